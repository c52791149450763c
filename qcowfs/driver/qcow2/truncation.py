"""Refuses to write to an image file that has been cut off.

A copy that broke off keeps a header that looks well, and its first tables. To
write to it would hide that the rest is missing, and repairs of the cut would
then be lost among valid changes. May not: write, repair. Invariants:

- A sound image passes whatever lies behind its file's end that nothing refers
  to: leaked counts and preallocated ones are no damage.
- What an L2 table says is looked at only when the refcounts reach past the end
  of the file, so that a sound image costs one refcount block.
"""

import logging

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import ALL_ALLOCATED, OFLAG_COMPRESSED, OFLAG_ZERO
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage

logger = logging.getLogger(__name__)


async def require_whole_file(metadata: Metadata) -> None:
    """Raise CorruptImage when a table or a cluster in use lies past the end of the file.

    For an image that is about to be opened for writing; it has not been
    written to. Loads the refcount table. Raises OSError of the host.
    """
    header = metadata.header
    file_size = metadata.storage.size()
    refcounts = metadata.refcounts
    _require(header.refcount_table_offset + 1, file_size, "refcount table", 0)
    _require(header.l1_table_offset + header.l1_size * 8, file_size, "L1 table", 0)
    if header.nb_snapshots:
        _require(header.snapshots_offset + 1, file_size, "snapshot table", 0)
    await refcounts.load_table(header.refcount_table_offset, header.refcount_table_clusters)
    for index, entry in enumerate(refcounts.table):
        if entry & OFFSET_MASK >= file_size:
            _require((entry & OFFSET_MASK) + 1, file_size, "refcount block", index)
    for l1_index, entry in enumerate(metadata.active.words):
        if entry & OFFSET_MASK >= file_size:
            _require((entry & OFFSET_MASK) + 1, file_size, "L2 table", l1_index)
    await metadata.allocator.find_end()
    if metadata.allocator.end_offset > metadata.geometry.round_up(file_size):
        await _require_data(metadata, file_size)


async def _require_data(metadata: Metadata, file_size: int) -> None:
    """Look through the active L2 tables for guest clusters past the end of the file."""
    import numpy as np

    geometry = metadata.geometry
    for l1_index, table_offset in metadata.table_offsets(metadata.active):
        words = await metadata.tables.read_table(table_offset)
        entries = np.frombuffer(words, dtype=np.uint64)[:: geometry.words_per_entry]
        compressed = entries & np.uint64(OFLAG_COMPRESSED) != 0
        offsets = np.where(
            compressed,
            entries & np.uint64(geometry.compressed_offset_mask),
            np.uint64(0) if geometry.has_data_file else entries & np.uint64(OFFSET_MASK),
        )
        beyond = np.flatnonzero(offsets >= np.uint64(file_size))
        if len(beyond):
            l2_index = int(beyond[0])
            guest_offset = (l1_index << geometry.l2_coverage_bits) + (
                l2_index << geometry.cluster_bits
            )
            _require(
                int(offsets[l2_index]) + 1,
                file_size,
                f"cluster of guest offset {guest_offset:#x}",
                None,
            )


async def require_whole_data_file(metadata: Metadata, *, writable: bool) -> None:
    """See that the external data file holds all that the active disk keeps there.

    Raises CorruptImage when it does not and is to be written; else logs a
    warning, since what is missing reads as zeros. Raises OSError of the host.
    """
    size = metadata.data_storage.size()
    needed = metadata.geometry.virtual_size
    if size >= needed:
        return
    if not metadata.geometry.data_file_raw:
        needed = min(needed, await _data_end(metadata))
        if size >= needed:
            return
    cause = (
        f"the data file ends at {size:#x}, but guest data reaches to {needed:#x}: "
        "it has been cut off, or is another file"
    )
    if writable:
        raise CorruptImage(
            f"{cause}, so the image can be read only", structure="data file", host_offset=size
        )
    logger.warning("%s: %s; what is missing reads as zeros", metadata.name, cause)


async def _data_end(metadata: Metadata) -> int:
    """Where the last cluster of the active disk ends that lies in the data file."""
    import numpy as np

    geometry = metadata.geometry
    for l1_index, table_offset in reversed(metadata.table_offsets(metadata.active)):
        words = await metadata.tables.read_table(table_offset)
        entries = np.frombuffer(words, dtype=np.uint64)
        if geometry.extended_l2:
            shown = entries[1::2] & np.uint64(ALL_ALLOCATED) != 0
        else:
            shown = entries & np.uint64(OFLAG_COPIED | OFLAG_ZERO) == np.uint64(OFLAG_COPIED)
        found = np.flatnonzero(shown)
        if len(found):
            end = int(found[-1]) + 1 << geometry.cluster_bits
            return (l1_index << geometry.l2_coverage_bits) + end
    return 0


def _require(end: int, file_size: int, structure: str, index: int | None) -> None:
    """Raise CorruptImage unless a structure that ends at `end` ends inside the file."""
    if end > file_size:
        number = f" {index}" if index else ""
        raise CorruptImage(
            f"the file ends at {file_size:#x}, but the {structure}{number} reaches to {end:#x}: "
            "the file has been cut off, so it can be read only",
            structure=structure,
            index=index,
            host_offset=end - 1,
        )
