"""Tests of nthr.py against the equations as printed, hand arithmetic and autograd: `pytest test_nthr.py`."""
import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nthr import (NTHR, gwhes, nthr_advantages, nthr_eta, nthr_scores, nthr_scores_pairwise, nthr_threshold)

ROOT = Path(__file__).resolve().parent
ALL = {"vocabulary": "all"}


def group(seed=0, G=5, T=7, V=23, d=6, dtype=torch.float64, correct=None):
    """A random group with responses of different lengths, one of them empty: hidden, tokens, mask, correct, lm_head."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(G, T, d, generator=generator, dtype=torch.float64).to(dtype)
    lm_head = torch.randn(V, d, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(0, V - 9, (G, T), generator=generator)              # some of V never occurs: V*_x < V
    lengths = torch.randint(1, T + 1, (G,), generator=generator)
    lengths[G - 1] = 0
    mask = torch.arange(T) < lengths[:, None]
    correct = torch.tensor([i % 2 == 0 for i in range(G)] if correct is None else correct)
    return hidden, tokens, mask, correct, lm_head


def logprobs_of(hidden, tokens, lm_head, temperature=1.0):
    """ln π of the tokens over the whole vocabulary, (G, T)."""
    return torch.log_softmax(hidden @ lm_head.T / temperature, -1).gather(-1, tokens[..., None])[..., 0]


def eq7(hidden, tokens, mask, correct, lm_head, columns=None, temperature=1.0):
    """Eq. 7 in plain Python numbers, optionally with only some vocabulary columns, not renormalised (App. 7.4)."""
    h, W = hidden.double().tolist(), lm_head.double().tolist()
    columns = range(len(W)) if columns is None else columns
    errors = {}
    for i, k in mask.nonzero().tolist():
        logits = [sum(w * x for w, x in zip(row, h[i][k])) / temperature for row in W]
        z = sum(math.exp(x) for x in logits)
        errors[i, k] = [(tokens[i, k] == v).item() - math.exp(logits[v]) / z for v in columns]
    scores = torch.zeros(mask.shape, dtype=torch.float64)
    for (j, l), error in errors.items():
        for (i, k), other in errors.items():
            if correct[i]:
                alpha = sum(a * b for a, b in zip(error, other))
                scores[j, l] += alpha * sum(a * b for a, b in zip(h[i][k], h[j][l]))
    return scores


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# --- Eq. 7

def test_pairwise_is_eq7_on_paper():
    # One correct and one wrong token, V = 2, W = I, h⁺ = (ln 3, 0), h⁻ = (0, ln 3): π⁺ = (3/4, 1/4), π⁻ = (1/4, 3/4).
    # y⁺ = 0, y⁻ = 1: errors (1/4, −1/4) and (−1/4, 1/4), α = −1/8 but ⟨h⁺, h⁻⟩ = 0; ⟨h⁺, h⁺⟩ = ln²3, α⁺ = 1/8.
    log3 = math.log(3)
    hidden = torch.tensor([[[log3, 0.0]], [[0.0, log3]]], dtype=torch.float64)
    args = hidden, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False])
    close(nthr_scores_pairwise(*args, torch.eye(2, dtype=torch.float64)), torch.tensor([[log3 ** 2 / 8], [0.0]]), 1e-7)
    hidden[1, 0] = torch.tensor([log3, 0.0])                                   # same state, other token: α = −3/8
    close(nthr_scores_pairwise(*args, torch.eye(2, dtype=torch.float64)),
          torch.tensor([[log3 ** 2 / 8], [-3 / 8 * log3 ** 2]]), 1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_pairwise_and_all_are_eq7_in_float64(seed):
    args = group(seed)
    expected = eq7(*args)
    assert expected[args[2]].abs().min() > 0 and nthr_scores_pairwise(*args).dtype == torch.float64
    close(nthr_scores_pairwise(*args), expected, 1e-12)
    close(nthr_scores(*args, **ALL), expected, 1e-6)                           # returned in float32


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_the_derivative_that_autograd_finds(seed):
    """M⁺ = ∂/∂W Σ_i ln π(y⁺_i|x), s = ⟨∂ ln π(token)/∂W, M⁺⟩, with an untied head."""
    hidden, tokens, mask, correct, lm_head = group(seed)
    W = lm_head.clone().requires_grad_()
    logprobs = logprobs_of(hidden, tokens, W)
    M, = torch.autograd.grad(logprobs[mask & correct[:, None]].sum(), W, retain_graph=True)
    for j, k in mask.nonzero().tolist():
        gradient, = torch.autograd.grad(logprobs[j, k], W, retain_graph=True)
        expected = (gradient * M).sum()
        close(nthr_scores(hidden, tokens, mask, correct, lm_head, **ALL)[j, k], expected)
        close(nthr_scores_pairwise(hidden, tokens, mask, correct, lm_head)[j, k], expected, 1e-10)


def test_score_predicts_the_effect_of_a_step_on_the_correct_responses():
    """s is d/dε ln π_{W+εM⁺}(token): a small step along M⁺ changes each ln π by ε s."""
    hidden, tokens, mask, correct, lm_head = group(4)
    W = lm_head.clone().requires_grad_()
    logprobs_of(hidden, tokens, W)[mask & correct[:, None]].sum().backward()
    epsilon = 1e-6
    change = logprobs_of(hidden, tokens, lm_head + epsilon * W.grad) - logprobs_of(hidden, tokens, lm_head)
    close((change / epsilon)[mask], nthr_scores(hidden, tokens, mask, correct, lm_head, **ALL)[mask], 1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_responses_is_eq7_with_the_other_columns_dropped(seed, temperature):
    args = group(seed)
    hidden, tokens, mask, correct, lm_head = args
    columns = sorted(set(tokens[mask].tolist()))
    assert len(columns) < len(lm_head)
    expected = eq7(*args, columns=columns, temperature=temperature)
    assert not torch.allclose(expected, eq7(*args, temperature=temperature))   # it is an approximation
    close(nthr_scores(*args, temperature=temperature), expected)
    with_logprobs = nthr_scores(*args, logprobs=logprobs_of(hidden, tokens, lm_head, temperature),
                                temperature=temperature)
    close(with_logprobs, expected)
    close(nthr_scores(*args, temperature=temperature, **ALL), eq7(*args, temperature=temperature))


def test_logprobs_leave_no_work_of_vocabulary_size():
    """With logprobs the rows of lm_head outside V*_x are not even read: they may be NaN."""
    hidden, tokens, mask, correct, lm_head = group(1)
    logprobs = logprobs_of(hidden, tokens, lm_head)
    expected = nthr_scores(hidden, tokens, mask, correct, lm_head)
    unused = [v for v in range(len(lm_head)) if v not in set(tokens[mask].tolist())]
    lm_head[unused] = math.nan
    close(nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs=logprobs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", ["all", "responses"])
def test_half_precision_input_is_accumulated_in_float32(dtype, vocabulary):
    """1500 tokens of almost equal sign: a sum kept in half precision would be off by several percent."""
    args = group(2, G=4, T=500, V=40, d=16, dtype=dtype)
    hidden, tokens, mask, correct, lm_head = args
    hidden += 1                                                                # a common direction: sums grow large
    exact = nthr_scores(hidden.double(), tokens, mask, correct, lm_head.double(), vocabulary=vocabulary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = nthr_scores(*args, vocabulary=vocabulary)
    assert scores.dtype == torch.float32
    assert ((scores - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_mixed_dtypes_are_computed_in_the_widest():
    hidden, tokens, mask, correct, lm_head = args = group(4)
    expected = nthr_scores(*args)
    logprobs = logprobs_of(hidden, tokens, lm_head)
    close(nthr_scores(hidden.float(), tokens, mask, correct, lm_head, logprobs), expected, 1e-4)
    close(nthr_scores(hidden, tokens, mask, correct, lm_head.float(), logprobs.float()), expected, 1e-4)
    close(nthr_scores_pairwise(hidden.float(), tokens, mask, correct, lm_head), eq7(*args), 1e-4)


def test_the_check_of_logprobs_does_not_depend_on_the_chunks():
    """A few tokens whose log-probability is rounded badly do not end a run, whichever chunk they fall into."""
    hidden, tokens, mask, correct, lm_head = group(0)
    logprobs = logprobs_of(hidden, tokens, lm_head)
    logprobs[0, 0] += 1
    for chunk_size in (1, 1000):
        nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs, chunk_size=chunk_size)


@pytest.mark.parametrize("vocabulary", ["all", "responses"])
def test_chunks_padding_and_order_change_nothing(vocabulary):
    hidden, tokens, mask, correct, lm_head = group(3)
    scores = nthr_scores(hidden, tokens, mask, correct, lm_head, vocabulary=vocabulary)
    for chunk_size in (1, 2, 3, 1000):
        close(nthr_scores(hidden, tokens, mask, correct, lm_head, vocabulary=vocabulary, chunk_size=chunk_size), scores)
    order = torch.tensor([3, 0, 4, 2, 1])
    close(nthr_scores(hidden[order], tokens[order], mask[order], correct[order], lm_head, vocabulary=vocabulary),
          scores[order])
    wide = torch.cat([hidden, torch.full_like(hidden, math.nan)], 1)           # padding may hold anything
    ids = torch.cat([tokens, torch.full_like(tokens, -100)], 1)
    padded = nthr_scores(wide, ids, torch.cat([mask, torch.zeros_like(mask)], 1), correct, lm_head,
                         vocabulary=vocabulary)
    close(padded[:, :mask.shape[1]], scores)
    assert (padded[:, mask.shape[1]:] == 0).all() and (scores[~mask] == 0).all()


def test_scores_without_any_correct_or_any_token_are_zero():
    hidden, tokens, mask, correct, lm_head = group(0)
    for vocabulary in ("all", "responses"):
        assert not nthr_scores(hidden, tokens, mask, correct & False, lm_head, vocabulary=vocabulary).any()
        assert not nthr_scores(hidden, tokens, mask & False, correct, lm_head, vocabulary=vocabulary).any()


# --- threshold, η and selection

def test_threshold_by_hand():
    scores = torch.tensor([[1.0, 3.0, 9.0], [6.0, 6.0, 6.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    correct = torch.tensor([True, True, True, False])                          # means 2 and 6; the empty one has none
    assert nthr_threshold(scores, mask, correct).item() == 2
    assert nthr_threshold(scores, mask, correct, beta=0.1).item() == pytest.approx(0.2)
    assert nthr_threshold(scores, mask, correct, beta=0).item() == 0
    assert nthr_threshold(scores * 0, mask, correct, beta=-math.inf).item() == -math.inf
    assert nthr_threshold(scores, mask, torch.tensor([False, False, True, False])).item() == math.inf
    for beta in (math.nan, math.inf):
        with pytest.raises(ValueError, match="beta"):
            nthr_threshold(scores, mask, correct, beta)


def test_threshold_is_the_mean_self_influence_of_section_5():
    """s̄⁺ by the printed double sum, i = i' included."""
    hidden, tokens, mask, correct, lm_head = args = group(5)
    positive = eq7(*args)
    means = [positive[i][mask[i]].mean() for i in range(len(mask)) if correct[i] and mask[i].any()]
    assert len(means) == 2
    close(nthr_threshold(nthr_scores(*args, **ALL), mask, correct, beta=0.5), 0.5 * min(means))


@pytest.mark.parametrize("rule, values", [("2|0.5-p|", [0.75, 0.0, 0.5]), ("p", [0.125, 0.5, 0.75]),
                                          ("1-p", [0.875, 0.5, 0.25]), (0.3, [0.3] * 3), ("0.3", [0.3] * 3),
                                          (0, [0] * 3)])
def test_eta_rules(rule, values):
    assert [nthr_eta(p, rule) for p in (0.125, 0.5, 0.75)] == pytest.approx(values)


@pytest.mark.parametrize("success_rate, rule", [(0.5, "q"), (0.5, None), (0.5, 1.5), (0.5, -0.1), (0.5, math.nan),
                                                (0.5, "nan"), (1.5, "p"), (math.nan, 0.5)])
def test_eta_refuses(success_rate, rule):
    with pytest.raises(ValueError, match="eta must be|success_rate must be"):
        nthr_eta(success_rate, rule)


def advantages_of(correct, T):
    """Lemma 4.2's advantages in plain arithmetic, (G, T) float32."""
    p = correct.double().mean().item()
    sigma = math.sqrt(p * (1 - p))
    return torch.tensor([[(1 - p) / sigma if right else -p / sigma] * T for right in correct.tolist()])


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_algorithm_1(seed, beta):
    """Token by token in plain Python: Eq. 8 from Eq. 7's scores, η on the selected ones, nothing else touched."""
    hidden, tokens, mask, correct, lm_head = args = group(seed, correct=[1, 0, 0, 0, 1])
    advantages = advantages_of(correct, mask.shape[1])
    result = nthr_advantages(advantages, *args, beta=beta, vocabulary="all")
    scores, eta = eq7(*args), 2 * abs(0.5 - 2 / 5)
    tau = beta * min(scores[i][mask[i]].mean() for i in range(5) if correct[i] and mask[i].any())
    assert isinstance(result, NTHR) and result.eta == pytest.approx(eta)
    close(result.tau, tau)
    close(result.scores, scores)
    for j in range(5):
        for k in range(mask.shape[1]):
            chosen = bool(mask[j, k] and not correct[j] and scores[j, k] > tau)
            assert result.selected[j, k] == chosen
            assert result.advantages[j, k].item() == pytest.approx(advantages[j, k].item() * (eta if chosen else 1))


def test_the_algorithm_1_cases_above_select_some_tokens_and_leave_some():
    args = group(1, correct=[1, 0, 0, 0, 1])
    negative = args[2] & (args[3] == 0)[:, None]
    selected = nthr_advantages(advantages_of(args[3], 7), *args, beta=0.1).selected
    assert 0 < selected.sum() < negative.sum()


def test_selection_is_strict():
    """Eq. 8 says s > τ: a token with s = τ exactly is not selected. W = 0 makes all numbers exact in binary."""
    hidden = torch.tensor([[[1.0]], [[1.0]], [[1.5]]])                         # s = α h⁺ h with α = 1/2, h⁺ = 1
    args = hidden, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool), torch.tensor([1, 0, 0])
    result = nthr_advantages(advantages_of(args[3], 1), *args, torch.zeros(2, 1), eta=0, vocabulary="all")
    assert result.tau == 0.5 and result.scores[:, 0].tolist() == [0.5, 0.5, 0.75]
    assert result.selected[:, 0].tolist() == [False, False, True]


def test_minus_infinity_selects_every_negative_token():
    args = group(6)
    result = nthr_advantages(advantages_of(args[3], 7), *args, beta=-math.inf, eta=0)
    assert torch.equal(result.selected, args[2] & ~args[3][:, None])
    assert (result.advantages[result.selected] == 0).all()
    assert torch.equal(result.advantages[args[3]], advantages_of(args[3], 7)[args[3]])


def test_eta_1_is_grpo_bit_for_bit():
    args = group(7)
    advantages = advantages_of(args[3], 7)
    result = nthr_advantages(advantages, *args, beta=-math.inf, eta=1)
    assert result.selected.any() and torch.equal(result.advantages, advantages)


@pytest.mark.parametrize("correct", [[0] * 5, [1] * 5])
def test_groups_without_contrast_come_back_unchanged(correct):
    args = group(8, correct=correct)
    advantages = torch.randn(5, 7)
    result = nthr_advantages(advantages, *args, beta=-math.inf, eta=0)
    assert torch.equal(result.advantages, advantages) and not result.selected.any() and result.eta == 1
    assert not result.scores.any() and result.tau == math.inf


def test_input_is_not_modified_and_needs_no_gradient():
    args = group(9)
    advantages = advantages_of(args[3], 7)
    copies = [x.clone() for x in (advantages, *args)]
    args[0].requires_grad_(), args[4].requires_grad_()
    result = nthr_advantages(advantages, *args, beta=0, eta=0)
    assert all(torch.equal(a, b) for a, b in zip((advantages, *args), copies))
    assert not result.advantages.requires_grad and not result.scores.requires_grad


# --- Eq. 5

def test_gwhes_is_eq5():
    """p⁻ ΣΣ α⁻⟨h,h⟩ − p⁺ ΣΣ α⁺⟨h,h⟩, summed pair by pair, with Lemma 4.2's weights for p = 3/5."""
    args = group(10, correct=[1, 1, 0, 0, 1])
    scores, correct = eq7(*args), args[3].bool()
    expected = 0.6 / math.sqrt(0.24) * scores[~correct].sum() - 0.4 / math.sqrt(0.24) * scores[correct].sum()
    close(gwhes(nthr_scores(*args, **ALL), args[2], correct), expected)
    assert gwhes(nthr_scores(*args), args[2], torch.ones(5)) == 0 == gwhes(nthr_scores(*args), args[2], torch.zeros(5))


# --- input that must be refused, and the file itself

def broken(name, value):
    values = dict(zip(("hidden", "tokens", "mask", "correct", "lm_head"), group(0)))
    values["advantages"] = torch.zeros(5, 7)
    values[name] = value(values[name])
    return values


@pytest.mark.parametrize("name, value, message", [
    ("hidden", lambda x: x[0], "hidden must be"), ("hidden", lambda x: x[..., :-1], "hidden must be"),
    ("lm_head", lambda x: x.T, "lm_head"), ("tokens", lambda x: x[:, 1:], "advantages must have shape"),
    ("mask", lambda x: x[1:], "mask must have shape"), ("correct", lambda x: x[1:], "correct must have shape"),
    ("correct", lambda x: x * 0.5, "correct must be bool or hold only 0 and 1, got 0.5"),
    ("correct", lambda x: torch.where(x, 1.0, -1.0), "correct must be bool"), ("mask", lambda x: x * 2, "mask must be"),
    ("advantages", lambda x: x[:, :1], "advantages must have shape"),
    ("tokens", lambda x: x + 99, "tokens must be rows"),
    ("tokens", lambda x: x - 99, "tokens must be rows"), ("hidden", lambda x: x * math.nan, "hidden holds NaN"),
    ("hidden", lambda x: x * math.inf, "hidden holds NaN or infinite")])
@pytest.mark.parametrize("all_correct", [False, True])
def test_bad_input_is_named(name, value, message, all_correct):
    values = broken(name, value)
    if all_correct and name != "correct":
        values["correct"] = torch.ones(5)
    with pytest.raises(ValueError, match=message):
        nthr_advantages(**values)


def test_bad_settings_and_logprobs_are_named():
    args = group(0)
    logprobs = logprobs_of(args[0], args[1], args[4])
    for setting, message in (({"vocabulary": "some"}, "vocabulary"), ({"temperature": 0}, "temperature"),
                             ({"chunk_size": 0}, "chunk_size"), ({"logprobs": logprobs[:1]}, "logprobs must"),
                             ({"logprobs": logprobs * math.nan}, "logprobs must be finite"),
                             ({"logprobs": logprobs + 1}, "logprobs are not")):
        with pytest.raises(ValueError, match=message):
            nthr_scores(*args, **setting)
    args[4][args[1][args[2]][0]] = math.nan
    with pytest.raises(ValueError, match="scores are not finite"):
        nthr_scores(*args)


def test_the_file_imports_torch_and_the_standard_library_only():
    tree = ast.parse((ROOT / "nthr.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"torch", "math", "typing"}


def test_the_toy_group_runs_alone(tmp_path):
    """A copy of the one file, in a folder of its own, prints its table; the marks agree with the printed threshold."""
    (tmp_path / "nthr.py").write_bytes((ROOT / "nthr.py").read_bytes())
    lines = subprocess.run([sys.executable, "nthr.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
                           env={"PYTHONIOENCODING": "utf-8"}).stdout.splitlines()
    tau = float(lines[0].split("tau = ")[1].split()[0])
    rows = [line.split() for line in lines if len(line.split()) >= 3 and line.split()[2] in ("-1.00", "0.00")]
    assert len(rows) == 16
    for _, score, advantage, *mark in rows:
        assert bool(mark) == (advantage == "0.00") == (float(score) > tau)
