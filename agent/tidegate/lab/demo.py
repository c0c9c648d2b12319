"""`make demo`: a service goes from permissive to strict on evidence, told with the commands a user has.

Every line of output below a `$` is what that command prints. The story checks itself: it fails, and says at which
step, when a verdict, a refusal or a count is not what it must be; the lab is taken down in any case.
"""

import asyncio
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tidegate.lab import runtime, state
from tidegate.lab.state import LabPaths, TargetStatistics
from tidegate.node.client import AgentClient

LAB = "demo"
PATHS = LabPaths(LAB)
PATIENCE_S = 40.0

console = Console(highlight=False)


class StoryError(Exception):
    """The story took a turn that it must not take."""


def main() -> int:
    """Tells the story; 0 when every step went as it must."""
    if os.geteuid() != 0:
        print("tidegate: the demo makes network namespaces: run sudo make demo", file=sys.stderr)
        return 1
    os.environ["TIDEGATE_LAB"] = LAB
    started = time.monotonic()
    _quiet("lab", "down", "--name", LAB)
    try:
        _story()
    except StoryError as error:
        console.print(f"[bold red]the demo failed:[/] {error}")
        _show_logs()
        return 1
    finally:
        _quiet("lab", "down", "--name", LAB)
    console.print(
        f"[bold green]done[/] in {time.monotonic() - started:.0f} s; nothing is left behind"
    )
    return 0


def _story() -> None:
    _chapter(1, "A lab of two nodes and seven pods, IPv4 and IPv6")
    _run("lab", "up")
    _wait("callers to be heard by every service", _everyone_was_heard)
    _run("lab", "status")

    _chapter(2, "Who talks to whom, and how")
    _run("flows", "--for", "3s")

    _chapter(3, "Can api and pay go strict? Not yet, and here is who would break")
    _run("ready", "api", exit_code=1)
    _run("ready", "pay", exit_code=1)

    _chapter(4, "legacy and tlsonly come into the mesh while they keep calling")
    _run("config", "write", "-", stdin=_intention("api", "web", "legacy"))
    _run("config", "write", "-", stdin=_intention("pay", "tlsonly"))
    _run("lab", "onboard", "legacy", "tlsonly")
    _wait("legacy and tlsonly to be seen as mesh", _onboarded)
    _say(f"requests so far: {_count_requests()}, failed: {_require_no_failure()}")

    _chapter(5, "A window without plaintext")
    _run("ready", "api", "--wait", "30s")
    _run("ready", "pay", "--wait", "30s")

    _chapter(6, "api goes strict")
    before = _count_requests()
    strict = _Background("strict", "api", "--guard", "5s")
    _wait("strict mode at api", strict.has_flipped)
    _run("lab", "exec", "outside", "--", *_curl("api", 8080), exit_code=None, refused=True)
    strict.finish(exit_code=0, expect="api is strict")
    during = _count_requests() - before
    _say(f"mesh requests through the flip: {during}, failed: {_require_no_failure()}")
    if not during:
        raise StoryError("nobody called while api was flipped")

    _chapter(7, "pay goes strict, and somebody was forgotten")
    strict = _Background("strict", "pay", "--guard", "10s")
    _wait("strict mode at pay", strict.has_flipped)
    _run(
        "lab", "exec", "nightly", "--", *_curl("pay", 8443, scheme="https"),
        exit_code=None, refused=True,
    )  # fmt: skip
    strict.finish(exit_code=1, expect="nightly was refused")
    _run("lab", "exec", "nightly", "--", *_curl("pay", 8443, scheme="https"))
    _say(f"requests in all: {_count_requests()}, failed: {_require_no_failure()}")


def _curl(host: str, port: int, scheme: str = "http") -> tuple[str, ...]:
    return ("curl", "-skS", "--max-time", "3", f"{scheme}://{host}:{port}/")


def _intention(destination: str, *sources: str) -> str:
    allowed = "\n".join(f'  {{ Name = "{source}" Action = "allow" }},' for source in sources)
    return f'Kind = "service-intentions"\nName = "{destination}"\nSources = [\n{allowed}\n]\n'


def _chapter(number: int, title: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {title}", align="left")


def _say(text: str) -> None:
    console.print(f"[bold]{text}[/]")


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "tidegate.cli.main", *args]


def _run(
    *args: str, exit_code: int | None = 0, stdin: str | None = None, refused: bool = False
) -> None:
    console.print(f"[dim]$ tidegate {shlex.join(args)}[/]", soft_wrap=True)
    if stdin:
        console.print(f"[dim]{stdin.strip()}[/]")
    sys.stdout.flush()
    done = subprocess.run(_command(*args), input=stdin, text=True, check=False)
    if exit_code is not None and done.returncode != exit_code:
        raise StoryError(
            f"`tidegate {shlex.join(args)}` ended with {done.returncode}, not {exit_code}"
        )
    if refused:
        if done.returncode == 0:
            raise StoryError(f"`tidegate {shlex.join(args)}` was answered, not refused")
        _say("refused")


class _Background:
    """A command that runs while the story goes on; what it prints shows at once."""

    def __init__(self, *args: str) -> None:
        console.print(f"[dim]$ tidegate {shlex.join(args)} &[/]")
        sys.stdout.flush()
        self._lines: list[str] = []
        self._process = subprocess.Popen(_command(*args), text=True, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._echo)
        self._reader.start()

    def _echo(self) -> None:
        for line in self._process.stdout or ():
            self._lines.append(line)
            # Not past the console: a progress bar may be on the screen.
            console.print(line.rstrip("\n"), markup=False, soft_wrap=True)

    def has_flipped(self) -> bool:
        """Whether `tidegate strict` has said that every sidecar follows."""
        return any("sidecars run strict mode" in line for line in self._lines)

    def finish(self, *, exit_code: int, expect: str) -> None:
        """Waits for its end; StoryError unless it ends like this and says `expect`."""
        self._process.wait(timeout=PATIENCE_S)
        self._reader.join()
        if self._process.returncode != exit_code:
            ended = self._process.returncode
            raise StoryError(f"`tidegate strict` ended with {ended}, not {exit_code}")
        if expect not in "".join(self._lines):
            raise StoryError(f"`tidegate strict` does not say {expect!r}")


def _quiet(*args: str) -> None:
    subprocess.run(
        _command(*args), check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _ask(path: str) -> Any:
    """What the first node's agent answers; the story looks on without starting a command each time."""

    async def ask() -> Any:
        node = state.read_spec(PATHS).nodes[0]
        async with AgentClient(f"unix://{PATHS.agent_socket(node)}") as agent:
            return await agent.get(path)

    return asyncio.run(ask())


def _wait(what: str, condition: Callable[[], bool]) -> None:
    """Waits for a condition with a progress bar; StoryError when patience ends."""
    columns = (TextColumn("waiting for {task.description}"), BarColumn(bar_width=30))
    started = time.monotonic()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=PATIENCE_S)
        while not condition():
            waited = time.monotonic() - started
            if waited > PATIENCE_S:
                raise StoryError(f"waited {PATIENCE_S:.0f} s in vain for {what}")
            bar.update(task, completed=waited)
            time.sleep(0.2)


def _seen(*edges: tuple[str, str, str]) -> bool:
    """Whether each (caller, service, class) is in the ledger."""
    rows = _ask("/v1/flows")["flows"]
    found = {(row["caller"]["service"], row["server"]["service"], row["class"]) for row in rows}
    return found.issuperset(edges)


def _everyone_was_heard() -> bool:
    return _seen(
        ("web", "api", "mesh"),
        ("legacy", "api", "plaintext"),
        ("tlsonly", "pay", "tls"),
        ("web", "db", "plaintext"),
    )


def _onboarded() -> bool:
    return _seen(("legacy", "api", "mesh"), ("tlsonly", "pay", "mesh"))


def _traffic() -> list[TargetStatistics]:
    pods = runtime.status(LAB).pods
    return [target for pod in pods if pod.statistics for target in pod.statistics.targets]


def _count_requests() -> int:
    return sum(target.ok for target in _traffic())


def _require_no_failure() -> int:
    for target in _traffic():
        if target.failed:
            raise StoryError(
                f"{target.failed} requests to {target.target} failed: {target.last_error}"
            )
    return 0


def _show_logs() -> None:
    for path in sorted(Path(f"/run/tidegate/lab/{LAB}/logs").glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-8:]
        console.print(f"[dim]{path.name}:[/]", *lines, sep="\n  ", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
