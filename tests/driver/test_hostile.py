"""Hostile and broken images, whole: a one-line error or right data, in bounded time and memory.

Each image is opened over a storage that may be written to, so that "nothing is
written" means something. The parsers have tests of their own in tests/layout;
here the question is what reaches them, and what happens behind them.
"""

import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from qcowfs.driver.layout.snapshot_table import Snapshot, serialize_snapshot_table
from qcowfs.driver.qcow2.image import open_qcow2
from qcowfs.errors import CorruptImage, QcowfsError
from tests.driver.qcow2_images import KIB, MIB, entry_place, make_image, open_node, read, with_entry
from tests.fakes import MemoryFile

CLUSTER = 64 * KIB
COPIED = 1 << 63
COMPRESSED = 1 << 62
HUGE = (1 << 32) - 1
MEMORY_BOUND = 64 * MIB

PLAIN = make_image(MIB, commands=("write -P 1 0 256k",))
L1_OFFSET = int.from_bytes(PLAIN[40:48], "big")
REFCOUNT_TABLE = int.from_bytes(PLAIN[48:56], "big")
REFCOUNT_BLOCK = int.from_bytes(PLAIN[REFCOUNT_TABLE : REFCOUNT_TABLE + 8], "big")
L2_OFFSET = entry_place(PLAIN, 0)


def patched(place: int, form: str, *values: object, image: bytes = PLAIN) -> bytes:
    """The image with fields from `place` on overwritten."""
    data = struct.pack(form, *values)
    return image[:place] + data + image[place + len(data) :]


async def refused(image: bytes, *, read_only: bool = False) -> str:
    """The one line with which an image is refused; it is unchanged, and memory stayed bounded."""
    storage = MemoryFile(image)
    tracemalloc.start()
    try:
        with pytest.raises(QcowfsError) as caught:
            await open_qcow2(storage, path="x", read_only=read_only, backing=None)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND
    finally:
        tracemalloc.stop()
    assert storage.content == image
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Headers

HEADERS: dict[str, bytes] = {
    "empty": b"",
    **{f"{length} bytes": PLAIN[:length] for length in (1, 3, 4, 23, 71, 72, 103, 104, 111)},
    "magic": patched(0, ">I", 0x514649FC),
    "version 0": patched(4, ">I", 0),
    "version 4": patched(4, ">I", 4),
    "version max": patched(4, ">I", HUGE),
    **{f"cluster_bits {n}": patched(20, ">I", n) for n in (0, 8, 22, 63, HUGE)},
    "size 2^63": patched(24, ">Q", 1 << 63),
    "size 2^64-1": patched(24, ">Q", (1 << 64) - 1),
    "crypt_method 3": patched(32, ">I", 3),
    "l1_size 0": patched(36, ">I", 0),
    "l1_size max": patched(36, ">I", HUGE),
    **{
        f"{name} {offset:#x}": patched(place, ">Q", offset)
        for name, place in (("L1", 40), ("refcounts", 48))
        for offset in (0, 8, 0x200, 0x10001, 1 << 40, (1 << 64) - CLUSTER, (1 << 64) - 1)
    },
    "both tables at one place": patched(40, ">QQ", REFCOUNT_TABLE, REFCOUNT_TABLE),
    "refcount_table_clusters 0": patched(56, ">I", 0),
    "refcount_table_clusters max": patched(56, ">I", HUGE),
    "snapshots 65537": patched(60, ">IQ", 65537, 0x50000),
    "snapshots max": patched(60, ">IQ", HUGE, 0x50000),
    "snapshots past the end": patched(60, ">IQ", 1, 1 << 40),
    "snapshots at 0": patched(60, ">IQ", 1, 0),
    "unknown feature": patched(72, ">Q", 1 << 40),
    "refcount_order 7": patched(96, ">I", 7),
    "refcount_order 255": patched(96, ">I", 255),
    **{f"header_length {n}": patched(100, ">I", n) for n in (0, 103, CLUSTER + 8, HUGE)},
    "compression type 2": patched(104, ">B", 2),
    "compression type without its bit": patched(104, ">B", 1),
    "extension past the cluster": patched(112, ">II", 0x12345678, CLUSTER),
    "extension of 2^32-1 bytes": patched(112, ">II", 0x12345678, HUGE),
    "extension that wraps around": patched(112, ">II", 0x12345678, HUGE - 7),
    "backing format of 200 bytes": patched(112, ">II", 0xE2792ACA, 200),
    **{f"backing name of {n}": patched(8, ">QI", 0x400, n) for n in (1024, HUGE)},
    "backing name past the cluster": patched(8, ">QI", 1 << 40, 10),
}


@pytest.mark.parametrize("name", HEADERS)
async def test_a_hostile_header_is_refused(name: str) -> None:
    """One line, nothing written, whether it is to be written to or not."""
    await refused(HEADERS[name])
    await refused(HEADERS[name], read_only=True)


async def test_bytes_of_a_header_changed_at_random_are_served_or_refused() -> None:
    """Whatever the first 112 bytes say, an open ends in time, with a node or one line."""
    choose = random.Random(1)
    for _ in range(400):
        image = patched(choose.randrange(112), ">B", choose.randrange(256))
        storage = MemoryFile(image)
        try:
            node = await open_node(storage, read_only=True)
            content = await read(node, 0, min(node.virtual_size, 4096))
            assert len(content) == min(node.virtual_size, 4096)
            await node.aclose()
        except QcowfsError as error:
            assert "\n" not in str(error)
        assert storage.content == image


# L1 and L2

L1_ENTRIES = {
    "reserved bits": 1 << 57 | L2_OFFSET,
    "low bits": L2_OFFSET | 1,
    "not aligned": L2_OFFSET | 0x200,
    "past the end": 1 << 40,
    "at the largest offset": (1 << 56) - CLUSTER,
}


@pytest.mark.parametrize("name", L1_ENTRIES)
async def test_a_bad_l1_entry_is_refused_for_its_range(name: str) -> None:
    """Reading, writing, zeroing and extents raise one line; there is no failsafe."""
    image = patched(L1_OFFSET, ">Q", COPIED | L1_ENTRIES[name])
    node = await open_node(image, read_only=True)
    with pytest.raises(CorruptImage):
        await read(node, 0, 4096)
    with pytest.raises(CorruptImage):
        await node.extents(0, 4096)


TABLES = {
    "the header": CLUSTER * 0,
    "the L1": L1_OFFSET,
    "the refcount table": REFCOUNT_TABLE,
    "a refcount block": REFCOUNT_BLOCK,
}


@pytest.mark.expects_warnings
@pytest.mark.parametrize("name", list(TABLES)[1:])
async def test_an_l1_entry_that_leads_to_other_metadata_is_never_written_through(name: str) -> None:
    """A write through it fails, and the structure there is as it was."""
    image = patched(L1_OFFSET, ">Q", COPIED | TABLES[name])
    storage = MemoryFile(image)
    node = await open_node(storage)
    with pytest.raises(QcowfsError):
        await node.write_from(0, b"\x05" * 4096)
    await node.aclose()
    assert bytes(storage.content[CLUSTER : len(image)]) == image[CLUSTER:]


@pytest.mark.expects_warnings
@pytest.mark.parametrize("name", ["the L1", "the refcount table", "a refcount block", "itself"])
@pytest.mark.parametrize("call", ["try_write", "write_from", "write_zeroes", "discard"])
async def test_an_l2_entry_that_leads_to_metadata_is_never_written_through(
    name: str, call: str
) -> None:
    """Guest data never lands in metadata: the corrupt bit, an error, and failsafe instead."""
    place = L2_OFFSET if name == "itself" else TABLES[name]
    image = with_entry(PLAIN, 0, COPIED | place)
    storage = MemoryFile(image)
    node = await open_node(storage)
    await read(node, 0, CLUSTER)
    await node.write_from(MIB // 2, b"\x06" * 512)
    await node.flush()
    before = bytes(storage.content[place : place + CLUSTER])
    with pytest.raises(QcowfsError):
        if call == "discard":
            await node.discard(0, CLUSTER)
        elif call == "write_zeroes":
            await node.write_zeroes(0, CLUSTER)
        elif call == "write_from" or not node.try_write(0, b"\x05" * 4096):
            await node.write_from(0, b"\x05" * 4096)
    assert node.failsafe is not None
    await node.aclose()
    assert storage.content[place : place + CLUSTER] == before
    assert storage.content[79] & 2


L2_ENTRIES = {
    "reserved bits": COPIED | 1 << 57 | L2_OFFSET + CLUSTER,
    "low bits": COPIED | L2_OFFSET + CLUSTER | 2,
    "not aligned": COPIED | L2_OFFSET + CLUSTER | 0x200,
}


@pytest.mark.parametrize("name", L2_ENTRIES)
async def test_a_bad_l2_entry_costs_its_cluster_alone(name: str) -> None:
    """EIO for the range that touches it; its neighbours are read and written."""
    node = await open_node(with_entry(PLAIN, CLUSTER, L2_ENTRIES[name]))
    for call in (
        read(node, CLUSTER - 1, 2),
        node.write_from(CLUSTER, b"\x05"),
        node.discard(CLUSTER, CLUSTER),
        node.write_zeroes(CLUSTER, CLUSTER),
    ):
        with pytest.raises(CorruptImage):
            await call
    assert node.failsafe is None
    await node.write_from(0, b"\x05" * CLUSTER)
    await node.write_from(2 * CLUSTER, b"\x05" * CLUSTER)
    assert await read(node, 2 * CLUSTER, CLUSTER) == b"\x05" * CLUSTER
    await node.aclose()


async def test_an_l2_entry_past_the_end_reads_as_zeros() -> None:
    """What the file does not have reads as zeros; the image cannot be opened for writing."""
    image = with_entry(PLAIN, 0, COPIED | 1 << 40)
    node = await open_node(image, read_only=True)
    assert await read(node, 0, CLUSTER) == bytes(CLUSTER)


async def test_zero_clusters_of_version_2_are_refused() -> None:
    """Version 2 knows no zero flag: its entry is damage."""
    image = make_image(MIB, "compat=0.10", commands=("write -P 1 0 256k",))
    node = await open_node(with_entry(image, 0, 1))
    with pytest.raises(CorruptImage):
        await read(node, 0, 512)
    assert await read(node, CLUSTER, CLUSTER) == b"\x01" * CLUSTER


EXTENDED = make_image(MIB, "extended_l2=on", commands=("write -P 1 0 256k",))
EXTENDED_PLACE = int.from_bytes(EXTENDED[L1_OFFSET : L1_OFFSET + 8], "big") & 0x00FF_FFFF_FFFF_FE00


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [
        (None, 1 << 32 | 1),
        (0, 1),
        (COMPRESSED | L2_OFFSET, 1),
        (None, (1 << 64) - 1),
    ],
    ids=["both bits", "no offset", "compressed with a bitmap", "all bits"],
)
async def test_a_bad_bitmap_costs_its_cluster_alone(entry: int | None, bitmap: int) -> None:
    """Subclusters that are two things at once, or nowhere, are damage."""
    old = int.from_bytes(EXTENDED[EXTENDED_PLACE : EXTENDED_PLACE + 8], "big")
    words = (old if entry is None else entry, bitmap)
    node = await open_node(patched(EXTENDED_PLACE, ">QQ", *words, image=EXTENDED))
    for call in (read(node, 0, 512), node.write_from(0, b"\x05"), node.discard(0, CLUSTER)):
        with pytest.raises(CorruptImage):
            await call
    assert await read(node, CLUSTER, CLUSTER) == b"\x01" * CLUSTER
    assert node.failsafe is None


@pytest.mark.expects_warnings
async def test_two_entries_for_one_cluster() -> None:
    """Both COPIED, counted once: no other data is ever handed out or shown."""
    entry = int.from_bytes(PLAIN[L2_OFFSET : L2_OFFSET + 8], "big")
    node = await open_node(with_entry(PLAIN, CLUSTER, entry))
    await node.discard(0, CLUSTER)
    await node.flush()
    await node.write_from(512 * KIB, b"\x05" * CLUSTER)
    try:
        await node.discard(CLUSTER, CLUSTER)
        await node.flush()
    except QcowfsError:
        assert node.failsafe is not None
    assert await read(node, 512 * KIB, CLUSTER) in (b"\x05" * CLUSTER, bytes(CLUSTER))
    await node.aclose()


# Compressed clusters


def deflate(data: bytes) -> bytes:
    """A raw stream as compressed clusters hold it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def with_stream(stream: bytes, *, options: str = "", sectors: int | None = None) -> bytes:
    """An image whose first cluster is a compressed one with that stream."""
    image = make_image(MIB, options, commands=("write -P 1 0 256k",))
    place = len(image) + -len(image) % CLUSTER
    image += bytes(place - len(image)) + stream
    count = (len(stream) - 1) // 512 if sectors is None else sectors
    return with_entry(image, 0, COMPRESSED | count << 54 | place)


STREAMS: dict[str, Callable[[], bytes]] = {
    "a bomb": lambda: with_stream(deflate(bytes(64 * MIB))),
    "less than a cluster": lambda: with_stream(deflate(b"x" * 1000)),
    "truncated": lambda: with_stream(deflate(random.Random(2).randbytes(CLUSTER))[:3000]),
    "noise": lambda: with_stream(b"\xff" * 4096),
    "nothing": lambda: with_stream(b"\x00" * 512),
    "past the end": lambda: with_entry(PLAIN, 0, COMPRESSED | 1 << 40),
    "noise as zstd": lambda: with_stream(b"\xff" * 512, options="compression_type=zstd"),
    "a zstd frame of a huge window": lambda: with_stream(
        b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00", options="compression_type=zstd"
    ),
    "a skippable zstd frame": lambda: with_stream(
        b"\x50\x2a\x4d\x18\xff\xff\xff\x7f", options="compression_type=zstd"
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_hostile_stream_is_eio_or_one_cluster(name: str) -> None:
    """No stream yields more than its cluster, costs more memory, or harms its neighbours."""
    image = STREAMS[name]()
    node = await open_node(image, read_only=True)
    tracemalloc.start()
    try:
        try:
            content = await read(node, 0, CLUSTER)
            assert len(content) == CLUSTER
        except CorruptImage as error:
            assert "\n" not in str(error)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND
    finally:
        tracemalloc.stop()
    assert await read(node, CLUSTER, CLUSTER) == b"\x01" * CLUSTER


@pytest.mark.expects_warnings
@pytest.mark.parametrize("name", ["truncated", "noise", "less than a cluster"])
async def test_a_bad_stream_can_be_overwritten(name: str) -> None:
    """A whole cluster over it needs nothing of it; a part of one fails and changes nothing."""
    node = await open_node(STREAMS[name]())
    with pytest.raises(CorruptImage):
        await node.write_from(512, b"\x05" * 512)
    assert node.failsafe is None
    await node.write_from(CLUSTER, b"\x06" * CLUSTER)
    assert await read(node, CLUSTER, CLUSTER) == b"\x06" * CLUSTER


async def test_a_stream_at_the_end_of_the_file_is_padded_with_zeros() -> None:
    """Sectors that the entry counts and the file does not have read as zeros."""
    node = await open_node(with_stream(deflate(b"x" * CLUSTER), sectors=20), read_only=True)
    assert await read(node, 0, CLUSTER) == b"x" * CLUSTER


# Refcounts


@pytest.mark.expects_warnings
@pytest.mark.parametrize("value", [0, 0xFFFF])
async def test_counts_that_are_all_alike_cost_writing_at_most(value: int) -> None:
    """All 0: no metadata is handed out. All saturated: nothing wraps. Data stays."""
    # Small clusters: what lies behind the last count is behind 128 KiB, not 2 GiB.
    image = make_image(MIB, "cluster_size=512", commands=("write -P 1 0 64k",))
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image = image[:block] + value.to_bytes(2, "big") * 256 + image[block + 512 :]
    storage = MemoryFile(image)
    node = await open_node(storage, read_only=True)
    assert await read(node, 0, 64 * KIB) == b"\x01" * 64 * KIB
    storage = MemoryFile(image)
    node = await open_node(storage)
    try:
        await node.write_from(512 * KIB, b"\x05" * 64 * KIB)
        await node.create_snapshot(b"one")
    except QcowfsError as error:
        assert "\n" not in str(error)
    assert await read(node, 0, 64 * KIB) == b"\x01" * 64 * KIB
    await node.aclose()


# Snapshots


def with_snapshots(*entries: Snapshot, extra_length: int | None = None) -> bytes:
    """An image with a snapshot table of that content at its end."""
    place = len(PLAIN) + -len(PLAIN) % CLUSTER
    data = bytearray(serialize_snapshot_table(entries))
    if extra_length is not None:
        data[36:40] = extra_length.to_bytes(4, "big")
    image = PLAIN + bytes(place - len(PLAIN)) + bytes(data)
    return patched(60, ">IQ", len(entries), place, image=image)


def snapshot(**changes: object) -> Snapshot:
    """A snapshot that shares the active L1."""
    values = {"id": b"1", "name": b"n", "l1_table_offset": L1_OFFSET, "l1_size": 1,
              "disk_size": MIB}  # fmt: skip
    return Snapshot(**(values | changes))  # type: ignore[arg-type]


BAD_SNAPSHOTS = {
    "l1_size max": {"l1_size": HUGE},
    "l1 of 33 MiB": {"l1_size": 33 * MIB // 8},
    "l1 not aligned": {"l1_table_offset": L1_OFFSET + 512},
    "l1 past the end": {"l1_table_offset": 1 << 40},
    "l1 at 0": {"l1_table_offset": 0},
    "l1 near 2^64": {"l1_table_offset": (1 << 64) - CLUSTER},
    "disk size 2^63": {"disk_size": 1 << 63},
    "disk size 2^64-1": {"disk_size": (1 << 64) - 1},
    "no l1": {"l1_size": 0},
}


@pytest.mark.parametrize("name", BAD_SNAPSHOTS)
async def test_a_bad_snapshot_is_listed_and_cannot_be_opened(name: str) -> None:
    """It costs itself: the others, the disk and its own removal go on."""
    other = snapshot(id=b"2", name=b"good", vm_state_size=(1 << 64) - 1)
    image = with_snapshots(snapshot(**BAD_SNAPSHOTS[name]), other)
    node = await open_node(image, read_only=True)
    first, second = node.snapshots()
    with pytest.raises(CorruptImage):
        await node.open_snapshot(first)
    view = await node.open_snapshot(second)
    assert await read(view, 0, 256 * KIB) == b"\x01" * 256 * KIB


@pytest.mark.expects_warnings
@pytest.mark.parametrize("extra_length", [1025, HUGE])
async def test_a_snapshot_table_that_cannot_be_parsed(extra_length: int) -> None:
    """Read-only, the disk is served without snapshots; for writing the image is refused."""
    image = with_snapshots(snapshot(), extra_length=extra_length)
    await refused(image)
    node = await open_node(image, read_only=True)
    assert node.snapshots() == ()
    assert await read(node, 0, 4096) == b"\x01" * 4096


async def test_names_of_any_sort_are_listed() -> None:
    """Slashes, NULs, invalid UTF-8, nothing, 65,535 bytes, and all equal."""
    names = [b"a/b", b"\0", b"\xff", b"", b"x" * 65535, b"x" * 65535]
    entries = [snapshot(id=b"%d" % place, name=name) for place, name in enumerate(names)]
    node = await open_node(with_snapshots(*entries), read_only=True)
    assert [entry.name for entry in node.snapshots()] == names


async def test_a_full_snapshot_table_takes_no_other() -> None:
    """65,536 snapshots are listed; one more is refused with nothing changed."""
    entries = [snapshot(id=b"%d" % place, name=b"n%d" % place) for place in range(65536)]
    image = with_snapshots(*entries)
    storage = MemoryFile(image)
    node = await open_node(storage)
    assert len(node.snapshots()) == 65536
    with pytest.raises(QcowfsError, match="65536"):
        await node.create_snapshot(b"one more")
    await node.aclose()
    assert storage.content == image
