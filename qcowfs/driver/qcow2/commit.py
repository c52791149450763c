"""The commit: what is written in which order, with a sync between.

Implements the phases of driver/README.md. May not: decide when to commit,
choose clusters, know guest data. The lock is held around every call, so that
nothing changes while one is under way. Invariants:

- Nothing is marked clean before the sync that made it durable, so a commit
  that failed for want of room can be tried again.
- No pointer goes out before what it leads to is durable; no count falls before
  the removal of the reference is durable.
"""

from array import array

from qcowfs.driver.layout.mapping import store_words
from qcowfs.driver.qcow2.allocator import Allocator
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.guard import REFCOUNT_TABLE, MetadataWriter, ProtectedMap
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.refcounting import RefcountCache
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.qcow2.switching import HeaderSwitch
from qcowfs.driver.qcow2.tables import TableCache
from qcowfs.driver.storage import Storage


class Committer:
    """Writes what the caches hold; knows the order, and nothing of locks or failsafe."""

    def __init__(
        self,
        writer: MetadataWriter,
        data_storage: Storage,
        tables: TableCache,
        refcounts: RefcountCache,
        allocator: Allocator,
        protected: ProtectedMap,
        switch: HeaderSwitch,
        requests: Requests,
        counters: Counters,
    ) -> None:
        self._writer = writer
        self._data_storage = data_storage if writer.storage is not data_storage else None
        self._tables = tables
        self._refcounts = refcounts
        self._allocator = allocator
        self._protected = protected
        self._switch = switch
        self._requests = requests
        self._counters = counters

    async def run(self, active: L1View) -> None:
        """All phases; raises OSError of the host, CorruptImage of the overlap check."""
        await self._allocator.settle()
        await self._write_refcounts()
        await self.sync_data()
        self._refcounts.mark_blocks_clean()
        self._refcounts.mark_table_clean()
        if self._tables.dirty or active.dirty:
            await self._tables.write_dirty()
            await active.write_dirty(self._writer)
            await self._writer.sync()
            self._tables.mark_clean()
            active.dirty.clear()
        self._counters.commits += 1
        if self._allocator.frees.pending:
            self._allocator.frees.published(self._requests.advance())
            await self._allocator.settle()

    async def sync_data(self) -> None:
        """Make guest data durable, then everything else written to the image file so far."""
        if self._data_storage is not None:
            await self._writer.sync(self._data_storage)
        await self._writer.sync()

    async def move_refcount_table(self, cluster_count: int, missing: list[int]) -> None:
        """A longer refcount table at the end of the file and one header write.

        As `Allocator.plan_table` has planned it, with no await since; a commit
        precedes, so nothing is dirty. The old table is dropped.
        """
        refcounts = self._refcounts
        old_offset, old_length = refcounts.table_offset, len(refcounts.table) * 8
        table_offset = self._allocator.end_offset
        entry_count = cluster_count * self._switch.header.cluster_size // 8
        refcounts.table.extend(array("Q", bytes((entry_count - len(refcounts.table)) * 8)))
        await self._allocator.take_end(cluster_count, missing)
        self._protected.claim(REFCOUNT_TABLE, table_offset, entry_count * 8)
        await refcounts.write_new_blocks()
        await refcounts.write_blocks()
        await self._writer.write(REFCOUNT_TABLE, table_offset, [store_words(refcounts.table)])
        await self._writer.sync()
        await self._switch.set_refcount_table(table_offset, cluster_count)
        refcounts.table_moved(table_offset)
        self._allocator.drop(old_offset, old_length, structure=REFCOUNT_TABLE)

    async def _write_refcounts(self) -> None:
        """New blocks, durable at once; then their table entries and all changed counts."""
        if self._refcounts.new_blocks:
            await self._refcounts.write_new_blocks()
            await self._writer.sync()
        await self._refcounts.write_blocks()
        await self._refcounts.write_table()
