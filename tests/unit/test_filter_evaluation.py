"""What filter expressions are true of: go-bexpr's rules, over Consul's JSON."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.intent.filtering.checking import check
from tidegate.intent.filtering.evaluation import Steps, matches
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.filter import Filter
from tidegate.intent.filtering.grammar import parse
from tidegate.intent.filtering.shapes import Record, Scalar, shape_of
from tidegate.intent.filtering.tree import (
    And,
    Binding,
    Collection,
    Match,
    Not,
    Operator,
    Or,
    Quantifier,
    Selector,
    Value,
)

OPTIONAL = Record({"Name": Scalar.TEXT}, optional=True)
SERVICE = shape_of(
    {
        "Name": str,
        "Port": int,
        "Weight": float,
        "Enabled": bool,
        "Meta": {str: str},
        "Tags": [str],
        "Ports": [int],
        "Sources": [{"Name": str, "Tags": [str]}],
        "TLS": {"Min": str, "Suites": [str]},
        "Destination": OPTIONAL,
        "Limits": {str: {"Max": int}},
        "Matrix": [[int]],
        "Config": object,
    }
)

WEB = {
    "Name": "web",
    "Port": 80,
    "Weight": 1.5,
    "Enabled": True,
    "Meta": {"team": "shop", "": "empty key", "a/b": "slash"},
    "Tags": ["blue", "v2"],
    "Ports": [80, 443],
    "Sources": [{"Name": "api", "Tags": ["x"]}, {"Name": "job"}],
    "TLS": {"Min": "TLSv1_2"},
    "Destination": {"Name": "outside"},
    "Limits": {"api": {"Max": 3}, "job": {}},
    "Matrix": [[1, 2], [], [3]],
    "Config": {
        "a": {"b": [1, "x", True, None, 2.5]},
        "n": 5,
        "none": None,
        "s": "text",
        "on": True,
    },
}
EMPTY = {}


def true_of(text, value):
    expression = parse(text)
    check(expression, SERVICE, text)
    return matches(expression, value, SERVICE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name == web", True),
        ("Name == Web", False),
        ("Name != api", True),
        ("Name contains eb", True),
        ("eb not in Name", False),
        ("Name contains ``", True),
        ("Name matches e", True),
        ("Name matches `^e`", False),
        ("Name not matches `^(web|api)$`", False),
        ("Name matches `(?i)WEB`", True),
        ("Name matches `\\pL{3}`", True),
        ("Name is empty", False),
        ("Port == 80", True),
        ('Port == "0x50"', True),
        ('Port == "0120"', True),
        ("Port != 81", True),
        ("Weight == 1.5", True),
        ('Weight == "15e-1"', True),
        ("Weight != 1.5", False),
        ("Enabled == true", True),
        ("Enabled == T", True),
        ("Enabled == 0", False),
        ("Enabled != false", True),
    ],
)
def test_scalars_are_compared_as_what_they_are(text, expected):
    assert true_of(text, WEB) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blue in Tags", True),
        ("blu in Tags", False),
        ("Tags not contains red", True),
        ("443 in Ports", True),
        ('"0x50" in Ports', True),
        ("44 in Ports", False),
        ("Tags is empty", False),
        ("Tags is not nil", True),
        ("Tags.1 == v2", True),
        ("Tags.0 == v2", False),
        ("team in Meta", True),
        ("Meta contains shop", False),
        ("Meta.team == shop", True),
        ('Meta["a/b"] == slash', True),
        ('"/Meta/a~1b" == slash', True),
        ('Meta[""] == "empty key"', True),
        ("Limits.api.Max == 3", True),
        ("Limits.job.Max == 0", True),
        ("job in Limits", True),
        ("TLS.Min == TLSv1_2", True),
        ("Destination is nil", False),
        ("Destination.Name == outside", True),
    ],
)
def test_lists_maps_and_objects_are_entered(text, expected):
    assert true_of(text, WEB) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sources.Name == job", True),
        ("Sources.Name == web", False),
        ("Sources.Name != job", True),
        ("Sources.Name != web", True),
        ("not Sources.Name == job", False),
        ("Sources.0.Name == job", False),
        ("Sources.1.Name == job", True),
        ("x in Sources.Tags", True),
        ("Sources.Tags is empty", True),
        ("Sources.0.Tags is empty", False),
        ("Matrix.1 is empty", True),
        ("Matrix.0.1 == 2", True),
        ("Matrix.2.1 == 0", False),
        ("any Matrix as row { 3 in row }", True),
        ("all Matrix as row { 3 in row }", False),
    ],
)
def test_a_selector_through_a_list_means_any_element(text, expected):
    assert true_of(text, WEB) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Name == ""', True),
        ("Name is empty", True),
        ("Port == 0", True),
        ("Weight == 0", True),
        ("Enabled == false", True),
        ("Enabled != true", True),
        ("Tags is empty", True),
        ("Tags is nil", True),
        ("x in Tags", False),
        ("x not in Tags", True),
        ("Meta is empty", True),
        ("Meta is not nil", False),
        ("x in Meta", False),
        ('TLS.Min == ""', True),
        ("TLS.Suites is empty", True),
        ("TLS is nil", False),
        # A selector through a list without elements is true of none of them.
        ("Sources.Name == x", False),
        ("Sources.Name != x", False),
        ("Sources.Tags is empty", False),
        ("not Sources.Name == x", True),
        ("any Sources as s { s.Name is empty }", False),
        ("all Sources as s { s.Name is not empty }", True),
        ("all Meta as k { k == x }", True),
    ],
)
@pytest.mark.parametrize("value", [EMPTY, dict.fromkeys(WEB)])
def test_fields_that_json_leaves_out_are_empty(text, expected, value):
    assert true_of(text, value) is expected


@pytest.mark.parametrize(
    "selector",
    ["Meta.nope", "Destination.Name", "Tags.7", "Tags.99999999999999999999", "Config.nope",
     "Config.a.nope.deeper", "Config.none", "Config.s.deeper", "Config.a.b.9"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("{} == x", False),
        ("{} != x", True),
        ("x in {}", False),
        ("x not in {}", True),
        ("{} is empty", True),
        ("{} is not empty", False),
        ("{} matches ``", False),
        ("{} not matches ``", True),
    ],
)
def test_of_what_is_absent_only_denials_and_emptiness_are_true(selector, form, expected):
    assert true_of(form.format(selector), {**WEB, "Destination": None}) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Destination is nil", True),
        ("Destination is not nil", False),
        ("Limits.nope is nil", True),
        ("Limits.job is nil", False),
        ("Config.none is nil", True),
        ("Config.nope is not nil", False),
        ("Limits.nope.Max == 0", False),
        ("Limits.nope.Max != 0", True),
        ("any Config.nope as x { x == 1 }", False),
        ("all Config.nope as x { x == 1 }", True),
    ],
)
def test_what_is_absent_is_nil(text, expected):
    assert true_of(text, {**WEB, "Destination": None}) is expected


def test_an_empty_list_is_not_nil():
    assert true_of("Tags is not nil and Tags is empty", {"Tags": []})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Config.n == 5", True),
        ("Config.n == 5.0", True),
        ("Config.n == five", False),
        ("Config.n != five", True),
        ("5 in Config.n", False),
        ("Config.n matches 5", False),
        ("Config.n is empty", False),
        ("Config.on == 1", True),
        ("Config.on == yes", False),
        ("Config.on != yes", True),
        ("Config.s == text", True),
        ("ex in Config.s", True),
        ("1 in Config.a.b", True),
        ("x in Config.a.b", True),
        ("true in Config.a.b", True),
        ("2.5 in Config.a.b", True),
        ("2 in Config.a.b", False),
        ("null in Config.a.b", False),
        ("Config.a == x", False),
        ("b in Config.a", True),
        ("Config.a.b.1 == x", True),
        ("any Config.a.b as v { v == 2.5 }", True),
        ("any Config as k, v { k == n and v == 5 }", True),
        ("any Config.s as x { x == text }", False),
        ("all Config.s as x { x == nothing }", True),
    ],
)
def test_json_without_a_shape_is_compared_as_it_is(text, expected):
    assert true_of(text, WEB) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("any Tags as t { t == v2 }", True),
        ("all Tags as t { t == v2 }", False),
        ("all Tags as t { t matches `^(blue|v2)$` }", True),
        ("any Tags as i, t { i == 1 and t == v2 }", True),
        ("any Tags as i, _ { i == 2 }", False),
        ("any Tags as _, t { t == blue }", True),
        ("any Meta as k { k == team }", True),
        ("any Meta as k { k == shop }", False),
        ("any Meta as k, v { k == team and v == shop }", True),
        ("any Meta as _, v { v == shop }", True),
        ("all Limits as k, v { v.Max != 4 and Limits contains api }", True),
        ("any Sources as s { s.Name == job and s.Tags is empty }", True),
        ("any Sources as s { s.Name == api and s.Tags is empty }", False),
        ("any Sources as s { any s.Tags as t { t == x and Name == web and s.Name == api } }", True),
        ("any Sources as Name { Name.Name == job }", True),
        ("any Tags as t { any Ports as t { t == 443 } }", True),
        ('any "/Sources" as s { "/s/Name" == job }', True),
        ("all Sources.Tags as t { t == x }", True),
        ("not any Tags as t { t == v3 } and all Ports as p { p != 1 }", True),
    ],
)
def test_any_and_all_go_through_lists_and_keys(text, expected):
    assert true_of(text, WEB) is expected


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_logic(first, second):
    value = {"Name": "a" if first else "b", "Port": int(second)}
    assert true_of("Name == a and Port == 1", value) is (first and second)
    assert true_of("Name == a or Port == 1", value) is (first or second)
    assert true_of("not Name == a", value) is not first


def test_without_a_shape_a_missing_field_is_absent():
    assert not matches(parse('Name == ""'), {})
    assert matches(parse("Name != x and Name is empty"), {})
    assert matches(parse("Name == web and 443 in Ports"), WEB)


def test_a_floating_point_field_is_compared_in_decimal():
    assert true_of('Weight == "010"', {"Weight": 10.0})
    assert not true_of("Weight == nan", {"Weight": math.nan})


def test_evaluation_changes_nothing():
    before = copy.deepcopy(WEB)
    true_of("any Sources as s { Meta.nope == 1 or Tags is empty or s.Name == x }", WEB)
    assert before == WEB


# -- what hostile expressions cost ----------------------------------------------------------


def nested(depth):
    names = [f"x{number}" for number in range(depth)]
    heads = "".join(f"any Tags as {name} {{ " for name in names)
    return heads + f"{names[-1]} == nothing" + " }" * depth


def test_nested_any_and_all_end_when_their_steps_do():
    value = {"Tags": ["a"] * 100}
    assert not matches(parse(nested(2)), value, SERVICE, Steps("", 100_000))
    with pytest.raises(FilterError) as caught:
        matches(parse(nested(9)), value, SERVICE, Steps("", 100_000))
    assert "too long" in caught.value.problem
    assert "any and all" in caught.value.expected


def test_steps_are_counted_over_all_that_is_filtered():
    value = {"Tags": ["a"] * 200}
    chosen = Filter(nested(2), SERVICE)
    assert chosen.select([value], dict) == []
    with pytest.raises(FilterError):
        chosen.select([value] * 1_000, dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Name matches `x+$`", {"Name": "x" * 30_000}),
        ("Name matches `(x?){500}$`", {"Name": "x" * 200}),
        ("Name contains y", {"Name": "x" * 300_000}),
        ("y in Tags", {"Tags": ["x"] * 300}),
        ("Sources.Name == x", {"Sources": [{}] * 300}),
        ("Sources.Name == x", {"Sources": [{"Name": "x"}] * 300}),
        ("all Tags as t { t == x }", {"Tags": ["x"] * 300}),
    ],
)
def test_long_text_and_lists_take_more_steps(text, value):
    expression = parse(text)
    matches(expression, value, SERVICE, Steps(text, 10_000))
    with pytest.raises(FilterError):
        matches(expression, value, SERVICE, Steps(text, 200))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*b", "(a|aa)+$", "(.*){50}b", "(x+x+)+y"])
def test_patterns_that_backtracking_never_ends_take_linear_time(pattern):
    assert not true_of(f"Name matches `^{pattern}`", {"Name": "a" * 5_000 + "c"})


def test_deep_data_is_entered_without_recursion():
    deep = "found"
    for _ in range(20_000):
        deep = [deep]
    assert true_of("Config.x == found", {"Config": {"x": "found"}})
    assert not true_of("Config.x.y == found", {"Config": {"x": deep}})
    wide = {"a": 1}
    for _ in range(5_000):
        wide = {"a": wide}
    assert not true_of("Config" + ".a" * 31 + " == 1", {"Config": wide})


def test_text_that_is_not_unicode_can_be_searched():
    assert true_of("Name matches b", {"Name": "\udcffb"})


# -- an oracle ------------------------------------------------------------------------------

SMALL = shape_of(
    {
        "Name": str,
        "Port": int,
        "On": bool,
        "Tags": [str],
        "Meta": {str: str},
        "Sources": [{"Name": str, "Ports": [int]}],
    }
)
ZERO = {"Name": "", "Port": 0, "On": False, "Tags": [], "Meta": {}, "Sources": []}
ZERO_SOURCE = {"Name": "", "Ports": []}

words = st.sampled_from(["", "a", "b", "ab"])
numbers = st.integers(0, 2)
sources = st.fixed_dictionaries(
    {}, optional={"Name": words, "Ports": st.lists(numbers, max_size=2)}
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "Name": words,
        "Port": numbers,
        "On": st.booleans(),
        "Tags": st.lists(words, max_size=3),
        "Meta": st.dictionaries(st.sampled_from(["a", "b"]), words),
        "Sources": st.lists(sources, max_size=2),
    },
)


def match(path, operators, values):
    values = values.map(lambda value: Value(str(value).lower()))
    return st.builds(Match, st.just(Selector(path)), st.sampled_from(operators), values)


EQUALITY = [Operator.EQUAL, Operator.NOT_EQUAL]
MEMBERSHIP = [Operator.IN, Operator.NOT_IN]
PATTERN = [Operator.MATCHES, Operator.NOT_MATCHES]
EMPTINESS = [Operator.IS_EMPTY, Operator.IS_NOT_EMPTY]

asked = st.one_of(
    *(match(path, [*EQUALITY, *MEMBERSHIP, *PATTERN], words)
      for path in (("Name",), ("Meta", "a"), ("Sources", "Name"), ("Sources", "1", "Name"))),
    match(("Port",), EQUALITY, numbers),
    match(("On",), EQUALITY, st.booleans()),
    match(("Tags",), MEMBERSHIP, words),
    match(("Meta",), MEMBERSHIP, words),
    match(("Sources", "Ports"), MEMBERSHIP, numbers),
    *(st.builds(Match, st.just(Selector((field,))), st.sampled_from(EMPTINESS))
      for field in ("Tags", "Meta", "Sources", "Name")),
)  # fmt: skip
inside = st.one_of(
    match(("s", "Name"), [*EQUALITY, *MEMBERSHIP], words),
    match(("s", "Ports"), MEMBERSHIP, numbers),
    match(("i",), EQUALITY, numbers),
)
quantified = st.builds(
    Collection,
    st.sampled_from(Quantifier),
    st.just(Selector(("Sources",))),
    st.just(Binding(index="i", value="s")),
    inside,
)
expressions = st.recursive(
    asked | quantified,
    lambda inner: (
        inner.filter(lambda each: not isinstance(each, Not)).map(Not)
        | st.tuples(inner, inner).map(And)
        | st.tuples(inner, inner).map(Or)
    ),
    max_leaves=6,
)


def filled(value):
    """The object as Go has it, without anything missing."""
    full = {**ZERO, **value}
    full["Sources"] = [{**ZERO_SOURCE, **source} for source in full["Sources"]]
    return full


def oracle(expression, value):
    if isinstance(expression, Not):
        return not oracle(expression.operand, value)
    if isinstance(expression, And):
        return min(oracle(each, value) for each in expression.operands)
    if isinstance(expression, Or):
        return max(oracle(each, value) for each in expression.operands)
    if isinstance(expression, Collection):
        answers = [
            oracle(expression.inner, {**value, "i": index, "s": source})
            for index, source in enumerate(value["Sources"])
        ]
        return any(answers) if expression.quantifier is Quantifier.ANY else all(answers)
    text = expression.value.text if expression.value else ""
    denied = "not" in expression.operator or expression.operator is Operator.NOT_EQUAL
    question = expression.operator.replace("not ", "").replace("!=", "==")
    path = expression.selector.path
    if path[0] == "Sources" and len(path) == 2:
        return any(ask(question, source[path[1]], text) != denied for source in value["Sources"])
    try:
        for part in path:
            value = value[int(part) if part.isdigit() else part]
    except (KeyError, IndexError):
        return (question == "is empty") != denied
    return ask(question, value, text) != denied


def ask(question, value, text):
    if question == "is empty":
        return len(value) == 0
    if question == "==":
        return str(value).lower() == text
    if question == "in" and isinstance(value, list):
        return text in [str(each) for each in value]
    # The words that are generated are patterns that match themselves.
    return text in value


@settings(deadline=None)
@given(expressions, objects)
def test_the_answer_is_that_of_an_evaluator_written_for_this_shape(expression, value):
    check(expression, SMALL, str(expression))
    assert matches(expression, value, SMALL) is bool(oracle(expression, filled(value)))


@settings(deadline=None)
@given(expressions, objects)
def test_the_answer_survives_writing_and_reading_the_expression(expression, value):
    again = parse(str(expression))
    assert matches(again, value, SMALL) is matches(expression, value, SMALL)


@settings(deadline=None)
@given(expressions, objects)
def test_not_is_the_opposite(expression, value):
    assert matches(parse(f"not ({expression})"), value, SMALL) is not matches(
        expression, value, SMALL
    )
