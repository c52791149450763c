"""The bitmap directory and bitmap tables: FORMATS.md 1.5."""

import struct
from array import array
from dataclasses import replace

import pytest

from qcowfs.driver.layout.bitmap_directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    BitmapEntry,
    BitmapExtension,
    parse_bitmap_directory,
    parse_bitmap_extension,
    parse_bitmap_table,
    serialised_length,
    serialize_bitmap_directory,
    serialize_bitmap_extension,
    table_entry_count,
)
from qcowfs.driver.layout.mapping import store_words
from qcowfs.errors import CorruptImage

CLUSTER = 65536
SIZE = 1 << 30
GOOD = BitmapEntry(5 * CLUSTER, 1, FLAG_AUTO, 16, b"backup-1")


def parse(data: bytes, count: int) -> tuple[BitmapEntry, ...]:
    """Parse with the geometry of these tests."""
    return parse_bitmap_directory(data, count, cluster_size=CLUSTER, virtual_size=SIZE)


@pytest.mark.parametrize("names", [[b"a"], [b"a", b"bb" * 4, b"x" * 1023], [b"\xc3\xa4", b"b"]])
def test_what_was_written_is_read(names: list[bytes]) -> None:
    """Entries of any name length come back, each padded to 8 bytes."""
    entries = tuple(replace(GOOD, name=name) for name in names)
    data = serialize_bitmap_directory(entries)
    assert len(data) % 8 == 0
    assert parse(data, len(entries)) == entries


def test_flags() -> None:
    """IN_USE and AUTO are set and cleared one by one."""
    used = GOOD.with_flags(in_use=True)
    assert used.flags == FLAG_AUTO | FLAG_IN_USE
    assert used.with_flags(in_use=False, auto=False).flags == 0


DAMAGE = {
    "reserved flags": replace(GOOD, flags=4),
    "empty name": replace(GOOD, name=b""),
    "name of 1,024 bytes": replace(GOOD, name=b"n" * 1024),
    "granularity below 512": replace(GOOD, granularity_bits=8),
    "granularity above 2^31": replace(GOOD, granularity_bits=32),
    "table at 0": replace(GOOD, table_offset=0),
    "table unaligned": replace(GOOD, table_offset=CLUSTER + 512),
    "table of no entries": replace(GOOD, table_entry_count=0),
    "table too large": replace(GOOD, table_entry_count=2**32 - 1),
    "table larger than the disk needs": replace(GOOD, table_entry_count=2),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str) -> None:
    """An entry out of range is a CorruptImage that names its index."""
    data = serialize_bitmap_directory((GOOD, replace(DAMAGE[name])))
    with pytest.raises(CorruptImage, match="entry 1 of the bitmap directory"):
        parse(data, 2)


def test_an_entry_in_use_may_have_another_size() -> None:
    """A resize under an inconsistent bitmap leaves its old table, which only a removal reads."""
    entry = replace(GOOD, table_entry_count=2, flags=FLAG_IN_USE)
    assert parse(serialize_bitmap_directory((entry,)), 1) == (entry,)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_entries_than_counted(count: int) -> None:
    """The number of entries must be exactly the header's."""
    data = serialize_bitmap_directory((GOOD, replace(GOOD, name=b"other")))
    with pytest.raises(CorruptImage, match=r"more than|are counted"):
        parse(data, count)


def test_a_name_twice() -> None:
    """Two bitmaps of one name are refused."""
    with pytest.raises(CorruptImage, match="repeats a name"):
        parse(serialize_bitmap_directory((GOOD, GOOD)), 2)


@pytest.mark.parametrize("length", [1, 23, 24, 31])
def test_a_cut_off_directory(length: int) -> None:
    """Neither an entry nor its name may be cut off."""
    with pytest.raises(CorruptImage, match="cut off"):
        parse(serialize_bitmap_directory((GOOD,))[:length], 1)


def test_extra_data_and_type_are_refused() -> None:
    """Extra data is known to nobody, and only dirty tracking bitmaps exist."""
    data = bytearray(serialize_bitmap_directory((GOOD,)))
    struct.pack_into(">I", data, 20, 8)
    with pytest.raises(CorruptImage, match="extra data"):
        parse(bytes(data), 1)
    data = bytearray(serialize_bitmap_directory((GOOD,)))
    data[16] = 2
    with pytest.raises(CorruptImage, match="type 2"):
        parse(bytes(data), 1)


def test_the_extension() -> None:
    """24 bytes there and back."""
    extension = BitmapExtension(3, 96, 7 * CLUSTER)
    assert parse_bitmap_extension(serialize_bitmap_extension(extension), CLUSTER) == extension


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(23),
        struct.pack(">IIQQ", 1, 1, 32, CLUSTER),
        struct.pack(">IIQQ", 0, 0, 32, CLUSTER),
        struct.pack(">IIQQ", 65536, 0, 32, CLUSTER),
        struct.pack(">IIQQ", 1, 0, 32, CLUSTER + 512),
        struct.pack(">IIQQ", 1, 0, 32, 0),
        struct.pack(">IIQQ", 1, 0, 0, CLUSTER),
        struct.pack(">IIQQ", 1, 0, 2**63, CLUSTER),
    ],
)
def test_a_bad_extension(data: bytes) -> None:
    """Every field has a range."""
    with pytest.raises(CorruptImage):
        parse_bitmap_extension(data, CLUSTER)


@pytest.mark.parametrize(
    ("size", "bits", "length"),
    [(0, 16, 0), (1, 16, 1), (8 << 16, 16, 1), ((8 << 16) + 1, 16, 2), (1 << 40, 9, 1 << 28)],
)
def test_serialised_length(size: int, bits: int, length: int) -> None:
    """One bit a granule, the last one a part of a granule maybe."""
    assert serialised_length(size, bits) == length
    assert table_entry_count(size, bits, CLUSTER) == -(-length // CLUSTER)


def test_a_table() -> None:
    """Zero, all ones, and offsets of clusters inside the file."""
    words = array("Q", [0, 1, 3 * CLUSTER])
    assert parse_bitmap_table(bytes(store_words(words)), CLUSTER, 4 * CLUSTER) == words


@pytest.mark.parametrize(
    "word", [2, CLUSTER | 1, CLUSTER + 512, 4 * CLUSTER, 1 << 56 | CLUSTER, 1 << 63]
)
def test_a_bad_table(word: int) -> None:
    """Reserved bits, all ones with an offset, unaligned, past the end."""
    data = bytes(store_words(array("Q", [0, word])))
    with pytest.raises(CorruptImage, match="entry 1 of a bitmap table"):
        parse_bitmap_table(data, CLUSTER, 4 * CLUSTER)
