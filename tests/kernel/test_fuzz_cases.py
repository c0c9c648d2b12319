"""Streams in, the same answer out as from the reference: what ever made a difference, and a few thousand more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import cases, streams
from fuzz.differential import BATCH, Differential

SEED = 4
STREAMS = 3000


@pytest.fixture(scope="module")
def differential() -> Iterator[Differential]:
    with Differential.open() as opened:
        yield opened


@pytest.mark.parametrize(
    "path", sorted(cases.DIRECTORY.glob("*.json")), ids=lambda path: str(path.stem)
)
def test_what_once_made_a_difference_makes_none(differential: Differential, path: Path) -> None:
    assert [str(each) for each in differential.compare([cases.read(path)])] == []


@pytest.mark.parametrize("first", range(0, STREAMS, BATCH))
def test_the_kernel_and_the_reference_agree(differential: Differential, first: int) -> None:
    batch = [streams.make(SEED, number) for number in range(first, first + BATCH)]
    assert [str(each) for each in differential.compare(batch)] == []


def test_with_reports_the_kernel_says_the_same_and_tells_hellos_without_a_gap() -> None:
    batch = [streams.make(SEED + 1, number) for number in range(BATCH)]
    with Differential.open(report=True) as reporting:
        assert [str(each) for each in reporting.compare(batch)] == []
