"""Making L2 tables: new ones, and the active disk's own copies of shared ones.

Implements docs/interop/qcow2, "Cluster mapping", for L1 entries that change.
May not: know guest data, commit. Invariants:

- A table's content is written to its cluster before the L1 entry in memory
  leads there; since nothing durable leads to it before the next commit's
  second phase, and the first one syncs, that needs no sync of its own.
- A table that could not be written is dropped again: nothing leads to it.
"""

from collections.abc import Callable
from typing import NoReturn

from qcowfs.driver.layout.geometry import OFLAG_COPIED, Geometry
from qcowfs.driver.layout.mapping import store_words
from qcowfs.driver.qcow2.allocator import Allocator
from qcowfs.driver.qcow2.guard import L2_TABLE, MetadataWriter, ProtectedMap
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.tables import TableCache
from qcowfs.errors import CorruptImage


class L2Tables:
    """The L2 tables of the active disk as wholes; lock held, or free and no await."""

    __slots__ = (
        "_active",
        "_allocator",
        "_cluster_bits",
        "_cluster_size",
        "_protected",
        "_report",
        "_tables",
        "_writer",
    )

    def __init__(
        self,
        writer: MetadataWriter,
        geometry: Geometry,
        tables: TableCache,
        allocator: Allocator,
        protected: ProtectedMap,
        active: L1View,
        report: Callable[[CorruptImage], NoReturn],
    ) -> None:
        self._writer = writer
        self._cluster_size = geometry.cluster_size
        self._cluster_bits = geometry.cluster_bits
        self._tables = tables
        self._allocator = allocator
        self._protected = protected
        self._active = active
        self._report = report

    def check(self, l1_index: int, table_offset: int) -> None:
        """A table that is about to change lies in a cluster of its own, or CorruptImage."""
        owner = self._protected.owner(table_offset >> self._cluster_bits)
        if owner != L2_TABLE:
            self._report(
                CorruptImage(
                    f"L1 entry {l1_index} leads to {table_offset:#x}, which belongs to "
                    f"{'the ' + owner if owner else 'no L2 table'}",
                    structure="L1 table",
                    index=l1_index,
                    host_offset=table_offset,
                )
            )

    def create_now(self, l1_index: int) -> bool:
        """A new, empty table; False, with nothing done, when that needs waiting."""
        place = self._allocator.try_allocate(1)
        if place is None:
            return False
        table_offset = place[0]
        self._claim(table_offset)
        try:
            written = self._writer.try_write(L2_TABLE, table_offset, [bytes(self._cluster_size)])
        except OSError:
            self._allocator.drop(table_offset, 1, structure=L2_TABLE)
            raise
        if not written:
            self._allocator.drop(table_offset, 1, structure=L2_TABLE)
            return False
        self._active.set_entry(l1_index, table_offset | OFLAG_COPIED)
        return True

    def _claim(self, table_offset: int) -> None:
        """A free cluster becomes an L2 table: what a broken image showed there is forgotten."""
        self._protected.claim(L2_TABLE, table_offset, 1)
        self._tables.forget_run(table_offset, 1)

    async def create(self, l1_index: int, content: bytes) -> None:
        """A new table of `content`, a cluster; lock held. Raises ImageFull, OSError."""
        table_offset, _ = await self._allocator.allocate(1)
        self._claim(table_offset)
        try:
            await self._writer.write(L2_TABLE, table_offset, [content])
        except BaseException:
            self._allocator.drop(table_offset, 1, structure=L2_TABLE)
            raise
        self._active.set_entry(l1_index, table_offset | OFLAG_COPIED)

    async def copy(self, l1_index: int, old_offset: int) -> None:
        """The active disk's own copy of a table that a snapshot shares; lock held."""
        words = await self._tables.read_table(old_offset)
        await self.create(l1_index, store_words(words))
        self._allocator.drop(old_offset, 1, structure=L2_TABLE)
