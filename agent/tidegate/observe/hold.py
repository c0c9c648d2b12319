"""The classifier's programs and maps in the kernel, and how they get onto interfaces and off them.

A `Hold` is one of two kinds: `Pinned` (observe/pins.py) outlives the process, `Private` (observe/private.py) ends with
it. Both attach by tcx links where the kernel has them (Linux 6.6), by clsact filters elsewhere, and before other
people's programs: ours leave every packet to the next one, while one of theirs that decides would keep from ours what
it lets pass. Knows programs, maps and constants by their names, and nothing of what the maps are for. Failures are
KernelErrors.
"""

import abc
import contextlib
import enum
import errno
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar, assert_never

from tidegate.kernel import interfaces, netns, tc
from tidegate.kernel.bpf import AttachType, Map, Program
from tidegate.kernel.bpf_object import Object, read_object
from tidegate.kernel.errors import KernelError
from tidegate.observe import abi

PACKAGED_OBJECT = Path(__file__).parent.parent / "bpf" / "classifier.bpf.o"
"""The compiled programs as the package ships them; `make -C bpf` makes them."""

HELLOS = "hellos"
"""The ring buffer."""

PROGRAMS = ("from_pod", "to_pod")
_FLOWS = "flows"
_SCRATCH = "scratch"
OWNER = "tidegate"
_OWN_PID_NAMESPACE = Path("/proc/self/ns/pid")
_NO_TCX = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
"""What kernels say to an attach type that they do not know."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


class Way(enum.Enum):
    """Which packets of an interface a program sees."""

    INGRESS = enum.auto()
    EGRESS = enum.auto()


class By(enum.Enum):
    """What holds programs on an interface."""

    TCX = enum.auto()
    """Links, before all programs that were there."""
    CLSACT = enum.auto()
    """Filters, before all but those of the first priority."""


BEST = (By.TCX, By.CLSACT)
"""What is tried, in this order."""

TCX_TYPES = {Way.INGRESS: AttachType.TCX_INGRESS, Way.EGRESS: AttachType.TCX_EGRESS}
_HOOKS = {Way.INGRESS: tc.Hook.INGRESS, Way.EGRESS: tc.Hook.EGRESS}


class Variant(NamedTuple):
    """The constants by which copies of the programs differ."""

    scope: int
    """The inode number of the network namespace in which they run."""
    link_header: int
    """Bytes before the IP header."""


AS_COMPILED = Variant(0, 14)
"""Of programs that are on no interface."""


def scope_here() -> int:
    """The scope of the calling thread's network namespace: the same for every agent, wherever that is itself."""
    return netns.identity(netns.CURRENT).inode


class Compiled:
    """The programs as they were when this process began: a package may be upgraded under it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = read_object(path)
        self.digest = hashlib.sha256(self._content).hexdigest()[:16]
        with self.opened() as compiled:
            self.kept = tuple(
                name
                for name in compiled.map_names()
                if name != HELLOS and not name.startswith(_SCRATCH)
            )
            """Names of the maps that all copies of the programs share."""
            self.layout = _layout(compiled, self.kept)

    def opened(self) -> Object:
        return Object.open(self.path, self._content)

    @contextlib.contextmanager
    def loaded(
        self,
        variant: Variant,
        shared: Iterable[Map] = (),
        *,
        report: bool = False,
        flows: int | None = None,
        only_maps: bool = False,
    ) -> Iterator[Object]:
        """A copy of the programs, with maps that exist, or with maps of its own; or nothing but these."""
        with self.opened() as compiled:
            _set_constants(compiled, {**variant._asdict(), "report": int(report)})
            if flows is not None:
                compiled.resize(_FLOWS, flows)
            if HELLOS in compiled.map_names() and not report:
                compiled.resize(HELLOS, mmap.PAGESIZE)
            for existing in shared:
                compiled.reuse(existing)
            if only_maps:
                compiled.leave_out_programs()
            compiled.load()
            yield compiled


def programs_of(loaded: Object) -> tuple[Program, Program]:
    """Handles on both programs: for packets from the pod, and for packets to it."""
    from_pod, to_pod = PROGRAMS
    return loaded.program(from_pod), loaded.program(to_pod)


class Hold(abc.ABC):
    """Maps, programs, and the interfaces that they are attached to.

    Where one begins, the filters go that holders left whose process is gone.
    """

    def __init__(self, compiled: Compiled, by: tuple[By, ...], owner: str) -> None:
        """`owner` is the name of its filters."""
        self.maps: dict[str, Map] = {}
        self._compiled = compiled
        self._copies: dict[Variant, tuple[Program, Program]] = {}
        self._by = by
        self._owner = owner
        self._began: tuple[str, ...] = ()
        """What a person should know of how this began, a sentence each."""
        self._beside: dict[tuple[int, int], tuple[str, ...]] = {}
        """What there is to know of interfaces, by scope and index, likewise."""
        _sweep(*tc.interfaces())

    @property
    def programs(self) -> tuple[Program, Program]:
        """What packets are given to that pass no interface: one for those from the pod, one for those to it."""
        return self._copy(AS_COMPILED)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how this began, and of interfaces, a sentence each."""
        return self._began + tuple(note for notes in self._beside.values() for note in notes)

    def attach(self, interface: abi.Interface, ways: tuple[Way, Way]) -> None:
        """Attaches both programs, each where its packets pass, in the calling thread's namespace."""
        copy = self._copy(Variant(interface.scope, interfaces.link_header(interface.ifindex)))
        programs = dict(zip(ways, copy, strict=True))
        _sweep(interface.ifindex)
        refused = KernelError(f"nothing is allowed to attach to interface {interface.ifindex}")
        for by in self._by:
            try:
                match by:
                    case By.TCX:
                        self._attach_links(interface, programs)
                    case By.CLSACT:
                        self._will_have_filters(interface)
                        hooks = {_HOOKS[way]: program for way, program in programs.items()}
                        tc.attach(interface.ifindex, hooks, self._owner)
                        self._note_earlier_filters(interface, tc.filters(interface.ifindex))
                    case _:
                        assert_never(by)
            except KernelError as error:
                if by is By.TCX and error.errno in _NO_TCX:
                    # The same copies are tried by the next way.
                    self._take_off(interface)
                    refused = error
                    continue
                self.detach(interface)
                raise
            return
        raise refused

    @abc.abstractmethod
    def is_attached(self, interface: abi.Interface) -> bool:
        """Whether both programs still are on the interface that they were attached to."""

    def detach(self, interface: abi.Interface) -> None:
        """Takes off what is on an interface; nothing is no error."""
        self._take_off(interface)
        self._beside.pop((interface.scope, interface.ifindex), None)

    @abc.abstractmethod
    def detach_all_but(self, known: Iterable[abi.Interface]) -> None:
        """Takes off what is on other interfaces than these."""

    def close(self) -> None:
        """Lets go of the kernel objects; what is pinned stays."""
        for programs in self._copies.values():
            for program in programs:
                program.close()
        for each in self.maps.values():
            each.close()

    @abc.abstractmethod
    def remove(self) -> None:
        """Takes everything out of the kernel."""

    @abc.abstractmethod
    def _take_off(self, interface: abi.Interface) -> None:
        """Takes off what is on an interface, and keeps all copies of the programs."""

    @abc.abstractmethod
    def _copy(self, variant: Variant) -> tuple[Program, Program]:
        """The programs with these constants."""

    @abc.abstractmethod
    def _attach_links(self, interface: abi.Interface, programs: Mapping[Way, Program]) -> None: ...

    @abc.abstractmethod
    def _will_have_filters(self, interface: abi.Interface) -> None:
        """Remembers it before there are any, so that they are found whatever happens."""

    def _has_filters(self, interface: abi.Interface, names: Mapping[int, str]) -> bool:
        """Whether an interface has filters for both programs, of which these are the copies."""
        found = in_scope(interface.scope, tc.filters, interface.ifindex) or ()
        self._note_earlier_filters(interface, found)
        return {names.get(each.program_id) for each in found} >= set(PROGRAMS)

    def _note_earlier_filters(
        self, interface: abi.Interface, filters: Collection[tc.Filter]
    ) -> None:
        """What decides before us may let packets pass that are then not seen."""
        first = {
            hook: min(
                (each.priority for each in filters if each.hook is hook and _is_ours(each)),
                default=0,
            )
            for hook in tc.Hook
        }
        self._beside[interface.scope, interface.ifindex] = tuple(
            f"interface {interface.ifindex} has another program before the classifier "
            f"({each.hook.name.lower()} filter {each.name or each.kind}, priority {each.priority}): "
            "packets on which that decides are not seen"
            for each in filters
            if each.priority < first[each.hook]
        )


def _layout(compiled: Object, names: Iterable[str]) -> str:
    """A digest of where everything is in the maps, and of what the numbers mean that are in them."""
    texts = [compiled.layout(name) for name in sorted(names)]
    for kind in (abi.Class, abi.Direction, abi.Role, abi.FlowFlag, abi.Verdict, abi.Counter):
        texts.append(f"{kind.__name__} {[(each.name, int(each)) for each in kind]}")
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _set_constants(compiled: Object, constants: Mapping[str, int]) -> None:
    """Sets them; programs that do not have one are right where it says what they are made for."""
    made_for = {**AS_COMPILED._asdict(), "report": 0}
    known = compiled.constants()
    compiled.set_constants(
        **{
            name: value
            for name, value in constants.items()
            if name in known or value != made_for[name]
        }
    )


def in_scope(
    scope: int, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T | None:
    """What a function returns in the namespace of a scope; None when that is gone."""
    path = netns.path_of(scope)
    return None if path is None else netns.run_in(path, function, *args, **kwargs)


def detach_filters(interface: abi.Interface, program_ids: Collection[int]) -> None:
    """Takes the filters off that run one of these programs."""
    in_scope(interface.scope, tc.detach, interface.ifindex, program_ids)


def _is_ours(each: tc.Filter) -> bool:
    return each.owner == OWNER or _private_pid(each) is not None


def private_owner() -> str:
    """The name of the filters of a holder that ends with this process."""
    return f"{OWNER}-{os.getpid()}-{_OWN_PID_NAMESPACE.stat().st_ino}"


def _private_pid(each: tc.Filter) -> tuple[int, int] | None:
    """Process and PID namespace of a private holder."""
    named = re.fullmatch(rf"{OWNER}-(\d+)-(\d+)", each.owner)
    return (int(named[1]), int(named[2])) if named else None


def _sweep(*ifindexes: int) -> None:
    """Removes filters of private holders whose process is gone."""
    own = _OWN_PID_NAMESPACE.stat().st_ino
    for ifindex in ifindexes:
        left = []
        for each in tc.filters(ifindex):
            holder = _private_pid(each)
            if holder and holder[1] == own and not Path(f"/proc/{holder[0]}").exists():
                left.append(each)
        tc.remove(ifindex, left)
