"""The metadata of one open image: lookup, linking, commit, failsafe. The writer lock lives here.

Implements docs/interop/qcow2 "Cluster mapping" for changes, and the commit
order of driver/README.md. May not: touch guest data or backing files, know
FUSE. Invariants:

- Tables change only under `lock`, or in code without an await while `lock` is
  free; a commit holds it, so nothing changes while a commit is under way.
- `can_write` is True only after `prepare_writing`, never again in failsafe.
- Slices handed out are valid until the caller's next await, no longer.
- Nothing is written by an image that is never written to.
"""

import errno
from array import array
from typing import Any, Self

import trio

from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.header import Header
from qcowfs.driver.layout.mapping import OFLAG_COMPRESSED, compressed_location, store_words
from qcowfs.driver.qcow2 import guard
from qcowfs.driver.qcow2.failsafe import describe
from qcowfs.driver.qcow2.l1 import L1View, load_l1
from qcowfs.driver.qcow2.lookup import ABSENT, Absence
from qcowfs.driver.qcow2.parts import DEFAULT_CACHE_SIZE, Parts
from qcowfs.driver.qcow2.protecting import protect_structures
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.qcow2.tables import Slice
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage

__all__ = ["ABSENT", "DEFAULT_CACHE_SIZE", "Absence", "L1View", "Metadata", "Slice", "load_l1"]

# The host has no room: nothing is lost, and the same commit may be tried again.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Metadata(Parts):
    """Everything about one qcow2 image file but guest bytes; made by `Metadata.open`."""

    def __init__(self, storage: Storage, header: Header, **options: Any) -> None:
        """As of `Parts`; no I/O. Use `Metadata.open`."""
        super().__init__(storage, header, **options)
        self.allocator.grow_table = self._grow_refcount_table
        self._flushes_begun = 0
        self._flushes_done = 0

    @classmethod
    async def open(
        cls,
        storage: Storage,
        header: Header,
        *,
        read_only: bool,
        cache_size: int = DEFAULT_CACHE_SIZE,
        data_storage: Storage | None = None,
        requests: Requests | None = None,
    ) -> Self:
        """The metadata of an image whose header has been parsed; reads the active L1 only.

        `cache_size` bytes bound slices and refcount blocks together. Raises
        OSError of the host.
        """
        self = cls(
            storage,
            header,
            read_only=read_only,
            cache_size=cache_size,
            data_storage=data_storage,
            requests=requests,
        )
        self.active.words = await load_l1(storage, header.l1_table_offset, header.l1_size)
        return self

    # Changing

    async def prepare_writing(self) -> None:
        """What must precede an image's first change; afterwards `can_write` is True.

        Loads the refcount table, protects all known metadata, clears autoclear
        bits that are not maintained here and makes that durable. Takes the
        lock, so the caller must not hold it. Raises ReadOnlyImage,
        CorruptImage, OSError; may then be tried again.
        """
        self._state.check()
        async with self.lock:
            if not self.can_write:
                await self._prepare()

    def try_writable_slice(self, guest_offset: int) -> Slice | None:
        """A slice of the active disk whose table may be changed now, or None.

        Never waits, and answers None while the lock is held by anybody or the
        caches want a commit first. A table that does not exist yet is created
        when that needs no waiting. The caller changes the slice with
        `set_entries` before its next await. Raises CorruptImage, ImageFull,
        OSError.
        """
        if not self.can_write or self.lock.locked() or self.under_pressure:
            return None
        l1_index = guest_offset >> self._l1_shift
        entry = self.active.words[l1_index]
        if not entry:
            if not self._l2_tables.create_now(l1_index):
                return None
        elif not entry & OFLAG_COPIED:
            return None
        found = self.load_now(self.active, guest_offset)
        if found is None or found is ABSENT:
            return None
        self._l2_tables.check(l1_index, found.host_offset)
        return found

    async def writable_slice(self, guest_offset: int) -> Slice:
        """A slice of the active disk whose table may be changed; the caller holds the lock.

        Creates the L2 table, or copies one that a snapshot shares; commits
        first when the caches are full of changes. Valid until the next await.
        Raises CorruptImage, ImageFull, OSError of the host.
        """
        self._state.check()
        assert self.lock.locked()
        if self.under_pressure:
            await self.commit()
        l1_index = guest_offset >> self._l1_shift
        if l1_index >= len(self.active.words):
            raise CorruptImage(
                f"the L1 table has {len(self.active.words)} entries, guest offset "
                f"{guest_offset:#x} needs entry {l1_index}",
                structure="L1 table",
                index=l1_index,
            )
        table_offset = self.active.table_at(l1_index, self.storage.size())
        if not table_offset:
            await self._l2_tables.create(l1_index, bytes(self.geometry.cluster_size))
        elif self.active.words[l1_index] & OFLAG_COPIED:
            self._l2_tables.check(l1_index, table_offset)
        else:
            await self._l2_tables.copy(l1_index, table_offset)
        found = await self.load(self.active, guest_offset)
        assert found is not ABSENT
        return found

    def set_entries(self, piece: Slice, first_index: int, words: "array[int]") -> None:
        """Overwrite L2 entries, from entry `first_index` of the slice on.

        `words` holds one word per entry, two with extended L2 entries. The
        slice came from `writable_slice` or `try_writable_slice` with no await
        since. The one way in which L2 tables change.
        """
        if not self.can_write:
            self._state.check()
        if self._slices.get(piece.host_offset) is not piece:
            raise RuntimeError("an L2 slice was kept across an await")
        self.tables.replace_words(piece, first_index * self.geometry.words_per_entry, words)

    def release_entry(self, entry: int, bitmap: int = 0, *, punch: bool = False) -> None:
        """Queue the removal of the reference that an overwritten L2 entry held.

        Called after `set_entries` replaced it, with no await between. With
        `punch` the host gets the clusters' space back once they are free.
        Nothing happens for entries without a host cluster, and for guest data
        in an external data file. Raises CorruptImage (and enters failsafe)
        when the cluster is metadata.
        """
        geometry = self.geometry
        if entry & OFLAG_COMPRESSED:
            host_offset, stored_length = compressed_location(entry, geometry)
            self.allocator.drop(host_offset, stored_length, punch=punch)
            return
        host_offset = entry & OFFSET_MASK
        if not host_offset or geometry.has_data_file:
            return
        if host_offset & geometry.cluster_mask:
            raise CorruptImage(
                f"L2 entry {entry:#018x}: the host offset is not cluster-aligned",
                structure="L2 table",
                host_offset=host_offset,
            )
        self.allocator.drop(host_offset, geometry.cluster_size, punch=punch)

    def check_guest_write(self, host_offset: int, length: int) -> None:
        """Raise CorruptImage (and enter failsafe) when guest data would overwrite metadata.

        For every write of guest data into `storage` at a place taken from an
        L2 entry; a clean pass costs about 200 ns.
        """
        if self.geometry.has_data_file:
            return
        bits = self.geometry.cluster_bits
        first_index = host_offset >> bits
        owned = self.protected.first_owned(
            first_index, (host_offset + length - 1 >> bits) - first_index + 1
        )
        if owned is not None:
            self._state.report(
                CorruptImage(
                    f"guest data at {host_offset:#x} would overwrite the "
                    f"{self.protected.owner(owned)} at {owned << bits:#x}",
                    structure=self.protected.owner(owned),
                    host_offset=host_offset,
                )
            )

    # Commit

    async def commit(self) -> None:
        """Make all changes durable in the order of driver/README.md; the caller holds the lock.

        Shielded from cancellation. A host without room (ENOSPC, EDQUOT) loses
        nothing: all stays dirty and a later commit tries again. Any other
        error means failsafe. Raises ReadOnlyImage, OSError, CorruptImage.
        """
        self._state.check()
        with trio.CancelScope(shield=True):
            try:
                await self._committer.run(self.active)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    self.enter_failsafe(describe(error))
                raise
            except BaseException as error:
                self.enter_failsafe(describe(error), corrupt=isinstance(error, CorruptImage))
                raise

    async def flush(self) -> None:
        """Everything acknowledged so far is durable afterwards; takes the lock.

        One that waited while another flush began and ended after its call has
        nothing left to do. An image that was never written costs nothing.
        Raises ReadOnlyImage in failsafe, OSError of the host.
        """
        if self.failsafe is not None:
            self._state.check()
        if not self.can_write:
            return
        ticket = self._flushes_begun
        async with self.lock:
            self._state.check()
            if self._flushes_done > ticket:
                return
            self._flushes_begun += 1
            number = self._flushes_begun
            if self.dirty:
                await self.commit()
            else:
                with trio.CancelScope(shield=True):
                    await self._committer.sync_data()
            self._flushes_done = number

    async def finish(self) -> None:
        """Commit until nothing is left, frees included; before the image is closed.

        To be called when no request is under way; does nothing in failsafe
        but to write a corrupt bit that could not be written at once.
        """
        if self.failsafe is not None:
            await self._state.write_corrupt_bit()
            return
        if not self.can_write:
            return
        await self.flush()
        async with self.lock:
            await self.allocator.settle()
            if self.dirty:
                await self.commit()

    # Whole-table operations, for snapshots and resizes: gate closed, lock held

    async def switch_active_l1(
        self, words: "array[int]", *, virtual_size: int | None = None
    ) -> None:
        """Replace the active L1, in new clusters, by one header write; a commit of its own.

        `words` in native order; every table they lead to must hold the
        references that the caller raised for it. With `virtual_size` the
        disk's size changes in the same write. What only the old L1 led to is
        the caller's to drop; the clusters of the old L1 itself are dropped
        here. The caller holds the lock. Raises ImageFull, OSError.
        """
        self._state.check()
        assert self.lock.locked()
        cluster_size = self.geometry.cluster_size
        count = max(1, self.geometry.cluster_count(len(words) * 8))
        table_offset = await self.allocator.allocate_contiguous(count, guard.L1_TABLE)
        old_offset, old_length = self.active.table_offset, len(self.active.words) * 8
        padding = bytes(count * cluster_size - len(words) * 8)
        try:
            await self.writer.write(guard.L1_TABLE, table_offset, [store_words(words), padding])
            await self.commit()
        except BaseException:
            self.allocator.drop(table_offset, count * cluster_size, structure=guard.L1_TABLE)
            raise
        with trio.CancelScope(shield=True), self._changing:
            size = self.header.virtual_size if virtual_size is None else virtual_size
            await self.switch.set_l1(len(words), table_offset, size)
            self.active.words = array("Q", words)
            self.active.table_offset = table_offset
            self._resize(size)
            self.protected.adopt_l2_tables([entry & OFFSET_MASK for entry in words if entry])
            if old_length:
                self.allocator.drop(old_offset, old_length, structure=guard.L1_TABLE)

    async def set_virtual_size(self, virtual_size: int) -> None:
        """Write the disk's size, L1 unchanged and long enough; durable on return; lock held."""
        self._state.check()
        await self.commit()
        with trio.CancelScope(shield=True), self._changing:
            await self.switch.set_l1(len(self.active.words), self.active.table_offset, virtual_size)
            self._resize(virtual_size)

    async def switch_snapshots(self, snapshot_count: int, table_offset: int) -> None:
        """Publish a snapshot table by one header write; lock held.

        The new table has been written with `writer.write(SNAPSHOT_TABLE, ...)`
        to clusters from `allocate_contiguous`; all changes so far become
        durable first. The old table is the caller's to drop afterwards.
        """
        self._state.check()
        await self.commit()
        with trio.CancelScope(shield=True), self._changing:
            await self.switch.set_snapshots(snapshot_count, table_offset)

    async def write_header(self, header: Header) -> None:
        """Rewrite the whole header cluster and make it durable; lock held.

        For changes that no field write can express; not atomic beyond the
        first 512 bytes, so never for pointers.
        """
        self._state.check()
        with trio.CancelScope(shield=True), self._changing:
            await self.switch.write_whole(header)
            self._state.header = header

    def table_offsets(self, view: L1View) -> list[tuple[int, int]]:
        """(L1 index, host offset) of each L2 table of a view; raises CorruptImage."""
        file_size = self.storage.size()
        return [
            (l1_index, view.table_at(l1_index, file_size))
            for l1_index, entry in enumerate(view.words)
            if entry
        ]

    # Inner parts

    async def _prepare(self) -> None:
        self._state.check()
        self.switch.check_may_write()
        await self.refcounts.load_table(
            self.header.refcount_table_offset, self.header.refcount_table_clusters
        )
        await protect_structures(
            self.storage, self.header, self.active, self.refcounts, self.protected
        )
        await self.allocator.find_end()
        with trio.CancelScope(shield=True), self._changing:
            await self.switch.clear_autoclear(self.name)
        self._state.can_write = True

    async def _grow_refcount_table(self, block_count: int) -> None:
        """Make the refcount table cover `block_count` blocks; a commit of its own; lock held."""
        await self.commit()
        cluster_count, missing = self.allocator.plan_table(block_count)
        with trio.CancelScope(shield=True), self._changing:
            await self._committer.move_refcount_table(cluster_count, missing)

    def _resize(self, virtual_size: int) -> None:
        self.geometry = self.geometry.with_virtual_size(virtual_size)
        self.active.geometry = self.geometry
        self.active.virtual_size = self.geometry.virtual_size
