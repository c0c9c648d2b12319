"""python-iptables and the libraries below it (libxtables, libip4tc, libip6tc), loaded without side effects.

Some of python-iptables 1.2 is gone around, because
- importing it starts ldconfig, gcc and modprobe: it gets the names of its libraries from here;
- Rule asks all tables of the machine whether they have a chain, which creates those that were not there.

What rules and tables are is not known here.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.kernel.errors import KernelError


class Libraries(NamedTuple):
    """What is used of python-iptables."""

    iptc: types.ModuleType
    xtables: types.ModuleType
    ip4tc: Any
    """The functions of libiptc for IPv4."""
    ip6tc: Any
    rule4: Any
    """Class for IPv4 rules that are being made."""
    rule6: Any


_SHARED = {
    "xtables": ("libxtables.so.12", 12),
    "ip4tc": ("libip4tc.so.2", 2),
    "ip6tc": ("libip6tc.so.2", 2),
}
"""The libraries that python-iptables asks for, and the versions of their interfaces."""
_WRAPPER = "xtwrapper"
"""Its own, which comes with it."""

_loading = threading.Lock()


# A child that forks off must find them loaded or not, but not half (isolation.py).
os.register_at_fork(
    before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
)


def loaded() -> Libraries:
    """The libraries; to be called before isolation.run_in for work that needs them. KernelError when one is missing."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Libraries:
    try:
        helpers = types.ModuleType("iptc.util")
        vars(helpers).update(
            find_library=_find_library,
            find_libc=lambda: ctypes.CDLL(None, mode=ctypes.RTLD_GLOBAL),
            load_kernel=lambda *_: None,
        )
        sys.modules.setdefault("iptc.util", helpers)
        with _extensions_named():
            iptc = importlib.import_module("iptc")
    except OSError as error:
        raise KernelError(f"cannot load the libraries of iptables: {error}") from error
    xtables = importlib.import_module("iptc.xtables")
    made = {"tables": (_Chains(Path(xtables._xtables_libdir)),)}
    return Libraries(
        iptc=iptc,
        xtables=xtables,
        ip4tc=importlib.import_module("iptc.ip4tc").iptc,
        ip6tc=importlib.import_module("iptc.ip6tc").ip6tc,
        rule4=type("Rule", (iptc.Rule,), made),
        rule6=type("Rule6", (iptc.Rule6,), made),
    )


class _Chains:
    """Stands for all tables when python-iptables asks whether a target is a chain: what is no extension is one."""

    def __init__(self, extensions: Path) -> None:
        self._extensions = extensions

    def is_chain(self, name: str) -> bool:
        kinds = ("libxt", "libipt", "libip6t")
        return not any((self._extensions / f"{kind}_{name}.so").exists() for kind in kinds)


def _find_library(*names: str) -> tuple[ctypes.CDLL, int]:
    if names[0] == _WRAPPER:
        spec = importlib.util.find_spec(f"lib{_WRAPPER}")
        if spec is None or spec.origin is None:
            raise OSError(f"lib{_WRAPPER} is not installed")
        return ctypes.CDLL(spec.origin, mode=ctypes.RTLD_GLOBAL), 0
    name, version = _SHARED[names[0]]
    return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL, use_errno=True), version


_EXTENSIONS = "XTABLES_LIBDIR"
"""Where the environment tells libxtables to look for its extensions."""


@contextmanager
def _extensions_named() -> Iterator[None]:
    """Tells python-iptables where the extensions are; libxtables finds them next to itself."""
    if _EXTENSIONS in os.environ:
        yield
        return
    _find_library("xtables")
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in maps if "/libxtables.so." in line)
    os.environ[_EXTENSIONS] = str(Path(library).parent / "xtables")
    try:
        yield
    finally:
        del os.environ[_EXTENSIONS]
