"""Host files: the only place where descriptors of images are owned and used.

`Storage` is the seam between an image format and the bytes it lies on;
`HostFile` is a regular file or a block device of this machine. Nothing here
knows clusters or formats. Invariants:

- Offsets are host offsets in bytes. Reads past the end of the file give zeros.
- The `try_` calls never wait for a device: reads pass RWF_NOWAIT (but on a
  tmpfs, which has none to wait for), writes go into the page cache. Whatever
  has to wait does so in a thread.
- A transfer is complete or it raises: short transfers are continued, EINTR is
  retried. An OSError keeps the errno of the host.
- After a failed sync every later sync of the same object fails too, since the
  kernel reports a lost write only once.
- Locks are taken before the first byte is read and end with the descriptor.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from os import preadv as _preadv
from os import pwritev as _pwritev
from typing import NamedTuple, Protocol, TypeVar, TypeVarTuple

import trio

from qcowfs.driver import locking
from qcowfs.driver.hostcalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    IOV_MAX,
    UNSUPPORTED,
    Buffer,
    fallocate,
    lives_in_memory,
    open_checked,
    open_or_create,
    read_all,
    require_image_file,
    run_at,
    skip,
)
from qcowfs.driver.locking import LockRole
from qcowfs.errors import BadRequest, ReadOnlyImage

__all__ = ["Buffer", "DataRun", "HostFile", "LockRole", "Storage"]

# Zeros are written in pieces of this many bytes where the host cannot make them itself.
_ZERO_CHUNK = 1 << 20
# Up to this length, writing zeros costs less than a thread and a fallocate.
_INLINE_ZEROES = 1 << 16
# A longer write is copied into the page cache by a thread, so that others go on meanwhile.
_INLINE_WRITE = 4 << 20


_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class DataRun(NamedTuple):
    """A run of host bytes that is data, or a hole (reads as zeros, takes no room)."""

    is_data: bool
    start: int
    length: int


class Storage(Protocol):
    """The bytes that an image lies on; offsets are host offsets in bytes.

    Buffers are C-contiguous and of single bytes. Any call may raise OSError;
    calls that change something raise ReadOnlyImage on a read-only storage.
    """

    @property
    def name(self) -> str:
        """The path or label that messages use."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""
        ...

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number: equal for two names of one file."""
        ...

    def size(self) -> int:
        """The size now, in bytes."""
        ...

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        """Fill the buffers one after the other and answer True if nothing must be waited for.

        Bytes past the end are zeros. On False the content of the buffers is undefined.
        """
        ...

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """Fill the buffers one after the other; bytes past the end are zeros."""
        ...

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """`length` bytes from `host_offset`; bytes past the end are zeros."""
        ...

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """Write all buffers one after the other and answer True, or do nothing and answer False."""
        ...

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all buffers one after the other, growing the file where needed."""
        ...

    async def write_zeroes(self, host_offset: int, length: int) -> None:
        """Make the range read as zeros, growing the file to its end where needed."""
        ...

    async def punch(self, host_offset: int, length: int) -> bool:
        """Give the range back to the host, so that it reads as zeros; the size stays.

        False, with nothing changed, when the host cannot.
        """
        ...

    async def truncate(self, size: int) -> None:
        """Cut the file, or grow it with zeros, to `size` bytes."""
        ...

    async def allocate(self, host_offset: int, length: int) -> None:
        """Reserve room for the range, growing the file to its end where needed."""
        ...

    def data_runs(
        self, host_offset: int, length: int, *, limit: int | None = None
    ) -> list[DataRun]:
        """What of the range is data and what holes, in order and without gaps.

        Past the end is a hole. With `limit`, at most so many runs: then they
        may end before the range does.
        """
        ...

    def allocated_bytes(self) -> int:
        """How many bytes the host has set aside for the file."""
        ...

    async def sync(self) -> None:
        """Make everything written so far durable; after one failure, fail for ever."""
        ...

    async def aclose(self) -> None:
        """Close without syncing, releasing the locks last; idempotent."""
        ...


class HostFile:
    """A regular file or block device opened as an image; made by `open` or `create`."""

    __slots__ = (
        "_always_waits",
        "_can_zero_range",
        "_fd",
        "_idle",
        "_is_device",
        "_read_flags",
        "_sync_error",
        "_thread_count",
        "created",
        "identity",
        "name",
        "read_only",
    )

    def __init__(self, fd: int, name: str, *, read_only: bool, created: bool = False) -> None:
        """Take over descriptor `fd` of a regular file or block device, open for reading at least.

        Raises BadRequest, with the descriptor still the caller's, for anything else.
        """
        status = os.fstat(fd)
        require_image_file(status.st_mode)
        self._is_device = stat.S_ISBLK(status.st_mode)
        self._fd = fd
        self._sync_error: OSError | None = None
        self._can_zero_range = True
        self._read_flags = os.RWF_NOWAIT
        self._always_waits = False
        self._thread_count = 0
        self._idle: trio.Event | None = None
        self.name = name
        self.read_only = read_only
        self.created = created
        # One device has many device nodes, so its own number counts, not the node's inode.
        self.identity = (status.st_rdev, 0) if self._is_device else (status.st_dev, status.st_ino)

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool,
        role: LockRole,
        force_share: bool = False,
        lock: bool = True,
    ) -> "HostFile":
        """Open an existing regular file or block device, and lock it before it is read.

        No locks are taken with `force_share` (read-only opens alone) or without
        `lock`; `acquire_locks` may take them later. Raises OSError, BadRequest
        (not a file or block device) or ImageBusy.
        """
        name = os.fspath(path)
        if force_share and writable:
            raise BadRequest("an image opened for writing cannot be shared by force")
        fd = await trio.to_thread.run_sync(open_checked, name, writable)
        return cls._adopt(fd, name, writable, role if lock and not force_share else None, False)

    @classmethod
    async def create(
        cls,
        path: str | os.PathLike[str],
        *,
        role: LockRole = LockRole.QCOW2_WRITE,
        lock: bool = True,
    ) -> "HostFile":
        """Open for writing an empty file: a new one, or an existing one once it is locked.

        `created` tells which it was. A block device keeps its content. Raises
        OSError, BadRequest or ImageBusy; then an existing file is unchanged.
        """
        name = os.fspath(path)
        fd, created = await trio.to_thread.run_sync(open_or_create, name)
        file = cls._adopt(fd, name, True, role if lock else None, created)
        try:
            if not file._is_device:
                await file.truncate(0)
        except BaseException:
            await file.aclose()
            raise
        return file

    @classmethod
    def _adopt(
        cls, fd: int, name: str, writable: bool, role: LockRole | None, created: bool
    ) -> "HostFile":
        try:
            file = cls(fd, name, read_only=not writable, created=created)
            if role is not None:
                file.acquire_locks(role)
        except BaseException:
            os.close(fd)
            raise
        return file

    def acquire_locks(self, role: LockRole) -> None:
        """Take the image locks of `role`; they end with `aclose`. Raises ImageBusy."""
        locking.acquire(self._fd, role, self.name)

    @property
    def is_device(self) -> bool:
        """Whether this is a block device, whose size is fixed."""
        return self._is_device

    # Reading

    def size(self) -> int:
        """The size now, in bytes."""
        if self._is_device:
            return os.lseek(self._fd, 0, os.SEEK_END)
        return os.fstat(self._fd).st_size

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        """Fill the buffers from the page cache, or answer False; see `Storage`."""
        try:
            got = _preadv(self._fd, buffers, host_offset, self._read_flags)
        except BlockingIOError:
            return False
        except OSError as error:
            return self._try_in_parts(buffers, host_offset, error)
        wanted = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if got == wanted:
            return True
        return self._zero_past_end(buffers, host_offset, got)

    def _try_in_parts(
        self, buffers: Sequence[memoryview], host_offset: int, error: OSError
    ) -> bool:
        """Continue `try_pread_into` where the one system call failed with `error`."""
        if len(buffers) > IOV_MAX:
            for first in range(0, len(buffers), IOV_MAX):
                part = buffers[first : first + IOV_MAX]
                if not self.try_pread_into(part, host_offset):
                    return False
                host_offset += sum(map(len, part))
            return True
        if error.errno not in UNSUPPORTED:
            raise error
        if not self._always_waits and lives_in_memory(self._fd):
            self._read_flags = 0
            return self.try_pread_into(buffers, host_offset)
        # A filesystem that may wait at any read: only a thread may call it.
        self._always_waits = True
        return False

    def _zero_past_end(self, buffers: Sequence[memoryview], host_offset: int, got: int) -> bool:
        """Zero what follows the first `got` bytes if the file ends there, else answer False."""
        if host_offset + got < self.size():
            return False
        for rest in skip(buffers, got):
            rest[:] = bytes(len(rest))
        return True

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """Fill the buffers, in a thread from the first byte that is not in the page cache."""
        done = 0
        if len(buffers) <= IOV_MAX:
            try:
                done = _preadv(self._fd, buffers, host_offset, self._read_flags)
            except OSError as error:
                if error.errno != errno.EAGAIN and error.errno not in UNSUPPORTED:
                    raise
        rest = skip(buffers, done)
        if rest and not self._zero_past_end(rest, host_offset + done, 0):
            await self._in_thread(read_all, self._fd, rest, host_offset + done)

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """`length` bytes from `host_offset`; bytes past the end are zeros."""
        content = bytearray(length)
        await self.pread_into((memoryview(content),), host_offset)
        return content

    def data_runs(
        self, host_offset: int, length: int, *, limit: int | None = None
    ) -> list[DataRun]:
        """Data and holes of the range; a filesystem that cannot tell shows data alone."""
        end = host_offset + length
        runs: list[DataRun] = []
        start = host_offset
        while start < end and (limit is None or len(runs) < limit):
            is_data, stop = run_at(self._fd, start)
            stop = min(stop, end) if stop is not None else end
            if stop > start:
                runs.append(DataRun(is_data, start, stop - start))
            start = stop
        return runs

    def allocated_bytes(self) -> int:
        """What the file occupies on its filesystem; all of a block device."""
        return self.size() if self._is_device else os.fstat(self._fd).st_blocks * 512

    # Changing

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """Write all buffers into the page cache; always True."""
        if len(buffers) > IOV_MAX:
            self._write_all(buffers, host_offset)
            return True
        try:
            written = _pwritev(self._fd, buffers, host_offset)
        except OSError as error:
            raise self._explained(error) from None
        wanted = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if written != wanted:
            self._write_all(skip(buffers, written), host_offset + written)
        return True

    def _write_all(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all buffers in as many system calls as it takes; also called in threads."""
        while buffers:
            try:
                written = _pwritev(self._fd, buffers[:IOV_MAX], host_offset)
            except OSError as error:
                raise self._explained(error) from None
            if written == 0 and any(map(len, buffers[:IOV_MAX])):
                raise OSError(errno.EIO, "the host wrote nothing and gave no reason")
            buffers = skip(buffers, written)
            host_offset += written

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write all buffers, without a checkpoint unless they are long."""
        if sum(map(len, buffers)) <= _INLINE_WRITE:
            self.try_pwrite(buffers, host_offset)
        else:
            await self._in_thread(self._write_all, buffers, host_offset)

    async def write_zeroes(self, host_offset: int, length: int) -> None:
        """Make the range read as zeros, by the host's own means where it has them."""
        self._require_writable()
        if length <= _INLINE_ZEROES:
            if length > 0:
                self.try_pwrite((bytes(length),), host_offset)
            return
        await self._in_thread(self._make_zero, host_offset, length)

    def _make_zero(self, host_offset: int, length: int) -> None:
        if self._can_zero_range:
            failure = fallocate(self._fd, FALLOC_ZERO_RANGE, host_offset, length)
            if failure == 0:
                return
            if failure in UNSUPPORTED:
                self._can_zero_range = False
            elif failure != errno.EINVAL:
                # EINVAL: a device asks for a coarser alignment than this range has.
                raise OSError(failure, os.strerror(failure))
        zeroes = memoryview(bytes(min(length, _ZERO_CHUNK)))
        end = host_offset + length
        while host_offset < end:
            part = zeroes[: end - host_offset]
            self._write_all((part,), host_offset)
            host_offset += len(part)

    async def punch(self, host_offset: int, length: int) -> bool:
        """Give the range back to the host, or answer False with nothing changed."""
        self._require_writable()
        if length <= 0:
            return True
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        failure = await self._in_thread(fallocate, self._fd, mode, host_offset, length)
        if failure in UNSUPPORTED or failure == errno.EINVAL:
            return False
        if failure:
            raise OSError(failure, os.strerror(failure))
        return True

    async def truncate(self, size: int) -> None:
        """Set the size; a block device only checks that it is large enough."""
        self._require_writable()
        if self._is_device:
            self._require_room(size)
        else:
            await self._in_thread(os.ftruncate, self._fd, size)

    async def allocate(self, host_offset: int, length: int) -> None:
        """Reserve room for the range; a block device only checks that it is large enough."""
        self._require_writable()
        if self._is_device:
            self._require_room(host_offset + length)
        elif length > 0:
            await self._in_thread(os.posix_fallocate, self._fd, host_offset, length)

    def _require_writable(self) -> None:
        if self.read_only:
            raise ReadOnlyImage("the file is open for reading alone")

    def _require_room(self, size: int) -> None:
        if size > self.size():
            raise OSError(errno.ENOSPC, "the block device is too small")

    def _explained(self, error: OSError) -> Exception:
        """The exception for a failed write; the hot path leaves this check to the kernel."""
        if error.errno == errno.EBADF and self.read_only and self._fd >= 0:
            return ReadOnlyImage("the file is open for reading alone")
        return error

    # Durability and the end

    async def sync(self) -> None:
        """Make everything written so far durable; after one failure, fail for ever."""
        if self._sync_error is None:
            await self._in_thread(self._sync_now)
        if self._sync_error is not None:
            raise OSError(self._sync_error.errno, self._sync_error.strerror)

    def _sync_now(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._sync_error = error

    async def aclose(self) -> None:
        """Close once the threads are through; the locks go with the descriptor. Idempotent."""
        with trio.CancelScope(shield=True):
            while self._thread_count:
                if self._idle is None:
                    self._idle = trio.Event()
                await self._idle.wait()
            fd, self._fd = self._fd, -1
            if fd >= 0:
                await trio.to_thread.run_sync(os.close, fd)

    async def _in_thread(
        self, function: Callable[[*_Arguments], _Result], *arguments: *_Arguments
    ) -> _Result:
        """Run a blocking call in a thread; the descriptor stays open until it has ended."""
        self._thread_count += 1
        try:
            return await trio.to_thread.run_sync(function, *arguments)
        finally:
            self._thread_count -= 1
            if self._thread_count == 0 and self._idle is not None:
                self._idle.set()
                self._idle = None
