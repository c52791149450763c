"""The directory and the tables of persistent dirty bitmaps (FORMATS.md 1.5).

Pure: bytes to values and back. The directory is a run of entries, each 24
bytes, extra data, the name, padded to 8; a bitmap table is an array of 64-bit
entries, one a cluster of the serialised bitmap.

Serialisation: bit i, counted from the least significant of each byte, stands
for the granule i of the disk; the bits behind the last granule are zero.
"""

import struct
from array import array
from dataclasses import dataclass, replace

from qcowfs.driver.layout.mapping import load_words
from qcowfs.errors import CorruptImage

MAX_BITMAPS = 65535
MAX_DIRECTORY_LENGTH = 1024 * MAX_BITMAPS
MAX_TABLE_ENTRIES = 0x8000000
MAX_SERIALISED_LENGTH = 0x20000000
MAX_NAME_LENGTH = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31

FLAG_IN_USE = 1
FLAG_AUTO = 2
_FLAGS_RESERVED = 0xFFFFFFFC
_TYPE_DIRTY_TRACKING = 1

TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00
TABLE_ALL_ONES = 1
_TABLE_RESERVED = 0xFF000000000001FE

_ENTRY = struct.Struct(">QIIBBHI")
_EXTENSION = struct.Struct(">IIQQ")
EXTENSION_LENGTH = _EXTENSION.size


@dataclass(frozen=True, slots=True)
class BitmapExtension:
    """The header extension: how many bitmaps, and where their directory lies (bytes)."""

    count: int
    directory_length: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap of the directory; the granularity is `1 << granularity_bits` bytes."""

    table_offset: int
    table_entry_count: int
    flags: int
    granularity_bits: int
    name: bytes

    @property
    def in_use(self) -> bool:
        """Whether somebody did not finish with it: what it says is not to be believed."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """Whether it records from the moment that the image is opened."""
        return bool(self.flags & FLAG_AUTO)

    def with_flags(self, *, in_use: bool | None = None, auto: bool | None = None) -> "BitmapEntry":
        """The same entry with flags set or cleared."""
        flags = self.flags
        for flag, value in ((FLAG_IN_USE, in_use), (FLAG_AUTO, auto)):
            if value is not None:
                flags = flags | flag if value else flags & ~flag
        return replace(self, flags=flags)


def _corrupt(message: str, index: int | None = None) -> CorruptImage:
    return CorruptImage(message, structure="bitmap directory", index=index)


def parse_bitmap_extension(data: bytes, cluster_size: int) -> BitmapExtension:
    """Parse the 24 bytes of the header extension; raises CorruptImage."""
    if len(data) != EXTENSION_LENGTH:
        raise _corrupt(f"the bitmaps extension has {len(data)} bytes (it must have 24)")
    count, reserved, length, offset = _EXTENSION.unpack(data)
    if reserved:
        raise _corrupt(f"the bitmaps extension has {reserved:#x} in its reserved field")
    if not 1 <= count <= MAX_BITMAPS:
        raise _corrupt(f"the bitmaps extension counts {count} bitmaps (1 to {MAX_BITMAPS})")
    if offset == 0 or offset % cluster_size:
        raise _corrupt(f"the bitmap directory at {offset:#x} is not cluster aligned")
    if not 1 <= length <= MAX_DIRECTORY_LENGTH:
        raise _corrupt(f"the bitmap directory has {length} bytes (1 to {MAX_DIRECTORY_LENGTH})")
    return BitmapExtension(count, length, offset)


def serialize_bitmap_extension(extension: BitmapExtension) -> bytes:
    """The 24 bytes of the header extension."""
    return _EXTENSION.pack(
        extension.count, 0, extension.directory_length, extension.directory_offset
    )


def table_entry_count(virtual_size: int, granularity_bits: int, cluster_size: int) -> int:
    """How many clusters the serialised bitmap of a disk spans."""
    return -(-serialised_length(virtual_size, granularity_bits) // cluster_size)


def serialised_length(virtual_size: int, granularity_bits: int) -> int:
    """The bytes of a disk's serialised bitmap."""
    granule_count = -(-virtual_size >> granularity_bits)
    return -(-granule_count // 8)


def _check_entry(entry: BitmapEntry, index: int, cluster_size: int, virtual_size: int) -> None:
    label = f"entry {index} of the bitmap directory"
    if entry.flags & _FLAGS_RESERVED:
        raise _corrupt(f"{label} has the unknown flags {entry.flags & _FLAGS_RESERVED:#x}", index)
    if not 1 <= len(entry.name) <= MAX_NAME_LENGTH:
        raise _corrupt(f"{label} has a name of {len(entry.name)} bytes (1 to 1023)", index)
    if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        raise _corrupt(f"{label} has a granularity of 2^{entry.granularity_bits} bytes", index)
    if entry.table_offset == 0 or entry.table_offset % cluster_size:
        raise _corrupt(f"{label} has its table at {entry.table_offset:#x}, not aligned", index)
    count = entry.table_entry_count
    if not 1 <= count <= MAX_TABLE_ENTRIES or count * cluster_size > MAX_SERIALISED_LENGTH:
        raise _corrupt(f"{label} has a table of {count} entries", index)
    wanted = table_entry_count(virtual_size, entry.granularity_bits, cluster_size)
    if not entry.in_use and count != wanted:
        raise _corrupt(f"{label} has a table of {count} entries, the disk needs {wanted}", index)


def parse_bitmap_directory(
    data: bytes, count: int, *, cluster_size: int, virtual_size: int
) -> tuple[BitmapEntry, ...]:
    """Parse a directory of exactly `count` entries that fill `data`.

    Raises CorruptImage for a field out of range, extra data, a name used
    twice, and for more or fewer entries than counted.
    """
    entries: list[BitmapEntry] = []
    names: set[bytes] = set()
    cursor = 0
    while cursor < len(data):
        index = len(entries)
        if index == count:
            raise _corrupt(f"the bitmap directory has more than the {count} entries counted")
        if cursor + _ENTRY.size > len(data):
            raise _corrupt(f"entry {index} of the bitmap directory is cut off", index)
        offset, size, flags, kind, granularity_bits, name_length, extra_length = (
            _ENTRY.unpack_from(data, cursor)
        )
        if extra_length:
            raise _corrupt(
                f"entry {index} of the bitmap directory has {extra_length} bytes of extra data",
                index,
            )
        if kind != _TYPE_DIRTY_TRACKING:
            raise _corrupt(f"entry {index} of the bitmap directory has the type {kind}", index)
        begin = cursor + _ENTRY.size
        if begin + name_length > len(data):
            raise _corrupt(f"the name of entry {index} of the bitmap directory is cut off", index)
        entry = BitmapEntry(
            offset, size, flags, granularity_bits, bytes(data[begin : begin + name_length])
        )
        _check_entry(entry, index, cluster_size, virtual_size)
        if entry.name in names:
            raise _corrupt(f"entry {index} of the bitmap directory repeats a name", index)
        names.add(entry.name)
        entries.append(entry)
        cursor = begin + -(-name_length // 8) * 8
    if len(entries) != count:
        raise _corrupt(f"the bitmap directory has {len(entries)} entries, {count} are counted")
    return tuple(entries)


def serialize_bitmap_directory(entries: tuple[BitmapEntry, ...]) -> bytes:
    """The bytes of a directory."""
    parts: list[bytes] = []
    for entry in entries:
        parts.append(
            _ENTRY.pack(
                entry.table_offset,
                entry.table_entry_count,
                entry.flags,
                _TYPE_DIRTY_TRACKING,
                entry.granularity_bits,
                len(entry.name),
                0,
            )
        )
        parts.append(entry.name.ljust(-(-len(entry.name) // 8) * 8, b"\0"))
    return b"".join(parts)


def parse_bitmap_table(data: bytes, cluster_size: int, file_size: int) -> "array[int]":
    """The entries of a bitmap table as native words; raises CorruptImage.

    Each is 0 (all clean), 1 (all dirty) or the host offset of a cluster.
    """
    words = load_words(data)
    for index, word in enumerate(words):
        if word in (0, TABLE_ALL_ONES):
            continue
        offset = word & TABLE_OFFSET_MASK
        problem = None
        if word & _TABLE_RESERVED:
            problem = "has reserved bits set"
        elif word & TABLE_ALL_ONES:
            problem = "is all ones and has an offset"
        elif offset % cluster_size:
            problem = "is not cluster aligned"
        elif offset + cluster_size > file_size:
            problem = "points past the end of the file"
        if problem:
            raise CorruptImage(
                f"entry {index} of a bitmap table, {word:#018x}, {problem}",
                structure="bitmap table",
                index=index,
                host_offset=offset,
            )
    return words
