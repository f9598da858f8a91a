r"""Rule-based reward for mathematical answers: 1 if the last \boxed{...} equals the gold answer.

An answer is cut into tokens and parsed by recursive descent into a number or a Form (list, tuple, interval, matrix,
union, relation, unit, text); Forms are compared part by part. Numbers are exact Fractions, and floats or complex after
a root, pi or e. A letter stands for fixed generic numbers of either sign and order, so (x+1)^2 is x^2+2x+1 and
\sqrt{x^2} is |x| but not x. What has no value must have the same tokens, or the same words.

Accepted: any spelling of a fraction, decimal, mixed number, power or root; 1,000 for 1000; a name in front (x = 5
for 5); any order in lists, sets and unions; a \pm b for a+b, a-b; terms moved across "="; x > 2 for (2,\infty);
units and %, unless both answers have a unit and the units differ.
Refused: rounded decimals, 50\% for 0.5, a tuple for a list, 12_5 for 12, a repeated list element, arithmetic with
infinity, a longer text that contains the answer.
Limits: answers of over MAX_CHARS characters, MAX_DEPTH levels, MAX_STEPS atoms or numbers over MAX_BITS bits are
compared as text, lists of over MAX_UNORDERED elements or MAX_LEAVES parts in order; a box of over MAX_BOX characters
is not read. \log has base 10, 1/2x is (1/2)x, up to three letters are a product, any plural after a number is a unit,
and (y,x)=(2,4) names (2,4).
"""

import cmath
import math
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_CHARS, MAX_DEPTH, MAX_STEPS, MAX_BITS = 1000, 20, 500, 8000
MAX_UNORDERED, MAX_LEAVES, MAX_BOX = 40, 200, 100_000
TOLERANCE = 1e-11  # relative, between values that are not both rational
TRIALS = 4  # sets of generic numbers for the letters

EXACT = (int, Fraction)
DIGITS = "0123456789"
SUPERSCRIPTS = {char: f"\1{plain}\2" for char, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", DIGITS + "-")}
UNICODE = str.maketrans(SUPERSCRIPTS | {
    "−": "-", "–": "-", "×": "*", "÷": "/", "·": "*", "π": r"\pi ", "√": r"\sqrt ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", "°": " ", "∞": r"\infty ", "±": r"\pm ", "′": "'", "θ": r"\theta ",
    "α": r"\alpha ", "\u00a0": " ", "\u2009": " ", "€": "", "£": "", "¢": "", "ℝ": r"(-\infty,\infty)"})
REWRITES = [  # in this order
    ("\\\\", "\\cr "), ("\\cr \\cr ", "\\cr "), ("\2\1", ""), ("\1", "^{"), ("\2", "}"), (r"\! ", ""), (r"\!", ""),
    (r"\,", " "), (r"\;", " "), (r"\ ", " "), (r"\text{,}", ","), ("{,}", ","), ("{:}", ":"), ("^ ", "^"), (" ^", "^"),
    (r"^{\circ}", " "), (r"^\circ", " "), ("**", "^"), ("<=", "≤"), (">=", "≥"), ("'", r"^\prime "), (r"\left.", ""),
    (r"\right.", ""), (r"\bar", r"\overline"), (".}", "}"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\mathbb R", r"(-\infty,\infty)")]
REWRITES += [(f"\\{edge}{{{kind}}}", f"\\{edge}matrix ") for edge in ("begin", "end")
             for kind in ("pmatrix", "bmatrix", "matrix", "array")]
DROPPED = {" ", "\n", "\0"} | set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle quad qquad degree angle boxed fbox framebox hline "
    "$ % : ( ) [ ]".split())
TEXT = set("text mbox textbf textit textrm mathrm mathbf mathit rm bf operatorname".split())
ALIASES = dict(pair.split("@") for pair in (
    r"dfrac@\frac tfrac@\frac cfrac@\frac dbinom@\binom tbinom@\binom cdot@* times@* ast@* div@/ le@≤ leq@≤ "
    r"leqslant@≤ ge@≥ geq@≥ geqslant@≥ lt@< gt@> ne@≠ neq@≠ in@∈ equiv@≡ colon@: cup@∪ pm@± mp@∓ "
    r"emptyset@∅ varnothing@∅ lbrace@\{ rbrace@\} lbrack@[ rbrack@] langle@( rangle@) lvert@| rvert@| vert@| "
    r"lg@\log").split())
FUNCTIONS = {f"\\{name}": getattr(cmath, name) for name in "sin cos tan exp sinh cosh tanh".split()} | {
    "\\arcsin": cmath.asin, "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\ln": cmath.log, "\\log": cmath.log10,
    "\\cot": lambda z: 1 / cmath.tan(z), "\\sec": lambda z: 1 / cmath.cos(z), "\\csc": lambda z: 1 / cmath.sin(z)}
CONSTANTS = {"\\pi": math.pi, "e": math.e, "i": 1j}
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
RELATIONS = set("=<>≤≥≠∈≡:") | {"\\to", "\\mid", "\\setminus", "\\subset", "\\mapsto"}
MIRROR = str.maketrans("<>≤≥", "><≥≤")
CLOSERS = {"(": ")]", "[": ")]", "{": "}", "|": "|", "\\{": ["\\}"], "\\lfloor": ["\\rfloor"], "\\lceil": ["\\rceil"]}
FACTORS = {"(", "[", "{", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil", "\\pi", *FUNCTIONS, *LETTERS}
NOT_NAMES = {"\\frac", "\\sqrt", "\\binom", "\\infty", *FUNCTIONS, *CONSTANTS}


@dataclass
class Form:
    """What is not one number. Computing with it raises TypeError."""

    kind: str  # "any" (order: list, set, union), "row" (tuple, interval, matrix), "relation", "unit" or "text"
    tag: object  # brackets, relation signs, unit or text: equal Forms have equal tags
    items: list
    name: str = ""  # what a relation such as x=5 names, if it does, or "unit"
    solution: object = None  # what may stand alone: 5 of x=5, 5 of 5 cm
    has_letter: bool = True  # 0=1 has none


INFINITY, MINUS_INFINITY = Form("text", "\\infty", []), Form("text", "-\\infty", [])


def extract_answer(response):
    r"""Return the content of the last \boxed, \fbox or \framebox of `response`, or None.

    The last box is the one that begins last: of nested boxes, the inner one. A box without braces holds the text up
    to the next space or $. None: no box, the last one does not close within MAX_BOX characters, or `response` is not a
    str. Raises nothing.
    """
    if not isinstance(response, str):
        return None
    start = max(map(response.rfind, ("\\boxed", "\\fbox", "\\framebox")))
    rest = response[start:start + MAX_BOX].partition("ox")[2].removeprefix("ed").lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        return next(iter(rest.partition("$")[0].split(maxsplit=1)), None)
    visible = rest.replace("\\\\", "  ").replace("\\{", "  ").replace("\\}", "  ")  # escaped braces are text
    depth = end = 0
    for piece in visible.split("}")[:-1]:
        depth += piece.count("{") - 1
        end += len(piece) + 1
        if depth == 0:
            return rest[1:end - 1]
    return None


def _run(text, start, characters):
    """Return where the run of `characters` that begins at `start` ends."""
    while text[start] in characters:
        start += 1
    return start


def _number(text, start, in_brackets):
    r"""Read 12, 1,000, 1 000, .5, 0.\overline{3} or 5.3e-9: return its exact value and its end."""
    end = _run(text, start, DIGITS)
    digits, mark, decimals, period = text[start:end], text[end], "", ""
    may_group = mark == " " or mark == "," and text[start - 1] != "," and not in_brackets
    if may_group and len(digits) < 4 and digits[:1] > "0" and _run(text, end + 1, DIGITS) == end + 4:
        groups = text[start:_run(text, start, DIGITS + mark)].rstrip(mark).split(mark)
        if all(len(group) == 3 for group in groups[1:]):
            digits, end = "".join(groups), start + len(mark.join(groups))
    if text[end] == ".":
        decimals, end = text[end + 1:_run(text, end + 1, DIGITS)], _run(text, end + 1, DIGITS)
    value = Fraction(int(digits + decimals or "0"), 10 ** len(decimals))
    if text.startswith("\\overline{", end):
        period = text[end + 10:_run(text, end + 10, DIGITS)]
        if period and text[end + 10 + len(period)] == "}":
            value += Fraction(int(period), 10 ** len(decimals) * (10 ** len(period) - 1))
            end += len(period) + 11
    stop = _run(text, end + 1 + (text[end + 1] in "+-"), DIGITS)
    if text[end] in "eE" and text[stop - 1] in DIGITS:
        if stop - end > 4:
            return text[start:stop], stop  # too large to evaluate
        value, end = value * Fraction(10) ** int(text[end + 1:stop]), stop
    return (value if value.denominator > 1 else value.numerator), end


def _is_word(word, in_text, last):
    """Tell whether a run of letters after the token `last` is a word or unit rather than a product of letters."""
    after_value = not isinstance(last, str) or last in ("}", ")", "/", "\\pi") or last[:1] == '"'
    return (in_text and len(word) > 1 or len(word) > 3 or word in ("no", "II", "III", "IV")
            or len(word) == 3 and (word.istitle() or not set(word).isdisjoint("eou"))
            or after_value and word.lower() in UNITS and (in_text or len(word) > 1 and word != "mg"))


@lru_cache(maxsize=4096)
def _tokens(text):
    """Cut `text` into a tuple of numbers and strings; a word is a string that begins with a "."""
    text = text if text.isascii() else text.translate(UNICODE)
    for old, new in REWRITES:
        text = text.replace(old, new)
    end = " \t\r\n$,;:\\" + "." * (".." not in text)  # a full stop, but not 0.333...
    text = text.removesuffix("\\cr ").strip().rstrip(end) + "\0\0"
    tokens, i, text_end, brackets = [], 0, -1, 0
    while i < len(text) - 2:
        char, stop, last = text[i], i + 1, tokens[-1] if tokens else ""
        while (char.isalpha() or char == "\\") and text[stop].isalpha():
            stop += 1
        name = text[i:stop]
        if char in DIGITS or char == "." and text[stop] in DIGITS:
            one_digit = char != "." and (last == "\\frac" or tokens[-2:-1] == ["\\frac"] and last != "{")  # \frac12
            value, stop = (int(char), stop) if one_digit else _number(text, i, brackets > 0)
            tokens.append(value)
        elif char.isalpha():
            if name.lower() in PLAIN:
                tokens.append(PLAIN[name.lower()])
            elif _is_word(name, i < text_end, last):
                tokens.append('"' + name.lower())
                stop += text[stop] == "."  # sq. cm
            else:
                tokens.extend(name)
        elif char == "\\":
            stop = max(stop, i + 2)
            name = text[i + 1:stop]
            if name in TEXT:
                start = _run(text, stop, " ")
                close = text.find("}", start)
                if text[start] == "{" and "{" not in text[start + 1:close]:
                    stop, text_end = start + 1, close
            elif name == "cr":
                if text.startswith("[", stop + 1):
                    stop = text.find("]", stop) + 1 or stop  # \\[4pt]
                tokens.append("\\cr")
            elif name not in DROPPED:
                tokens.append(ALIASES.get(name, "\\" + name))
                brackets += (name == "{") - (name == "}")
        elif char not in " \t\r\n\v\f$%~" and i != text_end:
            tokens.append(char)
            brackets += (char in "([") - (char in ")]")
        i = stop
    return tuple(token for k, token in enumerate(tokens) if token != "," or tokens[k - 1] != ",")


def _words(text):
    r"""Return the lower-case letters of an answer that consists of words, as in \text{II only}, else an empty str."""
    for name in TEXT:
        text = text.replace("\\" + name + "{", "")
    text = "".join(char for char in text.replace("\\ ", "") if char not in ' {}$~."')
    return text.casefold() if len(text) > 1 and text.isalpha() else ""


def _checked(value):
    """Return a number if it is not too large, without a part that is rounding noise."""
    if isinstance(value, EXACT):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise OverflowError("number too large")
        return value.numerator if value.denominator == 1 else value
    if not cmath.isfinite(value):
        raise OverflowError("not finite")
    if isinstance(value, complex):
        noise = 1e-15 * abs(value)
        return complex(*(x if abs(x) > noise else 0.0 for x in (value.real, value.imag)))
    return value


def _divide(top, bottom):
    return _checked(Fraction(top, bottom) if isinstance(top, EXACT) and isinstance(bottom, EXACT) else top / bottom)


@lru_cache(maxsize=1024, typed=True)  # typed: 5 is exact, 5.0 is not
def _factorial(value):
    small = isinstance(value, int) and 0 <= value < 900
    return math.factorial(value) if small else math.gamma(value + 1)


def _binomial(n, k):
    return _divide(_factorial(n), _checked(_factorial(k) * _factorial(n - k)))


@lru_cache(maxsize=4096)
def _generic(name, trial):
    """Return the number that `name` stands for: trial 0 all positive, 1 all negative, then reversed, signs mixed."""
    code = zlib.crc32(name.encode("utf-8", "replace"))
    size = code % 99991 + 50021  # that is, from 0.5 to 1.5
    negative = trial == 1 or trial > 1 and code >> trial & 1
    return Fraction((200006 - size if trial > 1 else size) * (-1 if negative else 1), 100003)


class _Parser:
    """Recursive descent from tokens to a number or a Form, with the letters of one trial."""

    def __init__(self, tokens, trial):
        self.tokens, self.trial = (*tokens, "", "", ""), trial
        self.position = self.depth = self.steps = self.bars = self.letters = 0
        self.upper, self.has_sign, self.has_branch = True, False, False

    def accept(self, tokens):
        """Step over the next token and return it, if it is one of `tokens`."""
        token = self.tokens[self.position]
        if not token or not isinstance(token, str) or token not in tokens:
            return ""
        self.position += 1
        return token

    def elements(self, expand=True):
        r"""Read elements between commas; with `expand`, an element with \pm gives two."""
        items, outer = [], (self.upper, self.has_sign)
        while not items or self.accept(","):
            start = self.position
            if expand:
                self.upper, self.has_sign = True, False
            items.append(self.relation())
            if expand and self.has_sign:
                self.position, self.upper = start, False
                items.append(self.relation())
        if expand:
            self.upper, self.has_sign = outer
        named = [item for item in items if isinstance(item, Form) and item.name]
        if len({item.name for item in named}) > 1:  # x=1, y=2 is not 1, 2
            for item in named:
                item.name = ""
        return items

    def relation(self):
        """Read unions between relation signs; note what x=5, x in [0,1] or 0<x<=1 says about its name."""
        start, items, names, tag = self.position, [self.union()], [], ""
        while mark := self.accept(RELATIONS):
            names.append(_name(self.tokens[start:self.position - 1]))
            start, tag = self.position, tag + mark
            items.append(self.union())
        if not tag:
            return items[0]
        names.append(_name(self.tokens[start:self.position]))
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
        while self.tokens[self.position] in ("+", "-", "±", "∓"):
            value = _checked(value + self.product())  # which reads the sign
        while isinstance(token := self.tokens[self.position], str) and (units or token[:1] == '"'):
            word = token.strip('"')
            singular = word.removesuffix("s")
            is_plural = not units and len(word) > 3 and word != singular and word not in NOT_UNITS
            if not is_plural and word not in UNITS and singular not in UNITS:
                break
            units.append(UNITS.get(word) or UNITS.get(singular, word))
            self.position += 1
            units += [str(self.atom(is_argument=True))] if self.accept("^") else []
            self.accept("*")
        return Form("unit", sorted(units), [], "unit", value) if units else value

    def product(self):
        value = self.operand()
        while True:
            mark = self.accept("*/")
            if not mark and not self.at_factor():
                return value
            right = self.operand()
            value = _divide(value, right) if mark == "/" else _checked(value * right)

    def at_factor(self):
        """Tell whether the next token multiplies what precedes it, as in 2x or 2^3 5^2, but not in 2 3."""
        token = self.tokens[self.position]
        if not isinstance(token, str):
            return (isinstance(self.tokens[self.position - 1], str)
                    or self.tokens[self.position - 2] == "^" == self.tokens[self.position + 1])
        return token.isalpha() or token in FACTORS or token == "|" and not self.bars

    def operand(self):
        """Read signs, an atom and its powers and factorial."""
        negative = False
        while sign := self.accept("+-±∓"):
            self.has_sign |= sign in "±∓"
            negative ^= sign == ("∓" if self.upper else "±") or sign == "-"
        if self.accept(["\\infty"]):
            return MINUS_INFINITY if negative else INFINITY
        value = self.atom()
        if self.tokens[self.position] == "_" and isinstance(value, int):
            value = self.letter(str(value))  # 12_5 is a name: digits in base 5
        while mark := self.accept("^!"):
            if mark == "^":
                minus = self.accept("+-") == "-"
                exponent = self.atom(is_argument=True)
                value = self.power(value, -exponent if minus else exponent)
            else:
                value = _checked(_factorial(value))
            if self.tokens[self.position] == mark:
                raise ValueError("double power or factorial")
        return -value if negative else value

    def power(self, base, exponent):
        """Return base**exponent; note a complex root, of which another spelling may have another branch."""
        if base == 0 and not (isinstance(exponent, EXACT) and exponent > 0):
            raise ZeroDivisionError("0 to a power that is not positive")
        if isinstance(base, EXACT) and isinstance(exponent, int):
            if max(map(abs, base.as_integer_ratio())).bit_length() * abs(exponent) > MAX_BITS:
                raise OverflowError("power too large")
            return _checked(Fraction(base) ** exponent)
        value = _checked(base ** exponent)
        if value == 0 != base:
            raise OverflowError("underflow")
        self.has_branch |= isinstance(value, complex) and not isinstance(exponent, int)
        return value

    def atom(self, is_argument=False):
        r"""Read a number, letter, command with its arguments or group; the argument of a command is no mixed number."""
        self.depth += 1
        self.steps += 1
        if self.depth > MAX_DEPTH or self.steps > MAX_STEPS:
            raise ValueError("nested too deep or too long")
        token = self.tokens[self.position]
        self.position += 1
        if not isinstance(token, str):
            value = token if is_argument or isinstance(token, Fraction) else self.mixed(token)
        elif token in CLOSERS:
            value = self.group(token)
        elif token == "\\beginmatrix":
            value = self.matrix()
        elif token == "\\frac":
            value = _divide(self.atom(is_argument=True), self.atom(is_argument=True))
        elif token == "\\binom":
            value = _binomial(self.atom(is_argument=True), self.atom(is_argument=True))
        elif token == "\\sqrt":
            index = self.group("[") if self.accept("[") else 2
            value = self.atom(is_argument=True)
            odd = index % 2 and not isinstance(value, complex) and value < 0  # real, not principal
            value = self.power(-value if odd else value, _divide(1, index)) * (-1 if odd else 1)
        elif token in FUNCTIONS:
            value = self.function(token)
        elif token[:1] == '"':
            while self.tokens[self.position][:1] == '"':
                token += self.accept(self.tokens[self.position])
            value = Form("text", token, [])
        elif token == "∅":
            value = Form("any", "", [])
        elif token in CONSTANTS and self.tokens[self.position] != "_":
            value = CONSTANTS[token]
        elif token.isalpha() or token in LETTERS:
            value = self.letter(token)
        else:
            raise ValueError("no value")
        self.depth -= 1
        return value

    def mixed(self, whole):
        r"""Return a mixed number, 1\frac12 or 1 1/2, if `whole` begins one, else `whole`."""
        start, letters, part = self.position, self.letters, 0
        top, mark, bottom = self.tokens[start:start + 3]
        if top == "\\frac":
            part = self.atom(is_argument=True)
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
        items = [] if self.tokens[self.position] == "\\}" else self.elements(token == "\\{")
        self.bars -= token == "|"
        if token == "{" and (mark := self.accept(["\\over", "\\choose"])):
            items = [(_divide if mark == "\\over" else _binomial)(items[0], self.sum())]
        ends = token + self.accept(CLOSERS[token])
        if ends == token:
            raise ValueError("unclosed bracket")
        if len(items) != 1 or ends in ("(]", "[)"):
            return Form("any", "", items) if token in ("{", "\\{") else Form("row", ends, items)
        value = items[0]
        if token == "\\{" and isinstance(value, Form) and value.kind == "any":
            return Form("any", "", items)  # {5} is 5, but {∅} is not ∅
        if token == "|":
            return abs(value)
        if token in ("\\lfloor", "\\lceil"):
            rounded = math.floor if token == "\\lfloor" else math.ceil
            # With letters, any function will do that distinguishes the two and gives equal values for equal arguments.
            return _generic(f"{token} {complex(value):.9g}", self.trial) if self.letters else rounded(value)
        return value

    def matrix(self):
        if self.accept("{"):  # the column types of an array
            self.position = self.tokens.index("}", self.position) + 1
        rows = [Form("row", "", [])]
        while not self.accept(["\\endmatrix"]):
            rows[-1].items.append(self.relation())
            if self.accept(["\\cr"]) and self.tokens[self.position] != "\\endmatrix":
                rows.append(Form("row", "", []))
            self.accept("&")
        return Form("row", "matrix", rows)

    def letter(self, name):
        """Read a subscript or the argument of an unknown function, as a part of the name; return its number."""
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
        base, power = math.e, 1
        if name == "\\log" and self.accept("_"):
            name, base = "\\ln", self.atom(is_argument=True)
        if self.accept("^"):
            power = self.atom(is_argument=True)
        if power == -1 and "\\arc" + name[1:] in FUNCTIONS:
            name, power = "\\arc" + name[1:], 1
        if self.tokens[self.position] in ("(", "[", "{"):
            value = self.atom()
        else:
            value = self.operand()
            while self.tokens[self.position] not in FUNCTIONS and self.at_factor():
                value = _checked(value * self.operand())
        result = _checked(FUNCTIONS[name](complex(value)) / cmath.log(base))
        if not isinstance(value, complex):
            self.has_branch |= result.imag != 0
            result = result if result.imag else result.real
        return self.power(result, power)


def _name(tokens):
    """Return `tokens` as text if they only name something: x, x_1, f(x), (x,y), AB, Area; else an empty str."""
    first = next((token for token in tokens if token not in ("(", "{")), 0)
    is_name = isinstance(first, str) and first not in ("e", "i") and all(
        before in ("(", ",", "_", "{") if not isinstance(token, str) else
        token.isalpha() or token in "_{}()," or token[0] == '"' or token[0] == "\\" and token not in NOT_NAMES
        for before, token in zip(("", *tokens), tokens))
    return " ".join(map(str, tokens)) if is_name else ""


@lru_cache(maxsize=4096)
def _value(text, trial):
    """Return the number or Form that `text` stands for, or None; whether it has letters; whether complex roots."""
    parser = _Parser(_tokens(text), trial)
    try:
        items = parser.elements()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None, False, False
    if parser.tokens[parser.position] != "":
        return None, False, False
    return items[0] if len(items) == 1 else Form("any", "", items), parser.letters > 0, parser.has_branch


def _close(a, b):
    """Tell whether two numbers are equal."""
    if isinstance(a, EXACT) and isinstance(b, EXACT):
        return a == b
    for value in (a, b):  # an exact value with a long denominator is a letter or a rounded decimal
        if isinstance(value, Fraction) and value.denominator > 10**6 and value.denominator % 100003:
            return False
    a, b = complex(a), complex(b)
    noise = 1e-15 * max(abs(a), abs(b))
    return all(abs(p - q) <= noise + TOLERANCE * max(abs(p), abs(q))
               for p, q in ((a.real, b.real), (a.imag, b.imag)))


def _leaves(value):
    """Return how many numbers, names and texts a value consists of."""
    return sum(map(_leaves, value.items or [value.solution])) if isinstance(value, Form) else 1


def _same(a, b):
    """Tell whether two numbers or Forms are equal."""
    kinds = [form.kind if isinstance(form, Form) else "number" for form in (a, b)]
    if kinds == ["number", "number"]:
        return _close(a, b)
    if kinds[0] != kinds[1]:
        form, other = (a, b) if kinds[0] in ("relation", "unit") else (b, a)
        return getattr(form, "name", "") != "" and _same(form.solution, other)
    if a.kind == "unit":
        return a.tag == b.tag and _same(a.solution, b.solution)
    if a.kind == "relation":
        if a.name and a.name == b.name:
            return _same(a.solution, b.solution)
        if a.tag == b.tag == "=" and a.has_letter and b.has_letter and not any(
                isinstance(item, Form) for item in a.items + b.items):
            left, right = a.items[0] - a.items[1], b.items[0] - b.items[1]
            return left != 0 and (_close(left, right) or _close(left, -right))
    is_union = any(all(isinstance(item, Form) and item.kind == "relation" for item in form.items) for form in (a, b))
    if len(a.items) != len(b.items) or a.tag != b.tag and not (is_union and a.kind == "any"):  # x<1 or x>2
        return False
    if a.kind != "any" or len(a.items) > MAX_UNORDERED or _leaves(a) > MAX_LEAVES:
        return all(map(_same, a.items, b.items))
    rest = list(b.items)
    for item in a.items:
        match = next((k for k, other in enumerate(rest) if _same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _equal(answer, gold):
    """Tell whether two answers have the same value in all trials."""
    for trial in range(TRIALS):
        (a, a_letters, a_branch), (b, b_letters, b_branch) = _value(answer, trial), _value(gold, trial)
        if a is None or b is None:
            return trial > 0
        if not (trial and (a_branch or b_branch) or _same(a, b)):
            return False
        if not (a_letters or b_letters):
            return True
    return True


def is_equivalent(answer, gold):
    """Tell whether two answers, given as LaTeX or plain text, are the same (True or False).

    Symmetric; True for any answer and itself unless nothing is left of it without spaces and dollar signs; False if
    one of them is not a str. Raises nothing.
    """
    try:
        if not isinstance(answer, str) or not isinstance(gold, str):
            return False
        answer, gold = sorted((answer.strip(), gold.strip()))
        if max(len(answer), len(gold)) > MAX_CHARS:
            short = max(len(answer), len(gold)) <= MAX_BOX
            return answer == gold or short and "".join(answer.split()) == "".join(gold.split())
        if not _tokens(answer) or _tokens(answer) == _tokens(gold):
            return _tokens(answer) != () or answer == gold and answer.replace("$", "").strip() != ""
        if _equal(answer, gold):
            return True
        for a, b in ((answer, gold), (gold, answer)):  # 100,200,300 may also be a list, if b is one
            if "," in a and not a.strip(DIGITS + ",") and ",0" not in a and b.strip(DIGITS + ","):
                return _equal(a.replace(",", ", "), b)
        return "\\" in answer + gold and _words(answer) == _words(gold) != ""
    except (OverflowError, RecursionError):  # an integer beyond all floats; a caller that is already deep
        return False


def math_reward(response, gold):
    """Return 1.0 if the last box of `response` is equivalent to `gold`, else 0.0."""
    try:
        answer = extract_answer(response)
        return float(answer is not None and is_equivalent(answer, gold))
    except RecursionError:  # not even these calls fit below the caller
        return 0.0
