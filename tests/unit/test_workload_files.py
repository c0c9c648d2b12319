"""Workloads from files: what is there is listed, what is broken is told and changes nothing."""

import os
from pathlib import Path

import msgspec
import pytest

from tidegate.model import Workload
from tidegate.workloads import files
from tidegate.workloads.files import FileSource
from tidegate.workloads.source import Origin


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
    (found,) = source.list()
    assert (found.id, found.name, found.meshed) == ("b-1", "b", True)
    assert found.origin is Origin.FILES
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
        (b'{"x": ' + b"[" * 60_000, "is not a workload"),
        (b'{"id": 3, "annotations"', "is not a workload"),
        (b'{"id": 3, "x": ' + b"[" * 60_000, "is not a workload"),
        (b'{"id": 3, "name": "\xff"}', "is not a workload"),
        (b"[" * (files.MAX_FILE_BYTES + 1), "larger than"),
    ],
    ids=[
        "empty",
        "cut off",
        "of another shape",
        "deep",
        "wrong, then cut off",
        "wrong, then deep",
        "wrong, then no text",
        "too large",
    ],
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


def test_annotations_that_are_no_strings_are_named(tmp_path: Path) -> None:
    raw = msgspec.to_builtins(workload("a"))
    raw["annotations"] = {
        "app": "web",
        "tidegate.io/exclude-inbound-ports": 99999,
        "tidegate.io/direct-probes": True,
        "a/list": ["8080", "9000-9010"],
    }
    raw["namespace_annotations"] = {"b/none": None, "c/object": {}, "d\nodd": 1.5}
    path = tmp_path / "a.json"
    path.write_bytes(msgspec.json.encode(raw))
    source = FileSource(tmp_path)
    assert source.list() == ()
    assert source.problems() == (
        f"{path} is not a workload: "
        'annotations.tidegate.io/exclude-inbound-ports is not a string; expected "99999"; '
        'annotations.tidegate.io/direct-probes is not a string; expected "true"; '
        'annotations.a/list is not a string; expected "8080,9000-9010"; '
        'namespace_annotations.b/none is not a string; expected ""; '
        "namespace_annotations.c/object is not a string; expected text in quotes; "
        "namespace_annotations.'d\\nodd' is not a string; expected \"1.5\"",
    )


def test_of_very_many_annotations_that_are_no_strings_some_are_named(tmp_path: Path) -> None:
    raw = msgspec.to_builtins(workload("a"))
    raw["annotations"] = {f"{'x' * 100}{number}": number for number in range(500)}
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(raw))
    source = FileSource(tmp_path)
    assert source.list() == ()
    (problem,) = source.problems()
    assert "and 480 more" in problem
    assert len(problem) < 5000


@pytest.mark.parametrize("annotations", [7, None, ["a"], {"a": 1}])
def test_a_file_with_other_faults_besides_its_annotations_is_told(
    tmp_path: Path, annotations: object
) -> None:
    raw = {"id": 7, "annotations": annotations}
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(raw))
    source = FileSource(tmp_path)
    assert source.list() == ()
    assert len(source.problems()) == 1


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
