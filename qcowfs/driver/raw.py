"""A raw image as a Node: guest bytes lie at the same offset of the host file.

There is no metadata, so nothing here can be inconsistent: host errors pass to
the caller unchanged. What may go wrong for good is a sync; after a failed one
the node is read-only (failsafe). The module knows no other format.

Invariants: `virtual_size` is the exact length of the file when it was opened
(or grown by `grow`), not rounded to sectors; no write goes past it.
"""

import logging
from typing import Any

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.node import Buffer
from qcowfs.driver.storage import Storage
from qcowfs.errors import BadRequest, ReadOnlyImage

logger = logging.getLogger(__name__)

# The host frees and tracks room in pages; smaller discards leave nothing behind.
_PAGE = 4096


class RawNode:
    """A raw image over `storage`, which the node owns from now on and closes."""

    format_name = "raw"
    cluster_size = _PAGE
    backing = None

    def __init__(self, storage: Storage, *, path: str | None = None) -> None:
        self._storage = storage
        self.name = storage.name if path is None else path
        self.virtual_size = storage.size()
        self.failsafe: str | None = None
        self._closed = False

    @property
    def read_only(self) -> bool:
        """Whether a write would be refused: opened so, or failsafe."""
        return self.failsafe is not None or self._storage.read_only

    def enter_failsafe(self, reason: str) -> None:
        """Refuse every later change, with one log record; the first reason stays."""
        if self.failsafe is None:
            self.failsafe = reason
            logger.error("%s is read-only from now on: %s", self.name, reason)

    # Reading

    def try_read(self, guest_offset: int, length: int) -> bytearray | None:
        """The bytes if the host has them in memory; None otherwise."""
        data = bytearray(length)
        if self._storage.try_pread_into((memoryview(data),), guest_offset):
            return data
        return None

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if the host has the bytes in memory."""
        self._check_range(guest_offset, len(buffer))
        return self._storage.try_pread_into((buffer,), guest_offset)

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; raises BadRequest out of range, OSError of the host."""
        self._check_range(guest_offset, len(buffer))
        await self._storage.pread_into((buffer,), guest_offset)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """Data and holes as the host tells them; a hole is ZERO without a host offset."""
        self._check_range(guest_offset, length)
        return [
            Extent(ExtentKind.DATA, start, run_length, start)
            if is_data
            else Extent(ExtentKind.ZERO, start, run_length)
            for is_data, start, run_length in self._storage.data_runs(
                guest_offset, length, limit=limit
            )
        ]

    # Changing

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` at once; False where the storage cannot."""
        self._check_writable(guest_offset, len(data))
        return self._storage.try_pwrite((data,), guest_offset)

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`; raises ReadOnlyImage, BadRequest, OSError of the host."""
        self._check_writable(guest_offset, len(data))
        await self._storage.pwrite((data,), guest_offset)

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros; with `unmap`, as a hole where the host has holes."""
        self._check_writable(guest_offset, length)
        if length and not (unmap and await self._storage.punch(guest_offset, length)):
            await self._storage.write_zeroes(guest_offset, length)

    async def discard(self, guest_offset: int, length: int) -> None:
        """Give the range back to the host; it stays as it was where the host cannot."""
        self._check_writable(guest_offset, length)
        if length:
            await self._storage.punch(guest_offset, length)

    async def allocate(self, guest_offset: int, length: int) -> None:
        """Reserve room for the range on the host; what it reads as stays."""
        self._check_writable(guest_offset, length)
        await self._storage.allocate(guest_offset, length)

    async def grow(self, size: int) -> None:
        """Make the disk `size` bytes long, the new part zeros; a smaller size is refused."""
        self._check_writable(0, 0)
        if size < self.virtual_size:
            raise BadRequest(f"a disk of {self.virtual_size} bytes cannot grow to {size}")
        if size > self.virtual_size:
            await self._storage.truncate(size)
            self.virtual_size = size

    # Durability and the end

    async def flush(self) -> None:
        """Make everything acknowledged durable; a failure makes the node read-only."""
        if self.read_only:
            self._check_failsafe()
            return
        try:
            await self._storage.sync()
        except OSError as error:
            self.enter_failsafe(f"its file could not be synced: {error.strerror}")
            raise

    async def aclose(self) -> None:
        """Flush and close; a failed flush is raised once all is closed. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only:
                await self.flush()
        finally:
            await self._storage.aclose()

    def info(self) -> dict[str, Any]:
        """The facts that qemu-img info prints, under its keys."""
        return {
            "virtual-size": self.virtual_size,
            "filename": self.name,
            "format": self.format_name,
            "actual-size": self._storage.allocated_bytes(),
            "dirty-flag": False,
        }

    def _check_range(self, guest_offset: int, length: int) -> None:
        if guest_offset < 0 or length < 0 or guest_offset + length > self.virtual_size:
            raise BadRequest(
                f"{length} bytes at {guest_offset:#x} are not inside the disk of "
                f"{self.virtual_size} bytes"
            )

    def _check_writable(self, guest_offset: int, length: int) -> None:
        if self.failsafe is not None or self._storage.read_only:
            self._check_failsafe()
            raise ReadOnlyImage("the image is open for reading alone")
        self._check_range(guest_offset, length)

    def _check_failsafe(self) -> None:
        if self.failsafe is not None:
            raise ReadOnlyImage(f"the image is read-only since an error: {self.failsafe}")
