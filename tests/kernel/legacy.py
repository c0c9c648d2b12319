"""The programs of iptables and ipset in a namespace, for tests that look at legacy tables or disturb them."""

import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

from namespaces import DEADLINE_S

from tidegate.kernel import netns


def run(netns_path, *arguments, text=None):
    """What a program says in the namespace; it has to end well."""
    process = netns.spawn(
        netns_path, arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "XTABLES_LOCKFILE"},
    )  # fmt: skip
    output, problem = process.communicate(text and text.encode(), timeout=DEADLINE_S)
    assert process.returncode == 0, problem
    return output.decode(errors="backslashreplace")


def sh(netns_path, command):
    return run(netns_path, "sh", "-ec", command)


def saved(netns_path, family="ip", table=None):
    """What iptables-legacy-save tells of the tables that are there, without counters and times."""
    listed = run(netns_path, f"{family}tables-legacy-save", *(("-t", table) if table else ()))
    rows = (re.sub(r"\[\d+:\d+\]", "", row) for row in listed.splitlines())
    return [row for row in rows if not row.startswith("#")]


def set_names(netns_path):
    return run(netns_path, "ipset", "list", "-n").split()


@contextmanager
def lock_of_its_own(monkeypatch):
    """A lock file that only this test has, so that iptables-legacy does not wait for it."""
    path = Path(f"/run/tg-xt-{os.getpid()}.lock")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    try:
        with path.open("w") as lock:
            yield lock
    finally:
        path.unlink()
