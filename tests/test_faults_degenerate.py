"""Degenerate rollouts and long runs: training goes on or stops with one clear line, and no metric is ever NaN."""
import contextlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, Qwen2Config

import train
from test_real_models import ROOT, SIZES, TOKENIZER, save
from test_train import (ENVIRONMENT, METRICS, SAMPLE_METRICS, UPDATE_METRICS, command, error_of, metrics_of, run_here,
                        trainer_state, weights_of)

RESULTS = ROOT / "tests" / "results"
METHODS = ("nthr", "grpo", "pos-only", "random")
PAD, EOS, LETTER = 0, 1, 20
LONGEST = 6                                                                    # --max-new-tokens


# ----------------------------------------------------------------------------------------- 7. degenerate rollouts

def certain(folder, *tokens):
    """A model that says these tokens with all of the probability, in equal parts, whatever came before.

    One entry of each embedding is so large that the head's input is nearly (√d, 0, ..., 0); the head reads it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(tie_word_embeddings=False, **SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 100
        model.get_output_embeddings().weight[:, 0] = 0
        model.get_output_embeddings().weight[list(tokens), 0] = 10             # logits 10 √32 = 57 and about 0
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"end": certain(folder / "end", EOS), "letter": certain(folder / "letter", LETTER),
            "padding": certain(folder / "padding", PAD), "end or letter": certain(folder / "either", EOS, LETTER),
            "any": save(Qwen2Config(tie_word_embeddings=False, **SIZES), folder / "any")}


def reward_file(folder, rule):
    """--reward for a function of n, how many responses were rewarded before this one."""
    file = folder / "reward.py"
    file.write_text(f"import itertools\n\ncounter = itertools.count()\n\n\ndef reward(response, answer):\n"
                    f"    n = next(counter)\n    return {rule}\n")
    return f"{file}:reward"


def flags_for(folder, reward, out, steps=2):
    """4 questions in 2 mini-batches, 4 responses each; evaluations reward 2 responses."""
    return ["--model", folder, "--data", ROOT / "tiny" / "train.jsonl", "--eval-data", ROOT / "tiny" / "test.jsonl",
            "--eval-size", 2, "--reward", reward, "--batch-size", 4, "--minibatch-size", 2, "--group-size", 4,
            "--max-new-tokens", LONGEST, "--micro-batch-tokens", 200, "--lr", 1e-3, "--kl-coef", 0.1, "--nll-coef", 0.1,
            "--steps", steps, "--delta-every", 1, "--eval-every", 0, "--save-every", 0, "--device", "cpu",
            "--dtype", "float32", "--out", out]


def assert_finite_or_null(value):
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_finite_or_null(part)
    if not isinstance(value, (dict, list)):
        assert value is None or isinstance(value, str) or math.isfinite(value)


def steps_of(folder):
    """The rows of metrics.jsonl after step 0, once every number in it and every weight is found finite."""
    rows = metrics_of(folder)
    assert_finite_or_null(rows)
    assert all(weight.isfinite().all() for weight in weights_of(folder).values())
    assert [row["step"] for row in rows] == list(range(len(rows)))
    for row in rows[1:]:
        assert set(row) == METRICS and not any(row[name] is None for name in SAMPLE_METRICS)
    return rows[1:]


def largest_move(folder, model):
    """By how much the weight that changed most did, between a model and a run's checkpoint."""
    before, after = load_file(model / "model.safetensors"), weights_of(folder)
    return max((before[name] - after[name]).abs().max().item() for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, longest, length", [
    ("end", LONGEST, 1), ("letter", LONGEST, LONGEST), ("padding", LONGEST, LONGEST), ("end or letter", LONGEST, None),
    ("any", LONGEST, None), ("any", 1, 1)])
def test_rewards_that_have_nothing_to_do_with_the_responses(name, longest, length, method, dtype, models, tmp_path):
    """Every second response is right: empty, cut off, one token again and again, decoded as "", one token long, any."""
    run_here(*flags_for(models[name], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1), "--method", method,
             "--dtype", dtype, "--max-new-tokens", longest)
    row, = steps_of(tmp_path / "run")
    assert row["groups_kept"] == 4 and row["success_rate"] == 0.5 and row["updates"] == 2
    for metric in UPDATE_METRICS:
        measured = method in ("nthr", "random") or metric not in ("tau", "eta", "selected_share")
        assert (row[metric] is not None) == measured, metric
    if name == "end or letter":
        assert 1 < row["response_length"] < LONGEST and 0 <= row["truncated_share"] < 1
    if length:
        assert row["response_length"] == length
    if name in ("end", "letter", "padding"):
        assert row["truncated_share"] == (name != "end")
        # π = 1 of what is sampled: no error e_y − π, so no score, no gradient, no likelihood to gain
        assert row["nll"] == row["kl"] == row["delta_mean"] == 0 and row["grad_norm"] < 1e-10
        assert not row["tau"] or abs(row["tau"]) < 1e-10
        assert largest_move(tmp_path / "run", models[name]) < 1e-9
    else:
        assert largest_move(tmp_path / "run", models[name]) > 0.9e-3           # AdamW's first step moves by lr


def test_the_padding_of_the_models_above_is_decoded_as_nothing(models):
    model = train.load_model(models["padding"], "cpu")
    assert train.generate(model, TOKENIZER, [[5, 6]], 3, LONGEST, seed=0).texts == [""] * 3


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("method", METHODS)
def test_identical_responses_to_one_question_half_of_them_right(method, group_size, models, tmp_path, monkeypatch):
    """With p = 1/2, Â = ±1 and η = 0. At γ = 1 Eq. 1's loss is −(1 − what is left of the wrong ones) / 2.

    What is left: for pos-only nothing, for grpo all, else all but the selected share; the KL penalty is still 0."""
    generate = train.generate

    def same(model, tokenizer, prompts, size, *args, **kwargs):
        sampled = generate(model, tokenizer, prompts, size, *args, **kwargs)
        return sampled.select(torch.arange(len(prompts)).repeat_interleave(size) * size)

    monkeypatch.setattr(train, "generate", same)
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--nll-coef", 0.25)
    first, second = steps_of(tmp_path / "run")
    assert first["groups_kept"] == first["updates"] == second["updates"] == 1
    left = {"grpo": 1, "pos-only": 0}.get(method, 1 - (first["selected_share"] or 0))
    if method in ("nthr", "random"):                                           # s⁻ = s⁺, and τ is their mean
        assert first["eta"] == 0 and 0 < first["selected_share"] < 1
    assert first["loss"] == pytest.approx(-(1 - left) / 2 + 0.25 * first["nll"], abs=1e-5) and abs(first["kl"]) < 1e-6
    assert second["kl"] > 0 and largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("method", METHODS)
def test_one_question_per_batch_with_the_smallest_group_and_a_large_one(method, group_size, models, tmp_path):
    """The micro-batches hold only a part of the large group."""
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--batch-size", 1, "--minibatch-size", 1, "--group-size", group_size, "--micro-batch-tokens", 40)
    for row in steps_of(tmp_path / "run"):
        assert row["questions"] == row["groups_kept"] == row["updates"] == 1 and row["success_rate"] == 0.5
    assert largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("method", ["nthr", "grpo"])
def test_batches_without_a_mixed_group_update_nothing_and_then_training_goes_on(method, right, models, tmp_path):
    """All wrong, or all right, for three steps with a checkpoint after them; then every second response is right."""
    sampled = 2 + 3 * 2 * 16 + 2                                               # evaluations, three steps of two rounds
    reward = reward_file(tmp_path, f"n % 2 if n >= {sampled} else {right}")
    run_here(*flags_for(models["any"], reward, tmp_path / "run", steps=3), "--method", method, "--sampling-rounds", 2)
    for row in steps_of(tmp_path / "run"):
        assert row["groups_kept"] == 0 and row["success_rate"] == right and row["questions"] == 8
        assert all(row[metric] is None for metric in UPDATE_METRICS)
    assert largest_move(tmp_path / "run", models["any"]) == 0
    assert trainer_state(tmp_path / "run")["optimizer"]["state"] == {}
    run_here("--resume", tmp_path / "run", "--steps", 5)
    for row in steps_of(tmp_path / "run")[3:]:
        assert row["groups_kept"] == 4 and row["updates"] == 2 and row["questions"] == 4
    assert largest_move(tmp_path / "run", models["any"]) > 0


@pytest.mark.parametrize("family", ["rotary", "learned"])
@pytest.mark.parametrize("room, longest", [(LONGEST, LONGEST), (1, 1), (LONGEST - 1, LONGEST), (0, 1), (-1, 1)])
def test_a_prompt_that_leaves_room_for_the_response_works_and_a_longer_one_is_named(family, room, longest, tmp_path):
    """Learned positions are rows of a table, so that one position too many would be an index error."""
    problem = "1+2*3-4"
    length = len(train.encode_prompt(TOKENIZER, problem, ""))
    sizes = SIZES | {"max_position_embeddings": length + room}
    config = Qwen2Config(**sizes) if family == "rotary" else OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **sizes)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": text, "answer": 1}) + "\n" for text in ("1", problem)))
    flags = [*flags_for(save(config, tmp_path / "model"), reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1),
             "--data", data, "--eval-data", data, "--max-new-tokens", longest, "--group-size", 16]
    if room >= longest:
        run_here(*flags)
        row, = steps_of(tmp_path / "run")
        assert row["updates"] == 2 and row["truncated_share"] > 0              # some went on to the end of the context
    else:
        message = error_of(*flags, starts=True)
        for words in (problem, f"takes {length} tokens", f"--max-new-tokens {longest}", f"context of {length + room}"):
            assert words in message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("method", ["nthr", "grpo"])
def test_temperatures_at_which_every_token_is_certain_or_every_one_as_likely(method, temperature, models, tmp_path):
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--method", method,
             "--temperature", temperature)
    for row in steps_of(tmp_path / "run"):
        assert row["groups_kept"] == 4 and row["updates"] >= 1
        if temperature == 1e30:                                                # −ln π = ln V, for half of the responses
            assert row["nll"] == pytest.approx(math.log(SIZES["vocab_size"]) / 2, rel=0.2)


def test_rounding_that_spoils_the_scores_is_named_and_not_a_traceback(models, tmp_path):
    """At so low a temperature the logits of bfloat16, divided by it, are far from those of float32."""
    flags = flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=3)
    message = error_of(*flags, "--temperature", 1e-3, "--dtype", "bfloat16", starts=True)
    assert "cannot score the answers of step" in message and "--dtype float32" in message and "--resume" in message


@pytest.mark.parametrize("rule, warned", [("1", True), ("n % 2", False)])
def test_a_run_that_made_no_update_says_so(rule, warned, models, tmp_path, capsys):
    run_here(*flags_for(models["any"], reward_file(tmp_path, rule), tmp_path / "run"))
    assert ("warning: no update was made" in capsys.readouterr().err) == warned


def test_an_infinite_threshold_is_null(models, tmp_path):
    run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run", steps=1), "--beta=-inf")
    row, = steps_of(tmp_path / "run")
    assert row["tau"] is None and row["selected_share"] == 1                   # every wrong token


def test_a_temperature_that_float32_cannot_divide_by_is_named(models, tmp_path):
    with pytest.raises(FloatingPointError, match="at temperature 1e-38 are not finite.*too low"):
        run_here(*flags_for(models["any"], reward_file(tmp_path, "n % 2"), tmp_path / "run"), "--temperature", 1e-38)


# ------------------------------------------------------------------------------------------------- 10. a long run

SOAK = ["--steps", 500, "--batch-size", 16, "--minibatch-size", 8, "--eval-every", 100, "--save-every", 10, "--seed", 0]


def slope(x, y):
    """Least squares: the slope of y over x, and half the width of its 95% band if the residuals were independent."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    centered = x - x.mean()
    value = centered @ y / (centered @ centered)
    residuals = y - y.mean() - value * centered
    return value, 1.96 * math.sqrt(residuals @ residuals / (len(x) - 2) / (centered @ centered))


def test_the_slope_of_a_line_a_leak_and_noise():
    x = np.arange(200)
    assert slope(x, 7 - 0.25 * x) == pytest.approx((-0.25, 0), abs=1e-12)
    # by hand: x = 0, 1, 2, 3 and y = 0, 2, 2, 4: Σ(x−x̄)y = 6, Σ(x−x̄)² = 5; residuals −0.2, 0.6, −0.6, 0.2
    assert slope([0, 1, 2, 3], [0, 2, 2, 4]) == pytest.approx((6 / 5, 1.96 * math.sqrt(0.8 / 2 / 5)))
    noise = np.random.default_rng(0).normal(0, 3, (100, 200))
    inside = [abs(slope(x, 500 + 0.02 * x + y)[0] - 0.02) < slope(x, 500 + 0.02 * x + y)[1] for y in noise]
    assert 88 <= sum(inside) <= 100                                            # 95 are expected
    assert slope(x, [3 if i % 10 else 30 for i in range(200)])[0] == pytest.approx(0, abs=0.01)   # peaks, but no trend


def resources(pid):
    """MiB resident and the number of open file handles of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd"))


def fifth(rows, number, steps):
    """The rows, which begin with a step, of one fifth of the steps, counted from 1."""
    return [row for row in rows if (number - 1) * steps / 5 < row[0] <= number * steps / 5]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory and files of a process in /proc")
def test_the_resources_of_a_process_are_counted(tmp_path):
    memory, handles = resources(os.getpid())
    kilobytes = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory == pytest.approx(int(kilobytes[1]) / 1024, rel=0.05)
    with open(tmp_path / "a", "w"), open(tmp_path / "b", "w"):
        assert resources(os.getpid())[1] == handles + 2
    assert resources(os.getpid())[1] == handles
    assert [row[0] for row in fifth([(step,) for step in range(21)], 2, 20)] == [5, 6, 7, 8]


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory and files of a process in /proc")
def test_memory_file_handles_and_speed_stay_as_they_are_over_hundreds_of_steps(tmp_path):
    """Memory over the steps after the first fifth; handles and speed of the second fifth against those of the last."""
    metrics, samples = tmp_path / "run" / "metrics.jsonl", []                  # (step, MiB, handles)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command(*SOAK, "--out", "run"), cwd=tmp_path, env=ENVIRONMENT, stdout=output,
                                   stderr=output)
        try:
            while process.poll() is None:
                step = metrics.read_text().count("\n") - 1 if metrics.exists() else -1
                with contextlib.suppress(OSError):                             # it has just ended
                    samples.append((step, *resources(process.pid)))
                time.sleep(0.25)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "output").read_text()[-2000:]
    rows = metrics_of(tmp_path / "run")[1:]
    assert_finite_or_null(rows)
    steps = len(rows)
    samples = [row for row in samples if row[0] < steps]                       # not of a process that is ending
    late = [row for row in samples if row[0] > steps / 5]
    growth, band = (100 * value for value in slope([row[0] for row in late], [row[1] for row in late]))
    handles = [statistics.median_low(row[2] for row in fifth(samples, number, steps)) for number in (2, 5)]
    # seconds of a step but for its evaluation, per 1000 sampled tokens
    cost = [(row["step"], 1000 * sum(value for phase, value in row["seconds"].items() if phase != "evaluation")
             / (row["response_length"] * row["questions"] * 8)) for row in rows]
    seconds = [statistics.median(row[1] for row in fifth(cost, number, steps)) for number in (2, 5)]
    model_name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    measured = {
        "command": " ".join(["python train.py", *map(str, SOAK)]), "seed": 0, "steps": steps,
        "samples_after_warm_up": len(late),
        "memory_mib_per_100_steps": growth, "band_of_95_percent": band,
        "median_memory_mib_by_fifth": [statistics.median(row[1] for row in fifth(samples, number, steps))
                                       for number in range(1, 6)],
        "file_handles": {"second_fifth": handles[0], "last_fifth": handles[1]},
        "seconds_per_1000_tokens": {"second_fifth": seconds[0], "last_fifth": seconds[1]},
        "speed_drift": seconds[1] / seconds[0], "greedy_accuracy": rows[-1]["eval_accuracy"],
        "machine": {"cores": os.cpu_count(), "threads_used": 1, "cpu": model_name[1] if model_name else None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}
    print(json.dumps(measured, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(measured, indent=1) + "\n")
    assert growth < 2 and handles[0] == handles[1] and 0.5 < measured["speed_drift"] < 2
