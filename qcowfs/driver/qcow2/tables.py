"""The cache of L2 slices: aligned pieces of L2 tables in native byte order.

Implements the reading and writing of L2 tables (docs/interop/qcow2, "Cluster
mapping"). A slice is `slice_length` bytes, keyed by its host offset, and is
shared by all L1 tables that lead to it.

May not: allocate, know guest offsets or guest data, decide when to commit.
Invariants:

- One slice object per host offset; concurrent loads of one are one read.
- A dirty slice is never dropped; callers keep the number of `dirty` ones below
  `dirty_limit` by committing, so that clean slices remain to be dropped.
- A load that began before `forget_run`, `forget_clean` or `patch` touched the cache, or during
  which its slice came and went, is repeated, so that no stale words enter it.
- Words change only through `replace_words` and `patch`.
"""

from array import array
from collections.abc import Iterator

import trio

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.layout.mapping import load_words, store_words
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.guard import L2_TABLE, MetadataWriter
from qcowfs.driver.storage import Storage

# Random access over a huge image wants small slices, a sequential one does not
# care; 4 KiB maps 32 MiB of guest data with 64 KiB clusters.
SLICE_LENGTH_MAX = 4096
# Python's own cost of a slice: the object, the array head, its place in a dict.
SLICE_OVERHEAD = 256
# Slices that go out in one write at most: 256 KiB.
_BUFFER_COUNT = 64


class Slice:
    """A piece of one L2 table; `words` are 64-bit words in native byte order.

    With extended L2 entries two words make an entry. Read `words` freely while
    no await lies between; change it only through `Metadata.set_entries`.
    """

    __slots__ = ("dirty_end", "dirty_first", "hits", "host_offset", "words")

    def __init__(self, host_offset: int, words: "array[int]") -> None:
        self.host_offset = host_offset
        self.words = words
        self.hits = 0
        self.dirty_first = len(words)
        self.dirty_end = 0


class TableCache:
    """The L2 slices of one image file; `budget` bytes, dirty ones at most half of it.

    `slices` (host offset -> Slice) is public for the lookup path alone.
    """

    def __init__(
        self,
        storage: Storage,
        writer: MetadataWriter,
        geometry: Geometry,
        counters: Counters,
        budget: int,
    ) -> None:
        self._storage = storage
        self._writer = writer
        self._counters = counters
        self._cluster_mask = geometry.cluster_size - 1
        self.slice_length = min(geometry.cluster_size, SLICE_LENGTH_MAX)
        self.slice_words = self.slice_length // 8
        self.slice_entry_count = self.slice_length // geometry.l2_entry_length
        # Selects, from a byte offset inside an L2 table, the start of its slice.
        self.in_table_mask = (geometry.cluster_size - 1) & ~(self.slice_length - 1)
        self._capacity = max(4, budget // (self.slice_length + SLICE_OVERHEAD))
        self.dirty_limit = max(2, self._capacity // 2)
        self.slices: dict[int, Slice] = {}
        self._loading: dict[int, trio.Event] = {}
        self._slices_by_table: dict[int, int] = {}
        self._epoch = 0
        self.dirty: dict[int, Slice] = {}

    @property
    def hits(self) -> int:
        """Lookups answered from memory since the image was opened."""
        return self._counters.slice_hits + sum(piece.hits for piece in self.slices.values())

    def peek(self, host_offset: int) -> Slice | None:
        """The slice at a slice-aligned host offset when it is in memory."""
        piece = self.slices.get(host_offset)
        if piece is not None:
            piece.hits += 1
        return piece

    def load_now(self, host_offset: int) -> Slice | None:
        """The slice from memory or, without waiting, from the host's page cache; else None."""
        piece = self.slices.get(host_offset)
        if piece is not None:
            piece.hits += 1
            return piece
        data = bytearray(self.slice_length)
        if not self._storage.try_pread_into([memoryview(data)], host_offset):
            return None
        return self._insert(host_offset, load_words(data))

    async def load(self, host_offset: int) -> Slice:
        """The slice at a slice-aligned host offset; raises OSError of the host."""
        while True:
            piece = self.load_now(host_offset)
            if piece is not None:
                return piece
            event = self._loading.get(host_offset)
            if event is not None:
                await event.wait()
                continue
            event = self._loading[host_offset] = trio.Event()
            epoch = self._epoch
            try:
                data = await self._storage.pread(self.slice_length, host_offset)
            finally:
                del self._loading[host_offset]
                event.set()
            if epoch == self._epoch and host_offset not in self.slices:
                return self._insert(host_offset, load_words(data))

    def replace_words(self, piece: Slice, first_word: int, words: "array[int]") -> None:
        """Overwrite words of a resident slice; the next commit writes them."""
        end = first_word + len(words)
        piece.words[first_word:end] = words
        piece.dirty_first = min(piece.dirty_first, first_word)
        piece.dirty_end = max(piece.dirty_end, end)
        self.dirty[piece.host_offset] = piece

    async def write_dirty(self) -> None:
        """Write the dirty range of every dirty slice; they stay dirty until `mark_clean`."""
        for start, buffers in self._runs():
            await self._writer.write(L2_TABLE, start, buffers)

    def mark_clean(self) -> None:
        """What `write_dirty` wrote is durable; nothing may have changed in between."""
        for piece in self.dirty.values():
            piece.dirty_first = len(piece.words)
            piece.dirty_end = 0
        self.dirty.clear()

    def forget_run(self, host_offset: int, cluster_count: int) -> None:
        """Drop the slices, dirty or not, of clusters that become free."""
        self._epoch += 1
        known = self._slices_by_table
        step = self._cluster_mask + 1
        run = range(host_offset, host_offset + cluster_count * step, step)
        if cluster_count > len(known):
            tables = [table_offset for table_offset in known if table_offset in run]
        else:
            tables = [table_offset for table_offset in run if table_offset in known]
        for table_offset in tables:
            for start in range(table_offset, table_offset + step, self.slice_length):
                if start in self.slices:
                    self.dirty.pop(start, None)
                    self._remove(start)

    def forget_clean(self) -> None:
        """Drop every slice that is not dirty, to be read anew."""
        self._epoch += 1
        for host_offset in [start for start in self.slices if start not in self.dirty]:
            self._remove(host_offset)

    def cached_tables(self) -> list[int]:
        """The host offsets of the L2 tables of which a slice is in memory."""
        return list(self._slices_by_table)

    async def read_table(self, table_offset: int) -> "array[int]":
        """All words of one L2 table in native order, changes not yet written included."""
        words = load_words(await self._storage.pread(self._cluster_mask + 1, table_offset))
        for start in range(0, self._cluster_mask + 1, self.slice_length):
            piece = self.slices.get(table_offset + start)
            if piece is not None:
                words[start // 8 : start // 8 + self.slice_words] = piece.words
        return words

    async def write_table(self, table_offset: int, words: "array[int]") -> None:
        """Write a whole L2 table at once, cached slices of it included; under the lock.

        For tables that nothing durable points to yet, and for changes that are
        harmless in any order (the COPIED flag inside a snapshot call). A write
        that fails leaves the cache as it was, so that it can be tried again.
        """
        await self._writer.write(L2_TABLE, table_offset, [store_words(words)])
        self.patch(table_offset, words)

    def patch(self, table_offset: int, words: "array[int]") -> None:
        """Make cached slices of a table agree with words that have been written."""
        self._epoch += 1
        if table_offset not in self._slices_by_table:
            return
        for start in range(0, self._cluster_mask + 1, self.slice_length):
            piece = self.slices.get(table_offset + start)
            if piece is not None:
                piece.words[:] = words[start // 8 : start // 8 + self.slice_words]

    def _runs(self) -> Iterator[tuple[int, list[bytes]]]:
        """Dirty ranges as (host offset, buffers), neighbours joined into one write."""
        start = end = -1
        buffers: list[bytes] = []
        for host_offset in sorted(self.dirty):
            piece = self.dirty[host_offset]
            first = host_offset + piece.dirty_first * 8
            if buffers and (first != end or len(buffers) == _BUFFER_COUNT):
                yield start, buffers
                buffers = []
            if not buffers:
                start = first
            buffers.append(store_words(piece.words[piece.dirty_first : piece.dirty_end]))
            end = first + len(buffers[-1])
        if buffers:
            yield start, buffers

    def _insert(self, host_offset: int, words: "array[int]") -> Slice:
        self._counters.slice_loads += 1
        if len(self.slices) >= self._capacity:
            self._evict()
        piece = self.slices[host_offset] = Slice(host_offset, words)
        table_offset = host_offset & ~self._cluster_mask
        self._slices_by_table[table_offset] = self._slices_by_table.get(table_offset, 0) + 1
        return piece

    def _evict(self) -> None:
        """Drop clean slices not used since the hand last passed (second chance)."""
        for _ in range(2 * len(self.slices)):
            host_offset = next(iter(self.slices))
            piece = self.slices[host_offset]
            if piece.hits or host_offset in self.dirty:
                self._counters.slice_hits += piece.hits
                piece.hits = 0
                del self.slices[host_offset]
                self.slices[host_offset] = piece
                continue
            self._remove(host_offset)
            if len(self.slices) < self._capacity:
                return

    def _remove(self, host_offset: int) -> None:
        piece = self.slices.pop(host_offset)
        if host_offset in self._loading:
            # What that load has read may be older than what was changed and written meanwhile.
            self._epoch += 1
        self._counters.slice_hits += piece.hits
        table_offset = host_offset & ~self._cluster_mask
        remaining = self._slices_by_table[table_offset] - 1
        if remaining:
            self._slices_by_table[table_offset] = remaining
        else:
            del self._slices_by_table[table_offset]
