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
  the counts were wrong, and nothing of their fall is on the disk yet.
"""

from array import array
from typing import TYPE_CHECKING, NoReturn

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import (
    L2_EXTENDED_RESERVED_MASK,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
)
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


async def clear_copied_flags(metadata: Metadata) -> None:
    """Clear COPIED in the active L1 and all its L2 tables: a snapshot is about to share them.

    Raises CorruptImage for an L1 entry that is not valid, OSError.
    """
    import numpy as np

    keep = np.uint64(OFLAG_COPIED - 1)
    for l1_index, table_offset in metadata.table_offsets(metadata.active):
        words = await metadata.tables.read_table(table_offset)
        entries = _entries(words, metadata.geometry.words_per_entry)
        if (entries > keep).any():
            entries &= keep
            await metadata.tables.write_table(table_offset, words)
        entry = metadata.active.words[l1_index]
        if entry & OFLAG_COPIED:
            metadata.active.set_entry(l1_index, entry & ~OFLAG_COPIED)


async def recompute_copied_flags(metadata: Metadata) -> None:
    """Set COPIED in the active L1 and L2 tables exactly where the refcount is 1.

    To be called after a commit that has made removals durable, and followed by
    one. Damaged entries are passed by. Raises CorruptImage, after failsafe, for
    a cluster in use whose count is 0; OSError.
    """
    import numpy as np

    geometry = metadata.geometry
    file_size = metadata.storage.size()
    bits = np.uint64(geometry.cluster_bits)
    for l1_index, entry in enumerate(metadata.active.words):
        try:
            table_offset = metadata.active.table_at(l1_index, file_size)
        except CorruptImage:
            continue
        if not table_offset:
            continue
        count = await metadata.refcounts.refcount(table_offset >> geometry.cluster_bits)
        if not count:
            _report_unused(metadata, table_offset)
        own = count == 1
        wanted = entry | OFLAG_COPIED if own else entry & ~OFLAG_COPIED
        if wanted != entry:
            metadata.active.set_entry(l1_index, wanted)
        words = await metadata.tables.read_table(table_offset)
        entries = _entries(words, geometry.words_per_entry)
        offsets = entries & np.uint64(OFFSET_MASK)
        broken = OFLAG_COMPRESSED | L2_EXTENDED_RESERVED_MASK & ~OFLAG_ZERO
        broken |= OFFSET_MASK & geometry.cluster_mask
        places = np.flatnonzero(
            (offsets != 0) & (offsets < np.uint64(file_size)) & (entries & np.uint64(broken) == 0)
        )
        unique, inverse = np.unique(offsets[places] >> bits, return_inverse=True)
        counts = await metadata.refcounts.gather(unique)
        if not counts.all():
            _report_unused(metadata, int(unique[np.argmin(counts)]) << geometry.cluster_bits)
        single = (counts == 1)[inverse]
        changed = entries & np.uint64(OFLAG_COPIED - 1)
        changed[places[single]] |= np.uint64(OFLAG_COPIED)
        if (changed != entries).any():
            entries[:] = changed
            await metadata.tables.write_table(table_offset, words)


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
