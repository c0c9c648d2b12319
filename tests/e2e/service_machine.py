"""A machine with one service, as docs/systemd.md has it, but for systemd: run by test_service_place.py.

`service_machine.py DIRECTORY`, in network and mount namespaces of its own, of which the first is the host's. Prints as
JSON what it has seen. What it starts ends with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

GUEST = Path(__file__).parent.parent / "vm" / "guest"
TIDEGATE = (sys.executable, "-m", "tidegate.cli.main")
ADDRESS, PORT = "10.11.0.2", 8080
DEADLINE_S = 60.0

ENTRIES = """\
Kind: mesh
AllowEnablingPermissiveMutualTLS: true
---
Kind: service-defaults
Name: web
Protocol: tcp
MutualTLSMode: permissive
"""


def main() -> None:
    place = Path(sys.argv[1])
    prepare(place)
    # As in the agent's unit.
    os.umask(0o077)
    seen: dict[str, object] = {}
    with ExitStack() as stack:
        told = stack.enter_context(notifications(place))
        server = stack.enter_context(
            running(*TIDEGATE, "server", "--config", place / "server.yaml")
        )
        until(lambda: "READY=1" in told(server))
        run(
            *TIDEGATE,
            "config",
            "write",
            "--http-addr",
            f"unix://{place}/server.sock",
            place / "mesh.yaml",
        )

        run(*TIDEGATE, "sidecar", "up", "web", "--config", place / "agent.yaml")
        application = (sys.executable, GUEST / "application.py", str(PORT), place / "accepted")
        stack.enter_context(running("ip", "netns", "exec", "web", *application))
        until(lambda: "listens" in read(place / "accepted"))
        seen["without an agent"] = knock()

        with running(*TIDEGATE, "agent", "run", "--config", place / "agent.yaml") as agent:
            stack.callback(end_sidecars, place)
            until(lambda: knock() == "answered")
            until(lambda: "WATCHDOG=1" in told(agent))
            seen["ready"] = "READY=1" in told(agent)
            up = (
                *TIDEGATE,
                "sidecar",
                "up",
                "web",
                "--wait",
                "60",
                "--config",
                place / "agent.yaml",
            )
            seen["waited for in vain"] = run(*up)
            os.kill(agent, signal.SIGHUP)
            until(lambda: "READY=1" in told(agent).partition("RELOADING=1")[2])
            until(lambda: knock() == "answered")
        seen["stopping"] = "STOPPING=1" in told(agent)
        seen["after the agent"] = knock()
        seen["accepted"] = [line.split()[2] for line in read(place / "accepted").splitlines()]
    run(*TIDEGATE, "sidecar", "down", "web", "--config", place / "agent.yaml")
    seen["left"] = run("ip", "netns", "list") + run("ip", "-brief", "link", "show", "type", "veth")
    print(json.dumps(seen))


def prepare(place: Path) -> None:
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "run", "/run")
    (place / "bpf").mkdir()
    run("mount", "-t", "bpf", "bpf", place / "bpf")
    run("ip", "link", "set", "lo", "up")
    common = {"trust_domain": "test"}
    server = common | {"state_dir": f"{place}/server", "listen": f"unix://{place}/server.sock"}
    agent = common | {
        "node": "machine",
        "server": f"unix://{place}/server.sock",
        "run_dir": f"{place}/run",
        "state_dir": f"{place}/state",
        "socket": f"{place}/agent.sock",
        "bpffs": f"{place}/bpf/tidegate",
        "processes": [{"service": "web", "port": PORT, "network": {"addresses": [ADDRESS]}}],
    }
    (place / "server.yaml").write_text(json.dumps(server))
    (place / "agent.yaml").write_text(json.dumps(agent))
    (place / "mesh.yaml").write_text(ENTRIES)


@contextmanager
def notifications(place: Path) -> Iterator[Callable[[int], str]]:
    """What systemd would hear, by the process that told it."""
    heard: dict[int, str] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"{place}/notify")
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.setblocking(False)
        os.environ.update(NOTIFY_SOCKET=f"{place}/notify", WATCHDOG_USEC="4000000")

        def told(pid: int) -> str:
            while True:
                try:
                    message, ancillary, _, _ = listener.recvmsg(4096, 1024)
                except BlockingIOError:
                    return heard.get(pid, "")
                sender = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
                heard[sender] = f"{heard.get(sender, '')}{message.decode()}\n"

        yield told


@contextmanager
def running(*command: str | Path) -> Iterator[int]:
    """A process until the end of the context; its number."""
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def end_sidecars(place: Path) -> None:
    for file in place.glob("run/sidecars/*/envoy.pid"):
        os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)


def knock() -> str:
    try:
        with socket.create_connection((ADDRESS, PORT), 2) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
            return "answered" if caller.recv(4096) else "ended"
    except OSError as error:
        return type(error).__name__


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {DEADLINE_S:g} s")
        time.sleep(0.1)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def run(*command: str | Path) -> str:
    """What a command says; of one that fails this process ends."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
