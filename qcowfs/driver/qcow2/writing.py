"""Guest writes to the active disk: in place, or allocate, copy on write, link.

Implements ARCHITECTURE's "A write". Tables change through the metadata's calls
alone. Invariants:

- Bytes go in place only where the cluster is the disk's own, and the write
  follows the lookup without an await, or under a generation token.
- New clusters are linked, in memory too, only after their bytes were written.
- Nothing that holds data is overwritten with anything but the data of this
  write; around it only clusters and subclusters that show nothing are filled.
- An Allocation is waited for without the lock, and everything is looked up
  again afterwards. Whatever fails between allocating and linking gives the
  clusters back and wakes those who wait.
"""

from array import array
from contextlib import AbstractAsyncContextManager, nullcontext

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import in_place_extent
from qcowfs.driver.node import Buffer
from qcowfs.driver.qcow2.linking import WritePlan, link, plan_write
from qcowfs.driver.qcow2.metadata import ABSENT, Metadata
from qcowfs.driver.qcow2.reading import ZEROS, Reader
from qcowfs.driver.qcow2.tables import Slice
from qcowfs.errors import BadRequest

# The most bytes around a write that are copied or zeroed without a thread.
_INLINE_EDGE_LENGTH = 128 << 10


class Edge:
    """The bytes of one side of a write: none, known zeros, or content.

    `length` in bytes; `content` is None for zeros.
    """

    __slots__ = ("content", "length")

    def __init__(self, length: int, content: Buffer | None) -> None:
        self.length = length
        self.content = content


_NO_EDGE = Edge(0, None)


class Writer:
    """Writes to the active disk of an image; `reader` is that disk's reader."""

    # Whether zero bytes of the guest are anything but zero bytes of the host.
    is_encrypted = False

    __slots__ = (
        "_cluster_bits",
        "_cluster_mask",
        "_cluster_size",
        "_is_extended",
        "_metadata",
        "_owner",
        "_peek",
        "_plain_mask",
        "_reader",
        "_requests",
        "_slice_coverage",
        "_slice_index_mask",
        "_storage",
        "_try_pwrite",
        "_view",
    )

    def __init__(self, metadata: Metadata, reader: Reader) -> None:
        geometry = metadata.geometry
        self._metadata = metadata
        self._reader = reader
        self._requests = metadata.requests
        self._view = metadata.active
        self._storage = metadata.data_storage
        self._peek = metadata.peek
        self._try_pwrite = metadata.data_storage.try_pwrite
        self._owner = metadata.protected.owner
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._is_extended = geometry.extended_l2
        self._plain_mask = geometry.plain_mask
        self._slice_index_mask = metadata.tables.slice_entry_count - 1
        self._slice_coverage = metadata.tables.slice_entry_count << geometry.cluster_bits

    def check_range(self, guest_offset: int, length: int) -> None:
        """Raise BadRequest for a range outside the disk."""
        if guest_offset < 0 or length < 0 or guest_offset + length > self._view.virtual_size:
            raise BadRequest(
                f"guest range {guest_offset:#x}, {length} bytes, is not inside "
                f"the disk of {self._view.virtual_size} bytes"
            )

    def hold(self, start: int, end: int) -> AbstractAsyncContextManager[None]:
        """Keep writes that must read before they store out of a guest range, for the block.

        Those of encrypted disks alone; taken before the lock.
        """
        return nullcontext()

    async def prepare(self) -> None:
        """What must precede any change; raises ReadOnlyImage, OSError, CorruptImage."""
        if not self._metadata.can_write:
            await self._metadata.prepare_writing()

    # Without waiting

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` and answer True, or answer False.

        After False some of the bytes may be written already; the caller writes
        the same bytes again by `write_from`. Raises as that does.
        """
        length = len(data)
        metadata = self._metadata
        if guest_offset < 0 or guest_offset + length > self._view.virtual_size:
            self.check_range(guest_offset, length)
        if not metadata.can_write:
            metadata.check_writable()
            return False
        if not self._requests.gate_open:
            return False
        in_cluster = guest_offset & self._cluster_mask
        if in_cluster + length <= self._cluster_size:
            piece = self._peek(self._view, guest_offset)
            if piece is not None and piece is not ABSENT:
                index = guest_offset >> self._cluster_bits & self._slice_index_mask
                if self._is_extended:
                    entry = piece.words[2 * index]
                    if not self._reader.shows_data(piece.words[2 * index + 1], in_cluster, length):
                        entry = 0
                else:
                    entry = piece.words[index]
                if entry > OFLAG_COPIED and not entry & self._plain_mask:
                    host_offset = entry & OFFSET_MASK
                    if self._owner(host_offset >> self._cluster_bits) is not None:
                        metadata.check_guest_write(host_offset, length)
                    return self._try_pwrite((data,), host_offset + in_cluster)
        view = data if isinstance(data, memoryview) else memoryview(data)
        end = guest_offset + length
        while guest_offset < end:
            part = view[guest_offset - end :]
            place = self._in_place_run(guest_offset, len(part))
            if place is not None:
                host_offset, written = place
                metadata.check_guest_write(host_offset, written)
                if not self._try_pwrite((part[:written],), host_offset):
                    return False
            else:
                written = self._try_allocating(guest_offset, part)
                if not written:
                    return False
            guest_offset += written
        return True

    def _in_place_run(self, guest_offset: int, length: int) -> tuple[int, int] | None:
        """(host offset, length) of what may be overwritten at `guest_offset`, or None.

        None also when that is not known without waiting.
        """
        piece = self._metadata.load_now(self._view, guest_offset)
        if piece is None or piece is ABSENT:
            return None
        extent = in_place_extent(
            piece.words,
            guest_offset >> self._cluster_bits & self._slice_index_mask,
            guest_offset,
            self._length_in_slice(guest_offset, length),
            self._metadata.geometry,
        )
        if extent is None:
            return None
        assert extent.host_offset is not None
        return extent.host_offset, extent.length

    def _length_in_slice(self, guest_offset: int, length: int) -> int:
        coverage = self._slice_coverage
        return min(length, coverage - (guest_offset & coverage - 1))

    def _try_allocating(self, guest_offset: int, data: memoryview) -> int:
        """Write the run at `guest_offset` to clusters that it needs; how many bytes, or 0."""
        metadata = self._metadata
        length = self._length_in_slice(guest_offset, len(data))
        if metadata.lock.locked() or not self._is_free(guest_offset, length):
            return 0
        piece = metadata.try_writable_slice(guest_offset)
        if piece is None:
            return 0
        index = guest_offset >> self._cluster_bits & self._slice_index_mask
        plan = plan_write(
            piece.words, index, guest_offset, guest_offset + length, metadata.geometry
        )
        head = self._try_edge(plan.cow_start, plan.guest_start, piece, index)
        last_index = index + plan.cluster_count - 1
        tail = self._try_edge(plan.guest_end, plan.cow_end, piece, last_index)
        if head is None or tail is None:
            return 0
        host_offset = plan.host_offset
        if host_offset is None:
            after = self._end_before(piece.words, index)
            place = metadata.allocator.try_allocate(plan.cluster_count, after=after)
            if place is None:
                return 0
            host_offset = place[0]
            if place[1] < plan.cluster_count:
                plan = plan.shortened(place[1], metadata.geometry)
                tail = _NO_EDGE
        else:
            metadata.check_guest_write(host_offset, plan.cluster_count << self._cluster_bits)
        linked = False
        try:
            buffers, start = self._arrange(plan, host_offset, head, data, tail)
            # Reading an edge may have pushed the slice out of the cache.
            if self._try_pwrite(buffers, start) and (
                not (head.content or tail.content)
                or (piece := metadata.try_writable_slice(guest_offset)) is not None
            ):
                link(metadata, piece, plan, host_offset)
                linked = True
        finally:
            if not linked and plan.host_offset is None:
                metadata.allocator.drop(host_offset, plan.cluster_count << self._cluster_bits)
        return plan.guest_end - plan.guest_start if linked else 0

    def _is_free(self, guest_offset: int, length: int) -> bool:
        """Whether no Allocation in flight touches the clusters of a range."""
        if not self._requests.allocations:
            return True
        start, end = self._clusters(guest_offset, length)
        return self._requests.overlapping(start, end - start) is None

    def _clusters(self, guest_offset: int, length: int) -> tuple[int, int]:
        """The guest range rounded to whole clusters."""
        size = self._cluster_size
        return guest_offset & -size, (guest_offset + length + size - 1) & -size

    def _end_before(self, words: "array[int]", index: int) -> int | None:
        """Where the host cluster of the entry before `index` ends: the best place to go on."""
        if not index or self._is_extended:
            return None
        entry = words[index - 1]
        if entry & self._plain_mask or not entry & OFFSET_MASK:
            return None
        return (entry & OFFSET_MASK) + self._cluster_size

    def _try_edge(self, start: int, end: int, piece: Slice, index: int) -> Edge | None:
        """The guest bytes [start, end), of the cluster at `index`; None: not without waiting."""
        if start == end:
            return _NO_EDGE
        if not self._is_extended and self._reader.is_zero_entry(piece.words[index], start):
            return Edge(end - start, None)
        inside = min(end, self._view.virtual_size)
        if inside <= start:
            return Edge(end - start, None)
        if end - start > _INLINE_EDGE_LENGTH:
            return None
        content = bytearray(end - start)
        if not self._reader.try_read_into(start, memoryview(content)[: inside - start]):
            return None
        return Edge(end - start, content)

    def _arrange(
        self, plan: WritePlan, host_offset: int, head: Edge, data: memoryview, tail: Edge
    ) -> tuple[list[Buffer], int]:
        """The buffers of one write for a plan, and the host offset where they go.

        Zeros are left out where the host cluster was never written: beyond the
        end of the file is nothing but zeros.
        """
        start = host_offset + plan.cow_start - (plan.guest_start & -self._cluster_size)
        buffers: list[Buffer] = [data[: plan.guest_end - plan.guest_start]]
        if not head.length and not tail.length:
            return buffers, start
        untouched = plan.host_offset is None and host_offset >= self._storage.size()
        if head.content is not None:
            buffers.insert(0, head.content)
        elif untouched:
            start += head.length
        elif head.length:
            buffers[:0] = _zeros(head.length)
        if tail.content is not None:
            buffers.append(tail.content)
        elif tail.length and not untouched:
            buffers.extend(_zeros(tail.length))
        return buffers, start

    # Waiting where it must be

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`.

        Raises BadRequest, ReadOnlyImage, ImageFull, CorruptImage, OSError.
        """
        self.check_range(guest_offset, len(data))
        await self.prepare()
        await self._requests.enter_write()
        try:
            await self.write_entered(guest_offset, data)
        finally:
            self._requests.leave_write()

    async def write_entered(self, guest_offset: int, data: Buffer) -> None:
        """As `write_from`, by a caller that has entered the gate and checked the range."""
        view = memoryview(data)
        end = guest_offset + len(data)
        while guest_offset < end:
            part = view[guest_offset - end :]
            written = await self._write_in_place(guest_offset, part)
            if not written:
                written = await self._write_allocating(guest_offset, part)
            guest_offset += written

    async def _write_in_place(self, guest_offset: int, data: memoryview) -> int:
        self._metadata.check_writable()
        await self._metadata.load(self._view, guest_offset)
        # Taken before the lookup: the write may have to wait.
        token = self._requests.begin()
        try:
            place = self._in_place_run(guest_offset, len(data))
            if place is None:
                return 0
            host_offset, length = place
            self._metadata.check_guest_write(host_offset, length)
            if not self._try_pwrite((data[:length],), host_offset):
                await self._storage.pwrite((data[:length],), host_offset)
            return length
        finally:
            self._requests.end(token)

    async def _write_allocating(self, guest_offset: int, data: memoryview) -> int:
        """Allocate, copy on write, link; how many bytes were written.

        0 when things changed while waiting, so that all must be looked up again.
        """
        metadata = self._metadata
        requests = self._requests
        length = self._length_in_slice(guest_offset, len(data))
        start, end = self._clusters(guest_offset, length)
        await requests.wait_overlapping(start, end - start)
        async with metadata.lock:
            if requests.overlapping(start, end - start) is not None:
                return 0
            piece = await metadata.writable_slice(guest_offset)
            if self._in_place_run(guest_offset, length) is not None:
                return 0
            index = guest_offset >> self._cluster_bits & self._slice_index_mask
            plan = plan_write(
                piece.words, index, guest_offset, guest_offset + length, metadata.geometry
            )
            host_offset = plan.host_offset
            if host_offset is None:
                host_offset, count = await metadata.allocator.allocate(
                    plan.cluster_count, after=self._end_before(piece.words, index)
                )
                plan = plan.shortened(count, metadata.geometry)
            else:
                metadata.check_guest_write(host_offset, plan.cluster_count << self._cluster_bits)
            end = start + (plan.cluster_count << self._cluster_bits)
            allocation = requests.register(start, end)
        token = requests.begin()
        linked = False
        try:
            await self._write_clusters(plan, host_offset, data)
            async with metadata.lock:
                piece = await metadata.writable_slice(guest_offset)
                link(metadata, piece, plan, host_offset)
                linked = True
        finally:
            requests.end(token)
            if not linked and plan.host_offset is None:
                metadata.allocator.drop(host_offset, plan.cluster_count << self._cluster_bits)
            requests.finish(allocation)
        return plan.guest_end - plan.guest_start

    async def _write_clusters(self, plan: WritePlan, host_offset: int, data: memoryview) -> None:
        """The bytes of a plan, with what comes along, to their host clusters."""
        head = await self._edge(plan.cow_start, plan.guest_start)
        tail = await self._edge(plan.guest_end, plan.cow_end)
        buffers, start = self._arrange(plan, host_offset, head, data, tail)
        if not self._try_pwrite(buffers, start):
            await self._storage.pwrite(buffers, start)

    async def _edge(self, start: int, end: int) -> Edge:
        """The guest bytes [start, end) as they are now; zeros beyond the disk's end."""
        if start == end:
            return _NO_EDGE
        inside = min(end, self._view.virtual_size)
        if inside <= start:
            return Edge(end - start, None)
        extents = await self._reader.extents(start, inside - start)
        if self._reader.is_zero(extents):
            return Edge(end - start, None)
        content = bytearray(end - start)
        await self._reader.read_into(start, memoryview(content)[: inside - start])
        return Edge(end - start, content)


def _zeros(length: int) -> list[Buffer]:
    """Buffers of `length` zero bytes together; clusters are no longer than one of them."""
    return [ZEROS[:length]]
