"""The headers and the bitmap of User-mode-Linux COW images, all layouts (FORMATS.md 1.3).

Pure: bytes to values and back. A COW image is a header, a bitmap with a bit for
each sector (least significant first), and the sectors at their own places
behind it. Several programs wrote headers under one version number, so a header
is read in every way that its magic number and version allow, and the one that
is plausible is it:

- version 1, 256 bytes of path, in the byte order of the host that wrote it;
- version 2 with 1,024 bytes of path, as QEMU had it, or 4,096, as
  User-mode-Linux has it; both as 64-bit and as 32-bit compilers laid it out;
- version 3, packed, and unpacked as 64-bit programs wrote it until 2005.

Invariant: no size of a header is believed before it is held against the file.
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.errors import BadRequest, CorruptImage, UnsupportedFeature

MAGIC = b"OOOM"
# What a little-endian host makes of the magic number; only version 1 has it.
MAGIC_LITTLE = b"MOOO"
HEADER_LENGTH_MAX = 8192
_MAX_SECTOR_LENGTH = 1 << 16
_MAX_ALIGNMENT = 1 << 24


@dataclass(frozen=True, slots=True)
class CowLayout:
    """Where a kind of header keeps its fields, in bytes from the beginning.

    `order` is that of struct. `is_aligned`: bitmap and data begin at multiples
    of the header's own alignment field, and the bitmap's length is rounded up;
    User-mode-Linux's older versions round it down.
    """

    name: str
    version: int
    order: str
    path_offset: int
    path_length: int
    mtime_offset: int
    size_offset: int
    sector_offset: int
    length: int
    is_aligned: bool = False

    @property
    def is_qemu(self) -> bool:
        """Whether QEMU's driver wrote it, which counts whole sectors of 512 bytes only."""
        return self.path_length == 1024


def _version_1(name: str, order: str, size_offset: int, length: int) -> CowLayout:
    return CowLayout(name, 1, order, 8, 256, 264, size_offset, size_offset + 8, length)


LAYOUTS = (
    CowLayout("qemu-2-64", 2, ">", 8, 1024, 1032, 1040, 1048, 1056),
    CowLayout("qemu-2-32", 2, ">", 8, 1024, 1032, 1036, 1044, 1048),
    CowLayout("uml-2-64", 2, ">", 8, 4096, 4104, 4112, 4120, 4128),
    CowLayout("uml-2-32", 2, ">", 8, 4096, 4104, 4108, 4116, 4120),
    CowLayout("uml-3", 3, ">", 32, 4096, 8, 12, 20, 4128, is_aligned=True),
    CowLayout("uml-3-unpacked", 3, ">", 36, 4096, 8, 16, 24, 4136, is_aligned=True),
    _version_1("uml-1-64", "<", 272, 288),
    _version_1("uml-1-32", "<", 268, 280),
    _version_1("uml-1-64-big-endian", ">", 272, 288),
    _version_1("uml-1-32-big-endian", ">", 268, 280),
)
LAYOUT_BY_NAME = {layout.name: layout for layout in LAYOUTS}


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


@dataclass(frozen=True, slots=True)
class CowHeader:
    """All fields of a header; sizes in bytes, `mtime` in seconds since 1970.

    `alignment` counts for version 3 alone.
    """

    layout: CowLayout
    backing_file: bytes | None
    mtime: int
    virtual_size: int
    sector_length: int = SECTOR
    alignment: int = 4096

    @property
    def disk_size(self) -> int:
        """The size of the disk: `virtual_size` to its last whole 512 bytes."""
        return self.virtual_size & -SECTOR

    @property
    def bit_count(self) -> int:
        """How many sectors, the last perhaps a part of one, the disk has."""
        return -(-self.disk_size // self.sector_length)

    @property
    def bitmap_offset(self) -> int:
        """The host offset of the bitmap."""
        if self.layout.is_aligned:
            return _round_up(self.layout.length, self.alignment)
        return self.layout.length

    @property
    def stated_bitmap_length(self) -> int:
        """The length that decides where data begins, by the rounding of the version."""
        if self.layout.is_qemu:
            return (self.virtual_size // SECTOR + 7) // 8
        if self.layout.is_aligned:
            sectors = (self.virtual_size + self.sector_length - 1) // self.sector_length
            return (sectors + 7) // 8
        return (self.virtual_size + self.sector_length - 1) // (8 * self.sector_length)

    @property
    def data_offset(self) -> int:
        """The host offset of the first sector."""
        unit = self.alignment if self.layout.is_aligned else self.sector_length
        return _round_up(self.bitmap_offset + self.stated_bitmap_length, unit)

    @property
    def tracked_count(self) -> int:
        """How many sectors have a bit: the rounding of versions 1 and 2 may leave out the last."""
        return min(self.bit_count, (self.data_offset - self.bitmap_offset) * 8)


def parse_cow_header(data: bytes, file_size: int) -> CowHeader:
    """Parse the beginning of a file; `data` holds its first 8 KiB or what there is.

    Raises BadRequest for something that is no COW image, UnsupportedFeature for
    an unknown version, CorruptImage for fields that make no sense, or that make
    sense in more than one way.
    """
    if data[:4] not in (MAGIC, MAGIC_LITTLE) or len(data) < 8:
        raise BadRequest("not a COW image")
    order = ">" if data[:4] == MAGIC else "<"
    version: int = struct.unpack_from(order + "I", data, 4)[0]
    layouts = [
        layout for layout in LAYOUTS if layout.version == version and layout.order == order
    ]
    if not layouts:
        raise UnsupportedFeature(f"the COW version {version} is not supported")
    causes: list[str] = []
    found: list[CowHeader] = []
    for layout in layouts:
        header = _read(data, layout)
        cause = _implausibility(header, data, file_size)
        if cause is None:
            assert header is not None
            found.append(header)
        else:
            causes.append(f"{layout.name}: {cause}")
    if len(found) > 1:
        # What follows a path in its field is zeros, in all that ever wrote one.
        found = [header for header in found if _has_clean_path(data, header.layout)]
        if len(found) != 1:
            raise CorruptImage(
                "the COW header makes sense in more than one way", structure="header"
            )
    if not found:
        raise CorruptImage(
            f"the COW header makes no sense ({'; '.join(causes)})", structure="header"
        )
    return found[0]


def _read(data: bytes, layout: CowLayout) -> CowHeader | None:
    """The fields as `layout` has them; None when the header does not fit or its path has no end."""
    if len(data) < layout.length:
        return None
    path_field = data[layout.path_offset : layout.path_offset + layout.path_length]
    path, end, _ = path_field.partition(b"\0")
    if not end:
        return None
    order = layout.order
    alignment = SECTOR
    if layout.is_aligned:
        alignment, cow_format = struct.unpack_from(">II", data, layout.sector_offset + 4)
        if cow_format != 0:
            return None
    return CowHeader(
        layout,
        path or None,
        struct.unpack_from(order + "I", data, layout.mtime_offset)[0],
        struct.unpack_from(order + "Q", data, layout.size_offset)[0],
        struct.unpack_from(order + "I", data, layout.sector_offset)[0],
        alignment,
    )


def _implausibility(header: CowHeader | None, data: bytes, file_size: int) -> str | None:
    """Why a header cannot be meant so; None when it can."""
    if header is None:
        return "too short, or a path without an end, or an unknown format"
    layout = header.layout
    sector_length = header.sector_length
    if layout.is_qemu and sector_length != SECTOR:
        return f"sectors of {sector_length} bytes"
    if sector_length & sector_length - 1 or not SECTOR <= sector_length <= _MAX_SECTOR_LENGTH:
        return f"sectors of {sector_length} bytes"
    alignment = header.alignment
    if alignment & alignment - 1 or not 1 <= alignment <= _MAX_ALIGNMENT:
        return f"an alignment of {alignment} bytes"
    if layout.name == "uml-3-unpacked" and any(data[12:16]):
        return "no gap behind the time"
    if not SECTOR <= header.virtual_size < 1 << 62:
        return f"a size of {header.virtual_size} bytes"
    if header.bitmap_offset + header.stated_bitmap_length > file_size:
        return f"a bitmap of {header.stated_bitmap_length} bytes past the end of the file"
    return None


def _has_clean_path(data: bytes, layout: CowLayout) -> bool:
    field = data[layout.path_offset : layout.path_offset + layout.path_length]
    return not any(field[field.index(b"\0") :])


def serialize_cow_header(header: CowHeader) -> bytes:
    """The header as its layout has it.

    Raises BadRequest when the backing file's path does not fit.
    """
    layout = header.layout
    path = header.backing_file or b""
    if len(path) >= layout.path_length:
        raise BadRequest(
            f"the backing file's path has {len(path)} bytes: at most {layout.path_length - 1}"
        )
    order = layout.order
    data = bytearray(layout.length)
    data[:4] = MAGIC if order == ">" else MAGIC_LITTLE
    struct.pack_into(order + "I", data, 4, layout.version)
    data[layout.path_offset : layout.path_offset + len(path)] = path
    struct.pack_into(order + "I", data, layout.mtime_offset, header.mtime & 0xFFFFFFFF)
    struct.pack_into(order + "Q", data, layout.size_offset, header.virtual_size)
    struct.pack_into(order + "I", data, layout.sector_offset, header.sector_length)
    if layout.is_aligned:
        struct.pack_into(">I", data, layout.sector_offset + 4, header.alignment)
    return bytes(data)


def list_runs(bits: "array[int]", first: int, count: int) -> Iterator[tuple[bool, int, int]]:
    """(is set, first bit, bit count) of the runs in bits [first, first + count) of a page."""
    if count <= 0:
        return
    # Shifts and carries of one long integer find each run's end without a step a bit.
    word = int.from_bytes(bits[first >> 3 : (first + count + 7) >> 3].tobytes(), "little")
    word = (word >> (first & 7)) & ((1 << count) - 1)
    while count:
        is_set = bool(word & 1)
        other = word ^ ((1 << count) - 1) if is_set else word
        length = (other & -other).bit_length() - 1 if other else count
        yield is_set, first, length
        word >>= length
        first += length
        count -= length


def set_bits(bits: "array[int]", first: int, count: int) -> tuple[int, int]:
    """Set bits [first, first + count), not none; (first byte, byte count) of what may change."""
    start, end = first >> 3, (first + count + 7) >> 3
    word = int.from_bytes(bits[start:end].tobytes(), "little")
    word |= ((1 << count) - 1) << (first & 7)
    bits[start:end] = array("B", word.to_bytes(end - start, "little"))
    return start, end - start
