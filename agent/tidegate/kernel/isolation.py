"""Work in a network namespace by a short-lived process of its own, for libraries that parse what others put there.

A library that crashes, hangs, leaks or calls exit(3) takes only that process with it. The process has a bound on
memory, on time and on what it may answer, and ends with the thread that asked. What the work is is not its business.

The child is a fork of a process that may have many threads, of which only the calling one goes on in it. A lock that
another thread holds stays locked there: the work must have loaded its libraries before, and a module with a lock of
its own has to hold it over forks (os.register_at_fork), as kernel/nftables.py does.
"""

import ctypes
import errno
import fcntl
import gc
import math
import os
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError

MEMORY_BYTES = 256 * 2**20
"""How much the work may allocate."""

ANSWER_BYTES = 16 * 2**20
"""How long what it returns may be, as MessagePack."""

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
# linux/sched.h
_CLONE_NEWNET = 0x40000000

_LENGTH = struct.Struct("=I")
_CHUNK = 2**16
_STANDARD = range(3)
"""Descriptors of standard input, output and error."""
_HIGHEST = 2**31 - 1
"""No descriptor is higher."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    value: Any = None
    problem: str | None = None
    errno: int = 0


_decoder = msgspec.msgpack.Decoder(_Answer)


class _Job(NamedTuple):
    """What a child has to know, made before it is."""

    work: Callable[[], Any]
    namespace: int | None
    """None for that which the child begins in."""
    answer_to: int
    deadline_s: float
    parent: int


class _Child(NamedTuple):
    pid: int
    pidfd: int


def run_in(
    netns_path: str, function: Callable[..., Any], /, *args: Any, deadline_s: float = 10.0
) -> Any:
    """Call `function(*args)` inside the namespace, in a process of its own, and return what it returns.

    That has to be made of None, bool, int, float, str, bytes, list, tuple and dict; tuples come back as lists. An
    exception of the function comes as a KernelError: one of the kernel's with its message and errno. KernelError
    as well when the namespace is gone, and when the work crashes, needs more than MEMORY_BYTES, says more than
    ANSWER_BYTES or lasts longer than `deadline_s` seconds; its process is gone then. The calling thread's own
    namespace (netns.CURRENT) is not entered: the child begins in it, and entering takes CAP_SYS_ADMIN.
    """
    name = getattr(function, "__name__", "the work")
    with ExitStack() as stack:
        is_elsewhere = netns_path != netns.CURRENT
        namespace = stack.enter_context(netns.opened(netns_path)) if is_elsewhere else None
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, read_end)
        writing = stack.enter_context(ExitStack())
        writing.callback(os.close, write_end)
        job = _Job(
            work=lambda: function(*args),
            namespace=namespace,
            answer_to=write_end,
            deadline_s=deadline_s,
            parent=os.getpid(),
        )
        # Signals for the parent (Ctrl-C, a stop of the service) are its to act on: the child keeps them blocked.
        # Nor may one raise here between the child's begin and the place that sees to its end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        child = stack.enter_context(_forked(name, job))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writing.close()
        received = _read(name, read_end, child, time.monotonic() + deadline_s)
        return _result(name, received)


@contextmanager
def _forked(name: str, job: _Job) -> Iterator[_Child]:
    """A child that does the job; it is dead and reaped afterwards."""
    try:
        pid = os.fork()
    except OSError as error:
        problem = f"cannot start a process for {name}: {error.strerror}"
        raise KernelError(problem, error.errno or 0) from error
    if pid == 0:
        _do(job)
    try:
        pidfd = os.pidfd_open(pid)
        try:
            yield _Child(pid, pidfd)
        finally:
            os.close(pidfd)
    finally:
        # Until it is reaped the number is the child's, whether it lives or not.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _do(job: _Job) -> NoReturn:
    """The child's whole life: never back into code of the parent, whatever happens."""
    try:
        # The parent's objects are not this process's to finalize.
        gc.disable()
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == job.parent:
            if job.namespace is None:
                (answer_to,) = _leave_behind(job.answer_to)
                namespace = None
            else:
                namespace, answer_to = _leave_behind(job.namespace, job.answer_to)
            _limit(job)
            _write(answer_to, _answer(job, namespace))
    finally:
        os._exit(0)


def _leave_behind(*kept: int) -> list[int]:
    """Close the parent's descriptors but some, whose new numbers are returned.

    What the parent closes has to be closed then, and nothing from here shall reach its output.
    """
    # Each gets the lowest number that is free, so they come in ascending order.
    moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, len(_STANDARD)) for one in kept]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in _STANDARD:
        os.dup2(nowhere, standard)
    first = len(_STANDARD)
    for descriptor in moved:
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, _HIGHEST)
    return moved


def _limit(job: _Job) -> None:
    for kind, most in (
        # Only here is it known what the parent had: its other threads go on mapping memory until the fork.
        (resource.RLIMIT_AS, _address_space() + MEMORY_BYTES),
        (resource.RLIMIT_CPU, math.ceil(job.deadline_s) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def _answer(job: _Job, namespace: int | None) -> bytes:
    try:
        if namespace is not None and _libc.setns(namespace, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise KernelError(f"cannot enter the network namespace: {os.strerror(number)}", number)
        answer = msgspec.msgpack.encode(_Answer(value=job.work()))
    except KernelError as error:
        return _told(str(error), error.errno)
    except MemoryError:
        return _told(f"more than {MEMORY_BYTES // 2**20} MiB of memory are needed", errno.ENOMEM)
    except BaseException as error:  # noqa: BLE001 - the parent is told, whatever it is
        number = error.errno or 0 if isinstance(error, OSError) else 0
        return _told(f"{type(error).__name__}: {error}", number)
    if len(answer) > ANSWER_BYTES:
        return _told(f"the answer is longer than {ANSWER_BYTES // 2**20} MiB", errno.EMSGSIZE)
    return answer


def _told(problem: str, number: int) -> bytes:
    text = problem.encode(errors="backslashreplace").decode()
    return msgspec.msgpack.encode(_Answer(problem=text, errno=number))


def _write(descriptor: int, answer: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(answer)) + answer)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read(name: str, read_end: int, child: _Child, deadline: float) -> bytearray:
    """The child's answer, without its length. KernelError when there is none in time."""
    received = bytearray()
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    poll.register(child.pidfd, select.POLLIN)
    while True:
        left_s = deadline - time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, left_s) * 1000)}
        chunk = os.read(read_end, _CHUNK) if read_end in ready else b""
        received += chunk
        if len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if length > ANSWER_BYTES:
                raise KernelError(f"{name} wants to say too much: {length} bytes", errno.EMSGSIZE)
            if len(received) >= _LENGTH.size + length:
                return received[_LENGTH.size : _LENGTH.size + length]
        # Only its own end tells that a child is gone: another one may have the pipe open for a moment.
        if ready == {child.pidfd}:
            raise KernelError(f"{name} died in a process of its own: {_death(child)}", errno.EIO)
        if ready and not chunk:
            poll.unregister(read_end)
        if left_s <= 0:
            raise KernelError(f"{name} did not end in time and was killed", errno.ETIMEDOUT)


def _death(child: _Child) -> str:
    """What a child died of that is just dying; it stays to be reaped."""
    ended = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    if ended is None or ended.si_code == os.CLD_EXITED:
        return f"exit status {0 if ended is None else ended.si_status}"
    return f"killed by {signal.Signals(ended.si_status).name}"


def _result(name: str, received: bytearray) -> Any:
    try:
        answer = _decoder.decode(received)
    except msgspec.DecodeError as error:
        raise KernelError(f"{name} answered nonsense: {error}", errno.EBADMSG) from error
    if answer.problem is not None:
        raise KernelError(answer.problem, answer.errno)
    return answer.value


def _address_space() -> int:
    """Bytes of address space that this process has (statm of proc(5))."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
