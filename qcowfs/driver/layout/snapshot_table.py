"""The snapshot table of a qcow2 image (qcow2 specification, "Snapshots").

Bytes <-> Snapshot values. Pure: it reads nothing by itself; since the length of
the table is written nowhere, SnapshotTableParser tells its caller how many
bytes to bring next.

Invariants: the structure of the table is checked here against its limits,
before anything is kept; what an entry says of its own L1 table is judged by
`Snapshot.check` alone, so that one bad snapshot does not hide the others.
Extra data that is unknown survives a round trip.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcowfs.driver.layout.geometry import (
    L1_ENTRY_LENGTH,
    MAX_L1_LENGTH,
    MAX_SNAPSHOT_COUNT,
    MAX_SNAPSHOT_EXTRA_LENGTH,
    MAX_SNAPSHOT_ID_LENGTH,
    MAX_SNAPSHOT_NAME_LENGTH,
    MAX_SNAPSHOT_TABLE_LENGTH,
    Geometry,
)
from qcowfs.errors import BadRequest, CorruptImage, ImageFull, NotFound

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_NO_ICOUNT = (1 << 64) - 1
_CHUNK_LENGTH = 64 << 10
_MAX_ID_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table.

    `l1_size` counts entries; `vm_state_size` and `disk_size` are bytes.
    `disk_size` is None in entries of old writers: then it is the active disk's.
    `unknown_extra` is what follows the extra data that is known.
    """

    id: bytes
    name: bytes
    l1_table_offset: int
    l1_size: int
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    unknown_extra: bytes = b""

    def check(self, geometry: Geometry, file_size: int) -> None:
        """Raise CorruptImage when the snapshot's L1 table cannot be used.

        `geometry` is the active disk's. The bounds are those of an active L1.
        """
        name = ascii(self.id.decode("utf-8", "backslashreplace"))
        size = geometry.virtual_size if self.disk_size is None else self.disk_size
        length = self.l1_size * L1_ENTRY_LENGTH
        end = self.l1_table_offset + length
        if length > MAX_L1_LENGTH:
            rule = f"L1 table of {length} bytes, must be at most {MAX_L1_LENGTH}"
        elif self.l1_table_offset & geometry.cluster_mask:
            rule = f"L1 table at {self.l1_table_offset:#x}, not aligned to a cluster"
        elif length and not self.l1_table_offset:
            rule = "L1 table at 0x0, where the header is"
        elif length and (self.l1_table_offset >= file_size or end > geometry.round_up(file_size)):
            rule = f"L1 table at {self.l1_table_offset:#x}, past the end of the file"
        elif geometry.l1_count(size) > self.l1_size:
            rule = (
                f"L1 table has {self.l1_size} entries, too few for {size} bytes "
                f"({geometry.l1_count(size)})"
            )
        else:
            return
        raise CorruptImage(
            f"snapshot {name}: {rule}", structure="snapshot", host_offset=self.l1_table_offset
        )


class SnapshotTableParser:
    """Parses a snapshot table from pieces that its caller reads.

    Feed it consecutive bytes from `snapshots_offset` on, `wanted()` bytes at a
    time, until that is 0. `available` is how many bytes the file has from
    there on. The same errors as of `parse_snapshot_table`.
    """

    def __init__(self, count: int, available: int) -> None:
        if count > MAX_SNAPSHOT_COUNT:
            raise _corrupt(f"{count} entries, must be at most {MAX_SNAPSHOT_COUNT}")
        self._count = count
        self._available = available
        self._pending = bytearray()
        self._fed = 0
        self._snapshots: list[Snapshot] = []
        self.length = 0

    def wanted(self) -> int:
        """How many bytes to feed next; 0 when the table is complete.

        Raises CorruptImage when the file, or the largest table, ends before it.
        """
        if len(self._snapshots) == self._count:
            return 0
        room = min(self._available, MAX_SNAPSHOT_TABLE_LENGTH) - self._fed
        if room <= 0:
            limit = f"{MAX_SNAPSHOT_TABLE_LENGTH} bytes, which is the limit"
            if self._available <= MAX_SNAPSHOT_TABLE_LENGTH:
                limit = "the end of the file"
            raise _corrupt(f"entry {len(self._snapshots)} does not end before {limit}")
        return min(room, _CHUNK_LENGTH)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the table."""
        self._pending += data
        self._fed += len(data)
        offset = 0
        pending = bytes(self._pending)
        while len(self._snapshots) < self._count:
            index = len(self._snapshots)
            parsed = _parse_entry(pending, offset, index)
            if parsed is None:
                break
            snapshot, length = parsed
            padded_length = length + (-length % 8)
            # The padding of the last entry alone need not be in the file.
            if offset + padded_length > len(pending) and index + 1 < self._count:
                break
            self._snapshots.append(snapshot)
            self.length += padded_length
            offset += padded_length
        del self._pending[:offset]

    def snapshots(self) -> tuple[Snapshot, ...]:
        """All entries, in the order of the table."""
        return tuple(self._snapshots)


def parse_snapshot_table(data: bytes | bytearray | memoryview, count: int) -> tuple[Snapshot, ...]:
    """The `count` entries of a whole table (what follows it is ignored).

    Raises CorruptImage for a table that goes on past `data` or past its limits,
    too many entries, or extra data over 1024 bytes.
    """
    parser = SnapshotTableParser(count, len(data))
    view = memoryview(data)
    offset = 0
    while length := parser.wanted():
        parser.feed(view[offset : offset + length])
        offset += length
    return parser.snapshots()


def serialize_snapshot_table(snapshots: Sequence[Snapshot]) -> bytes:
    """The bytes of a table, each entry padded to 8 bytes.

    Raises ImageFull for a table over its limits, BadRequest for an id, a name
    or extra data that is too long.
    """
    if len(snapshots) > MAX_SNAPSHOT_COUNT:
        raise ImageFull(f"{len(snapshots)} snapshots, an image holds {MAX_SNAPSHOT_COUNT}")
    table = b"".join(_pack_entry(snapshot) for snapshot in snapshots)
    if len(table) > MAX_SNAPSHOT_TABLE_LENGTH:
        raise ImageFull(
            f"snapshot table of {len(table)} bytes, at most {MAX_SNAPSHOT_TABLE_LENGTH}"
        )
    return table


def next_snapshot_id(snapshots: Iterable[Snapshot]) -> bytes:
    """One more than the largest number that an id begins with; "1" for none.

    An id with more digits than 64 bits could hold counts for nothing, so the
    result is short, and always one that is not taken.
    """
    largest = 0
    taken = set()
    for snapshot in snapshots:
        taken.add(snapshot.id)
        text = snapshot.id
        digits = text[: len(text) - len(text.lstrip(b"0123456789"))]
        if digits and len(digits) <= _MAX_ID_DIGITS:
            largest = max(largest, int(digits))
    found = largest + 1
    while b"%d" % found in taken:
        found += 1
    return b"%d" % found


def find_snapshot(snapshots: Sequence[Snapshot], reference: bytes) -> int:
    """The index of the snapshot with that id, or else the first with that name.

    Ids win over names: a snapshot named "1" is hidden by one whose id is "1".
    Raises NotFound.
    """
    for index, snapshot in enumerate(snapshots):
        if snapshot.id == reference:
            return index
    for index, snapshot in enumerate(snapshots):
        if snapshot.name == reference:
            return index
    shown = ascii(reference.decode("utf-8", "backslashreplace"))
    raise NotFound(f"no snapshot with the id or name {shown}")


def _corrupt(rule: str, index: int | None = None) -> CorruptImage:
    return CorruptImage(f"snapshot table: {rule}", structure="snapshot table", index=index)


def _parse_entry(data: bytes, offset: int, index: int) -> tuple[Snapshot, int] | None:
    """(snapshot, length without padding) of the entry at `offset`; None when more is needed."""
    if len(data) - offset < _ENTRY.size:
        return None
    (
        l1_table_offset,
        l1_size,
        id_length,
        name_length,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        vm_state_size,
        extra_length,
    ) = _ENTRY.unpack_from(data, offset)
    if extra_length > MAX_SNAPSHOT_EXTRA_LENGTH:
        raise _corrupt(
            f"entry {index}: extra data of {extra_length} bytes, must be at most "
            f"{MAX_SNAPSHOT_EXTRA_LENGTH}",
            index,
        )
    extra_offset = offset + _ENTRY.size
    id_offset = extra_offset + extra_length
    name_offset = id_offset + id_length
    end = name_offset + name_length
    if end > len(data):
        return None
    disk_size: int | None = None
    icount: int | None = None
    if extra_length >= 8:
        (vm_state_size,) = struct.unpack_from(">Q", data, extra_offset)
    if extra_length >= 16:
        (disk_size,) = struct.unpack_from(">Q", data, extra_offset + 8)
    if extra_length >= 24:
        (stored_icount,) = struct.unpack_from(">Q", data, extra_offset + 16)
        icount = None if stored_icount == _NO_ICOUNT else stored_icount
    snapshot = Snapshot(
        id=data[id_offset:name_offset],
        name=data[name_offset:end],
        l1_table_offset=l1_table_offset,
        l1_size=l1_size,
        date_sec=date_sec,
        date_nsec=date_nsec,
        vm_clock_nsec=vm_clock_nsec,
        vm_state_size=vm_state_size,
        disk_size=disk_size,
        icount=icount,
        unknown_extra=data[extra_offset + _EXTRA.size : id_offset],
    )
    return snapshot, end - offset


def _pack_entry(snapshot: Snapshot) -> bytes:
    extra = _pack_extra(snapshot)
    if len(snapshot.id) > MAX_SNAPSHOT_ID_LENGTH or len(snapshot.name) > MAX_SNAPSHOT_NAME_LENGTH:
        raise BadRequest(
            f"snapshot id or name over {MAX_SNAPSHOT_NAME_LENGTH} bytes: "
            f"{len(snapshot.id)} and {len(snapshot.name)}"
        )
    fixed = _ENTRY.pack(
        snapshot.l1_table_offset,
        snapshot.l1_size,
        len(snapshot.id),
        len(snapshot.name),
        snapshot.date_sec,
        snapshot.date_nsec,
        snapshot.vm_clock_nsec,
        # A reader that knows 32 bits only must not restore half of a VM state.
        snapshot.vm_state_size if snapshot.vm_state_size < 1 << 32 else 0,
        len(extra),
    )
    entry = fixed + extra + snapshot.id + snapshot.name
    return entry + bytes(-len(entry) % 8)


def _pack_extra(snapshot: Snapshot) -> bytes:
    if snapshot.disk_size is None:
        if snapshot.icount is not None or snapshot.unknown_extra:
            raise BadRequest("a snapshot with an icount or more extra data needs a disk size")
        if snapshot.vm_state_size < 1 << 32:
            return b""
        return struct.pack(">Q", snapshot.vm_state_size)
    icount = _NO_ICOUNT if snapshot.icount is None else snapshot.icount
    extra = _EXTRA.pack(snapshot.vm_state_size, snapshot.disk_size, icount)
    extra += snapshot.unknown_extra
    if len(extra) > MAX_SNAPSHOT_EXTRA_LENGTH:
        raise BadRequest(
            f"snapshot extra data of {len(extra)} bytes, at most {MAX_SNAPSHOT_EXTRA_LENGTH}"
        )
    return extra
