"""Guest bytes of one disk of an image: from L2 slices to extents to buffers.

Implements reads as ARCHITECTURE's "A read". A `Reader` belongs to one L1 table
(the active one or a snapshot's). It changes no table. Invariants:

- The fast calls (`try_`) and the slow ones use one classifier, so they differ
  only in what they wait for.
- A host offset is used in the same step as it was looked up, or under a
  generation token.
- A damaged entry or stream fails the requests that touch it and no others.
- Layers of a backing chain are walked by a loop, whatever their number.
"""

from collections.abc import Awaitable, Callable
from functools import partial

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.layout.mapping import (
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    append_extent,
    classify,
)
from qcowfs.driver.node import Node
from qcowfs.driver.qcow2.inflating import Inflater, Piece
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import ABSENT, Absence, Metadata
from qcowfs.driver.qcow2.parallel import run_all
from qcowfs.driver.qcow2.tables import Slice
from qcowfs.errors import BadRequest

# Runs of one request that are not in the host's cache are fetched so many at a time.
_FETCH_COUNT = 8

_DATA = ExtentKind.DATA
_ZERO = ExtentKind.ZERO
_COMPRESSED = ExtentKind.COMPRESSED
_UNALLOCATED = ExtentKind.UNALLOCATED

# Never written to, so the kernel backs it with its one page of zeros.
ZEROS = memoryview(bytes(2 << 20))

# A part of a request, still to be filled: (guest_offset, buffer).
Part = tuple[int, memoryview]


def fill_zeros(buffer: memoryview) -> None:
    """Zero the whole buffer."""
    length = len(buffer)
    if length <= len(ZEROS):
        buffer[:] = ZEROS[:length]
    else:
        buffer[:] = bytes(length)


class Reader:
    """Reads one disk of an image; `backing_reader` is the backing node's own, if it has one."""

    __slots__ = (
        "_backing",
        "_backing_reader",
        "_backing_size",
        "_cluster_bits",
        "_cluster_mask",
        "_cluster_size",
        "_inflater",
        "_is_extended",
        "_metadata",
        "_peek",
        "_plain_mask",
        "_slice_coverage",
        "_slice_index_mask",
        "_storage",
        "_subcluster_bits",
        "_try_pread_into",
        "view",
    )

    def __init__(
        self,
        metadata: Metadata,
        view: L1View,
        inflater: Inflater,
        backing: Node | None,
        backing_reader: "Reader | None",
    ) -> None:
        geometry = metadata.geometry
        self.view = view
        self._metadata = metadata
        self._inflater = inflater
        self._backing = backing
        self._backing_reader = backing_reader
        self._backing_size = backing.virtual_size if backing is not None else 0
        self._storage = metadata.data_storage
        self._peek = metadata.peek
        self._try_pread_into = metadata.data_storage.try_pread_into
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._is_extended = geometry.extended_l2
        self._subcluster_bits = geometry.subcluster_bits
        self._plain_mask = geometry.plain_mask
        self._slice_index_mask = metadata.tables.slice_entry_count - 1
        self._slice_coverage = metadata.tables.slice_entry_count << geometry.cluster_bits

    # Without waiting

    def try_read(self, guest_offset: int, length: int) -> bytearray | memoryview | None:
        """The bytes of a range inside the disk, or None when something must be waited for."""
        content = bytearray(length)
        if self.try_read_into(guest_offset, memoryview(content)):
            return content
        return None

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` from `guest_offset` on and answer True, or answer False."""
        length = len(buffer)
        if guest_offset < 0 or guest_offset + length > self.view.virtual_size:
            raise self._outside(guest_offset, length)
        reader = self
        while True:
            in_cluster = guest_offset & reader._cluster_mask
            if in_cluster + length > reader._cluster_size:
                return reader._try_parts([(guest_offset, buffer)])
            piece = reader._peek(reader.view, guest_offset)
            if piece is None:
                piece = reader._metadata.load_now(reader.view, guest_offset)
                if piece is None:
                    return False
            if piece is not ABSENT:
                index = guest_offset >> reader._cluster_bits & reader._slice_index_mask
                if reader._is_extended:
                    entry = piece.words[2 * index]
                    bitmap = piece.words[2 * index + 1]
                    if (entry or bitmap) and not reader.shows_data(bitmap, in_cluster, length):
                        return reader._try_parts([(guest_offset, buffer)])
                else:
                    entry = piece.words[index]
                if entry & reader._plain_mask:
                    return reader._try_parts([(guest_offset, buffer)])
                host_offset = entry & OFFSET_MASK
                if host_offset:
                    return reader._try_pread_into((buffer,), host_offset + in_cluster)
            if guest_offset >= reader._backing_size:
                fill_zeros(buffer)
                return True
            backing_reader = reader._backing_reader
            if backing_reader is None or guest_offset + length > reader._backing_size:
                return reader._try_parts([(guest_offset, buffer)])
            reader = backing_reader

    def _try_parts(self, parts: list[Part]) -> bool:
        """Fill all parts, layer by layer."""
        reader = self
        while True:
            holes: list[Part] = []
            for guest_offset, buffer in parts:
                extents = reader.try_extents(guest_offset, len(buffer))
                if extents is None:
                    return False
                if not reader._try_serve(extents, guest_offset, buffer, holes):
                    return False
            if not holes:
                return True
            if reader._backing_reader is None:
                backing = reader._backing
                assert backing is not None
                return all(backing.try_read_into(start, part) for start, part in holes)
            reader = reader._backing_reader
            parts = holes

    def _try_serve(
        self, extents: list[Extent], guest_offset: int, buffer: memoryview, holes: list[Part]
    ) -> bool:
        """Fill what this layer has; what the next one has is added to `holes`."""
        alone = len(extents) == 1
        for kind, extent_start, length, host_offset, stored_length in extents:
            start = extent_start - guest_offset
            part = buffer if alone else buffer[start : start + length]
            if kind is _DATA:
                assert host_offset is not None
                if not self._try_pread_into((part,), host_offset):
                    return False
            elif kind is _UNALLOCATED:
                self._add_hole(extent_start, part, holes)
            elif kind is _ZERO:
                fill_zeros(part)
            else:
                assert host_offset is not None
                piece = Piece(host_offset, stored_length, extent_start & self._cluster_mask, part)
                if not self._inflater.try_fill(piece, alone=alone):
                    return False
        return True

    def _add_hole(self, guest_offset: int, part: memoryview, holes: list[Part]) -> None:
        """Leave a part to the backing node; what lies past its end is zeros."""
        inside = self._backing_size - guest_offset
        if inside < len(part):
            if inside <= 0:
                fill_zeros(part)
                return
            fill_zeros(part[inside:])
            part = part[:inside]
        holes.append((guest_offset, part))

    def try_extents(self, guest_offset: int, length: int) -> list[Extent] | None:
        """What a range inside the disk is made of in this layer, or None."""
        extents: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end:
            piece = self._metadata.load_now(self.view, guest_offset)
            if piece is None:
                return None
            guest_offset = self._append(extents, piece, guest_offset, end)
        return extents

    def _append(
        self, extents: list[Extent], piece: Slice | Absence, guest_offset: int, end: int
    ) -> int:
        """Classify [guest_offset, end) as far as `piece` tells; the offset reached."""
        if piece is ABSENT:
            coverage = self.view.geometry.l2_coverage
            end = min(end, (guest_offset | coverage - 1) + 1)
            append_extent(extents, Extent(_UNALLOCATED, guest_offset, end - guest_offset))
            return end
        end = min(end, (guest_offset | self._slice_coverage - 1) + 1)
        index = guest_offset >> self._cluster_bits & self._slice_index_mask
        found = classify(
            piece.words, index, guest_offset, end - guest_offset, self._metadata.geometry
        )
        if extents:
            append_extent(extents, found[0])
            extents.extend(found[1:])
        else:
            extents.extend(found)
        return end

    # Waiting where it must be

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `guest_offset` on. Raises CorruptImage, OSError, BadRequest."""
        length = len(buffer)
        if guest_offset < 0 or guest_offset + length > self.view.virtual_size:
            raise self._outside(guest_offset, length)
        reader = self
        parts = [(guest_offset, buffer)]
        while parts:
            holes: list[Part] = []
            await reader._read_parts(parts, holes)
            parts = holes
            if holes and reader._backing_reader is None:
                backing = reader._backing
                assert backing is not None
                jobs = [partial(backing.read_into, start, part) for start, part in holes]
                await run_all(jobs, _FETCH_COUNT)
                return
            if reader._backing_reader is not None:
                reader = reader._backing_reader

    async def _read_parts(self, parts: list[Part], holes: list[Part]) -> None:
        """Fill what this layer has of all parts; what the next one has goes into `holes`."""
        requests = self._metadata.requests
        token = requests.begin()
        try:
            jobs: list[Callable[[], Awaitable[None]]] = []
            pieces: list[Piece] = []
            for guest_offset, buffer in parts:
                extents = await self.extents(guest_offset, len(buffer))
                self._plan(extents, guest_offset, buffer, holes, jobs, pieces)
            if pieces:
                jobs.append(partial(self._inflater.fill, pieces))
            if jobs:
                await run_all(jobs, _FETCH_COUNT)
        finally:
            requests.end(token)

    def _plan(
        self,
        extents: list[Extent],
        guest_offset: int,
        buffer: memoryview,
        holes: list[Part],
        jobs: list[Callable[[], Awaitable[None]]],
        pieces: list[Piece],
    ) -> None:
        """Fill what can be filled at once and list what has to be waited for."""
        for kind, extent_start, length, host_offset, stored_length in extents:
            start = extent_start - guest_offset
            part = buffer[start : start + length]
            if kind is _DATA:
                assert host_offset is not None
                if not self._try_pread_into((part,), host_offset):
                    jobs.append(partial(self._storage.pread_into, (part,), host_offset))
            elif kind is _UNALLOCATED:
                self._add_hole(extent_start, part, holes)
            elif kind is _ZERO:
                fill_zeros(part)
            else:
                assert host_offset is not None
                pieces.append(
                    Piece(host_offset, stored_length, extent_start & self._cluster_mask, part)
                )

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """What a range inside the disk is made of in this layer; at most `limit` extents.

        Host offsets in the answer stay true only under a token taken before.
        """
        extents: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end:
            piece = await self._metadata.load(self.view, guest_offset)
            guest_offset = self._append(extents, piece, guest_offset, end)
            # One more than asked for, since the last one may go on in the next slice.
            if limit is not None and len(extents) > limit:
                return extents[:limit]
        return extents

    async def checked_extents(
        self, guest_offset: int, length: int, limit: int | None
    ) -> list[Extent]:
        """As `extents`, for callers above the node. Raises BadRequest for a range outside."""
        if guest_offset < 0 or length < 0 or guest_offset + length > self.view.virtual_size:
            raise self._outside(guest_offset, length)
        # A table that goes away meanwhile must not become another's while it is read.
        token = self._metadata.requests.begin()
        try:
            return await self.extents(guest_offset, length, limit=limit)
        finally:
            self._metadata.requests.end(token)

    def is_zero(self, extents: list[Extent]) -> bool:
        """Whether extents of this layer are known to read as zeros, whatever lies behind it."""
        return all(
            extent.kind is _ZERO
            or (extent.kind is _UNALLOCATED and extent.guest_offset >= self._backing_size)
            for extent in extents
        )

    def shows_data(self, bitmap: int, in_cluster: int, length: int) -> bool:
        """Whether a valid bitmap says of all subclusters of a range that they are allocated.

        For a range inside one cluster of an extended L2 entry with a plain host offset.
        """
        if not length or bitmap >> 32 & bitmap:
            return False
        bits = self._subcluster_bits
        wanted = (2 << (in_cluster + length - 1 >> bits)) - (1 << (in_cluster >> bits))
        return bitmap & wanted == wanted

    def is_zero_entry(self, entry: int, guest_offset: int) -> bool:
        """Whether a cluster of a standard L2 entry is known to read as zeros.

        At `guest_offset` and after it, that is.
        """
        if not entry:
            return guest_offset >= self._backing_size
        return entry & (OFLAG_ZERO | OFLAG_COMPRESSED) == OFLAG_ZERO

    @property
    def backing_size(self) -> int:
        """The length of what unallocated clusters show, in bytes; 0 without a backing node."""
        return self._backing_size

    def _outside(self, guest_offset: int, length: int) -> BadRequest:
        return BadRequest(
            f"guest range {guest_offset:#x}, {length} bytes, is not inside "
            f"the disk of {self.view.virtual_size} bytes"
        )
