"""Filter expressions: what each rule of go-bexpr's grammar reads, and where errors point."""

import pytest

from tidegate.errors import InputError
from tidegate.intent.filtering import grammar
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.grammar import parse
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


def match(selector, operator, value=None):
    path = (selector,) if isinstance(selector, str) else tuple(selector)
    return Match(Selector(path), Operator(operator), None if value is None else Value(value))


def collection(quantifier, selector, binding, inner):
    return Collection(Quantifier(quantifier), Selector((selector,)), binding, inner)


A1, B2, C3 = (match(*each) for each in (("a", "==", "1"), ("b", "==", "2"), ("c", "==", "3")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foo == 3", match("foo", "==", "3")),
        ("foo != xyz", match("foo", "!=", "xyz")),
        ("foo in bar", match("bar", "in", "foo")),
        ("foo not in bar", match("bar", "not in", "foo")),
        ("bar contains foo", match("bar", "in", "foo")),
        ("bar not contains foo", match("bar", "not in", "foo")),
        ("foo matches bar", match("foo", "matches", "bar")),
        ("foo not matches bar", match("foo", "not matches", "bar")),
        ("list is empty", match("list", "is empty")),
        ("list is not empty", match("list", "is not empty")),
        ("list is nil", match("list", "is nil")),
        ("list is not nil", match("list", "is not nil")),
    ],
)
def test_every_operator_is_read(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("foo is empty", ["foo"]),
        ("foo.bar.baz is empty", ["foo", "bar", "baz"]),
        ("foo_1.B2 is empty", ["foo_1", "B2"]),
        ("slash/value is empty", ["slash/value"]),
        ("foo.0.bar is empty", ["foo", "0", "bar"]),
        ('foo["bar"]["ENV"] is empty', ["foo", "bar", "ENV"]),
        ("foo[\t`a b` ].c is empty", ["foo", "a b", "c"]),
        ('foo["abc-def ghi åß∂ƒ"] is empty', ["foo", "abc-def ghi åß∂ƒ"]),
        ('foo[""] is empty', ["foo", ""]),
        ('"/foo" is empty', ["foo"]),
        (
            '"/hy-phen/under_score/pi|pe/do.t/co:lon/été/½" is empty',
            ["hy-phen", "under_score", "pi|pe", "do.t", "co:lon", "été", "½"],
        ),
        ('"/a~1b/c~0d/~01" is empty', ["a/b", "c~d", "~1"]),
    ],
)
def test_every_form_of_a_selector_is_read(text, path):
    assert parse(text) == match(path, "is empty")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("word", "word"),
        ("dotted.word.3", "dotted.word.3"),
        ('indexed["a b"]', "indexed.a b"),
        ("0", "0"),
        ("-0.25", "-0.25"),
        ("1200", "1200"),
        ('"double"', "double"),
        ('""', ""),
        ("``", ""),
        ('`raw \\n "text"\nof lines`', 'raw \\n "text"\nof lines'),
        ("`carriage\r\nreturn`", "carriage\nreturn"),
        (r'"\a\b\f\n\r\t\v\\"', "\a\b\f\n\r\t\v\\"),
        (r'"\x41\101\u00e9\U0001F600"', "AAé😀"),
        (r'"\xc3\xa9"', "é"),
        ('"tab\tinside"', "tab\tinside"),
        ('"/like/a/pointer"', "/like/a/pointer"),
        ('"/~1"', "/~1"),
    ],
)
def test_every_form_of_a_value_is_read_as_text(text, value):
    assert parse(f"foo == {text}") == match("foo", "==", value)
    assert parse(f"{text} in foo") == match("foo", "in", value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a == 1 and b == 2", And((A1, B2))),
        ("a == 1 or b == 2", Or((A1, B2))),
        ("a == 1 and b == 2 and c == 3", And((A1, B2, C3))),
        ("a == 1 or b == 2 or c == 3", Or((A1, B2, C3))),
        ("a == 1 and b == 2 or c == 3", Or((And((A1, B2)), C3))),
        ("a == 1 or b == 2 and c == 3", Or((A1, And((B2, C3))))),
        ("(a == 1 or b == 2) and c == 3", And((Or((A1, B2)), C3))),
        ("a == 1 and (b == 2 and c == 3)", And((A1, And((B2, C3))))),
        ("not a == 1 and b == 2", And((Not(A1), B2))),
        ("not (a == 1 and b == 2)", Not(And((A1, B2)))),
        ("not not a == 1", A1),
        ("not not not a == 1", Not(A1)),
        ("not (not a == 1)", A1),
        ("(((a == 1)))", A1),
    ],
)
def test_not_binds_before_and_before_or(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("any Foo as x { x == 1 }", collection("any", "Foo", Binding(each="x"), match("x", "==", "1"))),
        ("all Foo as x {x == 1}", collection("all", "Foo", Binding(each="x"), match("x", "==", "1"))),
        (
            "any Foo as i, x{ a == 1 or b == 2 }",
            collection("any", "Foo", Binding(index="i", value="x"), Or((A1, B2))),
        ),
        ("any Foo as i,_ { a == 1 }", collection("any", "Foo", Binding(index="i"), A1)),
        ("any Foo as _ , x { a == 1 }", collection("any", "Foo", Binding(value="x"), A1)),
        (
            "all Foo as x { any x as y { a == 1 } }",
            collection(
                "all", "Foo", Binding(each="x"), collection("any", "x", Binding(each="y"), A1)
            ),
        ),
        ("a == 1 or any Foo as x { b == 2 }", Or((A1, collection("any", "Foo", Binding(each="x"), B2)))),
        ("not any Foo as x { a == 1 }", Not(collection("any", "Foo", Binding(each="x"), A1))),
        (
            "any Foo as x { a == 1 } and b == 2",
            And((collection("any", "Foo", Binding(each="x"), A1), B2)),
        ),
        ('all "/Foo" as x { a == 1 }', collection("all", "Foo", Binding(each="x"), A1)),
    ],
)  # fmt: skip
def test_every_form_of_any_and_all_is_read(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not in Tags", match("Tags", "in", "not")),
        ("not not in Tags", Not(match("Tags", "in", "not"))),
        ("not in in Tags", Not(match("Tags", "in", "in"))),
        ("not == 3", match("not", "==", "3")),
        ("not is empty", match("not", "is empty")),
        ("contains in matches", match("matches", "in", "contains")),
        ("is is empty", match("is", "is empty")),
        ("any in all", match("all", "in", "any")),
        ("any == 1 and all == 2", And((match("any", "==", "1"), match("all", "==", "2")))),
        ("a == and and b == or", And((match("a", "==", "and"), match("b", "==", "or")))),
        ("anything == 1", match("anything", "==", "1")),
        ("nothing == 1", match("nothing", "==", "1")),
    ],
)
def test_words_of_the_language_can_be_names_and_values(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foo==3", match("foo", "==", "3")),
        ("foo!=3", match("foo", "!=", "3")),
        ("\t\r\n foo \t\r\n == \t\r\n x \t\r\n", match("foo", "==", "x")),
        ("foo \n not \t in \r\n x", match("x", "not in", "foo")),
        ("foo  is  not  empty", match("foo", "is not empty")),
        ("( \t foo == x \n )", match("foo", "==", "x")),
        ("(a == 1)", A1),
        ("\tnot\n a == 1\n and\n b == 2", And((Not(A1), B2))),
    ],
)
def test_space_is_free_around_signs_and_between_words(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "column", "problem", "expected"),
    [
        ("", 1, "ends too early", "a selector"),
        (" \t", 3, "ends too early", "a selector"),
        ('MutualTLSMode = "permissive"', 15, "no operator =", '"=="'),
        ("foo", 4, "ends too early", '"=="'),
        ("foo ==", 7, "ends too early", "a value"),
        ("foo == ]", 8, "unexpected ']'", "a value"),
        ("foo bar", 5, "unexpected 'bar'", '"contains"'),
        ("foo == 'x'", 8, "single quotes", '"..." or `...`'),
        ("foo < 3", 5, "no operator <", '"=="'),
        ("foo >= 3", 5, "no operator >=", '"=="'),
        ("foo =~ `x`", 5, "no operator =~", '"matches"'),
        ("foo !~ `x`", 5, "no operator !~", '"not matches"'),
        ("a == 1 && b == 2", 8, "no operator &&", '"and"'),
        ("a == 1 || b == 2", 8, "no operator ||", '"or"'),
        ("!(a == 1)", 1, "no operator !", '"not"'),
        ("a == 1 AND b == 2", 8, "unexpected 'AND'", '"and"'),
        ("foo == 3x", 9, "not part of a number", "a number such as"),
        ("foo == 007", 9, "not part of a number", "a number such as"),
        ("foo == 1e5", 9, "not part of a number", "a number such as"),
        ("foo == 1.", 9, "not part of a number", "a number such as"),
        ("foo == -x", 8, "unexpected '-'", "a value"),
        ("foo == a-b", 9, "unexpected '-'", '"and"'),
        ('foo == "12x', 8, "without an end", 'closing "'),
        ("foo == `12x", 8, "without an end", "closing `"),
        (r'foo == "a\"b"', 10, "unknown escape", "backticks"),
        (r'foo == "ab\qc"', 11, r"unknown escape \q", "backticks"),
        (r'foo == "\xfz"', 9, r"unknown escape \x", "backticks"),
        (r'foo == "\ud800"', 9, "not a character", "backticks"),
        (r'foo == "\U00110000"', 9, "not a character", "backticks"),
        (r'foo == "a\xff"', 9, "not UTF-8", "backticks"),
        ('foo == "a\nb"', 10, "a line ends", "backticks"),
        ('foo == "\udcff"', 9, "not Unicode", "UTF-8"),
        ("foo[3] == abc", 5, "cannot be a key", "a string in quotes"),
        ("foo[] == abc", 5, "cannot be a key", "a string in quotes"),
        ('x in foo["abc"', 15, "without an end", '"]"'),
        ('foo["abc" == 3', 11, "without an end", '"]"'),
        ("foo. == 3", 5, "unexpected ' '", "a field or an index"),
        ("foo.-x == 3", 5, "unexpected '-'", "a field or an index"),
        ("_foo == 3", 1, "unexpected '_foo'", "a selector"),
        ("x in 32", 6, "unexpected '32'", "a selector"),
        ("x in", 5, "ends too early", "white space"),
        ("x not 3", 7, "unexpected '3'", '"in"'),
        ("32 == 32", 1, "a value is on the left", "a JSON pointer"),
        ('"foo" == 32', 1, "a value is on the left", "a JSON pointer"),
        ('"/foo/" == 32', 1, "a value is on the left", "a JSON pointer"),
        ("`/foo` == 32", 1, "a value is on the left", "a JSON pointer"),
        ("32 is empty", 4, "unexpected 'is'", '"in"'),
        ("foo is", 7, "ends too early", '"empty"'),
        ("foo is nothing", 8, "unexpected 'nothing'", '"nil"'),
        ("x in foo abc", 10, "unexpected 'abc'", "the end"),
        ("x in foo and ", 14, "ends too early", "a selector"),
        ("x in foo or not ", 17, "ends too early", "a selector"),
        ("x in foo or", 12, "ends too early", "white space"),
        ('foo contains"x"', 13, "unexpected '\"'", "white space"),
        ('"x"in foo', 4, "unexpected 'in'", "white space"),
        ('foo == "x"and bar == 1', 11, "unexpected 'and'", "white space"),
        ("(a == 1)and b == 2", 9, "unexpected 'and'", "white space"),
        ("not(a == 1)", 4, "unexpected '('", "white space"),
        ("(a == 1", 8, "ends too early", '")"'),
        ("a == 1)", 7, "unexpected ')'", "the end"),
        ("()", 2, "unexpected ')'", "a selector"),
        ("not (a == 1 and (b ==))", 22, "unexpected ')'", "a value"),
        ("foo matches `(a`", 13, "not a regular expression", "RE2"),
        ("foo not matches `a(?=b)`", 17, "not a regular expression", "RE2"),
        ("foo matches `(a)\\1`", 13, "not a regular expression", "RE2"),
        ("any Foo { a == 1 }", 9, "unexpected '{'", '"as"'),
        ("any Foo as { a == 1 }", 12, "unexpected '{'", "a name"),
        ("any Foo as _ { a == 1 }", 14, "unexpected '{'", '","'),
        ("any Foo as _, _ { a == 1 }", 15, "unexpected '_'", "a name"),
        ("any Foo as i, i { a == 1 }", 15, "name of the index", "another name"),
        ("any Foo as x ( a == 1 )", 14, "unexpected '('", '"{"'),
        ("any Foo as x { a == 1", 22, "ends too early", '"}"'),
        ("any Foo as x { }", 16, "unexpected '}'", "a selector"),
        ("any Foo as x { x = 1 }", 18, "no operator =", '"=="'),
    ],
)
def test_an_error_points_at_its_column_and_says_what_would_be_right(
    text, column, problem, expected
):
    with pytest.raises(FilterError) as caught:
        parse(text)
    error = caught.value
    assert error.column == column, error
    assert problem in error.problem
    assert expected in error.expected
    assert f"column {column}: " in str(error)
    assert isinstance(error, InputError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foo = 3", ["foo = 3", "    ^"]),
        ("foo ==", ["foo ==", "      ^"]),
        ("a == 1 and\n\tb = 2", ["a == 1 and  b = 2", "              ^"]),
        ("a == `日本` & b == 2", ["a == `日本` & b == 2", "            ^"]),
        ("a == `e\u0301` & b == 2", ["a == `e\u0301` & b == 2", "         ^"]),
    ],
)
def test_the_caret_stands_below_the_column(text, expected):
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert caught.value.caret.split("\n") == expected


def test_of_a_long_expression_the_part_around_the_column_is_shown():
    text = f"a == `{'x' * 500}` & b == `{'y' * 500}`"
    with pytest.raises(FilterError) as caught:
        parse(text)
    shown, caret = caught.value.caret.split("\n")
    assert shown[caret.index("^")] == "&"
    assert shown.startswith("...x")
    assert shown.endswith("y...")
    assert len(shown) < 80


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a == 1 and " * 10_000 + "a == 1", "an expression of"),
        ("(" * 10_000 + "a == 1" + ")" * 10_000, "an expression of"),
        ("(" * 5_000 + "a == 1" + ")" * 5_000, "nested too deep"),
        ("(" * (grammar.MAX_DEPTH + 1) + "a == 1" + ")" * (grammar.MAX_DEPTH + 1), "nested too deep"),
        ("not (" * 3_000, "nested too deep"),
        ("any a as x { " * 1_000, "nested too deep"),
        ("(" * 16_000, "nested too deep"),
        ("not " * 4_000, "ends too early"),
        ("a" + ".a" * 8_000 + " == 1", "parts"),
        ("a" + '["b"]' * 3_000 + " == 1", "parts"),
        ("a == `" + "x" * 16_000, "without an end"),
        ('a == "' + "\\n" * 8_000 + '\\"', "unknown escape"),
        ("a == " + "1" * 16_000 + "x", "not part of a number"),
        ("a" + " " * 16_000 + "b", "unexpected 'b'"),
        ("a matches `(a*)*` or " * 700 + "b == 1", "too many regular expressions"),
        ("a matches `((a{1000}){1000}){1000}`", "not a regular expression"),
        ("a matches `" + "(" * 16_000 + "`", "not a regular expression"),
    ],
)  # fmt: skip
def test_hostile_expressions_end_in_an_error(text, problem):
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert problem in caught.value.problem
    assert len(caught.value.caret) < 200


@pytest.mark.parametrize(
    "text",
    [
        "a == 1 and " * 1_400 + "a == 1",
        "not " * 4_000 + "a == 1",
        "(" * grammar.MAX_DEPTH + "a == 1" + ")" * grammar.MAX_DEPTH,
        "any a as x { " * grammar.MAX_DEPTH + "x == 1" + " }" * grammar.MAX_DEPTH,
        "a == `" + "x" * 16_000 + "`",
        'a == "/' + "x/" * 8_000 + '"',
        "a matches `" + "(x+x+)+" * 100 + "y`",
        "a" + ".a" * (grammar.MAX_PARTS - 1) + " == 1",
    ],
)
def test_large_expressions_within_the_bounds_are_read(text):
    assert parse(str(parse(text))) == parse(text)
