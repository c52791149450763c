"""Reading of a qcow image of version 1: from L2 entries to guest bytes (FORMATS.md 1.2).

Plain clusters are read, and deciphered where the image is encrypted; compressed
ones, which are never encrypted, are inflated; what is unallocated comes from
the backing node, or is zeros. No table is changed here. Invariants:

- The instant and the waiting calls look at the same extents.
- A stream is never overwritten while the image is open (see qcow1_tables), so
  what was inflated once stays true for its place in the file.
"""

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.layout.qcow1 import COMPRESSED_FLAG, HEADER_LENGTH, append_extent, list_extents
from qcowfs.driver.node import Node
from qcowfs.driver.qcow1_tables import Qcow1Tables
from qcowfs.driver.storage import Storage
from qcowfs.driver.transform.cipher import SectorCipher
from qcowfs.driver.transform.compression import COMPRESSION_ZLIB, inflate_cluster
from qcowfs.errors import CorruptImage

# Up to so many bytes, ciphers and inflating cost less than a hop into a thread.
INLINE_LENGTH = 64 << 10
_KEPT_LENGTH = 4 << 20
# A search through an L1 table lets others run after so many entries.
_L1_STEP = 4096


class Qcow1Reader:
    """Guest bytes of one image; ranges are inside the disk."""

    def __init__(
        self,
        storage: Storage,
        tables: Qcow1Tables,
        backing: Node | None,
        cipher: SectorCipher | None,
    ) -> None:
        self._storage = storage
        self._tables = tables
        self.backing = backing
        self._cipher = cipher
        # Inflated clusters by (host offset, length) of their streams, least recently used first.
        self._kept: dict[tuple[int, int], bytes] = {}
        self._kept_count = max(_KEPT_LENGTH // tables.cluster_size, 4)
        self.inflated_count = 0

    # Extents

    def extents_now(self, guest_offset: int, length: int) -> list[Extent] | None:
        """What the range is made of, or None when a table must be waited for."""
        tables = self._tables
        extents: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end:
            l1_index = guest_offset >> tables.coverage_bits
            stop = min(end, l1_index + 1 << tables.coverage_bits)
            if not tables.l1[l1_index]:
                append_extent(
                    extents, Extent(ExtentKind.UNALLOCATED, guest_offset, stop - guest_offset)
                )
            else:
                page = tables.try_load(guest_offset)
                if page is None:
                    return None
                list_extents(page.items, guest_offset, stop, tables.header, tables.end, extents)
            guest_offset = stop
        return extents

    async def extents(
        self, guest_offset: int, length: int, limit: int | None = None
    ) -> list[Extent]:
        """What the range is made of; with `limit`, at most so many extents."""
        tables = self._tables
        extents: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end:
            l1_index = guest_offset >> tables.coverage_bits
            if tables.l1[l1_index]:
                stop = min(end, l1_index + 1 << tables.coverage_bits)
                page = await tables.load(guest_offset)
                reached = list_extents(
                    page.items, guest_offset, stop, tables.header, tables.end, extents, limit
                )
                if reached < stop:
                    break
            else:
                stop = min(end, self.end_of_gap(l1_index) << tables.coverage_bits)
                gap = Extent(ExtentKind.UNALLOCATED, guest_offset, stop - guest_offset)
                if not append_extent(extents, gap, limit):
                    break
                await trio.lowlevel.checkpoint()
            guest_offset = stop
        return extents

    def end_of_gap(self, l1_index: int) -> int:
        """The index, some way after `l1_index`, up to which L1 entries are known to be empty."""
        part = self._tables.l1[l1_index : l1_index + _L1_STEP]
        if not any(part):
            return l1_index + len(part)
        return l1_index + next(index for index, entry in enumerate(part) if entry)

    # Bytes

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if nothing must be waited for."""
        tables = self._tables
        length = len(buffer)
        in_cluster = guest_offset & tables.cluster_size - 1
        if (
            self._cipher is None
            and in_cluster + length <= tables.cluster_size
            and length
            and tables.l1[guest_offset >> tables.coverage_bits]
        ):
            page = tables.try_load(guest_offset)
            if page is None:
                return False
            entry = page.items[guest_offset >> tables.cluster_bits & tables.index_mask]
            if HEADER_LENGTH <= entry < tables.end and not entry & SECTOR - 1:
                return self._storage.try_pread_into((buffer,), entry + in_cluster)
        extents = self.extents_now(guest_offset, length)
        if extents is None:
            return False
        inflatable = INLINE_LENGTH
        for extent in extents:
            start = extent.guest_offset - guest_offset
            target = buffer[start : start + extent.length]
            if extent.kind is ExtentKind.DATA:
                done = self._try_data(extent, target)
            elif extent.kind is ExtentKind.COMPRESSED:
                inflatable -= tables.cluster_size
                done = self._try_compressed(extent, target, may_inflate=inflatable >= 0)
            else:
                done = self._try_below(extent, target)
            if not done:
                return False
        return True

    def _try_data(self, extent: Extent, target: memoryview) -> bool:
        assert extent.host_offset is not None
        if self._cipher is None:
            return self._storage.try_pread_into((target,), extent.host_offset)
        if len(target) > INLINE_LENGTH:
            return False
        head, stored = _whole_sectors(extent)
        if not self._storage.try_pread_into((memoryview(stored),), extent.host_offset - head):
            return False
        plain = self._cipher.decrypt(stored, extent.guest_offset // SECTOR)
        target[:] = memoryview(plain)[head : head + len(target)]
        return True

    def _try_compressed(self, extent: Extent, target: memoryview, *, may_inflate: bool) -> bool:
        data = self._recall(extent)
        if data is None:
            if not may_inflate:
                return False
            assert extent.host_offset is not None
            stored = bytearray(extent.stored_length)
            if not self._storage.try_pread_into((memoryview(stored),), extent.host_offset):
                return False
            data = self._inflate(extent, stored)
            self._keep(extent, data)
        self._copy(extent, data, target)
        return True

    def _try_below(self, extent: Extent, target: memoryview) -> bool:
        length = self._length_below(extent)
        if length:
            assert self.backing is not None
            if not self.backing.try_read_into(extent.guest_offset, target[:length]):
                return False
        target[length:] = bytes(len(target) - length)
        return True

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. Raises CorruptImage, OSError."""
        self._tables.reader_count += 1
        try:
            await self._read_into(guest_offset, buffer)
        finally:
            self._tables.reader_count -= 1

    async def _read_into(self, guest_offset: int, buffer: memoryview) -> None:
        compressed: list[tuple[Extent, memoryview]] = []
        for extent in await self.extents(guest_offset, len(buffer)):
            start = extent.guest_offset - guest_offset
            target = buffer[start : start + extent.length]
            if extent.kind is ExtentKind.COMPRESSED:
                compressed.append((extent, target))
            elif extent.kind is ExtentKind.DATA:
                await self._data(extent, target)
            elif not self._try_below(extent, target):
                assert self.backing is not None
                length = self._length_below(extent)
                await self.backing.read_into(extent.guest_offset, target[:length])
                target[length:] = bytes(len(target) - length)
        if compressed:
            await self._compressed(compressed)

    async def _data(self, extent: Extent, target: memoryview) -> None:
        assert extent.host_offset is not None
        if self._cipher is None:
            await self._storage.pread_into((target,), extent.host_offset)
            return
        head, stored = _whole_sectors(extent)
        await self._storage.pread_into((memoryview(stored),), extent.host_offset - head)
        plain = await trio.to_thread.run_sync(
            self._cipher.decrypt, stored, extent.guest_offset // SECTOR
        )
        target[:] = memoryview(plain)[head : head + len(target)]

    async def _compressed(self, wanted: list[tuple[Extent, memoryview]]) -> None:
        """Inflate the clusters of one request that are not kept, in one thread."""
        jobs: list[tuple[Extent, bytearray, memoryview]] = []
        for extent, target in wanted:
            data = self._recall(extent)
            if data is not None:
                self._copy(extent, data, target)
                continue
            assert extent.host_offset is not None
            stored = bytearray(extent.stored_length)
            if not self._storage.try_pread_into((memoryview(stored),), extent.host_offset):
                await self._storage.pread_into((memoryview(stored),), extent.host_offset)
            jobs.append((extent, stored, target))

        last: list[tuple[Extent, bytes]] = []

        def inflate() -> None:
            for extent, stored, target in jobs:
                data = self._inflate(extent, stored)
                self._copy(extent, data, target)
                last[:] = [(extent, data)]

        if jobs:
            await trio.to_thread.run_sync(inflate)
            # Who reads on in order wants the rest of the last cluster next.
            self.inflated_count += len(jobs) - 1
            self._keep(*last[0])

    # Pieces

    def reveals(self, guest_offset: int) -> bool:
        """Whether the backing node decides what an unallocated byte here reads as."""
        return self.backing is not None and guest_offset < self.backing.virtual_size

    def _length_below(self, extent: Extent) -> int:
        """How many bytes of the extent the backing node has."""
        if self.backing is None:
            return 0
        return max(0, min(extent.length, self.backing.virtual_size - extent.guest_offset))

    def _inflate(self, extent: Extent, stored: bytearray) -> bytes:
        try:
            return inflate_cluster(COMPRESSION_ZLIB, stored, self._tables.cluster_size)
        except CorruptImage as error:
            raise CorruptImage(
                f"{error} (its stream lies at host offset {extent.host_offset:#x})",
                structure="compressed cluster",
                host_offset=extent.host_offset,
            ) from None

    def _copy(self, extent: Extent, data: bytes, target: memoryview) -> None:
        start = extent.guest_offset & self._tables.cluster_size - 1
        target[:] = memoryview(data)[start : start + extent.length]

    def _recall(self, extent: Extent) -> bytes | None:
        assert extent.host_offset is not None
        key = (extent.host_offset, extent.stored_length)
        data = self._kept.pop(key, None)
        if data is not None:
            self._kept[key] = data
        return data

    def _keep(self, extent: Extent, data: bytes) -> None:
        assert extent.host_offset is not None
        self.inflated_count += 1
        self._kept[extent.host_offset, extent.stored_length] = data
        while len(self._kept) > self._kept_count:
            del self._kept[next(iter(self._kept))]


def is_plain(entry: int) -> bool:
    """Whether an L2 entry maps a cluster that can be written in place."""
    return bool(entry) and not entry & COMPRESSED_FLAG


def _whole_sectors(extent: Extent) -> tuple[int, bytearray]:
    """How far into its sector an extent begins, and a buffer for all sectors that it touches."""
    head = extent.guest_offset & SECTOR - 1
    return head, bytearray(-(-(head + extent.length) // SECTOR) * SECTOR)
