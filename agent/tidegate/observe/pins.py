"""The classifier's programs, maps and links below a directory of a bpffs: taken over, upgraded, left and removed.

What is there:

    maps/<name>
    layout-<digest>/                                  comes after the maps and goes before them: they fit each other
    programs/<object>-<scope>-<link header>/<name>    one copy of the programs for each pair of constants
    links/<scope>-<ifindex>/<name>                    pinned tcx links; or an empty directory `clsact`

and nothing else is kept: which program a link or a filter runs, the kernel says. So an upgrade that was broken off is
completed by whoever opens the directory next.
"""

import contextlib
import errno
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tidegate.kernel import tc
from tidegate.kernel.bpf import Link, Map, Program
from tidegate.kernel.bpf_object import Object
from tidegate.kernel.errors import KernelError
from tidegate.observe import abi
from tidegate.observe.hold import (
    AS_COMPILED,
    BEST,
    OWNER,
    PROGRAMS,
    TCX_TYPES,
    By,
    Compiled,
    Hold,
    Variant,
    Way,
    detach_filters,
    in_scope,
    programs_of,
    scope_here,
)

_CLSACT = "clsact"
_LAYOUT = "layout-"

ANOTHER_LAYOUT = (
    "the classifier's maps have another layout than these programs use: what was counted in them is given up, "
    "and observation begins anew"
)
LOST_MAP = "a map of the classifier is gone: what else was counted is given up, and observation begins anew"


class Pinned(Hold):
    """Programs, maps and links that outlive the process; make one with `open`."""

    def __init__(self, directory: Path, compiled: Compiled, by: tuple[By, ...]) -> None:
        super().__init__(compiled, by, OWNER)
        self._directory = directory
        self._own = Variant(scope_here(), AS_COMPILED.link_header)
        """Of the copy that is there when there is no other."""

    @classmethod
    def open(
        cls,
        directory: Path,
        object_path: Path,
        by: tuple[By, ...] = BEST,
    ) -> "Pinned":
        """Takes over what is in the directory, with these programs in the place of others, or loads and pins."""
        pinned = cls(directory, Compiled(object_path), by)
        with contextlib.ExitStack() as undo:
            undo.callback(pinned.close)
            pinned.maps = pinned._maps_that_fit()
            if not pinned.maps:
                pinned._begin()
            pinned._upgrade()
            if not pinned._copies_there():
                # Programs that the kernel refuses are refused now, and not to each workload.
                pinned._copy(pinned._own)
            undo.pop_all()
        return pinned

    def _maps_that_fit(self) -> dict[str, Map]:
        """All maps, if they are all there and as these programs need them."""
        if not self._directory.exists():
            return {}
        layouts = [entry.name for entry in self._directory.iterdir() if _is_layout(entry)]
        if layouts != [_LAYOUT + self._compiled.layout]:
            if layouts or self._links():
                self._began += (ANOTHER_LAYOUT,)
            return {}
        with contextlib.ExitStack() as undo, self._compiled.opened() as compiled:
            found = {}
            for name in self._compiled.kept:
                path = self._directory / "maps" / name
                if not path.exists():
                    # Programs that count into a map which nobody can read look like observation and are none.
                    self._began += (LOST_MAP,)
                    return {}
                found[name] = undo.enter_context(Map.open_pinned(path))
                if found[name].definition() != compiled.definition(name):
                    self._began += (ANOTHER_LAYOUT,)
                    return {}
            undo.pop_all()
        return found

    def _begin(self) -> None:
        """New maps and programs; what is there goes on until the kernel has accepted these."""
        with self._compiled.loaded(self._own) as compiled:
            self.maps = {name: compiled.map(name) for name in self._compiled.kept}
            _remove_all(self._directory)
            for name in ("maps", "programs", "links"):
                (self._directory / name).mkdir(parents=True)
            for name, each in self.maps.items():
                each.pin(self._directory / "maps" / name)
            (self._directory / (_LAYOUT + self._compiled.layout)).mkdir()
            self._copies[self._own] = self._pin_copy(self._own, compiled)

    def _upgrade(self) -> None:
        """Puts these programs in the place of others, wherever those are attached."""
        known = _known_programs(self._directory)
        for directory in self._links():
            if (directory / _CLSACT).exists():
                self._upgrade_filters(_interface(directory), known)
            elif not self._upgrade_links(directory, known):
                _remove_links(self._directory, directory)
        for copy in self._copies_there():
            if not copy.name.startswith(self._compiled.digest):
                shutil.rmtree(copy)
        self._remove_unused_copies()

    def _upgrade_links(self, directory: Path, known: Mapping[int, "_Known"]) -> bool:
        """Whether it is known which programs the links run."""
        for pin in directory.iterdir():
            with Link.open_pinned(pin) as link:
                old = known.get(link.program_id())
                if old is None:
                    return False
                if old.digest == self._compiled.digest or not link.interface():
                    continue
                try:
                    link.replace(self._copy(old.variant)[PROGRAMS.index(old.name)])
                except KernelError as error:
                    # Its interface went meanwhile.
                    if error.errno != errno.ENOLINK:
                        raise
        return True

    def _upgrade_filters(self, interface: abi.Interface, known: Mapping[int, "_Known"]) -> None:
        def replace() -> None:
            for each in tc.filters(interface.ifindex):
                old = known.get(each.program_id)
                if old is not None and old.digest != self._compiled.digest:
                    program = self._copy(old.variant)[PROGRAMS.index(old.name)]
                    tc.replace(interface.ifindex, each, program)

        in_scope(interface.scope, replace)

    def is_attached(self, interface: abi.Interface) -> bool:
        directory = self._link_dir(interface)
        if (directory / _CLSACT).exists():
            known = _known_programs(self._directory, interface.scope)
            return self._has_filters(
                interface, {number: each.name for number, each in known.items()}
            )
        for name in PROGRAMS:
            if not (directory / name).exists():
                return False
            with Link.open_pinned(directory / name) as link:
                if link.interface() != interface.ifindex:
                    return False
        return True

    def detach(self, interface: abi.Interface) -> None:
        super().detach(interface)
        self._remove_unused_copies()

    def detach_all_but(self, known: Iterable[abi.Interface]) -> None:
        kept = {self._link_dir(interface) for interface in known}
        for directory in self._links():
            if directory not in kept:
                _remove_links(self._directory, directory)
        self._remove_unused_copies()

    def remove(self) -> None:
        self.close()
        _remove_all(self._directory)
        self._directory.rmdir()

    def _take_off(self, interface: abi.Interface) -> None:
        _remove_links(self._directory, self._link_dir(interface))

    def _attach_links(self, interface: abi.Interface, programs: Mapping[Way, Program]) -> None:
        directory = self._link_dir(interface)
        directory.mkdir()
        for way, program in programs.items():
            with Link.attach(program, interface.ifindex, TCX_TYPES[way]) as link:
                link.pin(directory / program.name)

    def _will_have_filters(self, interface: abi.Interface) -> None:
        (self._link_dir(interface) / _CLSACT).mkdir(parents=True)

    def _copy(self, variant: Variant) -> tuple[Program, Program]:
        """The programs with these constants; pinned, if they were not."""
        if variant not in self._copies:
            directory = self._program_dir(variant)
            if all((directory / name).exists() for name in PROGRAMS):
                self._copies[variant] = (
                    Program.open_pinned(directory / PROGRAMS[0]),
                    Program.open_pinned(directory / PROGRAMS[1]),
                )
            else:
                with self._compiled.loaded(variant, self.maps.values()) as compiled:
                    self._copies[variant] = self._pin_copy(variant, compiled)
        return self._copies[variant]

    def _pin_copy(self, variant: Variant, compiled: Object) -> tuple[Program, Program]:
        directory = self._program_dir(variant)
        _remove_tree(directory)
        directory.mkdir(parents=True)
        copy = programs_of(compiled)
        for program in copy:
            program.pin(directory / program.name)
        return copy

    def _remove_unused_copies(self) -> None:
        """Copies for namespaces in which nothing is attached."""
        used = {self._own.scope, *(_interface(directory).scope for directory in self._links())}
        for directory in self._copies_there():
            variant = _variant(directory)[1]
            if variant.scope not in used:
                for program in self._copies.pop(variant, ()):
                    program.close()
                shutil.rmtree(directory)

    def _copies_there(self) -> tuple[Path, ...]:
        return _entries(self._directory / "programs")

    def _links(self) -> tuple[Path, ...]:
        return _entries(self._directory / "links")

    def _link_dir(self, interface: abi.Interface) -> Path:
        return self._directory / "links" / f"{interface.scope}-{interface.ifindex}"

    def _program_dir(self, variant: Variant) -> Path:
        name = f"{self._compiled.digest}-{variant.scope}-{variant.link_header}"
        return self._directory / "programs" / name


class _Known(NamedTuple):
    """A pinned program."""

    digest: str
    variant: Variant
    name: str


def _known_programs(directory: Path, scope: int | None = None) -> dict[int, _Known]:
    """All programs that are pinned, by their numbers; or those that serve one scope."""
    found = {}
    for copy in _entries(directory / "programs"):
        digest, variant = _variant(copy)
        if scope not in (None, variant.scope):
            continue
        for pin in copy.iterdir():
            with Program.open_pinned(pin) as program:
                found[program.id] = _Known(digest, variant, pin.name)
    return found


def _variant(directory: Path) -> tuple[str, Variant]:
    """What a directory of programs says by its name: which object they are of, and their constants."""
    digest, scope, link_header = directory.name.split("-")
    return digest, Variant(int(scope), int(link_header))


def _interface(directory: Path) -> abi.Interface:
    """What a directory of links says by its name."""
    scope, _, ifindex = directory.name.partition("-")
    return abi.Interface(int(scope), int(ifindex))


def _is_layout(entry: Path) -> bool:
    return entry.name.startswith(_LAYOUT)


def _entries(directory: Path) -> tuple[Path, ...]:
    return tuple(directory.iterdir()) if directory.exists() else ()


def remove(directory: Path) -> None:
    """Takes everything below a directory of `Pinned` out of the kernel, without loading anything; idempotent.

    KernelError or OSError when the kernel refuses; the next call goes on.
    """
    if directory.exists():
        _remove_all(directory)
        directory.rmdir()


def _remove_all(directory: Path) -> None:
    """Links first: a program must not run on an interface that it has no entry for."""
    for links in _entries(directory / "links"):
        _remove_links(directory, links)
    for entry in _entries(directory):
        if _is_layout(entry):
            entry.rmdir()
    for name in ("links", "programs", "maps"):
        _remove_tree(directory / name)


def _remove_links(directory: Path, links: Path) -> None:
    for pin in _entries(links):
        if pin.name == _CLSACT:
            detach_filters(_interface(links), _known_programs(directory))
        else:
            with Link.open_pinned(pin) as link:
                link.detach()
    _remove_tree(links)


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
