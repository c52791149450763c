"""What changes the tree: taking, deleting, applying and renaming snapshots, growing the disk.

One change at a time. It must not import pyfuse3 or answer the kernel: a change
hands back what the kernel has to forget, and the caller tells it once no lock
is held. It parses nothing of an image.

Invariants: after a change, successful or not, the tree shows what the image
says; a snapshot is applied only while no handle can write to the active disk,
and none can be opened for writing meanwhile.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from qcowfs.driver.node import Node
from qcowfs.errors import AlreadyExists, BadRequest, ImageBusy, ReadOnlyImage, UnsupportedFeature
from qcowfs.fuse.files import BlockCounts, OpenFiles, SnapshotStore
from qcowfs.fuse.tree import ACTIVE_INODE, Entry, Tree
from qcowfs.fuse.xattrs import find_snapshot

# close(2) comes back before the kernel has said that the handle is gone: a
# writer that has just closed is given so long to be seen off.
_RELEASE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Effect:
    """What the kernel may have cached and must forget."""

    gone: list[Entry] = field(default_factory=list)


class Changes:
    """The changes of one mount; `tree` is the present truth."""

    def __init__(
        self,
        node: Node,
        files: OpenFiles,
        counts: BlockCounts,
        is_attached: Callable[[], bool] = lambda: False,
    ) -> None:
        self._node = node
        self._store = node if isinstance(node, SnapshotStore) else None
        self._files = files
        self._counts = counts
        self._is_attached = is_attached
        self._lock = trio.Lock()
        self._may_write = trio.Event()
        self._may_write.set()
        self.tree = Tree(self._store.snapshots() if self._store is not None else ())
        # Bumped by each change: directories take their times from it.
        self.changed_ns = time.time_ns()

    async def wait_writable(self) -> None:
        """Return when the active disk may be opened for writing."""
        while not self._may_write.is_set():
            await self._may_write.wait()

    async def create(self, name: bytes) -> Effect:
        """Take a snapshot of the active disk, everything acknowledged so far included."""
        _check_name(name)
        store = self._writable_store()
        return await self._change(lambda: store.create_snapshot(name))

    async def delete(self, reference: bytes) -> Effect:
        """Delete the snapshot with that ID or name."""
        store = self._writable_store()

        async def delete() -> None:
            entry, snapshot_id = self._find(reference)
            async with self._files.without(entry):
                await store.delete_snapshot(snapshot_id)
            self._counts.forget(entry.inode)

        return await self._change(delete)

    async def rename(self, reference: bytes, new_name: bytes) -> Effect:
        """Rename the snapshot with that ID or name."""
        _check_name(new_name)
        store = self._writable_store()

        async def rename() -> None:
            entry, snapshot_id = self._find(reference)
            assert entry.snapshot is not None
            if entry.snapshot.name == new_name:
                return
            if any(other.name == new_name for other in self.tree.snapshots):
                raise AlreadyExists("a snapshot of that name exists")
            await store.rename_snapshot(snapshot_id, new_name)

        return await self._change(rename)

    async def apply(self, reference: bytes) -> Effect:
        """Make the active disk what a snapshot shows; ImageBusy while it may be written to."""
        store = self._writable_store()

        async def apply() -> None:
            _, snapshot_id = self._find(reference)
            self._may_write = trio.Event()
            try:
                with trio.move_on_after(_RELEASE_SECONDS):
                    await self._files.wait_no_writers()
                if self._files.writer_count:
                    raise ImageBusy("active.raw is open for writing")
                # A read-only loop device keeps pages that nobody can invalidate.
                if self._is_attached():
                    raise ImageBusy("active.raw is attached to a loop device")
                await store.apply_snapshot(snapshot_id)
                self._files.active.touch()
                self._counts.forget(ACTIVE_INODE)
            finally:
                self._may_write.set()

        return await self._change(apply)

    async def grow(self, size: int) -> None:
        """Make the active disk at least `size` bytes long."""
        grow: Callable[[int], Awaitable[Any]] | None = getattr(self._node, "grow", None)
        if grow is None:
            raise UnsupportedFeature(f"a {self._node.format_name} image cannot grow")
        async with self._lock:
            if size > self._node.virtual_size:
                await grow(size)
                self._files.active.touch()

    def _find(self, reference: bytes) -> tuple[Entry, bytes]:
        """A snapshot and the ID that tells the image which one is meant."""
        entry = find_snapshot(self.tree, reference)
        assert entry.snapshot is not None
        # Refused where a broken image has that ID twice.
        find_snapshot(self.tree, entry.snapshot.id)
        return entry, entry.snapshot.id

    def _writable_store(self) -> SnapshotStore:
        if self._store is None:
            raise UnsupportedFeature(f"a {self._node.format_name} image has no snapshots")
        if self._node.read_only:
            raise ReadOnlyImage("the image is read-only")
        return self._store

    async def _change(self, change: Callable[[], Awaitable[Any]]) -> Effect:
        assert self._store is not None
        async with self._lock:
            earlier = self.tree
            try:
                await change()
            finally:
                self.tree = Tree(self._store.snapshots())
                self.changed_ns = time.time_ns()
        return Effect(gone=self.tree.gone_since(earlier))


def _check_name(name: bytes) -> None:
    if not name:
        raise BadRequest("a snapshot needs a name")
    if b"\0" in name:
        raise BadRequest("a snapshot's name cannot hold a NUL")
