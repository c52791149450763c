"""Making a new User-mode-Linux COW image (FORMATS.md 1.3).

Over a backing file it is version 3, what User-mode-Linux's own tools make and
read. Version 3 does not allow an empty path, so without one it is version 2 in
QEMU's layout. Nothing here opens a backing file; only its time is looked at.
Invariant: a request that cannot be met leaves no trace.
"""

import os

from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.layout.uml_cow import (
    LAYOUT_BY_NAME,
    CowHeader,
    serialize_cow_header,
)
from qcowfs.driver.new_file import write_new_file
from qcowfs.errors import BadRequest

_MAX_SIZE = 1 << 50


async def create_cow(
    path: str | os.PathLike[str],
    size: int,
    *,
    backing_file: str | bytes | None = None,
    mtime: int = 0,
    layout: str | None = None,
) -> None:
    """Make an image of `size` bytes at `path`: sparse, as long as the disk.

    The size is kept as it is, for User-mode-Linux compares it with the backing
    file's; the disk ends with its last whole sector. `backing_file` is the name
    to store, `mtime` that file's time in seconds (0: never compared), `layout`
    a name of LAYOUTS. Raises BadRequest, ImageBusy, OSError.
    """
    if not SECTOR <= size <= _MAX_SIZE:
        raise BadRequest(f"size {size}: must be from {SECTOR} to {_MAX_SIZE}")
    name = os.fsencode(backing_file) if backing_file else None
    if layout is None:
        layout = "qemu-2-64" if name is None else "uml-3"
    if name is None:
        size = -(-size // SECTOR) * SECTOR
    header = CowHeader(LAYOUT_BY_NAME[layout], name, mtime & 0xFFFFFFFF, size)
    length = header.data_offset + header.virtual_size
    await write_new_file(path, [(0, serialize_cow_header(header))], length, backing_file=name)
