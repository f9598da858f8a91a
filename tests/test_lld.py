"""experiments/lld.py: updates against plain full-logits ones, tables against the CSV, Theorem 4.4 pair by pair."""
import copy
import csv
import json
import math
import statistics
import sys
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROOT, write, wrong_endings
from reward import math_reward
from support.data import encode_prompts, load_problems

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "experiments"))

import common  # noqa: E402
import lld  # noqa: E402

SAMPLING = ["--max-sequences", "64", "--seed", "3", "--device", "cpu"]
N = 4
FLAGS = [*SAMPLING, "--questions", str(N), "--sweep", "0.01", "--layer", "1", "--normalize", "--overlap"]
METHODS = ("grpo", "pos-only", "random", "nthr")
RULES = """
def halved(advantages, hidden, tokens, mask, correct, lm_head, logprobs):
    return advantages * (1 - 0.5 * (advantages < 0))


def right_only(advantages, *_):
    return advantages.clamp(min=0)
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The script at a small size: its folder and rows as numbers; the model as it was, and the groups of the run."""
    out, kept = tmp_path_factory.mktemp("lld"), []
    rules = write(out / "rules.py", RULES)
    sample = common.mixed_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "mixed_groups", lambda *args: kept.append(sample(*args)) or kept[0])
        lld.main([*FLAGS, "--rules", f"{rules}:halved", f"{rules}:right_only", "--out", str(out)])
    with (out / "questions.csv").open(encoding="utf-8") as file:
        rows = [{key: value if key == "problem" else float(value) for key, value in row.items()}
                for row in csv.DictReader(file)]
    return out, rows, AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval(), kept[0][0]


def logprobs_of(model, group):
    """(G, T) ln π of the response tokens from the full logits, and what else a test needs."""
    rollout = group.rollout
    P, ids = rollout.prompt_ids.shape[1], torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    attention = torch.cat([rollout.prompt_mask, rollout.response_mask], 1).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, P - 1:-1]
    return torch.log_softmax(logits, -1).gather(-1, rollout.response_ids[..., None])[..., 0]


def in_float64(model):
    """A copy; its norms x / √(mean x² + ε) · w are written out, because the library's compute in float32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: (
                x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight)
    return model


def update_and_measure(model, group, factors, lr, adam=False):
    """Δ(x) after one step that ascends Σ factor · ln π / Σ|y|, on a float64 copy, all written out."""
    model = in_float64(model)
    mask = group.rollout.response_mask
    before = logprobs_of(model, group)
    ((before * factors * mask).sum() / mask.sum()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            g = parameter.grad
            parameter += lr * (g / (g.abs() + 1e-8) if adam else g)            # fresh AdamW: m̂/(√v̂ + ε) = g/(|g| + ε)
        change = ((logprobs_of(model, group) - before) * mask).sum(1)
    return change[group.correct].mean().item()


def grpo_factors(group):
    p = group.correct.double().mean()
    sigma = (p * (1 - p)).sqrt()
    return torch.where(group.correct, (1 - p) / sigma, -p / sigma)[:, None]


def test_each_update_is_one_plain_sgd_step_on_the_question(result):
    _, rows, model, groups = result
    for i in (0, 3):
        factors = grpo_factors(groups[i])
        expected = [update_and_measure(model, groups[i], each, 1e-3)
                    for each in (factors, factors.clamp(min=0), torch.where(factors < 0, factors / 2, factors))]
        found = [rows[i][f"delta {name}"] for name in ("grpo", "pos-only", "halved")]
        assert found == pytest.approx(expected, rel=1e-7) and rows[i]["delta right_only"] == found[1], i


def test_nthr_relieves_the_tokens_above_the_threshold_fully(result):
    """Eq. 7 written out again for one group, from full logits and the last hidden states."""
    _, rows, model, groups = result
    question = max(range(len(rows)), key=lambda i: rows[i]["selected"])
    group, row = groups[question], rows[question]
    rollout, m64 = group.rollout, in_float64(model)
    P, mask = rollout.prompt_ids.shape[1], rollout.response_mask
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    attention = torch.cat([rollout.prompt_mask, mask], 1).long()
    with torch.no_grad():
        hidden = m64.base_model(input_ids=ids, attention_mask=attention,
                                position_ids=(attention.cumsum(1) - 1).clamp(min=0)).last_hidden_state[:, P - 1:-1]
        pi = torch.softmax(hidden @ m64.lm_head.weight.T, -1)
    in_use = torch.zeros(pi.shape[-1], dtype=bool)
    in_use[rollout.response_ids[mask]] = True                                  # V*_x
    errors = (torch.nn.functional.one_hot(rollout.response_ids, len(in_use)) - pi)[..., in_use]
    a, b = errors[group.correct][mask[group.correct]], hidden[group.correct][mask[group.correct]]
    scores = ((errors @ a.T) * (hidden @ b.T)).sum(-1)
    means = [scores[i][mask[i]].mean() for i in group.correct.nonzero()[:, 0]]
    chosen = mask & ~group.correct[:, None] & (scores > min(means))
    assert row["selected"] == chosen.sum() > 0 and row["tau"] == pytest.approx(min(means).item(), rel=1e-4)
    factors = grpo_factors(group).masked_fill(chosen, 0.0)
    assert row["delta nthr"] == pytest.approx(update_and_measure(model, group, factors, 1e-3), rel=1e-7)
    assert row["negative_tokens"] == mask[~group.correct].sum() and row["correct"] == group.correct.sum()


@pytest.mark.full
def test_adamw_is_a_fresh_sign_step_and_a_seed_samples_the_same_again(result, tmp_path):
    _, _, model, groups = result
    lld.main([*SAMPLING, "--questions", "1", "--optimizer", "adamw", "sgd", "--lr", "1e-4", "1e-3",
              "--sweep", "--out", str(tmp_path)])
    sgd, row = (next(csv.DictReader((tmp_path / name / "questions.csv").open(encoding="utf-8"))) for name in
                ("sgd", "adamw"))
    expected = update_and_measure(model, groups[0], grpo_factors(groups[0]), 1e-4, adam=True)
    assert float(row["delta grpo"]) == pytest.approx(expected, rel=1e-5)       # Eq. 1's weights are float32
    expected = update_and_measure(model, groups[0], grpo_factors(groups[0]), 1e-3)
    assert float(sgd["delta grpo"]) == pytest.approx(expected, rel=1e-5)


def test_random_is_the_mean_of_its_draws(result, monkeypatch):
    """Three selections known here: the k-th draw takes the token k of each wrong response."""
    _, _, model, groups = result
    args = common.parse_flags(lld.build_parser(), [*FLAGS, "--draws", "3"])
    positions = torch.arange(groups[0].rollout.response_mask.shape[1])
    drawn = [(positions == k) & ~groups[0].correct[:, None] for k in range(3)]
    waiting = iter(drawn)
    monkeypatch.setattr(lld, "random_selection", lambda _, mask, *__: next(waiting)[:, :mask.shape[1]])
    m64, factors = common.to_float64(copy.deepcopy(model)), grpo_factors(groups[0])
    initial = [parameter.detach().clone() for parameter in m64.parameters()]
    row, deltas = lld.study(m64, initial, groups[0], None, [(3, False)], {}, {"sgd": (1e-3, [1e-3])}, args)["sgd"]
    expected = [update_and_measure(model, groups[0], torch.where(chosen, 0.0, factors), 1e-3) for chosen in drawn]
    assert len({*expected}) == 3 and row["delta random"] == pytest.approx(statistics.mean(expected), rel=1e-7)
    assert deltas["random"][1e-3] == row["delta random"] and not [name for name in row if "draw" in name]


def test_a_rule_gets_the_head_of_the_policy_that_was_sampled_from(tmp_path):
    rules = write(tmp_path / "rules.py", """
import torch


def checked(advantages, hidden, tokens, mask, correct, lm_head, logprobs):
    own = torch.log_softmax(hidden.double() @ lm_head.double().T, -1).gather(2, tokens[..., None])[..., 0]
    assert torch.allclose(own[mask], logprobs[mask].double(), atol=1e-4)
    return advantages / 2
""")
    lld.main([*SAMPLING, "--questions", "1", "--temperature", "0.7", "--sweep", "--rules", f"{rules}:checked", "--out",
              str(tmp_path)])


def test_the_parameters_are_put_back_and_equal_advantages_share_an_update(result):
    _, _, model, groups = result
    args = common.parse_flags(lld.build_parser(), [*FLAGS, "--beta", "1e9"])    # nothing is selected
    model = common.to_float64(copy.deepcopy(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    row, deltas = lld.study(model, before, groups[0], torch.Generator(), [(3, False)], {}, {"sgd": (1.0, [1.0])},
                            args)["sgd"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert row["selected"] == 0 and deltas["grpo"] == deltas["nthr"] == deltas["random"] != deltas["pos-only"]


def test_a_seed_samples_the_same_again_and_another_seed_other_responses(result, monkeypatch):
    model, problems, verdicts = result[2], load_problems(ROOT / "tiny" / "train.jsonl")[:8], []
    monkeypatch.setattr(common, "load_reward", lambda source: lambda *answers: (
        verdicts.append(math_reward(*answers)) or verdicts[-1]))
    tokenizer, found = AutoTokenizer.from_pretrained(ROOT / "tiny"), []
    prompts = encode_prompts(problems, tokenizer, model.config, 40)
    for seed in (3, 3, 4):
        args = common.parse_flags(lld.build_parser(), ["--questions", "8", "--max-new-tokens", "40", "--device", "cpu",
                                                       "--seed", str(seed)])
        groups, sampled, success_rate = common.mixed_groups(model, tokenizer, problems, prompts, args)
        assert sampled == 8 and all(group.rollout.hidden is None for group in groups)
        assert len(verdicts) == 64 and success_rate == sum(verdicts) / 64
        verdicts.clear()
        found.append({group.index: group.rollout.texts for group in groups})
    first, again, other = found
    assert first == again and [*first] != sorted(first) and first.keys() & other.keys()
    assert all(first[index] != other[index] for index in first.keys() & other.keys())


# ---- Theorem 4.4 and Eq. 7 with other states

def random_group(seed, G=4, T=5, d=6, V=9):
    g = torch.Generator().manual_seed(seed)
    hidden, W = torch.randn(G, T, d, generator=g), torch.randn(V, d, generator=g)
    tokens = torch.randint(V, (G, T), generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (G, 1), generator=g)
    return hidden, tokens, mask, torch.tensor([True, False, True, False])[:G], W


def gwhes_by_pairs(hidden, tokens, mask, correct, W):
    """Eq. 5 as printed, summed over the correct responses, with p⁺ and p⁻ of Lemma 4.2: all pairs of tokens."""
    h, W = hidden[mask].double(), W.double()
    right = correct[:, None].expand(mask.shape)[mask]
    p = correct.double().mean().item()
    errors = torch.eye(len(W), dtype=torch.double)[tokens[mask]] - torch.softmax(h @ W.T, -1)
    terms = ((errors @ errors.T) * (h @ h.T))[right]
    return ((p * terms[:, ~right].sum() - (1 - p) * terms[:, right].sum()) / math.sqrt(p * (1 - p))).item()


def test_theorem_4_4_the_step_of_an_untied_head_alone_is_minus_gwhes():
    for seed in range(3):
        group = random_group(seed)
        expected = -gwhes_by_pairs(*group)
        limit, minus_gwhes = lld.theory_check(*group)
        assert minus_gwhes == pytest.approx(expected, rel=1e-7), seed
        assert limit == pytest.approx(expected, rel=1e-3), seed
        errors = [abs(lld.theory_check(*group, lr=lr)[0] - expected) for lr in (1e-2, 1e-3, 1e-4)]
        ratios = errors[0] / errors[1], errors[1] / errors[2]
        assert 5 < min(ratios) < max(ratios) < 20, seed                        # a first-order error: the limit is exact


def test_theorem_4_4_holds_on_the_questions_of_the_run(result):
    _, rows, model, groups = result
    assert [row["theory_limit"] for row in rows] == pytest.approx([-row["gwhes"] for row in rows], rel=1e-3)
    group, mask = groups[0], groups[0].rollout.response_mask
    T = int(mask.sum(1).max())
    hidden = lld.initial_policy(model, group, 1.0, 3)[1]
    expected = gwhes_by_pairs(hidden, group.rollout.response_ids[:, :T], mask[:, :T], group.correct,
                              model.lm_head.weight.detach())
    assert rows[0]["gwhes"] == pytest.approx(expected, rel=1e-3)


def test_scores_from_other_states_keep_alpha_and_replace_the_inner_product():
    hidden, tokens, mask, correct, W = random_group(7)
    features = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8)) * 50
    scores, own = lld.scores_from(features, hidden, tokens, mask, correct, W, vocabulary="all")
    scale = (hidden[mask].square().sum() / features[mask].square().sum()).item()
    error = torch.nn.functional.one_hot(tokens, len(W)) - torch.softmax(hidden @ W.T, -1)
    for b in mask.nonzero().tolist():
        b, expected = tuple(b), 0.0
        for a in map(tuple, mask.nonzero().tolist()):
            if correct[a[0]]:
                expected += (error[a] @ error[b] * (features[a] @ features[b])).item() * scale
        assert scores[b].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for i in range(len(mask)):
        pairs = [(a, b) for a in range(5) for b in range(5) if mask[i, a] and mask[i, b] and correct[i]]
        expected = sum((error[i, a] @ error[i, b] * (features[i, a] @ features[i, b])).item() for a, b in pairs) * scale
        assert own[i].item() == pytest.approx(expected, rel=1e-4)


def test_layer_states_are_those_of_the_model(result):
    _, rows, model, groups = result
    group = groups[1]
    states, last = lld.layer_states(model, group, 3, 5), lld.initial_policy(model, group, 1.0, 8)[1]
    valid = group.rollout.response_mask[:, :states.shape[1]]
    assert torch.allclose(states[valid], last[valid], atol=1e-5)               # the last one: what the head reads
    row = group.correct.nonzero()[0, 0]
    embedded = model.get_input_embeddings()(group.rollout.response_ids[row, :2])
    assert torch.equal(lld.layer_states(model, group, 0, 8)[row, 1:3], embedded)          # state k holds token k − 1


def test_shared_tokens_by_hand():
    class Rollout:
        def inputs(self, rows):
            ids = torch.tensor([[9, 1, 2, 3, 4], [9, 1, 2, 5, 4], [9, 7, 8, 4, 0], [9, 5, 6, 6, 5]])
            attention = torch.ones_like(ids).bool()
            attention[2, 4] = False
            return ids, attention, 1

    group = common.Group(0, "", "", Rollout(), torch.tensor([True, True, False, False]))
    # [7, 8, 4] shares 4 with either; [5, 6, 6, 5] shares one 5 with the second
    assert lld.shared_tokens(group) == pytest.approx((1 / 3 + 1 / 4) / 2)


# ---- tables, files and flags

def test_tables_are_those_of_the_csv(result):
    out, rows, _, _ = result
    record = json.loads((out / "results.json").read_text())
    tables = list(record["tables"].values())
    assert record["seed"] == 3 and record["sampled"] >= N and record["command"].startswith("python experiments/")
    methods, table1, steps, layers, rules, overlap = tables
    assert [row["method"] for row in methods] == ["GRPO", "Pos Only", "GRPO + Random", "GRPO + NTHR"]
    for method, row in zip(METHODS, methods):
        delta = [r[f"delta {method}"] for r in rows]
        assert row["mean Δ"] == pytest.approx(statistics.mean(delta))
        assert row["median Δ"] == pytest.approx(statistics.median(delta))
        assert row["Δ ≤ 0 (LLD)"] == sum(d <= 0 for d in delta) / N
        assert row["above GRPO"] == sum(r[f"delta {method}"] > r["delta grpo"] for r in rows) / N
        assert row["equal"] == sum(r[f"delta {method}"] == r["delta grpo"] for r in rows) / N
        assert row["below"] == pytest.approx(1 - row["above GRPO"] - row["equal"])
    share = sum(r["selected"] for r in rows) / sum(r["negative_tokens"] for r in rows)
    assert methods[3]["negative tokens relieved"] == methods[2]["negative tokens relieved"] == pytest.approx(share)
    assert [row[f"K = 10 of {N}"] for row in table1] == [None] * 4                # sum, mean, normalised, at random
    by_delta = sorted(range(N), key=lambda i: rows[i]["delta grpo"])
    for row, divisor in zip(table1, (lambda r: 1, lambda r: r["correct"], lambda r: r["correct"] * r["tokens"])):
        by_score = sorted(range(N), key=lambda i: -rows[i]["gwhes"] / divisor(rows[i]))
        d2 = sum((by_delta.index(i) - by_score.index(i)) ** 2 for i in range(N))
        assert row["rank correlation with −Δ"] == pytest.approx(1 - 6 * d2 / (N * (N ** 2 - 1))), row["score"]
    with (out / "steps.csv").open(encoding="utf-8") as file:
        by_step = list(csv.DictReader(file))
    assert [row["step size"] for row in steps] == [0.001, 0.01] and len(by_step) == 2 * N
    for row in steps:
        mine = [r for r in by_step if float(r["step size"]) == row["step size"]]
        grpo = [float(r["delta grpo"]) for r in mine]
        assert row["mean Δ/step GRPO"] == pytest.approx(statistics.mean(grpo) / row["step size"])
        for method, name in zip(METHODS, ("GRPO", "Pos Only", "GRPO + Random", "GRPO + NTHR")):
            values = [float(r[f"delta {method}"]) for r in mine]
            assert row[f"Δ ≤ 0 {name}"] == sum(d <= 0 for d in values) / N
            if method != "grpo":
                gain = statistics.mean(a - b for a, b in zip(values, grpo))
                assert row[f"mean Δ − GRPO's {name} [95%]"].startswith(f"{gain:+.2e} [")
                assert row[f"above GRPO {name}"] == sum(a > b for a, b in zip(values, grpo)) / N
        if row["step size"] == 1e-3:
            assert grpo == [r["delta grpo"] for r in rows]
    names = [row["hidden states"] for row in layers]
    assert names == ["layer 3, dot product", "layer 3, cosine", "layer 1, dot product", "layer 1, cosine"]
    assert layers[0]["mean Δ"] == methods[3]["mean Δ"] and layers[0]["Jaccard with the first row"] == 1
    for name, row in zip(names, layers):
        selected, both = (sum(r[f"selected{infix} {name}"] for r in rows) for infix in ("", " in both"))
        assert row["Jaccard with the first row"] == pytest.approx(
            both / (selected + sum(r["selected"] for r in rows) - both))
    assert [row["rule"] for row in rules] == [*(row["method"] for row in methods), "halved", "right_only"]
    for name, row in zip((*METHODS, "halved", "right_only"), rules):
        for other in ("grpo", "nthr"):
            mean = statistics.mean(r[f"delta {name}"] - r[f"delta {other}"] for r in rows)
            assert row[f"mean Δ − {other.upper()}'s [95%]"].startswith(f"{mean:+.2e} [")
        gains = [statistics.mean(r[f"delta {at}"] - r["delta grpo"] for r in rows) for at in (name, "nthr")]
        assert row["gain / NTHR's"] == f"{gains[0] / gains[1]:+.2f}"
        assert row["median Δ − GRPO's"] == pytest.approx(statistics.median(
            r[f"delta {name}"] - r["delta grpo"] for r in rows))
        assert row["above NTHR"] == sum(r[f"delta {name}"] > r["delta nthr"] for r in rows) / N
        assert [row[at] for at in ("above GRPO", "below")] == [
            sum(sign * (r[f"delta {name}"] - r["delta grpo"]) > 0 for r in rows) / N for sign in (1, -1)]
    assert [row["penalty removed"] for row in rules[:2] + rules[4:]] == pytest.approx([0, 1, 0.5, 1])
    assert rules[3]["penalty removed"] == pytest.approx(                        # η is 0, a group's Â⁻ are all equal
        statistics.mean(r["selected"] / r["negative_tokens"] for r in rows), rel=1e-5)
    assert sum(row["questions"] for row in overlap) == N
    part = sorted(rows, key=lambda r: r["overlap"])[:1]
    assert overlap[0]["difference"] == pytest.approx(
        statistics.mean(r["delta nthr"] - r["delta grpo"] for r in part))


def test_the_interval_of_a_mean_is_that_of_all_resamples():
    values = lld.np.array([0.0, 1.0, 5.0, 7.0])
    means = [statistics.mean(drawn) for drawn in product(values.tolist(), repeat=4)]           # 256, equally likely
    assert lld.mean_interval(values) == pytest.approx(lld.np.quantile(means, (0.025, 0.975)), abs=0.26)


def test_overlap_of_k_by_hand():
    delta, score = lld.np.array([3.0, -1.0, 0.5, 2.0]), lld.np.array([0.0, 5.0, 1.0, 9.0])
    assert lld.overlap_of_k(delta, score, 2) == 0.5                            # {1, 2} and {3, 1}
    assert lld.overlap_of_k(delta, -delta, 3) == 1.0


def test_lazy_questions_are_those_whose_likelihood_does_not_rise():
    """Def. 4.1 with ε = 0, by hand: −1 and 0 are lazy, 2 and 3 are not."""
    deltas = {"grpo": [-1.0, 0.0, 2.0, 3.0], "pos-only": [1.0, 1.0, 1.0, 1.0], "random": [-1.0, -2.0, -3.0, -4.0],
              "nthr": [0.0, 0.0, 2.0, 4.0]}
    rows = [{"negative_tokens": 10, "selected": i, **{f"delta {m}": deltas[m][i] for m in METHODS}} for i in range(4)]
    table = lld.method_table(rows)
    assert [row["Δ ≤ 0 (LLD)"] for row in table] == [0.5, 0.0, 1.0, 0.5]
    assert [table[3][name] for name in ("above GRPO", "equal", "below")] == [0.5, 0.5, 0.0]
    curves = [{m: {0.5: deltas[m][i]} for m in METHODS} for i in range(4)]
    steps = lld.step_table(curves, [0.5])[0]
    assert [steps[f"Δ ≤ 0 {name}"] for name in ("GRPO", "Pos Only", "GRPO + Random", "GRPO + NTHR")] == [0.5, 0, 1, 0.5]


def test_table_1_averages_over_sets_of_the_papers_sizes():
    """120 questions make two sets of 57 and two of 47; 94 one and two, 50 one of 47, 46 none. All counted by hand."""
    rng = lld.np.random.default_rng(0)
    rows = [{"delta grpo": d, "gwhes": g, "correct": int(r), "tokens": int(t)} for (d, g), r, t in
            zip(rng.normal(size=(120, 2)), rng.integers(1, 8, 120), rng.integers(30, 300, 120))]
    scores = (lambda r: r["gwhes"], lambda r: r["gwhes"] / r["correct"],
              lambda r: r["gwhes"] / (r["correct"] * r["tokens"]))

    def overlap(part, score, k):
        lazy, high = (sorted(range(len(part)), key=key)[:k] for key in
                      (lambda i: part[i]["delta grpo"], lambda i: -score(part[i])))
        return len(set(lazy) & set(high)) / k

    for n, sizes in ((120, (57, 47)), (94, (57, 47)), (50, (47,)), (46, ())):
        table = lld.gwhes_table(rows[:n])
        assert [*table[0]] == ["score", *(f"K = {k} of {size}" for size in (n, *sizes) for k in (10, 15)),
                               "rank correlation with −Δ"]
        assert all([*row] == [*table[0]] for row in table) and len(table) == 4 + bool(sizes)
        for k in (10, 15):
            for size in (n, *sizes):
                sets = [rows[i:i + size] for i in range(0, n - size + 1, size)]
                expected = [statistics.mean(overlap(part, score, k) for part in sets) for score in scores]
                found = [row[f"K = {k} of {size}"] for row in table]
                assert found[:3] == pytest.approx(expected) and found[-1] == k / size, (n, k, size)
    paper = lld.gwhes_table(rows)[3]
    assert [paper[f"K = {k} of {n}"] for n in (57, 47, 120) for k in (10, 15)] == [0.5, 0.75, 0.6, 0.75, None, None]


def test_pictures_and_tables_are_written(result):
    out, rows, _, _ = result
    for name in ("figure1.png", "figure4.png", "step_size.png"):
        data = (out / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") > 800, name
    text = (out / "tables.md").read_text()
    assert f"{statistics.mean(r['delta nthr'] for r in rows):.2e}" in text and "| GRPO + NTHR |" in text
    for line in text.splitlines():                                             # a "|" inside a cell is escaped
        if line.startswith("| GWHES"):
            assert line.replace("\\|", "").count("|") == 5


def test_bad_flags_end_with_one_line(tmp_path):
    assert not wrong_endings(lambda flags: lld.main(["--out", str(tmp_path), *flags]), [
        (["--rules", "x.py:nthr"], "none of grpo, pos-only"), (["--rules", "none.py:f"], "none.py cannot be run"),
        (["--layer", "4"], "--layer must be 0 (embeddings) to 3"), (["--lr", "0"], "--lr must be finite and above 0"),
        (["--sweep", "nan"], "--sweep must be"), (["--draws", "0"], "--draws must be at least 1"),
        (["--lr", "1", "2"], "--lr must be one per --optimizer (sgd)"),
        (["--questions", "0"], "--questions must be at least 1"),
        (["--group-size", "1"], "--group-size must be at least 2"),
        (["--eta", "2"], "--eta 2, --beta 1.0: eta must be one of"), (["--beta", "nan"], "beta must be"),
        (["--temperature", "0"], "--temperature must be"), (["--micro-batch-size", "0"], "--micro-batch-size must be"),
        (["--model", "/none"], "there is no folder /none"), (["--data", "none.jsonl"], "cannot read the data file"),
        (["--reward", "x.txt:f"], "--reward must be"), (["--device", "none"], "--device none cannot be used"),
        (["--out", ROOT / "README.md"], "cannot be used as a folder")])


def test_groups_without_signal_end_with_one_line(tmp_path):
    data = tmp_path / "impossible.jsonl"
    data.write_text('{"problem": "1+1", "answer": "1000"}\n{"problem": "1+2", "answer": "1000"}\n')
    flags = ["--data", data, "--out", tmp_path / "out"]
    assert not wrong_endings(lld.main, [(flags, "none of 2 questions got both right and wrong responses")])


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        lld.main(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"--{name}" in printed for name in (
        "model", "data", "seed", "out", "optimizer", "lr", "layer", "normalize", "overlap"))
