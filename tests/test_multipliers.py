"""experiments/multipliers.py: each rule against a choice of tokens written out by loops, and through train.py."""
import inspect
import math
import sys

import pytest
import torch

from helpers import ROOT, metrics_of, run_here
from nthr import nthr_advantages, nthr_scores
from support.data import run_file

sys.path.insert(0, str(ROOT / "experiments"))

import common  # noqa: E402

FILE = ROOT / "experiments" / "multipliers.py"
RULES = {name: function for name, function in run_file(str(FILE)).items()
         if hasattr(function, "__wrapped__") and function.__module__ != "nthr"}         # what @rule has wrapped


def random_group(seed, G=6, T=9, d=8, V=12):
    """A group of G responses with a NaN wherever no token is, so that a rule that reads padding shows it."""
    g = torch.Generator().manual_seed(seed)
    hidden, W = torch.randn(G, T, d, generator=g), torch.randn(V, d, generator=g)
    tokens, mask = torch.randint(V, (G, T), generator=g), torch.arange(T) < torch.randint(3, T + 1, (G, 1), generator=g)
    logprobs = torch.log_softmax(hidden @ W.T, -1).gather(-1, tokens[..., None])[..., 0]
    correct = torch.tensor([True, True, True, True, False, False])[torch.randperm(G, generator=g)]        # η = 1/3
    advantages = torch.where(correct, 0.7, -1.4)[:, None].repeat(1, T)
    return advantages, hidden.masked_fill(~mask[..., None], math.nan), tokens, mask, correct, W, logprobs


def weakened(rule, group):
    """{row: its weakened tokens}, of a rule that only multiplies tokens of wrong responses by η = 2|0.5 − 4/6|."""
    advantages, _, _, mask, correct, *_ = group
    made, chosen = RULES[rule](*group), {}
    for i in range(len(mask)):
        for k in range(mask.shape[1]):
            if mask[i, k]:
                factor = (made[i, k] / advantages[i, k]).item()
                assert factor == pytest.approx(1, abs=1e-6) or not correct[i] and factor == pytest.approx(1 / 3)
                if factor < 0.9:
                    chosen.setdefault(i, set()).add(k)
    return chosen


def scores_by_loops(group):
    """What the rules that choose by another score go by, token by token."""
    _, hidden, tokens, mask, correct, W, _ = group
    found = {name: {} for name in ("highest_entropy", "highest_probability", "errors_alone", "states_alone")}
    valid = [(i, k) for i in range(len(mask)) for k in range(mask.shape[1]) if mask[i, k]]
    pi = {at: torch.softmax(hidden[at] @ W.T, -1) for at in valid}
    error = {at: torch.eye(len(W))[tokens[at]] - pi[at] for at in valid}
    for b in valid:
        right = [a for a in valid if correct[a[0]]]
        found["highest_entropy"][b] = -sum(p * math.log(p) for p in pi[b].tolist())
        found["highest_probability"][b] = pi[b][tokens[b]].item()
        found["errors_alone"][b] = sum((error[a] @ error[b]).item() for a in right)
        found["states_alone"][b] = sum((hidden[a] @ hidden[b]).item() for a in right)
    for name in ("entropy", "probability"):
        found[f"lowest_{name}"] = {at: -value for at, value in found[f"highest_{name}"].items()}
    return found


def test_rules_by_another_score_weaken_as_many_tokens_as_nthr_those_with_the_highest():
    seen = 0
    for seed in range(6):
        group = random_group(seed)
        counts = nthr_advantages(*group[:-1], logprobs=group[-1], tau_over="others").selected.sum(1)
        for rule, scores in scores_by_loops(group).items():
            found = weakened(rule, group)
            for row, count in enumerate(counts.tolist()):
                ranked = sorted((at for at in scores if at[0] == row), key=lambda at: -scores[at])
                assert found.get(row, set()) == {k for _, k in ranked[:count]}, (seed, rule, row)
                seen += count
    assert seen > 100


def test_probabilities_that_round_to_1_are_told_apart():
    """A head scaled by 40: most π are 1 in float32, and the choice is still that of float64."""
    chosen = 0
    for seed in range(6):
        _, hidden, tokens, mask, correct, W, _ = group = random_group(seed)
        best = (hidden @ W.T).argmax(-1)                                       # sure of these tokens
        sure = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
        tokens = torch.where(sure, best, tokens)
        logprobs = torch.log_softmax(hidden.double() @ W.T.double() * 40, -1).gather(-1, tokens[..., None])[..., 0]
        group = (group[0], hidden, tokens, mask, correct, 40 * W, logprobs.float())
        others = torch.log_softmax(hidden.double() @ W.T.double() * 40, -1).scatter(-1, tokens[..., None], -math.inf)
        doubt = others.logsumexp(-1)                                           # ln(1 − π)
        counts = nthr_advantages(*group[:-1], logprobs=group[-1], tau_over="others").selected.sum(1).tolist()
        found = weakened("highest_probability", group)
        for row, count in enumerate(counts):
            ranked = sorted(mask[row].nonzero()[:, 0].tolist(), key=lambda k: doubt[row, k].item())
            assert found.get(row, set()) == set(ranked[:count]), (seed, row)
            chosen += count
    assert chosen > 20


def test_quantiles_of_the_groups_own_scores():
    for seed in range(4):
        group = random_group(seed)
        scores = nthr_scores(*group[1:])
        ranked = sorted(((scores[i, k].item(), i, k) for i in range(6) for k in range(9)
                         if group[3][i, k] and not group[4][i]), reverse=True)
        for percent in (10, 20, 50):
            found = {(row, k) for row, columns in weakened(f"top_{percent}_percent", group).items() for k in columns}
            count = math.ceil((len(ranked) - 1) * percent / 100)               # above a quantile of n values
            assert found == {(i, k) for _, i, k in ranked[:count]}, (seed, percent)


def test_ar_by_hand():
    group = random_group(3)
    made = RULES["ar"](*group)
    for i, k in group[3].nonzero().tolist():
        factor = 0.3 * math.exp(group[6][i, k]) + 0.7
        assert made[i, k].item() == pytest.approx(group[0][i, k].item() * factor, rel=1e-5)


def test_resrl_by_the_eigenvectors_of_the_right_tokens():
    for seed in range(4):
        advantages, hidden, tokens, mask, correct, W, logprobs = group = random_group(seed)
        states = {(i, k): hidden[i, k].double() for i, k in mask.nonzero().tolist()}
        states = {at: (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() for at, h in states.items()}
        right = torch.stack([h for (i, _), h in states.items() if correct[i]])
        _, vectors = torch.linalg.eigh((right - right.mean(0)).T @ (right - right.mean(0)))        # ascending
        outside = {at: (vectors[:, :4].T @ (h - right.mean(0))).square().sum().item() for at, h in states.items()}
        low, high = torch.tensor([e for (i, _), e in outside.items() if not correct[i]]).quantile(
            torch.tensor([0.2, 0.8])).tolist()
        made, factors = RULES["resrl"](*group), []
        for (i, k), energy in outside.items():
            factors.append(0.1 if correct[i] else 0.1 + 0.9 * min(1, max(0, (energy - low) / (high - low))))
            assert made[i, k].item() == pytest.approx(advantages[i, k].item() * factors[-1], rel=1e-3), (seed, i, k)
        assert min(factors) == 0.1 and max(factors) == 1.0


def test_each_rule_is_short_and_names_what_it_stands_for():
    assert [f"{FILE}:{name}" for name in RULES] == [str(ROOT / rule) for rule in common.RULES]
    for name, rule in RULES.items():
        body = inspect.getsource(rule.__wrapped__).splitlines()
        assert len(body) <= 15 and rule.__doc__ and body[1] == f"def {name}(group):", name


@pytest.mark.full
def test_every_rule_trains(tmp_path):
    for name in RULES:
        out = tmp_path / name
        run_here("--method", f"{FILE}:{name}", "--steps", 2, "--batch-size", 4, "--minibatch-size", 4, "--eval-size", 2,
                 "--max-new-tokens", 40, "--out", out, "--device", "cpu")
        assert metrics_of(out)[-1]["updates"] == 1, name
