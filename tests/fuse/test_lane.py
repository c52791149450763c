"""The lane driven message by message, over sockets in place of /dev/fuse."""

import errno
import os
import struct

import hypothesis
import pytest
import trio
from hypothesis import strategies

from qcowfs.errors import CorruptImage, ImageFull, ReadOnlyImage
from qcowfs.fuse import device, wire
from qcowfs.fuse.lane import EndReason
from qcowfs.fuse.lane_peer import BACKLOG_LIMIT
from qcowfs.fuse.lane_tasks import MAX_TASKS
from tests.fuse.lane_support import (
    DISK_INODE,
    MIB,
    OTHER_FH,
    OTHER_INODE,
    READ_ONLY_FH,
    WRITABLE_FH,
    FakeOperations,
    MemoryNode,
    lane_of,
    transfer,
    until,
)

GETATTR = 3
LOOKUP = 1
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


def patterned(size: int = 4 * MIB, *, waits: bool = False) -> MemoryNode:
    node = MemoryNode(size, waits=waits)
    node.content[:] = (bytes(range(256)) * (size // 256 + 1))[:size]
    return node


# READ


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
@pytest.mark.parametrize("size", [1, 4096, 100_000, MIB])
async def test_read(waits: bool, size: int) -> None:
    """A READ is answered with exactly its bytes, whether the node has to wait or not."""
    node = patterned(waits=waits)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.read(12_345, size) == (0, bytes(node.content[12_345 : 12_345 + size]))


async def test_read_after_polling() -> None:
    """With polling on, requests that come late or at once are answered the same."""
    node = patterned()
    async with lane_of(FakeOperations(node), poll_us=1000) as harness:
        for offset in range(0, 4096 * 20, 4096):
            assert await harness.read(offset, 512) == (
                0,
                bytes(node.content[offset : offset + 512]),
            )
            if offset % 8192:
                await trio.sleep(0.003)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
async def test_read_across_the_end(waits: bool) -> None:
    """A read that crosses the end is short, one at or past it empty."""
    node = patterned(10_000, waits=waits)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.read(9_000, 4096) == (0, bytes(node.content[9_000:]))
        assert await harness.read(10_000, 4096) == (0, b"")
        assert await harness.read(1 << 62, 4096) == (0, b"")


async def test_read_of_a_file_without_a_node() -> None:
    """What the lane does not serve is read through the operations."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        body = transfer(OTHER_FH, 4, 100)
        assert await harness.ask(wire.READ, body, OTHER_INODE) == (0, b"a disk")
        assert harness.peer_is_silent()


async def test_read_tasks_are_bounded() -> None:
    """However many reads come, only so many are under way, and all are answered."""
    node = patterned(waits=True)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node)) as harness:
        uniques = [
            await harness.send(wire.READ, transfer(WRITABLE_FH, number, 16))
            for number in range(3 * MAX_TASKS)
        ]
        await until(lambda: node.under_way == MAX_TASKS)
        await trio.testing.wait_all_tasks_blocked()
        node.gate.set()
        for number, unique in enumerate(uniques):
            assert await harness.answer(unique) == (0, bytes(node.content[number : number + 16]))
    assert node.most_under_way == MAX_TASKS


# WRITE


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
@pytest.mark.parametrize("size", [1, 4096, 100_000, MIB])
async def test_write(waits: bool, size: int) -> None:
    """A WRITE reaches the node whole and is answered with its length."""
    node = MemoryNode(waits=waits)
    operations = FakeOperations(node)
    data = os.urandom(size)
    async with lane_of(operations) as harness:
        assert await harness.write(777, data) == (0, size)
    assert node.content[777 : 777 + size] == data
    assert operations.writable.changed_ns > 0


async def test_waiting_writes_keep_their_bytes() -> None:
    """Later messages never reach into the bytes of a write that waits."""
    node = MemoryNode(32 * MIB, waits=True)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node)) as harness:
        uniques = []
        for number in range(60):
            size = MIB // 2 if number % 3 else 3000
            data = bytes([number + 1]) * size
            body = transfer(WRITABLE_FH, number * MIB // 2, size, data)
            uniques.append((await harness.send(wire.WRITE, body), size))
            if number == 10:
                node.gate.set()
        for unique, size in uniques:
            assert await harness.answer(unique) == (0, struct.pack("=I4x", size))
    for number in range(60):
        assert node.content[number * MIB // 2] == number + 1
        assert node.content[number * MIB // 2 + 2999] == number + 1


async def test_write_across_the_end() -> None:
    """It goes to the operations, which write what fits and refuse what does not."""
    node = MemoryNode(10_000)
    operations = FakeOperations(node)
    async with lane_of(operations) as harness:
        assert await harness.write(9_000, bytes(4096)) == (0, 1000)
        assert await harness.write(10_000, bytes(10)) == (errno.ENOSPC, 0)
    assert operations.writes == [(WRITABLE_FH, 9_000, 4096), (WRITABLE_FH, 10_000, 10)]


async def test_write_on_a_handle_that_may_not() -> None:
    """A handle opened for reading writes nothing."""
    node = MemoryNode()
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.write(0, b"x", fh=READ_ONLY_FH) == (errno.EBADF, 0)
    assert not any(node.content)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
async def test_write_that_promises_durability(waits: bool) -> None:
    """O_DSYNC: the node is flushed before the answer."""
    node = MemoryNode(waits=waits)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.write(0, b"abc", flags=os.O_DSYNC) == (0, 3)
        assert node.calls[-1] == ("flush",)


# Errors


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (CorruptImage("L2 entry 7 is 0x1"), errno.EIO),
        (ImageFull("no room"), errno.ENOSPC),
        (ReadOnlyImage("failsafe"), errno.EROFS),
        (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
        (OSError(errno.ENOSYS, "a host that cannot"), errno.EOPNOTSUPP),
        (OSError(524, "an errno of the kernel's own"), errno.EIO),
        (OSError("no errno at all"), errno.EIO),
        (ZeroDivisionError("a fault of ours"), errno.EIO),
    ],
)
async def test_errors(waits: bool, failure: Exception, number: int) -> None:
    """A node's exception is answered by its errno, and the operations are told; nothing ends."""
    node = MemoryNode(waits=waits)
    node.failure = failure
    operations = FakeOperations(node)
    async with lane_of(operations) as harness:
        assert await harness.read(0, 512) == (number, b"")
        assert await harness.write(0, bytes(40_000)) == (number, 0)
        assert operations.failures == [failure, failure]
        node.failure = None
        assert (await harness.read(0, 512))[0] == 0


# FLUSH and FSYNC


async def test_flush_only_of_what_changed() -> None:
    """A close commits once what was written before it, and costs nothing otherwise."""
    node = MemoryNode()
    async with lane_of(FakeOperations(node)) as harness:
        flush = wire.FLUSH_OR_FSYNC_IN.pack(WRITABLE_FH, 0) + bytes(8)
        assert await harness.ask(wire.FLUSH, flush) == (0, b"")
        assert node.calls == []
        await harness.write(0, b"x")
        assert await harness.ask(wire.FLUSH, flush) == (0, b"")
        assert await harness.ask(wire.FLUSH, flush) == (0, b"")
    assert node.calls == [("flush",)]


@pytest.mark.parametrize("fh", [WRITABLE_FH, READ_ONLY_FH])
async def test_fsync_always_flushes(fh: int) -> None:
    """An fsync reaches the node through any handle, for others may have written."""
    node = MemoryNode()
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.ask(wire.FSYNC, wire.FLUSH_OR_FSYNC_IN.pack(fh, 1)) == (0, b"")
    assert node.calls == [("flush",)]


async def test_fsync_of_an_image_in_failsafe() -> None:
    """A node that has turned read-only is asked too: only it knows what it has lost."""
    node = MemoryNode()
    node.read_only = True
    node.failure = ReadOnlyImage("in failsafe")
    async with lane_of(FakeOperations(node)) as harness:
        body = wire.FLUSH_OR_FSYNC_IN.pack(READ_ONLY_FH, 0)
        assert await harness.ask(wire.FSYNC, body) == (errno.EROFS, b"")


async def test_fsync_that_fails() -> None:
    """The errno of a failed flush is the answer."""
    node = MemoryNode()
    node.failure = OSError(errno.EIO, "disk gone")
    async with lane_of(FakeOperations(node)) as harness:
        body = wire.FLUSH_OR_FSYNC_IN.pack(WRITABLE_FH, 0)
        assert await harness.ask(wire.FSYNC, body) == (errno.EIO, b"")


# FALLOCATE


async def test_punch_hole() -> None:
    """PUNCH_HOLE zeroes the range and gives its clusters back; the size stays."""
    node = patterned(100_000)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(1000, 5000, PUNCH_HOLE | KEEP_SIZE) == 0
    assert node.calls == [("zeroes", 1000, 5000, True)]


@pytest.mark.parametrize("mode", [ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
async def test_zero_range(mode: int) -> None:
    """ZERO_RANGE zeroes the range and keeps its clusters."""
    node = patterned(100_000)
    operations = FakeOperations(node)
    async with lane_of(operations) as harness:
        assert await harness.fallocate(1000, 5000, mode) == 0
    assert node.calls == [("zeroes", 1000, 5000, False)]
    assert operations.writable.changed_ns > 0


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE | KEEP_SIZE, KEEP_SIZE])
async def test_fallocate_across_the_end(mode: int) -> None:
    """With KEEP_SIZE what lies behind the end is left out."""
    node = patterned(10_000)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(9_000, 5000, mode) == 0
        assert await harness.fallocate(20_000, 5000, mode) == 0
    assert node.virtual_size == 10_000
    assert all(call[2] == 1000 for call in node.calls)


@pytest.mark.parametrize("mode", [0, ZERO_RANGE])
async def test_fallocate_would_grow(mode: int) -> None:
    """Without KEEP_SIZE a range behind the end is refused on a disk that does not grow."""
    node = patterned(10_000)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(9_000, 5000, mode) == errno.ENOSPC
        assert await harness.fallocate(9_000, 1 << 63, mode) == errno.EFBIG
    assert node.calls == []


async def test_fallocate_grows_a_growable_disk() -> None:
    """Without KEEP_SIZE and with -o growable the disk becomes longer, in whole sectors."""

    class GrowingNode(MemoryNode):
        async def grow(self, size: int) -> None:
            self.content.extend(bytes(size - len(self.content)))

    node = GrowingNode(10_240)
    async with lane_of(FakeOperations(node, growable=True)) as harness:
        assert await harness.fallocate(9_000, 5000, ZERO_RANGE) == 0
    assert node.virtual_size == 14_336
    assert node.calls == [("zeroes", 9_000, 5000, False)]


@pytest.mark.parametrize("mode", [PUNCH_HOLE, COLLAPSE, 32, 64, ZERO_RANGE | PUNCH_HOLE, 1 << 31])
async def test_fallocate_of_other_modes(mode: int) -> None:
    """What is not understood is EOPNOTSUPP and changes nothing."""
    node = patterned(10_000)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(0, 5000, mode) == errno.EOPNOTSUPP
    assert node.calls == []


async def test_fallocate_where_nothing_may_change() -> None:
    """A read-only handle is EBADF, a read-only image EROFS, a file without a node EOPNOTSUPP."""
    node = patterned(10_000)
    async with lane_of(FakeOperations(node)) as harness:
        mode = PUNCH_HOLE | KEEP_SIZE
        assert await harness.fallocate(0, 5000, mode, fh=READ_ONLY_FH) == errno.EBADF
        assert await harness.fallocate(0, 5000, mode, fh=OTHER_FH) == errno.EOPNOTSUPP
        node.read_only = True
        assert await harness.fallocate(0, 5000, mode) == errno.EROFS
    assert node.calls == []


async def test_allocate_asks_the_node() -> None:
    """Mode 0 is the node's own business where it knows how."""

    class AllocatingNode(MemoryNode):
        async def allocate(self, guest_offset: int, length: int) -> None:
            self.calls.append(("allocate", guest_offset, length))

    node = AllocatingNode()
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(1000, 5000, 0) == 0
    assert node.calls == [("allocate", 1000, 5000)]


async def test_allocate_by_writing_back() -> None:
    """Elsewhere what has no clusters is written as it reads, and what has is left alone."""
    node = patterned(4 * MIB)
    node.hole = (MIB, 3 * MIB + 512)
    node.content[MIB : 3 * MIB + 512] = bytes(2 * MIB + 512)
    before = bytes(node.content)
    async with lane_of(FakeOperations(node)) as harness:
        assert await harness.fallocate(0, 4 * MIB, 0) == 0
    assert bytes(node.content) == before
    assert node.calls == [("write", MIB, MIB), ("write", 2 * MIB, MIB), ("write", 3 * MIB, 512)]


async def test_allocate_by_writing_back_keeps_writers_away() -> None:
    """A write under way is waited for, a later one is not read before the allocation is done."""
    node = MemoryNode(MIB, waits=True)
    node.hole = (0, MIB)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node)) as harness:
        first = await harness.send(wire.WRITE, transfer(WRITABLE_FH, 0, 3, b"one"))
        allocation = await harness.send(
            wire.FALLOCATE, wire.FALLOCATE_IN.pack(WRITABLE_FH, 0, MIB, 0)
        )
        await until(lambda: node.under_way > 0)
        await trio.testing.wait_all_tasks_blocked()
        second = await harness.send(wire.WRITE, transfer(WRITABLE_FH, 3, 3, b"two"))
        await trio.testing.wait_all_tasks_blocked()
        assert node.under_way == 1
        node.gate.set()
        for unique in (first, allocation, second):
            assert (await harness.answer(unique))[0] == 0
    assert node.calls == [("write", 0, 3), ("write", 0, MIB), ("write", 3, 3)]
    assert node.content[:6] == b"onetwo"


# LSEEK


async def seek(harness: object, offset: int, whence: int, fh: int = READ_ONLY_FH) -> object:
    error, body = await harness.ask(  # type: ignore[attr-defined]
        wire.LSEEK, wire.LSEEK_IN.pack(fh, offset, whence), DISK_INODE
    )
    return error or wire.LSEEK_OUT.unpack(body)[0]


async def test_seek() -> None:
    """Holes and data are found from anywhere; the end is a hole."""
    node = patterned(100_000)
    node.hole = (20_000, 50_000)

    async with lane_of(FakeOperations(node)) as harness:
        assert await seek(harness, 0, os.SEEK_DATA) == 0
        assert await seek(harness, 0, os.SEEK_HOLE) == 20_000
        assert await seek(harness, 20_000, os.SEEK_DATA) == 50_000
        assert await seek(harness, 30_000, os.SEEK_HOLE) == 30_000
        assert await seek(harness, 60_000, os.SEEK_HOLE) == 100_000
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            assert await seek(harness, 100_000, whence) == errno.ENXIO
            assert await seek(harness, (1 << 64) - 1, whence) == errno.ENXIO
        assert await seek(harness, 0, os.SEEK_SET) == errno.EINVAL
        node.hole = (50_000, 100_000)
        assert await seek(harness, 60_000, os.SEEK_DATA) == errno.ENXIO


async def test_seek_in_a_file_without_a_node() -> None:
    """It is all data: libfuse's ENOSYS would end LSEEK on every file of the mount."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        assert await seek(harness, 3, os.SEEK_DATA, OTHER_FH) == 3
        assert await seek(harness, 3, os.SEEK_HOLE, OTHER_FH) == 10
        assert await seek(harness, 10, os.SEEK_DATA, OTHER_FH) == errno.ENXIO
        assert harness.peer_is_silent()


# What is passed on


async def test_others_pass_unchanged() -> None:
    """A request that is not hot, and its answer, arrive as they were sent."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        unique = await harness.send(LOOKUP, b"name\0", inode=1)
        request = await harness.peer_receive()
        assert request == wire.IN_HEADER.pack(45, LOOKUP, unique, 1, 0, 0, 1, 0, 0) + b"name\0"
        harness.peer_answer(request, b"entry" * 20)
        assert await harness.answer(unique) == (0, b"entry" * 20)


async def test_flush_and_fsync_of_other_files_pass() -> None:
    """Without a node they are libfuse's."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        for opcode in (wire.FLUSH, wire.FSYNC):
            unique = await harness.send(opcode, wire.FLUSH_OR_FSYNC_IN.pack(OTHER_FH, 0))
            harness.peer_answer(await harness.peer_receive())
            assert await harness.answer(unique) == (0, b"")


async def test_forgets_pass_and_need_no_answer() -> None:
    """FORGET and BATCH_FORGET go on in order, whatever is owed."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        sent = [await harness.send(op, bytes(8)) for op in (wire.FORGET, wire.BATCH_FORGET) * 50]
        for unique in sent:
            assert wire.IN_HEADER.unpack_from(await harness.peer_receive())[2] == unique


async def test_interrupts_pass_only_to_whom_they_concern() -> None:
    """libfuse hears of an interrupt while it has the request, of others never."""
    node = patterned(waits=True)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node)) as harness:
        hot = await harness.send(wire.READ, transfer(WRITABLE_FH, 0, 16))
        await harness.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(hot))
        passed = await harness.send(GETATTR, bytes(16))
        request = await harness.peer_receive()
        interrupt = await harness.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(passed))
        assert wire.IN_HEADER.unpack_from(await harness.peer_receive())[2] == interrupt
        harness.peer_answer(request, error=errno.EINTR)
        assert await harness.answer(passed) == (errno.EINTR, b"")
        await harness.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(passed))
        node.gate.set()
        assert await harness.answer(hot) == (0, bytes(node.content[:16]))
        assert harness.peer_is_silent()


async def test_long_listings_are_asked_for_in_parts() -> None:
    """A directory request never allows an answer that the channel could not carry."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        for opcode in (wire.READDIR, wire.READDIRPLUS):
            unique = await harness.send(opcode, transfer(1, 2, MIB), inode=1)
            request = await harness.peer_receive()
            assert wire.SIZED_READ_IN.unpack_from(request, 40) == (1, 2, 64 << 10)
            harness.peer_answer(request, bytes(64 << 10))
            assert await harness.answer(unique) == (0, bytes(64 << 10))


@pytest.mark.parametrize("room", [425_984, device.CHANNEL_LENGTH], ids=["ordinary user", "root"])
async def test_answers_never_overfill_the_channel(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests wait until the longest answers of those before them fit; none is lost."""
    monkeypatch.setattr(device, "CHANNEL_LENGTH", room)
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        body = wire.XATTR_IN.pack(65536)
        uniques = [await harness.send(wire.GETXATTR, body) for _ in range(BACKLOG_LIMIT + 100)]

        async def answer_as_libfuse() -> None:
            answered = 0
            while answered < len(uniques):
                requests = [await harness.peer_receive()]
                await trio.testing.wait_all_tasks_blocked()
                try:
                    while True:
                        requests.append(os.read(harness.libfuse, MIB))
                except BlockingIOError:
                    pass
                # All at once, as libfuse may: a full channel would raise here.
                for request in requests:
                    harness.peer_answer(request, bytes(65536))
                answered += len(requests)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_as_libfuse)
            for unique in uniques:
                assert await harness.answer(unique) == (0, bytes(65536))


async def test_init_is_amended() -> None:
    """libfuse's INIT answer reaches the kernel with the lane's abilities switched on."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        offered = wire.INIT_IN.pack(7, 40, 65536, wire.INIT_MAX_PAGES | wire.INIT_ASYNC_READ)
        unique = await harness.send(wire.INIT, offered)
        request = await harness.peer_receive()
        answer = wire.INIT_OUT.pack(7, 38, 65536, 0, 0, 0, 131072, 1, 32, 0, 0)
        harness.peer_answer(request, answer + bytes(64 - len(answer)))
        error, body = await harness.answer(unique)
        assert error == 0
        fields = wire.INIT_OUT.unpack_from(body)
        assert fields[3] == wire.INIT_MAX_PAGES | wire.INIT_ASYNC_READ
        assert (fields[6], fields[8]) == (MIB, 256)


@pytest.mark.parametrize(
    ("fh", "flags", "wanted"),
    [
        (WRITABLE_FH, os.O_RDWR, wire.OPEN_PARALLEL_DIRECT_WRITES),
        (
            WRITABLE_FH,
            os.O_RDWR | os.O_DIRECT,
            wire.OPEN_PARALLEL_DIRECT_WRITES | wire.OPEN_DIRECT_IO,
        ),
        (READ_ONLY_FH, os.O_RDONLY | os.O_DIRECT, 0),
        (OTHER_FH, os.O_RDONLY | os.O_DIRECT, 0),
    ],
)
async def test_open_is_amended(fh: int, flags: int, wanted: int) -> None:
    """Direct writers of one disk may run side by side; nothing else changes."""
    keep_cache = 2
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        unique = await harness.send(wire.OPEN, wire.OPEN_IN.pack(flags, 0))
        harness.peer_answer(await harness.peer_receive(), wire.OPEN_OUT.pack(fh, keep_cache))
        answer = (0, wire.OPEN_OUT.pack(fh, keep_cache | wanted))
        assert await harness.answer(unique) == answer


async def test_notifications_pass() -> None:
    """A message of unique 0 reaches the kernel as it is, in order."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        messages = [wire.OUT_HEADER.pack(17, 2, 0) + bytes([n]) for n in range(20)]
        for message in messages:
            os.write(harness.libfuse, message)
        assert [await harness.receive() for _ in messages] == messages


# Hostile messages


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    "message",
    [
        b"\0" * 3,
        wire.IN_HEADER.pack(40, wire.READ, 1, 2, 0, 0, 0, 0, 0)[:39],
        wire.IN_HEADER.pack(1 << 31, wire.FORGET, 1, 2, 0, 0, 0, 0, 0),
    ],
    ids=["tiny", "cut header", "lying forget"],
)
async def test_fragments_are_ignored(message: bytes) -> None:
    """What is no request is answered nothing, and the next request is served."""
    node = patterned()
    async with lane_of(FakeOperations(node)) as harness:
        await harness.send_raw(message)
        assert await harness.read(0, 16) == (0, bytes(node.content[:16]))


@pytest.mark.expects_warnings
async def test_malformed_requests_are_refused() -> None:
    """Bodies that are too short or lie about their length are answered, and change nothing."""
    node = patterned()
    before = bytes(node.content)
    async with lane_of(FakeOperations(node)) as harness:
        for opcode in (wire.READ, wire.WRITE, wire.FLUSH, wire.FSYNC, wire.FALLOCATE, wire.LSEEK):
            assert await harness.ask(opcode) == (errno.EINVAL, b"")
        for size in (5, 3, MIB + 1, (1 << 32) - 1):
            body = transfer(WRITABLE_FH, 0, size, b"four")
            assert await harness.ask(wire.WRITE, body) == (errno.EINVAL, b"")
        body = transfer(WRITABLE_FH, 0, MIB + 1)
        assert await harness.ask(wire.READ, body) == (errno.EINVAL, b"")
        lying = wire.IN_HEADER.pack(4000, wire.READ, 1 << 40, 2, 0, 0, 0, 0, 0) + bytes(40)
        await harness.send_raw(lying)
        assert await harness.answer(1 << 40) == (errno.EIO, b"")
    assert bytes(node.content) == before


@pytest.mark.expects_warnings
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    strategies.lists(
        strategies.tuples(
            strategies.integers(0, 60),
            strategies.binary(max_size=120),
            strategies.sampled_from([0, 0, 0, 1, -1, 1000]),
        ),
        max_size=12,
    )
)
def test_arbitrary_messages(messages: list[tuple[int, bytes, int]]) -> None:
    """No sequence of messages ends the lane or keeps it from serving the next request."""

    async def main() -> None:
        node = patterned(20_000)
        async with lane_of(FakeOperations(node)) as harness:
            for number, (opcode, body, lie) in enumerate(messages):
                length = max(40 + len(body) + lie, 0)
                header = wire.IN_HEADER.pack(length, opcode, 1001 + 2 * number, 2, 0, 0, 0, 0, 0)
                await harness.send_raw(header + body)
            error, body = await harness.read(0, 16)
            assert error == 0
            assert body == bytes(node.content[:16])

    trio.run(main)


# Ends


@pytest.mark.parametrize("poll_us", [0, 1000])
async def test_end_of_the_mount(poll_us: int) -> None:
    """When the kernel's side is gone the lane returns, after what it had begun."""
    node = patterned(waits=True)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node), poll_us) as harness:
        await harness.send(wire.WRITE, transfer(WRITABLE_FH, 0, 4, b"done"))
        await until(lambda: node.under_way > 0)
        harness.close_kernel()
        await trio.sleep(0.01)
        assert harness.end is None
        node.gate.set()
    assert harness.end is EndReason.UNMOUNTED
    assert node.content[:4] == b"done"


async def test_end_of_libfuse() -> None:
    """When libfuse is gone the lane ends, and whoever waited for libfuse gets EIO."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        uniques = [await harness.send(GETATTR, bytes(16)) for _ in range(5)]
        for _ in uniques:
            await harness.peer_receive()
        harness.close_libfuse()
        for unique in uniques:
            assert await harness.answer(unique) == (errno.EIO, b"")
    assert harness.end is EndReason.PEER_CLOSED


async def test_cancellation() -> None:
    """A cancelled lane answers EIO to all that waited for it."""
    node = patterned(waits=True)
    node.gate = trio.Event()
    async with lane_of(FakeOperations(node)) as harness:
        hot = await harness.send(wire.READ, transfer(WRITABLE_FH, 0, 16))
        passed = await harness.send(GETATTR, bytes(16))
        await harness.peer_receive()
        await until(lambda: node.under_way > 0)
        harness.scope.cancel()
        assert await harness.answer(hot) == (errno.EIO, b"")
        assert await harness.answer(passed) == (errno.EIO, b"")


async def test_close_is_idempotent() -> None:
    """Closing twice closes nobody else's descriptor."""
    async with lane_of(FakeOperations(MemoryNode())) as harness:
        harness.close_kernel()
    other = os.open(os.devnull, os.O_RDONLY)
    harness.lane.close()
    os.fstat(other)
    os.close(other)


async def test_other_tasks_get_their_turn() -> None:
    """However fast requests come, other tasks run in between."""
    node = patterned()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with lane_of(FakeOperations(node), poll_us=1000) as harness:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for round_number in range(10):
                uniques = [
                    await harness.send(wire.READ, transfer(WRITABLE_FH, 0, 4096)) for _ in range(50)
                ]
                for unique in uniques:
                    await harness.answer(unique)
                assert turns > round_number
            nursery.cancel_scope.cancel()
