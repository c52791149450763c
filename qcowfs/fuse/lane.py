"""The fast lane: hot FUSE requests answered from nodes, all others passed on.

Owns the descriptor of the connection. READ, WRITE, FLUSH, FSYNC, FALLOCATE and
LSEEK are answered here; what else comes goes to libfuse through the channel of
`lane_peer` and back. It must not know names, attributes or formats.

Concurrency: one task (`_serve`) reads requests. What a node answers without
waiting is answered before the next request is read; anything else is answered
by a task of its own. Code between two awaits is atomic, so nothing is locked.

Invariants:
- Every request read here is answered exactly once, or passed on exactly once.
- `_request` is the buffer that the next message is read into; a waiting WRITE
  keeps its buffer, or a copy of its bytes, until its answer is written.
- Nothing is read while the bounds of `lane_tasks` and `lane_peer` are reached.
- No hot request is ever answered ENOSYS: the kernel would stop sending its kind.
"""

import enum
import errno
import logging
import os
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic, time_ns
from typing import Any, Final, Protocol

import trio
from trio.lowlevel import checkpoint, wait_readable

from qcowfs.driver.node import Node
from qcowfs.fuse import lane_ranges, wire
from qcowfs.fuse.files import HotTarget
from qcowfs.fuse.lane_buffers import MessageBuffer
from qcowfs.fuse.lane_peer import BACKLOG_LIMIT, PeerChannel
from qcowfs.fuse.lane_tasks import Answers, Tasks

log = logging.getLogger(__name__)

DEFAULT_POLL_US: Final = 50

_SMALL: Final = 32 << 10
"""Up to this many bytes a waiting request has memory of its own size."""

_WAITING_WRITERS: Final = 2
"""So many writes wait in nodes at a time; the others wait here, which is cheaper
than to contend for an image's lock, and go the short way once it is free."""

_TURN: Final = 300e-6
_TURN_BESIDE_TASKS: Final = 50e-6
"""Seconds after which other tasks get a turn, however many requests there are."""

_SPINS_A_CHECKPOINT: Final = 32

_WRITE_ANSWER: Final = struct.Struct("=IiQI4x")
_DSYNC: Final = os.O_DSYNC


class EndReason(enum.Enum):
    """Why the lane has nothing more to do."""

    UNMOUNTED = "unmounted"
    ABORTED = "connection aborted"
    PEER_CLOSED = "libfuse closed its end"


class HotOperations(Protocol):
    """What the lane asks of the filesystem's operations."""

    def hot_target(self, inode: int, fh: int, /) -> HotTarget | None:
        """None: not a file for the lane, `read` and `write` answer for it."""
        ...

    def hot_failed(self, node: Node, exception: Exception, /) -> None:
        """Log what deserves it; after an exception that nobody expected trust the node no more."""
        ...

    async def read(self, fh: Any, offset: int, size: int, /) -> bytes:
        """What pyfuse3 would be answered."""
        ...

    async def write(self, fh: Any, offset: int, data: Any, /) -> int:
        """The count of bytes written, past the end of a growable disk too."""
        ...

    async def getattr(self, inode: Any, ctx: Any = None, /) -> Any:
        """Attributes with an `st_size`."""
        ...


class Lane:
    """Serves one connection; `run` once, then `close`."""

    def __init__(
        self,
        kernel_fd: int,
        peer_socket_fd: int,
        operations: HotOperations,
        poll_us: int = DEFAULT_POLL_US,
    ) -> None:
        """Both descriptors non-blocking, the lane's from now on; see device.py.

        `poll_us`: microseconds after a request in which the next is awaited
        busily; 0 for never.
        """
        self._fd = kernel_fd
        self._peer_fd = peer_socket_fd
        self._operations = operations
        self._poll = poll_us / 1e6
        self._answers = Answers(kernel_fd, operations)
        self._write = self._answers.write
        self._peer = PeerChannel(
            peer_socket_fd, operations, self._write, self._queue_notification, self._on_room
        )
        self._tasks = Tasks(self._answers, self._libfuse_keeps_up)
        self._request = self._tasks.take_buffer()
        self._reply = self._tasks.take_buffer()
        self._write_slots = trio.Semaphore(_WAITING_WRITERS)
        self._notifications: deque[bytes] = deque()
        self._notified = trio.Event()
        self._end = EndReason.UNMOUNTED
        self._closed = False
        self._handlers: dict[int, Callable[[int, int, int], None]] = {
            wire.FLUSH: self._on_flush,
            wire.FSYNC: self._on_fsync,
            wire.FALLOCATE: self._on_fallocate,
            wire.LSEEK: self._on_lseek,
        }

    async def run(self) -> EndReason:
        """Serve until the mount is gone or libfuse has closed its end.

        Requests under way are finished first. If cancelled, they are answered
        EIO. The descriptors stay open: `close` after libfuse has ended.
        """
        try:
            async with trio.open_nursery() as requests, trio.open_nursery() as helpers:
                self._tasks.nursery = requests
                helpers.start_soon(self._peer.pump)
                helpers.start_soon(self._deliver_notifications)
                helpers.start_soon(self._watch_peer, helpers.cancel_scope)
                await self._serve()
                helpers.cancel_scope.cancel()
        finally:
            self._peer.abandon()
        return self._end

    def close(self) -> None:
        """Close both descriptors, which ends the connection; idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
            os.close(self._peer_fd)

    # Reading requests

    async def _serve(self) -> None:
        fd, readv, unpack = self._fd, os.readv, wire.HOT_REQUEST.unpack_from
        tasks = self._tasks
        turn_ends = monotonic() + _TURN
        while True:
            if tasks.is_full:
                await tasks.wait_for_room()
            request = self._request
            try:
                length = readv(fd, request.vector)
            except OSError:
                length = await self._next_request()
                turn_ends = monotonic() + _TURN
            if not length:
                return
            stated, opcode, unique, inode, fh, offset, size, flags = unpack(request.message)
            if stated != length or length < wire.REQUEST_BODY_AT:
                self._on_malformed(length, opcode, unique)
            elif opcode == wire.READ:
                self._on_read(unique, inode, fh, offset, size, length)
            elif opcode == wire.WRITE:
                self._on_write(unique, inode, fh, offset, size, flags, length)
            else:
                handler = self._handlers.get(opcode)
                if handler is not None:
                    handler(unique, inode, length)
                else:
                    self._pass_on(length)
                turn_ends = 0.0
            now = monotonic()
            if now >= turn_ends:
                await checkpoint()
                turn_ends = now + (_TURN_BESIDE_TASKS if tasks.count else _TURN)

    async def _next_request(self) -> int:
        """The length of the next request, or 0 at the end of the connection.

        Tries again for a bounded time before it sleeps: a client's next request
        comes sooner than a sleep and a wake-up take. Not while requests wait in
        tasks, which need the processor more. Yielding between two tries costs a
        third of a microsecond, and lets the client run where processors are few.
        """
        fd, vector, readv, give_way = self._fd, self._request.vector, os.readv, os.sched_yield
        stop_at = monotonic() + self._poll
        spins = 0
        while True:
            if self._tasks.is_full:
                await self._tasks.wait_for_room()
            try:
                return readv(fd, vector)
            except BlockingIOError:
                if self._tasks.count or monotonic() >= stop_at:
                    await wait_readable(fd)
                    continue
                give_way()
                spins += 1
                if spins % _SPINS_A_CHECKPOINT == 0 or self._peer.is_busy:
                    await checkpoint()
            except OSError as error:
                if error.errno == errno.ENOENT:
                    # The request was interrupted before it could be handed over.
                    continue
                if error.errno in (errno.ECONNABORTED, errno.ECONNRESET):
                    self._end = EndReason.ABORTED
                elif error.errno != errno.ENODEV:
                    raise
                return 0

    def _on_malformed(self, length: int, opcode: int, unique: int) -> None:
        log.warning("a FUSE request of %d bytes is malformed", length)
        if length >= wire.REQUEST_BODY_AT and opcode not in wire.UNANSWERED:
            self._answers.error(unique, errno.EIO)

    def _pass_on(self, length: int) -> None:
        self._peer.forward(self._request.message[:length])
        self._tasks.update_room()

    def _on_room(self) -> None:
        self._tasks.update_room()

    def _libfuse_keeps_up(self) -> bool:
        return self._peer.backlog_count < BACKLOG_LIMIT

    # READ

    def _on_read(
        self, unique: int, inode: int, fh: int, offset: int, size: int, length: int
    ) -> None:
        if size > wire.MAX_TRANSFER or length < wire.READ_REQUEST_LENGTH:
            self._answers.error(unique, errno.EINVAL)
            return
        target = self._operations.hot_target(inode, fh)
        if target is None:
            self._tasks.start(unique, None, self._read_elsewhere, unique, fh, offset, size)
            return
        node = target.node
        left = node.virtual_size - offset
        if size > left:
            size = max(left, 0)
        try:
            whole, body = self._reply.answer(size)
            if not size or node.try_read_into(offset, body):
                wire.OUT_HEADER.pack_into(whole, 0, wire.ANSWER_BODY_AT + size, 0, unique)
                self._write(whole)
                return
        except Exception as error:
            self._answers.fail(unique, node, error)
            return
        buffer = self._tasks.take_buffer() if size > _SMALL else None
        self._tasks.start(unique, node, self._read_later, unique, node, offset, size, buffer)

    async def _read_later(
        self, unique: int, node: Node, offset: int, size: int, buffer: MessageBuffer | None
    ) -> None:
        try:
            if buffer is None:
                whole = memoryview(bytearray(wire.ANSWER_BODY_AT + size))
            else:
                whole, _ = buffer.answer(size)
            await node.read_into(offset, whole[wire.ANSWER_BODY_AT :])
            wire.OUT_HEADER.pack_into(whole, 0, len(whole), 0, unique)
            self._write(whole)
        finally:
            if buffer is not None:
                self._tasks.return_buffer(buffer)

    async def _read_elsewhere(self, unique: int, fh: int, offset: int, size: int) -> None:
        self._write(wire.body_answer(unique, await self._operations.read(fh, offset, size)))

    # WRITE

    def _on_write(
        self, unique: int, inode: int, fh: int, offset: int, size: int, flags: int, length: int
    ) -> None:
        if size > wire.MAX_TRANSFER or length != wire.WRITE_DATA_AT + size:
            self._answers.error(unique, errno.EINVAL)
            return
        target = self._operations.hot_target(inode, fh)
        if target is None or not target.writable:
            self._start_write(self._write_elsewhere, unique, None, size, inode, fh, offset, flags)
            return
        node = target.node
        data = self._request.data(size)
        if size > node.virtual_size - offset:
            self._start_write(self._write_elsewhere, unique, node, size, inode, fh, offset, flags)
            return
        try:
            written = node.try_write(offset, data)
        except Exception as error:
            self._answers.fail(unique, node, error)
            return
        if not written:
            self._start_write(self._write_later, unique, node, size, target, offset, flags)
            return
        target.touch()
        if flags & _DSYNC:
            self._tasks.start(unique, node, self._sync_write, unique, node, size)
        else:
            self._write(_WRITE_ANSWER.pack(_WRITE_ANSWER.size, 0, unique, size))

    def _start_write(
        self,
        function: Callable[..., Awaitable[None]],
        unique: int,
        node: Node | None,
        size: int,
        *arguments: object,
    ) -> None:
        """Let `function` write the request's bytes, which stay as they are meanwhile."""
        kept: MessageBuffer | None = None
        data: bytes | memoryview = self._request.data(size)
        if size <= _SMALL:
            data = bytes(data)
        else:
            kept, self._request = self._request, self._tasks.take_buffer()
        self._tasks.begin_change()
        self._tasks.start(unique, node, self._run_write, kept, function, unique, data, *arguments)

    async def _run_write(
        self, kept: MessageBuffer | None, function: Callable[..., Awaitable[None]], *arguments: Any
    ) -> None:
        try:
            await function(*arguments)
        finally:
            if kept is not None:
                self._tasks.return_buffer(kept)
            self._tasks.end_change()

    async def _write_later(
        self, unique: int, data: bytes | memoryview, target: HotTarget, offset: int, flags: int
    ) -> None:
        node = target.node
        async with self._write_slots:
            # What it had to wait for may be over; then others need not wait for this one.
            if not node.try_write(offset, data):
                await node.write_from(offset, data)
        target.touch()
        if flags & _DSYNC:
            await node.flush()
        self._write(_WRITE_ANSWER.pack(_WRITE_ANSWER.size, 0, unique, len(data)))

    async def _write_elsewhere(
        self, unique: int, data: bytes | memoryview, inode: int, fh: int, offset: int, flags: int
    ) -> None:
        """Past the end of a disk, or a file that the lane does not serve."""
        count = await self._operations.write(fh, offset, data)
        target = self._operations.hot_target(inode, fh)
        if flags & _DSYNC and target is not None:
            await target.node.flush()
        self._write(_WRITE_ANSWER.pack(_WRITE_ANSWER.size, 0, unique, count))

    async def _sync_write(self, unique: int, node: Node, size: int) -> None:
        """End a write that promises durability; the kernel asks for no FSYNC after a direct one."""
        await node.flush()
        self._write(_WRITE_ANSWER.pack(_WRITE_ANSWER.size, 0, unique, size))

    # FLUSH, FSYNC, FALLOCATE, LSEEK

    def _body(self, layout: struct.Struct, unique: int, length: int) -> tuple[int, ...] | None:
        """The fields of the request's body; None, and answered, when it is too short."""
        if length < wire.REQUEST_BODY_AT + layout.size:
            self._answers.error(unique, errno.EINVAL)
            return None
        return layout.unpack_from(self._request.message, wire.REQUEST_BODY_AT)

    def _on_flush(self, unique: int, inode: int, length: int) -> None:
        body = self._body(wire.FLUSH_OR_FSYNC_IN, unique, length)
        if body is None:
            return
        target = self._operations.hot_target(inode, body[0])
        if target is None:
            self._pass_on(length)
        elif not target.writable or target.changed_ns <= target.flushed_ns:
            self._answers.done(unique)
        else:
            self._tasks.start(unique, target.node, self._flush, unique, target)

    def _on_fsync(self, unique: int, inode: int, length: int) -> None:
        body = self._body(wire.FLUSH_OR_FSYNC_IN, unique, length)
        if body is None:
            return
        target = self._operations.hot_target(inode, body[0])
        if target is None:
            self._pass_on(length)
        else:
            # A read-only handle too may ask for what others have written, and a
            # node in failsafe has to say that it lost something.
            self._tasks.start(unique, target.node, self._flush, unique, target)

    async def _flush(self, unique: int, target: HotTarget) -> None:
        begun_ns = time_ns()
        await target.node.flush()
        target.flushed_ns = max(target.flushed_ns, begun_ns)
        self._answers.done(unique)

    def _on_fallocate(self, unique: int, inode: int, length: int) -> None:
        body = self._body(wire.FALLOCATE_IN, unique, length)
        if body is None:
            return
        fh, offset, range_length, mode = body
        target = self._operations.hot_target(inode, fh)
        if target is None:
            self._answers.error(unique, errno.EOPNOTSUPP)
            return
        self._tasks.start(
            unique, target.node, self._fallocate, unique, target, offset, range_length, mode
        )

    async def _fallocate(
        self, unique: int, target: HotTarget, offset: int, length: int, mode: int
    ) -> None:
        self._tasks.begin_change()
        try:
            await lane_ranges.change_range(target, offset, length, mode, self._tasks.alone)
        finally:
            self._tasks.end_change()
        self._answers.done(unique)

    def _on_lseek(self, unique: int, inode: int, length: int) -> None:
        body = self._body(wire.LSEEK_IN, unique, length)
        if body is None:
            return
        fh, offset, whence = body
        target = self._operations.hot_target(inode, fh)
        if target is None:
            self._tasks.start(unique, None, self._seek_elsewhere, unique, inode, offset, whence)
        else:
            self._tasks.start(unique, target.node, self._seek, unique, target.node, offset, whence)

    async def _seek(self, unique: int, node: Node, offset: int, whence: int) -> None:
        found = await lane_ranges.seek(node, offset, whence)
        self._write(wire.body_answer(unique, wire.LSEEK_OUT.pack(found)))

    async def _seek_elsewhere(self, unique: int, inode: int, offset: int, whence: int) -> None:
        """A file without a node is all data; libfuse would answer ENOSYS, for every file."""
        size = (await self._operations.getattr(inode, None)).st_size
        if offset >= size:
            lane_ranges.refuse(errno.ENXIO)
        found = offset if whence == os.SEEK_DATA else size
        self._write(wire.body_answer(unique, wire.LSEEK_OUT.pack(found)))

    # The other side

    async def _watch_peer(self, everything: trio.CancelScope) -> None:
        await self._peer.receive()
        self._end = EndReason.PEER_CLOSED
        everything.cancel()

    def _queue_notification(self, message: bytes) -> None:
        self._notifications.append(message)
        self._notified.set()

    async def _deliver_notifications(self) -> None:
        """Pass notifications on, in order, from a thread.

        The kernel takes one only when it holds the directory or the pages
        concerned, which a request may have locked that waits for this lane.
        """
        while True:
            while self._notifications:
                message = self._notifications.popleft()
                await trio.to_thread.run_sync(self._write, message, abandon_on_cancel=True)
            self._notified = trio.Event()
            await self._notified.wait()
