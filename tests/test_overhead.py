"""experiments/overhead.py: memory, growth, ratios and token counts by hand, each benchmark at its smallest size."""
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import ENVIRONMENT, ROOT, run_here, wrong_endings
from support.data import TINY, encode_prompts, load_problems, load_reward

sys.path.insert(0, str(ROOT / "experiments"))

import overhead  # noqa: E402

SIZES = ["--batch-size", "2", "--group-size", "4", "--max-new-tokens", "8", "--repetitions", "3", "--device", "cpu"]
SMALL = (2, 32, 4, 2, 48)      # layers, d, heads, key-value heads, intermediate size


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):                    # for programs that the script starts
        monkeypatch.setenv(name, ENVIRONMENT[name])


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(overhead, "SHAPES", dict.fromkeys(overhead.SHAPES, SMALL))
    monkeypatch.setattr(overhead, "VOCABULARY", 500)


def run(*flags):
    """The record that the script writes."""
    overhead.main([*SIZES, *map(str, flags), "--out", "out"])
    return json.loads(Path("out/overhead.json").read_text(encoding="utf-8"))


def check_ratio(found, values):
    """A ratio of the record against the values it must summarise."""
    assert found["values"] == pytest.approx(values)
    assert found["median"] == pytest.approx(statistics.median(values))
    assert (found["min"], found["max"]) == pytest.approx((min(values), max(values)))
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


def test_growth_is_the_exponent_of_a_power_law_over_the_larger_half():
    sizes = [256, 512, 1024, 2048, 4096, 8192, 16384]
    for exponent in (0.5, 1, 2):
        assert overhead.growth(sizes, [3e-5 * size ** exponent for size in sizes]) == pytest.approx(exponent)
    # of 5 sizes the last three, where the values triple with the size; before that they are constant
    assert overhead.growth([4, 8, 16, 48, 144], [1, 1, 1, 3, 9]) == pytest.approx(1)
    assert overhead.growth([4, 8], [1, 4]) == pytest.approx(2)


def test_ratio_by_hand():
    found = overhead.ratio("a / b", [1.5, 4.0, 1.0], at_least=1.5)
    assert found == {"ratio": "a / b", "median": 1.5, "min": 1.0, "max": 4.0, "goal": ">= 1.5", "met": True,
                     "values": [1.5, 4.0, 1.0]}
    assert not overhead.ratio("a / b", [1.5, 4.0, 1.0], at_least=1.6)["met"]
    assert overhead.ratio("a / b", [0.02, 0.04], at_most=0.03)["met"]
    found = overhead.ratio("a / b", [0.02, 0.05], at_most=0.03)
    assert (found["median"], found["goal"], found["met"]) == (pytest.approx(0.035), "<= 0.03", False)
    assert overhead.cells([3.0, 1.0, 2.5], ".1f") == ["2.5", "1.0 – 3.0"]


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
        tokens, expected = overhead.library_generate(model, tokenizer, prompts, stop_ids, args), 0
        assert [len(part) for part in seen] == [8, 4]                          # at most 8 rows at a time, all 12
        for part, width in zip(seen, (max(map(len, prompts[:2])), len(prompts[2]))):
            for row in part[:, width:].tolist():
                length = next((k + 1 for k, token in enumerate(row) if token in stop_ids), len(row))
                assert row[length:] == [0] * (len(row) - length), stop_ids     # padding: it has stopped
                expected += length
        assert tokens == expected and (stop_ids or tokens == 12 * 6), stop_ids


def test_a_random_model_has_the_parameters_of_its_shape(small_shapes):
    folder = overhead.make_model(Path("made"), "0.5B", seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    d, kv, inner = 32, 2 * 32 // 4, 48                     # a head has 32 / 4 numbers, keys and values have 2 heads
    layer = (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * inner + 2 * d    # q, k and v with bias, o, MLP, two norms
    assert model.num_parameters() == 500 * d + 2 * layer + d                   # the head is tied to the embedding
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    overhead.make_model(folder, "0.5B", seed=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before         # kept


def test_the_shapes_have_the_sizes_that_their_names_say():
    for name, parameters in (("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688)):    # model cards
        layers, d, heads, kv_heads, inner = overhead.SHAPES[name]
        kv = d // heads * kv_heads
        layer = (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * inner + 2 * d
        assert overhead.VOCABULARY * d + layers * layer + d == parameters


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


@pytest.mark.parametrize("as_program", [False, pytest.param(True, marks=pytest.mark.full)])
def test_train_py_is_measured_without_its_first_step(as_program, monkeypatch):
    """The metrics are those of steps 2 and 3. As a program of its own, train.py has to find what the reward imports."""
    if not as_program:                                                         # the same flags, without the imports
        monkeypatch.setattr(overhead.subprocess, "run", lambda command, **_: run_here(*command[2:]) or SimpleNamespace(
            returncode=0))
    args = overhead.parse_args([*SIZES, "--out", "out"])
    steps = overhead.train_metrics(args, "grpo", 2, "--lr=1e-3")
    logged = [json.loads(line) for line in Path("out/train-grpo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [0, 1, 2, 3] and steps == logged[2:]
    config = json.loads(Path("out/train-grpo/config.json").read_text())
    assert (config["method"], config["lr"], config["reward"]) == ("grpo", 1e-3, overhead.REWARD)
    assert (config["batch_size"], config["minibatch_size"], config["max_new_tokens"]) == (2, 2, 8)
    for step in steps:
        assert (step["questions"], step["groups_kept"], step["updates"], step["success_rate"]) == (2, 2, 1, 0.5)
        assert step["seconds"]["data_generation"] > 0 and step["seconds"]["likelihood_change"] == 0
        assert overhead.step_seconds(step) == pytest.approx(
            sum(value for phase, value in step["seconds"].items() if phase != "evaluation"))
    assert "evaluation" in steps[-1]["seconds"] and not Path("out/train-grpo/checkpoint").exists()


def test_step_sums_up_what_train_py_measured(monkeypatch, capsys):
    """Table 3 from invented seconds: of 2, 0.5 and 1% of a step, 1% is the median."""
    def metrics(args, method, steps):
        assert (method, steps) == ("nthr", 3)
        return [{"seconds": {"data_generation": 60 - nthr, "nthr": nthr, "old_probabilities": 0.0, "reference": 10.0,
                             "model_update": 30.0, "likelihood_change": 0.0, "evaluation": 7.0}}
                for nthr in (2, 0.5, 1)]

    monkeypatch.setattr(overhead, "train_metrics", metrics)
    record = run("step")
    result = record["results"]["step"]
    assert list(record["results"]) == ["step"] and [m["nthr"] for m in result["measured"]] == [2, 0.5, 1]
    check_ratio(result["ratios"][0], [0.02, 0.005, 0.01])
    assert result["ratios"][0]["goal"] == "<= 0.03"
    printed = capsys.readouterr().out
    assert "| nthr | 1.0000 | 0.5000 – 2.0000 | 1.00% | 22 | 4.2% |" in printed
    assert "| old_probabilities | 0.0000 | 0.0000 – 0.0000 | 0.00% | 55 | 10.5% |" in printed
    assert "| total | 100.0000 | 100.0000 – 100.0000 |  | 522 |  |" in printed
    assert record["seed"] == 0 and record["processor"] and record["sizes"]["batch_size"] == 2


def test_scores_of_every_variant_and_size():
    result = run("scores", "--score-tokens", 16, 32)["results"]["scores"]
    variants = ["all", "responses", "responses, logprobs", "pairwise"]
    assert sorted((row["variant"], row["tokens"]) for row in result["measured"]) == sorted(
        (variant, size) for variant in variants for size in (16, 32))
    V, d = 100, 128                                                            # of the embedded model
    for row in result["measured"]:
        N, U = row["tokens"], row["ids"]
        numbers = {"all": N * V + V * d + N * d, "responses": N * V + U * d + N * d,           # N < 512: one chunk
                   "responses, logprobs": N * U + U * d + N * d, "pairwise": N * V}[row["variant"]]
        assert row["bound_bytes"] == 4 * numbers and 1 < row["peak_bytes"] / row["bound_bytes"] < 4
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
    assert [r["ratio"] for r in result["ratios"]] == [
        f"{name}, {variant}" for variant in variants[:3] for name in ("growth with N", "peak / bound at any N")]
    peaks = {(row["variant"], row["tokens"]): row["peak_bytes"] / row["bound_bytes"] for row in result["measured"]}
    check_ratio(result["ratios"][1], [max(peaks["all", size] for size in (16, 32))])


@pytest.mark.full
def test_sampling_at_stops_and_at_a_fixed_length():
    result = run("sampling", "--max-new-tokens", 48)["results"]["sampling"]
    for name, found in zip(("stops", "fixed length"), result["ratios"]):
        ours, theirs = (result["measured"][name][who] for who in ("rollout.generate", "model.generate"))
        check_ratio(found, [(a[0] / a[1]) / (b[0] / b[1]) for a, b in zip(ours, theirs)])
        assert found["goal"] == ">= 1.5" and len(ours) == len(theirs) == 3
        for tokens, seconds in ours + theirs:
            assert seconds > 0 and (tokens == 2 * 4 * 48) == (name == "fixed length") and tokens <= 2 * 4 * 48


def test_loss_at_a_small_vocabulary(small_shapes):
    result = run("loss", "--loss-rows", 2, "--loss-tokens", 24)["results"]["loss"]
    measured = result["measured"]
    ours, naive = "grpo.response_logprobs", "full logits"
    check_ratio(result["ratios"][0], [measured["peak_bytes"][ours] / measured["peak_bytes"][naive]])
    check_ratio(result["ratios"][1], [b / a for a, b in zip(measured["seconds"][ours], measured["seconds"][naive])])
    # Logits, their log_softmax, and the gradient of one of them exist at one time: (2, 31 or 24, 500) float32.
    assert measured["peak_bytes"][naive] > 3 * 4 * 2 * 24 * 500


def test_sampling_from_a_shape_that_replaces_the_model(small_shapes):
    record = run("sampling", "--shape", "0.5B", "--repetitions", 1)
    assert record["sizes"]["shape"] == "0.5B" and Path("out/0.5B/config.json").is_file()
    for tokens, _ in record["results"]["sampling"]["measured"]["fixed length"]["model.generate"]:
        assert tokens == 2 * 4 * 8


def test_without_trl_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("trl")["results"]["trl"]
    assert list(result) == ["not_run"] and "pip install trl" in result["not_run"]
    assert result["not_run"] in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.filterwarnings("error::FutureWarning")
def test_trl_makes_as_many_steps_of_the_same_size(capsys):
    pytest.importorskip("trl")
    result = run("trl", "--trl-rows", 4, "--repetitions", 2)["results"]["trl"]  # the second ends with a step of ours
    measured = result["measured"]
    assert {name: len(runs) for name, runs in measured.items()} == {"nthr": 2, "grpo": 2, "trl": 2}
    assert all(seconds > 0 and tokens == 2 * 4 * 8 for runs in measured.values() for tokens, seconds in runs)  # no stop
    for found, method, per_token in zip(result["ratios"], ("nthr", "nthr", "grpo", "grpo"), (False, True) * 2):
        check_ratio(found, [b[1] / a[1] / (b[0] / a[0] if per_token else 1)
                            for a, b in zip(measured[method], measured["trl"])])
        assert found["goal"] == ">= 1.3"


def test_bad_input_ends_with_one_line():
    Path("file").write_text("")
    assert not wrong_endings(lambda flags: overhead.main([*SIZES, "--out", "out", *flags]), [
        (["speed"], "no benchmark is called speed: choose from step, scores, sampling, loss, trl"),
        (["step", "--repetitions", 0], "--repetitions must be at least 1, got 0"),
        (["step", "--group-size", 1], "--group-size must be at least 2, got 1"),
        (["scores", "--score-tokens", 16, 30], "--score-tokens must be multiples of --group-size 4, got 16 30"),
        (["scores", "--score-tokens", 0], "--score-tokens must be multiples of --group-size 4, got 0"),
        (["trl", "--trl-rows", 3], "--trl-rows 3 must divide the 8 rows of a step"),
        (["scores", "--model", "."], "the folder . has no config.json"),
        (["step", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["step", "--out", "file"], "--out file cannot be used as a folder")])


@pytest.mark.full
def test_an_error_of_train_py_is_passed_on():
    assert not wrong_endings(lambda flags: overhead.main([*SIZES, "--out", "out", *flags]), [
        (["step", "--data", "missing.jsonl"], "train.py ended with: cannot read the data file missing.jsonl")])


def test_help_names_the_benchmarks_and_their_sizes(capsys):
    with pytest.raises(SystemExit) as caught:
        overhead.main(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "--score-tokens" in printed and "Table 3" in printed
