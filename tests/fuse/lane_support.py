"""A lane without a kernel: sockets in place of /dev/fuse and libfuse, nodes in memory."""

import errno
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.fuse import device, wire
from qcowfs.fuse.files import HotTarget
from qcowfs.fuse.lane import EndReason, Lane

DISK_INODE = 2
OTHER_INODE = 9
WRITABLE_FH = 5
READ_ONLY_FH = 4
OTHER_FH = 99
PATIENCE = 30

MIB = 1 << 20


class MemoryNode:
    """A disk in a bytearray; `waits` makes every request take the asynchronous way.

    While `gate` is a new Event, asynchronous requests stay under way until it is set.
    `hole` is a range that reads as zeros without being stored.
    """

    format_name = "raw"
    cluster_size = 4096
    backing = None

    def __init__(self, size: int = 4 * MIB, *, waits: bool = False) -> None:
        self.name = "memory"
        self.content = bytearray(size)
        self.waits = waits
        self.read_only = False
        self.failure: Exception | None = None
        self.gate = trio.Event()
        self.gate.set()
        self.under_way = 0
        self.most_under_way = 0
        self.calls: list[tuple[Any, ...]] = []
        self.hole = (0, 0)

    @property
    def virtual_size(self) -> int:
        return len(self.content)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def _wait(self) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
            self._fail()
        finally:
            self.under_way -= 1

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        if self.waits:
            return False
        self._fail()
        buffer[:] = self.content[guest_offset : guest_offset + len(buffer)]
        return True

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        await self._wait()
        buffer[:] = self.content[guest_offset : guest_offset + len(buffer)]

    def try_write(self, guest_offset: int, data: bytes | memoryview) -> bool:
        if self.waits:
            return False
        self._fail()
        self.content[guest_offset : guest_offset + len(data)] = data
        return True

    async def write_from(self, guest_offset: int, data: bytes | memoryview) -> None:
        await self._wait()
        self.calls.append(("write", guest_offset, len(data)))
        self.content[guest_offset : guest_offset + len(data)] = data

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        await self._wait()
        self.calls.append(("zeroes", guest_offset, length, unmap))
        self.content[guest_offset : guest_offset + length] = bytes(length)

    async def discard(self, guest_offset: int, length: int) -> None:
        raise AssertionError("a discard may leave bytes as they were")

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> Sequence[Extent]:
        self._fail()
        found = []
        end = guest_offset + length
        while guest_offset < end:
            start, stop = self.hole
            in_hole = start <= guest_offset < stop
            next_change = min(e for e in (start, stop, end) if e > guest_offset)
            kind = ExtentKind.ZERO if in_hole else ExtentKind.DATA
            part = min(next_change, end) - guest_offset
            found.append(Extent(kind, guest_offset, part, None if in_hole else guest_offset))
            guest_offset += part
        return found

    async def flush(self) -> None:
        await self._wait()
        self.calls.append(("flush",))

    async def aclose(self) -> None:
        return


class FakeOperations:
    """Operations of one disk, and of another file that the lane does not serve."""

    def __init__(self, node: MemoryNode, *, growable: bool = False) -> None:
        self.node = node
        self.writable = HotTarget(node, True, growable)
        self.read_only = HotTarget(node, False)
        self.failures: list[Exception] = []
        self.writes: list[tuple[int, int, int]] = []
        self.other = b"not a disk"

    def hot_target(self, inode: int, fh: int) -> HotTarget | None:
        return {WRITABLE_FH: self.writable, READ_ONLY_FH: self.read_only}.get(fh)

    def hot_failed(self, node: Any, exception: Exception) -> None:
        assert node is self.node
        self.failures.append(exception)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self.other[off : off + size]

    async def write(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        self.writes.append((fh, off, len(buf)))
        count = min(len(buf), self.node.virtual_size - off)
        if fh != WRITABLE_FH or count <= 0:
            raise OSError(errno.EBADF if fh != WRITABLE_FH else errno.ENOSPC, "no")
        await self.node.write_from(off, buf[:count])
        return count

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return SimpleNamespace(st_size=len(self.other))


def transfer(fh: int, offset: int, size: int, data: bytes = b"", flags: int = 0) -> bytes:
    """The body of a READ or WRITE."""
    return struct.pack("=QQIIQII", fh, offset, size, 0, 0, flags, 0) + data


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds, which other tasks bring about."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


class Harness:
    """The kernel's and libfuse's side of a lane."""

    def __init__(self, lane: Lane, kernel: int, libfuse: int) -> None:
        self.lane = lane
        self.kernel = kernel
        self.libfuse = libfuse
        self.end: EndReason | None = None
        self.scope = trio.CancelScope()
        self._unique = 0
        self._answers: dict[int, tuple[int, bytes]] = {}

    async def run(self) -> None:
        with self.scope:
            self.end = await self.lane.run()

    async def send_raw(self, message: bytes) -> None:
        while True:
            try:
                os.write(self.kernel, message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.kernel)

    async def send(self, opcode: int, body: bytes = b"", inode: int = DISK_INODE) -> int:
        """Put a request to the lane; its unique."""
        self._unique += 2
        header = wire.IN_HEADER.pack(
            wire.IN_HEADER.size + len(body), opcode, self._unique, inode, 0, 0, 1, 0, 0
        )
        await self.send_raw(header + body)
        return self._unique

    async def receive(self) -> bytes:
        """The next message that the kernel is handed."""
        while True:
            try:
                return os.read(self.kernel, 2 * MIB)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.kernel)

    async def answer(self, unique: int) -> tuple[int, bytes]:
        """(errno or 0, body) of the answer to a request; each is answered once."""
        while unique not in self._answers:
            message = await self.receive()
            length, error, answered = wire.OUT_HEADER.unpack_from(message)
            assert length == len(message)
            assert answered not in self._answers
            self._answers[answered] = (-error, message[16:])
        return self._answers.pop(unique)

    async def ask(
        self, opcode: int, body: bytes = b"", inode: int = DISK_INODE
    ) -> tuple[int, bytes]:
        return await self.answer(await self.send(opcode, body, inode))

    async def read(self, offset: int, size: int, fh: int = WRITABLE_FH) -> tuple[int, bytes]:
        return await self.ask(wire.READ, transfer(fh, offset, size))

    async def write(
        self, offset: int, data: bytes, fh: int = WRITABLE_FH, flags: int = 0
    ) -> tuple[int, int]:
        body = transfer(fh, offset, len(data), data, flags)
        error, answer = await self.ask(wire.WRITE, body)
        return error, struct.unpack("=I4x", answer)[0] if not error else 0

    async def fallocate(self, offset: int, length: int, mode: int, fh: int = WRITABLE_FH) -> int:
        error, _ = await self.ask(wire.FALLOCATE, wire.FALLOCATE_IN.pack(fh, offset, length, mode))
        return error

    async def peer_receive(self) -> bytes:
        """The next message that libfuse is handed."""
        while True:
            try:
                return os.read(self.libfuse, 2 * MIB)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.libfuse)

    def peer_is_silent(self) -> bool:
        """Whether libfuse has been handed nothing more."""
        try:
            os.read(self.libfuse, 2 * MIB)
        except BlockingIOError:
            return True
        return False

    def peer_answer(self, request: bytes, body: bytes = b"", error: int = 0) -> bytes:
        """Answer a request as libfuse; the message that it sent."""
        _, _, unique, *_ = wire.IN_HEADER.unpack_from(request)
        message = wire.OUT_HEADER.pack(16 + len(body), -error, unique) + body
        os.write(self.libfuse, message)
        return message

    def close_libfuse(self) -> None:
        if self.libfuse >= 0:
            os.close(self.libfuse)
            self.libfuse = -1

    def close_kernel(self) -> None:
        if self.kernel >= 0:
            os.close(self.kernel)
            self.kernel = -1


@asynccontextmanager
async def lane_of(operations: FakeOperations, poll_us: int = 0) -> AsyncIterator[Harness]:
    """A running lane over `operations`; ended and closed on the way out."""
    kernel, lane_kernel = device.open_channel()
    lane_peer, libfuse = device.open_channel()
    lane = Lane(lane_kernel, lane_peer, operations, poll_us)
    harness = Harness(lane, kernel, libfuse)
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(harness.run)
                yield harness
                operations.node.gate.set()
                harness.close_kernel()
    finally:
        harness.close_kernel()
        harness.close_libfuse()
        lane.close()
