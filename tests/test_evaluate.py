"""Accuracy by benchmark, the table, --eval-only, and evaluation while training."""
import json
import re
from functools import lru_cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROOT, error_of, metrics_of, read_lines, run_here, tiny_rows, write
from support import evaluate, models
from support.data import encode_prompt
from support.evaluate import (accuracy_line, accuracy_metrics, accuracy_table, average_accuracy, greedy_answers,
                              values_by_benchmark)

CPU = ["--device", "cpu", "--dtype", "float32"]
SMALL = ["--batch-size", 4, "--minibatch-size", 4, "--group-size", 4, "--max-new-tokens", 28, "--steps", 1, *CPU]


def json_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sums(tmp_path):
    """Two files of sums for the embedded model: 12 and 4 problems."""
    rows = tiny_rows("test.jsonl", 16)
    return json_lines(tmp_path / "long.jsonl", rows[:12]), json_lines(tmp_path / "short.jsonl", rows[12:])


def boxed_integer_equals(response, gold):
    """The reward of a sum, by a regular expression."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", response)
    return float(bool(boxed) and int(boxed[-1]) == int(gold))


def invented_answers(counts):
    """{benchmark: (problems, right, truncated)} -> answers; the first ones are right, the last ones truncated."""
    return [{"benchmark": name, "reward": float(i < right), "finished": i < problems - truncated}
            for name, (problems, right, truncated) in counts.items() for i in range(problems)]


# --------------------------------------------------------------------------------------------------------- 1. by hand

def test_accuracy_is_the_mean_of_the_benchmarks_whatever_their_sizes():
    """1/4 and 2/2: 62.5%, where 3 of 6 answers are right."""
    answers = invented_answers({"b": (4, 1, 0), "a": (2, 2, 1)})
    assert values_by_benchmark(answers, "reward") == {"b": [1.0, 0.0, 0.0, 0.0], "a": [1.0, 1.0]}
    assert list(values_by_benchmark(answers, "finished").items()) == [("b", [True] * 4), ("a", [True, False])]
    mixed = [answers[i] for i in (4, 0, 5, 1, 2, 3)]
    assert list(values_by_benchmark(mixed, "reward").items()) == [("a", [1.0, 1.0]), ("b", [1.0, 0.0, 0.0, 0.0])]
    assert average_accuracy(answers) == ({"b": 0.25, "a": 1.0}, 0.625)
    assert accuracy_metrics(answers) == {"eval_accuracy": 0.625, "eval_by_benchmark": {"b": 0.25, "a": 1.0}}
    assert accuracy_metrics(answers[:4]) == {"eval_accuracy": 0.25}
    assert accuracy_line(3, answers) == "step 3: greedy accuracy 62.5% on 6 problems (b 25.0%, a 100.0%)"
    assert accuracy_line(0, answers[:4]) == "step 0: greedy accuracy 25.0% on 4 problems"


def test_the_table_by_hand():
    """2/30 = 6.667, 21/40 = 52.5, 371/500 = 74.2, 91/272 = 33.456, 253/675 = 37.481: the mean of 6.7, 52.5, 74.2,
    33.5 and 37.5 is 40.88 (without rounding first, 40.86; over all 1517 problems, 48.65)."""
    answers = invented_answers({"aime24": (30, 2, 11), "amc23": (40, 21, 0), "math500": (500, 371, 12),
                                "minerva": (272, 91, 1), "olympiadbench": (675, 253, 100)})
    assert accuracy_table(answers) == [
        "benchmark      problems  accuracy %  truncated",
        "aime24               30         6.7         11",
        "amc23                40        52.5          0",
        "math500             500        74.2         12",
        "minerva             272        33.5          1",
        "olympiadbench       675        37.5        100",
        "average            1517       40.88        124"]


def test_the_columns_of_the_table_fit_long_names_and_no_name_reaches_the_terminal_as_it_is():
    lines = accuracy_table(invented_answers({"some/long/folder/problems.jsonl": (3, 3, 0), "b": (1, 0, 1)}))
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines[1:]] == [
        ["some/long/folder/problems.jsonl", "3", "100.0", "0"], ["b", "1", "0.0", "1"], ["average", "4", "50.00", "1"]]
    answers = invented_answers({"a\x1b[2J\n": (1, 1, 0), "b\u202e": (1, 0, 0)})
    assert accuracy_table(answers)[1].startswith("a\\x1b[2J\\n ") and accuracy_table(answers)[2].startswith("b\\u202e ")
    assert accuracy_line(1, answers).endswith("(a\\x1b[2J\\n 100.0%, b\\u202e 0.0%)")


# -------------------------------------------------------------------------------------------------- 2. --eval-only

@lru_cache
def peer():
    return (AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval(), AutoTokenizer.from_pretrained(ROOT / "tiny"))


@lru_cache
def greedy_answer(problem, max_new_tokens):
    """(response, whether it ended) by transformers' own greedy generation of one problem."""
    model, tokenizer = peer()
    ids = torch.tensor([encode_prompt(tokenizer, problem)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    new = new[0, ids.shape[1]:]
    return tokenizer.decode(new, skip_special_tokens=True), new[-1].item() == tokenizer.eos_token_id


def greedy_by_transformers(files):
    """What answers.jsonl must hold of these files, with 28 tokens: too few for some answers."""
    expected = []
    for file in files:
        for row in read_lines(file):
            response, finished = greedy_answer(row["problem"], 28)
            expected.append({"benchmark": str(file), **row, "response": response,
                             "reward": boxed_integer_equals(response, row["answer"]), "finished": finished})
    return expected


def test_eval_only_writes_the_greedy_answers_and_prints_the_table(sums, tmp_path, capsys):
    run_here("--eval-only", "--eval-data", f"{sums[1]},{sums[0]}", "--max-new-tokens", 28, "--max-sequences", 5,
             "--out", tmp_path / "out", *CPU)
    printed = capsys.readouterr().out.splitlines()
    memory = next(number for number, line in enumerate(printed) if line.startswith("memory"))
    assert printed[memory].startswith("memory, estimated for responses of 28 tokens: ")
    assert "update" not in printed[memory]
    expected, table = greedy_by_transformers((sums[1], sums[0])), []
    for file in (sums[1], sums[0]):
        mine = [row for row in expected if row["benchmark"] == str(file)]
        share = sum(row["reward"] for row in mine) / len(mine)
        truncated = sum(not row["finished"] for row in mine)
        table.append([str(file), str(len(mine)), f"{100 * share:.1f}", str(truncated)])
    assert read_lines(tmp_path / "out" / "answers.jsonl") == expected
    assert list(expected[0]) == list(read_lines(tmp_path / "out" / "answers.jsonl")[0])
    assert {row["finished"] for row in expected} == {True, False} and {row["reward"] for row in expected} == {0.0, 1.0}
    lines = [line.split() for line in printed[memory + 1:]]
    average = f"{sum(float(row[2]) for row in table) / 2:.2f}"
    assert lines[0][0] == "benchmark" and lines[1:3] == table
    assert lines[3] == ["average", "16", average, str(sum(int(row[3]) for row in table))]
    assert str(tmp_path / "out" / "answers.jsonl") in printed[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl"]


def test_greedy_answers_keep_the_order_of_the_problems_and_ask_the_checker(sums):
    """In bfloat16 too, whose answers may differ. The checker gets the response and the answer."""
    model = models.load_model(ROOT / "tiny", "cpu", "grpo")
    tokenizer, problems, asked = AutoTokenizer.from_pretrained(ROOT / "tiny"), read_lines(sums[0]), []
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    for dtype in ("float32", "bfloat16"):
        computed = []
        layer = model.model.layers[0].mlp.up_proj
        hook = layer.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
        answers = greedy_answers(model, tokenizer, problems, prompts, lambda *pair: asked.append(pair) or 0.5, 28, 5,
                                 dtype)
        hook.remove()
        assert set(computed) == {getattr(torch, dtype)}
        assert [{name: row[name] for name in problems[0]} for row in answers] == problems
        assert [(row["response"], row["answer"]) for row in answers] == asked
        assert {row["reward"] for row in answers} == {0.5}
        asked.clear()
        if dtype == "float32":
            expected = greedy_by_transformers(sums[:1])
            assert [row["response"] for row in answers] == [row["response"] for row in expected]
            assert [row["finished"] for row in answers] == [row["finished"] for row in expected]


def test_eval_only_makes_no_optimizer_loads_one_model_and_no_training_data(sums, tmp_path, monkeypatch):
    loaded, original = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loaded.append(args[0]) or original(*args))
    monkeypatch.setattr(torch.optim, "AdamW", None)
    run_here("--eval-only", "--data", tmp_path / "missing.jsonl", "--eval-data", sums[1], "--kl-coef", 1,
             "--max-new-tokens", 8, "--out", tmp_path / "out", *CPU)
    assert loaded == [str(ROOT / "tiny")] and len(read_lines(tmp_path / "out" / "answers.jsonl")) == 4


def test_earlier_answers_are_never_overwritten(sums, tmp_path):
    write(tmp_path / "answers.jsonl", "mine")
    message = error_of("--eval-only", "--eval-data", sums[1], "--out", tmp_path, *CPU)
    assert str(tmp_path / "answers.jsonl") in message and "--out" in message
    assert (tmp_path / "answers.jsonl").read_text() == "mine"


def test_an_evaluation_that_is_cut_short_keeps_the_whole_benchmarks(sums, tmp_path, monkeypatch, capsys):
    """Cut in the first benchmark it leaves nothing, so that the same command can be given again; cut in the second one
    it leaves the answers to the first."""
    flags = ["--eval-only", "--eval-data", f"{sums[1]},{sums[0]}", "--max-new-tokens", 8, *CPU]
    original, calls = evaluate.generate, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", stopped)
    for stop_at, folder in ((1, "first"), (2, "second")):
        calls.clear()
        with pytest.raises(SystemExit) as caught:
            run_here(*flags, "--out", tmp_path / folder)
        assert caught.value.code == 130
    assert not (tmp_path / "first" / "answers.jsonl").exists()
    kept = read_lines(tmp_path / "second" / "answers.jsonl")
    assert [row["benchmark"] for row in kept] == [str(sums[1])] * 4
    monkeypatch.undo()
    run_here(*flags, "--out", tmp_path / "first")
    rows = read_lines(tmp_path / "first" / "answers.jsonl")
    assert len(rows) == 16 and rows[:4] == kept


# ---------------------------------------------------------------------------------------------------- 3. training

def test_training_logs_the_mean_over_benchmarks_and_eval_only_finds_the_same_in_its_checkpoint(sums, tmp_path, capsys):
    long, short = map(str, sums)
    both = ["--eval-data", f"{long},{short}", "--eval-size", 10]
    run_here(*both, *SMALL, "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+:", line)]
    rows = metrics_of(tmp_path / "run")
    run_here("--eval-only", "--model", tmp_path / "run" / "checkpoint", *both, "--max-new-tokens", 28, *CPU,
             "--out", tmp_path / "eval")
    answers = read_lines(tmp_path / "eval" / "answers.jsonl")
    assert [row["benchmark"] for row in answers] == [long] * 10 + [short] * 4  # at most 10 of each
    right = dict.fromkeys((long, short), 0.0)
    for row in answers:
        right[row["benchmark"]] += boxed_integer_equals(row["response"], row["answer"])
    assert rows[1]["eval_by_benchmark"] == {long: right[long] / 10, short: right[short] / 4}
    assert rows[1]["eval_accuracy"] == pytest.approx((right[long] / 10 + right[short] / 4) / 2)
    assert set(rows[0]) == {"step", "eval_accuracy", "eval_by_benchmark"} and len(lines) == 2
    assert lines[1] == (f"step 1: greedy accuracy {rows[1]['eval_accuracy']:.1%} on 14 problems "
                        f"({long} {right[long] / 10:.1%}, {short} {right[short] / 4:.1%})")
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 5 + [1] * 6               # the last one is a sampled group
    assert samples[5:10] == [{"step": 1, **row} for row in answers[:5]]          # the first five of the first benchmark


@pytest.mark.full
def test_a_single_benchmark_is_its_own_average(sums, tmp_path, capsys):
    run_here("--eval-data", sums[1], *SMALL, "--out", tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert all("eval_by_benchmark" not in row for row in rows)
    samples = [row["reward"] for row in read_lines(tmp_path / "run" / "samples.jsonl") if row["step"] == 0]
    assert rows[0]["eval_accuracy"] == sum(samples) / 4
    assert f"step 0: greedy accuracy {sum(samples) / 4:.1%} on 4 problems\n" in capsys.readouterr().out
