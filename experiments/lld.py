r"""Figures 1 and 4 and Table 1: what ONE update on a question's own samples does to its right answers, Δ(x) of Eq. 2.

python experiments/lld.py                                        # embedded model, 200 questions, 4 minutes on one core
python experiments/lld.py --layer 0 1 2 3 --normalize --overlap  # with the tables on what the paper leaves open
python experiments/lld.py --model tiny/stack                     # programs instead of sums
python experiments/lld.py --optimizer sgd adamw                  # both from the same gradients, a folder for each
python experiments/lld.py --eta "2|0.5-p|" --tau-over others --rules                # with other rules than NTHR
python experiments/lld.py --model Qwen/Qwen2.5-0.5B              # a real model, one GPU, 50 questions of MATH

For each question, G responses are sampled from the same initial policy; groups with both right and wrong answers are
kept. From those same responses one update is made with each of GRPO, Pos Only (§3), GRPO + Random and GRPO + NTHR
(β = 1, η = 0, §5.3), parameters and optimizer re-initialised each time, and Δ(x) is measured. Plain SGD, the default,
is the gradient flow of Theorem 4.4: for small --lr, Δ(x)/lr is a derivative. The first step of a fresh AdamW is about
lr · sign(gradient): parameters with a gradient far above 1e-8 move by lr, however much larger it is. No gradient
clipping. Models of up to 1e8 parameters are updated in float64, where rounding cannot reach Δ(x); larger ones in
float32, where differences below about 1e-6 are rounding.

Table 1 compares Δ(x) with GWHES. Eq. 5 is a quantity of one correct response, and the paper does not say how it becomes
one of a question. The table has three ways: its sum over the correct responses (`nthr.gwhes`), its mean over them, and
the sum over N⁺ Σ|y|, which is −Δ(x)/lr of the head alone. It uses all questions, and sets of the paper's sizes.

Expect Δ(x) with NTHR above GRPO's on most questions while the step is small, and with Random on about half after SGD.
Writes tables.md, questions.csv (a row per question), steps.csv (Δ(x) at each step size), results.json, figure1.png,
figure4.png and step_size.png.
"""
import math
import time
from difflib import SequenceMatcher
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

import common
import files
from grpo import (group_advantages, grpo_loss, likelihood_change, pos_only, random_selection, response_logprobs,
                  token_weights)
from nthr import gwhes, nthr_advantages, nthr_eta, nthr_scores, nthr_threshold
from support.errors import fail
from support.flags import flag_adder

matplotlib.use("Agg")                                                          # files only, no window

# Shapes: G responses of one question, T response tokens, V vocabulary, d hidden size, n questions
METHODS = {"grpo": "GRPO", "pos-only": "Pos Only", "random": "GRPO + Random", "nthr": "GRPO + NTHR"}
COLORS = {"grpo": "#e08214", "pos-only": "#4393c3", "random": "#bbbbbb", "nthr": "#542788"}
OPTIMIZERS = {"sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
              "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                                                                fused=True)}   # a third of the time on a CPU
BARS = 60          # about as many questions as the paper's figures show
# Table 1: n: {K: overlap} of DeepSeek-R1-Distill-1.5B on AIME and of Qwen2.5-Math-1.5B on MATH
PAPER_OVERLAPS = {57: {10: 0.5, 15: 0.75}, 47: {10: 0.6, 15: 0.75}}
STEPS = {"sgd": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0], "adamw": [1e-6, 1e-5, 1e-4, 3e-4, 1e-3]}
FORMATS = {"mean Δ/step": ".2f", "rank": ".2f", "Jaccard": ".2f", "mean": ".2e", "median": ".2e", "difference": ".2e",
           "step size": "g"}                                                   # by the start of the column's name
THEORY_LR = 1e-6   # small enough for a derivative, large enough for float64


def build_parser():
    parser = common.build_parser(__doc__, "lld", questions=(200, 50), eta="0")                 # §5.3
    add = flag_adder(parser.add_argument_group("the one update"))
    add("--optimizer", choices=OPTIMIZERS, nargs="+", default=["sgd"], help="plain SGD (Theorem 4.4), or a fresh "
        "AdamW: a sign step; several are run from the same gradients")
    add("--lr", type=float, nargs="+", help="step size of the figures and tables, one per optimizer (default: sgd "
        "1e-3, adamw 1e-4)")
    add("--sweep", type=float, nargs="*", metavar="LR", help="further step sizes of each optimizer, for the table and "
        "picture of Δ(x) as a function of the step; none: no further ones (default: sgd 1e-6 to 1, adamw 1e-6 to 1e-3)")
    add("--draws", type=int, default=1, help="random selections of GRPO + Random, whose mean Δ(x) is reported")
    add = flag_adder(parser.add_argument_group("what the paper leaves open"))
    add("--layer", type=int, nargs="+", default=[], help="also score with the hidden states of these layers "
        "(0: embeddings; the last one, which the paper uses, comes after the final norm)")
    add("--normalize", action="store_true", help="also score with the cosine of the hidden states, not the dot product")
    add("--rules", nargs="*", metavar="FILE.py:FUNCTION", help="also update with these functions, as of train.py's "
        "--method (none: those of experiments/multipliers.py, to be compared at --eta '2|0.5-p|' --tau-over others)")
    add("--overlap", action="store_true", help="bin the questions by what the wrong answers share with the right ones")
    return parser


def group_inputs(group):
    """ids and attention_mask (G, P+T), P, and of the responses: tokens and mask (G, T)."""
    ids, attention_mask, P = group.rollout.inputs(torch.arange(len(group.correct)))
    return ids, attention_mask, P, ids[:, P:], attention_mask[:, P:]


@torch.no_grad()
def initial_policy(model, group, temperature, rows_at_once):
    """Log-probabilities (G, T) and last-layer states (G, T, d) of the responses before any update."""
    ids, attention_mask, P, _, _ = group_inputs(group)
    parts = [response_logprobs(model, i, m, P, temperature, return_hidden=True)
             for i, m in zip(ids.split(rows_at_once), attention_mask.split(rows_at_once))]
    return tuple(map(torch.cat, zip(*parts)))


@torch.no_grad()
def layer_states(model, group, layer, rows_at_once):
    """States (G, T, d) of a layer, 0 the embeddings, at the positions that predict the response tokens."""
    ids, attention_mask, P, _, _ = group_inputs(group)
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return torch.cat([model.base_model(input_ids=i, attention_mask=m.long(), position_ids=p, use_cache=False,
                                       output_hidden_states=True).hidden_states[layer][:, P - 1:-1]
                      for i, m, p in zip(*(x.split(rows_at_once) for x in (ids, attention_mask, positions)))])


def scores_from(features, hidden, tokens, mask, correct, lm_head, **options):
    """Eq. 7 with π from `hidden` as always, but with ⟨·,·⟩ taken of `features` (G, T, d).

    Returns what `nthr_scores` does with return_own: (G, T) and (G,).

    Eq. 7 is linear in the inner product, and lm_head columns of zeros leave π alone: scores of [hidden, features] are
    those of hidden plus those wanted. Features are first scaled to the norm of hidden, which scales s and τ alike."""
    features = features * (hidden[mask].norm() / features[mask].norm())
    both = nthr_scores(torch.cat([hidden, features], -1).double(), tokens, mask, correct,
                       torch.cat([lm_head, torch.zeros_like(lm_head)], -1), return_own=True, **options)
    alone = nthr_scores(hidden.double(), tokens, mask, correct, lm_head, return_own=True, **options)
    return both[0] - alone[0], both[1] - alone[1]


def backward(model, group, old, advantages, temperature, rows_at_once):
    """The gradient of −J (Eq. 1) on this question alone into every parameter's .grad."""
    ids, attention_mask, P, _, mask = group_inputs(group)
    G = len(group.correct)
    weights = token_weights(mask, G)
    model.zero_grad()
    for rows in torch.arange(G).split(rows_at_once):
        logprobs = response_logprobs(model, ids[rows], attention_mask[rows], P, temperature)
        grpo_loss(logprobs, old[rows], advantages[rows], mask[rows], G, weights=weights[rows])[0].backward()


@torch.no_grad()
def updated_likelihoods(model, initial, group, old, lrs, optimizer, temperature, rows_at_once):
    """{lr: Δ(x)} (Eq. 2) after one optimizer step with the gradients at hand; the initial parameters are put back."""
    ids, attention_mask, P, _, mask = group_inputs(group)
    right, deltas = group.correct.nonzero()[:, 0].cpu(), {}
    for lr in lrs:
        OPTIMIZERS[optimizer](model.parameters(), lr).step()
        new = torch.cat([response_logprobs(model, ids[rows], attention_mask[rows], P, temperature)
                         for rows in right.split(rows_at_once)])
        deltas[lr] = likelihood_change(new, old[right], mask[right], group.correct[right]).item()
        for parameter, value in zip(model.parameters(), initial):
            parameter.copy_(value)
    return deltas


def theory_check(hidden, tokens, mask, correct, lm_head, lr=THEORY_LR):
    """(N⁺ · Σ|y| · Δ(x) / lr, −GWHES(x)): equal for lr → 0 if SGD moves an untied lm_head alone (Theorem 4.4).

    hidden (G, T, d) stays as it is, so the head is a matrix of its own here, even where the model ties it. float64."""
    W = lm_head.detach().double().requires_grad_()                             # (V, d)
    G, advantages = len(mask), group_advantages(correct.double()[None]).view(-1, 1).expand(mask.shape)

    def logprobs(row):                                                         # (1, T)
        return torch.log_softmax(hidden[row].double() @ W.T, -1).gather(1, tokens[row][:, None]).T

    with torch.no_grad():
        old = [logprobs(row) for row in range(G)]
    weights = token_weights(mask, G).double()
    for row in range(G):                                                       # one (T, V) matrix at a time
        one = slice(row, row + 1)
        grpo_loss(logprobs(row), old[row], advantages[one], mask[one], G, weights=weights[one])[0].backward()
    torch.optim.SGD([W], lr=lr).step()
    with torch.no_grad():
        new = torch.cat([logprobs(row) for row in range(G)])
    delta = likelihood_change(new, torch.cat(old), mask, correct)
    scores = nthr_scores(hidden.double(), tokens, mask, correct, lm_head, vocabulary="all")
    return (correct.sum() * mask.sum() * delta / lr).item(), -gwhes(scores, mask, correct).item()


def shared_tokens(group):
    """Share of a wrong response's tokens that its most similar right response has in the same order, mean over them."""
    _, _, _, tokens, mask = group_inputs(group)
    responses = [row[valid].tolist() for row, valid in zip(tokens, mask)]
    right = [response for response, correct in zip(responses, group.correct) if correct]
    shares = [max(sum(block.size for block in SequenceMatcher(None, wrong, other, autojunk=False).get_matching_blocks())
                  for other in right) / len(wrong)
              for wrong, correct in zip(responses, group.correct) if not correct]
    return sum(shares) / len(shares)


def variant_name(layer, normalize):
    return f"layer {layer}, {'cosine' if normalize else 'dot product'}"


def study(model, initial, group, generator, variants, rules, steps, args):
    """One question: for each optimizer its row of questions.csv, with variants and rules, and {method: {lr: Δ(x)}}.

    variants: (layer, whether its states are normalised), the paper's first; rules: {name: a function as of train.py's
    --method}; steps: {optimizer: (the --lr, at which alone other variants and rules are measured, all step sizes)}."""
    _, _, _, tokens, mask = group_inputs(group)
    correct, lm_head = group.correct, model.get_output_embeddings().weight.detach()
    old, hidden = initial_policy(model, group, args.temperature, args.micro_batch_size)
    grpo = group_advantages(correct.float()[None]).view(-1, 1).repeat(1, mask.shape[1])            # (G, T)
    options = {"vocabulary": args.nthr_vocab, "temperature": args.temperature}
    nthr = nthr_advantages(grpo, hidden, tokens, mask, correct, lm_head, logprobs=old, beta=args.beta, eta=args.eta,
                           tau_over=args.tau_over, **options)
    advantages = {"grpo": grpo, "pos-only": pos_only(grpo), "nthr": nthr.advantages}
    draws = ["random", *(f"random, draw {i}" for i in range(2, args.draws + 1))]
    for name in draws:
        chosen = random_selection(nthr.selected, mask, correct, generator)
        advantages[name] = torch.where(chosen, nthr.eta * grpo, grpo)
    selections = {}
    for layer, normalize in variants[1:]:
        features = hidden if layer == variants[0][0] else layer_states(model, group, layer, args.micro_batch_size)
        features = features / features.norm(dim=-1, keepdim=True) if normalize else features
        scores, own = scores_from(features, hidden, tokens, mask, correct, lm_head, logprobs=old, **options)
        tau = nthr_threshold(scores, mask, correct, args.beta, own if args.tau_over == "others" else None)
        chosen = mask & ~correct[:, None] & (scores > tau)
        selections[layer, normalize] = chosen
        advantages[layer, normalize] = torch.where(chosen, nthr.eta * grpo, grpo)
    if len(variants) > 1:
        selections[variants[0]], advantages[variants[0]] = nthr.selected, nthr.advantages
    for name, rule in rules.items():
        advantages[name] = rule(grpo, hidden, tokens, mask, correct, lm_head / args.temperature, old)
        if advantages[name].shape != mask.shape or not advantages[name][mask].isfinite().all():
            fail(f"--rules: {name} must return finite advantages (G, T) = {tuple(mask.shape)}, got {advantages[name]}")
    deltas = {}
    for name, A in advantages.items():
        same = next((other for other in deltas if torch.equal(A, advantages[other])), None)
        if same:                                                               # such as GRPO, if nothing is selected
            deltas[name] = deltas[same]
            continue
        backward(model, group, old, A, args.temperature, args.micro_batch_size)
        deltas[name] = {optimizer: updated_likelihoods(
            model, initial, group, old, lrs if name in (*METHODS, *draws) else [lr], optimizer, args.temperature,
            args.micro_batch_size) for optimizer, (lr, lrs) in steps.items()}
    drawn = [deltas["random"], *(deltas.pop(name) for name in draws[1:])]
    deltas["random"] = {optimizer: {lr: float(np.mean([delta[optimizer][lr] for delta in drawn])) for lr in lrs}
                        for optimizer, (_, lrs) in steps.items()}
    limit, minus_gwhes = theory_check(hidden, tokens, mask, correct, lm_head / args.temperature)
    row = {"index": group.index, "problem": group.problem, "group_size": len(correct), "correct": int(correct.sum()),
           "tokens": int(mask.sum()), "negative_tokens": int(mask[~correct].sum()),
           "selected": int(nthr.selected.sum()), "tau": nthr.tau.item(), "eta": nthr.eta,
           "gwhes": -minus_gwhes, "theory_limit": limit, "overlap": shared_tokens(group)}
    if rules:
        wrong = mask & ~correct[:, None]
        row |= {f"penalty removed {name}": 1 - (advantages[name][wrong].sum() / grpo[wrong].sum()).item()
                for name in (*METHODS, *rules)}
    for variant, chosen in selections.items():
        name = variant_name(*variant)
        row |= {f"selected {name}": int(chosen.sum()), f"selected in both {name}": int((chosen & nthr.selected).sum())}
    names = {name: variant_name(*name) if name in selections else name for name in deltas}
    return {optimizer: ({**row, **{f"delta {names[name]}": deltas[name][optimizer][lr] for name in deltas}},
                        {method: deltas[method][optimizer] for method in METHODS})
            for optimizer, (lr, _) in steps.items()}


def column(rows, name):
    return np.array([row[name] for row in rows], dtype=float)


def rank_correlation(a, b):
    """Spearman's, of values without ties; None for fewer than two."""
    return None if len(a) < 2 else float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def compared_with_grpo(delta, grpo):
    """Shares of questions where a method's Δ(x) lies above, at and below GRPO's."""
    return {"above GRPO": (delta > grpo).mean(), "equal": (delta == grpo).mean(), "below": (delta < grpo).mean()}


def method_table(rows):
    grpo, negative, table = column(rows, "delta grpo"), column(rows, "negative_tokens").sum(), []
    for method, name in METHODS.items():
        delta, selected = column(rows, f"delta {method}"), column(rows, "selected").sum() / negative
        table.append({"method": name, "mean Δ": delta.mean(), "median Δ": np.median(delta),
                      "Δ ≤ 0 (LLD)": (delta <= 0).mean(), **compared_with_grpo(delta, grpo),
                      "negative tokens relieved": {"grpo": 0.0, "pos-only": 1.0}.get(method, selected)})
    return table


def overlap_of_k(delta, score, k):
    """Table 1: the share of the k questions with smallest Δ that are among the k with largest score; None if k > n."""
    return None if k > len(delta) else len(set(delta.argsort()[:k]) & set((-score).argsort()[:k])) / k


def gwhes_table(rows):
    """Table 1 for three ways of making Eq. 5 a score of a question.

    K among all n questions, and the mean over sets of the paper's sizes, where it is as large a share as there."""
    delta, score, right, tokens = (column(rows, name) for name in ("delta grpo", "gwhes", "correct", "tokens"))
    n, ks, correlation, table = len(rows), (10, 15), "rank correlation with −Δ", []
    sizes = [size for size in PAPER_OVERLAPS if size <= n]
    for name, values in {"GWHES (Eq. 5), sum over i": score, "GWHES / N⁺, mean over i": score / right,
                         "GWHES / (N⁺ Σ|y|)": score / (right * tokens)}.items():
        row = {"score": name, **{f"K = {k} of {n}": overlap_of_k(delta, values, k) for k in ks}}
        for size in sizes:
            sets = [slice(start, start + size) for start in range(0, n - size + 1, size)]
            row |= {f"K = {k} of {size}": np.mean([overlap_of_k(delta[s], values[s], k) for s in sets]) for k in ks}
        table.append({**row, correlation: rank_correlation(-delta, values)})
    if sizes:
        paper = {f"K = {k} of {size}": PAPER_OVERLAPS[size][k] for size in sizes for k in ks}
        table.append({name: paper.get(name) for name in table[0]} | {"score": "the paper, on its models and data"})
    chance = {f"K = {k} of {size}": k / size if k <= size else None for size in (n, *sizes) for k in ks}
    return [*table, {"score": "expected at random", **chance, correlation: 0.0}]


def mean_interval(values, samples=10_000):
    """The 95% interval of a mean over questions: quantiles of its bootstrap, of a fixed seed."""
    drawn = np.random.default_rng(0).choice(values, (samples, len(values))).mean(1)
    return np.quantile(drawn, (0.025, 0.975))


def with_interval(values):
    """"+1.23e-04 [+1.00e-05, +2.00e-04]": their mean with its 95% interval."""
    low, high = mean_interval(values)
    return f"{values.mean():+.2e} [{low:+.2e}, {high:+.2e}]"


def step_table(curves, lrs):
    """For each step size the share of lazy questions of every method, and the gain Δ(x) − GRPO's in the mean."""
    table = []
    for lr in lrs:
        delta = {method: np.array([curve[method][lr] for curve in curves]) for method in METHODS}
        row = {"step size": lr, "mean Δ/step GRPO": delta["grpo"].mean() / lr}
        row |= {f"Δ ≤ 0 {name}": (delta[method] <= 0).mean() for method, name in METHODS.items()}
        for method, name in [*METHODS.items()][1:]:
            row[f"mean Δ − GRPO's {name} [95%]"] = with_interval(delta[method] - delta["grpo"])
            row[f"above GRPO {name}"] = (delta[method] > delta["grpo"]).mean()
        table.append(row)
    return table


def rule_table(rows, rules):
    """Other rules beside the methods: the share of the penalty that they remove, and the gain Δ(x) − GRPO's.

    Single questions can make much of a mean gain, which its interval and the median tell."""
    grpo, nthr, table = column(rows, "delta grpo"), column(rows, "delta nthr"), []
    gain = (nthr - grpo).mean()                                                # 0 if NTHR selects nothing
    for name in (*METHODS, *rules):
        delta, row = column(rows, f"delta {name}"), {"rule": METHODS.get(name, name)}
        row["penalty removed"] = column(rows, f"penalty removed {name}").mean()
        row["gain / NTHR's"] = f"{(delta - grpo).mean() / gain:+.2f}" if gain else None
        row |= {f"mean Δ − {other}'s [95%]": with_interval(delta - reference)
                for other, reference in (("GRPO", grpo), ("NTHR", nthr))}
        row |= {"median Δ − GRPO's": np.median(delta - grpo), **compared_with_grpo(delta, grpo)}
        table.append({**row, "above NTHR": (delta > nthr).mean()})
    return table


def layer_table(rows, variants):
    """Selection and Δ with hidden states of other layers; the first variant is the paper's."""
    grpo, negative, table = column(rows, "delta grpo"), column(rows, "negative_tokens").sum(), []
    paper = column(rows, f"selected {variants[0]}").sum()
    for variant in variants:
        delta, selected = column(rows, f"delta {variant}"), column(rows, f"selected {variant}").sum()
        both = column(rows, f"selected in both {variant}").sum()
        table.append({"hidden states": variant, "selected": selected / negative,
                      "Jaccard with the first row": both / max(1, paper + selected - both), "mean Δ": delta.mean(),
                      **compared_with_grpo(delta, grpo)})
    return table


def overlap_table(rows):
    """Quarters of the questions by the share of tokens that their wrong and right answers have in common."""
    table = []
    for part in np.array_split(column(rows, "overlap").argsort(kind="stable"), min(4, len(rows))):
        part = [rows[i] for i in part]
        grpo, nthr, overlap = (column(part, name) for name in ("delta grpo", "delta nthr", "overlap"))
        table.append({"shared tokens": f"{overlap.min():.0%} to {overlap.max():.0%}", "questions": len(part),
                      "selected": column(part, "selected").sum() / column(part, "negative_tokens").sum(),
                      "mean Δ GRPO": grpo.mean(), "mean Δ NTHR": nthr.mean(), "difference": (nthr - grpo).mean(),
                      **compared_with_grpo(nthr, grpo)})
    return table


def to_markdown(table):
    """Markdown: Δ in three digits, shares in percent."""
    def show(name, value):
        if not isinstance(value, float):
            return "–" if value is None else str(value)
        return format(value, next((form for start, form in FORMATS.items() if name.startswith(start)), ".1%"))

    return files.markdown(table[0], [[show(*item) for item in row.items()] for row in table])


def plot_bars(rows, methods, title, path):
    """Figures 1 and 4: Δ(x) of each question, side by side, sorted by GRPO's; at most BARS questions, evenly."""
    order, width = column(rows, "delta grpo").argsort(), 0.8 / len(methods)
    if len(order) > BARS:
        title += f" ({BARS} of {len(order)} questions, evenly along the order)"
        order = order[np.linspace(0, len(order) - 1, BARS).round().astype(int)]
    figure, axes = plt.subplots(figsize=(12, 3.8), layout="constrained")
    for i, method in enumerate(methods):
        axes.bar(np.arange(len(order)) + (i - (len(methods) - 1) / 2) * width, column(rows, f"delta {method}")[order],
                 width, color=COLORS[method], label=METHODS[method])
    axes.axhline(0, color="black", linewidth=0.8)
    shown = np.concatenate([column(rows, f"delta {method}")[order] for method in methods])
    # linear up to the median, logarithmic beyond: a few questions move a hundred times as far as most
    axes.set_yscale("symlog", linthresh=float(np.median(np.abs(shown))) or 1.0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel="questions, sorted by GRPO's Δ(x)", ylabel="Δ(x), nats (linear to the median)",
             xlim=(-1, len(order)), xticks=[], ylim=(1.5 * min(0, shown.min()), 1.5 * max(0, shown.max())))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(methods))      # beside the title
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_steps(curves, lrs, path):
    """Mean Δ/lr, and the share of questions where a method beats GRPO, as functions of the step size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for method, marker in zip(("random", "grpo", "pos-only", "nthr"), "^osD"):
        delta = np.array([[curve[method][lr] for lr in lrs] for curve in curves])                  # (n, step sizes)
        grpo = np.array([[curve["grpo"][lr] for lr in lrs] for curve in curves])
        style = {"color": COLORS[method], "marker": marker, "label": METHODS[method]}
        left.plot(lrs, delta.mean(0) / lrs, **style)
        if method != "grpo":
            right.plot(lrs, (delta > grpo).mean(0), **style)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="step size", ylabel="mean Δ(x) / step size", title="flat where Δ is a derivative")
    right.set(xscale="log", xlabel="step size", ylabel="share of questions", ylim=(-0.02, 1.02),
              title="Δ(x) above GRPO's")
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def theory_line(rows):
    limit, expected = column(rows, "theory_limit"), -column(rows, "gwhes")
    error = np.abs(limit - expected).max() / np.abs(expected).max()
    return error, (f"Theorem 4.4, lm_head alone, SGD step {THEORY_LR:g}: N⁺ Σ|y| Δ/lr equals −GWHES on all {len(rows)} "
                   f"questions within {error:.1e} of the largest")


def write_report(out, rows, curves, variants, rules, optimizer, lr, heading, source, args):
    """Tables, CSVs and pictures of one optimizer. rows, curves: what `study` returns, of all questions."""
    error, theory = theory_line(rows)
    lrs = sorted(curves[0]["grpo"])
    tables = {f"Δ(x) after one {optimizer} step of size {lr:g}": method_table(rows),
              "Table 1: do the laziest questions have the largest GWHES?": gwhes_table(rows),
              "Step size": step_table(curves, lrs)}
    if len(variants) > 1:
        tables["Other hidden states in Eq. 7"] = layer_table(rows, [variant_name(*v) for v in variants])
    if rules:
        tables["Other rules"] = rule_table(rows, rules)
    if args.overlap:
        tables["Questions by what their wrong answers share with the right ones"] = overlap_table(rows)
    lines = [heading, "", f"    {source['command']}", ""]
    for title, table in tables.items():
        lines += [f"**{title}**", "", to_markdown(table), ""]
    print("\n".join(lines), theory, sep="\n")
    (out / "tables.md").write_text("\n".join([*lines, theory, ""]), encoding="utf-8")
    files.write_csv(out / "questions.csv", rows)
    files.write_json(out / "results.json", {**source, "tables": tables, "theory_error": error})
    files.write_csv(out / "steps.csv", [
        {"index": row["index"], "step size": lr, **{f"delta {method}": curve[method][lr] for method in METHODS}}
        for row, curve in zip(rows, curves) for lr in lrs])
    setting = f"{Path(args.model).resolve().name}, one {optimizer} step of size {lr:g}"
    plot_bars(rows, ("grpo", "pos-only"), f"Figure 1: {setting}", out / "figure1.png")
    plot_bars(rows, ("grpo", "random", "nthr"), f"Figure 4: {setting}", out / "figure4.png")
    plot_steps(curves, lrs, out / "step_size.png")


def main(argv=None):
    args = common.parse_flags(build_parser(), argv)
    args.optimizer = list(dict.fromkeys(args.optimizer))
    args.lr = args.lr or [{"sgd": 1e-3, "adamw": 1e-4}[optimizer] for optimizer in args.optimizer]
    for flag, values in (("lr", args.lr), ("sweep", args.sweep or [])):
        if not all(0 < lr < math.inf for lr in values):
            fail(f"--{flag} must be finite and above 0, got {values}")
    if args.draws < 1:
        fail(f"--draws must be at least 1, got {args.draws}")
    if len(args.lr) != len(args.optimizer):
        fail(f"--lr must be one per --optimizer ({' '.join(args.optimizer)}), got {args.lr}")
    steps = {optimizer: (lr, sorted({lr, *(STEPS[optimizer] if args.sweep is None else args.sweep)}))
             for optimizer, lr in zip(args.optimizer, args.lr)}
    try:
        nthr_eta(0.5, args.eta), nthr_threshold(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), args.beta)
    except ValueError as error:
        fail(f"--eta {args.eta}, --beta {args.beta}: {error}")
    rules = {} if args.rules is None else common.load_rules(args.rules or common.RULES, METHODS)
    start = time.perf_counter()
    model, tokenizer, problems, prompts = common.load_model_and_prompts(args)
    layers = model.config.get_text_config().num_hidden_layers
    if not all(0 <= layer <= layers for layer in args.layer):
        fail(f"--layer must be 0 (embeddings) to {layers} (after the final norm), got {args.layer}")
    variants = [(layer, normalize) for layer in dict.fromkeys([layers, *args.layer])               # the paper's first
                for normalize in ((False, True) if args.normalize else (False,))]
    out = files.make_folder(args.out)
    groups, sampled, success_rate = common.mixed_groups(model, tokenizer, problems, prompts, args)
    model = common.to_float64(model)
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(args.seed)
    studies = [study(model, initial, group, generator, variants, rules, steps, args)
               for group in tqdm(groups, desc="one update per method", unit=" questions")]
    source = {**common.provenance(args, time.perf_counter() - start), "questions": len(groups), "sampled": sampled,
              "success_rate": success_rate}
    heading = (f"{len(groups)} questions with right and wrong answers of {sampled} sampled ({success_rate:.1%} of the "
               f"answers right), G = {args.group_size}, seed {args.seed}, {source['seconds']:.0f} s on "
               f"{source['machine']}:")
    for optimizer, (lr, _) in steps.items():
        rows, curves = map(list, zip(*(found[optimizer] for found in studies)))
        folder = files.make_folder(out / optimizer) if len(steps) > 1 else out
        write_report(folder, rows, curves, variants, rules, optimizer, lr, heading, source, args)


if __name__ == "__main__":
    main()
