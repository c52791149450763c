"""References of whole disks: counted once more, given up, and COPIED flags by the counts."""

import errno
import logging
import random
from array import array
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import trio

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import OFLAG_COMPRESSED, compressed_clusters, store_words
from qcowfs.driver.qcow2 import copied, guard, references
from qcowfs.driver.qcow2.copied import clear_copied_flags, recompute_copied_flags
from qcowfs.driver.qcow2.guard import L2_TABLE, ProtectedMap
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.driver.qcow2.references import lower_all, lower_raised, raise_all
from qcowfs.errors import CorruptImage, ImageFull
from tests.driver.engine import open_metadata
from tests.driver.qcow2_images import KIB, MIB, entry_place, make_image, with_entry
from tests.fakes import FaultyFile, MemoryFile

CONTENT = random.Random(7).randbytes(512) * (MIB // 512)
# Writes in an order that makes runs of one cluster and of many.
WRITES = tuple(
    f"write -P {number + 1} {place} 64k"
    for number, place in enumerate(("640k", "128k", "576k", "0", "192k", "960k"))
)
KINDS = {
    "plain": ("cluster_size=4k", False),
    "refcounts-1": ("cluster_size=4k,refcount_bits=1", False),
    "refcounts-4": ("cluster_size=4k,refcount_bits=4", False),
    "refcounts-8": ("cluster_size=4k,refcount_bits=8", False),
    "refcounts-64": ("cluster_size=4k,refcount_bits=64", False),
    "small": ("cluster_size=512", False),
    "small-refcounts-8": ("cluster_size=512,refcount_bits=8", False),
    "extended": ("cluster_size=16k,extended_l2=on", False),
    "compressed": ("cluster_size=4k", True),
    "compressed-extended": ("cluster_size=16k,extended_l2=on", True),
}


@pytest.fixture(params=["runs", "arrays", "small-batches"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How references are counted: run by run, as arrays, as many small arrays."""
    name: str = request.param

    def is_scattered(cost: int, cost_left: int) -> bool:
        return name != "runs"

    monkeypatch.setattr(references, "is_scattered", is_scattered)
    monkeypatch.setattr(references, "_BATCH_RUNS", 3)
    monkeypatch.setattr(copied, "is_scattered", is_scattered)
    if name == "small-batches":
        monkeypatch.setattr(references, "_BATCH_COUNT", 3)
        monkeypatch.setattr(copied, "_MAP_COUNT_MAX", 0)
    return name


def image_of(kind: str) -> bytes:
    """An image of 1 MiB with half of it written, or all of it compressed."""
    options, compressed = KINDS[kind]
    if compressed:
        return make_image(MIB, options, content=CONTENT, compressed=True)
    return make_image(MIB, options, commands=WRITES)


async def references_of(metadata: Metadata, view: L1View) -> "Counter[int]":
    """How many references the view holds to each host cluster, entry by entry."""
    geometry = metadata.geometry
    found: Counter[int] = Counter()
    for _, table_offset in metadata.table_offsets(view):
        found[table_offset >> geometry.cluster_bits] += 1
        words = await metadata.tables.read_table(table_offset)
        for entry in words[:: geometry.words_per_entry]:
            if entry & OFLAG_COMPRESSED:
                first, count = compressed_clusters(entry, geometry)
                first >>= geometry.cluster_bits
                found.update(range(first, first + count))
            elif entry & OFFSET_MASK:
                found[(entry & OFFSET_MASK) >> geometry.cluster_bits] += 1
    return found


async def all_counts(metadata: Metadata) -> dict[int, int]:
    """Every count in memory that is not 0."""
    per_block = metadata.geometry.refcounts_per_block
    found: dict[int, int] = {}
    for index, entry in enumerate(metadata.refcounts.table):
        if entry:
            block = await metadata.refcounts.block(index)
            values = block.counts.values(0, per_block)
            found |= {index * per_block + place: count
                      for place, count in enumerate(values) if count}  # fmt: skip
    return found


# Counting once more


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "refcounts-1"])
async def test_every_reference_is_counted_once_more(kind: str, way: str) -> None:
    """A cluster gets as many references as the disk holds to it; taken back, all is as before."""
    metadata = await open_metadata(MemoryFile(image_of(kind)))
    before = await all_counts(metadata)
    held = await references_of(metadata, metadata.active)
    async with metadata.lock:
        await raise_all(metadata, metadata.active)
        assert await all_counts(metadata) == Counter(before) + held
        await raise_all(metadata, metadata.active)
        await lower_raised(metadata, metadata.active)
        await lower_raised(metadata, metadata.active)
    assert await all_counts(metadata) == before


@pytest.mark.parametrize("seed", range(4))
async def test_a_full_count_changes_none(way: str, seed: int) -> None:
    """Where one of many counts cannot rise, none has risen."""
    metadata = await open_metadata(MemoryFile(image_of("small-refcounts-8")))
    held = await references_of(metadata, metadata.active)
    async with metadata.lock:
        full = sorted(held)[-1 - 100 * seed]
        await metadata.allocator.raise_refcount(full << 9, 254)
        before = await all_counts(metadata)
        assert before[full] == 255
        with pytest.raises(ImageFull, match="is 255, 8 bits"):
            await raise_all(metadata, metadata.active)
    assert await all_counts(metadata) == before


async def test_one_bit_is_always_full(way: str) -> None:
    """A count of one bit never rises."""
    metadata = await open_metadata(MemoryFile(image_of("refcounts-1")))
    before = await all_counts(metadata)
    async with metadata.lock:
        with pytest.raises(ImageFull):
            await raise_all(metadata, metadata.active)
    assert await all_counts(metadata) == before


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (OFLAG_COPIED | 0x30200, "not aligned"),
        (1 << 57, "reserved"),
        (OFLAG_COPIED | 0x10_0000_0000, "no refcount block"),
        (OFLAG_COPIED, None),
        (OFLAG_COPIED | 0x1000, "belongs to the refcount table"),
    ],
    ids=["unaligned", "reserved", "past-the-end", "no-offset", "metadata"],
)
async def test_a_damaged_entry_changes_nothing(entry: int, rule: str | None, way: str) -> None:
    """An entry that breaks a rule, or leads out of guest data, ends the counting as it began."""
    metadata = await open_metadata(MemoryFile(with_entry(image_of("plain"), 960 * KIB, entry)))
    before = await all_counts(metadata)
    async with metadata.lock:
        if rule is None:
            await raise_all(metadata, metadata.active)
            await lower_raised(metadata, metadata.active)
        else:
            with pytest.raises(CorruptImage, match=rule):
                await raise_all(metadata, metadata.active)
    assert await all_counts(metadata) == before
    assert metadata.failsafe is None


async def test_a_cluster_in_use_with_count_0_changes_nothing(way: str) -> None:
    """Counts that were wrong before are not built upon."""
    image = bytearray(image_of("plain"))
    place = entry_place(image, 960 * KIB)
    cluster = (int.from_bytes(image[place : place + 8], "big") & OFFSET_MASK) >> 12
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\0"
    metadata = await open_metadata(MemoryFile(image))
    before = await all_counts(metadata)
    async with metadata.lock:
        with pytest.raises(CorruptImage, match="refcount is 0"):
            await raise_all(metadata, metadata.active)
    assert await all_counts(metadata) == before


async def test_an_unreadable_table_changes_nothing(way: str) -> None:
    """The host's error comes through; what had been counted is taken back."""
    inner = MemoryFile(image_of("small"))
    file = FaultyFile(inner)
    metadata = await open_metadata(file)
    before = await all_counts(metadata)
    async with metadata.lock:
        file.fail("pread", 5)
        with pytest.raises(OSError) as caught:
            await raise_all(metadata, metadata.active)
    assert caught.value.errno == errno.EIO
    assert await all_counts(metadata) == before


async def test_little_memory_is_enough(way: str) -> None:
    """With room for a few refcount blocks only, they are written on the way and all is counted."""
    content = make_image(MIB, "cluster_size=512", commands=("write -P 1 0 1M",))
    metadata = await open_metadata(MemoryFile(content), cache_size=0)
    before = Counter(await all_counts(metadata))
    held = await references_of(metadata, metadata.active)
    async with metadata.lock:
        await raise_all(metadata, metadata.active)
        assert len(metadata.refcounts.dirty_blocks) <= metadata.refcounts.dirty_limit
    assert await all_counts(metadata) == before + held


# Giving up


@pytest.mark.parametrize("kind", KINDS)
async def test_what_nobody_holds_is_free(kind: str, way: str) -> None:
    """Given up by its only holder, a cluster is counted 0 and handed out again."""
    metadata = await open_metadata(MemoryFile(image_of(kind)))
    held = await references_of(metadata, metadata.active)
    geometry = metadata.geometry
    async with metadata.lock:
        # All blocks are known to be full then.
        for _ in range(20):
            await metadata.allocator.allocate(1)
        before = Counter(await all_counts(metadata))
        await lower_all(metadata, metadata.active, "the disk")
        assert await all_counts(metadata) == before - held
        taken = set()
        while True:
            offset, count = await metadata.allocator.allocate(1 << 20)
            first = offset >> geometry.cluster_bits
            taken.update(range(first, first + count))
            if first > max(held):
                break
    assert set(held) <= taken


@pytest.mark.parametrize("kind", ["plain", "extended", "compressed", "refcounts-4"])
async def test_what_another_holds_stays(kind: str, way: str) -> None:
    """Clusters that are shared lose one reference each, and are not free."""
    metadata = await open_metadata(MemoryFile(image_of(kind)))
    before = await all_counts(metadata)
    async with metadata.lock:
        await raise_all(metadata, metadata.active)
        frees = metadata.counters.frees
        await lower_all(metadata, metadata.active, "the disk")
    assert await all_counts(metadata) == before
    assert metadata.counters.frees == frees
    owner = metadata.protected.owner(next(iter(metadata.table_offsets(metadata.active)))[1] >>
                                     metadata.geometry.cluster_bits)  # fmt: skip
    assert owner == L2_TABLE


async def test_an_older_request_is_waited_for(way: str) -> None:
    """No count falls while a request that began earlier is under way."""
    metadata = await open_metadata(MemoryFile(image_of("plain")))
    before = await all_counts(metadata)
    token = metadata.requests.begin()
    ended = False

    async def end_later() -> None:
        nonlocal ended
        for _ in range(5):
            await trio.sleep(0.001)
            assert await all_counts(metadata) == before
        ended = True
        metadata.requests.end(token)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_later)
        async with metadata.lock:
            await lower_all(metadata, metadata.active, "the disk")
            assert ended
    assert await all_counts(metadata) != before


async def test_damage_costs_its_own_table(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The tables that can be read are given up, the damaged one stays in use, with one warning."""
    image = make_image(MIB, "cluster_size=512", commands=("write -P 1 0 1M",))
    broken = bytearray(with_entry(image, 100 * KIB, 1 << 57))
    l1_place = int.from_bytes(image[40:48], "big")
    broken[l1_place : l1_place + 8] = (0x7F << 56).to_bytes(8, "big")
    metadata = await open_metadata(MemoryFile(broken))
    bits = metadata.geometry.cluster_bits
    async with metadata.lock:
        with caplog.at_level(logging.WARNING):
            await lower_all(metadata, metadata.active, "the disk")
        assert len(caplog.records) == 1
        assert "the disk is damaged" in caplog.text
    damaged = 100 * KIB // metadata.geometry.l2_coverage
    for l1_index in range(1, len(metadata.active.words)):
        table_offset = metadata.active.table_at(l1_index, 1 << 40)
        count = await metadata.refcounts.refcount(table_offset >> bits)
        assert count == (1 if l1_index == damaged else 0)
    assert metadata.failsafe is None


@pytest.mark.expects_warnings
async def test_a_count_never_falls_below_0(way: str) -> None:
    """Giving up what nobody holds shows that the counts were wrong: all writing ends."""
    metadata = await open_metadata(MemoryFile(image_of("plain")))
    view = L1View(
        array("Q", metadata.active.words), 0, metadata.geometry, writable=False
    )
    async with metadata.lock:
        await lower_all(metadata, metadata.active, "the disk")
        with pytest.raises(CorruptImage, match="below 0"):
            await lower_all(metadata, view, "the disk")
    assert metadata.failsafe is not None


async def test_freed_tables_are_forgotten(way: str) -> None:
    """A cached slice of a cluster that became free does not outlive it, whatever it was."""
    metadata = await open_metadata(MemoryFile(image_of("plain")))
    held = await references_of(metadata, metadata.active)
    for cluster in held:
        await metadata.tables.load(cluster << 12)
    assert len(metadata.tables.slices) == len(held)
    async with metadata.lock:
        await lower_all(metadata, metadata.active, "the disk")
    assert not metadata.tables.slices


@pytest.mark.parametrize("bulk_limit", [2, 100])
def test_a_long_run_that_holds_metadata(
    bulk_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first protected cluster is found in runs of any length, and in arrays."""
    monkeypatch.setattr(guard, "BULK_LIMIT", bulk_limit)
    protected = ProtectedMap(12)
    protected.claim(guard.HEADER, 0, 1)
    protected.claim_l2_tables([40 << 12, 20 << 12, 30 << 12])
    assert protected.release(L2_TABLE, 20)
    for first, count, found in (
        (1, 29, None), (1, 30, 30), (1, 100, 30), (31, 9, None), (31, 100, 40), (0, 100, 0),
        (40, 1, 40), (41, 1 << 20, None),
    ):  # fmt: skip
        assert protected.first_owned(first, count) == found
        array_of = np.arange(first, first + count, dtype=np.uint64)
        assert protected.first_owned_among(array_of) == found
    assert protected.first_owned_among(np.array([], dtype=np.uint64)) is None


# COPIED flags


async def entries_of(metadata: Metadata) -> dict[int, int]:
    """All L1 and L2 entries with an offset by (a number for) their place."""
    step = metadata.geometry.words_per_entry
    found: dict[int, int] = {}
    for l1_index, table_offset in metadata.table_offsets(metadata.active):
        found[-1 - l1_index] = metadata.active.words[l1_index]
        words = (await metadata.tables.read_table(table_offset))[::step]
        found |= {l1_index << 32 | index: entry for index, entry in enumerate(words)
                  if entry & OFFSET_MASK}  # fmt: skip
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_flags_are_cleared_everywhere(kind: str, way: str) -> None:
    """No entry of the L1 or an L2 table keeps its flag, and nothing else of it changes."""
    metadata = await open_metadata(MemoryFile(image_of(kind)))
    await metadata.load(metadata.active, 0)
    before = await entries_of(metadata)
    async with metadata.lock:
        await clear_copied_flags(metadata)
    after = await entries_of(metadata)
    assert after == {place: entry & ~OFLAG_COPIED for place, entry in before.items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "refcounts-1"])
@pytest.mark.parametrize("seed", range(3))
async def test_flags_say_whether_the_count_is_1(kind: str, way: str, seed: int) -> None:
    """Worked out anew, an entry has its flag where its cluster's count is 1 and nowhere else."""
    metadata = await open_metadata(MemoryFile(image_of(kind)))
    bits = metadata.geometry.cluster_bits
    choice = random.Random(seed)
    async with metadata.lock:
        if choice.random() < 0.5:
            await clear_copied_flags(metadata)
        for cluster in await references_of(metadata, metadata.active):
            if choice.random() < seed * 0.3:
                await metadata.allocator.raise_refcount(cluster << bits)
        before = await entries_of(metadata)
        await recompute_copied_flags(metadata)
        await metadata.commit()
    counts = await all_counts(metadata)
    for place, entry in (await entries_of(metadata)).items():
        plain = entry & ~OFLAG_COPIED
        assert plain == before[place] & ~OFLAG_COPIED
        if entry & OFLAG_COMPRESSED:
            assert entry == plain
        else:
            assert bool(entry & OFLAG_COPIED) == (counts[(entry & OFFSET_MASK) >> bits] == 1)


@pytest.mark.expects_warnings
async def test_a_used_cluster_with_count_0_ends_all_writing(way: str) -> None:
    """Flags cannot be worked out from counts that are wrong."""
    metadata = await open_metadata(MemoryFile(image_of("plain")))
    async with metadata.lock:
        cluster = max(await references_of(metadata, metadata.active))
        block = await metadata.refcounts.block(0)
        metadata.refcounts.lower_run(block, cluster, 1)
        with pytest.raises(CorruptImage, match="refcount is 0"):
            await recompute_copied_flags(metadata)
    assert metadata.failsafe is not None


async def test_damaged_entries_are_passed_by(way: str) -> None:
    """What breaks a rule gets no flag; its neighbours get theirs."""
    image = with_entry(image_of("plain"), 960 * KIB, OFLAG_COPIED | 0x30200)
    metadata = await open_metadata(MemoryFile(image))
    async with metadata.lock:
        await clear_copied_flags(metadata)
        await recompute_copied_flags(metadata)
    flagged = {place for place, entry in (await entries_of(metadata)).items()
               if entry & OFLAG_COPIED}  # fmt: skip
    place = 960 * KIB >> 12
    assert place not in flagged
    assert place + 1 in flagged


# Many


async def test_hundreds_of_thousands_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was written in order is counted run by run: a run a table, whatever its size."""
    image = make_image(2 << 30, "preallocation=metadata,cluster_size=16k")
    metadata = await open_metadata(MemoryFile(image))
    runs: list[int] = []
    raise_run: Callable[..., None] = metadata.refcounts.raise_run

    def count_run(block: object, place: int, count: int) -> None:
        runs.append(count)
        raise_run(block, place, count)

    monkeypatch.setattr(metadata.refcounts, "raise_run", count_run)
    async with metadata.lock:
        await raise_all(metadata, metadata.active)
    assert sum(runs) == (2 << 30 >> 14) + len(metadata.active.words)
    assert len(runs) < 10 * len(metadata.active.words)


async def test_a_scattered_disk_of_many_tables() -> None:
    """Clusters in any order are counted block by block, each as often as it is held."""
    image = bytearray(make_image(128 * MIB, "preallocation=metadata,cluster_size=4k"))
    choice = random.Random(5)
    l1_place = int.from_bytes(image[40:48], "big")
    l1_size = int.from_bytes(image[36:40], "big")
    tables = [
        int.from_bytes(image[l1_place + 8 * index : l1_place + 8 * index + 8], "big") & OFFSET_MASK
        for index in range(l1_size)
    ]
    entries = [
        int.from_bytes(image[table + place : table + place + 8], "big")
        for table in tables
        for place in range(0, 4096, 8)
    ]
    choice.shuffle(entries)
    for number, table in enumerate(tables):
        image[table : table + 4096] = store_words(
            array("Q", entries[512 * number : 512 * number + 512])
        )
    metadata = await open_metadata(MemoryFile(image), cache_size=1 << 16)
    before = await all_counts(metadata)
    async with metadata.lock:
        await raise_all(metadata, metadata.active)
        raised = await all_counts(metadata)
        used = {entry & OFFSET_MASK for entry in entries} | set(tables)
        assert raised == {
            cluster: count + (cluster << 12 in used) for cluster, count in before.items()
        }
        await lower_all(metadata, metadata.active, "the disk")
        assert await all_counts(metadata) == before
        await lower_all(metadata, metadata.active, "the disk")
    gone = await all_counts(metadata)
    assert gone == {cluster: count for cluster, count in before.items()
                    if cluster << 12 not in used}  # fmt: skip


