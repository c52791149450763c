"""The system calls under a host file, without state: opening, long transfers, holes.

All of these block and are called in threads, `skip` and `run_at` apart. They
take descriptors and paths, and know nothing of formats. EINTR is retried.
"""

import errno
import functools
import os
import stat
from collections.abc import Callable, Sequence

from qcowfs.errors import BadRequest

Buffer = bytes | bytearray | memoryview

# The most buffers that one system call takes (UIO_MAXIOV).
IOV_MAX = 1024

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

# What a host answers that cannot do a thing at all.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY)


def require_image_file(mode: int) -> None:
    """Raise BadRequest unless `mode` is that of a regular file or a block device."""
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise BadRequest(f"it is {kind}, not a regular file or block device")


def open_checked(name: str, writable: bool) -> int:
    """A descriptor of the file at `name`, once it is known to be no FIFO, device or folder.

    Merely opening such a thing can hang or have effects, hence O_PATH first;
    and the second open goes through the first, so that both see the same file.
    """
    try:
        handle = os.open(name, os.O_PATH | os.O_CLOEXEC)
    except ValueError:
        raise BadRequest(f"{name!r} cannot be the name of a file") from None
    try:
        require_image_file(os.fstat(handle).st_mode)
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{handle}", flags)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None
    finally:
        os.close(handle)


def open_or_create(name: str) -> tuple[int, bool]:
    """A descriptor open for writing, and whether the file is new."""
    try:
        return open_checked(name, True), False
    except FileNotFoundError:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(name, flags, 0o644), True


def lives_in_memory(fd: int) -> bool:
    """Whether the file is on a filesystem without a device, where no read has to wait."""
    device = os.fstat(fd).st_dev
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    try:
        # Bytes, since a name in it may hold what text mode takes for the end of a line.
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split(b" ")
                if fields[2] == wanted:
                    return fields[fields.index(b"-") + 1] in {b"tmpfs", b"ramfs"}
    except (OSError, IndexError, ValueError):
        pass
    return False


def skip(buffers: Sequence[Buffer], count: int) -> list[memoryview]:
    """What remains of `buffers` after their first `count` bytes; empty ones are left out."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if count >= len(buffer):
            count -= len(buffer)
        else:
            rest.append(memoryview(buffer)[count:])
            count = 0
    return rest


def read_all(fd: int, buffers: Sequence[memoryview], host_offset: int) -> None:
    """Fill the buffers, waiting for the device; zeros past the end of the file."""
    while buffers:
        got = os.preadv(fd, buffers[:IOV_MAX], host_offset)
        if got == 0:
            for rest in buffers:
                rest[:] = bytes(len(rest))
            return
        buffers = skip(buffers, got)
        host_offset += got


def run_at(fd: int, start: int) -> tuple[bool, int | None]:
    """Whether `start` is data, and where its run ends; None: beyond the end of the file."""
    try:
        data = os.lseek(fd, start, os.SEEK_DATA)
        if data > start:
            return False, data
        return True, os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False, None
        if error.errno != errno.EINVAL:
            raise
    # A filesystem that cannot tell: all is data up to the end.
    end = os.lseek(fd, 0, os.SEEK_END)
    return (True, end) if start < end else (False, None)


@functools.cache
def _fallocate_function() -> Callable[[int, int, int, int], int]:
    """The C library's fallocate, as a function that answers 0 or an errno.

    Found at the first use: ctypes takes 3 ms to import and most runs need no hole.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, host_offset: int, length: int) -> int:
        return 0 if function(fd, mode, host_offset, length) == 0 else ctypes.get_errno()

    return call


def fallocate(fd: int, mode: int, host_offset: int, length: int) -> int:
    """Change how a range is stored, answering 0 or the errno; blocks, EINTR is retried."""
    function = _fallocate_function()
    while (failure := function(fd, mode, host_offset, length)) == errno.EINTR:
        pass
    return failure
