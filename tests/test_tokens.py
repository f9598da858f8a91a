"""experiments/tokens.py: its page and its numbers against full logits, Eq. 7 pair by pair, and counts made here."""
import contextlib
import copy
import csv
import html
import io
import json
import math
import re
import statistics
import sys
from argparse import Namespace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from helpers import ROOT, wrong_endings

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "experiments"))

import common  # noqa: E402
import tokens  # noqa: E402
from grpo import random_selection  # noqa: E402
from nthr import nthr_scores_pairwise  # noqa: E402
from rollout import Rollout  # noqa: E402

SAMPLING = ["--seed", "1", "--max-sequences", "64", "--device", "cpu"]
BETAS = (1.0, 0.1, 0.0)
VOID = {"meta"}
HOSTILE = ('<script>alert(1)</script></span></u><u title="s = 9">"onmouseover="alert(2)\' &amp;&lt; \x1b[31mred\x1b[0m '
           "\u202ekcab\u2066 \x00\x7f\x9b \u2028 \t\r\n  correct response 0: x\n\nquestion 1: \u200b<!-- ⟦no⟧")


class Page(HTMLParser):
    """The page as lists: start tags, problems, gold answers, and responses as (words, [(tag, attributes, text)]).

    Text inside <i> is turned back into the character that it stands for, text inside <em> writes nothing."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.problems, self.answers, self.responses, self.sups = [], [], [], [], [], []
        self.links, self.ids, self.words, self.body = [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []                                                 # every element is closed, in order

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("class") == "text":
            if tag == "bdi":
                self.answers.append("")
            elif "li" in self.open:
                self.responses.append((self.words.pop(), []))
            else:
                self.problems.append("")
            self.target = "bdi" if tag == "bdi" else "response" if "li" in self.open else "problem"
        elif attributes.get("class") == "label" and tag == "div":
            self.words.append("")
            self.target = "words"
        elif "title" in attributes and tag in ("u", "span"):
            self.responses[-1][1].append([tag, attributes, ""])
        elif tag == "sup":
            self.sups.append((len(self.responses), attributes.get("title")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("div", "bdi", "section"):
            self.target = None

    target = None

    def handle_data(self, data):
        self.body += data
        inside = self.open[-1] if self.open else ""
        if inside in ("em", "sup", "style"):
            return
        if inside == "i":
            data = {"␣": " ", "⇥": "\t"}.get(data) or unescape(data)
        if self.target == "words":
            self.words[-1] += data
        elif self.target == "problem":
            self.problems[-1] += data
        elif self.target == "bdi":
            self.answers[-1] += data
        elif self.target == "response":
            pieces = self.responses[-1][1]
            if "u" in self.open or "span" in self.open:
                pieces[-1][2] += data
            else:
                pieces.append([None, {}, data])


def unescape(mark):
    r"""\x1B, \u202E, \U000E0001 -> the character."""
    assert re.fullmatch(r"\\x[0-9A-F]{2}|\\u[0-9A-F]{4}|\\U[0-9A-F]{8}", mark), mark
    return chr(int(mark[2:], 16))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def check_picture(path, rows):
    """Each line that is called wrong is how one answer of tokens.csv begins; selected tokens are bold, underlined."""
    svg, lines = ElementTree.parse(path).getroot(), {}
    for text in svg.iter("{http://www.w3.org/2000/svg}text"):
        lines.setdefault(text.get("y"), []).append((text.text, text.get("font-weight")))
    answers = {}
    for row in rows:
        shown = tokens.plain(json.loads(row["text"])) or tokens.symbol(row)
        weight = "bold" if row["selected"] == "1" else "normal"
        answers.setdefault((row["question"], row["response"]), []).append((shown, weight))
    wrong = [line[1:] for line in lines.values() if line[0][0] == "wrong"]
    assert 1 <= len(wrong) <= 4 and [line[0][0] for line in lines.values()].count("right") == 1
    for line in wrong:
        assert any(answer[:len(line)] == line for answer in answers.values()), line
    bold = sum(weight == "bold" for line in wrong for _, weight in line)
    assert [rect.get("height") for rect in svg.iter("{http://www.w3.org/2000/svg}rect")].count("2.5") == bold


def run(out, *flags, stdout=None):
    """What the script prints, and its files: the page's source, the JSON record and the CSV's rows as text."""
    stdout = io.StringIO() if stdout is None else stdout
    with contextlib.redirect_stdout(stdout):
        tokens.main([*map(str, flags), "--out", str(out)])
    with (out / "tokens.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (out / "tokens.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    check_picture(out / "tokens.svg", rows)
    return (stdout.getvalue(), (out / "tokens.html").read_text(encoding="utf-8"),
            json.loads((out / "tokens.json").read_text(encoding="utf-8"), parse_constant=pytest.fail), rows)


@pytest.fixture(scope="module")
def sampled():
    """What `common.mixed_groups` samples, run by run: {question: group}."""
    kept, sample = [], common.mixed_groups

    def keep(*args):
        groups, questions = sample(*args)
        kept.append({group.index: group for group in groups})
        return groups, questions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "mixed_groups", keep)
        yield kept


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()


@pytest.fixture(scope="module")
def sums(tmp_path_factory, sampled):
    """The script on four sums: what it printed and wrote."""
    result = run(tmp_path_factory.mktemp("sums"), *SAMPLING, "--questions", 4, "--nthr-vocab", "all", "--text")
    return *result, sampled[-1]


def forward(model, group):
    """Logits and lm_head inputs (G, T, ·) of the response tokens."""
    rollout = group.rollout
    P, ids = rollout.prompt_ids.shape[1], torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    attention = torch.cat([rollout.prompt_mask, rollout.response_mask], 1).long()
    out = model(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                output_hidden_states=True)
    return out.logits[:, P - 1:-1], out.hidden_states[-1][:, P - 1:-1]


def responses_of(rows):
    """{(question, response): its rows, in order of position}"""
    result = {}
    for row in rows:
        result.setdefault((int(row["question"]), int(row["response"])), []).append(row)
    assert all([int(row["position"]) for row in part] == list(range(len(part))) for part in result.values())
    return result


# ----------------------------------------------------------------------------------------------------------- the page

def test_the_page_is_well_formed_and_needs_neither_script_nor_network(sums):
    source = sums[1]
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert source.startswith("<!DOCTYPE html>") and not names & {"script", "link", "img", "iframe", "base", "object"}
    used = {name for _, attributes in page.tags for name in attributes}
    assert used <= {"lang", "charset", "name", "content", "http-equiv", "class", "id", "href", "title", "scope",
                    "colspan", "rowspan"}                                      # no handler, no src, no style
    assert "//" not in source.replace("s⁻", "") and "url(" not in source and "@import" not in source
    assert "π &lt; 0.95" in source and "π <" not in source
    assert len(set(page.ids)) == len(page.ids) and sorted(page.links) == sorted("#" + name for name in page.ids)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for _, a in page.tags)


def test_tokens_add_up_to_the_sampled_responses_and_correct_ones_come_first(sums):
    _, source, record, rows, groups = sums
    page = Page(source)
    texts = iter(page.responses)
    for i, numbers in enumerate(record["groups"]):
        group = groups[numbers["question"]]
        assert (page.problems[i], page.answers[i]) == (group.problem, group.answer)
        order = [*group.correct.nonzero()[:, 0].tolist(), *(~group.correct).nonzero()[:, 0].tolist()]
        for j in order:
            words, parts = next(texts)
            assert words == f"{'correct' if group.correct[j] else 'incorrect'} response {j}"
            assert "".join(text for _, _, text in parts) == group.rollout.texts[j]
            if not group.correct[j]:
                mine = [row for row in rows if (row["question"], row["response"]) == (str(group.index), str(j))]
                assert [json.loads(row["text"]) for row in mine] == [text for _, _, text in parts]
                assert [int(row["token_id"]) for row in mine] == \
                    group.rollout.response_ids[j][group.rollout.response_mask[j]].tolist()
                assert mine[-1]["note"] == "<eos>" and json.loads(mine[-1]["text"]) == ""
    assert next(texts, None) is None and len(record["groups"]) == len(groups) == 4


def test_underlined_is_selected_is_above_tau_and_titles_and_shades_are_those_of_the_csv(sums):
    _, source, record, rows, _ = sums
    shown = [part for _, parts in Page(source).responses for part in parts if part[0]]
    assert len(shown) == len(rows) == record["summary"]["negative_tokens"]
    tau = {group["question"]: group["tau"] for group in record["groups"]}
    largest = {q: max(abs(float(row["s"])) for row in rows if int(row["question"]) == q) for q in tau}
    assert {row["selected"] for row in rows} == {"0", "1"}
    for (tag, attributes, _), row in zip(shown, rows):
        s, question = float(row["s"]), int(row["question"])
        assert (tag == "u") == (row["selected"] == "1") == (s > tau[question])
        numbers = re.match(r"s = (\S+), π = (\S+?)(,|$)", attributes["title"])
        assert [float(numbers[1]), float(numbers[2])] == pytest.approx([s, float(row["pi"])], rel=1e-3)
        sign, level = attributes["class"][0], int(attributes["class"][1:])
        assert abs(level - 10 * abs(s / largest[question]) ** 0.5) <= 0.5 + 1e-6
        assert level == 0 or (sign == "p") == (s > 0)
    assert {attributes["class"] for _, attributes, _ in shown} & {"p10", "n10"}


def luminance(color):
    channels = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_text_has_contrast_on_every_shade_and_shades_grow_apart(sums):
    """WCAG 2: 7 for text, 4.5 for marks."""
    style = re.search("<style>(.*?)</style>", sums[1], re.S)[1]
    shades = {name: luminance([int(c) for c in color.split(",")])
              for name, color in re.findall(r"\.([pn]\d+)\{background:rgb\(([\d,]+)\)\}", style)}
    assert set(shades) == {f"{sign}{level}" for sign in "pn" for level in range(11)}
    assert "body{" in style and "color:#111" in style and "i,em{" in style and "color:#333" in style
    for light in shades.values():
        assert (light + 0.05) / (luminance([0x11] * 3) + 0.05) >= 7
        assert (light + 0.05) / (luminance([0x33] * 3) + 0.05) >= 4.5
    for sign in "pn":
        steps = [shades[f"{sign}{level}"] for level in range(11)]
        assert steps[0] == 1 and steps == sorted(steps, reverse=True) and steps[-1] < 0.5
    assert "@media(prefers-color-scheme" not in style and "color-scheme:light" in style


# -------------------------------------------------------------------------------------------------------- the numbers

def test_s_pi_tau_eta_and_gwhes_are_those_of_the_definitions(sums, model):
    """π from full logits; one group's s pair by pair in float64, and τ, η, GWHES from these."""
    _, _, record, rows, groups = sums
    order = [group["gwhes"] for group in record["groups"]]
    assert order == sorted(order, reverse=True) and len(set(order)) == len(order)
    parts = responses_of(rows)
    for (question, j), part in parts.items():
        if j == min(k for q, k in parts if q == question):
            with torch.no_grad():
                pi = torch.softmax(forward(model, groups[question])[0].double(), -1)
        for row in part:
            assert float(row["pi"]) == pytest.approx(pi[j, int(row["position"]), int(row["token_id"])].item(), rel=1e-4)
    numbers = record["groups"][-1]
    group = groups[numbers["question"]]
    with torch.no_grad():
        hidden = forward(model, group)[1].double()
    mask, correct = group.rollout.response_mask, group.correct
    s = nthr_scores_pairwise(hidden, group.rollout.response_ids, mask, correct,
                             model.get_output_embeddings().weight.detach().double())
    size = s.abs().max().item()
    for (question, j), part in parts.items():
        if question == group.index:
            assert [float(row["s"]) for row in part] == pytest.approx(s[j][mask[j]].tolist(), rel=1e-3, abs=1e-5 * size)
    tau = min(s[i][mask[i]].mean().item() for i in range(8) if correct[i])
    p = correct.float().mean().item()
    assert (numbers["tau"], numbers["tau_at_beta_1"]) == pytest.approx((tau, tau), rel=1e-3)
    assert numbers["eta"] == pytest.approx(abs(1 - 2 * p)) and (numbers["correct"], numbers["responses"]) == (8 * p, 8)
    total = p * sum(s[i][mask[i]].sum() for i in range(8) if not correct[i])
    total -= (1 - p) * sum(s[i][mask[i]].sum() for i in range(8) if correct[i])
    assert numbers["gwhes"] == pytest.approx(total.item() / math.sqrt(p * (1 - p)), rel=1e-3)
    assert numbers["selected"] == sum(row["selected"] == "1" for row in rows if int(row["question"]) == group.index)


def counted(rows, record, name, beta):
    """(selected, precision, recall, chosen by response) at β from the CSV's columns alone."""
    tau = {group["question"]: group["tau_at_beta_1"] for group in record["groups"]}
    chosen = [row for row in rows if float(row["s"]) > beta * tau[int(row["question"])]]
    right = [row for row in rows if row[name] == "1"]
    both = sum(row[name] == "1" for row in chosen)
    return len(chosen), both / len(chosen), both / len(right), chosen


def test_precision_recall_and_ranking_are_those_counted_from_the_csv(sums):
    printed, source, record, all_rows, _ = sums
    for population, limit in (("definitions", 1.1), ("definitions_unsure", 0.95)):
        rows = [row for row in all_rows if float(row["pi"]) < limit]
        for name in ("right_as_written", "true_step", "on_path"):
            case, values = (population, name), record["summary"][population][name]
            assert values["tokens"] == len(rows), case
            assert values["base_rate"] == pytest.approx(statistics.mean(int(row[name]) for row in rows)), case
            assert set(values["betas"]) == set(map(str, BETAS)), case
            for beta in BETAS:
                mine, selected = values["betas"][str(beta)], counted(rows, record, name, beta)
                assert (mine["selected"], mine["precision"], mine["recall"]) == pytest.approx(selected[:3]), case
                cells = [f"{beta:g}", str(selected[0]), *(f"{100 * mine[key]:.1f}%" for key in
                         ("precision", "random_precision", "recall", "random_recall"))]
                assert "| " + " | ".join(cells) + " |" in printed, case
                assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in source, case
            ranks = []
            for question in {row["question"] for row in rows}:
                mine = [row for row in rows if row["question"] == question]
                pairs = [(float(a["s"]), float(b["s"])) for a in mine for b in mine if (a[name], b[name]) == ("1", "0")]
                ranks += [statistics.mean((a > b) + (a == b) / 2 for a, b in pairs)] if pairs else []
            assert values["outscoring"] == pytest.approx(statistics.mean(ranks)), case


def test_random_is_the_mean_of_many_draws_of_random_selection(sums):
    """§5.3 as grpo.py draws it, 2000 times for each wrong response; 5 standard errors."""
    _, _, record, rows, _ = sums
    draws = 2000
    for name in ("right_as_written", "true_step", "on_path"):
        hits = torch.zeros(draws)
        for part in responses_of(rows).values():
            selected = torch.tensor([[row["selected"] == "1" for row in part]]).expand(draws, -1)
            right = torch.tensor([row[name] == "1" for row in part])
            chosen = random_selection(selected, torch.ones_like(selected), torch.zeros(draws, dtype=torch.bool),
                                      torch.Generator().manual_seed(len(part) + int(part[0]["response"])))
            hits += (chosen & right).sum(1)
        mine = record["summary"]["definitions"][name]["betas"]["1.0"]
        n, right_tokens = mine["selected"], sum(row[name] == "1" for row in rows)
        error = 5 * hits.std().item() / draws ** 0.5
        assert 0 < error < 1
        assert mine["random_precision"] * n == pytest.approx(hits.mean().item(), abs=error)
        assert mine["random_recall"] * right_tokens == pytest.approx(hits.mean().item(), abs=error)


def solution(problem):
    """The right answer to a sum, step by step."""
    total, *terms = [int(term) for term in problem.replace("-", "+-").split("+")]
    lines = []
    for term in terms:
        lines.append("%d%s%d=%d;" % (total, "-" if term < 0 else "+", abs(term), total + term))
        total += term
    return "".join(lines) + "\\boxed{%d}" % total


def test_on_path_by_hand():
    texts = ["17+", "28", "=4", "5;45-9=3", "7", ";", ""]
    assert tokens.on_path([17, 28, -9], texts) == [1, 1, 1, 1, 0, 0, 0]
    assert tokens.on_path([1, 2], ["1+2=3;", r"\boxed{3}", "", "x"]) == [1, 1, 1, 0]
    assert tokens.on_path([1, 2], ["1+2=3;", ""]) == [1, 0]                    # it stops too early


# A response as its steps, each with what is known of it: (step, right as written, step of the true solution)
STEPS = [
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("45-9=36;", 2, 1, 1), (r"\boxed{36}", 3, 1, 1)]),
    ("17+28-9", [("17+28=35;", 1, 0, 0), ("35-9=26;", 2, 1, 0), (r"\boxed{26}", 3, 1, 0)]),
    ("17+28-9", [("17+28=35;", 1, 0, 0), ("45-9=36;", 2, 0, 1), (r"\boxed{35}", 3, 0, 0)]),
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("45-8=37;", 2, 0, 0), (r"\boxed{36}", 3, 0, 1)]),
    ("17+28-9", [("17+28=45;", 1, 1, 1), (r"\boxed{45}", 2, 0, 0)]),                 # the box comes too early
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("45-9=36;", 2, 1, 1), ("36-9=27;", 3, 0, 0), (r"\boxed{27}", 4, 0, 0)]),
    ("17+28-9", [("17+28;", 0, 0, 0), ("45-9=36;", 2, 0, 1), (r"\boxed{36}", 3, 1, 1)]),
    ("17+28-9", [("x;", 0, 0, 0), ("17-9=8;", 2, 0, 0), (r"\boxed{8}", 3, 1, 0)]),
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("45-9=3", 0, 0, 0)]),                      # cut off
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("", 0, 0, 0)]),                            # stops without a box
    ("17+28-9", [("17+28=45;", 1, 1, 1), ("45-9=36;", 2, 1, 1), (r"\boxed{36}36", 0, 0, 0)]),
    ("17+28-9", [(r"so 17+28=45;", 0, 0, 0), ("45-9=36;\n"[:8], 2, 0, 1), ("\n\\boxed{36}", 0, 0, 0)]),
    ("3-5-4", [("3-5=-2;", 1, 1, 1), ("-2-4=-6;", 2, 1, 1), (r"\boxed{-6}", 3, 1, 1)]),
    ("17+28-9", [("28+17=45;", 1, 0, 0), ("45-9=36;", 2, 1, 1), (r"\boxed{36}", 3, 1, 1)]),
    ("1+1", [("", 0, 0, 0)]),
]


def test_labels_of_responses_read_by_hand():
    """One character per token and an EOS, then tokens of three characters that straddle the steps, then empty ones."""
    for problem, steps in STEPS:
        terms = {"17+28-9": [17, 28, -9], "3-5-4": [3, -5, -4], "1+1": [1, 1]}[problem]
        assert tokens.sum_terms(problem) == terms
        response = "".join(text for text, *_ in steps)
        expected = [tuple(label) for text, *label in steps for _ in text]
        boxed = steps[-1][0].startswith("\\boxed") and steps[-1][1]
        after = tuple(steps[-1][1:]) if boxed else (0, 0, 0)
        assert tokens.label_tokens(terms, [*response, ""]) == [*expected, after], response
        triples = [response[i:i + 3] for i in range(0, len(response), 3)]
        last = [min(i + 2, len(response) - 1) for i in range(0, len(response), 3)]
        assert tokens.label_tokens(terms, [*triples, ""]) == [*(expected[i] for i in last), after], response
        parts = [part for char in response for part in ("", char)]             # as if each character took two tokens
        assert tokens.label_tokens(terms, parts) == [label for label in expected for _ in range(2)], response


def test_other_problems_are_no_sums():
    problems = ("17", "-1+2", "1+2=", "1+x", "1 + 2", "1+2\n", "1++2", "1*2", "1+2?", "", "1+²")
    assert [problem for problem in problems if tokens.sum_terms(problem) is not None] == []


def test_labels_in_the_csv_are_those_of_the_arithmetic(sums):
    """Each step is read again here, by splitting instead of regular expressions."""
    _, source, record, rows, _ = sums
    problems = {group["question"]: group["problem"] for group in record["groups"]}
    seen = set()
    for (question, _), part in responses_of(rows).items():
        so_far, solved = "", solution(problems[question])
        for row in part:
            so_far += json.loads(row["text"])
            begun = so_far == solved if row["note"] == "<eos>" else solved[:len(so_far)] == so_far
            assert row["on_path"] == str(int(begun))
        terms = [int(term) for term in problems[question].replace("-", "+-").split("+")]
        by_step = {}
        for row in part:
            by_step.setdefault(int(row["step"]), []).append(row)
        written = total = terms[0]
        for k in sorted(by_step):
            text = "".join(json.loads(row["text"]) for row in by_step[k])
            labels = {(int(row["right_as_written"]), int(row["true_step"])) for row in by_step[k]}
            assert k > 0 and len(labels) == 1                                  # all of these responses can be read
            if k == len(terms):
                value = int(text.removeprefix("\\boxed{").removesuffix("}"))
                assert labels == {(int(value == written), int(value == total))} and by_step[k][-1]["note"] == "<eos>"
            else:
                claim, result = text.removesuffix(";").split("=")
                term = terms[k]
                true = claim == f"{total}{term:+d}" and int(result) == total + term
                right = claim == f"{written}{term:+d}" and int(result) == written + term
                assert labels == {(int(right), int(true))}
                written, total = int(result), total + term
            seen |= labels
    assert seen == {(1, 1), (1, 0), (0, 0)} or seen == {(1, 1), (1, 0), (0, 1), (0, 0)}
    page = Page(source)
    shown = [title for _, title in page.sups if title]
    ends = [row for row, following in zip(rows, [*rows[1:], {"step": None, "response": None}])
            if (row["step"], row["response"]) != (following["step"], following["response"])]
    assert shown == [f"right as written: {'yes' if row['right_as_written'] == '1' else 'no'}; of the true solution: "
                     f"{'yes' if row['true_step'] == '1' else 'no'}" for row in ends]


# ------------------------------------------------------------------------------------------------- tokens of all kinds

def byte_tokenizer(*merges, special=("<eos>", "<odd>&\"\x1b")):
    """Byte-level BPE, each byte a token but for these merges of two byte strings; token 300 has no name."""
    alphabet = {}
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [*range(0x80), *range(0x80, 0x800), 0x1000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000,
                 *range(0x800, 0xD800, 0x40), *range(0xE000, 0x10000, 0x40)]:
        shown = encode.pre_tokenize_str(chr(code))[0][0]
        alphabet |= dict(zip(chr(code).encode(), shown))
    names = [alphabet.get(b, chr(b)) for b in range(256)]                      # 13 bytes occur in no UTF-8
    merged = [("".join(names[b] for b in left), "".join(names[b] for b in right)) for left, right in merges]
    vocabulary = {name: b for b, name in enumerate(names)} | {a + b: 256 + i for i, (a, b) in enumerate(merged)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merged))
    inner.pre_tokenizer, inner.decoder = encode, decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    inner.add_tokens([AddedToken("<tool é>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", clean_up_tokenization_spaces=False)


TEXTS = ["plain", "é", "x€y", "日本語 テスト", "👩‍🚀 done 👍🏽", "a\n\n b\t\tc  ", "\x1b[0m\u202e", "￼�", "मन्त्र ไทย עברית"]


def test_bytes_of_a_character_show_it_once_in_the_token_that_completes_it():
    for merges in ([], [(b"\xe2", b"\x82"), (b"x", b"\xe2"), (b"\xf0", b"\x9f"), (b" ", b" ")]):
        tokenizer = byte_tokenizer(*merges)
        for text in TEXTS:
            ids, case = tokenizer(text, add_special_tokens=False).input_ids, (text, merges)
            assert tokenizer.decode(ids) == text, case
            written = [bytes([i]) if i < 256 else b"".join(merges[i - 256]) for i in ids]
            assert b"".join(written).decode() == text, case
            before = ""
            for k, found in enumerate(tokens.pieces(tokenizer, ids)):
                complete = b"".join(written[:k + 1]).decode(errors="ignore")   # the characters that are complete by now
                assert found == (complete[len(before):], "" if complete != before else "part of a character"), case
                before = complete
            assert before == text, case


def test_special_added_nameless_and_invalid_tokens():
    tokenizer = byte_tokenizer((b"\xe2", b"\x82"))
    eos, odd, tool = (tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<odd>&\"\x1b", "<tool é>"))
    ids = [0xE2, 0x61, odd, 256, 0xAC, tool, 0xFF, 0xC3, eos, 0xA9, 5000, 0xF0, 0x9F]
    assert tokens.pieces(tokenizer, ids) == [
        ("\udce2", ""), ("a", ""), ("", "<odd>&\"\x1b"), ("", "part of a character"), ("€", ""), ("<tool é>", ""),
        ("\udcff", ""), ("", "part of a character"), ("", "<eos>"), ("é", ""), ("", "token 5000"),
        ("\udcf0", ""), ("\udc9f", "")]
    assert tokens.plain("\udce2\udcff") == r"\xE2\xFF" and tokens.markup("\udce2") == r"<i>\xE2</i>"


def test_sentencepiece_spaces_and_byte_fallback():
    names = ["<eos>", "▁", "▁a", "b", *(f"<0x{b:02X}>" for b in range(256))]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    ids = [names.index(name) for name in ("▁a", "▁", "b", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "<eos>")]
    assert [text for text, _ in tokens.pieces(tokenizer, ids)] == [" a", " ", "b", "", "", "€", "\n", ""]
    assert "".join(text for text, _ in tokens.pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_cannot_be_seen_is_shown():
    for text, shown in (
            ("a b", "a b"), (" ", "␣"), ("  ", "␣␣"), (" \n", "␣↵\n"), ("x\n", "x↵\n"), ("\t", "⇥"), ("\r", r"\x0D"),
            ("\x1b[1m", r"\x1B[1m"), ("\x9b", r"\u009B"), ("\x00\x7f", r"\x00\x7F"),
            ("\u202e\u2066\u200f", r"\u202E\u2066\u200F"),
            ("\u200b\ufeff\u2028\u00a0", r"\u200B\uFEFF\u2028\u00A0"), ("\U000e0041", r"\U000E0041"),
            ("é日👍", "é日👍")):
        assert tokens.plain(text) == shown, repr(text)
        assert html.unescape(re.sub("</?(i|em)>", "", tokens.markup(text))) == shown, repr(text)


# ------------------------------------------------------------------------------------------------------ hostile texts

@pytest.fixture(scope="module")
def hostile():
    """A group whose problem, answer and responses are HOSTILE, scored with a random model of byte-level tokens."""
    tokenizer = byte_tokenizer((b"<", b"/"), (b" ", b"\t"))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
                                         tie_word_embeddings=False)).eval()
    texts = ["right", HOSTILE, HOSTILE[::-1], "right 👍" + HOSTILE, "\n  wrong 🙂 \n"]
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    ids[2].insert(3, tokenizer.convert_tokens_to_ids("<odd>&\"\x1b"))
    T = max(map(len, ids))
    mask = torch.tensor([[k < len(row) for k in range(T)] for row in ids])
    response_ids = torch.tensor([row + [tokenizer.eos_token_id] * (T - len(row)) for row in ids])
    ones = torch.ones(5, 3, dtype=torch.bool)
    rollout = Rollout(torch.arange(15).view(5, 3), ones, response_ids, mask, torch.zeros(5, T),
                      torch.tensor([True, True, True, False, True]), texts)
    group = common.Group(7, HOSTILE, HOSTILE + "7", rollout, torch.tensor([True, False, False, True, False]))
    args = Namespace(beta=0.0, eta="p", nthr_vocab="responses", temperature=1.0, order="gwhes", micro_batch_size=2)
    return texts, tokens.token_view(model, tokenizer, group, None, [0.0, 1.0], args), args


def test_hostile_texts_stay_text_on_the_page(hostile):
    texts, view, args = hostile
    source = tokens.page([view], tokens.summarise([view], 1, [0.0, 1.0]), {"command": HOSTILE}, args)
    page = Page(source)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe")] and "<!--" not in source
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.problems == [HOSTILE] and page.answers == [HOSTILE + "7"]
    order = [0, 3, 1, 2, 4]
    assert ["".join(text for _, _, text in parts) for _, parts in page.responses] == [texts[j] for j in order]
    assert [words for words, _ in page.responses] == [
        "correct response 0", "correct response 3, cut off", "incorrect response 1", "incorrect response 2",
        "incorrect response 4"]
    shown = [part for _, parts in page.responses for part in parts if part[0]]
    assert [part[0] == "u" for part in shown] == [bool(row["selected"]) for row in view["rows"]]
    assert {part[0] for part in shown} == {"u", "span"}
    for (_, attributes, _), row in zip(shown, view["rows"]):
        note = f", {row['note']}".replace("\x1b", "\\x1B") if row["note"] else ""
        assert attributes["title"] == f"s = {row['s']:.4g}, π = {row['pi']:.4g}{note}" and len(attributes) == 2
    assert {row["note"] for row in view["rows"]} == {"", "part of a character", "<eos>", "<odd>&\"\x1b"}
    raw = [char for char in source + page.body if not (char.isprintable() or char == "\n")]
    assert raw == [] and "\ufffd" not in page.body


def test_hostile_texts_stay_text_in_the_terminal(hostile):
    _, view, _ = hostile
    for color in (False, True):
        printed = tokens.terminal([view], color)
        codes = re.findall(r"\x1b\[(?:30;48;2;\d+;\d+;\d+(?:;4)?|0)m", printed)
        assert bool(codes) == color and len(codes) == 2 * color * len(view["rows"])
        left = re.sub(r"\x1b\[(?:30;48;2;\d+;\d+;\d+(?:;4)?|0)m", "", printed)
        assert not [char for char in left if not (char.isprintable() or char == "\n")]
        starts = [line for line in left.split("\n") if line and not line.startswith("    ")]
        assert [start.split(":")[0].split(" <")[0] for start in starts] == [
            "question 7", "gold answer", "  correct response 0", "  correct response 3, cut off",
            "  incorrect response 1", "  incorrect response 2", "  incorrect response 4"]
        assert sum(";4m" in code for code in codes) == color * view["numbers"]["selected"]


def test_the_terminal_brackets_the_selected_tokens(sums):
    printed, _, record, rows, _ = sums
    assert "\x1b" not in printed
    for (question, j), part in responses_of(rows).items():
        expected = "".join(f"⟦{text}⟧" if row["selected"] == "1" else text for row, text in
                           ((row, json.loads(row["text"]) or row["note"]) for row in part))
        section = printed.split(f"question {question}: ")[1].split("\nquestion ")[0]
        assert f"  incorrect response {j}: {expected}\n" in section
    for group in record["groups"]:
        assert f"question {group['question']}: {group['problem']}\n" in printed


# --------------------------------------------------------------------------------------- other data, Δ(x), and errors

@pytest.fixture(scope="module")
def other(tmp_path_factory, sampled):
    """Some problems that are sums and some that are not, with a checker of their own, by Δ(x), on a terminal."""
    folder = tmp_path_factory.mktemp("other")
    problems = [f"{n}*{n + 3}+2" for n in range(11, 23)] + ["27+38+15", "19+19-8", "36-17+25"]
    (folder / "data.jsonl").write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in problems))
    (folder / "check.py").write_text("import zlib\n\n\ndef even(response, answer):\n"
                                     "    return zlib.crc32(response.encode()) % 2 == 0\n")
    flags = ["--data", str(folder / "data.jsonl"), "--reward", f"{folder / 'check.py'}:even", "--questions", "15",
             "--order", "delta", "--lr", "0.01", "--max-new-tokens", "40", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        return flags, *run(folder / "out", *flags, "--text", stdout=Terminal()), sampled[-1]


def test_other_problems_have_no_labels_and_a_line_says_so(other):
    _, printed, source, record, rows, _ = other
    summary = record["summary"]
    known = {group["question"] for group in record["groups"] if "*" not in group["problem"]}
    others = len(record["groups"]) - len(known)
    assert (summary["groups"], summary["groups_of_sums"]) == (len(record["groups"]), len(known)) and known and others
    line = f"No sums of whole numbers: {others} of {len(record['groups'])} problems."
    assert line in printed and line in source
    for row in rows:
        assert all((row[name] != "") == (int(row["question"]) in known)
                   for name in ("step", "right_as_written", "true_step", "on_path"))
    mine = [row for row in rows if int(row["question"]) in known]
    values = summary["definitions"]["right_as_written"]
    assert values["base_rate"] == pytest.approx(statistics.mean(int(row["right_as_written"]) for row in mine))
    assert values["betas"]["0.0"]["selected"] == counted(mine, record, "right_as_written", 0.0)[0]
    no_step = [row for row in mine if row["step"] == "0"]
    assert summary["tokens_in_no_step"] == len(no_step)


def test_the_order_is_that_of_one_sgd_update_written_out(other, model):
    """Eq. 1 at θ_old as Σ Â ln π / Σ|y|, a step along its gradient, and Eq. 2, all from full logits in float64."""
    _, printed, _, record, _, groups = other
    deltas = [group["delta"] for group in record["groups"]]
    assert deltas == sorted(deltas) and len(set(deltas)) == len(deltas) > 3
    for numbers in (record["groups"][0], record["groups"][-1]):
        group, moved = groups[numbers["question"]], copy.deepcopy(model).double()
        mask, correct = group.rollout.response_mask, group.correct
        p = correct.double().mean()
        advantages = (correct.double() - p) / torch.sqrt(p * (1 - p))

        def likelihoods():
            logprobs = torch.log_softmax(forward(moved, group)[0], -1)
            return (logprobs.gather(-1, group.rollout.response_ids[..., None])[..., 0] * mask).sum(1)

        before = likelihoods()
        ((advantages * before).sum() / mask.sum()).backward()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 0.01 * parameter.grad
            delta = (likelihoods() - before)[correct].mean().item()
        assert numbers["delta"] == pytest.approx(delta, rel=1e-3, abs=1e-4)
        assert f"Δ(x) = {numbers['delta']:.3e}" in printed


@pytest.mark.full
def test_colors_only_on_a_terminal_and_without_no_color(other, tmp_path, monkeypatch):
    flags, printed, *_ = other
    assert "\x1b[" in printed
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(tmp_path, *flags, "--text", stdout=Terminal())[0]
    written = "\nwritten: "
    assert plain.split(written)[0] == re.sub(r"\x1b\[[\d;]*m", "", printed).split(written)[0]


def test_without_any_sum_the_page_has_no_table(other, tmp_path):
    flags, *_ = other
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n}*{n + 3}+2", "answer": "1"}) + "\n" for n in range(11, 23)))
    printed, source, record, rows = run(tmp_path / "out", "--data", data, *flags[2:4], "--questions", 1)
    assert record["summary"]["definitions"] == {} and "<table" not in source and "| β" not in printed
    assert "No sums of whole numbers: 1 of 1 problems." in printed and {row["step"] for row in rows} == {""}
    assert not [title for _, title in Page(source).sups if title]


def test_bad_flags_end_with_one_line(tmp_path):
    flags = (("--beta", "nan"), ("--beta=-inf",), ("--eta", "2"), ("--lr", "0"), ("--micro-batch-size", "0"),
             ("--questions", "0"))
    assert not wrong_endings(lambda flags: tokens.main([*flags, "--out", str(tmp_path / "out")]),
                             [(case, case[0].split("=")[0]) for case in flags])
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        tokens.main(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "--order" in printed and "Figure 3" in printed
