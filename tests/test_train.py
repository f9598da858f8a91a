"""Whole runs of train.py: that they learn, what they write, and that seeds and data order are what they should be."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
import support.checkpoint
import support.evaluate
from helpers import (ROOT, metrics_of, read_lines, run, run_here, same_weights, small_flags, tiny_rows, weights_of,
                     write)
from support.data import INSTRUCTION
from support.flags import build_parser
from support.memory import PHASES

TINY = ROOT / "tiny"
METRICS = set("""step eval_accuracy questions groups_kept success_rate response_length truncated_share tau eta
selected_share updates skipped_updates loss clip_share kl nll grad_norm ratio_deviation delta_mean
delta_nonpositive_share seconds tokens_per_second peak_memory_gib""".split())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of a run that learns 16 problems, all of them in each step, and is evaluated on the same."""
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows("train.jsonl", 16))
    path = write(tmp_path_factory.mktemp("data") / "few.jsonl", rows)
    return ["--data", path, "--eval-data", path, "--batch-size", 16, "--minibatch-size", 4, "--lr", 3e-4,
            "--delta-every", 3, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def learned(few, tmp_path_factory):
    """The folder of a run of six steps, four updates each."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    run_here(*few, "--steps", 6, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of the smallest run that still learns something, evaluated on one problem."""
    return [*small_flags(tmp_path_factory.mktemp("data")), "--eval-size", 1]


def boxed_integer(response):
    """The integer in the last box of a response, read without reward.py; None without one."""
    found = re.findall(r"\\boxed\{(-?\d+)\}", response)
    return int(found[-1]) if found else None


# -------------------------------------------------------------------------------------------------- a run that learns

def test_a_short_run_raises_greedy_accuracy_and_the_sampled_success_rate(learned):
    rows = metrics_of(learned)
    success = [row["success_rate"] for row in rows[1:]]
    assert rows[-1]["eval_accuracy"] >= rows[0]["eval_accuracy"] + 2 / 16, rows
    assert success[-1] >= success[0] + 0.25 and np.mean(success[3:]) >= np.mean(success[:3]) + 0.1, success


@pytest.mark.full
def test_every_method_learns(few, tmp_path):
    failed = []
    for method in ("grpo", "pos-only", "random"):
        run_here(*few, "--steps", 6, "--method", method, "--out", tmp_path / method)
        rows = metrics_of(tmp_path / method)
        if not (rows[-1]["eval_accuracy"] > rows[0]["eval_accuracy"]
                and rows[-1]["success_rate"] >= rows[1]["success_rate"] + 0.2):
            failed.append((method, rows[-1]))
    assert not failed


@pytest.mark.full
def test_fifteen_steps_on_the_embedded_data_raise_accuracy_on_problems_never_seen(tmp_path):
    run("--steps", 15, "--minibatch-size", 4, "--eval-size", 200, "--out", "run", cwd=tmp_path)
    rows = metrics_of(tmp_path / "run")
    success = [row["success_rate"] for row in rows[1:]]
    assert rows[-1]["eval_accuracy"] >= rows[0]["eval_accuracy"] + 0.05
    assert np.mean(success[-5:]) >= np.mean(success[:3]) + 0.05


# ----------------------------------------------------------------------------------------------------- what it writes

def test_metrics_hold_one_line_per_step_with_every_key(learned):
    rows = metrics_of(learned)                                                 # fails on NaN and Infinity
    assert [row["step"] for row in rows] == list(range(7)) and set(rows[0]) == {"step", "eval_accuracy"}
    for row in rows[1:]:
        assert set(row) == METRICS
        assert row["questions"] == 16 and 4 <= row["groups_kept"] <= 16 and row["updates"] == 4
        assert 0 < row["success_rate"] < 1 and 1 <= row["response_length"] <= 64 and 0 <= row["truncated_share"] <= 1
        assert 0 <= row["eta"] <= 1 and 0 < row["selected_share"] < 1 and row["grad_norm"] > 0 and row["nll"] > 0
        assert 0 <= row["clip_share"] < 0.5 and math.isfinite(row["loss"]) and math.isfinite(row["tau"])
        assert row["skipped_updates"] == 0 <= row["ratio_deviation"] < 1e-3 and row["kl"] is None
        assert row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0
        measured = row["step"] % 3 == 0
        assert (row["delta_mean"] is not None) == measured == (row["delta_nonpositive_share"] is not None)
        assert (row["eval_accuracy"] is not None) == (row["step"] == 6)
        seconds, done = row["seconds"], {"data_generation", "nthr", "old_probabilities", "model_update"}
        done |= {"likelihood_change"} if measured else set()
        assert set(seconds) - {"evaluation"} == set(PHASES)
        assert {phase for phase in PHASES if seconds[phase] > 0} == done, row["step"]
        assert ("evaluation" in seconds) == (row["step"] == 6)


def test_every_key_of_the_metrics_is_documented():
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "support/README.md"))
    assert not [name for name in METRICS - {"step"} | {"eval_by_benchmark"} if f"`{name}`" not in text]


def test_the_throughput_is_the_sampled_tokens_over_the_sampling_time(learned):
    for row in metrics_of(learned)[1:]:
        tokens = row["response_length"] * row["questions"] * 8
        assert row["tokens_per_second"] * row["seconds"]["data_generation"] == pytest.approx(tokens, rel=1e-4)


def test_samples_hold_the_first_five_problems_of_each_evaluation(learned):
    rows, problems = read_lines(learned / "samples.jsonl"), tiny_rows("train.jsonl", 5)
    assert [row["step"] for row in rows] == [0] * 5 + [6] * 6                 # the last one is a sampled group
    for row, problem in zip(rows, problems * 2):
        assert {"problem": row["problem"], "answer": row["answer"]} == problem
        assert row["reward"] == float(boxed_integer(row["response"]) == int(row["answer"]))
        assert isinstance(row["finished"], bool)


def test_config_records_every_flag_as_it_was_used(learned, few):
    config = json.loads((learned / "config.json").read_text())
    assert set(config) == {action.dest for action in build_parser("")._actions} - {"help", "resume"}
    assert (config["steps"], config["minibatch_size"], config["lr"], config["method"]) == (6, 4, 3e-4, "nthr")
    assert (config["device"], config["dtype"], config["data"]) == ("cpu", "float32", str(few[1]))


def test_the_checkpoint_is_a_hugging_face_model_that_reaches_the_logged_accuracy(learned):
    """Its answers by transformers' own generate, on a batch padded by the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(learned / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "checkpoint", padding_side="left")
    rows = tiny_rows("train.jsonl", 16)
    prompts = [[{"role": "user", "content": f"{row['problem']}\n{INSTRUCTION}"}] for row in rows]
    batch = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, padding=True, return_dict=True,
                                          return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**batch, do_sample=False, max_new_tokens=64)[:, batch["input_ids"].shape[1]:]
    responses = tokenizer.batch_decode(output, skip_special_tokens=True)
    right = sum(boxed_integer(response) == int(row["answer"]) for response, row in zip(responses, rows))
    assert abs(right - metrics_of(learned)[-1]["eval_accuracy"] * 16) <= 1     # one: a tie in another batch shape
    samples = [row["response"] for row in read_lines(learned / "samples.jsonl")[5:10]]
    assert sum(map(str.__eq__, samples, responses)) >= 4


@pytest.mark.full
def test_weights_stay_float32_when_bfloat16_computes(small, tmp_path):
    run_here(*small, "--steps", 1, "--dtype", "bfloat16", "--out", tmp_path / "half")
    weights, start = weights_of(tmp_path / "half"), load_file(TINY / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    moved = [(weights[name] != value).float().mean() for name, value in start.items() if "mlp" in name]
    assert min(moved) > 0.5                                                    # lr 1e-4 would vanish in bfloat16
    run_here(*small, "--steps", 1, "--out", tmp_path / "full")
    assert not same_weights(tmp_path / "full", tmp_path / "half")


@pytest.mark.full
def test_zero_for_eval_every_save_every_and_delta_every_means_only_the_first_and_last(small, tmp_path, monkeypatch):
    saved, save = [], support.checkpoint.save_checkpoint

    def recording_save(out, model, tokenizer, optimizer, progress, keep):
        saved.append(progress.step)
        save(out, model, tokenizer, optimizer, progress, keep)

    monkeypatch.setattr(support.checkpoint, "save_checkpoint", recording_save)
    run_here(*small, "--steps", 3, "--eval-every", 0, "--save-every", 0, "--delta-every", 0, "--out", tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None] == [0, 3] and saved == [0, 3]
    assert all(row["delta_mean"] is None for row in rows[1:])
    saved.clear()
    run_here(*small, "--steps", 3, "--eval-every", 2, "--save-every", 2, "--delta-every", 2, "--out", tmp_path / "two")
    rows = metrics_of(tmp_path / "two")
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None] == [0, 2, 3] and saved == [0, 2, 3]
    assert [row["step"] for row in rows[1:] if row["delta_mean"] is not None] == [2]


# ----------------------------------------------------------------------------------------------- data order and seeds

def record_sampling(monkeypatch):
    """What `rollout.generate` is asked for and returns in training: [(prompts, texts), ...]; evaluations are apart."""
    trained, evaluated, original = [], [], rollout.generate

    def recording(model, tokenizer, prompts, group_size, *args, **kwargs):
        result = original(model, tokenizer, prompts, group_size, *args, **kwargs)
        (trained if group_size > 1 else evaluated).append((list(map(tuple, prompts)), result.texts))
        return result

    monkeypatch.setattr(rollout, "generate", recording)
    monkeypatch.setattr(support.evaluate, "generate", recording)
    return trained, evaluated


@pytest.mark.full
def test_every_epoch_visits_every_problem_once_in_a_new_order_and_held_out_problems_never(small, tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "model")                                  # another folder: held-out evaluation
    trained, evaluated = record_sampling(monkeypatch)
    run_here("--model", tmp_path / "model", "--data", small[1], "--eval-size", 8, "--batch-size", 11,
             "--minibatch-size", 11, "--steps", 4, "--max-new-tokens", 48, "--eval-every", 0, "--device", "cpu",
             "--dtype", "float32", "--kl-coef", 0, "--out", tmp_path / "run")
    drawn = sum((prompts for prompts, _ in trained), [])
    first, second = drawn[:22], drawn[22:]                                     # a tenth of 24 problems is held out
    assert len(set(first)) == 22 and set(first) == set(second) and first != second
    asked = [set(prompts) for prompts, _ in evaluated]
    assert asked[0] == asked[1] and len(asked[0]) == len(asked) == 2 and not asked[0] & set(first)


@pytest.mark.full
def test_the_seed_decides_the_order_of_the_data_and_the_sampling(small, tmp_path, monkeypatch):
    same = write(tmp_path / "same.jsonl", 8 * (json.dumps(tiny_rows("train.jsonl", 1)[0]) + "\n"))
    runs, _ = record_sampling(monkeypatch)
    for name, flags in enumerate((["--seed", 0], ["--seed", 0], ["--seed", 1],
                                  ["--data", same, "--seed", 0], ["--data", same, "--seed", 1])):
        run_here(*small, "--steps", 1, *flags, "--out", tmp_path / str(name))
    prompts, texts = zip(*runs)
    assert prompts[0] == prompts[1] != prompts[2] and texts[0] == texts[1]
    assert prompts[3] == prompts[4] and texts[3] != texts[4]                   # eight times the same question


@pytest.mark.full
def test_rounds_and_steps_sample_anew(small, tmp_path, monkeypatch):
    """One question eight times, twice a step: no responses come back, as they would with one seed for all."""
    same = write(tmp_path / "same.jsonl", 8 * (json.dumps({"problem": "1+1", "answer": "x"}) + "\n"))
    runs, _ = record_sampling(monkeypatch)
    run_here(*small, "--data", same, "--sampling-rounds", 2, "--steps", 2, "--out", tmp_path / "run")
    assert len({tuple(texts) for _, texts in runs}) == len(runs) == 4
