"""Filter expressions are checked against what they filter: selectors, operators and values."""

import enum

import msgspec
import pytest

from tidegate.intent.filtering.checking import check
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.filter import Filter
from tidegate.intent.filtering.grammar import parse
from tidegate.intent.filtering.shapes import (
    ANYTHING,
    ListOf,
    MapOf,
    Record,
    Scalar,
    shape_of,
)

SERVICE = shape_of(
    {
        "Name": str,
        "MutualTLSMode": str,
        "Port": int,
        "Weight": float,
        "Enabled": bool,
        "Meta": {str: str},
        "Tags": [str],
        "Ports": [int],
        "Sources": [{"Name": str, "Precedence": int, "Ports": [int]}],
        "TLS": {"Incoming": {"TLSMinVersion": str}},
        "Limits": {str: {"Max": int}},
        "Config": object,
        "Extra": {str: object},
    }
)

SCALARS = ("Port", "Weight", "Enabled")
TEXTS = ("Name", "TLS.Incoming.TLSMinVersion", "Sources.Name", "Sources.0.Name", "Meta.any")
CONTAINERS = ("Tags", "Meta", "Limits", "Extra")
ANY_JSON = ("Config", "Config.a.b", "Config.0", "Extra.key", "Extra.key.deeper")


def fault(text, shape=SERVICE):
    with pytest.raises(FilterError) as caught:
        check(parse(text), shape, text)
    return caught.value


def accepts(text):
    check(parse(text), SERVICE, text)


@pytest.mark.parametrize("selector", [*TEXTS, *ANY_JSON])
@pytest.mark.parametrize(
    "form",
    ["{} == x", "{} != x", "x in {}", "x not in {}", "{} matches x", "{} not matches x",
     "{} is empty", "{} is not empty"],
)  # fmt: skip
def test_text_takes_every_operator_but_is_nil(selector, form):
    accepts(form.format(selector))


@pytest.mark.parametrize("selector", SCALARS)
def test_numbers_and_bools_are_only_compared(selector):
    accepts(f"{selector} == 1")
    accepts(f"{selector} != 0")
    for form in ("1 in {}", "{} matches x", "{} is empty", "{} is nil"):
        assert fault(form.format(selector)).expected == "==, !="


@pytest.mark.parametrize("selector", CONTAINERS)
def test_lists_and_maps_are_asked_for_members_and_emptiness(selector):
    for form in ("x in {}", "{} not contains x", "{} is empty", "{} is not empty", "{} is nil"):
        accepts(form.format(selector))
    for form in ("{} == x", "{} matches x"):
        assert "in, not in, is empty" in fault(form.format(selector)).expected


def test_a_list_of_objects_has_no_members_to_compare_with():
    accepts("Sources is empty")
    accepts("Sources is not nil")
    assert fault("x in Sources").expected == "is empty, is not empty, is nil, is not nil"


def test_an_object_takes_is_nil_only():
    accepts("TLS is nil")
    accepts("Limits.web is not nil")
    assert fault("TLS == x").expected == "is nil, is not nil"


@pytest.mark.parametrize(
    "text",
    [
        "Sources.Ports contains 80",
        "Limits.web.Max == 3",
        'Limits["a b"].Max == 3',
        "Meta.a/b == x",
        '"/Meta/a~1b" == x',
        "Ports.0 == 80",
        '"0x1F" in Ports',
        "any Sources as s { s.Name == web and Enabled == true }",
        "any Sources as i, s { i == 0 and s.Precedence == 9 }",
        "all Meta as k { k matches `^a` }",
        "any Meta as _, v { v == x }",
        "any Limits as k, v { k == web and v.Max == 3 }",
        "any Sources as s { any s.Ports as p { p == 80 } }",
        "any Tags as Name { Name == x }",
        "any Tags as Port { Port matches x }",
        "any Config as x { x == 1 and any x as y { y.z is nil } }",
    ],
)
def test_selectors_lead_through_lists_maps_and_names(text):
    accepts(text)


@pytest.mark.parametrize(
    ("text", "column", "problem", "expected"),
    [
        ("MutualTlsMode == x", 1, "'MutualTlsMode' is not a field here", "MutualTLSMode"),
        ("mutual_tls_mode == x", 1, "'mutual_tls_mode' is not a field here", "MutualTLSMode"),
        ("Zzz == x", 1, "'Zzz' is not a field here", "one of Name, MutualTLSMode"),
        ("Name == x and Prot == 1", 15, "'Prot' is not a field here", "Port"),
        ("TLS.Incomming.TLSMinVersion == x", 5, "not a field of TLS", "Incoming"),
        ("TLS.Incoming.Min == x", 14, "not a field of TLS.Incoming", "TLSMinVersion"),
        ('"/TLS/Incomming" is nil', 7, "not a field of TLS", "Incoming"),
        ("Sources.Nam == x", 9, "not a field of Sources", "Name"),
        ("Sources.0.Nam == x", 11, "not a field of Sources.0", "Name"),
        ("Limits.web.max == 3", 12, "not a field of Limits.web", "Max"),
        ("Name.x == 3", 6, "Name is text, which has no fields", "no field"),
        ("Meta.a.b == 3", 8, "Meta.a is text, which has no fields", "no field"),
        ("Tags.x == 3", 6, "Tags is text, which has no fields", "no field"),
        ("Sources.Name.0 == x", 14, "Sources.Name is text, which has no fields", "no field"),
        ('Port["x"] == 3', 6, "Port is a whole number, which has no fields", "no field"),
        ("Port is empty", 1, 'Port is a whole number, which does not take "is empty"', "==, !="),
        ("80 in Port", 7, 'Port is a whole number, which does not take "in"', "==, !="),
        ("TLS.Incoming == x", 5, 'TLS.Incoming is an object, which does not take "=="', "is nil"),
        ("Port == http", 9, "'http' is not a whole number, as Port is", "digits"),
        ("Port == 80.5", 9, "'80.5' is not a whole number", "digits"),
        ("http in Ports", 1, "'http' is not a whole number, as Ports is", "digits"),
        ("Weight == heavy", 11, "'heavy' is not a number, as Weight is", "1.5"),
        ("Enabled == yes", 12, "'yes' is not a bool, as Enabled is", "true or false"),
        ("any Name as x { x == 1 }", 5, "Name is text", "a list or a map"),
        ("any TLS as x { x == 1 }", 5, "TLS is an object", "a list or a map"),
        ("any Tags as t { t.x == 1 }", 19, "t is text, which has no fields", "no field"),
        ("any Sources as s { s.Nam == x }", 22, "not a field of s", "Name"),
        ("any Sources as src { scr.Name == x }", 22, "'scr' is not a field here", "src"),
        ("any Meta as k, v { v == 1 } and k == 1", 33, "'k' is not a field here", "one of"),
        ("any Sources as i, s { i == first }", 28, "not a whole number, as i is", "digits"),
        ("not (Name == x or Prot == 1)", 19, "'Prot' is not a field here", "Port"),
    ],
)
def test_what_cannot_apply_is_refused_with_its_column(text, column, problem, expected):
    error = fault(text)
    assert error.column == column, error
    assert problem in error.problem
    assert expected in error.expected
    assert error.text == text


def test_a_long_unknown_name_makes_a_short_message():
    assert len(str(fault("x" * 10_000 + " == 1"))) < 400


def test_a_map_at_the_top_takes_any_key_and_a_list_nothing():
    check(parse("web.Max == 1"), shape_of({str: {"Max": int}}), "")
    assert fault("web == 1", shape_of(str)).problem.startswith("what is filtered is text")


class Mode(enum.Enum):
    STRICT = "strict"


class Inner(msgspec.Struct, rename="pascal"):
    min_version: str = ""


class Outer(msgspec.Struct, rename="pascal"):
    name: str
    mode: Mode | None = None
    port: int | None = 0
    weight: float = 1.0
    on: bool = False
    tags: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()
    meta: dict[str, str] = {}
    inner: Inner | None = None
    inners: list[Inner] = []
    either: int | str = 0


class Endless(msgspec.Struct):
    inner: "Endless | None" = None


def test_a_struct_describes_itself_by_its_names_in_json():
    inner = Record({"MinVersion": Scalar.TEXT})
    assert shape_of(Outer) == Record(
        {
            "Name": Scalar.TEXT,
            "Mode": Scalar.TEXT,
            "Port": Scalar.INTEGER,
            "Weight": Scalar.FLOAT,
            "On": Scalar.FLAG,
            "Tags": ListOf(Scalar.TEXT),
            "Ids": ListOf(Scalar.INTEGER),
            "Meta": MapOf(Scalar.TEXT),
            "Inner": Record(inner.fields, optional=True),
            "Inners": ListOf(inner),
            "Either": ANYTHING,
        }
    )


def test_a_struct_can_be_a_part_of_a_description():
    inner = Record({"MinVersion": Scalar.TEXT})
    assert shape_of({"TLS": Inner, "All": [Inner]}) == Record({"TLS": inner, "All": ListOf(inner)})


@pytest.mark.parametrize("description", [bytes, {1: str}, [str, int], "str", Endless])
def test_what_describes_nothing_is_a_type_error(description):
    with pytest.raises(TypeError):
        shape_of(description)


def test_a_filter_is_read_and_checked_at_once():
    services = [{"Name": "web", "Port": 80}, {"Name": "api"}, {"Port": 80}]
    assert Filter("Port == 80", SERVICE).select(services, dict) == [services[0], services[2]]
    assert Filter('Name == ""', SERVICE).select(services, dict) == [services[2]]
    with pytest.raises(FilterError, match="column 1: 'Prot' is not a field here; expected Port"):
        Filter("Prot == 80", SERVICE)
    with pytest.raises(FilterError, match='column 6: no operator = here; expected "=="'):
        Filter("Port = 80", SERVICE)
