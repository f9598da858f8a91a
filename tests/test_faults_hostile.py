"""Files and responses from strangers do no harm: hostile answers, data and names, and what the code depends on."""
import ast
import json
import random
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

import reward
import train
from reward import extract_answer, is_equivalent, math_reward
from test_reward import DIFFERENT, EQUAL
from test_train import ROOT, error_of, run, run_here, tiny_rows, write

sys.path.insert(0, str(ROOT / "experiments"))

import ablations  # noqa: E402
import curves  # noqa: E402

# ---- 8. hostile data and responses

ANSWERS = sorted({text for pair in EQUAL + DIFFERENT for text in pair})
FRAGMENTS = sorted([  # all that the parser knows, and what it does not; sorted, as some of it comes from sets
    *"0123456789+-*/^_(){}[]|,.=<>!xyzeinfg'& \"~$%;:\\\n\t\r\0\1\2", *map(chr, reward.UNICODE),
    *(text for pair in reward.REWRITES for text in pair), *reward.DROPPED, *reward.FUNCTIONS, *reward.LETTERS,
    *reward.RELATIONS, *reward.UNITS, *reward.PLAIN, *reward.CLOSERS, *("\\" + name for name in reward.ALIASES),
    *("\\" + name + "{" for name in reward.TEXT), "\\rfloor", "\\rceil", "{1\\over ", "{5\\choose ", "\\frac",
    "\\frac12", "\\frac{1}{", "\\sqrt", "\\sqrt[3]{", "\\sqrt[", "\\binom", "\\binom{800}{400}", "\\pm", "\\cup", "\\{",
    "\\}", "\\\\", "^{", "_{", "\\left(", "\\right)", "\\left|", "\\boxed{", "\\fbox", "\\begin{pmatrix}1&2",
    "\\end{pmatrix}", "\\begin{array}{cc}", "\\begin{vmatrix}", "\\\\[4pt]", "\\log_", "\\sin^2 ", "\\tan^{-1}",
    "x \\in ", "f(x)=", "(-\\infty,2]", "0.\\overline{3}", "0.\\overline{", "\\overline{", "x_{12}", "12_5",
    "1,000", "1 000", "100,200", "3 1/2", "1\\frac12", " and ", " or ", "(C)", "III", "10:30", "miles per hour",
    "9" * 1000, "9" * 4400, "9^{9^9}", "2^{2000}", "899!", "1e999", "1e-999", "10^{400}", "10^{-320}", "0^0", "1/0",
    "nan", "inf", "(-8)^{1/3}", "e^{i\\pi}", "{" * 50, "(" * 50, "\\{" * 30, "2^" * 40, "1," * 45, "-" * 60, "\ud800", "\udfff",
    "\x1b[2J", "\x1b]0;x\x07", "\x9b", "\u202e", "\u200f", "\u200b", "\u2028", "\x85", "\ufeff", "٣", "①", "𝟙", "Ⅳ",
    "ſ", "İ", "ß"])


def mutated(rng, text):
    """`text` with something inserted, deleted, repeated, swapped, spliced, replaced or put in front many times."""
    a, b, c = sorted(rng.randint(0, len(text)) for _ in range(3))
    fragment, other = rng.choice(FRAGMENTS), rng.choice(ANSWERS)
    return rng.choices((
        text[:a] + fragment + text[a:], text[:a] + text[a + rng.randint(1, 4):],
        text[:b] + text[a:b] * rng.choice((1, 2, 8, 60)) + text[b:], text[:a] + text[b:c] + text[a:b] + text[c:],
        text[:a] + other[rng.randint(0, len(other)):], text[:a] + fragment + text[a + rng.randint(0, 3):],
        fragment * rng.choice((2, 5, 20, 100)) + text), (6, 3, 3, 2, 3, 2, 1))[0]


def hostile_text(rng):
    random_text = "".join(rng.choices(FRAGMENTS, k=rng.choice((2, 4, 8, 20, 60))))
    text = random_text if rng.random() < 0.3 else rng.choice(ANSWERS)
    for _ in range(rng.randint(0, 6)):
        text = mutated(rng, text)
    return text[:reward.MAX_CHARS if rng.random() < 0.9 else 5000]


def in_time(function, *arguments):
    """The function's result; at most 50 ms of CPU time, measured again with nothing cached before it counts."""
    start = time.process_time()
    result = function(*arguments)
    seconds = [time.process_time() - start]
    while min(seconds) > 0.05 and len(seconds) < 5:
        forget()
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.05, (min(seconds), function.__name__, [argument[:2000] for argument in arguments])
    return result


def forget():
    for function in (reward._tokens, reward._value, reward._generic, reward._factorial):
        function.cache_clear()


@pytest.mark.parametrize("seed", range(4))
def test_51200_mutated_strings_raise_nothing_take_no_time_and_compare_symmetrically(seed):
    rng, equal = random.Random(f"hostile {seed}"), 0
    for number in range(25_600):
        first = hostile_text(rng)
        second = mutated(rng, first)[:1500] if rng.random() < 0.6 else hostile_text(rng)
        result = in_time(is_equivalent, first, second)
        assert type(result) is bool
        if number % 4 == 0:                                                    # with and without what is remembered
            forget()
        assert in_time(is_equivalent, second, first) is result, (first, second)
        if first.replace("$", "").strip():
            assert in_time(is_equivalent, first, first) is True, first
        response = rng.choice((f"so \\boxed{{{first}}}.", first, f"\\boxed {first}$", f"\\fbox{{{first}}} {second}"))
        assert in_time(math_reward, response, second) in (0.0, 1.0)
        answer = in_time(extract_answer, response)
        assert answer is None or answer in response
        equal += result
    assert 0.02 < equal / 25_600 < 0.5                                         # both happen


@pytest.mark.parametrize("text", ["\\", "\\right.", ",", "^{\\circ}", "%", "\\text", "\\(\\(\\)", "\1\2", "~", "$\\,$"])
def test_what_leaves_no_tokens_is_still_equal_to_itself_and_to_nothing_else(text):
    assert is_equivalent(text, text) and math_reward(f"\\boxed{{{text} }}", text) == 1.0
    assert not is_equivalent(text, "") and not is_equivalent("", text) and not is_equivalent(text, "5")


@pytest.mark.parametrize("text", ["", " ", "$", "$ $", "$\n$", "\u00a0"])
def test_nothing_is_not_equal_to_itself(text):
    assert not is_equivalent(text, text) and math_reward(f"\\boxed{{{text}}}", text) == 0.0


def list_of_lists(lists, length, brackets, reverse):
    """Lists that differ in their last element only, in order or with all that has no order reversed."""
    letters = "abcdfghjkmnpqrstuvwxyzABCDEFGHJKLMNOPQRSTUVW"
    items = [["e"] * (length - 1) + [letters[k]] for k in range(lists)]
    texts = [brackets[0] + ",".join(item[::-1] if reverse and brackets[0] == "\\{" else item) + brackets[1]
             for item in items]
    return ",".join(texts[::-1] if reverse else texts)


SLOW = {  # each took 35 to 120 ms, or was quadratic, before it was bounded
    "thousands that are none": ("1 " * 490, "1+" + "1 " * 490), "zeros": ("0" + " 0" * 490, "0+0" + " 0" * 490),
    "groups of three, and one digit": ("111 " * 240 + "1", "0+" + "111 " * 240 + "1"),
    "sum of factorials": ("+".join(["899!"] * 190) + "+x", "x+" + "+".join(["899!"] * 190)),
    "factorials with both signs": (r"\pm1/899!," * 90 + "x", "0+" + r"\pm1/899!," * 90 + "x"),
    "signs within signs": (r"\{" * 16 + "x" + r"\}=\pm1" * 120, "0+" + r"\{" * 16 + "x" + r"\}=\pm1" * 120),
    "sums under signs": (r"\{" * 12 + "x" + r"\}=\pm1" * 12 + "+x" * 300, "0+" + r"\{" * 12 + "x" + r"\}=\pm1" * 90),
    "sets of sets": (list_of_lists(20, 22, ("\\{", "\\}"), False), list_of_lists(20, 22, ("\\{", "\\}"), True)),
    "set of tuples": (list_of_lists(39, 11, "()", False), list_of_lists(39, 11, "()", True)),
}


@pytest.mark.parametrize("name", SLOW)
def test_answers_that_were_slow_to_compare_are_not(name):
    for first, second in (SLOW[name], SLOW[name][::-1]):
        first, second = first[:reward.MAX_CHARS], second[:reward.MAX_CHARS]
        forget()
        in_time(is_equivalent, first, second)
        in_time(math_reward, f"\\boxed{{{first}}}", second)


@pytest.mark.parametrize("size", [10**4, 10**6, 10**7])
@pytest.mark.parametrize("start, unit, end", [
    ("\\boxed ", "$", ""), ("\\boxed", " ", "{5}"), ("\\boxed ", "a ", ""), ("\\boxed{", "{}", "}"),
    ("\\boxed{", "\\\\", "}"), ("\\boxed{", "a ", "}"), ("\\boxed{", "\\boxed{", ""), ("\\boxed{", "123 ", "}"),
    ("", "é ", ""), ("\\boxed{", "é{", ""), ("\\boxed{" * 1000, "}", ""), ("", "\\boxed", ""),
    ("", "\\", "")], ids=repr)
def test_long_responses_are_read_in_time(start, unit, end, size):
    text = start + unit * (size // len(unit)) + end
    in_time(extract_answer, text)
    in_time(math_reward, text, "5")
    in_time(math_reward, text, "1 " * 500_000)
    in_time(is_equivalent, text, "5")
    assert in_time(is_equivalent, text, text) is True
    assert in_time(is_equivalent, text, text + "6") is False


def test_a_box_is_read_up_to_its_limit_and_texts_beyond_the_parser_are_compared_without_spaces():
    content = "9" * (reward.MAX_BOX - 8)
    assert extract_answer(f"so \\boxed{{{content}}}.") == content
    assert extract_answer(f"so \\boxed{{{content}9}}.") is None
    assert is_equivalent("x + " * 600 + "1", "x+" * 600 + "1") and not is_equivalent("x+" * 600 + "1", "x+" * 600 + "2")


def test_an_answer_of_more_than_the_most_steps_is_not_computed():
    assert is_equivalent("ii " * (reward.MAX_STEPS // 2), "1") and not is_equivalent("ii " * 300, "1")   # i^600 = 1


@pytest.mark.parametrize("n", [5, 20])
def test_sets_of_pairs_still_have_no_order(n):
    pairs = [f"({k},{k * k})" for k in range(n)]
    assert is_equivalent(",".join(pairs), ",".join(pairs[::-1]))
    assert not is_equivalent(",".join(pairs), ",".join([*pairs[:0:-1], "(0,1)"]))


def random_tree(rng, depth):
    """(operation, operands...) or a Fraction, and its value computed with Fractions alone."""
    operation = rng.choice(("number", "+", "-", "*", "/", "^", "negative", "factorial")) if depth else "number"
    if operation == "number":
        value = Fraction(rng.randint(0, 30), rng.choice((1, 1, 1, 2, 3, 5, 7, 8, 10, 100)))
        return value, value
    if operation == "factorial":
        n = rng.randint(0, 6)
        return ("factorial", n), Fraction((1, 1, 2, 6, 24, 120, 720)[n])
    left, x = random_tree(rng, depth - 1)
    if operation == "negative":
        return ("negative", left), -x
    if operation == "^":
        n = rng.randint(-3 if x else 1, 3)
        return ("^", left, n), x ** n
    right, y = random_tree(rng, depth - 1)
    if operation == "/" and y == 0:
        operation = "+"
    return (operation, left, right), {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[operation]


def spelled(rng, value):
    """One of the spellings of a Fraction; a negative one begins with its sign."""
    top, bottom = abs(value.numerator), value.denominator
    texts = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}",
             f"{{{top} \\over {bottom}}}", f"\\frac{{{top}.0}}{{{bottom}}}"]
    if bottom == 1:
        texts += [str(top), f"{top}.0", f"{{{top}}}", f"0{top}", f"{top}.", f"({top})"]
    if 10**6 % bottom == 0:
        digits = f"{top * 10**6 // bottom:07d}"
        texts += [f"{digits[:-6]}.{digits[-6:]}", f"{digits[:-6]}.{digits[-6:]}".rstrip("0") + "0", f"{digits}e-6",
                  f"{digits} \\cdot 10^{{-6}}"]
    period = next(((d, p) for d in (0, 1, 2) for p in (1, 2, 3, 6) if bottom > 1
                   and (abs(value) * 10**d * (10**p - 1)).denominator == 1), None)
    if period:
        d, p = period
        digits, rest = divmod(abs(value) * 10**d, 1)
        whole, decimals = divmod(digits, 10**d)
        texts.append(f"{whole}.{f'{decimals:0{d}}' if d else ''}\\overline{{{int(rest * (10**p - 1)):0{p}}}}")
    if top > bottom > 1:
        texts.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    return "-" * (value < 0) + rng.choice(texts)


def written(rng, tree):
    """LaTeX of a tree; operands are in brackets of some kind, so that precedence is not in question."""
    def operand(tree):
        brackets = ("(", ")"), ("\\left(", "\\right)"), ("[", "]"), ("{(", ")}"), ("\\bigl( ", " \\bigr)")
        left, right = rng.choice(brackets)
        return left + written(rng, tree) + right

    if isinstance(tree, Fraction):
        return spelled(rng, tree)
    operation, left, *right = tree
    if operation == "factorial":
        return rng.choice((f"{left}!", f"{left} !", f"({left})!"))
    if operation == "negative":
        return rng.choice(("-", "- ", "+-", "−", "---")) + operand(left)
    if operation == "^":
        return operand(left) + (f"^{right[0]}" if right[0] >= 0 and rng.random() < 0.5 else f"^{{{right[0]}}}")
    if operation == "/" and rng.random() < 0.6:
        a, b = written(rng, left), written(rng, right[0])
        return rng.choice((f"\\frac{{{a}}}{{{b}}}", f"\\tfrac{{{a}}}{{{b}}}", f"{{{a} \\over {b}}}"))
    signs = {"+": ("+", " + "), "-": ("-", " − ", "+-"), "/": ("/", " \\div ", "÷"),
             "*": ("", "*", " \\cdot ", "\\times ", "×")}
    return operand(left) + rng.choice(signs[operation]) + operand(right[0])


def test_generated_arithmetic_agrees_with_fractions():
    rng, values, compared = random.Random("oracle"), {}, [0, 0]
    while len(values) < 4000:
        tree, value = random_tree(rng, rng.randint(0, 4))
        if max(abs(value.numerator), value.denominator) > 10**40:
            continue
        text, again, result = written(rng, tree), written(rng, tree), spelled(rng, value)
        if max(map(len, (text, again, result))) > reward.MAX_CHARS:
            continue
        for first, second in ((text, result), (result, again), (text, again)):
            assert is_equivalent(first, second), (first, second)
        for difference in (1, Fraction(1, 1000), Fraction(-1, 10**9)):
            assert not is_equivalent(text, spelled(rng, value + difference)), (text, value + difference)
        assert math_reward(f"thus \\boxed{{{text}}}", result) == 1.0
        values[text] = value
    texts = sorted(values, key=lambda text: (values[text], text))
    for first, second in [*zip(texts, texts[1:]), *(rng.sample(texts, 2) for _ in range(2000))]:
        same = values[first] == values[second]
        assert is_equivalent(first, second) is same, (first, second)
        compared[same] += 1
    assert min(compared) > 1000


# Terminals. Whatever a stranger wrote is printed with escapes: no character that a terminal obeys, hides or reorders.

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\u202egpj\u2066\u200b\x7f"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x08\\u202egpj\\u2066\\u200b\\x7f"
TINY_EVALUATION = ["--eval-only", "--eval-size", 2, "--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32"]


def assert_harmless(text):
    """Only printable characters and line ends. \r is what tqdm's bar begins with, so it counts only where no bar is."""
    assert [char for char in text if not char.isprintable() and char not in "\n\t"] == []


def test_printable_escapes_all_that_a_terminal_obeys_and_nothing_else():
    assert train.printable(EVIL) == SHOWN
    assert train.printable("a\nb\rc\td\0\u2028\ud800") == "a\\nb\\rc\\td\\x00\\u2028\\ud800"
    for text in ("café, 漢字, 🙂, שלום", "β = 1, Δ(x) ≤ 0", "\\boxed{5} 'x' \"y\""):
        assert train.printable(text) == text
    assert_harmless(train.printable("".join(map(chr, range(0x110000)))))


def test_fail_ends_with_one_harmless_line():
    with pytest.raises(SystemExit) as caught:
        train.fail(f"cannot read {EVIL}\r\nerror: another")
    assert caught.value.code == f"error: cannot read {SHOWN}\\r\\nerror: another"


def test_names_of_data_files_and_of_a_models_weights_reach_the_terminal_with_escapes(tmp_path):
    """Through the script: transformers lists unknown weights, and the table of an evaluation names its files."""
    model, data = tmp_path / "model", tmp_path / f"data {EVIL}\r\n\udcff.jsonl"
    shutil.copytree(ROOT / "tiny", model, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "stack", "__pycache__"))
    weights = load_file(model / "model.safetensors")
    save_file({**weights, f"model.{EVIL}.weight": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    rows = [{**row, EVIL: EVIL} for row in tiny_rows("test.jsonl", 2)]
    write(data, "".join(json.dumps(row) + "\n" for row in rows))
    result = run("--model", model, *TINY_EVALUATION, "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--out", "run",
                 cwd=tmp_path)
    assert_harmless(result.stdout + result.stderr)
    assert f"model.{SHOWN}.weight" in result.stderr and f"{SHOWN}\\r\\n\\udcff.jsonl" in result.stdout
    assert json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])["benchmark"] == str(data)

    write(data, '{"problem": "1", "answer": 1}\n{"problem": "2", "answer": 2, "answer": 3}')
    result = run("--data", data, "--out", "run", cwd=tmp_path, check=False)
    assert_harmless(result.stdout + result.stderr)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and f"{SHOWN}\\r" in result.stderr


def test_hostile_problems_in_a_training_run_reach_no_terminal(tmp_path, capfd):
    rows = [{"problem": f"{EVIL}\r{row['problem']}", "answer": f"{EVIL}\r{row['answer']}"}
            for row in tiny_rows("train.jsonl", 4)]
    data = write(tmp_path / f"{EVIL}\rnumbers.json", json.dumps(rows))
    flags = ["--data", data, "--eval-data", f"{data},{ROOT}/tiny/test.jsonl", "--eval-size", 2, "--steps", 1,
             "--device", "cpu", "--dtype", "float32", "--batch-size", 2, "--minibatch-size", 2, "--group-size", 2]
    run_here(*flags, "--max-new-tokens", 4, "--out", tmp_path / "run")
    printed = "".join(capfd.readouterr())
    assert f"{SHOWN}\\rnumbers.json" in printed and "\rnumbers" not in printed     # other \r are of tqdm's bar
    assert_harmless(printed.replace("\r", ""))
    context = json.loads((ROOT / "tiny" / "config.json").read_text())["max_position_embeddings"]
    message = error_of(*flags, "--max-new-tokens", context, "--out", tmp_path / "other", starts=True)
    assert SHOWN in message and f"context of {context}" in message
    assert_harmless(message)


def test_the_experiments_print_foreign_names_and_logs_with_escapes(tmp_path, capfd, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "config.json", json.dumps({"method": EVIL}))
    write(source / "metrics.jsonl", "".join(json.dumps({"step": step, "eval_accuracy": 0.5}) + "\n" for step in (0, 1)))
    curves.main([str(source), "--out", str(tmp_path / "curves")])
    printed = "".join(capfd.readouterr())
    assert SHOWN in printed
    assert_harmless(printed)

    def start(folder, flags, environment):
        write(folder / "log.txt", f"error: {EVIL}\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(ablations, "start", start)
    assert ablations.run_all([(source, [])], 1, 1, 1, True) == [source]
    printed = "".join(capfd.readouterr())
    assert f"source failed:\n    error: {SHOWN}\n" in printed
    assert_harmless(printed.replace("\r", ""))


# Data files: read as they are meant, or refused in one line with the place.

def refusal(tmp_path, content):
    path = write(tmp_path / "data.jsonl", content)
    with pytest.raises(SystemExit) as caught:
        train.load_problems(str(path))
    message = caught.value.code
    assert message.startswith(f"error: {path}, ") and len(message) < 600
    assert_harmless(message.replace("\n", "\0"))                                   # one line
    return message.removeprefix(f"error: {path}, ")


GOOD = '{"problem": "1+1", "answer": 2}'
BAD_OBJECTS = [  # an object, what is said of it, and whether it is no JSON (then the line is named even in a list)
    ('{"problem": "1", "answer": 1, "answer": 2}', "'answer'", True),
    ('{"problem": "1", "problem": "1", "answer": 2}', "'problem'", True),
    ('{"problem": "1", "answer": 2, "meta": {"a": 1, "a": 1}}', "'a'", True),
    (f'{{"problem": "1", "answer": 2, {json.dumps(EVIL)}: 1, {json.dumps(EVIL)}: 2}}', SHOWN[:20], True),
    (f'{{"problem": "1", "answer": 2, "{"k" * 10**6}": 1, "{"k" * 10**6}": 2}}', "kkk", True),
    ('{"problem": "1", "answer": NaN}', "NaN", True), ('{"problem": "1", "answer": [1, -Infinity]}', "Infinity", True),
    ('{"problem": "1", "answer": 2, "unread": [[Infinity]]}', "Infinity", True),
    ('{"problem": "1", "answer": ' + "9" * 5000 + "}", "digits", True),
    ('{"problem": "1", "answer": ' + "[" * 100_000, "recursion", True),
    ('{"a":' * 100_000, "recursion", True), ('{"problem": "1", "answer": 01}', "not valid JSON", True),
    ('{"problem": "1", "answer": "2}', "not valid JSON", True),
    ("{'problem': '1', 'answer': 2}", "not valid JSON", True),
    ('{"problem": "a\tb", "answer": 2}', "not valid JSON", True),
    ('{"problem": "\x1b[2J", "answer": 2}', "not valid", True),
    ('\ufeff{"problem": "1", "answer": 2}', "not valid JSON", True), ("x" * 10**6, "not valid JSON", True),
    ('{"problem": "1", "answer": "\0"}', "NUL", True),
    ('{"problem": "\\ud800", "answer": 2}', "surrogate", False),
    ('{"problem": "1", "answer": "\\udfff x"}', "surrogate", False),
    ('{"problem": "1", "solution": "\\\\boxed{\\ud83d}"}', "surrogate", False),
    ('{"problem": "' + "a" * (10**6 + 1) + '", "answer": 2}', "1000001 characters", False),
    ('{"problem": "1", "answer": "' + "a" * (10**6 + 1) + '"}', "1000001 characters", False),
    ('{"problem": "1", "answer": [' + "1," * 400_000 + "1]}", "at most 1000000", False),
    ('{"problem": "1", "answer": 1e999}', "answer", False), ('{"problem": "1", "answer": -1e999}', "answer", False),
    ('{"problem": "1", "answer": [1, null]}', "answer", False),
    ('{"problem": "1", "answer": [[1, 2], [3]]}', "answer", False),
    ('{"problem": "1", "answer": ' + "[" * 900 + "1" + "]" * 900 + "}", "answer", False),
    ('{"problem": "1", "answer": [true]}', "answer", False),
    ('{"problem": "1", "answer": {"value": 2}}', "answer", False),
    ('{"problem": "1", "answer": " \\n "}', "answer", False),
    ('{"problem": "1", "solution": {"boxed": 2}}', "answer", False),
    ('{"problem": null, "answer": 2}', "problem", False), ('{"problem": ["1"], "answer": 2}', "problem", False),
    ('{"problem": {"text": "1"}, "answer": 2}', "problem", False), ('{"Problem": "1", "answer": 2}', "problem", False),
    ("null", "NoneType", False), ("true", "bool", False), ("1.5", "float", False), ('"text"', "str", False)]


@pytest.mark.parametrize("text, said, no_json", BAD_OBJECTS, ids=[row[0][:60] for row in BAD_OBJECTS])
def test_an_object_that_cannot_be_used_is_refused_with_its_line_or_item(text, said, no_json, tmp_path):
    message = refusal(tmp_path, f"{GOOD}\r\n\r\n{text}\r\n{GOOD}")
    assert message.startswith("line 3: ") and said in message
    message = refusal(tmp_path, f"[{GOOD},\n\n{GOOD}, {GOOD},\n{text},\n{GOOD}]")
    assert message.startswith("line 4: " if no_json else "item 4: ") and said in message


@pytest.mark.parametrize("content, line", [
    (f"{GOOD}\n{GOOD}\n".encode() + b'{"problem": "caf\xe9", "answer": 2}', 3),
    (f"\ufeff{GOOD}\r\n{GOOD}\r\n".encode() + b"\xc3\x28", 3), (f"[{GOOD},\r{GOOD},\r".encode() + b'{"\xff": 1}]', 3),
    (b"\xed\xa0\x80", 1), (b"\xc0\xaf", 1), (GOOD.encode() + b"\n\xf0\x9f\x99", 2)])
def test_bytes_that_are_no_utf_8_are_refused_with_their_line(content, line, tmp_path):
    message = refusal(tmp_path, content)
    assert message.startswith(f"line {line}: ") and "UTF-8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", [GOOD, f"[{GOOD}]"])
def test_utf_16_and_utf_32_are_refused_by_name(text, encoding, tmp_path):
    message = refusal(tmp_path, text.encode(encoding))
    assert message.startswith("line 1: ") and "expected" in message and "UTF-8" in message


@pytest.mark.parametrize("content, line", [
    (f"[{GOOD} {GOOD}]", 1), (f"[{GOOD},\n{GOOD},\n]", 3), (f"[{GOOD},\n{GOOD}", 2), (f"[{GOOD}\n]\n{GOOD}", 3),
    (f"[\n,{GOOD}]", 2), ("[", 1), ("[]]", 1), (f"{GOOD}\n{GOOD} {GOOD}", 2), (f"{GOOD}\n{GOOD},", 2),
    (f"[{GOOD}}}", 1), ('{"problem": "1",\n"answer": 2}', 1), (f"{GOOD}\r\r\r]", 4), (f"\ufeff\ufeff{GOOD}", 1)])
def test_text_that_is_neither_one_list_nor_one_object_a_line_is_refused_with_the_line(content, line, tmp_path):
    assert refusal(tmp_path, content).startswith(f"line {line}: not valid JSON")


def test_a_line_of_100_megabytes_is_refused_with_its_number(tmp_path):
    for middle in (b'{"problem": "' + b"a" * 10**8 + b'", "answer": 2}', b"{" + b"\\" * 10**8):
        assert refusal(tmp_path, GOOD.encode() + b"\n" + middle).startswith("line 2: ")
    (tmp_path / "data.jsonl").unlink()


READ = [{"problem": "a\u2028b\u2029c\x85d\ufeffe\x1b\0\r\nf", "answer": "🙂"}, {"problem": "1+1", "answer": "2"}]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r\n \r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\r\n\r\n", " \n\t"])
def test_line_ends_a_bom_and_unicode_separators_are_read_and_counted_right(start, end, ascii_only, tmp_path):
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in READ]
    lines = end.join(texts)
    for content in (lines, lines + end, "[" + f",{end}".join(texts) + end + "]",
                    f"[{end}" + f"{end},{end}".join(texts) + f"{end}]{end}"):
        assert train.load_problems(str(write(tmp_path / "data.json", start + content))) == READ
    number = (start + lines + end).replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    assert refusal(tmp_path, start + lines + end + "{").startswith(f"line {number}: ")


@pytest.mark.parametrize("value, text", [
    ("a" * 10**6, "a" * 10**6), (10**4000, "1" + "0" * 4000), (1e22, "1" + "0" * 22), (-0.0, "0"), (1e-7, "1e-07"),
    ("\ud83d\ude42", "🙂"), ([1, "", "x"], "1, x")], ids=lambda value: repr(value)[:20])
def test_large_and_odd_answers_that_can_be_read_are(value, text, tmp_path):
    path = write(tmp_path / "data.json", json.dumps([{"problem": "p" * 10**6, "answer": value}]))
    assert train.load_problems(str(path)) == [{"problem": "p" * 10**6, "answer": text}]


# ---- 11. supply chain

FOREIGN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "imp"}
TRUST = "_".join(("trust", "remote", "code"))                                      # no string for the search to find
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {  # (what it is called on, name)
    *(("os", name) for name in ("system", "popen", "execv", "execl", "execve", "spawnv", "spawnl", "startfile")),
    ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("hub", "load"), ("pd", "read_pickle"),
    *(("builtins", name) for name in NAMES)}


def dangers(source):
    """[(line, what)] of all that could run code from data or a download, or fetch what may change."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"import {name}") for name in names if name.split(".")[0] in FOREIGN]
            found += [(node.lineno, "import runpy") for name in names if name == "runpy"]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            constant = {name: value.value for name, value in keywords.items() if isinstance(value, ast.Constant)}
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
            owner = getattr(node.func, "value", None)
            owner = getattr(owner, "id", None) or getattr(owner, "attr", None)
            if (isinstance(node.func, ast.Name) and name in NAMES or (owner, name) in ATTRIBUTES
                    or name == "exec_module"):
                found.append((node.lineno, name))
            if (owner, name) == ("torch", "load") and constant.get("weights_only") is not True:
                found.append((node.lineno, "torch.load without weights_only=True"))
            if name == "load" and owner in ("np", "numpy") and "allow_pickle" in keywords:
                found.append((node.lineno, "allow_pickle"))
            if "shell" in keywords and constant.get("shell") is not False:
                found.append((node.lineno, "shell"))
            if TRUST in keywords and constant.get(TRUST) is not False:
                found.append((node.lineno, TRUST))
            if name == "from_pretrained" and TRUST not in keywords:
                found.append((node.lineno, "from_pretrained without trust_remote_code=False"))
            if "use_safetensors" in keywords and constant.get("use_safetensors") is not True or (
                    "AutoModelForCausalLM" in map(lambda part: getattr(part, "id", None), [*node.args, getattr(
                        node.func, "value", None)]) and name in ("load", "from_pretrained")
                    and "use_safetensors" not in keywords):
                found.append((node.lineno, "a model without use_safetensors=True"))
        elif isinstance(node, ast.Attribute) and node.attr == TRUST:
            found.append((node.lineno, TRUST))
        elif isinstance(node, ast.Constant) and node.value == TRUST:
            found.append((node.lineno, TRUST))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for url in re.findall(r"https?://\S+", node.value):
                if not re.search(r"/[0-9a-f]{40}(/|$)", url):
                    found.append((node.lineno, f"no fixed commit in {url}"))
    return found


def python_files():
    outside = {"runs", ".venv", "venv", "build", ".git"}
    return [path for path in ROOT.rglob("*.py") if not outside & set(path.relative_to(ROOT).parts)]


WEB = "{}://".format("https")                                                      # no URL for the search to find

# from_pretrained of test code reads only the embedded models and those it has just made
MAY_TRUST_ITS_OWN = ("from_pretrained without trust_remote_code=False", "a model without use_safetensors=True")


def test_no_file_runs_code_from_data_or_fetches_what_may_change():
    found = {}
    for path in python_files():
        is_test = path.name.startswith("test_")
        for line, what in dangers(path.read_text(encoding="utf-8")):
            if not (is_test and what in MAY_TRUST_ITS_OWN):
                found.setdefault((path.relative_to(ROOT).as_posix(), what), []).append(line)
    assert found.keys() == {
        ("train.py", "import runpy"),                                              # the user's own --reward
        ("tests/test_stack.py", "eval"),                                           # of this repository's problems
        ("tests/test_tiny.py", "exec_module"),                                     # of this repository's make_tiny.py
    }, found


def test_only_the_users_own_reward_is_run():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    uses = [function.name for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Name) and node.id == "runpy"]
    assert uses == ["run_file"] and source.count("runpy") == 2                     # the other is the import


@pytest.mark.parametrize("snippet", [
    "eval('1')", "x = exec(text)", "compile(text, '', 'exec')", "__import__(name)", "builtins.eval(x)", "import pickle",
    "from pickle import loads", "import os, marshal", "import yaml", "from joblib import load", "import runpy",
    "from runpy import run_path", "spec.loader.exec_module(module)", "torch.load(path)",
    "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "torch.load(path, **options)",
    "np.load(path, allow_pickle=True)", "os.system(x)", "os.popen(x)", "subprocess.run(x, shell=True)",
    "subprocess.Popen(x, shell=flag)", "subprocess.getoutput(x)", "torch.hub.load(repository, name)",
    "AutoModel.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "load(AutoConfig, name, trust_remote_code=args.trust)",
    "options = {'trust_remote_code': True}", "config.trust_remote_code = True",
    "load(AutoModelForCausalLM, name, dtype=dtype)", "load(AutoModelForCausalLM, name, use_safetensors=None)",
    f"URL = '{WEB}raw.githubusercontent.com/owner/name/main/data.json'", f"f'{WEB}example.org/{{name}}'",
    f"'{WEB}github.com/owner/name/raw/1636438eae81f1a7179d/data.json'"])
def test_the_search_finds_what_is_planted(snippet):
    assert dangers(f"def f():\n    {snippet}\n"), snippet


@pytest.mark.parametrize("snippet", [
    "model.eval()", "re.compile(x)", "torch.compile(model)", "torch.load(path, weights_only=True)", "np.load(path)",
    "AutoModel.from_pretrained(name, trust_remote_code=False, **options)", "subprocess.run([x], shell=False)",
    "load(AutoModelForCausalLM, name, use_safetensors=True)", "json.load(file)",
    f"'{WEB}raw.githubusercontent.com/owner/name/{'0123456789' * 4}/data.json'"])
def test_the_search_lets_pass_what_is_harmless(snippet):
    assert dangers(snippet) == [], snippet


def test_all_that_is_downloaded_comes_from_a_fixed_commit():
    urls = [url for url, _ in train.DOWNLOADS.values()]
    assert len(urls) == 6
    for url in urls:
        assert re.fullmatch(WEB + r"raw\.githubusercontent\.com/[\w.-]+/[\w.-]+/[0-9a-f]{40}/[\w./-]+", url), url


def loose(line):
    """Whether a line of a requirements file leaves the lowest or the highest version open."""
    operators = [specifier.operator for specifier in Requirement(line).specifier]
    return not ("==" in operators or {">=", "<"} <= set(operators))


def test_every_dependency_has_a_lower_and_an_upper_bound():
    lines = [line for name in ("requirements.txt", "experiments/requirements.txt")
             for line in (ROOT / name).read_text().splitlines() if line.strip()]
    assert lines.count("-r ../requirements.txt") == 1
    assert [line for line in lines if line != "-r ../requirements.txt" and loose(line)] == []
    assert loose("torch") and loose("torch>=2") and loose("torch<3")
    assert not loose("torch>=2,<3") and not loose("torch==2.6")


def test_every_package_that_is_imported_is_a_named_dependency():
    names = {Requirement(line).name for name in ("requirements.txt", "experiments/requirements.txt")
             for line in (ROOT / name).read_text().splitlines() if line.strip() and not line.startswith("-r")}
    own = {path.stem for path in python_files()}
    imported = set()
    for path in python_files():
        if not path.name.startswith("test_") and path.name != "conftest.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    assert "torch" in imported
    optional = {"trl", "datasets"}                                                 # of one benchmark
    assert imported - own - sys.stdlib_module_names - optional <= names
