"""What tests of live probes share: rules for as long as they are tried, listeners, and what the probes told."""

import re
import socket
import subprocess
from contextlib import ExitStack, contextmanager

from namespaces import DEADLINE_S

from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.probing.judgement import Outcome
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import Dns, Mode, Policy, PortRange
from tidegate.kernel import netns, nftables

PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED
INBOUND, OUTBOUND, APP = 20000, 15001, 8080
# linux/in6.h
IPV6_TRANSPARENT = 75
FAR = re.compile(r"\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+|\b(?:2001:db8|3fff):[0-9a-f:]+")

TEST_NETS = (
    "192.0.2.0/24",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "2001:db8::/32",
    "3fff::/20",
)

DNS = Policy(dns=Dns(enabled=True))
TPROXY = Policy(mode=Mode.TPROXY)
SOME_RESOLVERS = Policy(dns=Dns(enabled=True, resolvers=("10.96.0.10", "fd96::a")))
BACKENDS = {"nftables": NftablesBackend, "iptables": IptablesBackend}


@contextmanager
def applied(netns_path, policy, backend=NftablesBackend):
    made = backend()
    made.apply(netns_path, rules_for(policy))
    yield
    made.remove(netns_path)


def outcomes(probes):
    return {probe.name: probe.outcome for probe in probes}


def details(probes, outcome):
    """What probes of one outcome say; addresses by chance are called FAR."""
    return {
        probe.name: FAR.sub("FAR", probe.detail) for probe in probes if probe.outcome is outcome
    }


def nft(netns_path, text):
    netns.run_in(netns_path, nftables.load, text)


def state(netns_path):
    """All that a verification could leave behind: interfaces, addresses, routes, rules of either kind."""
    commands = (
        ["ip", "-brief", "link"],
        ["ip", "-brief", "address"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "-6", "route", "show", "table", "all"],
        ["ip", "rule"],
        ["ip", "-6", "rule"],
        ["nft", "-s", "list", "ruleset"],
    )
    shown = []
    for command in commands:
        process = netns.spawn(netns_path, command, stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        shown.append(output.decode())
    return shown


@contextmanager
def listening(netns_path, *ports, transparent=False):
    """Listeners that accept nothing; `transparent` ones as a sidecar has them in tproxy mode."""

    def listen(port):
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if transparent:
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
        listener.bind(("::", port))
        listener.listen()
        listener.setblocking(False)
        return listener

    with ExitStack() as stack:
        yield [stack.enter_context(netns.run_in(netns_path, listen, port)) for port in ports]


def only(port):
    return (PortRange(port, port),)
