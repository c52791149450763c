"""The header cluster: what is read back, what is kept, and what is refused."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.driver.layout import header as module
from qcowfs.driver.layout.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_CRYPTO,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_TABLE,
    Extension,
    FeatureName,
    printable,
)
from qcowfs.driver.layout.header import (
    Header,
    parse_header,
    probe_cluster_size,
    serialize,
)
from qcowfs.errors import BadRequest, CorruptImage, ImageFull, QcowfsError, UnsupportedFeature

FILE_SIZE = 1 << 30


def good_header(**changes: Any) -> Header:
    """A version 3 header of 1 GiB with 64 KiB clusters; all tables are in place."""
    values = {
        "version": 3,
        "cluster_bits": 16,
        "virtual_size": 1 << 30,
        "l1_size": 2,
        "l1_table_offset": 0x30000,
        "refcount_table_offset": 0x10000,
        "refcount_table_clusters": 1,
    }
    return Header(**(values | changes))


def patched(offset: int, form: str, value: object, header: Header | None = None) -> bytearray:
    """The bytes of a good header with one field overwritten."""
    data = bytearray(serialize(header or good_header()))
    struct.pack_into(form, data, offset, value)
    return data


def with_extensions(raw: bytes, version: int = 3) -> bytearray:
    """A good header cluster with `raw` where the extensions are."""
    header = good_header(version=version, header_length=72 if version == 2 else 112)
    data = bytearray(serialize(header))
    start = header.header_length
    data[start:] = bytes(len(data) - start)
    data[start : start + len(raw)] = raw
    return data


def extension(extension_type: int, data: bytes, length: int | None = None) -> bytes:
    """One raw extension, with a length that may lie."""
    claimed = len(data) if length is None else length
    return struct.pack(">II", extension_type, claimed) + data + bytes(-len(data) % 8)


def refused(data: bytes | bytearray, file_size: int = FILE_SIZE) -> str:
    """The message of the CorruptImage that parsing `data` raises."""
    with pytest.raises(CorruptImage) as caught:
        parse_header(data, file_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trips


def test_what_was_written_is_read() -> None:
    """Serialising and parsing gives the same header, the feature names of the table added."""
    header = good_header(
        backing_file=b"base.qcow2",
        backing_format="qcow2",
        compatible=1,
        refcount_order=6,
        nb_snapshots=3,
        snapshots_offset=0x50000,
    )
    parsed = parse_header(serialize(header), FILE_SIZE)
    assert replace(parsed, feature_names=()) == header
    assert len(parsed.feature_names) == 8


def test_version_2_has_defaults_for_what_it_cannot_say() -> None:
    """Refcounts of 16 bits, a header of 72 bytes, no features."""
    header = good_header(version=2, header_length=72, backing_file=b"b", backing_format="raw")
    assert parse_header(serialize(header), FILE_SIZE) == header


def test_the_same_header_gives_the_same_bytes() -> None:
    """Serialising what was parsed changes nothing."""
    data = serialize(good_header(backing_file=b"x", backing_format="raw"))
    assert serialize(parse_header(data, FILE_SIZE)) == data


def test_a_serialised_header_fills_its_cluster() -> None:
    """What follows the last field is zeros."""
    assert len(serialize(good_header(cluster_bits=21))) == 2 << 20


unknown_extensions = st.lists(
    st.builds(
        Extension,
        st.integers(1, 2**32 - 1).filter(
            lambda n: (
                n
                not in {
                    EXTENSION_BACKING_FORMAT,
                    EXTENSION_CRYPTO,
                    EXTENSION_DATA_FILE,
                    EXTENSION_FEATURE_TABLE,
                    EXTENSION_BITMAPS,
                }
            )
        ),
        st.binary(max_size=40),
    ),
    max_size=5,
)


@given(
    unknown_extensions,
    st.binary(max_size=40),
    st.binary(max_size=1023),
    st.integers(0, 6),
    st.sampled_from([13, 16, 21]),
    st.none() | st.text("abcq2", min_size=1, max_size=15),
)
def test_round_trip(
    extensions: list[Extension],
    unknown: bytes,
    backing: bytes,
    order: int,
    cluster_bits: int,
    backing_format: str | None,
) -> None:
    """Unknown extensions and bytes, names of any bytes and all widths survive."""
    header = good_header(
        cluster_bits=cluster_bits,
        virtual_size=0,
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=1 << cluster_bits,
        header_length=112 + len(unknown),
        unknown_bytes=unknown,
        extensions=tuple(extensions),
        backing_file=backing or None,
        backing_format=backing_format,
        refcount_order=order,
    )
    parsed = parse_header(serialize(header), FILE_SIZE)
    assert replace(parsed, feature_names=()) == header


@given(st.binary(max_size=600), st.integers(0, 520), st.integers(0, 2**20))
def test_any_bytes_are_parsed_or_refused(noise: bytes, at: int, file_size: int) -> None:
    """Noise anywhere in a header raises nothing but the errors of this project."""
    small = good_header(cluster_bits=9, virtual_size=0, l1_size=0, l1_table_offset=0)
    data = bytearray(serialize(replace(small, refcount_table_offset=512)))
    data[at : at + len(noise)] = noise
    try:
        serialize(parse_header(data, file_size))
    except QcowfsError:
        pass


# What is kept and what is made anew


def test_the_feature_table_is_left_out_of_small_clusters() -> None:
    """Clusters of 4 KiB and less need the room for the backing file name."""
    small = good_header(cluster_bits=12, virtual_size=0, l1_size=0, l1_table_offset=0)
    assert struct.pack(">I", EXTENSION_FEATURE_TABLE) not in serialize(small)
    assert struct.pack(">I", EXTENSION_FEATURE_TABLE) in serialize(replace(small, cluster_bits=13))


def test_the_feature_table_gives_way_to_what_is_needed() -> None:
    """It is a convenience: extensions that fill the cluster push it out."""
    big = Extension(0x1234, bytes(8192 - 112 - 16))
    header = good_header(cluster_bits=13, virtual_size=0, l1_size=0, l1_table_offset=0)
    data = serialize(replace(header, extensions=(big,)))
    assert parse_header(data, FILE_SIZE).extensions == (big,)


def test_names_of_features_unknown_here_are_kept() -> None:
    """A table row of somebody else's feature goes into the new table."""
    row = FeatureName(1, 63, b"their feature")
    parsed = parse_header(serialize(good_header(feature_names=(row,))), FILE_SIZE)
    assert row in parsed.feature_names


def test_a_header_that_does_not_fit_is_refused() -> None:
    """A long name in a small cluster raises ImageFull, before anything is written."""
    header = good_header(cluster_bits=9, virtual_size=0, l1_size=0, l1_table_offset=0)
    with pytest.raises(ImageFull):
        serialize(replace(header, backing_file=b"n" * 500))


@pytest.mark.parametrize("change", [{"backing_file": b"n" * 1024}, {"backing_format": "f" * 16}])
def test_names_over_their_limits_are_not_written(change: dict[str, Any]) -> None:
    """1023 bytes for the backing file, 15 for its format."""
    with pytest.raises(BadRequest):
        serialize(good_header(**change))


def test_extensions_keep_their_padding_out_of_their_data() -> None:
    """Each one is padded to 8 bytes, and the padding is not data."""
    extensions = (Extension(1, b"a"), Extension(2, b""), Extension(3, b"12345678"))
    parsed = parse_header(serialize(good_header(extensions=extensions)), FILE_SIZE)
    assert parsed.extensions == extensions


def test_a_size_that_is_no_multiple_of_a_sector_is_floored() -> None:
    """The disk ends at its last whole sector."""
    assert parse_header(patched(24, ">Q", (1 << 30) - 1), FILE_SIZE).virtual_size == (1 << 30) - 512


def test_an_empty_disk_needs_no_l1_table() -> None:
    """Size 0 with an L1 table of no entries is valid."""
    header = good_header(virtual_size=0, l1_size=0, l1_table_offset=0)
    assert parse_header(serialize(header), FILE_SIZE).virtual_size == 0


def test_a_table_in_a_last_cluster_cut_short_is_accepted() -> None:
    """Writers leave the file ending behind the last entry; the rest of the cluster is zeros."""
    assert parse_header(serialize(good_header()), 0x30000 + 16).l1_size == 2


def test_header_length_without_a_compression_type() -> None:
    """104 bytes are enough, and mean zlib."""
    data = with_extensions(b"")
    struct.pack_into(">I", data, 100, 104)
    parsed = parse_header(data, FILE_SIZE)
    assert (parsed.header_length, parsed.compression_type) == (104, 0)


def test_extensions_begin_after_the_header_length() -> None:
    """Not at the 112 bytes that are known."""
    data = bytearray(with_extensions(b""))
    struct.pack_into(">I", data, 100, 120)
    data[112:120] = b"unknown!"
    raw = extension(0x99, b"payload")
    data[120 : 120 + len(raw)] = raw
    parsed = parse_header(data, FILE_SIZE)
    assert parsed.unknown_bytes == b"unknown!"
    assert parsed.extensions == (Extension(0x99, b"payload"),)


def test_a_padded_backing_format_is_cut_at_its_first_nul() -> None:
    """Writers of 2009 stored the padding as part of the name."""
    raw = extension(EXTENSION_BACKING_FORMAT, b"raw\0\0\0\0\0")
    assert parse_header(with_extensions(raw, version=2), FILE_SIZE).backing_format == "raw"


def test_the_last_of_two_extensions_of_a_kind_counts() -> None:
    """As in QEMU."""
    raw = extension(EXTENSION_BACKING_FORMAT, b"raw") + extension(EXTENSION_BACKING_FORMAT, b"vmdk")
    assert parse_header(with_extensions(raw), FILE_SIZE).backing_format == "vmdk"


def test_thousands_of_empty_extensions_are_read() -> None:
    """They cost time in proportion to the cluster, and nothing else."""
    count = (65536 - 112) // 8
    data = with_extensions(extension(0x77, b"") * count)
    assert len(parse_header(data, FILE_SIZE).extensions) == count


def test_a_name_of_no_bytes_is_no_backing_file() -> None:
    """An offset with length 0 names nothing."""
    data = patched(8, ">Q", 0x1000)
    assert parse_header(data, FILE_SIZE).backing_file is None


def test_a_data_file_name_is_read() -> None:
    """The extension gives the name, the incompatible bit the fact."""
    header = good_header(incompatible=4, autoclear=2, data_file=b"data.raw")
    parsed = parse_header(serialize(header), FILE_SIZE)
    assert (parsed.data_file, parsed.has_data_file, parsed.data_file_raw) == (
        b"data.raw", True, True,
    )  # fmt: skip


def test_geometry_follows_the_header() -> None:
    """Cluster size, entry length and refcount width come out of it."""
    found = good_header(incompatible=16, refcount_order=2).geometry()
    assert (found.cluster_size, found.l2_entry_length, found.refcount_bits) == (65536, 16, 4)


def test_the_crypto_extension_is_parsed() -> None:
    """Offset and length of the LUKS header."""
    raw = Extension(EXTENSION_CRYPTO, struct.pack(">QQ", 0x50000, 4096))
    parsed = parse_header(serialize(good_header(crypt_method=2, extensions=(raw,))), FILE_SIZE)
    crypto = parsed.crypto()
    assert crypto is not None
    assert (crypto.offset, crypto.length) == (0x50000, 4096)


def test_without_refcounts_only_a_check_goes_on() -> None:
    """A refcount table of no clusters is what a check may rebuild."""
    data = patched(56, ">I", 0)
    assert parse_header(data, FILE_SIZE, checking=True).refcount_table_clusters == 0
    assert "no clusters" in refused(data)


# Fields changed in place


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda: module.l1_field(7, 0x50000), {"l1_size": 7, "l1_table_offset": 0x50000}),
        (
            lambda: module.refcount_table_field(0x70000, 2),
            {"refcount_table_offset": 0x70000, "refcount_table_clusters": 2},
        ),
        (
            lambda: module.snapshots_field(3, 0x80000),
            {"nb_snapshots": 3, "snapshots_offset": 0x80000},
        ),
        (lambda: module.virtual_size_field(1 << 20), {"virtual_size": 1 << 20}),
        (lambda: module.incompatible_field(1), {"incompatible": 1}),
        (lambda: module.autoclear_field(1), {"autoclear": 1}),
    ],
)
def test_a_field_write_changes_its_fields_alone(
    write: Callable[[], tuple[int, bytes]], expected: dict[str, int]
) -> None:
    """One write inside the first sector, and the header is the old one but for that."""
    offset, data = write()
    assert offset // 512 == (offset + len(data) - 1) // 512
    cluster = bytearray(serialize(good_header()))
    cluster[offset : offset + len(data)] = data
    parsed = parse_header(cluster, FILE_SIZE)
    assert parsed == replace(parse_header(serialize(good_header()), FILE_SIZE), **expected)


# Hostile and broken headers


def test_another_file_is_no_qcow2_image() -> None:
    """An empty file and a wrong magic are the caller's error, not a corrupt image."""
    for data in (b"", b"QFI", b"\0" * 512, b"KDMV" + bytes(508)):
        with pytest.raises(BadRequest, match="not a qcow2 image"):
            parse_header(data, len(data))


@pytest.mark.parametrize("length", [4, 8, 23, 24, 71, 72, 103, 104, 111, 112, 4096, 65535])
def test_a_header_cut_off_is_refused(length: int) -> None:
    """Any file that ends inside the header cluster."""
    refused(serialize(good_header())[:length], length)


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_versions_are_named(version: int) -> None:
    """Only 2 and 3 are qcow2."""
    with pytest.raises(UnsupportedFeature, match=str(version)):
        parse_header(patched(4, ">I", version), FILE_SIZE)


@pytest.mark.parametrize("cluster_bits", [0, 8, 22, 63, 64, 2**32 - 1])
def test_cluster_bits_are_9_to_21(cluster_bits: int) -> None:
    """Checked before anything is computed from them."""
    assert str(cluster_bits) in refused(patched(20, ">I", cluster_bits))


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
def test_the_cluster_size_can_be_asked_first(cluster_bits: int) -> None:
    """24 bytes tell how many bytes the parser wants."""
    assert probe_cluster_size(patched(20, ">I", cluster_bits)[:24]) == 1 << cluster_bits


@pytest.mark.parametrize("size", [(1 << 30) + 1, 2**63, 2**64 - 1])
def test_an_l1_table_too_small_for_the_size_is_refused(size: int) -> None:
    """The disk would have parts that no table covers."""
    assert "too few" in refused(patched(24, ">Q", size))


def test_an_l1_table_of_no_entries_needs_an_empty_disk() -> None:
    """l1_size 0 with a size."""
    assert "too few" in refused(patched(36, ">I", 0))


@pytest.mark.parametrize("l1_size", [(32 << 20) // 8 + 1, 2**32 - 1])
def test_an_l1_table_over_32_mib_is_refused(l1_size: int) -> None:
    """Whatever the file's length."""
    assert "at most 33554432" in refused(patched(36, ">I", l1_size), 1 << 62)


TABLE_FIELDS = [
    pytest.param(40, "L1 table", id="l1"),
    pytest.param(48, "refcount table", id="refcount"),
]


@pytest.mark.parametrize(("field", "name"), TABLE_FIELDS)
@pytest.mark.parametrize("offset", [1, 8, 512, 0x30001, 2**64 - 1, 2**63 + 512])
def test_tables_are_aligned_to_clusters(field: int, name: str, offset: int) -> None:
    """An offset inside a cluster is refused, near 2^64 too."""
    assert name in refused(patched(field, ">Q", offset))


@pytest.mark.parametrize(("field", "name"), TABLE_FIELDS)
@pytest.mark.parametrize("offset", [FILE_SIZE, 1 << 55, 2**64 - 65536])
def test_tables_begin_inside_the_file(field: int, name: str, offset: int) -> None:
    """A table past the end, or whose end wraps around, is refused."""
    message = refused(patched(field, ">Q", offset))
    assert name in message
    assert "past the end" in message


@pytest.mark.parametrize(("field", "name"), TABLE_FIELDS)
def test_tables_are_not_in_the_header(field: int, name: str) -> None:
    """Offset 0 is where the header is."""
    assert name in refused(patched(field, ">Q", 0))


def test_tables_do_not_share_a_place() -> None:
    """An L1 table that is the refcount table too is refused."""
    assert "overlap" in refused(patched(40, ">Q", 0x10000))


@pytest.mark.parametrize("clusters", [129, 2**32 - 1])
def test_a_refcount_table_over_8_mib_is_refused(clusters: int) -> None:
    """Whatever the file's length."""
    assert "at most 8388608" in refused(patched(56, ">I", clusters), 1 << 62)


@pytest.mark.parametrize("order", [7, 255, 2**32 - 1])
def test_refcounts_have_at_most_64_bits(order: int) -> None:
    """refcount_order is 0 to 6."""
    assert "refcount_order" in refused(patched(96, ">I", order))


@pytest.mark.parametrize("length", [0, 103, 65537, 2**32 - 1])
def test_header_length_is_104_to_a_cluster(length: int) -> None:
    """Anything else is refused before it is used."""
    assert "header_length" in refused(patched(100, ">I", length))


def test_an_odd_header_length_is_read() -> None:
    """105 bytes hold the compression type; the extensions begin at an odd offset then."""
    data = with_extensions(b"")
    struct.pack_into(">I", data, 100, 105)
    data[104] = 1
    struct.pack_into(">Q", data, 72, 8)
    assert parse_header(data, FILE_SIZE).compression_type == 1


def test_an_unknown_encryption_method_is_named() -> None:
    """0, 1 and 2 are known."""
    with pytest.raises(UnsupportedFeature, match="3"):
        parse_header(patched(32, ">I", 3), FILE_SIZE)


def test_luks_needs_its_extension() -> None:
    """And the extension needs LUKS."""
    assert "LUKS" in refused(patched(32, ">I", 2))
    crypto = extension(EXTENSION_CRYPTO, bytes(16))
    assert "crypto" in refused(with_extensions(crypto))


def test_a_crypto_extension_has_16_bytes() -> None:
    """Another length is refused."""
    data = with_extensions(extension(EXTENSION_CRYPTO, bytes(8)))
    struct.pack_into(">I", data, 32, 2)
    assert "16" in refused(data)


def test_an_unknown_incompatible_feature_is_named_by_the_image() -> None:
    """The feature table's name, with what a terminal acts on escaped; else the bit."""
    rows = (FeatureName(0, 40, b"rot13\x1b[2J"), FeatureName(1, 41, b"another kind"))
    header = good_header(feature_names=rows)
    data = patched(72, ">Q", 1 << 40 | 1 << 41, header)
    with pytest.raises(UnsupportedFeature, match=r"rot13\\x1b\[2J, bit 41$"):
        parse_header(data, FILE_SIZE)


@pytest.mark.parametrize("length", [1, 47, 49, 100])
def test_a_feature_table_of_odd_length_gives_its_whole_rows(length: int) -> None:
    """What does not fill a row is ignored."""
    row = struct.pack(">BB46s", 0, 50, b"named")
    data = with_extensions(extension(EXTENSION_FEATURE_TABLE, (row * 3)[:length]))
    struct.pack_into(">Q", data, 72, 1 << 50)
    with pytest.raises(UnsupportedFeature, match="named" if length >= 48 else "bit 50"):
        parse_header(data, FILE_SIZE)


def test_an_unknown_compression_type_is_named() -> None:
    """0 is zlib, 1 zstd."""
    data = patched(104, ">B", 2)
    struct.pack_into(">Q", data, 72, 8)
    with pytest.raises(UnsupportedFeature, match="2"):
        parse_header(data, FILE_SIZE)


@pytest.mark.parametrize(("bits", "compression"), [(8, 0), (0, 1)])
def test_compression_type_and_bit_agree(bits: int, compression: int) -> None:
    """The bit is set exactly for a type other than zlib."""
    data = patched(72, ">Q", bits)
    data[104] = compression
    assert "compression" in refused(data)


def test_extended_l2_needs_clusters_of_16_kib() -> None:
    """A subcluster is at least a sector."""
    header = good_header(cluster_bits=13, virtual_size=0, l1_size=0, l1_table_offset=0)
    assert "extended" in refused(patched(72, ">Q", 16, header))


def test_a_raw_data_file_needs_a_data_file() -> None:
    """The autoclear bit alone is a contradiction."""
    assert "external data" in refused(patched(88, ">Q", 2))


def test_too_many_snapshots_are_refused() -> None:
    """At most 65536."""
    for count in (65537, 2**32 - 1):
        data = patched(60, ">I", count)
        struct.pack_into(">Q", data, 64, 0x50000)
        assert "65536" in refused(data)


@pytest.mark.parametrize("offset", [0, 0x50001, FILE_SIZE, 2**64 - 65536])
def test_the_snapshot_table_lies_in_the_file(offset: int) -> None:
    """Aligned, inside the file, and not where the header is."""
    data = patched(60, ">I", 1)
    struct.pack_into(">Q", data, 64, offset)
    assert "snapshot table" in refused(data)


@pytest.mark.parametrize("length", [65536, 2**31, 2**32 - 8, 2**32 - 1])
def test_an_extension_ends_inside_the_header_cluster(length: int) -> None:
    """Its length is refused, wrapping around included."""
    assert "extension" in refused(with_extensions(extension(0x55, b"", length)))


def test_an_extension_ends_before_the_backing_file_name() -> None:
    """The name is no extension data."""
    data = with_extensions(extension(0x55, b"x" * 64))
    struct.pack_into(">QI", data, 8, 128, 4)
    assert "extension" in refused(data)


def test_a_missing_end_marker_is_no_error() -> None:
    """Extensions may run up to the backing file name."""
    data = with_extensions(extension(0x55, b"12345678"))
    data[128:132] = b"base"
    struct.pack_into(">QI", data, 8, 128, 4)
    parsed = parse_header(data, FILE_SIZE)
    assert (parsed.backing_file, parsed.extensions) == (b"base", (Extension(0x55, b"12345678"),))


@pytest.mark.parametrize("length", [16, 200])
def test_a_backing_format_has_at_most_15_bytes(length: int) -> None:
    """16 is one too many."""
    raw = extension(EXTENSION_BACKING_FORMAT, b"f" * length)
    assert "backing format" in refused(with_extensions(raw))


@pytest.mark.parametrize("length", [1024, 2**32 - 1])
def test_a_backing_file_name_has_at_most_1023_bytes(length: int) -> None:
    """The length is checked before it is used."""
    data = with_extensions(b"")
    struct.pack_into(">QI", data, 8, 0x1000, length)
    assert "backing file name" in refused(data)


def test_a_backing_file_name_lies_in_the_header_cluster() -> None:
    """Neither its beginning nor its end is outside."""
    for offset, length in ((65537, 1), (2**64 - 1, 1), (65530, 7)):
        data = with_extensions(b"")
        struct.pack_into(">QI", data, 8, offset, length)
        assert "backing file name" in refused(data)


def test_text_of_an_image_is_made_safe_for_messages() -> None:
    """Control characters, line ends and bytes that are no UTF-8 are escaped."""
    assert (
        printable(b"a\x1b\n\xff\xe2\x80\xa8\xc3\xa9")
        == "a\\x1b\\n\\xff\\u2028\N{LATIN SMALL LETTER E WITH ACUTE}"
    )
