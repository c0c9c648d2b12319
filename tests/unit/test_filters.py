"""Which of the ledger's edges `tidegate flows` shows, and since when."""

import argparse
import time

import pytest

from tidegate.cli import filters
from tidegate.cli.main import make_parser


def row(caller, server, port, flow_class, hints=()):
    def party(name):
        four, six = f"10.0.0.{len(name)}", f"fd00::{len(name)}"
        return {
            "workload": f"{name}-1",
            "service": name,
            "address": six,
            "addresses": [four, six],
        }

    return {
        "caller": party(caller),
        "server": party(server),
        "port": port,
        "class": flow_class,
        "hints": list(hints),
    }


ROWS = [
    row("web", "api", 8080, "mesh"),
    row("batch", "api", 8080, "plaintext", ["http1"]),
    row("batch", "db", 5432, "starttls", ["postgres"]),
    row("api", "db", 5432, "plaintext", ["postgres"]),
]


def shown(*argv):
    args = make_parser("flows").parse_args(["flows", *argv])
    answer = filters.chosen({"flows": ROWS, "problems": ["one"]}, args)
    assert answer["problems"] == ["one"]
    assert filters.is_given(args) == bool(argv)
    return [ROWS.index(one) for one in answer["flows"]]


@pytest.mark.parametrize(
    ("argv", "rows"),
    [
        ([], [0, 1, 2, 3]),
        (["--class", "plaintext"], [1, 3]),
        (["--class", "plaintext", "--class", "mesh"], [0, 1, 3]),
        (["--port", "5432"], [2, 3]),
        (["--port", "5432", "--port", "8080"], [0, 1, 2, 3]),
        (["--hint", "postgres"], [2, 3]),
        (["--hint", "postgres", "--class", "plaintext"], [3]),
        (["--caller", "batch"], [1, 2]),
        (["--caller", "batch-1"], [1, 2]),
        (["--peer", "api"], [0, 1, 3]),
        (["--peer", "10.0.0.5"], [1, 2]),
        (["--caller", "fd00:0::0005"], [1, 2]),
        (["--caller", "10.0.0.2"], []),
        (["--peer", "nobody"], []),
    ],
)
def test_each_filter_narrows_what_is_shown(argv, rows):
    assert shown(*argv) == rows


@pytest.mark.parametrize(
    "argv",
    [
        ["--class", "encrypted"],
        ["--hint", "gopher"],
        ["--port", "0"],
        ["--port", "http"],
        ["--since", "yesterday"],
        ["--since", "9999-01-01"],
        ["--since", "10m", "--window", "10m"],
    ],
)
def test_a_filter_that_chooses_nothing_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        make_parser("flows").parse_args(["flows", *argv])
    assert capsys.readouterr().err.startswith("tidegate: ")


def test_since_takes_durations_and_times():
    now = time.time()
    assert filters.since("10m") == pytest.approx(now - 600, abs=5)
    assert filters.since("2026-01-31T14:30+00:00") == 1769869800.0
    midnight = time.mktime((*time.localtime(now)[:3], 0, 0, 0, 0, 0, -1))
    assert filters.since("00:00") == midnight
    assert filters.since(time.strftime("%Y-%m-%d", time.localtime(now))) == midnight


def test_a_time_to_come_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="still to come"):
        filters.since("9999-01-01")
