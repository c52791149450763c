"""What an allocating write does to L2 entries: planned before it, linked after it.

Implements the mapping side of ARCHITECTURE's "A write" (steps 4 and 6): which
clusters of a range need a place on the host, which bytes around the data have
to come along, and the entries that show the result. It decides; it does no
I/O, and tables change through the metadata's own calls alone. Invariants:

- A plan lies in one slice and is linked by one change of it.
- A cluster keeps its host cluster when that is the disk's own (COPIED), and has
  no other than its guest offset in an external data file; then only subclusters
  that were not allocated are filled around the data, since a crash may show the
  old entry over the new bytes.
- The references of replaced entries are queued for removal after the change,
  never before.
"""

from array import array
from typing import NamedTuple

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED, Geometry
from qcowfs.driver.layout.mapping import (
    ALL_ALLOCATED,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    allocation_bits,
    check_entry,
    classify,
    data_entry,
    zero_bits,
)
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.driver.qcow2.tables import Slice


class WritePlan(NamedTuple):
    """One allocating write: guest bytes [guest_start, guest_end) in `cluster_count` clusters.

    `first_index` is the first cluster's entry in its slice. The host gets
    [cow_start, cow_end), the data with what comes along, in guest offsets.
    `host_offset` is where the first cluster begins, None while it has no place.
    """

    guest_start: int
    guest_end: int
    cow_start: int
    cow_end: int
    first_index: int
    cluster_count: int
    host_offset: int | None

    def shortened(self, cluster_count: int, geometry: Geometry) -> "WritePlan":
        """The same write over its first `cluster_count` clusters; for what could be allocated."""
        if cluster_count >= self.cluster_count:
            return self
        end = (self.guest_start & -geometry.cluster_size) + (cluster_count << geometry.cluster_bits)
        return self._replace(guest_end=end, cow_end=end, cluster_count=cluster_count)


def plan_write(
    words: "array[int]", first_index: int, guest_start: int, guest_end: int, geometry: Geometry
) -> WritePlan:
    """The longest allocating write at `guest_start` whose clusters are of one sort.

    Either all of them keep host clusters that follow each other, or all of
    them need new ones. The range lies in one slice, `first_index` is its first
    entry, and its first byte may not be written in place. Raises CorruptImage.
    """
    cluster_start = guest_start & -geometry.cluster_size
    wanted_count = (guest_end - 1 - cluster_start >> geometry.cluster_bits) + 1
    host_offset = _own_host_offset(words, first_index, cluster_start, geometry)
    count = 1
    step = geometry.words_per_entry
    if not any(words[first_index * step : (first_index + wanted_count) * step]):
        # None of them has a place yet, or all have theirs in the data file.
        count = wanted_count
    while count < wanted_count:
        own = _own_host_offset(
            words, first_index + count, cluster_start + (count << geometry.cluster_bits), geometry
        )
        if host_offset is None:
            if own is not None:
                break
        else:
            follows = own == host_offset + (count << geometry.cluster_bits)
            if not follows or not _needs_link(words, first_index + count, geometry):
                break
        count += 1
    guest_end = min(guest_end, cluster_start + (count << geometry.cluster_bits))
    kept = host_offset is not None
    last_index = first_index + count - 1
    return WritePlan(
        guest_start,
        guest_end,
        _cow_start(words, first_index, guest_start, kept, geometry),
        _cow_end(words, last_index, guest_end, kept, geometry),
        first_index,
        count,
        host_offset,
    )


def _own_host_offset(
    words: "array[int]", index: int, guest_offset: int, geometry: Geometry
) -> int | None:
    """Where the cluster of an entry lies if the disk alone refers to it, else None."""
    entry = words[index * geometry.words_per_entry]
    bitmap = words[2 * index + 1] if geometry.extended_l2 else 0
    if not entry and not bitmap:
        return guest_offset if geometry.has_data_file else None
    check_entry(entry, bitmap, guest_offset, geometry)
    if geometry.has_data_file:
        return guest_offset
    if not entry & OFLAG_COPIED or entry & OFLAG_COMPRESSED:
        return None
    return entry & OFFSET_MASK or None


def _needs_link(words: "array[int]", index: int, geometry: Geometry) -> bool:
    """Whether an entry with a host cluster of its own does not yet show all of it."""
    if geometry.has_data_file and not words[index * geometry.words_per_entry] & OFLAG_COPIED:
        return True
    if geometry.extended_l2:
        return words[2 * index + 1] & ALL_ALLOCATED != ALL_ALLOCATED
    return bool(words[index] & OFLAG_ZERO)


def _moved_subclusters(entry: int, bitmap: int, kept: bool) -> int:
    """Allocation bits of subclusters whose bytes a cluster takes to its new place."""
    if kept:
        return 0
    if entry & OFLAG_COMPRESSED:
        return ALL_ALLOCATED
    return bitmap & ALL_ALLOCATED


def _cow_start(
    words: "array[int]", index: int, guest_start: int, kept: bool, geometry: Geometry
) -> int:
    """Where the bytes begin that a write from `guest_start` on puts into its first cluster."""
    cluster_start = guest_start & -geometry.cluster_size
    if not geometry.extended_l2 or guest_start == cluster_start:
        return cluster_start
    entry, bitmap = words[2 * index], words[2 * index + 1]
    subcluster = (guest_start - cluster_start) >> geometry.subcluster_bits
    moved = _moved_subclusters(entry, bitmap, kept)
    if moved:
        first_moved = (moved & -moved).bit_length() - 1
        subcluster = min(subcluster, first_moved)
    elif bitmap >> subcluster & 1:
        return guest_start
    return cluster_start + (subcluster << geometry.subcluster_bits)


def _cow_end(
    words: "array[int]", index: int, guest_end: int, kept: bool, geometry: Geometry
) -> int:
    """Where the bytes end that a write up to `guest_end` puts into its last cluster."""
    cluster_start = (guest_end - 1) & -geometry.cluster_size
    if not geometry.extended_l2 or guest_end - cluster_start == geometry.cluster_size:
        return cluster_start + geometry.cluster_size
    entry, bitmap = words[2 * index], words[2 * index + 1]
    subcluster = (guest_end - 1 - cluster_start) >> geometry.subcluster_bits
    moved = _moved_subclusters(entry, bitmap, kept)
    if moved:
        subcluster = max(subcluster, moved.bit_length() - 1)
    elif bitmap >> subcluster & 1:
        return guest_end
    return cluster_start + (subcluster + 1 << geometry.subcluster_bits)


def link(metadata: Metadata, piece: Slice, plan: WritePlan, host_offset: int) -> None:
    """Show the written clusters, which begin at `host_offset`, and drop what they replace.

    `piece` is the slice of the plan, got from the metadata with no await since;
    its entries are those that the plan was made from. Raises ReadOnlyImage.
    """
    geometry = metadata.geometry
    first_word = plan.first_index * geometry.words_per_entry
    old = piece.words[first_word : first_word + plan.cluster_count * geometry.words_per_entry]
    if geometry.extended_l2:
        new = _extended_words(old, plan, host_offset, geometry)
    elif plan.cluster_count == 1:
        new = array("Q", (data_entry(host_offset),))
    else:
        first = data_entry(host_offset)
        end = first + (plan.cluster_count << geometry.cluster_bits)
        new = array("Q", range(first, end, geometry.cluster_size))
    metadata.set_entries(piece, plan.first_index, new)
    if plan.host_offset is None:
        release_words(metadata, old, plan.guest_start)


def _extended_words(
    old: "array[int]", plan: WritePlan, host_offset: int, geometry: Geometry
) -> "array[int]":
    """The entries and bitmaps after an allocating write."""
    new = array("Q", bytes(8 * len(old)))
    cluster_start = plan.guest_start & -geometry.cluster_size
    for number in range(plan.cluster_count):
        entry, bitmap = old[2 * number], old[2 * number + 1]
        start = max(plan.guest_start - cluster_start, 0) >> geometry.subcluster_bits
        end = min(plan.guest_end - cluster_start, geometry.cluster_size)
        end = (end - 1 >> geometry.subcluster_bits) + 1
        if entry & OFLAG_COMPRESSED:
            bitmap = ALL_ALLOCATED
        bitmap |= allocation_bits(start, end - start)
        bitmap &= ~zero_bits(start, end - start)
        new[2 * number] = data_entry(host_offset)
        new[2 * number + 1] = bitmap
        host_offset += geometry.cluster_size
        cluster_start += geometry.cluster_size
    return new


def release_words(
    metadata: Metadata, old: "array[int]", guest_offset: int, *, punch: bool = False
) -> None:
    """Queue the removal of all references that replaced entries held.

    Host clusters that follow each other are dropped by one call. `guest_offset`
    is that of the first entry's cluster, for messages. Called after the entries
    were replaced, with no await between. Raises CorruptImage.
    """
    geometry = metadata.geometry
    step = geometry.words_per_entry
    if len(old) == step or geometry.extended_l2:
        for index in range(0, len(old), step):
            entry = old[index]
            if entry & (OFFSET_MASK | OFLAG_COMPRESSED):
                metadata.release_entry(entry, old[index + 1] if step == 2 else 0, punch=punch)
        return
    if not any(old):
        return
    length = len(old) << geometry.cluster_bits
    drop = metadata.allocator.drop
    for extent in classify(old, 0, guest_offset & -geometry.cluster_size, length, geometry):
        if extent.kind is ExtentKind.COMPRESSED:
            assert extent.host_offset is not None
            drop(extent.host_offset, extent.stored_length, punch=punch)
        elif extent.host_offset is not None:
            drop(extent.host_offset, extent.length, punch=punch)
