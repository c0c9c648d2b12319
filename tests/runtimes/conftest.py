"""Real container runtimes: only where TIDEGATE_RUNTIMES is set, as `make runtimes` does, for it fetches them."""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# What the other tests share is good here too.
sys.path += [str(Path(__file__).parent.parent / name) for name in ("kernel", "unit")]

import images
from clusters import Cluster
from containers import Containerd, Podman, Runtime, configure
from nodeagents import intent_server
from nodes import Node
from plugins import install
from worlds import World, world

from debian import Packages, unpacked

collect_ignore_glob = [] if os.environ.get("TIDEGATE_RUNTIMES") else ["test_*.py"]

_LOG_SHOWN = 4000
_PACKAGES = (
    "containerd",
    "podman",
    "runc",
    "containernetworking-plugins",
    "busybox-static",
    "python3-grpcio",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure comes with what the node's daemons have logged."""
    report = yield
    node = item.funcargs.get("node")
    if report.failed and isinstance(node, Node):
        for log in sorted(node.disk.glob("*.log")):
            report.sections.append((log.name, log.read_text()[-_LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session")
def packages() -> Packages:
    return unpacked("runtimes", *_PACKAGES)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, packages: Packages) -> Path:
    """The image of all containers."""
    path = tmp_path_factory.mktemp("image") / "box.tar"
    images.build(path, packages.path("bin/busybox"))
    return path


@pytest.fixture
def node(tmp_path: Path, packages: Packages) -> Iterator[Node]:
    with Node(tmp_path / "disk", packages) as made:
        configure(made)
        yield made


@pytest.fixture
def outside(node: Node) -> Iterator[World]:
    """What the node's pods call."""
    with world(node) as made:
        yield made


@pytest.fixture(params=[Containerd, Podman], ids=["containerd", "podman"])
def runtime(request: pytest.FixtureRequest, node: Node, archive: Path) -> Iterator[Runtime]:
    with request.param(node, archive).running() as made:
        yield made


@pytest.fixture
def cluster(node: Node) -> Iterator[Cluster]:
    """With the plugin on the node, and an intent server; the agent is the test's."""
    install(node)
    with intent_server(node), Cluster(node) as made:
        yield made
