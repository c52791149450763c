"""The external data file of an image that is being made: a new file, or a raw disk taken over.

Implements the data file row of FORMATS.md 1.4 for creation. Invariants:

- A file that holds something is never emptied: it is taken over as it is where
  the data file is raw, and refused otherwise.
- It is locked before it is changed. A file made here is removed again when the
  image could not be made.
"""

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.errors import AlreadyExists, BadRequest

_CHUNK_LENGTH = 1 << 20


@asynccontextmanager
async def new_data_file(
    path: str, size: int, *, raw: bool, preallocation: str
) -> AsyncIterator[None]:
    """Make the data file at `path` hold `size` bytes, durably, around the making of its image.

    Raises AlreadyExists, BadRequest (a raw disk larger than `size`; no file or
    block device), ImageBusy, OSError.
    """
    is_new = not _is_taken(path)
    if not is_new and not raw:
        raise AlreadyExists(
            f"the data file {path} exists and is not empty",
            hint="--data-file-raw takes it over as the disk that it is",
        )
    if is_new:
        file = await HostFile.create(path, role=LockRole.DATA_FILE_WRITE)
    else:
        file = await HostFile.open(path, writable=True, role=LockRole.DATA_FILE_WRITE)
    try:
        await _prepare(file, size, is_new=is_new, preallocation=preallocation)
        yield
    except BaseException:
        if file.created:
            _remove(path, file)
        raise
    finally:
        with trio.CancelScope(shield=True):
            await file.aclose()


def _is_taken(path: str) -> bool:
    """Whether there is something at `path` that has content of its own."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(status.st_mode) or status.st_size > 0


async def _prepare(file: HostFile, size: int, *, is_new: bool, preallocation: str) -> None:
    present = file.size()
    if not is_new and not file.is_device and present > size:
        raise BadRequest(f"the data file has {present} bytes, more than the image's {size}")
    if not is_new and preallocation == "full":
        raise BadRequest("a data file that is taken over cannot be filled with zeros")
    if present < size or file.is_device:
        await file.truncate(size)
    if preallocation in ("falloc", "full"):
        await file.allocate(0, size)
    if preallocation == "full":
        zeros = memoryview(bytes(_CHUNK_LENGTH))
        for start in range(0, size, _CHUNK_LENGTH):
            await file.pwrite((zeros[: size - start],), start)
            await trio.lowlevel.checkpoint()
    await file.sync()


def _remove(path: str, file: HostFile) -> None:
    """Remove the unfinished file, unless the name has come to mean another one."""
    try:
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == file.identity:
            os.unlink(path)
    except FileNotFoundError:
        pass
