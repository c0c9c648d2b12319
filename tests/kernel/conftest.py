"""Fixtures of the kernel tests: network namespaces of their own, gone after each test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from namespaces import Pair, namespace, pair_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        skip = pytest.mark.skip(reason="kernel tests need root")
        for item in items:
            item.add_marker(skip)


@pytest.fixture
def new_namespace() -> Iterator[Callable[[], str]]:
    """Makes a network namespace per call and returns its path."""
    with ExitStack() as made:
        yield lambda: made.enter_context(namespace())


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A pod's namespace and the one at the other end of its veth."""
    with pair_of() as made:
        yield made
