"""What damage and hostile counts may cost the engine, and what they may not."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.layout.snapshot_table import (
    Snapshot,
    parse_snapshot_table,
    serialize_snapshot_table,
)
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import CorruptImage, NotFound, ReadOnlyImage
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    close_and_judge,
    make_image,
    open_node,
    read,
)
from tests.fakes import MemoryFile

CLUSTER = 64 * KIB
ONE = b"\x01" * MIB
# The first megabyte is written, and two snapshots share it with the disk.
SHARED = make_image(2 * MIB, commands=("write -P 1 0 1M",), snapshots=("a", "b"))


def _number(image: bytes | bytearray, place: int, length: int = 8) -> int:
    return int.from_bytes(image[place : place + length], "big")


L1_OFFSET = _number(SHARED, 40)
REFCOUNT_TABLE_OFFSET = _number(SHARED, 48)
REFCOUNT_BLOCK_OFFSET = _number(SHARED, REFCOUNT_TABLE_OFFSET)
L2_OFFSET = _number(SHARED, L1_OFFSET) & OFFSET_MASK
SNAPSHOT_TABLE_OFFSET = _number(SHARED, 64)
SNAPSHOTS = parse_snapshot_table(SHARED[SNAPSHOT_TABLE_OFFSET:], 2)


def _with(image: bytes, place: int, data: bytes) -> bytes:
    return image[:place] + data + image[place + len(data) :]


def _with_snapshots(*entries: Snapshot) -> bytes:
    return _with(SHARED, SNAPSHOT_TABLE_OFFSET, serialize_snapshot_table(entries))


def _with_counts(value: int, *, but: int = -1) -> bytes:
    """All counts above one are `value`, but for the cluster at host offset `but`."""
    data = bytearray(SHARED[REFCOUNT_BLOCK_OFFSET : REFCOUNT_BLOCK_OFFSET + CLUSTER])
    for place in range(0, CLUSTER, 2):
        if _number(data, place, 2) > 1 and place // 2 * CLUSTER != but:
            data[place : place + 2] = value.to_bytes(2, "big")
    return _with(SHARED, REFCOUNT_BLOCK_OFFSET, bytes(data))


async def _fill(node: Qcow2Node) -> None:
    """Use whatever room the image believes to be free."""
    await node.flush()
    await node.write_from(MIB, b"\x55" * MIB)


def _errors(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.ERROR for record in caplog.records)


# Snapshots over damage


@pytest.mark.parametrize("kept", [-1, L2_OFFSET], ids=["all counts", "counts of guest data"])
@pytest.mark.parametrize("reference", [b"a", b"b"])
async def test_counts_that_are_too_low_never_free_what_is_in_use(
    reference: bytes, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A deletion that would free clusters of the active disk ends all writing instead."""
    image = _with_counts(1, but=kept)
    node = await open_node(image)
    with pytest.raises(CorruptImage, match="in use, but its refcount is 0"):
        await node.delete_snapshot(reference)
    assert node.failsafe is not None
    assert _errors(caplog) == 1
    with pytest.raises(ReadOnlyImage):
        await _fill(node)
    assert await read(node, 0, MIB) == ONE
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    await node.aclose()
    assert storage.content[79] & 2, "the corrupt bit is set"
    left = await open_node(bytes(storage.content), read_only=True)
    assert await read(left, 0, MIB) == ONE


@pytest.mark.parametrize(
    "other",
    [SNAPSHOTS[0].l1_table_offset, L1_OFFSET, REFCOUNT_TABLE_OFFSET],
    ids=["another snapshot", "the active disk", "the refcount table"],
)
async def test_a_snapshot_whose_l1_is_not_its_own_leaks_at_worst(
    other: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its removal takes it from the list; what its L1 leads to stays in use."""
    node = await open_node(
        _with_snapshots(SNAPSHOTS[0], replace(SNAPSHOTS[1], l1_table_offset=other))
    )
    await node.delete_snapshot(b"b")
    assert "stay in use" in caplog.text
    assert node.failsafe is None
    await _fill(node)
    assert await read(node, 0, MIB) == ONE
    first = await node.open_snapshot(node.snapshots()[0])
    assert await read(first, 0, 2 * MIB) == ONE + bytes(MIB)
    await close_and_judge(node, ONE + b"\x55" * MIB, leaks=40)


@pytest.mark.parametrize("other", [L1_OFFSET, REFCOUNT_TABLE_OFFSET])
async def test_a_snapshot_whose_l1_is_other_metadata_is_not_applied(other: int) -> None:
    """Such a snapshot is refused, and the disk stays as it is."""
    image = _with_snapshots(SNAPSHOTS[0], replace(SNAPSHOTS[1], l1_table_offset=other))
    node = await open_node(image)
    with pytest.raises(CorruptImage, match="serves something else too"):
        await node.apply_snapshot(b"b")
    assert node.failsafe is None
    assert await read(node, 0, MIB) == ONE


BAD_TABLES = {
    "the refcount table": REFCOUNT_TABLE_OFFSET,
    "a refcount block": REFCOUNT_BLOCK_OFFSET,
    "the active L1": L1_OFFSET,
    "the L1 of a snapshot": SNAPSHOTS[0].l1_table_offset,
    "its own L1": SNAPSHOTS[1].l1_table_offset,
    "the snapshot table": SNAPSHOT_TABLE_OFFSET,
    "an odd place": 0x10200,
    "past the end": 1 << 40,
    "reserved bits": 1 << 56 | 0x40000,
}


@pytest.mark.parametrize("entry", BAD_TABLES.values(), ids=BAD_TABLES.keys())
async def test_a_snapshot_that_leads_into_metadata_is_not_applied(entry: int) -> None:
    """It is refused before anything changes; the other snapshot and the disk go on."""
    image = _with(SHARED, SNAPSHOTS[1].l1_table_offset, entry.to_bytes(8, "big"))
    node = await open_node(image)
    with pytest.raises(CorruptImage):
        await node.apply_snapshot(b"b")
    assert node.failsafe is None
    await _fill(node)
    await node.apply_snapshot(b"a")
    assert await read(node, 0, 2 * MIB) == ONE + bytes(MIB)
    await node.aclose()


@pytest.mark.parametrize("entry", BAD_TABLES.values(), ids=BAD_TABLES.keys())
async def test_a_snapshot_that_leads_into_metadata_can_be_deleted(
    entry: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes, with a warning, and nothing of anybody's is freed by it."""
    image = _with(SHARED, SNAPSHOTS[1].l1_table_offset, entry.to_bytes(8, "big"))
    node = await open_node(image)
    await node.delete_snapshot(b"b")
    assert "damaged or cannot be read" in caplog.text
    assert node.failsafe is None
    await _fill(node)
    first = await node.open_snapshot(node.snapshots()[0])
    assert await read(first, 0, 2 * MIB) == ONE + bytes(MIB)
    await close_and_judge(node, ONE + b"\x55" * MIB, leaks=40)


async def test_a_saturated_count_refuses_a_snapshot() -> None:
    """A count at its maximum cannot rise: ImageFull, and every count is as it was."""
    node = await open_node(_with_counts(0xFFFF))
    before = bytes(node.metadata.storage.content)  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="hold at most 65535"):
        await node.create_snapshot(b"c")
    await node.aclose()
    assert node.metadata.storage.content == before  # type: ignore[attr-defined]


# Caches


class HeldFile(MemoryFile):
    """A MemoryFile of which one read waits, with what it has read, until it is let go."""

    held_offset = -1

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reached = trio.Event()
        self.go_on = trio.Event()

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """As of a MemoryFile, but for the one place."""
        data = await super().pread(length, host_offset)
        if host_offset == self.held_offset:
            self.held_offset = -1
            self.reached.set()
            await self.go_on.wait()
        return data


async def test_a_late_read_of_a_table_never_undoes_a_change() -> None:
    """A slice that came, changed, was written and went while an older read was under way."""
    storage = HeldFile(make_image(MIB, commands=("write -P 1 0 64k",)))
    node = await open_node(storage, cache_size=1)
    await node.write_from(0, b"\x02" * CLUSTER)
    await node.flush()
    metadata = node.metadata
    table_offset = metadata.active.words[0] & OFFSET_MASK
    metadata.tables.forget_clean()
    async with trio.open_nursery() as nursery:
        storage.held_offset = table_offset
        storage.miss_rate = 1.0
        nursery.start_soon(metadata.load, metadata.active, 0)
        await storage.reached.wait()
        storage.miss_rate = 0.0
        await node.write_from(CLUSTER, b"\x03" * CLUSTER)
        await node.flush()
        while table_offset in metadata.tables.slices:
            for place in range(4096, CLUSTER, 4096):
                metadata.tables.load_now(table_offset + place)
        storage.go_on.set()
    assert await read(node, CLUSTER, CLUSTER) == b"\x03" * CLUSTER
    await close_and_judge(node, b"\x02" * CLUSTER + b"\x03" * CLUSTER + bytes(MIB - 2 * CLUSTER))


async def test_extents_of_a_deleted_snapshot_never_come_from_other_data() -> None:
    """A table that is being read keeps its cluster until the question is answered."""
    image = make_image(MIB, commands=("write -P 1 0 1M",), snapshots=("a",))
    storage = HeldFile(image)
    node = await open_node(storage)
    await node.write_from(0, b"\x02" * MIB)
    await node.flush()
    view = await node.open_snapshot(node.snapshots()[0])
    table_offset = view.reader.view.words[0] & OFFSET_MASK
    kinds: list[str] = []

    async def ask() -> None:
        found = await view.extents(0, MIB)
        kinds.extend(extent.kind.name for extent in found)

    async def delete_and_reuse() -> None:
        await node.delete_snapshot(b"a")
        # As an allocation may do from now on.
        storage.content[table_offset : table_offset + CLUSTER] = b"\x55" * CLUSTER

    node.metadata.tables.forget_clean()
    async with trio.open_nursery() as nursery:
        storage.held_offset = table_offset
        storage.miss_rate = 1.0
        nursery.start_soon(ask)
        await storage.reached.wait()
        storage.miss_rate = 0.0
        nursery.start_soon(delete_and_reuse)
        # Waiting for a request may sleep, so that checkpoints alone do not let it go on.
        for _ in range(20):
            await trio.sleep(0.001)
        storage.go_on.set()
    assert set(kinds) == {"DATA"}
    with pytest.raises(NotFound):
        await view.extents(0, MIB)
    await close_and_judge(node, b"\x02" * MIB)


# Refcounts


async def test_a_table_that_names_one_block_often_costs_one_look() -> None:
    """A refcount table of a million times the same empty block is no work for hours."""
    image = bytearray(make_image(MIB))
    entry_count = CLUSTER // 8
    empty = len(image) + -len(image) % CLUSTER
    image.extend(bytes(empty + CLUSTER - len(image)))
    place = _number(image, 48)
    image[place + 8 : place + CLUSTER] = empty.to_bytes(8, "big") * (entry_count - 1)
    node = await open_node(bytes(image))
    assert node.metadata.counters.refcount_block_loads <= 4
    await node.aclose()


BLOCKS: dict[str, Callable[[bytes], bytes]] = {
    "not aligned": lambda image: (0x20200).to_bytes(8, "big"),
    "past the end": lambda image: (1 << 40).to_bytes(8, "big"),
    "reserved bits": lambda image: (0x20001).to_bytes(8, "big"),
    "in the header": lambda image: bytes(8),
    "in the table": lambda image: image[48:56],
    "in the L1": lambda image: image[40:48],
    "beyond all offsets": lambda image: (1 << 63).to_bytes(8, "big"),
}


@pytest.mark.parametrize("name", BLOCKS)
async def test_a_bad_refcount_block_costs_writing_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk can be read; a write that needs the block fails, and no table is overwritten."""
    image = _with(SHARED, REFCOUNT_TABLE_OFFSET, BLOCKS[name](SHARED))
    reading = await open_node(image, read_only=True)
    assert await read(reading, 0, MIB) == ONE
    storage = MemoryFile(image)
    try:
        node = await open_node(storage)
        await node.write_from(MIB, b"\x05" * MIB)
    except (CorruptImage, ReadOnlyImage) as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("a write without refcounts succeeded")
    kept = bytearray(storage.content)
    # The corrupt bit is all that may have changed.
    kept[72:80] = image[72:80]
    assert bytes(kept[: len(image)]) == image
