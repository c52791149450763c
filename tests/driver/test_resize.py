"""A disk that grows: what is behind its old end is zeros, and a crash leaves one size or the other.

What growth owes to snapshots and backing files is in test_snapshots.
"""

import errno
import random

import pytest
import trio

from qcowfs.driver.layout.geometry import MAX_L1_LENGTH, SECTOR
from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import BadRequest, ImageFull, QcowfsError
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    assert_sound,
    close_and_judge,
    make_image,
    open_node,
    read,
)
from tests.fakes import CrashFile, FaultyFile, MemoryFile

KINDS = (
    "",
    "compat=0.10",
    "cluster_size=512",
    "compat=0.10,cluster_size=512",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64",
)
SIZE = 200 * KIB
CONTENT = b"\x01" * SIZE


def full_image(options: str) -> bytes:
    """A disk of 200 KiB that is all data."""
    return make_image(SIZE, options, commands=("write -P 1 0 200k",))


def shortened(image: bytes, size: int) -> bytes:
    """The image with a smaller disk, whose clusters behind the end are still there."""
    return image[:24] + size.to_bytes(8, "big") + image[32:]


def size_of(node: Qcow2Node) -> int:
    """The disk's size in the header of the file under a node."""
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    return parse_header(bytes(storage.content[: 2 * MIB]), len(storage.content)).virtual_size


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [SIZE + SECTOR, 300 * KIB, 5 * MIB])
async def test_a_grown_disk_is_zeros_behind_its_old_end(options: str, size: int) -> None:
    """Its old bytes stay, the rest is zeros, can be written, and QEMU sees the same."""
    node = await open_node(full_image(options))
    await node.grow(size)
    assert node.virtual_size == size_of(node) == size
    assert await read(node, 0, size) == CONTENT + bytes(size - SIZE)
    await node.write_from(size - 300, b"\x02" * 300)
    await close_and_judge(node, CONTENT + bytes(size - SIZE - 300) + b"\x02" * 300)


async def test_a_disk_grows_often() -> None:
    """Growth by growth the L1 table gets longer, and nothing of the old ones is left in use."""
    node = await open_node(make_image(512, "cluster_size=512"))
    size = 512
    choice = random.Random(3)
    expected = bytearray(512)
    for _ in range(25):
        size += choice.choice((512, 1024, 40 * KIB, 100 * KIB))
        await node.grow(size)
        expected += bytes(size - len(expected))
        place = choice.randrange(size - 511)
        await node.write_from(place, b"\x05" * 512)
        expected[place : place + 512] = b"\x05" * 512
    assert await read(node, 0, size) == expected
    await close_and_judge(node, expected)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("end", [100 * KIB, 99 * KIB + SECTOR, SECTOR])
async def test_what_lay_behind_the_end_is_never_shown(options: str, end: int) -> None:
    """Bytes and clusters behind the end, in the last cluster and after it, are gone."""
    image = shortened(full_image(options), end)
    node = await open_node(image)
    await node.grow(150 * KIB)
    assert await read(node, 0, 150 * KIB) == CONTENT[:end] + bytes(150 * KIB - end)
    await node.grow(SIZE)
    await close_and_judge(node, CONTENT[:end] + bytes(SIZE - end))


@pytest.mark.parametrize("options", ["", "cluster_size=16k,extended_l2=on", "compat=0.10"])
async def test_a_compressed_last_cluster_is_cut(options: str) -> None:
    """What a compressed cluster holds behind the end does not show either."""
    image = make_image(SIZE, options, content=CONTENT, compressed=True)
    node = await open_node(shortened(image, 99 * KIB))
    await node.grow(SIZE)
    await close_and_judge(node, CONTENT[: 99 * KIB] + bytes(SIZE - 99 * KIB))


async def test_a_size_is_rounded_up_to_a_sector() -> None:
    """A disk has whole sectors."""
    node = await open_node(full_image(""))
    await node.grow(SIZE + 1)
    assert node.virtual_size == SIZE + SECTOR
    await close_and_judge(node, CONTENT + bytes(SECTOR))


async def test_the_same_size_is_no_change() -> None:
    """Nothing is written for it."""
    image = full_image("")
    node = await open_node(image)
    await node.grow(SIZE)
    await node.grow(SIZE - 1)
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    assert storage.content == image
    await node.aclose()


@pytest.mark.parametrize(
    ("options", "size", "error"),
    [
        ("", SIZE - SECTOR, BadRequest),
        ("", 0, BadRequest),
        ("cluster_size=512", (MAX_L1_LENGTH // 8 << 15) + 1, ImageFull),
        ("", 1 << 62, ImageFull),
    ],
)
async def test_an_impossible_size_changes_nothing(
    options: str, size: int, error: type[QcowfsError]
) -> None:
    """Fewer bytes, or more than an L1 table can cover, are refused."""
    image = full_image(options)
    node = await open_node(image)
    with pytest.raises(error):
        await node.grow(size)
    assert node.virtual_size == SIZE
    assert node.failsafe is None
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    assert storage.content == image
    await node.aclose()


async def test_the_largest_l1_table_is_allowed() -> None:
    """A disk may grow to what 32 MiB of L1 table cover."""
    node = await open_node(make_image(MIB, "cluster_size=512"))
    largest = MAX_L1_LENGTH // 8 << 15
    await node.grow(largest)
    await node.write_from(largest - 512, b"\x03" * 512)
    assert await read(node, largest - 1024, 1024) == bytes(512) + b"\x03" * 512
    await close_and_judge(node)


# Crashes and faults


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on", "compat=0.10"])
@pytest.mark.parametrize("end", [SIZE, 99 * KIB])
async def test_a_crash_leaves_one_size_or_the_other(options: str, end: int) -> None:
    """In every state the disk is sound, and behind the old end there are zeros."""
    image = shortened(full_image(options), end)
    file = CrashFile(image)
    node = await open_node(file)
    await node.grow(400 * KIB)
    expected = CONTENT[:end] + bytes(400 * KIB - end)
    sizes = set()
    for state in file.states(point_count=6, each_limit=3, subset_count=2, torn_count=1, seed=4):
        left = await open_node(state.content, read_only=True)
        size = left.virtual_size
        sizes.add(size)
        assert size in {end, 400 * KIB}, state.description
        assert await read(left, 0, size) == expected[:size], state.description
        await left.aclose()
        assert_sound(state.content, leaks=1 << 20)
    assert sizes == {end, 400 * KIB}
    await close_and_judge(node, expected)


@pytest.mark.expects_warnings
@pytest.mark.parametrize("method", ["write", "sync", "read"])
@pytest.mark.parametrize("nth", [1, 2, 3, 5])
async def test_a_failing_host_leaves_a_sound_disk(method: str, nth: int) -> None:
    """Wherever growth fails, what is in the file is sound and has one of the two sizes."""
    file = FaultyFile(MemoryFile(full_image("cluster_size=512"), miss_rate=0.3, seed=nth))
    node = await open_node(file)
    file.fail(method, nth, repeat=True)
    try:
        await node.grow(400 * KIB)
    except (OSError, QcowfsError):
        assert node.virtual_size in {SIZE, 400 * KIB}
    file.heal()
    try:
        await node.aclose()
    except (OSError, QcowfsError):
        assert method == "sync"
    inner = file.inner
    assert isinstance(inner, MemoryFile)
    left = await open_node(bytes(inner.content), read_only=True)
    assert left.virtual_size in {SIZE, 400 * KIB}
    assert await read(left, 0, SIZE) == CONTENT
    await left.aclose()
    assert_sound(inner.content, leaks=1 << 20)


async def test_a_full_host_can_be_tried_again() -> None:
    """Without room for the longer table the disk keeps its size; with room, it grows."""
    file = FaultyFile(MemoryFile(full_image("cluster_size=512")))
    node = await open_node(file)
    file.fail("write", 1, errno.ENOSPC, repeat=True)
    with pytest.raises(OSError) as caught:
        await node.grow(4 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert node.virtual_size == SIZE
    assert node.failsafe is None
    file.heal()
    await node.grow(4 * MIB)
    await close_and_judge(node, CONTENT + bytes(4 * MIB - SIZE))


async def test_writes_go_on_around_growth() -> None:
    """Tasks that write while the disk grows again and again lose nothing."""
    node = await open_node(full_image("cluster_size=512"), miss_rate=0.4, refusal_rate=0.4)
    expected = bytearray(CONTENT) + bytes(MIB - SIZE)

    async def write_all(start: int, value: int) -> None:
        for place in range(start, SIZE, 8 * KIB):
            await node.write_from(place, bytes([value]) * 1500)
            expected[place : place + 1500] = bytes([value]) * 1500

    async def grow_all() -> None:
        for size in range(256 * KIB, MIB + 1, 256 * KIB):
            await node.grow(size)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, 0, 7)
        nursery.start_soon(write_all, 4 * KIB, 8)
        nursery.start_soon(grow_all)
    assert await read(node, 0, MIB) == expected
    await close_and_judge(node, expected)
