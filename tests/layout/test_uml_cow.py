"""The COW headers: all layouts, how they are told apart, what is refused; the bitmap's runs."""

import os
import random
import struct
from array import array

import pytest

from qcowfs.driver.layout.uml_cow import (
    LAYOUT_BY_NAME,
    LAYOUTS,
    CowHeader,
    list_runs,
    parse_cow_header,
    serialize_cow_header,
    set_bits,
)
from qcowfs.errors import BadRequest, CorruptImage, QcowfsError, UnsupportedFeature

MUTATIONS = int(os.environ.get("QCOWFS_FUZZ_MUTATIONS", "300"))
NAMES = [layout.name for layout in LAYOUTS]


def image_of(header: CowHeader) -> bytes:
    """A header with its bitmap of zeros behind it, as long as it must be."""
    end = header.bitmap_offset + header.stated_bitmap_length
    return serialize_cow_header(header).ljust(max(end, 8192), b"\0")


@pytest.mark.parametrize("size", [512, 1 << 20, 5 << 30, 1 << 40])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_read_back(name: str, size: int) -> None:
    """What a layout's writer wrote is recognised as that layout, at any size."""
    header = CowHeader(LAYOUT_BY_NAME[name], b"/images/base.raw", 1_700_000_000, size)
    data = serialize_cow_header(header)
    end = header.bitmap_offset + header.stated_bitmap_length
    found = parse_cow_header(data.ljust(8192, b"\0"), end)
    assert found.layout.name == name
    assert (found.backing_file, found.mtime) == (b"/images/base.raw", 1_700_000_000)
    assert found.data_offset == header.data_offset >= end


def test_the_places_of_the_fields() -> None:
    """The structures of the format, byte by byte, and where bitmap and data begin."""
    sizes = {
        "qemu-2-64": (1056, 1056, 1536),
        "qemu-2-32": (1048, 1048, 1536),
        "uml-2-64": (4128, 4128, 4608),
        "uml-2-32": (4120, 4120, 4608),
        "uml-3": (4128, 8192, 12288),
        "uml-3-unpacked": (4136, 8192, 12288),
        "uml-1-64": (288, 288, 1024),
        "uml-1-32": (280, 280, 1024),
    }
    for name, (length, bitmap_offset, data_offset) in sizes.items():
        header = CowHeader(LAYOUT_BY_NAME[name], b"/b", 7, 1_800_192)
        assert len(serialize_cow_header(header)) == length, name
        assert (header.bitmap_offset, header.data_offset) == (bitmap_offset, data_offset), name
    qemu = serialize_cow_header(CowHeader(LAYOUT_BY_NAME["qemu-2-64"], b"/b", 7, 1 << 20))
    assert qemu[:8] == b"OOOM\0\0\0\2"
    assert struct.unpack_from(">i4xQI", qemu, 1032) == (7, 1 << 20, 512)
    packed = serialize_cow_header(CowHeader(LAYOUT_BY_NAME["uml-3"], b"/b", 7, 1 << 20))
    assert struct.unpack_from(">IQIII2s", packed, 8) == (7, 1 << 20, 512, 4096, 0, b"/b")
    little = serialize_cow_header(CowHeader(LAYOUT_BY_NAME["uml-1-64"], b"/b", 7, 1 << 20))
    assert little[:8] == b"MOOO\1\0\0\0"


def test_old_versions_round_the_bitmap_down() -> None:
    """Versions 1 and 2 may leave the last sectors without a bit; version 3 and QEMU do not."""
    sectors = (1536 - 1056) * 8 + 3
    header = CowHeader(LAYOUT_BY_NAME["qemu-2-64"], b"/b", 0, sectors * 512)
    assert header.tracked_count == header.bit_count == sectors
    sectors = (4608 - 4128) * 8 + 3
    header = CowHeader(LAYOUT_BY_NAME["uml-2-64"], b"/b", 0, sectors * 512)
    assert header.data_offset == 4608
    assert (header.bit_count, header.tracked_count) == (sectors, sectors - 3)


def test_a_path_that_does_not_fit_is_refused() -> None:
    """A path needs room for its terminator; none is ever cut."""
    for name in NAMES:
        layout = LAYOUT_BY_NAME[name]
        fits = CowHeader(layout, b"p" * (layout.path_length - 1), 0, 1 << 20)
        assert parse_cow_header(image_of(fits), 1 << 30).backing_file == fits.backing_file
        with pytest.raises(BadRequest, match="path"):
            serialize_cow_header(CowHeader(layout, b"p" * layout.path_length, 0, 1 << 20))


@pytest.mark.parametrize(
    ("at", "value", "cause"),
    [
        (1048, struct.pack(">I", 0), "sectors of 0"),
        (1048, struct.pack(">I", 511), "sectors of 511"),
        (1048, struct.pack(">I", 1 << 31), "sectors of"),
        (1048, struct.pack(">I", 4096), "sectors of 4096"),
        (1040, struct.pack(">Q", 0), "a size of 0"),
        (1040, struct.pack(">Q", 511), "a size of 511"),
        (1040, struct.pack(">Q", 1 << 63), "a size of"),
        (1040, struct.pack(">Q", 1 << 50), "past the end"),
        (8, b"p" * 1024, "without an end"),
    ],
)
def test_what_makes_no_sense_is_refused(at: int, value: bytes, cause: str) -> None:
    """Fields out of range, a bitmap past the end of the file, a path without a terminator."""
    data = bytearray(image_of(CowHeader(LAYOUT_BY_NAME["qemu-2-64"], b"/b", 0, 1 << 20)))
    data[at : at + len(value)] = value
    with pytest.raises(CorruptImage) as caught:
        parse_cow_header(bytes(data), len(data))
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_with_two_meanings_is_refused() -> None:
    """Where more than one layout is plausible, none is guessed."""
    data = bytearray(8192)
    data[:8] = b"OOOM\0\0\0\2"
    # A path of more than 1,024 bytes that happens to hold a QEMU header's fields.
    struct.pack_into(">QI", data, 1040, 1 << 20, 512)
    struct.pack_into(">QI", data, 1036 + 3076, 1 << 20, 512)
    with pytest.raises(CorruptImage, match="more than one way"):
        parse_cow_header(bytes(data[:1028]) + b"x" + bytes(data[1029:]), 1 << 30)


def test_versions_and_magic() -> None:
    """Unknown versions are unsupported, another magic number is no COW image at all."""
    for version in (0, 4, 0xFFFFFFFF):
        with pytest.raises(UnsupportedFeature, match="version"):
            parse_cow_header(b"OOOM" + struct.pack(">I", version) + bytes(8184), 1 << 20)
    with pytest.raises(UnsupportedFeature):
        parse_cow_header(b"MOOO" + struct.pack("<I", 2) + bytes(8184), 1 << 20)
    for data in (b"", b"OOO", b"OOOM\0\0", b"QFI\xfb" + bytes(8188)):
        with pytest.raises(BadRequest):
            parse_cow_header(data, len(data))


def test_short_files() -> None:
    """A header cut off anywhere is refused without a traceback."""
    for name in NAMES:
        whole = serialize_cow_header(CowHeader(LAYOUT_BY_NAME[name], b"/b", 0, 4096))
        for length in range(8, len(whole), 97):
            with pytest.raises(QcowfsError):
                parse_cow_header(whole[:length], length)


def test_mutated_headers() -> None:
    """Any header gives its fields or a QcowfsError, and nothing that lies outside of the file."""
    rng = random.Random(11)
    for number in range(MUTATIONS):
        layout = LAYOUTS[number % len(LAYOUTS)]
        data = bytearray(image_of(CowHeader(layout, b"/b", 1, 1 << 20)))
        for _ in range(rng.randint(1, 4)):
            field = rng.choice((0, 4, layout.mtime_offset, layout.size_offset,
                                layout.sector_offset, rng.randrange(layout.length)))  # fmt: skip
            data[field + rng.randrange(8)] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
        try:
            header = parse_cow_header(bytes(data), len(data))
        except QcowfsError as error:
            assert "\n" not in str(error)
            continue
        assert header.bitmap_offset + header.stated_bitmap_length <= len(data)
        assert header.tracked_count <= header.bit_count


def test_runs_of_bits() -> None:
    """Runs cover their range in order; setting a range sets those bits and no other."""
    rng = random.Random(3)
    bits = array("B", bytes(64))
    model = [False] * 512
    for _ in range(200):
        first = rng.randrange(512)
        count = rng.randint(1, 512 - first)
        if rng.random() < 0.3:
            count = min(count, 5)
            start, length = set_bits(bits, first, count)
            assert start == first // 8 and (start + length) * 8 >= first + count
            model[first : first + count] = [True] * count
        covered = first
        for is_set, start, length in list_runs(bits, first, count):
            assert start == covered
            assert model[start : start + length] == [is_set] * length
            covered += length
        assert covered == first + count
