"""Qcow2Node as a whole: the contract of every node over many geometries, opening, closing."""

import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfs.driver.node import Node
from qcowfs.driver.qcow2 import image as image_module
from qcowfs.driver.qcow2.image import Qcow2Node, SnapshotNode, open_qcow2
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.errors import (
    BadRequest,
    CorruptImage,
    KeyRequired,
    NotFound,
    ReadOnlyImage,
)
from tests.driver import contract
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
from tests.fakes import FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]
checks = pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)

GEOMETRIES = {
    "512": "cluster_size=512",
    "4k": "cluster_size=4k",
    "64k": "",
    "2M": "cluster_size=2M",
    "version 2": "compat=0.10",
    "version 2, 512": "compat=0.10,cluster_size=512",
    "subclusters 16k": "cluster_size=16k,extended_l2=on",
    "subclusters 128k": "cluster_size=128k,extended_l2=on",
    "refcount 1": "cluster_size=4k,refcount_bits=1",
    "refcount 2": "cluster_size=4k,refcount_bits=2",
    "refcount 64": "cluster_size=4k,refcount_bits=64",
    "preallocated": "preallocation=metadata",
}
geometries = pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())


class Maker:
    """Makes nodes over memory and keeps their files, to be judged afterwards."""

    def __init__(self, options: str, *, compressed: bool = False, miss_rate: float = 0.0) -> None:
        self.options = options
        self.compressed = compressed
        self.miss_rate = miss_rate
        self.files: list[MemoryFile] = []

    async def __call__(self, content: bytes, *, read_only: bool = False) -> Node:
        if self.options == "preallocation=metadata":
            image = make_image(len(content), self.options)
        else:
            image = make_image(
                len(content), self.options, content=content, compressed=self.compressed
            )
        storage = MemoryFile(
            image,
            read_only=read_only,
            miss_rate=self.miss_rate,
            refusal_rate=self.miss_rate,
            seed=3,
        )
        self.files.append(storage)
        if self.options == "preallocation=metadata":
            filler = await open_node(MemoryFile(image))
            await filler.write_from(0, content)
            written = filler.metadata.storage
            await filler.aclose()
            assert isinstance(written, MemoryFile)
            storage.content[:] = written.content
        return await open_node(storage, read_only=read_only, cache_size=64 * KIB)


@geometries
@checks
async def test_the_contract_holds(check: Check, options: str) -> None:
    """Every rule of the contract, over each geometry; qemu-img finds no fault afterwards."""
    make = Maker(options)
    await check(make)
    for file in make.files:
        assert_sound(file.content)


@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "", "cluster_size=16k,extended_l2=on", "compat=0.10"]
)
@checks
async def test_the_contract_holds_when_it_has_to_wait(check: Check, options: str) -> None:
    """Every rule, where most bytes are not resident and most writes are refused inline."""
    make = Maker(options, miss_rate=0.6)
    await check(make)
    for file in make.files:
        assert_sound(file.content)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@checks
async def test_the_contract_holds_over_compressed_clusters(check: Check, method: str) -> None:
    """Every rule, over images that begin compressed."""
    make = Maker(f"compression_type={method}", compressed=True)
    await check(make)
    for file in make.files:
        assert_sound(file.content)


@geometries
async def test_the_rules_of_overlays_hold(options: str) -> None:
    """A backing file shows through up to its end and never after a change."""
    files: list[tuple[MemoryFile, bytes]] = []

    async def make_overlay(backing: bytes, size: int) -> Node:
        if "preallocation" in options:
            image = make_image(size, backing=backing)
        else:
            image = make_image(size, options, backing=backing)
        storage = MemoryFile(image)
        files.append((storage, backing))
        return await open_node(storage, backing=backing)

    await contract.check_overlay(make_overlay)
    for storage, backing in files:
        assert_sound(storage.content, backing=backing)


@checks
async def test_the_contract_holds_over_a_host_file(check: Check, tmp_path: Path) -> None:
    """Every rule over a file of the host."""
    paths: list[Path] = []

    async def make_node(content: bytes, *, read_only: bool = False) -> Node:
        path = tmp_path / f"{len(paths)}.qcow2"
        paths.append(path)
        path.write_bytes(make_image(len(content), content=content))
        role = LockRole.QCOW2_READ if read_only else LockRole.QCOW2_WRITE
        storage = await HostFile.open(path, writable=not read_only, role=role)
        return await open_qcow2(storage, path=str(path), read_only=read_only, backing=None)

    await check(make_node)
    for path in paths:
        assert_sound(path.read_bytes())


def fault_free(node: Qcow2Node) -> MemoryFile:
    """The file in memory behind a node."""
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    return storage


async def test_a_read_only_node_writes_nothing() -> None:
    """Opening, reading, flushing and closing read-only leave the file as it was."""
    image = make_image(MIB, commands=("write -P 1 0 64k",))
    storage = MemoryFile(image, read_only=True)
    node = await open_node(storage, read_only=True)
    await read(node, 0, MIB)
    await node.flush()
    await node.aclose()
    assert storage.content == image
    assert storage.sync_count == 0


async def test_a_writable_node_that_is_not_written_to_writes_nothing() -> None:
    """Only a change makes a file change."""
    image = make_image(MIB, commands=("write -P 1 0 64k",))
    storage = MemoryFile(image)
    node = await open_node(storage)
    await read(node, 0, MIB)
    await node.flush()
    await node.aclose()
    assert storage.content == image


async def test_what_was_flushed_is_in_the_file() -> None:
    """After a flush the file, as it is, shows what was written."""
    node = await open_node(make_image())
    await node.write_from(1000, b"x" * 5000)
    await node.flush()
    assert_sound(fault_free(node).content, bytes(1000) + b"x" * 5000 + bytes(MIB - 6000))
    await node.aclose()


async def test_a_flush_with_nothing_dirty_is_one_sync() -> None:
    """After in-place writes a flush costs one sync, and two after allocating ones."""
    node = await open_node(make_image())
    storage = fault_free(node)
    await node.write_from(0, b"x" * 512)
    await node.flush()
    before = storage.sync_count
    await node.write_from(0, b"y" * 512)
    await node.flush()
    assert storage.sync_count == before + 1
    await node.write_from(128 * KIB, b"y" * 512)
    await node.flush()
    assert storage.sync_count == before + 3
    await node.aclose()


async def test_changes_are_committed_without_being_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What has been changed for some seconds is in the file, with `maintain` running."""
    node = await open_node(make_image())
    await node.write_from(0, b"x" * 512)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.maintain)
        await trio.sleep(image_module.COMMIT_AFTER / 2)
        assert node.metadata.dirty
        await trio.sleep(image_module.COMMIT_AFTER + 3)
        assert not node.metadata.dirty
        nursery.cancel_scope.cancel()
    assert_sound(fault_free(node).content, b"x" * 512 + bytes(MIB - 512))
    await node.aclose()


@pytest.mark.expects_warnings
async def test_a_full_host_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    """A commit that finds no room loses nothing: `maintain` goes on trying."""
    storage = FaultyFile(MemoryFile(make_image()))
    node = await open_node(storage)
    await node.write_from(0, b"x" * 512)
    storage.fail("change", 1, 28, repeat=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.maintain)
        await trio.sleep(3 * image_module.COMMIT_AFTER)
        assert node.metadata.dirty
        storage.heal()
        await trio.sleep(3 * image_module.COMMIT_AFTER)
        nursery.cancel_scope.cancel()
    assert not node.metadata.dirty
    assert not node.read_only
    await close_and_judge(node, b"x" * 512 + bytes(MIB - 512))


@pytest.mark.expects_warnings
async def test_a_failed_sync_ends_all_writing() -> None:
    """After a sync that failed the image is read-only, and closing it says so too."""
    storage = FaultyFile(MemoryFile(make_image()))
    node = await open_node(storage)
    await node.write_from(0, b"x" * 512)
    storage.fail("sync")
    with pytest.raises(OSError):
        await node.flush()
    assert node.read_only
    assert node.failsafe is not None
    await node.aclose()


async def test_closing_releases_everything_when_the_flush_fails() -> None:
    """The first failure is raised once the file and the backing chain are closed."""
    inner = MemoryFile(make_image(MIB, backing=bytes(MIB)))
    storage = FaultyFile(inner)
    node = await open_node(storage, backing=bytes(MIB))
    assert node.backing is not None
    await node.write_from(0, b"x" * 512)
    storage.fail("change", 1, 28, repeat=True)
    with pytest.raises(OSError):
        await node.aclose()
    assert inner.closed
    with pytest.raises(OSError):
        await node.backing.read_into(0, memoryview(bytearray(512)))
    await node.aclose()


@pytest.mark.parametrize("bit", [1, 2], ids=["dirty", "corrupt"])
async def test_marked_image_is_not_opened_for_writing(bit: int) -> None:
    """An image marked dirty or corrupt is read only, and says what to do about it."""
    image = bytearray(make_image())
    image[79] |= bit
    with pytest.raises(CorruptImage) as refusal:
        await open_node(bytes(image))
    assert refusal.value.hint is not None
    node = await open_node(bytes(image), read_only=True)
    assert await read(node, 0, 512) == bytes(512)
    await node.aclose()


async def test_encrypted_image_is_refused() -> None:
    """Without its passphrase an encrypted image is refused, with a way out."""
    image = bytearray(make_image())
    image[35] = 1
    with pytest.raises(KeyRequired, match="encrypted") as refusal:
        await open_node(bytes(image))
    assert refusal.value.hint is not None


@pytest.mark.parametrize("content", [b"", b"QFI", b"\0" * 4096])
async def test_other_files_are_refused(content: bytes) -> None:
    """What is no qcow2 image raises BadRequest or CorruptImage."""
    with pytest.raises((BadRequest, CorruptImage)):
        await open_node(content, read_only=True)


async def test_cut_off_image_is_not_opened_for_writing() -> None:
    """An image whose file lost its end is read only."""
    image = make_image(MIB, commands=("write -P 1 0 1M",))[:-200_000]
    with pytest.raises(CorruptImage):
        await open_node(image)
    node = await open_node(image, read_only=True)
    await node.aclose()


SNAPSHOTS = make_image(MIB, commands=("write -P 1 0 128k",), snapshots=("one", "two"))


async def test_snapshots_are_listed_in_order() -> None:
    """The snapshots of an image are known once it is open."""
    node = await open_node(SNAPSHOTS)
    assert [snapshot.name for snapshot in node.snapshots()] == [b"one", b"two"]
    await node.aclose()


@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
async def test_a_snapshot_reads_as_it_was_taken(miss_rate: float) -> None:
    """Later writes, zeroing and discards do not show in a snapshot, which refuses its own."""
    node = await open_node(SNAPSHOTS, miss_rate=miss_rate)
    snapshot = await node.open_snapshot(node.snapshots()[0])
    assert isinstance(snapshot, Node)
    await node.write_from(1000, b"x" * 1000)
    await node.write_zeroes(64 * KIB, 64 * KIB)
    await node.flush()
    assert await read(snapshot, 0, MIB) == b"\1" * 128 * KIB + bytes(896 * KIB)
    instant = snapshot.try_read(0, 4096)
    assert instant is None or instant == b"\1" * 4096
    with pytest.raises(ReadOnlyImage):
        snapshot.try_write(0, b"x")
    with pytest.raises(ReadOnlyImage):
        await snapshot.write_from(0, b"x")
    await snapshot.aclose()
    assert await read(snapshot, 0, 512) == b"\1" * 512
    await close_and_judge(node)


async def test_a_snapshot_has_its_own_size_and_backing(tmp_path: Path) -> None:
    """A snapshot's disk keeps the size that it had, and shows the backing file in it."""
    base = random.Random(4).randbytes(2 * MIB)
    (tmp_path / "base.raw").write_bytes(base)
    path = tmp_path / "image.qcow2"
    path.write_bytes(make_image(MIB, backing=base, snapshots=("s",)))
    run("qemu-img", "snapshot", "-d", "s", str(path))
    run("qemu-img", "snapshot", "-c", "small", str(path))
    run("qemu-img", "resize", "-q", str(path), "2M")
    node = await open_node(path.read_bytes(), backing=base)
    snapshot = await node.open_snapshot(node.snapshots()[0])
    assert node.virtual_size == 2 * MIB
    assert snapshot.virtual_size == MIB
    assert await read(snapshot, 0, MIB) == base[:MIB]
    with pytest.raises(BadRequest):
        await read(snapshot, MIB, 512)
    await node.aclose()


async def test_all_who_open_a_snapshot_share_its_node() -> None:
    """One node serves all users of a snapshot."""
    node = await open_node(SNAPSHOTS)
    one = await node.open_snapshot(node.snapshots()[0])
    assert await node.open_snapshot(node.snapshots()[0]) is one
    assert await node.open_snapshot(node.snapshots()[1]) is not one
    await node.aclose()


async def test_a_deleted_snapshot_is_gone_for_all() -> None:
    """From the beginning of its deletion a snapshot answers NotFound."""
    node = await open_node(SNAPSHOTS)
    first, second = node.snapshots()
    snapshot = await node.open_snapshot(first)
    await node.delete_snapshot(b"one")
    with pytest.raises(NotFound):
        snapshot.try_read(0, 512)
    with pytest.raises(NotFound):
        snapshot.try_read_into(0, memoryview(bytearray(512)))
    with pytest.raises(NotFound):
        await read(snapshot, 0, 512)
    with pytest.raises(NotFound):
        await snapshot.extents(0, 512)
    with pytest.raises(NotFound):
        await node.open_snapshot(first)
    assert node.snapshots() == (second,)
    await close_and_judge(node)


async def test_a_snapshot_comes_back_when_its_deletion_fails() -> None:
    """When the table cannot be written, the snapshot is there as before."""
    storage = FaultyFile(MemoryFile(SNAPSHOTS))
    node = await open_node(storage)
    await node.metadata.prepare_writing()
    first = node.snapshots()[0]
    snapshot = await node.open_snapshot(first)
    storage.fail("change", 1, 28, repeat=True)
    with pytest.raises(OSError):
        await node.delete_snapshot(b"one")
    storage.heal()
    assert await read(snapshot, 0, 512) == b"\1" * 512
    assert await node.open_snapshot(first) is snapshot
    await node.aclose()


async def test_a_snapshot_opened_during_its_deletion_is_gone_as_well() -> None:
    """No node of a deleted snapshot stays readable, whenever it was opened."""
    node = await open_node(MemoryFile(SNAPSHOTS, miss_rate=1.0, refusal_rate=1.0))
    first = node.snapshots()[0]
    opened: list[SnapshotNode] = []
    deleted = False

    async def open_again_and_again() -> None:
        while not deleted:
            try:
                opened.append(await node.open_snapshot(first))
            except NotFound:
                return
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_again_and_again)
        await node.delete_snapshot(b"one")
        deleted = True
    assert opened
    for snapshot in opened:
        with pytest.raises(NotFound):
            await read(snapshot, 0, 512)
    await close_and_judge(node)


async def test_growth_reads_as_zeros(tmp_path: Path) -> None:
    """What lies behind the old end is zeros, over a longer backing file too."""
    base = random.Random(4).randbytes(2 * MIB)
    size = MIB + 512
    node = await open_node(make_image(size, backing=base), backing=base)
    await node.write_from(size - 512, b"x" * 512)
    await node.grow(3 * MIB)
    model = base[: size - 512] + b"x" * 512 + bytes(3 * MIB - size)
    assert await read(node, 0, 3 * MIB) == model
    await close_and_judge(node, model, backing=base)


async def test_growth_keeps_what_is_written_at_once() -> None:
    """Writers that wait for more room never lose what they write into it."""
    node = await open_node(
        MemoryFile(make_image(512, "cluster_size=64k"), miss_rate=0.5, refusal_rate=0.5)
    )

    async def append(lane: int) -> None:
        for number in range(10):
            start = (1 + number * 8 + lane) * 512
            if start + 512 > node.virtual_size:
                # Another one may have made it larger still.
                with suppress(BadRequest):
                    await node.grow(start + 512)
            await node.write_from(start, bytes([1 + lane]) * 512)

    async with trio.open_nursery() as nursery:
        for lane in range(8):
            nursery.start_soon(append, lane)
    model = bytes(512) + b"".join(bytes([1 + lane]) * 512 for lane in range(8)) * 10
    assert await read(node, 0, node.virtual_size) == model
    await close_and_judge(node, model)


async def test_a_bad_snapshot_costs_itself_only() -> None:
    """A snapshot whose L1 table cannot be used is listed, and raises CorruptImage when opened."""
    image = bytearray(SNAPSHOTS)
    table = int.from_bytes(image[64:72], "big")
    image[table : table + 8] = (0x1234).to_bytes(8, "big")
    node = await open_node(bytes(image), read_only=True)
    first, second = node.snapshots()
    with pytest.raises(CorruptImage):
        await node.open_snapshot(first)
    assert await read(await node.open_snapshot(second), 0, 512) == b"\1" * 512
    await node.aclose()


@pytest.mark.expects_warnings
async def test_a_bad_snapshot_table_is_no_reason_not_to_read() -> None:
    """Read-only, an image with a broken snapshot table shows its disk; it is not written to."""
    image = bytearray(SNAPSHOTS)
    table = int.from_bytes(image[64:72], "big")
    image[table + 36 : table + 40] = b"\xff" * 4
    with pytest.raises(CorruptImage):
        await open_node(bytes(image))
    node = await open_node(bytes(image), read_only=True)
    assert node.snapshots() == ()
    assert await read(node, 0, 512) == b"\1" * 512
    await node.aclose()


async def test_info_agrees_with_qemu_img(tmp_path: Path) -> None:
    """The facts of an image are those that qemu-img info prints."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(SNAPSHOTS)
    storage = await HostFile.open(path, writable=False, role=LockRole.QCOW2_READ)
    node = await open_qcow2(storage, path=str(path), read_only=True, backing=None)
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", str(path)))
    assert node.info().items() >= told.items()
    await node.aclose()


async def many_tasks(node: Qcow2Node, model: bytearray) -> None:
    """Six tasks write, zero and discard sectors of their own, in clusters that they share."""
    lanes = 6
    sectors = len(model) // 512

    async def work(lane: int) -> None:
        rng = random.Random(lane)
        for number in range(40):
            start = (rng.randrange(sectors // lanes) * lanes + lane) * 512
            kind = rng.randrange(6)
            data = bytes(512) if kind < 2 else rng.randbytes(512)
            if kind == 0:
                await node.write_zeroes(start, 512, unmap=number % 2 == 0)
            elif kind == 5:
                await node.discard(start, 512)
                data = await read(node, start, 512)
                assert data in {bytes(512), bytes(model[start : start + 512])}
            elif not node.try_write(start, data):
                await node.write_from(start, data)
            model[start : start + 512] = data
            if number % 10 == 0:
                await node.flush()
            assert await read(node, start, 512) == data

    async with trio.open_nursery() as nursery:
        for lane in range(lanes):
            nursery.start_soon(work, lane)
    assert await read(node, 0, len(model)) == model


@geometries
@pytest.mark.parametrize("miss_rate", [0.0, 0.5])
async def test_many_tasks_at_once(options: str, miss_rate: float) -> None:
    """Tasks that share clusters, but no bytes, never see each other's work."""
    size = MIB // 2
    file = MemoryFile(make_image(size, options), miss_rate=miss_rate, refusal_rate=miss_rate)
    node = await open_node(file, cache_size=32 * KIB)
    model = bytearray(size)
    await many_tasks(node, model)
    await close_and_judge(node, model)


@pytest.mark.parametrize("options", ["cluster_size=512", "", "extended_l2=on", "compat=0.10"])
@pytest.mark.parametrize("miss_rate", [0.0, 0.5])
async def test_many_tasks_over_a_snapshot(options: str, miss_rate: float) -> None:
    """Nothing that many tasks do to the disk at once shows in its snapshot."""
    size = MIB // 2
    image = make_image(
        size, options, commands=("write -P 7 0 300k", "write -P 8 310k 50k"), snapshots=("s",)
    )
    file = MemoryFile(image, miss_rate=miss_rate, refusal_rate=miss_rate, seed=2)
    node = await open_node(file, cache_size=32 * KIB)
    snapshot = await node.open_snapshot(node.snapshots()[0])
    before = await read(snapshot, 0, size)
    model = bytearray(before)
    await many_tasks(node, model)
    assert await read(snapshot, 0, size) == before
    await close_and_judge(node, model)
