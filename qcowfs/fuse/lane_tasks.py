"""What the lane's requests share: answers to the kernel, tasks, buffers, and their bounds.

Knows of the protocol how an error is answered, and no opcode.

Invariants: at most MAX_TASKS requests wait at a time, in at most _MAX_BUFFERS
large buffers; `is_full` says whether one more request, whatever it is, could be
taken in; while `alone` is entered no request is read and no other one changes
a node; an answer's refusal by the kernel never reaches a request.
"""

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

import trio

from qcowfs.driver.node import Node
from qcowfs.fuse import wire
from qcowfs.fuse.kernel import is_expected, to_errno
from qcowfs.fuse.lane_buffers import BufferPool, MessageBuffer

log = logging.getLogger(__name__)

MAX_TASKS: Final = 64

_MAX_BUFFERS: Final = 18
"""One to read into, one to answer from, and 16 for requests that wait."""

_LOST_ANSWER: Final = frozenset(
    {
        errno.ENOENT,
        errno.ENODEV,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ECONNRESET,
        errno.EBADF,
    }
)
"""ENOENT: the caller was killed meanwhile. The others: there is no connection any more."""


class FailureListener(Protocol):
    """Who is told of the exceptions that nodes raise."""

    def hot_failed(self, node: Node, exception: Exception, /) -> None:
        """Log what deserves it; after one that nobody expected trust the node no more."""
        ...


class Answers:
    """Writes answers to the kernel."""

    def __init__(self, kernel_fd: int, listener: FailureListener) -> None:
        self._fd = kernel_fd
        self._listener = listener

    def write(self, message: bytes | bytearray | memoryview) -> None:
        """Hand a whole message to the kernel, which takes it at once or not at all."""
        try:
            os.write(self._fd, message)
        except OSError as error:
            if error.errno not in _LOST_ANSWER:
                log.warning("the kernel refused an answer: %s", error)

    def done(self, unique: int) -> None:
        """Answer success, without a body."""
        self.write(wire.error_answer(unique, 0))

    def error(self, unique: int, number: int) -> None:
        """Answer an errno that is one of the kernel's own and not ENOSYS."""
        self.write(wire.error_answer(unique, number))

    def fail(self, unique: int, node: Node | None, error: Exception) -> None:
        """Answer an exception; who judges those of nodes is told."""
        if node is not None:
            self._listener.hot_failed(node, error)
        elif not is_expected(error):
            log.error("a FUSE request failed", exc_info=error)
        number = to_errno(error)
        if number == errno.ENOSYS:
            number = errno.EOPNOTSUPP
        elif not 0 < number <= wire.MAX_KERNEL_ERRNO:
            number = errno.EIO
        self.error(unique, number)


class Tasks:
    """Requests that have to wait for something, and what bounds them."""

    def __init__(self, answers: Answers, has_room: Callable[[], bool]) -> None:
        """`has_room` speaks for bounds that lie elsewhere; `update_room` asks it."""
        self._answers = answers
        self._has_room = has_room
        self._pool = BufferPool(_MAX_BUFFERS)
        self._change_count = 0
        self._changes_done = trio.Event()
        self._alone_lock = trio.Lock()
        self._is_alone = False
        self._room = trio.Event()
        self.nursery: trio.Nursery | None = None
        self.count = 0
        self.is_full = False

    def start(
        self,
        unique: int,
        node: Node | None,
        function: Callable[..., Awaitable[None]],
        *arguments: object,
    ) -> None:
        """Run `function`, which answers the request; its exception is answered for it."""
        assert self.nursery is not None
        self.count += 1
        self.update_room()
        self.nursery.start_soon(self._run, unique, node, function, arguments)

    async def _run(
        self,
        unique: int,
        node: Node | None,
        function: Callable[..., Awaitable[None]],
        arguments: tuple[object, ...],
    ) -> None:
        try:
            await function(*arguments)
        except Exception as error:
            self._answers.fail(unique, node, error)
        except trio.Cancelled:
            self._answers.error(unique, errno.EIO)
            raise
        finally:
            self.count -= 1
            self.update_room()

    def take_buffer(self) -> MessageBuffer:
        """A large buffer of one's own; there is one for each request that was let in."""
        buffer = self._pool.take()
        self.update_room()
        return buffer

    def return_buffer(self, buffer: MessageBuffer) -> None:
        """Give a buffer back; none of its views may be used any more."""
        self._pool.give_back(buffer)
        self.update_room()

    def update_room(self) -> None:
        """Find out anew whether `is_full`, and wake who waits when it is not."""
        self.is_full = (
            self.count >= MAX_TASKS
            or self._pool.free_count < 1
            or self._is_alone
            or not self._has_room()
        )
        if not self.is_full:
            self._room.set()

    async def wait_for_room(self) -> None:
        """Return when a request may be read."""
        while self.is_full:
            self._room = trio.Event()
            await self._room.wait()

    def begin_change(self) -> None:
        """Count a request that will change a node; `end_change` must follow."""
        self._change_count += 1

    def end_change(self) -> None:
        """The request has made its change, or failed to."""
        self._change_count -= 1
        if not self._change_count:
            self._changes_done.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep every other change away; entered between begin_change and end_change.

        Changes under way are waited for. Reading requests stops meanwhile.
        """
        self.end_change()
        try:
            async with self._alone_lock:
                self._is_alone = True
                self.update_room()
                try:
                    while self._change_count:
                        self._changes_done = trio.Event()
                        await self._changes_done.wait()
                    yield
                finally:
                    self._is_alone = False
                    self.update_room()
        finally:
            self.begin_change()
