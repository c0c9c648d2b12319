"""Every run leaves the machine as it was, also when it is killed (janitor.py); no test redirects the machine itself."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from janitor import ENDED, MARK, labs
from tidegate.kernel import nf_tables

_TABLES = tuple((family, "tidegate") for family in ("inet", "ip", "ip6"))


@pytest.fixture(scope="session", autouse=True)
def janitor() -> Iterator[None]:
    if os.geteuid() != 0:
        # Nothing can be made that would have to be removed.
        yield
        return
    mark = f"{os.getpid()}-{os.urandom(8).hex()}"
    argv = [sys.executable, f"{__file__[: -len('conftest.py')]}janitor.py"]
    with subprocess.Popen(
        [*argv, str(os.getpid()), mark, *labs()],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as cleaner:
        os.environ[MARK] = mark
        yield
        del os.environ[MARK]
        cleaner.communicate(ENDED)


@pytest.fixture(autouse=True)
def machine_is_not_redirected() -> Iterator[None]:
    """A test that leaves rules in the namespace that the run is in is told at once: they would cut the machine off."""
    before = _redirected()
    yield
    assert _redirected() == before, "rules were left in the machine's own network namespace"


def _redirected() -> tuple[tuple[str, str], ...]:
    if os.geteuid() != 0:
        return ()
    return tuple(one for one in _TABLES if nf_tables.table_flags(*one) is not None)
