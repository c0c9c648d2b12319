"""Filter expressions as trees: written as text, they are read as the same tree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.intent.filtering.grammar import parse
from tidegate.intent.filtering.tree import (
    And,
    Binding,
    Collection,
    Match,
    Operator,
    Or,
    Quantifier,
    Selector,
    Value,
    negated,
    render,
)

WORDS = ("and", "any", "all", "as", "contains", "empty", "in", "is", "matches", "nil", "not", "or")
ALONE = [each for each in Operator if each.startswith("is")]
PATTERNS = [Operator.MATCHES, Operator.NOT_MATCHES]

identifiers = st.sampled_from(WORDS) | st.from_regex(r"[a-zA-Z][a-zA-Z0-9_/]{0,5}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
dotted = st.builds(
    lambda first, rest: Selector((first, *rest)),
    identifiers,
    st.lists(identifiers | st.sampled_from(["0", "17"]) | texts, max_size=3),
)
pointers = st.lists(
    st.text(st.characters(categories=["L", "N"], include_characters="-_.~:|/"), min_size=1),
    min_size=1,
    max_size=3,
).map(lambda path: Selector(tuple(path)))
selectors = dotted | pointers
values = st.builds(Value, texts | identifiers | st.sampled_from(["0", "-1.5", "007", "/a/b", ""]))
patterns = st.builds(Value, st.sampled_from(["^a+$", "", 'a"b`c', r"\d\.\d", "/x"]))
leaves = (
    st.builds(Match, selectors, st.sampled_from(ALONE))
    | st.builds(Match, selectors, st.sampled_from(PATTERNS), patterns)
    | st.builds(
        Match,
        selectors,
        st.sampled_from([each for each in Operator if each not in (*ALONE, *PATTERNS)]),
        values,
    )
)
bindings = (
    st.builds(Binding, each=identifiers)
    | st.builds(Binding, index=identifiers)
    | st.builds(Binding, value=identifiers)
    | st.lists(identifiers, min_size=2, max_size=2, unique=True).map(
        lambda names: Binding(index=names[0], value=names[1])
    )
)
expressions = st.recursive(
    leaves,
    lambda inner: (
        inner.map(negated)
        | st.lists(inner, min_size=2, max_size=3).map(lambda some: And(tuple(some)))
        | st.lists(inner, min_size=2, max_size=3).map(lambda some: Or(tuple(some)))
        | st.builds(Collection, st.sampled_from(Quantifier), selectors, bindings, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(expressions)
def test_an_expression_written_as_text_is_read_as_itself(expression):
    text = render(expression)
    assert parse(text) == expression
    assert str(expression) == text


@settings(deadline=None)
@given(expressions, expressions)
def test_expressions_in_parentheses_are_put_together_as_they_are(one, other):
    assert parse(f"(\t( {one}\n) )") == one
    assert parse(f"not ({one})") == negated(one)
    assert parse(f"({one}) and ({other})") == And((one, other))
    assert parse(f"({one}) or ({other})") == Or((one, other))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Tags contains web", '"web" in Tags'),
        ("Tags not contains web", '"web" not in Tags'),
        ("Port==80", "Port == 80"),
        ('Port == "80"', "Port == 80"),
        ("Name == web", 'Name == "web"'),
        ("Name == `web`", 'Name == "web"'),
        ("Name == ``", 'Name == ""'),
        ('Name == `say "hi"`', 'Name == `say "hi"`'),
        ("Name matches `\\d+`", "Name matches `\\d+`"),
        (r'Name == "\x22`\\\n"', r'Name == "\x22`\\\n"'),
        (r'Name == "\u200b\U000e0001"', r'Name == "\u200b\U000e0001"'),
        ('Path == "/a/b"', "Path == `/a/b`"),
        ('Meta["a b"].c.0 is empty', 'Meta["a b"].c.0 is empty'),
        ('"/Meta/x" is nil', "Meta.x is nil"),
        ("not not matches x", 'not "/not" matches "x"'),
        ("not.x not matches y", 'not.x not matches "y"'),
        ('"/x-y/a~1b/~0" is nil', '"/x-y/a~1b/~0" is nil'),
        ("(a == 1) or (b == 2 and c == 3)", "a == 1 or b == 2 and c == 3"),
        ("not (a == 1 or b == 2)", "not (a == 1 or b == 2)"),
        ("any A as x{x==1}", "any A as x { x == 1 }"),
        ("any A as i,_{i==1} or not all A as _,v{v==1}",
         "(any A as i, _ { i == 1 }) or not (all A as _, v { v == 1 })"),
    ],
)  # fmt: skip
def test_expressions_are_written_in_one_way(text, written):
    assert str(parse(text)) == written


def test_columns_make_no_difference_between_expressions():
    assert parse("  a.b   ==   c") == parse("a.b==c")
    assert hash(parse("  a.b   ==   c")) == hash(parse("a.b==c"))
    assert parse("a.b == c") != parse("a.b == d")
    assert parse("a.b == c") != parse("a.c == c")
