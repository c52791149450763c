"""L1 and L2 entries: what each word means, and the classifier held against a plain model."""

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout import mapping
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED, Geometry
from qcowfs.driver.layout.mapping import (
    ALL_ALLOCATED,
    ALL_ZERO,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    ClusterType,
    SubclusterKind,
    allocation_bits,
    check_entry,
    classify,
    classify_one,
    cluster_type,
    compressed_clusters,
    compressed_entry,
    compressed_location,
    data_entry,
    in_place_extent,
    l1_entry_offset,
    load_words,
    store_words,
    subcluster_kind,
    zero_bits,
)
from qcowfs.errors import CorruptImage

STANDARD = Geometry(16, 3, 1 << 40, False, 4)
VERSION_2 = replace(STANDARD, version=2)
SMALL = Geometry(9, 3, 1 << 40, False, 4)
EXTENDED = Geometry(16, 3, 1 << 40, True, 4)
DATA_FILE = replace(STANDARD, has_data_file=True)
EXTENDED_DATA_FILE = replace(EXTENDED, has_data_file=True)
CLUSTER = 65536
SUBCLUSTER = 2048

DATA, ZERO = ExtentKind.DATA, ExtentKind.ZERO
COMPRESSED, UNALLOCATED = ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED


def model_of(
    words: "array[int]", guest_offset: int, length: int, geometry: Geometry
) -> list[Extent]:
    """The extents of a range, subcluster by subcluster, from `subcluster_kind` alone."""
    extents: list[Extent] = []
    end = guest_offset + length
    while guest_offset < end:
        index = guest_offset // geometry.cluster_size
        if geometry.extended_l2:
            entry, bitmap = words[2 * index], words[2 * index + 1]
        else:
            entry, bitmap = words[index], 0
        check_entry(entry, bitmap, guest_offset, geometry)
        inside = guest_offset % geometry.cluster_size
        subcluster = inside // geometry.subcluster_size
        kind = subcluster_kind(entry, bitmap, subcluster, geometry)
        unit = (
            geometry.cluster_size if kind is SubclusterKind.COMPRESSED else geometry.subcluster_size
        )
        stop = min(end, (guest_offset // unit + 1) * unit)
        piece = _model_extent(kind, entry, guest_offset, stop - guest_offset, geometry)
        last = extents[-1] if extents else None
        if (
            last is not None
            and last.kind is piece.kind
            and piece.kind is not COMPRESSED
            and (last.host_offset is None) == (piece.host_offset is None)
            and (last.host_offset is None or last.host_offset + last.length == piece.host_offset)
        ):
            extents[-1] = last._replace(length=last.length + piece.length)
        else:
            extents.append(piece)
        guest_offset = stop
    return extents


def _model_extent(
    kind: SubclusterKind, entry: int, guest_offset: int, length: int, geometry: Geometry
) -> Extent:
    host_offset = (entry & OFFSET_MASK) + guest_offset % geometry.cluster_size
    if kind is SubclusterKind.COMPRESSED:
        return Extent(COMPRESSED, guest_offset, length, *compressed_location(entry, geometry))
    if kind is SubclusterKind.NORMAL:
        return Extent(DATA, guest_offset, length, host_offset)
    if kind is SubclusterKind.ZERO_ALLOCATED:
        return Extent(ZERO, guest_offset, length, host_offset)
    if kind is SubclusterKind.UNALLOCATED_ALLOCATED:
        return Extent(UNALLOCATED, guest_offset, length, host_offset)
    return Extent(ZERO if kind is SubclusterKind.ZERO_PLAIN else UNALLOCATED, guest_offset, length)


def pairs(*entries: tuple[int, int]) -> "array[int]":
    """Extended entries as words."""
    return array("Q", [word for entry in entries for word in entry])


# Words


def test_words_are_big_endian_on_disk() -> None:
    """And native in memory."""
    assert load_words(b"\0\0\0\0\0\0\1\2" + b"\x80" + bytes(7)).tolist() == [0x102, 1 << 63]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_words_round_trip(values: list[int]) -> None:
    """Storing what was loaded gives the same bytes, and leaves the words as they were."""
    words = array("Q", values)
    assert load_words(store_words(words)) == words
    assert words.tolist() == values


def test_a_part_of_the_words_can_be_stored() -> None:
    """A dirty range is written, not the table."""
    words = array("Q", [1, 2, 3, 4])
    assert load_words(store_words(words, 1, 2)).tolist() == [2, 3]


# L1 entries


def test_an_l1_entry_names_a_table() -> None:
    """With COPIED or without; 0 names none."""
    assert l1_entry_offset(OFLAG_COPIED | 0x50000, 0, STANDARD) == 0x50000
    assert l1_entry_offset(0x50000, 0, STANDARD) == 0x50000
    assert l1_entry_offset(0, 0, STANDARD) == 0


@pytest.mark.parametrize("entry", [0x50001, 0x50100, 1 << 62, 1 << 56, 0x50200, 0x18000])
def test_a_broken_l1_entry_is_refused(entry: int) -> None:
    """Reserved bits or an offset inside a cluster; the message names index and value."""
    with pytest.raises(CorruptImage, match="L1 entry 17") as caught:
        l1_entry_offset(entry, 17, STANDARD)
    assert f"{entry:#018x}" in str(caught.value)


# L2 entries

VALID = [
    (STANDARD, 0, 0, ClusterType.UNALLOCATED),
    (STANDARD, OFLAG_COPIED, 0, ClusterType.UNALLOCATED),
    (STANDARD, 0x50000, 0, ClusterType.NORMAL),
    (STANDARD, OFLAG_COPIED | 0x50000, 0, ClusterType.NORMAL),
    (STANDARD, OFLAG_ZERO, 0, ClusterType.ZERO_PLAIN),
    (STANDARD, OFLAG_ZERO | 0x50000, 0, ClusterType.ZERO_ALLOCATED),
    (STANDARD, OFLAG_COMPRESSED | 0x12345, 0, ClusterType.COMPRESSED),
    (VERSION_2, OFLAG_COPIED | 0x50000, 0, ClusterType.NORMAL),
    (EXTENDED, 0, 0, ClusterType.UNALLOCATED),
    (EXTENDED, 0, ALL_ZERO, ClusterType.UNALLOCATED),
    (EXTENDED, 0x50000, ALL_ALLOCATED, ClusterType.NORMAL),
    (EXTENDED, OFLAG_COMPRESSED | 0x12345, 0, ClusterType.COMPRESSED),
    (DATA_FILE, 0, 0, ClusterType.UNALLOCATED),
    (DATA_FILE, OFLAG_COPIED, 0, ClusterType.NORMAL),
    (DATA_FILE, OFLAG_ZERO, 0, ClusterType.ZERO_PLAIN),
]


@pytest.mark.parametrize(("geometry", "entry", "bitmap", "expected"), VALID)
def test_the_type_of_a_cluster(
    geometry: Geometry, entry: int, bitmap: int, expected: ClusterType
) -> None:
    """By offset and flags; in a data file COPIED tells offset 0 from none."""
    check_entry(entry, bitmap, 0, geometry)
    assert cluster_type(entry, geometry) is expected


INVALID = [
    (STANDARD, 0x50002, 0, "reserved"),
    (STANDARD, 0x50100, 0, "reserved"),
    (STANDARD, 1 << 56 | 0x50000, 0, "reserved"),
    (STANDARD, 1 << 61, 0, "reserved"),
    (STANDARD, 0x50200, 0, "aligned"),
    (STANDARD, OFLAG_ZERO | 0x58000, 0, "aligned"),
    (VERSION_2, OFLAG_ZERO, 0, "version 2"),
    (VERSION_2, OFLAG_ZERO | 0x50000, 0, "version 2"),
    (EXTENDED, OFLAG_ZERO, 0, "reserved"),
    (EXTENDED, OFLAG_ZERO | 0x50000, ALL_ALLOCATED, "reserved"),
    (EXTENDED, 0x50000, 1 << 5 | 1 << 37, "both allocated and zero"),
    (EXTENDED, 0, 1, "without a host offset"),
    (EXTENDED, 0, ALL_ALLOCATED, "without a host offset"),
    (EXTENDED, OFLAG_COMPRESSED | 0x12345, 1, "bitmap"),
    (EXTENDED, OFLAG_COMPRESSED | 0x12345, ALL_ZERO, "bitmap"),
    (DATA_FILE, OFLAG_COMPRESSED | 0x12345, 0, "data file"),
    (DATA_FILE, OFLAG_COPIED | 0x50000, 0, "differ"),
    (DATA_FILE, OFLAG_COPIED | OFLAG_ZERO | 0x50000, 0, "differ"),
]


@pytest.mark.parametrize(("geometry", "entry", "bitmap", "rule"), INVALID)
def test_a_broken_l2_entry_is_refused(
    geometry: Geometry, entry: int, bitmap: int, rule: str
) -> None:
    """The message names guest offset, index, value and rule."""
    guest_offset = 3 * CLUSTER + 100
    words = pairs((0, 0), (0, 0), (0, 0), (entry, bitmap))
    if not geometry.extended_l2:
        words = words[::2]
    with pytest.raises(CorruptImage) as caught:
        classify(words, 3, guest_offset, 512, geometry)
    message = str(caught.value)
    assert rule in message
    assert f"{entry:#018x}" in message
    assert f"{guest_offset:#x}" in message
    assert "L2 entry 3" in message


def test_a_broken_entry_spoils_only_ranges_that_touch_it() -> None:
    """Its neighbours are read as ever."""
    words = array("Q", [0x50000, 0x60002, 0x70000])
    assert classify(words, 0, 0, CLUSTER, STANDARD) == [Extent(DATA, 0, CLUSTER, 0x50000)]
    after = classify(words, 2, 2 * CLUSTER, CLUSTER, STANDARD)
    assert after == [Extent(DATA, 2 * CLUSTER, CLUSTER, 0x70000)]
    with pytest.raises(CorruptImage):
        classify(words, 0, 0, 3 * CLUSTER, STANDARD)


def test_a_run_does_not_carry_into_flag_bits() -> None:
    """An entry that is one step on but has a reserved bit set is no continuation."""
    last = OFFSET_MASK & -CLUSTER
    words = array("Q", [OFLAG_COPIED | last, (OFLAG_COPIED | last) + CLUSTER])
    with pytest.raises(CorruptImage, match="reserved"):
        classify(words, 0, 0, 2 * CLUSTER, STANDARD)


# Compressed clusters


def test_a_compressed_entry_counts_additional_sectors() -> None:
    """The stream reaches to the end of the last sector that it begins."""
    entry = compressed_entry(0x12345, 1000, STANDARD)
    host_offset, stored_length = compressed_location(entry, STANDARD)
    assert host_offset == 0x12345
    assert (host_offset + stored_length) % 512 == 0
    assert 1000 <= stored_length < 1512


@given(st.sampled_from([9, 12, 16, 21]), st.integers(0, 2**49 - 1), st.data())
def test_compressed_entries_round_trip(
    cluster_bits: int, host_offset: int, data: st.DataObject
) -> None:
    """Offset and length come back, the length rounded up to the end of its sector."""
    geometry = Geometry(cluster_bits, 3, 0, False, 4)
    stored_length = data.draw(st.integers(1, geometry.cluster_size - 1))
    entry = compressed_entry(host_offset, stored_length, geometry)
    found_offset, found_length = compressed_location(entry, geometry)
    assert found_offset == host_offset
    assert 0 <= found_length - stored_length < 512
    check_entry(entry, 0, 0, geometry)


def test_a_compressed_cluster_refers_to_each_cluster_that_it_touches() -> None:
    """A piece across a boundary holds a reference to both."""
    inside = compressed_entry(0x50100, 300, STANDARD)
    across = compressed_entry(0x5FF00, 1000, STANDARD)
    assert compressed_clusters(inside, STANDARD) == (0x50000, 1)
    assert compressed_clusters(across, STANDARD) == (0x50000, 2)


def test_copied_on_a_compressed_cluster_is_read_all_the_same() -> None:
    """The flag means nothing there, and old writers set it."""
    entry = OFLAG_COPIED | compressed_entry(0x12345, 100, STANDARD)
    assert classify_one(entry, 0, 0, 512, STANDARD).kind is COMPRESSED


def test_compressed_neighbours_are_never_joined() -> None:
    """Each cluster has a stream of its own."""
    words = array("Q", [compressed_entry(0x10000, 512, STANDARD)] * 2)
    extents = classify(words, 0, 0, 2 * CLUSTER, STANDARD)
    assert [extent.length for extent in extents] == [CLUSTER, CLUSTER]


# Building entries


def test_a_data_entry_is_copied() -> None:
    """A new cluster has refcount 1."""
    assert data_entry(0x50000) == OFLAG_COPIED | 0x50000
    assert data_entry(0x50000, zero=True) == OFLAG_COPIED | 0x50000 | OFLAG_ZERO


def test_bitmap_bits_of_subclusters() -> None:
    """Allocated in the low half, zero in the high one."""
    assert allocation_bits(0, 32) == ALL_ALLOCATED
    assert zero_bits(0, 32) == ALL_ZERO
    assert (allocation_bits(3, 2), zero_bits(3, 2)) == (0b11000, 0b11000 << 32)


@pytest.mark.parametrize(
    ("entry", "bitmap", "expected"),
    [
        (0, 0, SubclusterKind.UNALLOCATED_PLAIN),
        (0, 1 << 36, SubclusterKind.ZERO_PLAIN),
        (0x50000, 0, SubclusterKind.UNALLOCATED_ALLOCATED),
        (0x50000, 1 << 36, SubclusterKind.ZERO_ALLOCATED),
        (0x50000, 1 << 4, SubclusterKind.NORMAL),
        (0x50000, ~(1 << 4) & ALL_ALLOCATED, SubclusterKind.UNALLOCATED_ALLOCATED),
        (OFLAG_COMPRESSED | 0x12345, 0, SubclusterKind.COMPRESSED),
    ],
)
def test_the_kind_of_a_subcluster(entry: int, bitmap: int, expected: SubclusterKind) -> None:
    """By its own two bits and whether the cluster has a host offset."""
    assert subcluster_kind(entry, bitmap, 4, EXTENDED) is expected


# The classifier


def test_contiguous_clusters_are_one_extent() -> None:
    """Also from the middle of a cluster to the middle of another."""
    words = array("Q", [OFLAG_COPIED | (0x50000 + n * CLUSTER) for n in range(16)])
    assert classify(words, 2, 2 * CLUSTER + 100, 10 * CLUSTER, STANDARD) == [
        Extent(DATA, 2 * CLUSTER + 100, 10 * CLUSTER, 0x50000 + 2 * CLUSTER + 100)
    ]


def test_a_change_of_copied_does_not_split_an_extent() -> None:
    """For reading, only the place counts."""
    words = array("Q", [OFLAG_COPIED | 0x50000, 0x60000])
    assert classify(words, 0, 0, 2 * CLUSTER, STANDARD) == [Extent(DATA, 0, 2 * CLUSTER, 0x50000)]


def test_two_entries_for_one_cluster_are_not_a_run() -> None:
    """A broken image may map a cluster twice; both read it from its beginning."""
    words = array("Q", [0x50000, 0x50000])
    extents = classify(words, 0, 0, 2 * CLUSTER, STANDARD)
    assert [extent.host_offset for extent in extents] == [0x50000, 0x50000]


def test_a_hole_and_the_cluster_at_one_step_are_not_a_run() -> None:
    """Unallocated is no host offset 0 that data could continue."""
    words = array("Q", [0, CLUSTER, 2 * CLUSTER])
    kinds = [extent.kind for extent in classify(words, 0, 0, 3 * CLUSTER, STANDARD)]
    assert kinds == [UNALLOCATED, DATA]


def test_host_offset_0_of_a_data_file_begins_a_run() -> None:
    """There the first cluster is data like any other."""
    words = array("Q", [OFLAG_COPIED | n * CLUSTER for n in range(40)])
    assert classify(words, 0, 0, 40 * CLUSTER, DATA_FILE) == [Extent(DATA, 0, 40 * CLUSTER, 0)]


def test_subclusters_are_told_apart() -> None:
    """All kinds inside one cluster."""
    words = pairs((0x50000, allocation_bits(0, 2) | zero_bits(2, 3)))
    assert classify(words, 0, 0, CLUSTER, EXTENDED) == [
        Extent(DATA, 0, 2 * SUBCLUSTER, 0x50000),
        Extent(ZERO, 2 * SUBCLUSTER, 3 * SUBCLUSTER, 0x50000 + 2 * SUBCLUSTER),
        Extent(UNALLOCATED, 5 * SUBCLUSTER, 27 * SUBCLUSTER, 0x50000 + 5 * SUBCLUSTER),
    ]


def test_fully_allocated_extended_clusters_are_one_extent() -> None:
    """Runs are found by comparing both words of each entry."""
    entries = [(OFLAG_COPIED | (0x50000 + n * CLUSTER), ALL_ALLOCATED) for n in range(300)]
    words = pairs(*entries)
    assert classify(words, 0, 0, 300 * CLUSTER, EXTENDED) == [
        Extent(DATA, 0, 300 * CLUSTER, 0x50000)
    ]
    words[2 * 200 + 1] = 0
    lengths = [extent.length for extent in classify(words, 0, 0, 300 * CLUSTER, EXTENDED)]
    assert lengths == [200 * CLUSTER, CLUSTER, 99 * CLUSTER]


@pytest.mark.parametrize("odd_one", [0, 1, 11, 12, 13, 75, 76, 77, 500, 2046, 2047])
@pytest.mark.parametrize("step", [0, 512])
def test_the_end_of_a_long_run_is_found(odd_one: int, step: int) -> None:
    """At every distance at which the search changes its stride."""
    first = OFLAG_COPIED | 0x50000 if step else OFLAG_ZERO
    words = array("Q", [first + n * step for n in range(2048)])
    words[odd_one] = OFLAG_COPIED | 0x4000000
    extents = classify(words, 0, 0, 2048 * 512, SMALL)
    assert extents == model_of(words, 0, 2048 * 512, SMALL)
    assert Extent(DATA, odd_one * 512, 512, 0x4000000) in extents


def test_a_long_run_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 contiguous clusters are not 2,048 calls, nor 2,048 looks at single words."""
    looks = 0

    class Counting(array):  # type: ignore[type-arg]
        def __getitem__(self, index: int | slice) -> object:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return super().__getitem__(index)

    words = Counting("Q", [OFLAG_COPIED | (0x50000 + n * 512) for n in range(2048)])
    assert classify(words, 0, 0, 2048 * 512, SMALL) == [Extent(DATA, 0, 2048 * 512, 0x50000)]
    assert looks < 40


def entry_runs(geometry: Geometry) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Lists of valid entries with bitmaps in which runs are likely."""
    cluster_bits = geometry.cluster_bits
    bitmaps = st.just(0)
    types = ["hole", "data", "shared", "compressed", "zero", "zero allocated"]
    if geometry.extended_l2:
        bitmaps = st.sampled_from(
            [0, ALL_ALLOCATED, ALL_ZERO, 0xFF, 0xFF << 40, 0xF0F | 0xF0 << 32]
        )
        types = types[:4]

    def expand(run: tuple[str, int, int, int]) -> list[tuple[int, int]]:
        kind, cluster, count, bitmap = run
        flags = 0 if kind == "shared" else OFLAG_COPIED
        made = []
        for number in range(count):
            offset = cluster + number << cluster_bits
            match kind:
                case "hole":
                    made.append((0, bitmap & ALL_ZERO))
                case "zero":
                    made.append((OFLAG_ZERO, 0))
                case "zero allocated":
                    made.append((flags | offset | OFLAG_ZERO, 0))
                case "compressed":
                    made.append((compressed_entry(offset + 77, 400, geometry), 0))
                case _:
                    made.append((flags | offset, bitmap))
        return made

    run = st.tuples(st.sampled_from(types), st.integers(1, 40), st.integers(1, 100), bitmaps)
    return st.lists(run.map(expand), min_size=1, max_size=8).map(
        lambda lists: [entry for entries in lists for entry in entries]
    )


@given(st.sampled_from([SMALL, STANDARD, EXTENDED]), st.data())
def test_classifying_agrees_with_the_model(geometry: Geometry, data: st.DataObject) -> None:
    """Any range over any mixture of runs: the same extents as entry by entry."""
    entries = data.draw(entry_runs(geometry))
    words = pairs(*entries)
    if not geometry.extended_l2:
        words = words[::2]
    size = len(entries) * geometry.cluster_size
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    first_index = start // geometry.cluster_size
    assert classify(words, first_index, start, length, geometry) == model_of(
        words, start, length, geometry
    )


@given(st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8), st.integers(0, 4))
def test_any_words_are_classified_or_refused(values: list[int], which: int) -> None:
    """Noise raises CorruptImage and nothing else, and the extents cover the range."""
    geometry = (STANDARD, SMALL, EXTENDED, DATA_FILE, EXTENDED_DATA_FILE)[which]
    words = array("Q", values)
    length = len(values) // geometry.words_per_entry * geometry.cluster_size
    try:
        extents = classify(words, 0, 0, length, geometry)
    except CorruptImage:
        return
    assert sum(extent.length for extent in extents) == length


# Writing in place


def test_in_place_needs_copied() -> None:
    """A shared cluster, a compressed one, a zero one or none may not be overwritten."""
    for entry in (0x50000, OFLAG_COPIED | OFLAG_ZERO | 0x50000, OFLAG_ZERO, 0,
                  OFLAG_COPIED | compressed_entry(0x12345, 9, STANDARD)):  # fmt: skip
        assert in_place_extent(array("Q", [entry]), 0, 0, 512, STANDARD) is None


def test_in_place_ends_where_copied_does() -> None:
    """Even where the next cluster continues on the host."""
    words = array("Q", [OFLAG_COPIED | 0x50000, OFLAG_COPIED | 0x60000, 0x70000])
    extent = in_place_extent(words, 0, 512, 3 * CLUSTER - 512, STANDARD)
    assert extent == Extent(DATA, 512, 2 * CLUSTER - 512, 0x50200)


def test_in_place_ends_with_the_allocated_subclusters() -> None:
    """What is not allocated needs a change of the bitmap."""
    words = pairs((OFLAG_COPIED | 0x50000, allocation_bits(1, 3)))
    assert in_place_extent(words, 0, 0, SUBCLUSTER, EXTENDED) is None
    extent = in_place_extent(words, 0, SUBCLUSTER, CLUSTER - SUBCLUSTER, EXTENDED)
    assert extent == Extent(DATA, SUBCLUSTER, 3 * SUBCLUSTER, 0x50000 + SUBCLUSTER)


@pytest.mark.parametrize("name", ["_ONES", "_RAMP"])
def test_the_long_numbers_have_a_digit_for_each_word(name: str) -> None:
    """1, 1, 1... and 0, 1, 2...: what runs are compared with."""
    digits = array("Q")
    digits.frombytes(getattr(mapping, name).to_bytes(8 * 4096, "little"))
    words = load_words(store_words(digits))
    assert words.tolist() == ([1] * 4096 if name == "_ONES" else list(range(4096)))
