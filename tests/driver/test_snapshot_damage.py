"""Snapshots of broken images, of failing hosts, in great numbers, and what is written for them."""

import random
from dataclasses import replace

import pytest
import trio

from qcowfs.driver.layout.geometry import MAX_SNAPSHOT_COUNT, OFLAG_COPIED
from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.layout.snapshot_table import (
    Snapshot,
    parse_snapshot_table,
    serialize_snapshot_table,
)
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import AlreadyExists, CorruptImage, ImageFull, QcowfsError
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    assert_sound,
    close_and_judge,
    entry_place,
    make_image,
    open_node,
    read,
    with_entry,
)
from tests.fakes import CrashFile, FaultyFile, MemoryFile

WRITTEN = b"\x01" * 300 * KIB + bytes(MIB - 300 * KIB)
IMAGE = make_image(MIB, "cluster_size=4k", commands=("write -P 1 0 300k",), snapshots=("a", "b"))


def entries_of(image: bytes | bytearray) -> tuple[Snapshot, ...]:
    """The snapshot table of an image."""
    header = parse_header(bytes(image[: 2 * MIB]), len(image))
    return parse_snapshot_table(bytes(image[header.snapshots_offset :]), header.nb_snapshots)


def with_entries(image: bytes, entries: list[Snapshot]) -> bytes:
    """The image with another snapshot table, put behind its end; the old one is counted no more."""
    header = parse_header(image[: 2 * MIB], len(image))
    size = header.cluster_size
    data = serialize_snapshot_table(entries)
    place = -(-len(image) // size) * size
    end = -(-(place + len(data)) // size) * size
    made = bytearray(image) + bytes(end - len(image))
    made[place : place + len(data)] = data
    made[60:72] = len(entries).to_bytes(4, "big") + place.to_bytes(8, "big")
    # One refcount block of 16-bit counts describes all of it.
    assert end // size <= size // 2
    table = header.refcount_table_offset
    block = int.from_bytes(image[table : table + 8], "big")
    for cluster in range(place // size, end // size):
        made[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\1"
    if header.nb_snapshots:
        old = header.snapshots_offset // size
        made[block + 2 * old : block + 2 * old + 2] = b"\0\0"
    return bytes(made)


def content_of(node: Qcow2Node) -> bytes:
    """The file under a node that lies in memory, perhaps behind faults."""
    storage = node.metadata.storage
    if isinstance(storage, FaultyFile):
        storage = storage.inner
    assert isinstance(storage, MemoryFile)
    return bytes(storage.content)


# What is written


async def test_an_entry_is_as_qemu_writes_it() -> None:
    """24 bytes of extra data: VM state size, the disk's size, no instruction count."""
    node = await open_node(IMAGE)
    made = await node.create_snapshot(b"c")
    await node.aclose()
    image = content_of(node)
    theirs, ours = entries_of(image)[0], entries_of(image)[2]
    assert ours == made
    assert ours.id == b"3"
    assert (ours.vm_state_size, ours.disk_size, ours.icount) == (0, MIB, None)
    assert (ours.l1_size, ours.vm_clock_nsec) == (theirs.l1_size, theirs.vm_clock_nsec)
    assert abs(ours.date_sec - theirs.date_sec) < 86400 * 3650
    place = int.from_bytes(image[64:72], "big")
    lengths = [len(serialize_snapshot_table(entries_of(image)[:count])) for count in range(4)]
    for start in lengths[:3]:
        assert image[place + start + 36 : place + start + 40] == (24).to_bytes(4, "big")


async def test_unknown_extra_data_is_kept() -> None:
    """What a later version wrote about other snapshots survives every operation."""
    entries = [
        replace(entry, unknown_extra=b"later" * 9, icount=7 + number, vm_state_size=0)
        for number, entry in enumerate(entries_of(IMAGE))
    ]
    node = await open_node(with_entries(IMAGE, entries))
    await node.create_snapshot(b"c")
    await node.rename_snapshot(b"a", b"d")
    await node.delete_snapshot(b"c")
    await node.aclose()
    found = entries_of(content_of(node))
    assert found == (replace(entries[0], name=b"d"), entries[1])


@pytest.mark.parametrize("operation", ["create", "delete", "rename"])
async def test_a_table_is_published_by_one_write(operation: str) -> None:
    """Count and offset go out together: 12 bytes at 60, and nothing else of the header."""
    file = CrashFile(IMAGE)
    node = await open_node(file)
    if operation == "create":
        await node.create_snapshot(b"c")
    elif operation == "delete":
        await node.delete_snapshot(b"a")
    else:
        await node.rename_snapshot(b"a", b"c")
    await node.aclose()
    written = [(each.host_offset, each.length) for each in file.log
               if each.kind == "pwrite" and each.host_offset < 4096]  # fmt: skip
    assert written == [(60, 12)]


async def test_apply_is_published_by_one_write() -> None:
    """Size and L1 table change together: 24 bytes at 24 where the size does, else 12 at 36."""
    file = CrashFile(IMAGE)
    node = await open_node(file)
    await node.apply_snapshot(b"a")
    await node.grow(2 * MIB)
    start = len(file.log)
    await node.apply_snapshot(b"a")
    await node.aclose()
    written = [(each.host_offset, each.length) for each in file.log
               if each.kind == "pwrite" and each.host_offset < 4096]  # fmt: skip
    assert written[0] == (36, 12)
    late = [(each.host_offset, each.length) for each in file.log[start:]
            if each.kind == "pwrite" and each.host_offset < 4096]  # fmt: skip
    assert late == [(24, 24)]


async def test_two_at_once_cannot_have_one_name() -> None:
    """Of tasks that take a snapshot under the same name, one succeeds."""
    node = await open_node(IMAGE, miss_rate=0.3)
    refused = 0

    async def create() -> None:
        nonlocal refused
        try:
            await node.create_snapshot(b"same")
        except AlreadyExists:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(create)
    assert refused == 3
    assert [entry.name for entry in node.snapshots()] == [b"a", b"b", b"same"]
    await close_and_judge(node, WRITTEN)


# Sharing


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on",
                                     "cluster_size=512,refcount_bits=64"])  # fmt: skip
async def test_compressed_pieces_are_shared_by_many(options: str) -> None:
    """Each snapshot holds a reference for each piece; the last one to go frees the cluster."""
    content = random.Random(5).randbytes(256) * (512 * KIB // 256)
    node = await open_node(make_image(512 * KIB, options, content=content, compressed=True))
    held = {b"n%d" % number: b"" for number in range(5)}
    expected = bytearray(content)
    for number, name in enumerate(held):
        held[name] = bytes(expected)
        await node.create_snapshot(name)
        place = number * 70_000
        await node.write_from(place, b"\x07" * 33_000)
        expected[place : place + 33_000] = b"\x07" * 33_000
    for name in (b"n3", b"n0", b"n4", b"n1", b"n2"):
        listed = {entry.name: entry for entry in node.snapshots()}
        view = await node.open_snapshot(listed[name])
        assert await read(view, 0, 512 * KIB) == held[name]
        await node.delete_snapshot(name)
        await node.flush()
        assert_sound(content_of(node), expected)
    await close_and_judge(node, expected)


async def test_thousands_are_listed_and_worked_on() -> None:
    """2,000 entries of one L1 each; create, rename and delete keep all the others."""
    node = await open_node(make_image(64 * KIB, "cluster_size=4k"))
    await node.create_snapshot(b"first")
    await node.aclose()
    image = content_of(node)
    first = entries_of(image)[0]
    # Empty disks need no L1 table: such entries refer to nothing.
    many = [replace(first, id=b"%d" % number, name=b"name %d" % number, l1_table_offset=0,
                    l1_size=0, disk_size=0) for number in range(2, 2002)]  # fmt: skip
    node = await open_node(with_entries(image, [first, *many]))
    assert len(node.snapshots()) == 2001
    made = await node.create_snapshot(b"new")
    assert made.id == b"2002"
    await node.rename_snapshot(b"name 77", b"renamed")
    await node.delete_snapshot(b"name 78")
    await node.aclose()
    found = entries_of(content_of(node))
    assert len(found) == 2001
    assert found[76].name == b"renamed"
    assert found[77] == many[77]
    assert_sound(content_of(node), leaks=1 << 20)


async def test_65536_are_the_limit() -> None:
    """One more is refused before anything is written."""
    many = [
        Snapshot(id=b"%d" % number, name=b"n", l1_table_offset=0, l1_size=0, disk_size=0)
        for number in range(MAX_SNAPSHOT_COUNT)
    ]
    image = with_entries(make_image(MIB), many)
    node = await open_node(image)
    with pytest.raises(ImageFull, match="65536"):
        await node.create_snapshot(b"new")
    await node.aclose()
    assert content_of(node) == image


# Broken images


@pytest.mark.parametrize(
    "entry", [OFLAG_COPIED | 0x200, 1 << 57, OFLAG_COPIED | 1 << 40, OFLAG_COPIED | 0x1000],
    ids=["unaligned", "reserved", "past-the-end", "refcount-table"],
)
async def test_a_broken_disk_is_not_kept(entry: int) -> None:
    """Over a damaged L2 entry no snapshot is taken; the file stays as it was, writing goes on."""
    image = with_entry(IMAGE, 200 * KIB, entry)
    node = await open_node(image)
    for _ in range(2):
        with pytest.raises(CorruptImage):
            await node.create_snapshot(b"c")
    assert len(node.snapshots()) == 2
    await node.flush()
    assert content_of(node) == image
    await node.write_from(0, b"\x09" * 4096)
    assert await read(node, 0, 4096) == b"\x09" * 4096
    await node.aclose()


@pytest.mark.parametrize("entry", [OFLAG_COPIED | 0x200, 1 << 57, OFLAG_COPIED | 0x1000])
async def test_a_broken_l1_is_not_kept(entry: int) -> None:
    """The same for an entry of the active L1 table."""
    place = int.from_bytes(IMAGE[40:48], "big")
    image = IMAGE[:place] + entry.to_bytes(8, "big") + IMAGE[place + 8 :]
    node = await open_node(image)
    with pytest.raises(CorruptImage):
        await node.create_snapshot(b"c")
    await node.flush()
    assert content_of(node) == image
    await node.aclose()


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    "changes",
    [
        {"l1_table_offset": 0x5200},
        {"l1_table_offset": 1 << 40},
        {"l1_size": 0},
        {"l1_size": 1 << 30},
        {"disk_size": 1 << 60},
    ],
    ids=repr,
)
async def test_a_broken_snapshot_costs_itself(changes: dict[str, int]) -> None:
    """It is listed, cannot be opened or applied, and can be removed; all others are as before."""
    first, second = entries_of(IMAGE)
    node = await open_node(with_entries(IMAGE, [replace(first, **changes), second]))
    bad, good = node.snapshots()
    with pytest.raises(CorruptImage):
        await node.open_snapshot(bad)
    with pytest.raises(CorruptImage):
        await node.apply_snapshot(b"a")
    assert await read(await node.open_snapshot(good), 0, MIB) == WRITTEN
    await node.create_snapshot(b"c")
    await node.delete_snapshot(b"a")
    assert await read(await node.open_snapshot(good), 0, MIB) == WRITTEN
    await node.apply_snapshot(b"c")
    assert node.failsafe is None
    await node.aclose()
    assert_sound(content_of(node), WRITTEN, leaks=1 << 20)


@pytest.mark.expects_warnings
async def test_two_with_one_l1_table() -> None:
    """Removing one of them leaves the other one whole: the shared table is nobody's to free."""
    first, second = entries_of(IMAGE)
    shared = replace(first, l1_table_offset=second.l1_table_offset)
    node = await open_node(with_entries(IMAGE, [shared, second]))
    await node.delete_snapshot(b"a")
    await node.write_from(0, b"\x05" * MIB)
    await node.flush()
    left = await node.open_snapshot(node.snapshots()[0])
    assert await read(left, 0, MIB) == WRITTEN
    assert node.failsafe is None
    await node.aclose()
    assert_sound(content_of(node), b"\x05" * MIB, leaks=1 << 20)


@pytest.mark.expects_warnings
async def test_a_damaged_table_of_a_snapshot_leaks() -> None:
    """A snapshot one of whose L2 entries is broken can be removed; what it led to stays in use."""
    node = await open_node(IMAGE)
    await node.write_from(0, b"\x03" * MIB)
    await node.aclose()
    image = bytearray(content_of(node))
    l1_place = entries_of(image)[0].l1_table_offset
    table = int.from_bytes(image[l1_place : l1_place + 8], "big")
    assert table + 8 != entry_place(image, 4096)
    image[table + 8 : table + 16] = (1 << 57).to_bytes(8, "big")
    node = await open_node(bytes(image))
    for name in (b"a", b"b"):
        await node.delete_snapshot(name)
    assert node.failsafe is None
    await node.aclose()
    assert_sound(content_of(node), b"\x03" * MIB, leaks=1 << 20)


# Failing hosts


@pytest.mark.expects_warnings
@pytest.mark.parametrize("method", ["read", "write", "sync"])
@pytest.mark.parametrize("operation", ["create", "delete", "apply", "rename"])
async def test_a_failing_host_leaves_a_sound_image(operation: str, method: str) -> None:
    """Whichever call fails, every disk in the file is one from before or after, nothing corrupt."""
    for nth in range(1, 40):
        file = FaultyFile(MemoryFile(IMAGE, miss_rate=0.3, refusal_rate=0.3, seed=nth))
        node = await open_node(file)
        await node.write_from(0, b"\x04" * 100 * KIB)
        await node.flush()
        now = b"\x04" * 100 * KIB + WRITTEN[100 * KIB :]
        fault = file.fail(method, nth)
        try:
            await _operate(node, operation)
        except (OSError, QcowfsError):
            pass
        file.heal()
        try:
            await node.aclose()
        except (OSError, QcowfsError):
            assert method == "sync" or node.failsafe is not None
        await _check_disks(content_of(node), {now, WRITTEN} if operation == "apply" else {now})
        if not fault.hit_count:
            break
    else:
        pytest.fail("more than 40 calls")


async def _operate(node: Qcow2Node, operation: str) -> None:
    if operation == "create":
        await node.create_snapshot(b"c")
    elif operation == "rename":
        await node.rename_snapshot(b"a", b"c")
    elif operation == "delete":
        await node.delete_snapshot(b"a")
    else:
        await node.apply_snapshot(b"a")


async def _check_disks(image: bytes, allowed: set[bytes]) -> None:
    """The active disk is an allowed one, snapshots hold what they held; qemu-img finds leaks."""
    left = await open_node(image, read_only=True)
    found = await read(left, 0, MIB)
    assert found in allowed
    for entry in left.snapshots():
        wanted = WRITTEN if entry.name in {b"a", b"b"} or entry.id != b"3" else found
        assert await read(await left.open_snapshot(entry), 0, MIB) == wanted
    await left.aclose()
    # In failsafe, COPIED flags may be left out of date: a repair of them must do.
    try:
        assert_sound(image, found, leaks=1 << 20)
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("ERROR")]
        assert lines
        assert all("OFLAG_COPIED" in line for line in lines), str(error)

