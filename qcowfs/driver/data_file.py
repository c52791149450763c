"""Opening the external data file of a qcow2 image, and checking that it is all there.

Implements the data file row of FORMATS.md 1.4 and "Files named by an image" of
RELIABILITY.md: the name counts from the folder of the image as that was named,
only a plain name (or a `file:` one) is understood, only a regular file or a
block device is opened, and it is locked before anything is read from it.

Invariants: the data file is none of the files of the chain; what is opened is
closed again when a later step fails.
"""

import os
from collections.abc import Collection

import trio

from qcowfs.driver.layout.extensions import printable
from qcowfs.driver.layout.header import Header
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.errors import BadRequest, CorruptImage, UnsupportedFeature


def data_file_path(header: Header, image_path: str) -> str:
    """Where the data file that a header names is. Raises BadRequest, UnsupportedFeature."""
    if not header.data_file:
        raise BadRequest("the image needs a data file and names none")
    name = os.fsdecode(header.data_file)
    scheme, colon, rest = name.partition(":")
    if colon and "/" not in scheme:
        if scheme != "file":
            shown = printable(os.fsencode(scheme))
            raise UnsupportedFeature(f'the protocol "{shown}" is not supported')
        name = rest
    if not name or "\0" in name:
        raise BadRequest("the name is empty, or has a NUL byte in it")
    return os.path.join(os.path.dirname(image_path), name)


async def open_data_file(
    path: str,
    *,
    writable: bool,
    lock: bool,
    taken: Collection[tuple[int, int]],
) -> HostFile:
    """Open and lock the data file at `path`; `taken` are the identities of the chain's files.

    Raises OSError, BadRequest (not a file or block device, or one of the
    chain's own), ImageBusy.
    """
    role = LockRole.DATA_FILE_WRITE if writable else LockRole.DATA_FILE_READ
    file = await HostFile.open(path, writable=writable, role=role, lock=False)
    try:
        if file.identity in taken:
            raise CorruptImage("the data file is an image of the chain itself")
        if lock:
            file.acquire_locks(role)
    except BaseException:
        with trio.CancelScope(shield=True):
            await file.aclose()
        raise
    return file
