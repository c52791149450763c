"""What every Node must do, whatever its format: a suite that runs over any implementation.

`check_node(make_node)` runs all of it; a test module that wants one test per
rule parametrises over CHECKS. `make_node(content)` gives a fresh writable node
without a backing file that shows `content`; `make_node(content,
read_only=True)` a read-only one. Contents are multiples of 512 bytes.
`check_overlay(make_overlay)` holds the rules of a node over a shorter backing
file: `make_overlay(backing_content, size)` gives an empty writable node.
"""

import errno
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

import pytest
import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
from qcowfs.errors import BadRequest, ReadOnlyImage

SIZE = 300 * 1024 + 512
SECTOR = 512


class MakeNode(Protocol):
    """Gives a fresh node that shows `content`."""

    def __call__(self, content: bytes, *, read_only: bool = False) -> Awaitable[Node]: ...


MakeOverlay = Callable[[bytes, int], Awaitable[Node]]


def pattern(size: int, seed: int = 1) -> bytes:
    """`size` bytes in which runs of zeros and of data alternate; no two sectors alike."""
    rng = random.Random(seed)
    pieces: list[bytes] = []
    length = 0
    while length < size:
        run = rng.choice((512, 4096, 16384, 65536, 1536))
        pieces.append(bytes(run) if rng.random() < 0.4 else rng.randbytes(run))
        length += run
    return b"".join(pieces)[:size]


async def read(node: Node, guest_offset: int, length: int) -> bytes:
    """The bytes by the waiting call; the instant calls must agree where they answer."""
    buffer = bytearray(b"\xa5" * length)
    await node.read_into(guest_offset, memoryview(buffer))
    result = bytes(buffer)
    instant = node.try_read(guest_offset, length)
    assert instant is None or bytes(instant) == result, "try_read disagrees with read_into"
    buffer = bytearray(b"\x5a" * length)
    if node.try_read_into(guest_offset, memoryview(buffer)):
        assert buffer == result, "try_read_into disagrees with read_into"
    return result


async def write(node: Node, guest_offset: int, data: bytes) -> None:
    """Write as the callers above do: the instant call first, then the waiting one."""
    if not node.try_write(guest_offset, data):
        await node.write_from(guest_offset, data)


async def whole(node: Node) -> bytes:
    """All bytes of the disk."""
    return await read(node, 0, node.virtual_size)


def random_range(rng: random.Random, size: int, unit: int = 1) -> tuple[int, int]:
    """A range inside `size`, often small, at multiples of `unit`."""
    longest = rng.choice((unit, 4096, 65536, size))
    start = rng.randrange(0, size, unit)
    length = min(rng.randint(1, max(longest // unit, 1)) * unit, size - start)
    return start, length


async def check_identity(make_node: MakeNode) -> None:
    """A node tells its size, its unit, its name and its format."""
    node = await make_node(pattern(SIZE))
    try:
        assert node.virtual_size == SIZE
        assert node.cluster_size >= SECTOR
        assert not node.read_only
        assert node.name
        assert node.format_name
        assert isinstance(node, Node)
    finally:
        await node.aclose()


async def check_reads(make_node: MakeNode) -> None:
    """Any range reads as the content; the instant and the waiting calls agree."""
    content = pattern(SIZE)
    node = await make_node(content)
    try:
        rng = random.Random(2)
        assert await whole(node) == content
        for _ in range(60):
            start, length = random_range(rng, SIZE)
            assert await read(node, start, length) == content[start : start + length]
        assert await read(node, SIZE - 1, 1) == content[-1:]
    finally:
        await node.aclose()


async def check_zero_lengths(make_node: MakeNode) -> None:
    """Requests of no length do nothing, at the very end of the disk too."""
    content = pattern(SIZE)
    node = await make_node(content)
    try:
        for start in (0, 777, SIZE):
            assert await read(node, start, 0) == b""
            await write(node, start, b"")
            await node.write_from(start, b"")
            await node.write_zeroes(start, 0)
            await node.discard(start, 0)
            assert list(await node.extents(start, 0)) == []
        assert await whole(node) == content
    finally:
        await node.aclose()


async def check_bounds(make_node: MakeNode) -> None:
    """A range that is not wholly inside the disk raises BadRequest and changes nothing."""
    content = pattern(SIZE)
    node = await make_node(content)
    outside = ((SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (-1, 1), (1 << 62, 512), (SIZE + 1, 0))
    try:
        for start, length in outside:
            data = bytes(length)
            with pytest.raises(BadRequest):
                await node.read_into(start, memoryview(bytearray(length)))
            with pytest.raises(BadRequest):
                await node.write_from(start, data)
            with pytest.raises(BadRequest):
                await node.write_zeroes(start, length)
            with pytest.raises(BadRequest):
                await node.discard(start, length)
            with pytest.raises(BadRequest):
                await node.extents(start, length)
            try:
                assert not node.try_write(start, data)
            except BadRequest:
                pass
        assert node.virtual_size == SIZE
        assert await whole(node) == content
    finally:
        await node.aclose()


async def check_writes(make_node: MakeNode) -> None:
    """What was written is read, of any length at any place and from any kind of buffer."""
    model = bytearray(pattern(SIZE))
    node = await make_node(bytes(model))
    kinds: tuple[Callable[[bytes], bytes | bytearray | memoryview], ...] = (
        bytes,
        bytearray,
        memoryview,
    )
    try:
        rng = random.Random(3)
        for number in range(60):
            start, length = random_range(rng, SIZE)
            data = rng.randbytes(length)
            if number % 2:
                await node.write_from(start, kinds[number % 3](data))
            elif not node.try_write(start, kinds[number % 3](data)):
                await node.write_from(start, data)
            model[start : start + length] = data
            assert await read(node, start, length) == data
        await node.write_from(SIZE - 1, b"z")
        model[-1:] = b"z"
        assert await whole(node) == model
    finally:
        await node.aclose()


async def check_buffer_is_free_again(make_node: MakeNode) -> None:
    """Once a write has returned, its buffer may change without the disk changing."""
    node = await make_node(bytes(SIZE))
    try:
        data = bytearray(b"q" * 70_000)
        await node.write_from(1000, data)
        data[:] = b"r" * len(data)
        if node.try_write(100_000, data):
            data[:] = b"s" * len(data)
            assert await read(node, 100_000, 70_000) == b"r" * 70_000
        assert await read(node, 1000, 70_000) == b"q" * 70_000
    finally:
        await node.aclose()


async def check_zeroes(make_node: MakeNode) -> None:
    """A zeroed range reads as zeros and its neighbours stay, with and without unmapping."""
    model = bytearray(pattern(SIZE))
    node = await make_node(bytes(model))
    try:
        rng = random.Random(4)
        for number in range(30):
            start, length = random_range(rng, SIZE, (1, 512)[number % 2])
            await node.write_zeroes(start, length, unmap=number % 3 == 0)
            model[start : start + length] = bytes(length)
            if number % 4 == 0:
                start, length = random_range(rng, SIZE)
                model[start : start + length] = data = rng.randbytes(length)
                await write(node, start, data)
        assert await whole(node) == model
    finally:
        await node.aclose()


async def check_discard(make_node: MakeNode) -> None:
    """A discarded byte reads as zero or as it was; all others stay; it can be written again."""
    model = bytearray(pattern(SIZE))
    node = await make_node(bytes(model))
    try:
        rng = random.Random(5)
        for number in range(30):
            start, length = random_range(rng, SIZE, (1, 512)[number % 2])
            await node.discard(start, length)
            got = await read(node, start, length)
            for byte, old in zip(got, model[start : start + length], strict=True):
                assert byte in (0, old)
            model[start : start + length] = got
            if number % 3 == 0:
                start, length = random_range(rng, SIZE)
                model[start : start + length] = data = rng.randbytes(length)
                await write(node, start, data)
        await node.flush()
        assert await whole(node) == model
    finally:
        await node.aclose()


async def check_extents(make_node: MakeNode) -> None:
    """Extents cover their range in order, without gaps, tell the truth, and are maximal."""
    content = pattern(SIZE)
    node = await make_node(content)
    try:
        await node.write_zeroes(0, 4096)
        await node.write_zeroes(131072, 65536)
        content = await whole(node)
        rng = random.Random(6)
        ranges = [(0, SIZE), (SIZE - 1, 1)] + [random_range(rng, SIZE) for _ in range(30)]
        for start, length in ranges:
            extents = await node.extents(start, length)
            covered = start
            for extent in extents:
                assert extent.guest_offset == covered
                assert extent.length > 0
                covered += extent.length
                if extent.kind in (ExtentKind.ZERO, ExtentKind.UNALLOCATED):
                    assert not any(content[extent.guest_offset : covered])
                if extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED):
                    assert extent.host_offset is not None
            assert covered == start + length
            for one, two in itertools.pairwise(extents):
                continues = (
                    two.host_offset is None
                    if one.host_offset is None
                    else one.host_offset + one.length == two.host_offset
                )
                assert one.kind is ExtentKind.COMPRESSED or not (
                    one.kind is two.kind and continues
                ), f"{one} and {two} are one extent"
            for limit in (1, 2, 5):
                part = await node.extents(start, length, limit=limit)
                assert 1 <= len(part) <= limit
                assert part[0].guest_offset == start
                assert sum(extent.length for extent in part) <= length
    finally:
        await node.aclose()


async def check_read_only(make_node: MakeNode) -> None:
    """A read-only node refuses every change with EROFS and still reads."""
    content = pattern(SIZE)
    node = await make_node(content, read_only=True)
    try:
        assert node.read_only
        with pytest.raises(ReadOnlyImage) as refusal:
            await node.write_from(0, b"x" * 512)
        assert refusal.value.errno == errno.EROFS
        with pytest.raises(ReadOnlyImage):
            await node.write_zeroes(0, 512)
        with pytest.raises(ReadOnlyImage):
            await node.discard(0, SIZE)
        try:
            assert not node.try_write(0, b"x" * 512)
        except ReadOnlyImage:
            pass
        await node.flush()
        assert await whole(node) == content
    finally:
        await node.aclose()


async def check_flush_and_close(make_node: MakeNode) -> None:
    """Flushing is possible at any time, closing more than once, and a closed read is no crash."""
    node = await make_node(pattern(SIZE))
    await node.flush()
    await write(node, 5, b"five")
    await node.flush()
    await node.flush()
    assert await read(node, 5, 4) == b"five"
    await node.aclose()
    await node.aclose()


async def check_concurrency(make_node: MakeNode) -> None:
    """Writers of disjoint ranges, zeroing, readers and flushes do not disturb each other."""
    model = bytearray(pattern(SIZE))
    node = await make_node(bytes(model))
    lane_count = 6
    lane_length = SIZE // lane_count // SECTOR * SECTOR - 1024 + 3

    async def work(lane: int) -> None:
        # Lanes end in the middle of sectors, so neighbours share sectors and clusters.
        rng = random.Random(lane)
        base = lane * lane_length
        for number in range(12):
            start, length = random_range(rng, lane_length)
            start += base
            if number % 5 == 4:
                await node.write_zeroes(start, length)
                data = bytes(length)
            else:
                data = rng.randbytes(length)
                await write(node, start, data)
            model[start : start + length] = data
            if number % 4 == 3:
                await node.flush()
            await trio.lowlevel.checkpoint()
            assert await read(node, start, length) == data

    try:
        async with trio.open_nursery() as nursery:
            for lane in range(lane_count):
                nursery.start_soon(work, lane)
        assert await whole(node) == model
    finally:
        await node.aclose()


CHECKS: tuple[Callable[[MakeNode], Awaitable[None]], ...] = (
    check_identity,
    check_reads,
    check_zero_lengths,
    check_bounds,
    check_writes,
    check_buffer_is_free_again,
    check_zeroes,
    check_discard,
    check_extents,
    check_read_only,
    check_flush_and_close,
    check_concurrency,
)


async def check_node(make_node: MakeNode) -> None:
    """Hold every rule above over fresh nodes of one implementation."""
    for check in CHECKS:
        await check(make_node)


async def check_overlay(make_overlay: MakeOverlay) -> None:
    """A backing file shows through up to its end, zeros behind it, and never after a change."""
    backing = pattern(100 * 1024 + 512, seed=9)
    node = await make_overlay(backing, SIZE)
    model = bytearray(backing + bytes(SIZE - len(backing)))
    try:
        assert node.backing is not None
        assert await whole(node) == model
        end = len(backing)
        assert await read(node, end - 700, 1400) == model[end - 700 : end + 700]
        for start, length in ((10, 100), (end - 50, 100), (SIZE - 3, 3), (70_000, 9000)):
            data = random.Random(start).randbytes(length)
            await write(node, start, data)
            model[start : start + length] = data
            assert await whole(node) == model
        await node.write_zeroes(1000, 66_000)
        model[1000:67_000] = bytes(66_000)
        assert await whole(node) == model
        before = bytes(model)
        await node.discard(0, SIZE)
        await node.flush()
        for byte, old in zip(await whole(node), before, strict=True):
            assert byte in (0, old), "a discard showed what lies below"
    finally:
        await node.aclose()
