"""Everything that netfilter has in a namespace, as nft and iptables-save tell it, in a form that can be compared."""

import re
from pathlib import Path

import consul_rules

from tidegate.kernel import netns

_SAVE = {"ip": "iptables-legacy-save", "ip6": "ip6tables-legacy-save"}
_NAMES = {"ip": "ip_tables_names", "ip6": "ip6_tables_names"}
_COUNTS = re.compile(r"\[\d+:\d+\]|packets \d+ bytes \d+")


def legacy_tables(netns_path: str) -> dict[str, list[str]]:
    """The legacy tables that the namespace has, by family; asking wakes none."""
    return netns.run_in(netns_path, _legacy_tables)


def parts(netns_path: str) -> dict[str, list[str]]:
    """The lines of nf_tables and of each legacy table, without counts; of a table that is empty, nothing."""
    told = {"nf_tables": consul_rules.run(netns_path, "nft", "-s", "list", "ruleset")}
    for family, tables in legacy_tables(netns_path).items():
        for table in tables:
            told[f"{family} {table}"] = consul_rules.run(netns_path, _SAVE[family], "-t", table)
    lines = {
        name: [_COUNTS.sub("", line).strip() for line in text.splitlines()]
        for name, text in told.items()
    }
    return {
        name: kept
        for name, told in lines.items()
        if (kept := [line for line in told if _tells(line)])
    }


def ruleset(netns_path: str) -> list[str]:
    """All lines of all parts, sorted."""
    return sorted(f"{name}: {line}" for name, lines in parts(netns_path).items() for line in lines)


def _tells(line: str) -> bool:
    """Whether somebody made what the line is about: legacy tables, once awake, always have their built-in chains."""
    return (
        bool(line)
        and not line.startswith(("#", "*", "COMMIT"))
        and not re.fullmatch(r":[A-Z]+ ACCEPT", line)
    )


def _legacy_tables() -> dict[str, list[str]]:
    return {
        family: sorted(Path("/proc/thread-self/net", name).read_text().split())
        for family, name in _NAMES.items()
    }
