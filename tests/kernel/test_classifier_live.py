"""The classifier on real interfaces: real clients, real OpenSSL, agents that come and go."""

import datetime
import http.client
import http.server
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from classifying import bpffs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from namespaces import DEADLINE_S, Pair, dial, landing, pair_of, serving

from tidegate.kernel import links, netns
from tidegate.model import Direction, Edge, FlowClass
from tidegate.observe.classifier import Attachment, Classifier, Side, consul_profile

TRUST_DOMAIN = "0a1b.consul"
MESH_SNI = f"api.default.dc1.internal.{TRUST_DOMAIN}"
WORKLOAD = 0xFEDCBA9876543210
PORT = 8080


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with bpffs(tmp_path / "bpf") as directory:
        yield directory


@pytest.fixture
def classifier(pins: Path) -> Iterator[Classifier]:
    opened = Classifier.open(pins)
    opened.set_profile(consul_profile(TRUST_DOMAIN))
    yield opened
    opened.remove()


def observe(
    classifier: Classifier, pair: Pair, side: Side, workload: int = WORKLOAD
) -> Attachment:
    """Attaches to the pod's veth; only one that is attached there can be seen by its interface."""
    where, interface = (pair.peer, "host0") if side is Side.HOST else (pair.pod, "eth0")
    ifindex = int(netns.run_in(where, Path(f"/sys/class/net/{interface}/ifindex").read_text))
    return netns.run_in(where, classifier.attach, workload, ifindex, side, (PORT,))


def counts(classifier: Classifier, workload: int = WORKLOAD) -> Counter[FlowClass]:
    connections: Counter[FlowClass] = Counter()
    for edge in classifier.edges():
        if edge.key.workload == workload:
            connections[edge.key.flow_class] += edge.count.connections
    return +connections


def the_edge(classifier: Classifier) -> Edge:
    (edge,) = [edge for edge in classifier.edges() if edge.count.connections]
    return edge


@contextmanager
def answering(netns_path: str, context: ssl.SSLContext | None = None) -> Iterator[None]:
    """An HTTP server for both families in a namespace, over TLS with a context."""
    listener = netns.run_in(netns_path, _listener)
    if context:
        listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
    server = http.server.ThreadingHTTPServer(("", PORT), Answer, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.block_on_close = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listener():
    import socket

    return socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
