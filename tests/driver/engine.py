"""A guest of clusters on top of the metadata engine alone, and judges for what it leaves.

The engine tests need writes that allocate, overwrite and discard, and nothing
of the write path above it: here a guest write is one whole cluster.
"""

import functools
import json
import subprocess
import tempfile
from array import array
from pathlib import Path

from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.layout.mapping import data_entry
from qcowfs.driver.qcow2.metadata import ABSENT, L1View, Metadata, Slice
from qcowfs.driver.storage import Storage

MIB = 1 << 20


@functools.lru_cache(maxsize=64)
def blank_image(
    size: int = 8 * MIB,
    *,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    options: str = "",
    writes: tuple[str, ...] = (),
    snapshots: tuple[str, ...] = (),
) -> bytes:
    """The bytes of an image made by qemu-img, with qemu-io commands run on it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        wanted = f"cluster_size={cluster_size},refcount_bits={refcount_bits}{options}"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", wanted, str(path), str(size))
        for command in writes:
            _run("qemu-io", "-c", command, str(path))
        for name in snapshots:
            _run("qemu-img", "snapshot", "-c", name, str(path))
        return path.read_bytes()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def judge(content: bytes | bytearray) -> tuple[int, int]:
    """(corruptions, leaks) that qemu-img check finds; -1 for an image it cannot check."""
    with tempfile.NamedTemporaryFile(suffix=".qcow2") as file:
        file.write(content)
        file.flush()
        done = subprocess.run(
            ["qemu-img", "check", "-f", "qcow2", "--output=json", file.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode not in {0, 2, 3}:
            return -1, -1
        found = json.loads(done.stdout)
        return found.get("corruptions", 0), found.get("leaks", 0)


async def open_metadata(
    storage: Storage, *, read_only: bool = False, prepared: bool = True, cache_size: int = 32 * MIB
) -> Metadata:
    """The metadata of an image in a storage, ready to be written to if `prepared`."""
    head = await storage.pread(min(storage.size(), 2 * MIB), 0)
    header = parse_header(head, storage.size())
    metadata = await Metadata.open(storage, header, read_only=read_only, cache_size=cache_size)
    if prepared and not read_only:
        await metadata.prepare_writing()
    return metadata


class Guest:
    """Reads and writes whole guest clusters; `index` counts clusters of the disk."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.cluster_size = metadata.geometry.cluster_size
        self.step = metadata.geometry.words_per_entry

    def pattern(self, value: int) -> bytes:
        """A cluster full of one byte value."""
        return bytes([value]) * self.cluster_size

    async def entry(self, index: int, view: L1View | None = None) -> int:
        """The L2 entry of a guest cluster, 0 without a table."""
        metadata = self.metadata
        found = await metadata.load(
            view if view is not None else metadata.active, index * self.cluster_size
        )
        if found is ABSENT:
            return 0
        return found.words[index % metadata.tables.slice_entry_count * self.step]

    async def read(self, index: int, view: L1View | None = None) -> bytes:
        """The bytes of a guest cluster, zeros when unallocated."""
        host_offset = await self.entry(index, view) & OFFSET_MASK
        if not host_offset:
            return bytes(self.cluster_size)
        return bytes(await self.metadata.storage.pread(self.cluster_size, host_offset))

    async def write(self, index: int, value: int, *, after: int | None = None) -> int:
        """Write a cluster out of place; answers its new host offset."""
        metadata = self.metadata
        token = metadata.requests.begin()
        try:
            async with metadata.lock:
                host_offset, _ = await metadata.allocator.allocate(1, after=after)
            await metadata.storage.pwrite([self.pattern(value)], host_offset)
            await self._link(index, data_entry(host_offset))
        finally:
            metadata.requests.end(token)
        return host_offset

    def try_write(self, index: int, value: int, *, after: int | None = None) -> int | None:
        """As `write`, with no waiting; None when it would have to."""
        metadata = self.metadata
        if metadata.try_writable_slice(index * self.cluster_size) is None:
            return None
        place = metadata.allocator.try_allocate(1, after=after)
        if place is None:
            return None
        if not metadata.storage.try_pwrite([self.pattern(value)], place[0]):
            metadata.allocator.drop(place[0], self.cluster_size)
            return None
        piece = metadata.try_writable_slice(index * self.cluster_size)
        assert piece is not None
        self._set(piece, index, data_entry(place[0]))
        return place[0]

    async def discard(self, index: int, *, punch: bool = False) -> None:
        """Unmap a cluster."""
        await self._link(index, 0, punch=punch)

    async def _link(self, index: int, entry: int, *, punch: bool = False) -> None:
        metadata = self.metadata
        async with metadata.lock:
            piece = await metadata.writable_slice(index * self.cluster_size)
            with metadata.changing():
                self._set(piece, index, entry, punch=punch)

    def _set(self, piece: Slice, index: int, entry: int, *, punch: bool = False) -> None:
        metadata = self.metadata
        place = index % metadata.tables.slice_entry_count
        old = piece.words[place * self.step]
        # A whole cluster is data in all subclusters, or not mapped at all.
        words = [entry] if self.step == 1 else [entry, 0xFFFF_FFFF if entry else 0]
        metadata.set_entries(piece, place, array("Q", words))
        if old:
            metadata.release_entry(old, punch=punch)
