"""`tidegate redirect` as people and scripts run it: real processes, real namespaces, both backends."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from namespaces import serving

from tidegate.enforce.redirect import block
from tidegate.enforce.redirect.backend import BackendName
from tidegate.kernel import netns, nf_tables

BACKENDS = [name.value for name in BackendName]
POLICY = "outbound:\n  exclude_ports: ['5432', 6000-6010]\n  exclude_cidrs: [192.0.2.0/24, 'fd99::/16']\n"
RESTORE = {
    "# sets": ("ipset", "restore"),
    "# ip": ("iptables-legacy-restore", "--noflush"),
    "# ip6": ("ip6tables-legacy-restore", "--noflush"),
}
"""The programs that load the sections of a ruleset for the legacy tables."""
SIDECAR_PORTS = (15001, 20000)
DEADLINE_S = 60


def run(*argv, code=0, stdin=""):
    """Standard output and standard error of a command that ends as it should."""
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli.main", "redirect", *argv],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def said(*argv, code=0, stdin=""):
    return json.loads(run(*argv, "--json", code=code, stdin=stdin)[0])


def inside(path, *argv, stdin=""):
    """Runs another program in a namespace."""
    done = subprocess.run(
        ["nsenter", f"--net={path}", *argv],
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def generation(path):
    """Counts every change of nf_tables in a namespace (nfnetlink's NFT_MSG_GETGEN)."""
    return netns.run_in(path, nf_tables.generation)


def legacy_tables(path):
    return [
        inside(path, f"{program}-legacy-save", "-t", table)
        for program in ("iptables", "ip6tables")
        for table in ("nat", "mangle", "raw")
    ]


def without_what_changes(listing):
    """The rules of iptables-save, without its comments and counters."""
    return [line.partition(" [")[0] for line in listing.splitlines() if not line.startswith("#")]


@pytest.fixture
def pod(pair):
    """A pod in whose namespace something listens where the sidecar would."""
    with serving(pair.pod, "sidecar", SIDECAR_PORTS):
        yield pair.pod


@pytest.fixture
def policy_file(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    return str(file)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_of_all_commands(pod, policy_file, backend):
    where = ("--netns", pod)
    what = ("--policy", policy_file)
    assert run("show", *where, code=1)[0] == f"{pod}: no rules of tidegate\n"
    load = f"tidegate redirect apply --netns {pod} --policy {policy_file}"
    lacking = f"{pod}: no rules of tidegate; load them with: {load}\n"
    assert run("check", *where, *what, code=1) == (lacking, "")
    out, err = run("verify", *where, *what, code=1)
    assert "FAILED" in out
    assert err == f"NOTE: {lacking}"

    out, err = run("apply", *where, *what, "--backend", backend)
    assert out.startswith(f"{pod}: created\n  backend: {backend} (it was asked for")
    assert err == ""
    out, _ = run("show", *where)
    assert out.startswith(f"{pod}: {backend}\n")
    for line in (
        "outbound",
        "inbound",
        "excluded-port",
        "excluded-cidr-ipv6",
        "to-outbound-listener",
    ):
        assert line in out
    out, err = run("check", *where, *what)
    assert out == f"{pod}: the kernel equals the policy ({backend})\n"
    assert err == ""

    probes, _ = run("verify", *where, *what)
    outcomes = {line.split()[0] for line in probes.splitlines()}
    assert "PASSED" in outcomes
    assert "FAILED" not in outcomes
    assert re.fullmatch(r"\d+ passed(, \d+ skipped)?", probes.splitlines()[-1])
    run("check", *where, *what)

    assert run("remove", *where)[0] == f"{pod}: removed the rules of {backend}\n"
    run("show", *where, code=1)
    assert run("remove", *where)[0].startswith(f"{pod}: unchanged")
    assert "tidegate" not in inside(pod, "nft", "list", "ruleset")
    assert "TIDEGATE" not in "".join(legacy_tables(pod))


@pytest.mark.parametrize("backend", BACKENDS)
def test_for_programs_every_command_answers_in_json(pod, backend):
    where = ("--netns", pod)
    assert said("show", *where, code=1) == {
        "netns": pod,
        "backend": None,
        "blocked": False,
        "lines": [],
    }
    applied = said("apply", *where, "--backend", backend)
    why = applied.pop("why")
    assert why
    assert applied == {
        "netns": pod,
        "change": "created",
        "backend": backend,
        "replaced_backend": None,
        "adopted": [],
        "warnings": [],
    }
    shown = said("show", *where)
    assert shown["backend"] == backend
    assert {"list": "outbound", "line": "proxy", "decided": 0} in shown["lines"]
    checked = said("check", *where)
    assert checked == {
        "netns": pod,
        "policy": "built-in",
        "equal": True,
        "backend": backend,
        "differences": [],
        "notes": [],
    }
    verified = said("verify", *where)
    assert (verified["policy"], verified["passed"], verified["notes"]) == ("built-in", True, [])
    assert {"passed"} <= {probe["outcome"] for probe in verified["probes"]} <= {"passed", "skipped"}
    removed = said("remove", *where)
    assert (removed["change"], removed["backend"]) == ("removed", backend)


def test_applying_twice_changes_nothing_in_nf_tables(pod, policy_file):
    argv = ("apply", "--netns", pod, "--policy", policy_file, "--backend", "nftables")
    run(*argv)
    before = generation(pod)
    out, _ = run(*argv)
    assert out.startswith(f"{pod}: unchanged, the kernel follows this policy already\n")
    run("check", "--netns", pod, "--policy", policy_file)
    run("show", "--netns", pod)
    assert generation(pod) == before


def test_applying_twice_changes_nothing_in_the_legacy_tables(pod, policy_file):
    argv = ("apply", "--netns", pod, "--policy", policy_file, "--backend", "iptables")
    run(*argv)
    before = legacy_tables(pod)
    out, _ = run(*argv)
    assert out.startswith(f"{pod}: unchanged")
    assert [without_what_changes(one) for one in legacy_tables(pod)] == [
        without_what_changes(one) for one in before
    ]


def test_a_changed_policy_replaces_the_rules(pod, policy_file):
    run("apply", "--netns", pod)
    out, _ = run("apply", "--netns", pod, "--policy", policy_file)
    assert out.startswith(f"{pod}: replaced\n")
    off = "inbound: {enabled: false}\noutbound: {enabled: false}\n"
    out, err = run("apply", "--netns", pod, "--policy", "-", stdin=off)
    assert out == f"{pod}: removed, the policy redirects nothing\n"
    assert "inbound redirection is off" in err
    out, _ = run("apply", "--netns", pod, "--policy", "-", stdin=off)
    assert out.startswith(f"{pod}: unchanged, the policy redirects nothing")


def test_the_other_backend_takes_the_rules_over_and_says_so(pod):
    run("apply", "--netns", pod, "--backend", "iptables")
    run("check", "--netns", pod)
    differences, _ = run("check", "--netns", pod, "--backend", "nftables", code=1)
    assert "iptables" in differences
    out, _ = run("apply", "--netns", pod, "--backend", "nftables")
    assert "  replaced: the rules of iptables, in the same step\n" in out
    assert said("show", "--netns", pod)["backend"] == "nftables"
    run("check", "--netns", pod, "--backend", "nftables")


def tamper_nftables(path):
    listing = inside(path, "nft", "-a", "list", "table", "inet", "tidegate")
    chain = ""
    for line in listing.splitlines():
        if line.strip().startswith("chain "):
            chain = line.split()[1]
        if '"excluded-port' in line or 'excluded-port"' in line:
            handle = line.rpartition("# handle ")[2].strip()
            inside(path, "nft", "delete", "rule", "inet", "tidegate", chain, "handle", handle)
            return
    raise AssertionError(listing)


def tamper_iptables(path):
    rules = inside(path, "iptables-legacy-save", "-t", "nat").splitlines()
    rule = next(line for line in rules if line.startswith("-A") and "excluded-port" in line)
    inside(path, "sh", "-c", f"iptables-legacy -t nat {rule.replace('-A', '-D', 1)}")


@pytest.mark.parametrize(
    ("backend", "tamper"), [("nftables", tamper_nftables), ("iptables", tamper_iptables)]
)
def test_a_check_after_tampering_names_the_line(pod, policy_file, backend, tamper):
    what = ("--netns", pod, "--policy", policy_file)
    run("apply", *what, "--backend", backend)
    tamper(pod)
    differences, _ = run("check", *what, code=1)
    assert "excluded-port" in differences
    answer = said("check", *what, code=1)
    assert not answer["equal"]
    assert answer["differences"] == differences.splitlines()
    assert run("apply", *what, "--backend", backend)[0].startswith(f"{pod}: replaced")
    run("check", *what)


def test_nft_loads_what_a_dry_run_prints_and_the_check_accepts_it(pod, policy_file):
    what = ("--policy", policy_file, "--backend", "nftables")
    ruleset, _ = run("apply", "--dry-run", *what)
    assert "5432" in ruleset
    inside(pod, "nft", "-f", "-", stdin=ruleset)
    run("check", "--netns", pod, *what)
    run("apply", "--netns", pod, *what)


def test_iptables_restore_loads_what_a_dry_run_prints_and_the_check_accepts_it(pod):
    ports = ", ".join(str(port) for port in range(1, 99, 2))
    policy = f"outbound: {{exclude_ports: [{ports}], exclude_cidrs: [10.0.0.0/8, 'fd99::/16']}}"
    what = ("--policy", "-", "--backend", "iptables")
    ruleset, _ = run("apply", "--dry-run", *what, stdin=policy)
    sections = re.split(r"^(# \w+)\n", ruleset, flags=re.MULTILINE)
    assert sections[0] == ""
    assert sections[1::2] == list(RESTORE)
    for title, section in zip(sections[1::2], sections[2::2], strict=True):
        inside(pod, *RESTORE[title], stdin=section)
    run("check", "--netns", pod, *what, stdin=policy)
    out, _ = run("apply", "--netns", pod, *what, stdin=policy)
    assert out.startswith(f"{pod}: unchanged")


def test_a_namespace_is_found_by_name_path_and_process(pod):
    name = os.path.basename(pod)  # noqa: PTH119
    run("apply", "--netns", name)
    assert run("show", "--netns", name)[0].startswith(f"{name}: nftables\n")
    with subprocess.Popen(["nsenter", f"--net={pod}", "sleep", "60"]) as process:
        try:
            until = time.monotonic() + DEADLINE_S
            while netns.identity(f"/proc/{process.pid}/ns/net") != netns.identity(pod):
                assert time.monotonic() < until
            run("check", "--pid", str(process.pid))
            out, _ = run("remove", "--pid", str(process.pid))
            assert out == f"process {process.pid}: removed the rules of nftables\n"
        finally:
            process.kill()
    _, err = run("show", "--pid", str(process.pid), code=2)
    assert f"there is no process {process.pid}" in err
    run("show", "--netns", pod, code=1)


def test_a_policy_comes_from_standard_input(pod):
    run("apply", "--netns", pod, "--policy", "-", stdin=POLICY)
    run("check", "--netns", pod, "--policy", "-", stdin=POLICY)


def test_whoever_forgets_the_policy_is_told_with_what_the_rules_were_compared(pod):
    run("apply", "--netns", pod, "--policy", "-", stdin="outbound: {enabled: false}\n")
    note = (
        "compared with the built-in policy; say --policy, --annotations or --consul-config "
        "if the rules follow another"
    )
    for command in ("check", "verify"):
        out, err = run(command, "--netns", pod, code=1)
        assert err.endswith(f"NOTE: {note}\n")
        answer = said(command, "--netns", pod, code=1)
        assert (answer["policy"], answer["notes"][-1]) == ("built-in", note)
    assert re.fullmatch(r"\d+ failed, \d+ passed(, \d+ skipped)?", out.splitlines()[-1])
    inbound_off = "inbound: {enabled: false}\n"
    answer = said("check", "--netns", pod, "--policy", "-", stdin=inbound_off, code=1)
    assert answer["policy"] == "options"
    assert note not in answer["notes"]


def test_a_faulty_policy_changes_nothing(pod, policy_file):
    run("apply", "--netns", pod, "--policy", policy_file)
    before = generation(pod)
    bad = "outbound: {exclude_ports: ['70000'], exclude_cidrs: [10.0.0.0/33]}\n"
    _, err = run("apply", "--netns", pod, "--policy", "-", stdin=bad, code=2)
    assert "70000" in err
    assert "10.0.0.0/33" in err
    assert generation(pod) == before


def test_redirecting_to_where_nobody_listens_is_warned_of(pair):
    _, err = run("apply", "--netns", pair.pod, "--backend", "nftables")
    assert err == "".join(
        f"WARNING: nothing listens on port {port}: connections that are redirected there are refused\n"
        for port in SIDECAR_PORTS
    )
    with serving(pair.pod, "sidecar", SIDECAR_PORTS[1:]):
        policy = "outbound: {enabled: false}\n"
        _, err = run("apply", "--netns", pair.pod, "--policy", "-", stdin=policy)
        assert "nothing listens" not in err


def test_a_family_that_is_off_is_a_way_around_the_sidecar(pod):
    argv = ("--netns", pod, "--policy", "-")
    policy = "families: [ipv4]\n"
    _, err = run("apply", *argv, stdin=policy)
    assert err.startswith("WARNING: IPv6 is off in the policy")
    _, err = run("check", *argv, stdin=policy)
    assert err.startswith("NOTE: IPv6 is off in the policy")


def test_a_block_is_shown_and_removed(pod):
    block.block(pod)
    out, _ = run("show", "--netns", pod)
    assert f"{pod}: blocked, nothing but loopback passes" in out
    assert said("show", "--netns", pod)["blocked"]
    assert run("remove", "--netns", pod)[0] == f"{pod}: removed the block\n"
    run("show", "--netns", pod, code=1)


CONSUL = """
table inet consul_tproxy {
  chain CONSUL_PROXY_OUTPUT {
    type nat hook output priority -100; policy accept;
    meta skuid 5995 return
    meta l4proto tcp redirect to :15001
  }
}
"""


def test_what_consul_left_is_told_and_replaced_when_asked_for(pod):
    inside(pod, "nft", "-f", "-", stdin=CONSUL)
    _, err = run("apply", "--netns", pod)
    assert "WARNING: Consul redirects in" in err
    assert "--adopt replaces it" in err
    differences, _ = run("check", "--netns", pod, code=1)
    assert "Consul" in differences
    out, err = run("apply", "--netns", pod, "--adopt")
    assert "  adopted: Consul redirects in" in out
    assert err == ""
    assert "consul_tproxy" not in inside(pod, "nft", "list", "ruleset")
    run("check", "--netns", pod)


def test_explain_asks_the_routes_of_a_namespace(pair):
    def explained(address, *argv):
        return said("explain", "outbound", address, *argv)

    here = ("--netns", pair.pod)
    own, elsewhere = f"{pair.pod_ipv4}:80", f"{pair.peer_ipv4}:80"
    assert explained(own)["line"] == "to-outbound-listener"
    assert explained(own, *here)["line"] == "own-address"
    assert explained(f"[{pair.pod_ipv6}]:80", *here)["connection"]["interface"] == "lo"
    assert explained(elsewhere, *here)["connection"]["interface"] == "eth0"
    inside(pair.pod, "ip", "route", "del", "default")
    note = f"{pair.pod} has no route to 192.0.2.1; eth0 is assumed"
    assert run("explain", "outbound", "192.0.2.1:80", *here)[1] == f"NOTE: {note}\n"
    assert explained("192.0.2.1:80", *here)["notes"] == [note]


def test_explain_finds_the_interface_that_has_an_inbound_address(pair):
    inside(pair.pod, "ip", "link", "add", "v0", "type", "bridge")
    inside(pair.pod, "ip", "address", "add", "192.0.2.7/24", "dev", "v0")
    inside(pair.pod, "ip", "route", "add", "local", "192.0.2.8", "dev", "v0")

    def answer(address):
        return said("explain", "inbound", f"{address}:80", "--netns", pair.pod)

    assert answer(pair.pod_ipv4)["connection"]["interface"] == "eth0"
    assert answer("192.0.2.7")["connection"]["interface"] == "v0"
    assert answer("127.0.0.9")["connection"]["interface"] == "lo"
    assert answer("192.0.2.7")["notes"] == []
    note = f"no interface of {pair.pod} has the global address 192.0.2.8; eth0 is assumed"
    assert answer("192.0.2.8")["notes"] == [note]


def test_explain_knows_by_the_namespace_what_is_forwarded(pair):
    here = ("--netns", pair.pod)
    for own in (f"{pair.pod_ipv4}:80", f"[{pair.pod_ipv6}]:80"):
        answer = said("explain", "inbound", own, *here)
        assert (answer["line"], answer["notes"]) == ("to-inbound-listener", [])
        assert said("explain", "inbound", own, *here, "--forwarded")["line"] == "forwarded"
    for other in ("192.0.2.9", "2001:db8::9"):
        dialled = f"[{other}]:80" if ":" in other else f"{other}:80"
        assert said("explain", "inbound", dialled)["line"] == "to-inbound-listener"
        out, err = run("explain", "inbound", dialled, *here)
        assert "decided by forwarded: " in out
        assert err == f"NOTE: {other} is no address of {pair.pod}: such connections are forwarded\n"


def test_the_namespace_of_the_shell_itself_is_warned_of(pod):
    argv = ["nsenter", f"--net={pod}", sys.executable, "-m", "tidegate.cli.main", "redirect"]
    done = subprocess.run(
        [*argv, "apply", "--netns", pod], text=True, capture_output=True, check=True
    )
    assert "is the network namespace of this shell" in done.stderr


def test_where_the_kernel_cannot_be_asked_a_question_is_answered_by_neither_yes_nor_no(tmp_path):
    file = tmp_path / "no-namespace"
    file.touch()
    for command in ("show", "check", "verify"):
        _, err = run(command, "--netns", str(file), code=2)
        assert err.startswith("tidegate: --netns: cannot enter network namespace")
