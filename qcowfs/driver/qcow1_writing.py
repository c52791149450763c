"""Writing to a qcow image of version 1: in place, or to new clusters at the end (FORMATS.md 1.2).

A write goes piece by piece; a piece stays inside one L2 table and is either
contiguous plain clusters, overwritten where they are, or a run of clusters
that are unallocated or compressed and get new room, with what else they show
(COW head and tail) copied along. Table words change through Qcow1Tables alone.
Invariants:

- Data and its COW edges are written before the L2 entry is set in memory, so a
  commit never publishes an entry without them.
- A new cluster is written to its end, so that the file holds it whole. Its
  beginning is left alone where nothing shows there: room at the end of the
  file was never written, so it is zeros. An encrypted cluster is written whole.
- A request that waits holds its clusters (GuestRanges); one that does not wait
  gives up when somebody holds them.
- Less than a sector of an encrypted cluster is read, changed and written under
  the same protection.
"""

from typing import NamedTuple

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.guest_ranges import GuestRanges
from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.layout.qcow1 import list_extents
from qcowfs.driver.node import Buffer
from qcowfs.driver.pages import Page
from qcowfs.driver.qcow1_reading import INLINE_LENGTH, Qcow1Reader
from qcowfs.driver.qcow1_tables import Qcow1Tables
from qcowfs.driver.storage import Storage
from qcowfs.driver.transform.cipher import SectorCipher

# A waiting write handles so many bytes at a time; bounds what a cipher works on.
_PIECE_LENGTH = 4 << 20


class _Plan(NamedTuple):
    """New clusters for the guest bytes [start, end), mapped from entry `first_index` on.

    [cow_start, start) and [end, cow_end) are to be copied along.
    """

    start: int
    end: int
    first_index: int
    cluster_count: int
    cow_start: int
    cow_end: int


class Qcow1Writer:
    """Changes guest bytes of one image; ranges are inside the disk, the image is writable."""

    def __init__(
        self,
        storage: Storage,
        tables: Qcow1Tables,
        reader: Qcow1Reader,
        ranges: GuestRanges,
        cipher: SectorCipher | None,
    ) -> None:
        self._storage = storage
        self._tables = tables
        self._reader = reader
        self._ranges = ranges
        self._cipher = cipher
        self.allocations = 0

    # Without waiting

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` at once, or answer False, perhaps after some of it."""
        end = guest_offset + len(data)
        tables = self._tables
        in_cluster = tables.cluster_size - 1
        if tables.pages.is_full or self._ranges.overlaps(
            guest_offset & -tables.cluster_size, (end | in_cluster) + 1
        ):
            return False
        view = data if isinstance(data, memoryview) else memoryview(data)
        while guest_offset < end:
            written = self._try_piece(guest_offset, view[guest_offset - end :])
            if not written:
                return False
            guest_offset += written
        return True

    def _try_piece(self, guest_offset: int, data: memoryview) -> int:
        """Write some of `data`; how much, 0 when it must be waited for."""
        tables = self._tables
        length = self._length_in_table(guest_offset, len(data))
        page = None
        if tables.l1[guest_offset >> tables.coverage_bits]:
            page = tables.try_load(guest_offset)
            if page is None:
                return 0
        run = self._first_extent(page, guest_offset, length)
        if run.kind is ExtentKind.DATA:
            assert run.host_offset is not None
            part = data[: run.length]
            if self._cipher is None:
                return run.length if self._storage.try_pwrite((part,), run.host_offset) else 0
            return run.length if self._try_encrypted(run, part) else 0
        plan = self._plan(guest_offset, run.length)
        if self._cipher is not None and plan.cow_end - plan.cow_start > INLINE_LENGTH:
            return 0
        edges = bytearray(plan.start - plan.cow_start), bytearray(plan.cow_end - plan.end)
        for edge, start in zip(edges, (plan.cow_start, plan.end), strict=True):
            if not self._reader.try_read_into(start, self._inside(start, edge)):
                return 0
        if page is None:
            page = tables.try_create(guest_offset)
            if page is None:
                return 0
        buffers, start = self._arrange(plan, edges[0], data[: run.length], edges[1])
        host_offset = tables.end
        if not tables.try_append(buffers, plan.cluster_count << tables.cluster_bits, start):
            return 0
        self._link(page, plan, host_offset)
        return run.length

    def _try_encrypted(self, run: Extent, data: memoryview) -> bool:
        """Overwrite a part of encrypted clusters in place."""
        assert self._cipher is not None
        assert run.host_offset is not None
        head = run.guest_offset % SECTOR
        tail = -(run.guest_offset + len(data)) % SECTOR
        if len(data) > INLINE_LENGTH:
            return False
        sectors = bytearray(head + len(data) + tail)
        start = run.guest_offset - head
        view = memoryview(sectors)
        for is_partial, first in ((head, 0), (tail, len(sectors) - SECTOR)):
            if is_partial and not self._reader.try_read_into(
                start + first, view[first : first + SECTOR]
            ):
                return False
        view[head : head + len(data)] = data
        stored = self._cipher.encrypt(sectors, start // SECTOR)
        return self._storage.try_pwrite((stored,), run.host_offset - head)

    # Waiting where it must be

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        end = guest_offset + len(data)
        while guest_offset < end:
            part = view[guest_offset - end :]
            length = self._length_in_table(guest_offset, min(len(part), _PIECE_LENGTH))
            async with self._ranges.hold(*self.clusters(guest_offset, length)):
                await self.write_held(guest_offset, part[:length])
            guest_offset += length

    async def write_held(self, guest_offset: int, data: memoryview) -> None:
        """Write bytes of one L2 table whose clusters the caller holds."""
        tables = self._tables
        end = guest_offset + len(data)
        while guest_offset < end:
            part = data[guest_offset - end :]
            page = None
            if tables.l1[guest_offset >> tables.coverage_bits]:
                page = await tables.load(guest_offset)
            run = self._first_extent(page, guest_offset, len(part))
            if run.kind is ExtentKind.DATA:
                await self._write_in_place(run, part[: run.length])
            else:
                await self._write_new(guest_offset, part[: run.length])
            guest_offset += run.length

    async def _write_in_place(self, run: Extent, data: memoryview) -> None:
        assert run.host_offset is not None
        if self._cipher is None:
            if not self._storage.try_pwrite((data,), run.host_offset):
                await self._storage.pwrite((data,), run.host_offset)
            return
        head = run.guest_offset % SECTOR
        tail = -(run.guest_offset + len(data)) % SECTOR
        sectors = bytearray(head + len(data) + tail)
        start = run.guest_offset - head
        view = memoryview(sectors)
        for is_partial, first in ((head, 0), (tail, len(sectors) - SECTOR)):
            if is_partial:
                await self._reader.read_into(start + first, view[first : first + SECTOR])
        view[head : head + len(data)] = data
        stored = await trio.to_thread.run_sync(self._cipher.encrypt, sectors, start // SECTOR)
        await self._storage.pwrite((stored,), run.host_offset - head)

    async def _write_new(self, guest_offset: int, data: memoryview) -> None:
        tables = self._tables
        plan = self._plan(guest_offset, len(data))
        head, tail = bytearray(plan.start - plan.cow_start), bytearray(plan.cow_end - plan.end)
        await self._reader.read_into(plan.cow_start, self._inside(plan.cow_start, head))
        await self._reader.read_into(plan.end, self._inside(plan.end, tail))
        if self._cipher is None:
            buffers, start = self._arrange(plan, head, data, tail)
        else:
            buffers, start = await trio.to_thread.run_sync(self._arrange, plan, head, data, tail)
        if not tables.l1[guest_offset >> tables.coverage_bits]:
            await tables.create(guest_offset)
        host_offset = tables.take(plan.cluster_count << tables.cluster_bits)
        await self._storage.pwrite(buffers, host_offset + start)
        self._link(await tables.load(guest_offset), plan, host_offset)

    # Pieces

    def clusters(self, guest_offset: int, length: int) -> tuple[int, int]:
        """The range [start, end) of whole clusters around a range that is not empty."""
        size = self._tables.cluster_size
        return guest_offset & -size, (guest_offset + length + size - 1) & -size

    def _length_in_table(self, guest_offset: int, length: int) -> int:
        coverage = 1 << self._tables.coverage_bits
        return min(length, coverage - (guest_offset & coverage - 1))

    def _first_extent(self, page: Page | None, guest_offset: int, length: int) -> Extent:
        """The run at `guest_offset`: DATA that is contiguous on the host, or what needs room."""
        extent = Extent(ExtentKind.UNALLOCATED, guest_offset, length)
        if page is None:
            return extent
        tables = self._tables
        extents: list[Extent] = []
        end = guest_offset + length
        at = guest_offset
        while at < end:
            # One more than is needed, so that the one before is known to be complete.
            at = list_extents(
                page.items, at, end, tables.header, tables.end, extents, len(extents) + 1
            )
            if extents[0].kind is ExtentKind.DATA:
                return extents[0]
            if extents[-1].kind is ExtentKind.DATA:
                break
        missing = sum(part.length for part in extents if part.kind is not ExtentKind.DATA)
        return extent._replace(length=missing)

    def _plan(self, guest_offset: int, length: int) -> _Plan:
        """How a run without plain clusters gets them."""
        tables = self._tables
        start, end = self.clusters(guest_offset, length)
        return _Plan(
            start=guest_offset,
            end=guest_offset + length,
            first_index=start >> tables.cluster_bits & tables.index_mask,
            cluster_count=end - start >> tables.cluster_bits,
            cow_start=start if self._cipher or self._shows(start) else guest_offset,
            cow_end=end,
        )

    def _shows(self, guest_offset: int) -> bool:
        """Whether a cluster without room of its own may read as anything but zeros."""
        tables = self._tables
        if self._reader.reveals(guest_offset):
            return True
        if not tables.l1[guest_offset >> tables.coverage_bits]:
            return False
        page = tables.try_load(guest_offset)
        index = guest_offset >> tables.cluster_bits & tables.index_mask
        return page is None or page.items[index] != 0

    def _inside(self, start: int, edge: bytearray) -> memoryview:
        """What of an edge lies inside the disk; the rest stays zeros."""
        return memoryview(edge)[: max(0, self._tables.header.disk_size - start)]

    def _arrange(
        self, plan: _Plan, head: bytearray, data: memoryview, tail: bytearray
    ) -> tuple[list[Buffer], int]:
        """The buffers of a plan, and how far into its first cluster they begin."""
        start = plan.cow_start & self._tables.cluster_size - 1
        if self._cipher is None:
            buffers: list[Buffer] = [part for part in (head, data, tail) if len(part)]
            return buffers, start
        plain = b"".join((head, data, tail))
        return [self._cipher.encrypt(plain, plan.cow_start // SECTOR)], start

    def _link(self, page: Page, plan: _Plan, host_offset: int) -> None:
        self._tables.set_run(page, plan.first_index, plan.cluster_count, host_offset)
        self.allocations += plan.cluster_count
