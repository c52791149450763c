"""The refcount table and the cache of refcount blocks.

Implements docs/interop/qcow2, "Host cluster management". Counts here are what
the next commit will write: increments at once, decrements when the allocator
applies them. May not: choose clusters, know L1, L2 or guest offsets.
Invariants:

- A count never wraps: below 0 is CorruptImage, above the width's maximum is
  ImageFull, and a bulk change that would fail changes nothing.
- A block that the file's refcount table does not name yet is in `new_blocks`,
  and its table index in `dirty_table`, until both are durable.
- Writing a dirty block is harmless at any time (it holds raised counts, whose
  references are not durable yet, or lowered ones, whose references durably are
  gone), so a commit only has to order it before the references.
"""

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import trio

from qcowfs.driver.layout.geometry import SECTOR, Geometry
from qcowfs.driver.layout.mapping import load_words, store_words
from qcowfs.driver.layout.refcounts import (
    RefcountBlock,
    find_free_run,
    pack_all,
    refcount_table_entry_offset,
    unpack_all,
)
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.guard import REFCOUNT_BLOCK, REFCOUNT_TABLE, MetadataWriter
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage, ImageFull

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORDS_PER_SECTOR = SECTOR // 8


class CachedBlock:
    """One refcount block in memory; `dirty_first` to `dirty_end` in bytes of `data`."""

    __slots__ = ("counts", "data", "dirty_end", "dirty_first", "hits", "host_offset", "index")

    def __init__(self, index: int, host_offset: int, data: bytearray, order: int) -> None:
        self.index = index
        self.host_offset = host_offset
        self.data = data
        self.counts = RefcountBlock(data, order)
        self.hits = 0
        self.dirty_first = len(data)
        self.dirty_end = 0


class RefcountCache:
    """The refcounts of one image file; `budget` bytes of blocks.

    `table` holds the refcount table's words in native order, as they will be
    after the next commit; `load_table` must come first.
    """

    def __init__(
        self,
        storage: Storage,
        writer: MetadataWriter,
        geometry: Geometry,
        counters: Counters,
        budget: int,
        report: Callable[[CorruptImage], NoReturn],
    ) -> None:
        self._storage = storage
        self._writer = writer
        self._geometry = geometry
        self._counters = counters
        self._report = report
        self._capacity = max(4, budget // (geometry.cluster_size + 512))
        self.dirty_limit = max(2, self._capacity // 2)
        self.table: array[int] = array("Q")
        self.table_offset = 0
        self._blocks: dict[int, CachedBlock] = {}
        self._loading: dict[int, trio.Event] = {}
        self.dirty_blocks: dict[int, CachedBlock] = {}
        self.new_blocks: set[int] = set()
        self.dirty_table: set[int] = set()
        # Blocks that may not be changed: two table entries name them.
        self.shared_blocks: set[int] = set()

    @property
    def dirty(self) -> bool:
        """Whether a commit has refcounts to write."""
        return bool(self.dirty_blocks or self.dirty_table)

    # The table

    async def load_table(self, table_offset: int, cluster_count: int) -> None:
        """Read the refcount table; its place and size have been checked with the header."""
        length = cluster_count * self._geometry.cluster_size
        self.table = load_words(await self._storage.pread(length, table_offset))
        self.table_offset = table_offset

    def block_offset(self, index: int) -> int:
        """The host offset of a refcount block, 0 for none; raises CorruptImage."""
        if index >= len(self.table):
            return 0
        host_offset = refcount_table_entry_offset(self.table[index], index, self._geometry)
        rule = None
        if index in self.shared_blocks:
            rule = "names a block that another entry, or another structure, uses too"
        elif host_offset and index not in self._blocks and host_offset >= self._storage.size():
            rule = "names a block past the end of the file"
        if rule is not None:
            raise CorruptImage(
                f"refcount table entry {index}: {host_offset:#018x} {rule}",
                structure="refcount table",
                index=index,
                host_offset=host_offset,
            )
        return host_offset

    # Blocks

    def peek(self, index: int) -> CachedBlock | None:
        """A block that is in memory, or None."""
        return self._blocks.get(index)

    def block_now(self, index: int) -> CachedBlock | None:
        """A block from memory or the host's page cache; None when it must be waited for.

        The table must have an entry for it. Raises CorruptImage.
        """
        block = self._blocks.get(index)
        if block is not None:
            block.hits += 1
            return block
        host_offset = self.block_offset(index)
        data = bytearray(self._geometry.cluster_size)
        if not self._storage.try_pread_into([memoryview(data)], host_offset):
            return None
        return self._insert(index, host_offset, data)

    async def block(self, index: int) -> CachedBlock:
        """A block that the table names; raises CorruptImage, OSError of the host."""
        while True:
            block = self.block_now(index)
            if block is not None:
                return block
            event = self._loading.get(index)
            if event is not None:
                await event.wait()
                continue
            host_offset = self.block_offset(index)
            event = self._loading[index] = trio.Event()
            try:
                data = await self._storage.pread(self._geometry.cluster_size, host_offset)
            finally:
                del self._loading[index]
                event.set()
            if index not in self._blocks:
                return self._insert(index, host_offset, data)

    def create_block(self, index: int, host_offset: int) -> CachedBlock:
        """A new block, all counts 0, named by the table in memory; the table has room for it."""
        block = self._insert(index, host_offset, bytearray(self._geometry.cluster_size))
        self.table[index] = host_offset
        self.dirty_table.add(index)
        self.new_blocks.add(index)
        self._mark(block, 0, len(block.data))
        return block

    # Counts

    def count(self, block: CachedBlock, place: int) -> int:
        """The refcount at a place of a block."""
        return block.counts.get(place)

    def find_free(self, block: CachedBlock, place: int, count: int) -> tuple[int, int] | None:
        """The first run of zero counts from `place` on: (place, at most `count`), or None."""
        return find_free_run(block.counts, place, count)

    def take(self, block: CachedBlock, place: int, count: int) -> None:
        """Set a run of zero counts to 1."""
        block.counts.fill(place, count, 1)
        self._mark_counts(block, place, count)

    def raise_count(self, block: CachedBlock, place: int, addend: int = 1) -> None:
        """Add to one count; raises ImageFull over the width's maximum."""
        value = block.counts.get(place) + addend
        if value > self._geometry.refcount_max:
            raise self._over(block, place)
        block.counts.set(place, value)
        self._mark_counts(block, place, 1)

    def raise_run(self, block: CachedBlock, place: int, count: int) -> None:
        """Add 1 to each count of a run of clusters that are in use.

        Raises ImageFull over the width's maximum, CorruptImage for a count of
        0, which nothing in use has; with nothing changed.
        """
        counts = block.counts
        value = counts.uniform(place, count)
        if value is not None and 0 < value < counts.maximum:
            counts.fill(place, count, value + 1)
        else:
            unused = counts.find_zero(place, count)
            if unused >= 0:
                raise self._unused(block, unused)
            full = counts.find_maximum(place, count)
            if full >= 0:
                raise self._over(block, full)
            counts.shift_run(place, count, 1)
        self._mark_counts(block, place, count)

    def lower_run(self, block: CachedBlock, place: int, count: int) -> list[tuple[int, int]]:
        """Take 1 off each count of a run; answers the runs (place, count) that became 0.

        Raises CorruptImage, through `report`, for a count that is 0 already,
        with nothing changed.
        """
        counts = block.counts
        value = counts.uniform(place, count)
        if value:
            counts.fill(place, count, value - 1)
            freed = [(place, count)] if value == 1 else []
        else:
            unused = counts.find_zero(place, count)
            if unused >= 0:
                self._report_below(block, unused)
            counts.shift_run(place, count, -1)
            freed = counts.zero_runs(place, count)
        self._mark_counts(block, place, count)
        return freed

    def _report_below(self, block: CachedBlock, place: int) -> NoReturn:
        cluster_index = block.index * self._geometry.refcounts_per_block + place
        host_offset = cluster_index << self._geometry.cluster_bits
        self._report(
            CorruptImage(
                f"refcount of cluster {cluster_index} (host offset {host_offset:#x}) "
                "would fall below 0",
                structure="refcount block",
                index=cluster_index,
                host_offset=host_offset,
            )
        )

    async def refcount(self, cluster_index: int) -> int:
        """The refcount of a host cluster, by index; 0 where there is no block."""
        index, place = divmod(cluster_index, self._geometry.refcounts_per_block)
        if not self.block_offset(index):
            return 0
        return (await self.block(index)).counts.get(place)

    async def gather(self, cluster_indexes: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
        """The refcounts of sorted cluster indexes, one beside each."""
        import numpy as np

        found = np.zeros(len(cluster_indexes), dtype=np.uint64)
        for index, start, end, places in self._by_block(cluster_indexes):
            if self.block_offset(index):
                block = await self.block(index)
                found[start:end] = unpack_all(block.data, self._geometry.refcount_order)[places]
        return found

    async def raise_many(
        self, cluster_indexes: "NDArray[np.uint64]", addends: "NDArray[np.uint64] | int" = 1
    ) -> None:
        """Add to the refcounts of many clusters at once; the caller holds the lock.

        `cluster_indexes` sorted and unique, `addends` one number for all or an
        array beside them. Raises ImageFull (a count over the width's maximum)
        and CorruptImage (a count of 0, which nothing in use has, or no refcount
        block) before anything changes. Dirty blocks beyond the budget are
        written on the way.
        """
        import numpy as np

        order = self._geometry.refcount_order
        amounts = np.broadcast_to(np.asarray(addends, dtype=np.uint64), len(cluster_indexes))
        limit = np.uint64(self._geometry.refcount_max)
        pieces = list(self._by_block(cluster_indexes))
        for index, start, end, places in pieces:
            if not self.block_offset(index):
                raise self.without_block(int(cluster_indexes[start]))
            block = await self.block(index)
            values = unpack_all(block.data, order)[places]
            if not values.all():
                raise self._unused(block, int(places[np.argmin(values)]))
            room = limit - np.minimum(amounts[start:end], limit)
            over = (values > room) | (amounts[start:end] > limit)
            if over.any():
                raise self._over(block, int(places[over][0]))
            await trio.lowlevel.checkpoint()
        for index, start, end, places in pieces:
            block = await self.block(index)
            values = unpack_all(block.data, order)
            values[places] += amounts[start:end]
            self._replace_counts(block, values, places)
            await self.relieve()
            await trio.lowlevel.checkpoint()

    async def lower_many(
        self, cluster_indexes: "NDArray[np.uint64]", subtrahends: "NDArray[np.uint64]"
    ) -> "list[tuple[int, NDArray[np.int64]]]":
        """Take from the refcounts of many clusters at once; the caller holds the lock.

        `cluster_indexes` sorted and unique, `subtrahends` beside them. Answers
        (block index, sorted places whose count became 0). Raises CorruptImage,
        through `report`, for a count that would fall below 0. Dirty blocks
        beyond the budget are written on the way.
        """
        import numpy as np

        freed: list[tuple[int, NDArray[np.int64]]] = []
        for index, start, end, places in self._by_block(cluster_indexes):
            if not self.block_offset(index):
                self._report(self.without_block(int(cluster_indexes[start])))
            block = await self.block(index)
            values = unpack_all(block.data, self._geometry.refcount_order)
            below = values[places] < subtrahends[start:end]
            if below.any():
                self._report_below(block, int(places[np.argmax(below)]))
            values[places] -= subtrahends[start:end]
            self._replace_counts(block, values, places)
            zeros = places[values[places] == 0]
            if len(zeros):
                freed.append((index, zeros))
            await self.relieve()
            await trio.lowlevel.checkpoint()
        return freed

    def _replace_counts(
        self, block: CachedBlock, values: "NDArray[np.uint64]", places: "NDArray[np.int64]"
    ) -> None:
        """Store all counts of a block, of which those at `places` have changed."""
        block.data[:] = pack_all(values, self._geometry.refcount_order)
        self._mark_counts(block, int(places[0]), int(places[-1] - places[0]) + 1)

    async def relieve(self) -> None:
        """Write dirty blocks when they have reached their limit: harmless at any time."""
        if len(self.dirty_blocks) >= self.dirty_limit:
            await self.write_blocks()
            self.mark_blocks_clean()

    # Writing

    async def write_new_blocks(self) -> None:
        """Write the blocks that the file's table does not name yet, whole."""
        for index in sorted(self.new_blocks):
            block = self._blocks[index]
            await self._writer.write(REFCOUNT_BLOCK, block.host_offset, [bytes(block.data)])

    async def write_blocks(self) -> None:
        """Write the dirty range of each block that the file's table names already."""
        for index in sorted(self.dirty_blocks):
            if index not in self.new_blocks:
                block = self.dirty_blocks[index]
                await self._writer.write(
                    REFCOUNT_BLOCK,
                    block.host_offset + block.dirty_first,
                    [bytes(block.data[block.dirty_first : block.dirty_end])],
                )

    async def write_table(self) -> None:
        """Write the sectors of the refcount table that hold entries of new blocks."""
        for sector in sorted({index // _WORDS_PER_SECTOR for index in self.dirty_table}):
            first = sector * _WORDS_PER_SECTOR
            await self._writer.write(
                REFCOUNT_TABLE,
                self.table_offset + first * 8,
                [store_words(self.table, first, _WORDS_PER_SECTOR)],
            )

    def mark_blocks_clean(self) -> None:
        """The blocks but the new ones have been written; nothing changed in between."""
        new = {}
        for index, block in self.dirty_blocks.items():
            if index in self.new_blocks:
                new[index] = block
            else:
                block.dirty_first = len(block.data)
                block.dirty_end = 0
        self.dirty_blocks = new

    def mark_table_clean(self) -> None:
        """The table entries are durable, and the blocks that they name were before them."""
        self.new_blocks.clear()
        self.dirty_table.clear()
        self.mark_blocks_clean()

    def table_moved(self, table_offset: int) -> None:
        """The table as it is in memory is durable at another place, which the header names."""
        self.table_offset = table_offset
        self.mark_blocks_clean()
        self.mark_table_clean()

    # Inner parts

    def _insert(self, index: int, host_offset: int, data: bytearray) -> CachedBlock:
        self._counters.refcount_block_loads += 1
        if len(self._blocks) >= self._capacity:
            self._evict()
        block = CachedBlock(index, host_offset, data, self._geometry.refcount_order)
        self._blocks[index] = block
        return block

    def _evict(self) -> None:
        """Drop clean blocks not used since the hand last passed (second chance)."""
        for _ in range(2 * len(self._blocks)):
            index = next(iter(self._blocks))
            block = self._blocks.pop(index)
            if index in self.dirty_blocks or index in self.new_blocks or block.hits:
                block.hits = 0
                self._blocks[index] = block
            elif len(self._blocks) < self._capacity:
                return

    def _mark(self, block: CachedBlock, first: int, end: int) -> None:
        block.dirty_first = min(block.dirty_first, first)
        block.dirty_end = max(block.dirty_end, end)
        self.dirty_blocks[block.index] = block

    def _mark_counts(self, block: CachedBlock, place: int, count: int) -> None:
        first, length = block.counts.byte_range(place, count)
        self._mark(block, first, first + length)

    def _by_block(
        self, cluster_indexes: "NDArray[np.uint64]"
    ) -> "Iterator[tuple[int, int, int, NDArray[np.int64]]]":
        """Sorted cluster indexes cut at blocks: (block index, start, end, places in the block)."""
        import numpy as np

        per_block = self._geometry.refcounts_per_block
        whole = np.asarray(cluster_indexes).astype(np.int64)
        start = 0
        while start < len(whole):
            index = int(whole[start]) // per_block
            end = int(np.searchsorted(whole, (index + 1) * per_block))
            yield index, start, end, whole[start:end] - index * per_block
            start = end

    def without_block(self, cluster_index: int) -> CorruptImage:
        """The error for a cluster in use that no refcount block describes."""
        return CorruptImage(
            f"cluster {cluster_index} (host offset "
            f"{cluster_index << self._geometry.cluster_bits:#x}) is in use, but no refcount "
            "block describes it",
            structure="refcount table",
            index=cluster_index // self._geometry.refcounts_per_block,
            host_offset=cluster_index << self._geometry.cluster_bits,
        )

    def _unused(self, block: CachedBlock, place: int) -> CorruptImage:
        cluster_index = block.index * self._geometry.refcounts_per_block + place
        host_offset = cluster_index << self._geometry.cluster_bits
        return CorruptImage(
            f"cluster {cluster_index} (host offset {host_offset:#x}) is in use, "
            "but its refcount is 0",
            structure="refcount block",
            index=cluster_index,
            host_offset=host_offset,
        )

    def _over(self, block: CachedBlock, place: int) -> ImageFull:
        cluster_index = block.index * self._geometry.refcounts_per_block + place
        return ImageFull(
            f"refcount of cluster {cluster_index} is {block.counts.get(place)}, "
            f"{self._geometry.refcount_bits} bits hold at most {self._geometry.refcount_max}",
            structure="refcount block",
            index=cluster_index,
            host_offset=cluster_index << self._geometry.cluster_bits,
        )
