"""What must hold for nthr.py on any group. The bounds on rounding are derived, not tuned.

Each property is checked on 25 groups in the fast tests, in turn with each dtype and vocabulary, and on all 150
combinations by `python -m pytest --all`."""
import itertools
import math
from typing import NamedTuple

import pytest
import torch

from nthr import nthr_advantages, nthr_scores, nthr_scores_pairwise, nthr_threshold
from test_nthr import cases, close, eq7, group as small_group

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = ("all", "responses")
SEEDS = range(25)
IN_TURN = [(seed, DTYPES[seed % 3], VOCABULARIES[seed // 3 % 2]) for seed in SEEDS]
PRODUCT = list(itertools.product(SEEDS, DTYPES, VOCABULARIES))
on_random_groups = pytest.mark.parametrize("examples", [
    pytest.param(IN_TURN, id="in turn"), pytest.param(PRODUCT, id="all combinations", marks=pytest.mark.full)])


class Group(NamedTuple):
    """The arguments of `nthr_scores`, by the names and shapes that it has."""
    hidden: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor
    lm_head: torch.Tensor


def random_group(seed, dtype=torch.float32, mixed=True):
    """G 2 to 16, T 1 to 12, V 2 to 60, d 1 to 20, rows of any length from 0, garbage on padding.

    mixed: a correct and a wrong response have a token; else none, all, or any may be right."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    G, T, V, d = integer(2, 16), integer(1, 12), integer(2, (4, 60)[integer(0, 1)]), integer(1, 20)
    scale = (0.03, 1.0, 100.0)[integer(0, 2)]                                  # float16 would overflow at 256²
    common = torch.randn(d, generator=generator) * (0, 2)[integer(0, 1)]       # states of one direction: tokens compete
    hidden = ((torch.randn(G, T, d, generator=generator) + common) * scale).to(dtype)
    lm_head = (torch.randn(V, d, generator=generator) / scale).to(dtype)
    lengths = torch.randint(0, T + 1, (G,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    tokens = torch.randint(0, V, (G, T), generator=generator)
    correct = torch.rand(G, generator=generator) < (0.5 if mixed else integer(0, 2) / 2)
    if mixed:
        correct[:2], mask[:2, 0] = torch.tensor([True, False]), True           # a correct token, and a wrong one
    hidden[~mask], tokens[~mask] = (math.nan, math.inf)[seed % 2], (-100, 10 ** 9)[seed % 2]
    return Group(hidden, tokens, mask, correct, lm_head)


def logprobs_of(group, temperature=1.0):
    """ln π of the tokens in float32, (G, T), NaN on padding."""
    logits = group.hidden[group.mask].double() @ group.lm_head.double().T / temperature
    logprobs = torch.log_softmax(logits, -1).gather(1, group.tokens[group.mask][:, None])[:, 0]
    return torch.full(group.mask.shape, math.nan).masked_scatter(group.mask, logprobs.float())


def exact_and_bound(group, vocabulary="all", temperature=1.0):
    """Eq. 7 pair by pair in float64, (G, T), and how far a float32 computation on the same input may be from it.

    To first order, a float32 sum of n products is off by at most n ε Σ|terms|, ε = 2⁻²³. So a logit is off by d ε L,
    L = max_v Σ_j |w_vj h_j| / temperature. With the normaliser, a sum over V, and the exponential, π is wrong by a
    factor of at most 1 + ρ, ρ = ε (2 (d + 3) L + V + |ln π_y| + 4), and an entry of e_y − π by ρ (e_y + π). s is a sum
    over N⁺ tokens, the columns and d: off by (2 ρ + (N⁺ + columns + d + 3) ε) Σ_a ⟨e_y + π_a, e_y + π_b⟩ |h_a|ᵀ|h_b|.
    The dtype does not enter: half-precision input is exact in float32, and all arithmetic is float32."""
    mask, correct, W = group.mask, group.correct, group.lm_head.double()
    h, y = group.hidden[mask].double(), group.tokens[mask]                     # (N, d), (N,)
    pi = torch.softmax(h @ W.T / temperature, -1)                              # (N, V)
    e = torch.nn.functional.one_hot(y, len(W)).double()
    columns = torch.unique(y) if vocabulary == "responses" else torch.arange(len(W))
    error, size = (e - pi)[:, columns], (e + pi)[:, columns]
    positive = correct[:, None].expand_as(mask)[mask]                          # (N,)
    exact = ((error @ error[positive].T) * (h @ h[positive].T)).sum(1)
    terms = ((size @ size[positive].T) * (h.abs() @ h[positive].abs().T)).sum(1)
    d, L = h.shape[1], (h.abs() @ W.abs().T).max() / temperature if len(h) else 0.0
    log_pi = pi.gather(1, y[:, None]).log().abs().max() if len(h) else 0.0
    rho = EPS * (2 * (d + 3) * L + len(W) + log_pi + 4)
    bound = (2 * rho + (int(positive.sum()) + len(columns) + d + 3) * EPS) * terms
    whole = torch.zeros(mask.shape, dtype=torch.float64)
    return whole.masked_scatter(mask, exact), whole.masked_scatter(mask, bound)


def assert_within(actual, expected, bound):
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert ((actual.double() - expected).abs() <= bound).all()


def selection(group, beta=1.0, eta="2|0.5-p|", vocabulary="responses", advantages=None):
    advantages = torch.ones(group.mask.shape) if advantages is None else advantages
    return nthr_advantages(advantages, *group, beta=beta, eta=eta, vocabulary=vocabulary)


def eq_8(group, vocabulary="responses"):
    """(G, T) bool, twice: V⁻ for β = 1 in float64, and where a token is so far from τ that no rounding could change it.

    The mean of T float32 numbers is off by T ε times the largest, besides their own bounds."""
    scores, bound = exact_and_bound(group, vocabulary)
    rows = group.correct & group.mask.any(1)
    mean, error = ((x.sum(1) / group.mask.sum(1))[rows] for x in (scores, bound))
    slack = 2 * (bound + error.max() + group.mask.shape[1] * EPS * scores.abs().max())
    negative = group.mask & ~group.correct[:, None]
    return negative & (scores > mean.min()), (scores - mean.min()).abs() > slack


# ---- the oracle and the groups

def test_the_float64_reference_above_is_eq_7_in_plain_python():
    with cases() as case:
        for seed in SEEDS[:5]:
            group = random_group(seed)
            for vocabulary, used in (("all", None), ("responses", sorted(set(group.tokens[group.mask].tolist())))):
                with case(f"seed {seed}, {vocabulary}"):
                    close(exact_and_bound(group, vocabulary, 0.7)[0], eq7(*group, used, temperature=0.7), 1e-9)


def test_the_random_groups_hold_the_cases_that_matter_and_the_bound_is_narrow():
    groups = [random_group(seed) for seed in SEEDS]
    G, T, V, d = zip(*[(*group.mask.shape, *group.lm_head.shape) for group in groups])
    assert min(G) == 2 and max(G) == 16 and min(T) == 1 and min(V) <= 3 and min(d) == 1
    assert any(not group.mask.any(1).all() for group in groups) and any(not group.mask.all() for group in groups)
    assert {0, 1} < {random_group(seed, mixed=False).correct.double().mean().item() for seed in SEEDS[::5]}
    ratios, shares = [], []
    for group in groups:
        exact, bound = exact_and_bound(group)
        ratios.append((bound.max() / exact.abs().max()).item())
        shares.append(eq_8(group)[1][group.mask].float().mean().item())
    assert max(ratios) < 0.05 and sorted(ratios)[len(ratios) // 2] < 1e-3
    assert sorted(shares)[len(shares) // 2] > 0.9


# ---- Eq. 7 and what follows from it

@on_random_groups
def test_scores_are_eq_7_in_float64_up_to_the_rounding_of_float32(examples):
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            group, temperature = random_group(seed, dtype, mixed=seed % 5 != 0), (1.0, 0.7, 1.5)[seed // 2 % 3]
            expected, bound = exact_and_bound(group, vocabulary, temperature)
            for logprobs in (None, logprobs_of(group, temperature)):
                for chunk_size in (1, 3, 512):
                    with case((seed, dtype, vocabulary, temperature, f"logprobs {logprobs is not None}", chunk_size)):
                        scores = nthr_scores(*group, logprobs, vocabulary, temperature, chunk_size)
                        assert scores.dtype == torch.float32
                        assert_within(scores, expected, bound)
            with case((seed, dtype, vocabulary, "Eq. 8 for the tokens of no doubt")):
                if seed % 5:
                    selected, sure = eq_8(group, vocabulary)
                    assert torch.equal(selection(group, vocabulary=vocabulary).selected[sure], selected[sure])
            with case((seed, dtype, "pairwise")):
                whole = group._replace(hidden=group.hidden.double(), lm_head=group.lm_head.double())
                close(nthr_scores_pairwise(*whole), exact_and_bound(group)[0], 1e-9)
                assert_within(nthr_scores_pairwise(*group), *exact_and_bound(group))


@on_random_groups
def test_scores_are_linear_in_the_correct_responses(examples):
    """Eq. 7 sums over the correct responses: those of P₁ ∪ P₂ are those of P₁ plus those of P₂, on every row.

    V*_x is that of the whole group, whoever is correct in it."""
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            group = random_group(seed, dtype)
            half = torch.rand(len(group.correct), generator=torch.Generator().manual_seed(seed)) < 0.5
            first = group.correct & half
            with case((seed, dtype, vocabulary)):
                parts = [group._replace(correct=correct) for correct in (first, group.correct & ~first)]
                bound = sum(exact_and_bound(part, vocabulary)[1] for part in [group, *parts])
                total = sum(nthr_scores(*part, vocabulary=vocabulary).double() for part in parts)
                assert_within(nthr_scores(*group, vocabulary=vocabulary), total, bound)
            for rows in (~group.correct | first, ~group.correct | ~first) if vocabulary == "all" else ():
                with case((seed, dtype, "the other correct responses left out")):
                    fewer = Group(*[x[rows] for x in group[:4]], group.lm_head)
                    scores, bounds = exact_and_bound(fewer)
                    close(exact_and_bound(group._replace(correct=group.correct & rows))[0][rows], scores, 1e-7)
                    assert_within(nthr_scores(*fewer, vocabulary="all"), scores, bounds)


def rearranged(group, generator):
    """(name, the group in another order or with more padding, where each of its (G, T) entries is in the new one)."""
    G, T = group.mask.shape
    index = torch.arange(G * T).view(G, T)
    order = torch.randperm(G, generator=generator)
    yield "responses", Group(*[x[order] for x in group[:4]], group.lm_head), index[order]
    # A score depends on a token and its state, not on its place; so padding may be anywhere, too.
    padding = [torch.full((G, 3, *x.shape[2:]), value, dtype=x.dtype)
               for x, value in zip(group[:3], (math.nan, 10 ** 12, False))]
    columns = torch.randperm(T + 3, generator=generator)
    hidden, tokens, mask = (torch.cat([x, more], 1)[:, columns] for x, more in zip(group[:3], padding))
    new = torch.cat([index, torch.full((G, 3), -1)], 1)[:, columns]
    yield "columns and padding", Group(hidden, tokens, mask, *group[3:]), new
    ids = torch.randperm(len(group.lm_head), generator=generator)
    tokens = group.tokens.clone()
    tokens[group.mask] = ids.argsort()[group.tokens[group.mask]]
    yield "vocabulary", group._replace(tokens=tokens, lm_head=group.lm_head[ids]), index


@on_random_groups
def test_order_padding_and_the_numbering_of_the_vocabulary_change_nothing(examples):
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            group = random_group(seed, dtype)
            expected, bound = exact_and_bound(group, vocabulary)
            selected, sure = eq_8(group, vocabulary)
            eta = 2 * abs(0.5 - group.correct.double().mean().item())
            for name, other, place in rearranged(group, torch.Generator().manual_seed(seed)):
                with case((seed, dtype, vocabulary, name)):
                    found, real = selection(other, vocabulary=vocabulary), place >= 0
                    assert_within(found.scores[real], expected.flatten()[place[real]], bound.flatten()[place[real]])
                    assert not found.scores[~real].any() and not found.selected[~real].any()
                    certain = sure.flatten()[place[real]]
                    assert torch.equal(found.selected[real][certain], selected.flatten()[place[real]][certain])
                    assert found.eta == pytest.approx(eta)


@on_random_groups
def test_a_group_listed_twice_has_twice_the_scores_and_the_same_selection(examples):
    """By linearity each s doubles, so τ does, and s > τ holds for the same tokens; p and so η stay as they are.

    Listing only the wrong responses twice changes no score (but p); only the correct ones: as for the whole group."""
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            group = random_group(seed, dtype)
            expected, _ = exact_and_bound(group, vocabulary)
            (selected, sure), G = eq_8(group, vocabulary), len(group.mask)
            for name, twice, factor in (("all", torch.arange(G), 2), ("wrong", (~group.correct).nonzero()[:, 0], 1),
                                        ("correct", group.correct.nonzero()[:, 0], 2)):
                rows = torch.cat([torch.arange(G), twice])
                rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
                double = Group(*[x[rows] for x in group[:4]], group.lm_head)
                with case((seed, dtype, vocabulary, f"{name} twice")):
                    found = selection(double, vocabulary=vocabulary)
                    assert_within(found.scores, factor * expected[rows], exact_and_bound(double, vocabulary)[1])
                    certain = sure[rows] & eq_8(double, vocabulary)[1]
                    assert torch.equal(found.selected[certain], selected[rows][certain])
                    assert found.eta == pytest.approx(2 * abs(0.5 - group.correct[rows].double().mean().item()))


# ---- threshold, selection and η

@on_random_groups
def test_a_larger_beta_selects_fewer_tokens_if_the_smallest_mean_is_positive_and_more_if_it_is_negative(examples):
    """τ = β · min s̄⁺ rises with β or falls with it, and V⁻ = {s > τ}: each set holds the next one.

    Only β = −∞, which stands for "every negative token" (Table 4), does so whatever the sign."""
    betas = (-math.inf, -1e300, -2.0, -0.5, 0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 30.0, 1e300)
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            with case((seed, dtype, vocabulary)):
                group = random_group(seed, dtype)
                negative = group.mask & ~group.correct[:, None]
                smallest = selection(group, vocabulary=vocabulary).tau.item()
                results = [selection(group, beta, vocabulary=vocabulary) for beta in betas]
                assert not any(result.tau.isnan() for result in results)
                assert torch.equal(results[0].selected, negative)
                chain = [result.selected for result in results[1:]][::1 if smallest >= 0 else -1]
                for larger, smaller in zip(chain, chain[1:]):
                    assert not (smaller & ~larger).any()
                if smallest:
                    assert torch.equal(chain[0], negative) and not chain[-1].any()     # τ = ∓∞ in float32


def test_both_signs_of_the_smallest_mean_occur_above_and_one_correct_response_has_a_positive_one():
    """With one correct response its mean is ‖M⁺‖² / |y| ≥ 0; with more, some may work against the others."""
    signs = []
    with cases() as case:
        for seed in SEEDS:
            group = random_group(seed)
            signs.append((selection(group).tau > 0).item())
            one = group._replace(correct=torch.arange(len(group.correct)) == 0)
            scores, bound = exact_and_bound(one, "responses")
            length = group.mask[0].sum()
            h, y = group.hidden[0][group.mask[0]].double(), group.tokens[0][group.mask[0]]
            columns = torch.unique(group.tokens[group.mask])
            pi = torch.softmax(h @ group.lm_head.double().T, -1)
            M = (torch.nn.functional.one_hot(y, len(group.lm_head)) - pi)[:, columns].T @ h
            with case(f"seed {seed}"):
                tau = nthr_threshold(nthr_scores(*one), one.mask, one.correct).double()
                tolerance = bound[0].sum() / length + len(bound[0]) * EPS * scores[0].abs().max()
                assert (tau - M.square().sum() / length).abs() <= tolerance
    assert 0.1 < sum(signs) / len(signs) < 0.95


@on_random_groups
def test_eta_1_gives_the_advantages_back_bit_for_bit_and_others_touch_the_selected_negative_ones_only(examples):
    with cases() as case:
        for seed, dtype, vocabulary in examples:
            group = random_group(seed, dtype, mixed=seed % 5 != 0)
            advantages = torch.randn(group.mask.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for beta in (-math.inf, -1.0, 0.0, 1.0):
                with case((seed, dtype, vocabulary, f"beta {beta}")):
                    for eta in (1, "1", 1.0):
                        same = selection(group, beta, eta, vocabulary, advantages).advantages
                        assert same.dtype == dtype and torch.equal(same, advantages)
                    result = selection(group, beta, 0.25, vocabulary, advantages)
                    chosen = result.selected
                    weaker = chosen & (advantages < 0)
                    assert torch.equal(result.advantages[~weaker], advantages[~weaker])
                    assert torch.equal(result.advantages[weaker], advantages[weaker] / 4)      # exact in binary
                    assert not (chosen & (group.correct[:, None] | ~group.mask)).any()
                    if group.correct.all() or not group.correct.any():         # β = −∞ included
                        assert not chosen.any() and not result.scores.any() and result.eta == 1


# ---- degenerate groups

def test_identical_responses_have_one_row_of_scores_and_its_mean_is_tau():
    """The same answer in each row, half of them called right: s⁻ = s⁺, so the tokens above their mean are selected."""
    hidden, tokens, _, _, lm_head = small_group(0)
    with cases() as case:
        for G in (2, 64):
            same = hidden[:1].expand(G, -1, -1), tokens[:1].expand(G, -1), torch.ones(G, 7), torch.arange(G) % 2 == 0
            row = eq7(*[x[:1] for x in same], lm_head)[0] * G / 2              # of one copy, times the correct ones
            with case(f"G = {G}"):
                result = nthr_advantages(torch.ones(G, 7), *same, lm_head, vocabulary="all")
                close(result.scores, row.expand(G, -1))
                close(result.tau, row.mean())
                assert result.eta == 0 and 0 < (row > row.mean()).sum() < 7
                assert result.selected.tolist() == [[False] * 7, (row > row.mean()).tolist()] * (G // 2)


def test_extreme_temperatures():
    """T → ∞: π = 1/V, as with W = 0. T → 0: π is all on the largest logit; such a token has no error and no score."""
    hidden, tokens, mask, correct, lm_head = small_group(1, dtype=torch.float32)
    columns, likeliest = sorted(set(tokens[mask].tolist())), (hidden @ lm_head.T).argmax(-1)
    uniform, certain = torch.full(mask.shape, -math.log(len(lm_head))), torch.zeros(mask.shape)    # their ln π
    with cases() as case:
        for vocabulary, used, logprobs in (("all", None, (None, None)), ("responses", columns, (None, None)),
                                           ("responses", columns, (uniform, certain))):
            with case(f"{vocabulary}, logprobs {logprobs[0] is not None}, hot"):
                close(nthr_scores(hidden, tokens, mask, correct, lm_head, logprobs[0], vocabulary, 1e30),
                      eq7(hidden, tokens, mask, correct, lm_head * 0, used))
            with case(f"{vocabulary}, logprobs {logprobs[0] is not None}, cold"):
                assert not nthr_scores(hidden, likeliest, mask, correct, lm_head, logprobs[1], vocabulary, 1e-30).any()


def test_scores_that_float32_cannot_hold_are_an_error_and_not_infinite():
    hidden, lm_head = torch.full((2, 1, 1), 1e22, dtype=torch.float64), torch.tensor([[0.0], [1e-22]]).double()
    args = hidden, torch.tensor([[1], [0]]), torch.ones(2, 1), torch.tensor([1, 0]), lm_head
    assert nthr_scores_pairwise(*args).abs().min() > 1e43
    with pytest.raises(ValueError, match="scores are not finite: .*overflow"):
        nthr_scores(*args, vocabulary="all")
