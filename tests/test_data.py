"""Problems from files and downloads: what each field means and what is refused; prompts; the user's functions."""
import hashlib
import json
import re
import sys
import textwrap
from collections import Counter
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import rollout
from helpers import ROOT, run_here, small_flags, write
from reward import math_reward
from support import data, evaluate, models
from support.data import (BENCHMARKS, TABLE_2, TRAINING_SETS, check_reward, draw_questions, encode_prompt,
                          encode_prompts, load_eval_problems, load_function, load_problems, load_reward, split_problems,
                          step_seed)

DATA = ROOT.parent / "shared" / "data"                                         # the real files, where they lie there
FILES = {   # data set: (its file in DATA, its number of problems)
    "aime24": ("aime24.jsonl", 30), "amc23": ("amc23.jsonl", 40), "math500": ("math500.json", 500),
    "minerva": ("minerva_math.jsonl", 272), "olympiadbench": ("olympiadbench.jsonl", 675),
    "gsm8k": ("gsm8k_test.jsonl", 1319), "gsm8k train": ("gsm8k_train.jsonl", 7473)}
SETS = {**BENCHMARKS, **{f"{name} train": entry for name, entry in TRAINING_SETS.items()}}   # name: (URL, SHA-256)
GOOD = '{"problem": "1+1", "answer": 2}'
# Made-up problems with the fields of each source, and what they mean
MATH_LEVELS = [{"problem": f"p{level}", "level": f"Level {level}", "answer": level} for level in "12345?"]
SOURCES = {
    "aime24": ([{"id": 60, "problem": "One?", "solution": r"So \boxed{25}.", "answer": "025", "question": "One?"},
                {"id": 61, "problem": "Two?", "solution": r"So \boxed{204}.", "answer": "204", "url": "u"}],
               [("One?", "025"), ("Two?", "204")]),
    "amc23": ([{"id": 0, "problem": "How far?", "answer": 27.0, "url": "u", "question": "How far?"},
               {"id": 1, "problem": "How cold?", "answer": -1.0, "url": "u", "question": "How cold?"},
               {"id": 2, "problem": "How much?", "answer": 2.5, "url": "u", "question": "How much?"}],
              [("How far?", "27"), ("How cold?", "-1"), ("How much?", "2.5")]),
    "math500": ([{"problem": "What?", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}", "level": 1,
                  "subject": "Algebra", "unique_id": "test/1.json"}],
                [("What?", r"\frac{1}{2}")]),
    "minerva": ([{"problem": "How bright?", "solution": r"\[ \boxed{4.5e33} \mathrm{~W} \]", "type": "8.282J"},
                 {"problem": "Solve.", "solution": r"It is \boxed{\frac{e^{t}}{3}}.", "type": "18.03", "idx": 1}],
                [("How bright?", "4.5e33"), ("Solve.", r"\frac{e^{t}}{3}")]),
    "olympiadbench": ([{"id": 1606, "context": None, "question": "Which?", "unit": None, "solution": ["So $2$."],
                        "final_answer": ["$(1,2),(2,1)$"], "is_multiple_answer": True}],
                      [("Which?", "$(1,2),(2,1)$")]),
    "gsm8k": ([{"question": "How many?", "answer": "3 and <<3+4=7>>7.\nHe has 7.\n#### 7"}], [("How many?", "7")]),
    "gsm8k train": ([{"question": "Cost?", "answer": "It is $1,234.\n#### 1,234"}], [("Cost?", "1,234")]),
    "math train": (MATH_LEVELS, [("p3", "3"), ("p4", "4"), ("p5", "5")])}


def error_of(action, *args):
    """The one line that an action ends with."""
    with pytest.raises(SystemExit) as caught:
        action(*args)
    message = caught.value.code
    assert message.startswith("error: ") and message.isprintable() and len(message) < 900, message
    return message


def load(name):
    """[(problem, answer), ...] of a data set by its key in SETS."""
    source, _, train = name.partition(" ")
    return [(row["problem"], row["answer"]) for row in load_problems(source, TRAINING_SETS if train else BENCHMARKS)]


# ------------------------------------------------------------------------------------------------ 1. fields and files

def test_problems_and_answers_are_read_from_each_field_that_data_sets_use(tmp_path):
    rows = [
        ({"answer": "42"}, "42"), ({"answer": " x+1 "}, "x+1"), ({"answer": 42}, "42"), ({"answer": 0}, "0"),
        ({"answer": -3}, "-3"), ({"answer": 27.0}, "27"), ({"answer": 2.5}, "2.5"), ({"answer": -0.0}, "0"),
        ({"answer": 1e22}, "1" + "0" * 22), ({"answer": 1e-7}, "1e-07"), ({"answer": 10**4000}, "1" + "0" * 4000),
        ({"answer": ["1", 2, 3.0]}, "1, 2, 3"), ({"answer": [1, "", "x"]}, "1, x"), ({"answer": "🙂"}, "🙂"),
        ({"final_answer": ["$\\frac{1}{2}$"]}, "$\\frac{1}{2}$"), ({"final_answer": ["1", "2"]}, "1, 2"),
        ({"final_answer": "7"}, "7"), ({"answer": "", "final_answer": ["8"]}, "8"),
        ({"answer": "6", "final_answer": "7"}, "6"), ({"answer": "6", "solution": r"\boxed{5}"}, "6"),
        ({"final_answer": "7", "solution": r"\boxed{5}"}, "7"), ({"answer": None, "solution": r"\boxed{5}"}, "5"),
        ({"answer": [], "final_answer": None, "solution": r"\boxed{5}"}, "5"),
        ({"solution": "#### Step 1\n\\boxed{5}\n#### Check\nIt fits."}, "5"),
        ({"solution": r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}."}, r"\frac{1}{\sqrt{2}}"),
        ({"solution": ["It is", r"\boxed{\{1, 2\}}"]}, r"\{1, 2\}"),
        ({"answer": "a\nb #### not this\n#### 7"}, "7"), ({"answer": "1+1=<<1+1=2>>2\n####2 "}, "2"),
        ({"answer": "nothing follows ####", "final_answer": "3"}, "3"), ({"answer": "a" * 10**6}, "a" * 10**6)]
    for name in ("problem", "question"):
        written = [{name: f"What? {number}", **row} for number, (row, _) in enumerate(rows)]
        found = load_problems(write(tmp_path / "data.json", json.dumps(written)))
        assert found == [{"problem": f"What? {n}", "answer": answer} for n, (_, answer) in enumerate(rows)]
    for row, problem in (({"body": "", "problem": "1+1", "answer": 2}, "1+1"),
                         ({"body": "A.", "question": "B?", "answer": 2}, "A. B?"),
                         ({"input": "1+1", "target": 2.0}, "1+1")):
        assert load_problems(write(tmp_path / "one.jsonl", json.dumps(row))) == [{"problem": problem, "answer": "2"}]
    strange = '{"instruction": "Sort.", "input": "3 1", "answer": 1}'
    message = error_of(load_problems, write(tmp_path / "one.jsonl", strange))
    assert "instruction: Sort." in message                                     # an input alone is no whole problem
    path = write(tmp_path / "both.jsonl", '{"problem": "", "question": "b", "answer": 1}\n'
                 '{"problem": "a", "question": "b", "answer": 2}')
    assert [row["problem"] for row in load_problems(path)] == ["b", "a"]


WORD_PROBLEMS = [   # (a made-up row with the fields of ASDiv, SVAMP, MAWPS, or with capital letters, problem, answer)
    ({"body": "Two cats meet three dogs.", "question": "How many meet?", "answer": "5 (cats and dogs)"},
     "Two cats meet three dogs. How many meet?", "5"),
    ({"body": " Two cats ", "question": " How many? ", "answer": "1,008 (paws)"}, "Two cats. How many?", "1,008"),
    ({"body": "Is it late?", "question": "Tell!", "answer": "Yes (it is)"}, "Is it late? Tell!", "Yes (it is)"),
    ({"body": "Cats!", "question": "Ratio?", "answer": "3:4 (cats)"}, "Cats! Ratio?", "3:4 (cats)"),
    ({"body": "Cats.", "question": "How many?", "answer": "-2.5 (m)"}, "Cats. How many?", "-2.5"),
    ({"body": "Cats.", "question": "How many?", "answer": "inf (m)"}, "Cats. How many?", "inf (m)"),
    ({"body": "Cats.", "question": "How many?", "solution": r"\boxed{4}"}, "Cats. How many?", "4"),
    ({"Body": "Some cats", "Question": "How many?", "Answer": 43.0, "ID": "x"}, "Some cats. How many?", "43"),
    ({"Body": "Half a cat.", "Question": "How much?", "Answer": 0.5}, "Half a cat. How much?", "0.5"),
    ({"input": "How many cats ?", "target": 43.0}, "How many cats ?", "43"),
    ({"input": "How many cats ?", "target": "2.5"}, "How many cats ?", "2.5"),
    ({"question": "An interval?", "answer": "9 (apples)"}, "An interval?", "9 (apples)"),    # no body: a text as it is
    ({"PROBLEM": "a", "Final_Answer": 3}, "a", "3"), ({"Problem": "a", "problem": "b", "answer": 1}, "b", "1")]


def test_rows_of_asdiv_svamp_and_mawps_and_capital_letters_are_read_as_they_are(tmp_path):
    wrong = []
    for row, problem, answer in WORD_PROBLEMS:
        found = load_problems(write(tmp_path / "rows.jsonl", json.dumps(row)))
        if found != [{"problem": problem, "answer": answer}]:
            wrong.append((row, found))
    assert wrong == []


def test_fields_that_are_not_known_are_listed_and_the_readme_converts_them(tmp_path, monkeypatch):
    for row in ({"prompt": "1+1", "label": 2}, {"question": "1+1", "label": 2}, {"prompt": "1+1", "answer": 2}):
        message = error_of(load_problems, write(tmp_path / "theirs.jsonl", json.dumps(row)))
        assert all(f"{name}: " in message for name in row) and "README.md, Your own task" in message, message
    assert "got nothing (" in error_of(load_problems, write(tmp_path / "theirs.jsonl", "{}"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs.jsonl", '{"prompt": "1+1", "label": 2}\n{"prompt": "1+2", "label": 3}\n')
    task = (ROOT / "README.md").read_text().split("## Your own task")[1]
    lines = re.search(r"```python\n(.*?)```", task, re.DOTALL)[1]
    assert len(lines.strip().splitlines()) == 3
    exec(textwrap.dedent(lines))
    assert load_problems("my.json") == [{"problem": "1+1", "answer": "2"}, {"problem": "1+2", "answer": "3"}]


def test_a_gold_answer_that_looks_like_a_solution_is_warned_of_but_not_in_a_data_set_with_a_name(tmp_path, capsys,
                                                                                               monkeypatch):
    def warnings(*answers, name=None):
        path = write(tmp_path / "data.jsonl", "".join(json.dumps({"problem": "a", "answer": answer}) + "\n"
                                                      for answer in answers))
        monkeypatch.setattr(data, "download", lambda *source: path)
        load_problems(name or path)
        return capsys.readouterr().err

    assert warnings("x" * 200) == warnings("2\n#### 7") == ""
    for answers, counted in ((["7", "x" * 201], "1 of 2 answers"), (["7", "8", "3 and\n4"], "1 of 3 answers"),
                             (["a\nb", "7", "x" * 999], "2 of 3 answers")):
        text, first = warnings(*answers), next(i for i, answer in enumerate(answers, 1) if len(answer) > 2)
        assert text.startswith(f"warning: {counted}") and text.count("\n") == 1, text
        assert f"(first line {first})" in text, text
        assert str(tmp_path / "data.jsonl") in text and "the final answer alone" in text
        assert warnings(*answers, name="olympiadbench") == ""                  # nobody would mend it


def test_json_lists_and_json_lines_are_read_alike_whatever_their_line_ends(tmp_path):
    """With a BOM, blank lines, separators of Unicode inside of texts, and pretty-printed."""
    rows = [{"problem": "a\u2028b\u2029c\x85d\ufeffe\x1b\0\r\nf", "answer": "é🙂"}, {"problem": "1+1", "answer": "2"}]
    wrong = []
    for ascii_only in (True, False):
        texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        for end in ("\n", "\r\n", "\n\r\n \n"):
            lines = end.join(texts)
            for start in ("", "\ufeff", "\ufeff\r\n\r\n", " \n\t"):
                for content in (lines, lines + end, json.dumps(rows, indent=2, ensure_ascii=ascii_only),
                                f"[{f',{end}'.join(texts)}{end}]", f"[{end}{f'{end},{end}'.join(texts)}{end}]{end}"):
                    if load_problems(write(tmp_path / "data.json", start + content)) != rows:
                        wrong.append((start, content))
    assert wrong == []


def test_a_file_that_cannot_be_used_is_named_with_its_line_or_item(tmp_path):
    """An object stands in a line (the third), and in a list on a line (the fourth) that is not its number (the third).

    What is no JSON is named by its line in a list too. Where Python's reader knows no line (None), the list's is."""
    bad_objects = [   # (an object, what is said of it, whether it is no JSON)
        ('{"problem": "1", answer}', "not valid JSON", True), ('{"problem": "1" "answer": 2}', "not valid JSON", True),
        ('{"problem": "1", "answer": 01}', "not valid JSON", True), ("{'problem': '1'}", "not valid JSON", True),
        ('{"problem": "1", "answer": "2}', "not valid JSON", True), ("x" * 10**6, "not valid JSON", True),
        ('{"problem": "a\tb", "answer": 2}', "not valid JSON", True), ("\ufeff" + GOOD, "not valid JSON", True),
        ('{"problem": "\x1b[2J", "answer": 2}', "not valid JSON", True), ("{" + "\\" * 10**6, "not valid JSON", True),
        ('{"problem": "1", "answer": ' + "9" * 5000 + "}", "digits", None), ("[" * 10**5, "recursion", None),
        ('{"a":' * 10**5, "recursion", None), ('{"problem": "1", "answer": ' + "[" * 10**5, "recursion", None),
        *((f'{{"problem": "1", "answer": {value}}}', "answer", False) for value in (
            "null", "true", "NaN", "-Infinity", "1e999", "-1e999", "[1, null]", "[[1, 2], [3]]", "[true]", "[1, 1e999]",
            '{"value": 1}', '" \\n "', "[" * 900 + "1" + "]" * 900)),
        ('{"problem": "2"}', "answer", False), ('{"problem": "1", "solution": {"boxed": 2}}', "answer", False),
        ('{"problem": "2", "solution": "it is 4"}', "answer", False),
        *((f'{{"problem": {value}, "answer": 1}}', "problem", False) for value in ("null", '" "', "5", '["1"]', "{}",
                                                                                   '{"text": "1"}')),
        ('{"answer": 1}', "problem", False), ('{"prompt": "1", "answer": 2}', "problem", False),
        ("null", "NoneType", False), ("true", "bool", False), ("7", "int", False), ("1.5", "float", False),
        ('"text"', "str", False)]
    cases = [   # (content, the place that must be named, what is said)
        ("", "", "holds no problems"), ("[]", "", "holds no problems"), (" \n\r\n", "", "holds no problems"),
        (f"[{GOOD}, [\"2\", 2]]", "item 2", "list"), (f"[{GOOD} {GOOD}]", "line 1", "not valid JSON"),
        (f"[{GOOD},\n{GOOD},\n]", "line 3", "not valid JSON"), (f"[{GOOD},\n{GOOD}", "line 2", "not valid JSON"),
        (f"[{GOOD}\n]\n{GOOD}", "line 3", "not valid JSON"), (f"[\n,{GOOD}]", "line 2", "not valid JSON"),
        ("[", "line 1", "not valid JSON"), ("[]]", "line 1", "not valid JSON"),
        (f"{GOOD}\n{GOOD} {GOOD}", "line 2", "not valid JSON"), (f"{GOOD}\n{GOOD},", "line 2", "not valid JSON"),
        (f"[{GOOD}}}", "line 1", "not valid JSON"), ('{"problem": "1",\n"answer": 2}', "line 1", "not valid JSON"),
        (f"{GOOD}\n\n\n]", "line 4", "not valid JSON"),
        (f"{GOOD}\n{GOOD}\n".encode() + b'{"problem": "caf\xe9", "answer": 2}', "line 3", "UTF-8"),
        (f"\ufeff{GOOD}\r\n{GOOD}\r\n".encode() + b"\xc3\x28", "line 3", "UTF-8"), (b"\xed\xa0\x80", "line 1", "UTF-8"),
        (GOOD.encode() + b"\n\xf0\x9f\x99", "line 2", "UTF-8"), (b"\xc0\xaf", "line 1", "UTF-8")]
    for text, said, is_no_json in bad_objects:
        cases.append((f"{GOOD}\r\n\r\n{text}\r\n{GOOD}", "line 3", said))
        place = {True: "line 4", False: "item 3", None: "line 1"}[is_no_json]
        cases.append((f"[{GOOD},\n\n{GOOD},\n{text},\n{GOOD}]", place, said))
    wrong = []
    for content, place, said in cases:
        path = write(tmp_path / "data.jsonl", content)
        message = error_of(load_problems, path)
        places = set(re.findall(r"(?:line|item) \d+", message))                # no second, other place
        if not (message.startswith(f"error: {path}") and said in message and places == ({place} - {""})):
            wrong.append((content[:80], place, said, message))
    assert wrong == []


def test_a_file_that_is_not_there_and_a_misspelt_name_are_named_with_the_names_that_exist(tmp_path):
    for source in (str(tmp_path / "missing.jsonl"), str(tmp_path), "aime2024"):
        message = error_of(load_problems, source)
        assert source in message and all(name in message for name in (*BENCHMARKS, "math")), message


# --------------------------------------------------------------------------------------------------------- 2. downloads

@pytest.fixture
def served(tmp_path, monkeypatch):
    """{data set: the file that its URL leads to}, with SOURCES in them and the hashes. torch.hub's folder is empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    files = {}
    for name, (rows, _) in SOURCES.items():
        url, sha256 = SETS[name]
        file = files[name] = tmp_path / "server" / name / url.split("/")[-1]
        file.parent.mkdir(parents=True)
        write(file, json.dumps(rows, indent=2) if file.suffix == ".json" else
              "".join(json.dumps(row) + "\n" for row in rows))
        sets, key = (TRAINING_SETS, name.split()[0]) if " " in name else (BENCHMARKS, name)
        monkeypatch.setitem(sets, key, (file.as_uri(), sha256 and hashlib.sha256(file.read_bytes()).hexdigest()))
    return files


def test_each_source_is_read_fully_and_downloaded_once(served, tmp_path):
    """Each into a file of its own; "gsm8k" is the training file in --data and the test file in --eval-data."""
    first = {name: load(name) for name in SOURCES}
    for file in served.values():
        file.unlink()
    assert first == {name: load(name) for name in SOURCES} == {name: meaning for name, (_, meaning) in SOURCES.items()}
    assert len(list((tmp_path / "hub" / "nthr").iterdir())) == len(SOURCES)


def test_only_a_whole_download_is_kept(served, tmp_path):
    """A changed byte, an end that is cut off and an empty file; MATH has no known hash, so that its JSON must tell."""
    wrong = []
    for name, file in served.items():
        whole = file.read_bytes()
        cut = {"empty": b"", "within a line": whole[:-10]}
        if name != "math train":
            cut |= {"between lines": whole[:whole.index(b"\n") + 1], "changed": whole.replace(b"?", b"!")}
        for kind, content in cut.items():
            if kind == "between lines" and content == whole:                   # of one line
                continue
            file.write_bytes(content)
            message = error_of(load, name)
            if not (file.as_uri() in message and "try again" in message and name.split()[0] in message):
                wrong.append((name, kind, message))
            if list((tmp_path / "hub").rglob("*.json*")):
                wrong.append((name, kind, "kept"))
        file.write_bytes(whole)
        if load(name) != SOURCES[name][1]:
            wrong.append((name, "not downloaded again"))
        for kept in (tmp_path / "hub").rglob("*.json*"):
            kept.unlink()
    assert wrong == []


def test_without_a_network_the_message_says_where_the_file_can_be_put(served, tmp_path, monkeypatch):
    for error in (URLError("no network"), IncompleteRead(b"", 5), OSError(28, "No space left on device"),
                  RuntimeError('invalid hash value (expected "a", got "b")')):
        def failing(url, path, hash_prefix=None, progress=True):
            raise error

        monkeypatch.setattr(torch.hub, "download_url_to_file", failing)
        for name in SOURCES:
            message = error_of(load, name)
            assert served[name].as_uri() in message and str(error) in message
            path = next(Path(word) for word in message.split() if word.startswith(str(tmp_path / "hub")))
            write(path, served[name].read_bytes())
            assert load(name) == SOURCES[name][1], (name, error)
            path.unlink()


def test_the_data_sets_are_those_of_table_2_and_gsm8k_at_fixed_commits_with_hashes():
    assert list(TABLE_2) == ["aime24", "amc23", "math500", "minerva", "olympiadbench"]
    assert list(BENCHMARKS) == [*TABLE_2, "gsm8k"] and list(TRAINING_SETS) == ["math", "gsm8k"]
    urls = [url for url, _ in SETS.values()]
    assert len(set(urls)) == 8
    for name, (url, sha256) in SETS.items():
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w.-]+/[\w.-]+/[0-9a-f]{40}/[\w./-]+", url), url
        assert re.fullmatch("[0-9a-f]{64}", sha256 or "") or name == "math train", name
    owners = {name: "/".join(url.split("/")[3:5]) for name, (url, _) in SETS.items()}
    qwen, rasbt, openai = "QwenLM/Qwen2.5-Math", "rasbt/reasoning-from-scratch", "openai/grade-school-math"
    assert owners == {"aime24": qwen, "amc23": qwen, "math500": rasbt, "minerva": qwen, "olympiadbench": qwen,
                      "gsm8k": openai, "math train": "rasbt/math_full_minus_math500", "gsm8k train": openai}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
def test_every_gold_of_other_word_problems_is_right_when_it_is_boxed():
    """ASDiv, MAWPS, SVAMP and GSM8K's training set, as files of the user's: none is warned of either."""
    for file, problems in (("asdiv", 2215), ("mawps", 2065), ("svamp", 1000), ("gsm8k_train", 7473),
                           ("gsm8k_test", 1319)):
        rows = load_problems(DATA / f"{file}.jsonl")
        wrong = [row for row in rows if math_reward(f"So it is \\boxed{{{row['answer']}}}.", row["answer"]) != 1]
        assert len(rows) == problems and wrong == [], file
        raw = [json.loads(line) for line in (DATA / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row, mine in zip(raw, rows):
            question = row.get("question") or row.get("Question") or row["input"]
            assert mine["problem"].endswith(question.strip()) or file == "mawps" and mine["problem"] == question, row
            if file == "svamp" or file == "mawps":
                assert float(mine["answer"]) == row.get("Answer", row.get("target"))
            elif file == "asdiv":                                              # a number without its unit, or a text
                number = re.match(r"-?[\d,.]+(?= *\()", row["answer"])
                assert mine["answer"].strip() == (number[0] if number else row["answer"].strip()), row
            else:
                assert mine["answer"] == re.search(r"#### (.*)$", row["answer"])[1], row


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
def test_the_real_files_have_the_known_hashes_and_so_many_problems(capsys):
    for name, (file, problems) in FILES.items():
        assert hashlib.sha256((DATA / file).read_bytes()).hexdigest() == SETS[name][1], name
        assert len(load_problems(DATA / file)) == problems, name


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
def test_every_answer_of_the_real_files_is_right_when_it_is_boxed():
    wrong = [(name, row) for name, (file, _) in FILES.items() for row in load_problems(DATA / file)
             if math_reward(f"So it is \\boxed{{{row['answer']}}}.", row["answer"]) != 1]
    assert wrong == []


@pytest.mark.full
def test_a_line_of_100_megabytes_is_refused_with_its_number(tmp_path):
    for line in (b'{"problem": "' + b"a" * 10**8 + b'"}', b"{" + b"\\" * 10**8):
        assert ", line 2: " in error_of(load_problems, write(tmp_path / "data.jsonl", GOOD.encode() + b"\n" + line))
    (tmp_path / "data.jsonl").unlink()


# --------------------------------------------------------------------------------- 3. which problems are used, and when

def json_lines(path, rows):
    return str(write(path, "".join(json.dumps(row) + "\n" for row in rows)))


def evaluated(eval_data, eval_size=1000):
    return [(row["benchmark"], row["problem"], row["answer"]) for row in load_eval_problems(eval_data, eval_size)]


def test_benchmarks_come_in_the_order_of_table_2_and_files_after_them_as_given(served, tmp_path):
    b = json_lines(tmp_path / "b.jsonl", [{"problem": "B", "answer": 1}])
    a = json_lines(tmp_path / "a.jsonl", [{"problem": "A", "answer": 2}])
    rows = evaluated(f"{b},gsm8k,olympiadbench,minerva,{a}, math500,amc23,aime24,{b},amc23")
    order = ("aime24", "amc23", "math500", "minerva", "olympiadbench", "gsm8k")
    assert rows == [(name, *pair) for name in order for pair in SOURCES[name][1]] + [(b, "B", "1"), (a, "A", "2")]


def test_the_evaluation_size_is_that_of_each_benchmark(served):
    assert evaluated("amc23,minerva,aime24", 2) == [(name, *pair) for name in ("aime24", "amc23", "minerva")
                                                    for pair in SOURCES[name][1][:2]]


def test_an_empty_name_is_refused():
    for eval_data in ("aime24,", ",aime24", "aime24,,amc23", " , ", ""):
        assert f"--eval-data {eval_data}: expected names or files" in error_of(evaluated, eval_data)


def test_a_tenth_is_held_out_at_most_the_evaluation_size(tmp_path):
    """It is drawn from the whole file and is the same each time; no problem is in both parts or in none."""
    source = json_lines(tmp_path / "data.jsonl", [{"problem": f"p{i}", "answer": i} for i in range(50)])
    for eval_size, held_out in ((200, 5), (5, 5), (3, 3), (1, 1)):
        train, test = split_problems(source, None, eval_size)
        assert len(test) == held_out and {row["benchmark"] for row in test} == {source}
        assert sorted(int(row["answer"]) for row in train + test) == list(range(50))
        assert [int(row["answer"]) for row in test] != list(range(held_out))
        assert split_problems(source, None, eval_size) == (train, test)
    few = json_lines(tmp_path / "few.jsonl", [{"problem": f"p{i}", "answer": i} for i in range(2)])
    assert [len(part) for part in split_problems(few, None, 200)] == [1, 1]
    one = json_lines(tmp_path / "one.jsonl", [{"problem": "p", "answer": 1}])
    message = error_of(split_problems, one, None, 200)
    assert one in message and "--eval-data" in message
    train, test = split_problems(one, f"{source},{few}", 1)
    assert train == [{"problem": "p", "answer": "1"}]
    assert test == [{"benchmark": name, "problem": "p0", "answer": "0"} for name in (source, few)]


def test_every_epoch_draws_each_problem_once_in_a_new_order():
    """Whatever the batch size, and wherever a run is continued."""
    draws = draw_questions(22, 0, 66, seed=0)
    epochs = [draws[:22], draws[22:44], draws[44:]]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, range(22), draw_questions(22, 0, 22, seed=1))}) == 5
    for batch_size in (1, 8, 50):
        batches = [draw_questions(22, start, batch_size, seed=0) for start in range(0, 66, batch_size)]
        assert sum(batches, [])[:66] == draws
    assert Counter(draw_questions(3, 0, 10, seed=0)).keys() == {0, 1, 2}       # a batch larger than the data


def test_a_run_visits_every_problem_once_per_epoch_and_held_out_ones_never(tmp_path, monkeypatch):
    """22 of 24 problems train, 11 a step. --seed decides their order, and each step samples with a seed of its own."""
    source = small_flags(tmp_path)[1]
    drawn, evaluated, seeds, original = [], [], [], rollout.generate

    def recording(model, tokenizer, prompts, group_size, max_new_tokens, temperature, seed, *args, **kwargs):
        drawn.extend(map(tuple, prompts))
        seeds.append(seed)
        return original(model, tokenizer, prompts, group_size, max_new_tokens, temperature, seed, *args, **kwargs)

    def recording_greedy(model, tokenizer, prompts, *args, **kwargs):
        evaluated.extend(map(tuple, prompts))
        return original(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(rollout, "generate", recording)
    monkeypatch.setattr(evaluate, "generate", recording_greedy)
    for out, seed in (("a", 0), ("b", 1)):
        run_here("--data", source, "--eval-size", 8, "--batch-size", 11, "--minibatch-size", 11, "--group-size", 2,
                 "--steps", 4, "--max-new-tokens", 4, "--eval-every", 0, "--device", "cpu", "--dtype", "float32",
                 "--seed", seed, "--out", tmp_path / out)
    first, second, other = drawn[:22], drawn[22:44], drawn[44:66]
    assert len(set(first)) == 22 and set(first) == set(second) == set(other)
    assert first != second and first != other and len(drawn) == 88
    assert len(set(evaluated)) == 2 and evaluated == evaluated[:2] * 4 and not set(evaluated) & set(first)
    assert len(set(seeds)) == len(seeds) == 8


def test_each_step_round_and_seed_samples_with_a_seed_of_its_own():
    keys = [(seed, step, round_) for seed in range(4) for step in range(50) for round_ in range(3)]
    seeds = [step_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and seeds == [step_seed(*key) for key in keys]
    assert step_seed(0, 1) == step_seed(0, 1, 0) and all(0 <= seed < 2**63 for seed in seeds)


# ----------------------------------------------------------------------------------------------------------- 4. prompts

class Letters:
    """A tokenizer without chat template, whose ids are the characters' codes."""
    chat_template, name_or_path = None, "letters"

    def __call__(self, text):
        return SimpleNamespace(input_ids=list(map(ord, text)))


class Nothing(Letters):
    """A tokenizer that lost its vocabulary."""
    name_or_path = "nothing"

    def __call__(self, text):
        return SimpleNamespace(input_ids=[])


BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def test_a_prompt_is_the_tokenizers_chat_template_or_a_plain_one():
    text = "".join(map(chr, encode_prompt(Letters(), "1+1?")))
    assert text == f"Question: 1+1?\n{BOXED}\nAnswer:"
    assert "".join(map(chr, encode_prompt(Letters(), "1+1?", ""))) == "Question: 1+1?\nAnswer:"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
                               "{% if add_generation_prompt %}assistant{% endif %}")
    expected = tokenizer(f"user: 1+1?\n{BOXED};assistant", add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, "1+1?") == expected and type(expected[0]) is int
    expected = tokenizer("user: 1+1?;assistant", add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, "1+1?", "") == expected


def test_every_prompt_ends_with_the_instruction():
    problems = [{"problem": "a"}, {"problem": "bb"}]
    assert data.INSTRUCTION == BOXED
    for instruction, end in ((BOXED, f"\n{BOXED}\nAnswer:"), ("Be brief.", "\nBe brief.\nAnswer:"), ("", "\nAnswer:")):
        prompts = encode_prompts(problems, Letters(), SimpleNamespace(), 5, instruction)
        assert ["".join(map(chr, prompt)) for prompt in prompts] == [f"Question: a{end}", f"Question: bb{end}"]


def test_the_longest_prompt_and_its_response_must_fit_into_the_context():
    problems, length = [{"problem": "a"}, {"problem": "b" * 99 + "\x1b"}, {"problem": "c"}], 10 + 100 + 8
    for limit, fits in ((length + 5, True), (length + 4, False), (None, True), (10**9, True)):
        config = SimpleNamespace(max_position_embeddings=limit)
        if fits:
            assert len(encode_prompts(problems, Letters(), config, 5, "")) == 3
        else:
            message = error_of(encode_prompts, problems, Letters(), config, 5, "")
            for words in (f"takes {length} tokens", "--max-new-tokens 5", f"context of {limit}", "b" * 60):
                assert words in message and "b" * 61 not in message


def test_a_tokenizer_that_makes_no_tokens_is_refused():
    message = error_of(encode_prompts, [{"problem": "a"}], Nothing(), SimpleNamespace(), 5)
    assert "the tokenizer of nothing makes no tokens" in message


# ---------------------------------------------------------------------------------------------- 5. the user's functions

RIGHT = ["1", "True", "1.0", "np.float32(1)", "np.int64(1)", "np.bool_(True)", "np.array([1])", "torch.tensor(1)",
         "torch.tensor(True)", "torch.tensor([1.0], dtype=torch.bfloat16)", "np.float16(1)", "torch.tensor([[1]])"]
WRONG = ["0", "False", "0.0", "np.float32(0)", "np.bool_(False)", "torch.tensor(0.0)", "torch.tensor([False])"]
REFUSED = ["0.5", "1.1", "None", "'yes'", "'1'", "float('nan')", "2", "-1", "[1]", "(1,)", "np.array([1, 0])", "{}",
           "1j", "torch.tensor([1, 1])", "np.float32(0.1)", "torch.tensor(0.5)", "torch.tensor([])", "np.array(['1'])",
           "float('inf')", "b'1'", "1 + 1e-9"]


def test_a_reward_is_right_or_wrong_and_anything_else_ends_the_run(tmp_path):
    file = write(tmp_path / "mine.py", "import numpy as np\nimport torch\n\n\n"
                                       "def right(response, answer):\n    return eval(response)\n")
    reward, wrong = load_reward(f"{file}:right"), []
    for number, texts in ((1.0, RIGHT), (0.0, WRONG)):
        found = {text: reward(text, "a") for text in texts}
        assert found == dict.fromkeys(texts, number) and {type(value) for value in found.values()} == {float}
    for text in REFUSED:
        message = error_of(reward, text, "gold")
        value = str(eval(text, {"np": np, "torch": torch}))
        expected = f'{file}:right returned {value} for the response "{text}" to the answer "gold", expected 1 or 0'
        wrong += [(text, message)] * (message != f"error: {expected}")
    assert wrong == []
    assert load_reward("math")(r"\boxed{\frac{2}{4}}", "0.5") == 1.0
    message = error_of(reward, f"{'7' * 90} * 0 + 2", "7" * 90)                # the ends, where answers stand
    assert f'"... {"7" * 68} * 0 + 2"' in message and f'"... {"7" * 76}"' in message and len(message) < 400, message


def called_at_start(tmp_path, capsys, code, answer="42"):
    """(how the call of a reward file at the start ends, what it warned of)."""
    file = tmp_path / f"reward{len(list(tmp_path.iterdir()))}.py"
    write(file, code)
    try:
        check_reward(f"{file}:f", answer)
        return "", capsys.readouterr().err
    except SystemExit as stop:
        assert stop.code.startswith(f"error: {file}:f ") and "\n" not in stop.code, stop.code
        assert "swapped" in stop.code or r'for the response "\boxed{42}" to the answer "42"' in stop.code, stop.code
        return stop.code, capsys.readouterr().err


def test_the_reward_is_called_once_at_the_start_on_a_gold_answer_in_its_box(tmp_path, capsys):
    expected = "expected a function (response, answer) -> 1 or 0"
    for code, words in (
            ("def f(response): return 1", "TypeError: f() takes 1 positional argument"),
            ("def f(prompt, response, answer): return 1", "TypeError: f() missing 1 required positional"),
            ("def f(*, response, answer): return 1", "TypeError"),
            ("def f(response, answer):\n    import no_such_module", "ModuleNotFoundError: No module named 'no_such_m"),
            ("def f(response, answer): return re.search('x', response)", "NameError: name 're' is not defined"),
            ("def f(response, answer):\n    return 1 / 0", "ZeroDivisionError: division by zero in "),
            ("def f(response, answer):\n    return 1 / 0", ".py, line 2, for the response"),
            ("def f(answer, response): return int(answer in response)", "swapped"),
            ("import reward\n\n\ndef f(answer, response): return reward.math_reward(response, answer)", "swapped"),
            ("def f(response, answer): return 0.5", "returned 0.5 for the response"),
            ("def f(response, answer): pass", "returned None for the response")):
        message, warned = called_at_start(tmp_path, capsys, code)
        assert words in message and warned == "" and ("1 or 0" if "returned" in words else expected) in message, code
    for code in ("def f(response, answer): return answer in response",
                 "def f(response, answer): return response == answer",
                 "def f(r, *rest, **more): return True", "f = lambda response, answer: answer in response"):
        assert called_at_start(tmp_path, capsys, code) == ("", ""), code
    for code in ("def f(response, answer): return 0", "def f(response, answer): return f'<a>{answer}</a>' in response"):
        message, warned = called_at_start(tmp_path, capsys, code)
        assert message == "" and warned.startswith("warning: the reward ") and warned.count("\n") == 1, code
        assert r'neither "\boxed{42}" nor "42" right' in warned
    check_reward("math", "42")
    assert capsys.readouterr().err == ""
    check_reward("math", "no \\boxed{} ) of a gold {")                          # it can never be right
    assert capsys.readouterr().err.startswith("warning: the reward math calls neither")


def test_what_is_wrong_with_a_reward_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    file = write(tmp_path / "mine.py", "def f(response): return 1\n")
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("the model was loaded"))
    for extra, flags in (([], small_flags(tmp_path)), (["--eval-only"], small_flags(tmp_path)[2:])):
        with pytest.raises(SystemExit) as caught:
            run_here(*flags, *extra, "--reward", f"{file}:f", "--out", tmp_path / "run")
        assert "takes 1 positional argument" in caught.value.code and not (tmp_path / "run").exists()


def test_a_reward_file_imports_what_lies_beside_it_and_the_path_is_as_before(tmp_path, monkeypatch):
    name = f"neighbour_{tmp_path.name}".replace("-", "_")
    write(tmp_path / f"{name}.py", "BOX = '[%s]'\n")
    source = write(tmp_path / "mine.py", f"from {name} import BOX\n\n\ndef f(response, answer):\n"
                                         "    return BOX % answer in response\n")
    broken = write(tmp_path / "broken.py", f"import {name}, no_such_module\n")
    monkeypatch.chdir(tmp_path.parent)
    before = sys.path.copy()
    reward = load_reward(f"{source}:f")
    assert (reward("so [7]", "7"), reward("so 7", "7")) == (1.0, 0.0) and sys.path == before
    data.run_file.cache_clear()
    assert load_reward(f"{tmp_path.name}/mine.py:f")("[7]", "7") == 1.0 and sys.path == before    # from another folder
    assert "no_such_module" in error_of(load_reward, f"{broken}:f") and sys.path == before


def test_a_file_of_the_users_is_run_once_and_its_faults_are_named(tmp_path):
    runs = tmp_path / "runs"
    file = write(tmp_path / "mine.py", f"open({str(runs)!r}, 'a').write('x')\nNUMBER = 7\n\n\ndef f():\n    return 3\n")
    assert load_function("--method", f"{file}:f")() == 3 and load_reward(f"{file}:f") and runs.read_text() == "x"
    broken = write(tmp_path / "broken.py", "def f(:\n")
    raising = write(tmp_path / "raising.py", "1 / 0\n")
    for flag in ("--reward", "--method"):
        for source, words in (
                ("half", "a name that --help lists or FILE.py:FUNCTION, got half"), (str(file), "FILE.py:FUNCTION"),
                ("mine.txt:f", "got mine.txt:f"), (f"{file}:g", f"{file} defines no function g"),
                (f"{file}:", "defines no function"), (f"{file}:NUMBER", f"{file} defines no function NUMBER"),
                (f"{broken}:f", f"{broken} cannot be run: SyntaxError"),
                (f"{raising}:f", f"{raising} cannot be run: ZeroDivisionError"),
                (f"{tmp_path}/none.py:f", f"{tmp_path}/none.py cannot be run: FileNotFoundError")):
            message = error_of(load_function, flag, source)
            assert flag in message and words in message, message
    assert error_of(load_reward, "grader").startswith("error: --reward ")


def test_the_embedded_models_have_their_data_and_rewards():
    for folder, reward in data.EMBEDDED.items():
        problems = load_problems(folder / "train.jsonl")
        assert load_reward(reward)(r"\boxed{" + problems[0]["answer"] + "}" if reward == "math" else
                                   problems[0]["answer"], problems[0]["answer"]) == 1.0
