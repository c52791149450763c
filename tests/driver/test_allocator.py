"""Free space: what is handed out, what is counted, what waits before it is free again."""

from collections.abc import Iterable

import numpy as np
import pytest

from qcowfs.driver.layout import header as fields
from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.qcow2.guard import BULK_LIMIT, HEADER, L2_TABLE, SNAPSHOT_TABLE, ProtectedMap
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage, ImageFull, QcowfsError
from tests.driver.engine import MIB, Guest, blank_image, judge, open_metadata
from tests.fakes import CrashFile, MemoryFile, resize

WIDTHS = [(512, 1), (512, 16), (4096, 8), (65536, 16), (65536, 64), (65536, 2)]


async def _allocate(metadata: Metadata, count: int, after: int | None = None) -> tuple[int, int]:
    async with metadata.lock:
        return await metadata.allocator.allocate(count, after=after)


async def _commit(metadata: Metadata) -> None:
    async with metadata.lock:
        await metadata.commit()


def _runs(places: Iterable[tuple[int, int]], cluster_size: int) -> set[int]:
    clusters: set[int] = set()
    for host_offset, count in places:
        first = host_offset // cluster_size
        assert not clusters.intersection(range(first, first + count))
        clusters.update(range(first, first + count))
    return clusters


@pytest.mark.parametrize(("cluster_size", "refcount_bits"), WIDTHS)
async def test_what_is_handed_out_was_free_and_is_counted(
    cluster_size: int, refcount_bits: int
) -> None:
    """Clusters handed out are disjoint, counted 1, and to qemu-img no worse than leaks."""
    content = blank_image(4 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits)
    file = MemoryFile(content)
    metadata = await open_metadata(file)
    places = [await _allocate(metadata, count) for count in (1, 3, 700, 1, 64)]
    clusters = _runs(places, cluster_size)
    assert min(clusters) * cluster_size >= len(content) // cluster_size * cluster_size
    for cluster_index in clusters:
        assert await metadata.refcounts.refcount(cluster_index) == 1
    await metadata.finish()
    resize(file.content, metadata.allocator.end_offset)
    assert judge(file.content) == (0, len(clusters))


# Wider clusters describe more with their first table than a test wants to fill.
@pytest.mark.parametrize(("cluster_size", "refcount_bits"), [(512, 16), (512, 64), (1024, 64)])
async def test_the_refcount_table_grows_where_it_must(
    cluster_size: int, refcount_bits: int
) -> None:
    """A run beyond what the table can describe makes it grow, and the image stays sound."""
    file = MemoryFile(blank_image(4 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits))
    metadata = await open_metadata(file)
    covered = len(metadata.refcounts.table) * metadata.geometry.refcounts_per_block
    count = covered + 10
    async with metadata.lock:
        host_offset = await metadata.allocator.allocate_contiguous(count, SNAPSHOT_TABLE)
    assert metadata.header.refcount_table_clusters > 1
    assert metadata.protected.owner(host_offset // cluster_size) == SNAPSHOT_TABLE
    await metadata.finish()
    resize(file.content, metadata.allocator.end_offset)
    assert judge(file.content) == (0, count)


async def test_table_growth_survives_a_crash_at_any_point() -> None:
    """While the refcount table moves, every crash leaves leaks at worst."""
    file = CrashFile(blank_image(1 * MIB, cluster_size=512, refcount_bits=64))
    metadata = await open_metadata(file)
    covered = len(metadata.refcounts.table) * metadata.geometry.refcounts_per_block
    guest = Guest(metadata)
    await guest.write(3, 3)
    async with metadata.lock:
        await metadata.allocator.allocate_contiguous(covered, SNAPSHOT_TABLE)
    await guest.write(4, 4)
    await metadata.finish()
    for state in file.states(point_count=14, each_limit=4, subset_count=1, torn_count=1):
        assert judge(state.content)[0] == 0, state.description


async def test_a_table_at_its_limit_is_full_and_nothing_breaks() -> None:
    """A refcount table over 8 MiB is refused as ImageFull, without failsafe."""
    metadata = await open_metadata(MemoryFile(blank_image(1 * MIB, cluster_size=512)))
    with pytest.raises(ImageFull, match="limit"):
        metadata.allocator.plan_table((8 * MIB >> 3) + 1)
    assert metadata.failsafe is None


async def test_allocation_continues_after_the_last_one() -> None:
    """`after` makes neighbouring writes one host run."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    first = metadata.allocator.try_allocate(2)
    assert first is not None
    other = metadata.allocator.try_allocate(1)
    assert other is not None
    assert metadata.allocator.try_allocate(3, after=other[0] + 65536) == (other[0] + 65536, 3)


async def test_after_a_used_cluster_any_free_run_will_do() -> None:
    """When the cluster behind `after` is taken, the allocation goes elsewhere."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    first = metadata.allocator.try_allocate(4)
    assert first is not None
    place = metadata.allocator.try_allocate(1, after=first[0] + 65536)
    assert place == (first[0] + 4 * 65536, 1)


async def test_a_new_refcount_block_is_durable_before_its_table_entry() -> None:
    """The block is written and synced first; only then does the table name it."""
    file = CrashFile(blank_image(4 * MIB, cluster_size=512))
    metadata = await open_metadata(file)
    for _ in range(3):
        await _allocate(metadata, 200)
    (index,) = sorted(metadata.refcounts.new_blocks)[:1]
    offset = metadata.refcounts.table[index]
    await _commit(metadata)
    table = metadata.header.refcount_table_offset
    written = next(
        number
        for number, entry in enumerate(file.log)
        if entry.kind == "pwrite" and entry.host_offset == offset
    )
    named = next(
        number
        for number, entry in enumerate(file.log)
        if entry.kind == "pwrite"
        and entry.host_offset <= table + index * 8 < entry.host_offset + entry.length
    )
    assert any(entry.kind == "sync" for entry in file.log[written:named])


async def test_without_a_commit_there_is_no_reuse() -> None:
    """A dropped cluster keeps its count until its removal is durable."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    guest = Guest(metadata)
    old = await guest.write(0, 1)
    await metadata.flush()
    await guest.discard(0)
    places = _runs([await _allocate(metadata, 1) for _ in range(50)], 65536)
    assert old // 65536 not in places


async def test_a_commit_makes_dropped_clusters_free() -> None:
    """A long run of overwrites with commits between does not make the file grow."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    for value in range(1, 40):
        for index in range(8):
            await guest.write(index, value)
        await metadata.flush()
    await metadata.finish()
    assert len(file.content) <= (8 * 3 + 8) * 65536
    assert judge(file.content) == (0, 0)


async def test_a_freed_cluster_waits_for_requests_that_began_before() -> None:
    """A reader that may still use the old place keeps it from being handed out."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    guest = Guest(metadata)
    old = await guest.write(0, 1)
    await metadata.flush()
    token = metadata.requests.begin()
    await guest.discard(0)
    await metadata.flush()
    places = _runs([await _allocate(metadata, 1) for _ in range(20)], 65536)
    assert old // 65536 not in places
    metadata.requests.end(token)
    assert metadata.allocator.try_allocate(1) is None
    assert (await _allocate(metadata, 1))[0] == old


async def test_a_request_that_begins_after_the_commit_delays_nothing() -> None:
    """Only requests older than the removal count."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    guest = Guest(metadata)
    old = await guest.write(0, 1)
    await guest.discard(0)
    await metadata.flush()
    token = metadata.requests.begin()
    assert (await _allocate(metadata, 1))[0] == old
    metadata.requests.end(token)


async def test_freed_clusters_are_punched_when_asked() -> None:
    """A discard with `punch` gives the room back to the host, once it is free."""
    file = CrashFile(blank_image())
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    offsets = [await guest.write(index, 5) for index in range(4)]
    await metadata.flush()
    for index in range(4):
        await guest.discard(index, punch=True)
    assert not [entry for entry in file.log if entry.kind == "punch"]
    await metadata.flush()
    punched = [entry for entry in file.log if entry.kind == "punch"]
    assert sum(entry.length for entry in punched) == 4 * 65536
    assert all(bytes(file.content[offset : offset + 65536]) == bytes(65536) for offset in offsets)


@pytest.mark.parametrize("structure", ["header", "refcount table", "refcount block", "L2 table"])
async def test_metadata_that_is_counted_as_free_is_not_handed_out(
    structure: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile refcount of 0 on a metadata cluster ends in failsafe, not in an overwrite."""
    content = bytearray(blank_image(writes=("write 0 64k",)))
    header = fields.parse_header(content, len(content))
    block = int.from_bytes(content[header.refcount_table_offset :][:8], "big")
    l1_entry = int.from_bytes(content[header.l1_table_offset :][:8], "big")
    offset = {
        "header": 0,
        "refcount table": header.refcount_table_offset,
        "refcount block": block,
        "L2 table": l1_entry & OFFSET_MASK,
    }[structure]
    place = block + offset // 65536 * 2
    content[place : place + 2] = b"\0\0"
    file = MemoryFile(content)
    metadata = await open_metadata(file)
    with pytest.raises(CorruptImage, match=f"belongs to the {structure}"):
        for _ in range(4):
            await _allocate(metadata, 1)
    assert metadata.failsafe is not None
    assert file.content[79] & fields.INCOMPATIBLE_CORRUPT
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


async def test_freeing_metadata_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """An L2 entry that names a metadata cluster as guest data cannot set it free."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    with pytest.raises(CorruptImage, match="would free"):
        metadata.allocator.drop(metadata.header.l1_table_offset, 65536)
    assert metadata.failsafe is not None


async def test_a_count_never_falls_below_zero(caplog: pytest.LogCaptureFixture) -> None:
    """Dropping one reference twice is corruption, found before the count wraps."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    host_offset, _ = await _allocate(metadata, 1)
    metadata.allocator.drop(host_offset, 65536)
    metadata.allocator.drop(host_offset, 65536)
    with pytest.raises(CorruptImage, match="below 0"):
        await _commit(metadata)
    assert metadata.failsafe is not None
    assert await metadata.refcounts.refcount(host_offset // 65536) == 0


@pytest.mark.parametrize(("cluster_size", "refcount_bits"), [(65536, 1), (65536, 2), (4096, 8)])
async def test_a_count_never_passes_its_width(cluster_size: int, refcount_bits: int) -> None:
    """One reference more than the width holds is ImageFull, and changes nothing."""
    metadata = await open_metadata(
        MemoryFile(blank_image(cluster_size=cluster_size, refcount_bits=refcount_bits))
    )
    host_offset, _ = await _allocate(metadata, 2)
    most = (1 << refcount_bits) - 1
    indexes = np.array([host_offset // cluster_size, host_offset // cluster_size + 1], np.uint64)
    async with metadata.lock:
        if most > 1:
            await metadata.allocator.raise_refcount(host_offset, most - 1)
        with pytest.raises(ImageFull, match="hold at most"):
            await metadata.allocator.raise_refcount(host_offset)
        with pytest.raises(ImageFull, match="hold at most"):
            await metadata.refcounts.raise_many(indexes)
    assert [int(count) for count in await metadata.refcounts.gather(indexes)] == [most, 1]
    assert metadata.failsafe is None


# One bit has no second reference.
@pytest.mark.parametrize(("cluster_size", "refcount_bits"), WIDTHS[1:])
async def test_bulk_changes_agree_with_single_ones(cluster_size: int, refcount_bits: int) -> None:
    """raise_many, drop_many and gather count as one cluster after the other would."""
    metadata = await open_metadata(
        MemoryFile(blank_image(cluster_size=cluster_size, refcount_bits=refcount_bits))
    )
    async with metadata.lock:
        host_offset = await metadata.allocator.allocate_contiguous(3000, L2_TABLE)
        indexes = np.arange(3000, dtype=np.uint64) + np.uint64(host_offset // cluster_size)
        await metadata.refcounts.raise_many(indexes[::2], 2)
        assert (await metadata.refcounts.gather(indexes)).tolist() == [3, 1] * 1500
        metadata.allocator.drop_many(np.repeat(indexes[::2], 2), structure=L2_TABLE)
        metadata.allocator.drop_many(indexes[1::2], structure=L2_TABLE)
        await metadata.commit()
        assert (await metadata.refcounts.gather(indexes)).tolist() == [1, 0] * 1500
        metadata.allocator.drop(host_offset, 1, structure=L2_TABLE)
        await metadata.commit()
    assert await metadata.refcounts.refcount(int(indexes[0])) == 0


async def test_raising_a_cluster_without_a_block_is_corruption() -> None:
    """A reference to a cluster that no refcount block describes cannot be counted."""
    metadata = await open_metadata(MemoryFile(blank_image(cluster_size=4096)))
    with pytest.raises(CorruptImage, match="no refcount block"):
        await metadata.refcounts.raise_many(np.array([1 << 20], np.uint64))


async def test_compressed_pieces_are_packed() -> None:
    """Pieces follow each other in one cluster, each with a reference of its own."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    async with metadata.lock:
        first = await metadata.allocator.allocate_bytes(1000)
        second = await metadata.allocator.allocate_bytes(2000)
        third = metadata.allocator.try_allocate_bytes(65000)
    assert second == first + 1000
    assert third == second + 2000
    assert await metadata.refcounts.refcount(first // 65536) == 3
    assert await metadata.refcounts.refcount(first // 65536 + 1) == 1


async def test_a_piece_never_spans_clusters_that_are_not_neighbours() -> None:
    """When the next cluster is taken, a piece that would reach into it begins elsewhere."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    async with metadata.lock:
        first = await metadata.allocator.allocate_bytes(60000)
        taken = await metadata.allocator.allocate(1, after=first + 65536)
        assert taken[0] == first + 65536
        second = await metadata.allocator.allocate_bytes(10000)
    assert second == first + 2 * 65536
    assert await metadata.refcounts.refcount(first // 65536) == 1


async def test_a_saturated_cluster_takes_no_further_piece() -> None:
    """With one refcount bit every piece gets a cluster of its own."""
    metadata = await open_metadata(MemoryFile(blank_image(refcount_bits=1)))
    async with metadata.lock:
        first = await metadata.allocator.allocate_bytes(100)
        second = await metadata.allocator.allocate_bytes(100)
    assert second == first + 65536


async def test_packing_stops_in_a_cluster_that_became_free() -> None:
    """A freed cluster is not continued by the next piece."""
    metadata = await open_metadata(MemoryFile(blank_image()))
    async with metadata.lock:
        first = await metadata.allocator.allocate_bytes(100)
        metadata.allocator.drop(first, 100)
        await metadata.commit()
        second = await metadata.allocator.allocate_bytes(100)
    assert second == first
    assert await metadata.refcounts.refcount(first // 65536) == 1


async def test_a_full_image_is_not_searched_again_and_again() -> None:
    """Blocks without a free cluster are looked at once."""
    file = MemoryFile(blank_image(64 * MIB, cluster_size=512))
    metadata = await open_metadata(file)
    async with metadata.lock:
        await metadata.allocator.allocate_contiguous(60000, SNAPSHOT_TABLE)
    await metadata.finish()
    again = await open_metadata(MemoryFile(file.content), cache_size=1 << 16)
    for _ in range(100):
        await _allocate(again, 1)
    loads = again.counters.refcount_block_loads
    for _ in range(1000):
        await _allocate(again, 1)
    assert again.counters.refcount_block_loads - loads < 20


async def test_holes_of_an_earlier_session_are_found() -> None:
    """Free clusters below the end are used before long, though no free was seen."""
    file = MemoryFile(blank_image())
    metadata = await open_metadata(file)
    guest = Guest(metadata)
    offsets = [await guest.write(index, 1) for index in range(10)]
    for index in range(0, 10, 2):
        await guest.discard(index)
    await metadata.finish()
    again = await open_metadata(MemoryFile(file.content))
    assert [(await _allocate(again, 1))[0] for _ in range(5)] == offsets[::2]


@pytest.mark.parametrize(
    ("entry", "rule"),
    [(0x30001, "reserved"), (0x30200, "not aligned"), (1 << 40, "past the end")],
)
async def test_a_bad_refcount_table_entry_is_named(entry: int, rule: str) -> None:
    """An invalid entry stops the first change with a clear error; nothing is written."""
    content = bytearray(blank_image())
    header = fields.parse_header(content, len(content))
    place = header.refcount_table_offset
    content[place : place + 8] = entry.to_bytes(8, "big")
    file = MemoryFile(content)
    with pytest.raises(CorruptImage, match=rule):
        await open_metadata(file)
    assert file.content == content


async def test_a_block_that_two_entries_share_is_never_changed() -> None:
    """Two table entries for one refcount block: neither may be used."""
    content = bytearray(blank_image())
    header = fields.parse_header(content, len(content))
    place = header.refcount_table_offset
    content[place + 8 : place + 16] = content[place : place + 8]
    file = MemoryFile(content)
    with pytest.raises(CorruptImage, match="another entry"):
        await open_metadata(file)
    assert file.content == content


async def test_an_image_whose_counts_are_all_zero_is_not_written_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without counts the header itself would be the first free cluster."""
    content = bytearray(blank_image())
    header = fields.parse_header(content, len(content))
    block = int.from_bytes(content[header.refcount_table_offset :][:8], "big")
    content[block : block + 65536] = bytes(65536)
    metadata = await open_metadata(MemoryFile(content))
    with pytest.raises(QcowfsError):
        await _allocate(metadata, 1)
    assert metadata.failsafe is not None


def test_the_protected_map_holds_any_number_of_tables() -> None:
    """Beyond a bound the tables of a large L1 are kept as an array; the answers are the same."""
    protected = ProtectedMap(16)
    protected.claim(HEADER, 0, 1)
    offsets = [(index * 3 + 7) << 16 for index in range(BULK_LIMIT + 1)]
    protected.claim_l2_tables([*offsets, offsets[5]])
    assert protected.owner(7) == L2_TABLE
    assert protected.owner(8) is None
    assert protected.first_owned(8, 3) == 10
    assert protected.release(L2_TABLE, 10)
    assert protected.owner(10) is None
    assert not protected.release(L2_TABLE, offsets[5] >> 16)
    assert not protected.release(L2_TABLE, 0)


def test_a_cluster_claimed_twice_is_never_released() -> None:
    """Where two structures name one cluster, its first owner keeps it for good."""
    protected = ProtectedMap(16)
    protected.claim(L2_TABLE, 65536, 65536)
    protected.claim(SNAPSHOT_TABLE, 65536, 100)
    assert protected.owner(1) == L2_TABLE
    assert not protected.release(L2_TABLE, 1)
