"""`tidegate init`, with CAP_NET_ADMIN and nothing else, redirects a pod and proves it, or says why not."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import consul_rules
import pytest
from namespaces import DEADLINE_S, landing, needs_user_namespaces, serving
from readable import for_everybody
from verifying import listening, nft

from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend, Twins
from tidegate.enforce.redirect.nftables_rules import DORMANT_TABLE
from tidegate.enforce.redirect.probing.place import INTERFACE, Means
from tidegate.enforce.redirect.rules import rules_for
from tidegate.enforce.redirect.verify import verify
from tidegate.intent.policy import DEFAULT, Dns, Family, Mode, Outbound, Policy, PortRange, Proxy
from tidegate.kernel import netns, nf_tables, tunnel
from tidegate.kernel.errors import KernelError
from tidegate.node import init as init_module
from tidegate.node.init import Failure, InitFailed, redirect

USER = 7777
NET_ADMIN = ("-all", "+net_admin")
NOTHING = ("-all",)
INBOUND, OUTBOUND, APP = 20000, 15001, 8080
MANY_KINDS = Policy(
    dns=Dns(enabled=True),
    outbound=Outbound(
        exclude_ports=(PortRange(1, 1), PortRange(3, 4)), exclude_cidrs=("10.0.0.0/8", "fd00::/8")
    ),
)


def init(netns_path, *options, capabilities=NET_ADMIN, user=USER, **environment):
    """Run the command as a container's: as a user, with capabilities in its sets, and none to gain."""
    sets = ",".join(capabilities)
    argv = [
        *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"),
        *(f"--bounding-set={sets}", f"--inh-caps={sets}", f"--ambient-caps={sets}"),
        *(sys.executable, "-m", "tidegate.cli.main", "init", *options),
    ]
    process = netns.spawn(
        netns_path,
        for_everybody(argv),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **environment},
    )
    output, problem = process.communicate(timeout=DEADLINE_S * 3)
    return process.returncode, output.decode(), problem.decode()


def refused(netns_path, failure, policy=DEFAULT, **options):
    """What is told of a failure; of those that privileges have no part in, without a process."""
    with pytest.raises(InitFailed) as told:
        netns.run_in(netns_path, redirect, policy, **options)
    assert told.value.exit_code == failure
    return str(told.value)


def links_of(netns_path):
    return {name for _, name in netns.run_in(netns_path, socket.if_nameindex)}


class TestWithNetAdminAlone:
    def test_connections_are_redirected_in_both_directions_and_the_agent_finds_its_own_rules(
        self, pair
    ):
        code, output, problem = init(pair.pod)
        assert code == 0, problem
        assert output.startswith("created by nftables")
        assert Engine().check(pair.pod, DEFAULT) == ()
        with serving(pair.pod, "sidecar", [INBOUND, OUTBOUND]), serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"
            assert landing(pair.peer, pair.pod_ipv6, APP).server == "sidecar"
            assert landing(pair.pod, pair.peer_ipv4, APP, uid=1000).port == OUTBOUND

    def test_probes_are_made_of_both_directions_families_and_of_dns(self, pair):
        code, output, problem = init(
            pair.pod, "--json", TIDEGATE_DNS="all", TIDEGATE_EXCLUDE_INBOUND_PORTS="9000"
        )
        assert code == 0, problem
        told = json.loads(output)
        passed = {probe["name"] for probe in told["probes"] if probe["outcome"] == "passed"}
        for family in ("ipv4", "ipv6"):
            assert {
                f"outbound-{family}",
                f"inbound-{family}",
                f"outbound-port-{family}",
                f"inbound-excluded-port-{family}",
                f"dns-tcp-{family}",
                f"dns-udp-{family}",
            } <= passed

    def test_nothing_but_the_rules_is_left(self, pair):
        before = links_of(pair.pod)
        assert init(pair.pod)[0] == 0
        assert links_of(pair.pod) == before
        for family in ("inet", "ip", "ip6"):
            assert netns.run_in(pair.pod, nf_tables.table_flags, family, DORMANT_TABLE) is None

    def test_the_same_again_changes_nothing(self, pair):
        assert init(pair.pod)[0] == 0
        code, output, _ = init(pair.pod, "--json")
        assert (code, json.loads(output)["change"]) == (0, "unchanged")

    def test_another_policy_takes_the_place_of_the_first(self, pair):
        assert init(pair.pod)[0] == 0
        code, output, _ = init(pair.pod, "--json", TIDEGATE_EXCLUDE_OUTBOUND_PORTS="5432")
        assert (code, json.loads(output)["change"]) == (0, "replaced")

    def test_what_the_agent_loaded_is_as_it_should_be(self, pair):
        Engine().apply(pair.pod, DEFAULT)
        code, output, _ = init(pair.pod, "--json")
        assert (code, json.loads(output)["change"]) == (0, "unchanged")

    def test_a_sidecar_that_listens_already_is_redirected_to(self, pair):
        with listening(pair.pod, INBOUND, OUTBOUND):
            code, output, problem = init(pair.pod)
        assert code == 0, problem
        assert "redirected to port 20000; a listener answered" in output

    def test_what_a_killed_one_left_is_in_nobodys_way(self, pair):
        nft(pair.pod, f"table inet {DORMANT_TABLE} {{ flags dormant; chain outbound {{ }}; }}")
        left_behind = netns.run_in(pair.pod, tunnel.opened, INTERFACE)
        netns.run_in(pair.pod, left_behind.__enter__)
        code, _, problem = init(pair.pod)
        assert code == 0, problem
        assert INTERFACE not in links_of(pair.pod)

    def test_annotations_of_the_downward_api_are_heeded(self, pair):
        # Directories of pytest's are for their owner only.
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o755)
            annotations = Path(directory, "annotations")
            annotations.write_text('tidegate.io/exclude-inbound-ports="8080"\n')
            code, _, problem = init(pair.pod, f"--annotations={annotations}")
        assert code == 0, problem
        with serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "app"

    def test_consuls_own_configuration_is_heeded(self, pair):
        config = {"ProxyUserID": "5995", "ProxyInboundPort": 20000, "ExcludeInboundPorts": ["8080"]}
        code, _, problem = init(pair.pod, CONSUL_REDIRECT_TRAFFIC_CONFIG=json.dumps(config))
        assert code == 0, problem
        with serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "app"

    def test_rules_that_consul_left_are_replaced_on_request(self, pair):
        consul_rules.run(
            pair.pod,
            "nft",
            "-f",
            "-",
            text="table inet consul_tproxy { chain CONSUL_NAT_OUTPUT { }; }",
        )
        code, output, problem = init(pair.pod, "--adopt")
        assert code == 0, problem
        assert "adopted: Consul" in output
        assert netns.run_in(pair.pod, nf_tables.table_flags, "inet", "consul_tproxy") is None


class TestElsewhere:
    def test_in_a_user_namespace_of_its_own_a_pod_is_redirected(self):
        """Such as a pod with hostUsers: false."""
        needs_user_namespaces()
        script = 'ip link set lo up && ip addr add 192.0.2.1/32 dev lo && exec "$@"'
        environment = {"PATH": os.environ["PATH"]}
        unshare = ("unshare", "--user", "--map-root-user", "--net", "sh", "-ec", script, "sh")
        argv = (sys.executable, "-m", "tidegate.cli.main", "init", "--json")
        done = subprocess.run(
            [*unshare, *argv],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 3,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outcomes = {one["name"]: one["outcome"] for one in json.loads(done.stdout)["probes"]}
        assert outcomes["outbound-ipv4"] == outcomes["inbound-ipv4"] == "passed"

    def test_without_nf_tables_the_legacy_tables_are_taken(self, pair, monkeypatch):
        monkeypatch.setattr(NftablesBackend, "apply", without_nf_tables)
        done = netns.run_in(pair.pod, redirect, DEFAULT)
        assert done.applied.backend == "iptables"
        assert done.why == "there is no nf_tables; iptables works here"
        with serving(pair.pod, "sidecar", [INBOUND]), serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"


def without_nf_tables(*_args):
    raise KernelError("there is no nf_tables")


class TestWhatIsTold:
    def test_nobody_waits_for_the_sidecar(self, pair):
        policy = Policy(outbound=Outbound(wait_for_sidecar=True))
        done = netns.run_in(pair.pod, redirect, policy)
        assert any("do not wait for the sidecar" in warning for warning in done.warnings)
        assert Engine().check(pair.pod, policy) == ()

    def test_ways_around_the_sidecar_are(self, pair):
        done = netns.run_in(pair.pod, redirect, Policy(families=(Family.IPV4,)))
        assert any("IPv6" in warning for warning in done.warnings)


class TestWhatFails:
    def assert_fails(self, answer, failure, *words):
        code, output, problem = answer
        assert code == failure, (output, problem)
        assert output == ""
        last = problem.strip().splitlines()[-1]
        assert last.startswith("tidegate: ")
        assert "Traceback" not in problem
        for word in words:
            assert word in last

    def test_a_faulty_policy(self, pair):
        answer = init(pair.pod, TIDEGATE_OUTBOUND_PORT="web")
        self.assert_fails(answer, Failure.POLICY, "TIDEGATE_OUTBOUND_PORT", "'web' is not a port")
        assert Engine().current(pair.pod) is None

    def test_a_file_that_is_not_there(self, pair):
        answer = init(pair.pod, "--labels=/nowhere/labels")
        self.assert_fails(answer, Failure.POLICY, "/nowhere/labels", "No such file")

    def test_no_net_admin_also_for_root(self, pair):
        for user in (0, USER):
            answer = init(pair.pod, capabilities=NOTHING, user=user)
            self.assert_fails(answer, Failure.PERMISSION, "NET_ADMIN")

    def test_another_mesh(self, pair):
        nft(pair.pod, "table ip nat { chain ISTIO_OUTPUT { }; }")
        for adopt in (False, True):
            told = refused(pair.pod, Failure.FOREIGN, adopt=adopt)
            assert "ISTIO_OUTPUT" in told
            assert told.endswith("a pod can be in one mesh only")
        assert Engine().current(pair.pod) is None

    def test_consul_without_a_word_that_it_is_to_be_replaced(self, pair):
        nft(pair.pod, "table inet consul_tproxy { chain CONSUL_NAT_OUTPUT { }; }")
        told = refused(pair.pod, Failure.FOREIGN)
        assert told.endswith("CONSUL_NAT_OUTPUT; --adopt replaces that")

    def test_rules_that_the_kernel_refuses(self, pair):
        policy = Policy(proxy=Proxy(cgroup="no/such/cgroup"))
        assert "no/such/cgroup" in refused(pair.pod, Failure.KERNEL, policy)

    def test_a_kernel_without_any_of_it(self, pair, monkeypatch):
        for backend in (NftablesBackend, IptablesBackend):
            monkeypatch.setattr(backend, "apply", without_nf_tables)
        told = refused(pair.pod, Failure.KERNEL)
        assert told.endswith("(the legacy tables take NET_RAW and root besides)")
        assert Engine().current(pair.pod) is None

    def test_probes_that_cannot_be_made(self, pair, monkeypatch):
        monkeypatch.setattr(init_module, "verify", without_nf_tables)
        told = refused(pair.pod, Failure.UNPROVEN)
        assert told.startswith("the rules are loaded, but no probe could be made: ")
        assert Engine().check(pair.pod, DEFAULT) == ()

    def test_a_drop_on_the_way_to_the_sidecar(self, pair):
        nft(
            pair.pod,
            "table ip o { chain i { type filter hook input priority 0; tcp dport 20000 drop; }; }",
        )
        told = refused(pair.pod, Failure.FAILED)
        assert "inbound-ipv4 failed" in told
        assert told.endswith("something drops it")

    def test_a_redirection_by_somebody_who_comes_first(self, pair):
        nft(
            pair.pod,
            "table ip others { chain o { type nat hook output priority -150; tcp dport 1-65535 redirect to :7; }; }",
        )
        told = refused(pair.pod, Failure.FAILED)
        assert "outbound-ipv4 failed" in told
        assert told.endswith("port 7, not on port 15001")

    def test_the_nodes_own_network(self):
        if not netns.is_initial(netns.CURRENT):
            pytest.skip(
                "this machine is itself a container: its namespace is not the kernel's first"
            )
        before = nf_tables.generation()
        self.assert_fails(init(netns.CURRENT), Failure.NODE, "hostNetwork")
        assert nf_tables.generation() == before


class TestATwinBesideTheRules:
    @pytest.mark.parametrize(
        "policy",
        [DEFAULT, MANY_KINDS, Policy(mode=Mode.TPROXY), Policy(drop_invalid=True)],
        ids=["default", "sets and zones", "tproxy", "drop invalid"],
    )
    def test_says_what_one_in_a_namespace_of_its_own_says(self, pair, policy):
        rules = rules_for(policy)
        beside, apart = NftablesBackend(Twins.BESIDE), NftablesBackend(Twins.APART)
        beside.apply(pair.pod, rules)
        assert apart.check(pair.pod, rules) == ()
        assert apart.apply(pair.pod, rules).value == "unchanged"
        apart.remove(pair.pod)
        apart.apply(pair.pod, rules)
        assert beside.check(pair.pod, rules) == ()

    def test_tells_that_rules_are_other_ones(self, pair):
        rules = rules_for(DEFAULT)
        NftablesBackend().apply(pair.pod, rules)
        nft(pair.pod, "add rule inet tidegate inbound counter")
        assert NftablesBackend(Twins.BESIDE).check(pair.pod, rules) == (
            "table inet tidegate is another one than the policy says",
        )

    def test_sees_no_packet(self, pair):
        """Its own rules would redirect while it is read."""
        rules = rules_for(MANY_KINDS)
        NftablesBackend(Twins.BESIDE).check(pair.pod, rules)
        with serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "app"


class TestProbesByConnections:
    @pytest.fixture
    def unseen_answers(self, monkeypatch):
        """As before Linux 6.5, where what a tunnel sends to this machine itself comes to no socket."""
        monkeypatch.setattr(tunnel, "_IFLA_VXLAN_LOCALBYPASS", 1000)

    def test_find_rules_that_are_not_there(self, pair):
        probes = verify(pair.pod, DEFAULT, Means.CONNECTIONS)
        failed = {probe.name for probe in probes if probe.outcome == "failed"}
        assert failed == {
            f"{name}-{family}"
            for name in ("outbound", "inbound", "outbound-port")
            for family in ("ipv4", "ipv6")
        }

    def test_pass_where_answers_cannot_be_seen(self, pair, unseen_answers):
        Engine().apply(pair.pod, DEFAULT)
        probes = {probe.name: probe for probe in verify(pair.pod, DEFAULT, Means.CONNECTIONS)}
        assert not [probe for probe in probes.values() if probe.outcome == "failed"]
        assert probes["inbound-ipv4"].outcome == probes["inbound-ipv6"].outcome == "passed"
        assert "answers cannot be seen here" in probes["inbound-ipv4"].detail

    def test_find_missing_rules_also_where_answers_cannot_be_seen(self, pair, unseen_answers):
        probes = {probe.name: probe for probe in verify(pair.pod, DEFAULT, Means.CONNECTIONS)}
        assert probes["inbound-ipv4"].outcome == probes["inbound-ipv6"].outcome == "failed"
