"""The lane's other side: messages that libfuse answers, passed on in both directions.

Knows from the protocol only what passing on needs: which requests are answered
and how long an answer may get, what INIT and OPEN negotiate, and whom an
INTERRUPT is for. It never looks into names or attributes.

libfuse writes its answers to the channel in the thread that also empties it,
and an answer that finds the channel full would be lost, and its caller hang.
So requests are passed on only while their longest answers fit together
(`_Budget`); the others wait here, in order.

Invariants: requests reach libfuse in the order they came; each one passed on
is answered to the kernel exactly once (by `abandon` at the latest); a message
is changed only where `_amend_request` and `_amend_answer` say; an INTERRUPT is
passed on only while libfuse has the request that it is for.
"""

import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import trio

from qcowfs.fuse import wire
from qcowfs.fuse.files import HotTarget

log = logging.getLogger(__name__)

BACKLOG_LIMIT: Final = 256
"""Messages that may wait for libfuse before the lane stops reading new ones."""

_LISTING_LIMIT: Final = 64 << 10
_ORDINARY_ANSWER: Final = 8 << 10
_MESSAGE_OVERHEAD: Final = 2 << 10
_RECEIVE_LENGTH: Final = 1 << 20
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


class TargetFinder(Protocol):
    """What the channel asks of the operations: whose OPEN answer this is."""

    def hot_target(self, inode: int, fh: int, /) -> HotTarget | None:
        """None when the lane does not serve the file."""
        ...


class _Passed(NamedTuple):
    """A request that libfuse has and has not answered."""

    opcode: int
    node_id: int
    cost: int
    open_flags: int


class _Budget:
    """Bytes of answers that the channel is certain to hold.

    Half of it is left to notifications, which are not counted. A message takes
    up to twice its length and some overhead, the way the kernel accounts it.
    """

    def __init__(self, channel_fd: int) -> None:
        with socket.socket(fileno=os.dup(channel_fd)) as channel:
            self._left = channel.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        self._under_way = 0

    def admits(self, cost: int) -> bool:
        """One request is admitted always: the channel takes a first message of any cost."""
        return cost <= self._left or self._under_way == 0

    def charge(self, cost: int) -> None:
        self._left -= cost
        self._under_way += 1

    def refund(self, cost: int) -> None:
        self._left += cost
        self._under_way -= 1


class PeerChannel:
    """Passes requests to libfuse and its answers and notifications to the kernel.

    `answer` writes a whole message to the kernel and deals with its refusal.
    `on_room` is called when the backlog has become shorter.
    """

    def __init__(
        self,
        channel_fd: int,
        finder: TargetFinder,
        answer: Callable[[bytes | bytearray | memoryview], None],
        notify: Callable[[bytes], None],
        on_room: Callable[[], None],
    ) -> None:
        self._fd = channel_fd
        self._finder = finder
        self._answer = answer
        self._notify = notify
        self._on_room = on_room
        self._budget = _Budget(channel_fd)
        self._passed: dict[int, _Passed] = {}
        self._backlog: deque[bytes] = deque()
        self._wake = trio.Event()
        self._offer: wire.InitOffer | None = None

    @property
    def backlog_count(self) -> int:
        """Messages that wait here for libfuse."""
        return len(self._backlog)

    @property
    def is_busy(self) -> bool:
        """Whether libfuse owes an answer."""
        return bool(self._passed)

    def forward(self, message: memoryview) -> None:
        """Pass one request on, now or when there is room; `message` may be reused at once.

        A closed channel is not an error here: `receive` finds it.
        """
        if self._backlog or not self._try_send(message):
            self._backlog.append(bytes(message))
            self._wake.set()

    async def pump(self) -> None:
        """Pass on what waits, for as long as this runs."""
        while True:
            if self._backlog and self._try_send(memoryview(self._backlog[0])):
                self._backlog.popleft()
                self._on_room()
                continue
            self._wake = trio.Event()
            if self._backlog and self._admits(self._backlog[0]):
                await trio.lowlevel.wait_writable(self._fd)
            else:
                await self._wake.wait()

    async def receive(self) -> None:
        """Pass answers and notifications on; returns when libfuse has closed its end."""
        buffer = memoryview(bytearray(_RECEIVE_LENGTH))
        while True:
            try:
                length = os.readv(self._fd, [buffer])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
                continue
            except OSError as error:
                if error.errno in _GONE:
                    return
                raise
            if length == 0:
                return
            self._take_answer(buffer[:length])

    def abandon(self) -> None:
        """Answer EIO to all that libfuse has or would have got: nobody waits for ever."""
        waiting = list(self._passed)
        for message in self._backlog:
            _, opcode, unique, *_ = wire.IN_HEADER.unpack_from(message)
            if opcode not in wire.UNANSWERED:
                waiting.append(unique)
        self._passed.clear()
        self._backlog.clear()
        for unique in waiting:
            self._answer(wire.error_answer(unique, errno.EIO))

    def _admits(self, message: bytes | memoryview) -> bool:
        _, opcode, *_ = wire.IN_HEADER.unpack_from(message)
        return opcode in wire.UNANSWERED or self._budget.admits(_longest_answer(opcode, message))

    def _try_send(self, message: memoryview) -> bool:
        """Send, or drop what needs no sending; False when it has to wait."""
        length, opcode, unique, node_id, *_ = wire.IN_HEADER.unpack_from(message)
        if length != len(message):
            self._refuse(opcode, unique, errno.EIO)
            return True
        if opcode == wire.INTERRUPT and not self._is_for_libfuse(message):
            return True
        if opcode in wire.UNANSWERED:
            return self._write(message, opcode, unique)
        message = _amend_request(opcode, message)
        cost = _longest_answer(opcode, message)
        if not self._budget.admits(cost):
            return False
        passed = _Passed(opcode, node_id, cost, _open_flags(opcode, message))
        if opcode == wire.INIT:
            self._offer = wire.parse_init_request(message)
        self._passed[unique] = passed
        self._budget.charge(cost)
        if self._write(message, opcode, unique):
            return True
        self._forget(unique)
        return False

    def _write(self, message: memoryview, opcode: int, unique: int) -> bool:
        try:
            os.write(self._fd, message)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _GONE:
                self._forget(unique)
                self._refuse(opcode, unique, error.errno or errno.EIO)
        return True

    def _is_for_libfuse(self, interrupt: memoryview) -> bool:
        if len(interrupt) < wire.REQUEST_BODY_AT + wire.INTERRUPT_IN.size:
            return False
        (unique,) = wire.INTERRUPT_IN.unpack_from(interrupt, wire.REQUEST_BODY_AT)
        return unique in self._passed

    def _refuse(self, opcode: int, unique: int, number: int) -> None:
        log.warning(
            "FUSE request %d of opcode %d cannot be passed on: errno %d", unique, opcode, number
        )
        if opcode not in wire.UNANSWERED:
            self._answer(wire.error_answer(unique, number))

    def _forget(self, unique: int) -> _Passed | None:
        passed = self._passed.pop(unique, None)
        if passed is not None:
            self._budget.refund(passed.cost)
        return passed

    def _take_answer(self, message: memoryview) -> None:
        if len(message) < wire.OUT_HEADER.size:
            return
        _, error, unique = wire.OUT_HEADER.unpack_from(message)
        if unique == 0:
            self._notify(bytes(message))
            return
        passed = self._forget(unique)
        if passed is not None and error == 0:
            self._amend_answer(passed, message)
        self._answer(message)
        if self._backlog:
            self._wake.set()

    def _amend_answer(self, passed: _Passed, message: memoryview) -> None:
        if passed.opcode == wire.INIT and self._offer is not None:
            wire.amend_init_answer(self._offer, message)
        elif passed.opcode == wire.OPEN:
            self._amend_open_answer(passed, message)

    def _amend_open_answer(self, passed: _Passed, message: memoryview) -> None:
        """Let direct writes to one file run side by side.

        The kernel does that only for handles that it knows to bypass its cache
        for good, so a handle opened with O_DIRECT is declared to.
        """
        if len(message) < wire.ANSWER_BODY_AT + wire.OPEN_OUT.size:
            return
        fh, flags = wire.OPEN_OUT.unpack_from(message, wire.ANSWER_BODY_AT)
        target = self._finder.hot_target(passed.node_id, fh)
        if target is None or not target.writable:
            return
        flags |= wire.OPEN_PARALLEL_DIRECT_WRITES
        if passed.open_flags & os.O_DIRECT:
            flags |= wire.OPEN_DIRECT_IO
        wire.OPEN_OUT.pack_into(message, wire.ANSWER_BODY_AT, fh, flags)


def _open_flags(opcode: int, message: memoryview) -> int:
    if opcode != wire.OPEN or len(message) < wire.REQUEST_BODY_AT + wire.OPEN_IN.size:
        return 0
    flags: int = wire.OPEN_IN.unpack_from(message, wire.REQUEST_BODY_AT)[0]
    return flags


def _longest_answer(opcode: int, message: bytes | memoryview) -> int:
    """What the longest answer to a request may take of the channel, in bytes."""
    body = message[wire.REQUEST_BODY_AT :]
    size = _ORDINARY_ANSWER
    if opcode in (wire.READDIR, wire.READDIRPLUS) and len(body) >= wire.SIZED_READ_IN.size:
        size = min(wire.SIZED_READ_IN.unpack_from(body)[2], _LISTING_LIMIT)
    elif opcode in (wire.GETXATTR, wire.LISTXATTR) and len(body) >= wire.XATTR_IN.size:
        size = wire.XATTR_IN.unpack_from(body)[0]
    return 2 * size + _MESSAGE_OVERHEAD


def _amend_request(opcode: int, message: memoryview) -> memoryview:
    """The message that libfuse is to see instead."""
    if opcode in (wire.READDIR, wire.READDIRPLUS):
        return _shorten_listing(message)
    if opcode == wire.SETXATTR and len(message) >= wire.SETXATTR_FLAGS_AT + wire.FLAGS2.size:
        # "Create" and "replace" mean nothing where setting is an act; pyfuse3
        # would refuse a replacement of what has no value to be read.
        amended = bytearray(message)
        wire.FLAGS2.pack_into(amended, wire.SETXATTR_FLAGS_AT, 0)
        return memoryview(amended)
    return message


def _shorten_listing(message: memoryview) -> memoryview:
    """Ask for no longer a listing than an ordinary user's channel can carry.

    The kernel passes a caller's buffer size on, up to 1 MiB; a listing that is
    cut short is continued by the next request.
    """
    if len(message) < wire.REQUEST_BODY_AT + wire.SIZED_READ_IN.size:
        return message
    fh, offset, size = wire.SIZED_READ_IN.unpack_from(message, wire.REQUEST_BODY_AT)
    if size <= _LISTING_LIMIT:
        return message
    amended = bytearray(message)
    wire.SIZED_READ_IN.pack_into(amended, wire.REQUEST_BODY_AT, fh, offset, _LISTING_LIMIT)
    return memoryview(amended)
