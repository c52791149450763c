"""Snapshots and growth of an image: what they do to bytes, with qemu-img as the oracle."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qcowfs.driver.layout.snapshot_table import parse_snapshot_table, serialize_snapshot_table
from qcowfs.driver.node import Buffer
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import (
    AlreadyExists,
    BadRequest,
    ImageFull,
    NotFound,
    ReadOnlyImage,
    UnsupportedFeature,
)
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    assert_sound,
    close_and_judge,
    make_image,
    open_node,
    read,
    run,
)
from tests.fakes import CrashFile, MemoryFile

KINDS = (
    "",
    "compat=0.10",
    "extended_l2=on,cluster_size=16k",
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=2048,refcount_bits=64",
    "cluster_size=1024,refcount_bits=2",
    "compression_type=zstd",
)


def qemu_reads(image: Buffer, snapshot_id: bytes | None = None) -> bytes:
    """The bytes of the active disk, or of a snapshot, as qemu-img sees them."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "image.qcow2", Path(folder) / "disk.raw"
        source.write_bytes(image)
        chosen = [] if snapshot_id is None else ["-l", f"snapshot.id={snapshot_id.decode()}"]
        run("qemu-img", "convert", *chosen, "-f", "qcow2", "-O", "raw", str(source), str(target))
        return target.read_bytes()


def content_of(node: Qcow2Node) -> bytes:
    """The file under a node that lies in memory."""
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    return bytes(storage.content)


def with_table(image: bytes, **changes: object) -> bytes:
    """The image with all snapshot table entries changed in place."""
    count, place = int.from_bytes(image[60:64], "big"), int.from_bytes(image[64:72], "big")
    entries = parse_snapshot_table(image[place:], count)
    data = serialize_snapshot_table([replace(entry, **changes) for entry in entries])  # type: ignore[arg-type]
    return image[:place] + data + image[place + len(data) :]


class Disk:
    """A node and a model of it: the active bytes, and those of every snapshot by its id."""

    def __init__(self, node: Qcow2Node, content: bytes, seed: int) -> None:
        self.node = node
        self.content = bytearray(content)
        self.snapshots: dict[bytes, bytes] = {}
        self.choice = random.Random(seed)

    async def step(self) -> None:
        """One operation of any sort."""
        choose = self.choice
        kind = choose.choice(("write", "write", "write", "zero", "create", "delete", "apply",
                              "rename", "flush", "grow"))  # fmt: skip
        if kind == "write":
            await self.write(choose.choice((1, 512, 4096, 70000, 200000)))
        elif kind == "zero":
            await self.zero(choose.choice((512, 65536, 300000)))
        elif kind == "flush":
            await self.node.flush()
        elif kind == "grow" and (self.node.metadata.header.version > 2 or not self.snapshots):
            size = len(self.content) + choose.choice((512, 65536, 99840))
            await self.node.grow(size)
            self.content += bytes(size - len(self.content))
        elif kind == "create" and len(self.snapshots) < 5:
            await self.create()
        elif kind in {"delete", "apply", "rename"} and self.snapshots:
            reference = choose.choice(list(self.snapshots))
            if kind == "delete":
                await self.node.delete_snapshot(reference)
                del self.snapshots[reference]
            elif kind == "apply":
                await self.apply(reference)
            else:
                await self.node.rename_snapshot(reference, b"%d" % choose.randrange(1 << 60))

    async def apply(self, reference: bytes) -> None:
        """Go back to a snapshot; nothing happens where a refcount is full."""
        try:
            await self.node.apply_snapshot(reference)
        except ImageFull:
            assert self.node.metadata.geometry.refcount_bits < 8
        else:
            self.content = bytearray(self.snapshots[reference])

    async def write(self, length: int) -> None:
        """Random bytes at a random place."""
        start = self.choice.randrange(len(self.content))
        data = self.choice.randbytes(min(length, len(self.content) - start))
        if not self.node.try_write(start, data):
            await self.node.write_from(start, data)
        self.content[start : start + len(data)] = data

    async def zero(self, length: int) -> None:
        """Zeros at a random place."""
        start = self.choice.randrange(len(self.content))
        length = min(length, len(self.content) - start)
        await self.node.write_zeroes(start, length, unmap=self.choice.random() < 0.5)
        self.content[start : start + length] = bytes(length)

    async def create(self) -> None:
        """A snapshot under a new name; nothing happens where a refcount is full."""
        try:
            snapshot = await self.node.create_snapshot(b"n%d" % self.choice.randrange(1 << 60))
        except ImageFull:
            assert self.node.metadata.geometry.refcount_bits < 8
        else:
            self.snapshots[snapshot.id] = bytes(self.content)

    async def check(self) -> None:
        """All disks read as the model says."""
        assert self.node.failsafe is None
        assert self.node.virtual_size == len(self.content)
        assert await read(self.node, 0, len(self.content)) == self.content
        assert {entry.id for entry in self.node.snapshots()} == set(self.snapshots)
        for entry in self.node.snapshots():
            node = await self.node.open_snapshot(entry)
            assert await read(node, 0, node.virtual_size) == self.snapshots[entry.id]

    async def close(self) -> None:
        """Close, and let qemu-img judge and read all disks."""
        await self.node.aclose()
        content = content_of(self.node)
        assert_sound(content, self.content)
        for reference, expected in self.snapshots.items():
            # qemu-img reads every snapshot with the size of the active disk.
            found = qemu_reads(content, reference)[: len(expected)]
            assert found == expected[: len(found)]


# Any sequence of operations


@pytest.mark.parametrize("miss_rate", [0.0, 0.4])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("options", KINDS)
async def test_any_sequence_agrees_with_qemu(
    options: str, compressed: bool, miss_rate: float
) -> None:
    """Whatever is done in whatever order, all disks hold what they should and no cluster leaks."""
    choose = random.Random(options)
    content = choose.randbytes(4096) * (MIB // 4096) if compressed else bytes(MIB)
    if compressed:
        image = make_image(MIB, options, content=content, compressed=True)
    else:
        image = make_image(MIB, options)
    node = await open_node(image, miss_rate=miss_rate, refusal_rate=miss_rate)
    disk = Disk(node, content, seed=len(options) + compressed)
    for _ in range(40):
        await disk.step()
        await disk.check()
    await disk.close()


async def test_snapshots_of_qemu_can_be_worked_on() -> None:
    """Snapshots that qemu-img has taken are applied, renamed and deleted like our own."""
    image = make_image(MIB, commands=("write -P 1 0 300k",), snapshots=("one", "two"))
    node = await open_node(image)
    await node.write_from(0, b"\x02" * MIB)
    await node.apply_snapshot(b"two")
    await node.delete_snapshot(b"one")
    await node.rename_snapshot(b"two", b"three")
    await node.delete_snapshot(b"three")
    await close_and_judge(node, b"\x01" * 300 * KIB + bytes(MIB - 300 * KIB))


async def test_many_snapshots() -> None:
    """Hundreds of snapshots are taken, listed in order by qemu-img too, and deleted again."""
    count = 400
    node = await open_node(make_image(64 * KIB, "cluster_size=512"))
    for number in range(count):
        await node.write_from(number % 100 * 512, bytes([number % 251]) * 512)
        await node.create_snapshot(b"name %d" % number)
    assert [entry.id for entry in node.snapshots()] == [b"%d" % (n + 1) for n in range(count)]
    await node.flush()
    with tempfile.NamedTemporaryFile(suffix=".qcow2") as file:
        file.write(content_of(node))
        file.flush()
        assert run("qemu-img", "snapshot", "-l", file.name).count("name ") == count
    for number in range(count):
        if number % 50:
            await node.delete_snapshot(b"name %d" % number)
    await close_and_judge(node)


# Names and references


@pytest.mark.parametrize(
    "name",
    [b"/", b"..", b"a/b\x00c", b"\xff\xfe", b" ", b"x" * 65535, "ü".encode(), b"\n\x1b[2J"],
    ids=lambda name: ascii(name[:8]),
)
async def test_any_name_is_kept(name: bytes) -> None:
    """A name is bytes: any but an empty one, up to 65,535 of them."""
    node = await open_node(make_image(MIB))
    await node.create_snapshot(name)
    await node.aclose()
    node = await open_node(content_of(node))
    assert [entry.name for entry in node.snapshots()] == [name]
    await close_and_judge(node)


@pytest.mark.parametrize(
    ("name", "error"),
    [(b"", BadRequest), (b"x" * 65536, BadRequest), (b"one", AlreadyExists)],
)
async def test_a_refused_name_changes_nothing(name: bytes, error: type[Exception]) -> None:
    """An empty, over-long or taken name is refused by create and rename, nothing is written."""
    image = make_image(MIB, snapshots=("one", "two"))
    node = await open_node(image)
    with pytest.raises(error):
        await node.create_snapshot(name)
    with pytest.raises(error):
        await node.rename_snapshot(b"two", name)
    await node.aclose()
    assert content_of(node) == image


async def test_ids_win_over_names() -> None:
    """A reference that is one snapshot's id and another one's name means the id."""
    node = await open_node(make_image(MIB, snapshots=("2", "other")))
    await node.delete_snapshot(b"2")
    assert [entry.name for entry in node.snapshots()] == [b"2"]
    with pytest.raises(NotFound):
        await node.delete_snapshot(b"other")
    await close_and_judge(node)


async def test_equal_names_are_told_apart_by_id() -> None:
    """Where an image has one name twice, each snapshot can still be reached."""
    node = await open_node(with_table(make_image(MIB, snapshots=("a", "b")), name=b"b"))
    await node.rename_snapshot(b"1", b"c")
    assert [entry.name for entry in node.snapshots()] == [b"c", b"b"]
    await close_and_judge(node)


async def test_a_read_only_image_keeps_its_snapshots() -> None:
    """Every operation is refused on an image that is open for reading."""
    image = make_image(MIB, snapshots=("one",))
    node = await open_node(image, read_only=True)
    for operation in (
        node.create_snapshot(b"two"),
        node.delete_snapshot(b"one"),
        node.apply_snapshot(b"one"),
        node.rename_snapshot(b"one", b"two"),
        node.grow(2 * MIB),
    ):
        with pytest.raises(ReadOnlyImage):
            await operation
    await node.aclose()
    assert content_of(node) == image


async def test_a_full_refcount_refuses_a_snapshot() -> None:
    """With refcounts of one bit no cluster can be shared; the image stays as it was."""
    image = make_image(MIB, "refcount_bits=1", commands=("write -P 1 0 100k",))
    node = await open_node(image)
    with pytest.raises(ImageFull):
        await node.create_snapshot(b"one")
    assert node.failsafe is None
    await node.write_from(0, b"\x02" * 4096)
    await close_and_judge(node, b"\x02" * 4096 + b"\x01" * 98304 + bytes(MIB - 102400))


# Sizes


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
async def test_apply_brings_the_size_back(options: str) -> None:
    """A snapshot keeps the size that the disk had, and gives it back when applied."""
    node = await open_node(make_image(100 * KIB, options, commands=("write -P 1 0 100k",)))
    await node.create_snapshot(b"small")
    await node.grow(300 * KIB)
    await node.write_from(200 * KIB, b"\x02" * 100 * KIB)
    await node.create_snapshot(b"large")
    await node.apply_snapshot(b"small")
    assert node.virtual_size == 100 * KIB
    await node.apply_snapshot(b"large")
    assert node.virtual_size == 300 * KIB
    await node.apply_snapshot(b"small")
    await node.grow(200 * KIB)
    await close_and_judge(node, b"\x01" * 100 * KIB + bytes(100 * KIB))


@pytest.mark.parametrize("operation", ["apply", "grow"])
async def test_a_snapshot_that_tells_no_size_keeps_the_one_it_had(operation: str) -> None:
    """Entries of old writers have the active disk's size; it is noted before that changes."""
    node = await open_node(make_image(MIB, commands=("write -P 1 0 1M",)))
    await node.create_snapshot(b"small")
    await node.grow(2 * MIB)
    await node.create_snapshot(b"old")
    await node.aclose()
    image = content_of(node)
    count, place = int.from_bytes(image[60:64], "big"), int.from_bytes(image[64:72], "big")
    small, old = parse_snapshot_table(image[place:], count)
    data = serialize_snapshot_table([small, replace(old, disk_size=None)])
    node = await open_node(image[:place] + data + image[place + len(data) :])
    if operation == "apply":
        await node.apply_snapshot(b"small")
        assert node.virtual_size == MIB
    else:
        await node.grow(3 * MIB)
    await node.aclose()
    node = await open_node(content_of(node))
    view = await node.open_snapshot(node.snapshots()[1])
    assert view.virtual_size == 2 * MIB
    assert await read(view, 0, 2 * MIB) == b"\x01" * MIB + bytes(MIB)
    await close_and_judge(node)


async def test_version_2_with_snapshots_does_not_grow() -> None:
    """Its snapshots could not say their own size to old readers."""
    node = await open_node(make_image(MIB, "compat=0.10", snapshots=("one",)))
    with pytest.raises(UnsupportedFeature):
        await node.grow(2 * MIB)
    assert node.virtual_size == MIB
    await close_and_judge(node)


async def test_growth_hides_what_lay_behind_the_end() -> None:
    """Tables behind the disk's end (the VM state of an applied snapshot) never become disk."""
    node = await open_node(make_image(64 * KIB, "cluster_size=512"))
    await node.grow(128 * KIB)
    await node.write_from(0, b"\x07" * 128 * KIB)
    await node.aclose()
    image = bytearray(content_of(node))
    image[24:32] = (64 * KIB).to_bytes(8, "big")
    node = await open_node(bytes(image))
    await node.grow(100 * KIB)
    assert await read(node, 64 * KIB, 36 * KIB) == bytes(36 * KIB)
    await node.grow(128 * KIB)
    await close_and_judge(node, b"\x07" * 64 * KIB + bytes(64 * KIB))


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "extended_l2=on"])
async def test_growth_never_shows_a_longer_backing_file(options: str) -> None:
    """Whenever a crash comes, the disk has its old size, or the new one with zeros behind it."""
    backing = b"\x09" * 300 * KIB
    image = make_image(100 * KIB, options, backing=backing)
    storage = CrashFile(image)
    node = await open_node(storage, backing=backing)
    await node.grow(400 * KIB)
    assert await read(node, 0, 400 * KIB) == backing[: 100 * KIB] + bytes(300 * KIB)
    await node.aclose()
    assert_sound(storage.content, backing=backing)
    for state in storage.states(each_limit=6, subset_count=2, torn_count=1):
        left = await open_node(state.content, backing=backing)
        content = await read(left, 0, left.virtual_size)
        assert left.virtual_size in {100 * KIB, 400 * KIB}, state.description
        assert content == (backing[: 100 * KIB] + bytes(300 * KIB))[: left.virtual_size]
        await left.aclose()


# Readers meanwhile


@pytest.mark.parametrize("operation", ["delete", "apply"])
async def test_a_read_under_way_sees_what_it_began_with(operation: str) -> None:
    """Clusters that an operation frees are not handed out while an older read may use them."""
    image = make_image(MIB, commands=("write -P 1 0 1M",), snapshots=("one",))
    node = await open_node(image, miss_rate=1.0)
    await node.write_from(0, b"\x02" * MIB)
    snapshot = await node.open_snapshot(node.snapshots()[0])
    found: list[bytes] = []

    async def keep_reading(source: Sequence[object], done: trio.Event) -> None:
        while not done.is_set():
            try:
                found.append(await read(source[0], 0, MIB))  # type: ignore[arg-type]
            except NotFound:
                return

    async with trio.open_nursery() as nursery:
        done = trio.Event()
        nursery.start_soon(keep_reading, [snapshot], done)
        nursery.start_soon(keep_reading, [node], done)
        await trio.lowlevel.checkpoint()
        if operation == "delete":
            await node.delete_snapshot(b"one")
        else:
            await node.apply_snapshot(b"one")
        done.set()
    assert found
    assert set(found) <= {b"\x01" * MIB, b"\x02" * MIB}
    await close_and_judge(node, (b"\x02" if operation == "delete" else b"\x01") * MIB)


async def test_writes_wait_for_an_operation() -> None:
    """A write that meets a snapshot being taken comes before or after it, never inside."""
    node = await open_node(make_image(MIB), miss_rate=0.5, refusal_rate=0.5)
    await node.write_from(0, b"\x01" * MIB)

    async def write_all(value: int) -> None:
        for place in range(0, MIB, 64 * KIB):
            await node.write_from(place, bytes([value]) * 64 * KIB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, 2)
        for number in range(4):
            await node.create_snapshot(b"n%d" % number)
    for entry in node.snapshots():
        view = await node.open_snapshot(entry)
        content = await read(view, 0, MIB)
        edge = content.rfind(b"\x02") + 1
        assert content == b"\x02" * edge + b"\x01" * (MIB - edge)
    await close_and_judge(node, b"\x02" * MIB)
