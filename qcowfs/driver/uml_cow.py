"""A User-mode-Linux COW image as a Node (FORMATS.md 1.3).

A sector's bytes lie at their own place behind the bitmap, so nothing is ever
allocated: a write goes to its place and sets bits. What a clear bit's place
holds is not known (a crash may have left anything), so the rest of a sector
that is written in part is always filled in. Invariants:

- A commit syncs data before it writes the bits that show it, and syncs again.
- Bits are only ever set: what reads as zeros and cannot be left unset is a hole
  of the file, or zeros, at its place.
- A request that waits holds its sectors; one that does not gives up when
  somebody holds them.
"""

from collections.abc import Iterator
from typing import Any

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.guest_ranges import GuestRanges
from qcowfs.driver.image_base import ImageBase
from qcowfs.driver.layout.uml_cow import CowHeader, list_runs, set_bits
from qcowfs.driver.node import Buffer, Node
from qcowfs.driver.pages import Page, PageCache
from qcowfs.driver.storage import Storage
from qcowfs.errors import UnsupportedFeature

DEFAULT_CACHE_SIZE = 8 << 20
_PAGE_LENGTH = 4096
_PAGE_BITS = _PAGE_LENGTH * 8
# A waiting write handles so many bytes at a time, fewer than the pages that stay in memory map.
_PIECE_LENGTH = 4 << 20
_ZEROS = bytes(1 << 16)
# A look at a long range lets others run after so many pages.
_PAGES_AT_ONCE = 64


class CowNode(ImageBase):
    """A COW image; made by `open_cow`."""

    format_name = "cow"

    def __init__(
        self,
        storage: Storage,
        header: CowHeader,
        path: str,
        backing: Node | None,
        cache_size: int,
    ) -> None:
        super().__init__(storage, path, header.disk_size, backing)
        self.header = header
        self.cluster_size = header.sector_length
        self._sector_length = header.sector_length
        self._data_offset = header.data_offset
        self._bitmap_offset = header.bitmap_offset
        self._tracked_end = min(header.tracked_count * header.sector_length, header.disk_size)
        self._hides_backing = backing is None and header.backing_file is not None
        self._ranges = GuestRanges()
        self._pages = PageCache(storage, length=_PAGE_LENGTH, typecode="B", budget=cache_size)

    # The bitmap

    def _sectors(self, guest_offset: int, end: int) -> tuple[int, int]:
        """The numbers [first, last) of the sectors that a range touches."""
        return guest_offset // self._sector_length, -(-end // self._sector_length)

    def _page_offset(self, sector: int) -> int:
        return self._bitmap_offset + sector // _PAGE_BITS * _PAGE_LENGTH

    def _pages_of(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(page's host offset, first bit in it, bit count) of the pages for sectors."""
        last = min(last, self.header.tracked_count)
        while first < last:
            stop = min(last, (first // _PAGE_BITS + 1) * _PAGE_BITS)
            yield self._page_offset(first), first % _PAGE_BITS, stop - first
            first = stop

    def _extents_of_page(
        self, page: Page, sector: int, bit: int, count: int, guest_offset: int, end: int
    ) -> Iterator[Extent]:
        """The extents of sectors of one page, cut to [guest_offset, end)."""
        for is_set, first, length in list_runs(page.items, bit, count):
            start = max(guest_offset, (sector + first - bit) * self._sector_length)
            stop = min(end, (sector + first - bit + length) * self._sector_length)
            if is_set:
                yield Extent(ExtentKind.DATA, start, stop - start, self._data_offset + start)
            else:
                yield Extent(ExtentKind.UNALLOCATED, start, stop - start)

    def _extents_now(self, guest_offset: int, end: int) -> list[Extent] | None:
        """What a range is made of, or None when a page must be waited for."""
        extents: list[Extent] = []
        if guest_offset == end:
            return extents
        first, last = self._sectors(guest_offset, end)
        for place, bit, count in self._pages_of(first, last):
            page = self._pages.try_load(place)
            if page is None:
                return None
            for extent in self._extents_of_page(page, first, bit, count, guest_offset, end):
                _append(extents, extent, None)
            first += count
        self._append_untracked(extents, guest_offset, end, None)
        return extents

    async def _load_extents(
        self, guest_offset: int, end: int, limit: int | None = None
    ) -> list[Extent]:
        extents: list[Extent] = []
        if guest_offset == end:
            return extents
        first, last = self._sectors(guest_offset, end)
        for number, (place, bit, count) in enumerate(self._pages_of(first, last)):
            if number % _PAGES_AT_ONCE == _PAGES_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
            page = await self._pages.load(place)
            for extent in self._extents_of_page(page, first, bit, count, guest_offset, end):
                if not _append(extents, extent, limit):
                    return extents
            first += count
        self._append_untracked(extents, guest_offset, end, limit)
        return extents

    def _append_untracked(
        self, extents: list[Extent], guest_offset: int, end: int, limit: int | None
    ) -> None:
        """Sectors without a bit are never there."""
        start = max(guest_offset, self._tracked_end)
        if start < end:
            _append(extents, Extent(ExtentKind.UNALLOCATED, start, end - start), limit)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """What the range is made of in this layer alone."""
        self.check_range(guest_offset, length)
        return await self._load_extents(guest_offset, guest_offset + length, limit)

    # Reading

    def try_read(self, guest_offset: int, length: int) -> bytearray | None:
        """The bytes, backing files seen through; None when something must be waited for."""
        data = bytearray(length)
        return data if self.try_read_into(guest_offset, memoryview(data)) else None

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` and answer True, or leave its content undefined and answer False."""
        self.check_range(guest_offset, len(buffer))
        extents = self._extents_now(guest_offset, guest_offset + len(buffer))
        if extents is None:
            return False
        for extent in extents:
            start = extent.guest_offset - guest_offset
            target = buffer[start : start + extent.length]
            if extent.host_offset is not None:
                if not self._storage.try_pread_into((target,), extent.host_offset):
                    return False
            elif not self._try_below(extent, target):
                return False
        return True

    def _length_below(self, extent: Extent) -> int:
        """How many bytes of the extent the backing node has."""
        if self.backing is None:
            return 0
        return max(0, min(extent.length, self.backing.virtual_size - extent.guest_offset))

    def _try_below(self, extent: Extent, target: memoryview) -> bool:
        length = self._length_below(extent)
        if length:
            assert self.backing is not None
            if not self.backing.try_read_into(extent.guest_offset, target[:length]):
                return False
        target[length:] = bytes(len(target) - length)
        return True

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. Raises BadRequest, CorruptImage, OSError."""
        self.check_range(guest_offset, len(buffer))
        for extent in await self._load_extents(guest_offset, guest_offset + len(buffer)):
            start = extent.guest_offset - guest_offset
            target = buffer[start : start + extent.length]
            if extent.host_offset is not None:
                await self._storage.pread_into((target,), extent.host_offset)
            elif not self._try_below(extent, target):
                assert self.backing is not None
                length = self._length_below(extent)
                await self.backing.read_into(extent.guest_offset, target[:length])
                target[length:] = bytes(len(target) - length)

    # Writing

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting and answer True, or change nothing."""
        length = len(data)
        self.check_change(guest_offset, length)
        end = guest_offset + length
        if not length:
            return True
        self._require_tracked(end)
        if self._pages.is_full or self._ranges.overlaps(*self._whole_sectors(guest_offset, end)):
            return False
        extents = self._extents_now(guest_offset, end)
        if extents is None:
            return False
        if len(extents) == 1 and extents[0].host_offset is not None:
            return self._storage.try_pwrite((data,), extents[0].host_offset)
        head, tail = self._edges(extents)
        for start, edge in head, tail:
            if not self.try_read_into(start, memoryview(edge)):
                return False
        buffers: list[Buffer] = [part for part in (head[1], data, tail[1]) if len(part)]
        if not self._storage.try_pwrite(buffers, self._data_offset + head[0]):
            return False
        for place, bit, count in self._pages_of(*self._sectors(guest_offset, end)):
            page = self._pages.try_load(place)
            if page is None:
                # Reading an edge or a later page pushed it out; nothing shows yet.
                return False
            self._set(page, bit, count)
        return True

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`. Raises ReadOnlyImage, BadRequest, OSError, UnsupportedFeature."""
        self.check_change(guest_offset, len(data))
        end = guest_offset + len(data)
        self._require_tracked(end)
        await self._commit_if_full()
        view = memoryview(data)
        while guest_offset < end:
            part = view[guest_offset - end :][:_PIECE_LENGTH]
            stop = guest_offset + len(part)
            async with self._ranges.hold(*self._whole_sectors(guest_offset, stop)):
                await self._write_held(guest_offset, part)
            guest_offset = stop

    async def _write_held(self, guest_offset: int, data: memoryview) -> None:
        end = guest_offset + len(data)
        extents = await self._load_extents(guest_offset, end)
        head, tail = self._edges(extents)
        for start, edge in head, tail:
            await self.read_into(start, memoryview(edge))
        buffers: list[Buffer] = [part for part in (head[1], data, tail[1]) if len(part)]
        await self._storage.pwrite(buffers, self._data_offset + head[0])
        await self._set_range(guest_offset, end)

    def _edges(self, extents: list[Extent]) -> tuple[tuple[int, bytearray], tuple[int, bytearray]]:
        """(guest offset, room for the bytes) of what of unset sectors a write leaves out."""
        first, last = extents[0], extents[-1]
        start, end = first.guest_offset, last.guest_offset + last.length
        whole_start, whole_end = self._whole_sectors(start, end)
        head_start = whole_start if first.host_offset is None else start
        tail_end = min(whole_end, self.virtual_size) if last.host_offset is None else end
        return (head_start, bytearray(start - head_start)), (end, bytearray(tail_end - end))

    def _whole_sectors(self, guest_offset: int, end: int) -> tuple[int, int]:
        """A range rounded to whole sectors."""
        first, last = self._sectors(guest_offset, end)
        return first * self._sector_length, last * self._sector_length

    async def _set_range(self, guest_offset: int, end: int) -> None:
        for place, bit, count in self._pages_of(*self._sectors(guest_offset, end)):
            self._set(await self._pages.load(place), bit, count)

    def _set(self, page: Page, bit: int, count: int) -> None:
        if all(is_set for is_set, _, _ in list_runs(page.items, bit, count)):
            return
        self._pages.mark_dirty(page, *set_bits(page.items, bit, count))

    def _require_tracked(self, end: int) -> None:
        if end > self._tracked_end:
            raise UnsupportedFeature(
                f"this version of COW has no bits for the sectors from {self._tracked_end:#x} on"
            )

    # Zeroing

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros; with `unmap`, as holes of the file where it can."""
        await self._zero(guest_offset, length, unmap=unmap, discard=False)

    async def discard(self, guest_offset: int, length: int) -> None:
        """Make holes of what is there; what the backing file shows stays."""
        await self._zero(guest_offset, length, unmap=True, discard=True)

    async def _zero(self, guest_offset: int, length: int, *, unmap: bool, discard: bool) -> None:
        self.check_change(guest_offset, length)
        await self._commit_if_full()
        end = guest_offset + length
        step = _PAGE_BITS * self._sector_length
        while guest_offset < end:
            stop = min(end, (guest_offset // step + 1) * step)
            async with self._ranges.hold(*self._whole_sectors(guest_offset, stop)):
                for extent in await self._load_extents(guest_offset, stop):
                    await self._zero_extent(extent, unmap=unmap, discard=discard)
            guest_offset = stop

    async def _zero_extent(self, extent: Extent, *, unmap: bool, discard: bool) -> None:
        _, start, length, host_offset, _ = extent
        if host_offset is not None:
            await self._zero_place(host_offset, length, unmap=unmap, discard=discard)
            return
        end = start + (length if self._hides_backing else self._length_below(extent))
        if discard or start == end:
            return
        self._require_tracked(end)
        # Whole sectors become zeros at their places; parts of some go the way of a write.
        unit = self._sector_length
        first = min(-(-start // unit) * unit, end)
        last = max(first, end if end == self.virtual_size else end // unit * unit)
        await self._write_zeros(start, first)
        if first < last:
            await self._zero_place(
                self._data_offset + first, last - first, unmap=unmap, discard=False
            )
            await self._set_range(first, last)
        await self._write_zeros(last, end)

    async def _zero_place(
        self, host_offset: int, length: int, *, unmap: bool, discard: bool
    ) -> None:
        if unmap and await self._storage.punch(host_offset, length):
            return
        if not discard:
            await self._storage.write_zeroes(host_offset, length)

    async def _write_zeros(self, start: int, end: int) -> None:
        while start < end:
            length = min(end - start, len(_ZEROS))
            await self._write_held(start, memoryview(_ZEROS)[:length])
            start += length

    # Durability

    async def _commit_if_full(self) -> None:
        if self._pages.is_full:
            await self.commit()

    def _has_changes(self) -> bool:
        return bool(self._pages.dirty)

    async def _commit(self) -> None:
        taken = self._pages.take_dirty()
        try:
            await self.sync_storage()
            for part in taken:
                if not self._storage.try_pwrite((part.data,), part.host_offset):
                    await self._storage.pwrite((part.data,), part.host_offset)
            if taken:
                self.commits += 1
                await self.sync_storage()
        except BaseException:
            self._pages.give_back(taken)
            raise
        self._pages.settle(taken)

    # What the image is

    def info(self) -> dict[str, Any]:
        """The facts that qemu-img info prints of any image, under its keys."""
        return self._facts(self.cluster_size, self.header.backing_file)

    def statistics(self) -> dict[str, int]:
        """Counts since the image was opened, and sizes of caches, by name."""
        return {
            "commits": self.commits,
            "slice_loads": self._pages.loads,
            "slices": len(self._pages.pages),
            "dirty_slices": len(self._pages.dirty),
        }


def _append(extents: list[Extent], extent: Extent, limit: int | None) -> bool:
    """Append an extent, or lengthen the last one, of the same kind; False at the limit."""
    if extents and extents[-1].kind is extent.kind:
        extents[-1] = extents[-1]._replace(length=extents[-1].length + extent.length)
        return True
    if limit is not None and len(extents) >= limit:
        return False
    extents.append(extent)
    return True


async def open_cow(
    storage: Storage,
    header: CowHeader,
    *,
    path: str,
    backing: Node | None,
    cache_size: int = DEFAULT_CACHE_SIZE,
) -> CowNode:
    """The node of the image in `storage`; it owns `storage` and `backing`.

    It is writable when `storage` is. `cache_size` in bytes bounds the bitmap
    in memory.
    """
    return CowNode(storage, header, path, backing, cache_size)
