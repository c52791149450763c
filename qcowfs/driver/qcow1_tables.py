"""The L1 and L2 tables of one open qcow image of version 1, its end, and their commits.

Implements the write order of FORMATS.md 1.2. There are no refcounts: clusters
are taken at the end of the file and never handed out again while it is open,
so the worst that a crash leaves is room that nothing points to. It reads and
writes no guest data and knows no backing file.

Invariants:

- `end` is a multiple of the cluster size behind everything in the file, so
  what lies there was never written: it reads as zeros.
- A commit writes new L2 tables, syncs them with all guest data, then writes
  L1 entries and changed L2 entries, and syncs again.
- An L2 table that is new is linked in the L1 table in memory only, until then.
- The host clusters of discarded entries are punched out once their removal is
  durable and, in an encrypted image, once nobody reads: whoever looked one up
  before would decipher the zeros of the hole to noise.
"""

import logging
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import trio

from qcowfs.driver.layout.mapping import load_words, store_words
from qcowfs.driver.layout.qcow1 import CRYPT_NONE, Qcow1Header, l2_table_offset
from qcowfs.driver.pages import DirtyRange, Page, PageCache
from qcowfs.driver.storage import Buffer, Storage

logger = logging.getLogger(__name__)

DEFAULT_CACHE_SIZE = 8 << 20
_LOAD_LENGTH = 1 << 20


async def load_l1(storage: Storage, header: Qcow1Header) -> "array[int]":
    """The L1 table in native order, read in pieces, since it may be 32 MiB long."""
    words = array("Q")
    host_offset = header.l1_table_offset
    end = host_offset + header.l1_size * 8
    while host_offset < end:
        length = min(_LOAD_LENGTH, end - host_offset)
        words.extend(load_words(await storage.pread(length, host_offset)))
        host_offset += length
    return words


class Qcow1Tables:
    """Tables in memory; every method without `async` is atomic.

    `l1` holds the offsets of L2 tables as read, unchecked; `end` is where the
    next cluster is taken. `reader_count` is how many reads are waiting for
    bytes whose place they have looked up.
    """

    __slots__ = ("_create_lock", "_freed", "_l1_dirty", "_storage", "cluster_bits",
                 "cluster_size", "coverage_bits", "end", "header", "index_mask", "l1",
                 "pages", "reader_count")  # fmt: skip

    def __init__(
        self, storage: Storage, header: Qcow1Header, l1: "array[int]", cache_size: int
    ) -> None:
        self._storage = storage
        self._create_lock = trio.Lock()
        self._l1_dirty: set[int] = set()
        self._freed: list[tuple[int, int]] = []
        self.reader_count = 0
        self.header = header
        self.l1 = l1
        self.pages = PageCache(
            storage, length=header.l2_table_length, typecode="Q", budget=cache_size
        )
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.coverage_bits = header.cluster_bits + header.l2_bits
        self.index_mask = header.l2_entry_count - 1
        self.end = -(-storage.size() // header.cluster_size) * header.cluster_size

    @property
    def has_changes(self) -> bool:
        """Whether a commit would write something."""
        return bool(self.pages.dirty or self._l1_dirty)

    # Tables

    def try_load(self, guest_offset: int) -> Page | None:
        """The L2 table of a guest offset that has one; None when it must be waited for.

        Raises CorruptImage for an L1 entry that leads nowhere.
        """
        return self.pages.try_load(self._place(guest_offset))

    async def load(self, guest_offset: int) -> Page:
        """The L2 table of a guest offset that has one."""
        return await self.pages.load(self._place(guest_offset))

    def _place(self, guest_offset: int) -> int:
        l1_index = guest_offset >> self.coverage_bits
        return l2_table_offset(self.l1[l1_index], l1_index, self.header, self.end)

    def try_create(self, guest_offset: int) -> Page | None:
        """A new empty L2 table for a guest offset without one; None when it must be waited for."""
        if self._create_lock.locked():
            return None
        host_offset = self.end
        # Written at once: a full host says so now, not at the next commit.
        if not self.try_append((bytes(self.pages.length),), self.pages.length):
            return None
        return self._adopt(guest_offset, host_offset)

    async def create(self, guest_offset: int) -> Page:
        """As `try_create`, waiting; the table that another request made meanwhile will do too."""
        async with self._create_lock:
            if self.l1[guest_offset >> self.coverage_bits]:
                return await self.load(guest_offset)
            host_offset = self.take(self.pages.length)
            await self._storage.pwrite((bytes(self.pages.length),), host_offset)
            return self._adopt(guest_offset, host_offset)

    def _adopt(self, guest_offset: int, host_offset: int) -> Page:
        l1_index = guest_offset >> self.coverage_bits
        self.l1[l1_index] = host_offset
        self._l1_dirty.add(l1_index)
        return self.pages.add_new(host_offset)

    def set_run(self, page: Page, index: int, count: int, host_offset: int) -> None:
        """Map `count` clusters from entry `index` on to the host clusters from `host_offset` on."""
        size = self.cluster_size
        page.items[index : index + count] = array(
            "Q", range(host_offset, host_offset + count * size, size)
        )
        self.pages.mark_dirty(page, index, count)

    def clear_run(self, page: Page, index: int, count: int) -> None:
        """Unmap `count` clusters from entry `index` on."""
        page.items[index : index + count] = array("Q", bytes(8 * count))
        self.pages.mark_dirty(page, index, count)

    # Host room

    def take(self, length: int) -> int:
        """The host offset of room for `length` bytes, rounded up to clusters; never given back."""
        host_offset = self.end
        size = self.cluster_size
        self.end += -(-length // size) * size
        return host_offset

    def try_append(self, buffers: Sequence[Buffer], length: int, start: int = 0) -> bool:
        """Write buffers `start` bytes into new room of `length` bytes at `end`.

        False, with nothing taken, when the storage cannot write at once. When it
        fails the room is lost: some of it may have been written.
        """
        try:
            done = self._storage.try_pwrite(buffers, self.end + start)
        except BaseException:
            self.take(length)
            raise
        if done:
            self.take(length)
        return done

    def free(self, host_offset: int, length: int) -> None:
        """Nothing points to the range any more; its room goes back to the host in due time."""
        if self._freed:
            last_offset, last_length = self._freed[-1]
            if last_offset + last_length == host_offset:
                self._freed[-1] = (last_offset, last_length + length)
                return
        self._freed.append((host_offset, length))

    # Durability

    async def commit(self, sync: Callable[[], Awaitable[None]]) -> None:
        """Write everything in order; one call at a time. What fails is tried again by the next."""
        taken = self.pages.take_dirty()
        l1_indexes, self._l1_dirty = self._l1_dirty, set()
        freed, self._freed = self._freed, []
        l1_parts = [(index, store_words(self.l1, index, 1)) for index in sorted(l1_indexes)]
        try:
            for part in taken:
                if part.is_new:
                    await self._write(part.data, part.host_offset)
            await sync()
            for part in taken:
                # Durable now: what is added to it later must follow its data, even if the
                # L1 entry that is written next fails half-way.
                part.page.is_new = False
            if taken or l1_parts:
                await self._publish(taken, l1_parts)
                await sync()
        except BaseException:
            self.pages.give_back(taken)
            self._l1_dirty |= l1_indexes
            self._freed = freed + self._freed
            raise
        self.pages.settle(taken)
        await self._give_room_back(freed)

    async def _publish(
        self, taken: Sequence[DirtyRange], l1_parts: Sequence[tuple[int, bytes]]
    ) -> None:
        for part in taken:
            if not part.is_new:
                await self._write(part.data, part.host_offset)
        for index, data in l1_parts:
            await self._write(data, self.header.l1_table_offset + index * 8)

    async def _write(self, data: bytes, host_offset: int) -> None:
        if not self._storage.try_pwrite((data,), host_offset):
            await self._storage.pwrite((data,), host_offset)

    async def _give_room_back(self, freed: Sequence[tuple[int, int]]) -> None:
        if self.reader_count and self.header.crypt_method != CRYPT_NONE:
            self._freed[:0] = freed
            return
        try:
            for host_offset, length in freed:
                if not await self._storage.punch(host_offset, length):
                    return
        except OSError as error:
            logger.warning("%s: cannot give room back: %s", self._storage.name, error)

    async def replace_l1(
        self, header: Qcow1Header, sync: Callable[[], Awaitable[None]]
    ) -> Qcow1Header:
        """Copy the L1 table, longer now, to new room; the header that names it, not yet written.

        Everything must have been committed, and nothing may change meanwhile.
        """
        l1 = self.l1 + array("Q", bytes(8 * (header.l1_size - len(self.l1))))
        host_offset = self.take(len(l1) * 8)
        await self._write(store_words(l1), host_offset)
        await sync()
        self.l1 = l1
        return replace(header, l1_table_offset=host_offset)
