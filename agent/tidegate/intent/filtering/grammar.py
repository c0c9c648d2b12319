"""Reads filter expressions: the grammar of hashicorp/go-bexpr 0.1.16 (grammar.peg).

    or         <- and (_ "or" _ and)*
    and        <- operand (_ "and" _ operand)*
    operand    <- "not" _ operand / "(" _? or _? ")" / collection / match
    collection <- ("any" / "all") _ selector _ "as" _ binding _? "{" _? or _? "}"
    binding    <- identifier _? "," _? identifier / identifier _? "," _? "_" / "_" _? "," _? identifier / identifier
    match      <- selector (_? "==" _? / _? "!=" _? / _ "not"? "contains" _ / _ "not"? "matches" _) value
                / selector _ "is" "not"? ("empty" / "nil")
                / value _ "not"? "in" _ selector
    selector   <- identifier ("." identifier / "[" _? string _? "]" / "." [0-9]+)* / '"' ("/" segment)+ '"'
    value      <- selector / number / string

Space (_) is needed around words, not around signs. Words are not reserved: `not in Tags` asks for the value
"not". Where go-bexpr takes `any` and `all` only as a whole expression, in parentheses or after "or", they are
operands here. A quoted value that begins with a slash keeps it, as in Consul (go-bexpr 0.1.2); later ones drop it.

Expressions come from anybody: their length, nesting and patterns are bounded, and reading takes linear time.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from tidegate.intent.fields import described
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.patterns import MAX_PATTERNS, BadPattern, compiled
from tidegate.intent.filtering.tree import (
    IDENTIFIER,
    INDEX,
    NUMBER,
    And,
    Binding,
    Collection,
    Expression,
    Match,
    Operator,
    Or,
    Quantifier,
    Selector,
    Value,
    is_pointer_segment,
    negated,
)
from tidegate.intent.filtering.values import BadEscape, unquote

MAX_LENGTH = 16_384
"""Characters of the longest expression."""

MAX_DEPTH = 50
"""Deepest nesting of parentheses and of the braces of `any` and `all`."""

MAX_PARTS = 32
"""Most fields, keys and indexes in one selector."""

_SPACE = re.compile(r"[ \t\r\n]*")
_WORD_CHARACTER = re.compile(r"[a-zA-Z0-9_/]")
_TOKEN = re.compile(r"[a-zA-Z0-9_]+|&&|\|\||[=!]~|[!<>=]=?|.", re.DOTALL)

_SIGNS = {"==": Operator.EQUAL, "!=": Operator.NOT_EQUAL}
_WITH_VALUE = {
    ("contains",): Operator.IN,
    ("not", "contains"): Operator.NOT_IN,
    ("matches",): Operator.MATCHES,
    ("not", "matches"): Operator.NOT_MATCHES,
}
_ALONE = {
    ("is", "empty"): Operator.IS_EMPTY,
    ("is", "not", "empty"): Operator.IS_NOT_EMPTY,
    ("is", "nil"): Operator.IS_NIL,
    ("is", "not", "nil"): Operator.IS_NOT_NIL,
}
_AFTER_VALUE = {("in",): Operator.IN, ("not", "in"): Operator.NOT_IN}

_MISTAKES = {
    "=": "==",
    "!": "not",
    "&&": "and",
    "||": "or",
    "&": "and",
    "|": "or",
    "~": "matches",
    "=~": "matches",
    "!~": "not matches",
}
"""What other languages write, and what it is here."""


def parse(text: str) -> Expression:
    """The expression that `text` is. Raises FilterError."""
    if len(text) > MAX_LENGTH:
        problem = f"an expression of {len(text)} characters"
        raise FilterError(text, MAX_LENGTH + 1, problem, f"at most {MAX_LENGTH}")
    surrogate = re.search(r"[\ud800-\udfff]", text)
    if surrogate:
        raise FilterError(text, surrogate.start() + 1, "this is not Unicode text", "UTF-8")
    return _Parser(text).whole()


class _Term(NamedTuple):
    """What can stand on either side of an operator, and where it ends.

    A name, and a string that is a JSON pointer, can be a selector as well as a value.
    """

    value: Value
    selector: Selector | None
    end: int


class _Parser:
    """Recursive descent. Each method takes the offset at which it reads, and gives what it read and the
    offset behind that, or None if it is not there; then `_furthest` and `_expected` tell what was missed.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._furthest = 0
        self._expected: dict[str, None] = {}
        self._depth = 0
        self._patterns = 0

    def whole(self) -> Expression:
        read = self._or(self._after_space(0))
        if read is not None:
            expression, end = read
            end = self._after_space(end)
            if end == len(self._text):
                return expression
            self._miss(end, "the end")
        raise self._fault_at_furthest()

    def _or(self, at: int) -> tuple[Expression, int] | None:
        return self._chain(at, "or", self._and, Or)

    def _and(self, at: int) -> tuple[Expression, int] | None:
        return self._chain(at, "and", self._operand, And)

    def _chain(
        self,
        at: int,
        word: str,
        part: Callable[[int], tuple[Expression, int] | None],
        whole: type[And | Or],
    ) -> tuple[Expression, int] | None:
        """What `part` reads or, with `word` between several of that, the `whole` of them."""
        operands: list[Expression] = []
        while (read := part(at)) is not None:
            operand, end = read
            operands.append(operand)
            behind = self._words(end, (word,), space_behind=True)
            if behind is None:
                return (whole(tuple(operands)) if len(operands) > 1 else operand), end
            at = behind
        return None

    def _operand(self, at: int) -> tuple[Expression, int] | None:
        """One operand behind any number of "not".

        A "not" that nothing can follow may itself be a value or a selector, the last one first.
        """
        starts = [at]
        while (behind := self._not(starts[-1])) is not None:
            starts.append(behind)
        read = self._positive(starts.pop())
        while read is None and starts:
            read = self._match(starts.pop())
        if read is None:
            return None
        expression, end = read
        for _ in starts:
            expression = negated(expression)
        return expression, end

    def _not(self, at: int) -> int | None:
        """Where the operand of a "not" begins."""
        if not self._text.startswith("not", at):
            return None
        end = at + len("not")
        operand = self._after_space(end)
        if operand > end:
            return operand
        if self._text.startswith("(", end):
            self._miss(end, "white space")
        return None

    def _positive(self, at: int) -> tuple[Expression, int] | None:
        if self._text.startswith("(", at):
            return self._enclosed(at, ")")
        for quantifier in Quantifier:
            if self._text.startswith(quantifier, at):
                header = self._collection_header(at + len(quantifier))
                if header is not None:
                    selector, binding, brace = header
                    read = self._enclosed(brace, "}")
                    if read is None:
                        return None
                    return Collection(quantifier, selector, binding, read[0]), read[1]
        return self._match(at)

    def _enclosed(self, at: int, closing: str) -> tuple[Expression, int] | None:
        """An expression behind the opening bracket at `at` and before `closing`."""
        if self._depth == MAX_DEPTH:
            raise self._fault(
                at, "nested too deep", f"at most {MAX_DEPTH} brackets within each other"
            )
        self._depth += 1
        read = self._or(self._after_space(at + 1))
        self._depth -= 1
        if read is None:
            return None
        expression, end = read
        end = self._after_space(end)
        if not self._text.startswith(closing, end):
            self._miss(end, f'"{closing}"')
            return None
        return expression, end + 1

    def _collection_header(self, at: int) -> tuple[Selector, Binding, int] | None:
        """What stands between `any` or `all` and the opening brace, and where that is."""
        start = self._after_space(at)
        term = self._term(start) if start > at else None
        if term is None or term.selector is None:
            return None
        named = self._words(term.end, ("as",), space_behind=True)
        if named is None:
            return None
        read = self._binding(named)
        if read is None:
            return None
        binding, end = read
        brace = self._after_space(end)
        if not self._text.startswith("{", brace):
            self._miss(brace, '"{"')
            return None
        return term.selector, binding, brace

    def _binding(self, at: int) -> tuple[Binding, int] | None:
        first = self._name_or_blank(at)
        if first is None:
            self._miss(at, "a name for an element")
            return None
        comma = self._after_space(at + len(first))
        if not self._text.startswith(",", comma):
            if first == "_":
                self._miss(comma, '","')
                return None
            return Binding(each=first), at + len(first)
        start = self._after_space(comma + 1)
        second = self._name_or_blank(start)
        if second is None or first == second == "_":
            self._miss(start, "a name for an element")
            return None
        if first == second:
            raise self._fault(start, f"{first!r} is the name of the index already", "another name")
        names = ["" if name == "_" else name for name in (first, second)]
        return Binding(index=names[0], value=names[1]), start + len(second)

    def _name_or_blank(self, at: int) -> str | None:
        if self._text.startswith("_", at):
            return "_"
        name = IDENTIFIER.match(self._text, at)
        return name[0] if name else None

    def _match(self, at: int) -> tuple[Expression, int] | None:
        term = self._term(at)
        if term is None:
            self._miss(at, "a selector", "a value", '"("', '"not"', '"any"', '"all"')
            return None
        if term.selector is not None:
            if (read := self._operator_with_value(term.end)) is not None:
                operator, behind = read
                compared = self._term(behind)
                if compared is None:
                    self._miss(behind, "a value")
                    return None
                if operator in (Operator.MATCHES, Operator.NOT_MATCHES):
                    self._check_pattern(compared.value)
                return Match(term.selector, operator, compared.value), compared.end
            for words, operator in _ALONE.items():
                end = self._words(term.end, words)
                if end is not None:
                    return Match(term.selector, operator), end
        for words, operator in _AFTER_VALUE.items():
            behind_word = self._words(term.end, words, space_behind=True)
            if behind_word is not None:
                selected = self._term(behind_word)
                if selected is None or selected.selector is None:
                    self._miss(behind_word, "a selector")
                    return None
                return Match(selected.selector, operator, term.value), selected.end
        if term.selector is None:
            self._refuse_sign(at, self._after_space(term.end))
        return None

    def _refuse_sign(self, at: int, sign_at: int) -> None:
        """Fails where a value that cannot be a selector is compared by a sign."""
        if self._text.startswith(tuple(_SIGNS), sign_at):
            right = 'a name such as Meta.key or a JSON pointer such as "/Meta/key"'
            raise self._fault(at, "a value is on the left, where a selector belongs", right)

    def _operator_with_value(self, at: int) -> tuple[Operator, int] | None:
        """The operator between a selector and a value, and where the value begins."""
        start = self._after_space(at)
        for sign, operator in _SIGNS.items():
            if self._text.startswith(sign, start):
                return operator, self._after_space(start + len(sign))
            self._miss(start, f'"{sign}"')
        for words, operator in _WITH_VALUE.items():
            behind = self._words(at, words, space_behind=True)
            if behind is not None:
                return operator, behind
        return None

    def _check_pattern(self, value: Value) -> None:
        self._patterns += 1
        if self._patterns > MAX_PATTERNS:
            raise self._fault(
                value.column - 1, "too many regular expressions", f"at most {MAX_PATTERNS}"
            )
        try:
            compiled(value.text)
        except BadPattern as error:
            problem = f"{described(value.text)} is not a regular expression: {error}"
            raise self._fault(value.column - 1, problem, "the syntax of RE2") from None

    def _words(self, at: int, words: tuple[str, ...], *, space_behind: bool = False) -> int | None:
        """Words with space before each, and `space_behind` the last if asked for; the end of all that."""
        for word in words:
            start = self._after_space(at)
            end = start + len(word)
            if not self._text.startswith(word, start) or _WORD_CHARACTER.match(self._text, end):
                self._miss(start, f'"{word}"')
                return None
            if start == at:
                self._miss(at, "white space")
                return None
            at = end
        if not space_behind:
            return at
        end = self._after_space(at)
        if end == at:
            self._miss(at, "white space")
            return None
        return end

    def _term(self, at: int) -> _Term | None:
        char = self._text[at : at + 1]
        if char in ('"', "`"):
            return self._string_term(at)
        if char == "-" or char.isdigit():
            return self._number(at)
        return self._name(at)

    def _string_term(self, at: int) -> _Term:
        text, end = self._string(at)
        selector = None
        raw = self._text[at + 1 : end - 1]
        segments = raw.split("/")[1:] if self._text[at] == '"' and raw.startswith("/") else []
        if 0 < len(segments) <= MAX_PARTS and all(map(is_pointer_segment, segments)):
            columns, column = [], at + 3
            for segment in segments:
                columns.append(column)
                column += len(segment) + 1
            path = (segment.replace("~1", "/").replace("~0", "~") for segment in segments)
            selector = Selector(tuple(path), tuple(columns))
        return _Term(Value(text, at + 1), selector, end)

    def _string(self, at: int) -> tuple[str, int]:
        """The string that opens at `at`. go-bexpr's strings end at the next quote, escaped or not."""
        quote = self._text[at]
        closing = self._text.find(quote, at + 1)
        if closing < 0:
            raise self._fault(at, "a string without an end", f"a closing {quote}")
        inside = self._text[at + 1 : closing]
        if quote == "`":
            return inside.replace("\r", ""), closing + 1
        try:
            return unquote(inside), closing + 1
        except BadEscape as error:
            right = r'an escape such as \n, \\, \x22 for ", or a string in backticks'
            raise self._fault(at + 1 + error.offset, error.problem, right) from None

    def _number(self, at: int) -> _Term | None:
        number = NUMBER.match(self._text, at)
        if number is None:
            return None
        end = number.end()
        if end < len(self._text) and self._text[end] not in " \t\r\n)}":
            right = "a number such as 3 or -1.5 with white space behind, or a string in quotes"
            raise self._fault(end, "this is not part of a number", right)
        return _Term(Value(number[0], at + 1), None, end)

    def _name(self, at: int) -> _Term | None:
        first = IDENTIFIER.match(self._text, at)
        if first is None:
            return None
        path, columns, end = [first[0]], [at + 1], first.end()
        while True:
            char = self._text[end : end + 1]
            if char == ".":
                step = IDENTIFIER.match(self._text, end + 1) or INDEX.match(self._text, end + 1)
                if step is None:
                    self._miss(end + 1, "a field or an index")
                    break
                path.append(step[0])
                columns.append(end + 2)
                end = step.end()
            elif char == "[":
                start = self._after_space(end + 1)
                if self._text[start : start + 1] not in ('"', "`"):
                    raise self._fault(start, "this cannot be a key", "a string in quotes")
                key, behind = self._string(start)
                closing = self._after_space(behind)
                if not self._text.startswith("]", closing):
                    raise self._fault(closing, "a key in brackets without an end", '"]"')
                path.append(key)
                columns.append(start + 1)
                end = closing + 1
            else:
                break
        if len(path) > MAX_PARTS:
            problem = f"a selector of {len(path)} parts"
            raise self._fault(columns[MAX_PARTS] - 1, problem, f"at most {MAX_PARTS}")
        return _Term(Value(".".join(path), at + 1), Selector(tuple(path), tuple(columns)), end)

    def _after_space(self, at: int) -> int:
        space = _SPACE.match(self._text, at)
        return space.end() if space else at

    def _miss(self, at: int, *expected: str) -> None:
        """Notes what could have stood at `at`, which matters if nothing was read beyond it."""
        if at > self._furthest:
            self._furthest = at
            self._expected = {}
        if at == self._furthest:
            self._expected.update(dict.fromkeys(expected))

    def _fault_at_furthest(self) -> FilterError:
        at = self._furthest
        token = _TOKEN.match(self._text, at)
        right = _listed(list(self._expected))
        if token is None:
            return self._fault(at, "the expression ends too early", right)
        word = token[0]
        if word == "'":
            return self._fault(at, "single quotes do not make a string", '"..." or `...`')
        if word in ("<", ">", "<=", ">="):
            return self._fault(at, f"no operator {word} here: nothing is compared by order", right)
        if word in _MISTAKES:
            return self._fault(at, f"no operator {word} here", f'"{_MISTAKES[word]}"')
        return self._fault(at, f"unexpected {described(word)}", right)

    def _fault(self, at: int, problem: str, expected: str = "") -> FilterError:
        return FilterError(self._text, at + 1, problem, expected)


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
