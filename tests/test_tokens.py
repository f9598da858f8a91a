"""experiments/tokens.py: its page and its numbers against full logits, Eq. 7 pair by pair, and counts made here."""
import contextlib
import copy
import csv
import html
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
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
LABELS = {"right_as_written": "in steps right as written", "true_step": "in steps of the true solution",
          "on_path": "on the path of the true solution"}
VOID = {"meta"}
HOSTILE = ('<script>alert(1)</script></span></u><u title="s = 9">"onmouseover="alert(2)\' &amp;&lt; \x1b[31mred\x1b[0m '
           "\u202ekcab\u2066 \x00\x7f\x9b \u2028 \t\r\n  correct response 0: x\n\nquestion 1: \u200b<!-- ⟦no⟧")


class Page(HTMLParser):
    """The page as lists: start tags, problems, gold answers, responses as (words, [(tag, attributes, text)]), and the
    table of each response as rows of cells.

    Text inside <i> is turned back into the character that it stands for, text inside <em> writes nothing."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.problems, self.answers, self.responses, self.sups = [], [], [], [], [], []
        self.links, self.ids, self.words, self.scores, self.body = [], [], [], [], ""
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
                self.scores.append([])
            else:
                self.problems.append("")
            self.target = "bdi" if tag == "bdi" else "response" if "li" in self.open else "problem"
        elif attributes.get("class") == "label" and tag == "div":
            self.words.append("")
            self.target = "words"
        elif tag in ("u", "span") and self.target == "response":
            self.responses[-1][1].append([tag, attributes, ""])
        elif tag == "sup" and self.target == "response":
            self.sups.append("")
        elif tag == "tr":
            self.scores[-1].append([])
        elif tag in ("td", "th"):
            self.scores[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("div", "bdi", "section"):
            self.target = None

    target = None

    def handle_data(self, data):
        self.body += data
        inside = self.open[-1] if self.open else ""
        if "td" in self.open or inside == "th":
            self.scores[-1][-1][-1] += data
        if inside == "sup" and self.target == "response":
            self.sups[-1] += data
        if inside in ("em", "sup", "style") or "td" in self.open:
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


def check_picture(path, rows):
    """Each line that is called wrong is how one answer of tokens.csv begins; selected tokens are bold, underlined."""
    svg, lines = ElementTree.parse(path).getroot(), {}
    for text in svg.iter("{http://www.w3.org/2000/svg}text"):
        assert " " not in text.text or not text.get("textLength")              # a browser would drop it at an end
        lines.setdefault(text.get("y"), []).append((text.text.replace("\u00a0", " "), text.get("font-weight")))
    answers = {}
    for row in rows:
        shown = tokens.plain(json.loads(row["text"])) or tokens.symbol(row)
        weight = "bold" if row["selected"] == "1" else "normal"
        answers.setdefault((row["question"], row["response"]), []).append((shown, weight))
    wrong = [line[1:] for line in lines.values() if line[0][0].startswith("wrong")]
    assert 1 <= len(wrong) <= 4
    assert [line[0][0].split(" ×")[0] for line in lines.values()] == ["question", "right", *["wrong"] * len(wrong)]
    for line in wrong:
        assert any(answer[:len(line)] == line for answer in answers.values()), line
    bold = sum(weight == "bold" for line in wrong for _, weight in line)
    assert [rect.get("height") for rect in svg.iter("{http://www.w3.org/2000/svg}rect")].count("2.5") == bold


def run(out, *flags):
    """What the script prints, and its files: the page's source, the JSON record and the CSV's rows as text."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        tokens.main([*map(str, flags), "--out", str(out)])
    with (out / "tokens.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    check_picture(out / "tokens.svg", rows)
    return (stdout.getvalue(), (out / "tokens.html").read_text(encoding="utf-8"),
            json.loads((out / "tokens.json").read_text(encoding="utf-8"), parse_constant=pytest.fail), rows)


@pytest.fixture(scope="module")
def sampled():
    """What `common.mixed_groups` samples, run by run: {question: group}."""
    kept, sample = [], common.mixed_groups

    def keep(*args):
        found = sample(*args)
        kept.append({group.index: group for group in found[0]})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "mixed_groups", keep)
        yield kept


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()


@pytest.fixture(scope="module")
def sums(tmp_path_factory, sampled):
    """The script on four sums, with shares of so few: what it printed and wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "FEWEST_TOKENS", 1)
        patch.setattr(tokens, "FEWEST_GROUPS", 1)
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


def answers_of(group):
    """[(correct, responses)] of the different answers, right ones and often given ones first, else as sampled."""
    ids = [row[mask].tolist() for row, mask in zip(group.rollout.response_ids, group.rollout.response_mask)]
    found = [(bool(group.correct[j]), [k for k in range(len(ids)) if ids[k] == ids[j]])
             for j in range(len(ids)) if ids[j] not in ids[:j]]
    return sorted(found, key=lambda answer: (-answer[0], -len(answer[1]), answer[1]))


def page_order(record):
    """The groups as the page shows them: one of them first, then the rest."""
    return sorted(record["groups"], key=lambda numbers: numbers["question"] != record["summary"]["shown_first"])


def shown_rows(sums):
    """The rows of tokens.csv that the page shows, in its order: each different answer's once."""
    _, _, record, rows, groups = sums
    parts = responses_of(rows)
    return [row for numbers in page_order(record) for correct, where in answers_of(groups[numbers["question"]])
            if not correct for row in parts[numbers["question"], where[0]]]


# ----------------------------------------------------------------------------------------------------------- the page

def test_the_page_is_well_formed_and_needs_neither_script_nor_network(sums):
    source = sums[1]
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert "step of a sum" in source
    assert source.startswith("<!DOCTYPE html>") and not names & {"script", "link", "img", "iframe", "base", "object"}
    used = {name for _, attributes in page.tags for name in attributes}
    assert used <= {"lang", "charset", "name", "content", "http-equiv", "class", "id", "href", "scope"}
    assert "//" not in source and "url(" not in source and "@import" not in source
    assert "π &lt; 0.95" in source and "π <" not in source
    assert len(set(page.ids)) == len(page.ids) and sorted(page.links) == sorted("#" + name for name in page.ids)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for _, a in page.tags)
    places = [source.index(part) for part in ("Bold and underlined", "stands first by a rule", "<section ", "<nav>",
                                              '<section id="statistics">', "<footer")]
    assert places == sorted(places)                                            # legend, one group, ..., statistics


def test_each_different_answer_is_there_once_with_its_count_right_ones_first(sums):
    _, source, record, rows, groups = sums
    page = Page(source)
    texts, counts, parts = iter(page.responses), [], responses_of(rows)
    assert sorted(numbers["question"] for numbers in record["groups"]) == sorted(groups) and len(groups) == 4
    for i, numbers in enumerate(page_order(record)):
        group = groups[numbers["question"]]
        assert (page.problems[i], page.answers[i]) == (group.problem, group.answer)
        for correct, where in answers_of(group):
            words, shown = next(texts)
            many = f" ×{len(where)}: responses " if len(where) > 1 else " response "
            assert words == ("correct" if correct else "incorrect") + many + ", ".join(map(str, where))
            assert "".join(text for _, _, text in shown) == group.rollout.texts[where[0]]
            counts.append((correct, len(where)))
            for j in where if not correct else ():
                mine = parts[group.index, j]
                assert [json.loads(row["text"]) for row in mine] == [text for _, _, text in shown]
                assert [int(row["token_id"]) for row in mine] == \
                    group.rollout.response_ids[j][group.rollout.response_mask[j]].tolist()
                assert mine[-1]["note"] == "<eos>" and json.loads(mine[-1]["text"]) == ""
    assert next(texts, None) is None and {correct for correct, count in counts if count > 1} == {True, False}


def test_underlined_is_selected_is_above_tau_and_shades_and_tables_are_those_of_the_csv(sums):
    _, source, record, all_rows, _ = sums
    page, rows = Page(source), shown_rows(sums)
    shown = [part for _, parts in page.responses for part in parts if part[0]]
    tables = [table for table in page.scores if table]
    cells = [cells for table in tables for cells in table[1:]]
    assert len(shown) == len(cells) == len(rows) and len(all_rows) == record["summary"]["negative_tokens"]
    assert [table[0] for table in tables] == [["token", "s", "π", "selected"]] * len(tables)
    assert len(tables) == sum(words.startswith("incorrect") for words, _ in page.responses)
    tau = {group["question"]: group["tau"] for group in record["groups"]}
    largest = {q: max(abs(float(row["s"])) for row in rows if int(row["question"]) == q) for q in tau}
    assert {row["selected"] for row in rows} == {"0", "1"}
    for (tag, attributes, _), (token, *numbers, chosen), row in zip(shown, cells, rows):
        s, question = float(row["s"]), int(row["question"])
        assert (tag == "u") == (row["selected"] == "1") == (s > tau[question]) == (chosen == "yes")
        assert token == (json.loads(row["text"]) or row["note"])
        assert [float(number) for number in numbers] == pytest.approx([s, float(row["pi"])], rel=6e-3)
        sign, level = attributes["class"][0], int(attributes["class"][1:])
        assert abs(level - 10 * abs(s / largest[question]) ** 0.5) <= 0.5 + 1e-6
        assert level == 0 or (sign == "p") == (s > 0)
    assert {attributes["class"] for _, attributes, _ in shown} & {"p10", "n10"}


def hand_made(question, *wrong, right=1):
    """A view whose wrong answers are strings: 1 a selected token, 0 another."""
    answers = [{"rows": [{"selected": int(char)} for char in answer]} for answer in wrong]
    return {"answers": [{"rows": []}] * right + answers,
            "numbers": {"question": question, "selected": "".join(wrong).count("1"),
                        "negative_tokens": len("".join(wrong))}}


def test_the_first_group_is_the_median_of_those_with_a_few_partly_selected_answers(sums):
    views = [hand_made(1, "01"), hand_made(2, "0111", "0111"), hand_made(3, "10", "0", "1"), hand_made(4, "111", "001"),
             hand_made(5, "0001", "0010", right=3), hand_made(6, "01", "10", "0011", "1100"),
             hand_made(7, "01", "10", "01", "10", "01"), hand_made(8, "000", "001")]
    for questions, expected in (((1, 2, 3, 4, 5, 6, 7, 8), 6), ((8, 7, 6, 5, 4, 3, 2, 1), 6), ((5, 6), 6), ((2, 5), 2),
                                ((5,), 5), ((3, 1, 7), 3), ((1, 4, 8), 1)):
        assert tokens.instructive([views[q - 1] for q in questions])["numbers"]["question"] == expected, questions
    _, source, record, rows, groups = sums
    shares, parts = {}, responses_of(rows)
    for question, group in groups.items():
        wrong = [parts[question, where[0]] for correct, where in answers_of(group) if not correct]
        mine = [row["selected"] == "1" for row in rows if int(row["question"]) == question]
        if 2 <= len(wrong) <= 4 and all({row["selected"] for row in answer} == {"0", "1"} for answer in wrong):
            shares[sum(mine) / len(mine)] = question
    first = shares[statistics.median_high(shares)] if shares else record["groups"][0]["question"]
    assert record["summary"]["shown_first"] == first == int(Page(source).ids[0].removeprefix("question-"))


def luminance(color):
    channels = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_text_has_contrast_on_every_shade_and_shades_grow_apart_in_both_schemes(sums):
    """WCAG 2: 7 for text, 4.5 for marks."""
    style = re.search("<style>(.*?)</style>", sums[1], re.S)[1]
    light, dark = re.findall(r":root\{(.*?)\}", style, re.S)
    strengths = dict(re.findall(r"\.([pn]\d+)\{background:rgb\(var\(--[pn]\)/(\d+)%\)\}", style))
    assert strengths == {f"{sign}{level}": str(10 * level) for sign in "pn" for level in range(11)}
    assert "@media(prefers-color-scheme:dark){:root{" + dark in style and "color-scheme:light dark" in light
    for use in ("background:var(--page)", "color:var(--text)", "color:var(--mark)"):
        assert use in style
    for scheme in (light, dark):
        colors = {name: [int(c * (3 - len(c)), 16) for c in re.findall("." * (len(value) // 3), value)]
                  for name, value in re.findall(r"--(\w+):#(\w+)", scheme)}   # #fff is #ffffff
        for sign, color in re.findall(r"--([pn]):([\d ]+)", scheme):
            shades = [luminance([c * level / 10 + page * (1 - level / 10)
                                 for c, page in zip(map(int, color.split()), colors["page"])]) for level in range(11)]
            for shade in shades:
                for name, least in (("text", 7), ("mark", 4.5)):
                    low, high = sorted((shade, luminance(colors[name])))
                    assert (high + 0.05) / (low + 0.05) >= least, (scheme, sign, shade, name)
            assert shades == sorted(shades, reverse=scheme is light)
            assert max(shades) + 0.05 > 1.9 * (min(shades) + 0.05), (scheme, sign)


MEASURE = """<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre><script>
const measured = [];
for (const [width, height] of [[1200, 900], [390, 844]]) {
    const frame = document.createElement("iframe");
    frame.width = width; frame.height = height; frame.style.border = 0; frame.srcdoc = PAGE;
    frame.onload = () => {
        const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
        const style = element => frame.contentWindow.getComputedStyle(element);
        const first = page.querySelector("section"), stops = all("a, summary"), chosen = all("u");
        all("details").forEach(table => table.open = true);
        const sideways = page.documentElement.scrollWidth - page.documentElement.clientWidth;
        all("details").forEach(table => table.open = false);
        stops.forEach(stop => stop.focus() || (stop.reached = page.activeElement === stop && stop.tabIndex === 0));
        measured.push({width, sideways, first: first.getBoundingClientRect().height,
            end: first.getBoundingClientRect().bottom + frame.contentWindow.scrollY,
            levels: all("h1, h2, h3").map(heading => +heading.tagName[1]),
            chosen: chosen.length, others: all(".text span").length,
            bold: chosen.filter(u => style(u).fontWeight === "700"
                                && style(u).textDecorationLine === "underline").length,
            plain: all(".text span").filter(span => style(span).fontWeight === "400").length,
            stops: stops.length, reached: stops.filter(stop => stop.reached).length,
            dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
            background: style(page.body).backgroundColor, color: style(page.body).color});
        if (measured.length === 2) document.getElementById("found").textContent = JSON.stringify(measured);
    };
    document.body.append(frame);
}
</script>"""


@pytest.mark.full
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_a_group_on_a_screen_never_sideways_and_reaches_all_by_keyboard(sums, tmp_path, dark):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium")
    measure = tmp_path / "measure.html"
    source = json.dumps(sums[1]).replace("</", "<\\/")
    measure.write_text(MEASURE.replace("PAGE", source, 1), encoding="utf-8")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=20000", "--dump-dom", measure.as_uri()], capture_output=True, text=True, timeout=180)
    shown = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', result.stdout, re.S)[1]))
    wide, phone = sorted(shown, key=lambda page: -page["width"])
    for page in (wide, phone):
        assert page["sideways"] == 0 and page["levels"][:3] == [1, 2, 2] and set(page["levels"][3:]) == {2}
        assert page["bold"] == page["chosen"] > 5 and page["plain"] == page["others"] > 50     # not by colour alone
        assert page["reached"] == page["stops"] > 10
        assert page["dark"] is dark and page["background"] == ("rgb(18, 18, 18)" if dark else "rgb(255, 255, 255)")
        assert page["color"] == ("rgb(238, 238, 238)" if dark else "rgb(17, 17, 17)")
    assert wide["end"] < 900 and phone["first"] < 844, shown                   # on a desktop with all above it


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
    assert numbers["tau"] == pytest.approx(tau, rel=1e-3)
    assert numbers["eta"] == pytest.approx(abs(1 - 2 * p)) and (numbers["correct"], numbers["responses"]) == (8 * p, 8)
    total = p * sum(s[i][mask[i]].sum() for i in range(8) if not correct[i])
    total -= (1 - p) * sum(s[i][mask[i]].sum() for i in range(8) if correct[i])
    assert numbers["gwhes"] == pytest.approx(total.item() / math.sqrt(p * (1 - p)), rel=1e-3)
    assert numbers["selected"] == sum(row["selected"] == "1" for row in rows if int(row["question"]) == group.index)


def counted(rows, name):
    """(selected, how many of them have the label) from the CSV's columns alone."""
    chosen = [row for row in rows if row["selected"] == "1"]
    return len(chosen), sum(row[name] == "1" for row in chosen)


def test_tau_over_the_others_is_lower(sums, tmp_path):
    flags = [*SAMPLING, "--questions", 4, "--nthr-vocab", "all"]
    taus = [[group["tau"] for group in record["groups"]] for record in (
        run(tmp_path / name, *flags, "--tau-over", name)[2] for name in ("all", "others"))]
    assert len(taus[0]) == 4 and all(others < everyone for everyone, others in zip(*map(sorted, taus)))


def test_shares_and_ranking_are_those_counted_from_the_csv(sums):
    printed, source, record, all_rows, _ = sums
    for words, limit in (("", 1.1), (", π < 0.95", 0.95)):
        rows = [row for row in all_rows if float(row["pi"]) < limit]
        for name, label in LABELS.items():
            case, values = label + words, record["summary"]["labels"][label + words]
            selected, hits = counted(rows, name)
            assert (values["tokens"], values["selected"]) == (len(rows), selected), case
            assert values["precision"][0] == pytest.approx(hits / selected), case
            difference = values["precision"][0] - values["random_precision"][0]
            assert values["difference"][0] == pytest.approx(difference), case
            ranks = []
            for question in {row["question"] for row in rows}:
                mine = [row for row in rows if row["question"] == question]
                pairs = [(float(a["s"]), float(b["s"])) for a in mine for b in mine if (a[name], b[name]) == ("1", "0")]
                ranks += [statistics.mean((a > b) + (a == b) / 2 for a, b in pairs)] if pairs else []
            assert values["outscoring"][0] == pytest.approx(statistics.mean(ranks)), case
            for text in (printed, html.unescape(source)):
                share = r"(\S+)% \[[^]]+\]"
                line = re.search(re.escape(f"Tokens {case}: ") + rf"{share} of (\d+) selected ones, {share} of as many "
                                 r"random ones per answer, a difference of (\S+) points \[[^]]+\]; they outscore the "
                                 rf"others of their question with probability {share}", text)
                found = [float(number.replace("−", "-")) for number in line.groups()]
                assert found == pytest.approx([100 * hits / selected, selected, 100 * values["random_precision"][0],
                                               100 * difference, 100 * statistics.mean(ranks)], abs=0.051), case


def quantile_of_binomial(q, n, p, value):
    """The q-quantile of value(K), K ~ Bin(n, p), for a value that rises with K."""
    probability = np.array([math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)])
    cumulated = probability.cumsum()
    assert np.abs(cumulated - q).min() > 0.005                                 # no borderline case
    return value(int((cumulated >= q).argmax()))


def test_the_interval_is_the_quantiles_of_all_equally_likely_samples_of_groups():
    """Ten groups of two kinds: the number of the first kind in a sample is binomial."""
    for n, p, first, second in ((10, 0.4, (10, 10), (0, 10)), (10, 0.4, (1000, 1000), (0, 1000)),
                                (10, 0.5, (30, 40), (3, 10)), (12, 0.5, (4, 10), (-20, 30))):
        groups = [first] * round(p * n) + [second] * round(n - p * n)

        def value(k):
            return (k * first[0] + (n - k) * second[0]) / (k * first[1] + (n - k) * second[1])

        expected = [value(round(p * n)), *(quantile_of_binomial(q, n, p, value) for q in (0.025, 0.975))]
        assert tokens.share(*zip(*groups)) == pytest.approx(expected), groups
        assert tokens.share(*zip(*groups, (0, 0), (0, 0))) == pytest.approx(expected), groups


def test_few_tokens_or_few_groups_have_no_share():
    for parts, wholes, enough, given in (
            ([5] * 10, [10] * 10, None, True), ([5] * 10, [10] * 9 + [9], None, False),
            ([50] * 9, [100] * 9, None, False), ([50] * 9 + [0], [100] * 9 + [0], None, False),
            ([0.5] * 10, [1] * 10, 100, True), ([0.5] * 10, [1] * 10, 99, False),
            ([0] * 10, [0] * 10, 100, False), ([], [], None, False)):
        assert (tokens.share(parts, wholes, enough) is not None) == given, (parts, wholes, enough)


def test_random_is_the_mean_of_many_draws_of_random_selection(sums):
    """§5.3 as grpo.py draws it, 2000 times for each wrong response; 5 standard errors."""
    _, _, record, rows, _ = sums
    draws = 2000
    for name, label in LABELS.items():
        hits = torch.zeros(draws)
        for part in responses_of(rows).values():
            selected = torch.tensor([[row["selected"] == "1" for row in part]]).expand(draws, -1)
            right = torch.tensor([row[name] == "1" for row in part])
            chosen = random_selection(selected, torch.ones_like(selected), torch.zeros(draws, dtype=torch.bool),
                                      torch.Generator().manual_seed(len(part) + int(part[0]["response"])))
            hits += (chosen & right).sum(1)
        mine = record["summary"]["labels"][label]
        error = 5 * hits.std().item() / draws ** 0.5
        assert 0 < error < 1
        assert mine["random_precision"][0] * mine["selected"] == pytest.approx(hits.mean().item(), abs=error)


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


EQUATIONS = [                                                                  # (text, its equations, right or wrong)
    ("So 7 + 5 = 12 apples.", [("7 + 5 = 12", 1)]), ("9-4=6, 2*3=6", [("9-4=6", 0), ("2*3=6", 1)]),
    ("13 + 9 equals 22.", [("13 + 9 equals 22", 1)]), ("1 + 3 + 4 = 10", [("1 + 3 + 4 = 10", 0)]),
    ("2 + 3 x 4 - 1 = 13", [("2 + 3 x 4 - 1 = 13", 1)]), ("4 - 6 = -2", [("4 - 6 = -2", 1)]),
    ("7 + 5 =", []), ("a + 3 + 4 = 7", []), ("1.5 + 2 = 3", []), ("7 + 5 = 12.5", []), ("7 + 5 = 12 + 0", []), ("", []),
    ("2 × 2 = 4.", [("2 × 2 = 4", 1)]), ("- 3 + 4 = 1", [])]


def test_equations_read_by_hand():
    """One character per token, with empty tokens between them."""
    for text, equations in EQUATIONS:
        expected, start = [""] * len(text), 0
        for equation, right in equations:
            start = text.index(equation, start)
            expected[start:start + len(equation)] = [right] * len(equation)
        parts = [part for char in text for part in (char, "")]
        assert tokens.right_equations(parts) == [label for each in expected for label in (each, "")], text
    assert tokens.right_equations(["So 7", " + 5 =", " 12", " apples"]) == [1, 1, 1, ""]


def test_words_are_counted_and_sorted_by_their_share():
    rows = [{"text": text, "note": note, "selected": selected} for text, note, selected, times in (
        (" the", "", 1, 5), ("the", "", 0, 15), ("=", "", 1, 20), ("", "<eos>", 0, 30), ("rare", "", 1, 19))
        for _ in range(times)]
    assert tokens.words(rows) == [("=", 20, 20), ("the", 5, 20), ("<eos>", 0, 30)]


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
    shown = shown_rows(sums)
    ends = [row for row, following in zip(shown, [*shown[1:], {"step": None, "response": None}])
            if (row["step"], row["response"]) != (following["step"], following["response"])]
    assert Page(source).sups == ["".join("✗✓"[int(row[name])] for name in ("right_as_written", "true_step"))
                                 for row in ends]


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
    args = Namespace(beta=0.0, eta="p", nthr_vocab="responses", temperature=1.0, order="gwhes", micro_batch_size=2,
                     tau_over="all")
    return texts, tokens.token_view(model, tokenizer, group, None, args), args


def test_hostile_texts_stay_text_on_the_page(hostile):
    texts, view, args = hostile
    source = tokens.page([view], tokens.summarise([view], 1), {"command": HOSTILE}, args)
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
    assert all([*attributes] == ["class"] for _, attributes, _ in shown)
    cells = [cells[0] for table in page.scores for cells in table[1:]]
    assert cells == [tokens.plain(row["text"]) or tokens.symbol(row) for row in view["rows"]]
    assert {row["note"] for row in view["rows"]} == {"", "part of a character", "<eos>", "<odd>&\"\x1b"}
    raw = [char for char in source + page.body if not (char.isprintable() or char == "\n")]
    assert raw == [] and "\ufffd" not in page.body


def test_hostile_texts_stay_text_in_the_terminal(hostile):
    _, view, _ = hostile
    printed = tokens.terminal([view])
    assert not [char for char in printed if not (char.isprintable() or char == "\n")]
    starts = [line for line in printed.split("\n") if line and not line.startswith("    ")]
    assert [start.split(":")[0].split(" <")[0] for start in starts] == [
        "question 7", "gold answer", "  correct response 0", "  correct response 3, cut off",
        "  incorrect response 1", "  incorrect response 2", "  incorrect response 4"]


def test_the_terminal_brackets_the_selected_tokens(sums):
    printed, _, record, rows, groups = sums
    parts = responses_of(rows)
    for question, group in groups.items():
        for where in (where for correct, where in answers_of(group) if not correct):
            expected = "".join(f"⟦{text}⟧" if row["selected"] == "1" else text for row, text in
                               ((row, json.loads(row["text"]) or row["note"]) for row in parts[question, where[0]]))
            section = printed.split(f"question {question}: ")[1].split("\nquestion ")[0]
            many = f"×{len(where)}: responses" if len(where) > 1 else "response"
            assert f"  incorrect {many} {', '.join(map(str, where))}: {expected}\n" in section
    for group in record["groups"]:
        assert f"question {group['question']}: {group['problem']}\n" in printed


# --------------------------------------------------------------------------------------- other data, Δ(x), and errors

@pytest.fixture(scope="module")
def other(tmp_path_factory, sampled):
    """Some problems that are sums and some that are not, with a checker of their own, by Δ(x)."""
    folder = tmp_path_factory.mktemp("other")
    problems = [f"{n}*{n + 3}+2" for n in range(11, 23)] + ["27+38+15", "19+19-8", "36-17+25"]
    (folder / "data.jsonl").write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in problems))
    (folder / "check.py").write_text("import zlib\n\n\ndef even(response, answer):\n"
                                     "    return zlib.crc32(response.encode()) % 2 == 0\n")
    flags = ["--data", str(folder / "data.jsonl"), "--reward", f"{folder / 'check.py'}:even", "--questions", "15",
             "--order", "delta", "--lr", "0.01", "--max-new-tokens", "40", "--device", "cpu"]
    return flags, *run(folder / "out", *flags, "--text"), sampled[-1]


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
    assert summary["labels"]["in steps right as written"]["selected"] == counted(mine, "right_as_written")[0]
    assert len(known) < 10 and "Fewer than 100 tokens or 10 questions get no share." in printed
    for text in (printed, source):                                             # too few sums for a share of them
        assert not any(f"Tokens {label}" in text for label in LABELS.values()) and "of as many random" not in text
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


def test_without_any_sum_the_page_has_no_labels(other, tmp_path):
    flags, *_ = other
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n}*{n + 3}+2", "answer": "1"}) + "\n" for n in range(11, 23)))
    printed, source, record, rows = run(tmp_path / "out", "--data", data, *flags[2:4], "--questions", 1)
    assert record["summary"]["selected_share"] is None
    equations = [row for row in rows if row["right_equation"] != ""]           # of sums in answers to products
    labels = record["summary"]["labels"]
    assert [*labels] == ["in right equations, of those in equations"] * bool(equations)
    assert all(row["precision"] is row["outscoring"] is None for row in labels.values())
    assert "No sums of whole numbers: 1 of 1 problems." in printed and {row["step"] for row in rows} == {""}
    assert "%" not in printed.replace("95% intervals", "") and Page(source).sups == []
    assert "step of a sum" not in source                                       # the legend has no marks but those shown


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
