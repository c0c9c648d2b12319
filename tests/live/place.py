"""Where the corpus is played: a pod with real servers, a peer with real clients, a veth between them.

Servers run inside the pod's namespace as a user without rights, from unpacked packages, in a directory that is
removed with them. Clients run inside the peer's. Nothing of it is on the machine's own network.
"""

import contextlib
import os
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from namespaces import Pair, pair_of, set_sysctl

from debian import Packages, unpacked
from tidegate.kernel import netns

DEADLINE_S = 60.0
CLIENT_LIMIT_S = 30.0
NOBODY = 65534
_LISTENING = "0A"
"""Of include/net/tcp_states.h, as /proc/net/tcp writes it."""


@dataclass(frozen=True)
class Place:
    """Everything that servers and clients need to know."""

    pair: Pair
    directory: Path
    """For state; any user may pass it."""
    packages: Packages
    certificate: Path
    """Certificate and key in one PEM file, readable by the servers' user only."""

    @property
    def ipv4(self) -> str:
        """The servers' address."""
        return self.pair.pod_ipv4

    @property
    def ipv6(self) -> str:
        return self.pair.pod_ipv6

    def own(self, name: str) -> Path:
        """A new directory that belongs to the servers' user."""
        made = self.directory / name
        made.mkdir(mode=0o700)
        os.chown(made, NOBODY, NOBODY)
        return made

    @contextlib.contextmanager
    def serving(
        self, command: Sequence[str], *ports: int, where: str | None = None
    ) -> Iterator[None]:
        """Runs a server as the servers' user until it listens on these ports, and ends it afterwards.

        It is in the pod, or in the namespace `where`.
        """
        namespace = where or self.pair.pod
        log_path = self.directory / f"{Path(command[0]).name}-{'-'.join(map(str, ports))}.log"
        with log_path.open("wb") as log:
            process = netns.run_in(
                namespace,
                subprocess.Popen,
                command,
                cwd=self.directory,
                env=self.packages.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not set(ports) <= _listening(namespace):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{' '.join(command)} does not serve: {log_path.read_text()[-2000:]}"
                    )
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def prepare(self, command: Sequence[str]) -> None:
        """Runs what a server needs before it starts, as its user."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.packages.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}{done.stdout[-2000:]}")

    def call(self, command: Sequence[str], environment: Mapping[str, str]) -> "Called":
        """Runs a client in the peer's namespace to its end."""
        try:
            done = netns.run_in(
                self.pair.peer,
                subprocess.run,
                command,
                cwd=self.directory,
                env=self.packages.environment | {"HOME": str(self.directory)} | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=CLIENT_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Called(None, (error.stdout or b"").decode(errors="replace"))
        return Called(done.returncode, done.stdout.decode(errors="replace"))


@dataclass(frozen=True)
class Called:
    """How a client ended."""

    status: int | None
    """Exit status; None: it did not end in time and was killed."""
    output: str


PACKAGES = (
    *(
        "openssl",
        "curl",
        "tshark",
        "openssh-server",
        "openssh-client",
        "redis-server",
        "redis-tools",
    ),
    *("mariadb-server-core", "mariadb-client-core", "postgresql-15", "postgresql-client-15"),
)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """The two namespaces, and the packages where every user can read them."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-live-"))
    try:
        directory.chmod(0o711)
        root = directory / "debian"
        # The checkout may be where only root comes.
        shutil.copytree(unpacked("live", *PACKAGES).root, root, symlinks=True)
        with pair_of() as pair:
            set_sysctl(pair.pod, "net/ipv4/ip_unprivileged_port_start", "0")
            yield Place(pair, directory, Packages(root), _certificate(directory))
    finally:
        shutil.rmtree(directory)


def server_context(made: Place) -> ssl.SSLContext:
    """A Python server's side of TLS, with the same certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate)
    return context


def _certificate(directory: Path) -> Path:
    path = directory / "server.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *(
                "-subj",
                "/CN=server.example",
                "-keyout",
                path,
                "-out",
                directory / "certificate.pem",
            ),
        ],
        check=True,
        capture_output=True,
    )
    with path.open("ab") as key:
        key.write((directory / "certificate.pem").read_bytes())
    path.chmod(0o600)
    os.chown(path, NOBODY, NOBODY)
    return path


def _listening(namespace: str) -> set[int]:
    """TCP ports on which somebody listens in a namespace."""

    def read() -> str:
        directory = Path("/proc/thread-self/net")
        return "".join((directory / name).read_text() for name in ("tcp", "tcp6"))

    rows = [line.split() for line in netns.run_in(namespace, read).splitlines()]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENING}
