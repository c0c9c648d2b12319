"""Services of this machine are found by their unit, process, port or place, and their namespaces are the workloads."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from namespaces import namespace

from tidegate.kernel import netns
from tidegate.model import Sidecar
from tidegate.workloads.processes import settings, source
from tidegate.workloads.processes.settings import ProcessConfig
from tidegate.workloads.processes.source import ProcessSource
from tidegate.workloads.source import Description, Origin, Treatment

LISTENING = """
import socket, sys
with socket.create_server(("", int(sys.argv[1]))) as server:
    print("listens", flush=True)
    sys.stdin.read()
"""

Serving = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def serving() -> Iterator[Serving]:
    """Starts a process in a namespace that listens on a port, until the test ends or somebody closes its input."""
    with ExitStack() as stack:

        def start(path: str, port: int) -> subprocess.Popen[bytes]:
            process = netns.spawn(
                path,
                [sys.executable, "-c", LISTENING, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"listens\n"
            return process

        yield start


@pytest.fixture
def place() -> Iterator[str]:
    with namespace() as path:
        yield path


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def looking(*processes: dict[str, Any]) -> ProcessSource:
    configured = ({"service": "web", "port": 8080, **fields} for fields in processes)
    return ProcessSource(tuple(msgspec.convert(one, ProcessConfig) for one in configured), "n1")


def looking_in_vain(*processes: dict[str, Any]) -> str:
    found = looking(*processes)
    assert found.list() == ()
    assert not found.is_complete
    return found.problems()[0]


def only(found: ProcessSource) -> Description:
    (description,) = found.list()
    assert found.problems() == ()
    assert found.is_complete
    return description


def test_a_place_made_for_a_service_is_its_workload_whether_it_runs_or_not(place: str) -> None:
    fields = {"name": Path(place).name, "network": {"addresses": ["10.1.0.2"]}}
    found = only(looking(fields | {"annotations": {"a": "b"}, "sidecar": "own"}))
    assert (found.origin, found.netns, found.name) == (Origin.PROCESSES, place, Path(place).name)
    assert (found.service, found.port, found.meshed) == ("web", 8080, True)
    assert (found.sidecar, found.annotations) == (Sidecar.OWN, {"a": "b"})


def test_a_place_that_is_not_there_is_told_with_the_unit_that_makes_it() -> None:
    absent = looking({"name": "tg-vm-absent", "network": {"addresses": ["10.1.0.2"]}})
    assert absent.list() == ()
    (problem,) = absent.problems()
    assert "start tidegate-sidecar@tg-vm-absent.service" in problem
    assert absent.is_complete


def test_a_service_is_found_by_its_port_at_the_path_that_outlasts_it(
    place: str, serving: Serving
) -> None:
    found = looking({"listens": 7321})
    assert found.list() == ()
    assert found.problems() == ("web: no process listens on port 7321",)
    process = serving(place, 7321)
    found._finder._looked_at.clear()
    assert only(found).netns == place
    end(process)
    with namespace() as other:
        serving(other, 7321)
        found._finder._looked_at.clear()
        assert only(found).netns == other


@pytest.mark.parametrize("how", ["unit", "pid", "pid file", "listens"])
def test_a_service_that_is_restarted_stays_where_it_was_while_its_namespace_is_there(
    how: str, serving: Serving, slices: Path
) -> None:
    with namespace() as place:
        process, file = serving(place, 7321), slices / "web.pid"
        file.write_text(f"{process.pid}")
        unit(slices / "system.slice" / "web.service", process.pid)
        ways = {
            "unit": {"unit": "web.service"},
            "pid": {"pid": process.pid},
            "pid file": {"pid": str(file)},
            "listens": {"listens": 7321},
        }
        found = looking(ways[how])
        before = only(found)
        end(process)
        assert found.list() == (before,)
        assert len(found.problems()) == 1
        assert found.is_complete
        if how == "listens":
            serving(place, 7321)
            found._finder._looked_at.clear()
            assert only(found) == before, "another process, and the same workload"
    assert found.list() == ()
    assert len(found.problems()) == 1


def test_a_port_on_which_two_listen_is_no_answer(place: str, serving: Serving) -> None:
    with namespace() as other:
        serving(place, 7322)
        serving(other, 7322)
        found = looking({"listens": 7322})
        assert found.list() == ()
        assert "2 network namespaces listen on port 7322" in found.problems()[0]


def test_a_service_is_found_by_its_pid_or_by_the_file_that_has_it(
    place: str, serving: Serving, tmp_path: Path
) -> None:
    process, file = serving(place, 7323), tmp_path / "web.pid"
    found = looking({"pid": process.pid}, {"name": "other", "pid": str(file)})
    assert [each.netns for each in found.list()] == [place]
    assert found.problems() == (f"web: there is no file {file}",)
    file.write_text("no number")
    found.list()
    assert found.problems() == (f"web: {file} does not have the number of a process",)
    file.write_text(f"{process.pid}\n")
    by_pid, by_file = found.list()
    assert (by_pid.netns, by_file.netns) == (place, place)
    assert by_pid.created_at == by_file.created_at
    end(process)
    found.list()
    assert found.problems() == (
        f"web: process {process.pid} has ended",
        f"web: process {process.pid} has ended",
    )


def test_a_number_that_another_process_has_by_now_is_not_the_service(
    place: str, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, file = serving(place, 7324), tmp_path / "web.pid"
    file.write_text(f"{process.pid}")
    for said in (process.pid, str(file)):
        found = looking({"pid": said})
        only(found)
        known = found._finder._identified["web"].process
        monkeypatch.setattr(known, "is_running", lambda: False)
        found._found.clear()
        assert found.list() == ()
        assert found.problems() == (f"web: process {process.pid} has ended",)
    # Written anew, the same number is that of the process that has it now.
    os.utime(file, ns=(1, 1))
    assert only(found).netns == place


@pytest.fixture
def slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups as systemd makes them; what a kernel has in one stands in files."""
    monkeypatch.setattr(source, "_CGROUPS", (tmp_path / "none", tmp_path))
    (tmp_path / "system.slice").mkdir()
    return tmp_path


def unit(at: Path, *pids: int) -> None:
    at.mkdir(parents=True)
    (at / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


def test_a_service_that_has_not_entered_its_namespace_yet_stays_where_it_was(
    serving: Serving, slices: Path
) -> None:
    group = slices / "system.slice" / "web.service"
    with namespace() as place:
        process = serving(place, 7327)
        unit(group, process.pid)
        found = looking({"unit": "web.service"})
        before = only(found)
        # As what `ip netns exec` starts, before it has entered the namespace.
        (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
        assert found.list() == (before,)
        assert found.left_alone() == ()
        assert found.problems() == (
            f"web shares the host's network namespace, and {place} is kept for it",
        )
        (group / "cgroup.procs").write_text(f"{process.pid}\n")
        assert only(found) == before
        (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert found.list() == ()
    assert [one.name for one in found.left_alone()] == ["web"]


@pytest.mark.parametrize(
    "where", ["system.slice", "a.slice/a-b.slice", "system.slice/system-web.slice"]
)
def test_a_service_is_found_by_its_unit_in_whatever_slice_that_is(
    where: str, place: str, serving: Serving, slices: Path
) -> None:
    process = serving(place, 7325)
    unit(slices / where / "web.service")
    unit(slices / where / "web.service" / "workers", process.pid, 2**22 + 1)
    found = looking({"unit": "web.service"})
    assert only(found).netns == place
    assert only(found).netns == place


def test_a_unit_that_does_not_run_or_is_in_two_places_is_told(
    place: str, serving: Serving, slices: Path
) -> None:
    found = looking({"unit": "web.service"})
    assert found.list() == ()
    assert found.problems() == ("web: the unit web.service does not run",)
    unit(slices / "system.slice" / "web.service")
    found.list()
    assert found.problems() == ("web: the unit web.service has no process",)
    with namespace() as other:
        pids = [str(serving(each, 7326).pid) for each in (place, other)]
        (slices / "system.slice" / "web.service" / "cgroup.procs").write_text("\n".join(pids))
        found.list()
        assert "are in 2 network namespaces" in found.problems()[0]


def test_a_service_in_the_hosts_namespace_is_left_alone_and_told_why(slices: Path) -> None:
    unit(slices / "system.slice" / "web.service", os.getpid())
    found = looking({"unit": "web.service"})
    assert found.list() == ()
    (left,) = found.left_alone()
    assert (left.name, left.treatment) == ("web", Treatment.HOST_NETWORK)
    assert left.reason.endswith("or say host_network")
    assert found.problems() == ()
    assert found.is_complete
    beside = looking({"unit": "web.service"}, {"service": "db", "host_network": {"user": "nobody"}})
    assert [one.service for one in beside.list()] == ["db"]
    assert beside.left_alone()[0].reason.endswith("or put it among the more_ports of db")


def test_the_hosts_namespace_is_a_workload_where_the_configuration_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = looking({"host_network": {"user": "nobody"}})
    found = only(looked)
    assert found.netns == "/proc/self/ns/net"
    assert found.annotations is not None
    assert found.annotations["tidegate.io/include-inbound-ports"] == "8080"
    assert found.annotations["tidegate.io/exclude-uids"] == "0-65533,65535-4294967294"

    def unknown(name: str) -> None:
        raise KeyError(name)

    # As of a directory service that is restarted.
    monkeypatch.setattr(settings.pwd, "getpwnam", unknown)
    assert only(looked) == found
    assert "there is no user 'nobody'" in looking_in_vain({"host_network": {"user": "nobody"}})


def test_a_namespace_that_is_made_anew_is_another_workload() -> None:
    name, ids = f"tg-vm-{os.getpid()}", []
    looked = looking({"name": name, "network": {"addresses": ["10.1.0.2"]}})
    for _ in range(2):
        netns.create(name)
        try:
            ids.append(only(looked).id)
            assert only(looked).id == ids[-1]
        finally:
            netns.delete(name)
    assert ids[0] != ids[1]


def test_what_cannot_be_looked_for_is_told_and_nothing_is_taken_for_gone(
    place: str, serving: Serving, slices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_directory: Path) -> Iterator[int]:
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup")

    unit(slices / "system.slice" / "web.service", serving(place, 7327).pid)
    found = looking({"unit": "web.service"})
    before = only(found)
    monkeypatch.setattr(source, "_members", refused)
    assert found.list() == (before,)
    assert "web cannot be looked for" in found.problems()[0]
    assert not found.is_complete
    assert looking({"unit": "web.service"}).list() == ()
