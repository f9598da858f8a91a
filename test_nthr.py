"""Tests of nthr.py against the equations as printed, hand arithmetic and autograd: `pytest test_nthr.py`."""
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nthr import NTHR, gwhes, nthr_advantages, nthr_eta, nthr_scores, nthr_scores_pairwise, nthr_threshold

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
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


@contextmanager
def cases():
    """Yields `case(name)`, to stand around the assertions on one case of a loop; what failed is raised at the end."""
    failures = []

    @contextmanager
    def case(name):
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:                    # the latter: DID NOT RAISE
            failures.append(f"{name}: {type(error).__name__}: {error}")

    yield case
    assert not failures, f"{len(failures)} cases failed\n" + "\n".join(failures)


# --- Eq. 7

def test_pairwise_is_eq7_on_paper():
    # One correct and one wrong token, V = 2, W = I, h⁺ = (ln 3, 0), h⁻ = (0, ln 3): π⁺ = (3/4, 1/4), π⁻ = (1/4, 3/4).
    # y⁺ = 0, y⁻ = 1: errors (1/4, −1/4) and (−1/4, 1/4), α = −1/8 but ⟨h⁺, h⁻⟩ = 0; ⟨h⁺, h⁺⟩ = ln²3, α⁺ = 1/8.
    log3 = math.log(3)
    hidden = torch.tensor([[[log3, 0.0]], [[0.0, log3]]], dtype=torch.float64)
    args = hidden, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False])
    close(nthr_scores_pairwise(*args, torch.eye(2, dtype=torch.float64)), [[log3 ** 2 / 8], [0.0]], 1e-7)
    hidden[1, 0] = torch.tensor([log3, 0.0])                                   # same state, other token: α = −3/8
    close(nthr_scores_pairwise(*args, torch.eye(2, dtype=torch.float64)), [[log3 ** 2 / 8], [-3 / 8 * log3 ** 2]], 1e-7)


def test_pairwise_and_all_are_eq7_in_float64():
    with cases() as case:
        for seed in range(3):
            with case(f"seed {seed}"):
                args = group(seed)
                expected = eq7(*args)
                assert expected[args[2]].abs().min() > 0 and nthr_scores_pairwise(*args).dtype == torch.float64
                close(nthr_scores_pairwise(*args), expected, 1e-12)
                close(nthr_scores(*args, **ALL), expected, 1e-6)               # returned in float32


def test_scores_are_the_derivative_that_autograd_finds():
    """M⁺ = ∂/∂W Σ_i ln π(y⁺_i|x), s = ⟨∂ ln π(token)/∂W, M⁺⟩, with an untied head."""
    with cases() as case:
        for seed in range(3):
            hidden, tokens, mask, correct, lm_head = group(seed)
            W = lm_head.clone().requires_grad_()
            logprobs = logprobs_of(hidden, tokens, W)
            M, = torch.autograd.grad(logprobs[mask & correct[:, None]].sum(), W, retain_graph=True)
            expected = torch.zeros(mask.shape, dtype=torch.float64)
            for j, k in mask.nonzero().tolist():
                gradient, = torch.autograd.grad(logprobs[j, k], W, retain_graph=True)
                expected[j, k] = (gradient * M).sum()
            with case(f"seed {seed}"):
                close(nthr_scores(hidden, tokens, mask, correct, lm_head, **ALL), expected)
                close(nthr_scores_pairwise(hidden, tokens, mask, correct, lm_head), expected, 1e-10)


def test_score_predicts_the_effect_of_a_step_on_the_correct_responses():
    """s is d/dε ln π_{W+εM⁺}(token): a small step along M⁺ changes each ln π by ε s."""
    hidden, tokens, mask, correct, lm_head = group(4)
    W = lm_head.clone().requires_grad_()
    logprobs_of(hidden, tokens, W)[mask & correct[:, None]].sum().backward()
    epsilon = 1e-6
    change = logprobs_of(hidden, tokens, lm_head + epsilon * W.grad) - logprobs_of(hidden, tokens, lm_head)
    close((change / epsilon)[mask], nthr_scores(hidden, tokens, mask, correct, lm_head, **ALL)[mask], 1e-3)


def test_responses_is_eq7_with_the_other_columns_dropped():
    with cases() as case:
        for seed, temperature in ((0, 1.0), (1, 0.6), (2, 1.7)):
            hidden, tokens, mask, correct, lm_head = args = group(seed)
            columns = sorted(set(tokens[mask].tolist()))
            expected, whole = (eq7(*args, used, temperature) for used in (columns, None))
            logprobs = logprobs_of(hidden, tokens, lm_head, temperature)
            for name, settings, right in (("responses", {}, expected), ("logprobs", {"logprobs": logprobs}, expected),
                                          ("all", ALL, whole), ("all, logprobs", {"logprobs": logprobs, **ALL}, whole)):
                with case(f"seed {seed}, temperature {temperature}, {name}"):
                    assert not torch.allclose(expected, whole)                 # columns are missing
                    close(nthr_scores(*args, temperature=temperature, **settings), right)


class LargestTensor(TorchDispatchMode):
    """`size`: the number of elements of the largest tensor that any operation returned while this was active."""

    def __enter__(self):
        self.size = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size] + [x.numel() for x in tree_leaves(result) if torch.is_tensor(x)])
        return result


def test_logprobs_leave_no_work_of_vocabulary_size():
    """With logprobs the rows of lm_head outside V*_x are not even read: they may be NaN."""
    hidden, tokens, mask, correct, lm_head = args = group(1, V=997)
    tokens %= 14
    logprobs = logprobs_of(hidden, tokens, lm_head)
    expected = nthr_scores(*args)
    lm_head[14:] = math.nan
    close(nthr_scores(*args, logprobs=logprobs), expected)
    close(nthr_advantages(torch.zeros(5, 7), *args, logprobs=logprobs).scores, expected)
    half = hidden.bfloat16(), tokens, mask, correct, lm_head.bfloat16()        # a cast of it would be a tensor, too
    with LargestTensor() as largest:
        nthr_scores(*half, logprobs=logprobs, chunk_size=2)
    assert largest.size < 997
    for vocabulary in ("all", "responses"):
        with LargestTensor() as largest:
            nthr_scores(*half[:4], lm_head.nan_to_num(), vocabulary=vocabulary, chunk_size=2)
        assert largest.size <= 997 * 6                                         # M⁺ or lm_head; T × V would be 14 · 997
    for chunk_size, size in ((2, 997 * 6), (512, 997 * mask.sum().item())):    # Algorithm 1 hands it on
        with LargestTensor() as largest:
            nthr_advantages(torch.zeros(5, 7), *half[:4], lm_head.nan_to_num(), chunk_size=chunk_size)
        assert largest.size == size


def test_half_precision_input_is_accumulated_in_float32():
    """1500 tokens of almost equal sign: a sum kept in half precision would be off by several percent."""
    with cases() as case:
        for dtype in (torch.bfloat16, torch.float16):
            hidden, tokens, mask, correct, lm_head = args = group(2, G=4, T=500, V=40, d=16, dtype=dtype)
            hidden += 1                                                        # a common direction: sums grow large
            for vocabulary in ("all", "responses"):
                exact = nthr_scores(hidden.double(), tokens, mask, correct, lm_head.double(), vocabulary=vocabulary)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    scores = nthr_scores(*args, vocabulary=vocabulary)
                with case(f"{dtype}, {vocabulary}"):
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
    for chunk_size in (1, 3, 1000):
        nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs + (torch.arange(7) == 0), chunk_size=chunk_size)
        with pytest.raises(ValueError, match="do not belong together"):
            nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs + 1, chunk_size=chunk_size)


def test_states_shifted_by_one_are_an_error_that_does_not_blame_the_logprobs():
    """States of a policy that is sure of its tokens; "pass None" alone would silence the only alarm."""
    hidden, tokens, mask, correct, lm_head = group(0, d=23)
    lm_head, hidden = torch.eye(23).double(), 9.0 * torch.nn.functional.one_hot(tokens, 23).double()
    logprobs = logprobs_of(hidden, tokens, lm_head)
    nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs)
    for shift in (-1, 1):
        with pytest.raises(ValueError, match="Check first that state k predicts token k and is the lm_head's input; "
                                             "pass None only if logprobs alone are at fault"):
            nthr_scores(hidden.roll(shift, 1), tokens, mask, correct, lm_head, logprobs)


def test_chunks_padding_and_order_change_nothing():
    hidden, tokens, mask, correct, lm_head = group(3)
    order = torch.tensor([3, 0, 4, 2, 1])
    wide = torch.cat([hidden, torch.full_like(hidden, math.nan)], 1)           # padding may hold anything
    ids = torch.cat([tokens, torch.full_like(tokens, -100)], 1)
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
    with cases() as case:
        for vocabulary in ("all", "responses"):
            scores = nthr_scores(hidden, tokens, mask, correct, lm_head, vocabulary=vocabulary)
            for chunk_size in (1, 2, 3, 1000):
                with case(f"{vocabulary}, chunks of {chunk_size}"):
                    close(nthr_scores(hidden, tokens, mask, correct, lm_head, vocabulary=vocabulary,
                                      chunk_size=chunk_size), scores)
            with case(f"{vocabulary}, other order"):
                close(nthr_scores(hidden[order], tokens[order], mask[order], correct[order], lm_head,
                                  vocabulary=vocabulary), scores[order])
            with case(f"{vocabulary}, more padding"):
                padded = nthr_scores(wide, ids, wide_mask, correct, lm_head, vocabulary=vocabulary)
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


def test_threshold_over_the_others_leaves_out_what_a_response_adds_to_itself():
    """s̄⁺ by the words of §5: Eq. 7 of i' with all but i' as the correct ones."""
    with cases() as case:
        for seed, right in ((5, (0, 2, 4)), (6, (0, 1, 2)), (7, (1,)), (8, (0, 4))):       # row 4 is empty
            correct = [i in right for i in range(5)]
            hidden, tokens, mask, correct, lm_head = args = group(seed, correct=correct)
            used = [i for i in range(len(mask)) if correct[i] and mask[i].any()]
            for vocabulary, temperature in (("all", 1.0), ("responses", 1.0), ("responses", 0.7)):
                columns = sorted(set(tokens[mask].tolist())) if vocabulary == "responses" else None
                everyone = eq7(*args, columns, temperature)
                means = []
                for i in used:
                    others = correct & (torch.arange(len(mask)) != i)
                    scores = eq7(hidden, tokens, mask, others, lm_head, columns, temperature)
                    means.append(scores[i][mask[i]].mean().item())
                for chunk_size in (1, 3, 512):
                    result = nthr_advantages(torch.ones(mask.shape), *args, beta=0.5, vocabulary=vocabulary,
                                             temperature=temperature, chunk_size=chunk_size, tau_over="others")
                    with case((seed, vocabulary, temperature, chunk_size)):
                        close(result.tau, 0.5 * min(means), 1e-4)
                        close(result.scores, everyone)
                        assert len(used) > 1 or result.tau == 0                # exactly: nothing is left
                        assert result.selected.equal(mask & ~correct[:, None] & (result.scores > result.tau))
    assert nthr_advantages(torch.ones(mask.shape), *args, beta=-math.inf, tau_over="others").tau == -math.inf
    scores, own = nthr_scores(hidden, tokens, mask, torch.zeros(5), lm_head, return_own=True)     # none is right
    assert not scores.any() and own.tolist() == [0] * 5
    halves = [x.bfloat16() for x in (hidden, lm_head)]
    rounded = nthr_advantages(torch.ones(mask.shape), halves[0], tokens, mask, correct, halves[1], tau_over="others")
    exact = nthr_advantages(torch.ones(mask.shape), halves[0].double(), tokens, mask, correct, halves[1].double(),
                            tau_over="others")
    close(rounded.tau, exact.tau, 1e-3)                                        # accumulated in float32
    with pytest.raises(ValueError, match="tau_over must be"):
        nthr_advantages(torch.ones(mask.shape), *args, tau_over="rest")


def test_eta_rules():
    for rule, values in (("2|0.5-p|", [0.75, 0, 0.5, 1, 1]), ("p", [0.125, 0.5, 0.75, 0, 1]),
                         ("1-p", [0.875, 0.5, 0.25, 1, 0]), (0.3, [0.3] * 5), ("0.3", [0.3] * 5), (0, [0] * 5)):
        assert [nthr_eta(p, rule) for p in (0.125, 0.5, 0.75, 0, 1)] == pytest.approx(values), rule
    assert nthr_eta(0.125) == 0.75


def test_eta_refuses():
    with cases() as case:
        for success_rate, rule in ((0.5, "q"), (0.5, None), (0.5, 1.5), (0.5, -0.1), (0.5, math.nan), (0.5, "nan"),
                                   (1.5, "p"), (math.nan, 0.5)):
            with case((success_rate, rule)):
                with pytest.raises(ValueError, match="success_rate must be" if success_rate != 0.5 else "eta must be"):
                    nthr_eta(success_rate, rule)


def advantages_of(correct, T):
    """Lemma 4.2's advantages in plain arithmetic, (G, T) float32."""
    p = correct.double().mean().item()
    sigma = math.sqrt(p * (1 - p))
    return torch.tensor([[(1 - p) / sigma if right else -p / sigma] * T for right in correct.tolist()])


def test_algorithm_1():
    """Token by token in plain Python: Eq. 8 from Eq. 7's scores, η on the selected ones, nothing else touched."""
    chosen, left = 0, 0
    with cases() as case:
        for seed, beta, temperature in ((0, 0.0, 1.0), (1, 0.1, 0.6), (2, 1.0, 1.7), (3, 0.1, 1.0), (4, 0.0, 0.6),
                                        (5, 1.0, 0.6), (6, None, 1.0), (7, None, 1.0)):
            hidden, tokens, mask, correct, lm_head = args = group(seed, correct=[1, 0, 1, 0, 1])
            settings, columns = {"beta": beta, "vocabulary": "all", "temperature": temperature}, None
            if beta is None:                                                   # the defaults
                settings, columns, beta = {}, sorted(set(tokens[mask].tolist())), 1.0
            advantages = advantages_of(correct, mask.shape[1])
            scores, eta = eq7(*args, columns, temperature), 2 * abs(0.5 - 3 / 5)
            tau = beta * min(scores[i][mask[i]].mean() for i in range(5) if correct[i] and mask[i].any())
            negative = mask & ~correct.bool()[:, None]
            expected = torch.tensor([[bool(negative[j, k] and scores[j, k] > tau) for k in range(7)] for j in range(5)])
            with case(f"seed {seed}, {settings}"):
                result = nthr_advantages(advantages, *args, **settings)
                assert isinstance(result, NTHR) and result.eta == pytest.approx(eta)
                close(result.tau, tau)
                close(result.scores, scores)
                assert torch.equal(result.selected, expected)
                close(result.advantages, torch.where(expected, advantages * eta, advantages), 1e-6)
            chosen, left = chosen + expected.sum(), left + (negative & ~expected).sum()
    assert chosen > 10 and left > 10                                           # the cases hold both kinds of token


def test_positive_advantages_are_kept_and_one_per_response_is_expanded():
    """Graded rewards: a wrong response can be better than the mean. Eq. 8 selects its tokens; η is for penalties."""
    args = hidden, tokens, mask, correct, lm_head = group(26, correct=[1, 0, 1, 0, 1])
    scores, T = eq7(*args), mask.shape[1]
    tau = 0.1 * min(scores[i][mask[i]].mean() for i in (0, 2, 4) if mask[i].any())
    graded = [1.25, -0.5, 0.0, 0.75, -1.5], [-0.25, 0.5, -1.25, -0.75, 1.5]    # the wrong ones are 1 and 3
    tokenwise = torch.randn(5, T, generator=torch.Generator().manual_seed(0))
    kept, weakened = 0, 0
    with cases() as case:
        for given in (tokenwise, tokenwise.bfloat16(), *map(torch.tensor, graded)):
            rows = given.tolist() if given.dim() == 2 else [[value] * T for value in given.tolist()]
            expected, selected = [row[:] for row in rows], torch.zeros(5, T, dtype=torch.bool)
            for j in (1, 3):
                for k in range(T):
                    if mask[j, k] and scores[j, k] > tau:
                        selected[j, k] = True
                        kept, weakened = kept + (rows[j][k] > 0), weakened + (rows[j][k] < 0)
                        expected[j][k] *= 0.5 if rows[j][k] < 0 else 1         # exact in binary
            for advantages in [given] if given.dim() == 2 else [given, given[:, None]]:
                with case((given.dtype, tuple(advantages.shape))):
                    result = nthr_advantages(advantages, *args, beta=0.1, eta=0.5, **ALL)
                    assert torch.equal(result.selected, selected) and result.advantages.dtype == given.dtype
                    assert result.advantages.tolist() == expected
                    for eta, right in ((1, correct), (0, [1] * 5)):            # nothing to weaken: bit for bit
                        same = nthr_advantages(advantages, *args[:3], right, lm_head, beta=-math.inf, eta=eta)
                        assert same.advantages.tolist() == rows
    assert kept > 5 and weakened > 5


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


def test_groups_without_contrast_come_back_unchanged():
    for correct in ([0] * 5, [1] * 5):
        args = group(8, correct=correct)
        advantages = torch.randn(5, 7)
        result = nthr_advantages(advantages, *args, beta=-math.inf, eta=0)
        assert torch.equal(result.advantages, advantages) and not result.selected.any() and result.eta == 1, correct
        assert not result.scores.any() and result.tau == math.inf, correct


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
    """Eq. 5 of each correct response y⁺_i, as printed; gwhes is their sum, and divided by N⁺ their mean (p = 3/5)."""
    hidden, tokens, mask, correct, lm_head = args = group(10, correct=[1, 1, 0, 1, 0])
    right, eq5 = correct.bool(), []
    for i in right.nonzero()[:, 0].tolist():
        part = eq7(hidden, tokens, mask, torch.arange(5) == i, lm_head)        # Eq. 6: Σ_k α ⟨h_k, h_b⟩, k in y⁺_i only
        eq5.append(0.6 / math.sqrt(0.24) * part[~right].sum() - 0.4 / math.sqrt(0.24) * part[right].sum())
    assert len(eq5) == 3 and min(map(abs, eq5)) > 1e-3
    total = gwhes(nthr_scores(*args, **ALL), mask, correct)
    assert total.shape == ()
    close(total, sum(eq5))
    close(total / correct.sum(), sum(eq5) / 3)
    assert gwhes(nthr_scores(*args), mask, torch.ones(5)) == 0 == gwhes(nthr_scores(*args), mask, torch.zeros(5))
    close(gwhes(nthr_scores(*args, **ALL) + 9.0 * ~mask, mask, correct), total)        # padding is not looked at


def test_correct_may_be_a_list_or_an_array():
    hidden, tokens, mask, _, lm_head = group(1)
    expected = eq7(hidden, tokens, mask, torch.tensor([True, False, True, False, False]), lm_head)
    scores, ones = torch.tensor([[1.0, 2.0], [4.0, 4.0]]), torch.ones(2, 2)    # means 1.5 and 4, sums 3 and 8; p = 1/2
    with cases() as case:
        for name, of in (("list of bools", lambda *x: [v == 1 for v in x]), ("list of 0 and 1", lambda *x: [*x]),
                         ("tuple", lambda *x: x), ("floats", lambda *x: torch.tensor(x).float()),
                         ("bool array", lambda *x: np.array(x) == 1), ("float array", lambda *x: np.array(x) * 1.0)):
            with case(name):
                args = hidden, tokens, mask, of(1, 0, 1, 0, 0), lm_head
                close(nthr_scores_pairwise(*args), expected)
                close(nthr_scores(*args, **ALL), expected)
                close(nthr_advantages(torch.zeros(5), *args, **ALL).scores, expected)
                assert nthr_threshold(scores, ones, of(0, 1)) == 4 and nthr_threshold(scores, ones, of(1, 0)) == 1.5
                assert gwhes(scores, ones, of(0, 1)) == 3 - 8 and gwhes(scores, ones, of(1, 0)) == 8 - 3
        for wrong in ([None, 1], ["right", "wrong"], [1, 0.5], np.array([1, -1]), [[1], [1, 0]], [math.nan, 1], None):
            for name, function in (("threshold", nthr_threshold), ("gwhes", gwhes)):
                with case((name, wrong)):
                    with pytest.raises(ValueError, match="correct must be bool or hold only 0 and 1, got "):
                        function(scores, ones, wrong)
        for wrong in (torch.ones(2, 1), [1, 0, 1], True):
            for name, function in (("threshold", nthr_threshold), ("gwhes", gwhes)):
                with case((name, wrong)):
                    with pytest.raises(ValueError, match=r"correct must have shape \(2,\), got \("):
                        function(scores, ones, wrong)


# --- input that must be refused, and the file itself

def test_bad_input_is_named():
    def with_one(value):                                                       # one number of the first token
        return lambda x: x.put(torch.tensor(3), x.new_tensor(value))

    names = "hidden", "tokens", "mask", "correct", "lm_head"
    with cases() as case:
        for name, change, message in (
                ("hidden", lambda x: x[0], "hidden must be"), ("hidden", lambda x: x[..., :-1], "hidden must be"),
                ("hidden", with_one(math.nan), "hidden holds NaN"), ("hidden", with_one(-math.inf), "or infinite"),
                ("lm_head", lambda x: x.T, "lm_head"), ("tokens", lambda x: x[:, 1:], r"tokens \(G, T\)"),
                ("lm_head", lambda x: torch.nn.Linear(6, 23), r"lm_head must be a tensor, got Linear: pass "
                                                              r"lm_head\.weight"),
                ("tokens", lambda x: x - x.min() - 1, "must be rows of lm_head, 0..22, got -1"),
                ("tokens", lambda x: x.where(x < x[0, 0], 23), "must be rows of lm_head, 0..22, got .*23"),
                ("mask", lambda x: x[1:], "mask must have shape"), ("mask", lambda x: x * 2, "mask must be bool"),
                ("correct", lambda x: x[1:], "correct must have shape"),
                ("correct", lambda x: x[:, None], r"correct must have shape \(5,\), got \(5, 1\)"),
                ("correct", lambda x: [*x.tolist()[:-1], None], "correct must be bool or hold only 0 and 1, got .*No"),
                ("correct", lambda x: x * 0.5, "correct must be bool or hold only 0 and 1, got 0.5"),
                ("correct", lambda x: torch.where(x, 1.0, -1.0), "correct must be bool"),
                ("advantages", lambda x: x[0], r"advantages must have shape \(5, 7\), \(5,\) or \(5, 1\), got \(7"),
                ("advantages", lambda x: x[:1], "advantages must have"), ("advantages", lambda x: x.T, "advantages")):
            for p in (3 / 5, 1):
                values = dict(zip(names, group(0)), advantages=torch.zeros(5, 7))
                if p == 1 and name != "correct":
                    values["correct"] = torch.ones(5)
                values[name] = change(values[name])
                with case(f"{name}, {message}, p = {p}"):
                    with pytest.raises(ValueError, match=message):
                        nthr_advantages(**values)


def test_bad_settings_and_logprobs_are_named():
    args = group(0)
    logprobs = logprobs_of(args[0], args[1], args[4])
    with cases() as case:
        for setting, message in (({"vocabulary": "some"}, "vocabulary"), ({"temperature": 0}, "temperature"),
                                 ({"chunk_size": 0}, "chunk_size"), ({"logprobs": logprobs[:1]}, "logprobs must"),
                                 ({"logprobs": logprobs * math.nan}, "logprobs must be a tensor"),
                                 ({"logprobs": logprobs + 1}, "do not belong together")):
            with case(message):
                with pytest.raises(ValueError, match=message):
                    nthr_scores(*args, **setting)
    args[4][args[1][args[2]][0]] = math.nan
    with pytest.raises(ValueError, match="scores are not finite"):
        nthr_scores(*args)


def test_the_file_runs_alone_and_needs_only_torch(tmp_path):
    """A copy of the one file, in a folder of its own, prints its table; the marks agree with the printed threshold."""
    (tmp_path / "nthr.py").write_bytes((Path(__file__).resolve().parent / "nthr.py").read_bytes())
    script = ("import runpy, sys, torch; before = {*sys.modules}; runpy.run_path('nthr.py', run_name='__main__'); "
              "print({name.split('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names - {'torch'}); "
              "sys.stdout.isatty = lambda: True; runpy.run_path('nthr.py', run_name='__main__')")
    printed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
                             env={"PYTHONIOENCODING": "utf-8"}).stdout
    printed, _, on_a_terminal = printed.partition("set()\n")                   # nothing beyond torch
    lines = printed.splitlines()
    colored = re.findall(r"\033\[30;43m(.*?) <\033\[0m", on_a_terminal)
    assert re.sub(r"\033\[\d*;?\d*m", "", on_a_terminal) == printed
    tau = float(lines[0].split("tau = ")[1].split()[0])
    found = re.findall(r" (\S+) +(-?\d\.\d\d) +(-1\.00|0\.00)( <|)", "\n".join(lines))
    assert len(lines) <= 20 and len(found) == 16 and {mark for *_, mark in found} == {" <", ""}
    assert len(colored) == sum(mark == " <" for *_, mark in found)
    for _, score, advantage, mark in found:
        assert (mark == " <") == (advantage == "0.00") == (float(score) > tau)
