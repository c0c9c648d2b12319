"""What the lab tests share: running the command as a user does, and waiting for conditions."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 40.0
DEMO_FILE = Path(__file__).parents[2] / "agent/tidegate/lab/demo.yaml"
RUN_DIR = Path("/run/tidegate/lab")


def tidegate(
    *args: str, stdin: str | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tidegate.cli.main", *args],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def start(*args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tidegate.cli.main", *args],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of the condition; AssertionError when none comes in time."""
    until = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"waited {deadline_s:.0f} s in vain for {what}"
        time.sleep(0.1)


class Lab:
    """One lab that is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = RUN_DIR / name

    def run(self, *args: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
        """A tidegate command towards this lab; the option goes behind the command's name."""
        words = 2 if args[0] in ("lab", "config", "onboard", "intentions") else 1
        return tidegate(*args[:words], "--lab", self.name, *args[words:], stdin=stdin)

    def json(self, *args: str) -> Any:
        done = self.run(*args, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def exec(self, where: str, *argv: str) -> "subprocess.CompletedProcess[str]":
        return tidegate("lab", "exec", "--lab", self.name, where, "--", *argv)

    def status(self) -> Any:
        return self.json("lab", "status")

    def pod(self, name: str) -> Any:
        return next(pod for pod in self.status()["pods"] if pod["name"] == name)

    def edges(self, **query: str) -> dict[tuple[str, str, str], Any]:
        """The ledger's rows by (caller, server, class), addresses and ports of both families summed."""
        merged: dict[tuple[str, str, str], Any] = {}
        for row in self.json("flows")["flows"]:
            key = (row["caller"]["workload"], row["server"]["workload"], row["class"])
            if key in merged:
                merged[key]["connections"] += row["connections"]
            else:
                merged[key] = row
        return merged

    def sees(self, *edges: tuple[str, str, str]) -> bool:
        return set(edges) <= set(self.edges())

    def targets(self, pod: str) -> list[Any]:
        statistics = self.pod(pod)["statistics"]
        return statistics["targets"] if statistics else []

    def failures(self) -> list[str]:
        """Every request of every caller that failed since the lab came up."""
        return [
            f"{pod['name']} -> {target['target']}: {target['failed']} failed, {target['last_error']}"
            for pod in self.status()["pods"]
            for target in (pod["statistics"] or {"targets": ()})["targets"]
            if target["failed"]
        ]

    def answered(self, pod: str) -> int:
        return sum(target["ok"] for target in self.targets(pod))

    def agent(self, node: str) -> psutil.Process:
        pid = next(one["agent_pid"] for one in self.status()["nodes"] if one["name"] == node)
        return psutil.Process(pid)

    def envoy(self, pod: str) -> psutil.Process:
        """The sidecar of a pod: the process of the proxy user in its namespace."""
        wanted = Path(f"/run/netns/tg-{self.name}-{pod}").stat().st_ino
        for process in psutil.process_iter():
            try:
                if (
                    process.uids().effective == 5995
                    and Path(f"/proc/{process.pid}/ns/net").stat().st_ino == wanted
                ):
                    return process
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue
        raise AssertionError(f"no sidecar runs in {pod}")


@contextmanager
def lab_up(name: str, file: Path = DEMO_FILE) -> Iterator[Lab]:
    """A lab from a file under another name, gone afterwards whatever happens."""
    tidegate("lab", "down", "--name", name)
    try:
        done = tidegate("lab", "up", str(file), "--name", name)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Lab(name)
    finally:
        down = tidegate("lab", "down", "--name", name)
        assert down.returncode == 0, down.stderr


def leftovers(name: str) -> list[str]:
    """Everything of a lab that is still on this machine."""
    found = [f"namespace {path.name}" for path in Path("/run/netns").glob(f"tg-{name}-*")]
    if (RUN_DIR / name).exists():
        found.append(f"directory {RUN_DIR / name}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if f"tg-{name}-" in line or f"lab/{name}/" in line]
    for process in psutil.process_iter():
        try:
            if any(f"lab/{name}/" in word for word in process.cmdline()):
                found.append(f"process {process.pid} {process.cmdline()}")
        except psutil.NoSuchProcess:
            continue
    return found


def kill(process: psutil.Process, number: signal.Signals) -> None:
    process.send_signal(number)
