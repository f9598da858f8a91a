"""Problems, from files and downloads; the prompts that a model gets; and the checker of its answers."""
import json
import math
import runpy
import sys
import traceback
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from reward import extract_answer, math_reward
from support.errors import fail, warn

TINY = Path(__file__).resolve().parent.parent / "tiny"
EMBEDDED = {TINY: "math", TINY / "stack": f"{TINY / 'stack_machine.py'}:program_reward"}    # model folder: reward
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
LONGEST_GOLD = 200    # characters of an answer, above which a model is hardly meant to give it
GITHUB = "https://raw.githubusercontent.com"
QWEN_MATH = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
TABLE_2 = {   # benchmark: (URL of a fixed commit, SHA-256 of the file), in the paper's order
    "aime24": (f"{QWEN_MATH}/aime24/test.jsonl", "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac"),
    "amc23": (f"{QWEN_MATH}/amc23/test.jsonl", "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4"),
    "math500": (f"{GITHUB}/rasbt/reasoning-from-scratch/f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958/ch03/"
                "01_main-chapter-code/math500_test.json",
                "a9eccff7e25ecaf3952614e5b92fe081b4f0549c68ae6a387b96e131df9ddf41"),
    "minerva": (f"{QWEN_MATH}/minerva_math/test.jsonl",
                "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2"),
    "olympiadbench": (f"{QWEN_MATH}/olympiadbench/test.jsonl",
                      "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416")}
BENCHMARKS = TABLE_2 | {
    "gsm8k": (f"{GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")}
TRAINING_SETS = {
    "math": (f"{GITHUB}/rasbt/math_full_minus_math500/1636438eae81f1a7179de613f1c4aa52782b3a18/"
             "math_full_minus_math500.json", None),
    "gsm8k": (f"{GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465")}


def download(name, url, sha256):
    """The file of a data set, fetched once into torch.hub's folder and kept only if it is whole."""
    path = Path(torch.hub.get_dir()) / "nthr" / f"{name}-{Path(url).name}"
    if not path.is_file():
        print(f"downloading {url}")
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
            if not read_rows(part):                                            # a cut connection raises nothing
                raise OSError("the file is empty")
            part.replace(path)
        except (OSError, HTTPException, RuntimeError, SystemExit) as error:
            fail(f"{name} is downloaded once, which failed ({str(error).removeprefix('error: ')}): try again, or put "
                 f"the file of {url} at {path}")
    return path


def read_rows(path):
    """[("line 1" or "item 1", value), ...] of a JSONL file or JSON list; exits with the line that cannot be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        fail(f"cannot read the data file {path}: {error} (data sets with a name: "
             f"{', '.join({**TRAINING_SETS, **BENCHMARKS})})")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fail(f"{path}, line {line}: expected UTF-8 text, got the byte 0x{error.object[error.start]:02x}")
    is_list, rows = text.lstrip().startswith("["), []
    for number, part in enumerate([text] if is_list else text.split("\n"), start=1):
        if part.strip():
            try:
                rows.append((f"line {number}", json.loads(part)))
            except (ValueError, RecursionError) as error:
                fail(f"{path}, line {number + getattr(error, 'lineno', 1) - 1}: not valid JSON (expected one list, or "
                     f"one object per line): {getattr(error, 'msg', error)}")
    return [(f"item {number}", row) for number, row in enumerate(rows[0][1], start=1)] if is_list else rows


def answer_text(value):
    """The text of an answer field: a list's texts and numbers joined by commas, 27.0 as "27", of GSM8K's what follows
    "####"; "" for what is no answer, such as null, or a list with null in it."""
    if isinstance(value, list):
        parts = ["" if isinstance(part, list) else answer_text(part) for part in value if part != ""]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, float) and not math.isfinite(value):                  # 1e999
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value).rpartition("####")[2].strip() if is_text else ""


def read_problem(row):
    """(problem, answer) of one row, "" for one that no field holds. Capital letters in names of fields do not matter.

    Fields: those of README.md, MATH, Minerva, OlympiadBench (final_answer), MAWPS (input, target), SVAMP and ASDiv
    (body and question). ASDiv writes a unit in brackets after the number: "9 (apples)"."""
    row = {name.lower(): value for name, value in row.items()} | row
    names = ["problem", "question"] + ["input"] * ("target" in row)            # elsewhere it is no whole problem
    problem = next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), "")
    answer = next(filter(None, (answer_text(row.get(name)) for name in ("answer", "final_answer", "target"))), None)
    if problem and isinstance(row.get("body"), str) and row["body"].strip():
        body, number = row["body"].strip(), (answer or "").partition("(")[0].strip()
        problem = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {problem.strip()}"
        with suppress(ValueError):                                             # "Yes (to both)"
            answer = number if math.isfinite(float(number.replace(",", ""))) else answer
    solution = row.get("solution")
    boxed = extract_answer("\n".join(map(str, solution)) if isinstance(solution, list) else solution)
    return problem, answer or boxed


def load_problems(source, named=TRAINING_SETS):
    r"""[{"problem": str, "answer": str}] from a JSON list or JSONL file, or a data set with a name, `named` first.

    The answer is a field of `read_problem`, else the last \boxed{} of `solution`. "math" holds levels 3-5. Warns of
    answers that look like whole solutions. Exits with the line or item that cannot be used."""
    known = {**TRAINING_SETS, **BENCHMARKS, **named}
    path = download(source, *known[source]) if source in known else Path(source)
    problems, long = [], []
    for place, row in read_rows(path):
        if not isinstance(row, dict):
            fail(f"{path}, {place}: expected an object with a problem and an answer, got {type(row).__name__}")
        problem, answer = read_problem(row)
        if not problem or not answer:
            missing = "text in `problem` or `question`" if not problem else (
                "text or a number in `answer` or `final_answer`, or a `solution` with a \\boxed answer")
            found = ", ".join(f"{name}: {str(value)[:40]}" for name, value in row.items())
            fail(f"{path}, {place}: expected {missing}, got {found[:300] or 'nothing'} (README.md, Your own task, says "
                 f"how to convert a file)")
        if source != "math" or row.get("level") in ("Level 3", "Level 4", "Level 5"):
            problems.append({"problem": problem, "answer": answer})
            long += [place] if len(answer) > LONGEST_GOLD or "\n" in answer else []
    if not problems:
        fail(f"{path} holds no problems")
    if long and source not in known:                                           # nobody would mend a benchmark
        warn(f"{len(long)} of {len(problems)} answers in {path} have several lines or over {LONGEST_GOLD} characters "
             f"(first {long[0]}): the reward compares with the whole text; expected the final answer alone")
    return problems


def load_eval_problems(sources, eval_size):
    """The first `eval_size` problems of each of `sources` (names and files with commas between them) by "benchmark".

    In the order of Table 2; files follow, in the order given. A source that is given twice counts once."""
    names, known = [source.strip() for source in sources.split(",")], [*BENCHMARKS, *TRAINING_SETS]
    if "" in names:
        fail(f"--eval-data {sources}: expected names or files separated by single commas")
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    return [{"benchmark": name, **row} for name in dict.fromkeys(names)
            for row in load_problems(name, BENCHMARKS)[:eval_size]]


def split_problems(source, eval_data, eval_size):
    """Training and evaluation problems. Without eval_data a tenth is held out for evaluation, at most eval_size."""
    problems = load_problems(source)
    if eval_data:
        return problems, load_eval_problems(eval_data, eval_size)
    if len(problems) < 2:
        fail(f"{source} has one problem only, so none can be held out for evaluation: pass --eval-data")
    held_out = max(1, min(eval_size, len(problems) // 10))
    shuffled = [problems[i] for i in np.random.default_rng(0).permutation(len(problems))]
    return shuffled[held_out:], [{"benchmark": source, **row} for row in shuffled[:held_out]]


def draw_questions(total, position, count, seed):
    """The numbers, below `total`, of the `count` questions after `position` draws: each epoch has its own order."""
    draws = [divmod(i, total) for i in range(position, position + count)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(total) for epoch in {epoch for epoch, _ in draws}}
    return [int(orders[epoch][i]) for epoch, i in draws]


def step_seed(seed, step, round_=0):
    """A seed for the sampling of one step, the same in a resumed run."""
    return int(np.random.SeedSequence([seed, step, round_]).generate_state(1)[0])


def encode_problems(tokenizer, problems, instruction=INSTRUCTION):
    """Token ids of each problem (a text) and the instruction: by the tokenizer's chat template, else a plain one."""
    questions = [f"{problem}\n{instruction}" if instruction else problem for problem in problems]
    if tokenizer.chat_template:                                                # one call takes half the time
        return tokenizer.apply_chat_template([[{"role": "user", "content": question}] for question in questions],
                                             add_generation_prompt=True, return_dict=False)
    return [tokenizer(f"Question: {question}\nAnswer:").input_ids for question in questions]


def encode_prompt(tokenizer, problem, instruction=INSTRUCTION):
    """`encode_problems` of one problem."""
    return encode_problems(tokenizer, [problem], instruction)[0]


def encode_prompts(problems, tokenizer, config, max_new_tokens, instruction=INSTRUCTION):
    """Token ids of each problem, followed by the instruction.

    Exits if a prompt is empty, or leaves no room for max_new_tokens in the context of the model's `config`."""
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    prompts = encode_problems(tokenizer, [row["problem"] for row in problems], instruction)
    longest = max(prompts, key=len)
    if not min(prompts, key=len):
        fail(f"the tokenizer of {tokenizer.name_or_path} makes no tokens of a problem: are its files complete?")
    if len(longest) + max_new_tokens > limit:
        problem = problems[prompts.index(longest)]["problem"]
        long = sum(len(prompt) + max_new_tokens > limit for prompt in prompts)
        fail(f"the prompt of problem {problem[:60]!r} takes {len(longest)} tokens; with --max-new-tokens "
             f"{max_new_tokens} that exceeds the model's context of {limit}: lower --max-new-tokens, or leave out the "
             f"{long} of {len(prompts)} problems that are too long")
    return prompts


@lru_cache
def run_file(file):
    """The names that a Python file of the user's defines. It can import what lies beside it."""
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(file)
    finally:
        sys.path.remove(folder)


def load_function(flag, source):
    """The function of FILE.py:FUNCTION, the value of this flag; one line if there is none."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        fail(f"{flag} must be a name that --help lists or FILE.py:FUNCTION, got {source}")
    try:
        function = run_file(file).get(name)
    except Exception as error:                                                 # whatever the file raises
        fail(f"{flag}: {file} cannot be run: {type(error).__name__}: {error}")
    if not callable(function):
        fail(f"{flag}: {file} defines no function {name}")
    return function


def load_reward(source):
    """The checker (response, answer) -> 1.0 if right, else 0.0: `math_reward` for "math", else from FILE.py:FUNCTION.

    NTHR needs right or wrong: the checker exits if a function of the user's returns anything but 0, 1, True, False."""
    if source == "math":
        return math_reward
    function = load_function("--reward", source)

    def reward(response, answer):
        value, number = function(response, answer), None
        with suppress(TypeError, ValueError, RuntimeError):                    # .item() of several numbers
            number = value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value
        if not isinstance(number, (bool, int, float)) or number not in (0, 1):
            fail(f"{source} returned {str(value)[:60]} for the response {shorten(response)} to the answer "
                 f"{shorten(answer)}, expected 1 or 0")
        return float(number)

    return reward


def check_reward(source, answer):
    r"""Call the reward with \boxed{answer} as response, before a model is loaded. Exits where it is called wrongly,
    warns where it finds no right answer."""
    reward, boxed = load_reward(source), f"\\boxed{{{answer}}}"
    expected = "expected a function (response, answer) -> 1 or 0"
    try:
        right = reward(boxed, answer)
    except Exception as error:                                                 # whatever the function raises
        lines = [f" in {file}, line {line}," for file, line, *_ in traceback.extract_tb(error.__traceback__)[2:]]
        fail(f"{source} raised {type(error).__name__}: {error}{''.join(lines[-1:])} for the response {shorten(boxed)} "
             f"to the answer {shorten(answer)}; {expected}")
    if not right:
        swapped = False
        with suppress(Exception, SystemExit):                                  # no user makes this call
            swapped = reward(answer, boxed)
        if swapped:
            fail(f"{source} finds {shorten(boxed)} right only with its arguments swapped: {expected}")
        with suppress(Exception, SystemExit):                                  # a reward that reads no box
            right = reward(answer, answer)
        if not right:
            warn(f"the reward {source} calls neither {shorten(boxed)} nor {shorten(answer)} right where "
                 f"{shorten(answer)} is the answer: check that it can return 1")


def shorten(text):
    """The end of a text, where an answer stands, in quotes."""
    return f'"{text if len(text) <= 80 else f"... {text[-76:]}"}"'
