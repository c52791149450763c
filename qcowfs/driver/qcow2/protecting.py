"""Fills the map of metadata clusters before an image's first change.

Implements the reader's half of the overlap rule (guard.py). May not: write,
load refcount blocks, judge guest data. Every size has been bounded before
something is read: by the header's parser, the snapshot table's, or here.
"""

from qcowfs.driver.layout.geometry import OFFSET_MASK, SECTOR
from qcowfs.driver.layout.header import Header
from qcowfs.driver.layout.refcounts import REFCOUNT_TABLE_RESERVED_MASK
from qcowfs.driver.layout.snapshot_table import Snapshot, SnapshotTableParser
from qcowfs.driver.qcow2 import guard
from qcowfs.driver.qcow2.guard import ProtectedMap
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.refcounting import RefcountCache
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage


async def protect_structures(
    storage: Storage,
    header: Header,
    active: L1View,
    refcounts: RefcountCache,
    protected: ProtectedMap,
) -> None:
    """Register every metadata structure of an image; the refcount table has been loaded.

    Refcount blocks that two table entries name, or that lie on another
    structure, are marked as shared, so that they are never changed. Raises
    CorruptImage for a snapshot table that cannot be parsed, OSError.
    """
    geometry = active.geometry
    file_size = storage.size()
    protected.clear()
    protected.claim(guard.HEADER, 0, 1)
    protected.claim(
        guard.REFCOUNT_TABLE,
        header.refcount_table_offset,
        header.refcount_table_clusters * geometry.cluster_size,
    )
    if header.l1_size:
        protected.claim(guard.L1_TABLE, header.l1_table_offset, header.l1_size * 8)
    _protect_refcount_blocks(geometry.cluster_mask, geometry.cluster_bits, refcounts, protected)
    if header.nb_snapshots:
        length, snapshots = await read_snapshot_table(storage, header, file_size)
        protected.claim(guard.SNAPSHOT_TABLE, header.snapshots_offset, max(length, 1))
        for snapshot in snapshots:
            # A snapshot with an impossible L1 costs that snapshot, not the image.
            if snapshot.l1_size and _is_plausible(snapshot, geometry.cluster_mask, file_size):
                protected.claim(
                    guard.SNAPSHOT_L1_TABLE, snapshot.l1_table_offset, snapshot.l1_size * 8
                )
    crypto = header.crypto()
    if crypto is not None and 0 < crypto.offset < file_size:
        length = min(crypto.length, file_size - crypto.offset)
        protected.claim(guard.CRYPTO_HEADER, crypto.offset, max(length, SECTOR))
    # Entries that a lookup would refuse protect nothing.
    protected.claim_l2_tables(
        [
            entry & OFFSET_MASK
            for entry in active.words
            if entry
            and not entry & geometry.cluster_mask & OFFSET_MASK
            and 0 < entry & OFFSET_MASK < file_size
        ]
    )


def _protect_refcount_blocks(
    cluster_mask: int, cluster_bits: int, refcounts: RefcountCache, protected: ProtectedMap
) -> None:
    refcounts.shared_blocks.clear()
    first_use: dict[int, int] = {}
    for index, entry in enumerate(refcounts.table):
        if not entry or entry & (cluster_mask | REFCOUNT_TABLE_RESERVED_MASK):
            continue
        if entry in first_use:
            refcounts.shared_blocks.update((index, first_use[entry]))
        elif protected.owner(entry >> cluster_bits) is not None:
            refcounts.shared_blocks.add(index)
        else:
            protected.claim(guard.REFCOUNT_BLOCK, entry, 1)
        first_use[entry] = index


async def read_snapshot_table(
    storage: Storage, header: Header, file_size: int
) -> tuple[int, tuple[Snapshot, ...]]:
    """The snapshot table's length in bytes, and its entries."""
    offset = header.snapshots_offset
    if offset & (header.cluster_size - 1) or not 0 < offset < file_size:
        raise CorruptImage(
            f"snapshot table at {offset:#x}: not cluster-aligned, or outside the file",
            structure="snapshot table",
            host_offset=offset,
        )
    parser = SnapshotTableParser(header.nb_snapshots, file_size - offset)
    fed = 0
    while length := parser.wanted():
        parser.feed(await storage.pread(length, offset + fed))
        fed += length
    return parser.length, parser.snapshots()


def _is_plausible(snapshot: Snapshot, cluster_mask: int, file_size: int) -> bool:
    end = snapshot.l1_table_offset + snapshot.l1_size * 8
    return not snapshot.l1_table_offset & cluster_mask and end <= file_size + cluster_mask
