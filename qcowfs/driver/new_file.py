"""A new image file from its first bytes: written, synced, or removed again.

For the formats whose new images are a header and zeros (qcow, cow). It knows no
format. Invariants: the file is locked before it is emptied; a file that was
made here and could not be finished is removed.
"""

import os
from collections.abc import Sequence

from qcowfs.driver.storage import Buffer, HostFile, LockRole
from qcowfs.errors import BadRequest


async def write_new_file(
    path: str | os.PathLike[str],
    parts: Sequence[tuple[int, Buffer]],
    length: int,
    *,
    backing_file: bytes | None = None,
) -> None:
    """Make the file at `path`, `length` bytes of zeros but for the parts (host offset, bytes).

    `backing_file` is compared with the file itself, as seen from its folder.
    Raises BadRequest for that and for a block device (new clusters go behind
    the end of the file, which a device does not have), ImageBusy, OSError.
    """
    if backing_file and _is_same(path, backing_file):
        raise BadRequest("the backing file is the image itself")
    file = await HostFile.create(path, role=LockRole.QCOW2_WRITE)
    try:
        if file.is_device:
            raise BadRequest("a block device cannot hold an image of this format")
        await file.truncate(length)
        for host_offset, data in parts:
            await file.pwrite((data,), host_offset)
        await file.sync()
    except BaseException:
        if file.created:
            _remove(path, file)
        raise
    finally:
        await file.aclose()


def _is_same(path: str | os.PathLike[str], backing_file: bytes) -> bool:
    folder = os.path.dirname(os.fsencode(path))
    try:
        return os.path.samefile(path, os.path.join(folder, backing_file))
    except (OSError, ValueError):
        return False


def _remove(path: str | os.PathLike[str], file: HostFile) -> None:
    """Remove the unfinished file, unless the name has come to mean another one."""
    try:
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == file.identity:
            os.unlink(path)
    except FileNotFoundError:
        pass
