"""Writing to an image: in place, into new clusters, copy on write, failures, order."""

import errno
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import OFLAG_ZERO
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.driver.raw import RawNode
from qcowfs.driver.storage import Buffer
from qcowfs.errors import BadRequest, CorruptImage, ReadOnlyImage
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    assert_sound,
    close_and_judge,
    entry_of,
    entry_place,
    make_image,
    open_node,
    read,
    run,
)
from tests.fakes import FaultyFile, MemoryFile

CLUSTER = 64 * KIB
RNG = random.Random(8)
DATA = RNG.randbytes(4 * MIB)
BASE = RNG.randbytes(MIB)


class LoggingFile(MemoryFile):
    """A MemoryFile that notes (host offset, length) of every read and write.

    While `hold` is an event, instant writes are refused and waiting ones wait for it.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.hold: trio.Event | None = None

    def _read(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        self.reads.append((host_offset, sum(map(len, buffers))))
        super()._read(buffers, host_offset)

    def _write(self, data: bytes, host_offset: int) -> None:
        self.writes.append((host_offset, len(data)))
        super()._write(data, host_offset)

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        return self.hold is None and super().try_pwrite(buffers, host_offset)

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        if self.hold is not None:
            await self.hold.wait()
        await super().pwrite(buffers, host_offset)


async def ready(node: Qcow2Node) -> Qcow2Node:
    """The node after what precedes its first change, so that instant writes are possible."""
    await node.metadata.prepare_writing()
    return node


async def test_own_cluster_is_written_in_place() -> None:
    """Where the disk has its own cluster, a write goes there at once and changes no table."""
    node = await ready(await open_node(make_image(MIB, commands=("write -P 1 0 1M",))))
    before = entry_of(node, CLUSTER)
    with trio.testing.assert_no_checkpoints():
        assert node.try_write(CLUSTER + 100, DATA[:5000])
        assert node.try_write(0, DATA[: MIB // 2])
    assert entry_of(node, CLUSTER) == before
    assert not node.metadata.dirty
    model = bytearray(b"\1" * MIB)
    model[CLUSTER + 100 : CLUSTER + 5100] = DATA[:5000]
    model[: MIB // 2] = DATA[: MIB // 2]
    await close_and_judge(node, model)


async def test_first_write_of_an_image_waits() -> None:
    """Before the first change there is something to do, so the instant call declines."""
    node = await open_node(make_image())
    assert not node.try_write(0, b"x")
    await node.write_from(0, b"x")
    assert node.try_write(0, b"x")
    await close_and_judge(node, b"x" + bytes(MIB - 1))


@pytest.mark.parametrize("length", [512, CLUSTER, 300 * KIB])
async def test_new_clusters_need_no_wait(length: int) -> None:
    """An allocating write is instant when its tables are in memory and nobody is in the way."""
    node = await ready(await open_node(make_image()))
    node.try_write(MIB - 512, b"t" * 512)
    with trio.testing.assert_no_checkpoints():
        assert node.try_write(1000, DATA[:length])
    model = bytearray(MIB)
    model[MIB - 512 :] = b"t" * 512
    model[1000 : 1000 + length] = DATA[:length]
    assert await read(node, 0, MIB) == model
    await close_and_judge(node, model)


async def test_neighbouring_writes_are_contiguous_on_the_host() -> None:
    """Clusters allocated one after the other lie one after the other."""
    node = await ready(await open_node(make_image()))
    for start in range(0, MIB, 128 * KIB):
        assert node.try_write(start, DATA[: 128 * KIB])
    assert [extent.kind for extent in await node.extents(0, MIB)] == [ExtentKind.DATA]
    await node.aclose()


async def test_instant_write_declines_while_the_lock_is_held() -> None:
    """A change of tables waits for whoever is changing them; in-place writes do not."""
    node = await ready(await open_node(make_image(MIB, commands=("write -P 1 0 64k",))))
    async with node.metadata.lock:
        assert not node.try_write(CLUSTER, b"x" * 512)
        assert node.try_write(0, b"y" * 512)
    assert node.try_write(CLUSTER, b"x" * 512)
    await node.aclose()


async def test_closed_gate_keeps_all_writes_out() -> None:
    """While the gate is closed nothing is written, in place or not."""
    node = await ready(await open_node(make_image(MIB, commands=("write -P 1 0 64k",))))
    async with trio.open_nursery() as nursery:
        async with node.metadata.requests.close_gate():
            assert not node.try_write(0, b"x" * 512)
            nursery.start_soon(node.write_from, 0, b"x" * 512)
            await trio.testing.wait_all_tasks_blocked()
            assert await read(node, 0, 512) == b"\1" * 512
    assert await read(node, 0, 512) == b"x" * 512
    await node.aclose()


async def test_whole_cluster_reads_nothing() -> None:
    """A write of whole clusters over a backing file copies nothing from it."""
    base = LoggingFile(BASE)
    node = await open_node(make_image(MIB, backing=BASE), backing=RawNode(base))
    await node.write_from(CLUSTER, DATA[: 2 * CLUSTER])
    assert not base.reads
    await node.aclose()


@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
async def test_partial_write_copies_head_and_tail_only(miss_rate: float) -> None:
    """Around the data, and only there, the old bytes come along into the new cluster."""
    node = await open_node(make_image(MIB, backing=BASE), backing=BASE, miss_rate=miss_rate)
    start, length = CLUSTER + 1000, 3 * CLUSTER
    await node.write_from(start, DATA[:length])
    model = bytearray(BASE)
    model[start : start + length] = DATA[:length]
    assert await read(node, 0, MIB) == model
    await close_and_judge(node, model, backing=BASE)


async def test_backing_file_that_ends_inside_a_cluster() -> None:
    """What comes along from behind the backing file's end is zeros."""
    base = BASE[: CLUSTER + 3000]
    node = await open_node(make_image(MIB, backing=base), backing=base)
    await node.write_from(CLUSTER + 2500, b"x" * 100)
    model = bytearray(base + bytes(MIB - len(base)))
    model[CLUSTER + 2500 : CLUSTER + 2600] = b"x" * 100
    await close_and_judge(node, model, backing=base)


async def test_last_cluster_of_an_odd_disk() -> None:
    """A cluster that reaches over the disk's end is filled with zeros there."""
    size = CLUSTER + 1024
    base = BASE[:MIB]
    node = await open_node(make_image(size, backing=base), backing=base)
    await node.write_from(size - 512, b"e" * 512)
    model = base[: size - 512] + b"e" * 512
    assert await read(node, 0, size) == model
    with pytest.raises(BadRequest):
        await node.write_from(size - 511, b"e" * 512)
    await close_and_judge(node, model, backing=base)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("extended", ["off", "on"])
async def test_compressed_cluster_is_replaced(method: str, extended: str) -> None:
    """A write into a compressed cluster unpacks the rest of it into a cluster of its own."""
    content = (BASE[:100] * (MIB // 100 + 1))[:MIB]
    options = f"compression_type={method},extended_l2={extended}"
    node = await open_node(make_image(MIB, options, content=content, compressed=True))
    model = bytearray(content)
    for start in (100, 3 * CLUSTER - 10, 5 * CLUSTER + 777):
        model[start : start + 500] = DATA[:500]
        if not node.try_write(start, DATA[:500]):
            await node.write_from(start, DATA[:500])
        assert await read(node, 0, MIB) == model
    await close_and_judge(node, model)


async def test_snapshot_keeps_its_bytes() -> None:
    """A cluster that a snapshot shares is copied before it is changed."""
    image = make_image(MIB, commands=("write -P 9 0 1M",), snapshots=("s",))
    node = await open_node(image)
    model = bytearray(b"\x09" * MIB)
    for start in (0, CLUSTER + 512, 5 * CLUSTER - 256):
        await node.write_from(start, DATA[:1000])
        model[start : start + 1000] = DATA[:1000]
    assert await read(node, 0, MIB) == model
    storage = node.metadata.storage
    await close_and_judge(node, model)
    assert isinstance(storage, MemoryFile)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        path.write_bytes(storage.content)
        run("qemu-img", "snapshot", "-a", "s", str(path))
        assert_sound(path.read_bytes(), b"\x09" * MIB)


async def test_preallocated_zero_cluster_keeps_its_place() -> None:
    """A zero cluster with a host cluster of its own is filled where it lies."""
    image = make_image(MIB, commands=("write -P 5 0 64k", "write -z 0 64k"))
    node = await open_node(image)
    entry, _ = entry_of(node, 0)
    assert entry & OFLAG_ZERO
    assert entry & OFFSET_MASK
    await node.write_from(1000, b"x" * 24)
    assert entry_of(node, 0)[0] == OFLAG_COPIED | entry & OFFSET_MASK
    await close_and_judge(node, bytes(1000) + b"x" * 24 + bytes(MIB - 1024))


async def test_only_unallocated_subclusters_are_filled() -> None:
    """In a cluster with data, a write touches its own bytes and subclusters that show nothing."""
    image = make_image(MIB, "extended_l2=on", commands=("write -P 5 2k 2k",), backing=BASE)
    storage = LoggingFile(image)
    node = await ready(await open_node(storage, backing=BASE))
    host_offset = entry_of(node, 0)[0] & OFFSET_MASK
    storage.writes.clear()
    # From inside the allocated subcluster 1 into the unallocated subcluster 3.
    await node.write_from(3 * KIB, b"x" * 3584)
    touched = [(start - host_offset, length) for start, length in storage.writes]
    assert touched == [(3 * KIB, KIB), (4 * KIB, 4 * KIB)]
    assert entry_of(node, 0) == (OFLAG_COPIED | host_offset, 0b1110)
    model = bytearray(BASE)
    model[2 * KIB : 4 * KIB] = b"\5" * 2 * KIB
    model[3 * KIB : 3 * KIB + 3584] = b"x" * 3584
    await close_and_judge(node, model, backing=BASE)


async def test_new_cluster_takes_its_subclusters_only() -> None:
    """A new cluster with extended L2 entries holds the subclusters of the write, no others."""
    storage = LoggingFile(make_image(MIB, "extended_l2=on", backing=BASE))
    node = await ready(await open_node(storage, backing=BASE))
    await node.write_from(0, b"a" * 100)
    await node.write_from(CLUSTER + 5 * KIB, b"b" * KIB)
    assert entry_of(node, 0)[1] == 0b1
    assert entry_of(node, CLUSTER)[1] == 0b100
    model = bytearray(BASE)
    model[:100] = b"a" * 100
    model[CLUSTER + 5 * KIB : CLUSTER + 6 * KIB] = b"b" * KIB
    await close_and_judge(node, model, backing=BASE)


async def test_shared_subclusters_move_together() -> None:
    """Copying a shared cluster takes all its data along, and leaves the rest unallocated."""
    image = make_image(
        MIB,
        "extended_l2=on",
        commands=("write -P 5 2k 2k", "write -P 6 40k 4k", "write -z 50k 2k"),
        snapshots=("s",),
    )
    node = await open_node(image)
    await node.write_from(20 * KIB + 100, b"x" * 100)
    assert entry_of(node, 0)[1] == 1 << (25 + 32) | 1 << 1 | 1 << 10 | 3 << 20
    model = bytearray(MIB)
    model[2 * KIB : 4 * KIB] = b"\5" * 2 * KIB
    model[40 * KIB : 44 * KIB] = b"\6" * 4 * KIB
    model[20 * KIB + 100 : 20 * KIB + 200] = b"x" * 100
    await close_and_judge(node, model)


async def test_cluster_is_linked_after_its_bytes_were_written() -> None:
    """Until a new cluster's bytes are in the file, readers see what was there before."""
    storage = LoggingFile(make_image(MIB))
    node = await ready(await open_node(storage))
    await node.write_from(MIB - 512, b"t" * 512)
    storage.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write_from, 0, b"x" * 512)
        await trio.testing.wait_all_tasks_blocked()
        assert entry_of(node, 0) == (0, 0)
        assert len(node.metadata.requests.allocations) == 1
        assert not node.metadata.lock.locked()
        hold, storage.hold = storage.hold, None
        hold.set()
    assert await read(node, 0, 512) == b"x" * 512
    await node.aclose()


async def test_overlapping_writes_wait_for_each_other() -> None:
    """Two writes into one new cluster both come through, in one cluster."""
    storage = LoggingFile(make_image(MIB))
    node = await ready(await open_node(storage))
    await node.write_from(MIB - 512, b"t" * 512)
    allocated = node.statistics()["allocations"]
    storage.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write_from, 0, b"a" * 512)
        nursery.start_soon(node.write_from, 512, b"b" * 512)
        await trio.testing.wait_all_tasks_blocked()
        assert not node.try_write(1024, b"c" * 512)
        hold, storage.hold = storage.hold, None
        hold.set()
    assert node.try_write(1024, b"c" * 512)
    assert node.statistics()["allocations"] == allocated + 1
    await close_and_judge(
        node, b"a" * 512 + b"b" * 512 + b"c" * 512 + bytes(MIB - 2048) + b"t" * 512
    )


@pytest.mark.parametrize("instant", [True, False])
async def test_failed_write_leaves_the_old_bytes(instant: bool) -> None:
    """When the host refuses the bytes, its errno comes through and nothing has changed."""
    storage = FaultyFile(MemoryFile(make_image(MIB), refusal_rate=0.0 if instant else 1.0))
    node = await ready(await open_node(storage))
    await node.write_from(MIB - 512, b"t" * 512)
    storage.fail("write", 1, errno.ENOSPC)
    with pytest.raises(OSError) as failure:
        if not node.try_write(0, b"x" * 512):
            await node.write_from(0, b"x" * 512)
    assert failure.value.errno == errno.ENOSPC
    assert not node.read_only
    assert not node.metadata.requests.allocations
    assert await read(node, 0, 512) == bytes(512)
    await node.write_from(0, b"y" * 512)
    await close_and_judge(node, b"y" * 512 + bytes(MIB - 1024) + b"t" * 512)


async def test_failed_write_wakes_those_who_wait() -> None:
    """A write that waited for one that failed goes on by itself."""
    inner = LoggingFile(make_image(MIB))
    storage = FaultyFile(inner)
    node = await ready(await open_node(storage))
    await node.write_from(MIB - 512, b"t" * 512)
    inner.hold = trio.Event()
    failures: list[OSError] = []

    async def failing() -> None:
        try:
            await node.write_from(0, b"a" * 512)
        except OSError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        storage.fail("pwrite", 1, errno.EIO)
        nursery.start_soon(failing)
        await trio.testing.wait_all_tasks_blocked()
        hold, inner.hold = inner.hold, None
        hold.set()
        nursery.start_soon(node.write_from, 512, b"b" * 512)
    assert len(failures) == 1
    await close_and_judge(node, bytes(512) + b"b" * 512 + bytes(MIB - 1536) + b"t" * 512)


async def test_cancelled_write_gives_its_clusters_back() -> None:
    """A write that is cancelled between allocating and linking leaves nothing behind."""
    storage = LoggingFile(make_image(MIB))
    node = await ready(await open_node(storage))
    await node.write_from(MIB - 512, b"t" * 512)
    storage.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write_from, 0, b"a" * 512)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    storage.hold = None
    assert not node.metadata.requests.allocations
    assert node.metadata.requests.writer_count == 0
    await close_and_judge(node, bytes(MIB - 512) + b"t" * 512)


async def test_read_only_image_refuses() -> None:
    """A read-only node raises ReadOnlyImage and writes nothing."""
    storage = MemoryFile(make_image(), read_only=True)
    node = await open_node(storage, read_only=True)
    with pytest.raises(ReadOnlyImage):
        node.try_write(0, b"x")
    with pytest.raises(ReadOnlyImage):
        await node.write_from(0, b"x")
    await node.aclose()
    assert storage.content == make_image()


@pytest.mark.expects_warnings
async def test_failsafe_refuses_and_still_reads() -> None:
    """After failsafe every write raises ReadOnlyImage; reads go on."""
    node = await ready(await open_node(make_image(MIB, commands=("write -P 1 0 64k",))))
    node.enter_failsafe("a test asked for it")
    assert node.read_only
    with pytest.raises(ReadOnlyImage):
        node.try_write(0, b"x")
    with pytest.raises(ReadOnlyImage):
        await node.write_from(0, b"x")
    assert await read(node, 0, 512) == b"\1" * 512
    await node.aclose()


@pytest.mark.expects_warnings
@pytest.mark.parametrize("instant", [True, False])
async def test_guest_data_never_overwrites_metadata(instant: bool) -> None:
    """An entry that leads to a table is refused as damage: nothing is written there."""
    image = bytearray(make_image(MIB, commands=("write -P 1 0 128k",)))
    place = entry_place(image, 0)
    table = place // CLUSTER * CLUSTER
    image[place : place + 8] = (OFLAG_COPIED | table).to_bytes(8, "big")
    storage = MemoryFile(bytes(image))
    node = await ready(await open_node(storage))
    with pytest.raises(CorruptImage):
        if instant:
            node.try_write(0, b"x" * 512)
        else:
            await node.write_from(0, b"x" * 512)
    assert node.read_only
    assert storage.content[table : table + 512] == image[table : table + 512]
    await node.aclose()


@pytest.mark.parametrize(
    ("refcount_bits", "compat"), [(1, "1.1"), (16, "1.1"), (64, "1.1"), (16, "0.10")]
)
async def test_random_writes_over_small_clusters(refcount_bits: int, compat: str) -> None:
    """Thousands of clusters, tables and refcount blocks come out sound."""
    options = f"cluster_size=512,refcount_bits={refcount_bits},compat={compat}"
    node = await ready(await open_node(make_image(2 * MIB, options)))
    model = bytearray(2 * MIB)
    rng = random.Random(3)
    for _ in range(200):
        start = rng.randrange(2 * MIB - 40000)
        length = rng.choice([1, 512, 3000, 40000])
        if not node.try_write(start, DATA[start : start + length]):
            await node.write_from(start, DATA[start : start + length])
        model[start : start + length] = DATA[start : start + length]
    assert await read(node, 0, 2 * MIB) == model
    await close_and_judge(node, model)
