"""The COPIED flag over a whole disk: cleared before a snapshot, worked out anew after one ends.

Implements docs/interop/qcow2, "Cluster mapping", bit 63: set where the
refcount is exactly one. For snapshot operations, under a closed gate and the
lock. May not: change references. Invariants:

- L2 tables are rewritten at once, the L1's flags with the next commit. A crash
  in between leaves flags that are wrong and nothing else, which only a
  snapshot operation may do.
- A flag is never set while a reference too many may still exist: counts fall
  in memory only after the removal is durable.
- A cluster in use whose count is 0 ends all writing before it can be handed out:
  the counts were wrong.
"""

import sys
from array import array
from typing import TYPE_CHECKING, NoReturn

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import (
    L2_EXTENDED_RESERVED_MASK,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
)
from qcowfs.driver.layout.table_references import (
    RUNS_BEFORE_NUMPY,
    is_scattered,
    placed_runs,
    run_cost,
)
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Clusters of the image file up to which all counts of a disk are looked up in
# one array of bytes, built once: 2 TiB of 64 KiB clusters.
_MAP_COUNT_MAX = 1 << 25
# In a table of words in native order, the byte with the COPIED flag of the first.
_TOP_BYTE = 7 if sys.byteorder == "little" else 0
_WITHOUT_FLAG = bytes(value & 0x7F for value in range(256))
_AS_FLAG = bytes(value << 7 & 0x80 for value in range(256))


async def clear_copied_flags(metadata: Metadata) -> None:
    """Clear COPIED in the active L1 and all its L2 tables: a snapshot is about to share them.

    Raises CorruptImage for an L1 entry that is not valid, OSError.
    """
    entry_length = metadata.geometry.l2_entry_length
    for l1_index, table_offset in metadata.table_offsets(metadata.active):
        if table_offset:
            words = await metadata.tables.read_table(table_offset)
            changed = _with_flags(words, entry_length, None)
            if changed is not None:
                await metadata.tables.write_table(table_offset, changed)
        entry = metadata.active.words[l1_index]
        if entry & OFLAG_COPIED:
            metadata.active.set_entry(l1_index, entry & ~OFLAG_COPIED)


async def recompute_copied_flags(metadata: Metadata) -> None:
    """Set COPIED in the active L1 and L2 tables exactly where the refcount is 1.

    To be called after a commit that has made removals durable, and followed by
    one. Damaged entries are passed by. Raises CorruptImage, after failsafe, for
    a cluster in use whose count is 0; OSError.
    """
    await _Flags(metadata).recompute()


class _Flags:
    """One pass over the active disk that works out COPIED flags."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._file_size = metadata.storage.size()
        self._cost_left = RUNS_BEFORE_NUMPY
        self._map: NDArray[np.uint8] | None = None

    async def recompute(self) -> None:
        """All of the L1 and its tables."""
        metadata = self._metadata
        geometry = metadata.geometry
        for l1_index, entry in enumerate(metadata.active.words):
            try:
                table_offset = metadata.active.table_at(l1_index, self._file_size)
            except CorruptImage:
                continue
            if not table_offset:
                continue
            count = await metadata.refcounts.refcount(table_offset >> geometry.cluster_bits)
            if not count:
                _report_unused(metadata, table_offset)
            wanted = entry | OFLAG_COPIED if count == 1 else entry & ~OFLAG_COPIED
            if wanted != entry:
                metadata.active.set_entry(l1_index, wanted)
            words = await metadata.tables.read_table(table_offset)
            changed = await self._of_table(words, l1_index * geometry.l2_coverage)
            if changed is not None:
                await metadata.tables.write_table(table_offset, changed)

    async def _of_table(self, words: "array[int]", guest_offset: int) -> "array[int] | None":
        """The table with the right flags, None when it has them."""
        geometry = self._metadata.geometry
        cost = run_cost(words, geometry)
        if not is_scattered(cost, self._cost_left):
            try:
                runs = list(placed_runs(words, guest_offset, geometry))
            except CorruptImage:
                runs = None
            end = geometry.cluster_count(self._file_size)
            if runs is not None and all(first + count <= end for _, first, count in runs):
                self._cost_left -= cost
                ones = await self._ones_by_runs(runs)
                return _with_flags(words, geometry.l2_entry_length, ones)
        return await self._by_array(words)

    async def _ones_by_runs(self, runs: list[tuple[int, int, int]]) -> bytearray:
        """A byte for each entry of a table, 1 where its cluster has one reference."""
        metadata = self._metadata
        refcounts = metadata.refcounts
        per_block = metadata.geometry.refcounts_per_block
        ones = bytearray(metadata.geometry.l2_entry_count)
        for index, first, count in runs:
            while count:
                block_index, place = divmod(first, per_block)
                part = min(count, per_block - place)
                if not refcounts.block_offset(block_index):
                    _report_unused(metadata, first << metadata.geometry.cluster_bits)
                block = refcounts.block_now(block_index) or await refcounts.block(block_index)
                value = block.counts.uniform(place, part)
                if value:
                    found = bytes((value == 1,)) * part
                else:
                    unused = block.counts.find_zero(place, part)
                    if unused >= 0:
                        cluster_index = first + unused - place
                        _report_unused(metadata, cluster_index << metadata.geometry.cluster_bits)
                    found = block.counts.ones(place, part)
                ones[index : index + part] = found
                index += part
                first += part
                count -= part
        return ones

    async def _by_array(self, words: "array[int]") -> "array[int] | None":
        """`_of_table` for tables that are scattered or damaged."""
        import numpy as np

        metadata = self._metadata
        geometry = metadata.geometry
        bits = np.uint64(geometry.cluster_bits)
        entries = _entries(words, geometry.words_per_entry)
        offsets = entries & np.uint64(OFFSET_MASK)
        broken = OFLAG_COMPRESSED | L2_EXTENDED_RESERVED_MASK & ~OFLAG_ZERO
        broken |= OFFSET_MASK & geometry.cluster_mask
        places = np.flatnonzero(
            (offsets != 0)
            & (offsets < np.uint64(self._file_size))
            & (entries & np.uint64(broken) == 0)
        )
        clusters = offsets[places] >> bits
        counts = await self._counts(clusters)
        if not counts.all():
            unused = int(clusters[np.argmin(counts)])
            _report_unused(metadata, unused << geometry.cluster_bits)
        changed = entries & np.uint64(OFLAG_COPIED - 1)
        changed[places[counts == 1]] |= np.uint64(OFLAG_COPIED)
        if (changed == entries).all():
            return None
        entries[:] = changed
        return words

    async def _counts(self, clusters: "NDArray[np.uint64]") -> "NDArray[np.uint64 | np.uint8]":
        """The refcount of each cluster; what is more than 2 may be told as 2."""
        import numpy as np

        refcounts = self._metadata.refcounts
        end = (self._file_size >> self._metadata.geometry.cluster_bits) + 1
        if end > _MAP_COUNT_MAX:
            unique, inverse = np.unique(clusters, return_inverse=True)
            return (await refcounts.gather(unique))[inverse]
        if self._map is None:
            step = self._metadata.geometry.refcounts_per_block
            self._map = np.zeros(end, dtype=np.uint8)
            for first in range(0, end, step):
                some = np.arange(first, min(first + step, end), dtype=np.uint64)
                found = await refcounts.gather(some)
                self._map[first : first + step] = np.minimum(found, np.uint64(2))
        return self._map[clusters]


def _with_flags(
    words: "array[int]", entry_length: int, ones: bytes | bytearray | None
) -> "array[int] | None":
    """A table with COPIED where `ones` has a 1 for the entry, None when it is so already."""
    data = bytearray(words.tobytes())
    found = data[_TOP_BYTE::entry_length]
    wanted = found.translate(_WITHOUT_FLAG)
    if ones is not None:
        flags = int.from_bytes(ones.translate(_AS_FLAG), "big")
        wanted = bytearray((int.from_bytes(wanted, "big") | flags).to_bytes(len(found), "big"))
    if wanted == found:
        return None
    data[_TOP_BYTE::entry_length] = wanted
    changed = array("Q")
    changed.frombytes(data)
    return changed


def _report_unused(metadata: Metadata, host_offset: int) -> NoReturn:
    error = CorruptImage(
        f"the cluster at {host_offset:#x} is in use, but its refcount is 0",
        structure="refcount block",
        index=host_offset >> metadata.geometry.cluster_bits,
        host_offset=host_offset,
    )
    metadata.enter_failsafe(str(error), corrupt=True)
    raise error


def _entries(words: "array[int]", words_per_entry: int) -> "NDArray[np.uint64]":
    """The entry words of an L2 table, without its bitmaps, as a view that changes `words`."""
    import numpy as np

    return np.frombuffer(words, dtype=np.uint64)[::words_per_entry]
