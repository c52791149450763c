"""The Node protocol: what every format offers to those above it.

A node is one layer: an image, a snapshot of one, a backing file. Its bytes are
`virtual_size` long. The two `try_` calls never wait: they answer at once or
say that the asynchronous call is needed, which always gives the same result.
A node may say no to anything by raising a QcowfsError or an OSError.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qcowfs.driver.extent import Extent

Buffer = bytes | bytearray | memoryview


@runtime_checkable
class Node(Protocol):
    """One layer of a disk; offsets and lengths in bytes, ranges inside it.

    A range that is not wholly inside `virtual_size` raises BadRequest, but for
    `try_read` callers clip first. Zero-length requests do nothing.
    """

    @property
    def name(self) -> str:
        """The path or label that messages use."""
        ...

    @property
    def format_name(self) -> str:
        """The format's name as qemu-img spells it: qcow2, qcow, cow, raw."""
        ...

    @property
    def virtual_size(self) -> int:
        """The size of the disk that the guest sees."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether a write would be refused (failsafe included)."""
        ...

    @property
    def cluster_size(self) -> int:
        """The unit of allocation; 512 or more."""
        ...

    @property
    def backing(self) -> "Node | None":
        """The node that unallocated ranges show."""
        ...

    def try_read(self, guest_offset: int, length: int) -> bytes | bytearray | memoryview | None:
        """The bytes, backing files seen through; None when something must be waited for."""
        ...

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` and answer True, or leave its content undefined and answer False."""
        ...

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, backing files seen through; ranges beyond them are zeros."""
        ...

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting and answer True, or answer False.

        After False a part of it may be written: `write_from` of the same bytes follows.
        """
        ...

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`; it must not change until the call returns.

        Raises ReadOnlyImage, ImageFull, CorruptImage, OSError of the host.
        """
        ...

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros; with `unmap`, give its clusters back where possible."""
        ...

    async def discard(self, guest_offset: int, length: int) -> None:
        """Say that the range is not needed: it reads as zeros or as it was, never as anything else.

        Whole clusters are given back; a backing file is never revealed.
        """
        ...

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> Sequence[Extent]:
        """What the range is made of in this layer alone, in order and without gaps.

        Neighbours of one kind that continue each other are one extent. With
        `limit`, at most so many extents: then they may end before the range does.
        """
        ...

    async def flush(self) -> None:
        """Make everything acknowledged so far durable."""
        ...

    async def aclose(self) -> None:
        """Flush, release locks and descriptors, of the backing chain too; idempotent."""
        ...
