"""A qcow image of version 1 as a Node: assembly only (FORMATS.md 1.2).

Reading is in qcow1_reading, writing in qcow1_writing and qcow1_zeroing, tables
and commits in qcow1_tables. The format has no snapshots, no refcounts and no
dirty mark. Invariants:

- An image is opened for writing only after all its L2 tables were looked at:
  what is cut off, or would let guest data run over tables, stays read-only.
- The node owns its file and its backing node.
"""

from dataclasses import replace
from typing import Any

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.guest_ranges import GuestRanges
from qcowfs.driver.image_base import ImageBase
from qcowfs.driver.layout.qcow1 import CRYPT_AES, MAX_L1_LENGTH, Qcow1Header, resize_field
from qcowfs.driver.node import Buffer, Node
from qcowfs.driver.qcow1_check import require_sound_tables
from qcowfs.driver.qcow1_reading import Qcow1Reader
from qcowfs.driver.qcow1_tables import DEFAULT_CACHE_SIZE, Qcow1Tables, load_l1
from qcowfs.driver.qcow1_writing import Qcow1Writer
from qcowfs.driver.qcow1_zeroing import Qcow1Zeroer
from qcowfs.driver.storage import Storage
from qcowfs.driver.transform.cipher import CbcCipher, SectorCipher
from qcowfs.errors import BadRequest, KeyRequired, UnsupportedFeature

_AES_KEY_LENGTH = 16


class Qcow1Node(ImageBase):
    """A qcow image of version 1; made by `open_qcow1`."""

    format_name = "qcow"

    def __init__(
        self,
        storage: Storage,
        tables: Qcow1Tables,
        path: str,
        backing: Node | None,
        cipher: SectorCipher | None,
    ) -> None:
        header = tables.header
        super().__init__(storage, path, header.disk_size, backing)
        self.cluster_size = header.cluster_size
        self._tables = tables
        self._ranges = GuestRanges()
        self._reader = Qcow1Reader(storage, tables, backing, cipher)
        self._writer = Qcow1Writer(storage, tables, self._reader, self._ranges, cipher)
        self._zeroer = Qcow1Zeroer(
            storage,
            tables,
            self._reader,
            self._writer,
            self._ranges,
            encrypted=cipher is not None,
            hides_backing=backing is None and header.backing_file is not None,
        )

    # Guest bytes

    def try_read(self, guest_offset: int, length: int) -> bytearray | None:
        """The bytes, backing files seen through; None when something must be waited for."""
        data = bytearray(length)
        return data if self.try_read_into(guest_offset, memoryview(data)) else None

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` and answer True, or leave its content undefined and answer False."""
        self.check_range(guest_offset, len(buffer))
        return self._reader.try_read_into(guest_offset, buffer)

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. Raises BadRequest, CorruptImage, OSError."""
        self.check_range(guest_offset, len(buffer))
        await self._reader.read_into(guest_offset, buffer)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """What the range is made of in this layer alone."""
        self.check_range(guest_offset, length)
        return await self._reader.extents(guest_offset, length, limit)

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting, or answer False.

        After False the same bytes are to be written by `write_from`: some of
        them may be written already.
        """
        self.check_change(guest_offset, len(data))
        return self._writer.try_write(guest_offset, data)

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`. Raises ReadOnlyImage, BadRequest, CorruptImage, OSError."""
        self.check_change(guest_offset, len(data))
        await self._commit_if_full()
        await self._writer.write_from(guest_offset, data)

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros; with `unmap`, give its clusters back where possible."""
        self.check_change(guest_offset, length)
        await self._commit_if_full()
        await self._zeroer.zero(guest_offset, length, unmap=unmap, discard=False)

    async def discard(self, guest_offset: int, length: int) -> None:
        """Give back what can be given back; it reads as zeros then, all else stays."""
        self.check_change(guest_offset, length)
        await self._commit_if_full()
        await self._zeroer.zero(guest_offset, length, unmap=True, discard=True)

    async def _commit_if_full(self) -> None:
        if self._tables.pages.is_full:
            await self.commit()

    # Durability

    def _has_changes(self) -> bool:
        return self._tables.has_changes

    async def _commit(self) -> None:
        self.commits += self._tables.has_changes
        await self._tables.commit(self.sync_storage)

    async def grow(self, size: int) -> None:
        """Make the disk `size` bytes long, the new part zeros; the L1 table moves if it must.

        Raises BadRequest for a smaller size or one that is no multiple of 512,
        UnsupportedFeature where a longer backing file would show in the new part.
        """
        self.check_change(0, 0)
        if size < self.virtual_size or size % 512:
            raise BadRequest(f"a disk of {self.virtual_size} bytes cannot grow to {size}")
        if self.backing is not None and self.backing.virtual_size > self.virtual_size:
            raise UnsupportedFeature("the backing file is longer than the disk: it would show")
        if self._tables.header.backing_file is not None and self.backing is None:
            raise UnsupportedFeature("without its backing file the disk cannot grow")
        if size == self.virtual_size:
            return
        async with self._ranges.hold(0, 1 << 63):
            await self.commit()
            async with self._commit_lock:
                await self._grow(size)

    async def _grow(self, size: int) -> None:
        tables = self._tables
        header = replace(tables.header, virtual_size=size)
        if header.l1_size * 8 > MAX_L1_LENGTH:
            raise BadRequest(f"a disk of {size} bytes needs too large an L1 table")
        rest = min(-self.virtual_size % self.cluster_size, size - self.virtual_size)
        if rest:
            last = (await self._reader.extents(self.virtual_size - 1, 1))[0]
            if last.kind is not ExtentKind.UNALLOCATED:
                # What lies behind the old end of the disk in its last cluster must not show.
                await self._writer.write_held(self.virtual_size, memoryview(bytes(rest)))
                await tables.commit(self.sync_storage)
        if header.l1_size > len(tables.l1):
            header = await tables.replace_l1(header, self.sync_storage)
        else:
            await self.sync_storage()
        host_offset, data = resize_field(header)
        await self._storage.pwrite((data,), host_offset)
        await self.sync_storage()
        tables.header = header
        self.virtual_size = header.disk_size

    # What the image is

    def info(self) -> dict[str, Any]:
        """The facts that qemu-img info prints, under its keys."""
        header = self._tables.header
        return self._facts(
            self.cluster_size, header.backing_file, encrypted=header.crypt_method == CRYPT_AES
        )

    def statistics(self) -> dict[str, int]:
        """Counts since the image was opened, and sizes of caches, by name."""
        pages = self._tables.pages
        return {
            "commits": self.commits,
            "allocations": self._writer.allocations,
            "inflated_clusters": self._reader.inflated_count,
            "slice_loads": pages.loads,
            "slices": len(pages.pages),
            "dirty_slices": len(pages.dirty),
        }


async def open_qcow1(
    storage: Storage,
    header: Qcow1Header,
    *,
    path: str,
    backing: Node | None,
    key: bytes | None = None,
    describe_only: bool = False,
    cache_size: int = DEFAULT_CACHE_SIZE,
) -> Qcow1Node:
    """The node of the image in `storage`; it owns `storage` and `backing` on success.

    It is writable when `storage` is. `key` is the passphrase of an encrypted
    image. Nothing in this format tells a right passphrase from a wrong one:
    with a wrong one the disk reads as noise. With `describe_only` no key is
    needed, and the node is good for `info` alone. `cache_size` in bytes bounds
    the tables in memory. Raises KeyRequired, CorruptImage, OSError.
    """
    cipher = None if describe_only else _cipher(header, key)
    l1 = await load_l1(storage, header)
    if not storage.read_only:
        await require_sound_tables(storage, header, l1)
    tables = Qcow1Tables(storage, header, l1, cache_size)
    return Qcow1Node(storage, tables, path, backing, cipher)


def _cipher(header: Qcow1Header, key: bytes | None) -> SectorCipher | None:
    """AES-128: the first 16 bytes of the passphrase, zero padded, are the key."""
    if header.crypt_method != CRYPT_AES:
        return None
    if not key:
        raise KeyRequired("the image is encrypted (AES): its passphrase is needed",
                          hint="--key-file")  # fmt: skip
    return CbcCipher(key[:_AES_KEY_LENGTH].ljust(_AES_KEY_LENGTH, b"\0"))
