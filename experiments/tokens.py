r"""Figure 3 and Tables 10-11: which tokens of wrong answers NTHR selects, as a page to read, and as numbers.

python experiments/tokens.py                          # embedded model, 30 questions, 10 seconds on one CPU core
python experiments/tokens.py --order delta --text     # laziest question first by Δ(x); the groups in the terminal too
python experiments/tokens.py --model Qwen/Qwen2.5-0.5B --max-new-tokens 600        # a real model, one GPU, 10 questions

The paper finds that high-NTHR tokens of wrong answers are mostly correct steps. On sums such as 17+28-9 the correct
steps are known: this script recomputes the arithmetic of each wrong answer and reports how many selected tokens (Eq. 8)
lie in correct steps (precision) and how many tokens of correct steps are selected (recall), beside as many random
tokens per answer (§5.3), for the definitions of `label_tokens` and `on_path`; also for the tokens alone that the model
was not sure of, since tokens with π near 1 have a prediction error, and so a score, near 0. Other problems get the page
without these numbers.

Writes to --out: tokens.html, the page (no script, no network); tokens.svg, answers of its first group; tokens.json, the
summary and the numbers of each group; tokens.png, the share of correct steps by score; tokens.csv, a row per token of a
wrong answer. There, text is a JSON string (a byte that is no UTF-8 is \udc80 to \udcff), note a special token's name or
"part of a character", step counts from 1 and is 0 where the text is no step; step and the labels are empty where they
are not known.
"""
import json
import math
import os
import re
import sys
import time
from html import escape
from itertools import accumulate

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from tqdm import tqdm

import common
from grpo import group_advantages
from lld import backward, column, group_inputs, initial_policy, updated_likelihoods
from nthr import gwhes, nthr_advantages, nthr_eta, nthr_threshold
from support.errors import fail
from support.flags import flag_adder

matplotlib.use("Agg")                                                          # files only, no window

# Shapes: G responses of one question, T response tokens, n tokens of its wrong responses
COLORS = ("#1b7837", "#4393c3", "#bf812d")
PART = "part of a character"
DEFINITIONS = {"right_as_written": "right as written", "true_step": "of the true solution"}            # of a step
LABELS = {**{name: f"in steps {words}" for name, words in DEFINITIONS.items()},
          "on_path": "on the path of the true solution"}                       # of a token
UNSURE = 0.95                                                                  # π below which the model was not sure
PICTURE_WIDTH = 80                                                             # characters of an answer in the SVG
LEVELS = 10                                                                    # of shading, for each sign
PALETTE = {f"{sign}{level}": [round(255 + (c - 255) * level / LEVELS) for c in hue] for level in range(LEVELS + 1)
           for sign, hue in (("p", (242, 158, 66)), ("n", (116, 176, 244)))}   # s > 0 orange, s < 0 blue
# Byte-level BPE writes these bytes as the characters that they are in Latin-1, the others as chr(256), chr(257), ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
NUMBER = "[0-9]{1,9}"


def pieces(tokenizer, ids):
    """(text, note) of each token; the texts add up to what the tokens write.

    A character that several tokens share is in the text of the last; the others write "" and have the note PART. A
    special token writes "" and has its name as note. Bytes that are no UTF-8 become the surrogates U+DC80 to U+DCFF."""
    byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    added, names, data = tokenizer.added_tokens_decoder, {}, []
    for k, (token_id, token) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids))):
        if token is None or (token_id in added and added[token_id].special):   # None: more lm_head rows than tokens
            names[k] = token or f"token {token_id}"
            data.append(b"")
        elif byte_level and token_id not in added and set(token) <= BYTES.keys():
            data.append(bytes(BYTES[char] for char in token))
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):                           # SentencePiece's byte fallback
            data.append(bytes.fromhex(token[3:5]))
        else:
            data.append(token.replace("▁", " ").encode())                      # SentencePiece's space
    owner = [k for k, part in enumerate(data) for _ in part]                   # the token of each byte
    texts, position = [""] * len(data), 0
    for char in b"".join(data).decode("utf-8", "surrogateescape"):
        position += 1 if "\udc80" <= char <= "\udcff" else len(char.encode())
        texts[owner[position - 1]] += char
    return [(text, names.get(k, "" if text else PART)) for k, text in enumerate(texts)]


def marks(text):
    """(shown, tag) of each character; tag: "i" for a mark in the character's place, "em" for one beside it, or ""."""
    for char in text:
        code = ord(char)
        if char == "\n":
            yield from (("↵", "em"), ("\n", ""))
        elif char == "\t":
            yield "⇥", "i"
        elif char == " " and text.isspace():
            yield "␣", "i"
        elif char.isprintable():
            yield char, ""
        elif 0xDC80 <= code <= 0xDCFF:                                         # a byte that is no UTF-8
            yield f"\\x{code - 0xDC00:02X}", "i"
        else:                                                                  # ESC, bidi overrides, zero width, ...
            yield f"\\x{code:02X}" if code < 128 else f"\\u{code:04X}" if code < 65536 else f"\\U{code:08X}", "i"


def plain(text):
    return "".join(shown for shown, _ in marks(text))


def markup(text):
    return "".join(f"<{tag}>{escape(shown)}</{tag}>" if tag else escape(shown) for shown, tag in marks(text))


def sum_terms(problem):
    """[17, 28, -9] of "17+28-9"; None for anything else."""
    if re.fullmatch(f"{NUMBER}([+-]{NUMBER})+", problem):
        return [int(term) for term in re.findall(f"[+-]?{NUMBER}", problem)]


def label_tokens(terms, texts):
    r"""(step, right as written, step of the true solution) of each token of 17+28=45;45-9=36;\boxed{36}<eos>.

    Right as written: the step starts from the result written before it (or the first term), its other operand is the
    problem's next term, and its arithmetic is right; the box comes after the last term and copies the last result.
    Step of the true solution: it states exactly the true running totals. A step includes its ";", the box what follows
    it without text (EOS); a token belongs to the step of its last character. Text that is no step is (0, 0, 0)."""
    totals, previous, labels, box = list(accumulate(terms)), terms[0], [], None
    truth = list(zip(totals, terms[1:], totals[1:]))                           # (17, 28, 45), (45, -9, 36)
    label = nothing = (0, 0, 0)
    for k, text in enumerate(re.findall("[^;]*;|[^;]+", "".join(texts))):
        step = re.fullmatch(f"(-?{NUMBER})([+-]{NUMBER})=(-?{NUMBER});", text)
        box = re.fullmatch(rf"\\boxed\{{(-?{NUMBER})\}}", text)
        label = nothing
        if step:
            left, term, result = map(int, step.groups())
            due = k < len(truth) and term == terms[k + 1]
            label = (k + 1, int(due and left == previous and left + term == result),
                     int(due and truth[k] == (left, term, result)))
        elif box:
            due = k == len(truth)
            label = (k + 1, int(due and int(box[1]) == previous), int(due and int(box[1]) == totals[-1]))
        previous = int(step[3]) if step else None
        labels += [label] * len(text)                                          # one for each character
    labels.append(label if box else nothing)                                   # and one for what follows the last
    return [labels[end - 1 if text else end] for text, end in zip(texts, accumulate(map(len, texts)))]


def on_path(terms, texts):
    r"""1 for each token up to which the answer is how 17+28=45;45-9=36;\boxed{36}<eos> begins, else 0."""
    totals = list(accumulate(terms))
    steps = [f"{left}{term:+d}={result};" for left, term, result in zip(totals, terms[1:], totals[1:])]
    solution = "".join(steps) + f"\\boxed{{{totals[-1]}}}"
    return [int(solution.startswith(so_far) and (text != "" or so_far == solution))                # "": EOS
            for text, so_far in zip(texts, accumulate(texts))]


def token_view(model, tokenizer, group, initial, betas, args):
    """What is shown and counted of a group: its numbers; its responses as (words, text, rows), rows those of
    tokens.csv, none for a correct one; all n rows; and which of them each β selects."""
    _, _, _, tokens, mask = group_inputs(group)                                      # (G, T) both
    correct, terms = group.correct, sum_terms(group.problem)
    old, hidden = initial_policy(model, group, args.temperature, args.micro_batch_size)
    advantages = group_advantages(correct.float()[None]).view(-1, 1).repeat(1, mask.shape[1])
    nthr = nthr_advantages(advantages, hidden, tokens, mask, correct, model.get_output_embeddings().weight.detach(),
                           logprobs=old, beta=args.beta, eta=args.eta, vocabulary=args.nthr_vocab,
                           temperature=args.temperature)
    responses, finished = [], group.rollout.finished.tolist()
    for j in sorted(range(len(correct)), key=lambda j: not correct[j]):        # the correct ones first
        written = pieces(tokenizer, tokens[j][mask[j]].tolist())
        texts = [text for text, _ in written]
        labels = ([(*steps, path) for steps, path in zip(label_tokens(terms, texts), on_path(terms, texts))] if terms
                  else [("", "", "", "")] * len(written))
        columns = zip(written, labels, *(x[j].tolist() for x in (tokens, nthr.scores, old.exp(), nthr.selected.int())))
        rows = [{"question": group.index, "response": j, "position": k, "token_id": token_id, "text": text,
                 "note": note, "s": s, "pi": pi, "selected": selected, **dict(zip(("step", *LABELS), label))}
                for k, ((text, note), label, token_id, s, pi, selected) in enumerate(columns) if not correct[j]]
        words = f"{'correct' if correct[j] else 'incorrect'} response {j}{'' if finished[j] else ', cut off'}"
        responses.append((words, "".join(texts), rows))
    rows = [row for _, _, rows in responses for row in rows]
    numbers = {"question": group.index, "problem": plain(group.problem), "answer": plain(group.answer),
               "responses": len(correct), "correct": int(correct.sum()), "negative_tokens": len(rows),
               "selected": int(nthr.selected.sum()), "tau": nthr.tau.item(), "eta": nthr.eta,
               "tau_at_beta_1": nthr_threshold(nthr.scores, mask, correct).item(),
               "gwhes": gwhes(nthr.scores, mask, correct).item(), "largest_s": max(abs(row["s"]) for row in rows)}
    if args.order == "delta":
        backward(model, group, old, advantages, args.temperature, args.micro_batch_size)           # GRPO, plain SGD
        numbers["delta"] = updated_likelihoods(model, initial, group, old, [args.lr], "sgd", args.temperature,
                                               args.micro_batch_size)[args.lr]
    chosen = {beta: (nthr.scores > nthr_threshold(nthr.scores, mask, correct, beta))[mask & ~correct[:, None]]
              .cpu().numpy() for beta in betas}                                # (n,) bool, in the order of rows
    return {"group": group, "numbers": numbers, "responses": responses, "rows": rows, "chosen": chosen,
            "is_sum": terms is not None}


def precision_recall(views, name, beta):
    """'Selected' against a label of tokens, for NTHR and for GRPO + Random; None without a token to divide by.

    Random: the expectation, n_j selected tokens of response j hit n_j · (share of its tokens with the label)."""
    selected = hits = random_hits = right_tokens = 0
    for group in views:
        right, response = column(group["rows"], name), column(group["rows"], "response")
        chosen = group["chosen"][beta]
        selected, hits, right_tokens = selected + chosen.sum(), hits + chosen @ right, right_tokens + right.sum()
        random_hits += sum(chosen[response == j].sum() * right[response == j].mean() for j in set(response))
    shares = [float(part / whole) if whole else None
              for whole in (selected, right_tokens) for part in (hits, random_hits)]
    return dict(zip(("precision", "random_precision", "recall", "random_recall"), shares), selected=int(selected))


def outscoring(views, name):
    """The probability that a token with the label outscores one of its group without it (ties: half).

    ½ is chance. Mean over the groups that have both kinds of tokens; None if none has."""
    values = []
    for group in views:
        s, right = column(group["rows"], "s"), column(group["rows"], name) == 1
        if 0 < right.sum() < len(right):
            values.append(0.5 + np.sign(s[right, None] - s[~right]).mean() / 2)
    return float(np.mean(values)) if values else None


def unsure_only(group):
    """The view without the tokens that the model was sure of."""
    keep = column(group["rows"], "pi") < UNSURE
    return {"rows": [row for row, kept in zip(group["rows"], keep) if kept],
            "chosen": {beta: chosen[keep] for beta, chosen in group["chosen"].items()}}


def measures(views, betas):
    """{label: how often tokens have it, and how NTHR's selection and Random meet it}; {} without tokens."""
    rows = [row for group in views for row in group["rows"]]
    return {name: {"tokens": len(rows), "base_rate": column(rows, name).mean().item(),
                   "outscoring": outscoring(views, name),
                   "betas": {str(beta): precision_recall(views, name, beta) for beta in betas}}
            for name in LABELS if rows}


def summarise(views, sampled, betas):
    sums = [group for group in views if group["is_sum"]]
    rows = [row for group in sums for row in group["rows"]]
    no_step = [(row["question"], row["response"]) for row in rows if row["step"] == 0]
    return {"groups": len(views), "questions_sampled": sampled, "groups_of_sums": len(sums),
            "negative_tokens": sum(len(group["rows"]) for group in views),
            "selected": sum(group["numbers"]["selected"] for group in views),
            "tokens_in_no_step": len(no_step), "responses_with_text_in_no_step": len(set(no_step)),
            "definitions": measures(sums, betas),
            "definitions_unsure": measures([unsure_only(group) for group in sums], betas)}


def percent(value):
    return "–" if value is None else f"{value:.1%}"


def sentences(summary, beta):
    """The answer to Figure 3's claim in words."""
    selected, total, groups = summary["selected"], summary["negative_tokens"], summary["groups"]
    others, no_step = groups - summary["groups_of_sums"], summary["tokens_in_no_step"]
    lines = [f"At β = {beta:g} NTHR selects {selected} of the {total} tokens of wrong answers ({selected / total:.1%}) "
             f"in {groups} questions with right and wrong answers of {summary['questions_sampled']} sampled."]
    for name in summary["definitions"]:
        found = [summary[population][name]["betas"][str(beta)]
                 for population in ("definitions", "definitions_unsure") if name in summary[population]]
        nthr, random = ([percent(row[key]) for row in found] for key in ("precision", "random_precision"))
        line = f"Tokens {LABELS[name]} are {nthr[0]} of the selected ones ({random[0]} of as many random ones)"
        lines.append(f"{line}; among tokens with π < {UNSURE}, {nthr[1]} ({random[1]})." if found[1:] else f"{line}.")
    if summary["definitions"]:
        at_beta = {name: values["betas"][str(beta)] for name, values in summary["definitions"].items()}
        more = [LABELS[name] for name, row in at_beta.items()
                if (row["precision"] or 0) > (row["random_precision"] or 0)]
        lines.append("Figure 3, that the tokens NTHR selects are mostly correct steps: here they are more often than "
                     f"random tokens {' and '.join(more) or 'nothing of the above'}"
                     + (", not the rest of the above." if 0 < len(more) < len(LABELS) else "."))
    if others:
        lines.append(f"No sums of whole numbers: {others} of {groups} problems. Which of their steps are right is not "
                     f"known, so they enter no precision or recall.")
    if no_step:
        lines.append(f"Text that cannot be read as steps: {no_step} tokens, in "
                     f"{summary['responses_with_text_in_no_step']} of the wrong answers; they count as wrong.")
    return lines


def table(summary):
    """(title, rows) of each label, for all tokens and for those that the model was not sure of."""
    for population, words in (("definitions", "the tokens"), ("definitions_unsure", f"the tokens with π < {UNSURE}")):
        for name, values in summary[population].items():
            title = (f"Tokens {LABELS[name]}: {percent(values['base_rate'])} of {words}. They outscore the others of "
                     f"their group with probability {percent(values['outscoring'])} (50% by chance).")
            yield title, [[f"{float(beta):g}", row["selected"], *map(percent, list(row.values())[:4])]
                          for beta, row in values["betas"].items()]


STYLE = """:root{color-scheme:light}
body{margin:0 auto;padding:1rem;max-width:60rem;background:#fff;color:#111;font:16px/1.5 system-ui,sans-serif;
 overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:1.5rem 0 .3rem}p{margin:.5rem 0}a{color:#0645ad}
section{border-top:2px solid #999;margin-top:1.5rem}ul{list-style:none;padding:0;margin:0}li{margin:.3rem 0}
nav li{display:inline-block;margin-right:.8rem}.label{color:#444;font-size:.9rem}
.text{font:15px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}caption{text-align:left}
th,td{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #bbb;overflow-wrap:normal}
tbody th{text-align:left;padding-top:.8rem}thead [colspan]{text-align:center}u,span{margin-right:1px}
u{text-decoration:underline 2px;text-underline-offset:4px;text-decoration-skip-ink:none;font-weight:700}
i,em{font-style:italic;font-weight:400;color:#333;unicode-bidi:isolate}
sup{font:600 .8em system-ui,sans-serif;margin:0 .35em 0 .1em}
@media(max-width:30rem){th,td{padding:.2rem;font-size:.85rem}}
""" + "".join(".{}{{background:rgb({},{},{})}}".format(name, *color) for name, color in PALETTE.items())
TABLE = """<table><caption>Tokens of wrong answers at each threshold β: how many are selected, how many of these are
of the kind named (precision), how many of that kind are selected (recall), and the same for as many random tokens per
answer.</caption><thead><tr><th scope="col" rowspan="2">β</th><th scope="col" rowspan="2">tokens</th>
<th scope="colgroup" colspan="2">precision</th><th scope="colgroup" colspan="2">recall</th></tr><tr>
<th scope="col">NTHR</th><th scope="col">random</th><th scope="col">NTHR</th><th scope="col">random</th></tr></thead>"""
LEGEND = """<h2>How to read this page</h2>
<p>Each token of an incorrect response is shaded by its score s (Eq. 7): <span class="p7">orange</span> for s &gt; 0,
where raising the correct responses raises this token too; <span class="n7">blue</span> for s &lt; 0; white near 0. The
strength is the square root of |s| over the group's largest. <u>Bold and underlined</u> tokens are selected (s &gt; τ,
Eq. 8): their penalty is multiplied by η. Point at a token to see s and its probability π; tokens.csv lists them.</p>
<p>Marks: <i>␣</i> a space, <em>↵</em> a new line, <i>⇥</i> a tab, <i>\\x1B</i> a control character or a byte that is no
text, <em>◌</em> a part of a character that a later token completes, <em>&lt;name&gt;</em> a special token. Where it is
known, <sup>✓</sup> follows a step that is right as written, given the steps before it (so also a box that copies a
wrong result), and <sup>✗</sup> any other text. On the path of the true solution: the answer up to this token is how the
true solution begins.</p>"""


def shade(row, largest):
    """The name of this token's color in PALETTE; level 0 is white."""
    level = round(LEVELS * math.sqrt(abs(row["s"]) / largest)) if largest else 0
    return f"{'p' if row['s'] > 0 else 'n'}{level}"


def facts(numbers):
    delta = f"; Δ(x) = {numbers['delta']:.3e}" if "delta" in numbers else ""
    return (f"p = {numbers['correct']}/{numbers['responses']}; τ = {numbers['tau']:.4g}; η = {numbers['eta']:.4g}; "
            f"GWHES = {numbers['gwhes']:.4g}{delta}")


def symbol(row):
    """What stands for a token that writes nothing."""
    return "◌" if row["note"] == PART else plain(row["note"])


def response_html(rows, largest):
    parts = []
    for row, following in zip(rows, [*rows[1:], {"step": None}]):
        tag = "u" if row["selected"] else "span"
        title = f"s = {row['s']:.4g}, π = {row['pi']:.4g}" + (f", {plain(row['note'])}" if row["note"] else "")
        shown = markup(row["text"]) or f"<em>{escape(symbol(row))}</em>"
        parts.append(f'<{tag} class="{shade(row, largest)}" title="{escape(title)}">{shown}</{tag}>')
        if row["step"] not in ("", following["step"]):                         # the last token of its step
            words = "; ".join(f"{DEFINITIONS[name]}: {'yes' if row[name] else 'no'}" for name in DEFINITIONS)
            parts.append(f'<sup title="{words}">{"✓" if row["right_as_written"] else "✗"}</sup>')
    return "".join(parts)


def page(views, summary, source, args):
    """The HTML file. All that a model or a data file wrote goes through `markup`, or through `plain` and `escape`."""
    bodies, links, sections = "", "", ""
    order = "smallest Δ(x)" if args.order == "delta" else "largest GWHES (Eq. 5), summed over the correct responses"
    for title, rows in table(summary):
        lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        bodies += f'<tbody><tr><th colspan="6" scope="rowgroup">{escape(title)}</th></tr>{lines}</tbody>'
    for group in views:
        numbers, problem, answer = group["numbers"], group["group"].problem, group["group"].answer
        number = numbers["question"]
        links += f'<li><a href="#question-{number}">{number}</a></li> '
        items = "".join(f'<li><div class="label">{words}</div><div class="text">'
                        f'{response_html(rows, numbers["largest_s"]) if rows else markup(text)}</div></li>\n'
                        for words, text, rows in group["responses"])
        sections += (f'<section id="question-{number}"><h2>Question {number}</h2>\n<div class="text">'
                     f'{markup(problem)}</div>\n<p>Gold answer <bdi class="text">{markup(answer)}</bdi>; '
                     f"{facts(numbers)}</p>\n<ul>\n{items}</ul></section>\n")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light"><title>Tokens that NTHR selects</title><style>{STYLE}</style></head>
<body><main><h1>Which tokens of wrong answers does NTHR select?</h1>
{"".join(f"<p>{escape(line, quote=False)}</p>" for line in sentences(summary, args.beta))}
{f"{TABLE}{bodies}</table>" if bodies else ""}
{LEGEND}
<nav><h2>Questions, laziest first: {order}</h2>
<ul>{links}</ul></nav>
{sections}</main>
<footer class="label">{escape(plain(", ".join(f"{name}: {value}" for name, value in source.items())))}</footer></body>
</html>
"""


def picture(group):
    """A right and up to four wrong answers of a group as an SVG, shaded and underlined as on the page, cut if long."""
    right = [answer for answer in group["responses"] if not answer[2]]
    wrong = [answer for answer in group["responses"] if answer[2]]
    parts, largest, widest = [], group["numbers"]["largest_s"], 0
    for line, (_, text, rows) in enumerate([right[0], *wrong[:4]]):
        x, y = 80, 36 + 34 * line                                              # of the baseline, in pixels
        label = "wrong" if rows else "right"
        parts.append(f'<text x="14" y="{y}" font-family="sans-serif" fill="#57606a">{label}</text>')
        for row in rows or [{"text": text[:PICTURE_WIDTH], "note": "", "s": 0.0, "selected": 0}]:
            shown = plain(row["text"]) or symbol(row)
            width, color = 11 * len(shown), "rgb({},{},{})".format(*PALETTE[shade(row, largest)])
            if x + width > 80 + 11 * PICTURE_WIDTH:
                break
            parts.append(f'<rect x="{x}" y="{y - 19}" width="{width}" height="25" fill="{color}"/>')
            if row["selected"]:
                parts.append(f'<rect x="{x + 1}" y="{y + 6}" width="{width - 2}" height="2.5"/>')
            weight = "bold" if row["selected"] else "normal"
            parts.append(f'<text x="{x}" y="{y}" textLength="{width}" font-family="monospace" font-weight="{weight}">'
                         f'{escape(shown)}</text>')
            x += width
        widest, height = max(widest, x + 14), y + 20
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" width="{widest}" height="{height}" '
            f'font-size="18">'
            f'<rect width="100%" height="100%" rx="6" fill="white"/>{"".join(parts)}</svg>\n')


def terminal(views, color):
    """The groups as text, selected tokens in ⟦ ⟧; with color they are underlined too, and each token is shaded."""
    lines = []
    for group in views:
        numbers = group["numbers"]
        lines += ["", f"question {numbers['question']}: {numbers['problem']}",
                  f"gold answer {numbers['answer']}; {facts(numbers)}"]
        for words, text, rows in group["responses"]:
            shown = "" if rows else plain(text)
            for row in rows:
                token = plain(row["text"]) or symbol(row)
                token = f"⟦{token}⟧" if row["selected"] else token
                codes = "30;48;2;{};{};{}".format(*PALETTE[shade(row, numbers["largest_s"])]) + ";4" * row["selected"]
                shown += f"\x1b[{codes}m{token}\x1b[0m" if color else token
            lines.append(f"  {words}: {shown}")
    return "\n".join(line.replace("\n", "\n    ") for line in lines)           # no text can pose as a line of ours


def plot_labels(views, path):
    """Of the tokens of wrong answers in each range of s/|τ|, the share with each label; without sums, their number."""
    sums, edges = [group for group in views if group["is_sum"]], [-math.inf, -10, -1, -0.1, 0, 0.1, 1, 10, math.inf]
    ratio = np.concatenate([column(group["rows"], "s") / abs(group["numbers"]["tau_at_beta_1"])
                            for group in sums or views])
    where, n = np.digitize(ratio, edges, right=True) - 1, len(edges) - 1       # right: a token at τ is not selected
    counts = np.bincount(where, minlength=n)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, name, color in zip((-0.27, 0, 0.27), LABELS if sums else (), COLORS):
        right = np.concatenate([column(group["rows"], name) for group in sums])
        axes.bar(np.arange(n) + offset, np.bincount(where, right, n) / np.maximum(counts, 1), 0.27, color=color,
                 label=LABELS[name])
        axes.axhline(right.mean(), color=color, linestyle="--", linewidth=1)
    if sums:
        axes.set(ylabel="share of tokens", ylim=(0, 1), title="Tokens of wrong answers (dashed: share of all tokens)")
        axes.legend(frameon=False, loc="upper left")
    else:
        axes.bar(np.arange(n), counts, color="#1b7837")
        axes.set(ylabel="tokens of wrong answers", yscale="symlog")
    ranges = ["below -10", *(f"{low:g} to {high:g}" for low, high in zip(edges[1:-2], edges[2:-1])), "above 10"]
    axes.set_xticks(range(n), [f"{name}\nn = {count}" for name, count in zip(ranges, counts)], fontsize=8)
    axes.set(xlabel="s / |τ|, τ at β = 1")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def build_parser():
    parser = common.build_parser(__doc__, "tokens", questions=(30, 10), eta="2|0.5-p|")
    add = flag_adder(parser.add_argument_group("what is shown"))
    add("--order", default="gwhes", choices=["gwhes", "delta"], help="laziest question first, by Eq. 5, summed over "
        "the correct responses, or by Eq. 2 "
        "after one GRPO update by plain SGD on this question alone")
    add("--lr", type=float, default=1e-3, help="step size of that update")
    add("--text", action="store_true", help="also print the groups")
    return parser


def main(argv=None):
    args = common.parse_flags(build_parser(), argv)
    for name, expected, valid in (("lr", "finite and above 0", 0 < args.lr < math.inf),
                                  ("beta", "finite", math.isfinite(args.beta))):
        if not valid:
            fail(f"--{name} must be {expected}, got {getattr(args, name)}")
    try:
        nthr_eta(0.5, args.eta)
    except ValueError as error:
        fail(f"--eta: {error}")
    start = time.perf_counter()
    model, tokenizer, problems, prompts = common.load_model_and_prompts(args)
    out = common.make_folder(args.out)
    groups, sampled = common.mixed_groups(model, tokenizer, problems, prompts, args)
    betas = list(dict.fromkeys([args.beta, 1.0, 0.1, 0.0]))                    # those of Table 4
    model = common.to_float64(model)
    initial = [parameter.detach().clone() for parameter in model.parameters()] if args.order == "delta" else None
    views = [token_view(model, tokenizer, group, initial, betas, args)
             for group in tqdm(groups, desc="scoring tokens", unit=" questions")]
    views.sort(key=lambda group: group["numbers"]["delta"] if args.order == "delta" else -group["numbers"]["gwhes"])
    summary = summarise(views, sampled, betas)
    source = common.provenance(args, time.perf_counter() - start)
    (out / "tokens.html").write_text(page(views, summary, source, args), encoding="utf-8")
    common.write_json(out / "tokens.json", {**source, "summary": summary, "groups": [v["numbers"] for v in views]})
    common.write_csv(out / "tokens.csv", [{**row, "text": json.dumps(row["text"]), "note": plain(row["note"])}
                                          for group in views for row in group["rows"]])
    (out / "tokens.svg").write_text(picture(views[0]), encoding="utf-8")
    plot_labels(views, out / "tokens.png")
    if args.text:
        print(terminal(views, sys.stdout.isatty() and not os.environ.get("NO_COLOR")), end="\n\n")
    print("\n".join(sentences(summary, args.beta)))
    for title, rows in table(summary):
        header = ["β", "tokens", "precision NTHR", "random", "recall NTHR", "random"]
        print("", title, "", common.markdown(header, rows), sep="\n")
    print(f"\nwritten: tokens.html, tokens.json, tokens.csv, tokens.svg and tokens.png in {out}")


if __name__ == "__main__":
    main()
