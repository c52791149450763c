"""Reading and writing the guest bytes of an encrypted disk.

The subclasses of the plain reader and writer that put a `Ciphering` between
buffers and host; the plain ones know nothing of it and pay nothing for it.
Invariants:

- What goes to the host is whole sectors of ciphertext. A write of part of a
  sector is widened first: the rest is read as the guest sees it, whatever it
  lies in, and the range is held from before that until all is linked.
- Bytes that come along with an allocating write are decrypted with the numbers
  of their old place and encrypted with those of the new one; zeros as well,
  since nothing that was never written reads as zeros here.
- A cluster with a zero flag stays one: zeros are ciphered only when written.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.node import Buffer, Node
from qcowfs.driver.qcow2.ciphering import INLINE_LENGTH, Ciphering, HeldRanges
from qcowfs.driver.qcow2.inflating import Inflater, Piece
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.linking import WritePlan
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.driver.qcow2.reading import Part, Reader
from qcowfs.driver.qcow2.tables import Slice
from qcowfs.driver.qcow2.writing import Edge, Writer

_DATA = ExtentKind.DATA
_SECTOR_MASK = SECTOR - 1
_EVERY_BIT = (1 << 64) - 1


class EncryptedReader(Reader):
    """Reads one disk of an encrypted image."""

    __slots__ = ("_ciphering",)

    def __init__(
        self,
        metadata: Metadata,
        view: L1View,
        inflater: Inflater,
        backing: Node | None,
        backing_reader: Reader | None,
        ciphering: Ciphering,
    ) -> None:
        super().__init__(metadata, view, inflater, backing, backing_reader)
        self._ciphering = ciphering
        # No entry is plain data here: all of them take the way through the extents.
        self._plain_mask = _EVERY_BIT

    def _try_serve(
        self, extents: list[Extent], guest_offset: int, buffer: memoryview, holes: list[Part]
    ) -> bool:
        """As `Reader._try_serve`; more than a little is left to worker threads."""
        others = []
        data_length = 0
        for extent in extents:
            if extent.kind is not _DATA:
                others.append(extent)
                continue
            data_length += extent.length
            if data_length > INLINE_LENGTH:
                return False
            assert extent.host_offset is not None
            start = extent.guest_offset - guest_offset
            part = buffer[start : start + extent.length]
            if not self._try_fetch(extent.guest_offset, part, extent.host_offset):
                return False
        if not others:
            return True
        if len(others) == len(extents):
            return super()._try_serve(extents, guest_offset, buffer, holes)
        for extent in others:
            start = extent.guest_offset - guest_offset
            part = buffer[start : start + extent.length]
            if not super()._try_serve([extent], extent.guest_offset, part, holes):
                return False
        return True

    def _try_fetch(self, guest_offset: int, part: memoryview, host_offset: int) -> bool:
        skipped = guest_offset & _SECTOR_MASK
        stored = _stored_buffer(skipped, part)
        if not self._try_pread_into((stored,), host_offset - skipped):
            return False
        plain = self._ciphering.decrypt(stored, guest_offset - skipped, host_offset - skipped)
        part[:] = memoryview(plain)[skipped : skipped + len(part)]
        return True

    def _plan(
        self,
        extents: list[Extent],
        guest_offset: int,
        buffer: memoryview,
        holes: list[Part],
        jobs: list[Callable[[], Awaitable[None]]],
        pieces: list[Piece],
    ) -> None:
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = buffer[start : start + extent.length]
            if extent.kind is _DATA:
                assert extent.host_offset is not None
                jobs.append(partial(self._fetch, extent.guest_offset, part, extent.host_offset))
            else:
                super()._plan([extent], extent.guest_offset, part, holes, jobs, pieces)

    async def _fetch(self, guest_offset: int, part: memoryview, host_offset: int) -> None:
        skipped = guest_offset & _SECTOR_MASK
        stored = _stored_buffer(skipped, part)
        if not self._try_pread_into((stored,), host_offset - skipped):
            await self._storage.pread_into((stored,), host_offset - skipped)
        await self._ciphering.decrypt_long(stored, guest_offset - skipped, host_offset - skipped)
        if stored is not part:
            part[:] = stored[skipped : skipped + len(part)]


def _stored_buffer(skipped: int, part: memoryview) -> memoryview:
    """Room for the whole sectors of a part that begins `skipped` bytes inside one."""
    length = skipped + len(part) + _SECTOR_MASK & -SECTOR
    return part if length == len(part) else memoryview(bytearray(length))


class EncryptedWriter(Writer):
    """Writes to the active disk of an encrypted image."""

    is_encrypted = True

    __slots__ = ("_ciphering", "_ranges")

    def __init__(self, metadata: Metadata, reader: Reader, ciphering: Ciphering) -> None:
        super().__init__(metadata, reader)
        self._ciphering = ciphering
        self._ranges = HeldRanges()

    def hold(self, start: int, end: int) -> AbstractAsyncContextManager[None]:
        """Keep writes of parts of sectors out of [start, end) for the block."""
        return self._ranges.hold(start, end)

    # Without waiting

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """As `Writer.try_write`; more than a little is left to worker threads."""
        length = len(data)
        metadata = self._metadata
        if guest_offset < 0 or guest_offset + length > self._view.virtual_size:
            self.check_range(guest_offset, length)
        if not metadata.can_write:
            metadata.check_writable()
            return False
        start, end = _sectors(guest_offset, length)
        if (
            not self._requests.gate_open
            or length > INLINE_LENGTH
            or self._ranges.overlapping(start, end) is not None
        ):
            return False
        if end - start != length:
            widened = self._try_widen(guest_offset, data, start, end)
            if widened is None:
                return False
            data = widened
        view = data if isinstance(data, memoryview) else memoryview(data)
        while start < end:
            part = view[start - end :]
            place = self._in_place_run(start, len(part))
            if place is None:
                written = self._try_allocating(start, part)
                if not written:
                    return False
            else:
                host_offset, written = place
                metadata.check_guest_write(host_offset, written)
                stored = self._ciphering.encrypt(part[:written], start, host_offset)
                if not self._try_pwrite((stored,), host_offset):
                    return False
            start += written
        return True

    def _try_widen(self, guest_offset: int, data: Buffer, start: int, end: int) -> bytearray | None:
        """`data` with the rest of its first and last sector, or None."""
        whole = bytearray(end - start)
        view = memoryview(whole)
        for sector in _cut_sectors(guest_offset, len(data), start, end):
            part = view[sector - start : sector - start + SECTOR]
            if not self._reader.try_read_into(sector, part):
                return None
        view[guest_offset - start : guest_offset - start + len(data)] = data
        return whole

    def _try_edge(self, start: int, end: int, piece: Slice, index: int) -> Edge | None:
        if end - start > INLINE_LENGTH:
            return None
        return super()._try_edge(start, end, piece, index)

    def _arrange(
        self, plan: WritePlan, host_offset: int, head: Edge, data: memoryview, tail: Edge
    ) -> tuple[list[Buffer], int]:
        start = self._start_of(plan, host_offset)
        plain = _join(plan, head, data, tail)
        return [self._ciphering.encrypt(plain, plan.cow_start, start)], start

    def _start_of(self, plan: WritePlan, host_offset: int) -> int:
        """Where on the host the first byte of a plan goes."""
        return host_offset + plan.cow_start - (plan.guest_start & -self._cluster_size)

    # Waiting where it must be

    async def write_entered(self, guest_offset: int, data: Buffer) -> None:
        """As `Writer.write_entered`; the sectors touched are held meanwhile."""
        length = len(data)
        start, end = _sectors(guest_offset, length)
        async with self._ranges.hold(start, end):
            if end - start != length:
                whole = bytearray(end - start)
                view = memoryview(whole)
                for sector in _cut_sectors(guest_offset, length, start, end):
                    part = view[sector - start : sector - start + SECTOR]
                    await self._reader.read_into(sector, part)
                view[guest_offset - start : guest_offset - start + length] = data
                data = whole
            await super().write_entered(start, data)

    async def _write_in_place(self, guest_offset: int, data: memoryview) -> int:
        self._metadata.check_writable()
        await self._metadata.load(self._view, guest_offset)
        token = self._requests.begin()
        try:
            place = self._in_place_run(guest_offset, len(data))
            if place is None:
                return 0
            host_offset, length = place
            self._metadata.check_guest_write(host_offset, length)
            stored = await self._ciphering.encrypt_long(data[:length], guest_offset, host_offset)
            if not self._try_pwrite((stored,), host_offset):
                await self._storage.pwrite((stored,), host_offset)
            return length
        finally:
            self._requests.end(token)

    async def _write_clusters(self, plan: WritePlan, host_offset: int, data: memoryview) -> None:
        head = await self._edge(plan.cow_start, plan.guest_start)
        tail = await self._edge(plan.guest_end, plan.cow_end)
        start = self._start_of(plan, host_offset)
        plain = _join(plan, head, data, tail)
        stored = await self._ciphering.encrypt_long(plain, plan.cow_start, start)
        if not self._try_pwrite((stored,), start):
            await self._storage.pwrite((stored,), start)


def _sectors(guest_offset: int, length: int) -> tuple[int, int]:
    """The range rounded to whole sectors."""
    return guest_offset & -SECTOR, (guest_offset + length + _SECTOR_MASK) & -SECTOR


def _cut_sectors(guest_offset: int, length: int, start: int, end: int) -> list[int]:
    """Where the sectors begin of which the range covers a part: none, one or two of them."""
    cut = []
    if guest_offset > start:
        cut.append(start)
    if guest_offset + length < end and end - SECTOR not in cut:
        cut.append(end - SECTOR)
    return cut


def _join(plan: WritePlan, head: Edge, data: memoryview, tail: Edge) -> Buffer:
    """The guest bytes of a plan in one buffer."""
    part = data[: plan.guest_end - plan.guest_start]
    if not head.length and not tail.length:
        return part
    plain = bytearray(plan.cow_end - plan.cow_start)
    if head.content is not None:
        plain[: head.length] = head.content
    plain[head.length : head.length + len(part)] = part
    if tail.content is not None:
        plain[head.length + len(part) :] = tail.content
    return plain
