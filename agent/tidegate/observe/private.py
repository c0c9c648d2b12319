"""The classifier's programs, maps and links in one process: gone when it closes them, or when it is gone."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tidegate.kernel.bpf import Link, Program
from tidegate.observe import abi
from tidegate.observe.hold import (
    AS_COMPILED,
    BEST,
    HELLOS,
    PROGRAMS,
    TCX_TYPES,
    By,
    Compiled,
    Hold,
    Variant,
    Way,
    detach_filters,
    private_owner,
    programs_of,
)


class Private(Hold):
    """Programs, maps and links that are gone when this is closed, or when the process is."""

    def __init__(
        self,
        object_path: Path,
        by: tuple[By, ...] = BEST,
        *,
        report: bool,
        flows: int | None = None,
    ) -> None:
        """Makes the maps. Programs are loaded for what they are attached to, and when they are asked for.

        With `report` they send ClientHellos; `flows` is the room in the flow map.
        """
        super().__init__(Compiled(object_path), by, private_owner())
        self._report, self._flows = report, flows
        self._links: dict[tuple[int, int], list[Link]] = {}
        self._filters: set[tuple[int, int]] = set()
        with self._compiled.loaded(
            AS_COMPILED, report=report, flows=flows, only_maps=True
        ) as compiled:
            names = [
                name
                for name in compiled.map_names()
                if name == HELLOS or name in self._compiled.kept
            ]
            self.maps = {name: compiled.map(name) for name in names}

    def is_attached(self, interface: abi.Interface) -> bool:
        key = interface.scope, interface.ifindex
        if key in self._filters:
            return self._has_filters(interface, self._names())
        links = self._links.get(key, [])
        return len(links) == len(PROGRAMS) and all(
            link.interface() == interface.ifindex for link in links
        )

    def detach_all_but(self, known: Iterable[abi.Interface]) -> None:
        kept = {(interface.scope, interface.ifindex) for interface in known}
        for scope, ifindex in {*self._links, *self._filters} - kept:
            self.detach(abi.Interface(scope, ifindex))

    def close(self) -> None:
        self.detach_all_but(())
        super().close()

    def remove(self) -> None:
        self.close()

    def _take_off(self, interface: abi.Interface) -> None:
        key = interface.scope, interface.ifindex
        for link in self._links.pop(key, []):
            link.close()
        if key in self._filters:
            detach_filters(interface, self._names())
            self._filters.discard(key)

    def _attach_links(self, interface: abi.Interface, programs: Mapping[Way, Program]) -> None:
        links = self._links.setdefault((interface.scope, interface.ifindex), [])
        for way, program in programs.items():
            links.append(Link.attach(program, interface.ifindex, TCX_TYPES[way]))

    def _will_have_filters(self, interface: abi.Interface) -> None:
        self._filters.add((interface.scope, interface.ifindex))

    def _copy(self, variant: Variant) -> tuple[Program, Program]:
        if variant not in self._copies:
            shared = self.maps.values()
            with self._compiled.loaded(
                variant, shared, report=self._report, flows=self._flows
            ) as compiled:
                self._copies[variant] = programs_of(compiled)
        return self._copies[variant]

    def _names(self) -> dict[int, str]:
        return {
            program.id: program.name for programs in self._copies.values() for program in programs
        }
