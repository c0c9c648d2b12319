"""The place of a service: a namespace whose rules are in force before anything can come, and which goes as a whole."""

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from namespaces import namespace

from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import InputError
from tidegate.kernel import netns
from tidegate.kernel.door import Door
from tidegate.kernel.errors import KernelError
from tidegate.node import places
from tidegate.node.config import AgentConfig
from tidegate.node.places import PlaceError
from tidegate.workloads.processes.settings import ProcessConfig

ADDRESSES = ("10.88.0.2", "fd88::2")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A namespace in the place of the host's."""
    with namespace() as path:
        monkeypatch.setattr(places, "HOST", path)
        yield path


@pytest.fixture
def name() -> Iterator[str]:
    called = f"tg-vm-{os.getpid()}"
    yield called
    netns.delete(called)


def config(name: str, **fields: object) -> AgentConfig:
    process = {"service": "web", "name": name, "port": 8080, "network": {"addresses": ADDRESSES}}
    raw = {
        "node": "n1",
        "server": "unix:///run/none",
        "trust_domain": "test",
        "socket": f"/run/tg-vm-{os.getpid()}.sock",
        "processes": [process | fields],
    }
    return msgspec.convert(raw, AgentConfig, dec_hook=lambda kind, text: kind(text))


def make(configured: AgentConfig, name: str) -> ProcessConfig:
    one = places.described(configured, name)
    places.make(configured, one)
    return one


def knock(path: str, address: str, port: int = 8080) -> str:
    """What becomes of a connection from a namespace."""

    def dial() -> str:
        try:
            with socket.create_connection((address, port), 5) as caller:
                return caller.recv(16).decode()
        except OSError as error:
            return type(error).__name__

    return netns.run_in(path, dial)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_service_in_its_place_is_closed_until_its_sidecar_listens(
    host: str, name: str, address: str
) -> None:
    make(config(name), name)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def listener(port: int) -> socket.socket:
        return netns.run_in(netns.path(name), socket.create_server, ("", port), family=family)

    with listener(8080) as application:
        assert knock(host, address) == "ConnectionRefusedError"
        with listener(20000) as sidecar:
            application.setblocking(False)
            sidecar.settimeout(5)
            with netns.run_in(host, socket.create_connection, (address, 8080), 5):
                sidecar.accept()[0].close()
            with pytest.raises(BlockingIOError):
                application.accept()


def test_a_place_that_is_there_stays_as_it_is(host: str, name: str) -> None:
    make(config(name), name)
    with Door(netns.path(name)) as door:
        before = door._link(places.INTERFACE)["index"]
    make(config(name), name)
    with Door(netns.path(name)) as door:
        assert door._link(places.INTERFACE)["index"] == before
        assert door.global_addresses(places.INTERFACE) == set(ADDRESSES)


def test_a_place_goes_with_its_link_and_may_have_gone_already(host: str, name: str) -> None:
    one = make(config(name), name)
    # As a sidecar does until the agent has heard that its workload is gone.
    with netns.opened(netns.path(name)):
        places.remove(name, one)
        with Door(host) as door:
            assert door._link(places.link(name)) is None
    assert name not in netns.names()
    places.remove(name, None)


def test_there_is_no_way_in_while_its_rules_are_refused(
    host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_args: object, **_options: object) -> None:
        raise KernelError("the kernel does not take the rules")

    monkeypatch.setattr(Engine, "apply", refused)
    with pytest.raises(KernelError):
        make(config(name), name)
    with Door(host) as door:
        assert door._link(places.link(name)) is None


def test_there_is_no_way_in_with_other_rules_than_it_should_have(
    host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "check", lambda *_: ("a line is missing",))
    with pytest.raises(PlaceError, match="not redirected: a line is missing"):
        make(config(name), name)
    with Door(host) as door:
        assert door._link(places.link(name)) is None


def test_a_service_that_is_kept_out_of_the_mesh_has_a_place_without_rules(
    host: str, name: str
) -> None:
    make(config(name, meshed=False), name)
    assert Engine().backend_of(netns.path(name)) is None
    with netns.run_in(netns.path(name), socket.create_server, ("", 8080)) as application:
        application.settimeout(5)
        netns.run_in(host, socket.create_connection, (ADDRESSES[0], 8080), 5).close()
        application.accept()[0].close()


def test_a_service_of_the_host_is_redirected_where_it_is_and_left_alone_again(
    host: str, name: str
) -> None:
    network = {"network": None, "host_network": {"user": "nobody"}}
    one = make(config(name, **network), name)
    assert Engine().current(host)
    places.remove(name, one)
    assert Engine().backend_of(host) is None
    assert name not in netns.names()


@pytest.mark.parametrize(
    ("asked", "words"), [("wep", "expected one of web"), ("web", "no place that could be made")]
)
def test_what_has_no_place_that_could_be_made_is_refused(asked: str, words: str) -> None:
    configured = config("web", network=None, unit="web.service")
    with pytest.raises(InputError, match=words):
        make(configured, asked)


def test_whoever_waits_for_a_sidecar_is_told_why_there_is_none() -> None:
    with pytest.raises(PlaceError, match=r"not in the mesh after 0.1 s: no agent answers"):
        places.wait_until_redirected(config("web"), "web", 0.1)


def test_the_hosts_end_of_a_link_is_named_after_the_service_or_by_a_digest_of_a_long_name() -> None:
    assert places.link("web") == "tg-web"
    long = places.link("a-very-long-name-of-a-service")
    assert len(long) <= 15
    assert long != places.link("a-very-long-name-of-another-service")
