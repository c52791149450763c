"""The snapshot table: entries, their extra data, ids, and what is refused."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.layout.snapshot_table import (
    Snapshot,
    SnapshotTableParser,
    find_snapshot,
    next_snapshot_id,
    parse_snapshot_table,
    serialize_snapshot_table,
)
from qcowfs.errors import BadRequest, CorruptImage, ImageFull, NotFound

GEOMETRY = Geometry(16, 3, 1 << 30, False, 4)


def snapshot(**changes: Any) -> Snapshot:
    """A snapshot of a disk of 1 GiB."""
    values = {
        "id": b"1",
        "name": b"first",
        "l1_table_offset": 0x50000,
        "l1_size": 2,
        "disk_size": 1 << 30,
    }
    return Snapshot(**(values | changes))


def raw_entry(
    extra: bytes = b"", *, vm_state_size: int = 0, extra_length: int | None = None
) -> bytes:
    """An entry as it lies on disk: id "7", name "raw"."""
    claimed = len(extra) if extra_length is None else extra_length
    fixed = struct.pack(">QIHHIIQII", 0x50000, 2, 1, 3, 11, 12, 13, vm_state_size, claimed)
    entry = fixed + extra + b"7" + b"raw"
    return entry + bytes(-len(entry) % 8)


names = st.binary(max_size=60)
snapshots = st.lists(
    st.builds(
        Snapshot,
        id=names,
        name=names,
        l1_table_offset=st.integers(0, 2**64 - 1),
        l1_size=st.integers(0, 2**32 - 1),
        date_sec=st.integers(0, 2**32 - 1),
        date_nsec=st.integers(0, 2**32 - 1),
        vm_clock_nsec=st.integers(0, 2**64 - 1),
        vm_state_size=st.integers(0, 2**64 - 1),
        disk_size=st.integers(0, 2**64 - 1),
        icount=st.none() | st.integers(0, 2**64 - 2),
        unknown_extra=names,
    )
    | st.builds(
        Snapshot,
        id=names,
        name=names,
        l1_table_offset=st.integers(0, 2**64 - 1),
        l1_size=st.integers(0, 2**32 - 1),
        vm_state_size=st.integers(0, 2**64 - 1),
    ),
    max_size=6,
)


@given(snapshots)
def test_round_trip(table: list[Snapshot]) -> None:
    """All fields, unknown extra data and names of any bytes come back."""
    data = serialize_snapshot_table(table)
    assert len(data) % 8 == 0
    assert parse_snapshot_table(data, len(table)) == tuple(table)


@given(snapshots, st.integers(1, 50))
def test_pieces_of_any_length_give_the_same_table(table: list[Snapshot], piece: int) -> None:
    """A parser that is fed piece by piece ends where the table does."""
    data = serialize_snapshot_table(table)
    parser = SnapshotTableParser(len(table), len(data) + 100)
    offset = 0
    while parser.wanted():
        parser.feed((data + bytes(100))[offset : offset + piece])
        offset += piece
    assert parser.snapshots() == tuple(table)
    assert parser.length == len(data)


@given(st.binary(max_size=400), st.integers(0, 8))
def test_any_bytes_are_parsed_or_refused(noise: bytes, count: int) -> None:
    """Noise raises CorruptImage and nothing else."""
    try:
        assert len(parse_snapshot_table(noise, count)) == count
    except CorruptImage:
        pass


def test_an_entry_without_extra_data() -> None:
    """Old writers: 32 bits of VM state size, no disk size."""
    (found,) = parse_snapshot_table(raw_entry(vm_state_size=99), 1)
    assert (found.vm_state_size, found.disk_size, found.icount) == (99, None, None)
    assert (found.id, found.name) == (b"7", b"raw")
    assert (found.date_sec, found.date_nsec, found.vm_clock_nsec) == (11, 12, 13)


def test_the_large_vm_state_size_wins() -> None:
    """Where there is extra data, the 32-bit field says nothing."""
    (found,) = parse_snapshot_table(raw_entry(struct.pack(">Q", 5 << 32), vm_state_size=99), 1)
    assert found.vm_state_size == 5 << 32


def test_a_large_vm_state_stores_0_in_the_small_field() -> None:
    """A reader of 32 bits must see no VM state rather than a part of it."""
    data = serialize_snapshot_table([snapshot(vm_state_size=1 << 32)])
    assert data[32:36] == bytes(4)
    data = serialize_snapshot_table([snapshot(vm_state_size=(1 << 32) - 1)])
    assert data[32:36] == b"\xff\xff\xff\xff"


def test_an_icount_of_all_ones_is_none() -> None:
    """QEMU stores -1 for a machine that does not count instructions."""
    (found,) = parse_snapshot_table(raw_entry(struct.pack(">QQQ", 0, 512, 2**64 - 1)), 1)
    assert (found.disk_size, found.icount) == (512, None)


def test_a_new_entry_has_24_bytes_of_extra_data() -> None:
    """Version 3 wants 16 at least."""
    assert serialize_snapshot_table([snapshot()])[36:40] == (24).to_bytes(4, "big")


@pytest.mark.parametrize("length", [1025, 2**32 - 1])
def test_extra_data_over_1024_bytes_is_refused(length: int) -> None:
    """Before anything is read or kept by that length."""
    with pytest.raises(CorruptImage, match="entry 0: extra data"):
        parse_snapshot_table(raw_entry(extra_length=length) + bytes(4096), 1)


def test_1024_bytes_of_extra_data_are_accepted() -> None:
    """The limit itself is allowed, and what is unknown kept."""
    (found,) = parse_snapshot_table(raw_entry(bytes(24) + b"x" * 1000), 1)
    assert found.unknown_extra == b"x" * 1000


@pytest.mark.parametrize("count", [65537, 2**32 - 1])
def test_too_many_entries_are_refused(count: int) -> None:
    """Before the first is read."""
    with pytest.raises(CorruptImage, match="65536"):
        SnapshotTableParser(count, 1 << 40)


def test_a_table_ends_inside_the_file() -> None:
    """An entry cut off is refused."""
    data = raw_entry() * 2
    for length in (0, 1, 39, 40, 47, 48, 80, 91):
        with pytest.raises(CorruptImage, match="end of the file"):
            parse_snapshot_table(data[:length], 2)


def test_the_padding_of_the_last_entry_need_not_be_there() -> None:
    """A file may end with its name."""
    assert len(parse_snapshot_table((raw_entry() * 2)[:-4], 2)) == 2


def test_a_table_over_64_mib_is_refused() -> None:
    """The parser stops asking for more, wherever the file ends."""
    entry = serialize_snapshot_table([snapshot(name=b"n" * 65535, id=b"i" * 65535)])
    parser = SnapshotTableParser(65536, 1 << 40)
    fed = 0
    with pytest.raises(CorruptImage, match="limit"):
        while wanted := parser.wanted():
            start = fed % len(entry)
            piece = (entry + entry)[start : start + wanted]
            parser.feed(piece)
            fed += len(piece)
    assert fed <= 64 << 20


def test_a_table_that_breaks_a_limit_is_not_written() -> None:
    """Too many entries, too many bytes, too long a name, too much extra data."""
    with pytest.raises(ImageFull):
        serialize_snapshot_table([snapshot()] * 65537)
    with pytest.raises(ImageFull):
        serialize_snapshot_table([snapshot(name=b"n" * 65535)] * 1030)
    with pytest.raises(BadRequest):
        serialize_snapshot_table([snapshot(name=b"n" * 65536)])
    with pytest.raises(BadRequest):
        serialize_snapshot_table([snapshot(unknown_extra=bytes(1001))])


def test_names_of_65535_bytes_are_written_and_read() -> None:
    """The limit of the 16-bit length."""
    table = (snapshot(name=b"/\0\xff" * 21845),)
    assert parse_snapshot_table(serialize_snapshot_table(table), 1) == table


# Ids and references


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], b"1"),
        ([b"1", b"7", b"3"], b"8"),
        ([b"", b"abc"], b"1"),
        ([b"12ab"], b"13"),
        ([b"9" * 5000], b"1"),
        ([b"18446744073709551615"], b"18446744073709551616"),
    ],
)
def test_the_next_id(ids: list[bytes], expected: bytes) -> None:
    """One more than the largest number; what is no number of a sane length counts for nothing."""
    assert next_snapshot_id(snapshot(id=one) for one in ids) == expected


def test_ids_win_over_names() -> None:
    """A snapshot named "2" is hidden by the one with the id "2"."""
    table = [snapshot(id=b"1", name=b"2"), snapshot(id=b"2", name=b"1")]
    assert find_snapshot(table, b"2") == 1
    assert find_snapshot(table, b"1") == 0


def test_the_first_of_equal_names_is_found() -> None:
    """Duplicate names are legal."""
    table = [snapshot(id=b"1", name=b"x"), snapshot(id=b"2", name=b"x")]
    assert find_snapshot(table, b"x") == 0


def test_a_missing_snapshot_is_named() -> None:
    """With what a terminal might act on escaped."""
    with pytest.raises(NotFound, match=r"no\\x1b"):
        find_snapshot([snapshot()], b"no\x1b")


# One bad snapshot


def test_a_good_snapshot_passes() -> None:
    """Its L1 table is aligned, in the file and long enough."""
    snapshot().check(GEOMETRY, 1 << 20)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"l1_size": 2**32 - 1}, "at most"),
        ({"l1_size": (32 << 20) // 8 + 1}, "at most"),
        ({"l1_table_offset": 0x50200}, "aligned"),
        ({"l1_table_offset": 0}, "header"),
        ({"l1_table_offset": 1 << 40}, "past the end"),
        ({"l1_table_offset": 2**64 - 65536}, "past the end"),
        ({"l1_size": 1}, "too few"),
        ({"disk_size": 2**63}, "too few"),
        ({"disk_size": None, "l1_size": 1}, "too few"),
    ],
)
def test_a_bad_snapshot_is_refused_by_itself(change: dict[str, Any], rule: str) -> None:
    """The table it is in is read all the same."""
    bad = snapshot(**change)
    assert parse_snapshot_table(serialize_snapshot_table([bad, snapshot()]), 2)[0] == bad
    with pytest.raises(CorruptImage, match=rule):
        bad.check(GEOMETRY, 1 << 20)


def test_an_empty_disk_has_no_l1_table() -> None:
    """Size 0 with no entries at offset 0."""
    snapshot(l1_size=0, l1_table_offset=0, disk_size=0).check(GEOMETRY, 1 << 20)
