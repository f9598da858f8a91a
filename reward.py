r"""Rule-based reward for mathematical answers: 1 if the last \boxed{...} equals the gold answer.

An answer is cut into tokens and parsed by recursive descent into a number or a form (list, tuple,
interval, matrix, union, relation); forms are compared part by part. Numbers are exact Fractions,
and floats or complex after a root, pi or e. A letter stands for fixed generic numbers, positive in
trial 0 and negative in trial 1, so (x+1)^2 is x^2+2x+1, and \sqrt{x^2} is |x| but not x (later
trials count where both sides are real). What has no value must have the same tokens.

Accepted: any spelling of a fraction, decimal, mixed number or power; 1,000 for 1000; a name in
front (x = 5 for 5); any order in lists, sets and unions; a \pm b for a+b, a-b (the signs of one
element change together); terms moved across "="; units and %, unless two units differ.
Refused: rounded decimals, 50\% for 0.5, a tuple for a list, 12_5 for 12, a repeated list element.
Limits: over MAX_CHARS characters, nested over MAX_DEPTH deep, over MAX_STEPS atoms or with numbers
over MAX_BITS bits, only the text is compared; over MAX_UNORDERED elements, only in order. \log
has base 10, 1/2x is (1/2)x, infinity is a letter, and up to three letters are mostly a product.
"""

import cmath
import math
import zlib
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace as Form  # kind: any (order), row, rel, unit, text; tag; items

MAX_CHARS, MAX_DEPTH, MAX_STEPS, MAX_BITS = 1000, 20, 2000, 8000
MAX_UNORDERED, MAX_BRACES = 40, 100_000
TOLERANCE = 1e-11  # relative, between values that are not both rational
DIGITS = "0123456789"
REWRITES = [pair.split("|") for pair in (
    r"\\|\cr ", r"\! |", r"\!|", r"\,| ", r"{,}|,", r"{:}|:", r"^{\circ}| ", r"^\circ| ",
    r"**|^", r"<=|≤", r">=|≥", r"'|^\prime ", r"\left.|", r"\right.|")]
UNICODE = str.maketrans(dict(zip("−–×÷·π√½¼¾°∞²³±′θα\u00a0\u2009", (
    r"-|-|*|/|*|\pi |\sqrt |\frac12 |\frac14 |\frac34 | |\infty |^2|^3|\pm |'|\theta |\alpha "
    r"| | ").split("|"))))
DROPPED = set("left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle quad qquad degree "
              "boxed fbox framebox hline $ % ; : ( ) [ ]".split()) | {" ", "\n", "\0"}
TEXT = set("text mbox textbf textit textrm mathrm mathbf mathit mathbb rm bf operatorname".split())
ALIASES = dict(pair.split("@") for pair in (
    r"dfrac@\frac tfrac@\frac cfrac@\frac dbinom@\binom cdot@* times@* ast@* div@/ le@≤ leq@≤ "
    r"leqslant@≤ ge@≥ geq@≥ geqslant@≥ lt@< gt@> ne@≠ neq@≠ in@∈ approx@≈ equiv@≡ pmod@: bmod@: "
    r"mod@: colon@: to@→ rightarrow@→ cup@∪ pm@± mp@∓ emptyset@∅ varnothing@∅ lbrace@\{ rbrace@\} "
    r"lbrack@[ rbrack@] langle@( rangle@) lvert@| rvert@| vert@| lg@\log bar@\overline").split())
FUNCTIONS = {"\\" + name: getattr(cmath, name) for name in "sin cos tan exp sinh cosh tanh".split()}
FUNCTIONS |= {
    "\\arcsin": cmath.asin, "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\ln": cmath.log,
    "\\log": cmath.log10, "\\cot": lambda z: 1 / cmath.tan(z), "\\sec": lambda z: 1 / cmath.cos(z),
    "\\csc": lambda z: 1 / cmath.sin(z)}
PLAIN = {name[1:]: name for name in FUNCTIONS} | {  # names also read without backslash
    "sqrt": "\\sqrt", "pi": "\\pi", "infinity": "\\infty", "and": ",", "or": ","}
CONSTANTS = {"\\pi": math.pi, "e": math.e, "i": 1j}
SCALES = {'"hundred': 100, '"thousand': 10**3, '"million': 10**6, '"billion': 10**9}
UNITS = {name: group.split()[0] for group in (
    "cm centimeter centimetre|mm millimeter|km kilometer kilometre|m meter metre|in inch inches|ft "
    "foot feet|yd yard|mi mile|kg kilogram|g gram|mg|lb pound|oz ounce|s sec second|min minute|h "
    "hr hour|day|week|month|year|l liter litre|ml milliliter|^ degree deg percent unit|rad radian"
    "|dollar|cent|2 square sq|3 cubic|/ per|mph|people|k|c|f|n|j|w|v|hz|erg").split("|")
    for name in group.split()}
RELATIONS = set("=<>≤≥≠∈≈≡:→") | {"\\setminus", "\\subset", "\\subseteq", "\\mid", "\\mapsto"}
LEVELS = dict.fromkeys(RELATIONS, 1) | {  # how tightly an operator binds; 2x binds like 2*x
    "∪": 2, "+": 3, "-": 3, "±": 3, "∓": 3, "*": 4, "/": 4}
MIRROR = str.maketrans("<>≤≥:→∈", "><≥≤\0\0\0")  # 1<x is x>1, but 1:2 is not 2:1
CLOSERS = {"(": ")]", "[": ")]", "{": "}", "|": "|", "\\{": ["\\}"],
           "\\lfloor": ["\\rfloor"], "\\lceil": ["\\rceil"]}
UNIT_END = {",", ")", "]", "\\}", "=", "*", "&", "\\cr", "\\end", "\\endv"}
NOT_NAMES = {"\\frac", "\\sqrt", "\\binom", *FUNCTIONS, *CONSTANTS}
NO_VALUE = {"\\" + name for name in (  # commands that do not stand for one number
    "overline dot ddot ldots dots cdots implies iff Rightarrow lim int sum prod land lor neg cap "
    "circ forall exists perp parallel min max gcd det choose").split()}
NOT_FACTORS = {"\\}", "\\rfloor", "\\rceil", "\\end", "\\endv", "\\cr", "\\{"} | RELATIONS


def extract_answer(response):
    r"""Return the content of the last \boxed, \fbox or \framebox of `response`, or None.

    The last box is the one that begins last: of nested boxes, the inner one. A box without braces
    holds the text up to the next space or $. None: no box, the last one never closes or holds over
    MAX_BRACES closing braces, or `response` is not a str. Raises nothing.
    """
    if not isinstance(response, str):
        return None
    start, name = max((response.rfind(box), box) for box in ("\\boxed", "\\fbox", "\\framebox"))
    rest = response[start + len(name):].lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        return next(iter(rest.split("$")[0].split(maxsplit=1)), None)
    # Escaped braces are text: hide them behind as many spaces.
    visible = rest.replace("\\\\", "  ").replace("\\{", "  ").replace("\\}", "  ")
    depth = end = 0
    for piece in visible.split("}", MAX_BRACES)[:-1]:
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
    whole, mark, decimals = text[start:end], text[end], 0
    if mark == " " or mark == "," and text[start - 1] != "," and not in_brackets:
        groups = text[start:_run(text, start, DIGITS + mark)].rstrip(mark).split(mark)
        if len(groups[0]) < 4 and groups[0][:1] > "0" and all(len(g) == 3 for g in groups[1:]):
            whole, end = "".join(groups), start + len(mark.join(groups))
    value = int(whole or "0")
    if text[end] == ".":
        stop = _run(text, end + 1, DIGITS)
        decimals = stop - end - 1
        value, end = Fraction(int(whole + text[end + 1:stop] or "0"), 10**decimals), stop
    if text.startswith("\\overline{", end):
        stop = _run(text, end + 10, DIGITS)
        if text[stop] == "}" and text[stop - 1] != "{":
            period = 10**decimals * (10**(stop - end - 10) - 1)
            value, end = value + Fraction(int(text[end + 10:stop]), period), stop + 1
    stop = _run(text, end + 1 + (text[end + 1] in "+-"), DIGITS)
    if text[end] in "eE" and text[stop - 1] in DIGITS:
        if stop - end > 5 or abs(int(text[end + 1:stop])) > 999:
            return text[start:stop], stop  # too large to evaluate
        value, end = value * Fraction(10) ** int(text[end + 1:stop]), stop
    return (value if value.denominator > 1 else value.numerator), end


@lru_cache(maxsize=4096)
def _tokens(text):
    """Cut `text` into a tuple of numbers and strings; a word is a string that begins with a "."""
    text = text if text.isascii() else text.translate(UNICODE)
    for old, new in REWRITES:
        text = text.replace(old, new)
    text = text.strip().rstrip(" \t\r\n$.,;:") + "\0\0"
    tokens, i, text_end, brackets = [], 0, -1, 0
    while i < len(text) - 2:
        char, stop, count, last = text[i], i + 1, len(tokens), tokens[-1] if tokens else ""
        if char in DIGITS or char == "." and text[stop] in DIGITS:
            one_digit = char != "." and (  # \frac12 is 1/2
                last == "\\frac" or tokens[-2:-1] == ["\\frac"] and last != "{")
            value, stop = (int(char), stop) if one_digit else _number(text, i, brackets > 0)
            tokens.append(value)
        elif char.isalpha() or char == "\\":
            while text[stop].isalpha():
                stop += 1
            stop = max(stop, i + 2) if char == "\\" else stop
            name = text[i + (char == "\\"):stop]
            word, in_text = name.lower(), i < text_end
            after_value = not isinstance(last, str) or last in ("}", ")", "/") or last[:1] == '"'
            if char == "\\" and name in TEXT:
                stop = _run(text, stop, " ")
                close = text.find("}", stop)
                if text[stop] == "{" and "{" not in text[stop + 1:close]:
                    stop, text_end = stop + 1, close
            elif char == "\\" and name in ("begin", "end"):
                close = text.find("}", stop) + 1
                kind, stop = text[stop:close], max(stop, close)
                if name == "begin" and kind == "{array}":
                    stop = max(stop, text.find("}", stop) + 1)  # the column types
                tokens.append("\\" + name + "v" * ("v" in kind))
            elif char == "\\":
                tokens.extend(() if name in DROPPED else [ALIASES.get(name, "\\" + name)])
            elif word in PLAIN:
                tokens.append(PLAIN[word])
            elif (in_text and len(word) > 1 or len(word) > 3 or word == "no"
                  or len(word) == 3 and (name.istitle() or set(word) & set("eou"))
                  or after_value and word in UNITS and (in_text or len(word) > 1 and word != "mg")):
                tokens.append('"' + word)
            else:
                tokens.extend(name)
        elif char not in " \t\r\n\v\f$%~" and i != text_end:
            tokens.append(char)
        if len(tokens) > count:
            brackets += (tokens[-1] in ("(", "[", "\\{")) - (tokens[-1] in (")", "]", "\\}"))
        i = stop
    return tuple(token for k, token in enumerate(tokens) if token != "," or tokens[k - 1] != ",")


def _checked(value):
    """Return a number if it is not too large, without a part that is rounding noise."""
    if isinstance(value, (int, Fraction)):
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
    exact = isinstance(top, int) and isinstance(bottom, int)
    return _checked(Fraction(top, bottom) if exact else top / bottom)


def _power(base, exponent):
    """Return base**exponent, exactly if it is rational."""
    exact = isinstance(exponent, (int, Fraction))
    if base == 0 and not (exact and exponent > 0):
        raise ZeroDivisionError("0 to a power that is not positive")
    if exact and isinstance(base, (int, Fraction)) and exponent.denominator < 100:
        index, root = exponent.denominator, Fraction(base)
        if index > 1 and base > 0:
            root = Fraction(*(round(n ** (1 / index)) for n in root.as_integer_ratio()))
        if root ** index == base:
            if max(map(abs, root.as_integer_ratio())).bit_length() * abs(exponent) > MAX_BITS:
                raise OverflowError("power too large")
            return _checked(root ** exponent.numerator)
    value = _checked(base ** exponent)
    if value == 0:
        raise OverflowError("underflow")
    return value


def _factorial(value):
    small = isinstance(value, int) and 0 <= value < 900
    return math.factorial(value) if small else math.gamma(value + 1)


def _generic(name, trial):
    """Return the number that `name` stands for: positive in trial 0, negative in trial 1."""
    negative = trial == 1 or trial == 2 and sum(name.encode()) % 2
    code = zlib.crc32(f"{name} {trial}".encode())
    return Fraction(code % 99991 + 50021, -100003 if negative else 100003)


class _Parser:
    """Recursive descent from tokens to a number or a Form, with the letters of one trial."""

    def __init__(self, tokens, trial):
        self.tokens, self.trial = (*tokens, "", "", ""), trial
        self.position = self.depth = self.steps = self.bars = 0
        self.upper, self.has_sign, self.has_letter = True, False, False

    def accept(self, tokens):
        """Step over the next token and return it, if it is one of `tokens`."""
        token = self.tokens[self.position]
        if not token or not isinstance(token, str) or token not in tokens:
            return ""
        self.position += 1
        return token

    def expect(self, tokens):
        if not self.accept(tokens):
            raise ValueError("unexpected token")

    def elements(self, expand=True):
        r"""Read elements between commas; with `expand`, an element with \pm gives two."""
        items = []
        while not items or self.accept(","):
            start = self.position
            items.append(self.expression())
            if expand and self.has_sign:
                self.position, self.upper = start, False
                items.append(self.expression())
                self.upper, self.has_sign = True, False
        return items

    def expression(self, floor=0):
        """Read an operand and the operators that bind more tightly than `floor`."""
        start, value = self.position, self.operand()
        while True:
            mark = self.tokens[self.position]
            level = LEVELS.get(mark, 4 if self.at_factor(mark) else 0)
            if floor < 3 and str(mark)[:1] == '"' and mark not in SCALES:
                value = self.with_unit(value)
            elif level <= floor:
                return value
            elif level > 2:  # a sign stays: a-b is a plus -b
                self.position += mark in ("*", "/")
                right = self.expression(level)
                value = (_divide(value, right) if mark == "/" else
                         _checked(value + right if level == 3 else value * right))
            else:
                if getattr(value, "level", 0) != level:  # else a chain such as 1<x<2 goes on
                    named = mark in "=∈≈" and _is_name(self.tokens[start:self.position])
                    value = Form(kind="rel" if level == 1 else "any", tag="", items=[value],
                                 level=level, named=named)
                self.position += 1
                value.tag += mark
                value.items.append(self.expression(level))

    def with_unit(self, value):
        """Read the unit that follows a number: words, "/" and powers."""
        names = []
        while (token := self.tokens[self.position]) and token not in UNIT_END:
            word = str(token).strip('"')
            number = isinstance(token, int)
            name = "" if number else UNITS.get(word) or UNITS.get(word.removesuffix("s"), "")
            power = (number or word == "-") and self.tokens[self.position - 1] in ("^", "{", "-")
            plural = word[-1:] == "s" and '"' + word[:-1] not in SCALES
            if not (name or power or plural or word in ("^", "{", "}")):
                raise ValueError("not a unit")
            names.append(name or word)
            self.position += 1
        tag = sorted(name for name in names if name not in "^{}")
        return Form(kind="unit", tag=tag, items=[_checked(value)]) if tag else value

    def operand(self):
        """Read signs, an atom and its powers and factorial."""
        negative = False
        while sign := self.accept("+-±∓"):
            self.has_sign |= sign in "±∓"
            negative ^= sign == ("∓" if self.upper else "±") or sign == "-"
        value = self.atom()
        while mark := self.accept("^!"):
            if mark == "^":
                minus = self.accept("+-") == "-"
                exponent = self.argument()
                value = _power(value, -exponent if minus else exponent)
            else:
                value = _checked(_factorial(value))
            if self.tokens[self.position] == mark:
                raise ValueError("double power or factorial")
        return -value if negative else value

    def at_factor(self, token):
        """Tell whether `token` multiplies what precedes it, as in 2x, but not in 2 3."""
        if not isinstance(token, str):
            return isinstance(self.tokens[self.position - 1], str)
        return (token.isalpha() or token in ("(", "[", "{") or token in SCALES
                or token == "|" and not self.bars or token[:1] == "\\" and token not in NOT_FACTORS)

    def argument(self):
        """Read the argument of a TeX command: a number by itself, or an atom."""
        if isinstance(self.tokens[self.position], str):
            return self.atom()
        self.position += 1
        return self.tokens[self.position - 1]

    def atom(self):
        self.depth += 1
        self.steps += 1
        if self.depth > MAX_DEPTH or self.steps > MAX_STEPS:
            raise ValueError("nested too deep or too long")
        token = self.tokens[self.position]
        self.position += 1
        if not isinstance(token, str):
            based = self.tokens[self.position] == "_"  # 12_5 is a name: digits in base 5
            value = self.name(str(token)) if based else self.mixed(token)
        elif token in CLOSERS:
            value = self.group(token)
        elif token in ("\\begin", "\\beginv"):
            value = self.matrix(token)
        elif token == "\\frac":
            value = _divide(self.argument(), self.argument())
        elif token == "\\binom":
            n, k = self.argument(), self.argument()
            value = _divide(_factorial(n), _checked(_factorial(k) * _factorial(n - k)))
        elif token == "\\sqrt":
            index = self.group("[") if self.accept("[") else 2
            value = self.argument()
            odd = index % 2 and not isinstance(value, complex) and value < 0  # real, not principal
            value = _power(-value if odd else value, _divide(1, index)) * (-1 if odd else 1)
        elif token in FUNCTIONS:
            value = self.function(token)
        elif token in SCALES:
            value = SCALES[token]
        elif token[:1] == '"':
            value = Form(kind="text", tag=token, items=[])
            while self.tokens[self.position][:1] == '"':
                value.tag += self.accept(self.tokens[self.position])
        elif token == "∅":
            value = Form(kind="any", tag="", items=[])
        elif token in CONSTANTS and self.tokens[self.position] != "_":
            value = CONSTANTS[token]
        elif token.isalpha() or token[:1] == "\\" and token not in NO_VALUE:
            value = self.name(token)
        else:
            raise ValueError("no value")
        self.depth -= 1
        return value

    def mixed(self, whole):
        r"""Read what makes a number the whole part of a mixed number: 1\frac12 or 1 1/2."""
        start, tokens = self.position, self.tokens[self.position:self.position + 2]
        if not isinstance(whole, int) or tokens[0] != "\\frac" and (
                not isinstance(tokens[0], int) or tokens[1] != "/"):
            return whole
        self.accept(["\\frac"])
        top = self.argument()
        self.accept("/")
        bottom = self.argument()
        if isinstance(top, int) and isinstance(bottom, int) and 0 < top < bottom:
            return whole + Fraction(top, bottom)
        self.position = start
        return whole

    def group(self, token):
        """Read up to the bracket that closes `token`: a list, tuple, interval, |x| or floor."""
        self.bars += token == "|"
        items = [] if self.tokens[self.position] == "\\}" else self.elements(token == "\\{")
        self.bars -= token == "|"
        close = self.tokens[self.position]
        self.expect(CLOSERS[token])
        if token == "\\{":
            return items[0] if len(items) == 1 else Form(kind="any", tag="", items=items)
        if len(items) > 1 or token + close in ("(]", "[)"):
            return Form(kind="row", tag=token + close, items=items)
        if token == "|":
            return abs(items[0])
        if token in ("\\lfloor", "\\lceil"):
            if self.has_letter:
                return self.unknown(token, items)
            return math.floor(items[0]) if token == "\\lfloor" else math.ceil(items[0])
        return items[0]

    def matrix(self, token):
        rows = [Form(kind="row", tag="", items=[])]
        while not self.accept(("\\end", "\\endv")):
            rows[-1].items.append(self.expression())
            if self.accept(["\\cr"]) and self.tokens[self.position] not in ("\\end", "\\endv"):
                rows.append(Form(kind="row", tag="", items=[]))
            self.accept("&")
        return Form(kind="row", tag=token, items=rows)

    def name(self, name):
        """Read a subscript and an argument; return what the name or the unknown function is."""
        self.has_letter = True
        if self.accept("_"):
            stop = self.position
            if self.tokens[stop] == "{":
                stop = self.tokens.index("}", stop)
            name += "_" + "".join(map(str, self.tokens[self.position:stop + 1])).strip("{}")
            self.position = stop + 1
        call = self.tokens[self.position:self.position + 3]
        if call[0] == "(" and (name[0] in "fgh" or call[2] == ")"):
            self.position += 1
            values = self.elements(expand=False)
            self.expect(")")
            return self.unknown(name, values)
        return _generic(name, self.trial)

    def unknown(self, name, values):
        """Return some smooth function of the values."""
        scale = result = float(_generic(name, self.trial))
        for value in values:
            result = scale + cmath.cos(result * (value + 1))
        return _checked(result if result.imag else result.real)

    def function(self, name):
        base, power = math.e, 1
        if name == "\\log" and self.accept("_"):
            name, base = "\\ln", self.argument()
        if self.accept("^"):
            power = self.argument()
        if power == -1 and "\\arc" + name[1:] in FUNCTIONS:
            name, power = "\\arc" + name[1:], 1
        if self.tokens[self.position] in ("(", "[", "{"):
            value = self.atom()
        else:
            value = self.operand()
            while (token := self.tokens[self.position]) not in FUNCTIONS and self.at_factor(token):
                value = _checked(value * self.operand())
        result = _checked(FUNCTIONS[name](complex(value)) / cmath.log(base))
        real = result.imag == 0 and not isinstance(value, complex)
        return _power(result.real if real else result, power)


def _is_name(tokens):
    """Tell whether `tokens` up to a relation only name something: x_1, f(x), (x, y), AB, Area."""
    first = next((token for token in tokens if token not in ("(", "{")), 0)
    return isinstance(first, str) and first not in ("e", "i") and all(
        before in ("(", ",", "_", "{") if not isinstance(token, str) else
        token.isalpha() or token in ("_", "{", "}", "(", ")", ",") or token[0] == '"'
        or token[0] == "\\" and token not in NOT_NAMES
        for before, token in zip(("", *tokens), tokens))


@lru_cache(maxsize=4096)
def _value(text, trial):
    """Return the number or Form that `text` stands for, or None, and whether it has letters."""
    parser = _Parser(_tokens(text), trial)
    try:
        items = parser.elements()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None, False
    if parser.tokens[parser.position] != "":
        return None, False
    value = items[0] if len(items) == 1 else Form(kind="any", tag="", items=items)
    return value, parser.has_letter


def _close(a, b, trial):
    """Tell whether two numbers are equal; in a later trial, only two real ones can differ."""
    if isinstance(a, (int, Fraction)) and isinstance(b, (int, Fraction)):
        return a == b
    if trial > 0 and (isinstance(a, complex) or isinstance(b, complex)):
        return True
    for value in (a, b):  # an exact value with a long denominator is a letter or a rounded decimal
        if isinstance(value, Fraction) and value.denominator > 10**6 and value.denominator % 100003:
            return False
    try:
        a, b = complex(a), complex(b)
    except OverflowError:
        return False  # an integer beyond all floats
    noise = 1e-15 * max(abs(a), abs(b))
    return all(abs(p - q) <= noise + TOLERANCE * max(abs(p), abs(q))
               for p, q in ((a.real, b.real), (a.imag, b.imag)))


def _same(a, b, trial):
    """Tell whether two numbers or Forms are equal."""
    kinds = [getattr(form, "kind", "") for form in (a, b)]
    if kinds[0] != kinds[1] and "rel" in kinds:
        form, other = (a, b) if kinds[0] == "rel" else (b, a)
        return form.named and all(_same(item, other, trial) for item in form.items[1:])
    if "unit" in kinds:
        if kinds[0] == kinds[1] and a.tag != b.tag:
            return False
        a, b = (form.items[0] if kind == "unit" else form for form, kind in zip((a, b), kinds))
        return _same(a, b, trial)
    if kinds == ["", ""]:
        return _close(a, b, trial)
    if kinds[0] != kinds[1] or len(a.items) != len(b.items):
        return False
    if a.tag == b.tag and all(_same(x, y, trial) for x, y in zip(a.items, b.items)):
        return True
    if a.kind == "rel" and a.tag[::-1].translate(MIRROR) == b.tag and all(
            _same(x, y, trial) for x, y in zip(a.items, b.items[::-1])):
        return True
    if a.tag == b.tag == "=" and not any(hasattr(x, "kind") for x in a.items + b.items):
        left, right = a.items[0] - a.items[1], b.items[0] - b.items[1]
        return left != 0 and (_close(left, right, trial) or _close(left, -right, trial))
    if a.kind != "any" or a.tag != b.tag or len(a.items) > MAX_UNORDERED:
        return False
    rest = list(b.items)
    for item in a.items:
        match = next((k for k, other in enumerate(rest) if _same(item, other, trial)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _equal(answer, gold):
    """Tell whether two answers have the same value in all trials."""
    for trial in range(3):
        try:
            (a, a_letters), (b, b_letters) = _value(answer, trial), _value(gold, trial)
            if a is None or b is None or not _same(a, b, trial):
                return trial > 0 and (a is None or b is None)
        except (OverflowError, RecursionError):  # the latter only if the caller is already deep
            return False
        if not (a_letters or b_letters):
            return True
    return True


def is_equivalent(answer, gold):
    """Tell whether two answers, given as LaTeX or plain text, are the same (True or False).

    Symmetric; True for any answer and itself unless nothing is left of it without spaces and
    dollar signs; False if one of them is not a str. Raises nothing.
    """
    if not isinstance(answer, str) or not isinstance(gold, str):
        return False
    answer, gold = sorted((answer.strip(), gold.strip()))
    if max(len(answer), len(gold)) > MAX_CHARS:
        return bool(answer) and "".join(answer.split()) == "".join(gold.split())
    if not _tokens(answer) or _tokens(answer) == _tokens(gold):
        return _tokens(answer) != ()
    if _equal(answer, gold):
        return True
    for a, b in ((answer, gold), (gold, answer)):  # 100,200,300 may also be a list, if b is one
        plain = set(DIGITS + ",")
        if "," in a and set(a) <= plain and ",0" not in a and not set(b) <= plain:
            return _equal(a.replace(",", ", "), b)
    return False


def math_reward(response, gold):
    """Return 1.0 if the last box of `response` is equivalent to `gold`, else 0.0."""
    answer = extract_answer(response)
    return float(answer is not None and is_equivalent(answer, gold))
