"""Tables in terminals of every width: nothing of them is cut off."""

import io

import pytest
from rich.console import Console

from tidegate.cli import tables

NOW = 1_000.0


def answer():
    def party(name):
        return {"workload": name, "address": "10.0.0.1"}

    row = {
        "caller": party("tlsonly"),
        "server": party("pay"),
        "port": 20000,
        "class": "server-first",
        "hints": ["postgres"],
        "path": "outside the sidecars",
        "connections": 1234,
        "bytes_to_server": 10_000_000,
        "bytes_to_client": 1,
        "last_seen": NOW - 200,
    }
    return {"flows": [row]}


def printed(width, monkeypatch):
    """What a terminal is given, before it breaks lines."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    console = Console(highlight=False, width=width)
    tables.print_table(console, tables.flows(answer(), NOW))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 60, 80, 90, 100, 160])
def test_every_word_of_a_table_is_whole_in_a_terminal_of_any_width(width, monkeypatch):
    lines = printed(width, monkeypatch)
    row = "tlsonly -> pay 20000 server-first postgres sidecars 1234 10000001 3 m 20 s ago"
    assert {*row.split(" "), "connections", "caller"} <= {*" ".join(lines).split()}


@pytest.mark.parametrize("width", [92, 100, 160])
def test_a_table_is_no_wider_than_the_terminal_where_its_words_fit(width, monkeypatch):
    assert max(map(len, printed(width, monkeypatch))) <= width


def test_columns_come_closer_only_where_the_terminal_is_too_narrow(monkeypatch):
    assert "tlsonly  ->  pay" in "\n".join(printed(160, monkeypatch))
    assert "tlsonly -> pay" in "\n".join(printed(92, monkeypatch))


def test_a_live_table_is_never_wider_than_the_terminal():
    for width in (20, 60, 80):
        out = Console(highlight=False, width=width, file=io.StringIO())
        out.print(tables.fitted(out, tables.flows(answer(), NOW)))
        assert max(map(len, out.file.getvalue().splitlines())) <= width
