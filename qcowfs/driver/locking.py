"""Image locks on a host file, byte for byte those of QEMU (open file description locks).

A user of an image holds a shared lock on byte 100 + bit for each permission it
uses and on byte 200 + bit for each permission that it denies to others. The
locks are taken first and the others' are probed afterwards, so of two that
start at once at least one sees the other.

This module knows descriptors and nothing of formats. Invariants:

- Only open file description locks are used: a POSIX record lock would vanish
  as soon as any descriptor of the file is closed anywhere in the process.
- After a conflict nothing stays locked.
- Closing the last descriptor of the description releases everything.
"""

import enum
import errno
import fcntl
import logging
import os
import struct

from qcowfs.errors import ImageBusy

logger = logging.getLogger(__name__)

_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3
_PERMISSION_NAMES = ("consistent read", "write", "write unchanged", "resize")

_USED_BASE = 100
_DENIED_BASE = 200

# The C struct flock: type, whence, (padding), start, length, process id.
_FLOCK = struct.Struct("@hhqqi0q")

_NO_LOCKS_HERE = (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)


class LockRole(enum.Enum):
    """What an opened file is used for; the value is (permissions used, permissions denied)."""

    QCOW2_WRITE = ((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE))
    QCOW2_READ = ((_CONSISTENT_READ,), (_WRITE, _RESIZE))
    DATA_FILE_WRITE = ((_CONSISTENT_READ, _WRITE, _RESIZE), (_RESIZE,))
    DATA_FILE_READ = ((_CONSISTENT_READ,), (_RESIZE,))
    RAW_WRITE = ((_CONSISTENT_READ, _WRITE), ())
    RAW_READ = ((_CONSISTENT_READ,), ())

    def __init__(self, used: tuple[int, ...], denied: tuple[int, ...]) -> None:
        self.used = used
        self.denied = denied


def lock_bytes(role: LockRole) -> list[int]:
    """The file offsets that `role` holds shared locks on, ascending."""
    return [_USED_BASE + bit for bit in role.used] + [_DENIED_BASE + bit for bit in role.denied]


def acquire(descriptor: int, role: LockRole, path: str) -> None:
    """Take the locks of `role` on a readable descriptor, then probe for conflicts.

    Raises ImageBusy on a conflict, with everything released again. A filesystem
    without locks gives a logged warning and no locks.
    """
    try:
        for host_offset in lock_bytes(role):
            _set(descriptor, fcntl.F_RDLCK, host_offset)
        conflict = _conflict(descriptor, role)
    except OSError as error:
        release(descriptor)
        if error.errno in _HELD_BY_ANOTHER:
            conflict = '"write" lock'
        elif error.errno in _NO_LOCKS_HERE:
            logger.warning(
                "%s: the filesystem has no file locks (%s): nothing keeps other programs "
                "from changing the image meanwhile",
                path,
                os.strerror(error.errno or 0),
            )
            return
        else:
            raise
    if conflict is not None:
        release(descriptor)
        raise ImageBusy(
            f"Failed to get {conflict}", hint=f"Is another process using the image [{path}]?"
        )


def release(descriptor: int) -> None:
    """Drop every image lock of the descriptor; errors mean that there are none."""
    for base in (_USED_BASE, _DENIED_BASE):
        try:
            _set(descriptor, fcntl.F_UNLCK, base, len(_PERMISSION_NAMES))
        except OSError:
            return


def _set(descriptor: int, kind: int, host_offset: int, length: int = 1) -> None:
    request = _FLOCK.pack(kind, os.SEEK_SET, host_offset, length, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def _conflict(descriptor: int, role: LockRole) -> str | None:
    """What another description denies us, or uses though we deny it; in words."""
    for bit in role.used:
        if _held_elsewhere(descriptor, _DENIED_BASE + bit):
            return f'"{_PERMISSION_NAMES[bit]}" lock'
    for bit in role.denied:
        if _held_elsewhere(descriptor, _USED_BASE + bit):
            return f'shared "{_PERMISSION_NAMES[bit]}" lock'
    return None


def _held_elsewhere(descriptor: int, host_offset: int) -> bool:
    # Only a write lock conflicts with others' shared locks; it is asked about, never taken.
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, host_offset, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
