"""Every run leaves the machine as it was, also when it is killed: see janitor.py."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from janitor import ENDED, MARK, labs


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
