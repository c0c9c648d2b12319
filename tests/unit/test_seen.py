"""How what was seen looks on terminals that are narrow: nothing that identifies a connection is cut."""

import io

import pytest
from rich.console import Console

from tidegate.cli import seen
from tidegate.model import Direction, FlowClass, Hint
from tidegate.observe.report import EdgeRow, FlowRow, Report

CLIENT, SERVER = "[2001:db8::10:2]:37830", "[2001:db8::10:1]:8443"
NAME = "api.default.example.org"
FLOW = FlowRow(
    direction=Direction.OUTBOUND,
    client=CLIENT,
    server=SERVER,
    flow_class=FlowClass.STARTTLS,
    hint=Hint.POSTGRES,
    alpn=("h2",),
    sni=NAME,
    syn_seen=True,
    first_byte_seen=True,
    bytes_to_server=1_234_567,
    bytes_to_client=7_654_321,
    segments=4_242,
    flags=("server_first", "closed"),
)
EDGE = EdgeRow(
    direction=Direction.OUTBOUND,
    peer="2001:db8::10:1",
    port=8443,
    flow_class=FlowClass.STARTTLS,
    connections=1,
    bytes_to_server=1_234_567,
    bytes_to_client=7_654_321,
    hints=(Hint.POSTGRES,),
)
REPORT = Report(flows=(FLOW,), edges=(EDGE,), counters={}, ignored={}, flows_not_listed=0)


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


def terminal(written: io.StringIO, width: int) -> Console:
    return Console(file=written, width=width, force_terminal=True, color_system=None)


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_what_is_printed_in_the_end_is_cut_nowhere(written, width):
    seen.print_report(terminal(written, width), REPORT, as_json=False)
    text = written.getvalue()
    (line,) = [each for each in text.splitlines() if CLIENT in each]
    for part in (SERVER, "starttls", "postgres", f"{NAME} [h2]", "7654321", "server_first, closed"):
        assert part in line
    assert "…" not in text


@pytest.mark.parametrize(("width", "left_out"), [(200, []), (100, ["packets", "flags"])])
def test_a_live_table_leaves_columns_out_before_it_cuts_one(written, width, left_out):
    console = terminal(written, width)
    console.print(seen.tables_of(REPORT, 10, console))
    title, line = written.getvalue().splitlines()[:2]
    assert [each for each in ("packets", "flags") if each not in title] == left_out
    assert f"{CLIENT}  {SERVER}" in line
    assert f"{NAME} [h2]" in line
