"""Making the active disk larger.

Implements docs/interop/qcow2, "Header" (size) and "Cluster mapping" (L1) for
growth; under a closed write gate. May not: write guest data. The order: an L1
that covers the new size and shows nothing behind the old end, then whatever
else lies there is hidden by the caller, then the size. Each step is durable
before the next one, so a disk that has grown never shows what it had not.
"""

from array import array
from collections.abc import Awaitable, Callable

from qcowfs.driver.layout.geometry import MAX_L1_LENGTH, SECTOR
from qcowfs.driver.layout.mapping import ALL_ALLOCATED, data_entry
from qcowfs.driver.qcow2 import references
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import BadRequest, ImageFull, UnsupportedFeature


async def grow(
    metadata: Metadata, virtual_size: int, hide: Callable[[int, int], Awaitable[None]]
) -> None:
    """Give the active disk `virtual_size` bytes, rounded up to 512; durable on return.

    `hide` is called with the gate closed and the lock free, to make the guest
    range [old end, new end) read as zeros in what the L1 does not tell.

    Raises BadRequest for less than it has, ImageFull where the L1 table would
    be over its limit, UnsupportedFeature for a version 2 image with snapshots
    (which could not say their own size), ReadOnlyImage, OSError; the disk then
    has its old size.
    """
    virtual_size = -(-virtual_size // SECTOR) * SECTOR
    await metadata.prepare_writing()
    async with metadata.requests.close_gate():
        async with metadata.lock:
            metadata.check_writable()
            old_size = metadata.geometry.virtual_size
            _check_size(metadata, virtual_size)
            if virtual_size == old_size:
                return
            await _cover(metadata, virtual_size)
        if metadata.geometry.has_data_file and metadata.data_storage.size() < virtual_size:
            await metadata.data_storage.truncate(virtual_size)
        await hide(old_size, virtual_size)
        async with metadata.lock:
            await metadata.set_virtual_size(virtual_size)


async def map_data_file(metadata: Metadata, start: int, end: int) -> None:
    """Let [start, end) show the raw data file, which reads as zeros there; durable on return.

    So that a change of that file by itself is seen, as everywhere before
    `start`. Takes the lock slice by slice. Raises ReadOnlyImage, ImageFull,
    OSError.
    """
    geometry = metadata.geometry
    step = geometry.words_per_entry
    coverage = metadata.tables.slice_entry_count << geometry.cluster_bits
    start = geometry.round_down(start)
    while start < end:
        stop = min(geometry.round_up(end), (start | coverage - 1) + 1)
        if not await metadata.requests.wait_overlapping(start, stop - start):
            async with metadata.lock:
                if metadata.requests.overlapping(start, stop - start) is None:
                    piece = await metadata.writable_slice(start)
                    index = start >> geometry.cluster_bits & metadata.tables.slice_entry_count - 1
                    count = stop - start >> geometry.cluster_bits
                    words = piece.words[index * step : (index + count) * step]
                    for number in range(count):
                        if not words[number * step]:
                            place = start + (number << geometry.cluster_bits)
                            words[number * step] = data_entry(place)
                            if geometry.extended_l2:
                                words[2 * number + 1] = ALL_ALLOCATED
                    metadata.set_entries(piece, index, words)
                    start = stop
    await metadata.flush()


def _check_size(metadata: Metadata, virtual_size: int) -> None:
    geometry = metadata.geometry
    if virtual_size < geometry.virtual_size:
        raise BadRequest(f"the disk has {geometry.virtual_size} bytes, {virtual_size} are fewer")
    if metadata.header.version < 3 and metadata.header.nb_snapshots:
        raise UnsupportedFeature("a version 2 image with snapshots cannot be resized")
    l1_size = geometry.l1_count(virtual_size)
    if l1_size * 8 > MAX_L1_LENGTH:
        raise ImageFull(
            f"{virtual_size} bytes need an L1 table of {l1_size} entries, at most "
            f"{MAX_L1_LENGTH // 8} are allowed with these clusters"
        )


async def _cover(metadata: Metadata, virtual_size: int) -> None:
    """Let the L1 cover the new size, with no table behind the old end; lock held.

    Tables may lie there: the VM state of a snapshot that was applied.
    """
    geometry = metadata.geometry
    words = array("Q", metadata.active.words)
    first, end = geometry.l1_count(geometry.virtual_size), geometry.l1_count(virtual_size)
    stale = words[first:end]
    if not any(stale) and len(words) >= end:
        return
    words[first:end] = array("Q", bytes(8 * (end - first)))
    await metadata.switch_active_l1(words)
    if any(stale):
        hidden = array("Q", bytes(8 * first)) + stale
        view = L1View(hidden, metadata.active.table_offset, geometry, writable=False)
        await references.lower_all(metadata, view, "what lay behind the end of the disk")
