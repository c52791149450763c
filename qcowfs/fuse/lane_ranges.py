"""FALLOCATE and LSEEK on a node: which mode means which change, and where holes are.

Works on the Node protocol alone; it parses no message and answers none.

Invariants: a range is clipped to the disk before a node sees it; a mode that is
not understood changes nothing; no call here makes a byte read differently,
other than to zero where that was asked.
"""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, NoReturn, Protocol, runtime_checkable

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.mapping_chain import data_or_hole
from qcowfs.driver.node import Node
from qcowfs.errors import QcowfsError
from qcowfs.fuse.files import HotTarget

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10

_REWRITE_LENGTH: Final = 1 << 20

Pause = Callable[[], AbstractAsyncContextManager[None]]
"""Keeps every other change of any node away while it is entered."""


@runtime_checkable
class Allocating(Protocol):
    """A node that can give a range its own clusters without changing what it reads as."""

    async def allocate(self, guest_offset: int, length: int) -> None:
        """Raises ImageFull or the host's OSError when there is no room."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A node whose disk can be made larger."""

    async def grow(self, size: int) -> None:
        """Raises QcowfsError when it cannot be `size` bytes long."""
        ...


def refuse(number: int) -> NoReturn:
    """Raise the OSError of errno `number`."""
    raise OSError(number, os.strerror(number))


async def ensure_length(target: HotTarget, end_offset: int) -> None:
    """Make the disk at least `end_offset` bytes long where the mount allows; ENOSPC elsewhere."""
    node = target.node
    if end_offset <= node.virtual_size:
        return
    if not (target.growable and isinstance(node, Growing)):
        refuse(errno.ENOSPC)
    try:
        await node.grow(-(-end_offset // SECTOR) * SECTOR)
    except QcowfsError:
        # Another request may have made it larger still, which cannot be undone.
        if node.virtual_size < end_offset:
            raise
    target.touch()


async def change_range(
    target: HotTarget, guest_offset: int, length: int, mode: int, pause: Pause
) -> None:
    """What fallocate(2) asks with `mode`; offsets and lengths in bytes.

    Punching frees whole clusters and zeroes the rest; zeroing keeps them;
    neither reveals a backing file. Raises EOPNOTSUPP for other modes, EBADF
    for a handle that may not write, EROFS for a node that may not, EINVAL,
    ENOSPC behind the end of a disk that does not grow, and the node's errors.
    """
    if mode not in _CHANGES:
        refuse(errno.EOPNOTSUPP)
    if not target.writable:
        refuse(errno.EBADF)
    node = target.node
    if node.read_only:
        refuse(errno.EROFS)
    if length <= 0 or guest_offset + length > (1 << 63) - 1:
        refuse(errno.EINVAL if length <= 0 else errno.EFBIG)
    if not mode & KEEP_SIZE:
        await ensure_length(target, guest_offset + length)
    length = min(length, node.virtual_size - guest_offset)
    if length <= 0:
        return
    if mode & PUNCH_HOLE:
        await node.write_zeroes(guest_offset, length, unmap=True)
    elif mode & ZERO_RANGE:
        await node.write_zeroes(guest_offset, length, unmap=False)
    elif isinstance(node, Allocating):
        await node.allocate(guest_offset, length)
    else:
        async with pause():
            await _allocate_by_writing(node, guest_offset, length)
    target.touch()


async def seek(node: Node, guest_offset: int, whence: int) -> int:
    """The next data or hole at or after `guest_offset`, backing chain included.

    ENXIO at and past the end, and when only a hole follows where data was
    asked for; the end itself is a hole. EINVAL for any other `whence`.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        refuse(errno.EINVAL)
    if guest_offset >= node.virtual_size:
        refuse(errno.ENXIO)
    found = await data_or_hole(node, guest_offset, whence == os.SEEK_DATA)
    if found is None:
        refuse(errno.ENXIO)
    return found


async def _allocate_by_writing(node: Node, guest_offset: int, length: int) -> None:
    """Write back what every part without clusters of its own reads as.

    The caller keeps other writers away: between the read and the write of a
    part, bytes of theirs would be lost.
    """
    end_offset = guest_offset + length
    buffer = memoryview(bytearray(min(length, _REWRITE_LENGTH)))
    while guest_offset < end_offset:
        extents = await node.extents(guest_offset, end_offset - guest_offset, limit=64)
        for extent in extents:
            if extent.kind is not ExtentKind.DATA:
                await _write_back(node, extent.guest_offset, extent.length, buffer)
            guest_offset = extent.guest_offset + extent.length


async def _write_back(node: Node, guest_offset: int, length: int, buffer: memoryview) -> None:
    end_offset = guest_offset + length
    while guest_offset < end_offset:
        part = buffer[: min(len(buffer), end_offset - guest_offset)]
        await node.read_into(guest_offset, part)
        await node.write_from(guest_offset, part)
        guest_offset += len(part)


_CHANGES: Final = frozenset(
    {0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE}
)
