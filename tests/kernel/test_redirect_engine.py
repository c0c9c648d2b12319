"""The engine: the backend it picks, a change of backends, and what other meshes left, under live traffic."""

import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import consul_rules
import pytest
from callers import calling_both_ways
from hostile import owned_table, table
from namespaces import dial, echoes, landing, pair_of, serving
from rulesets import legacy_tables, ruleset

from tidegate.enforce.redirect import block, engine, foreign
from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.redirect.foreign import Left, Mesh
from tidegate.errors import InputError
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    Inbound,
    Outbound,
    Policy,
    PortRange,
)
from tidegate.kernel import chains, links, netns, nf_transaction, xtables
from tidegate.kernel.chains import Store
from tidegate.kernel.errors import KernelError

INBOUND, OUTBOUND, APP, OTHER = 20000, 15001, 8080, 5432
PORTS = (INBOUND, OUTBOUND, APP, OTHER)
NAMES = tuple(BackendName)
NOTHING = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
EXCLUDING = Policy(outbound=Outbound(exclude_ports=(PortRange(OTHER, OTHER),)))
IPV4_ONLY = Policy(families=(Family.IPV4,))
REDIRECTED = {
    "outbound-4": {("pod", OUTBOUND)},
    "outbound-6": {("pod", OUTBOUND)},
    "inbound-4": {("pod", INBOUND)},
    "inbound-6": {("pod", INBOUND)},
}


@pytest.fixture(scope="module")
def lab():
    """A pair with servers on all ports of both ends; each test cleans the pod."""
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        yield pair


@pytest.fixture
def own_lab():
    """As lab, with namespaces that no rule has ever been in."""
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        yield pair


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces, for tests without traffic."""
    return new_namespace()


@pytest.fixture(params=NAMES)
def redirecting(request):
    """An engine of each backend."""
    return Engine(request.param)


def other_than(redirecting):
    (name,) = set(NAMES) - {redirecting.choice.backend}
    return Engine(name)


@contextmanager
def continuously_redirected(pair):
    """Every connection that is opened meanwhile is redirected, and none fails."""
    with calling_both_ways(pair, APP) as callers:
        for caller in callers.values():
            caller.wait_for(20)
        yield callers
        for caller in callers.values():
            caller.wait_for(20)
    assert {name: caller.failures for name, caller in callers.items()} == {
        name: [] for name in callers
    }
    assert {name: set(caller.landed) for name, caller in callers.items()} == REDIRECTED


class TestChoice:
    def test_auto_prefers_nftables_and_says_why(self):
        choice = engine.choose("auto")
        assert choice.backend is BackendName.NFTABLES
        assert choice.why == "nf_tables of this kernel takes tidegate's rules"

    @pytest.mark.parametrize("name", NAMES)
    def test_a_backend_that_is_asked_for_is_tried_as_well(self, name):
        choice = engine.choose(name)
        assert choice.backend is name
        assert choice.why.startswith("it was asked for; ")

    def test_a_name_that_is_none_is_an_input_error_that_tells_the_names(self):
        with pytest.raises(
            InputError, match="'ebpf' is not a backend; expected one of auto, nftables"
        ):
            _ = Engine("ebpf").choice

    @pytest.fixture
    def broken(self, monkeypatch):
        """Lets backends be refused by the kernel, as long as the test lasts."""

        def break_backend(name, problem):
            def refuse(*_):
                raise KernelError(problem, 95)

            monkeypatch.setattr(engine._backend(name), "apply", refuse, raising=True)
            engine._probed.cache_clear()

        yield break_backend
        monkeypatch.undo()
        engine._probed.cache_clear()

    def test_without_nf_tables_the_legacy_tables_are_chosen_and_the_reason_is_told(self, broken):
        broken(BackendName.NFTABLES, "Operation not supported")
        choice = engine.choose("auto")
        assert choice.backend is BackendName.IPTABLES
        assert "nf_tables of this kernel does not take tidegate's rules" in choice.why
        assert "Operation not supported" in choice.why
        assert choice.why.endswith("the legacy table nat of this kernel takes tidegate's rules")

    def test_when_nothing_works_every_reason_is_told(self, broken):
        broken(BackendName.NFTABLES, "no nf_tables here")
        broken(BackendName.IPTABLES, "no legacy tables here")
        with pytest.raises(KernelError, match=r"no nf_tables here.*no legacy tables here"):
            _ = Engine("auto").choice
        with pytest.raises(KernelError, match="no legacy tables here"):
            _ = Engine("iptables").choice

    def test_a_refusal_is_not_remembered_and_a_success_is(self, broken, monkeypatch):
        broken(BackendName.NFTABLES, "not now")
        with pytest.raises(KernelError):
            engine.choose("nftables")
        monkeypatch.undo()
        assert engine.choose("nftables").backend is BackendName.NFTABLES
        broken_again = "engine asks again"
        monkeypatch.setattr(
            engine._backend(BackendName.NFTABLES), "apply", lambda *_: pytest.fail(broken_again)
        )
        assert engine.choose("nftables").backend is BackendName.NFTABLES

    def test_no_program_is_needed(self, pod):
        script = (
            "import sys; from tidegate.enforce.redirect.engine import Engine;"
            "from tidegate.intent.policy import DEFAULT;"
            "engines = [Engine(name) for name in ('auto', 'nftables', 'iptables')];"
            "applied = [engine.apply(sys.argv[1], DEFAULT).change for engine in engines];"
            "print(*applied, engines[-1].check(sys.argv[1], DEFAULT), engines[0].remove(sys.argv[1]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, pod],
            env={"PATH": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "created unchanged replaced () removed\n"), (
            done.stderr
        )


class TestOneBackend:
    def test_apply_check_and_remove_agree(self, redirecting, pod):
        assert redirecting.backend_of(pod) is None
        assert redirecting.current(pod) is None
        applied = redirecting.apply(pod, DEFAULT)
        assert applied == engine.Applied(change=Change.CREATED, backend=redirecting.choice.backend)
        assert redirecting.backend_of(pod) is redirecting.choice.backend
        assert redirecting.check(pod, DEFAULT) == ()
        assert "to-inbound-listener" in {line.name for line in redirecting.current(pod)}
        assert redirecting.apply(pod, DEFAULT).change is Change.UNCHANGED
        assert redirecting.apply(pod, EXCLUDING).change is Change.REPLACED
        assert redirecting.check(pod, DEFAULT) != ()
        assert redirecting.remove(pod) is Change.REMOVED
        assert redirecting.remove(pod) is Change.UNCHANGED
        assert redirecting.backend_of(pod) is None

    def test_what_is_rendered_is_not_empty_unless_nothing_is_redirected(self, redirecting):
        assert "20000" in redirecting.render(DEFAULT)
        assert redirecting.render(NOTHING) == ""

    def test_a_policy_that_redirects_nothing_and_back(self, redirecting, lab):
        with removed_afterwards(redirecting, lab.pod):
            redirecting.apply(lab.pod, DEFAULT)
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "pod"
            assert redirecting.apply(lab.pod, NOTHING).change is Change.REMOVED
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "peer"
            assert redirecting.check(lab.pod, NOTHING) == ()
            assert redirecting.apply(lab.pod, DEFAULT).change is Change.CREATED
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "pod"

    def test_a_family_that_is_switched_off_and_on_again(self, redirecting, lab):
        with removed_afterwards(redirecting, lab.pod), ExitStack() as stack:
            redirecting.apply(lab.pod, DEFAULT)
            through, landed = dial(lab.pod, lab.peer_ipv4, APP)
            stack.enter_context(through)
            assert landed.server == "pod"
            assert redirecting.apply(lab.pod, IPV4_ONLY).change is Change.REPLACED
            assert landing(lab.pod, lab.peer_ipv6, APP).server == "peer"
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "pod"
            assert landing(lab.peer, lab.pod_ipv6, APP).port == APP
            assert redirecting.check(lab.pod, IPV4_ONLY) == ()
            assert redirecting.apply(lab.pod, DEFAULT).change is Change.REPLACED
            assert landing(lab.pod, lab.peer_ipv6, APP).server == "pod"
            assert landing(lab.peer, lab.pod_ipv6, APP).port == INBOUND
            assert echoes(through)

    def test_a_family_that_comes_back_knows_nothing_of_connections_from_before(
        self, redirecting, lab
    ):
        with removed_afterwards(redirecting, lab.pod), ExitStack() as stack:
            redirecting.apply(lab.pod, DEFAULT)
            port = 40_010 + NAMES.index(redirecting.choice.backend)
            before, landed = dial(lab.pod, lab.peer_ipv6, APP, source_port=port)
            assert landed.server == "pod"
            before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            redirecting.apply(lab.pod, IPV4_ONLY)
            before.close()
            direct, landed = dial(lab.pod, lab.peer_ipv6, APP, source_port=port)
            stack.enter_context(direct)
            assert landed.server == "peer"
            redirecting.apply(lab.pod, DEFAULT)
            assert echoes(direct)
            assert echoes(direct)


class TestChangeOfBackends:
    def test_the_other_backends_rules_go_in_the_same_step(self, redirecting, pod):
        other = other_than(redirecting)
        other.apply(pod, EXCLUDING)
        assert redirecting.backend_of(pod) is other.choice.backend
        assert redirecting.current(pod) == other.current(pod) != ()
        applied = redirecting.apply(pod, DEFAULT)
        assert applied.change is Change.REPLACED
        assert applied.replaced_backend is other.choice.backend
        assert redirecting.check(pod, DEFAULT) == ()
        assert redirecting.backend_of(pod) is other.backend_of(pod) is redirecting.choice.backend
        assert redirecting.apply(pod, DEFAULT) == engine.Applied(
            change=Change.UNCHANGED, backend=redirecting.choice.backend
        )

    def test_rules_of_both_backends_are_a_difference_and_are_repaired(self, redirecting, pod):
        other = other_than(redirecting)
        redirecting.apply(pod, DEFAULT)
        # Past the engine, which would take the first ones away.
        other._backend.apply(pod, engine.rules_for(DEFAULT))
        name = other.choice.backend
        assert redirecting.check(pod, DEFAULT) == (
            f"rules of the backend {name} are there as well",
        )
        assert redirecting.backend_of(pod) is redirecting.choice.backend
        assert redirecting.apply(pod, DEFAULT).replaced_backend is name
        assert redirecting.check(pod, DEFAULT) == ()

    def test_a_policy_that_redirects_nothing_takes_the_other_backends_rules_away(
        self, redirecting, lab
    ):
        other_than(redirecting).apply(lab.pod, DEFAULT)
        assert redirecting.apply(lab.pod, NOTHING).change is Change.REMOVED
        assert landing(lab.pod, lab.peer_ipv4, APP).server == "peer"
        assert redirecting.backend_of(lab.pod) is None

    def test_remove_takes_the_rules_of_both(self, redirecting, pod):
        other_than(redirecting).apply(pod, DEFAULT)
        assert redirecting.remove(pod) is Change.REMOVED
        assert redirecting.remove(pod) is Change.UNCHANGED

    def test_no_connection_goes_unredirected_or_fails_there_and_back(self, redirecting, own_lab):
        other = other_than(redirecting)
        redirecting.apply(own_lab.pod, DEFAULT)
        with continuously_redirected(own_lab) as callers:
            for _ in range(3):
                for taking_over in (other, redirecting):
                    assert taking_over.apply(own_lab.pod, DEFAULT).replaced_backend
                    for caller in callers.values():
                        caller.wait_for(5)

    @pytest.mark.parametrize("version", [4, 6])
    def test_open_connections_live_through_it_there_and_back(self, redirecting, lab, version):
        other = other_than(redirecting)
        with removed_afterwards(redirecting, lab.pod), ExitStack() as stack:
            redirecting.apply(lab.pod, DEFAULT)
            out, landed = dial(lab.pod, lab.peer_address(version), APP)
            stack.enter_context(out)
            assert (landed.server, landed.port) == ("pod", OUTBOUND)
            into, landed = dial(lab.peer, lab.pod_address(version), APP)
            stack.enter_context(into)
            assert landed.port == INBOUND
            direct, landed = dial(lab.pod, lab.peer_address(version), APP, uid=5995)
            stack.enter_context(direct)
            assert landed.server == "peer"
            for taking_over in (other, redirecting, other):
                assert taking_over.apply(lab.pod, DEFAULT).replaced_backend
                assert all(echoes(connection) for connection in (out, into, direct))

    def test_the_unchanged_path_wakes_no_legacy_table(self, pod):
        nft = Engine("nftables")
        before = legacy_tables(pod)
        for policy in (DEFAULT, DEFAULT, EXCLUDING, NOTHING):
            nft.apply(pod, policy)
            nft.check(pod, policy)
            nft.gaps(pod, policy)
            nft.current(pod)
            nft.backend_of(pod)
        nft.remove(pod)
        assert legacy_tables(pod) == before == {"ip": [], "ip6": []}


class TestRemove:
    def test_it_leaves_the_namespace_as_it_was(self, redirecting, pod):
        for program in ("iptables-legacy", "ip6tables-legacy"):
            others_rules(pod, program)
        consul_rules.run(
            pod, "nft", "add table inet other { chain c { type nat hook output priority 5; }; }"
        )
        before = ruleset(pod)
        both = other_than(redirecting)
        redirecting.apply(pod, Policy(dns=Dns(enabled=True), drop_invalid=True))
        both._backend.apply(pod, engine.rules_for(EXCLUDING))
        assert ruleset(pod) != before
        assert redirecting.remove(pod) is Change.REMOVED
        assert ruleset(pod) == before

    def test_it_unblocks(self, redirecting, lab):
        block.block(lab.pod)
        assert redirecting.remove(lab.pod) is Change.REMOVED
        assert not block.is_blocked(lab.pod)
        assert landing(lab.pod, lab.peer_ipv4, APP).server == "peer"
        assert redirecting.remove(lab.pod) is Change.UNCHANGED

    def test_what_the_kernel_refuses_is_told_after_all_else_is_gone(self, redirecting, lab):
        redirecting.apply(lab.pod, IPV4_ONLY)
        block.block(lab.pod)
        with netns.run_in(lab.pod, owned_table, "tidegate", "squatted"):
            with pytest.raises(KernelError, match="table inet tidegate"):
                redirecting.remove(lab.pod)
            assert not block.is_blocked(lab.pod)
            assert not [line for line in ruleset(lab.pod) if "TIDEGATE" in line]
        redirecting.remove(lab.pod)
        assert landing(lab.pod, lab.peer_ipv4, APP).server == "peer"
        assert redirecting.backend_of(lab.pod) is None

    def test_all_refusals_are_told_in_one(self, redirecting, pod, monkeypatch):
        def refuses(problem):
            def refuse(_):
                raise KernelError(problem, 1)

            return refuse

        redirecting.apply(pod, DEFAULT)
        monkeypatch.setattr(block, "unblock", refuses("the block stays"))
        monkeypatch.setattr(redirecting._backend, "remove", refuses("the rules stay"))
        with pytest.raises(KernelError, match=r"^the rules stay; the block stays$"):
            redirecting.remove(pod)

    def test_what_consul_left_stays(self, redirecting, pod):
        consul_rules.with_nft(pod)
        redirecting.apply(pod, DEFAULT)
        redirecting.remove(pod)
        assert {item.mesh for item in foreign.find(pod)} == {Mesh.CONSUL}


class TestForeign:
    @pytest.mark.parametrize(
        ("left_by", "places"),
        [
            ("legacy tables", {(Store.LEGACY, "ip", "nat"), (Store.LEGACY, "ip6", "nat")}),
            ("iptables-nft", {(Store.NF_TABLES, "ip", "nat"), (Store.NF_TABLES, "ip6", "nat")}),
            ("consul_tproxy", {(Store.NF_TABLES, "inet", "consul_tproxy")}),
            ("inet nat", {(Store.NF_TABLES, "inet", "nat")}),
        ],
    )
    def test_consuls_rules_are_found_wherever_they_are(self, pod, left_by, places):
        consul_rules.LEFT_BY[left_by](pod)
        found = foreign.find(pod)
        assert {(item.store, item.family, item.table) for item in found} == places
        for item in found:
            assert item.mesh is Mesh.CONSUL
            assert item.removable
            assert (
                set(consul_rules.CHAINS)
                <= set(item.chains)
                <= {*consul_rules.CHAINS, *consul_rules.BASE_CHAINS}
            )

    @pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
    def test_exactly_consuls_chains_and_the_jumps_to_them_are_removed(self, pod, left_by):
        for program in ("iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"):
            others_rules(pod, program)
        for named in ("nat", "mine"):
            consul_rules.run(pod, "nft", OTHERS_TABLE.format(named))
        before = ruleset(pod)
        if left_by == "inet nat":
            # The draft's own script begins with the removal of the whole table.
            consul_rules.run(pod, "nft", "delete table inet nat")
            consul_rules.with_nft_draft(pod)
            consul_rules.run(pod, "nft", OTHERS_TABLE.format("nat"))
        else:
            consul_rules.LEFT_BY[left_by](pod)
        found = foreign.find(pod)
        assert found
        remove_foreign(pod, found)
        assert foreign.find(pod) == ()
        assert ruleset(pod) == before
        remove_foreign(pod, found)
        assert ruleset(pod) == before

    def test_a_jump_that_another_program_added_goes_with_the_chain(self, pod):
        for program in ("iptables-legacy", "iptables-nft"):
            consul_rules.by_iptables(pod, program, "127.0.0.1/32", "127.0.0.1:8600")
            others_rules(pod, program)
            consul_rules.run(pod, program, "-t", "nat", "-A", "OTHERS", "-j", "CONSUL_PROXY_OUTPUT")
            consul_rules.run(pod, program, "-t", "nat", "-I", "OTHERS", "-g", "CONSUL_DNS_REDIRECT")
        remove_foreign(pod, foreign.find(pod))
        assert foreign.find(pod) == ()
        left = ruleset(pod)
        assert not [line for line in left if "CONSUL" in line]
        assert [line for line in left if "OTHERS" in line]

    def test_a_table_that_somebody_else_uses_too_is_not_deleted_whole(self, pod):
        consul_rules.with_nft(pod)
        consul_rules.run(
            pod, "nft", "add chain inet consul_tproxy mine; add rule inet consul_tproxy mine accept"
        )
        remove_foreign(pod, foreign.find(pod))
        assert foreign.find(pod) == ()
        listed = consul_rules.run(pod, "nft", "-s", "list", "table", "inet", "consul_tproxy")
        assert " ".join(listed.split()) == "table inet consul_tproxy { chain mine { accept } }"

    def test_other_meshes_are_told_and_left_alone(self, pod):
        for program in ("iptables-legacy", "ip6tables-nft"):
            for chain in ("ISTIO_OUTPUT", "PROXY_INIT_REDIRECT", "KUMA_MESH_INBOUND"):
                consul_rules.run(pod, program, "-t", "nat", "-N", chain)
                consul_rules.run(pod, program, "-t", "nat", "-A", "OUTPUT", "-j", chain)
        consul_rules.run(pod, "nft", "add table inet istio-proxy-nat { chain prerouting { }; }")
        before = ruleset(pod)
        found = foreign.find(pod)
        assert {item.mesh for item in found} == {Mesh.ISTIO, Mesh.LINKERD, Mesh.KUMA}
        assert not [item for item in found if item.removable]
        assert "Istio redirects in the nftables table inet istio-proxy-nat: prerouting" in map(
            str, found
        )
        remove_foreign(pod, found)
        assert ruleset(pod) == before

    def test_rules_that_are_nobodys_are_not_told(self, redirecting, pod):
        others_rules(pod, "iptables-legacy")
        others_rules(pod, "ip6tables-nft")
        redirecting.apply(pod, DEFAULT)
        assert foreign.find(pod) == ()

    def test_looking_wakes_no_legacy_table(self, pod):
        before = legacy_tables(pod)
        assert foreign.find(pod) == ()
        assert legacy_tables(pod) == before == {"ip": [], "ip6": []}

    def test_a_namespace_that_is_gone_is_an_error_that_names_it(self):
        with pytest.raises(KernelError, match="/run/netns/tg-gone"):
            foreign.find("/run/netns/tg-gone")


class TestFloods:
    """A pod that may change its own rules can have any number of them."""

    @pytest.fixture
    def flooded(self, pod):
        """A namespace with more chains, in more tables, than are looked at."""
        tables = "".join(
            f"table inet t{n} {{ chain a {{ }}; chain b {{ }}; }}\n" for n in range(1000)
        )
        consul_rules.run(pod, "nft", "-f", "-", text=tables)
        return pod

    @pytest.fixture
    def large_legacy_table(self, pod):
        """Adds rules to a legacy table of the pod, until it is larger than what is looked at."""
        rules = "-A OUTPUT -p tcp -m comment --comment x -j ACCEPT\n" * 3000

        def add(name):
            text = f"*{name}\n{rules}COMMIT\n"
            consul_rules.run(pod, "iptables-legacy-restore", "--noflush", text=text)

        return add

    def test_both_backends_rules_are_found_and_give_way_to_each_other(self, redirecting, flooded):
        other = other_than(redirecting)
        assert other.apply(flooded, DEFAULT).change is Change.CREATED
        assert redirecting.backend_of(flooded) is other.choice.backend
        assert redirecting.apply(flooded, DEFAULT).replaced_backend is other.choice.backend
        assert redirecting.check(flooded, DEFAULT) == ()
        assert redirecting.apply(flooded, DEFAULT).change is Change.UNCHANGED

    @pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
    def test_consuls_rules_are_found_and_adopted(self, redirecting, flooded, left_by):
        consul_rules.LEFT_BY[left_by](flooded)
        left = set(foreign.find(flooded))
        assert left
        applied = redirecting.apply(flooded, DEFAULT, adopt=True)
        assert (set(applied.adopted), applied.foreign) == (left, ())
        assert foreign.find(flooded) == ()

    def test_everything_is_removed(self, redirecting, flooded):
        before = ruleset(flooded)
        redirecting.apply(flooded, DEFAULT)
        other_than(redirecting)._backend.apply(flooded, engine.rules_for(EXCLUDING))
        block.block(flooded)
        assert redirecting.remove(flooded) is Change.REMOVED
        assert redirecting.backend_of(flooded) is None
        assert ruleset(flooded) == before

    def test_what_is_in_a_large_legacy_table_is_removed_too(self, pod, large_legacy_table):
        Engine("iptables").apply(pod, DEFAULT)
        large_legacy_table("nat")
        nft = Engine("nftables")
        assert nft.remove(pod) is Change.REMOVED
        assert not [line for line in ruleset(pod) if "TIDEGATE" in line]
        assert nft.remove(pod) is Change.UNCHANGED

    def test_legacy_tables_of_others_too_large_to_be_worked_on_are_no_obstacle(self, pod):
        rules = "-A OUTPUT -p tcp -j ACCEPT\n" * (xtables.MOST_RULES + 1)
        consul_rules.run(pod, "iptables-legacy-restore", text=f"*nat\n{rules}COMMIT\n")
        nft = Engine("nftables")
        assert nft.apply(pod, DEFAULT).change is Change.CREATED
        assert nft.check(pod, DEFAULT) == ()
        assert nft.remove(pod) is Change.REMOVED
        assert nft.remove(pod) is Change.UNCHANGED

    def test_what_has_not_changed_is_not_listed_again(self, redirecting, pod, monkeypatch):
        consul_rules.run(pod, "nft", "add table inet other")
        redirecting.apply(pod, DEFAULT)
        listings = []
        of_nf_tables = chains.of_nf_tables
        monkeypatch.setattr(
            chains, "of_nf_tables", lambda *sought: listings.append(1) or of_nf_tables(*sought)
        )
        assert redirecting.apply(pod, DEFAULT).change is Change.UNCHANGED
        assert redirecting.check(pod, DEFAULT) == ()
        assert redirecting.backend_of(pod) is redirecting.choice.backend
        assert listings == []
        consul_rules.run(pod, "nft", "add table inet another { chain ISTIO_OUTPUT { }; }")
        assert len(redirecting.check(pod, DEFAULT)) == 1
        assert listings == [1]


class TestAdoption:
    @pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
    def test_no_connection_goes_unredirected_or_fails_meanwhile(
        self, redirecting, own_lab, left_by
    ):
        consul_rules.LEFT_BY[left_by](own_lab.pod)
        left = foreign.find(own_lab.pod)
        with continuously_redirected(own_lab):
            adopted = redirecting.apply(own_lab.pod, DEFAULT, adopt=True)
        assert (adopted.foreign, adopted.adopted) == ((), left)
        assert foreign.find(own_lab.pod) == ()
        assert redirecting.check(own_lab.pod, DEFAULT) == ()

    @pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
    def test_what_is_not_adopted_is_told_until_it_is(self, redirecting, pod, left_by):
        consul_rules.LEFT_BY[left_by](pod)
        left = foreign.find(pod)
        told = redirecting.apply(pod, DEFAULT)
        assert (told.change, told.adopted) == (Change.CREATED, ())
        assert told.foreign == tuple(map(Left, left))
        assert redirecting.check(pod, DEFAULT) == tuple(map(str, left))
        adopted = redirecting.apply(pod, DEFAULT, adopt=True)
        assert (adopted.change, adopted.foreign, adopted.adopted) == (Change.UNCHANGED, (), left)
        assert redirecting.check(pod, DEFAULT) == ()

    @pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
    def test_connections_through_consuls_rules_live_on(self, redirecting, own_lab, left_by):
        consul_rules.LEFT_BY[left_by](own_lab.pod)
        with ExitStack() as stack:
            opened = []
            for version in (4, 6):
                out, landed = dial(own_lab.pod, own_lab.peer_address(version), APP)
                opened.append(stack.enter_context(out))
                assert (landed.server, landed.port) == ("pod", OUTBOUND)
                into, landed = dial(own_lab.peer, own_lab.pod_address(version), APP)
                opened.append(stack.enter_context(into))
                assert landed.port == INBOUND
            assert redirecting.apply(own_lab.pod, DEFAULT, adopt=True).adopted
            assert all(echoes(connection) for connection in opened)

    def test_a_pod_that_keeps_consuls_rules_from_being_adopted_is_redirected_all_the_same(
        self, redirecting, pod
    ):
        consul_rules.with_nft(pod)
        (left,) = foreign.find(pod)
        hold = "add map inet consul_tproxy held { type inet_service : verdict; elements = { 1 : jump {0} }; }"
        consul_rules.run(pod, "nft", hold.replace("{0}", consul_rules.CHAINS[0]))
        applied = redirecting.apply(pod, DEFAULT, adopt=True)
        assert (applied.change, applied.adopted) == (Change.CREATED, ())
        (refused,) = applied.foreign
        assert refused.found == left
        assert str(refused).startswith(
            f"{left}; it cannot be taken away: nftables: cannot delete chain"
        )
        assert redirecting.check(pod, DEFAULT) == (str(left),)
        consul_rules.run(pod, "nft", "delete map inet consul_tproxy held")
        applied = redirecting.apply(pod, DEFAULT, adopt=True)
        assert (applied.adopted, applied.foreign) == ((left,), ())

    def test_a_table_that_a_process_of_the_pod_owns_is_told_and_stays(self, redirecting, pod):
        with netns.run_in(pod, owned_table, "consul_tproxy", "CONSUL_PROXY_OUTPUT"):
            applied = redirecting.apply(pod, DEFAULT, adopt=True)
            assert applied.change is Change.CREATED
            (refused,) = applied.foreign
            assert "Operation not permitted" in refused.reason

    def test_of_too_many_jumps_to_consuls_chains_none_is_touched(self, pod):
        consul_rules.with_iptables_nft(pod)
        jumps = "add rule ip nat OUTPUT jump CONSUL_PROXY_OUTPUT\n" * 1001
        consul_rules.run(pod, "nft", "-f", "-", text=jumps)
        before = ruleset(pod)
        found = {item.family: item for item in foreign.find(pod)}
        with pytest.raises(KernelError, match="more than 1000 rules of the table ip nat lead to"):
            foreign.remove(pod, found["ip"])
        assert ruleset(pod) == before
        applied = Engine("nftables").apply(pod, DEFAULT, adopt=True)
        assert applied.adopted == (found["ip6"],)
        assert [left.found for left in applied.foreign] == [found["ip"]]

    def test_somebody_who_changes_other_tables_all_the_time_is_no_obstacle(self, pod):
        consul_rules.with_nft(pod)
        with changing_all_the_time(pod):
            for _ in range(5):
                consul_rules.with_nft(pod)
                applied = Engine("iptables").apply(pod, DEFAULT, adopt=True)
                assert (len(applied.adopted), applied.foreign) == (1, ())
        assert foreign.find(pod) == ()

    def test_what_cannot_be_adopted_is_still_told(self, redirecting, pod):
        consul_rules.run(pod, "nft", "add table ip nat { chain ISTIO_OUTPUT { }; }")
        applied = redirecting.apply(pod, DEFAULT, adopt=True)
        assert applied.adopted == ()
        (left,) = applied.foreign
        assert str(left) == "Istio redirects in the nftables table ip nat: ISTIO_OUTPUT"


class TestGaps:
    def test_a_workload_without_gaps(self, redirecting, lab):
        assert redirecting.gaps(lab.pod, DEFAULT) == ()

    def test_a_family_that_is_off_is_a_gap_where_the_workload_has_it(self, redirecting, lab, pod):
        assert redirecting.gaps(lab.pod, IPV4_ONLY) == (
            "IPv6 is off in the policy and the workload has fd77::2: "
            "its IPv6 traffic goes around the sidecar",
        )
        assert redirecting.gaps(pod, IPV4_ONLY) == ()

    def test_a_default_route_alone_is_a_way_out_as_well(self, redirecting, new_namespace):
        left, right = new_namespace(), new_namespace()
        links.create_veth(left, "eth0", right, "eth0")
        links.set_up(left, "eth0")
        links.add_route(left, "::/0", interface="eth0")
        (gap,) = redirecting.gaps(left, IPV4_ONLY)
        assert "the workload has a default route of IPv6" in gap

    def test_a_direction_that_is_off_is_a_gap(self, redirecting, pod):
        inbound, outbound = redirecting.gaps(pod, NOTHING)
        assert inbound.startswith("inbound redirection is off")
        assert outbound.startswith("outbound redirection is off")
        included = Policy(inbound=Inbound(include_ports=()), outbound=Outbound(include_cidrs=()))
        assert redirecting.gaps(pod, included) == (inbound, outbound)

    def test_dns_of_a_family_without_an_address_is_a_gap(self, redirecting, lab, pod):
        policy = Policy(dns=Dns(enabled=True, addresses=("127.0.0.1",)))
        (gap,) = redirecting.gaps(lab.pod, policy)
        assert gap.startswith("DNS queries over IPv6 are not redirected")
        assert redirecting.gaps(pod, policy) == ()
        resolvers = ("192.0.2.53", "fd00::53")
        asked = Policy(dns=Dns(enabled=True, addresses=("127.0.0.1",), resolvers=resolvers))
        assert redirecting.gaps(pod, asked) == (gap,)

    def test_rules_of_another_mesh_are_a_difference_and_told_as_nothing_else(
        self, redirecting, pod
    ):
        redirecting.apply(pod, DEFAULT)
        consul_rules.with_nft(pod)
        (difference,) = redirecting.check(pod, DEFAULT)
        redirects = "Consul redirects in the nftables table inet consul_tproxy: CONSUL_"
        assert difference.startswith(redirects)
        assert redirecting.gaps(pod, DEFAULT) == ()


@contextmanager
def changing_all_the_time(netns_path):
    """Somebody makes and deletes a table of the namespace, over and over."""
    stop = threading.Event()

    def change():
        while not stop.is_set():
            made, gone = table("restless"), nf_transaction.deletion("inet", "restless")
            nf_transaction.run([made, gone])

    changing = threading.Thread(target=netns.run_in, args=(netns_path, change))
    changing.start()
    try:
        yield
    finally:
        stop.set()
        changing.join()


def remove_foreign(netns_path, found):
    for item in found:
        foreign.remove(netns_path, item)


OTHERS_TABLE = "add table inet {} {{ chain theirs {{ type nat hook output priority 7; tcp dport 3 accept; }}; }}"


def others_rules(netns_path, program):
    """What some other program has in the nat table of one variant and family of iptables."""
    rules = (
        "-N OTHERS",
        "-A OTHERS -p tcp --dport 1 -j RETURN",
        "-A OUTPUT -p tcp -j OTHERS",
        "-A PREROUTING -p udp",
    )
    consul_rules.run(
        netns_path, "sh", "-e", text="\n".join(f"{program} -t nat {rule}" for rule in rules)
    )


@contextmanager
def removed_afterwards(redirecting, netns_path):
    try:
        yield
    finally:
        redirecting.remove(netns_path)
