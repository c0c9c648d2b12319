"""The legacy tables: rules from words to what the kernel takes and back, tables that others fill, and their lock."""

import errno
import fcntl
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from legacy import lock_of_its_own, run, saved, sh
from namespaces import DEADLINE_S

from tidegate.kernel import legacy_tables, libxtables, netns, xtables, xtables_rules
from tidegate.kernel.errors import KernelError

IPV4, IPV6 = legacy_tables.Family.IPV4, legacy_tables.Family.IPV6
TEXT = """*nat
:OURS - [0:0]
-I OUTPUT 1 -j OURS
-A OURS -j RETURN
COMMIT
"""


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces."""
    return new_namespace()


def compiled(text, family=IPV4):
    ((_, content),) = xtables_rules.compiled(family, xtables_rules.parse(text)).items()
    return content


def replace(pod, content, family=IPV4):
    netns.run_in(pod, xtables.replace, family, "nat", "OURS", content, {})


def content(pod, family=IPV4):
    return netns.run_in(pod, xtables.content, family, "nat", "OURS", {})


def restore(pod, *rows, family="ip"):
    text = "\n".join(("*nat", *rows, "COMMIT", ""))
    run(pod, f"{family}tables-legacy-restore", "--noflush", text=text)


def test_a_rule_is_told_as_iptables_writes_it(pod):
    text = """*nat
:C - [0:0]
-I OUTPUT 1 -j C
-A C ! -s 10.0.0.0/9 ! -d 192.0.2.1/32 ! -o eth0 ! -p udp -m mark ! --mark 0x1/0xff -j RETURN
-A C -p tcp -m multiport ! --dports 1,2:3 -m comment --comment "a \\"b\\" c" -j REDIRECT --to-ports 7
-A C -p udp -j DNAT --to-destination 127.0.0.1:53
-A C -p tcp -j DNAT --to-destination :15006
-A C -m owner ! --uid-owner 1-2 -m addrtype ! --dst-type LOCAL -g D
:D - [0:0]
COMMIT
"""
    family = IPV4
    rules = [row.removeprefix("-A C ") for row in text.splitlines() if row.startswith("-A")]
    wanted = compiled(text)
    assert xtables_rules.spelled(family, wanted.entries()["C"]) == rules
    netns.run_in(pod, xtables.replace, family, "nat", "C|D", wanted, {})
    assert netns.run_in(pod, xtables.content, family, "nat", "C|D", {}).equals(wanted)
    assert [row.removeprefix("-A C ") for row in saved(pod) if row.startswith("-A C ")] == rules


@pytest.mark.parametrize(
    "rule",
    [
        "-m comment --comment x",
        "-j RETURN -j RETURN",
        "-p icmp -j RETURN",
        "-s fd00::/8 -j RETURN",
        "-o sixteen-letters-x -j RETURN",
        "-m nowhere --what 1 -j RETURN",
        "-m owner --uid-owner nobody-at-all -j RETURN",
        "-m owner -j RETURN",
        "-p tcp -m multiport --dports 70000 -j RETURN",
        "-p tcp -j REDIRECT --to-ports x",
        "-j REDIRECT --to-ports 1",
        "--uid-owner 1 -j RETURN",
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_before_the_kernel_is_asked(rule):
    text = f"*nat\n:C - [0:0]\n-A C {rule}\nCOMMIT\n"
    with pytest.raises(KernelError, match=f"cannot write the rule '{re.escape(rule)}': ."):
        compiled(text)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(libxtables, "_load", libxtables._load.__wrapped__)
    monkeypatch.setitem(libxtables._SHARED, "xtables", ("libnowhere.so.12", 12))
    for name in [name for name in sys.modules if name.partition(".")[0] == "iptc"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(KernelError, match="cannot load the libraries of iptables: libnowhere"):
        libxtables.loaded()


class TestTablesOfOthers:
    @pytest.mark.parametrize(
        ("bound", "value"), [("MOST_BYTES", 1000), ("MOST_RULES", 40), ("MOST_BYTES", 9000)]
    )
    def test_one_that_is_too_large_is_refused_before_it_is_read(
        self, pod, monkeypatch, bound, value
    ):
        replace(pod, compiled(TEXT))
        restore(pod, *["-A POSTROUTING -j RETURN"] * 60)
        monkeypatch.setattr(xtables, bound, value)
        monkeypatch.setattr(libxtables.loaded().ip4tc, "iptc_init", None)
        problem = r"table nat of ip is too large: \d{5} bytes, 6\d rules"
        for attempt in (content, lambda pod: replace(pod, xtables.EMPTY)):
            with pytest.raises(KernelError, match=problem):
                attempt(pod)

    def test_one_that_would_become_too_large_to_be_read_is_not_loaded(self, pod, monkeypatch):
        twenty = compiled(TEXT.replace("-A OURS -j RETURN", "\n".join(["-A OURS -j RETURN"] * 20)))
        restore(pod, *["-A POSTROUTING -j RETURN"] * 20)
        monkeypatch.setattr(xtables, "MOST_RULES", 40)
        with pytest.raises(KernelError, match=r"too large: .* 48 rules"):
            replace(pod, twenty)
        assert content(pod) == xtables.EMPTY
        monkeypatch.setattr(xtables, "MOST_RULES", 48)
        for _ in range(2):
            replace(pod, twenty)
            assert content(pod).equals(twenty)

    def test_chains_in_question_are_read_up_to_a_bound_and_not_loaded_beyond_it(
        self, pod, monkeypatch
    ):
        def of(count):
            return compiled(
                TEXT.replace("-A OURS -j RETURN", "\n".join(["-A OURS -j RETURN"] * count))
            )

        monkeypatch.setattr(xtables, "MOST_OWNED", 20)
        problem = "table nat of ip is too large: 20 rules or more in the chains"
        replace(pod, of(19))
        assert content(pod).equals(of(19))
        with pytest.raises(KernelError, match=problem):
            replace(pod, of(20))
        sh(pod, "iptables-legacy -t nat -A OURS -j RETURN")
        for attempt in (content, lambda pod: replace(pod, xtables.EMPTY)):
            with pytest.raises(KernelError, match=problem):
                attempt(pod)

    def test_jumps_that_somebody_made_go_up_to_a_bound(self, pod, monkeypatch):
        monkeypatch.setattr(xtables, "MOST_JUMPS", 5)
        replace(pod, compiled(TEXT))
        restore(pod, *["-A POSTROUTING -j OURS"] * 4)
        assert len(content(pod).jumps) == 5
        restore(pod, "-A POSTROUTING -j OURS")
        with pytest.raises(KernelError, match="table nat of ip has more than 5 rules that jump"):
            content(pod)
        sh(pod, "iptables-legacy -t nat -D POSTROUTING 1")
        replace(pod, xtables.EMPTY)
        assert not any("OURS" in row for row in saved(pod))

    @pytest.mark.parametrize("family", [IPV4, IPV6])
    def test_names_that_are_no_text_are_left_alone_and_do_no_harm(self, pod, family):
        named = f"{family}tables-legacy -t nat -N $(printf '\\377\\376'); "
        jumping = f"{family}tables-legacy -t nat -A $(printf '\\377\\376') -j OURS"
        replace(pod, compiled(TEXT, family), family)
        sh(pod, named + jumping)
        assert [jump.chain for jump in content(pod, family).jumps] == ["OUTPUT", "\udcff\udcfe"]
        replace(pod, compiled(TEXT, family), family)
        assert content(pod, family).equals(compiled(TEXT, family))
        before = run(pod, f"{family}tables-legacy", "-t", "nat", "-L", "-n").count("Chain")
        replace(pod, xtables.EMPTY, family)
        assert (
            run(pod, f"{family}tables-legacy", "-t", "nat", "-L", "-n").count("Chain") == before - 1
        )

    def test_a_set_that_nobody_named_stays_the_one_that_a_rule_asks(self, pod):
        sh(pod, "ipset create a hash:ip; ipset create b hash:ip; iptables-legacy -t nat -N OURS")
        sh(pod, "iptables-legacy -t nat -A OURS -m set --match-set b src -j RETURN")
        before = content(pod)
        (rule,) = before.chains["OURS"]
        assert [name for _, name in rule.entry.sets] == ["#1"]
        assert "--match-set #1 src" in xtables_rules.spelled(IPV4, [rule.entry])[0]
        replace(pod, xtables.EMPTY)
        replace(pod, before)
        assert "-A OURS -m set --match-set b src -j RETURN" in saved(pod)

    def test_one_that_grows_while_it_is_read_is_read_up_to_the_bound(self, pod, monkeypatch):
        replace(pod, compiled(TEXT))
        ask = legacy_tables._ask
        asked = []

        def grow_in_between(door, family, table, option, buffer):
            if option == legacy_tables._SO_GET_ENTRIES and not asked:
                asked.append(len(buffer))
                restore(pod, *["-A POSTROUTING -j RETURN"] * 60)
            ask(door, family, table, option, buffer)

        monkeypatch.setattr(legacy_tables, "_ask", grow_in_between)
        assert content(pod).equals(compiled(TEXT))
        asked.clear()
        monkeypatch.setattr(xtables, "MOST_RULES", 100)
        with pytest.raises(KernelError, match="the legacy table nat of ip is too large: ") as told:
            content(pod)
        assert told.value.errno == errno.E2BIG

    def test_one_that_changes_all_the_time_is_not_read_for_ever(self, pod, monkeypatch):
        def always(door, family, table, option, buffer):
            if option == legacy_tables._SO_GET_ENTRIES:
                raise KernelError("changed", errno.EAGAIN)
            ask(door, family, table, option, buffer)

        ask = legacy_tables._ask
        monkeypatch.setattr(legacy_tables, "_ask", always)
        with pytest.raises(KernelError, match="nat of ip changes faster than it can be read"):
            content(pod)

    def test_only_one_of_two_chains_of_the_same_name_is_the_one_that_is_asked_for(self, pod):
        replace(pod, compiled(TEXT.replace("-j RETURN", "-j ACCEPT")))
        sh(pod, "iptables-legacy -t nat -N OURT")
        raw = netns.run_in(pod, legacy_tables.read, IPV4, "nat", 2**20)
        twins = legacy_tables.Table(
            IPV4, raw._entries.replace(b"OURT\0", b"OURS\0"), dict(raw._hooks)
        )
        first, second = twins.chains()
        assert first == "OURS"
        assert second.startswith("OURS#")

    def test_long_rules_of_others_are_not_remembered(self, pod):
        replace(pod, compiled(TEXT))
        match = "-m comment --comment " + "x" * 250
        sh(pod, f"iptables-legacy -t nat -A OURS {' '.join([match] * 5)} -j RETURN")
        before = xtables._remembered.cache_info().currsize
        assert len(content(pod).chains["OURS"]) == 2
        assert xtables._remembered.cache_info().currsize <= before + 2
        largest = max(len(rule.entry.data) for rule in content(pod).chains["OURS"])
        assert largest > xtables._REMEMBERED_BYTES


class TestChangesOfOthersMeanwhile:
    def test_a_table_is_read_and_changed_again_and_theirs_is_kept(self, pod, monkeypatch):
        edit = xtables._edit
        raced = []

        def edit_late(*arguments):
            edit(*arguments)
            if len(raced) < 3:
                raced.append(1)
                sh(pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 9 -j ACCEPT")

        monkeypatch.setattr(xtables, "_edit", edit_late)
        replace(pod, compiled(TEXT))
        assert content(pod).equals(compiled(TEXT))
        theirs = [row for row in saved(pod) if row == "-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT"]
        assert len(theirs) == 3

    def test_one_that_changes_all_the_time_is_given_up(self, pod, monkeypatch):
        tries = []
        monkeypatch.setattr(xtables._Handle, "commit", lambda self: tries.append(1))
        with pytest.raises(
            KernelError, match="table nat of ip is being changed by another program"
        ):
            replace(pod, compiled(TEXT))
        assert 3 < len(tries) < 30


class TestLock:
    def test_a_file_that_is_not_there_is_made_for_the_owner_alone(self, tmp_path, monkeypatch):
        path = tmp_path / "lock"
        monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
        with xtables.locked():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "no" / "lock"))
        problem = f"cannot open the xtables lock {tmp_path}/no/lock: No such"
        with pytest.raises(KernelError, match=problem), xtables.locked():
            pass

    def test_iptables_waits_for_us_as_well(self, pod):
        with xtables.locked():
            process = netns.spawn(
                pod,
                ["iptables-legacy", "-w", "1", "-t", "nat", "-S"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            _, problem = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 4
        assert b"xtables lock" in problem

    def test_who_holds_it_too_long_is_named(self, monkeypatch):
        monkeypatch.setattr(xtables, "LOCK_WAIT_S", 0.05)
        with lock_of_its_own(monkeypatch) as lock:
            holding = ["flock", lock.name, "sh", "-c", "echo held; read _"]
            holder = subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert holder.stdout.readline() == b"held\n"
            named = rf"process {holder.pid} \(flock\) holds the xtables lock {re.escape(lock.name)} for 0.05 s"
            with pytest.raises(KernelError, match=named), xtables.locked():
                pass
            holder.communicate(timeout=DEADLINE_S)
            with xtables.locked():
                pass

    def test_a_holder_that_cannot_be_told_is_another_program(self, monkeypatch):
        monkeypatch.setattr(xtables, "LOCK_WAIT_S", 0.05)
        with lock_of_its_own(monkeypatch) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            monkeypatch.setattr(xtables.os, "fstat", lambda _: Path("/").stat())
            with pytest.raises(KernelError, match=r"^another program holds"), xtables.locked():
                pass
