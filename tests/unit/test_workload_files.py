"""Workloads from files: what is there is listed, what is broken is told and changes nothing."""

import os
from pathlib import Path

import msgspec
import pytest

from tidegate.model import Workload
from tidegate.workloads import files
from tidegate.workloads.files import FileSource


def workload(name: str, **changes: object) -> Workload:
    made = Workload(id=f"{name}-1", name=name, service=name, node="n1", netns=f"/run/netns/{name}")
    return msgspec.structs.replace(made, **changes)


def put(directory: Path, made: Workload) -> Path:
    path = directory / f"{made.name}.json"
    path.write_bytes(msgspec.json.encode(made))
    return path


def test_workloads_come_and_go_with_their_files(tmp_path: Path) -> None:
    source = FileSource(tmp_path)
    assert source.list() == ()
    put(tmp_path, workload("b"))
    gone = put(tmp_path, workload("a"))
    assert [one.name for one in source.list()] == ["a", "b"]
    gone.unlink()
    put(tmp_path, workload("b", meshed=True))
    assert source.list() == (workload("b", meshed=True),)
    assert source.problems() == ()


def test_a_directory_that_goes_away_takes_no_workload_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "workloads"
    source = FileSource(directory)
    assert source.list() == ()
    assert str(directory) in source.problems()[0], "a missing directory is told from the beginning"
    directory.mkdir()
    put(directory, workload("a", meshed=True))
    assert [one.name for one in source.list()] == ["a"]
    assert source.problems() == ()
    directory.rename(tmp_path / "elsewhere")
    assert [one.name for one in source.list()] == ["a"]
    assert str(directory) in source.problems()[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a workload"),
        (b'{"id": "a-1"', "is not a workload"),
        (b'{"id": 3}', "is not a workload"),
        (b"[" * (files.MAX_FILE_BYTES + 1), "larger than"),
    ],
    ids=["empty", "cut off", "of another shape", "too large"],
)
def test_a_broken_file_is_told_and_keeps_the_workload_as_it_was(
    tmp_path: Path, content: bytes, words: str
) -> None:
    source = FileSource(tmp_path)
    path = put(tmp_path, workload("a"))
    put(tmp_path, workload("b"))
    before = source.list()
    path.write_bytes(content)
    assert source.list() == before
    (problem,) = source.problems()
    assert str(path) in problem
    assert words in problem
    put(tmp_path, workload("a", meshed=True))
    assert source.list()[0].meshed
    assert source.problems() == ()


def test_a_file_that_was_never_right_is_no_workload(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    source = FileSource(tmp_path)
    assert source.list() == ()
    assert len(source.problems()) == 1


def test_what_is_no_regular_file_is_not_opened_for_long(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    (tmp_path / "directory.json").mkdir()
    source = FileSource(tmp_path)
    assert source.list() == ()
    assert len(source.problems()) == 3


def test_two_files_with_one_id_are_told_and_the_first_is_kept(tmp_path: Path) -> None:
    put(tmp_path, workload("a"))
    put(tmp_path, workload("b", id="a-1"))
    source = FileSource(tmp_path)
    assert [one.name for one in source.list()] == ["a"]
    assert "already that of a.json" in source.problems()[0]


def test_files_that_are_still_being_written_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".a.json").write_text("{")
    (tmp_path / "a.json.new").write_text("{")
    source = FileSource(tmp_path)
    assert source.list() == ()
    assert source.problems() == ()


def test_no_more_files_are_read_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 2)
    for name in "abc":
        put(tmp_path, workload(name))
    source = FileSource(tmp_path)
    assert [one.name for one in source.list()] == ["a", "b"]
    assert "has 3 files" in source.problems()[0]
