"""Handing out host clusters: where the free ones are, and making room for more.

Implements docs/interop/qcow2, "Host cluster management". May not: know L1, L2
or guest offsets, lower a count (frees.py does that). Invariants:

- A cluster is free when its count in memory is 0, and behind `_end_index` all
  counts are 0.
- No protected cluster is handed out.
- A block without a free cluster is not looked at again until one is freed in
  it, so that no allocation scans a full image.
- A new refcount block describes itself, or is described by a block that is
  there already or made with it; nothing recurses.
"""

import heapq
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from qcowfs.driver.layout.geometry import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_LENGTH, Geometry
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.frees import Frees
from qcowfs.driver.qcow2.guard import REFCOUNT_BLOCK, ProtectedMap
from qcowfs.driver.qcow2.refcounting import CachedBlock, RefcountCache
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.qcow2.tables import TableCache
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage, ImageFull

# How many blocks that were never looked at one allocation may look through
# before it takes room at the end of the file instead.
_SCAN_BLOCKS = 4
# Blocks that are looked through before other tasks get a turn.
_BLOCKS_PER_PAUSE = 64


class Allocator:
    """The free space of one image file; cluster runs as (host offset, cluster count)."""

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        refcounts: RefcountCache,
        protected: ProtectedMap,
        tables: TableCache,
        requests: Requests,
        counters: Counters,
        permit: Callable[[], None],
        report: Callable[[CorruptImage], NoReturn],
    ) -> None:
        self._geometry = geometry
        self._refcounts = refcounts
        self._protected = protected
        self._counters = counters
        self._permit = permit
        self._report = report
        # Set by Metadata: a commit of its own that makes the table longer.
        self.grow_table: Callable[[int], Awaitable[None]] | None = None
        self.frees = Frees(
            storage,
            geometry,
            refcounts,
            protected,
            tables,
            requests,
            counters,
            report,
            self._set_free,
        )
        # References that go away are the business of `frees`; see there.
        self.drop = self.frees.drop
        self.drop_many = self.frees.drop_many
        self.settle = self.frees.settle
        # The first cluster index beyond everything that is in use.
        self._end_index = 0
        # Blocks below this index have been looked through since the image was opened.
        self._scanned_blocks = 0
        # Block index -> a place at or below its first free cluster; and the same as a heap.
        self._free_from: dict[int, int] = {}
        self._free_heap: list[int] = []
        # Where the next compressed piece may go: a byte offset inside a cluster, or 0.
        self._byte_offset = 0
        # What `_make_ready` has to provide: the index of a refcount block.
        self._wanted = 0

    @property
    def end_offset(self) -> int:
        """The host offset behind the last cluster in use."""
        return self._end_index << self._geometry.cluster_bits

    async def find_end(self) -> None:
        """Look for the last cluster in use; before the first allocation.

        By counts, not by the size of the file: what lies behind is free, and
        a block device has no size of its own.
        """
        per_block = self._geometry.refcounts_per_block
        seen: set[int] = set()
        for index in range(len(self._refcounts.table) - 1, -1, -1):
            host_offset = self._refcounts.table[index]
            if not host_offset or host_offset in seen:
                continue
            # A broken table may name one block a million times.
            seen.add(host_offset)
            if len(seen) % _BLOCKS_PER_PAUSE == 0:
                await trio.lowlevel.checkpoint()
            block = await self._refcounts.block(index)
            used = len(bytes(block.data).rstrip(b"\0"))
            if used:
                place = min(per_block - 1, used * 8 // self._geometry.refcount_bits)
                while not block.counts.get(place):
                    place -= 1
                self._end_index = index * per_block + place + 1
                return

    # Allocation

    def try_allocate(self, count: int, *, after: int | None = None) -> tuple[int, int] | None:
        """Up to `count` adjoining clusters, counted 1 in memory; None when it must be waited for.

        Continues at host offset `after` when that cluster is free. Atomic. The
        caller either holds the lock or has seen it free. Raises ImageFull,
        CorruptImage.
        """
        if self.frees.settle_due():
            return None
        return self._find(count, after)

    async def allocate(self, count: int, *, after: int | None = None) -> tuple[int, int]:
        """As `try_allocate`, waiting for what is needed; the caller holds the lock.

        May load refcount blocks and make the refcount table grow (a commit of
        its own). Raises ImageFull, CorruptImage, ReadOnlyImage, OSError.
        """
        self._permit()
        await self.settle()
        while True:
            found = self._find(count, after)
            if found is not None:
                return found
            await self._make_ready()

    async def allocate_contiguous(self, count: int, structure: str) -> int:
        """The host offset of exactly `count` adjoining clusters for a table; lock held.

        They are registered as `structure`. Raises ImageFull, CorruptImage,
        OSError of the host.
        """
        self._permit()
        await self.settle()
        if count <= 16:
            found = await self.allocate(count)
            if found[1] == count:
                self._protected.claim(structure, found[0], count << self._geometry.cluster_bits)
                return found[0]
            # Nothing refers to the run yet: it is free again after a commit.
            self.drop(found[0], found[1] << self._geometry.cluster_bits)
        first_index = await self._extend(count)
        host_offset = first_index << self._geometry.cluster_bits
        self._protected.claim(structure, host_offset, count << self._geometry.cluster_bits)
        return host_offset

    def try_allocate_bytes(self, length: int) -> int | None:
        """Room for one compressed piece, its references counted; None when it must be waited for.

        At most a cluster; packed behind the piece before where that is
        possible. Atomic, as `try_allocate`.
        """
        if self.frees.settle_due():
            return None
        return self._find_bytes(length)

    async def allocate_bytes(self, length: int) -> int:
        """As `try_allocate_bytes`, waiting for what is needed; the caller holds the lock."""
        self._permit()
        await self.settle()
        while True:
            found = self._find_bytes(length)
            if found is not None:
                return found
            await self._make_ready()

    async def raise_refcount(self, host_offset: int, addend: int = 1) -> None:
        """Count more references to one cluster; lock held. Raises ImageFull, CorruptImage."""
        index, place = divmod(
            host_offset >> self._geometry.cluster_bits, self._geometry.refcounts_per_block
        )
        if not self._refcounts.block_offset(index):
            raise self._refcounts.without_block(host_offset >> self._geometry.cluster_bits)
        self._refcounts.raise_count(await self._refcounts.block(index), place, addend)

    # Inner parts

    def _set_free(self, block_index: int, place: int, count: int) -> None:
        """Clusters whose count became 0: remember where to look for them."""
        bits = self._geometry.cluster_bits
        first_index = block_index * self._geometry.refcounts_per_block + place
        if first_index <= self._byte_offset >> bits < first_index + count:
            self._byte_offset = 0
        known = self._free_from.get(block_index)
        if known is None:
            heapq.heappush(self._free_heap, block_index)
            self._free_from[block_index] = place
        elif place < known:
            self._free_from[block_index] = place

    def _find(self, count: int, after: int | None) -> tuple[int, int] | None:
        """A free run, taken; None with `_wanted` set when a block or a longer table is needed."""
        if after is not None:
            after_index = after >> self._geometry.cluster_bits
            if after_index >= self._end_index:
                return self._take_at_end(count)
            found = self._take_at(after_index, count)
            if found is not None:
                return found
        free_from = self._free_from
        heap = self._free_heap
        while heap:
            index = heap[0]
            block = self._refcounts.block_now(index)
            if block is None:
                self._wanted = index
                return None
            run = self._refcounts.find_free(block, free_from[index], count)
            if run is not None:
                free_from[index] = run[0]
                return self._take(block, run[0], run[1])
            del free_from[index]
            heapq.heappop(heap)
        return self._find_unscanned(count)

    def _find_unscanned(self, count: int) -> tuple[int, int] | None:
        """A free run in blocks not looked at so far, a few at a time, or at the end."""
        per_block = self._geometry.refcounts_per_block
        for _ in range(_SCAN_BLOCKS):
            index = self._scanned_blocks
            if index * per_block >= self._end_index:
                break
            if self._refcounts.block_offset(index):
                block = self._refcounts.block_now(index)
                if block is None:
                    self._wanted = index
                    return None
                run = self._refcounts.find_free(block, 0, count)
                if run is not None:
                    self._scanned_blocks = index + 1
                    self._free_from[index] = run[0]
                    heapq.heappush(self._free_heap, index)
                    return self._take(block, run[0], run[1])
            self._scanned_blocks = index + 1
        return self._take_at_end(count)

    def _take_at(self, cluster_index: int, count: int) -> tuple[int, int] | None:
        """The run that begins at a cluster below the end when it is free and its block at hand."""
        index, place = divmod(cluster_index, self._geometry.refcounts_per_block)
        block = self._refcounts.peek(index)
        if block is None:
            if not self._refcounts.block_offset(index):
                return None
            block = self._refcounts.block_now(index)
            if block is None:
                return None
        length = block.counts.free_length(place, count)
        return self._take(block, place, length) if length else None

    def _take_at_end(self, count: int) -> tuple[int, int] | None:
        """The run behind everything in use, with a new refcount block where one is missing."""
        per_block = self._geometry.refcounts_per_block
        while True:
            index, place = divmod(self._end_index, per_block)
            if index >= len(self._refcounts.table):
                self._wanted = index
                return None
            block = self._refcounts.peek(index)
            if block is None:
                if not self._refcounts.block_offset(index):
                    self._create_block(index, self._end_index)
                    continue
                block = self._refcounts.block_now(index)
                if block is None:
                    self._wanted = index
                    return None
            length = block.counts.free_length(place, count)
            if not length:
                self._end_index += 1
                continue
            return self._take(block, place, length)

    def _find_bytes(self, length: int) -> int | None:
        """Room for a compressed piece; None with `_wanted` set as by `_find`."""
        bits = self._geometry.cluster_bits
        offset = self._byte_offset
        cluster_end = (offset | self._geometry.cluster_mask) + 1
        if offset:
            index, place = divmod(offset >> bits, self._geometry.refcounts_per_block)
            block = self._refcounts.block_now(index)
            if block is None:
                self._wanted = index
                return None
            # A saturated cluster takes no further piece; a piece that ends in the
            # next cluster needs that one to be free.
            if block.counts.get(place) < self._geometry.refcount_max and (
                offset + length <= cluster_end or self._take_at_or_end(cluster_end >> bits)
            ):
                self._refcounts.raise_count(block, place)
                self._byte_offset = self._inside(offset + length)
                return offset
        found = self._find(1, cluster_end if offset else None)
        if found is None:
            return None
        if found[0] + length - 1 > self._geometry.compressed_offset_mask:
            self.drop(found[0], 1)
            raise ImageFull(
                f"a compressed cluster cannot lie at {found[0]:#x}: offsets have "
                f"{self._geometry.csize_shift} bits"
            )
        self._byte_offset = self._inside(found[0] + length)
        return found[0]

    def _inside(self, offset: int) -> int:
        """A byte offset inside a cluster as it is, 0 for one at a cluster's beginning."""
        return offset if offset & self._geometry.cluster_mask else 0

    def _take_at_or_end(self, cluster_index: int) -> bool:
        """Take one given cluster if it is free and at hand."""
        if cluster_index < self._end_index:
            return self._take_at(cluster_index, 1) is not None
        index = cluster_index // self._geometry.refcounts_per_block
        # A missing refcount block would be put into this very cluster.
        if cluster_index > self._end_index or not self._refcounts.block_offset(index):
            return False
        return self._take_at_end(1) is not None

    async def _make_ready(self) -> None:
        """Load the refcount block, or grow the table for it, that the last search asked for."""
        wanted = self._wanted
        if wanted < len(self._refcounts.table):
            await self._refcounts.block(wanted)
            return
        assert self.grow_table is not None
        await self.grow_table(wanted + 1)

    async def _extend(self, count: int) -> int:
        """The index of the first of `count` clusters at the end, counted 1.

        Missing refcount blocks are put behind the run, so that the blocks of
        the run and of themselves are all there is to make: no recursion.
        """
        while True:
            first_index = self._end_index
            missing = self._missing_blocks(first_index, count)
            last_block = self._last_block(first_index, count + len(missing))
            if last_block < len(self._refcounts.table):
                break
            assert self.grow_table is not None
            await self.grow_table(last_block + 1)
        await self.take_end(count, missing)
        return first_index

    def plan_table(self, block_count: int) -> tuple[int, list[int]]:
        """Size and needs of a refcount table for `block_count` blocks, put at the end.

        Answers (clusters of the table, indexes of blocks that must be made to
        describe it and themselves). Raises ImageFull over the limit.
        """
        geometry = self._geometry
        entries_per_cluster = geometry.cluster_size // 8
        limit = MAX_REFCOUNT_TABLE_LENGTH // geometry.cluster_size
        # Half as much again, so that growing n times costs about n.
        wanted = max(block_count, len(self._refcounts.table) * 3 // 2)
        cluster_count = min(limit, -(-wanted // entries_per_cluster))
        while True:
            missing = self._missing_blocks(self._end_index, cluster_count)
            last_block = self._last_block(self._end_index, cluster_count + len(missing))
            needed = -(-max(last_block + 1, block_count) // entries_per_cluster)
            if needed <= cluster_count:
                return cluster_count, missing
            if needed > limit:
                raise ImageFull(
                    f"the refcount table would grow over its limit of {MAX_REFCOUNT_TABLE_LENGTH} "
                    "bytes"
                )
            cluster_count = needed

    async def take_end(self, count: int, missing: list[int]) -> None:
        """Count `count` clusters at the end and, behind them, the blocks `missing`; lock held.

        The table (in memory) has room for all of them.
        """
        geometry = self._geometry
        per_block = geometry.refcounts_per_block
        first_index = self._end_index
        end_index = first_index + count + len(missing)
        self._check_free(first_index, end_index - first_index)
        for number, index in enumerate(missing):
            host_offset = first_index + count + number << geometry.cluster_bits
            self._refcounts.create_block(index, host_offset)
            self._protected.claim(REFCOUNT_BLOCK, host_offset, 1)
        self._end_index = end_index
        self._counters.allocations += count
        while first_index < end_index:
            index, place = divmod(first_index, per_block)
            length = min(per_block - place, end_index - first_index)
            self._refcounts.take(await self._refcounts.block(index), place, length)
            first_index += length

    def _missing_blocks(self, first_index: int, count: int) -> list[int]:
        """Blocks to make for a run at the end, those for the clusters of these blocks included."""
        per_block = self._geometry.refcounts_per_block
        missing: list[int] = []
        index = first_index // per_block
        while index <= self._last_block(first_index, count + len(missing)):
            if not self._refcounts.block_offset(index):
                missing.append(index)
            index += 1
        return missing

    def _last_block(self, first_index: int, count: int) -> int:
        return (first_index + count - 1) // self._geometry.refcounts_per_block

    def _create_block(self, index: int, cluster_index: int) -> None:
        """A new refcount block in a free cluster, described by itself or by a block at hand."""
        bits = self._geometry.cluster_bits
        self._check_free(cluster_index, 1)
        block = self._refcounts.create_block(index, cluster_index << bits)
        self._protected.claim(REFCOUNT_BLOCK, cluster_index << bits, 1)
        place = cluster_index - index * self._geometry.refcounts_per_block
        self._refcounts.take(block, place, 1)
        self._end_index = max(self._end_index, cluster_index + 1)

    def _take(self, block: CachedBlock, place: int, count: int) -> tuple[int, int]:
        first_index = block.index * self._geometry.refcounts_per_block + place
        self._check_free(first_index, count)
        self._refcounts.take(block, place, count)
        self._counters.allocations += count
        self._end_index = max(self._end_index, first_index + count)
        return first_index << self._geometry.cluster_bits, count

    def _check_free(self, first_index: int, count: int) -> None:
        """Nothing that is about to be handed out is metadata, or beyond what entries can name."""
        owned = self._protected.first_owned(first_index, count)
        if owned is not None:
            host_offset = owned << self._geometry.cluster_bits
            owner = self._protected.owner(owned)
            self._report(
                CorruptImage(
                    f"the cluster at {host_offset:#x} is counted as free, but belongs to the "
                    f"{owner}",
                    structure=owner,
                    host_offset=host_offset,
                )
            )
        if (first_index + count) << self._geometry.cluster_bits > MAX_HOST_OFFSET:
            raise ImageFull("the image file has reached the largest host offset, 2^56 bytes")
