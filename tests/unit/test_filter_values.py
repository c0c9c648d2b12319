"""Values of filter expressions become numbers and bools as Go's strconv makes them."""

import math

import pytest

from tidegate.intent.filtering.values import parse_flag, parse_float, parse_integer


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_what_go_takes_for_true(text):
    assert parse_flag(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_what_go_takes_for_false(text):
    assert parse_flag(text) is False


@pytest.mark.parametrize("text", ["", "yes", "tRUE", "on", " true", "2", "-1"])
def test_nothing_else_is_a_bool(text):
    assert parse_flag(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("-0", 0),
        ("12", 12),
        ("+12", 12),
        ("-12", -12),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-0X_1f", -31),
        ("0b101", 5),
        ("0o17", 15),
        ("017", 15),
        ("0_17", 15),
        ("-9223372036854775808", -(1 << 63)),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_whole_numbers_are_read_with_the_bases_of_go(text, number):
    assert parse_integer(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "-", "1.0", "1e3", "08", "0x", "1__0", "_1", "1_", "12a", " 1", "1 ", "१", "--1",
     "-9223372036854775809", "18446744073709551616", "1" * 100_000],
)  # fmt: skip
def test_what_go_takes_for_no_whole_number_is_none(text):
    assert parse_integer(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+1e3", 1000.0),
        ("1_0.5E-1", 1.05),
        ("inf", math.inf),
        ("-Infinity", -math.inf),
    ],
)
def test_floating_point_numbers_are_read(text, number):
    assert parse_float(text) == number


def test_nan_is_a_number_without_a_sign_only():
    assert math.isnan(parse_float("NaN"))
    assert parse_float("-nan") is None


@pytest.mark.parametrize(
    "text", ["", ".", "e5", "1e", "1__0", "1e999", " 1", "१", "0x1", "9" * 100_000]
)
def test_what_is_no_floating_point_number_is_none(text):
    assert parse_float(text) is None
