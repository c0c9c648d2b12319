"""Envoy's counters as a second witness of what the ledger says about inbound connections.

Pure. Both count the same connections, but at different moments, so the comparison is a bracket:
since a common baseline, Envoy must have counted at least what the ledger was sure of one round ago
and at most what the ledger knows now. That holds when each round reads Envoy's counters first and
the kernel's edges after. An offset that the baseline itself can explain is allowed for; one that
grows is not. Disagreement counts after PERSISTENT_ROUNDS rounds in a row.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from tidegate.addresses import is_within
from tidegate.model import Direction, Edge, FlowClass
from tidegate.verdict.evidence import ChainTotals, WitnessReading

PERSISTENT_ROUNDS = 3


class SidecarCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of Envoy's admin interface.

    Totals are downstream_cx_total of tcp.permissive_public_listener and of tcp. or
    http.public_listener: connections that entered the chain, not completed handshakes.
    """

    permissive_total: int
    public_total: int
    permissive_active: int
    public_active: int | None = None
    """downstream_cx_active of the public chain; None where it was not read, which makes the
    comparison coarser."""
    epoch: str
    """Names the Envoy process and the mode it runs: counts of different epochs cannot be
    compared."""


class ChainCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to one filter chain, cumulative, by the ledger."""

    nonempty: int
    """Seen from their SYN and with payload: the sidecar must have accepted them."""
    all: int
    """Every one, also those without payload and those that began before the observation."""


class LedgerCounts(msgspec.Struct, frozen=True, kw_only=True):
    permissive: ChainCounts
    public: ChainCounts
    generation: str = ""
    """Identity of the kernel map that was counted from."""


def count_chains(
    edges: Iterable[Edge],
    *,
    permissive_ports: Collection[int],
    excluded_ports: Sequence[tuple[int, int]] = (),
    excluded_sources: Sequence[str] = (),
    inbound_port: int,
    generation: str = "",
) -> LedgerCounts:
    """What the cumulative edges of one workload say about the two chains.

    `permissive_ports` are the ports that have a permissive chain now, none in strict mode. Flows on
    excluded ports or from excluded networks never come to the sidecar, except on its own inbound port.
    """
    counts = {"permissive": [0, 0], "public": [0, 0]}
    for edge in edges:
        port = edge.key.port
        excluded = any(first <= port <= last for first, last in excluded_ports)
        excluded = excluded or is_within(edge.key.peer, excluded_sources)
        if edge.key.direction is not Direction.INBOUND or (excluded and port != inbound_port):
            continue
        chain = counts["permissive" if port in permissive_ports else "public"]
        if edge.key.flow_class not in (FlowClass.EMPTY, FlowClass.UNKNOWN):
            chain[0] += edge.count.connections
        chain[1] += edge.count.connections
    return LedgerCounts(
        permissive=ChainCounts(nonempty=counts["permissive"][0], all=counts["permissive"][1]),
        public=ChainCounts(nonempty=counts["public"][0], all=counts["public"][1]),
        generation=generation,
    )


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What both witnesses said in one round."""

    at: float
    sidecar: SidecarCounts
    ledger: LedgerCounts


class WitnessState(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between rounds, for one workload. `advance` makes the next one."""

    before: Round | None = None
    """The round before the baseline: connections that it knew may enter the sidecar's count
    after the baseline."""
    baseline: Round | None = None
    latest: tuple[Round, ...] = ()
    """Up to PERSISTENT_ROUNDS rounds since the baseline, oldest first."""
    disagreements: int = 0
    """In a row."""
    disagreed_at: float = 0.0
    fault: str = ""
    """What is wrong in the latest comparison."""
    restarted: str = ""
    """Why the baseline is a new one."""
    reading: WitnessReading = WitnessReading()


def advance(
    state: WitnessState, now: float, sidecar: SidecarCounts, ledger: LedgerCounts
) -> WitnessState:
    """Takes one round. `sidecar` must have been read before the edges that `ledger` was counted
    from."""
    this = Round(at=now, sidecar=sidecar, ledger=ledger)
    if state.before is None:
        return _begin(this, state, state.restarted)
    broken = _break(state.latest[-1] if state.latest else state.before, this)
    if broken:
        return _begin(this, state, broken)
    if state.baseline is None:
        return msgspec.structs.replace(state, baseline=this, latest=(this,))
    return _compare(state, this, state.before, state.baseline)


def _begin(this: Round, state: WitnessState, why: str) -> WitnessState:
    detail = f"{why}: comparing anew" if why else "comparison has just begun"
    return WitnessState(
        before=this,
        disagreed_at=state.disagreed_at,
        restarted=why,
        reading=WitnessReading(
            detail=detail,
            permissive_active=0,
            permissive_open=this.sidecar.permissive_active,
            since=this.at,
            disagreed_at=state.disagreed_at,
        ),
    )


def _break(last: Round, this: Round) -> str:
    """Why counts of two rounds cannot be compared; empty when they can."""
    if last.sidecar.epoch != this.sidecar.epoch:
        return "the sidecar was restarted or changed its mode"
    if (
        this.sidecar.permissive_total < last.sidecar.permissive_total
        or this.sidecar.public_total < last.sidecar.public_total
    ):
        return "the sidecar's counters went back"
    if last.ledger.generation != this.ledger.generation:
        return "the ledger began to count anew"
    return ""


class _Bracket(msgspec.Struct, frozen=True):
    chain: str
    sidecar: int
    least: int
    most: int

    @property
    def fault(self) -> str:
        if self.sidecar < self.least:
            return f"{self.chain}: the sidecar counted {self.sidecar} connections, the ledger saw at least {self.least}"
        if self.sidecar > self.most:
            return f"{self.chain}: the sidecar counted {self.sidecar} connections, the ledger saw at most {self.most}"
        return ""


def _compare(state: WitnessState, this: Round, before: Round, baseline: Round) -> WitnessState:
    previous = state.latest[-1]
    permissive = _Bracket(
        "permissive_public_listener",
        this.sidecar.permissive_total - baseline.sidecar.permissive_total,
        _sure(
            previous.ledger.permissive,
            baseline.ledger.permissive,
            baseline.sidecar.permissive_active,
        ),
        this.ledger.permissive.all - before.ledger.permissive.all,
    )
    public = _Bracket(
        "public_listener",
        this.sidecar.public_total - baseline.sidecar.public_total,
        _sure(previous.ledger.public, baseline.ledger.public, baseline.sidecar.public_active),
        this.ledger.public.all - before.ledger.public.all,
    )
    fault = "; ".join(bracket.fault for bracket in (permissive, public) if bracket.fault)
    disagreements = state.disagreements + 1 if fault else 0
    counts = disagreements >= PERSISTENT_ROUNDS
    disagreed_at = this.at if counts else state.disagreed_at
    latest = (*state.latest, this)[-PERSISTENT_ROUNDS:]
    note = f" ({state.restarted}: compared since then)" if state.restarted else ""
    return msgspec.structs.replace(
        state,
        latest=latest,
        disagreements=disagreements,
        disagreed_at=disagreed_at,
        fault=fault,
        reading=WitnessReading(
            agrees=not counts,
            detail=(fault if counts else "the sidecar's counters agree with the ledger") + note,
            sidecar=ChainTotals(permissive=permissive.sidecar, public=public.sidecar),
            least=ChainTotals(permissive=permissive.least, public=public.least),
            most=ChainTotals(permissive=permissive.most, public=public.most),
            permissive_active=min(each.sidecar.permissive_active for each in latest)
            if len(latest) == PERSISTENT_ROUNDS
            else 0,
            permissive_open=this.sidecar.permissive_active,
            since=baseline.at,
            disagreed_at=disagreed_at,
        ),
    )


def _sure(previous: ChainCounts, baseline: ChainCounts, active: int | None) -> int:
    """Connections that the sidecar must have counted since the baseline.

    A connection that it had accepted before, and that sent its first payload after, is in the
    ledger's growth and not in the sidecar's. There are at most as many as were empty at the
    baseline, and as were open then.
    """
    empty = max(baseline.all - baseline.nonempty, 0)
    pending = empty if active is None else min(empty, active)
    return max(previous.nonempty - baseline.nonempty - pending, 0)
