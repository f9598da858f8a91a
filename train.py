"""Train a causal language model with GRPO + NTHR (Deng et al. 2025, arXiv 2505.18830) on one device.

python train.py                                     # embedded model, CPU, 2 minutes: greedy accuracy 54% -> 75%
python train.py --method grpo                       # the same without NTHR: an A/B with one flag
python train.py --model tiny/stack                  # a second embedded model: stack-machine programs
python train.py --model Qwen/Qwen2.5-0.5B           # App. 7.3's 0.5B settings on MATH levels 3-5, one GPU
python train.py --model my/folder --data my.jsonl   # any Hugging Face causal LM, any {"problem", "answer"} file
python train.py --resume runs/tiny-nthr-seed0       # continue a run that was stopped
python train.py --eval-only --model my/folder       # greedy accuracy on the five benchmarks of Table 2, no training
"""
import argparse
import hashlib
import json
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils import enable_progress_bars
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from grpo import (LOGITS_AT_ONCE, check_head, group_advantages, grpo_loss, likelihood_change, pos_only,
                  random_selection, response_logprobs, token_weights)
from nthr import nthr_advantages, nthr_eta
from reward import extract_answer, math_reward
from rollout import BUCKET, INSTRUCTION, PREFILL_TOKENS, check_cache, concatenate, encode_prompt, generate

# Shapes: Q questions, G responses each, B = Q·G rows (the G of a question consecutive), K kept questions, T tokens
RUNTIME = 0.6 * 2 ** 30    # bytes that Python and its libraries take on a CPU
MAX_TEXT = 1_000_000       # characters of a problem or an answer
TINY = Path(__file__).resolve().parent / "tiny"
MATH_URL = ("https://raw.githubusercontent.com/rasbt/math_full_minus_math500/"
            "1636438eae81f1a7179de613f1c4aa52782b3a18/math_full_minus_math500.json")
QWEN_MATH = ("https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/"
             "evaluation/data")
BENCHMARKS = {   # name: (URL of a fixed commit, problems), in the order of Table 2
    "aime24": (f"{QWEN_MATH}/aime24/test.jsonl", 30), "amc23": (f"{QWEN_MATH}/amc23/test.jsonl", 40),
    "math500": ("https://raw.githubusercontent.com/rasbt/reasoning-from-scratch/"
                "f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958/ch03/01_main-chapter-code/math500_test.json", 500),
    "minerva": (f"{QWEN_MATH}/minerva_math/test.jsonl", 272),
    "olympiadbench": (f"{QWEN_MATH}/olympiadbench/test.jsonl", 675)}
DOWNLOADS = BENCHMARKS | {"math": (MATH_URL, None)}    # one JSON list: it cannot be cut unnoticed
EMBEDDED = {TINY: "math", TINY / "stack": f"{TINY / 'stack_machine.py'}:program_reward"}    # folder: reward
DEFAULTS = {   # flag: (embedded model, real model = the paper's 0.5B settings, App. 7.3)
    "data": ("its train.jsonl", "math"), "reward": ("its own", "math"),
    "eval_data": ("its test.jsonl", "a tenth of --data, held out, or with --eval-only the five benchmarks"),
    "eval_size": (500, 200), "steps": (150, 105), "batch_size": (32, 32),
    "minibatch_size": (32, 16), "micro_batch_tokens": (2048, 16384), "lr": (1e-4, 5e-7),
    "max_new_tokens": (64, 2500), "kl_coef": (0.0, 1e-4), "max_sequences": (1024, 128), "eval_every": (50, 20),
    "save_every": (25, 5), "delta_every": (1, 10), "gradient_checkpointing": (False, True)}
MAY_CHANGE_ON_RESUME = ("steps", "eval_every", "save_every", "keep_checkpoints", "device", "out", "micro_batch_tokens",
                        "micro_batch_size", "max_sequences", "gradient_checkpointing")
LOWERS_MEMORY = {   # phase: what to do when it runs out of memory
    "loading": "choose a smaller --model, or leave the reference model out with --kl-coef 0",
    "data_generation": "lower --max-sequences", "evaluation": "lower --max-sequences",
    "old_probabilities": "lower --micro-batch-tokens (or, in a new run, --minibatch-size)",
    "nthr": "lower --micro-batch-tokens (or, in a new run, --minibatch-size)",
    "reference": "lower --micro-batch-tokens", "likelihood_change": "lower --micro-batch-tokens",
    "model_update": "lower --micro-batch-tokens, with --gradient-checkpointing"}
NOT_MEASURED = dict.fromkeys((
    "tau", "eta", "selected_share", "updates", "skipped_updates", "skipped_questions", "loss", "clip_share", "kl",
    "nll", "grad_norm", "ratio_deviation", "delta_mean", "delta_nonpositive_share", "eval_accuracy"))
# Of a run: steps done, place in the data, updates skipped in a row and their problems, whether the weights have moved
# since the last step that was logged (never so in a checkpoint), and a hash of the data.
START = {"step": 0, "position": 0, "nonfinite": 0, "offending": [], "moved": False, "data": None}


def printable(text):
    """`text` in one line, with all that a terminal would obey or hide (control characters, bidi marks) as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def clean(record):
    """A logging filter: transformers reports names that it finds in a model's files, and they may hold anything."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", record.getMessage()).expandtabs().split("\n")    # no colours
    record.msg, record.args = "\n".join(map(printable, lines)), ()
    return True


for transformers_handler in logging.getLogger("transformers").handlers:
    transformers_handler.addFilter(clean)


def fail(message):
    sys.exit(f"error: {printable(message)}")


def defaults_of(model):
    """{flag: default} for this --model: the embedded models bring their own data and reward."""
    folder = Path(model).resolve()
    values = {name: pair[folder not in EMBEDDED] for name, pair in DEFAULTS.items()}
    if folder in EMBEDDED:
        return values | {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl"),
                         "reward": EMBEDDED[folder]}
    return values | {"eval_data": None}


def adder(group):
    """group.add_argument that ends the help with the default, or with the two of `DEFAULTS`."""
    def add(flag, help, **options):
        default = options.get("default")
        if flag[2:].replace("-", "_") in DEFAULTS and "(default" not in help:
            default = "embedded model {}, real model {}".format(*DEFAULTS[flag[2:].replace("-", "_")])
        shown = "" if default is None or "(default" in help else f" (default: {default})"
        group.add_argument(flag, help=help + shown, **options)
    return add


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = adder(parser.add_argument_group("model and data"))
    add("--model", default=str(TINY), help="Hugging Face id or local folder (default: the embedded model in tiny/)")
    add("--data", help='JSON or JSONL file, or "math": MATH without MATH-500, levels 3-5')
    add("--eval-data", help=f"files or benchmarks ({', '.join(BENCHMARKS)}) for greedy evaluation, with commas "
        "between them; with --data alone, a tenth of it is held out")
    add("--reward", help='"math" (reward.py), or FILE.py:FUNCTION, called with the response and the answer, 1 if right')
    add("--eval-size", type=int, help="most problems per evaluation: the first of each file of --eval-data; with "
        "--eval-only all, unless the flag is given")
    add = adder(parser.add_argument_group("method (Eq. 7, Eq. 8, Algorithm 1)"))
    add("--method", default="nthr", choices=["nthr", "grpo", "pos-only", "random"], help="nthr: Algorithm 1; grpo: "
        "Eq. 1 alone; pos-only: no negative advantages (§3); random: as many random tokens as NTHR selects (§5.3)")
    add("--beta", type=float, default=1.0, help="β of the threshold τ (§5); --beta=-inf selects every negative token")
    add("--eta", default="2|0.5-p|", help='η of Algorithm 1: "2|0.5-p|", "p", "1-p" (Table 5) or a number in [0, 1]')
    add("--nthr-vocab", default="responses", choices=["responses", "all"], help="V*_x (App. 7.4), or Eq. 7 exactly")
    add = adder(parser.add_argument_group("sampling (§2, App. 7.3)"))
    add("--group-size", type=int, default=8, help="G, responses per question")
    add("--batch-size", type=int, help="questions per step")
    add("--max-new-tokens", type=int, help="longest response, in tokens")
    add("--temperature", type=float, default=1.0, help="π is softmax(logits / temperature) everywhere")
    add("--sampling-rounds", type=int, default=1, help="draw more questions up to this often until --batch-size groups "
        "have both right and wrong answers (dynamic sampling); groups without both are dropped in any case")
    add("--max-sequences", type=int, help="responses sampled together: bounds the KV cache")
    add = adder(parser.add_argument_group("objective and update (Eq. 1, App. 7.3, App. 7.8)"))
    add("--minibatch-size", type=int, help="questions per AdamW update: batch-size / minibatch-size updates a step")
    add("--micro-batch-tokens", type=int, help="most tokens per forward pass, padding included (a longer row goes "
        "alone): bounds memory")
    add("--micro-batch-size", type=int, default=256, help="most responses per forward pass")
    add("--lr", type=float, help="AdamW learning rate")
    add("--steps", type=int, help="sampling steps")
    add("--clip-eps", type=float, default=0.2, help="ε of Eq. 1")
    add("--kl-coef", type=float, help="weight of the KL penalty to the initial model (loaded a second time if > 0)")
    add("--nll-coef", type=float, default=0.0, help="weight of the NLL of correct responses (App. 7.8)")
    add("--max-grad-norm", type=float, default=1.0, help="gradient norm is clipped to this")
    add = adder(parser.add_argument_group("running"))
    add("--out", help="output folder (default: runs/MODEL-METHOD-seedSEED, or runs/MODEL-eval)")
    add("--eval-only", action="store_true", help="no training: evaluate --model, print a table like Table 2 and write "
        "answers.jsonl")
    add("--resume", nargs="?", const=True, help="continue the run in this folder (or in --out) with its own flags")
    add("--eval-every", type=int, help="steps between greedy evaluations (0: only first and last)")
    add("--save-every", type=int, help="steps between checkpoints (0: only first and last)")
    add("--keep-checkpoints", type=int, default=2, help="how many: the newest, and older ones as checkpoint-STEP")
    add("--delta-every", type=int, help="steps between measurements of Δ(x), Eq. 2: one more forward pass (0: never)")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="compute type, weights are float32 "
        "(default: auto, bfloat16 on a CUDA GPU)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations: less memory")
    return parser


def parse_args(argv=None):
    """Flags -> Namespace. Defaults depend on --model; --resume takes those that its run recorded in config.json."""
    parser, recorded = build_parser(), {}
    args = parser.parse_args(argv)
    parser.set_defaults(**defaults_of(args.model))
    if args.data:
        parser.set_defaults(eval_data=None)                                    # evaluate on the same kind of problems
    if args.eval_only:
        if args.resume:
            fail("--eval-only evaluates a model, not a run: pass --model FOLDER/checkpoint instead of --resume FOLDER")
        if args.data and not args.eval_data:
            fail(f"--eval-only does not read --data: pass --eval-data {args.data}")
        parser.set_defaults(eval_data=parser.get_default("eval_data") or ",".join(BENCHMARKS), eval_size=sys.maxsize)
    out = args.resume if isinstance(args.resume, str) else args.out
    folder = Path(args.model).resolve()
    name = folder.parent.name if args.eval_only and folder.name.startswith("checkpoint") else folder.name
    out = out or f"runs/{name}-" + ("eval" if args.eval_only else f"{args.method}-seed{args.seed}")
    if args.resume:
        recorded = recorded_flags(out, parser)
        reward = recorded["reward"]
        if is_a_users(reward) and args.reward is None:
            fail(f"--resume would run {reward}, which {out}/config.json names: add --reward {reward} if you trust it")
        parser.set_defaults(**recorded)
    args = parser.parse_args(argv)
    args.out = out
    for name in sorted(set(recorded) - set(MAY_CHANGE_ON_RESUME)):
        if str(getattr(args, name)) != str(recorded[name]):
            fail(f"--resume continues with the run's own flags, but --{name.replace('_', '-')} {getattr(args, name)} "
                 f"is not its {recorded[name]}: leave the flag out, or start a new run")
    if args.eval_only and (Path(out) / "answers.jsonl").exists():
        fail(f"{out}/answers.jsonl holds the answers of an earlier evaluation: move it away, or choose another --out")
    if not args.resume and not args.eval_only and (checkpoints(out) or (Path(out) / "metrics.jsonl").exists()):
        fail(f"{args.out} already holds a run: continue it with {resume(args)}, or choose another --out")
    try:
        check(args)
    except TypeError as error:
        if not args.resume:
            raise
        fail(f"--resume: {out}/config.json is damaged: {error}")
    return args


def recorded_flags(out, parser):
    """{flag: value} from the config.json of a run, which must name every flag; one line if it cannot be used."""
    path = Path(out) / "config.json"
    if not path.is_file():
        fail(f"--resume: {out} holds no run (no config.json): name the run's folder, or start without --resume")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        missing = set(vars(parser.parse_args([]))) - {"resume"} - set(recorded)
    except (ValueError, TypeError) as error:
        fail(f"--resume: {path} is damaged ({error}): start a new run with --model {out}/checkpoint")
    if missing:
        fail(f"--resume: {path} lacks {', '.join(sorted(missing))}: start a new run with --model {out}/checkpoint")
    return {**recorded, "eval_only": False}


def check(args):
    """One line for flags that cannot work, before anything is loaded; settles device and dtype "auto"."""
    for names, expected, valid in (
            ("batch_size minibatch_size micro_batch_tokens micro_batch_size steps max_new_tokens sampling_rounds "
             "max_sequences eval_size keep_checkpoints",
             "at least 1", lambda value: value >= 1),
            ("group_size", "at least 2, because advantages compare responses", lambda value: value >= 2),
            ("kl_coef nll_coef eval_every save_every delta_every seed", "0 or more, and finite",
             lambda value: 0 <= value < math.inf),
            ("lr temperature", "finite and above 0", lambda value: 0 < value < math.inf),
            ("clip_eps max_grad_norm", "above 0", lambda value: value > 0),
            ("beta", "a real number or -inf", lambda value: value < math.inf)):
        for name in names.split():
            if not valid(getattr(args, name)):
                fail(f"--{name.replace('_', '-')} must be {expected}, got {getattr(args, name)}")
    if args.batch_size % args.minibatch_size:
        fail(f"--batch-size {args.batch_size} must be a multiple of --minibatch-size {args.minibatch_size}")
    args.device = choose_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    load_reward(args.reward)
    try:
        nthr_eta(0.5, args.eta)
    except ValueError as error:
        fail(f"--eta {args.eta} cannot be used: {str(error).splitlines()[0][:200]}")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)                                     # what memory and time are measured on


def choose_device(name):
    """A --device with "auto" settled; one line if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0][:200]}")
    return name


def is_a_users(reward):
    """Whether this --reward is none of the project's own, but a file that would be run."""
    return reward not in ("math", *EMBEDDED.values())


@lru_cache
def run_file(file):
    """The names that a Python file of the user's defines."""
    try:
        return runpy.run_path(file)
    except Exception as error:                                                 # whatever the file raises
        fail(f"--reward: {file} cannot be run: {type(error).__name__}: {error}")


def load_reward(source):
    """The checker (response, answer) -> 1.0 if right, else 0.0: `math_reward` for "math", else from FILE.py:FUNCTION,
    which may also return an int or a bool; whatever is not 1 counts as wrong."""
    if source == "math":
        return math_reward
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        fail(f'--reward must be "math" or FILE.py:FUNCTION, got {source}')
    if not callable(run_file(file).get(name)):
        fail(f"--reward: {file} defines no function {name}")
    function = run_file(file)[name]
    return lambda response, answer: float(function(response, answer) == 1)


def download(name):
    """The file of a data set in `DOWNLOADS`: fetched once into torch.hub's folder, and kept only if it is whole."""
    url, expected = DOWNLOADS[name]
    path = Path(torch.hub.get_dir()) / "nthr" / Path(url.replace("/test.jsonl", ".jsonl")).name
    if not path.is_file():
        print(f"downloading {url}")
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(part))
            found = len(load_problems(str(part)))                              # a cut connection raises nothing
            if expected and found != expected:
                raise OSError(f"{found} problems came, not {expected}")
            part.replace(path)
        except (OSError, HTTPException, SystemExit) as error:
            reason = str(error).removeprefix("error: ")
            fail(f"{name} is downloaded once, which failed ({reason}): try again, or put the file of {url} at {path}")
    return path


def json_rows(path, data):
    """[("item 1" or "line 1", value), ...] from the bytes of a JSON list or JSONL file; exits with the line at fault.

    Strict: UTF-8, no NaN or Infinity, and no key twice in an object, where one of the values would be lost."""
    def refuse(line, reason):
        fail(f"{path}, line {line}: {reason}")

    def unique(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice[:60]!r} comes twice in an object")
        return row

    def no_constant(name):
        raise ValueError(f"{name} is no number of JSON")

    def skip(text, position):
        return blanks.match(text, position).end()

    def parse(text, position, line):
        """The value at this position of a text that begins on this line, and where the next thing begins."""
        position = skip(text, position)
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:                          # ValueError: bad JSON, huge integers
            refuse(line + text.count("\n", 0, getattr(error, "pos", position)), "not valid JSON (expected one list, or "
                   f"one object per line): {getattr(error, 'msg', error)}")
        return value, skip(text, end)

    decoder, blanks = json.JSONDecoder(object_pairs_hook=unique, parse_constant=no_constant), re.compile("[ \t\n]*")
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(error.object.count(b"\n", 0, error.start) + 1, f"byte 0x{error.object[error.start]:02x} is no UTF-8, as "
               "is expected: save the file as UTF-8")
    if "\0" in text:
        refuse(text.count("\n", 0, text.index("\0")) + 1, "a NUL character, expected UTF-8 text: is the file UTF-16?")
    rows = []
    if text.lstrip().startswith("["):
        position, mark = skip(text, text.index("[") + 1), ","
        if text.startswith("]", position):
            position, mark = position + 1, "]"
        while mark == ",":
            value, position = parse(text, position, 1)
            rows.append((f"item {len(rows) + 1}", value))
            mark = text[position:position + 1]
            if mark not in (",", "]"):
                refuse(text.count("\n", 0, position) + 1, "not valid JSON: expected a comma or ] after the list's item")
            position += 1
        if text[position:].strip():
            refuse(text.count("\n", 0, skip(text, position)) + 1, "not valid JSON: more text after the end of the list")
        return rows
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, end = parse(line, 0, number)
            rows.append((f"line {number}", value))
            if end < len(line):
                refuse(number, "not valid JSON: more text after the object of this line")
    return rows


def load_problems(source):
    r"""[{"problem": str, "answer": str}] from a JSON list or JSONL file, or a name in `DOWNLOADS` ("math": levels 3-5).

    problem: the field `problem` or `question`. answer: `answer`, else `final_answer` (text, a number or a list),
    else the last \boxed{} of `solution`. Exits with the line or item that cannot be used."""
    path = download(source) if source in DOWNLOADS else Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        fail(f"cannot read the data file {path}: {error} (data sets with a name: {', '.join(DOWNLOADS)})")
    problems = []
    for where, row in json_rows(path, data):
        if not isinstance(row, dict):
            fail(f"{path}, {where}: expected an object with a problem and an answer, got {type(row).__name__}")
        problem = row.get("problem") or row.get("question")
        if not isinstance(problem, str) or not problem.strip():
            fail(f"{path}, {where}: expected text in `problem` or `question`")
        answer = (answer_text(row.get("answer")) or answer_text(row.get("final_answer"))
                  or extract_answer(answer_text(row.get("solution"))))
        if not answer:
            fail(f"{path}, {where}: expected an `answer`, a `final_answer`, or a `solution` with a \\boxed answer")
        for name, text in (("problem", problem), ("answer", answer)):
            if len(text) > MAX_TEXT:
                fail(f"{path}, {where}: the {name} has {len(text)} characters, expected at most {MAX_TEXT}")
            if re.search("[\ud800-\udfff]", text):                             # which no tokenizer can encode
                fail(f"{path}, {where}: the {name} has half of a surrogate pair, expected whole characters")
        if source != "math" or row.get("level") in ("Level 3", "Level 4", "Level 5"):
            problems.append({"problem": problem, "answer": answer})
    if not problems:
        fail(f"{path} holds no problems")
    return problems


def answer_text(value):
    """The text of an answer field: a list's texts and numbers joined by commas, 27.0 as "27", "" for what is no answer.

    A list with anything else in it, such as null or a list, is none: it would lose a part."""
    if isinstance(value, list):
        parts = ["" if isinstance(part, list) else answer_text(part) for part in value if part != ""]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, float) and not math.isfinite(value):                  # 1e999
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def load_eval_data(args):
    """The first --eval-size problems of each source in --eval-data, which becomes their "benchmark".

    In the order of Table 2; files follow, in the order given. A source that is given twice counts once."""
    sources, known = [source.strip() for source in args.eval_data.split(",")], list(DOWNLOADS)
    if "" in sources:
        fail(f"--eval-data {args.eval_data}: expected names or files separated by single commas")
    sources.sort(key=lambda source: known.index(source) if source in known else len(known))
    return [{"benchmark": source, **row} for source in dict.fromkeys(sources)
            for row in load_problems(source)[:args.eval_size]]


def load_data(args):
    """Training and evaluation problems. Without --eval-data a tenth of --data is held out, at most --eval-size.

    The "id" of a training problem is its number in --data, from 1."""
    problems = [{"id": number, **row} for number, row in enumerate(load_problems(args.data), start=1)]
    if args.eval_data:
        return problems, load_eval_data(args)
    if len(problems) < 2:
        fail(f"{args.data} has one problem only, so none can be held out for evaluation: pass --eval-data")
    held_out = max(1, min(args.eval_size, len(problems) // 10))
    shuffled = [problems[i] for i in np.random.default_rng(0).permutation(len(problems))]
    return shuffled[held_out:], [{"benchmark": args.data, **row} for row in shuffled[:held_out]]


class OutOfMemory(Exception):
    pass


@contextmanager
def memory_for(phase):
    """Turn the device's running out of memory into an `OutOfMemory` that says where, and which flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:                               # only CUDA's allocator has its own class
        known = ("out of memory", "allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in known):
            raise
        raise OutOfMemory(f"out of memory in {phase}: {LOWERS_MEMORY[phase]}") from None


def load(auto_class, name, **options):
    """from_pretrained of a Hugging Face id or folder, or one line; no code that comes with a model is run."""
    transformers_logging.disable_progress_bar()                                # of weights read from disk,
    enable_progress_bars()                                                     # but not of downloads
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)               # its retries are not news, their end is
    try:
        with memory_for("loading"):
            return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except OutOfMemory:
        raise
    except Exception as error:                                                 # whatever a stranger's files can raise
        fail(f"cannot load the model {name}: {' '.join(str(error).split())[:300]} (expected a Hugging Face id, or a "
             f"folder with config.json, safetensors weights and a tokenizer)")


def load_config(name):
    """The model's configuration without dropout, which would part π_θ from π_old; one line if it is of no use."""
    config = load(AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
            if "implementation" in key and "/" in str(value):
                fail(f"{name} asks for code from the Hub ({value}), which is not run: remove it from its config.json")
    try:
        check_cache(config)
    except ValueError as error:
        fail(f"{name}: {error}")
    return config


def load_model(name, device, dtype=torch.float32):
    """The model on its device, in eval mode; one line unless its logits are those of lm_head, as Eq. 7 needs."""
    pickled = [path.name for end in ("bin", "pt", "pth", "ckpt") for path in sorted(Path(name).glob(f"*.{end}"))]
    if pickled and not any(Path(name).glob("*.safetensors")):
        fail(f"{name} holds pickled weights only ({pickled[0]}), and loading a pickle can run any code: convert them "
             f"to safetensors, or use a model that comes with them")
    model, report = load(AutoModelForCausalLM, name, config=load_config(name), dtype=dtype, use_safetensors=True,
                         output_loading_info=True)
    if report["missing_keys"]:                                                 # they would be random numbers
        fail(f"{name} has no weights for {', '.join(sorted(report['missing_keys']))[:200]}: are its files complete?")
    try:
        check_head(model)
        with memory_for("loading"), torch.no_grad():
            model.to(device).eval()
            ids = torch.arange(3, device=device)[None]
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits, own = model(input_ids=ids, use_cache=False).logits, model.get_output_embeddings()(states)
        if not torch.allclose(logits, own, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError("its logits are not lm_head(base_model(ids)): choose another model")
    except (ValueError, AttributeError) as error:
        fail(f"{name}: {error}")
    return model


def load_policy(source, args):
    """(the model to train, the frozen reference model or None without --kl-coef, AdamW)."""
    model = load_model(source, args.device)
    if args.method in ("nthr", "random") and getattr(model.get_output_embeddings(), "bias", None) is not None:
        fail(f"{args.model} adds a bias to its logits; Eq. 7 needs softmax(W h): choose another model or --method grpo")
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # old name
        enable({"use_reentrant": False})
    reference = load_model(args.model, args.device, getattr(torch, args.dtype)) if args.kl_coef else None
    fused = args.device.startswith(("cpu", "cuda"))                            # one pass, no copies of the weights
    return model, reference, torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                               fused=fused)


def encode_prompts(problems, tokenizer, config, max_new_tokens, reward="math"):
    """Token ids of each problem, with the instruction to box the answer if that is what the reward reads."""
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    prompts = [encode_prompt(tokenizer, row["problem"], INSTRUCTION if reward == "math" else "") for row in problems]
    longest = max(prompts, key=len)
    if not min(prompts, key=len):
        fail(f"the tokenizer of {tokenizer.name_or_path} makes no tokens of a problem: are its files complete?")
    if len(longest) + max_new_tokens > limit:
        problem = problems[prompts.index(longest)]["problem"]
        fail(f"the prompt of problem {problem[:60]!r} takes {len(longest)} tokens; with --max-new-tokens "
             f"{max_new_tokens} that exceeds the model's context of {limit}: lower it or leave the problem out")
    return prompts


def precision(args):
    """Compute in args.dtype; the weights stay float32, so that AdamW's small updates are not rounded away."""
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")


class Timer(dict):
    """Seconds by phase, under the names of the paper's Table 3."""

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        with memory_for(phase):
            yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - start


def step_seed(args, step, round_=0):
    """A seed for the sampling of one step, the same in a resumed run."""
    return int(np.random.SeedSequence([args.seed, step, round_]).generate_state(1)[0])


def group_rows(groups, group_size):
    """The rows of these groups: (K,) -> (K · G,)."""
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def minibatches(groups, args):
    """The rows of each AdamW update of a step that kept so many groups: a list of LongTensors, whole groups each."""
    parts = torch.arange(groups).tensor_split(args.batch_size // args.minibatch_size)
    return [group_rows(part, args.group_size) for part in parts if len(part)]


def micro_batches(rollout, rows, args):
    """`rows`, a LongTensor, in parts for one forward pass: at most --micro-batch-tokens, padding included.

    Rows are sorted by response length, so that little is padding; one that exceeds the budget goes alone. π_old and
    π_θ come from the same parts: other shapes round differently, which in bfloat16 would move the ratio off 1."""
    prompts, responses = rollout.prompt_mask.sum(1).tolist(), rollout.response_mask.sum(1).tolist()
    parts, P, T = [], 0, 0
    for row in sorted(rows.tolist(), key=responses.__getitem__):
        P, T = max(P, prompts[row]), max(T, responses[row])
        n = len(parts[-1]) + 1 if parts else math.inf
        if n * (P + T) > args.micro_batch_tokens or n > args.micro_batch_size:
            parts.append([])
            P, T = prompts[row], responses[row]
        parts[-1].append(row)
    return [torch.tensor(part) for part in parts]


def sample_groups(model, tokenizer, problems, prompts, args, step, position):
    """Sample and reward G responses to each of the next questions; drop groups that are all right or all wrong.

    Returns the rollout of the K kept groups, rewards (K, G), metrics of all samples (and the indices "kept" of the
    questions of those groups), and the next data position."""
    rollouts, rewards, asked, reward = [], [], [], load_reward(args.reward)
    for round_ in range(args.sampling_rounds):                                 # dynamic sampling (App. 7.3)
        draws = [divmod(i, len(problems)) for i in range(position, position + args.batch_size)]
        position += args.batch_size
        orders = {epoch: np.random.default_rng([args.seed, epoch]).permutation(len(problems))
                  for epoch in {epoch for epoch, _ in draws}}
        questions = [int(orders[epoch][i]) for epoch, i in draws]
        asked += questions
        with precision(args):
            rollouts.append(generate(model, tokenizer, [prompts[q] for q in questions], args.group_size,
                                     args.max_new_tokens, args.temperature, step_seed(args, step, round_),
                                     args.max_sequences))
        golds = [problems[q]["answer"] for q in questions for _ in range(args.group_size)]
        rewards += map(reward, rollouts[-1].texts, golds)
        grouped = torch.tensor(rewards).view(-1, args.group_size)              # (Q, G)
        mixed = (grouped.amax(1) != grouped.amin(1)).nonzero()[:args.batch_size, 0]
        if len(mixed) == args.batch_size:
            break
    rollout = concatenate(rollouts)
    lengths = rollout.response_mask.sum(1)
    metrics = {"questions": len(grouped), "groups_kept": len(mixed), "kept": [asked[k] for k in mixed.tolist()],
               "success_rate": grouped.mean().item(),
               "response_length": lengths.float().mean().item(), "tokens": int(lengths.sum()),
               "truncated_share": 1 - rollout.finished.float().mean().item()}
    return rollout.select(group_rows(mixed, args.group_size)), grouped[mixed], metrics, position


def policy_logprobs(model, rollout, rows, args, return_hidden=False):
    """`response_logprobs` of these rows in one forward pass: (b, t), t the longest of these responses."""
    ids, attention_mask, prompt_length = rollout.inputs(rows)
    with precision(args):
        return response_logprobs(model, ids, attention_mask, prompt_length, args.temperature, return_hidden)


@torch.no_grad()
def old_policy_pass(model, reference, rollout, rewards, args, step, timer):
    """ONE no-grad pass over each mini-batch: ln π_old, and from the same hidden states the method's advantages.

    Returns old_logprobs, ref_logprobs (or None) and advantages, all (B, T), and NTHR's metrics."""
    correct, mask = rewards.flatten().to(args.device) == 1, rollout.response_mask                  # (B,), (B, T)
    advantages = group_advantages(rewards).to(args.device).view(-1, 1).repeat(1, mask.shape[1])
    old, ref = torch.zeros_like(advantages), torch.zeros_like(advantages) if reference else None
    lm_head, generator, stats = model.get_output_embeddings().weight, torch.Generator(), []
    generator.manual_seed(step_seed(args, step, args.sampling_rounds))         # no round of sampling has this seed
    scored = args.method in ("nthr", "random")
    for rows in minibatches(len(rewards), args):
        first, hidden = int(rows[0]), None                                     # the states of the mini-batch, (b, T, d)
        for micro in micro_batches(rollout, rows, args):
            with timer("old_probabilities"):
                logprobs, states = policy_logprobs(model, rollout, micro, args, return_hidden=True)
                t = logprobs.shape[1]
                old[micro, :t] = logprobs
                if scored and hidden is None:
                    shape = (len(rows), mask.shape[1], states.shape[2])
                    hidden = states.new_zeros(shape, dtype=getattr(torch, args.dtype))
                if scored:
                    hidden[micro - first, :t] = states.to(hidden.dtype)
            if reference:
                with timer("reference"):
                    ref[micro, :t] = policy_logprobs(reference, rollout, micro, args)
        if scored:
            with timer("nthr"):
                for group in rows.split(args.group_size):
                    t = max(1, int(mask[group].sum(1).max()))
                    A, m = advantages[group, :t], mask[group, :t]
                    try:
                        result = nthr_advantages(
                            A, hidden[group - first, :t], rollout.response_ids[group, :t], m, correct[group], lm_head,
                            logprobs=old[group, :t], beta=args.beta, eta=args.eta, vocabulary=args.nthr_vocab,
                            temperature=args.temperature)
                    except ValueError as error:                                # of numbers: the rest fits
                        raise FloatingPointError(f"NTHR cannot score the answers of step {step}, which --dtype float32 "
                                                 f"or a higher --temperature may mend: {error}") from None
                    advantages[group, :t] = result.advantages
                    if args.method == "random":
                        chosen = random_selection(result.selected, m, correct[group], generator)
                        advantages[group, :t] = torch.where(chosen, result.eta * A, A)
                    stats.append((result.tau.item(), result.eta, result.selected.sum().item()))
    if args.method == "pos-only":
        advantages = pos_only(advantages)
    if not stats:
        return old, ref, advantages, {}
    tau, eta, selected = np.array(stats).T
    return old, ref, advantages, {"tau": tau.mean(), "eta": eta.mean(),
                                  "selected_share": selected.sum() / max(1, mask[~correct].sum().item())}


def update(model, optimizer, rollout, rewards, old, ref, advantages, args, state):
    """Ascend Eq. 1 by AdamW, one update per mini-batch of questions. Returns metrics, means over the updates made.

    An update with a non-finite loss or gradient is skipped; state["nonfinite"] counts how many in a row. "skipped" has
    the groups, of K, of each: those with a part in a non-finite loss, else all of the update. state["moved"] becomes
    True with the first update that is made."""
    correct, mask = rewards.flatten().to(args.device) == 1, rollout.response_mask
    model.train(args.gradient_checkpointing)                                   # recomputation works in train mode only
    done, skipped, deviation = [], [], torch.zeros((), device=mask.device)
    for number, rows in enumerate(minibatches(len(rewards), args)):
        weights, totals, suspects = torch.zeros(len(mask), device=mask.device), {}, []
        weights[rows] = token_weights(mask[rows], args.group_size)
        for micro in micro_batches(rollout, rows, args):
            logprobs = policy_logprobs(model, rollout, micro, args)
            t = logprobs.shape[1]
            loss, metrics = grpo_loss(
                logprobs, old[micro, :t], advantages[micro, :t], mask[micro, :t], args.group_size, args.clip_eps,
                None if ref is None else ref[micro, :t], args.kl_coef, args.nll_coef, correct[micro], weights[micro])
            loss.backward()
            totals = {name: totals.get(name, 0.0) + value.item() for name, value in metrics.items()}
            suspects += [] if metrics["loss"].isfinite() else (micro // args.group_size).tolist()
            if number == 0:                                                    # nothing has moved yet: γ should be 1
                deviation = torch.maximum(deviation, torch.expm1(logprobs.detach() - old[micro, :t]).abs().max())
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        if math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"]):
            state["moved"] = True                                              # before it begins: it may be cut short
            optimizer.step()
            done.append(totals)
            state["nonfinite"] = 0
        else:
            state["nonfinite"] += 1
            skipped.append(sorted(set(suspects or (rows // args.group_size).tolist())))
            tqdm.write(f"update skipped: loss {totals['loss']}, gradient norm {totals['grad_norm']}")
        optimizer.zero_grad(set_to_none=True)
        if state["nonfinite"] == 3:
            break
    model.eval()
    means = {name: sum(totals[name] for totals in done) / len(done) for name in done[0]} if done else {}
    return {"updates": len(done), "skipped": skipped, "ratio_deviation": deviation.item(), **means}


@torch.no_grad()
def step_likelihood_change(model, rollout, rewards, old, args):
    """Δ(x) of Eq. 2 for each kept question, in nats: {"delta_mean", "delta_nonpositive_share"}.

    Here θ' is the policy after the whole step, all questions together; §4 updates on one question alone."""
    correct = rewards.to(args.device) == 1                                     # (K, G)
    new = old.clone()
    for rows in micro_batches(rollout, correct.flatten().nonzero()[:, 0], args):
        logprobs = policy_logprobs(model, rollout, rows, args)                 # only the correct responses matter
        new[rows, :logprobs.shape[1]] = logprobs
    new, old, mask = (x.view(*correct.shape, -1) for x in (new, old, rollout.response_mask))       # (K, G, T)
    delta = torch.stack([likelihood_change(*group) for group in zip(new, old, mask, correct)])
    return {"delta_mean": delta.mean().item(), "delta_nonpositive_share": (delta <= 0).float().mean().item()}


def estimate_memory(config, args, prompt_length):
    """Bytes at the peak, from the shapes, if every response took --max-new-tokens: ({part: bytes}, {phase: bytes}).

    "activations" is what a decoder layer with a gated MLP saves for its backward pass: of one layer at a time, plus
    each layer's input, with gradient checkpointing. "head" is `grpo.LOGITS_AT_ONCE`, twice in float32, and the gradient
    of the head before it is added to that of the embeddings, which mostly are the same tensor."""
    with torch.device("meta"):                                                 # shapes without memory
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    text = config.get_text_config()
    layers, d, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or d // heads
    kv = 2 * size * (getattr(text, "num_key_value_heads", None) or heads)
    inner = getattr(text, "intermediate_size", None) or 4 * d
    half, compute = args.dtype == "bfloat16", 2 if args.dtype == "bfloat16" else 4
    length = prompt_length + args.max_new_tokens
    slots = min(args.max_sequences, max(args.batch_size * args.group_size, args.eval_size))
    rows = args.minibatch_size * args.group_size
    tokens = min(rows * length, max(args.micro_batch_tokens, length))
    prompts = min(slots * prompt_length, max(PREFILL_TOKENS, prompt_length))   # tokens of prompts in one pass
    # saved per token: six float32 tensors of the two norms, the projections and rotations, gate, up and their product
    per_token = 24 * d + compute * (2 * d + 4 * heads * size + 2 * kv + 4 * inner)
    layer, trains = tokens * per_token, not args.eval_only
    parts = {
        "weights": 4 * parameters, "gradients": 4 * parameters * trains, "AdamW": 8 * parameters * trains,
        "reference": compute * parameters if args.kl_coef and trains else 0,
        "bfloat16 copy": 2 * parameters if half else 0,                        # what autocast keeps while it is entered
        "KV cache": slots * (length + BUCKET) * layers * kv * compute, "sampling logits": slots * text.vocab_size * 16,
        "prefill": prompts * (per_token + 4 * layers * kv),
        "hidden states": rows * args.max_new_tokens * d * compute if args.method in ("nthr", "random") else 0,
        "activations": layer + tokens * layers * d * 4 if args.gradient_checkpointing else layer * layers,
        "head": 8 * min(LOGITS_AT_ONCE, tokens * text.vocab_size) + 4 * text.vocab_size * d}
    kept = parts["weights"] + parts["AdamW"] + parts["reference"] + parts["bfloat16 copy"]
    kept += 0 if args.device.startswith("cuda") else RUNTIME
    sampling = {"sampling": kept + parts["KV cache"] + parts["prefill"] + parts["sampling logits"]}
    if args.eval_only:
        return parts, sampling
    return parts, sampling | {"old probabilities": kept + parts["hidden states"] + layer + parts["head"],
                              "update": kept + parts["gradients"] + parts["activations"] + parts["head"]}


def device_memory(device):
    """Bytes of the device, or None where that is not known."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device == "cpu" else None
    except (AttributeError, ValueError):                                       # Windows
        return None


def announce_memory(config, args, prompt_length):
    """Print the estimated peak of each phase; warn if one exceeds the device."""
    try:
        phases, available = estimate_memory(config, args, prompt_length)[1], device_memory(args.device)
    except Exception:                                                          # loading it will say what is wrong
        return print("memory: no estimate for a model of this kind")
    shown = ", ".join(f"{need / 2 ** 30:.1f} GiB in {phase}" for phase, need in phases.items())
    print(f"memory, estimated for responses of {args.max_new_tokens} tokens: {shown}")
    if available and max(phases.values()) > available:
        print(f"warning: {args.device} has {available / 2 ** 30:.1f} GiB; lower --max-sequences (sampling) or "
              f"--micro-batch-tokens (update), or leave out the reference model (--kl-coef 0)", file=sys.stderr)


def peak_memory():
    """Peak GiB so far: of the GPU's allocator if one is in use, else resident; None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def greedy_answers(model, tokenizer, problems, prompts, args):
    """The rows of `problems`, in their order, each with its greedy "response", "reward" and "finished"."""
    with precision(args):                                                      # generate sorts them by length
        rollout = generate(model, tokenizer, prompts, 1, args.max_new_tokens, 0.0, max_sequences=args.max_sequences)
    checker = load_reward(args.reward)
    return [{**row, "response": text, "reward": checker(text, row["answer"]), "finished": finished}
            for row, text, finished in zip(problems, rollout.texts, rollout.finished.tolist())]


def by_benchmark(answers, field):
    """{benchmark: the values of a field of its answers}, in the order of the answers."""
    values = {}
    for row in answers:
        values.setdefault(row["benchmark"], []).append(row[field])
    return values


def average_accuracy(answers):
    """The share of right answers by benchmark, and the mean of these shares, whatever the benchmarks' sizes."""
    accuracy = {name: sum(rewards) / len(rewards) for name, rewards in by_benchmark(answers, "reward").items()}
    return accuracy, sum(accuracy.values()) / len(accuracy)


def evaluate(model, tokenizer, problems, prompts, args, step):
    """Greedy accuracy: {"eval_accuracy"}, the mean over the benchmarks, and with several also "eval_by_benchmark".

    Printed, too; the first five answers go to samples.jsonl."""
    answers = greedy_answers(model, tokenizer, problems, prompts, args)
    append(args, "samples.jsonl", [{"step": step, **row} for row in answers[:5]])
    accuracy, average = average_accuracy(answers)
    each = f" ({', '.join(f'{name} {share:.1%}' for name, share in accuracy.items())})" if len(accuracy) > 1 else ""
    tqdm.write(printable(f"step {step}: greedy accuracy {average:.1%} on {len(answers)} problems{each}"))
    return {"eval_accuracy": average} | ({"eval_by_benchmark": accuracy} if each else {})


def accuracy_table(answers):
    """Lines of text: a row per benchmark and the average, in percent with one and with two decimals as in Table 2.

    The average is that of the rounded rows, as the paper's are (all multiples of 0.02), each with the same weight."""
    finished = by_benchmark(answers, "finished")
    rows = [(printable(name), len(finished[name]), f"{100 * share:.1f}", finished[name].count(False))
            for name, share in average_accuracy(answers)[0].items()]
    average = sum(float(row[2]) for row in rows) / len(rows)
    rows.append(("average", len(answers), f"{average:.2f}", sum(row[3] for row in rows)))
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {problems:>8}  {percent:>10}  {truncated:>9}" for name, problems, percent, truncated in
            [("benchmark", "problems", "accuracy %", "truncated"), *rows]]


def evaluate_only(args):
    """Greedy answers of --model to all of --eval-data: a table, and answers.jsonl in args.out."""
    tokenizer = load(AutoTokenizer, args.model)                                # first: a misspelt id is found at once
    problems, config = load_eval_data(args), load_config(args.model)
    prompts = encode_prompts(problems, tokenizer, config, args.max_new_tokens, args.reward)
    announce_memory(config, args, max(map(len, prompts)))
    model = load_model(args.model, args.device)
    temporary, final = (Path(args.out) / name for name in ("answers.tmp", "answers.jsonl"))
    answers = []
    for name in dict.fromkeys(row["benchmark"] for row in problems):           # one at a time: what is done is written
        rows = [i for i, row in enumerate(problems) if row["benchmark"] == name]
        with memory_for("evaluation"):
            answers += greedy_answers(model, tokenizer, [problems[i] for i in rows], [prompts[i] for i in rows], args)
        with writing(temporary, args):
            temporary.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    temporary.replace(final)
    print(*accuracy_table(answers), f"all answers are in {final}", sep="\n")


def resume(args):
    """The command that continues the run. A --reward file is code, which is not run because config.json says so."""
    reward = f" --reward {shlex.quote(args.reward)}" if is_a_users(args.reward) else ""
    return f"python train.py --resume {shlex.quote(str(args.out))}{reward}"


@contextmanager
def writing(path, args):
    """One line if a file of the output folder cannot be written, as on a full disk."""
    try:
        yield
    except Exception as error:                                                 # torch.save, safetensors have their own
        while error.__context__:                                               # the first cause is the clearest
            error = error.__context__
        begun = not args.eval_only and (Path(args.out) / "config.json").exists()
        fail(f"cannot write {path}: {' '.join(str(error).split())[:200]}: put that right (is the disk full?), then "
             f"{'continue with ' + resume(args) if begun else 'start again'}")


def append(args, name, rows):
    """Append JSON lines to a file of the output folder; a non-finite number becomes null, which JSON can hold.

    They are on the disk when it returns, and so before any checkpoint of their step."""
    path = Path(args.out) / name
    with writing(path, args), open(path, "a", encoding="utf-8") as file:
        for row in rows:
            row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                   for key, value in row.items()}
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace(path, text):
    """Replace a text file by another that is already whole on the disk."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():                                                  # of which Windows and some disks of a
            raise                                                              # network are not capable


@contextmanager
def claimed(out):
    """Hold the output folder, so that a second process that would write to it ends with one line.

    The lock ends with the process, however that dies. A folder in which nothing was written is not left behind."""
    out = Path(out)
    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another process is writing to {out}: wait until it has ended, or choose another --out")
    except OSError as error:
        fail(f"--out {out} cannot be used as a folder: {error}")
    try:
        yield
    finally:
        with suppress(OSError):
            (out / ".lock").unlink()
            out.rmdir()                                                        # fails unless it is empty
        lock.release()


def checkpoints(out):
    """The checkpoints of an output folder, newest first: "checkpoint", then each "checkpoint-STEP"."""
    newest = Path(out) / "checkpoint"
    older = [path for path in Path(out).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return [newest] * newest.is_dir() + sorted(older, key=lambda path: int(path.name[11:]), reverse=True)


def manifest(checkpoint):
    """What `save_checkpoint` wrote about a checkpoint: "step", "flags" and "files", {name: hash}."""
    return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(checkpoint, args):
    """Why a run with these flags cannot go on from this checkpoint, or None if it can."""
    name = "manifest.json"
    try:
        content = manifest(checkpoint)
        there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        for name in sorted(there - {"manifest.json"} ^ set(content["files"])):
            return f"its {name} is missing" if name not in there else f"its {name} was not saved with it"
        for name, digest in content["files"].items():
            if sha256(checkpoint / name) != digest:
                return f"its {name} is not the file that was saved"
        for name, value in content["flags"].items():
            if name not in MAY_CHANGE_ON_RESUME and str(value) != str(getattr(args, name, None)):
                return f"it is of a run with --{name.replace('_', '-')} {value}, not {getattr(args, name, None)}"
    except OSError as error:
        return f"its {name} cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its manifest.json is damaged: {error!r}"


def find_checkpoint(args):
    """The newest checkpoint of the run in args.out, or None if it was stopped before its first.

    One line if that one cannot be used, with the newest that can."""
    found = checkpoints(args.out)
    if not found and (Path(args.out) / "metrics.jsonl").exists():
        fail(f"{args.out} has metrics, but no checkpoint is left to continue from: choose another --out")
    wrong = fault(found[0], args) if found else None
    if wrong:
        intact = next((path for path in found[1:] if not fault(path, args)), None)
        advice = "no older one is intact: start a new run with another --out"
        if intact:
            damaged = " and ".join(map(str, found[:found.index(intact)]))
            advice = (f"the newest intact one is {intact}, of step {manifest(intact)['step']}: move {damaged} away, "
                      f"and {resume(args)} continues from there")
        fail(f"{found[0]} cannot be used, {wrong}; {advice}")
    return found[0] if found else None


def recordable(args):
    """The flags as JSON can hold them."""
    return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in vars(args).items()
            if name != "resume"}


def save_checkpoint(model, tokenizer, optimizer, state, args):
    """Weights in Hugging Face format, optimizer, step, data position and RNG states: complete, or not there at all.

    All is written and synced beside the newest checkpoint and then takes its name, "checkpoint"; that one becomes
    "checkpoint-STEP", and --keep-checkpoints of them stay. manifest.json has the flags and a hash of each file."""
    final, temporary = (Path(args.out) / name for name in ("checkpoint", "checkpoint.tmp"))
    with writing(final, args):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            rng = {"cpu": torch.get_rng_state(),
                   "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}
            with open(temporary / "trainer.pt", "wb") as file:
                torch.save({"optimizer": optimizer.state_dict(), "state": state, "rng": rng}, file)
            paths = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in paths:
                sync(path)
            content = {"step": state["step"], "flags": recordable(args),
                       "files": {path.relative_to(temporary).as_posix(): sha256(path) for path in paths}}
            replace(temporary / "manifest.json", json.dumps(content, indent=1))
            sync(temporary)
        except BaseException:                                                  # the room may be wanted for a next try
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():
            older = final.with_name(f"checkpoint-{manifest(final)['step']}")
            shutil.rmtree(older, ignore_errors=True)
            final.rename(older)
        temporary.rename(final)
        sync(final.parent)
        for old in checkpoints(args.out)[args.keep_checkpoints:]:
            old.rename(temporary)                                              # what is named checkpoint is whole
            shutil.rmtree(temporary)


def restore(optimizer, checkpoint, args, data):
    """Load optimizer and RNG states and cut the logs back to the checkpoint's step. Returns the run's state.

    data: the hash of the problems and their tokens, which must be those that the run began with."""
    try:
        saved = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if torch.cuda.is_initialized() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        state = {name: saved["state"][name] for name in START}
    except Exception as error:                                                 # whatever a stranger's file can raise
        fail(f"{checkpoint}/trainer.pt cannot be used ({' '.join(str(error).split())[:200]}): start a new run with "
             f"--model {checkpoint}")
    if state["data"] != data:
        fail(f"the problems of {args.data} or {args.eval_data}, or their tokens, are not those that the run began "
             f"with: put them back as they were, or start a new run with --model {checkpoint}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = Path(args.out) / name
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
        kept, steps = [], []                                                   # a torn line, the last one, has no end
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
                if step <= state["step"]:
                    kept.append(line)
                    steps.append(step)
            except (ValueError, KeyError, TypeError):
                fail(f"{path}, line {number} is damaged: mend or remove it, then continue with {resume(args)}")
        if name == "metrics.jsonl" and steps != list(range(state["step"] + 1)) and (steps or state["step"]):
            fail(f"{path} does not have each of the steps 0 to {state['step']} once: mend it, or choose another --out")
        with writing(path, args):
            replace(path, "".join(line + "\n" for line in kept))
    return state


def train_step(model, reference, tokenizer, optimizer, problems, prompts, args, step, state):
    """Algorithm 1 on the next questions: sample, reward, score, update. Returns metrics; moves state["position"] on."""
    timer = Timer()
    with timer("data_generation"):                                             # y_i ~ π_old, r_i, mixed groups only
        rollout, rewards, metrics, state["position"] = sample_groups(
            model, tokenizer, problems, prompts, args, step, state["position"])
    kept = metrics.pop("kept")
    if len(rewards):
        old, ref, advantages, nthr_metrics = old_policy_pass(model, reference, rollout, rewards, args, step, timer)
        with timer("model_update"):                                            # Eq. 1 with Algorithm 1's advantages
            metrics |= update(model, optimizer, rollout, rewards, old, ref, advantages, args, state) | nthr_metrics
        skipped = [[problems[kept[k]]["id"] for k in groups] for groups in metrics.pop("skipped")]
        metrics |= {"skipped_updates": len(skipped), "skipped_questions": sorted(set(sum(skipped, [])))}
        streak = sum(skipped[-state["nonfinite"]:], []) if state["nonfinite"] else []
        state["offending"] = streak if metrics["updates"] else state["offending"] + streak
        if args.delta_every and step % args.delta_every == 0:
            with timer("likelihood_change"):                                   # Eq. 2
                metrics |= step_likelihood_change(model, rollout, rewards, old, args)
    metrics["tokens_per_second"] = metrics.pop("tokens") / timer["data_generation"]
    return {**NOT_MEASURED, **metrics, "seconds": timer}


@contextmanager
def stoppable():
    """Ctrl-C and SIGTERM raise a KeyboardInterrupt with the signal's number; on leaving, handlers are as before."""
    def stop(number, _):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args):
    """Train, or with --eval-only evaluate. All goes to args.out, where no other process may write meanwhile."""
    with stoppable(), claimed(args.out):
        (evaluate_only if args.eval_only else run)(args)


def run(args):
    """Set up, then `train_step` by `train_step`, and see to it that the run can be continued, whatever ends it."""
    out, state = Path(args.out), dict(START)
    checkpoint = find_checkpoint(args) if args.resume else None
    tokenizer = load(AutoTokenizer, checkpoint or args.model)                  # first: a misspelt id is found at once
    problems, eval_problems = load_data(args)
    config = load_config(checkpoint or args.model)
    prompts, eval_prompts = (encode_prompts(rows, tokenizer, config, args.max_new_tokens, args.reward)
                             for rows in (problems, eval_problems))
    announce_memory(config, args, max(map(len, prompts)))
    model, reference, optimizer = load_policy(checkpoint or args.model, args)
    data = json.dumps([problems, prompts, eval_problems, eval_prompts])
    state["data"] = hashlib.sha256(data.encode()).hexdigest()
    if checkpoint:
        state = restore(optimizer, checkpoint, args, state["data"])
        if state["step"] >= args.steps:
            return print(f"{args.out} is complete at step {state['step']}: pass a larger --steps to go on")
    with writing(out / "config.json", args):
        replace(out / "config.json", json.dumps(recordable(args), indent=1))
    complete, saved = dict(state), state["step"]                               # after the last whole step; step on disk
    signals, saving, stop, delta = [], False, None, math.nan                   # why it ended; Δ that was last measured

    def interrupt(number, _):
        signals.append(number)
        if stop is None and not saving and (len(signals) > 1 or not state["moved"]):
            raise KeyboardInterrupt(number)
        os.write(2, b"\nfinishing this step and saving it; once more gives the step up\n")    # print may be at work

    def save(whole):
        nonlocal saved, saving
        saving = True                                                          # an interrupt waits, as torch.save
        save_checkpoint(model, tokenizer, optimizer, whole, args)              # would turn it into another error
        saved, saving = whole["step"], False

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if not checkpoint:
            save(state)
        if state["step"] == 0 and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
            (out / "samples.jsonl").unlink(missing_ok=True)                    # of an evaluation that was cut short
            with memory_for("evaluation"):
                metrics = evaluate(model, tokenizer, eval_problems, eval_prompts, args, 0)
            append(args, "metrics.jsonl", [{"step": 0, **metrics}])
        with tqdm(range(state["step"] + 1, args.steps + 1), initial=state["step"], total=args.steps,
                  desc=args.method) as bar:
            for step in bar:
                if signals:                                                    # one that had to wait
                    raise KeyboardInterrupt(signals[0])
                metrics = train_step(model, reference, tokenizer, optimizer, problems, prompts, args, step, state)
                if step == args.steps or (args.eval_every and step % args.eval_every == 0):
                    with metrics["seconds"]("evaluation"):
                        metrics |= evaluate(model, tokenizer, eval_problems, eval_prompts, args, step)
                append(args, "metrics.jsonl", [{"step": step, **metrics, "peak_memory_gib": peak_memory()}])
                diverged = state["nonfinite"] >= 3                             # after which it may be tried again
                complete = {**state, "step": step, "moved": False, "nonfinite": 0 if diverged else state["nonfinite"]}
                state = dict(complete)
                delta = delta if metrics["delta_mean"] is None else metrics["delta_mean"]
                bar.set_postfix({"success": f"{metrics['success_rate']:.2f}", "Δ": f"{delta:.2f}",
                                 "tok/s": f"{metrics['tokens_per_second']:.0f}"})
                if step == args.steps or signals or diverged or (args.save_every and step % args.save_every == 0):
                    save(state)
                if diverged:
                    offending = sorted(set(state["offending"]))
                    shown = ", ".join(map(str, offending[:20])) + ", ..." * (len(offending) > 20)
                    fail(f"three updates in a row had a non-finite loss or gradient, with problems {shown} of "
                         f"{args.data} (all in metrics.jsonl); the last good weights are in {out}/checkpoint: start "
                         f"again from there with a lower --lr")
    except (KeyboardInterrupt, Exception) as error:
        stop = OutOfMemory(str(error)) if isinstance(error, OutOfMemory) else error    # itself it holds the tensors
    if stop is None:
        if not optimizer.state and not state["nonfinite"]:                     # AdamW has moments from the first update
            tqdm.write("warning: no update was made, as no question had both right and wrong answers: look at --reward "
                       "and --data, or draw more with --group-size or --sampling-rounds", file=sys.stderr)
        return print(f"done: metrics in {args.out}/metrics.jsonl, the model in {args.out}/checkpoint")
    optimizer.zero_grad(set_to_none=True)
    try:                                                                       # weights that gave NaN are not kept
        if complete["step"] > saved and not state["moved"] and not isinstance(stop, FloatingPointError):
            save(complete)
    finally:
        if not isinstance(stop, (KeyboardInterrupt, FloatingPointError, OutOfMemory)):
            tqdm.write(f"this run broke; {resume(args)} continues it after step {saved}", file=sys.stderr)
            raise stop                                                         # of a --reward FILE.py, or a fault here
    if isinstance(stop, KeyboardInterrupt):
        print(f"stopped after step {saved}; continue with: {resume(args)}")
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])
    if isinstance(stop, OutOfMemory):
        fail(f"{stop}; continue with step {saved + 1} by {resume(args)} and the lower value")
    fail(f"{stop}; the last checkpoint is of step {saved}: {resume(args)} continues from there")


if __name__ == "__main__":
    try:
        train(parse_args())
    except (FloatingPointError, OutOfMemory) as error:
        fail(error)
    except KeyboardInterrupt as error:
        print("interrupted before there was a result: run the same command again", file=sys.stderr)
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])
