"""The header and the table entries of qcow version 1 (FORMATS.md 1.2).

Pure: bytes to values and back. All fields are big-endian. There are no
refcounts, no snapshots and no zero clusters: an entry is 0, a host offset, or
a compressed cluster with its size in bytes. Nothing is aligned but plain
clusters, to a sector; the L1 table may lie right behind the header.

Invariant: a size that is no multiple of a sector counts only to the last whole
one, as QEMU has it.
"""

import struct
from array import array
from dataclasses import dataclass, replace

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.errors import BadRequest, CorruptImage, UnsupportedFeature

MAGIC = b"QFI\xfb"
VERSION = 1
HEADER_LENGTH = 48
CRYPT_NONE = 0
CRYPT_AES = 1
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 16
MIN_L2_BITS = 6
MAX_L2_BITS = 13
MAX_BACKING_NAME_LENGTH = 1023
# An L1 table is kept in memory whole: the limit of qcow2 (8 TiB at 4 KiB clusters) serves here too.
MAX_L1_LENGTH = 32 << 20
COMPRESSED_FLAG = 1 << 63

_HEADER = struct.Struct(">4sIQIIQBBHIQ")
_SIZE_OFFSET = 24


@dataclass(frozen=True, slots=True)
class Qcow1Header:
    """All fields of the header; offsets and sizes in bytes."""

    backing_file: bytes | None
    mtime: int
    virtual_size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int
    l1_table_offset: int

    @property
    def disk_size(self) -> int:
        """The size of the disk: `virtual_size` to its last whole sector."""
        return self.virtual_size & -SECTOR

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entry_count(self) -> int:
        """Entries of an L2 table."""
        return 1 << self.l2_bits

    @property
    def l2_table_length(self) -> int:
        """Bytes of an L2 table."""
        return 8 << self.l2_bits

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table: exactly what the size needs."""
        return -(-self.virtual_size // self.l2_coverage)

    @property
    def offset_mask(self) -> int:
        """The bits of a compressed entry that hold its host offset."""
        return (1 << (63 - self.cluster_bits)) - 1

    def compressed_location(self, entry: int) -> tuple[int, int]:
        """(host offset, bytes) of a compressed cluster's stream."""
        length = (entry >> (63 - self.cluster_bits)) & (self.cluster_size - 1)
        return entry & self.offset_mask, length

    def compressed_entry(self, host_offset: int, length: int) -> int:
        """The entry of a stream of less than a cluster at `host_offset`."""
        return COMPRESSED_FLAG | length << (63 - self.cluster_bits) | host_offset


def _corrupt(message: str) -> CorruptImage:
    return CorruptImage(message, structure="header")


def parse_qcow1_header(data: bytes, file_size: int) -> Qcow1Header:
    """Parse the beginning of a file, 48 bytes and the backing name.

    `data` should hold the first 64 KiB or what there is. Raises BadRequest
    for something that is no qcow image of version 1, CorruptImage for a field
    out of range, UnsupportedFeature for an unknown encryption.
    """
    if len(data) < HEADER_LENGTH:
        raise BadRequest(f"not a qcow image: {len(data)} bytes are less than its header")
    (
        magic,
        version,
        backing_offset,
        backing_length,
        mtime,
        virtual_size,
        cluster_bits,
        l2_bits,
        _padding,
        crypt_method,
        l1_table_offset,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise BadRequest("not a qcow image of version 1")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise _corrupt(f"the header has cluster_bits {cluster_bits} (9 to 16 are allowed)")
    if not MIN_L2_BITS <= l2_bits <= MAX_L2_BITS:
        raise _corrupt(f"the header has l2_bits {l2_bits} (6 to 13 are allowed)")
    if virtual_size <= 1:
        raise _corrupt(f"the header has a size of {virtual_size} bytes")
    if crypt_method not in (CRYPT_NONE, CRYPT_AES):
        raise UnsupportedFeature(f"the encryption method {crypt_method} is not supported")
    header = Qcow1Header(
        None, mtime, virtual_size, cluster_bits, l2_bits, crypt_method, l1_table_offset
    )
    if header.l1_size * 8 > MAX_L1_LENGTH:
        raise _corrupt(f"the size {virtual_size} needs an L1 table of {header.l1_size} entries")
    if l1_table_offset < HEADER_LENGTH or l1_table_offset + header.l1_size * 8 > file_size:
        raise _corrupt(
            f"the L1 table of {header.l1_size} entries at {l1_table_offset:#x}"
            f" is outside the file of {file_size} bytes"
        )
    if not backing_offset or not backing_length:
        return header
    if backing_length > MAX_BACKING_NAME_LENGTH:
        raise _corrupt(f"the backing file's name has {backing_length} bytes (1023 are allowed)")
    if backing_offset < HEADER_LENGTH or backing_offset + backing_length > min(
        file_size, len(data)
    ):
        raise _corrupt(f"the backing file's name at {backing_offset:#x} is outside the header")
    name = bytes(data[backing_offset : backing_offset + backing_length])
    return replace(header, backing_file=name)


def serialize_qcow1_header(header: Qcow1Header) -> bytes:
    """The header and the backing name behind it."""
    name = header.backing_file or b""
    return (
        _HEADER.pack(
            MAGIC,
            VERSION,
            HEADER_LENGTH if name else 0,
            len(name),
            header.mtime,
            header.virtual_size,
            header.cluster_bits,
            header.l2_bits,
            0,
            header.crypt_method,
            header.l1_table_offset,
        )
        + name
    )


def resize_field(header: Qcow1Header) -> tuple[int, bytes]:
    """(file offset, bytes) of the fields from the size to the L1 table's offset: one write."""
    return _SIZE_OFFSET, serialize_qcow1_header(header)[_SIZE_OFFSET:HEADER_LENGTH]


def l2_table_offset(entry: int, l1_index: int, header: Qcow1Header, host_end: int) -> int:
    """The host offset of the L2 table that an L1 entry names, 0 for none.

    Raises CorruptImage for a table that is not wholly inside the first
    `host_end` bytes of the file, behind the header.
    """
    if entry and not HEADER_LENGTH <= entry <= host_end - header.l2_table_length:
        raise CorruptImage(
            f"L1 table: entry {l1_index} ({entry:#x}) names an L2 table outside the file",
            structure="L1 table",
            index=l1_index,
            host_offset=entry,
        )
    return entry


def check_entry(entry: int, guest_offset: int, header: Qcow1Header, host_end: int) -> None:
    """Raise CorruptImage for an L2 entry, not 0, that breaks a rule of the format."""
    if entry & COMPRESSED_FLAG:
        host_offset, length = header.compressed_location(entry)
        if length and HEADER_LENGTH <= host_offset < host_end:
            return
        rule = "names no compressed stream inside the file"
    elif entry & SECTOR - 1:
        rule = "is not aligned to a sector"
    elif HEADER_LENGTH <= entry < host_end:
        return
    else:
        rule = "lies outside the file"
    raise CorruptImage(
        f"L2 table: the entry {entry:#x} for guest offset {guest_offset:#x} {rule}",
        structure="L2 table",
        index=guest_offset >> header.cluster_bits & header.l2_entry_count - 1,
        host_offset=entry,
    )


def list_extents(
    words: "array[int]",
    guest_offset: int,
    guest_end: int,
    header: Qcow1Header,
    host_end: int,
    extents: list[Extent],
    limit: int | None = None,
) -> int:
    """Append what [guest_offset, guest_end), inside one L2 table, is made of; where it ended.

    Extents continue the last one of `extents` where they can. With `limit`, no
    more than so many extents are made. Raises CorruptImage as `check_entry`.
    """
    cluster_size = header.cluster_size
    in_cluster = cluster_size - 1
    index = guest_offset >> header.cluster_bits & header.l2_entry_count - 1
    while guest_offset < guest_end:
        entry = words[index]
        stop = min(guest_end, (guest_offset | in_cluster) + 1)
        length = stop - guest_offset
        if not entry:
            extent = Extent(ExtentKind.UNALLOCATED, guest_offset, length)
        elif entry & COMPRESSED_FLAG:
            check_entry(entry, guest_offset, header, host_end)
            stream_offset, stored_length = header.compressed_location(entry)
            extent = Extent(
                ExtentKind.COMPRESSED, guest_offset, length, stream_offset, stored_length
            )
        else:
            if entry & SECTOR - 1 or not HEADER_LENGTH <= entry < host_end:
                check_entry(entry, guest_offset, header, host_end)
            host_offset = entry + (guest_offset & in_cluster)
            extent = Extent(ExtentKind.DATA, guest_offset, length, host_offset)
        if not append_extent(extents, extent, limit):
            break
        guest_offset = stop
        index += 1
    return guest_offset


def append_extent(extents: list[Extent], extent: Extent, limit: int | None = None) -> bool:
    """Append an extent, or lengthen the last one by it; False when there are `limit` already.

    Compressed clusters stay apart, as each has a stream of its own.
    """
    kind, _, length, host_offset, _ = extent
    if extents:
        last = extents[-1]
        if (
            last.kind is kind
            and kind is not ExtentKind.COMPRESSED
            and (
                last.host_offset == host_offset
                if host_offset is None or last.host_offset is None
                else last.host_offset + last.length == host_offset
            )
        ):
            extents[-1] = last._replace(length=last.length + length)
            return True
        if limit is not None and len(extents) >= limit:
            return False
    extents.append(extent)
    return True
