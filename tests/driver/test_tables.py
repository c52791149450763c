"""The cache of L2 slices: single flight, budget, dirty ranges, staleness."""

from array import array

import pytest
import trio

from qcowfs.driver.layout.mapping import load_words, store_words
from qcowfs.driver.qcow2.guard import L2_TABLE
from qcowfs.driver.qcow2.metadata import ABSENT, Metadata
from qcowfs.driver.qcow2.tables import SLICE_LENGTH_MAX, SLICE_OVERHEAD
from tests.driver.engine import MIB, Guest, blank_image, open_metadata
from tests.fakes import CrashFile, MemoryFile


async def _with_table(file: MemoryFile, cache_size: int = 32 * MIB) -> tuple[Metadata, int]:
    """Metadata with one L2 table on disk, and that table's host offset."""
    metadata = await open_metadata(file, cache_size=cache_size)
    await Guest(metadata).write(0, 7)
    await metadata.flush()
    return metadata, metadata.active.table_at(0, file.size())


async def test_a_slice_holds_the_words_of_the_file_in_native_order() -> None:
    """A loaded slice shows what the file says, whatever the machine's byte order."""
    file = MemoryFile(blank_image())
    metadata, table_offset = await _with_table(file)
    metadata.tables.forget_clean()
    piece = await metadata.tables.load(table_offset)
    length = metadata.tables.slice_length
    assert piece.words == load_words(bytes(file.content[table_offset : table_offset + length]))
    assert len(piece.words) == metadata.tables.slice_words == min(length, SLICE_LENGTH_MAX) // 8


async def test_concurrent_loads_of_one_slice_read_once() -> None:
    """Loads are single-flight: those who wait get the same object."""
    file = MemoryFile(blank_image())
    metadata, table_offset = await _with_table(file)
    metadata.tables.forget_clean()
    file.miss_rate = 1.0
    before = metadata.counters.slice_loads
    found = []

    async def load() -> None:
        found.append(await metadata.tables.load(table_offset))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(load)
    assert metadata.counters.slice_loads == before + 1
    assert all(piece is found[0] for piece in found)


async def test_a_failed_load_leaves_the_next_one_free_to_try() -> None:
    """An error of one reader is not kept for the others."""
    file = MemoryFile(blank_image())
    metadata, table_offset = await _with_table(file)
    metadata.tables.forget_clean()
    file.miss_rate = 1.0
    original = file.pread

    async def failing(length: int, host_offset: int) -> bytearray:
        raise OSError(5, "no such luck")

    file.pread = failing  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no such luck"):
        await metadata.tables.load(table_offset)
    file.pread = original  # type: ignore[method-assign]
    assert (await metadata.tables.load(table_offset)).host_offset == table_offset


async def test_the_budget_bounds_clean_slices() -> None:
    """Loading more slices than the budget holds drops those least used."""
    file = MemoryFile(bytes(4 * MIB))
    file.content[: len(blank_image())] = blank_image()
    budget = 64 * (SLICE_LENGTH_MAX + SLICE_OVERHEAD)
    metadata = await open_metadata(file, prepared=False, cache_size=budget * 4 // 3)
    for host_offset in range(0, 4 * MIB, 4096):
        await metadata.tables.load(host_offset)
    assert len(metadata.tables.slices) <= 65
    assert metadata.counters.slice_loads == 1024


async def test_a_slice_in_use_outlives_others() -> None:
    """The second chance keeps a slice that is looked up between loads."""
    file = MemoryFile(bytes(4 * MIB))
    file.content[: len(blank_image())] = blank_image()
    budget = 16 * (SLICE_LENGTH_MAX + SLICE_OVERHEAD)
    metadata = await open_metadata(file, prepared=False, cache_size=budget * 4 // 3)
    wanted = await metadata.tables.load(0)
    for host_offset in range(4096, 4 * MIB, 4096):
        await metadata.tables.load(host_offset)
        assert metadata.tables.peek(0) is wanted


async def test_a_dirty_slice_is_never_dropped() -> None:
    """Eviction passes dirty slices by, however many others come."""
    file = MemoryFile(blank_image(64 * MIB, cluster_size=512))
    metadata = await open_metadata(file, cache_size=8192)
    guest = Guest(metadata)
    assert guest.try_write(0, 3) is not None
    piece = metadata.peek(metadata.active, 0)
    for index in range(64, 64 * 40, 64):
        await metadata.load(metadata.active, index * 512)
        await metadata.tables.load(index * 512)
    assert metadata.peek(metadata.active, 0) is piece


async def test_only_the_dirty_range_is_written() -> None:
    """A commit writes the changed words of a slice of a linked table, no more."""
    file = CrashFile(blank_image())
    metadata, table_offset = await _with_table(file)
    start = file.position
    await Guest(metadata).write(5, 9)
    await Guest(metadata).write(6, 9)
    await metadata.flush()
    writes = [
        (operation.host_offset - table_offset, operation.length)
        for operation in file.log[start:]
        if operation.kind == "pwrite" and table_offset <= operation.host_offset < table_offset + 512
    ]
    assert writes == [(5 * 8, 16)]


async def test_neighbouring_dirty_slices_become_one_write() -> None:
    """Whole slices that follow each other go out together."""
    file = CrashFile(blank_image(1 << 30))
    metadata, table_offset = await _with_table(file)
    words = array("Q", [0]) * metadata.tables.slice_words
    for number in (2, 3, 4):
        piece = await metadata.tables.load(table_offset + number * metadata.tables.slice_length)
        metadata.tables.replace_words(piece, 0, words)
    start = file.position
    await metadata.tables.write_dirty()
    length = metadata.tables.slice_length
    assert [(entry.host_offset, entry.length) for entry in file.log[start:]] == [
        (table_offset + 2 * length, 3 * length)
    ]


async def test_a_load_that_a_rewrite_overtook_is_repeated() -> None:
    """Words read before `write_table` changed the file never enter the cache."""
    file = MemoryFile(blank_image())
    metadata, table_offset = await _with_table(file)
    metadata.tables.forget_clean()
    words = await metadata.tables.read_table(table_offset)
    words[1] = 0x1234_0000
    file.miss_rate = 1.0
    original = file.pread
    stale = bytes(file.content[table_offset : table_offset + metadata.tables.slice_length])
    reads = []

    async def slow(length: int, host_offset: int) -> bytearray:
        reads.append(host_offset)
        if len(reads) == 1:
            await metadata.tables.write_table(table_offset, words)
            return bytearray(stale)
        return await original(length, host_offset)

    file.pread = slow  # type: ignore[method-assign]
    piece = await metadata.tables.load(table_offset)
    assert piece.words[1] == 0x1234_0000
    assert len(reads) == 2


async def test_write_table_changes_slices_in_memory_too() -> None:
    """A whole-table rewrite leaves no cached slice behind that says otherwise."""
    file = MemoryFile(blank_image())
    metadata, table_offset = await _with_table(file)
    piece = await metadata.tables.load(table_offset)
    words = await metadata.tables.read_table(table_offset)
    words[3] = 0x5555_0000
    await metadata.tables.write_table(table_offset, words)
    assert piece.words[3] == 0x5555_0000
    assert bytes(file.content[table_offset : table_offset + 65536]) == store_words(words)


async def test_read_table_shows_changes_not_yet_written() -> None:
    """Whole-table readers see what lookups see."""
    metadata, table_offset = await _with_table(MemoryFile(blank_image()))
    guest = Guest(metadata)
    await guest.write(4, 1)
    assert (await metadata.tables.read_table(table_offset))[4] == await guest.entry(4)


async def test_slices_of_a_freed_table_are_forgotten() -> None:
    """What lay in a cluster before it was freed is never shown to its next user."""
    metadata, table_offset = await _with_table(MemoryFile(blank_image()))
    await metadata.tables.load(table_offset)
    metadata.tables.forget_run(table_offset, 1)
    assert metadata.tables.peek(table_offset) is None
    assert not metadata.tables.dirty


async def test_a_slice_kept_across_an_await_cannot_be_changed() -> None:
    """`set_entries` refuses a slice object that the cache has replaced."""
    metadata, table_offset = await _with_table(MemoryFile(blank_image()))
    piece = metadata.try_writable_slice(0)
    assert piece is not None
    metadata.tables.forget_run(table_offset, 1)
    with pytest.raises(RuntimeError, match="across an await"):
        metadata.set_entries(piece, 0, array("Q", [0]))


async def test_metadata_writes_stay_inside_their_structure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one door for metadata writes refuses a cluster that belongs to something else."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    before = bytes(file.content[:4096])
    with pytest.raises(Exception, match="would overwrite a cluster of the header"):
        await metadata.writer.write(L2_TABLE, 0, [bytes(512)])
    assert metadata.failsafe is not None
    # The corrupt bit is the one thing that is still written.
    assert file.content[79] == before[79] | 2
    assert bytes(file.content[:72]) == before[:72]


async def test_a_lookup_without_a_table_is_absent() -> None:
    """An empty L1 entry, and an index past the L1, mean that nothing is allocated."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    assert metadata.peek(metadata.active, 0) is ABSENT
    assert metadata.load_now(metadata.active, 1 << 40) is ABSENT
    assert await metadata.load(metadata.active, 1 << 50) is ABSENT
