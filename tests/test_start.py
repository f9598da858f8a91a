"""What a run says of itself: its first prompt and settings, few or repeated data, and why it cannot learn."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

import rollout
from helpers import ROOT, SIZES, metrics_of, read_lines, run_here, save_random_model, tiny_rows, write
from nthr import nthr_advantages
from support import evaluate
from support.data import INSTRUCTION
from support.evaluate import likely_cause
from support.models import load_model
from support.start import announce_run


def plain_model(folder):
    """A random model without chat template: its tokenizer spells any printable text."""
    save_random_model(Qwen2Config(tie_word_embeddings=True, **SIZES), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_model(tmp_path_factory.mktemp("models") / "plain")


def flags_for(model, data, *more):
    """Steps of two questions, two responses of four tokens each; then `more`."""
    return ["--model", model, "--data", data, "--eval-data", data, "--eval-size", 1, "--batch-size", 2,
            "--group-size", 2, "--max-new-tokens", 4, "--kl-coef", 0, "--steps", 1, "--eval-every", 0,
            "--save-every", 0, "--delta-every", 0, "--device", "cpu", "--dtype", "float32", *more]


def problems_file(path, count):
    """Problems of two lines, each with another answer."""
    rows = ({"problem": f"Cats are many.\nWhat is {i}+{i}?", "answer": f"answer {i}"} for i in range(count))
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def recorded_calls(monkeypatch, *modules):
    """[(prompts, rollout), ...]: what `generate` of these modules is asked for and returns, from now on."""
    calls, original = [], rollout.generate

    def recording(model, tokenizer, prompts, *args, **kwargs):
        calls.append((prompts, original(model, tokenizer, prompts, *args, **kwargs)))
        return calls[-1][1]

    for module in modules:
        monkeypatch.setattr(module, "generate", recording)
    return calls


# -------------------------------------------------------------------------------------------- 1. the block at the start

def test_a_run_first_prints_its_first_prompt_as_the_model_gets_it(plain, tmp_path, monkeypatch, capsys):
    """Its text is that of the ids which the first step's `generate` gets, and the answer is the one of that problem."""
    data = problems_file(tmp_path / "data.jsonl", 30)
    reward = write(tmp_path / "mine.py", "def f(*args):\n    return 1\n")
    tokenizer, seen = AutoTokenizer.from_pretrained(plain), set()
    for number, (more, instruction) in enumerate((
            ([], INSTRUCTION), (["--seed", 3], INSTRUCTION), (["--reward", f"{reward}:f"], ""),
            (["--instruction", "Be brief."], "Be brief."), (["--eval-only"], INSTRUCTION),
            (["--reward", f"{reward}:f", "--instruction", "Two\nlines"], "Two\nlines"))):
        calls = recorded_calls(monkeypatch, rollout if more != ["--eval-only"] else evaluate)
        out = tmp_path / str(number)
        flags = flags_for(plain, data, *more, "--out", out)
        run_here(*(flags[:2] + flags[4:] if more == ["--eval-only"] else flags))
        monkeypatch.undo()
        printed = capsys.readouterr().out
        block, after = printed.split("first prompt, as the model gets it:\n")[1].split("its gold answer: ")
        prompt = "\n".join(line.removeprefix("  | ") for line in block.splitlines())
        assert all(line.startswith("  | ") for line in block.splitlines())
        assert prompt == tokenizer.decode(calls[0][0][0]), more
        question = re.fullmatch(r"Question: (Cats are many\.\nWhat is (\d+)\+\d+\?)(.*)\nAnswer:", prompt, re.DOTALL)
        assert question[3] == f"\n{instruction}" * bool(instruction), more
        assert after.splitlines()[0] == f"answer {question[2]}", more
        seen.add(question[2])
        assert printed.startswith(f"model: {plain} on cpu in float32\nproblems: ")
        kept = re.search(f"^kept in {re.escape(str(out))}: (.*)", printed, re.MULTILINE)[1]
        files = {path.name for path in out.iterdir()}
        assert files == ({"answers.jsonl"} if more == ["--eval-only"] else
                         {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "checkpoint-0"})
        assert {name.removesuffix("-0") for name in files - {"checkpoint", "checkpoint-0"}} == set(
            re.findall(r"\w+\.jsonl?", kept)) and ("newest 2 checkpoints" in kept) == (more != ["--eval-only"])
    assert len(seen) > 1                                                       # --seed draws another first question


class Letters:
    """A tokenizer whose ids are the characters' codes."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def announced(capsys, problems, evaluation, batch_size=4):
    """(what is printed of these problems, what is warned of)."""
    rows, asked = ([{"problem": text, "answer": text.upper()} for text in texts] for texts in (problems, evaluation))
    args = SimpleNamespace(model="m\x1b[2J", device="cpu", dtype="float32", data="d", eval_data="e", reward="math",
                           out="o", seed=0, batch_size=batch_size, keep_checkpoints=3)
    announce_run(args, Letters(), rows, [list(map(ord, text)) for text in problems], asked,
                 [list(map(ord, text)) for text in evaluation])
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_few_evaluation_problems_repeated_questions_and_a_batch_above_the_data_are_said(capsys):
    many = [f"p{i}" for i in range(30)]
    assert announced(capsys, many, many[:20])[1] == announced(capsys, [], many[:20])[1] == ""
    assert announced(capsys, many, many, batch_size=30)[1] == ""
    for problems, evaluation, batch_size, words in (
            (many, many[:19], 4, ["few evaluation problems (19)", "5 points"]),
            (many, many[:2], 4, ["few evaluation problems (2)", "50 points"]),
            ([], many[:1], 4, ["few evaluation problems (1)", "100 points"]),
            (many + many[:3] + many[:1], many, 4, ["4 of 34 problems repeat the question"]),
            (many, many, 31, ["a step repeats questions", "--batch-size 31", "the 30 problems"])):
        text = announced(capsys, problems, evaluation, batch_size)[1]
        assert text.startswith("warning: ") and text.count("\n") == 1 and all(word in text for word in words), text
    assert announced(capsys, many[:2] * 2, many[:3], 9)[1].count("warning: ") == 3


def test_nothing_of_a_prompt_or_an_answer_reaches_the_terminal_as_it_is(capsys):
    printed, _ = announced(capsys, ["a\x1b[2J\n\tb\u202e"] * 2, ["e"] * 20)
    assert printed.replace("\n", "").isprintable() and "  | a\\x1b[2J\n  | \\tb\\u202e\n" in printed
    assert "its gold answer: A\\x1b[2J\\n\\tB\\u202e\n" in printed and "model: m\\x1b[2J on" in printed


def test_an_evaluation_has_its_bar_from_the_first_second_and_sampling_later(plain, tmp_path, monkeypatch):
    """A bar that is never measured shows no number: what stands on it is in metrics.jsonl."""
    data, delays, shown = problems_file(tmp_path / "data.jsonl", 4), [], []

    class Bar(rollout.tqdm):
        def __init__(self, *args, **kwargs):
            delays.append((kwargs["total"], kwargs["delay"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(rollout, "tqdm", Bar)
    original = rollout.tqdm.__bases__[0].set_postfix
    monkeypatch.setattr(rollout.tqdm.__bases__[0], "set_postfix",
                        lambda self, *args, **shows: shown.append(shows) or original(self, *args, **shows))
    run_here(*flags_for(plain, data, "--out", tmp_path / "run"))
    assert delays == [(4, 0), (16, 10), (4, 0)]                                # of 1 answer, 4 responses, 1 answer
    row = metrics_of(tmp_path / "run")[1]
    assert shown == [{"success": "0.00", "groups": 0, "tokens_s": f"{row['tokens_per_second']:.0f}"}]


# --------------------------------------------------------------------------------------------- 2. why it cannot learn

def answers(**counts):
    """So many answers of each kind to the gold 42: right, wrong (in a box), without a box, cut off, late (cut off)."""
    kinds = {"right": (r"so \boxed{42}", 1.0, True), "wrong": (r"so \boxed{7}", 0.0, True),
             "unboxed": ("so 42", 0.0, True), "cut": ("so it", 0.0, False), "late": (r"\boxed{42} and", 1.0, False),
             "empty": (r"\boxed{}", 0.0, True)}
    return [dict(zip(("response", "reward", "finished"), kinds[kind]), answer="42")
            for kind, count in counts.items() for _ in range(count)]


def test_the_likely_cause_is_what_was_counted():
    long = [{"response": "x" * 90 + r"\boxed{1}", "reward": 0.0, "finished": True, "answer": "9" * 99}]
    for rows, reward, counted, cause in (
            (answers(cut=8), "math", "of 8 answers, 0 are right, 8 cut off, 0 fin", "raise --max-new-tokens (now 77)"),
            (answers(cut=2, wrong=2), "math", "0 are right, 2 cut off, 0 finished", "raise --max-new-tokens (now 77)"),
            (answers(cut=1, wrong=1, unboxed=2), "math", "1 cut off, 2 finished without a box", r"the last \boxed{}"),
            (answers(unboxed=4), "math", "0 cut off, 4 finished without a box", "check the prompt, --instruction"),
            (answers(empty=1), "math", "0 are right, 0 cut off, 1 finished without a box", "--instruction"),
            (answers(unboxed=4), "mine.py:f", "0 are right, 0 cut off: ", "one is \"so 42\", and the answer is \"42\""),
            (answers(cut=1, wrong=2), "math", "1 cut off, 0 fin", r'one is "so \boxed{7}", and the answer is "42"'),
            (answers(cut=1, wrong=2), "mine.py:f", "1 cut off: ", "too hard, or --reward and --data do"),
            (answers(right=3), "math", "of 3 answers, 3 are right, 0 cut off, 0 fin", "the questions are too easy"),
            (answers(late=3), "mine.py:f", "3 are right, 0 cut off: ", "the questions are too easy"),
            (answers(right=4, cut=4), "math", "4 are right, 4 cut off", "raise --group-size, --batch-size or --sam"),
            (long, "math", "of 1 answers", f'"... {long[0]["response"][-76:]}", and the answer is "... {"9" * 76}"')):
        text = likely_cause(rows, reward, 77)
        assert counted in text and cause in text, text
        if reward != "math":
            assert "box" not in text.replace(rows[0]["response"], "").replace(rows[-1]["response"], "")
        causes = ("--max-new-tokens", "--instruction", "too hard", "too easy", "--group-size")
        assert sum(words in text for words in causes) == 1, text               # one cause


def unmixed_counts(text):
    """The numbers of steps without a mixed group that were warned of, in their order."""
    return [int(number) for number in re.findall(r"warning: no question had both [^\n]*? in (\d+) steps", text)]


def scripted_reward(path, rule):
    """--reward for a rule on n, how many answers were rewarded before; the call at the start, in a box, is right."""
    return str(write(path, "import itertools\n\ncalls = itertools.count()\n\n\ndef f(response, answer):\n"
                           "    if response == '\\\\boxed{' + answer + '}':\n        return 1\n"
                           f"    n = next(calls)\n    return {rule}\n")) + ":f"


def test_steps_without_a_mixed_group_are_said_at_3_13_23_and_a_mixed_one_starts_again(plain, tmp_path, capsys):
    """An evaluation rewards answer 0, step s those of number 2s - 1 and 2s: step 5 is mixed. Step 10 is resumed."""
    data = problems_file(tmp_path / "data.jsonl", 20)
    reward = scripted_reward(tmp_path / "mine.py", "n == 9")
    flags = flags_for(plain, data, "--reward", reward, "--batch-size", 1, "--steps", 10, "--out", tmp_path / "run")
    run_here(*flags)
    mixed = [row["step"] for row in metrics_of(tmp_path / "run")[1:] if row["groups_kept"]]
    text = capsys.readouterr().err
    assert mixed == [5] and unmixed_counts(text) == [3, 3], text               # after steps 3 and 8, not at the end
    run_here("--resume", tmp_path / "run", "--reward", reward, "--steps", 29)
    text = capsys.readouterr().err
    assert unmixed_counts(text) == [13, 23]                                    # steps 18 and 28
    assert "of 2 answers, 0 are right" in text


def test_a_run_that_made_no_update_says_so_at_its_end(plain, tmp_path, capsys):
    data = problems_file(tmp_path / "data.jsonl", 20)
    for steps, right, expected in ((1, 0, [1]), (3, 1, [3]), (5, 1, [3, 5])):
        reward = scripted_reward(tmp_path / f"{steps}.py", right)
        run_here(*flags_for(plain, data, "--reward", reward, "--steps", steps, "--out", tmp_path / str(steps)))
        text = capsys.readouterr().err
        assert unmixed_counts(text) == expected and "box" not in text, text
        assert text.count("of 4 answers, 4 are right") == len(expected) * right, text


def test_an_evaluation_without_a_right_answer_says_why(plain, tmp_path, capsys):
    """In training and with --eval-only; with a reward of the user's no box is mentioned."""
    data = problems_file(tmp_path / "data.jsonl", 20)
    none, one = (scripted_reward(tmp_path / f"{name}.py", rule) for name, rule in (("none", "0"), ("one", "n == 2")))
    flags = flags_for(plain, data, "--eval-size", 20, "--max-new-tokens", 12)
    for number, (reward, words) in enumerate(((None, "0 are right"), (none, "0 are right"), (one, ""))):
        given = [] if reward is None else ["--reward", reward]
        run_here(*flags[:2], *flags[4:], *given, "--eval-only", "--out", tmp_path / f"eval {number}")
        text = capsys.readouterr().err
        assert text.count("warning: no answer is right: of 20 answers, 0 are right") == bool(words), text
        assert ("without a box" in text) == (reward is None)
    run_here(*flags, "--out", tmp_path / "run")
    text = capsys.readouterr().err                                             # later, the sampled answers tell
    assert text.count("warning: no answer is right: of 20 answers") == text.count("warning: no question had") == 1


# ----------------------------------------------------------------------------------------------- 3. the sampled group

def test_a_sampled_group_shows_what_the_model_got_said_and_what_nthr_selected(tmp_path, monkeypatch):
    """By what `generate` returned, the reward by a regular expression, and Algorithm 1 on the states that it kept."""
    data = write(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in tiny_rows("train.jsonl", 40)))
    calls = recorded_calls(monkeypatch, rollout)
    hidden, original = [], rollout.Rollout.select

    def selecting(self, rows):                                                 # the run drops the states it has read
        hidden.append(original(self, torch.arange(len(self.response_mask))))
        return original(self, rows)

    monkeypatch.setattr(rollout.Rollout, "select", selecting)
    flags = ["--data", data, "--eval-data", data, "--eval-size", 2, "--batch-size", 6, "--group-size", 8, "--steps", 2,
             "--eval-every", 1, "--lr", 1e-9, "--beta", 0.5, "--device", "cpu", "--dtype", "float32"]
    run_here(*flags, "--out", tmp_path / "run")
    groups = [row for row in read_lines(tmp_path / "run" / "samples.jsonl") if "prompt" in row]
    assert [row["step"] for row in groups] == [1, 2] and len(hidden) == len(calls) == 2
    tokenizer, model = AutoTokenizer.from_pretrained(ROOT / "tiny"), load_model(ROOT / "tiny", "cpu", "nthr")
    gold, selected = {row["problem"]: row["answer"] for row in read_lines(data)}, 0
    for row, (prompts, sampled), kept in zip(groups, calls, hidden):
        assert list(row) == ["step", "problem", "answer", "prompt", "responses", "rewards", "selected"]
        right = [float(re.findall(r"\\boxed\{(-?\d+)\}", text)[-1:] == [row["answer"]]) for text in row["responses"]]
        assert row["rewards"] == right and row["answer"] == gold[row["problem"]]
        first = next(q for q in range(6) if len({                              # the first question with both
            re.findall(r"\\boxed\{(-?\d+)\}", text)[-1:] == [gold[tokenizer.decode(prompts[q]).split("<")[0]]]
            for text in sampled.texts[8 * q:8 * q + 8]}) == 2)
        rows = slice(8 * first, 8 * first + 8)
        assert row["responses"] == sampled.texts[rows] and row["prompt"] == tokenizer.decode(prompts[first])
        r, mask = torch.tensor(right), sampled.response_mask[rows]
        advantages = ((r - r.mean()) / r.std(unbiased=False))[:, None] * mask
        result = nthr_advantages(advantages, kept.hidden[rows], sampled.response_ids[rows], mask, r == 1,
                                 model.get_output_embeddings().weight.detach(), beta=0.5)
        expected = [[[k, tokenizer.decode([sampled.response_ids[8 * first + i, k].item()])]
                     for k in range(mask.shape[1]) if result.selected[i, k]] for i in range(8)]
        assert row["selected"] == expected
        selected += sum(map(len, expected))
        assert all(not tokens for tokens, reward in zip(expected, right) if reward == 1)
    assert selected > 0


def test_a_step_without_a_mixed_group_shows_its_first_one_with_nothing_selected(plain, tmp_path, monkeypatch):
    data, calls = problems_file(tmp_path / "data.jsonl", 4), recorded_calls(monkeypatch, rollout)
    run_here(*flags_for(plain, data, "--out", tmp_path / "run"))
    row = read_lines(tmp_path / "run" / "samples.jsonl")[-1]
    prompts, sampled = calls[0]
    assert row["prompt"] == AutoTokenizer.from_pretrained(plain).decode(prompts[0]) and row["problem"] in row["prompt"]
    assert row["responses"] == sampled.texts[:2] and row["rewards"] == [0.0, 0.0] and row["selected"] == [[], []]
