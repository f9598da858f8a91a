"""One training step: the update against one written out here, its passes, --method, and what an A/B rests on.

The update of train.py is compared with `step_by_hand`, which shares nothing with it but the samples: full logits of
sequences padded on the right, Eq. 7 as a sum over all pairs of tokens, Eq. 1 by autograd, AdamW written out."""
import functools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import grpo
import rollout
import support.models
from helpers import (ROOT, error_of, metrics_of, read_lines, run_here, same_weights, small_flags, weights_of,
                     without_wall_clock, write)
from nthr import nthr_advantages
from reward import math_reward
from support.data import EMBEDDED, encode_prompt, load_reward, run_file, step_seed
from support.memory import PHASES

TINY = ROOT / "tiny"
SAMPLE_METRICS = ("questions", "groups_kept", "success_rate", "response_length", "truncated_share")
UPDATE_METRICS = ("tau", "eta", "selected_share", "updates", "skipped_updates", "loss", "clip_share", "kl", "nll",
                  "grad_norm", "ratio_deviation", "delta_mean", "delta_nonpositive_share")
AR = '''"""AR (arXiv 2505.12929): a token of probability π keeps α π + 1 − α of its advantage."""
ALPHA = 0.1


def ar(advantages, hidden, tokens, mask, correct, lm_head, logprobs):
    return (ALPHA * logprobs.exp() + 1 - ALPHA) * advantages
'''


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of the smallest run that still learns something, evaluated on one problem."""
    return [*small_flags(tmp_path_factory.mktemp("data")), "--eval-size", 1]


@pytest.fixture(scope="module")
def step(small, tmp_path_factory):
    """step("--flag", value, ...) -> the folder of a one-step run with these flags; the same flags run once."""
    folders = {}

    def runs(*flags):
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("step") / "run"
            run_here(*small, "--steps", 1, *flags, "--out", folders[flags])
        return folders[flags]

    return runs


def relative_difference(a, b, start):
    """How far apart two sets of weights are, each as one vector, in units of the way from `start` to the first."""
    def distance(x, y):
        return math.sqrt(sum((x[name].double() - y[name].double()).square().sum().item() for name in x))

    assert a.keys() == b.keys() and distance(a, start) > 0
    return distance(a, b) / distance(a, start)


def unlike(row, expected, rel, abs):
    """(name, found, expected) of the metrics that differ by more; None is only like None."""
    return [(name, row[name], value) for name, value in expected.items() if
            (row[name] is not None if value is None else row[name] != pytest.approx(value, rel=rel, abs=abs))]


def tiny_weights():
    return load_file(TINY / "model.safetensors")


# ------------------------------------------------------------------------------- the update, against one by hand

DEFAULT = dict(method="nthr", nthr_vocab="responses", beta=1.0, eta="2|0.5-p|", tau_over="all", batch_size=8,
               minibatch_size=8, group_size=8, sampling_rounds=1, temperature=1.0, kl_coef=0.0, nll_coef=0.0,
               clip_eps=0.2, lr=1e-3, max_grad_norm=1.0, delta_every=1)


def full_pass(model, prompts, responses, temperature):
    """ln π over the vocabulary (B, T, V), that of the response's tokens (B, T), and the last hidden states (B, T, d).

    Prompt and response of a row stand together and padding is on the right, where a causal model does not see it."""
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, responses)], batch_first=True)
    tokens, T = pad_sequence(responses, batch_first=True), max(map(len, responses))
    before = torch.tensor([[len(prompt) - 1] for prompt in prompts]) + torch.arange(T)       # state k predicts token k
    place = torch.arange(len(ids))[:, None], before.clamp(max=ids.shape[1] - 1)
    output = model(ids, output_hidden_states=True)
    pi = torch.log_softmax(output.logits[place] / temperature, -1)
    return pi, pi.gather(2, tokens[..., None])[..., 0], output.hidden_states[-1][place]


def sample_by_hand(model, tokenizer, problems, case):
    """Prompts and responses of the kept groups, row by row, whether each is correct (K, G), and metrics of all."""
    prompts, responses, correct, every, Q, G = [], [], [], [], case["batch_size"], case["group_size"]
    order = np.random.default_rng([0, 0]).permutation(len(problems))
    for round_ in range(case["sampling_rounds"]):
        asked = [problems[q] for q in order[round_ * Q:(round_ + 1) * Q]]
        sample = rollout.generate(model, tokenizer, [encode_prompt(tokenizer, row["problem"]) for row in asked], G, 40,
                                  case["temperature"], step_seed(0, 1, round_), 1024, keep_hidden=False)
        for q, row in enumerate(asked):
            rows = range(q * G, (q + 1) * G)
            right = [math_reward(sample.texts[i], row["answer"]) == 1 for i in rows]
            every += [(right[i - q * G], len(ids), ids[-1] != tokenizer.eos_token_id) for i in rows
                      for ids in [sample.response_ids[i][sample.response_mask[i]].tolist()]]
            if 0 < sum(right) < G and len(correct) < Q:
                correct.append(right)
                prompts += [sample.prompt_ids[i][sample.prompt_mask[i]] for i in rows]
                responses += [sample.response_ids[i][sample.response_mask[i]] for i in rows]
        if len(correct) == Q:
            break
    rates = zip(("success_rate", "response_length", "truncated_share"), np.array(every, float).mean(0).tolist())
    return prompts, responses, torch.tensor(correct), {"questions": len(every) // G, **dict(rates)}


def algorithm_1_by_hand(A, pi, hidden, tokens, mask, correct, case):
    """Algorithm 1 of one group by Eq. 7 over all pairs of tokens, in float64: advantages, τ, η and tokens selected."""
    h, y, right = hidden[mask].double(), tokens[mask], correct[:, None].expand_as(mask)[mask]
    errors = torch.nn.functional.one_hot(y, pi.shape[-1]) - pi[mask].double().exp()                # e_y − π, (N, V)
    if case["nthr_vocab"] == "responses":
        errors = errors[:, y.unique()]                                         # V*_x
    scores, pairs = torch.zeros(mask.shape, dtype=torch.float64), (errors @ errors.T) * (h @ h.T)
    scores[mask] = pairs[:, right].sum(1)                                      # Σ over the positive tokens
    owner = torch.arange(len(mask))[:, None].expand_as(mask)[mask]             # the response of each token
    means = [pairs[owner == i][:, right & ((owner != i) if case["tau_over"] == "others" else True)].sum(1).mean().item()
             for i in correct.nonzero()[:, 0]]
    tau = case["beta"] * min(means)
    p = correct.float().mean().item()
    eta = {"2|0.5-p|": 2 * abs(0.5 - p), "p": p, "1-p": 1 - p}[case["eta"]]
    selected = mask & ~correct[:, None] & (scores > tau)
    return torch.where(selected, eta * A, A), tau, eta, selected.sum().item()


def step_by_hand(problems, case):
    """One step of `case` with two passes per mini-batch: the weights after it, and the metrics that it logs."""
    model, reference = (AutoModelForCausalLM.from_pretrained(TINY).eval() for _ in range(2))
    tokenizer, temperature = AutoTokenizer.from_pretrained(TINY), case["temperature"]
    prompts, responses, correct, sampled = sample_by_hand(model, tokenizer, problems, case)
    K, G = correct.shape
    tokens = pad_sequence(responses, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(response)] for response in responses])
    with torch.no_grad():                                                      # the first pass: π_old
        pi, old, hidden = full_pass(model, prompts, responses, temperature)
        ref = full_pass(reference, prompts, responses, temperature)[1]
    advantages, found = [], []
    for k in range(K):
        rows, p = slice(k * G, (k + 1) * G), correct[k].double().mean()
        sigma = (p * (1 - p)).sqrt()
        A = torch.where(correct[k], (1 - p) / sigma, -p / sigma).float()[:, None].repeat(1, tokens.shape[1])
        if case["method"] == "nthr":
            A, *metrics = algorithm_1_by_hand(A, pi[rows], hidden[rows], tokens[rows], mask[rows], correct[k], case)
            found.append(metrics)
        elif case["method"] == "pos-only":
            A = torch.where(A < 0, 0.0, A)
        elif case["method"] == "ar":
            A = (0.1 * old[rows].exp() + 1 - 0.1) * A
        advantages.append(A)
    A = torch.cat(advantages)
    parameters, moments, logged = dict(model.named_parameters()), {}, []
    parts = np.array_split(np.arange(K), min(K, case["batch_size"] // case["minibatch_size"]))
    for number, part in enumerate(parts, 1):
        rows = [k * G + i for k in part.tolist() for i in range(G)]
        new = full_pass(model, [prompts[i] for i in rows], [responses[i] for i in rows], temperature)[1]
        t = new.shape[1]                                                       # the longest response of these rows
        m, a, o, r = mask[rows, :t], A[rows, :t], old[rows, :t], ref[rows, :t]
        right = correct.flatten()[rows, None]

        def mean(value):                                                       # Eq. 1's normaliser, by question
            groups = torch.where(m, value, 0.0).view(len(part), -1).sum(1), m.view(len(part), -1).sum(1)
            return (groups[0] / groups[1]).mean()

        ratio, low, high = (new - o).exp(), 1 - case["clip_eps"], 1 + case["clip_eps"]
        clipped = ((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))
        kl, nll = mean((r - new).exp() - 1 - (r - new)), mean(torch.where(right, -new, 0.0))
        loss = (-mean(torch.minimum(ratio * a, ratio.clamp(low, high) * a)) + case["kl_coef"] * kl
                + case["nll_coef"] * nll)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        for name, g in gradients.items():                                      # AdamW without weight decay
            g = g * min(1.0, case["max_grad_norm"] / (norm + 1e-6))
            first, second = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            moments[name] = first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
            with torch.no_grad():
                denominator = (second / (1 - 0.95 ** number)).sqrt() + case["adam_eps"]
                parameters[name] -= case["lr"] * first / (1 - 0.9 ** number) / denominator
        logged.append({"loss": loss.item(), "nll": nll.item(), "clip_share": mean(clipped.float()).item(),
                       "grad_norm": norm, "kl": kl.item()})
    with torch.no_grad():
        change = torch.where(mask, full_pass(model, prompts, responses, temperature)[1] - old, 0.0).sum(1).view(K, G)
    delta = [change[k][correct[k]].mean().item() for k in range(K)]            # Eq. 2
    metrics = {name: np.mean([row[name] for row in logged]).item() for name in logged[0]}
    metrics |= {"groups_kept": K, "updates": len(logged), **sampled}
    if not case["kl_coef"]:
        metrics["kl"] = None
    if case["delta_every"]:
        metrics |= {"delta_mean": np.mean(delta).item(),
                    "delta_nonpositive_share": np.mean(np.array(delta) <= 0).item()}
    if found:
        tau, eta, selected = np.array(found).T
        metrics |= {"tau": tau.mean().item(), "eta": eta.mean().item(),
                    "selected_share": (selected.sum() / mask[~correct.flatten()].sum()).item()}
    return {name: value.detach() for name, value in model.state_dict().items()}, metrics


def unlike_a_step_by_hand(change, small, folder, monkeypatch, adam_eps=1e-3, tolerance=3e-5):
    """What differs between a run of one step and `step_by_hand`, and the hand-made metrics.

    AdamW divides by the size of a gradient. A large ε keeps it from blowing up the rounding of those that are almost
    zero, so that weights can be compared to some 1e-5 of the way moved, as float32 weights hold it."""
    case, flags = {**DEFAULT, "adam_eps": adam_eps, **change}, []
    for name, value in {**DEFAULT, **change}.items():
        flags += [f"--{name.replace('_', '-')}", value]
    if case["method"] == "ar":
        write(folder / "ar.py", AR)
        flags += ["--method", f"{folder / 'ar.py'}:ar"]
    out = folder / f"run{len(list(folder.iterdir()))}"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=adam_eps))
        run_here(*small, *flags, "--steps", 1, "--out", out)
    weights, metrics = step_by_hand(read_lines(small[1]), case)
    row, failed = metrics_of(out)[1], []
    difference = relative_difference(weights_of(out), weights, tiny_weights())
    if difference > tolerance:
        failed.append(("weights", difference))
    delta = metrics.pop("delta_mean", None)                                    # a sum of many changes of either sign
    failed += unlike(row, {"delta_mean": delta}, rel=1e-4, abs=1e-4) + unlike(row, metrics, rel=1e-4, abs=1e-6)
    if row["ratio_deviation"] > 1e-4:
        failed.append(("ratio_deviation", row["ratio_deviation"]))
    return [(*change.items(), *what) for what in failed], metrics


CASES = (   # pairwise, not all combinations
    dict(minibatch_size=8),
    dict(minibatch_size=4, nthr_vocab="all", kl_coef=0.1, nll_coef=0.3, temperature=0.8, clip_eps=0.01, lr=5e-3,
         delta_every=0, sampling_rounds=2),
    dict(minibatch_size=2, nll_coef=0.3, temperature=1.2, eta="p", beta=0.5, tau_over="others", max_grad_norm=0.1),
    dict(minibatch_size=2, method="grpo", kl_coef=0.1, temperature=0.8),
    dict(minibatch_size=8, method="pos-only", kl_coef=0.1, nll_coef=0.3, eta="1-p", lr=5e-3),
    dict(minibatch_size=4, method="ar", temperature=1.2, clip_eps=0.01, lr=5e-3),
    dict(minibatch_size=2, method="grpo", clip_eps=0.01, lr=5e-3, kl_coef=1.0, batch_size=4, group_size=4,
         sampling_rounds=3),
    dict(minibatch_size=4, nthr_vocab="all", eta="1-p", beta=0.1, batch_size=4, group_size=4, sampling_rounds=3))


def test_a_step_is_that_of_two_passes_written_out(small, tmp_path, monkeypatch):
    """1, 2 and 4 mini-batches, with and without KL, NLL and Δ(x); a second round of sampling fills a batch."""
    failed, metrics = zip(*(unlike_a_step_by_hand(case, small, tmp_path, monkeypatch) for case in CASES[:3]))
    assert not sum(failed, [])
    assert metrics[0]["groups_kept"] < metrics[1]["groups_kept"] == 8
    assert metrics[1]["clip_share"] > 0 and metrics[2]["selected_share"] > 0 and metrics[1]["kl"] > 1e-6


@pytest.mark.full
def test_a_step_is_that_of_two_passes_written_out_for_other_methods_and_sampling_rounds(small, tmp_path, monkeypatch):
    failed, metrics = zip(*(unlike_a_step_by_hand(case, small, tmp_path, monkeypatch) for case in CASES[3:]))
    assert not sum(failed, [])
    assert metrics[3]["clip_share"] > 0 and metrics[4]["groups_kept"] == 4


@pytest.mark.full
def test_the_small_epsilon_of_adamw_is_kept(small, tmp_path, monkeypatch):
    """With ε = 1e-8 almost all weights move by lr; the few whose gradient is rounding may go either way."""
    failed, _ = unlike_a_step_by_hand(CASES[0], small, tmp_path, monkeypatch, adam_eps=1e-8, tolerance=0.01)
    assert not failed


# ------------------------------------------------------------------------------------------ the passes of a step

def passes_of(small, out, monkeypatch, *flags):
    """(what a step does with its models in order, its metrics): "no gradient", "gradient", "reference", "update"."""
    events, loaded, load_model, response_logprobs = [], [], support.models.load_model, grpo.response_logprobs

    def recorded(model, *args):
        reference = model is not loaded[0]
        events.append("reference" if reference else "gradient" if torch.is_grad_enabled() else "no gradient")
        return response_logprobs(model, *args)

    monkeypatch.setattr(support.models, "load_model", lambda *args: loaded.append(load_model(*args)) or loaded[-1])
    monkeypatch.setattr(grpo, "response_logprobs", recorded)
    hook = register_optimizer_step_pre_hook(lambda *args: events.append("update"))
    try:
        run_here(*small, "--micro-batch-tokens", 10 ** 6, "--steps", 1, *flags, "--out", out)
    finally:
        hook.remove()
        monkeypatch.undo()
    return events, metrics_of(out)[1]


def test_the_first_mini_batch_makes_no_pass_for_old_probabilities_and_later_ones_make_theirs_before_any_update(
        small, tmp_path, monkeypatch):
    events, row = passes_of(small, tmp_path / "1", monkeypatch, "--delta-every", 0)
    assert events == ["gradient", "update"]
    assert row["seconds"]["old_probabilities"] == 0.0 < row["seconds"]["model_update"]
    assert set(PHASES) <= set(row["seconds"]) and row["seconds"]["likelihood_change"] == 0.0

    events, row = passes_of(small, tmp_path / "2", monkeypatch, "--minibatch-size", 4, "--micro-batch-size", 8,
                            "--kl-coef", 0.1)
    first, second = (len(part) for part in np.array_split(range(row["groups_kept"]), 2))   # micro-batches of one group
    assert second > 1
    expected = (["no gradient"] * second + ["reference", "gradient"] * first + ["update"]
                + ["reference", "gradient"] * second + ["update"])
    assert events[:len(expected)] == expected
    assert 0 < len(events) - len(expected) < first + second                    # Δ(x), of correct responses alone
    assert set(events[len(expected):]) == {"no gradient"}
    assert row["seconds"]["old_probabilities"] > 0 and row["seconds"]["reference"] > 0


@pytest.mark.full
def test_passes_of_four_mini_batches(small, tmp_path, monkeypatch):
    events, row = passes_of(small, tmp_path / "4", monkeypatch, "--minibatch-size", 2, "--delta-every", 0)
    updates = min(row["groups_kept"], 4)
    assert updates > 2 and events == ["no gradient"] * (updates - 1) + ["gradient", "update"] * updates


def test_each_mini_batch_is_one_update_and_there_are_no_more_than_kept_groups(step):
    one, eight = step(), step("--minibatch-size", 1)
    kept = metrics_of(one)[1]["groups_kept"]
    assert kept > 1 and metrics_of(one)[1]["updates"] == 1 and metrics_of(eight)[1]["updates"] == kept
    assert relative_difference(weights_of(one), weights_of(eight), tiny_weights()) > 0.1


@pytest.mark.full
def test_mini_batches_are_whole_groups_and_as_equal_as_possible(small, tmp_path, monkeypatch):
    sizes, original = [], grpo.token_weights
    monkeypatch.setattr(grpo, "token_weights", lambda mask, group_size: (
        sizes.append(len(mask) / group_size), original(mask, group_size))[1])
    run_here(*small, "--steps", 1, "--minibatch-size", 2, "--out", tmp_path / "run")
    kept = metrics_of(tmp_path / "run")[1]["groups_kept"]
    assert sizes == [len(part) for part in np.array_split(range(kept), min(kept, 4))]


def test_the_size_of_micro_batches_does_not_change_a_step(step):
    whole, failed = step(), []
    expected = {name: metrics_of(whole)[1][name] for name in UPDATE_METRICS if name != "ratio_deviation"}
    for flags in (("--micro-batch-tokens", 700), ("--micro-batch-size", 3)):
        parts = step(*flags)
        difference = relative_difference(weights_of(whole), weights_of(parts), tiny_weights())
        failed += [(flags, *what) for what in unlike(metrics_of(parts)[1], expected, rel=1e-3, abs=1e-6)]
        failed += [(flags, "weights", difference)] if difference >= 0.01 else []
    assert not failed


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(step, small, tmp_path, monkeypatch):
    """With it, each row is computed whole, and once more in the backward pass; without, prompts are computed apart."""
    forward, columns, counts = Qwen2MLP.forward, [], []

    def counting(self, x):
        columns.extend([x.shape[1]] * torch.is_grad_enabled())                 # of the update's passes
        return forward(self, x)

    monkeypatch.setattr(Qwen2MLP, "forward", counting)
    for name, flags in (("without", []), ("with", ["--gradient-checkpointing"])):
        columns.clear()
        run_here(*small, "--steps", 1, "--micro-batch-tokens", 16384, *flags, "--out", tmp_path / name)
        counts.append(Counter(columns))
    layers = json.loads((TINY / "config.json").read_text())["num_hidden_layers"]
    apart, whole = counts                                                      # one micro-batch
    assert list(apart.values()) == [layers, layers] and whole == {sum(apart) + 1: 2 * layers}      # P and T - 1, P + T
    assert relative_difference(weights_of(tmp_path / "without"), weights_of(tmp_path / "with"), tiny_weights()) < 0.01


# --------------------------------------------------------------- rounding: the sampler's numbers and the update's

def test_the_deviation_of_the_ratio_is_that_of_the_largest_token_since_sampling_and_moves_nothing(
        step, small, tmp_path, monkeypatch):
    """The sampler's ln π is shifted on two tokens: the update takes its own, whose ratio is 1."""
    flags = ["--method", "grpo", "--micro-batch-size", 8]
    original, plain = rollout.concatenate, step(*flags)

    def shifted(rollouts):
        joined = original(rollouts)
        lengths = joined.response_mask.sum(1)                                  # micro-batches are sorted by it
        joined.logprobs[lengths.argmin(), 0] += 0.5
        joined.logprobs[lengths.argmax(), 2] -= 0.25
        assert joined.hidden is None                                           # grpo reads no states: none are kept
        return joined

    monkeypatch.setattr(rollout, "concatenate", shifted)
    run_here(*small, "--steps", 1, *flags, "--out", tmp_path / "run")
    (_, row), (_, expected) = (without_wall_clock(metrics_of(folder)) for folder in (tmp_path / "run", plain))
    assert row["ratio_deviation"] == pytest.approx(max(1 - math.exp(-0.5), math.exp(0.25) - 1), rel=1e-3)
    assert expected["ratio_deviation"] < 1e-4
    assert {**row, "ratio_deviation": 0} == {**expected, "ratio_deviation": 0}
    assert same_weights(tmp_path / "run", plain)


@pytest.mark.full
def test_in_bfloat16_the_clip_does_not_fire_on_rounding(small, tmp_path, monkeypatch):
    """Steps that move nothing leave the ratio of each token at 1 exactly, in every mini-batch and micro-batch.

    Passes of other shapes, as those of the sampler, can differ by more than 1e-3 in bfloat16."""
    original, dtypes = grpo.response_logprobs, set()

    def recording(model, *args, **kwargs):
        dtypes.add(grpo.compute_dtype(model))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(grpo, "response_logprobs", recording)
    run_here(*small, "--steps", 1, "--dtype", "bfloat16", "--minibatch-size", 4, "--micro-batch-tokens", 300, "--lr",
             1e-30, "--clip-eps", 1e-7, "--gradient-checkpointing", "--out", tmp_path / "run")
    row = metrics_of(tmp_path / "run")[1]
    assert dtypes == {torch.bfloat16}
    assert row["updates"] == 2 and row["clip_share"] == 0 and row["delta_mean"] == pytest.approx(0, abs=0.05)
    assert row["ratio_deviation"] < 0.3


@pytest.mark.full
def test_selection_from_the_states_that_bfloat16_sampling_kept_is_that_of_float32():
    """On at least 95% of the negative tokens, for both embedded models; float32's states come from one forward pass."""
    for folder, source in EMBEDDED.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        rows, reward = read_lines(folder / "train.jsonl")[:24], load_reward(source)
        instruction = {} if source == "math" else {"instruction": ""}
        prompts = [encode_prompt(tokenizer, row["problem"], **instruction) for row in rows]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sample = rollout.generate(model, tokenizer, prompts, 8, 64, seed=0)
        assert sample.hidden.dtype == torch.bfloat16
        right = torch.tensor([reward(text, rows[i // 8]["answer"]) for i, text in enumerate(sample.texts)]) == 1
        with torch.no_grad():
            _, logprobs, hidden = full_pass(model, *([ids[keep] for ids, keep in zip(*pair)] for pair in (
                (sample.prompt_ids, sample.prompt_mask), (sample.response_ids, sample.response_mask))), 1.0)
        same, selected = [], []
        for group in torch.arange(len(right)).split(8):
            if 0 < right[group].sum() < 8:
                tokens, mask = sample.response_ids[group], sample.response_mask[group]
                half, full = (nthr_advantages(
                    torch.ones(mask.shape), states[group], tokens, mask, right[group],
                    model.get_output_embeddings().weight, logprobs=values[group]).selected
                    for states, values in ((sample.hidden, sample.logprobs), (hidden, logprobs)))
                negative = mask & ~right[group][:, None]
                same.append((half == full)[negative])
                selected.append(full[negative])
        agreement, selected = torch.cat(same).float().mean().item(), torch.cat(selected).float().mean().item()
        assert len(same) > 5 and selected > 0.02 and agreement >= 0.95, (folder.name, agreement, selected)


# ------------------------------------------------------------------------------------- --method FILE.py:FUNCTION

METHODS = '''import torch

from nthr import nthr_advantages

calls = []


def unchanged(advantages, *group):
    calls.append([value.clone() for value in (advantages, *group)])
    return advantages


def nthr(advantages, hidden, tokens, mask, correct, lm_head, logprobs):
    return nthr_advantages(advantages, hidden, tokens, mask, correct, lm_head, logprobs=logprobs).advantages


def another_shape(advantages, *group):
    return advantages[:, :1]


def not_a_number(advantages, *group):
    advantages[-1, -1] = torch.nan
    return advantages


def numbers(advantages, *group):
    return advantages.tolist()


def array(advantages, *group):
    return advantages.numpy()


def nothing(advantages, *group):
    pass
'''


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    return write(tmp_path_factory.mktemp("methods") / "my_rules.py", METHODS)


def test_a_function_of_the_users_own_is_called_once_per_kept_group_and_its_advantages_are_used(step, methods):
    """One that changes nothing is grpo, and one that calls nthr_advantages is nthr, bit for bit."""
    file = run_file(str(methods))
    file["calls"].clear()
    mine, grpo_run = step("--method", f"{methods}:unchanged"), step("--method", "grpo")
    assert same_weights(mine, grpo_run) and without_wall_clock(metrics_of(mine)) == without_wall_clock(
        metrics_of(grpo_run))
    row, V, d = metrics_of(mine)[1], 100, 128
    assert len(file["calls"]) == row["groups_kept"] > 1
    successes = 0
    for advantages, hidden, tokens, mask, correct, lm_head, logprobs in file["calls"]:
        G, T = tokens.shape
        assert (G, T) == (8, mask.sum(1).max()) and mask.dtype == correct.dtype == torch.bool
        assert [x.shape for x in (advantages, mask, logprobs, correct, hidden, lm_head)] == [
            (G, T), (G, T), (G, T), (G,), (G, T, d), (V, d)]
        p = correct.float().mean().item()
        assert 0 < p < 1
        for i in range(G):
            expected = ((1 - p) if correct[i] else -p) / math.sqrt(p * (1 - p))
            assert advantages[i].tolist() == pytest.approx([expected] * T, abs=1e-6)
        own = torch.log_softmax(hidden @ lm_head.T, -1).gather(2, tokens[..., None])[..., 0]
        assert torch.allclose(own[mask], logprobs[mask], atol=1e-4) and not logprobs[~mask].any()
        assert not (hidden.requires_grad or logprobs.requires_grad)
        successes += int(correct.sum())
    assert 0 < successes <= row["success_rate"] * 64
    assert same_weights(step("--method", f"{methods}:nthr"), step())


def test_a_function_of_the_users_own_gets_the_head_of_the_policy_that_was_sampled_from(step, methods):
    file = run_file(str(methods))
    file["calls"].clear()
    step("--method", f"{methods}:unchanged", "--temperature", "0.7")
    for _, hidden, tokens, mask, _, lm_head, logprobs in file["calls"]:
        own = torch.log_softmax(hidden @ lm_head.T, -1).gather(2, tokens[..., None])[..., 0]
        assert torch.allclose(own[mask], logprobs[mask], atol=1e-4)
    assert file["calls"]


def test_advantages_that_cannot_be_used_end_the_run_with_one_line(small, methods, tmp_path):
    failed = []
    for name in ("another_shape", "not_a_number", "numbers", "array", "nothing"):
        message = error_of(*small, "--steps", 1, "--method", f"{methods}:{name}", "--out", tmp_path / name)
        if not all(part in message for part in ("--method", f"{methods}:{name}", "finite", "(G, T) = (8, ")):
            failed.append((name, message))
    assert not failed


def test_ar_is_a_function_of_ten_lines(tmp_path):
    """m = α π + 1 − α on every token, right and wrong. What a run does with it is among `CASES`."""
    assert len(AR.splitlines()) <= 10
    rule = run_file(str(write(tmp_path / "ar.py", AR)))["ar"]
    advantages, pi = torch.tensor([[2.0, 2.0], [-0.5, -0.5]]), torch.tensor([[1.0, 0.5], [0.25, 0.1]])
    assert rule(advantages, None, None, None, None, None, pi.log()).tolist() == [
        pytest.approx([2 * 1.0, 2 * 0.95]), pytest.approx([-0.5 * 0.925, -0.5 * 0.91])]


# ------------------------------------------------------------------------------------------------ A/B comparisons

def test_methods_see_the_same_rollouts_in_their_first_step_and_change_the_update(step):
    runs = [step(*flags) for flags in
            ((), ("--method", "grpo"), ("--method", "pos-only"), ("--method", "random"))]
    sampled = [[metrics_of(folder)[1][name] for name in SAMPLE_METRICS] for folder in runs]
    assert sampled[0] == sampled[1] == sampled[2] == sampled[3] and metrics_of(runs[0])[1]["groups_kept"] >= 2
    assert not [(i, j) for i in range(4) for j in range(i) if same_weights(runs[i], runs[j])]


def test_nthr_with_eta_one_is_grpo(step):
    assert same_weights(step("--eta", "1"), step("--method", "grpo"))


def test_nthr_with_beta_minus_infinity_and_eta_zero_is_pos_only(step):
    folder = step("--beta=-inf", "--eta", "0")
    assert same_weights(folder, step("--method", "pos-only"))
    row = metrics_of(folder)[1]
    assert row["selected_share"] == 1 and row["tau"] is None                   # −∞ is not JSON


def test_random_selects_as_many_tokens_as_nthr_in_each_response_and_weakens_them_by_eta(step, small, tmp_path,
                                                                                       monkeypatch):
    nthr, chance = metrics_of(step())[1], metrics_of(step("--method", "random"))[1]
    assert 0 < nthr["selected_share"] == chance["selected_share"] < 1
    assert nthr["tau"] == chance["tau"] and nthr["eta"] == chance["eta"]
    seen = {}
    for method in ("nthr", "random"):
        original = grpo.grpo_loss

        def recording(logprobs, old, advantages, mask, *args, **kwargs):
            seen[method] = advantages.clone(), mask.clone()
            return original(logprobs, old, advantages, mask, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(grpo, "grpo_loss", recording)
            run_here(*small, "--steps", 1, "--eta", 0, "--method", method, "--micro-batch-tokens", 10 ** 6, "--out",
                     tmp_path / method)
    (a, mask), (b, _) = seen["nthr"], seen["random"]                           # the rows in the same order
    zeros = [((x == 0) & mask).sum(1) for x in (a, b)]
    assert zeros[0].sum() > 0 and zeros[0].equal(zeros[1])
    assert ((a == 0) & mask != (b == 0) & mask).any()                          # others than NTHR's


@pytest.mark.full
def test_random_tokens_have_a_seed_of_their_own_in_each_step(small, tmp_path, monkeypatch):
    seeds, select, sample = [], grpo.random_selection, rollout.generate

    def selection(selected, mask, correct, generator):
        if generator.initial_seed() not in seeds[-1:]:                         # one generator for all groups of a step
            seeds.append(generator.initial_seed())
        return select(selected, mask, correct, generator)

    def sampling(model, tokenizer, prompts, group_size, limit, temperature, seed, *args, **kwargs):
        seeds.append(seed)
        return sample(model, tokenizer, prompts, group_size, limit, temperature, seed, *args, **kwargs)

    monkeypatch.setattr(grpo, "random_selection", selection)
    monkeypatch.setattr(rollout, "generate", sampling)
    run_here(*small, "--steps", 2, "--method", "random", "--out", tmp_path / "run")
    assert len(seeds) == len(set(seeds)) == 4


def test_methods_without_nthr_log_no_nthr_metrics(step):
    for method in ("grpo", "pos-only"):
        row = metrics_of(step("--method", method))[1]
        assert row["tau"] is row["eta"] is row["selected_share"] is None, method


@pytest.mark.full
def test_more_sampling_rounds_fill_the_batch_with_mixed_groups(step):
    one, four = (step("--batch-size", 16, "--minibatch-size", 16, "--group-size", 4, "--sampling-rounds", n)
                 for n in (1, 4))
    assert metrics_of(one)[1]["questions"] == 16 and metrics_of(one)[1]["groups_kept"] < 16
    assert metrics_of(four)[1]["questions"] in (32, 48, 64) and metrics_of(four)[1]["groups_kept"] == 16
    for folder in (one, four):
        position = json.loads((folder / "checkpoint" / "progress.json").read_text())["position"]
        assert position == metrics_of(folder)[1]["questions"]


@pytest.mark.full
def test_the_kl_penalty_is_zero_before_the_first_update_and_grows(step, small, tmp_path):
    run_here(*small, "--steps", 2, "--kl-coef", 10, "--out", tmp_path / "run")
    first, second = metrics_of(tmp_path / "run")[1:]
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert first["seconds"]["reference"] > 0 == metrics_of(step())[1]["seconds"]["reference"]
    assert relative_difference(weights_of(step()), weights_of(step("--kl-coef", 10)), tiny_weights()) < 0.01


@pytest.mark.full
def test_the_reference_of_a_resumed_run_is_the_initial_model(small, tmp_path):
    flags = [*small, "--kl-coef", 1, "--lr", 1e-3]
    run_here(*flags, "--steps", 2, "--out", tmp_path / "whole")
    run_here(*flags, "--steps", 1, "--out", tmp_path / "parts")
    run_here("--resume", tmp_path / "parts", "--steps", 2)
    assert metrics_of(tmp_path / "parts")[2]["kl"] == metrics_of(tmp_path / "whole")[2]["kl"] > 1e-6
