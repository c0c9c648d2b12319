"""Fixtures of the kernel tests: network namespaces of their own, gone after each test."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

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


@pytest.fixture
def state() -> Iterator[Path]:
    """A directory that the proxy user can pass, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)
