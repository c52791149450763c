"""A qcow2 image and its snapshots as nodes: assembly only.

What happens to bytes is in reading, writing and zeroing; what happens to
tables in metadata and snapshots. Here the parts are put together, and the life
of the whole begins and ends. Invariants:

- A snapshot's node reads through the image's caches and its backing node, with
  an L1 table and a size of its own; it owns nothing, so closing it does nothing.
- The node of a snapshot that is going away answers NotFound from before its
  first reference is dropped; requests that began earlier hold a generation, so
  they see its bytes or fail, and never see others.
- Closing flushes, then closes the file, then the backing chain, whatever fails.
"""

import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import trio

from qcowfs.driver.extent import Extent
from qcowfs.driver.layout.extensions import printable
from qcowfs.driver.layout.header import (
    CRYPT_LUKS,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    Header,
    parse_header,
    probe_cluster_size,
)
from qcowfs.driver.layout.luks import LuksHeader
from qcowfs.driver.layout.snapshot_table import Snapshot
from qcowfs.driver.node import Buffer, Node
from qcowfs.driver.qcow2 import resize
from qcowfs.driver.qcow2.ciphering import Ciphering
from qcowfs.driver.qcow2.description import describe
from qcowfs.driver.qcow2.encrypted import EncryptedReader, EncryptedWriter
from qcowfs.driver.qcow2.inflating import Inflater
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import DEFAULT_CACHE_SIZE, Metadata
from qcowfs.driver.qcow2.reading import Reader
from qcowfs.driver.qcow2.sealed import SealedReader, SealedWriter
from qcowfs.driver.qcow2.snapshots import Snapshots
from qcowfs.driver.qcow2.truncation import require_whole_data_file, require_whole_file
from qcowfs.driver.qcow2.unlocking import open_cipher, read_luks_header
from qcowfs.driver.qcow2.writing import Writer
from qcowfs.driver.qcow2.zeroing import Zeroer
from qcowfs.driver.storage import Storage
from qcowfs.errors import BadRequest, CorruptImage, NotFound, QcowfsError, ReadOnlyImage

logger = logging.getLogger(__name__)

# What has been changed for so long is committed without being asked, in seconds.
COMMIT_AFTER = 5.0
_COMMIT_CHECK_INTERVAL = 1.0

# Enough for the header of all but the largest clusters.
_HEAD_LENGTH = 1 << 16


class SnapshotNode:
    """One snapshot of an image as a read-only node; made by `Qcow2Node.open_snapshot`."""

    format_name = "qcow2"
    read_only = True

    def __init__(self, snapshot: Snapshot, reader: Reader, image: "Qcow2Node") -> None:
        self.snapshot = snapshot
        self.reader = reader
        self._image = image
        self.is_gone = False
        self.virtual_size = reader.view.virtual_size
        self.cluster_size = image.cluster_size
        self.backing = image.backing

    @property
    def name(self) -> str:
        """The image's name with the snapshot's id."""
        return f"{self._image.name} (snapshot {self.snapshot.id.decode('utf-8', 'replace')})"

    def try_read(self, guest_offset: int, length: int) -> bytearray | memoryview | None:
        """As `Node.try_read`; raises NotFound once the snapshot is deleted."""
        if self.is_gone:
            raise self._gone()
        return self.reader.try_read(guest_offset, length)

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """As `Node.try_read_into`; raises NotFound once the snapshot is deleted."""
        if self.is_gone:
            raise self._gone()
        return self.reader.try_read_into(guest_offset, buffer)

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """As `Node.read_into`; raises NotFound once the snapshot is deleted."""
        if self.is_gone:
            raise self._gone()
        await self.reader.read_into(guest_offset, buffer)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """As `Node.extents`; raises NotFound once the snapshot is deleted."""
        if self.is_gone:
            raise self._gone()
        return await self.reader.checked_extents(guest_offset, length, limit)

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Raises ReadOnlyImage."""
        raise self._unchangeable()

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Raises ReadOnlyImage."""
        raise self._unchangeable()

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Raises ReadOnlyImage."""
        raise self._unchangeable()

    async def discard(self, guest_offset: int, length: int) -> None:
        """Raises ReadOnlyImage."""
        raise self._unchangeable()

    async def flush(self) -> None:
        """Nothing: a snapshot never changes."""

    async def aclose(self) -> None:
        """Nothing: all that the node uses is the image's."""

    def _gone(self) -> NotFound:
        return NotFound(f"snapshot {printable(self.snapshot.id)} is deleted")

    def _unchangeable(self) -> ReadOnlyImage:
        return ReadOnlyImage("a snapshot never changes")


class Qcow2Node:
    """The active disk of a qcow2 image; made by `open_qcow2`.

    It owns `storage`, the data file and its backing node, and closes them all.
    `luks` is the LUKS header of an image that has one and whose is sound.
    """

    format_name = "qcow2"

    def __init__(
        self,
        metadata: Metadata,
        path: str,
        backing: Node | None,
        ciphering: Ciphering | None = None,
        *,
        sealed: bool = False,
    ) -> None:
        header = metadata.header
        self.luks: LuksHeader | None = None
        self._ciphering = ciphering
        self._sealed = sealed
        self.name = path
        self.cluster_size = header.cluster_size
        self.backing = backing
        self.metadata = metadata
        self._inflater = Inflater(
            metadata.data_storage,
            metadata.requests,
            compression_type=header.compression_type,
            cluster_size=header.cluster_size,
        )
        self.reader = self._reader_of(metadata.active)
        self._writer = self._make_writer()
        self._zeroer = Zeroer(metadata, self.reader, self._writer, backing)
        self._snapshots = Snapshots(metadata, self._vanishing)
        # Nodes that are in use, by `_key`.
        self._snapshot_nodes: WeakValueDictionary[tuple[bytes, int], SnapshotNode]
        self._snapshot_nodes = WeakValueDictionary()
        self._vanishing_keys: set[tuple[bytes, int]] = set()
        self._closed = False

    def _reader_of(self, view: L1View) -> Reader:
        backing = self.backing
        backing_reader = backing.reader if isinstance(backing, Qcow2Node | SnapshotNode) else None
        parts = (self.metadata, view, self._inflater, backing, backing_reader)
        if self._ciphering is not None:
            return EncryptedReader(*parts, self._ciphering)
        return SealedReader(*parts) if self._sealed else Reader(*parts)

    def _make_writer(self) -> Writer:
        if self._ciphering is not None:
            return EncryptedWriter(self.metadata, self.reader, self._ciphering)
        make = SealedWriter if self._sealed else Writer
        return make(self.metadata, self.reader)

    @property
    def virtual_size(self) -> int:
        """The size of the active disk in bytes."""
        return self.metadata.active.virtual_size

    @property
    def read_only(self) -> bool:
        """Whether a write would be refused: opened so, or failsafe."""
        return self.metadata.read_only

    @property
    def failsafe(self) -> str | None:
        """Why the image went read-only, None while all is well."""
        return self.metadata.failsafe

    def enter_failsafe(self, reason: str) -> None:
        """Refuse every later change, with one log record; the first reason stays."""
        self.metadata.enter_failsafe(reason)

    # Guest bytes

    def try_read(self, guest_offset: int, length: int) -> bytearray | memoryview | None:
        """The bytes, backing files seen through; None when something must be waited for."""
        return self.reader.try_read(guest_offset, length)

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` and answer True, or leave its content undefined and answer False."""
        return self.reader.try_read_into(guest_offset, buffer)

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. Raises BadRequest, CorruptImage, OSError."""
        await self.reader.read_into(guest_offset, buffer)

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting and answer True, or answer False.

        After False the same bytes are to be written by `write_from`: some of
        them may be written already.
        """
        return self._writer.try_write(guest_offset, data)

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Write all of `data`. Raises as `Node.write_from`, and BadRequest."""
        await self._writer.write_from(guest_offset, data)

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros; with `unmap`, give its clusters back where possible."""
        await self._zeroer.write_zeroes(guest_offset, length, unmap=unmap)

    async def discard(self, guest_offset: int, length: int) -> None:
        """Give the whole clusters of the range back; a backing file is never revealed."""
        await self._zeroer.discard(guest_offset, length)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """What the range is made of in this layer alone."""
        return await self.reader.checked_extents(guest_offset, length, limit)

    async def grow(self, virtual_size: int) -> None:
        """Make the disk larger; what is behind its old end reads as zeros. See `resize.grow`."""
        await self._snapshots.keep_sizes()
        old_size = self.virtual_size
        await resize.grow(self.metadata, virtual_size, self._hide)
        if self.metadata.geometry.data_file_raw and not self._writer.is_encrypted:
            await resize.map_data_file(self.metadata, old_size, self.virtual_size)

    async def _hide(self, old_size: int, new_size: int) -> None:
        """Zero what a growing disk would show: its last table's rest, a longer backing file."""
        geometry = self.metadata.geometry
        table_end = geometry.vm_state_offset(old_size)
        end = geometry.round_up(min(new_size, max(self.reader.backing_size, table_end)))
        if end > old_size:
            await self._zeroer.zero_entered(old_size, end)

    # Durability and the end

    async def flush(self) -> None:
        """Make everything acknowledged so far durable. Raises ReadOnlyImage, OSError."""
        await self.metadata.flush()

    async def maintain(self) -> None:
        """Commit what has been changed for some seconds; runs until cancelled.

        A failure is logged (once while it lasts) and tried again; what cannot be
        tried again has put the image into failsafe by itself.
        """
        dirty_since: float | None = None
        failed = False
        while True:
            await trio.sleep(_COMMIT_CHECK_INTERVAL)
            if not self.metadata.dirty or self.metadata.read_only:
                dirty_since = None
                continue
            now = trio.current_time()
            if dirty_since is None:
                dirty_since = now
            if now - dirty_since < COMMIT_AFTER:
                continue
            dirty_since = None
            try:
                await self.metadata.flush()
                failed = False
            except (OSError, QcowfsError) as error:
                if not failed:
                    logger.warning("%s: cannot commit: %s", self.name, error)
                failed = True

    async def aclose(self) -> None:
        """Flush, release the file and the backing chain; idempotent.

        What fails first is raised, after everything has been closed.
        """
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            async with AsyncExitStack() as closing:
                if self.backing is not None:
                    closing.push_async_callback(self.backing.aclose)
                for file in self.metadata.files:
                    closing.push_async_callback(file.aclose)
                await self._snapshots.finish()
                await self.metadata.finish()

    # Snapshots

    async def load_snapshots(self) -> None:
        """Read the snapshot table; once, when the image is opened. Raises CorruptImage, OSError."""
        await self._snapshots.load()

    def snapshots(self) -> tuple[Snapshot, ...]:
        """All snapshots, in the order of the table."""
        return self._snapshots.entries

    async def create_snapshot(self, name: bytes) -> Snapshot:
        """Take a snapshot of the active disk; see `Snapshots.create`."""
        return await self._snapshots.create(name)

    async def delete_snapshot(self, reference: bytes) -> None:
        """Remove the snapshot with that id, or else name; see `Snapshots.delete`."""
        await self._snapshots.delete(reference)

    async def apply_snapshot(self, reference: bytes) -> None:
        """Make the active disk what a snapshot holds; see `Snapshots.apply`."""
        await self._snapshots.apply(reference)

    async def rename_snapshot(self, reference: bytes, name: bytes) -> Snapshot:
        """Give a snapshot another name; see `Snapshots.rename`."""
        return await self._snapshots.rename(reference, name)

    async def open_snapshot(self, snapshot: Snapshot) -> SnapshotNode:
        """The read-only node of one of `snapshots()`; the same one for all who have it open.

        Raises NotFound when it is no longer there, CorruptImage when its L1
        table cannot be used, OSError.
        """
        node = self._open_node(snapshot)
        if node is not None:
            return node
        view = await self._snapshots.open_view(snapshot)
        node = self._open_node(snapshot)
        if node is None:
            node = SnapshotNode(snapshot, self._reader_of(view), self)
            self._snapshot_nodes[_key(snapshot)] = node
        return node

    def _open_node(self, snapshot: Snapshot) -> SnapshotNode | None:
        """The node of a snapshot if it is open. Raises NotFound for a snapshot that is gone."""
        key = _key(snapshot)
        if key in self._vanishing_keys or key not in map(_key, self._snapshots.entries):
            raise NotFound(f"snapshot {printable(snapshot.id)} is deleted")
        return self._snapshot_nodes.get(key)

    @contextmanager
    def _vanishing(self, snapshot: Snapshot) -> Iterator[None]:
        """Around the deletion of a snapshot: its node is gone from the beginning.

        None can be opened meanwhile. It comes back when the block raises.
        """
        key = _key(snapshot)
        node = self._snapshot_nodes.get(key)
        self._vanishing_keys.add(key)
        if node is not None:
            node.is_gone = True
        try:
            yield
        except BaseException:
            if node is not None:
                node.is_gone = False
            raise
        else:
            self._snapshot_nodes.pop(key, None)
        finally:
            self._vanishing_keys.discard(key)

    # What the image is

    def info(self) -> dict[str, Any]:
        """The facts that qemu-img info prints, under its keys."""
        metadata = self.metadata
        return describe(
            metadata.header,
            metadata.geometry,
            self._snapshots.entries,
            filename=self.name,
            actual_size=sum(file.allocated_bytes() for file in metadata.files),
            luks=self.luks,
        )

    def statistics(self) -> dict[str, int]:
        """Counts since the image was opened, and sizes of caches, by name."""
        metadata = self.metadata
        return {
            **metadata.counters.as_dict(),
            "inflated_clusters": self._inflater.inflated_count,
            "slices": len(metadata.tables.slices),
            "dirty_slices": len(metadata.tables.dirty),
            "allocations_in_flight": len(metadata.requests.allocations),
        }


def _key(snapshot: Snapshot) -> tuple[bytes, int]:
    """What tells a snapshot from others for as long as it lives; names may change."""
    return snapshot.id, snapshot.l1_table_offset


async def open_qcow2(
    storage: Storage,
    *,
    path: str,
    read_only: bool,
    backing: Node | None,
    cache_size: int = DEFAULT_CACHE_SIZE,
    secret: bytes | None = None,
    data_storage: Storage | None = None,
    describe_only: bool = False,
) -> Qcow2Node:
    """The node of the qcow2 image in `storage`; it owns what it is given on success.

    `cache_size` in bytes bounds the image's tables in memory, `secret` is the
    passphrase of an encrypted image, `data_storage` the external data file of
    an image that has one. With `describe_only` neither is needed, and guest
    data can be neither read nor written. Raises BadRequest (not a qcow2 image),
    UnsupportedFeature (an unknown feature), KeyRequired, CorruptImage (a broken
    header; and when the image is to be written: marked corrupt or dirty, or cut
    off), OSError.
    """
    size = storage.size()
    head = await storage.pread(min(size, _HEAD_LENGTH), 0)
    cluster_size = probe_cluster_size(head)
    if cluster_size > len(head):
        head = await storage.pread(min(size, cluster_size), 0)
    header = parse_header(head, size)
    _check_usable(header, writable=not read_only)
    luks = None
    if header.crypt_method == CRYPT_LUKS:
        try:
            luks = await read_luks_header(storage, header)
        except QcowfsError as error:
            if not describe_only:
                raise
            logger.warning("%s: %s", path, error)
    ciphering = None
    if not describe_only:
        ciphering = await open_cipher(storage, header, luks, secret)
        if header.has_data_file and data_storage is None:
            raise BadRequest("the image needs its data file", structure="header")
    metadata = await Metadata.open(
        storage,
        header,
        read_only=read_only,
        cache_size=cache_size,
        data_storage=data_storage,
    )
    if not read_only:
        await require_whole_file(metadata)
    if data_storage is not None:
        await require_whole_data_file(metadata, writable=not read_only)
    node = Qcow2Node(metadata, path, backing, ciphering, sealed=describe_only)
    node.luks = luks
    try:
        await node.load_snapshots()
    except CorruptImage as error:
        if not read_only:
            raise
        # The active disk needs nothing of that table.
        logger.warning("%s: no snapshots are shown: %s", path, error)
    return node


def _check_usable(header: Header, *, writable: bool) -> None:
    """Refuse what cannot be served, or not for writing."""
    marks = []
    if header.incompatible & INCOMPATIBLE_CORRUPT:
        marks.append("corrupt")
    if header.incompatible & INCOMPATIBLE_DIRTY:
        marks.append("dirty (its refcounts may be wrong)")
    if marks and writable:
        raise CorruptImage(
            f"the image is marked {' and '.join(marks)}: it is not opened for writing",
            structure="header",
            hint="open it read-only, or repair it with qemu-img check -r all",
        )
