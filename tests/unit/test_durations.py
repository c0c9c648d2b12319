"""Durations, as they are written and as they are shown."""

import argparse

import pytest

from tidegate import durations
from tidegate.cli.arguments import duration

WRITTEN = {
    "90": 90.0, "0.5": 0.5, "250ms": 0.25, "8s": 8.0, "1.5s": 1.5, "10m": 600.0, "24h": 86_400.0,
    "7d": 604_800.0, "1h30m": 5_400.0, "1us": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), WRITTEN.items())
def test_a_duration_is_a_number_with_units_or_seconds(text, seconds):
    assert durations.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "x", "1 h", "-1s", "1hour", "s", "1h30", "1e3", "٣s", "9" * 20]
)
def test_anything_else_is_no_duration(text):
    assert durations.parse(text) is None


@pytest.mark.parametrize("text", ["0", "0s", "tomorrow"])
def test_the_command_line_takes_only_durations_that_last(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as"):
        duration(text)


SHOWN = {
    0: "0 s", 0.4: "0 s", 8: "8 s", 59.6: "1 m", 200: "3 m 20 s", 86_400: "24 h",
    86_400 * 2 + 3_600 * 3 + 5: "2 d 3 h", -3: "0 s",
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), SHOWN.items())
def test_a_person_reads_the_two_largest_units(seconds, text):
    assert durations.span(seconds) == text


def test_what_was_less_than_a_second_ago_was_just_now():
    assert durations.ago(0.3) == "just now"
    assert durations.ago(61) == "1 m 1 s ago"
