"""A workload that cannot be redirected is told by name: by `tidegate status`, by the metrics, and in the log."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from agents import node_in_a_directory
from consul_rules import with_legacy_tables, with_nft
from hostile import owned_table
from namespaces import DEADLINE_S, eventually, needs_user_namespaces, pair_of
from prometheus_client.parser import text_string_to_metric_families

from tidegate.cli.main import main
from tidegate.kernel import netns


@contextlib.contextmanager
def running(backend):
    with node_in_a_directory() as node:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            node.config["metrics"] = f"127.0.0.1:{free.getsockname()[1]}"
        node.config["redirect"] = {"backend": backend, "adopt": False}
        node.start()
        yield node


@pytest.fixture(scope="module")
def by_nftables():
    with running("nftables") as node:
        yield node


@pytest.fixture(scope="module")
def by_iptables():
    with running("iptables") as node:
        yield node


@contextlib.contextmanager
def mistyped(_pair):
    yield {"annotations": {"tidegate.io/exclude-inbound-ports": "80 90"}}


@contextlib.contextmanager
def without_a_namespace(pair):
    yield {"netns": f"{pair.pod}-gone"}


@contextlib.contextmanager
def another_ones_table(pair):
    """Somebody has a table of this name for himself: the kernel lets nobody else change it."""
    with netns.run_in(pair.pod, owned_table, "tidegate"):
        yield {}


@contextlib.contextmanager
def consuls_rules(pair):
    with_nft(pair.pod)
    yield {}


@contextlib.contextmanager
def consuls_legacy_rules(pair):
    with_legacy_tables(pair.pod)
    yield {}


@contextlib.contextmanager
def users_of_its_own(_pair):
    """As a pod with hostUsers: false."""
    needs_user_namespaces()
    made = subprocess.Popen(["unshare", "--user", "--net", "sleep", "600"])
    try:
        path = Path(f"/proc/{made.pid}")
        mine = Path("/proc/self/ns/user").readlink()

        def is_made():
            return (path / "ns/user").readlink() != mine and (
                path / "comm"
            ).read_text() == "sleep\n"

        eventually(is_made)
        for kind in ("uid_map", "gid_map"):
            (path / kind).write_text("0 100000 65536")
        yield {"netns": str(path / "ns/net")}
    finally:
        made.kill()
        made.wait()


CAUSES = {
    mistyped: "exclude-inbound-ports",
    without_a_namespace: "no network namespace at",
    another_ones_table: "Operation not permitted",
    consuls_rules: "Consul",
}
BY_IPTABLES = {
    mistyped: "exclude-inbound-ports",
    without_a_namespace: "no network namespace at",
    consuls_legacy_rules: "Consul",
    users_of_its_own: "hostUsers: false",
}


def name_of(value):
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_workload_that_nftables_cannot_redirect_is_told(by_nftables, cause, capsys):
    told_everywhere(by_nftables, cause, CAUSES[cause], capsys)


@pytest.mark.parametrize("cause", BY_IPTABLES, ids=name_of)
def test_a_workload_that_iptables_cannot_redirect_is_told(by_iptables, cause, capsys):
    told_everywhere(by_iptables, cause, BY_IPTABLES[cause], capsys)


def told_everywhere(node, cause, why, capsys):
    name = cause.__name__.replace("_", "-")
    with pair_of() as pair:
        with cause(pair) as fields:
            node.put(name, pair, **{"sidecar": "own", "namespace": "shop", **fields})
            found_at = when_it_is_known(node, name)
            eventually(lambda: node.status()["round_at"] > found_at)
            (shown,) = (one for one in in_status(node, capsys) if one["name"] == name)
            assert why in shown["problem"]
            assert ("shop", name) in in_metrics(node)
            assert any(why in line["message"] for line in in_log(node, name)), in_log(node, name)
        (node.directory / "workloads" / f"{name}.json").unlink()
        eventually(lambda: name not in {one["name"] for one in node.status()["workloads"]})


def when_it_is_known(node, name):
    """The end of the first round that has it: of the next one on it is told."""
    until = time.monotonic() + DEADLINE_S
    while True:
        status = node.status()
        if name in {one["name"] for one in status["workloads"]}:
            return status["round_at"]
        assert time.monotonic() < until


def in_status(node, capsys):
    assert main(["status", "--json", "--socket", node.config["socket"]]) == 1
    return json.loads(capsys.readouterr().out)["nodes"][0]["workloads"]


def in_metrics(node):
    with urllib.request.urlopen(f"http://{node.config['metrics']}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.labels["namespace"], sample.labels["workload"])
        for family in families
        for sample in family.samples
        if sample.name == "tidegate_workload_problem"
    }


def in_log(node, name):
    """Warnings about one workload."""
    lines = map(json.loads, (node.directory / "agent.log").read_text().splitlines())
    return [line for line in lines if line["level"] == "warning" and line.get("workload") == name]
