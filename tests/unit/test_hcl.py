"""HCL1 as Consul's users write and paste it."""

import contextlib
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InputError
from tidegate.intent import hcl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Kind = "mesh" TransparentProxy { MeshDestinationsOnly = false}',
            {"Kind": "mesh", "TransparentProxy": {"MeshDestinationsOnly": False}},
        ),
        (
            'Kind = "mesh" AllowEnablingPermissiveMutualTLS = '
            "trueTransparentProxy { MeshDestinationsOnly = false}",
            {
                "Kind": "mesh",
                "AllowEnablingPermissiveMutualTLS": True,
                "TransparentProxy": {"MeshDestinationsOnly": False},
            },
        ),
        (
            'Kind = "service-defaults"Name = "example-service" MutualTLSMode = "permissive"',
            {
                "Kind": "service-defaults",
                "Name": "example-service",
                "MutualTLSMode": "permissive",
            },
        ),
        (
            'Kind = "mesh" AllowEnablingPermissiveMutualTLS = '
            "falseTransparentProxy { MeshDestinationsOnly = true}",
            {
                "Kind": "mesh",
                "AllowEnablingPermissiveMutualTLS": False,
                "TransparentProxy": {"MeshDestinationsOnly": True},
            },
        ),
    ],
)
def test_the_one_line_examples_of_the_onboarding_document_are_read(text, expected):
    assert hcl.parse(text, "doc") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (
            "a = 1\nb = -2\nc = 0x1F\nd = 1.5\ne = 1e3",
            {"a": 1, "b": -2, "c": 31, "d": 1.5, "e": 1000.0},
        ),
        ("# one\n// two\n/* three\n */ a = true # four", {"a": True}),
        ('a = "x\\n\\"\\\\\\u00e9\\x41\\101"', {"a": 'x\n"\\éAA'}),
        ("a = [1, 2,]", {"a": [1, 2]}),
        ("a = [\n  { b = 1 },\n  { b = 2 }\n]", {"a": [{"b": 1}, {"b": 2}]}),
        ("a = { b = 1, c = 2 }", {"a": {"b": 1, "c": 2}}),
        ("a { b = 1 } a { b = 2 } a { b = 3 }", {"a": [{"b": 1}, {"b": 2}, {"b": 3}]}),
        ('a "x" "y" { b = 1 }', {"a": {"x": {"y": {"b": 1}}}}),
        ('"quoted key" = 1', {"quoted key": 1}),
        ("a = <<EOF\none\n  two\nEOF\nb = 1", {"a": "one\n  two\n", "b": 1}),
        ("a = <<-EOF\n    one\n      two\n    EOF\n", {"a": "one\n  two\n"}),
        ("a-b.c_d = 1\r\nx = 2\r\n", {"a-b.c_d": 1, "x": 2}),
        ("\ufeffa = 1", {"a": 1}),
    ],
)
def test_the_notation_is_read(text, expected):
    assert hcl.parse(text, "f.hcl") == expected


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("Kind = mesh", "line 1, column 8", '"mesh"'),
        ("a = 1\nb {\n  c = 2\n", "line 4, column 1", "'}' for the '{' on line 2"),
        ("a = [1 2]", "line 1, column 8", "',' or ']'"),
        ('a = "x\ny"', "line 1, column 5", "'\"'"),
        ("a = <<E\nx\n", "line 1, column 5", "a line with E alone"),
        ("a = 1 }", "line 1, column 7", "the name of a field or a block"),
        ('a = "\\q"', "line 1, column 6", "one like"),
        ('a = "\\ud800"', "line 1, column 6", "a Unicode character"),
        ("a = 1\n/* x", "line 2, column 1", "'*/'"),
        ("\n  @", "line 2, column 3", "a name"),
        ("a b = 1", "line 1, column 8", "a block after the label 'b'"),
        ("a", "line 1, column 2", "'=' or '{' after 'a'"),
        ("a = ", "line 1, column 5", "a value"),
        ("a = 1\na = 2", "line 2: a", "the first is on line 1"),
        ("a = " + "9" * 40, "line 1, column 5", "at most 32 digits"),
        ("a = {" * 40, "line 1, column 165", "at most 32 levels"),
        ("a = " + "[" * 100_000, "line 1, column 37", "at most 32 levels"),
        ("a " * 100_000, "line 1, column 67", "at most 32 levels"),
        ("a" * (hcl.MAX_TEXT + 1), "", "at most 524288 characters"),
    ],
)
def test_what_is_wrong_is_told_with_place_and_remedy(text, where, expected):
    with pytest.raises(InputError) as caught:
        hcl.parse(text, "f.hcl")
    assert caught.value.source == "f.hcl"
    assert caught.value.field == where
    assert expected in caught.value.expected


def test_a_key_remembers_its_line():
    block = hcl.parse("a = 1\n\nb {\n  c = 2\n}\n", "f")
    assert block.lines == {"a": 1, "b": 3}
    assert block["b"].lines == {"c": 4}


NAMES = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8).map(
    lambda text: "k" + text
)
VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


def written(value):
    match value:
        case dict():
            inside = "\n".join(f"{key} = {written(inner)}" for key, inner in value.items())
            return "{\n" + inside + "\n}"
        case list():
            return "[" + ", ".join(map(written, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return json.dumps(value)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.sampled_from(["\n", " "]))
def test_whatever_is_written_is_read_back(fields, separator):
    text = separator.join(f"{key} = {written(value)}" for key, value in fields.items())
    assert hcl.parse(text, "f") == fields


@given(st.text(st.sampled_from('ab ={}[],"\n<#/*\\1.-tE'), max_size=40))
def test_any_text_is_read_or_refused_with_an_input_error(text):
    with contextlib.suppress(InputError):
        assert isinstance(hcl.parse(text, "f"), dict)
