"""The record of CNI's attachments: what is told of them, and when they end."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tidegate.kernel import netns
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.cni import AttachmentKey
from tidegate.workloads.source import Description, Origin

HERE = "/proc/self/ns/net"


def attachment(
    container: str = "c1",
    interface: str = "eth0",
    *,
    path: str = HERE,
    uid: str = "",
    pod: tuple[str, str] = ("", ""),
    created_at: float = 1.0,
) -> Attachment:
    return Attachment(
        key=AttachmentKey("net", container, interface),
        place=netns.identity(HERE),
        description=Description(
            origin=Origin.CNI, netns=path, id=uid or container, created_at=created_at
        ),
        pod_uid=uid,
        pod_namespace=pod[0],
        pod_name=pod[1],
    )


def test_the_next_agent_knows_what_this_one_knew(tmp_path: Path) -> None:
    first = Attachments(tmp_path / "attachments")
    one = attachment(uid="u", pod=("shop", "web"))
    first.put(one)
    second = Attachments(tmp_path / "attachments")
    assert second.get(one.key) == one
    assert second.list() == (one.description,)
    assert second.remove(one.key) == one
    assert second.remove(one.key) is None
    assert Attachments(tmp_path / "attachments").list() == ()


def test_records_that_somebody_cleared_away_are_written_again(tmp_path: Path) -> None:
    known, directory = Attachments(tmp_path / "attachments"), tmp_path / "attachments"
    for container in ("c1", "c2"):
        known.put(attachment(container))
        shutil.rmtree(directory)
    known.list()
    assert {one.key for one in Attachments(directory).all} == {one.key for one in known.all}
    shutil.rmtree(directory)
    known.put(attachment("c3"))
    assert [one.key.container_id for one in Attachments(directory).all] == ["c3"]


def test_a_namespace_is_told_once_as_its_oldest_attachment_has_it(tmp_path: Path) -> None:
    known = Attachments(tmp_path)
    for interface, at in (("net1", 1.0), ("eth0", 2.0)):
        known.put(attachment(interface=interface, created_at=at))
    assert [one.created_at for one in known.list()] == [1.0]
    assert [one.created_at for one in Attachments(tmp_path).list()] == [1.0]


def test_what_lies_at_no_path_or_at_another_namespaces_has_ended(tmp_path: Path) -> None:
    known = Attachments(tmp_path / "attachments")
    path = tmp_path / "netns"
    path.touch()
    for container, lies_at in (("gone", "/nonexistent"), ("another", str(path)), ("here", HERE)):
        known.put(attachment(container, path=lies_at))
    assert [one.id for one in known.list()] == ["here"]
    assert len([*(tmp_path / "attachments").iterdir()]) == 1


def test_pods_are_found_by_uid_and_by_name_only_where_no_uid_is_known(tmp_path: Path) -> None:
    known = Attachments(tmp_path)
    known.put(attachment("a", uid="u1", pod=("shop", "web")))
    known.put(attachment("b", pod=("shop", "api")))
    assert known.find("u1", "shop", "web") == HERE
    assert known.find("u2", "shop", "web") is None
    assert known.find("", "shop", "web") == HERE
    assert known.find("u3", "shop", "api") == HERE
    assert known.find("", "", "") is None
    known.remove(AttachmentKey("net", "a", "eth0"))
    assert known.find("u1", "shop", "web") is None


def test_of_two_sandboxes_of_a_pod_the_later_is_the_pods(tmp_path: Path) -> None:
    """The runtime may have lost the DEL of the first."""
    known = Attachments(tmp_path)
    paths = [HERE, "/proc/thread-self/ns/net", f"/proc/{os.getpid()}/ns/net"]
    for number, path in enumerate(paths):
        one = attachment(f"c{number}", path=path, uid="u1", pod=("shop", "web"))
        known.put(one)
        os.utime(known._path(one.key), ns=(number, number))
    assert known.find("u1", "shop", "web") == paths[-1]
    assert known.find("", "shop", "web") == paths[-1]
    assert Attachments(tmp_path).find("u1", "shop", "web") == paths[-1]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_record_is_told_and_counts_as_not_knowing(
    tmp_path: Path, content: bytes
) -> None:
    Attachments(tmp_path).put(attachment())
    (tmp_path / "x.json").write_bytes(content)
    known = Attachments(tmp_path)
    assert len(known.list()) == 1
    assert "x.json" in known.problems()[0]
    assert not known.is_complete


def test_attachments_may_come_and_go_while_they_are_listed(tmp_path: Path) -> None:
    known = Attachments(tmp_path)
    stop = threading.Event()

    def come_and_go(container: str) -> None:
        one = attachment(container, uid=container)
        while not stop.is_set():
            known.put(one)
            known.remove(one.key)

    with ThreadPoolExecutor() as threads:
        working = [threads.submit(come_and_go, name) for name in ("a", "b")]
        for _ in range(200):
            known.list()
            known.find("a", "", "")
        stop.set()
    assert [one.result() for one in working] == [None, None]
