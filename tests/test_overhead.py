"""experiments/overhead.py: statistics, memory and token counts by hand, each benchmark at its smallest size."""
import itertools
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from helpers import ENVIRONMENT, ROOT, wrong_endings
from support.data import TINY, encode_prompts, load_problems, load_reward

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "experiments"))

import overhead  # noqa: E402

SIZES = ["--batch-size", "2", "--group-size", "4", "--max-new-tokens", "8", "--repetitions", "3", "--device", "cpu"]
SMALL = (500, 2, 32, 4, 2, 48)     # V, layers, d, heads, key-value heads, intermediate size


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):                    # for programs that the script starts
        monkeypatch.setenv(name, ENVIRONMENT[name])


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(overhead, "SHAPES", {name: (LlamaConfig if name == "135M" else Qwen2Config, *SMALL)
                                             for name in overhead.SHAPES})


def run(*flags):
    """The record that the script writes."""
    overhead.main([*SIZES, *map(str, flags), "--out", "out"])
    return json.loads(Path("out/overhead.json").read_text(encoding="utf-8"))


def seconds(*cpu, **other):
    """Runs of so many CPU seconds, each twice as long by the wall clock."""
    return [{"cpu": c, "wall": 2 * c, **other} for c in cpu]


def check_ratio(found, values):
    """A ratio of the record against the values it must summarise."""
    assert found["values"] == pytest.approx(values)
    assert found["median"] == pytest.approx(statistics.median(values))
    low, high = found["interval"]
    assert min(found["values"]) <= low <= found["median"] <= high <= max(found["values"])
    sign, goal = found["goal"].split()
    assert found["met"] is (found["median"] >= float(goal) if sign == ">=" else found["median"] <= float(goal))


def test_peak_bytes_of_tensors_made_and_freed():
    def function():
        a = torch.empty(1000, 1000)                        # 4 MB held
        b = torch.empty(500, 1000, dtype=torch.float64)    # 8 MB
        del a                                              # 4 MB
        c = torch.empty(250, 1000)                         # 5 MB
        return b, c

    assert overhead.peak_bytes(function, "cpu") == 8_000_000
    assert overhead.peak_bytes(lambda: None, "cpu") == 0


def test_peak_bytes_counts_from_what_was_held_and_inside_operations():
    held = torch.ones(1000, 1000, requires_grad=True)
    assert overhead.peak_bytes(lambda: held + held, "cpu") == 4_000_000        # held itself is not counted
    # The gradient and one tensor of an operation's own, which no Python code ever sees: logsumexp exponentiates.
    assert 4_000_000 < overhead.peak_bytes(lambda: held.detach().logsumexp(1), "cpu") < 4_100_000
    assert overhead.peak_bytes(lambda: (held * 2).sum().backward(), "cpu") >= 4_000_000
    assert held.grad is not None


def test_exponent_of_a_power_law_over_the_larger_half():
    sizes = [256, 512, 1024, 2048, 4096, 8192, 16384]
    for exponent in (0.5, 1, 2):
        assert overhead.exponent(sizes, [3e-5 * size ** exponent for size in sizes]) == pytest.approx(exponent)
    # of 5 sizes the last three, where the values triple with the size; before that they are constant
    assert overhead.exponent([4, 8, 16, 48, 144], [1, 1, 1, 3, 9]) == pytest.approx(1)
    assert overhead.exponent([4, 8], [1, 4]) == pytest.approx(2)


def test_the_bootstrap_interval_is_that_of_all_resamples():
    """Of 7 values there are 7^7 resamples, equally likely; of 3 values the smallest is the median of 7 in 27."""
    values = np.array([1.31, 0.9, 1.02, 1.4, 1.15, 2.5, 1.2])
    medians = np.median(values[np.array(list(itertools.product(range(7), repeat=7)), dtype=np.int8)], axis=1)
    expected = np.quantile(medians, (0.025, 0.975)).tolist()
    assert expected == [1.02, 1.4]                                             # neither the smallest nor the largest
    assert overhead.interval(values) == expected and overhead.interval(list(values)) == expected
    assert overhead.interval([3.0, 1.0, 2.0]) == [1, 3] and overhead.interval([2.0]) == [2, 2]


def test_ratio_by_hand():
    found = overhead.ratio("a / b", [1.5, 4.0, 1.0], at_least=1.5)
    assert found == {"ratio": "a / b", "median": 1.5, "interval": [1.0, 4.0], "goal": ">= 1.5", "met": True,
                     "values": [1.5, 4.0, 1.0], "busy": False}
    assert not overhead.ratio("a / b", [1.5, 4.0, 1.0], at_least=1.6)["met"]
    assert overhead.ratio("a / b", [0.02, 0.04], at_most=0.03)["met"]
    found = overhead.ratio("a / b", [0.02, 0.05], at_most=0.03)
    assert (found["median"], found["goal"], found["met"]) == (pytest.approx(0.035), "<= 0.03", False)


def test_runs_are_compared_pair_by_pair():
    """The median of the pairs' ratios is 2; the ratio of the medians, 3 / 2, is another."""
    above, below = seconds(2, 3, 10), seconds(1, 2, 5)
    above[1]["wall"] = 3
    found = overhead.compare("a / b", above, below, "cpu", at_least=1)
    assert (found["values"], found["wall"], found["median"]) == ([2, 1.5, 2], [2, 0.75, 2], 2)
    assert overhead.compare("a / b", above, below, "wall", at_least=1)["values"] == [2, 0.75, 2]
    per_token = overhead.compare("a / b", seconds(8, tokens=4), seconds(3, tokens=6), "cpu", per="tokens", at_least=1)
    assert per_token["values"] == [4]                                          # 2 seconds a token against 1 / 2


def test_a_ratio_is_marked_if_a_contender_or_the_machine_was_busy():
    quiet, busy = [{"cpu": 0.95, "wall": 1}] * 3, [{"cpu": 0.95, "wall": 1}] + [{"cpu": 0.85, "wall": 1}] * 2
    for above, below, expected in ((quiet, quiet, False), (quiet, busy, True), (busy, quiet, True)):
        found = overhead.compare("a / b", above, below, "cpu", at_least=1)
        assert found["busy"] is expected
        for at_start in (False, True):
            table = overhead.ratio_table({"step": {"ratios": [found]}}, at_start)
            assert table.endswith("| busy |" if expected or at_start else "| quiet |")


def test_cpu_seconds_are_those_of_every_thread_and_no_others():
    asleep = overhead.measured(lambda: time.sleep(0.2))
    assert asleep["wall"] >= 0.2 and asleep["cpu"] < 0.1

    def work():                                                                # 0.2 CPU seconds of its own thread
        start = time.thread_time()
        while time.thread_time() - start < 0.2:
            pass

    def two_threads():
        thread = threading.Thread(target=work)
        thread.start()
        work()
        thread.join()
        return {"tokens": 5}

    found = overhead.measured(two_threads)
    assert 0.4 <= found["cpu"] < 0.6 and found["tokens"] == 5
    assert overhead.times(seconds(3, 1, 2)) == ["2", "4", "0.50"]


def test_interleaved_turns_round_every_second_time_and_drops_the_warm_up():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or len(calls) for name in ("a", "b")}
    found = overhead.interleaved(contenders, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert found == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_the_reward_is_right_every_second_time_and_train_py_can_load_it():
    reward = load_reward(overhead.REWARD)
    found = [reward("the same response", "1") for _ in range(12)]
    assert found == [1.0, 0.0] * 6 or found == [0.0, 1.0] * 6
    assert [reward("\\boxed{7}", "7") for _ in range(3)] == [1, 1, 1]          # the check of a --reward


def test_lengths_count_the_first_stop_token_by_hand():
    responses = torch.tensor([[5, 7, 9, 7], [7, 0, 0, 0], [5, 5, 5, 5], [5, 5, 5, 9]])
    assert overhead.lengths_until(responses, [7, 9]).tolist() == [2, 1, 4, 4]
    assert overhead.lengths_until(responses, []).tolist() == [4, 4, 4, 4]


def test_the_librarys_sampler_gets_our_stop_ids_and_nothing_of_the_models_own(monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    model.generation_config, seen = GenerationConfig(), []
    inner = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])
    prompts = encode_prompts(load_problems(TINY / "train.jsonl")[:3], tokenizer, model.config, 6)
    args = SimpleNamespace(max_new_tokens=6, group_size=4, max_sequences=8, device="cpu")
    torch.manual_seed(0)
    for stop_ids in ([], [1], list(range(0, 100, 3))):
        seen.clear()
        tokens, expected = overhead.library_generate(model, prompts, stop_ids, args), 0
        assert [len(part) for part in seen] == [8, 4]                          # at most 8 rows at a time, all 12
        for part, width in zip(seen, (max(map(len, prompts[:2])), len(prompts[2]))):
            for row in part[:, width:].tolist():
                length = next((k + 1 for k, token in enumerate(row) if token in stop_ids), len(row))
                assert row[length:] == [0] * (len(row) - length), stop_ids     # padding: it has stopped
                expected += length
        assert tokens == expected and (stop_ids or tokens == 12 * 6), stop_ids


@pytest.mark.full
def test_continuous_batching_counts_tokens_up_to_the_stop(monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    model.generation_config, seen, inner = GenerationConfig(), [], model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])
    prompts = encode_prompts(load_problems(TINY / "train.jsonl")[:2], tokenizer, model.config, 6)
    args = SimpleNamespace(max_new_tokens=6, group_size=4, max_sequences=8, device="cpu")
    for stop_ids in ([], list(range(0, 100, 3))):
        tokens = overhead.library_generate_batch(model, prompts, stop_ids, args)
        rows = [output.generated_tokens for output in seen[-1].values()]
        assert len(rows) == 8 and tokens == sum(map(len, rows)), stop_ids
        for row in rows:
            assert len(row) == next((k + 1 for k, token in enumerate(row) if token in stop_ids), 6), stop_ids
    monkeypatch.setattr(model, "generate_batch", lambda *a, **k: {"one": None})
    with pytest.raises(RuntimeError, match="7 of 8 responses are missing"):
        overhead.library_generate_batch(model, prompts, [], args)


def test_a_random_model_has_the_parameters_of_its_shape(small_shapes):
    d, kv, inner = 32, 2 * 32 // 4, 48                     # a head has 32 / 4 numbers, keys and values have 2 heads
    layer = 2 * d * d + 2 * d * kv + 3 * d * inner + 2 * d                     # q, o, k and v, MLP, two norms
    for shape, V, biases in (("135M", 500, 0), ("0.5B", 500, d + 2 * kv), ("small", 700, d + 2 * kv)):
        folder = overhead.make_model(shape, 0, 700 if shape == "small" else None)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.num_parameters() == V * d + 2 * (layer + biases) + d, shape                   # a tied head
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
        assert overhead.stop_token_ids(model, tokenizer) == ([] if shape == "small" else [1]), shape
    before = Path(folder, "model.safetensors").stat().st_mtime_ns
    assert overhead.make_model("small", 0, 700) == folder != overhead.make_model("small", 1, 700)
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == before      # kept


def test_the_shapes_have_the_sizes_that_their_names_say():
    for name, parameters in (("135M", 134_515_008), ("0.5B", 494_032_768)):    # model cards
        config_class, V, layers, d, heads, kv_heads, inner = overhead.SHAPES[name]
        kv = d // heads * kv_heads
        layer = 2 * d * d + 2 * d * kv + 3 * d * inner + 2 * d + (config_class is Qwen2Config) * (d + 2 * kv)
        assert V * d + layers * layer + d == parameters, name


def test_prompts_have_the_tokens_that_are_asked_for():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for size in (5, 38, 200):
        args = overhead.parse_args(["--batch-size", "3", "--prompt-tokens", str(size), "--out", "out"])
        rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
        prompts = [tokenizer(f"{row['problem']}<answer>").input_ids for row in rows]               # its chat template
        assert [len(prompt) for prompt in prompts] == [size] * 3 and len(set(map(tuple, prompts))) == 3, size


def test_a_random_group_is_what_it_says():
    W = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    (hidden, tokens, mask, correct, _), logprobs = overhead.random_group(4000, W, SimpleNamespace(group_size=8, seed=0))
    assert hidden.shape == (8, 500, 6) and tokens.shape == mask.shape == logprobs.shape == (8, 500) and mask.all()
    assert correct.tolist() == [True] * 4 + [False] * 4
    assert torch.allclose(logprobs[3, 7], torch.softmax(W @ hidden[3, 7], 0)[tokens[3, 7]].log(), atol=1e-5)
    counts = tokens.flatten().bincount(minlength=50).sort(descending=True).values / 4000
    harmonic = sum(1 / r for r in range(1, 51))
    assert counts[0].item() == pytest.approx(1 / harmonic, abs=0.03)           # 0.222 ± 0.007
    assert counts[1].item() == pytest.approx(1 / harmonic / 2, abs=0.03)


def test_the_loss_is_compared_only_if_it_is_the_same(monkeypatch):
    model, ids = AutoModelForCausalLM.from_pretrained(TINY), torch.randint(2, 90, (2, 20))
    overhead.check_equal(model, ids, 8)
    naive, rotated = overhead.naive_logprobs, overhead.response_logprobs
    monkeypatch.setattr(overhead, "naive_logprobs", lambda *a: naive(*a) * 1.001)
    with pytest.raises(SystemExit, match="differ by .* in logprobs"):
        overhead.check_equal(model, ids, 8)
    # The same numbers, but no gradient of half of the tokens:
    monkeypatch.setattr(overhead, "naive_logprobs", naive)
    monkeypatch.setattr(overhead, "response_logprobs", lambda *a: torch.cat(
        [rotated(*a)[:, :6].detach(), rotated(*a)[:, 6:]], dim=1))
    with pytest.raises(SystemExit, match="differ by .* in model"):
        overhead.check_equal(model, ids, 8)


def test_our_step_is_a_whole_step_that_leaves_the_model_as_it_is():
    args = overhead.parse_args([*SIZES, "--out", "out", "--batch-size", "5", "--max-new-tokens", "40"])
    program, kept = overhead.runpy.run_path, {}

    def read_program(path):
        functions = program(path)                                              # of train.py, then of the reward
        return functions | {"load_run": lambda *a: kept.setdefault("run", functions["load_run"](*a))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead.runpy, "run_path", read_program)
        steps = overhead.our_steps(args)
    before = {name: value.clone() for name, value in kept["run"].model.state_dict().items()}
    problems = [row["problem"] for row in load_problems(TINY / "train.jsonl")[:5]]
    sampled = {"nthr": [], "grpo": []}
    for method in ("nthr", "grpo", "grpo", "nthr"):
        found = steps[method]()
        answers, *_ = kept["run"].sampled
        sampled[method].append([row["response"] for row in answers])
        assert (found["questions"], found["updates"]) == (5, 1) and 1 <= found["response_tokens"] <= 40
        assert found["prompt_tokens"] == sum(len(problem) + 1 for problem in problems) / 5         # and "<answer>"
        assert 0 < sum(found["seconds"].values()) <= found["wall"] and found["cpu"] > 0, method
        assert found["seconds"]["likelihood_change"] == 0
    assert sampled["nthr"] == sampled["grpo"] and sampled["nthr"][0] != sampled["nthr"][1]        # the same work
    assert len(kept["run"].optimizer.state) > 0                                # AdamW has done its work
    assert all(torch.equal(value, before[name]) for name, value in kept["run"].model.state_dict().items())


def test_step_sums_up_what_was_measured(monkeypatch):
    """Table 3 and ratios from invented seconds: of 2, 0.5 and 1% of a step, 1% is the median."""
    def runs(*values, cpu=100):
        found = iter([{"cpu": cpu, "wall": 100.0, "questions": 2, "prompt_tokens": 9.5, "response_tokens": 8,
                       "updates": 1, "seconds": {
                           "data_generation": 60 - nthr, "nthr": nthr, "old_probabilities": 0.0, "reference": 10.0,
                           "model_update": 30.0, "likelihood_change": 0.0}} for nthr in values])
        return lambda: next(found)

    monkeypatch.setattr(overhead, "our_steps", lambda args: {"nthr": runs(9, 2, 0.5, 1),
                                                             "grpo": runs(0, 0, 0, 0, cpu=99)})
    monkeypatch.setattr(overhead, "trl_steps", lambda args: {"TRL": runs(0, 0, 0, 0, cpu=140)})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 9, 9))
    record = run("step", "--goal", 1.41)
    result, printed = record["results"]["step"], Path("out/tables.md").read_text(encoding="utf-8")
    assert list(record["results"]) == ["step"]
    assert [m["seconds"]["nthr"] for m in result["measured"]["nthr"]] == [2, 0.5, 1]
    for found, values, goal in zip(result["ratios"], ([1.4] * 3, [140 / 99] * 3, [100 / 99] * 3, [0.02, 0.005, 0.01]),
                                   (">= 1.41", ">= 1.41", "<= 1.02", "<= 0.02"), strict=True):
        check_ratio(found, values)
        assert found["goal"] == goal and not found["busy"]
    assert [found["met"] for found in result["ratios"]] == [False, True, True, True]
    assert "| train.py, nthr | 2 | 4 | 9.5 | 8 | 1 | 8 | float32 | 1 | 100 | 100 | 1.00 |" in printed
    assert "| nthr | 1.0000 | 1.00% | 22 | 4.2% |" in printed
    assert "| old_probabilities | 0.0000 | 0.00% | 55 | 10.5% |" in printed
    assert f"load at the start: 0.25 on {os.cpu_count()} cores\n" in printed and "| quiet |" in printed
    assert record["seed"] == 0 and record["processor"] and record["sizes"]["batch_size"] == 2
    assert (record["load"], record["busy"]) == (0.25, False)


def test_scores_of_every_variant_and_size(monkeypatch):
    monkeypatch.setattr(overhead, "SCORE_TOKENS", [16, 32])
    result = run("scores")["results"]["scores"]
    variants = ["all", "responses", "responses, logprobs", "pairwise"]
    assert sorted((row["variant"], row["tokens"]) for row in result["measured"]) == sorted(
        (variant, size) for variant in variants for size in (16, 32))
    V, d = 100, 128                                                            # of the embedded model
    for row in result["measured"]:
        N, U = row["tokens"], row["ids"]
        numbers = {"all": N * V + V * d + N * d, "responses": N * V + U * d + N * d,           # N < 512: one chunk
                   "responses, logprobs": N * U + U * d + N * d, "pairwise": N * V}[row["variant"]]
        assert row["bound_bytes"] == 4 * numbers and 1 < row["peak_bytes"] / row["bound_bytes"] < 4
        assert len(row["runs"]) == 3 and min(measured["cpu"] for measured in row["runs"]) > 0
    assert [r["ratio"] for r in result["ratios"]] == [f"{name}, {variant}" for variant in variants[:3]
                                                      for name in ("exponent of N in seconds", "peak / bound at any N")]
    peaks = {(row["variant"], row["tokens"]): row["peak_bytes"] / row["bound_bytes"] for row in result["measured"]}
    check_ratio(result["ratios"][1], [max(peaks["all", size] for size in (16, 32))])


@pytest.mark.full
def test_sampling_at_stops_and_at_a_fixed_length():
    result = run("sampling", "--max-new-tokens", 48)["results"]["sampling"]
    ratios = iter(result["ratios"])
    assert not result["notes"]
    for name, goal in (("stops", ">= 1.5"), ("fixed length", ">= 1")):
        measured = result["measured"][name]
        for runs in measured.values():
            assert len(runs) == 3
            assert all((m["tokens"] == 2 * 4 * 48) == (name == "fixed length") and m["tokens"] <= 2 * 4 * 48
                       for m in runs), name
        for who in ("model.generate", "model.generate_batch"):
            found = next(ratios)
            check_ratio(found, [b["cpu"] / b["tokens"] / (a["cpu"] / a["tokens"])
                                for a, b in zip(measured["rollout.generate"], measured[who])])
            assert found["goal"] == goal and who in found["ratio"] and name in found["ratio"]


def test_sampling_without_continuous_batching_says_so(monkeypatch):
    def fails(*_):
        raise RuntimeError("no GPU")

    monkeypatch.setattr(overhead, "library_generate_batch", fails)
    result = run("sampling", "--repetitions", 1)["results"]["sampling"]
    assert "stops: model.generate_batch did not run (RuntimeError: no GPU)" in result["notes"]
    assert result["notes"][0] in Path("out/tables.md").read_text(encoding="utf-8")
    assert [list(runs) for runs in result["measured"].values()] == [["rollout.generate", "model.generate"]] * 2


def test_loss_at_a_small_vocabulary(small_shapes, monkeypatch):
    monkeypatch.setattr(overhead, "LOSS_ROWS", 2)
    monkeypatch.setattr(overhead, "LOSS_TOKENS", 24)
    result = run("loss")["results"]["loss"]
    runs, peaks = result["measured"]["seconds"], result["measured"]["peak_bytes"]
    ours, naive = "grpo.response_logprobs", "full logits"
    check_ratio(result["ratios"][0], [peaks[ours] / peaks[naive]])
    check_ratio(result["ratios"][1], [b["cpu"] / a["cpu"] for a, b in zip(runs[ours], runs[naive])])
    # Logits, their log_softmax, and the gradient of one of them exist at one time: (2, 31 or 24, 500) float32.
    assert peaks[naive] > 3 * 4 * 2 * 24 * 500


@pytest.mark.full
def test_growth_of_every_size(monkeypatch):
    monkeypatch.setattr(overhead, "BASE", {"batch_size": 2, "group_size": 2, "max_new_tokens": 4, "vocabulary": 110})
    monkeypatch.setattr(overhead, "GROWTH", {
        axis: (flag, {"vocabulary": (110, 200)}.get(flag, (2, 4)), goal)
        for axis, (flag, _, goal) in overhead.GROWTH.items()})
    result = run("growth")["results"]["growth"]
    points = iter(result["measured"])
    for axis, seconds_ratio, bytes_ratio in zip(overhead.GROWTH, result["ratios"][::2], result["ratios"][1::2],
                                                strict=True):
        a, b = next(points), next(points)
        doublings = np.log(b["size"] / a["size"])
        check_ratio(seconds_ratio, [np.log(y["cpu"] / x["cpu"]) / doublings for x, y in zip(a["runs"], b["runs"])])
        check_ratio(bytes_ratio, [np.log(b["peak_bytes"] / a["peak_bytes"]) / doublings])
        assert axis == a["axis"] == b["axis"] and axis in seconds_ratio["ratio"] and len(a["runs"]) == 3
        flag = overhead.GROWTH[axis][0]
        for point in (a, b):                                                   # the work that the size says
            sizes = overhead.BASE | {flag: point["size"]}
            assert all((found["questions"], found["response_tokens"]) == (sizes["batch_size"], sizes["max_new_tokens"])
                       for found in point["runs"]), point
    assert Path("out/growth.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.full
def test_sampling_from_a_shape_that_replaces_the_model(small_shapes, monkeypatch):
    monkeypatch.delattr("transformers.ContinuousBatchingConfig")
    record = run("sampling", "--shape", "0.5B", "--repetitions", 1)
    assert record["sizes"]["shape"] == "0.5B" and (overhead.SCRATCH / "0.5B-500-seed0").is_dir()
    for found in record["results"]["sampling"]["measured"]["fixed length"]["model.generate"]:
        assert found["tokens"] == 2 * 4 * 8


def test_without_trl_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("step", "--repetitions", 1)["results"]["step"]
    assert "pip install trl" in result["notes"][0] and list(result["measured"]) == ["nthr", "grpo"]
    assert result["notes"][0] in Path("out/tables.md").read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.filterwarnings("error::FutureWarning")
def test_trl_makes_steps_of_the_same_size(small_shapes):
    pytest.importorskip("trl")
    for flags in (["--micro-batch-size", 4], ["--shape", "135M", "--prompt-tokens", 20]):
        measured = run("step", "--repetitions", 2, *flags)["results"]["step"]["measured"]
        assert {name: len(runs) for name, runs in measured.items()} == {"nthr": 2, "grpo": 2, "TRL": 2}
        for name, runs in measured.items():
            for found in runs:
                assert found["cpu"] > 0 and found["wall"] > 0, name
                assert (found["questions"], found["updates"], found["response_tokens"]) == (2, 1, 8), (name, found)
        assert measured["TRL"][0]["prompt_tokens"] == measured["nthr"][0]["prompt_tokens"]


def test_bad_input_ends_with_one_line():
    Path("file").write_text("")
    assert not wrong_endings(lambda flags: overhead.main([*SIZES, "--out", "out", *flags]), [
        (["speed"], "no benchmark is called speed: choose from step, sampling, scores, loss, growth"),
        (["step", "--repetitions", 0], "--repetitions must be at least 1, got 0"),
        (["step", "--group-size", 1], "--group-size must be at least 2, got 1"),
        (["step", "--micro-batch-size", 3], "--micro-batch-size 3 must divide the 8 rows of a step"),
        (["step", "--batch-size", 10 ** 6], "problems only: lower --batch-size 1000000"),
        (["step", "--data", "missing.jsonl"], "cannot read the data file missing.jsonl"),
        (["scores", "--model", "."], "the folder . has no config.json"),
        (["step", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["step", "--out", "file"], "--out file cannot be used as a folder")])


def test_help_names_the_benchmarks_and_their_sizes(capsys):
    with pytest.raises(SystemExit) as caught:
        overhead.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "--prompt-tokens" in printed and "Table 3" in printed
