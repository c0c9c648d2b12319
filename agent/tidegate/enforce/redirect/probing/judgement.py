"""What the fate of a probe shows, in words for a person."""

import enum
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.probing.place import Place, Target
from tidegate.enforce.redirect.probing.sending import Answer, Fate
from tidegate.enforce.redirect.rules import Drop, Leave, Redirect, Tproxy, Translate, Zone
from tidegate.intent.policy import Mode
from tidegate.kernel.conntrack import Endpoint
from tidegate.model import Direction

LEFT_ALONE = "left alone, as the policy says"
_OWN_LISTENER = "the port has a listener of its own: an answer tells nothing"
_UNHEARD = "answers cannot be seen here (before Linux 6.5 only by TUN)"
_UNTOLD = "connection tracking does not tell where it went (see net.netfilter.nf_conntrack_events)"


class Outcome(enum.StrEnum):
    """What a probe showed."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It could not be made, or could not tell."""


class Probe(msgspec.Struct, frozen=True):
    """One thing that was tried."""

    name: str
    """What and in which family, such as outbound-ipv4."""
    outcome: Outcome
    detail: str
    """What happened, or why it could not be tried; for a person."""


def skipped(name: str, reason: str) -> Probe:
    return Probe(name, Outcome.SKIPPED, reason)


def judged(place: Place, name: str, target: Target, fate: Fate) -> Probe:
    outcome, detail = _judgement(place, target, fate)
    return Probe(name, outcome, detail)


def _judgement(place: Place, target: Target, fate: Fate) -> tuple[Outcome, str]:
    action = target.action
    match action:
        case Redirect(port):
            return _redirected(place, target, fate, port)
        case Tproxy(port):
            return _handed_over(place, target, fate, port)
        case Translate(address, port):
            wanted = Endpoint(address, port)
            if fate.landed == wanted:
                return Outcome.PASSED, f"redirected to {_at(wanted)}{_heard(fate.answer)}"
            return _astray(place, target, fate, _at(wanted))
        case Leave():
            return _left_alone(place, target, fate)
        case Drop() | Zone():
            raise AssertionError(f"{action} decides on no connection of an application")
        case _:
            assert_never(action)


def _redirected(place: Place, target: Target, fate: Fate, port: int) -> tuple[Outcome, str]:
    landed = fate.landed
    if landed is None or landed.port != port:
        return _astray(place, target, fate, f"port {port}")
    if not place.owns(landed.address):
        return _astray(place, target, fate, "an address of the workload")
    if _is_unheard(place, target):
        return Outcome.PASSED, f"redirected to port {port}; {_UNHEARD}"
    if fate.answer is None:
        gone = f"redirected to port {port}, but no answer came back: something drops it"
        return Outcome.FAILED, gone
    return Outcome.PASSED, f"redirected to port {port}{_heard(fate.answer)}"


def _is_unheard(place: Place, target: Target) -> bool:
    """Whether an answer, if there is one, comes to where nobody sees it."""
    return target.connection.direction is Direction.INBOUND and not place.hears


def _heard(answer: Answer | None) -> str:
    """What to add about who answered."""
    match answer:
        case Answer.LISTENER:
            return "; a listener answered"
        case Answer.NOBODY:
            return "; nobody listens there yet"
        case None:
            return "; nobody answered"
        case _:
            assert_never(answer)


def _handed_over(place: Place, target: Target, fate: Fate, port: int) -> tuple[Outcome, str]:
    """There is no translation to see: only the answer of the transparent listener tells."""
    if fate.landed not in (None, target.dialled):
        return _astray(place, target, fate, f"port {port}")
    if place.listens(port) and not place.is_transparent(port):
        return Outcome.FAILED, f"the listener on port {port} is not transparent"
    if _is_unheard(place, target):
        return Outcome.SKIPPED, _UNHEARD
    if place.listens(target.connection.port) and fate.answer is not None:
        return Outcome.SKIPPED, _OWN_LISTENER
    if fate.answer is Answer.LISTENER:
        return Outcome.PASSED, f"handed to the listener on port {port}, which answered"
    if place.listens(port):
        return Outcome.FAILED, f"the listener on port {port} did not get it"
    return Outcome.SKIPPED, f"nobody listens on port {port} yet: until then nothing can be told"


def _left_alone(place: Place, target: Target, fate: Fate) -> tuple[Outcome, str]:
    if fate.landed not in (None, target.dialled):
        return Outcome.FAILED, f"it landed on {_at(fate.landed)}, and should be left alone"
    if target.connection.direction is Direction.INBOUND:
        return _let_in(place, target, fate)
    if not fate.left:
        return Outcome.FAILED, "it should be left alone, but never came out: something drops it"
    return Outcome.PASSED, LEFT_ALONE


def _let_in(place: Place, target: Target, fate: Fate) -> tuple[Outcome, str]:
    """With tproxy there is no translation to see, and what a listener should get that is not there is dropped."""
    if fate.landed is None and not place.knows:
        return Outcome.SKIPPED, _UNTOLD
    served = place.listens(target.connection.port)
    if fate.answer is Answer.LISTENER and not served:
        return Outcome.FAILED, "it should be left alone, but a listener of another port answered"
    if place.policy.mode is Mode.TPROXY:
        if _is_unheard(place, target):
            return Outcome.SKIPPED, _UNHEARD
        if fate.answer is None:
            dropped = "it should be left alone, but no answer came back: something drops it"
            return Outcome.FAILED, dropped
        if served and place.listens(place.policy.inbound.port):
            return Outcome.SKIPPED, _OWN_LISTENER
    return Outcome.PASSED, LEFT_ALONE


def _astray(place: Place, target: Target, fate: Fate, wanted: str) -> tuple[Outcome, str]:
    """What to say of a probe that did not land where it should."""
    if fate.left:
        by = "" if target.stays else f" by {target.connection.interface}"
        return Outcome.FAILED, f"not redirected to {wanted}: it left the namespace{by}"
    if fate.landed is None and not place.knows:
        return Outcome.SKIPPED, _UNTOLD
    if fate.landed is not None and fate.landed != target.dialled:
        return Outcome.FAILED, f"it landed on {_at(fate.landed)}, not on {wanted}"
    if fate.answer is not None:
        own = target.connection.port
        return Outcome.FAILED, f"not redirected to {wanted}: it reached port {own} itself"
    return Outcome.FAILED, f"no answer came back from {wanted}: something drops it"


def _at(endpoint: Endpoint) -> str:
    return f"{endpoint.address} port {endpoint.port}"
