r"""Rule-based reward for mathematical answers: 1 if the last \boxed{...} equals the gold answer, else 0.

A lexer cuts an answer into tokens. A parser reads them as a number or a Form: a list, tuple, interval, matrix, union,
relation, unit or text. Numbers are exact Fractions, until a root, pi or e makes them floats. A letter stands for
generic numbers of either sign and order, so (x+1)^2 is x^2+2x+1, and \sqrt{x^2} is |x| but not x. Forms are compared
part by part. An answer without a value equals only an answer with the same tokens or the same words.

Accepted: any spelling of a fraction, decimal, mixed number, power or root; 1,000 for 1000; a name in front (x = 5
for 5); any order in lists, sets and unions; a \pm b for a+b, a-b; terms moved across "="; x > 2 for (2,\infty);
units and %, unless both answers have a unit and the units differ.
Refused: rounded decimals, 50\% for 0.5, a tuple for a list, 12_5 for 12, a repeated list element, arithmetic with
infinity, a longer text that contains the answer.
Limits: answers of over MAX_CHARS characters, MAX_DEPTH levels, MAX_STEPS atoms or numbers over MAX_BITS bits are
compared as text. Lists of over MAX_UNORDERED elements or MAX_LEAVES parts are compared in order. A box of over MAX_BOX
characters is not read.
Readings: \log has base 10, 1/2x is (1/2)x, up to three letters are a product, any plural after a number is a unit,
and (y,x)=(2,4) names (2,4).
"""

import cmath
import math
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


@dataclass
class Form:
    """What is not one number. Computing with it raises TypeError."""

    kind: str  # "any" (in any order: list, set, union), "row" (tuple, interval, matrix), "relation", "unit" or "text"
    tag: object  # brackets, relation signs, unit or text: equal Forms have equal tags
    items: list
    name: str = ""  # what a relation such as x=5 names, if it does, or "unit"
    solution: object = None  # the part that can be an answer by itself: 5 of x=5, 5 of 5 cm
    has_letter: bool = True  # False for 0=1

    def count_leaves(self):
        """Return how many numbers, names and texts this consists of."""
        return sum(item.count_leaves() if isinstance(item, Form) else 1 for item in self.items or [self.solution])


# ------------------------------------------------------------------------------------------------------------- tables
MAX_CHARS, MAX_DEPTH, MAX_STEPS, MAX_BITS = 1000, 20, 500, 8000
MAX_UNORDERED, MAX_LEAVES, MAX_BOX = 40, 200, 100_000
TOLERANCE = 1e-11  # relative, between values that are not both rational
TRIALS = 4  # sets of generic numbers for the letters
EXACT, DIGITS = (int, Fraction), "0123456789"
UNICODE = str.maketrans({char: f"\1{plain}\2" for char, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", DIGITS + "-")} | {
    "−": "-", "–": "-", "×": "*", "÷": "/", "·": "*", "π": r"\pi ", "√": r"\sqrt ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", "°": " ", "∞": r"\infty ", "±": r"\pm ", "′": "'", "θ": r"\theta ",
    "α": r"\alpha ", "\u00a0": " ", "\u2009": " ", "€": "", "£": "", "¢": "", "ℝ": r"(-\infty,\infty)"})
REWRITES = [  # in this order; superscripts come between \1 and \2
    ("\\\\", "\\cr "), ("\\cr \\cr ", "\\cr "), ("\2\1", ""), ("\1", "^{"), ("\2", "}"), (r"\! ", ""), (r"\!", ""),
    (r"\,", " "), (r"\;", " "), (r"\ ", " "), (r"\text{,}", ","), ("{,}", ","), ("{:}", ":"), ("^ ", "^"), (" ^", "^"),
    (r"^{\circ}", " "), (r"^\circ", " "), ("**", "^"), ("<=", "≤"), (">=", "≥"), ("'", r"^\prime "), (r"\left.", ""),
    (r"\right.", ""), (r"\bar", r"\overline"), (".}", "}"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\mathbb R", r"(-\infty,\infty)")]
REWRITES += [(f"\\{edge}{{{kind}}}", f"\\{edge}matrix ") for edge in ("begin", "end")
             for kind in ("pmatrix", "bmatrix", "matrix", "array")]
DROPPED = {*" \t\r\n\v\f$%~", "\\ ", "\\\n", "\\\0"} | {"\\" + name for name in (
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle quad qquad degree angle boxed fbox framebox hline "
    "$ % : ( ) [ ]").split()}
TEXT = ["\\" + name for name in "text mbox textbf textit textrm mathrm mathbf mathit rm bf operatorname".split()]
ALIASES = dict(("\\" + pair).split("@") for pair in (
    r"dfrac@\frac tfrac@\frac cfrac@\frac dbinom@\binom tbinom@\binom cdot@* times@* ast@* div@/ le@≤ leq@≤ "
    r"leqslant@≤ ge@≥ geq@≥ geqslant@≥ lt@< gt@> ne@≠ neq@≠ in@∈ equiv@≡ colon@: cup@∪ pm@± mp@∓ emptyset@∅ "
    r"varnothing@∅ lbrace@\{ rbrace@\} lbrack@[ rbrack@] langle@( rangle@) lvert@| rvert@| vert@| lg@\log").split())
FUNCTIONS = {f"\\{name}": getattr(cmath, name) for name in "sin cos tan exp sinh cosh tanh".split()} | {
    "\\arcsin": cmath.asin, "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\ln": cmath.log, "\\log": cmath.log10,
    "\\cot": lambda z: 1 / cmath.tan(z), "\\sec": lambda z: 1 / cmath.cos(z), "\\csc": lambda z: 1 / cmath.sin(z)}
INFINITY, MINUS_INFINITY = Form("text", "\\infty", []), Form("text", "-\\infty", [])
CONSTANTS = {"\\pi": math.pi, "e": math.e, "i": 1j, "∅": Form("any", "", [])}
LETTERS = {"\\" + name for name in (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar prime").split()}
PLAIN = {name[1:]: name for name in (*FUNCTIONS, "\\sqrt", "\\pi")} | {  # names also read without backslash
    "infinity": "\\infty", "and": ",", "or": ","}
UNITS = {name: group.split()[0] for group in (  # each group is one unit
    "cm centimeter centimetre|mm millimeter|km kilometer kilometre|m meter metre|in inch inches|ft foot feet|yd yard|"
    "mi mile|kg kilogram|g gram|mg|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|year|l liter "
    "litre|ml milliliter|deg degree|percent|unit|rad radian|dollar usd|cent|2 square sq|3 cubic|-1 / per|mph|people|"
    "children|men|women|cup|old|erg|k|c|f|n|j|w|v|hz").split("|") for name in group.split()}
NOT_UNITS = {"less", "minus", "plus", "times", "yes", "dozens", "hundreds", "thousands", "millions", "billions"}
SIGNS = ("+", "-", "±", "∓")
RELATIONS = {*"=<>≤≥≠∈≡:", "\\to", "\\mid", "\\setminus", "\\subset", "\\mapsto"}
MIRROR = str.maketrans("<>≤≥", "><≥≤")
CLOSERS = {"(": ")]", "[": ")]", "{": "}", "|": "|", "\\{": ["\\}"], "\\lfloor": ["\\rfloor"], "\\lceil": ["\\rceil"]}
MEASURES = {"|": abs, "\\lfloor": math.floor, "\\lceil": math.ceil}
FACTORS = {"(", "[", "{", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil", "\\pi", *FUNCTIONS, *LETTERS}
NOT_NAMES = {"\\frac", "\\sqrt", "\\binom", "\\infty", *FUNCTIONS, *CONSTANTS}


# -------------------------------------------------------------------------------------------------------------- lexer
def extract_answer(response):
    r"""Return the content of the last \boxed, \fbox or \framebox of `response`, or None. Raises nothing.

    The last box is the one that begins last: of nested boxes, the inner one. A box without braces holds the text up to
    the next space or $. None means no str, no box, or a last box that does not close within MAX_BOX characters.
    """
    if not isinstance(response, str):
        return None
    start = max(map(response.rfind, ("\\boxed", "\\fbox", "\\framebox")))
    rest = response[start:start + MAX_BOX].partition("ox")[2].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return next(iter(rest.partition("$")[0].split(maxsplit=1)), None)
    depth = 0
    for end, char in enumerate(rest.replace("\\\\", "  ").replace("\\{", "  ").replace("\\}", "  ")):
        depth += (char == "{") - (char == "}")  # escaped braces are text
        if depth == 0:
            return rest[1:end]
    return None


def _run_end(text, start, characters):
    """Return where the run of `characters` that begins at `start` ends."""
    return len(text) - len(text[start:].lstrip(characters))


def _number(text, start, in_brackets):
    r"""Read 12, 1,000, 1 000, .5, 0.\overline{3} or 5.3e-9; return its exact value and its end."""
    end = _run_end(text, start, DIGITS)
    digits, mark = text[start:end], text[end]
    may_group = (mark == " " or mark == "," and text[start - 1] != "," and not in_brackets) and digits[:1] > "0"
    groups = text[start:_run_end(text, start, DIGITS + mark)].rstrip(mark).split(mark)
    if may_group and len(digits) < 4 and all(len(group) == 3 for group in groups[1:]):
        digits, end = "".join(groups), start + len(mark.join(groups))
    point, end = end, _run_end(text, end + 1, DIGITS) if text[end] == "." else end
    decimals = text[point + 1:end]
    value = Fraction(int(digits + decimals or "0"), 10 ** len(decimals))
    if text.startswith("\\overline{", end):
        close = _run_end(text, end + 10, DIGITS)
        period = text[end + 10:close]
        if period and text[close] == "}":
            value += Fraction(int(period), 10 ** len(decimals) * (10 ** len(period) - 1))
            end = close + 1
    stop = _run_end(text, end + 1 + (text[end + 1] in "+-"), DIGITS)
    if text[end] in "eE" and text[stop - 1] in DIGITS:
        if stop - end > 4:
            return text[start:stop], stop  # too large to evaluate
        value, end = value * Fraction(10) ** int(text[end + 1:stop]), stop
    return (value if value.denominator > 1 else value.numerator), end


def _is_word(name, in_text, last):
    """Tell whether the letters `name` after the token `last` are a word or unit rather than a product of letters."""
    after_value = not isinstance(last, str) or last in ("}", ")", "/", "\\pi") or last[:1] == '"'
    return (in_text and len(name) > 1 or len(name) > 3 or name in ("no", "II", "III", "IV")
            or len(name) == 3 and (name.istitle() or not set(name).isdisjoint("eou"))
            or after_value and name.lower() in UNITS and (in_text or len(name) > 1 and name != "mg"))


@lru_cache(maxsize=4096)
def _tokens(text):
    """Cut `text` into a tuple of numbers and strings. A word is a string that begins with a quotation mark."""
    text = text.translate(UNICODE)
    for old, new in REWRITES:
        text = text.replace(old, new)
    ignored_end = " \t\r\n$,;:\\" + "." * (".." not in text)  # a full stop, but not 0.333...
    text = text.removesuffix("\\cr ").strip().rstrip(ignored_end) + "\0\0"
    tokens, i, text_end, brackets = [], 0, -1, 0
    while i < len(text) - 2:
        char, last = text[i], tokens[-1] if tokens else ""
        stop = i + 1 + (char == "\\")
        while text[stop - 1].isalpha() and text[stop].isalpha():
            stop += 1
        name = text[i:stop]
        if char in DIGITS or char == "." and text[stop] in DIGITS:
            one_digit = char != "." and (last == "\\frac" or tokens[-2:-1] == ["\\frac"] and last != "{")  # \frac12
            value, stop = (int(char), stop) if one_digit else _number(text, i, brackets > 0)
            tokens.append(value)
        elif name.lower() in PLAIN:
            tokens.append(PLAIN[name.lower()])
        elif char.isalpha() and _is_word(name, i < text_end, last):
            tokens.append('"' + name.lower())
            stop += text[stop] == "."  # sq. cm
        elif char.isalpha():
            tokens.extend(name)
        elif name in TEXT:
            start = _run_end(text, stop, " ")
            close = text.find("}", start)
            if text[start] == "{" and "{" not in text[start + 1:close]:
                stop, text_end = start + 1, close
        elif name == "\\cr":
            tokens.append(name)
            if text.startswith("[", stop + 1):  # \\[4pt]
                stop = text.find("]", stop) + 1 or stop
        elif name not in DROPPED and i != text_end:
            tokens.append(ALIASES.get(name, name))
            brackets += (name in ("(", "[", "\\{")) - (name in (")", "]", "\\}"))
        i = stop
    return tuple(token for k, token in enumerate(tokens) if token != "," or tokens[k - 1] != ",")


def _words(text):
    r"""Return the lower-case letters of an answer that consists of words, as in \text{II only}, else an empty str."""
    for name in TEXT:
        text = text.replace(name + "{", "")
    text = "".join(char for char in text.replace("\\ ", "") if char not in ' {}$~."')
    return text.casefold() if len(text) > 1 and text.isalpha() else ""


# ------------------------------------------------------------------------------------------------------------ numbers
def _checked(value):
    """Return a number if it is not too large, without a part that is rounding noise."""
    if isinstance(value, EXACT):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise OverflowError("number too large")
        return value.numerator if value.denominator == 1 else value
    if not cmath.isfinite(value):
        raise OverflowError("number not finite")
    parts = [part if abs(part) > 1e-15 * abs(value) else 0.0 for part in (value.real, value.imag)]
    return complex(*parts) if isinstance(value, complex) else value


def _divide(top, bottom):
    return _checked(Fraction(top, bottom) if isinstance(top, EXACT) and isinstance(bottom, EXACT) else top / bottom)


@lru_cache(maxsize=1024, typed=True)  # typed: 5 is exact, 5.0 is not
def _factorial(value):
    return math.factorial(value) if isinstance(value, int) and 0 <= value < 900 else math.gamma(value + 1)


def _binomial(n, k):
    return _divide(_factorial(n), _checked(_factorial(k) * _factorial(n - k)))


@lru_cache(maxsize=4096)
def _generic(name, trial):
    """Return the number for `name`: positive in trial 0, negative in trial 1, then of mixed sign in reversed order."""
    code = zlib.crc32(name.encode("utf-8", "replace"))
    size = code % 99991 + 50021  # that is, from 0.5 to 1.5
    negative = trial == 1 or trial > 1 and code >> trial & 1
    return Fraction((200006 - size if trial > 1 else size) * (-1 if negative else 1), 100003)


# ------------------------------------------------------------------------------------------------------------- parser
class _Parser:
    r"""Recursive descent from tokens to a number or a Form, with the letters of one trial. Each rule is a method.

    elements = relation {"," relation}                  {...} any number of times, [...] at most once
    relation = union {RELATIONS union}
    union    = sum {"∪" sum}
    sum      = product {SIGNS product} {UNITS ["^" atom]}
    product  = operand {["*" | "/"] operand}
    operand  = {SIGNS} ("\infty" | atom {"^" ["-"] atom | "!"})
    atom     = mixed | group | matrix | letter | function | CONSTANTS | {word} | "\sqrt" ["[" elements "]"] atom | ...
    mixed    = number ["\frac" atom atom | number "/" number]
    group    = "(" elements ")" | "{" elements ("\over" | "\choose") sum "}" | ...
    """

    def __init__(self, tokens, trial):
        self.tokens, self.trial = (*tokens, "", "", ""), trial
        self.position = self.depth = self.steps = self.bars = self.letters = 0
        self.is_upper, self.has_sign = True, False  # whether \pm is read as +, and whether there was one
        self.has_branch = False  # whether a complex root or logarithm was taken

    @property
    def token(self):
        return self.tokens[self.position]

    def accept(self, *tokens):
        """Step over the next token and return it, if it is one of `tokens`; else return an empty str."""
        found = self.token in tokens
        self.position += found
        return self.tokens[self.position - 1] if found else ""

    def elements(self, expand=False):
        r"""Read elements between commas. With `expand`, an element with \pm gives two."""
        items, outer = [], (self.is_upper, self.has_sign)
        while not items or self.accept(","):
            start = self.position
            if expand:
                self.is_upper, self.has_sign = True, False
            items.append(self.relation())
            if expand and self.has_sign:
                self.position, self.is_upper = start, False
                items.append(self.relation())
        if expand:
            self.is_upper, self.has_sign = outer
        forms = [item for item in items if isinstance(item, Form)]
        if len({form.name for form in forms} - {""}) > 1:  # x=1, y=2 is not 1, 2
            for form in forms:
                form.name = ""
        return items

    def relation(self):
        """Read unions between relation signs. Note what x=5, x in [0,1] or 0<x<=1 says about its name."""
        items, names, tag, mark = [], [], "", ""
        while not items or mark:
            start = self.position
            items.append(self.union())
            names.append(_name(self.tokens[start:self.position]))
            mark = self.accept(*RELATIONS)
            tag += mark
        if not tag:
            return items[0]
        if tag[0] in ">≥" or tag in ("=", "≠") and not names[0]:
            tag, items, names = tag.translate(MIRROR)[::-1], items[::-1], names[::-1]
        name, solution = names[0] if tag in ("=", "∈") else "", items[1]
        if tag in ("<", "≤") and names[0]:  # x<5 is -infinity<x<5
            tag, items, names = "<" + tag, [MINUS_INFINITY, *items], ["", *names]
        elif tag in ("<", "≤"):
            tag, items = tag + "<", [*items, INFINITY]
        if tag in ("<<", "<≤", "≤<", "≤≤"):
            name, solution = names[1], Form("row", "(["[tag[0] == "≤"] + ")]"[tag[1] == "≤"], items[::2])
        return Form("relation", tag, items, name, solution, self.letters > 0)

    def union(self):
        items = [self.sum()]
        while self.accept("∪"):
            items.append(self.sum())
        return items[0] if len(items) == 1 else Form("any", "∪", items)

    def sum(self):
        """Read a sum and its unit, such as "cm", "/", "s" or any plural."""
        value, units = self.product(), []
        while self.token in SIGNS:
            value = _checked(value + self.product())  # which reads the sign
        while isinstance(self.token, str) and (units or self.token[:1] == '"'):
            word = self.token.strip('"')
            unit = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
            if not unit and (units or len(word) < 4 or word[-1] != "s" or word in NOT_UNITS):
                break
            units.append(unit or word)
            self.position += 1
            units += [str(self.atom())] if self.accept("^") else []
            self.accept("*")
        return Form("unit", sorted(units), [], "unit", value) if units else value

    def product(self):
        value = self.operand()
        while (mark := self.accept("*", "/")) or self.at_factor():
            value = _divide(value, self.operand()) if mark == "/" else _checked(value * self.operand())
        return value

    def at_factor(self):
        """Tell whether the next token multiplies what precedes it, as in 2x or 2^3 5^2, but not in 2 3."""
        token, before = self.token, self.tokens[self.position - 1]
        if not isinstance(token, str):
            return isinstance(before, str) or self.tokens[self.position - 2] == "^" == self.tokens[self.position + 1]
        return token.isalpha() or token in FACTORS or token == "|" and not self.bars

    def operand(self):
        """Read signs, an atom, and its powers and factorials."""
        negative = False
        while sign := self.accept(*SIGNS):
            self.has_sign |= sign in "±∓"
            negative ^= sign in ("-∓" if self.is_upper else "-±")
        if self.accept("\\infty"):
            return MINUS_INFINITY if negative else INFINITY
        value = self.atom(may_be_mixed=True)
        if self.token == "_" and isinstance(value, int):
            value = self.letter(str(value))  # 12_5 is a name: digits in base 5
        while mark := self.accept("^", "!"):
            if mark == "!":
                value = _checked(_factorial(value))
            else:
                value = self.power(value, -self.atom() if self.accept("+", "-") == "-" else self.atom())
            if self.token == mark:
                raise ValueError("double power or factorial")
        return -value if negative else value

    def power(self, base, exponent):
        """Return base**exponent. Note a complex root, as another spelling of it can give another of its values."""
        is_exact = isinstance(base, EXACT) and isinstance(exponent, int)
        if is_exact and max(map(abs, base.as_integer_ratio())).bit_length() * abs(exponent) > MAX_BITS:
            raise OverflowError("power too large")
        value = _checked((Fraction(base) if is_exact else base) ** exponent)
        if value == 0 != base or base == 0 and not (isinstance(exponent, EXACT) and exponent > 0):
            raise ArithmeticError("underflow, or 0 to a power that is not positive")
        self.has_branch |= isinstance(value, complex) and not isinstance(exponent, int)
        return value

    def atom(self, may_be_mixed=False):
        """Read one value. A number may be mixed, unless it is an exponent or the argument of a command."""
        self.depth, self.steps = self.depth + 1, self.steps + 1
        if self.depth > MAX_DEPTH or self.steps > MAX_STEPS:
            raise ValueError("nested too deep or too long")
        token = self.token
        self.position += 1
        if not isinstance(token, str):
            value = self.mixed(token) if may_be_mixed and isinstance(token, int) else token
        elif token in CLOSERS:
            value = self.group(token)
        elif token == "\\beginmatrix":
            value = self.matrix()
        elif token in ("\\frac", "\\binom"):
            value = (_divide if token == "\\frac" else _binomial)(self.atom(), self.atom())
        elif token == "\\sqrt":
            index = self.group("[") if self.accept("[") else 2
            value = self.atom()
            odd = index % 2 and not isinstance(value, complex) and value < 0  # the real root, not the principal one
            value = self.power(-value if odd else value, _divide(1, index)) * (-1 if odd else 1)
        elif token in FUNCTIONS:
            value = self.function(token)
        elif token[:1] == '"':
            while self.token[:1] == '"':
                token += self.accept(self.token)
            value = Form("text", token, [])
        elif token in CONSTANTS and self.token != "_":
            value = CONSTANTS[token]
        elif token.isalpha() or token in LETTERS:
            value = self.letter(token)
        else:
            raise ValueError("no value")
        self.depth -= 1
        return value

    def mixed(self, whole):
        r"""Return the mixed number that begins with `whole`, such as 1\frac12 or 1 1/2, or else `whole`."""
        start, letters, part = self.position, self.letters, 0
        top, mark, bottom = self.tokens[start:start + 3]
        if top == "\\frac":
            part = self.atom()
        elif isinstance(top, int) and mark == "/" and isinstance(bottom, int):
            self.position += 3
            part = _divide(top, bottom)
        if isinstance(part, Fraction) and 0 < part < 1 and letters == self.letters:
            return whole + part
        self.position = start
        return whole

    def group(self, token):
        r"""Read up to the bracket that closes `token`: a list, tuple, interval, |x|, floor or {a \over b}."""
        self.bars += token == "|"
        items = [] if self.token == "\\}" else self.elements(expand=token == "\\{")
        self.bars -= token == "|"
        if token == "{" and (mark := self.accept("\\over", "\\choose")):
            items = [(_divide if mark == "\\over" else _binomial)(items[0], self.sum())]
        ends = token + self.accept(*CLOSERS[token])
        if ends == token:
            raise ValueError("unclosed bracket")
        if len(items) != 1 or ends in ("(]", "[)") or token == "\\{" and getattr(items[0], "kind", "") == "any":
            return Form("any", "", items) if token in ("{", "\\{") else Form("row", ends, items)  # {∅} is not ∅
        value = items[0]
        if token in ("\\lfloor", "\\lceil") and self.letters:  # a made-up number, the same for equal arguments
            return _generic(f"{token} {complex(value):.9g}", self.trial)
        return MEASURES[token](value) if token in MEASURES else value

    def matrix(self):
        if self.accept("{"):  # the column types of an array
            self.position = self.tokens.index("}", self.position) + 1
        rows = [Form("row", "", [])]
        while not self.accept("\\endmatrix"):
            rows[-1].items.append(self.relation())
            if self.accept("\\cr") and self.token != "\\endmatrix":
                rows.append(Form("row", "", []))
            self.accept("&")
        return Form("row", "matrix", rows)

    def letter(self, name):
        """Read a subscript, or the argument of an unknown function, as a part of the name. Return its number."""
        self.letters += 1
        while True:
            start = self.position
            mark, inner, close = self.tokens[start:start + 3]
            if mark == "_" and inner != "":
                stop = self.tokens.index("}", start) if inner == "{" else start + 1
            elif mark == "(" and (name[0] in "fgh" or close == ")"):
                stop = self.tokens.index(")", start)
            else:
                return _generic(name, self.trial)
            name += mark + "".join(map(str, self.tokens[start + 1:stop + 1])).strip("{}()")
            self.position = stop + 1

    def function(self, name):
        r"""Read and compute \sin^2 x, \log_2(8), \tan^{-1} 1 or \sin 2x."""
        base = math.e
        if name == "\\log" and self.accept("_"):
            name, base = "\\ln", self.atom()
        power = self.atom() if self.accept("^") else 1
        if power == -1 and "\\arc" + name[1:] in FUNCTIONS:
            name, power = "\\arc" + name[1:], 1
        in_brackets = self.token in ("(", "[", "{")
        value = self.atom() if in_brackets else self.operand()
        while not in_brackets and self.token not in FUNCTIONS and self.at_factor():
            value = _checked(value * self.operand())
        result = _checked(FUNCTIONS[name](complex(value)) / cmath.log(base))
        is_real = not isinstance(value, complex)
        self.has_branch |= is_real and result.imag != 0
        return self.power(result.real if is_real and not result.imag else result, power)


def _name(tokens):
    """Return `tokens` as text if they are a name, such as x, x_1, f(x), (x,y), AB or Area, else an empty str."""
    first = next((token for token in tokens if token not in ("(", "{")), 0)
    is_name = isinstance(first, str) and first not in ("e", "i") and all(
        before in ("(", ",", "_", "{") if not isinstance(token, str) else
        token.isalpha() or token in "_{}()," or token[0] == '"' or token[0] == "\\" and token not in NOT_NAMES
        for before, token in zip(("", *tokens), tokens))
    return " ".join(map(str, tokens)) if is_name else ""


@lru_cache(maxsize=4096)
def _value(text, trial):
    """Return the value of `text` (None if it has none), whether it has letters, and whether it has complex roots."""
    parser, value = _Parser(_tokens(text), trial), None
    try:
        items = parser.elements(expand=True)
        if parser.token == "":
            value = items[0] if len(items) == 1 else Form("any", "", items)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        pass
    return value, parser.letters > 0, parser.has_branch


# --------------------------------------------------------------------------------------------------------- comparison
def _same_number(a, b):
    if isinstance(a, EXACT) and isinstance(b, EXACT):
        return a == b
    if any(isinstance(x, Fraction) and x.denominator > 10**6 and x.denominator % 100003 for x in (a, b)):
        return False  # a long denominator without the one of the letters is that of a rounded decimal
    a, b = complex(a), complex(b)
    noise = 1e-15 * max(abs(a), abs(b))
    return all(abs(p - q) <= noise + TOLERANCE * max(abs(p), abs(q)) for p, q in ((a.real, b.real), (a.imag, b.imag)))


def _same_value(a, b):
    """Tell whether two numbers or Forms are equal."""
    kind, other_kind = (getattr(value, "kind", "number") for value in (a, b))
    if kind != other_kind:
        form, other = (a, b) if kind in ("relation", "unit") else (b, a)
        return getattr(form, "name", "") != "" and _same_value(form.solution, other)
    if kind == "number":
        return _same_number(a, b)
    if kind == "unit" and a.tag == b.tag or kind == "relation" and a.name and a.name == b.name:
        return _same_value(a.solution, b.solution)
    if kind == "relation" and a.tag == b.tag == "=" and a.has_letter and b.has_letter:
        if not any(isinstance(item, Form) for item in a.items + b.items):  # terms can be moved across the sign
            left, right = a.items[0] - a.items[1], b.items[0] - b.items[1]
            return left != 0 and (_same_number(left, right) or _same_number(left, -right))
    is_union = any(all(getattr(item, "kind", "") == "relation" for item in form.items) for form in (a, b))
    if len(a.items) != len(b.items) or a.tag != b.tag and not (is_union and kind == "any"):  # x<1 or x>2
        return False
    if kind != "any" or len(a.items) > MAX_UNORDERED or a.count_leaves() > MAX_LEAVES:
        return all(map(_same_value, a.items, b.items))
    rest = list(b.items)
    for item in a.items:
        match = next((k for k, other in enumerate(rest) if _same_value(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_in_all_trials(answer, gold):
    """Tell whether two answers have values, and equal ones whatever numbers the letters stand for."""
    for trial in range(TRIALS):
        (a, a_letters, a_branch), (b, b_letters, b_branch) = _value(answer, trial), _value(gold, trial)
        if a is None or b is None:
            return trial > 0
        if not (trial and (a_branch or b_branch) or _same_value(a, b)):  # complex roots: only in the first trial
            return False
        if not (a_letters or b_letters):
            break
    return True


def is_equivalent(answer, gold):
    """Tell whether two answers, in LaTeX or plain text and in any order, are the same. Raises nothing.

    An answer equals itself, unless it consists of spaces and dollar signs only. What is not a str equals nothing.
    """
    try:
        if not isinstance(answer, str) or not isinstance(gold, str):
            return False
        answer, gold = sorted((answer.strip(), gold.strip()))
        longest = max(len(answer), len(gold))
        if longest > MAX_CHARS:
            return answer == gold or longest <= MAX_BOX and "".join(answer.split()) == "".join(gold.split())
        if _tokens(answer) == _tokens(gold):
            return _tokens(answer) != () or answer == gold and answer.replace("$", "").strip() != ""
        if _same_in_all_trials(answer, gold):
            return True
        for a, b in ((answer, gold), (gold, answer)):  # 100,200,300 may also be a list, if b is one
            if "," in a and not a.strip(DIGITS + ",") and ",0" not in a and b.strip(DIGITS + ","):
                return _same_in_all_trials(a.replace(",", ", "), b)
        return "\\" in answer + gold and _words(answer) == _words(gold) != ""
    except (OverflowError, RecursionError):  # an integer beyond all floats; a caller that is already deep
        return False


def math_reward(response, gold):
    """Return 1.0 if the last box of `response` is equivalent to `gold`, else 0.0."""
    try:
        return float(is_equivalent(extract_answer(response), gold))
    except RecursionError:  # not even these calls fit below the caller
        return 0.0
