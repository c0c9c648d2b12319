"""Network namespaces: making and naming them, working in them, starting processes in them.

The one way into another network namespace is `run_in`: it gives the work a thread of its own, which
ends with the work, so that no thread is ever left in the wrong namespace. `Visitors` are such threads that go on to
the next. Names are bind mounts in
/run/netns, as iproute2 makes them, so that `ip netns` sees them too. Nothing here knows what a
namespace is for.
"""

import concurrent.futures
import ctypes
import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, ParamSpec, TypeVar

from tidegate.kernel.capabilities import hand_down
from tidegate.kernel.errors import KernelError

DIRECTORY = Path("/run/netns")
"""Where iproute2 looks for named network namespaces (its NETNS_RUN_DIR)."""

CURRENT = "/proc/thread-self/ns/net"
"""Path of the network namespace of the thread that opens it."""

# linux/sched.h
_CLONE_NEWNET = 0x40000000
# asm-generic/socket.h
_SO_NETNS_COOKIE = 71
# linux/nsfs.h
_NS_GET_USERNS = 0xB701
_INITIAL_COOKIE = 1
"""The first that is given out (net/core/net_namespace.c, net_ns_init)."""
_INITIAL_INODE = 0xEFFFFFF9
"""NET_NS_INIT_INO of linux/nsfs.h, in kernels that number namespaces of all kinds together."""
# sys/mount.h
_MS_BIND = 4096
_MNT_DETACH = 2

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_libc = ctypes.CDLL(None, use_errno=True)
_setns = ctypes.PyDLL(None, use_errno=True).setns
"""Without letting other threads of Python go on meanwhile: having to wait for them then takes longer than this does."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Identity(NamedTuple):
    """What tells one namespace from all others alive on this machine; paths only name it."""

    device: int
    inode: int


def path(name: str) -> str:
    """Path of the namespace `name`, whether or not it exists. KernelError for what is no name."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise KernelError(f"{name!r} is not a name for a network namespace", errno.EINVAL)
    return str(DIRECTORY / name)


def names() -> tuple[str, ...]:
    """Names of all named network namespaces of this machine, whoever made them, sorted."""
    try:
        return tuple(sorted(entry.name for entry in DIRECTORY.iterdir()))
    except FileNotFoundError:
        return ()


def create(name: str) -> str:
    """Make a new network namespace and return its path. KernelError when the name is taken."""
    target = path(name)
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    except FileExistsError as error:
        raise KernelError(f"network namespace {name} already exists", errno.EEXIST) from error
    try:
        _in_fresh_thread(_unshare_and_bind, target)
    except BaseException:
        Path(target).unlink()
        raise
    return target


def delete(name: str) -> None:
    """Take the name away, if it is there; the namespace dies with its last process."""
    target = path(name)
    encoded = os.fsencode(target)
    while _libc.umount2(encoded, _MNT_DETACH) == 0:
        pass
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise _failure(f"cannot unmount network namespace {name}", number)
    Path(target).unlink(missing_ok=True)


def identity(netns_path: str) -> Identity:
    """Which namespace lies at a path. KernelError when nothing does."""
    try:
        # Not by Path: this is part of every look, and would take thrice as long.
        found = os.stat(netns_path)  # noqa: PTH116
    except OSError as error:
        raise _failure(f"no network namespace at {netns_path}", error.errno or 0) from error
    return Identity(found.st_dev, found.st_ino)


def cookie(netns_path: str) -> int:
    """A number that no other network namespace has had or will have until the machine boots anew.

    KernelError when the namespace is gone, and before Linux 5.14.
    """

    def ask() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            try:
                answer = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            except OSError as error:
                raise _failure("cannot tell network namespaces apart", error.errno or 0) from error
        return int.from_bytes(answer, sys.byteorder)

    return ask() if netns_path == CURRENT else run_in(netns_path, ask)


def is_initial(netns_path: str) -> bool:
    """Whether this is the namespace that the machine booted with. KernelError as of `cookie`.

    True is certain. Told from inside, without a look at other processes: for who sees none but its own.
    """
    if identity(netns_path).inode == _INITIAL_INODE:
        return True
    return cookie(netns_path) == _INITIAL_COOKIE


def is_of_other_users(netns_path: str) -> bool:
    """Whether it belongs to another user namespace than the calling process is in. KernelError when it is gone."""
    with opened(netns_path) as descriptor:
        try:
            owner = fcntl.ioctl(descriptor, _NS_GET_USERNS)
        except PermissionError:
            # One that is above the caller's own (ioctl_ns(2)).
            return True
        try:
            return not os.path.samestat(os.fstat(owner), Path("/proc/self/ns/user").stat())
        finally:
            os.close(owner)


def path_of(inode: int) -> str | None:
    """A path at which the namespace of this inode number lies: the calling thread's, a name, or a process's.

    None when nothing of that leads to it.
    """
    for candidate in _paths():
        try:
            if candidate.stat().st_ino == inode:
                return str(candidate)
        except OSError:
            # It went while it was looked at.
            continue
    return None


def everywhere() -> dict[Identity, str]:
    """A path of each network namespace of this machine that has one: a name, a mount or a process's."""
    found: dict[Identity, str] = {}
    for candidate in _paths():
        try:
            at = candidate.stat()
        except OSError:
            # It went while it was looked at, or is somebody's mount that may not be looked at.
            continue
        found.setdefault(Identity(at.st_dev, at.st_ino), str(candidate))
    return found


def _paths() -> Iterator[Path]:
    yield Path(CURRENT)
    for name in names():
        yield DIRECTORY / name
    yield from _mounts()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            yield entry / "ns" / "net"


def _mounts() -> Iterator[Path]:
    """Where namespaces are mounted in the sight of this process; of network namespaces the root says so (proc(5))."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _, _, _, root, place, *_ = line.split(" ")
        # Blanks and backslashes are written in octal.
        if root.startswith("net:[") and "\\" not in place:
            yield Path(place)


@contextmanager
def opened(netns_path: str = CURRENT) -> Iterator[int]:
    """A descriptor of a namespace, open as long as the context. KernelError when there is none."""
    try:
        descriptor = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _failure(f"no network namespace at {netns_path}", error.errno or 0) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run_in(
    netns_path: str, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Call `function` inside the namespace and return what it returns; its exceptions come through.

    The function runs in a thread of its own, unless the namespace is given as CURRENT. Sockets that it
    opens stay in the namespace and may be used from everywhere afterwards. KernelError when the
    namespace is gone or may not be entered.
    Beware of /proc/net and /sys/class/net in there: the first follows the process's main thread
    (/proc/thread-self/net does not), the second whoever mounted /sys. /proc/sys/net follows the
    thread.
    """

    if netns_path == CURRENT:
        return function(*args, **kwargs)

    def enter_and_call() -> _T:
        _enter(netns_path)
        return function(*args, **kwargs)

    return _in_fresh_thread(enter_and_call)


def pids(netns_path: str) -> tuple[int, ...]:
    """Processes whose main thread is in the namespace, sorted."""
    wanted = identity(netns_path)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "ns" / "net").stat()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if (stat.st_dev, stat.st_ino) == wanted:
            found.append(int(entry.name))
    return tuple(sorted(found))


def spawn(
    netns_path: str,
    argv: Sequence[str],
    *,
    user: int | None = None,
    group: int | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    executable: str | None = None,
    start_new_session: bool = False,
    capabilities: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process in the namespace; the other arguments are subprocess.Popen's.

    With a `user` or a `group` the process has no supplementary groups, and of all capabilities only
    `capabilities`. KernelError when the namespace is gone, OSError when the program cannot be started.
    """

    def start() -> "subprocess.Popen[bytes]":
        if capabilities:
            hand_down(capabilities)
        return subprocess.Popen(
            list(argv),
            user=user,
            group=group,
            extra_groups=None if user is None and group is None else (),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
            pass_fds=pass_fds,
            executable=executable,
            start_new_session=start_new_session,
        )

    return run_in(netns_path, start)


def run_in_new(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call `function` inside a new, nameless namespace that is gone when it returns.

    It runs in a thread of its own; where run_in has made one already, in that, which comes back afterwards.
    """

    def unshare_and_call() -> _T:
        _unshare()
        return function(*args, **kwargs)

    if not getattr(_this_thread, "is_made_for_this", False):
        return _in_fresh_thread(unshare_and_call)
    with opened() as home:
        try:
            return unshare_and_call()
        finally:
            _set(home, CURRENT)


class Visitors:
    """Threads that work in one network namespace after the other: for much work that comes one by one, because a
    thread of its own for each piece, as run_in has, costs as much as a small piece itself.

    May be used from any thread, but not from within its own work.
    """

    def __init__(self, threads: int, name: str) -> None:
        """They come back to where they are made."""
        self._home = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        self._executor = concurrent.futures.ThreadPoolExecutor(threads, name)

    def submit(
        self, netns_path: str, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> "concurrent.futures.Future[_T]":
        """Have `function` called inside the namespace; KernelError when that is gone or may not be entered."""
        return self._executor.submit(self.visit, netns_path, function, *args, **kwargs)

    def visit(
        self, netns_path: str, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """The same in the calling thread, which is to be one that nothing else needs to be at home."""
        _make_for_this()
        _enter(netns_path)
        try:
            return function(*args, **kwargs)
        finally:
            # Whoever stays keeps the namespace alive.
            _set(self._home, CURRENT)

    def close(self) -> None:
        """Waits for the work that was begun; the rest is not done."""
        self._executor.shutdown(cancel_futures=True)
        os.close(self._home)


_this_thread = threading.local()


def _make_for_this() -> None:
    _this_thread.is_made_for_this = True


def _in_fresh_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def work() -> None:
        _make_for_this()
        try:
            outcome.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it is raised where the work was asked for
            outcome.set_exception(error)

    # An executor for one piece of work costs twice as much, and this is done for every workload in every round.
    thread = threading.Thread(target=work, name="netns")
    thread.start()
    try:
        return outcome.result()
    finally:
        thread.join()


def _unshare_and_bind(target: str) -> None:
    _unshare()
    if _libc.mount(CURRENT.encode(), os.fsencode(target), b"none", _MS_BIND, None) != 0:
        raise _failure(f"cannot mount a network namespace at {target}", ctypes.get_errno())


def _unshare() -> None:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise _failure("cannot make a network namespace", ctypes.get_errno())


def _enter(netns_path: str) -> None:
    with opened(netns_path) as descriptor:
        _set(descriptor, netns_path)


def _set(descriptor: int, netns_path: str) -> None:
    if _setns(descriptor, _CLONE_NEWNET) != 0:
        raise _failure(f"cannot enter network namespace {netns_path}", ctypes.get_errno())


def _failure(what: str, number: int) -> KernelError:
    return KernelError(f"{what}: {os.strerror(number)}", number)
