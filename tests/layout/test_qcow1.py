"""The header and the entries of qcow version 1: fields, limits, and what is refused."""

import os
import random
import struct
from array import array
from dataclasses import replace

import pytest

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.qcow1 import (
    COMPRESSED_FLAG,
    Qcow1Header,
    l2_table_offset,
    list_extents,
    parse_qcow1_header,
    resize_field,
    serialize_qcow1_header,
)
from qcowfs.errors import BadRequest, CorruptImage, QcowfsError, UnsupportedFeature

MUTATIONS = int(os.environ.get("QCOWFS_FUZZ_MUTATIONS", "300"))
HEADER = Qcow1Header(b"base.raw", 7, 10 << 20, 12, 9, 1, 56)


def image_of(header: Qcow1Header) -> bytes:
    """The header with an empty L1 table behind it."""
    return serialize_qcow1_header(header).ljust(header.l1_table_offset + header.l1_size * 8, b"\0")


def test_the_places_of_the_fields() -> None:
    """48 bytes, big-endian, the name behind them; what is written is read back."""
    data = image_of(HEADER)
    assert struct.unpack_from(">4sIQIIQBBHIQ", data) == (
        b"QFI\xfb", 1, 48, 8, 7, 10 << 20, 12, 9, 0, 1, 56,
    )  # fmt: skip
    assert data[48:56] == b"base.raw"
    assert parse_qcow1_header(data, len(data)) == HEADER
    plain = replace(HEADER, backing_file=None, l1_table_offset=48)
    assert parse_qcow1_header(image_of(plain), 1000) == plain


def test_what_follows_from_the_fields() -> None:
    """Sizes of clusters and tables; a size that is not whole sectors counts to the last one."""
    header = replace(HEADER, virtual_size=(10 << 20) + 700)
    assert (header.cluster_size, header.l2_table_length, header.l2_coverage) == (
        4096, 4096, 2 << 20,
    )  # fmt: skip
    assert (header.l1_size, header.disk_size) == (6, (10 << 20) + 512)


def test_compressed_entries_count_bytes() -> None:
    """The stored size is in bytes, its place depends on the cluster size."""
    for bits in range(9, 17):
        header = replace(HEADER, cluster_bits=bits)
        entry = header.compressed_entry(123_457, (1 << bits) - 1)
        assert entry >> 63 == 1
        assert header.compressed_location(entry) == (123_457, (1 << bits) - 1)


@pytest.mark.parametrize(
    ("field", "at", "values"),
    [
        ("cluster_bits", ">32xB", (0, 8, 17, 63, 255)),
        ("l2_bits", ">33xB", (0, 5, 14, 255)),
        ("size", ">24xQ", (0, 1)),
        ("L1 table", ">24xQ", (1 << 63, (1 << 64) - 1, 1 << 44)),
        ("L1 table", ">40xQ", (0, 47, 1 << 40, (1 << 64) - 1)),
        ("backing file", ">16xI", (1024, (1 << 32) - 1)),
        ("backing file", ">8xQ", (1, 40, 1 << 40, (1 << 64) - 1)),
    ],
)
def test_fields_out_of_range(field: str, at: str, values: tuple[int, ...]) -> None:
    """Each field is held against its limits and the file before it is believed."""
    whole = image_of(HEADER)
    offset = struct.calcsize(at) - struct.calcsize(">" + at[-1])
    for value in values:
        data = bytearray(whole)
        struct.pack_into(">" + at[-1], data, offset, value)
        with pytest.raises(CorruptImage, match=field):
            parse_qcow1_header(bytes(data), len(data))


def test_what_is_no_image_of_this_version() -> None:
    """Short data, another magic number or version, an unknown encryption."""
    data = image_of(HEADER)
    for length in (0, 1, 4, 47):
        with pytest.raises(BadRequest):
            parse_qcow1_header(data[:length], length)
    for wrong in (b"QFI\xfa" + data[4:], data[:7] + b"\2" + data[8:]):
        with pytest.raises(BadRequest):
            parse_qcow1_header(wrong, len(wrong))
    with pytest.raises(UnsupportedFeature, match="encryption"):
        parse_qcow1_header(data[:39] + b"\2" + data[40:], len(data))


def test_a_resize_is_one_write_inside_a_sector() -> None:
    """Size and L1 offset change together."""
    at, data = resize_field(replace(HEADER, virtual_size=1 << 30, l1_table_offset=8192))
    assert (at, len(data)) == (24, 24)
    whole = bytearray(image_of(HEADER))
    whole[at : at + len(data)] = data
    changed = parse_qcow1_header(bytes(whole), 1 << 20)
    assert (changed.virtual_size, changed.l1_table_offset) == (1 << 30, 8192)
    assert changed.backing_file == HEADER.backing_file


def test_extents_of_a_table() -> None:
    """Contiguous clusters are one extent, compressed ones stay apart, a limit ends the list."""
    stream = HEADER.compressed_entry(50_001, 99)
    words = array("Q", [8192, 12288, 0, 0, stream, stream, 4096] + [0] * 505)
    expected = [
        Extent(ExtentKind.DATA, 100, 8092, 8292),
        Extent(ExtentKind.UNALLOCATED, 8192, 8192),
        Extent(ExtentKind.COMPRESSED, 16384, 4096, 50_001, 99),
        Extent(ExtentKind.COMPRESSED, 20480, 4096, 50_001, 99),
        Extent(ExtentKind.DATA, 24576, 10, 4096),
    ]
    extents: list[Extent] = []
    assert list_extents(words, 100, 24586, HEADER, 1 << 20, extents) == 24586
    assert extents == expected
    for limit in (1, 3):
        extents = []
        end = list_extents(words, 100, 24586, HEADER, 1 << 20, extents, limit)
        assert extents == expected[:limit]
        assert end == expected[limit].guest_offset


@pytest.mark.parametrize(
    "entry", [1, 47, 600, 1 << 20, 1 << 62, COMPRESSED_FLAG | 8192, COMPRESSED_FLAG | (1 << 51)]
)
def test_entries_that_lead_nowhere(entry: int) -> None:
    """An entry that is not aligned, or not inside the file, is corrupt, and says which it is."""
    with pytest.raises(CorruptImage, match="0x") as caught:
        list_extents(array("Q", [entry] * 512), 0, 4096, HEADER, 1 << 20, [])
    assert caught.value.structure == "L2 table"


def test_l1_entries_that_lead_nowhere() -> None:
    """An L2 table lies behind the header and wholly inside the file; 0 is none."""
    assert l2_table_offset(0, 3, HEADER, 1 << 20) == 0
    assert l2_table_offset(56, 3, HEADER, 1 << 20) == 56
    assert l2_table_offset((1 << 20) - 4096, 3, HEADER, 1 << 20) == (1 << 20) - 4096
    for entry in (1, 47, (1 << 20) - 4095, 1 << 63):
        with pytest.raises(CorruptImage, match="entry 3"):
            l2_table_offset(entry, 3, HEADER, 1 << 20)


def test_mutated_headers() -> None:
    """Any header gives its fields or a QcowfsError of one line; the L1 table is inside the file."""
    rng = random.Random(5)
    whole = image_of(HEADER)
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(48)] = rng.choice((0, 1, 9, 12, 0x7F, 0x80, 0xFF))
        del data[rng.choice((len(data), len(data), rng.randrange(len(data)))) :]
        try:
            header = parse_qcow1_header(bytes(data), len(data))
        except QcowfsError as error:
            assert "\n" not in str(error)
            continue
        assert header.l1_table_offset + header.l1_size * 8 <= len(data)
        assert header.backing_file is None or len(header.backing_file) <= 1023
