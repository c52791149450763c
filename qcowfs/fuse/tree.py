"""The inode tree: what is shown under which name (INTERFACE "The mounted directory").

Pure: built from a tuple of snapshot records, never changed afterwards; a change
of the snapshots makes a new tree. It must not import trio or pyfuse3, do I/O,
or know how an image stores its snapshots.

Invariants:
- An inode number is a function of the image alone: constants for the fixed
  files, for a snapshot a digest of what never changes about it (its ID and its
  dates), so that it survives a remount, a rename and the deletion of others,
  and so that a new snapshot that gets a deleted one's ID gets another inode.
- A directory offset is the inode number of the entry before it, and listings
  are in the order of inode numbers: entries that come or go neither repeat nor
  hide others.
- Every snapshot has exactly one file name, no two share one, and every name is
  a legal one: not empty, no slash, no NUL, valid UTF-8, at most 255 bytes.
"""

import enum
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

ROOT_INODE = 1
ACTIVE_INODE = 2
SNAPSHOTS_INODE = 3
INFO_INODE = 4
# 5 to 15 stay free for the directories that are to come (partitions, bitmaps).
_FIRST_SNAPSHOT_INODE = 1 << 32
# An inode number doubled is a file handle, and a directory offset is a signed
# 64-bit number: 62 bits fit both.
_INODE_MASK = (1 << 62) - 1

ACTIVE_NAME = b"active.raw"
SNAPSHOTS_NAME = b"snapshots"
INFO_NAME = b"info.json"
DISK_SUFFIX = b".raw"
_LONGEST_SUFFIX = b".vmstate"
NAME_MAX = 255
"""Bytes of the longest file name."""

_STEM_MAX = NAME_MAX - len(_LONGEST_SUFFIX)

# A name that is its own file name: no byte that needs a second look.
_PLAIN_NAME = re.compile(rb"[\w +,:;=#@!$&'()\[\]{}^~-][\w .+,:;=#@!$&'()\[\]{}^~-]*\Z", re.ASCII)
_PERCENT_TO_ESCAPE = re.compile(rb"%(?=[0-9A-Fa-f]{2}|~)")
_ESCAPED_BYTE = re.compile(rb"%([0-9A-Fa-f]{2})")
_EMPTY_NAME = b"%"
_LONE_PERCENT = b"%25"
_DIGEST_MARK = b"%~"


class EntryKind(enum.Enum):
    """What a name in the tree stands for."""

    DIRECTORY = "directory"
    ACTIVE = "active"
    SNAPSHOT = "snapshot"
    INFO = "info"


class SnapshotRecord(Protocol):
    """What the tree and the attributes want to know of a snapshot."""

    @property
    def id(self) -> bytes:
        """Unique in a sound image."""
        ...

    @property
    def name(self) -> bytes:
        """What a person called it; any bytes."""
        ...

    @property
    def date_sec(self) -> int:
        """When it was taken, seconds since 1970."""
        ...

    @property
    def date_nsec(self) -> int:
        """The fraction of that second."""
        ...

    @property
    def vm_clock_nsec(self) -> int:
        """How long the guest had run."""
        ...

    @property
    def vm_state_size(self) -> int:
        """Bytes of its saved machine state."""
        ...

    @property
    def disk_size(self) -> int | None:
        """Bytes of its disk; None in old images: that of the active disk."""
        ...

    @property
    def icount(self) -> int | None:
        """The instruction count of a recorded run, where there is one."""
        ...


class Entry(NamedTuple):
    """One name of the tree; `snapshot` is given for the kind SNAPSHOT alone."""

    inode: int
    parent_inode: int
    name: bytes
    kind: EntryKind
    snapshot: SnapshotRecord | None = None


def escape_name(name: bytes) -> bytes:
    """A snapshot's name as a file name's stem, reversibly.

    Bytes that cannot stand in a file name become %XX; a `%` that would be taken
    for the beginning of such an escape becomes %25; the empty name becomes a
    single `%`. The result may be too long for a file name.
    """
    if _PLAIN_NAME.match(name):
        return name
    if not name:
        return _EMPTY_NAME
    if name == b"%":
        return _LONE_PERCENT
    if name in (b".", b".."):
        return name.replace(b".", b"%2E")
    escaped = bytearray()
    marked = _PERCENT_TO_ESCAPE.sub(b"%25", name)
    for character in marked.decode("utf-8", "surrogateescape"):
        if character in "/\0":
            escaped += b"%%%02X" % ord(character)
        elif "\udc80" <= character <= "\udcff":
            escaped += b"%%%02X" % (ord(character) - 0xDC00)
        else:
            escaped += character.encode()
    return bytes(escaped)


def unescape_name(stem: bytes) -> bytes:
    """The name that `escape_name` made `stem` from; any other `%` stands for itself."""
    if stem == _EMPTY_NAME:
        return b""
    return _ESCAPED_BYTE.sub(lambda match: bytes((int(match[1], 16),)), stem)


def snapshot_name_of(file_name: bytes) -> bytes:
    """The snapshot name that a file called `file_name` would show.

    Raises ValueError for a name that no snapshot can have: another suffix, or
    the form of a shortened name.
    """
    stem = file_name.removesuffix(DISK_SUFFIX)
    if stem == file_name:
        raise ValueError("a snapshot's file name ends in .raw")
    name = unescape_name(stem)
    if escape_name(name) != stem or len(stem) > _STEM_MAX:
        raise ValueError("no snapshot name has that file name")
    return name


class Tree:
    """All names of one mount; `snapshots` in the order of the image's table."""

    def __init__(self, snapshots: Sequence[SnapshotRecord] = ()) -> None:
        self.snapshots = tuple(snapshots)
        inodes = _snapshot_inodes(self.snapshots)
        stems = _stems(self.snapshots, inodes)
        root = [
            Entry(ACTIVE_INODE, ROOT_INODE, ACTIVE_NAME, EntryKind.ACTIVE),
            Entry(SNAPSHOTS_INODE, ROOT_INODE, SNAPSHOTS_NAME, EntryKind.DIRECTORY),
            Entry(INFO_INODE, ROOT_INODE, INFO_NAME, EntryKind.INFO),
        ]
        children = [
            Entry(inode, SNAPSHOTS_INODE, stem + DISK_SUFFIX, EntryKind.SNAPSHOT, snapshot)
            for snapshot, inode, stem in zip(self.snapshots, inodes, stems, strict=True)
        ]
        children.sort()
        self._by_inode = {
            ROOT_INODE: Entry(ROOT_INODE, ROOT_INODE, b"", EntryKind.DIRECTORY),
            **{entry.inode: entry for entry in root},
            **{entry.inode: entry for entry in children},
        }
        self._children = {ROOT_INODE: root, SNAPSHOTS_INODE: children}
        self._by_name = {
            directory: {entry.name: entry for entry in entries}
            for directory, entries in self._children.items()
        }
        self._offsets = {
            directory: [entry.inode for entry in entries]
            for directory, entries in self._children.items()
        }

    def entry(self, inode: int) -> Entry | None:
        """The entry with this inode number."""
        return self._by_inode.get(inode)

    def lookup(self, directory_inode: int, name: bytes) -> Entry | None:
        """The entry called `name` in a directory; `.` and `..` are understood."""
        if name in (b".", b".."):
            entry = self._by_inode.get(directory_inode)
            if entry is None or name == b".":
                return entry
            return self._by_inode.get(entry.parent_inode)
        return self._by_name.get(directory_inode, {}).get(name)

    def listing(self, directory_inode: int, after: int = 0) -> Iterator[Entry]:
        """The entries behind directory offset `after`; an entry's offset is its inode number."""
        entries = self._children[directory_inode]
        first = bisect_right(self._offsets[directory_inode], after)
        for index in range(first, len(entries)):
            yield entries[index]

    def snapshot_entries(self) -> Sequence[Entry]:
        """All snapshots, in the order of their inode numbers."""
        return self._children[SNAPSHOTS_INODE]

    @property
    def active(self) -> Entry:
        """The active disk."""
        return self._by_inode[ACTIVE_INODE]

    def child_count(self, directory_inode: int) -> int:
        """How many entries a directory has."""
        return len(self._children[directory_inode])

    def directory_count(self, directory_inode: int) -> int:
        """How many of them are directories (the link count rests on it)."""
        return sum(
            entry.kind is EntryKind.DIRECTORY for entry in self._children[directory_inode][:16]
        )

    def gone_since(self, earlier: "Tree") -> list[Entry]:
        """Entries of `earlier` whose name is no longer there, or shows another inode."""
        now = self._by_name[SNAPSHOTS_INODE]
        gone = []
        for name, entry in earlier._by_name[SNAPSHOTS_INODE].items():
            current = now.get(name)
            if current is None or current.inode != entry.inode:
                gone.append(entry)
        return gone


def _snapshot_inodes(snapshots: Sequence[SnapshotRecord]) -> list[int]:
    """One inode number each; equal records (a broken image) are told apart by their order."""
    inodes: list[int] = []
    taken: set[int] = set()
    for snapshot in snapshots:
        identity = b"%d %d %d " % (snapshot.date_sec, snapshot.date_nsec, snapshot.vm_clock_nsec)
        identity += snapshot.id
        inode = _digest(identity)
        occurrence = 0
        while inode in taken or inode < _FIRST_SNAPSHOT_INODE:
            occurrence += 1
            inode = _digest(b"%d:" % occurrence + identity)
        taken.add(inode)
        inodes.append(inode)
    return inodes


def _digest(identity: bytes) -> int:
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "big") & _INODE_MASK


def _stems(snapshots: Sequence[SnapshotRecord], inodes: Sequence[int]) -> list[bytes]:
    """The file name without suffix of each snapshot.

    In order of preference: the name; NAME@ID where that is shared; for what is
    too long, or shared even then, its beginning and the inode number.
    """
    bases = [escape_name(snapshot.name) for snapshot in snapshots]
    uses = Counter(bases)
    with_ids = [
        base + b"@" + escape_name(snapshot.id) if uses[base] > 1 else base
        for base, snapshot in zip(bases, snapshots, strict=True)
    ]
    # A snapshot may be called what another one needs as NAME@ID.
    uses = Counter(with_ids)
    stems = []
    taken: set[bytes] = set()
    for stem, snapshot, inode in zip(with_ids, snapshots, inodes, strict=True):
        if uses[stem] > 1:
            stem = stem + b"@" + escape_name(snapshot.id)
        if len(stem) > _STEM_MAX or stem in taken or uses.get(stem, 1) > 1:
            stem = _shortened(stem, inode)
        taken.add(stem)
        stems.append(stem)
    return stems


def _shortened(stem: bytes, inode: int) -> bytes:
    tail = _DIGEST_MARK + b"%016x" % inode
    beginning = stem[: _STEM_MAX - len(tail)].decode("utf-8", "ignore").encode()
    return beginning + tail
