"""Internal snapshots: the table in memory, and what creates, deletes, applies and renames them.

Implements docs/interop/qcow2, "Snapshots". Every operation runs under a closed
write gate and the metadata lock, so no guest write is under way. May not: know
FUSE or paths, write guest data. The order of each operation (README.md):

- create: counts up, COPIED flags off, the new L1 and the new table durable, one
  header write.
- delete: a table without it durable, one header write, counts down, COPIED anew.
- apply: counts of the snapshot up, a new active L1 durable, one header write
  (with the size), counts of the old one down, COPIED anew.

What fails behind the header write has happened all the same; COPIED flags that
it left to be set are set before the next operation, or at the end.

Invariants: a snapshot that is listed is whole; until the header write nothing
has changed but refcounts that are too high; an operation that is refused
changes nothing.
"""

import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace

import trio

from qcowfs.driver.layout.geometry import (
    MAX_SNAPSHOT_COUNT,
    MAX_SNAPSHOT_NAME_LENGTH,
    OFLAG_COPIED,
)
from qcowfs.driver.layout.mapping import store_words
from qcowfs.driver.layout.snapshot_table import (
    Snapshot,
    find_snapshot,
    next_snapshot_id,
    serialize_snapshot_table,
)
from qcowfs.driver.qcow2 import guard, references
from qcowfs.driver.qcow2.copied import clear_copied_flags, recompute_copied_flags
from qcowfs.driver.qcow2.l1 import L1View, load_l1
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.driver.qcow2.protecting import read_snapshot_table
from qcowfs.errors import (
    AlreadyExists,
    BadRequest,
    CorruptImage,
    ImageFull,
    QcowfsError,
    UnsupportedFeature,
)

logger = logging.getLogger(__name__)

# How long to wait between looks at requests that began before references went.
_SETTLE_INTERVAL = 0.0005


class Snapshots:
    """The snapshots of one open image; `entries` is what the header's table says.

    `vanishing` is entered around the removal of a snapshot from the table.
    """

    def __init__(
        self,
        metadata: Metadata,
        vanishing: Callable[[Snapshot], AbstractContextManager[None]],
    ) -> None:
        self._metadata = metadata
        self._vanishing = vanishing
        self._table_length = 0
        # COPIED flags are missing since references went away.
        self._flags_due = False
        self.entries: tuple[Snapshot, ...] = ()

    async def load(self) -> None:
        """Read the snapshot table. Raises CorruptImage, OSError."""
        header = self._metadata.header
        if header.nb_snapshots:
            self._table_length, self.entries = await read_snapshot_table(
                self._metadata.storage, header, self._metadata.storage.size()
            )

    def find(self, reference: bytes) -> Snapshot:
        """The snapshot with that id, or else name; raises NotFound."""
        return self.entries[find_snapshot(self.entries, reference)]

    async def open_view(self, snapshot: Snapshot) -> L1View:
        """The L1 table of a snapshot, with its own disk size. Raises CorruptImage, OSError."""
        metadata = self._metadata
        snapshot.check(metadata.geometry, metadata.storage.size())
        size = self._size_of(snapshot)
        # The table may become free while it is being read.
        token = metadata.requests.begin()
        try:
            words = await load_l1(metadata.storage, snapshot.l1_table_offset, snapshot.l1_size)
        finally:
            metadata.requests.end(token)
        return L1View(
            words,
            snapshot.l1_table_offset,
            metadata.geometry.with_virtual_size(size),
            writable=False,
        )

    async def create(self, name: bytes) -> Snapshot:
        """Take a snapshot of the active disk; durable on return.

        Raises BadRequest for an empty or over-long name, AlreadyExists,
        ImageFull where a count or a table cannot grow, UnsupportedFeature with
        an external data file, CorruptImage, ReadOnlyImage, OSError.
        """
        self._check_new(name)
        metadata = self._metadata
        async with self._alone():
            # Another one may have been taken meanwhile.
            self._check_new(name)
            await references.raise_all(metadata, metadata.active)
            snapshot: Snapshot | None = None
            try:
                snapshot = await self._write_l1_copy(name)
                await clear_copied_flags(metadata)
                await self._publish((*self.entries, snapshot))
            except BaseException:
                if snapshot is not None:
                    self._drop_l1(snapshot)
                await self._take_back(metadata.active, recompute=True)
                raise
        return snapshot

    async def delete(self, reference: bytes) -> None:
        """Remove a snapshot and free what only it used; durable on return.

        One whose own tables are damaged is removed all the same, and what they
        led to stays in use. Raises NotFound, ReadOnlyImage, CorruptImage, OSError.
        """
        metadata = self._metadata
        async with self._alone():
            snapshot = self.find(reference)
            view = await self._view_or_none(snapshot)
            rest = tuple(entry for entry in self.entries if entry is not snapshot)
            with self._vanishing(snapshot):
                await self._publish(rest)
            self._flags_due = True
            if view is not None:
                await references.lower_all(metadata, view, f"snapshot {snapshot.id!r}")
                self._drop_l1(snapshot)
            await self._settle_and_recompute()

    async def apply(self, reference: bytes) -> None:
        """Make the active disk what a snapshot holds, its size included; durable on return.

        Raises NotFound, CorruptImage for a damaged snapshot, ImageFull,
        ReadOnlyImage, OSError.
        """
        metadata = self._metadata
        async with self._alone():
            snapshot = self.find(reference)
            view = await self.open_view(snapshot)
            owner = metadata.protected.owner(
                snapshot.l1_table_offset >> metadata.geometry.cluster_bits
            )
            if snapshot.l1_size and owner != guard.SNAPSHOT_L1_TABLE:
                raise self._shared_l1(snapshot)
            if view.virtual_size != metadata.geometry.virtual_size:
                await self._keep_sizes()
            await references.raise_all(metadata, view)
            old = L1View(
                array("Q", metadata.active.words),
                metadata.active.table_offset,
                metadata.geometry,
                writable=False,
            )
            try:
                words = array("Q", (entry & ~OFLAG_COPIED for entry in view.words))
                missing = metadata.geometry.l1_count(view.virtual_size) - len(words)
                words.extend([0] * max(0, missing))
                await metadata.switch_active_l1(words, virtual_size=view.virtual_size)
            except BaseException:
                await self._take_back(view, recompute=False)
                raise
            self._flags_due = True
            await references.lower_all(metadata, old, "the active disk")
            await self._settle_and_recompute()

    async def rename(self, reference: bytes, name: bytes) -> Snapshot:
        """Give a snapshot another name; durable on return.

        Raises NotFound, BadRequest, AlreadyExists, ImageFull, ReadOnlyImage, OSError.
        """
        async with self._alone():
            old = self.find(reference)
            if old.name == name:
                return old
            self._check_name(name)
            new = replace(old, name=name)
            await self._publish(tuple(new if entry is old else entry for entry in self.entries))
            await self._metadata.commit()
        return new

    async def keep_sizes(self) -> None:
        """Note the disk's size in snapshots that tell none, before it changes; durable.

        Raises ImageFull, ReadOnlyImage, OSError.
        """
        if any(entry.disk_size is None for entry in self.entries):
            async with self._alone():
                await self._keep_sizes()

    async def finish(self) -> None:
        """Set the COPIED flags that a failed operation left out; before the image is closed."""
        if not self._flags_due or self._metadata.failsafe is not None:
            return
        try:
            async with self._alone():
                pass
        except (OSError, QcowfsError) as error:
            logger.warning("%s: cannot set COPIED flags: %s", self._metadata.name, error)

    # Inner parts

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Writable, no write under way, lock held, everything so far durable."""
        metadata = self._metadata
        await metadata.prepare_writing()
        async with metadata.requests.close_gate(), metadata.lock:
            metadata.check_writable()
            # Half an operation would leave clusters in use for nothing.
            with trio.CancelScope(shield=True):
                await metadata.commit()
                if self._flags_due:
                    await self._settle_and_recompute()
                yield

    async def _keep_sizes(self) -> None:
        if any(entry.disk_size is None for entry in self.entries):
            await self._publish(
                tuple(replace(entry, disk_size=self._size_of(entry)) for entry in self.entries)
            )

    def _check_new(self, name: bytes) -> None:
        self._check_name(name)
        if self._metadata.geometry.has_data_file:
            raise UnsupportedFeature(
                "an image with an external data file cannot have internal snapshots"
            )
        if len(self.entries) >= MAX_SNAPSHOT_COUNT:
            raise ImageFull(f"an image holds at most {MAX_SNAPSHOT_COUNT} snapshots")

    def _check_name(self, name: bytes) -> None:
        if not name:
            raise BadRequest("a snapshot needs a name")
        if len(name) > MAX_SNAPSHOT_NAME_LENGTH:
            raise BadRequest(
                f"a snapshot's name has {len(name)} bytes, at most {MAX_SNAPSHOT_NAME_LENGTH}"
            )
        if any(entry.name == name for entry in self.entries):
            shown = ascii(name.decode("utf-8", "backslashreplace"))
            raise AlreadyExists(f"there is a snapshot named {shown} already")

    def _drop_l1(self, snapshot: Snapshot) -> None:
        if snapshot.l1_size:
            self._metadata.allocator.drop(
                snapshot.l1_table_offset,
                snapshot.l1_size * 8,
                structure=guard.SNAPSHOT_L1_TABLE,
            )

    def _size_of(self, snapshot: Snapshot) -> int:
        if snapshot.disk_size is None:
            return self._metadata.geometry.virtual_size
        return snapshot.disk_size

    def _shared_l1(self, snapshot: Snapshot) -> CorruptImage:
        return CorruptImage(
            f"the L1 table of snapshot {snapshot.id.decode('utf-8', 'backslashreplace')!a} "
            f"at {snapshot.l1_table_offset:#x} serves something else too",
            structure="snapshot",
            host_offset=snapshot.l1_table_offset,
        )

    async def _view_or_none(self, snapshot: Snapshot) -> L1View | None:
        """The view of a snapshot whose references may be dropped, None for a damaged one."""
        metadata = self._metadata
        try:
            view = await self.open_view(snapshot)
            if snapshot.l1_size and not metadata.protected.is_sole_owner(
                guard.SNAPSHOT_L1_TABLE, snapshot.l1_table_offset, snapshot.l1_size * 8
            ):
                raise self._shared_l1(snapshot)
            return view
        except CorruptImage as error:
            logger.warning(
                "%s: %s; its clusters stay in use after its removal", self._metadata.name, error
            )
            return None

    async def _write_l1_copy(self, name: bytes) -> Snapshot:
        """The active L1 without COPIED flags in clusters of its own, and its entry."""
        metadata = self._metadata
        words = array("Q", (entry & ~OFLAG_COPIED for entry in metadata.active.words))
        table_offset = 0
        if words:
            cluster_size = metadata.geometry.cluster_size
            count = metadata.geometry.cluster_count(len(words) * 8)
            table_offset = await metadata.allocator.allocate_contiguous(
                count, guard.SNAPSHOT_L1_TABLE
            )
            padding = bytes(count * cluster_size - len(words) * 8)
            try:
                await metadata.writer.write(
                    guard.SNAPSHOT_L1_TABLE, table_offset, [store_words(words), padding]
                )
            except BaseException:
                metadata.allocator.drop(
                    table_offset, len(words) * 8, structure=guard.SNAPSHOT_L1_TABLE
                )
                raise
        now = time.time_ns()
        return Snapshot(
            id=next_snapshot_id(self.entries),
            name=name,
            l1_table_offset=table_offset,
            l1_size=len(words),
            date_sec=now // 1_000_000_000 & 0xFFFFFFFF,
            date_nsec=now % 1_000_000_000,
            disk_size=metadata.geometry.virtual_size,
        )

    async def _publish(self, entries: tuple[Snapshot, ...]) -> None:
        """Write a whole new table, switch to it, drop the old one; durable on return.

        When it fails before the switch, nothing has changed.
        """
        metadata = self._metadata
        old_offset, old_length = metadata.header.snapshots_offset, self._table_length
        data = serialize_snapshot_table(entries)
        table_offset = 0
        if data:
            cluster_size = metadata.geometry.cluster_size
            count = metadata.geometry.cluster_count(len(data))
            table_offset = await metadata.allocator.allocate_contiguous(
                count, guard.SNAPSHOT_TABLE
            )
            try:
                padding = bytes(count * cluster_size - len(data))
                await metadata.writer.write(guard.SNAPSHOT_TABLE, table_offset, [data, padding])
                await metadata.switch_snapshots(len(entries), table_offset)
            except BaseException:
                metadata.allocator.drop(table_offset, len(data), structure=guard.SNAPSHOT_TABLE)
                raise
        else:
            await metadata.switch_snapshots(0, 0)
        self.entries = entries
        self._table_length = len(data)
        if old_length:
            metadata.allocator.drop(old_offset, old_length, structure=guard.SNAPSHOT_TABLE)

    async def _take_back(self, view: L1View, *, recompute: bool) -> None:
        """Counts that were raised for nothing go down again; nothing of it was published."""
        metadata = self._metadata
        if metadata.failsafe is not None:
            return
        with metadata.changing():
            await references.lower_raised(metadata, view)
            if recompute:
                await recompute_copied_flags(metadata)

    async def _settle_and_recompute(self) -> None:
        """Wait until the counts are what the tables say, then set COPIED by them; durable."""
        metadata = self._metadata
        await metadata.commit()
        frees = metadata.allocator.frees
        while frees.settling:
            await frees.settle()
            if frees.settling:
                await trio.sleep(_SETTLE_INTERVAL)
        await recompute_copied_flags(metadata)
        await metadata.commit()
        self._flags_due = False
