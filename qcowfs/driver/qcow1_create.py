"""Making a new qcow image of version 1 (FORMATS.md 1.2).

The header, the backing file's name, and right behind them, at the next multiple
of 8, the L1 table: all zeros, so it need not be written. Nothing here opens a
backing file. Invariants: a request that cannot be met leaves no trace; a file
that was made here and could not be finished is removed.
"""

import os

from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.layout.qcow1 import (
    CRYPT_AES,
    CRYPT_NONE,
    HEADER_LENGTH,
    MAX_BACKING_NAME_LENGTH,
    MAX_CLUSTER_BITS,
    MAX_L1_LENGTH,
    MIN_CLUSTER_BITS,
    MIN_L2_BITS,
    Qcow1Header,
    serialize_qcow1_header,
)
from qcowfs.driver.new_file import write_new_file
from qcowfs.errors import BadRequest

# Over a backing file QEMU takes the smallest clusters: then no write copies anything along.
_OVERLAY_CLUSTER_BITS = 9
_OVERLAY_L2_BITS = 12
_CLUSTER_BITS = 12


async def create_qcow1(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int | None = None,
    backing_file: str | bytes | None = None,
    encryption: bool = False,
) -> int:
    """Make an image of `size` bytes, rounded up to 512, at `path`; answers its cluster size.

    `backing_file` is the name to store. With `encryption`, AES by the first 16
    bytes of a passphrase that is asked for at every opening. Raises BadRequest
    for what the format does not allow, ImageBusy, OSError.
    """
    name = os.fsencode(backing_file) if backing_file else None
    header = _lay_out(size, cluster_size, name, encryption=encryption)
    length = header.l1_table_offset + header.l1_size * 8
    await write_new_file(path, [(0, serialize_qcow1_header(header))], length, backing_file=name)
    return header.cluster_size


def _lay_out(
    size: int, cluster_size: int | None, name: bytes | None, *, encryption: bool
) -> Qcow1Header:
    if size < 1:
        raise BadRequest(f"size {size}: a qcow image must not be empty")
    if name is not None and len(name) > MAX_BACKING_NAME_LENGTH:
        raise BadRequest(
            f"the backing file's name has {len(name)} bytes: at most {MAX_BACKING_NAME_LENGTH}"
        )
    cluster_bits = _CLUSTER_BITS if name is None else _OVERLAY_CLUSTER_BITS
    if cluster_size is not None:
        cluster_bits = cluster_size.bit_length() - 1
        if cluster_size != 1 << cluster_bits or not (
            MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS
        ):
            raise BadRequest(
                f"cluster size {cluster_size}: must be a power of two from 512 to 65536"
            )
    l2_bits = max(MIN_L2_BITS, cluster_bits - 3)
    if cluster_bits == _OVERLAY_CLUSTER_BITS:
        l2_bits = _OVERLAY_L2_BITS
    header = Qcow1Header(
        backing_file=name,
        mtime=0,
        virtual_size=-(-size // SECTOR) * SECTOR,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=CRYPT_AES if encryption else CRYPT_NONE,
        l1_table_offset=-(-(HEADER_LENGTH + len(name or b"")) // 8) * 8,
    )
    if header.l1_size * 8 > MAX_L1_LENGTH:
        largest = MAX_L1_LENGTH // 8 * header.l2_coverage
        raise BadRequest(
            f"size {size}: clusters of {header.cluster_size} bytes allow at most {largest}"
        )
    return header
