"""What a killed test run leaves is removed, what others have stays."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import DEADLINE_S

import janitor
from tidegate.kernel import netns

MARK = "a run that is no more"


@pytest.fixture
def left() -> Iterator["subprocess.Popen[bytes]"]:
    """A process of a run, and a namespace named by its pid as if it were the run's."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, janitor.MARK: MARK}) as process:
        netns.create(f"tg-test-{process.pid}-0")
        yield process
        process.kill()
    netns.delete(f"tg-test-{process.pid}-0")


def clean(left: "subprocess.Popen[bytes]", mark: str, said: str) -> None:
    assert janitor.__file__
    argv = [sys.executable, janitor.__file__, str(left.pid), mark, *janitor.labs()]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, text=True) as cleaner:
        cleaner.communicate(said, timeout=DEADLINE_S)
    assert cleaner.returncode == 0


def test_a_killed_run_leaves_nothing(left):
    clean(left, MARK, "")
    assert left.wait(DEADLINE_S) == -9
    assert not Path(netns.path(f"tg-test-{left.pid}-0")).exists()


def test_processes_in_its_namespaces_go_too(left):
    with netns.spawn(netns.path(f"tg-test-{left.pid}-0"), ["sleep", "60"], env={}) as inside:
        clean(left, "another run", "")
        assert inside.wait(DEADLINE_S) == -9


def test_a_run_that_ended_is_left_alone(left):
    clean(left, MARK, janitor.ENDED)
    assert left.poll() is None
    assert Path(netns.path(f"tg-test-{left.pid}-0")).exists()


def test_processes_of_other_runs_are_left_alone(left):
    clean(left, "another run", "")
    assert left.poll() is None
