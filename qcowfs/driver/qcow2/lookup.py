"""From a guest offset to the slice that maps it: the path that every request takes.

Implements docs/interop/qcow2, "Cluster mapping", for the L1. May not: change
anything, allocate, know what entries mean. Invariants:

- `peek` and `load_now` never wait, and all three answer alike.
- An L1 entry is validated when a slice is brought in by it; while that slice
  is in memory, lookups cost an index and a dict access.
"""

import enum
from typing import Final

from qcowfs.driver.layout.geometry import OFFSET_MASK, Geometry
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.tables import Slice, TableCache
from qcowfs.driver.storage import Storage


class Absence(enum.Enum):
    """The type of `ABSENT`: no L2 table covers the guest offset."""

    ABSENT = 0


ABSENT: Final = Absence.ABSENT


class Lookup:
    """The lookups of one image file; views of all its L1 tables share the slices."""

    def __init__(self, storage: Storage, geometry: Geometry, tables: TableCache) -> None:
        self.storage = storage
        self.tables = tables
        self._l1_shift = geometry.l2_coverage_bits
        self._word_shift = geometry.cluster_bits - (4 if geometry.extended_l2 else 3)
        self._in_table_mask = tables.in_table_mask
        self._slices = tables.slices

    def peek(self, view: L1View, guest_offset: int) -> Slice | Absence | None:
        """The slice that maps `guest_offset`: in memory, ABSENT, or None when not resident.

        Never waits. Valid until the caller's next await. The entry's index in
        the slice is `(guest_offset >> cluster_bits) % tables.slice_entry_count`.
        """
        try:
            entry = view.words[guest_offset >> self._l1_shift]
        except IndexError:
            return ABSENT
        if not entry:
            return ABSENT
        piece = self._slices.get(
            (entry & OFFSET_MASK) + (guest_offset >> self._word_shift & self._in_table_mask)
        )
        if piece is not None:
            piece.hits += 1
        return piece

    def load_now(self, view: L1View, guest_offset: int) -> Slice | Absence | None:
        """As `peek`, but a slice in the host's page cache is taken from there at once.

        Raises CorruptImage when the L1 entry is not valid.
        """
        found = self.peek(view, guest_offset)
        if found is not None:
            return found
        table_offset = view.table_at(guest_offset >> self._l1_shift, self.storage.size())
        if not table_offset:
            return ABSENT
        return self.tables.load_now(
            table_offset + (guest_offset >> self._word_shift & self._in_table_mask)
        )

    async def load(self, view: L1View, guest_offset: int) -> Slice | Absence:
        """The slice that maps `guest_offset`, read if need be; the lock may be held or not.

        Raises CorruptImage when the L1 entry is not valid (for this range
        only), OSError of the host. Valid until the caller's next await.
        """
        while True:
            found = self.load_now(view, guest_offset)
            if found is not None:
                return found
            table_offset = view.words[guest_offset >> self._l1_shift] & OFFSET_MASK
            await self.tables.load(
                table_offset + (guest_offset >> self._word_shift & self._in_table_mask)
            )
