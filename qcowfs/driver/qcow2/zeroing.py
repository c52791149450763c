"""Zeroing and discarding ranges of the active disk, slice by slice.

Implements the zero and discard rules of FORMATS.md 1.1 and 1.4. Tables change
through the metadata's calls alone. Invariants:

- Nothing of a backing node that was hidden is ever revealed: where it could
  be, version 3 gets zero flags and version 2 zeros in clusters of its own.
- Bytes around a zeroed range that is not made of whole units (clusters, or
  subclusters with extended L2 entries) are written like any other write, and
  only if they do not read as zeros already.
- Entries are checked before the first of a slice changes; references are
  queued for removal after all of it has changed.
- An Allocation in flight is waited for first, without the lock: it would bring
  back what is being zeroed.
- A raw data file always holds what the guest sees: there the bytes are zeroed,
  and the entries stay. In another data file what no entry shows any more is
  given back to the host, under an Allocation, so that no new data is hit.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED, Geometry
from qcowfs.driver.layout.mapping import (
    ALL_ALLOCATED,
    ALL_ZERO,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    allocation_bits,
    check_entry,
    classify,
    compressed_location,
    zero_bits,
)
from qcowfs.driver.node import Node
from qcowfs.driver.qcow2.metadata import ABSENT, Metadata
from qcowfs.driver.qcow2.reading import ZEROS, Reader
from qcowfs.driver.qcow2.writing import Writer

# Zeros are written as data in pieces of this length.
_WRITE_LENGTH = 1 << 20
# Ranges without tables are passed by with a checkpoint every so many tables.
_TABLES_PER_STEP = 64
# A backing range of more extents than this is taken to hold data.
_BACKING_EXTENT_LIMIT = 256


class Policy(NamedTuple):
    """What becomes of the clusters of a range.

    `keep` leaves host clusters allocated behind a zero flag. `hide` puts a
    zero flag where a backing node would show through, and where a cluster goes
    away; without it, a cluster that goes away is hidden only where there is
    something to hide, and what is unallocated stays as it is.
    """

    keep: bool
    hide: bool


class Change(NamedTuple):
    """What a run of entries becomes: the words before and after.

    `dropped` are the host ranges whose references go away, `rewritten` the
    guest ranges that only bytes can zero, as (start, end).
    """

    old: "array[int]"
    new: "array[int]"
    dropped: list[tuple[int, int]]
    rewritten: list[tuple[int, int]]


class Zeroer:
    """Zeroes and discards ranges of the active disk of one image."""

    __slots__ = ("_geometry", "_is_raw", "_metadata", "_reader", "_requests", "_unit", "_view",
                 "_writer", "backing")  # fmt: skip

    def __init__(
        self, metadata: Metadata, reader: Reader, writer: Writer, backing: Node | None
    ) -> None:
        self._metadata = metadata
        self._reader = reader
        self._writer = writer
        self._requests = metadata.requests
        self._view = metadata.active
        self._geometry = metadata.geometry
        self._unit = metadata.geometry.subcluster_size
        self.backing = backing
        self._is_raw = (
            metadata.geometry.data_file_raw and backing is None and not writer.is_encrypted
        )

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros; with `unmap`, give its clusters back.

        Raises BadRequest, ReadOnlyImage, ImageFull, CorruptImage, OSError.
        """
        self._writer.check_range(guest_offset, length)
        if not length:
            return
        await self._writer.prepare()
        await self._requests.enter_write()
        try:
            await self.zero_entered(guest_offset, guest_offset + length, unmap=unmap)
        finally:
            self._requests.leave_write()

    async def discard(self, guest_offset: int, length: int) -> None:
        """Give the whole clusters of a range back; nothing is revealed by it.

        Raises BadRequest, ReadOnlyImage, ImageFull, CorruptImage, OSError.
        """
        self._writer.check_range(guest_offset, length)
        self._metadata.check_writable()
        start, end = self._whole(guest_offset, guest_offset + length, self._geometry.cluster_size)
        if self._geometry.version < 3:
            # Without a zero flag, what lies over the backing node has to stay.
            start = max(start, self._geometry.round_up(self._reader.backing_size))
        if start >= end:
            return
        await self._writer.prepare()
        await self._requests.enter_write()
        try:
            if self._is_raw:
                await self._punch([(start, end - start)])
            else:
                await self._change(start, end, Policy(keep=False, hide=False))
        finally:
            self._requests.leave_write()

    def _whole(self, start: int, end: int, unit: int) -> tuple[int, int]:
        """The whole units inside [start, end); the disk's last one counts as whole at its end."""
        rounded_end = end & -unit
        if end == self._view.virtual_size:
            rounded_end = (end + unit - 1) & -unit
        return (start + unit - 1) & -unit, rounded_end

    # Zeros as bytes

    async def zero_entered(self, start: int, end: int, *, unmap: bool = True) -> None:
        """As `write_zeroes`, for a caller that has entered the gate or closed it."""
        if self._is_raw:
            storage = self._metadata.data_storage
            end = min(end, storage.size())
            if start < end and not (unmap and await storage.punch(start, end - start)):
                await storage.write_zeroes(start, end - start)
            return
        whole_start, whole_end = self._whole(start, end, self._unit)
        if whole_start >= whole_end:
            await self._write_bytes(start, end)
            return
        await self._write_bytes(start, whole_start)
        if self._geometry.version < 3:
            covered_end = self._geometry.round_up(self._reader.backing_size)
            middle = min(max(whole_start, covered_end), whole_end)
            await self._write_bytes(whole_start, min(middle, end))
            await self._change(middle, whole_end, Policy(keep=False, hide=False))
        else:
            await self._change(whole_start, whole_end, Policy(keep=not unmap, hide=True))
        await self._write_bytes(whole_end, end)

    async def _write_bytes(self, start: int, end: int) -> None:
        """Write zeros where the range does not read as zeros already."""
        while start < end:
            stop = min(end, (start | _WRITE_LENGTH - 1) + 1)
            if not await self._reads_as_zero(start, stop):
                await self._writer.write_entered(start, ZEROS[: stop - start])
            start = stop

    async def _reads_as_zero(self, start: int, end: int) -> bool:
        """Whether tables alone, of all layers, tell that a range is zeros."""
        extents = await self._reader.extents(start, end - start, limit=_BACKING_EXTENT_LIMIT)
        return await _known_zero(extents, start, end, self.backing)

    # Zeros as entries

    async def _change(self, start: int, end: int, policy: Policy) -> None:
        """Apply a policy to whole units, one slice at a time."""
        geometry = self._geometry
        coverage = self._metadata.tables.slice_entry_count << geometry.cluster_bits
        steps = 0
        while start < end:
            stop = min(end, (start | coverage - 1) + 1)
            first = start & -geometry.cluster_size
            await self._requests.wait_overlapping(first, geometry.round_up(stop) - first)
            piece = await self._metadata.load(self._view, start)
            change: Change | None = None
            if piece is ABSENT:
                steps += 1
                if steps % _TABLES_PER_STEP == 0:
                    await trio.lowlevel.checkpoint()
                skipped = await self._pass_by(start, end, policy)
                if skipped > start:
                    start = skipped
                    continue
            else:
                change = self._plan(piece.words, start, stop, policy)
                if change is None:
                    await trio.lowlevel.checkpoint()
                    start = stop
                    continue
            start = await self._change_slice(start, stop, policy, change)

    async def _pass_by(self, start: int, end: int, policy: Policy) -> int:
        """Where a range without a table has to be looked at again; `start` if it needs one."""
        stop = min(end, (start | self._geometry.l2_coverage - 1) + 1)
        if not policy.hide or start >= self._reader.backing_size:
            return stop
        assert self.backing is not None
        inside = min(stop, self._reader.backing_size)
        extents = await self.backing.extents(start, inside - start, limit=_BACKING_EXTENT_LIMIT)
        zero = await _known_zero(list(extents), start, inside, self.backing.backing)
        return stop if zero else start

    async def _change_slice(
        self, start: int, stop: int, policy: Policy, change: Change | None
    ) -> int:
        """Change entries of one slice; how far it went, `start` to look everything up again.

        `change` was planned before, None where there was no table yet.
        """
        metadata = self._metadata
        first = start & -self._geometry.cluster_size
        length = self._geometry.round_up(stop) - first
        async with self._writer.hold(start, stop), metadata.lock:
            if self._requests.overlapping(first, length) is not None:
                return start
            piece = await metadata.writable_slice(start)
            first_word = self._index(start) * self._geometry.words_per_entry
            if change is None or (
                piece.words[first_word : first_word + len(change.old)] != change.old
            ):
                change = self._plan(piece.words, start, stop, policy)
            if change is None:
                return stop
            metadata.set_entries(piece, self._index(start), change.new)
            allocation = None
            if self._geometry.has_data_file:
                allocation = self._requests.register(first, first + length)
            else:
                for host_offset, dropped_length in change.dropped:
                    metadata.allocator.drop(host_offset, dropped_length, punch=True)
        if allocation is not None:
            try:
                await self._punch(change.dropped)
            finally:
                self._requests.finish(allocation)
        for part_start, part_end in change.rewritten:
            # To the cluster's end even behind the disk's, which a growing disk will show.
            await self._write_bytes(part_start, part_end)
        return stop

    async def _punch(self, runs: Sequence[tuple[int, int]]) -> None:
        """Give runs (host offset, length) of the data file back, where the host can."""
        storage = self._metadata.data_storage
        for host_offset, length in runs:
            length = min(length, storage.size() - host_offset)
            if length > 0 and not await storage.punch(host_offset, length):
                return

    def _index(self, guest_offset: int) -> int:
        mask = self._metadata.tables.slice_entry_count - 1
        return guest_offset >> self._geometry.cluster_bits & mask

    def _plan(self, words: "array[int]", start: int, stop: int, policy: Policy) -> Change | None:
        """The change of the entries of [start, stop), all in one slice; None: there is none."""
        geometry = self._geometry
        index = self._index(start)
        backing_size = self._reader.backing_size
        if geometry.extended_l2:
            change = _ExtendedPlanner(geometry, policy, backing_size).plan(
                words, index, start, stop
            )
        else:
            change = _plan_standard(words, index, start, stop, policy, geometry, backing_size)
        return change if change.rewritten or change.old != change.new else None


def _plan_standard(
    words: "array[int]",
    index: int,
    start: int,
    stop: int,
    policy: Policy,
    geometry: Geometry,
    backing_size: int,
) -> Change:
    """New standard entries for [start, stop), by runs. Raises CorruptImage."""
    new: array[int] = array("Q")
    dropped: list[tuple[int, int]] = []
    bits = geometry.cluster_bits
    covered_end = geometry.round_up(backing_size)
    for extent in classify(words, index, start, stop - start, geometry):
        count = extent.length >> bits
        first = index + len(new)
        hidden_count = min(max(covered_end - extent.guest_offset, 0) >> bits, count)
        if extent.kind is ExtentKind.UNALLOCATED:
            hidden_count = hidden_count if policy.hide else 0
            new.extend(_repeated(OFLAG_ZERO, hidden_count))
            new.extend(_repeated(0, count - hidden_count))
        elif extent.kind is ExtentKind.ZERO and (extent.host_offset is None or policy.keep):
            new.extend(words[first : first + count])
        elif extent.kind is ExtentKind.DATA and policy.keep:
            new.extend(array("Q", [word | OFLAG_ZERO for word in words[first : first + count]]))
        else:
            assert extent.host_offset is not None
            hidden_count = count if policy.hide else hidden_count
            new.extend(_repeated(OFLAG_ZERO, hidden_count))
            new.extend(_repeated(0, count - hidden_count))
            if extent.kind is ExtentKind.COMPRESSED:
                dropped.append((extent.host_offset, extent.stored_length))
            else:
                dropped.append((extent.host_offset, extent.length))
    return Change(words[index : index + len(new)], new, dropped, [])


def _repeated(word: int, count: int) -> "array[int]":
    return array("Q", (word,)) * count


class _ExtendedPlanner:
    """New extended entries, cluster by cluster."""

    def __init__(self, geometry: Geometry, policy: Policy, backing_size: int) -> None:
        self._geometry = geometry
        self._policy = policy
        self._backing_size = backing_size
        self._dropped: list[tuple[int, int]] = []
        self._rewritten: list[tuple[int, int]] = []

    def plan(self, words: "array[int]", index: int, start: int, stop: int) -> Change:
        """The change of [start, stop), which is made of whole subclusters. Raises CorruptImage."""
        geometry = self._geometry
        new: array[int] = array("Q")
        first_index = index
        while start < stop:
            cluster_start = start & -geometry.cluster_size
            cluster_stop = min(stop, cluster_start + geometry.cluster_size)
            first = (start - cluster_start) >> geometry.subcluster_bits
            count = (cluster_stop - start) >> geometry.subcluster_bits
            entry, bitmap = words[2 * index], words[2 * index + 1]
            check_entry(entry, bitmap, start, geometry)
            new.extend(self._changed(entry, bitmap, first, count, cluster_start))
            index += 1
            start = cluster_stop
        old = words[2 * first_index : 2 * index]
        return Change(old, new, self._dropped, self._rewritten)

    def _changed(
        self, entry: int, bitmap: int, first: int, count: int, cluster_start: int
    ) -> tuple[int, int]:
        geometry = self._geometry
        policy = self._policy
        whole = count == geometry.subclusters_per_cluster
        covered = cluster_start < self._backing_size
        # Host offset 0 is a place of its own in a data file only: COPIED tells.
        place_mask = OFFSET_MASK | OFLAG_COPIED if geometry.has_data_file else OFFSET_MASK
        has_place = bool(entry & place_mask) and not entry & OFLAG_COMPRESSED
        if entry & OFLAG_COMPRESSED and not whole:
            start = cluster_start + (first << geometry.subcluster_bits)
            self._rewritten.append((start, start + (count << geometry.subcluster_bits)))
            return entry, bitmap
        if not (has_place or entry & OFLAG_COMPRESSED) and not (covered and policy.hide):
            return entry, bitmap
        if entry & OFLAG_COMPRESSED:
            self._dropped.append(compressed_location(entry, geometry))
            entry = bitmap = 0
        zero = zero_bits(first, count)
        bitmap = (bitmap | zero) & ~allocation_bits(first, count)
        if not bitmap & ALL_ALLOCATED and not policy.keep:
            if has_place:
                self._dropped.append((entry & OFFSET_MASK, geometry.cluster_size))
            entry = 0
            if whole and not covered and not policy.hide:
                bitmap = 0
        assert not whole or bitmap in (0, ALL_ZERO)
        return entry, bitmap


async def _known_zero(extents: list[Extent], start: int, end: int, backing: Node | None) -> bool:
    """Whether a layer's extents, over the layers behind it, are known to read as zeros.

    They should make up [start, end); if a limit cut them short, the answer is False.
    """
    layer = [(extents, start, end)]
    while layer:
        holes: list[tuple[int, int]] = []
        size = backing.virtual_size if backing is not None else 0
        for found, range_start, range_end in layer:
            if sum(extent.length for extent in found) < range_end - range_start:
                return False
            for extent in found:
                if extent.kind is ExtentKind.UNALLOCATED:
                    stop = min(extent.guest_offset + extent.length, size)
                    if stop > extent.guest_offset:
                        holes.append((extent.guest_offset, stop))
                elif extent.kind is not ExtentKind.ZERO:
                    return False
        if not holes:
            return True
        assert backing is not None
        layer = []
        for hole_start, hole_end in holes:
            found = list(
                await backing.extents(
                    hole_start, hole_end - hole_start, limit=_BACKING_EXTENT_LIMIT
                )
            )
            layer.append((found, hole_start, hole_end))
        backing = backing.backing
    return True
