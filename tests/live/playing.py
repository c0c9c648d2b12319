"""Plays the corpus once: servers up, interface watched and recorded, client after client; three readings of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus import CASES, Case
from dissection import Dissected, dissect
from place import Called, Place
from recording import Connection, recording
from servers import all_servers

from debian import CACHE
from tidegate.kernel import netns

TIDEGATE = (sys.executable, "-m", "tidegate.cli.main")
END_LIMIT_S = 60.0

Flow = dict[str, Any]
"""One of the flows of `tidegate observe --json`."""


@dataclass
class Played:
    """What every case did, and what was seen of it."""

    called: dict[str, Called] = field(default_factory=dict)
    """By the name of the case."""
    connections: dict[str, list[Connection]] = field(default_factory=dict)
    """By the name of the case, in the order in which they were opened."""
    observed: dict[str, Any] = field(default_factory=dict)
    """What `tidegate observe --json` said in the end."""
    classified: dict[str, Any] = field(default_factory=dict)
    """What `tidegate classify --json` says of the capture."""
    dissected: dict[Connection, Dissected] = field(default_factory=dict)

    def observed_flow(self, connection: Connection) -> Flow | None:
        return _flow(self.observed, connection)

    def classified_flow(self, connection: Connection) -> Flow | None:
        return _flow(self.classified, connection)


def possible(case: Case) -> bool:
    """Whether this machine has what the case needs."""
    return not case.needs or shutil.which(case.needs) is not None


def play(place: Place) -> Played:
    """Plays all cases that are possible here."""
    played = Played()
    _build_clients(place)
    with all_servers(place):
        recorder = recording("eth0", place.directory / "capture.pcap")
        record = netns.run_in(place.pair.pod, recorder.__enter__)
        try:
            watcher = _watch(place)
            try:
                for case in filter(possible, CASES):
                    before = len(record.opened)
                    played.called[case.name] = place.call(case.command(place), case.environment)
                    record.settle()
                    played.connections[case.name] = record.opened[before:]
            finally:
                watcher.send_signal(signal.SIGINT)
                said, _ = watcher.communicate(timeout=END_LIMIT_S)
        finally:
            recorder.__exit__(None, None, None)
    played.observed = json.loads(said)
    everything = [each for connections in played.connections.values() for each in connections]
    played.dissected = dissect(place, record.file, everything)
    played.classified = _classify(record.file)
    return played


def _watch(place: Place) -> "subprocess.Popen[str]":
    watcher = subprocess.Popen(
        [
            *TIDEGATE,
            "observe",
            "--netns",
            Path(place.pair.pod).name,
            "--interface",
            "eth0",
            "--json",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert watcher.stderr is not None
    told = []
    for line in watcher.stderr:
        if line == "ready\n":
            return watcher
        told.append(line)
    raise RuntimeError(f"tidegate observe ended: {''.join(told)}")


def _classify(capture: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*TIDEGATE, "classify", str(capture), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"tidegate classify failed: {done.stderr}")
    return dict(json.loads(done.stdout))


def _build_clients(place: Place) -> None:
    if shutil.which("go"):
        cache = {"GOCACHE": str(CACHE / "go"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
        source = Path(__file__).parent / "client.go"
        subprocess.run(
            ["go", "build", "-o", place.directory / "client-go", source],
            env=os.environ | cache,
            check=True,
        )


def _flow(report: dict[str, Any], connection: Connection) -> Flow | None:
    ends = (connection.client, connection.server)
    found = [each for each in report["flows"] if (each["client"], each["server"]) == ends]
    return found[0] if len(found) == 1 else None
