"""Every connection of the corpus is what it is, by the live classifier, by tshark, and by `tidegate classify`."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from corpus import CASES, Case, Seen
from dissection import Dissected
from place import place
from playing import Played, play, possible

from tidegate.model import FlowClass

TLS_CLASSES = {FlowClass.TLS, FlowClass.MESH, FlowClass.STARTTLS}


@dataclass(frozen=True)
class Difference:
    """Where tshark says something else of a connection on purpose, and why tidegate is right for what it is for."""

    case: str
    tshark: Dissected
    reason: str


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "SSLv2-compatible hello",
        Dissected(first="client"),
        "tshark 4.0 looks for SSLv2 records only on ports that it knows as TLS; OpenSSL's server takes it for a hello",
    ),
)


@pytest.fixture(scope="session")
def played() -> Iterator[Played]:
    with place() as made:
        yield play(made)


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def connections(played: Played, case: Case) -> list[tuple[Seen, object]]:
    if not possible(case):
        pytest.skip(f"{case.needs} is not installed here, and is too large to be fetched for this")
    return list(zip(case.seen, played.connections[case.name], strict=True))


@cases
def test_a_client_is_served_and_opens_the_connections_that_it_should(
    played: Played, case: Case
) -> None:
    if not possible(case):
        pytest.skip(f"{case.needs} is not installed here, and is too large to be fetched for this")
    called = played.called[case.name]
    assert called.status in case.status, called.output
    assert case.says in called.output
    assert len(played.connections[case.name]) == len(case.seen), called.output


@cases
def test_observe_sees_what_a_client_does(played: Played, case: Case) -> None:
    for seen, connection in connections(played, case):
        flow = played.observed_flow(connection)
        assert flow is not None, f"{connection} is not among the flows"
        assert (flow["class"], flow["hint"], flow["sni"], tuple(flow["alpn"])) == (
            right_class(played, case, seen, connection),
            seen.hint,
            seen.sni,
            seen.alpn,
        )
        assert {"proxy", "sslv2"} & set(flow["flags"]) == seen.flags
        assert flow["syn_seen"]


@cases
def test_tshark_sees_the_same_or_differs_for_a_known_reason(played: Played, case: Case) -> None:
    known = {each.case: each.tshark for each in DIFFERENCES}
    for seen, connection in connections(played, case):
        dissected = played.dissected[connection]
        right = Dissected(seen.flow_class in TLS_CLASSES, seen.sni, seen.alpn, dissected.first)
        if case.name in known:
            assert dissected == known[case.name] != right
        else:
            assert dissected == right


@cases
def test_classify_says_of_the_capture_what_observe_said_of_the_connection(
    played: Played, case: Case
) -> None:
    for _, connection in connections(played, case):
        observed, classified = (
            played.observed_flow(connection),
            played.classified_flow(connection),
        )
        assert observed is not None
        assert classified is not None
        compared = observed.keys() - {"direction"}
        assert {key: classified[key] for key in compared} == {
            key: observed[key] for key in compared
        }


def test_every_connection_is_told_and_none_is_lost(played: Played) -> None:
    everything = [each for opened in played.connections.values() for each in opened]
    told = sorted((flow["client"], flow["server"]) for flow in played.observed["flows"])
    assert told == sorted((each.client, each.server) for each in everything)
    edges = sum(edge["connections"] for edge in played.observed["edges"])
    assert edges == len(everything)
    assert not {name: count for name, count in played.observed["counters"].items() if count}
    assert played.observed["flows_not_listed"] == 0


def right_class(played: Played, case: Case, seen: Seen, connection: object) -> FlowClass:
    """Where both ends speak at once, the capture says who was first."""
    if case.either and played.dissected[connection].first == "server":
        return case.either
    return seen.flow_class
