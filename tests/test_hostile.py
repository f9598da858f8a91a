"""Hostile answers and responses: what a model could write must not slow reward.py down, break or deceive it."""

import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import reward
from reward import extract_answer, is_equivalent, math_reward
from test_reward import ANSWERS

FRAGMENTS = sorted([  # all that the parser knows, and what it does not; sorted, as some of it comes from sets
    *"0123456789+-*/^_(){}[]|,.=<>!xyzeinfg'& \"~$%;:\\\n\t\r\0\1\2", *map(chr, reward.UNICODE),
    *(text for pair in reward.REWRITES for text in pair), *reward.DROPPED, *reward.FUNCTIONS, *reward.LETTERS,
    *reward.RELATIONS, *reward.UNITS, *reward.PLAIN, *reward.CLOSERS, *reward.ALIASES,
    *(name.lstrip("\\") for name in reward.DROPPED), *(name + "{" for name in reward.TEXT), "\\rfloor", "\\rceil",
    "{1\\over ", "{5\\choose ", "\\frac", "\\frac12", "\\frac{1}{", "\\sqrt", "\\sqrt[3]{", "\\sqrt[", "\\binom",
    "\\binom{800}{400}", "\\pm", "\\cup", "\\{", "\\}", "\\\\", "^{", "_{", "\\left(", "\\right)", "\\left|",
    "\\boxed{", "\\fbox", "\\begin{pmatrix}1&2", "\\end{pmatrix}", "\\begin{array}{cc}", "\\begin{vmatrix}",
    "\\\\[4pt]", "\\log_", "\\sin^2 ", "\\tan^{-1}",
    "x \\in ", "f(x)=", "(-\\infty,2]", "0.\\overline{3}", "0.\\overline{", "\\overline{", "x_{12}", "12_5",
    "1,000", "1 000", "100,200", "3 1/2", "1\\frac12", " and ", " or ", "(C)", "III", "10:30", "miles per hour",
    "9" * 1000, "9" * 4400, "9^{9^9}", "2^{2000}", "899!", "1e999", "1e-999", "10^{400}", "10^{-320}", "0^0", "1/0",
    "nan", "inf", "(-8)^{1/3}", "e^{i\\pi}", "{" * 50, "(" * 50, "\\{" * 30, "2^" * 40, "1," * 45, "-" * 60, "\ud800",
    "\udfff",
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


def in_time(function, *arguments, name=""):
    """The function's result; at most 0.2 s of CPU time (a busy machine is slow), measured again with nothing cached."""
    start = time.process_time()
    result = function(*arguments)
    seconds = [time.process_time() - start]
    while min(seconds) > 0.2 and len(seconds) < 5:
        forget()
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.2, (
        min(seconds), function.__name__, name, [argument[:2000] for argument in arguments])
    return result


def forget():
    for function in (reward._tokens, reward._value, reward._generic, reward._factorial):
        function.cache_clear()


@pytest.mark.parametrize("seed, count", [(4, 2000), *(pytest.param(seed, 51_200, marks=pytest.mark.full)
                                                     for seed in range(4))])
def test_mutated_strings_raise_nothing_take_no_time_and_compare_symmetrically(seed, count):
    rng, equal, failures = random.Random(f"hostile {seed}"), 0, []
    for number in range(count // 2):
        first = hostile_text(rng)
        second = mutated(rng, first)[:1500] if rng.random() < 0.6 else hostile_text(rng)
        result = in_time(is_equivalent, first, second)
        if number % 4 == 0:                                                    # with and without what is remembered
            forget()
        response = rng.choice((f"so \\boxed{{{first}}}.", first, f"\\boxed {first}$", f"\\fbox{{{first}}} {second}"))
        answer = in_time(extract_answer, response)
        if not (type(result) is bool and in_time(is_equivalent, second, first) is result
                and (in_time(is_equivalent, first, first) is True or not first.replace("$", "").strip())
                and in_time(math_reward, response, second) in (0.0, 1.0) and (answer is None or answer in response)):
            failures.append((first, second, response))
        equal += result
    assert failures == []
    assert 0.02 < equal / (count // 2) < 0.5                                   # both happen


def test_verdicts_do_not_depend_on_the_order_of_sets():
    """An answer gets the same verdict in every process, whatever the seed of Python's hashes."""
    rng = random.Random("hash seeds")
    pairs = [(r"\tex\mathrm{t{Yes}", r"\text{Yes}"), *((text, mutated(rng, text)) for text in rng.sample(ANSWERS, 300))]
    code = ("import ast, sys; from reward import is_equivalent; "
            "print([is_equivalent(*pair) for pair in ast.literal_eval(sys.stdin.read())])")
    verdicts = [subprocess.run([sys.executable, "-c", code], input=ascii(pairs), text=True, capture_output=True,
                               check=True, cwd=Path(reward.__file__).parent,
                               env={**os.environ, "PYTHONHASHSEED": str(seed)}).stdout for seed in range(4)]
    assert verdicts == verdicts[:1] * 4


def test_what_leaves_no_tokens_is_still_equal_to_itself_and_to_nothing_else():
    for text in ("\\", "\\right.", ",", "^{\\circ}", "%", "\\text", "\\(\\(\\)", "\1\2", "~", "$\\,$"):
        assert is_equivalent(text, text) and math_reward(f"\\boxed{{{text} }}", text) == 1.0, text
        assert not any((is_equivalent(text, ""), is_equivalent("", text), is_equivalent(text, "5"))), text


def test_nothing_is_not_equal_to_itself():
    for text in ("", " ", "$", "$ $", "$\n$", "\u00a0"):
        assert not is_equivalent(text, text) and math_reward(f"\\boxed{{{text}}}", text) == 0.0, text


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


def test_answers_that_were_slow_to_compare_are_not():
    for name, texts in SLOW.items():
        for first, second in (texts, texts[::-1]):
            first, second = first[:reward.MAX_CHARS], second[:reward.MAX_CHARS]
            forget()
            in_time(is_equivalent, first, second, name=name)
            in_time(math_reward, f"\\boxed{{{first}}}", second, name=name)


@pytest.mark.parametrize("size", [10**4, 10**6, pytest.param(10**7, marks=pytest.mark.full)])
def test_long_responses_are_read_in_time(size):
    for start, unit, end in (
            ("\\boxed ", "$", ""), ("\\boxed", " ", "{5}"), ("\\boxed ", "a ", ""), ("\\boxed{", "{}", "}"),
            ("\\boxed{", "\\\\", "}"), ("\\boxed{", "a ", "}"), ("\\boxed{", "\\boxed{", ""), ("\\boxed{", "123 ", "}"),
            ("", "é ", ""), ("\\boxed{", "é{", ""), ("\\boxed{" * 1000, "}", ""), ("", "\\boxed", ""), ("", "\\", "")):
        text, name = start + unit * (size // len(unit)) + end, repr((start[:20], unit, end))
        in_time(extract_answer, text, name=name)
        in_time(math_reward, text, "5", name=name)
        in_time(math_reward, text, "1 " * 500_000, name=name)
        in_time(is_equivalent, text, "5", name=name)
        assert in_time(is_equivalent, text, text, name=name) is True, name
        assert in_time(is_equivalent, text, text + "6", name=name) is False, name


def test_a_box_is_read_up_to_its_limit_and_texts_beyond_the_parser_are_compared_without_spaces():
    content = "9" * (reward.MAX_BOX - 8)
    assert extract_answer(f"so \\boxed{{{content}}}.") == content
    assert extract_answer(f"so \\boxed{{{content}9}}.") is None
    assert is_equivalent("x + " * 600 + "1", "x+" * 600 + "1") and not is_equivalent("x+" * 600 + "1", "x+" * 600 + "2")


def test_an_answer_of_more_than_the_most_steps_is_not_computed():
    assert is_equivalent("ii " * (reward.MAX_STEPS // 2), "1") and not is_equivalent("ii " * 300, "1")   # i^600 = 1


def test_an_answer_of_more_than_the_most_levels_is_not_computed():
    for depth, computed in ((reward.MAX_DEPTH - 1, True), (reward.MAX_DEPTH, False)):                # and 5 is one more
        assert is_equivalent("{" * depth + "5" + "}" * depth, "5") is computed, depth


def test_sets_of_pairs_still_have_no_order():
    for n in (5, 20):
        pairs = [f"({k},{k * k})" for k in range(n)]
        assert is_equivalent(",".join(pairs), ",".join(pairs[::-1])), n
        assert not is_equivalent(",".join(pairs), ",".join([*pairs[:0:-1], "(0,1)"])), n


def test_longer_lists_than_the_longest_without_order_are_compared_in_order():
    for length, unordered in ((reward.MAX_UNORDERED, True), (reward.MAX_UNORDERED + 1, False)):
        elements = [f"x+{k}" for k in range(length)]
        assert is_equivalent(",".join(elements), ",".join(elements[::-1])) is unordered, length
        assert is_equivalent(",".join(elements), ",".join(f"{k}+x" for k in range(length))), length


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


@pytest.mark.parametrize("count", [300, pytest.param(4000, marks=pytest.mark.full)])
def test_generated_arithmetic_agrees_with_fractions(count):
    rng, values, compared, failures = random.Random("oracle"), {}, [0, 0], []
    while len(values) < count:
        tree, value = random_tree(rng, rng.randint(0, 4))
        if max(abs(value.numerator), value.denominator) > 10**40:
            continue
        text, again, result = written(rng, tree), written(rng, tree), spelled(rng, value)
        if max(map(len, (text, again, result))) > reward.MAX_CHARS:
            continue
        cases = [(text, result, True), (result, again, True), (text, again, True)]
        cases += [(text, spelled(rng, value + d), False) for d in (1, Fraction(1, 1000), Fraction(-1, 10**9))]
        failures += [case for case in cases if is_equivalent(*case[:2]) is not case[2]]
        if math_reward(f"thus \\boxed{{{text}}}", result) != 1.0:
            failures.append((text, result, "in a box"))
        values[text] = value
    texts = sorted(values, key=lambda text: (values[text], text))
    for first, second in [*zip(texts, texts[1:]), *(rng.sample(texts, 2) for _ in range(count // 2))]:
        same = values[first] == values[second]
        if is_equivalent(first, second) is not same:
            failures.append((first, second, same))
        compared[same] += 1
    assert failures == []
    assert min(compared) > count // 5                                          # both happen
