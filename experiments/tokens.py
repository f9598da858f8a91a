r"""Figure 3 and Tables 10-11: which tokens of wrong answers NTHR selects, as a page to read, and as numbers.

python experiments/tokens.py                          # embedded model, 30 questions, 10 seconds on one CPU core
python experiments/tokens.py --order delta --text     # laziest question first by Δ(x); the groups in the terminal too
python experiments/tokens.py --model Qwen/Qwen2.5-0.5B --max-new-tokens 600        # a real model, one GPU, 10 questions

The paper finds that high-NTHR tokens of wrong answers are mostly correct steps. On sums such as 17+28-9 the correct
steps are known: this script recomputes the arithmetic of each wrong answer and reports how many selected tokens (Eq. 8)
lie in correct steps (`label_tokens`, `on_path`), beside as many random tokens per answer (§5.3). It does so again for
the tokens that the model was not sure of: where π is near 1, the prediction error and so the score are near 0. In
answers to other problems equations such as 7 + 5 = 12 are checked (`right_equations`). Every share has a 95% interval
from a bootstrap over questions, since the tokens of a question are not independent. Fewer than 100 tokens or 10
questions get no share.

The page shows one group first. Of the groups with two to four different wrong answers, each partly selected, it is the
one with the median share of selected tokens; without any such group, the laziest. tokens.svg shows the same group.

Writes to --out: tokens.html, the page (no script, no network); tokens.svg, the picture; tokens.json, the summary and
the numbers of each group; tokens.csv, a row per token of a wrong answer. There, text is a JSON string (a byte that is
no UTF-8 is \udc80 to \udcff), note a special token's name or "part of a character", step counts from 1 and is 0 where
the text is no step; step and the labels are empty where they are not known.
"""
import json
import math
import re
import time
from html import escape
from itertools import accumulate

import numpy as np
from tqdm import tqdm

import common
import files
from grpo import group_advantages
from lld import backward, column, group_inputs, initial_policy, updated_likelihoods
from nthr import gwhes, nthr_advantages, nthr_eta
from support.errors import fail
from support.flags import flag_adder

# Shapes: G responses of one question, T response tokens, n tokens of its wrong responses
COLORS = {"p": (242, 158, 66), "n": (116, 176, 244)}                           # s > 0 orange, s < 0 blue
PART = "part of a character"
LABELS = {"right_as_written": "in steps right as written", "true_step": "in steps of the true solution",
          "on_path": "on the path of the true solution"}                       # of a token of an answer to a sum
EQUATION = "right_equation"                                                    # the label of other answers' tokens
OFTEN, WORDS = 20, 8                                                           # of the words that are named
UNSURE = 0.95                                                                  # π below which the model was not sure
FEWEST_TOKENS, FEWEST_GROUPS = 100, 10                                         # that a share is stated of
RESAMPLES = 10000
PICTURE_WIDTH = 80                                                             # characters of an answer in the SVG
NO_BREAK_SPACE = "\u00a0"                                                      # for the SVG: a browser drops spaces
LEVELS = 10                                                                    # of shading, for each sign
# Byte-level BPE writes these bytes as the characters that they are in Latin-1, the others as chr(256), chr(257), ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
NUMBER = "[0-9]{1,9}"
# An equation, whole: no digits or further terms before it or after it
WRITTEN = re.compile(rf"(?<![0-9.+*x×-])(?<![+*x×-] ){NUMBER}(?: ?[-+*x×] ?{NUMBER})+ ?(?:=|equals) ?-?{NUMBER}"
                     r"(?![0-9]|\.[0-9]| ?[+*x×-] ?[0-9])")


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


def right_equations(texts):
    """1 for each token in a right equation of whole numbers, such as 7 + 5 = 12 or 7 + 5 equals 12; 0 in a wrong one.

    Elsewhere "". Read are + - * x and ×, products first. A token belongs to the equation of its last character."""
    text = "".join(texts)
    labels = [""] * len(text)
    for match in WRITTEN.finditer(text):
        left, right = re.split("=|equals", match[0])
        products = re.findall("[-+]?[^-+]+", left)
        value = sum((-1) ** (part[0] == "-") * math.prod(map(int, re.findall(NUMBER, part))) for part in products)
        labels[match.start():match.end()] = [int(value == int(right))] * len(match[0])
    return [labels[end - 1] if text else "" for text, end in zip(texts, accumulate(map(len, texts)))]


def token_view(model, tokenizer, group, initial, args):
    """What is shown and counted of a group: its numbers; its different answers, correct ones first, each with its text,
    its responses and its rows of tokens.csv, none for a correct one; and all n rows."""
    _, _, _, tokens, mask = group_inputs(group)                                      # (G, T) both
    correct, terms = group.correct, sum_terms(group.problem)
    old, hidden = initial_policy(model, group, args.temperature, args.micro_batch_size)
    advantages = group_advantages(correct.float()[None]).view(-1, 1).repeat(1, mask.shape[1])
    nthr = nthr_advantages(advantages, hidden, tokens, mask, correct, model.get_output_embeddings().weight.detach(),
                           logprobs=old, beta=args.beta, eta=args.eta, vocabulary=args.nthr_vocab,
                           temperature=args.temperature, tau_over=args.tau_over)
    answers, all_rows, finished = {}, [], group.rollout.finished.tolist()
    for j in range(len(correct)):
        ids = tokens[j][mask[j]].tolist()
        written = pieces(tokenizer, ids)
        texts = [text for text, _ in written]
        labels = ([(*steps, path, "") for steps, path in zip(label_tokens(terms, texts), on_path(terms, texts))]
                  if terms else [("", "", "", "", equation) for equation in right_equations(texts)])
        columns = zip(written, labels, ids, *(x[j].tolist() for x in (nthr.scores, old.exp(), nthr.selected.int())))
        rows = [{"question": group.index, "response": j, "position": k, "token_id": token_id, "text": text,
                 "note": note, "s": s, "pi": pi, "selected": selected, **dict(zip(("step", *LABELS, EQUATION), label))}
                for k, ((text, note), label, token_id, s, pi, selected) in enumerate(columns) if not correct[j]]
        same = answers.setdefault((bool(correct[j]), finished[j], *ids),
                                  {"text": "".join(texts), "finished": finished[j], "rows": rows, "responses": []})
        same["responses"].append(j)
        all_rows += rows
    numbers = {"question": group.index, "problem": plain(group.problem), "answer": plain(group.answer),
               "responses": len(correct), "correct": int(correct.sum()), "negative_tokens": len(all_rows),
               "selected": int(nthr.selected.sum()), "tau": nthr.tau.item(), "eta": nthr.eta,
               "gwhes": gwhes(nthr.scores, mask, correct).item(), "largest_s": max(abs(row["s"]) for row in all_rows)}
    if args.order == "delta":
        backward(model, group, old, advantages, args.temperature, args.micro_batch_size)           # GRPO, plain SGD
        numbers["delta"] = updated_likelihoods(model, initial, group, old, [args.lr], "sgd", args.temperature,
                                               args.micro_batch_size)[args.lr]
    return {"group": group, "numbers": numbers, "rows": all_rows, "is_sum": terms is not None,
            "answers": sorted(answers.values(), key=lambda answer: (answer["rows"] != [], -len(answer["responses"])))}


def instructive(views):
    """The group that is shown first: the docstring at the top states the rule. Of two in the middle, the larger share.

    views: the groups, laziest first."""
    found = []
    for group in views:
        shares = [column(answer["rows"], "selected").mean() for answer in group["answers"] if answer["rows"]]
        if 2 <= len(shares) <= 4 and 0 < min(shares) and max(shares) < 1:
            found.append(group)
    found.sort(key=lambda group: group["numbers"]["selected"] / group["numbers"]["negative_tokens"])
    return found[len(found) // 2] if found else views[0]


def share(parts, wholes, tokens=None):
    """[Σ parts / Σ wholes, and the ends of its 95% interval] from (groups,) each; groups where the whole is 0 are left
    out. None if there are too few groups or `tokens` (default: Σ wholes)."""
    parts, wholes = np.array([pair for pair in zip(parts, wholes) if pair[1]], dtype=float).reshape(-1, 2).T
    if len(wholes) < FEWEST_GROUPS or (tokens or wholes.sum()) < FEWEST_TOKENS:
        return None
    drawn = np.random.default_rng(0).integers(len(wholes), size=(RESAMPLES, len(wholes)))
    ratios = parts[drawn].sum(1) / wholes[drawn].sum(1)                        # of each bootstrap sample
    return [float(value) for value in (parts.sum() / wholes.sum(), *np.quantile(ratios, (0.025, 0.975)))]


def hits(rows, name):
    """Selected tokens, those of them with the label, and the expectation for as many random tokens per answer (§5.3):
    n_j selected tokens of response j hit n_j · (share of its tokens with the label)."""
    right, response, selected = (column(rows, key) for key in (name, "response", "selected"))
    random = sum(selected[response == j].sum() * right[response == j].mean() for j in set(response))
    return selected.sum(), selected @ right, random


def outscoring(rows, name):
    """(the probability that a token with the label outscores one without it, ties counted half; 1), ½ being chance;
    (0, 0) if either kind is missing."""
    s, right = column(rows, "s"), column(rows, name) == 1
    return (0.5 + np.sign(s[right, None] - s[~right]).mean() / 2, 1) if 0 < right.sum() < len(right) else (0, 0)


def measures(groups, name):
    """How NTHR's selection and Random meet the label; groups: a list of rows for each."""
    selected, found, random = np.array([hits(rows, name) for rows in groups], dtype=float).T
    tokens = sum(map(len, groups))
    return {"tokens": tokens, "selected": int(selected.sum()), "precision": share(found, selected),
            "random_precision": share(random, selected), "difference": share(found - random, selected),
            "outscoring": share(*zip(*(outscoring(rows, name) for rows in groups)), tokens)}


def words(rows):
    """[(word, selected, all tokens that write it)] of words that wrong answers hold OFTEN times, by selected share."""
    counts = {}
    for row in rows:
        if word := plain(row["text"].strip() or row["note"]):
            selected, tokens = counts.get(word, (0, 0))
            counts[word] = selected + row["selected"], tokens + 1
    often = [(word, *found) for word, found in counts.items() if found[1] >= OFTEN]
    return sorted(often, key=lambda word: (-word[1] / word[2], -word[2], word[0]))


def summarise(views, sampled):
    sums = [group["rows"] for group in views if group["is_sum"]]
    unsure = [[row for row in rows if row["pi"] < UNSURE] for rows in sums]
    no_step = [(row["question"], row["response"]) for rows in sums for row in rows if row["step"] == 0]
    equations = [[row for row in group["rows"] if row[EQUATION] != ""] for group in views]
    selected, tokens = ([group["numbers"][name] for group in views] for name in ("selected", "negative_tokens"))
    return {"shown_first": instructive(views)["numbers"]["question"], "groups": len(views),
            "questions_sampled": sampled, "groups_of_sums": len(sums), "negative_tokens": sum(tokens),
            "selected": sum(selected), "selected_share": share(selected, tokens),
            "tokens_in_no_step": len(no_step), "responses_with_text_in_no_step": len(set(no_step)),
            "labels": {words + where: measures(groups, name) for name, words in LABELS.items() if sums
                       for groups, where in ((sums, ""), (unsure, f", π < {UNSURE}"))}
            | ({"in right equations, of those in equations": measures(equations, EQUATION)} if any(equations) else {}),
            "words": words([row for group in views for row in group["rows"]])}


def percent(found, form=".1f", unit="%"):
    """A share and its interval, as 51.6% [44.9, 57.5]."""
    value, low, high = (f"{100 * part:{form}}".replace("-", "−") for part in found)
    return f"{value}{unit} [{low}, {high}]"


def sentences(summary, beta):
    """The answer to Figure 3's claim in words."""
    groups, no_step = summary["groups"], summary["tokens_in_no_step"]
    others, selected = groups - summary["groups_of_sums"], summary["selected_share"]
    lines = [f"At β = {beta:g} NTHR selects {summary['selected']} of the {summary['negative_tokens']} tokens of wrong "
             f"answers{f', {percent(selected)}' if selected else ''}. They are from {groups} questions with right and "
             f"wrong answers, of {summary['questions_sampled']} sampled.",
             f"Brackets hold 95% intervals from {RESAMPLES} bootstrap samples of the questions, as the tokens of a "
             f"question are not independent. Fewer than {FEWEST_TOKENS} tokens or {FEWEST_GROUPS} questions get no "
             f"share."]
    for words, row in summary["labels"].items():
        found = []
        if row["precision"]:
            found.append(f"{percent(row['precision'])} of {row['selected']} selected ones, "
                         f"{percent(row['random_precision'])} of as many random ones per answer, a difference of "
                         f"{percent(row['difference'], '+.1f', ' points')}")
        if row["outscoring"]:
            found.append(f"they outscore the others of their question with probability {percent(row['outscoring'])}, "
                         f"by chance 50%")
        lines += [f"Tokens {words}: {'; '.join(found)}."] if found else []
    if named := summary["words"]:
        most, least = (", ".join(f"{word} ({selected} of {tokens})" for word, selected, tokens in part)
                       for part in (named[:WORDS], named[WORDS:][-WORDS:]))
        lines.append(f"Of the words that occur {OFTEN} times, most often selected: {most}"
                     f"{f'; least often: {least}' if least else ''}.")
    if others:
        lines.append(f"No sums of whole numbers: {others} of {groups} problems. Which of their steps are right is not "
                     f"known, so no share of right tokens counts them.")
    if no_step:
        lines.append(f"Text that cannot be read as steps: {no_step} tokens, in "
                     f"{summary['responses_with_text_in_no_step']} of the wrong answers; they count as wrong.")
    return lines


STYLE = """:root{color-scheme:light dark;--page:#fff;--text:#111;--mark:#333;--label:#444;--line:#999;--link:#0645ad;
 --p:242 158 66;--n:116 176 244}
@media(prefers-color-scheme:dark){:root{--page:#121212;--text:#eee;--mark:#c8c8c8;--label:#bbb;--line:#777;
 --link:#8ab4f8;--p:120 64 0;--n:16 72 136}}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--page);color:var(--text);
 font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere;print-color-adjust:exact}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:1.5rem 0 .3rem}p{margin:.5rem 0}a{color:var(--link)}
section{border-top:2px solid var(--line);margin-top:1.5rem}ul{list-style:none;padding:0;margin:0}li{margin:.5rem 0}
nav li{display:inline-block;margin-right:.8rem}.label,summary{color:var(--label);font-size:.9rem}
.text{font:15px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}summary{padding:.3rem 0;cursor:pointer}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0 1rem}
th,td{padding:.2rem .5rem;text-align:right;border-bottom:1px solid var(--line)}
u,span{margin-right:1px}
u{text-decoration:underline 2px;text-underline-offset:4px;text-decoration-skip-ink:none;font-weight:700}
i,em{font-style:italic;font-weight:400;color:var(--mark);unicode-bidi:isolate}
sup{font:600 .8em system-ui,sans-serif;margin:0 .35em 0 .1em}
@media(max-width:30rem){th,td{padding:.2rem;font-size:.85rem}}
""" + "".join(f".{sign}{level}{{background:rgb(var(--{sign})/{100 * level // LEVELS}%)}}"
              for sign in COLORS for level in range(LEVELS + 1))
LEGEND = """<p>Each token of an incorrect answer is shaded by its score s (Eq. 7). <span class="p7">Orange</span> means
s &gt; 0: raising the correct answers raises this token, too. <span class="n7">Blue</span> means s &lt; 0. The strength
is the square root of |s| over the group's largest. <u>Bold and underlined</u> tokens are selected (s &gt; τ, Eq. 8):
their penalty is multiplied by η. “Scores” opens a table with s and the probability π. ×2: two answers are equal.</p>
"""
STEP_MARKS = """<p>Two marks follow each step of a sum. The first is <sup>✓</sup> if the step is right as written, given
the steps before it: a box may copy a wrong result. The second is <sup>✓</sup> if it is a step of the true solution.</p>
"""
OTHER_MARKS = """<details><summary>other marks</summary><p><i>␣</i> a space, <em>↵</em> a new line, <i>⇥</i> a tab,
<i>\\x1B</i> a control character or a byte that is no text, <em>◌</em> a part of a character that a later token completes,
<em>&lt;name&gt;</em> a special token</p></details>"""
RULE = """<p>This group stands first by a rule. Of the groups with two to four different wrong answers, each partly
selected, it has the median share of selected tokens. Without any such group, the laziest stands first.</p>"""


def shade(row, largest):
    """Sign and level of this token's color; level 0 is none."""
    level = round(LEVELS * math.sqrt(abs(row["s"]) / largest)) if largest else 0
    return "p" if row["s"] > 0 else "n", level


def facts(numbers):
    delta = f"; Δ(x) = {numbers['delta']:.3e}" if "delta" in numbers else ""
    return (f"p = {numbers['correct']}/{numbers['responses']}; τ = {numbers['tau']:.4g}; η = {numbers['eta']:.4g}; "
            f"GWHES = {numbers['gwhes']:.4g}{delta}")


def symbol(row):
    """What stands for a token that writes nothing."""
    return "◌" if row["note"] == PART else plain(row["note"])


def name_of(answer):
    """As "incorrect ×2: responses 1, 5"."""
    kind, where = "incorrect" if answer["rows"] else "correct", answer["responses"]
    many = f" ×{len(where)}: responses " if where[1:] else " response "
    return kind + many + ", ".join(map(str, where)) + ("" if answer["finished"] else ", cut off")


def answer_html(answer, largest):
    """An answer as a list item: its tokens, and a table of their numbers."""
    shown, lines = "", ""
    for row, following in zip(answer["rows"], [*answer["rows"][1:], {"step": None}]):
        tag, token = "u" if row["selected"] else "span", markup(row["text"]) or f"<em>{escape(symbol(row))}</em>"
        shown += f'<{tag} class="{"".join(map(str, shade(row, largest)))}">{token}</{tag}>'
        if row["step"] not in ("", following["step"]):                         # the last token of its step
            shown += f"<sup>{''.join('✓' if row[name] else '✗' for name in ('right_as_written', 'true_step'))}</sup>"
        lines += (f"<tr><td>{token}</td><td>{row['s']:.3g}</td><td>{row['pi']:.3g}</td>"
                  f"<td>{'yes' if row['selected'] else ''}</td></tr>")
    details = ("<details><summary>scores</summary><table><thead><tr>"
               + "".join(f'<th scope="col">{name}</th>' for name in ("token", "s", "π", "selected"))
               + f"</tr></thead><tbody>{lines}</tbody></table></details>") if lines else ""
    return (f'<li><div class="label">{name_of(answer)}</div><div class="text">{shown or markup(answer["text"])}</div>'
            f"{details}</li>\n")


def section(group):
    numbers, problem, gold = group["numbers"], group["group"].problem, group["group"].answer
    items = "".join(answer_html(answer, numbers["largest_s"]) for answer in group["answers"])
    return (f'<section id="question-{numbers["question"]}"><h2>Question {numbers["question"]}</h2>\n<div class="text">'
            f'{markup(problem)}</div>\n<p>Gold answer <bdi class="text">{markup(gold)}</bdi>; {facts(numbers)}</p>\n'
            f"<ul>\n{items}</ul></section>\n")


def page(views, summary, source, args):
    """The HTML file. All that a model or a data file wrote goes through `markup`, or through `plain` and `escape`."""
    first = instructive(views)
    order = "smallest Δ(x)" if args.order == "delta" else "largest GWHES (Eq. 5), summed over the correct responses"
    links = "".join(f'<li><a href="#question-{number}">{number}</a></li> '
                    for number in (group["numbers"]["question"] for group in views))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Tokens that NTHR selects</title><style>{STYLE}</style></head>
<body><main><h1>Which tokens of wrong answers does NTHR select?</h1>
{LEGEND}{STEP_MARKS if summary["groups_of_sums"] else ""}{OTHER_MARKS}
{RULE}
{section(first)}
<nav><h2>All questions, laziest first: {order}</h2>
<ul>{links}<li><a href="#statistics">statistics</a></li></ul></nav>
{"".join(section(group) for group in views if group is not first)}
<section id="statistics"><h2>Statistics</h2>
{"".join(f"<p>{escape(line, quote=False)}</p>" for line in sentences(summary, args.beta))}
</section></main>
<footer class="label">{escape(plain(", ".join(f"{name}: {value}" for name, value in source.items())))}</footer></body>
</html>
"""


def picture(group):
    """A question, a right and up to four wrong answers as an SVG, shaded and underlined as on the page, cut if long."""
    question = {"text": group["group"].problem, "rows": [], "responses": []}
    wrong = [("wrong", answer) for answer in group["answers"] if answer["rows"]]
    parts, left, end = [], 116, 116                                            # of the tokens, in pixels
    for line, (label, answer) in enumerate([("question", question), ("right", group["answers"][0]), *wrong[:4]]):
        x, y, count = left, 36 + 34 * line, len(answer["responses"])           # y: of the baseline
        label += f" ×{count}" if count > 1 else ""
        parts.append(f'<text x="14" y="{y}" font-family="sans-serif" fill="#57606a">{label}</text>')
        for row in answer["rows"] or [{"text": answer["text"][:PICTURE_WIDTH], "note": "", "s": 0.0, "selected": 0}]:
            shown, (sign, level) = plain(row["text"]) or symbol(row), shade(row, group["numbers"]["largest_s"])
            width = 11 * len(shown)
            if x + width > left + 11 * PICTURE_WIDTH:
                break
            parts.append(f'<rect x="{x}" y="{y - 19}" width="{width}" height="25" fill="rgb{COLORS[sign]}" '
                         f'fill-opacity="{level / LEVELS}"/>')
            if row["selected"]:
                parts.append(f'<rect x="{x + 1}" y="{y + 6}" width="{width - 2}" height="2.5"/>')
            weight = "bold" if row["selected"] else "normal"
            parts.append(f'<text x="{x}" y="{y}" textLength="{width}" font-family="monospace" font-weight="{weight}">'
                         f'{escape(shown).replace(" ", NO_BREAK_SPACE)}</text>')
            x += width
        end, height = max(end, x + 14), y + 20
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{end}" height="{height}" '
            f'viewBox="0 0 {end} {height}" font-size="18">'
            f'<rect width="100%" height="100%" rx="6" fill="white"/>{"".join(parts)}</svg>\n')


def terminal(views):
    """The groups as text, selected tokens in ⟦ ⟧."""
    lines = []
    for group in views:
        numbers = group["numbers"]
        lines += ["", f"question {numbers['question']}: {numbers['problem']}",
                  f"gold answer {numbers['answer']}; {facts(numbers)}"]
        for answer in group["answers"]:
            shown = [(plain(row["text"]) or symbol(row), row["selected"]) for row in answer["rows"]]
            shown = "".join(f"⟦{token}⟧" if chosen else token for token, chosen in shown) or plain(answer["text"])
            lines.append(f"  {name_of(answer)}: {shown}")
    return "\n".join(line.replace("\n", "\n    ") for line in lines)           # no text can pose as a line of ours


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
    out = files.make_folder(args.out)
    groups, sampled, _ = common.mixed_groups(model, tokenizer, problems, prompts, args)
    model = common.to_float64(model)
    initial = [parameter.detach().clone() for parameter in model.parameters()] if args.order == "delta" else None
    views = [token_view(model, tokenizer, group, initial, args)
             for group in tqdm(groups, desc="scoring tokens", unit=" questions")]
    views.sort(key=lambda group: group["numbers"]["delta"] if args.order == "delta" else -group["numbers"]["gwhes"])
    summary = summarise(views, sampled)
    source = common.provenance(args, time.perf_counter() - start)
    (out / "tokens.html").write_text(page(views, summary, source, args), encoding="utf-8")
    files.write_json(out / "tokens.json", {**source, "summary": summary, "groups": [v["numbers"] for v in views]})
    files.write_csv(out / "tokens.csv", [{**row, "text": json.dumps(row["text"]), "note": plain(row["note"])}
                                         for group in views for row in group["rows"]])
    (out / "tokens.svg").write_text(picture(instructive(views)), encoding="utf-8")
    if args.text:
        print(terminal(views), end="\n\n")
    print("\n".join(sentences(summary, args.beta)))
    print(f"\nwritten: tokens.html, tokens.json, tokens.csv and tokens.svg in {out}")


if __name__ == "__main__":
    main()
