"""A service of a machine: closed until its sidecar is there, behind it from then on, and systemd is told of it all."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

MACHINE = Path(__file__).parent / "service_machine.py"


def test_a_service_is_behind_its_sidecar_from_the_first_connection_on() -> None:
    # Unix sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as directory:
        Path(directory).chmod(0o711)
        ended = subprocess.run(
            ["unshare", "--mount", "--net", sys.executable, MACHINE, directory],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr[-8000:]
    seen = json.loads(ended.stdout)
    assert seen["without an agent"] == "ConnectionRefusedError"
    assert seen["after the agent"] == "answered"
    accepted = Counter(seen["accepted"])
    assert accepted.pop("listens") == 1
    assert accepted.keys() == {"127.0.0.1"}
    assert seen["ready"]
    assert seen["stopping"]
    assert seen["waited for in vain"] == ""
    assert seen["left"] == ""
