"""Making a new qcow2 image (qcow2 specification, "Header", "Refcounts").

The whole layout is worked out before anything is opened: header, refcount
table, active L1, LUKS header, refcount blocks, and with preallocation all L2
tables and then the data, each a contiguous run of clusters. Nothing here opens a
backing file; its name is compared with the new image's alone.

Invariants: a request that cannot be met leaves no trace. The header is written
last, after a sync of all that it points to, so a file cut short by a crash is
no image. A file that was made here and could not be finished is removed.
"""

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from qcowfs.driver.layout.extensions import EXTENSION_CRYPTO, Extension
from qcowfs.driver.layout.geometry import (
    L1_ENTRY_LENGTH,
    MAX_BACKING_NAME_LENGTH,
    MAX_CLUSTER_BITS,
    MAX_HOST_OFFSET,
    MAX_L1_LENGTH,
    MAX_REFCOUNT_TABLE_LENGTH,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    OFLAG_COPIED,
    REFCOUNT_TABLE_ENTRY_LENGTH,
    SECTOR,
)
from qcowfs.driver.layout.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    CRYPT_LUKS,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    Header,
    serialize,
)
from qcowfs.driver.layout.mapping import ALL_ALLOCATED
from qcowfs.driver.layout.refcounts import RefcountBlock
from qcowfs.driver.locking import LockRole
from qcowfs.driver.qcow2.new_data_file import new_data_file
from qcowfs.driver.qcow2.new_luks import Encryption, make_luks_header
from qcowfs.driver.storage import HostFile
from qcowfs.errors import BadRequest

_COMPRESSION_TYPES = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_CHUNK_LENGTH = 1 << 20


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything of a new image lies: first clusters by host offset, counts of clusters."""

    header: Header
    l1_clusters: int
    crypto_offset: int
    refcount_block_offset: int
    refcount_block_count: int
    l2_table_offset: int
    l2_table_count: int
    data_offset: int
    mapped_clusters: int
    end: int

    @property
    def cluster_count(self) -> int:
        """All clusters of the file; each has the refcount 1."""
        return self.end >> self.header.cluster_bits


async def create_qcow2(
    path: str | os.PathLike[str],
    size: int,
    *,
    version: int = 3,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    extended_l2: bool = False,
    backing_file: str | bytes | None = None,
    backing_format: str | None = None,
    preallocation: str = "off",
    compression_type: str = "zlib",
    lazy_refcounts: bool = False,
    encryption: Encryption | None = None,
    data_file: str | bytes | None = None,
    data_file_raw: bool = False,
) -> None:
    """Make an image of `size` bytes, rounded up to 512, in a new or emptied file at `path`.

    `backing_file` is the name to store. Preallocation `metadata` maps every
    cluster, `falloc` also reserves the room, `full` writes zeros there.
    `data_file` is the name to store of an external data file, which is made, or
    taken over if it holds a disk and `data_file_raw` says so. Raises BadRequest
    for what the format does not allow, ImageFull when a name does not fit into
    the header cluster, KeyRequired, AlreadyExists (the data file), ImageBusy,
    OSError.
    """
    header = _requested_header(
        size,
        version=version,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        extended_l2=extended_l2,
        compression_type=compression_type,
        lazy_refcounts=lazy_refcounts,
    )
    header = _with_backing(header, backing_file, backing_format)
    header = _with_data_file(header, data_file, data_file_raw)
    if encryption is not None:
        header = _with_encryption(header, encryption)
    _check_preallocation(header, preallocation)
    # A raw data file by itself is the disk, so every cluster shows it from the beginning.
    preallocated = preallocation != "off" or data_file_raw
    crypto_length = encryption.header_length if encryption is not None else 0
    layout = _lay_out(header, preallocated=preallocated, crypto_length=crypto_length)
    header_cluster = serialize(layout.header)
    _check_not_own_backing(path, header.backing_file)
    luks = await make_luks_header(encryption) if encryption is not None else []
    async with _data_file_of(path, header, preallocation):
        await _write_image(path, layout, preallocation, luks, header_cluster)


@asynccontextmanager
async def _data_file_of(
    path: str | os.PathLike[str], header: Header, preallocation: str
) -> AsyncIterator[None]:
    """Around the making of an image: its data file, if it is to have one."""
    if header.data_file is None:
        yield
        return
    data_path = os.path.join(os.path.dirname(os.fspath(path)), os.fsdecode(header.data_file))
    others = [os.fspath(path)]
    if header.backing_file:
        others.append(os.path.join(os.path.dirname(others[0]), os.fsdecode(header.backing_file)))
    if os.path.realpath(data_path) in map(os.path.realpath, others):
        raise BadRequest("the data file is the image itself, or its backing file")
    async with new_data_file(
        data_path, header.virtual_size, raw=header.data_file_raw, preallocation=preallocation
    ):
        yield


async def _write_image(
    path: str | os.PathLike[str],
    layout: _Layout,
    preallocation: str,
    luks: list[tuple[int, bytes]],
    header_cluster: bytes,
) -> None:
    file = await HostFile.create(path, role=LockRole.QCOW2_WRITE)
    try:
        await _write_tables(file, layout, preallocation)
        for offset, data in luks:
            await file.pwrite([data], layout.crypto_offset + offset)
        await file.sync()
        await file.pwrite([header_cluster], 0)
        await file.sync()
    except BaseException:
        if file.created:
            _remove(path, file)
        raise
    finally:
        await file.aclose()


def _requested_header(
    size: int,
    *,
    version: int,
    cluster_size: int,
    refcount_bits: int,
    extended_l2: bool,
    compression_type: str,
    lazy_refcounts: bool,
) -> Header:
    """The header that the options ask for, without its tables; BadRequest if they cannot be had."""
    if version not in (2, 3):
        raise BadRequest(f"version {version}: must be 2 or 3")
    if size < 0:
        raise BadRequest(f"size {size}: must not be negative")
    cluster_bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << max(cluster_bits, 0) or not (
        MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS
    ):
        raise BadRequest(
            f"cluster size {cluster_size}: must be a power of two from "
            f"{1 << MIN_CLUSTER_BITS} to {1 << MAX_CLUSTER_BITS}"
        )
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise BadRequest(f"refcount bits {refcount_bits}: must be a power of two from 1 to 64")
    if compression_type not in _COMPRESSION_TYPES:
        raise BadRequest(f'compression type "{compression_type}": must be zlib or zstd')
    if extended_l2 and cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        raise BadRequest(
            f"extended L2 entries need clusters of {1 << MIN_EXTENDED_L2_CLUSTER_BITS} bytes "
            f"or more, not {cluster_size}"
        )
    compression = _COMPRESSION_TYPES[compression_type]
    if version == 2:
        for wanted, what in (
            (refcount_bits != 16, f"refcounts of {refcount_bits} bits"),
            (lazy_refcounts, "lazy refcounts"),
            (extended_l2, "extended L2 entries"),
            (compression != COMPRESSION_ZLIB, f"{compression_type} compression"),
        ):
            if wanted:
                raise BadRequest(f"{what}: only in version 3 images")
    incompatible = INCOMPATIBLE_EXTENDED_L2 if extended_l2 else 0
    if compression != COMPRESSION_ZLIB:
        incompatible |= INCOMPATIBLE_COMPRESSION
    return Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size=-(-size // SECTOR) * SECTOR,
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        incompatible=incompatible,
        compatible=COMPATIBLE_LAZY_REFCOUNTS if lazy_refcounts else 0,
        refcount_order=refcount_bits.bit_length() - 1,
        header_length=V2_HEADER_LENGTH if version == 2 else V3_HEADER_LENGTH,
        compression_type=compression,
    )


def _with_backing(header: Header, name: str | bytes | None, backing_format: str | None) -> Header:
    stored = os.fsencode(name) if name else None
    if backing_format and not stored:
        raise BadRequest("a backing format without a backing file")
    if stored and len(stored) > MAX_BACKING_NAME_LENGTH:
        raise BadRequest(
            f"backing file name of {len(stored)} bytes: at most {MAX_BACKING_NAME_LENGTH}"
        )
    return replace(header, backing_file=stored, backing_format=backing_format or None)


def _with_data_file(header: Header, name: str | bytes | None, raw: bool) -> Header:
    stored = os.fsencode(name) if name else None
    if stored is None:
        if raw:
            raise BadRequest("a raw data file without a data file")
        return header
    if header.version == 2:
        raise BadRequest("an external data file: only in version 3 images")
    if b":" in stored.split(b"/", 1)[0] or b"\0" in stored:
        raise BadRequest("the data file's name would be taken for a protocol", hint="./NAME")
    if raw and header.backing_file:
        raise BadRequest("a raw data file and a backing file exclude each other")
    return replace(
        header,
        data_file=stored,
        incompatible=header.incompatible | INCOMPATIBLE_DATA_FILE,
        autoclear=header.autoclear | (AUTOCLEAR_DATA_FILE_RAW if raw else 0),
    )


def _with_encryption(header: Header, encryption: Encryption) -> Header:
    """The same header, encrypted; its crypto extension has no offset yet."""
    encryption.check()
    if header.data_file_raw:
        raise BadRequest("a raw data file cannot be encrypted: it would not be the disk")
    return replace(header, crypt_method=CRYPT_LUKS)


def _check_not_own_backing(path: str | os.PathLike[str], backing_file: bytes | None) -> None:
    """Refuse to empty the file that the new image is to show."""
    if not backing_file:
        return
    try:
        same = os.path.samefile(
            path, os.path.join(os.path.dirname(os.fsencode(path)), backing_file)
        )
    except (OSError, ValueError):
        return
    if same:
        raise BadRequest("the backing file is the image itself")


def _check_preallocation(header: Header, preallocation: str) -> None:
    if preallocation not in _PREALLOCATIONS:
        raise BadRequest(
            f'preallocation "{preallocation}": must be one of {", ".join(_PREALLOCATIONS)}'
        )
    # Preallocated subclusters stay unallocated and show the backing file; whole
    # clusters would hide it behind zeros.
    if preallocation != "off" and header.backing_file and not header.extended_l2:
        raise BadRequest("preallocation over a backing file needs extended L2 entries")
    # What was never written would be decrypted into noise.
    if preallocation != "off" and header.crypt_method == CRYPT_LUKS and not header.extended_l2:
        raise BadRequest("preallocation of an encrypted image needs extended L2 entries")


def _lay_out(header: Header, *, preallocated: bool, crypto_length: int = 0) -> _Layout:
    """Place the tables, with refcount blocks that describe everything, themselves included."""
    geometry = header.geometry()
    cluster_bits = header.cluster_bits
    l1_size = geometry.l1_count(header.virtual_size)
    if l1_size * L1_ENTRY_LENGTH > MAX_L1_LENGTH:
        raise BadRequest(
            f"size {header.virtual_size}: clusters of {header.cluster_size} bytes allow at most "
            f"{MAX_L1_LENGTH // L1_ENTRY_LENGTH << geometry.l2_coverage_bits}"
        )
    l1_clusters = geometry.cluster_count(l1_size * L1_ENTRY_LENGTH)
    l2_tables = l1_size if preallocated else 0
    mapped_clusters = geometry.cluster_count(header.virtual_size) if preallocated else 0
    data_clusters = 0 if header.has_data_file else mapped_clusters
    crypto_clusters = geometry.cluster_count(crypto_length)
    described = 1 + l1_clusters + crypto_clusters + l2_tables + data_clusters
    blocks = table_clusters = 1
    while True:
        total = described + blocks + table_clusters
        enough = -(-total // geometry.refcounts_per_block)
        enough_table = geometry.cluster_count(enough * REFCOUNT_TABLE_ENTRY_LENGTH)
        if (enough, enough_table) == (blocks, table_clusters):
            break
        # Neither ever shrinks, so that the two cannot chase each other for ever.
        blocks, table_clusters = max(blocks, enough), max(table_clusters, enough_table)
    if (
        table_clusters << cluster_bits > MAX_REFCOUNT_TABLE_LENGTH
        or total << cluster_bits > MAX_HOST_OFFSET
    ):
        raise BadRequest(
            f"preallocating {header.virtual_size} bytes needs a refcount table of "
            f"{table_clusters << cluster_bits} bytes: at most {MAX_REFCOUNT_TABLE_LENGTH}"
        )
    table_offset = 1 << cluster_bits
    l1_offset = table_offset + (table_clusters << cluster_bits)
    crypto_offset = l1_offset + (l1_clusters << cluster_bits)
    block_offset = crypto_offset + (crypto_clusters << cluster_bits)
    l2_offset = block_offset + (blocks << cluster_bits)
    data_offset = l2_offset + (l2_tables << cluster_bits)
    extensions = header.extensions
    if crypto_length:
        place = struct.pack(">QQ", crypto_offset, crypto_length)
        extensions = (*extensions, Extension(EXTENSION_CRYPTO, place))
    placed = replace(
        header,
        extensions=extensions,
        l1_size=l1_size,
        l1_table_offset=l1_offset if l1_size else 0,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
    )
    return _Layout(
        header=placed,
        l1_clusters=l1_clusters,
        crypto_offset=crypto_offset,
        refcount_block_offset=block_offset,
        refcount_block_count=blocks,
        l2_table_offset=l2_offset,
        l2_table_count=l2_tables,
        data_offset=0 if header.has_data_file else data_offset,
        mapped_clusters=mapped_clusters,
        end=total << cluster_bits,
    )


async def _write_tables(file: HostFile, layout: _Layout, preallocation: str) -> None:
    """Everything but the header, which an old image on a block device loses first."""
    header = layout.header
    await file.truncate(layout.end)
    if file.is_device:
        # A new file is all zeros; a device still has what was there before.
        await file.write_zeroes(0, header.cluster_size)
        await file.sync()
        await file.write_zeroes(header.cluster_size, layout.end - header.cluster_size)
    if preallocation in ("falloc", "full"):
        await file.allocate(0, layout.end)
    for pieces in (
        _refcount_table(layout),
        _l1_table(layout),
        _refcount_blocks(layout),
        _l2_tables(layout),
    ):
        for host_offset, data in pieces:
            await file.pwrite([data], host_offset)
            await trio.lowlevel.checkpoint()
    if preallocation == "full" and not header.has_data_file:
        await _write_zero_data(file, layout)


def _entries(first: int, count: int, step: int, flags: int) -> Iterator[tuple[int, bytes]]:
    """(index of the first one, bytes) of `count` table words `first | flags`, step by step."""
    import numpy as np

    per_chunk = _CHUNK_LENGTH // 8
    for index in range(0, count, per_chunk):
        indexes = np.arange(index, min(count, index + per_chunk), dtype=np.uint64)
        words = indexes * np.uint64(step) + np.uint64(first) | np.uint64(flags)
        yield index, words.astype(">u8").tobytes()


def _refcount_table(layout: _Layout) -> Iterator[tuple[int, bytes]]:
    header = layout.header
    start = layout.refcount_block_offset
    for index, data in _entries(start, layout.refcount_block_count, header.cluster_size, 0):
        yield header.refcount_table_offset + index * REFCOUNT_TABLE_ENTRY_LENGTH, data


def _l1_table(layout: _Layout) -> Iterator[tuple[int, bytes]]:
    header = layout.header
    start = layout.l2_table_offset
    for index, data in _entries(start, layout.l2_table_count, header.cluster_size, OFLAG_COPIED):
        yield header.l1_table_offset + index * L1_ENTRY_LENGTH, data


def _refcount_blocks(layout: _Layout) -> Iterator[tuple[int, bytes]]:
    """Refcounts of 1 for all clusters; the blocks lie side by side, so they are one array."""
    order = layout.header.refcount_order
    per_chunk = _CHUNK_LENGTH * 8 >> order
    whole = b""
    for first in range(0, layout.cluster_count, per_chunk):
        count = min(per_chunk, layout.cluster_count - first)
        if count == per_chunk and whole:
            data = whole
        else:
            block = RefcountBlock(bytearray(((count << order) + 7) // 8), order)
            block.fill(0, count, 1)
            data = bytes(block.buffer)
            whole = data
        yield layout.refcount_block_offset + (first << order) // 8, data


def _l2_tables(layout: _Layout) -> Iterator[tuple[int, bytes]]:
    """Entries for all mapped clusters; with extended L2 entries no subcluster is allocated yet.

    But for a raw data file, whose bytes are the disk's already.
    """
    header = layout.header
    start = layout.data_offset
    for index, data in _entries(start, layout.mapped_clusters, header.cluster_size, OFLAG_COPIED):
        if header.extended_l2:
            bitmap = ALL_ALLOCATED if header.data_file_raw else 0
            yield layout.l2_table_offset + index * 16, _with_bitmaps(data, bitmap)
        else:
            yield layout.l2_table_offset + index * 8, data


def _with_bitmaps(entries: bytes, bitmap: int) -> bytes:
    import numpy as np

    pairs = np.full((len(entries) // 8, 2), bitmap, dtype=">u8")
    pairs[:, 0] = np.frombuffer(entries, dtype=">u8")
    return pairs.tobytes()


async def _write_zero_data(file: HostFile, layout: _Layout) -> None:
    zeros = bytes(_CHUNK_LENGTH)
    host_offset = layout.data_offset
    while host_offset < layout.end:
        part = memoryview(zeros)[: layout.end - host_offset]
        await file.pwrite([part], host_offset)
        await trio.lowlevel.checkpoint()
        host_offset += len(part)


def _remove(path: str | os.PathLike[str], file: HostFile) -> None:
    """Remove the unfinished file, unless the name has come to mean another one."""
    try:
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == file.identity:
            os.unlink(path)
    except FileNotFoundError:
        pass
