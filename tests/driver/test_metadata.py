"""The metadata engine: first write, commit order, failsafe, copies of shared tables."""

import errno
import random
from array import array

import pytest
import trio

from qcowfs.driver.layout import header as fields
from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.layout.mapping import OFLAG_COPIED
from qcowfs.driver.qcow2.copied import clear_copied_flags, recompute_copied_flags
from qcowfs.driver.qcow2.guard import SNAPSHOT_L1_TABLE, SNAPSHOT_TABLE
from qcowfs.driver.qcow2.metadata import L1View, Metadata, load_l1
from qcowfs.errors import CorruptImage, ReadOnlyImage
from tests.driver.engine import MIB, Guest, blank_image, judge, open_metadata
from tests.fakes import CrashFile, FaultyFile, MemoryFile, resize

SHAPES = [
    (512, 16, ""),
    (512, 1, ""),
    (4096, 8, ""),
    (16384, 16, ",extended_l2=on"),
    (65536, 16, ""),
    (65536, 64, ""),
    (2 * MIB, 16, ""),
]


class History:
    """What each cluster may hold after a crash: the last flushed value, or a later one."""

    def __init__(self) -> None:
        self.current: dict[int, int] = {}
        self.changes: list[tuple[int, int, int]] = []
        self.flushes: list[tuple[int, dict[int, int]]] = [(0, {})]

    def change(self, position: int, index: int, value: int) -> None:
        self.changes.append((position, index, value))
        self.current[index] = value

    def flushed(self, position: int) -> None:
        self.flushes.append((position, dict(self.current)))

    def allowed(self, point: int) -> dict[int, set[int]]:
        position, base = [entry for entry in self.flushes if entry[0] <= point][-1]
        found = {index: {base.get(index, 0)} for _, index, _ in self.changes}
        for begun, index, value in self.changes:
            if begun >= position:
                found[index].add(value)
        return found


async def _work(
    metadata: Metadata, file: CrashFile | None, *, seed: int, step_count: int, span: int
) -> History:
    """Random writes, overwrites, discards and flushes of clusters, and a clean end."""
    guest = Guest(metadata)
    choice = random.Random(seed)
    history = History()
    for _ in range(step_count):
        index, value, kind = choice.randrange(span), choice.randrange(1, 256), choice.random()
        position = file.position if file is not None else 0
        if kind < 0.45:
            history.change(position, index, value)
            if guest.try_write(index, value) is None:
                await guest.write(index, value)
        elif kind < 0.65:
            history.change(position, index, value)
            await guest.write(index, value)
        elif kind < 0.88:
            history.change(position, index, 0)
            await guest.discard(index, punch=choice.random() < 0.5)
        else:
            await metadata.flush()
            history.flushed(file.position if file is not None else 0)
    await metadata.finish()
    history.flushed(file.position if file is not None else 0)
    assert not metadata.dirty
    return history


@pytest.mark.parametrize(("cluster_size", "refcount_bits", "options"), SHAPES)
async def test_random_changes_leave_a_sound_image(
    cluster_size: int, refcount_bits: int, options: str
) -> None:
    """After writes, overwrites and discards the image checks clean and reads as written."""
    file = MemoryFile(
        blank_image(
            64 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits, options=options
        ),
        miss_rate=0.2,
        refusal_rate=0.2,
        seed=cluster_size,
    )
    metadata = await open_metadata(file)
    span = min(64 * MIB // cluster_size, 400)
    history = await _work(metadata, None, seed=3, step_count=600, span=span)
    assert judge(file.content) == (0, 0)
    again = Guest(await open_metadata(MemoryFile(file.content), read_only=True))
    for index, value in history.current.items():
        assert await again.read(index) == again.pattern(value)


@pytest.mark.parametrize(("cluster_size", "refcount_bits", "options"), SHAPES[:5])
async def test_a_crash_leaves_leaks_at_worst(
    cluster_size: int, refcount_bits: int, options: str
) -> None:
    """Any survivors of the unsynced writes: no corruption, and old or new data everywhere."""
    file = CrashFile(
        blank_image(
            8 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits, options=options
        )
    )
    metadata = await open_metadata(file)
    history = await _work(metadata, file, seed=cluster_size, step_count=60, span=24)
    assert not await _damage(file, history)


@pytest.mark.parametrize("drop_first_sync", [False, True])
async def test_the_crash_judge_finds_missing_syncs(drop_first_sync: bool) -> None:
    """With every other sync undone, the first phase's or the second's, the judge sees damage."""
    file = CrashFile(
        blank_image(8 * MIB, cluster_size=512),
        drop_every_second_sync=True,
        drop_first_sync=drop_first_sync,
    )
    metadata = await open_metadata(file)
    history = await _work(metadata, file, seed=512, step_count=60, span=24)
    assert await _damage(file, history)


async def _damage(file: CrashFile, history: History) -> list[str]:
    """What the states after a crash show that they must not."""
    found = []
    for state in file.states(point_count=12, each_limit=4, subset_count=2, torn_count=1):
        where = f"after {state.point}, {state.description}"
        if judge(state.content)[0]:
            found.append(f"{where}: corrupt")
            continue
        again = Guest(await open_metadata(MemoryFile(state.content), read_only=True))
        for index, values in history.allowed(state.point).items():
            data = await again.read(index)
            sectors = {data[place : place + 512] for place in range(0, len(data), 512)}
            if not sectors <= {bytes([value]) * 512 for value in values}:
                found.append(f"{where}: cluster {index} is none of {values}")
    return found


async def test_an_image_that_is_not_written_to_stays_as_it_is() -> None:
    """Opening read-write, reading and closing changes no byte and syncs nothing."""
    content = blank_image(writes=("write 0 256k",))
    file = MemoryFile(content)
    metadata = await open_metadata(file, prepared=False)
    assert await Guest(metadata).read(0) != bytes(65536)
    await metadata.flush()
    await metadata.finish()
    assert bytes(file.content) == content
    assert file.sync_count == 0


@pytest.mark.expects_warnings
async def test_autoclear_bits_are_durably_clear_before_the_first_write(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bitmaps and features that are not kept up to date are declared invalid first."""
    content = bytearray(blank_image())
    content[88:96] = (fields.AUTOCLEAR_BITMAPS | 1 << 40).to_bytes(8, "big")
    file = CrashFile(content)
    metadata = await open_metadata(file, prepared=False)
    await metadata.prepare_writing()
    assert [entry.kind for entry in file.log] == ["pwrite", "sync"]
    assert parse_header(file.content, file.size()).autoclear == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await metadata.prepare_writing()
    assert len(file.log) == 2


@pytest.mark.parametrize(
    "bit", [fields.INCOMPATIBLE_CORRUPT, fields.INCOMPATIBLE_DIRTY], ids=["corrupt", "dirty"]
)
async def test_a_marked_image_is_not_written_to(bit: int) -> None:
    """An image marked corrupt or dirty refuses the first write, and may be read."""
    content = bytearray(blank_image())
    content[79] |= bit
    metadata = await open_metadata(MemoryFile(content), prepared=False)
    with pytest.raises(ReadOnlyImage, match="marked as"):
        await metadata.prepare_writing()
    assert not metadata.can_write


async def test_a_flush_costs_two_syncs_with_changes_and_one_without() -> None:
    """Phases (a) and (b) are one sync each; in-place data alone needs one; between none."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    for index in range(10):
        await guest.write(index, 1)
    assert file.sync_count == 0
    await metadata.flush()
    assert file.sync_count == 2
    await metadata.flush()
    assert file.sync_count == 3


async def test_flushes_that_wait_for_each_other_share_one() -> None:
    """Of many flushes at once, those that began before another's start need no sync."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    await Guest(metadata).write(0, 1)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(metadata.flush)
    assert file.sync_count <= 4
    assert not metadata.dirty


async def test_data_file_is_synced_before_the_metadata() -> None:
    """With an external data file its sync comes first, and a clean flush includes it."""
    order: list[str] = []

    class Named(MemoryFile):
        async def sync(self) -> None:
            order.append(self.name)
            await super().sync()

    file, data = Named(blank_image(), name="image"), Named(name="data")
    header = parse_header(file.content, file.size())
    metadata = await Metadata.open(file, header, read_only=False, data_storage=data)
    await metadata.prepare_writing()
    await Guest(metadata).write(0, 1)
    await metadata.flush()
    assert order == ["data", "image", "image"]


@pytest.mark.parametrize("nth", [1, 2])
async def test_a_failed_sync_means_failsafe(nth: int, caplog: pytest.LogCaptureFixture) -> None:
    """After a sync failed nothing is believed or written any more; reads go on."""
    inner = MemoryFile(blank_image())
    file = FaultyFile(inner)
    file.fail("sync", nth)
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    await guest.write(0, 1)
    with pytest.raises(OSError, match=r"."):
        await metadata.flush()
    content = bytes(inner.content)
    assert metadata.failsafe is not None
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    with pytest.raises(ReadOnlyImage):
        await guest.write(1, 1)
    with pytest.raises(ReadOnlyImage):
        await metadata.flush()
    assert guest.try_write(1, 1) is None
    assert await guest.read(0) == guest.pattern(1)
    await metadata.finish()
    assert inner.content == content


async def test_a_host_without_room_is_no_failsafe() -> None:
    """ENOSPC in a commit is told, all stays dirty, and the next commit gets it done."""
    inner = MemoryFile(blank_image())
    file = FaultyFile(inner)
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    await guest.write(0, 1)
    # Refcounts first; then, with these durable, the slice; then the L1.
    for nth in (1, 2, 2):
        file.fail("write", nth, errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            await metadata.flush()
    assert metadata.failsafe is None
    assert metadata.dirty
    await metadata.finish()
    assert judge(inner.content) == (0, 0)
    again = Guest(await open_metadata(MemoryFile(inner.content), read_only=True))
    assert await again.read(0) == again.pattern(1)


async def test_any_exception_in_a_change_means_failsafe(caplog: pytest.LogCaptureFixture) -> None:
    """What escapes `changing` leaves memory and file at odds: nothing is written after it."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    with pytest.raises(ZeroDivisionError), metadata.changing():
        raise ZeroDivisionError("half done")
    assert metadata.failsafe == "ZeroDivisionError: half done"
    with pytest.raises(ReadOnlyImage, match="half done"):
        metadata.check_writable()
    # No corruption was found, so the image is not marked.
    assert not file.content[79] & fields.INCOMPATIBLE_CORRUPT


async def test_corruption_in_a_change_marks_the_image(caplog: pytest.LogCaptureFixture) -> None:
    """CorruptImage out of `changing` sets the corrupt bit, later if it cannot be at once."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    file.refusal_rate = 1.0
    with pytest.raises(CorruptImage), metadata.changing():
        raise CorruptImage("bad")
    assert not file.content[79] & fields.INCOMPATIBLE_CORRUPT
    await metadata.finish()
    assert file.content[79] & fields.INCOMPATIBLE_CORRUPT


async def test_a_version_2_image_has_no_corrupt_bit(caplog: pytest.LogCaptureFixture) -> None:
    """Where version 3's feature bits would be, a version 2 header has something else."""
    content = blank_image(options=",compat=0.10")
    file = MemoryFile(content)
    metadata = await open_metadata(file)
    metadata.enter_failsafe("for a test", corrupt=True)
    assert bytes(file.content) == content


async def test_a_cancelled_flush_finishes_its_commit() -> None:
    """A commit is shielded: cancellation comes after it, with everything durable."""
    file = CrashFile(blank_image(), refusal_rate=1.0, miss_rate=1.0)
    metadata = await open_metadata(file)
    await Guest(metadata).write(0, 9)
    with trio.CancelScope() as scope:

        async def cancel() -> None:
            while metadata.counters.syncs == 0:
                await trio.lowlevel.checkpoint()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            nursery.start_soon(metadata.flush)
    assert not metadata.dirty
    again = Guest(await open_metadata(MemoryFile(file.rebuild([])), read_only=True))
    assert await again.read(0) == again.pattern(9)


async def test_failsafe_stops_a_commit_that_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    """When state is found to be wrong during a sync, the phases after it are not written."""

    class Interrupted(CrashFile):
        async def sync(self) -> None:
            await super().sync()
            metadata.enter_failsafe("found by somebody else")

    file = Interrupted(blank_image())
    metadata = await open_metadata(file)
    await Guest(metadata).write(0, 9)
    with pytest.raises(ReadOnlyImage, match="found by somebody else"):
        await metadata.flush()
    assert file.log[-1].kind == "sync"
    assert file.sync_count == 1
    again = Guest(await open_metadata(MemoryFile(file.content), read_only=True))
    assert await again.read(0) == again.pattern(0)


async def test_a_read_only_image_refuses_changes() -> None:
    """Nothing can be prepared, changed or flushed into a read-only image."""
    content = blank_image()
    file = MemoryFile(content, read_only=True)
    metadata = await open_metadata(file, read_only=True)
    with pytest.raises(ReadOnlyImage):
        await metadata.prepare_writing()
    assert metadata.try_writable_slice(0) is None
    await metadata.flush()
    assert bytes(file.content) == content


async def test_try_changes_nothing_while_the_lock_is_held() -> None:
    """The synchronous path keeps off while a commit or another change is under way."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    async with metadata.lock:
        assert metadata.try_writable_slice(0) is None
    assert metadata.try_writable_slice(0) is not None


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (OFLAG_COPIED | 0x5_0001, "reserved"),
        (OFLAG_COPIED | 1 << 60 | 0x5_0000, "reserved"),
        (OFLAG_COPIED | 0x5_0200, "not aligned"),
        (OFLAG_COPIED | 1 << 50, "past the end"),
    ],
)
async def test_a_bad_l1_entry_costs_its_own_range(entry: int, rule: str) -> None:
    """A broken L1 entry is an error for its range only, for reading and for writing."""
    metadata = await open_metadata(MemoryFile(blank_image(2 << 30)))
    guest = Guest(metadata)
    metadata.active.words[0] = entry
    with pytest.raises(CorruptImage, match=rule):
        await guest.read(0)
    with pytest.raises(CorruptImage, match=rule):
        await guest.write(0, 1)
    assert metadata.failsafe is None
    await guest.write(metadata.geometry.l2_entry_count, 5)
    assert await guest.read(metadata.geometry.l2_entry_count) == guest.pattern(5)


async def test_an_l1_entry_that_leads_to_other_metadata_is_not_written_through(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An L1 entry naming the refcount block: changing that "table" ends in failsafe."""
    content = bytearray(blank_image())
    header = parse_header(content, len(content))
    block = int.from_bytes(content[header.refcount_table_offset :][:8], "big")
    content[header.l1_table_offset : header.l1_table_offset + 8] = (OFLAG_COPIED | block).to_bytes(
        8, "big"
    )
    file = MemoryFile(content)
    metadata = await open_metadata(file)
    with pytest.raises(CorruptImage, match="belongs to the refcount block"):
        await Guest(metadata).write(0, 1)
    assert metadata.failsafe is not None
    assert bytes(file.content[block : block + 65536]) == bytes(content[block : block + 65536])


async def test_guest_data_over_metadata_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A place taken from an L2 entry is checked before guest data goes there."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    metadata.check_guest_write(1 << 30, 65536)
    with pytest.raises(CorruptImage, match="would overwrite the active L1 table"):
        metadata.check_guest_write(metadata.header.l1_table_offset, 512)
    assert metadata.failsafe is not None


async def test_a_table_that_a_snapshot_shares_is_copied_before_it_changes() -> None:
    """The snapshot keeps its table and its data; the active disk gets its own."""
    content = blank_image(writes=("write -P 17 0 512k",), snapshots=("one",))
    file = MemoryFile(content)
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    before = metadata.active.words[0]
    shared = before & OFFSET_MASK
    assert not before & OFLAG_COPIED
    assert metadata.try_writable_slice(0) is None
    await guest.write(2, 99)
    assert metadata.active.words[0] & OFFSET_MASK != shared
    assert metadata.active.words[0] & OFLAG_COPIED
    assert await guest.read(2) == guest.pattern(99)
    assert await guest.read(3) == guest.pattern(17)
    await metadata.finish()
    assert judge(file.content) == (0, 0)
    assert bytes(file.content[shared : shared + 65536]) == bytes(content[shared : shared + 65536])


async def test_crashes_while_tables_are_copied() -> None:
    """Overwriting and discarding what a snapshot shares survives any crash."""
    content = blank_image(
        2 * MIB, cluster_size=512, writes=("write -P 17 0 64k",), snapshots=("one", "two")
    )
    file = CrashFile(content)
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    for index in range(0, 128, 9):
        await guest.write(index, index + 1)
        await guest.discard((index + 4) % 128)
        if index % 27 == 0:
            await metadata.flush()
    await metadata.finish()
    assert judge(file.content) == (0, 0)
    for state in file.states(point_count=12, each_limit=4, subset_count=2, torn_count=1):
        assert judge(state.content)[0] == 0, (state.point, state.description)


async def test_a_snapshot_can_be_taken_with_the_whole_table_operations() -> None:
    """Raise, clear, write, switch: afterwards the snapshot keeps its data whatever is written."""
    file = CrashFile(blank_image(4 * MIB, cluster_size=512, writes=("write -P 3 0 32k",)))
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    await guest.write(70, 8)
    await _take_snapshot(metadata)
    assert judge(file.content) == (0, 0)
    view = L1View(array("Q", metadata.active.words), 0, metadata.geometry, writable=False)
    await guest.write(70, 9)
    await guest.write(3, 9)
    await metadata.finish()
    assert judge(file.content) == (0, 0)
    assert await guest.read(70, view) == guest.pattern(8)
    assert await guest.read(3, view) == guest.pattern(3)
    assert await guest.read(70) == guest.pattern(9)


async def _take_snapshot(metadata: Metadata) -> None:
    """A snapshot of the active disk with a table of one entry."""
    import numpy as np

    from qcowfs.driver.layout.mapping import store_words
    from qcowfs.driver.layout.snapshot_table import Snapshot, serialize_snapshot_table

    cluster_size = metadata.geometry.cluster_size
    async with metadata.lock:
        await metadata.commit()
        clusters = []
        for _, table_offset in metadata.table_offsets(metadata.active):
            clusters.append(table_offset // cluster_size)
            words = await metadata.tables.read_table(table_offset)
            clusters.extend((word & OFFSET_MASK) // cluster_size for word in words if word)
        await metadata.refcounts.raise_many(np.array(sorted(clusters), np.uint64))
        await clear_copied_flags(metadata)
        words = metadata.active.words
        count = metadata.geometry.cluster_count(len(words) * 8)
        l1_offset = await metadata.allocator.allocate_contiguous(count, SNAPSHOT_L1_TABLE)
        await metadata.writer.write(SNAPSHOT_L1_TABLE, l1_offset, [store_words(words)])
        table = serialize_snapshot_table(
            [Snapshot(b"1", b"one", l1_offset, len(words), disk_size=metadata.header.virtual_size)]
        )
        offset = await metadata.allocator.allocate_contiguous(1, SNAPSHOT_TABLE)
        await metadata.writer.write(SNAPSHOT_TABLE, offset, [table])
        await metadata.switch_snapshots(1, offset)
    await metadata.finish()


async def test_copied_flags_can_be_worked_out_anew() -> None:
    """After flags were cleared without need, each is set where the refcount is 1."""
    file = MemoryFile(blank_image(writes=("write -P 17 0 512k",)))
    metadata = await open_metadata(file)
    async with metadata.lock:
        await clear_copied_flags(metadata)
        await metadata.commit()
        assert judge(file.content)[0] > 0
        await recompute_copied_flags(metadata)
        await metadata.commit()
    assert judge(file.content) == (0, 0)
    assert metadata.try_writable_slice(0) is not None


@pytest.mark.parametrize("size", [8 * MIB, 64 * MIB])
async def test_the_active_l1_is_replaced_by_one_header_write(size: int) -> None:
    """A longer L1 (a resize) takes the old one's place; every crash has one of the two."""
    file = CrashFile(blank_image(8 * MIB, cluster_size=512, writes=("write -P 3 0 32k",)))
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    await guest.write(100, 4)
    words = array("Q", metadata.active.words)
    words.extend([0] * (metadata.geometry.l1_count(size) - len(words)))
    async with metadata.lock:
        await metadata.switch_active_l1(words, virtual_size=size)
    assert metadata.active.virtual_size == metadata.geometry.virtual_size == size
    await guest.write(size // 512 - 1, 5)
    await metadata.finish()
    assert judge(file.content) == (0, 0)
    again = Guest(await open_metadata(MemoryFile(file.content), read_only=True))
    assert await again.read(size // 512 - 1) == again.pattern(5)
    assert await again.read(100) == again.pattern(4)
    for state in file.states(point_count=10, each_limit=4, subset_count=1, torn_count=1):
        assert judge(state.content)[0] == 0, (state.point, state.description)


async def test_memory_stays_inside_the_budget() -> None:
    """Random writes over a huge image commit on the way, and the caches stay bounded."""
    file = MemoryFile(blank_image(1 << 40, cluster_size=4096, refcount_bits=16)[: 1 << 20])
    resize(file.content, len(blank_image(1 << 40, cluster_size=4096, refcount_bits=16)))
    budget = 256 << 10
    metadata = await open_metadata(file, cache_size=budget)
    guest = Guest(metadata)
    choice = random.Random(1)
    for _ in range(1500):
        index = choice.randrange(1 << 28)
        if guest.try_write(index, 1) is None:
            await guest.write(index, 1)
    assert metadata.counters.commits > 5
    held = len(metadata.tables.slices) * (metadata.tables.slice_length + 256)
    assert held <= budget
    assert len(metadata.tables.dirty) <= metadata.tables.dirty_limit
    await metadata.finish()


async def test_concurrent_writers_and_flushes_agree() -> None:
    """Tasks that write, discard and flush at once leave what they last wrote."""
    file = MemoryFile(
        blank_image(64 * MIB, cluster_size=4096), miss_rate=0.5, refusal_rate=0.5, seed=4
    )
    metadata = await open_metadata(file, cache_size=64 << 10)
    guest = Guest(metadata)
    expected: dict[int, int] = {}

    async def worker(number: int) -> None:
        choice = random.Random(number)
        for _ in range(60):
            index, value = choice.randrange(400) * 8 + number, choice.randrange(1, 256)
            kind = choice.random()
            if kind < 0.1:
                await metadata.flush()
            elif kind < 0.3:
                await guest.discard(index)
                expected[index] = 0
            else:
                await guest.write(index, value)
                expected[index] = value

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(worker, number)
    await metadata.finish()
    assert judge(file.content) == (0, 0)
    again = Guest(await open_metadata(MemoryFile(file.content), read_only=True))
    for index, value in expected.items():
        assert await again.read(index) == again.pattern(value)


async def test_a_write_that_never_links_leaks_nothing_in_the_end() -> None:
    """Clusters dropped before anything referred to them are free after the next commit."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    async with metadata.lock:
        host_offset, count = await metadata.allocator.allocate(5)
    metadata.allocator.drop(host_offset, count * 65536)
    await metadata.finish()
    resize(file.content, metadata.allocator.end_offset)
    assert judge(file.content) == (0, 0)


async def test_snapshots_l1_of_the_file_is_read_as_it_lies() -> None:
    """An L1 of a snapshot gives a view whose lookups share the slices of the active disk."""
    file = MemoryFile(blank_image(writes=("write -P 17 0 512k",), snapshots=("one",)))
    metadata = await open_metadata(file)
    table = file.content[metadata.header.snapshots_offset :]
    l1_offset, l1_size = int.from_bytes(table[:8], "big"), int.from_bytes(table[8:12], "big")
    view = L1View(
        await load_l1(file, l1_offset, l1_size), l1_offset, metadata.geometry, writable=False
    )
    assert await metadata.load(view, 0) is await metadata.load(metadata.active, 0)
    assert metadata.statistics()["slice_loads"] == 1
