"""What the kernel is told beside answers: notifications, and the errno of an exception.

A notification may block until requests that the kernel has in flight are
answered (it waits for locked pages and directories), so it is sent from a
thread of its own small pool, never while a lock is held, and an entry is never
invalidated from inside a handler that holds its directory. It must not know
names, images or formats.
"""

import errno
import fcntl
import logging
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable

import pyfuse3
import trio

from qcowfs.errors import QcowfsError

log = logging.getLogger(__name__)

# Codes and layouts of include/uapi/linux/fuse.h: fuse_out_header with unique 0,
# its error field naming the notification.
_OUT_HEADER = struct.Struct("<IiQ")
_INVALIDATE_INODE = struct.Struct("<Qqq")
_DELETE_ENTRY = struct.Struct("<QQII")
_NOTIFY_INVALIDATE_INODE = 2
_NOTIFY_DELETE_ENTRY = 6
_THREADS = 4
_CLOSE_SECONDS = 5


def to_errno(exception: BaseException) -> int:
    """The errno that a caller is answered; EIO for what nobody expected.

    A QcowfsError has it as a class attribute, an OSError and a FUSEError carry
    their own.
    """
    if isinstance(exception, pyfuse3.FUSEError):
        return exception.errno
    if isinstance(exception, QcowfsError):
        return exception.errno
    if isinstance(exception, OSError):
        return exception.errno or errno.EIO
    if isinstance(exception, MemoryError):
        return errno.ENOMEM
    return errno.EIO


def is_expected(exception: BaseException) -> bool:
    """Whether an exception is an answer; any other is a fault of the program."""
    return isinstance(exception, QcowfsError | OSError | pyfuse3.FUSEError | MemoryError)


class Notifier(ABC):
    """The notifications that the filesystem needs; failures are logged, not raised."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_THREADS)

    @abstractmethod
    async def invalidate_inode(self, inode: int, *, attributes_only: bool = False) -> None:
        """Drop the cached attributes, and the cached bytes, of an inode."""

    @abstractmethod
    async def delete_entry(self, parent_inode: int, name: bytes, inode: int) -> None:
        """Drop a cached name, and tell those who watch it that it is gone."""

    async def aclose(self) -> bool:
        """Send nothing from now on; False when a thread still waits for the kernel."""
        with trio.move_on_after(_CLOSE_SECONDS):
            for _ in range(_THREADS):
                await self._limiter.acquire_on_behalf_of(object())
            return True
        return False

    async def _send(self, send: Callable[[], object], what: str) -> None:
        try:
            await trio.to_thread.run_sync(send, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            # ENOENT: the kernel has nothing cached; the others: no mount any more.
            if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EBADF):
                log.warning("the kernel refused to invalidate %s: %s", what, error)


class SessionKernel(Notifier):
    """Notifications through pyfuse3's own session."""

    async def invalidate_inode(self, inode: int, *, attributes_only: bool = False) -> None:
        """Drop the cached attributes, and the cached bytes, of an inode."""
        await self._send(lambda: pyfuse3.invalidate_inode(inode, attributes_only), f"inode {inode}")

    async def delete_entry(self, parent_inode: int, name: bytes, inode: int) -> None:
        """Drop a cached name, and tell those who watch it that it is gone."""
        await self._send(
            lambda: pyfuse3.invalidate_entry(parent_inode, name, inode), f"the name {name!r}"
        )


class DescriptorKernel(Notifier):
    """Notifications written to a descriptor of /dev/fuse that this process owns.

    The call returns when the kernel has acted, which a message handed to
    another task to be passed on could not tell.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        # A duplicate of its own, so that no late thread can meet a number that
        # was closed and given to another file.
        self._descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)

    async def invalidate_inode(self, inode: int, *, attributes_only: bool = False) -> None:
        """Drop the cached attributes, and the cached bytes, of an inode."""
        first_byte = -1 if attributes_only else 0
        body = _INVALIDATE_INODE.pack(inode, first_byte, 0)
        await self._notify(_NOTIFY_INVALIDATE_INODE, body, f"inode {inode}")

    async def delete_entry(self, parent_inode: int, name: bytes, inode: int) -> None:
        """Drop a cached name, and tell those who watch it that it is gone."""
        body = _DELETE_ENTRY.pack(parent_inode, inode, len(name), 0) + name + b"\0"
        await self._notify(_NOTIFY_DELETE_ENTRY, body, f"the name {name!r}")

    async def aclose(self) -> bool:
        """Give the descriptor back too, unless a thread still waits in it."""
        is_idle = await super().aclose()
        if is_idle:
            os.close(self._descriptor)
        return is_idle

    async def _notify(self, code: int, body: bytes, what: str) -> None:
        message = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, 0) + body
        await self._send(lambda: os.write(self._descriptor, message), what)
