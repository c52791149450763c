"""Zeroing and discarding in a qcow image of version 1 (FORMATS.md 1.2).

The format has no zero clusters: an entry of 0 shows the backing file, or zeros
where there is none. So a whole cluster is unmapped only where nothing lies
below it; elsewhere its bytes become zeros on the host. Invariants:

- A backing file is never revealed, not even one that was not opened this time.
- A discard never takes new room: what cannot be unmapped or punched stays.
- A change of entries and its lookup have no await between them, or the clusters
  are held.
"""

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.guest_ranges import GuestRanges
from qcowfs.driver.qcow1_reading import Qcow1Reader
from qcowfs.driver.qcow1_tables import Qcow1Tables
from qcowfs.driver.qcow1_writing import Qcow1Writer
from qcowfs.driver.storage import Storage

_ZEROS = bytes(1 << 16)


class Qcow1Zeroer:
    """Zeroes guest ranges of one image; ranges are inside the disk, the image is writable.

    `hides_backing`: the image names a backing file that is not open.
    """

    def __init__(
        self,
        storage: Storage,
        tables: Qcow1Tables,
        reader: Qcow1Reader,
        writer: Qcow1Writer,
        ranges: GuestRanges,
        *,
        encrypted: bool,
        hides_backing: bool,
    ) -> None:
        self._storage = storage
        self._tables = tables
        self._reader = reader
        self._writer = writer
        self._ranges = ranges
        self._encrypted = encrypted
        self._hides_backing = hides_backing

    async def zero(self, guest_offset: int, length: int, *, unmap: bool, discard: bool) -> None:
        """Make the range read as zeros; with `discard`, only what costs nothing."""
        bits = self._tables.coverage_bits
        end = guest_offset + length
        while guest_offset < end:
            l1_index = guest_offset >> bits
            if not self._reader.reveals(guest_offset) and not self._hides_backing:
                stop = min(end, self._reader.end_of_gap(l1_index) << bits)
                if guest_offset < stop and not self._ranges.overlaps(guest_offset, stop):
                    guest_offset = stop
                    await trio.lowlevel.checkpoint()
                    continue
            stop = min(end, l1_index + 1 << bits)
            clusters = self._writer.clusters(guest_offset, stop - guest_offset)
            async with self._ranges.hold(*clusters):
                for extent in await self._reader.extents(guest_offset, stop - guest_offset):
                    await self._zero_extent(extent, unmap=unmap, discard=discard)
            guest_offset = stop

    async def _zero_extent(self, extent: Extent, *, unmap: bool, discard: bool) -> None:
        kind, start, length, _, _ = extent
        end = start + length
        if kind is ExtentKind.UNALLOCATED:
            below = self._end_of_backing(start, end)
            if not discard and below > start:
                await self._write_zeros(start, below)
            return
        if (unmap or kind is ExtentKind.COMPRESSED) and not self._hides_backing:
            first, last = self._whole_clusters(start, end)
            if first < last:
                await self._unmap(extent, first, last)
                for part_start, part_end in ((start, first), (last, end)):
                    await self._zero_bytes(extent, part_start, part_end, unmap, discard)
                return
        await self._zero_bytes(extent, start, end, unmap, discard)

    def _end_of_backing(self, start: int, end: int) -> int:
        """Up to where in [start, end) a backing file has, or may have, bytes."""
        backing = self._reader.backing
        if self._hides_backing:
            return end
        return start if backing is None else min(end, max(start, backing.virtual_size))

    def _whole_clusters(self, start: int, end: int) -> tuple[int, int]:
        """The whole clusters of [start, end) that have nothing below; empty as (start, start)."""
        size = self._tables.cluster_size
        backing = self._reader.backing
        floor = start if backing is None else max(start, backing.virtual_size)
        first = (floor + size - 1) & -size
        last = end if end == self._tables.header.disk_size else end & -size
        return (first, last) if first < last else (start, start)

    async def _unmap(self, extent: Extent, first: int, last: int) -> None:
        tables = self._tables
        page = await tables.load(first)
        count = -(-(last - first) // tables.cluster_size)
        tables.clear_run(page, first >> tables.cluster_bits & tables.index_mask, count)
        if extent.kind is ExtentKind.DATA:
            assert extent.host_offset is not None
            host_offset = extent.host_offset + first - extent.guest_offset
            tables.free(host_offset, count << tables.cluster_bits)

    async def _zero_bytes(
        self, extent: Extent, start: int, end: int, unmap: bool, discard: bool
    ) -> None:
        """Zero the part [start, end) of a DATA or COMPRESSED extent without unmapping."""
        if start >= end:
            return
        if extent.kind is ExtentKind.COMPRESSED or self._encrypted:
            if not discard:
                await self._write_zeros(start, end)
            return
        assert extent.host_offset is not None
        host_offset = extent.host_offset + start - extent.guest_offset
        if unmap and await self._storage.punch(host_offset, end - start):
            return
        if not discard:
            await self._storage.write_zeroes(host_offset, end - start)

    async def _write_zeros(self, start: int, end: int) -> None:
        while start < end:
            length = min(end - start, len(_ZEROS))
            await self._writer.write_held(start, memoryview(_ZEROS)[:length])
            start += length
