"""Takes in the calls of the CNI plugin: a thread that accepts connections, and reads what they ask.

As a rule all of a request is there at once, and it is answered at once, in the same thread: of many that come at the
same time each has the processor to itself, and none waits for another thread to be woken. Whoever says only half of it
is waited for while others are served. Knows how a request is framed; what it says and who answers it is not its
business. `Turns` keeps the calls about one container in their order, in whichever thread they are carried out.
"""

import collections
import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from tidegate.node.log import Log
from tidegate.workloads import cni
from tidegate.workloads.cni import CniError, Code

MAX_CALLS = 128
"""Connections at a time; with the size of a request this bounds the memory that they take."""
BACKLOG = 256
REQUEST_S = 5.0
"""How long the plugin may take to say what it wants."""

_READ_BYTES = 1 << 16
_NO_ROOM_S = 0.2
"""How long calls wait where none can be taken in."""

DEFECT = CniError(
    Code.NOT_REDIRECTED, "the tidegate agent has a defect", "see the log of the agent"
)

log = Log("cni")


class Call:
    """A connection: one request, one answer."""

    def __init__(self, caller: socket.socket, calls: set["Call"]) -> None:
        """It is among `calls` until it is answered or hung up on."""
        self.patience_ends = time.monotonic() + REQUEST_S
        """When, by the monotonic clock, its request has to be whole."""
        self._caller = caller
        self._received = bytearray()
        self._calls = calls
        calls.add(self)

    def fileno(self) -> int:
        return self._caller.fileno()

    def read(self) -> bytes | None:
        """What the plugin asks, when all of it is there. CniError when that is no request, OSError when it is gone."""
        try:
            said = self._caller.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        if not said:
            raise ConnectionResetError
        self._received += said
        head = len(cni.MAGIC) + cni.LENGTH_BYTES
        if self._received[: len(cni.MAGIC)] != cni.MAGIC[: len(self._received)]:
            raise CniError(
                Code.TRY_AGAIN,
                "the tidegate-cni plugin speaks another language than the agent",
                "install the plugin of the agent's version: tidegate cni install",
            )
        if len(self._received) < head:
            return None
        length = int.from_bytes(self._received[len(cni.MAGIC) : head])
        if length > cni.MAX_REQUEST_BYTES:
            raise CniError(Code.DECODING, "the plugin's request is too large")
        if len(self._received) < head + length:
            return None
        body = bytes(self._received[head : head + length])
        self._received.clear()
        return body

    def answer(self, answer: bytes) -> None:
        """Says it, and hangs up; from whichever thread has the call."""
        # Answers are shorter than what a socket takes without waiting, and who has gone away is told nothing.
        with contextlib.suppress(OSError):
            self._caller.send(answer, socket.MSG_DONTWAIT)
        self.hang_up()

    def hang_up(self) -> None:
        self._calls.discard(self)
        self._caller.close()


class Calls:
    """Those of one listening socket."""

    def __init__(
        self,
        listener: socket.socket,
        calls: set[Call],
        take: Callable[[Call, bytes], None],
    ) -> None:
        """`calls` has all that are there, also those of other sockets. `take` gets each with its request, in the
        thread; it may be answered later, and from elsewhere.
        """
        self._listener = listener
        self._calls = calls
        self._take = take
        self._selector = selectors.DefaultSelector()
        self._reading: dict[Call, None] = {}
        """Those whose request is not whole, the oldest first."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="cni-calls")

    def begin(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()

    def end(self) -> None:
        """Takes in no more, and hangs up on whoever has not said what it wants; returns when the thread has ended."""
        self._ending.set()
        # This wakes the thread, too.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for call in tuple(self._reading):
            self._forget(call)
            call.hang_up()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(self._patience()):
                if self._ending.is_set():
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, Call):
                    self._read(key.fileobj)
            self._lose_patience()

    def _patience(self) -> float | None:
        """Seconds until somebody has taken too long."""
        for call in self._reading:
            return max(0.0, call.patience_ends - time.monotonic())
        return None

    def _lose_patience(self) -> None:
        now = time.monotonic()
        for call in tuple(self._reading):
            if call.patience_ends > now:
                return
            self._forget(call)
            call.hang_up()

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Too many files are open, and nothing tells when that is over.
            log.warning("CNI calls have to wait", reason=str(error))
            self._ending.wait(_NO_ROOM_S)
            return
        call = Call(caller, self._calls)
        if len(self._calls) > MAX_CALLS:
            busy = f"the agent works on {MAX_CALLS} calls already"
            call.answer(cni.failed(CniError(Code.TRY_AGAIN, busy)))
        else:
            self._read(call)

    def _read(self, call: Call) -> None:
        try:
            request = call.read()
        except CniError as error:
            self._forget(call)
            call.answer(cni.failed(error))
        except OSError:
            self._forget(call)
            call.hang_up()
        else:
            if request is None:
                self._wait(call)
            else:
                self._forget(call)
                self._hand_on(call, request)

    def _hand_on(self, call: Call, request: bytes) -> None:
        try:
            self._take(call, request)
        except Exception as defect:
            log.exception("a CNI call failed by a defect of the agent", defect)
            call.answer(cni.failed(DEFECT))

    def _wait(self, call: Call) -> None:
        if call not in self._reading:
            self._reading[call] = None
            self._selector.register(call, selectors.EVENT_READ)

    def _forget(self, call: Call) -> None:
        """Does not wait for more of its request, if it did."""
        if call in self._reading:
            del self._reading[call]
            self._selector.unregister(call)


class Turns:
    """Who has to wait for whom, of one container's calls: a runtime may give up waiting, and ask for the contrary.

    May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, collections.deque[Callable[[], None]]] = {}
        """By container that something is done for: what is begun afterwards."""

    def take(self, container: str, begin: Callable[[], None]) -> bool:
        """Whether it is the caller's turn; otherwise `begin` is called when it is."""
        with self._lock:
            waiting = self._waiting.get(container)
            if waiting is None:
                self._waiting[container] = collections.deque()
            else:
                waiting.append(begin)
            return waiting is None

    def leave(self, container: str) -> None:
        """Ends the turn of whoever has it."""
        with self._lock:
            waiting = self._waiting[container]
            if not waiting:
                del self._waiting[container]
                return
            begin = waiting.popleft()
        begin()
