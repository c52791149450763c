"""What stat, statfs and a listing tell of each file, and the content of info.json.

Answers pyfuse3's values from the tree, the node and the bookkeeping of open
files; it changes nothing and answers no request by itself.

Invariant: an attribute that may change without the kernel's knowledge is never
given to it for keeps.
"""

import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyfuse3

from qcowfs.driver.node import Node
from qcowfs.fuse import xattrs
from qcowfs.fuse.changes import Changes
from qcowfs.fuse.files import BlockCounts, NodeContext, OpenFiles
from qcowfs.fuse.tree import (
    ACTIVE_INODE,
    INFO_INODE,
    NAME_MAX,
    ROOT_INODE,
    SNAPSHOTS_INODE,
    Entry,
    EntryKind,
)

# How long the kernel may believe what it cannot see change: whatever changes
# the attributes of a disk file on the way through the kernel ends it at once.
_LONG = 3600
_BLOCK = 512
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Presentation:
    """How files look from outside: owner, permissions, and what may be done at all.

    `mtime_ns` is that of the active disk until it is written to (0: now).
    """

    uid: int
    gid: int
    umask: int = 0o077
    read_only: bool = False
    growable: bool = False
    mtime_ns: int = 0

    def mode(self, permissions: int, *, writable: bool) -> int:
        """`permissions` less the umask, and less all writing where nothing may be written."""
        permissions &= ~self.umask
        return permissions if writable and not self.read_only else permissions & ~0o222


class Status:
    """The attributes of one mount's files; `using` opens the node of a disk's entry."""

    def __init__(
        self,
        node: Node,
        files: OpenFiles,
        counts: BlockCounts,
        changes: Changes,
        presentation: Presentation,
        using: Callable[[Entry], NodeContext],
    ) -> None:
        self._node = node
        self._files = files
        self._counts = counts
        self._changes = changes
        self._show = presentation
        self._using = using
        self._mounted_ns = time.time_ns()
        self._mtime_ns = presentation.mtime_ns or self._mounted_ns
        self._mtime_of_change_ns = 0
        self._info = b""
        self._info_state: tuple[object, ...] = ()

    @property
    def info(self) -> bytes:
        """The content of info.json, kept as it is while somebody reads it."""
        state = (self._changes.changed_ns, self._files.active.changed_ns, self._node.read_only)
        if not self._info or (state != self._info_state and not self._files.is_open(INFO_INODE)):
            self._info = xattrs.info_text(self._node)
            self._info_state = state
        return self._info

    def set_mtime(self, mtime_ns: int) -> None:
        """What touch(1) asked for; the next write ends it."""
        self._mtime_of_change_ns = self._files.active.changed_ns
        self._mtime_ns = mtime_ns

    async def of(self, entry: Entry) -> pyfuse3.EntryAttributes:
        """All attributes of an entry, its blocks counted where that is soon done."""
        if entry.kind not in (EntryKind.ACTIVE, EntryKind.SNAPSHOT):
            return self.guess(entry)
        changed_ns = self._files.active.changed_ns if entry.kind is EntryKind.ACTIVE else 0
        blocks, is_exact = await self._counts.blocks(
            entry.inode, self._size_of(entry), changed_ns, lambda: self._using(entry)
        )
        attributes = self.guess(entry)
        attributes.st_blocks = blocks
        if is_exact:
            attributes.attr_timeout = _LONG
        return attributes

    def guess(self, entry: Entry) -> pyfuse3.EntryAttributes:
        """The same without waiting: st_blocks is the last that was known, not to be kept."""
        attributes = pyfuse3.EntryAttributes()
        size = self._size_of(entry)
        known = self._counts.known(entry.inode)
        attributes.st_ino = entry.inode
        attributes.st_uid = self._show.uid
        attributes.st_gid = self._show.gid
        attributes.st_size = size
        attributes.st_blocks = -(-size // _BLOCK) if known is None else known
        attributes.st_blksize = self._node.cluster_size
        attributes.attr_timeout = 0
        attributes.entry_timeout = _LONG
        if entry.kind is EntryKind.SNAPSHOT:
            assert entry.snapshot is not None
            attributes.st_mode = stat.S_IFREG | self._show.mode(0o666, writable=False)
            attributes.entry_timeout = 0
            changed_ns = entry.snapshot.date_sec * _NANOSECONDS + entry.snapshot.date_nsec
        elif entry.kind is EntryKind.DIRECTORY:
            attributes.st_mode = stat.S_IFDIR | self._show.mode(0o777, writable=True)
            attributes.st_nlink = 2 + self._changes.tree.directory_count(entry.inode)
            is_root = entry.inode == ROOT_INODE
            changed_ns = self._mounted_ns if is_root else self._changes.changed_ns
        else:
            is_active = entry.kind is EntryKind.ACTIVE
            attributes.st_mode = stat.S_IFREG | self._show.mode(0o666, writable=is_active)
            changed_ns = self._active_mtime()
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = changed_ns
        return attributes

    def of_filesystem(self) -> pyfuse3.StatvfsData:
        """The active disk in clusters: those known to be allocated are used, the others free."""
        unit = self._node.cluster_size
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = unit
        data.f_blocks = -(-self._node.virtual_size // unit)
        used = -(-(self._counts.known(ACTIVE_INODE) or 0) * _BLOCK // unit)
        data.f_bfree = data.f_bavail = max(data.f_blocks - used, 0)
        tree = self._changes.tree
        data.f_files = 1 + tree.child_count(ROOT_INODE) + tree.child_count(SNAPSHOTS_INODE)
        data.f_namemax = NAME_MAX
        return data

    def _size_of(self, entry: Entry) -> int:
        if entry.kind is EntryKind.DIRECTORY:
            return 0
        if entry.kind is EntryKind.INFO:
            return len(self.info)
        if entry.snapshot is not None and entry.snapshot.disk_size is not None:
            return entry.snapshot.disk_size
        return self._node.virtual_size

    def _active_mtime(self) -> int:
        changed_ns = self._files.active.changed_ns
        if changed_ns != self._mtime_of_change_ns:
            self._mtime_of_change_ns = changed_ns
            # Whole seconds: each new value makes the kernel drop what it has cached.
            self._mtime_ns = changed_ns // _NANOSECONDS * _NANOSECONDS
        return self._mtime_ns
