"""References that went away, and the clusters that become free by it.

Implements rules 4 and 5 of the write ordering in driver/README.md. May not:
choose clusters, know L1, L2 or guest offsets. Invariants:

- `drop` changes no count: it queues. A commit moves what was queued before it
  to `settling`; `settle` lowers the counts once every request that began
  before the end of that commit has ended. With no commit there is no reuse.
- So a count that is 0 in memory means: no durable reference leads to the
  cluster, and no request under way can still use it.
- A protected cluster is not set free but by the structure that owns it.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import trio

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.guard import ProtectedMap
from qcowfs.driver.qcow2.refcounting import RefcountCache
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.qcow2.tables import TableCache
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Runs of dropped references that may wait for a commit: about 10 MB.
PENDING_LIMIT = 65536
# Runs after which other tasks get a turn: some milliseconds.
_PAUSE_COUNT = 256


class Dropped(NamedTuple):
    """References that went away, one for each cluster of a run."""

    first_index: int
    cluster_count: int
    structure: str | None
    punch: bool


def _by_first_index(dropped: Dropped) -> int:
    return dropped.first_index


class Frees:
    """The removed references of one image, from `drop` to the free cluster.

    `pending` waits for a commit, `settling` (with the generation that must be
    reached) for the end of requests.

    `on_free` gets (refcount block index, place in it, cluster count) of each
    run that became free.
    """

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        refcounts: RefcountCache,
        protected: ProtectedMap,
        tables: TableCache,
        requests: Requests,
        counters: Counters,
        report: Callable[[CorruptImage], NoReturn],
        on_free: Callable[[int, int, int], None],
    ) -> None:
        self._storage = storage
        self._geometry = geometry
        self._refcounts = refcounts
        self._protected = protected
        self._tables = tables
        self._requests = requests
        self._counters = counters
        self._report = report
        self._on_free = on_free
        self.pending_limit = PENDING_LIMIT
        self.pending: list[Dropped] = []
        self.settling: deque[tuple[int, list[Dropped]]] = deque()

    def drop(
        self, host_offset: int, length: int, *, structure: str | None = None, punch: bool = False
    ) -> None:
        """Queue the removal of one reference to each cluster that the bytes touch.

        `structure` names the metadata that lay there (see guard.py), None
        means guest data. Counts change after the commit that makes the removal
        durable. Raises CorruptImage (after failsafe) for guest data that is
        metadata, and for a cluster past the largest offset.
        """
        bits = self._geometry.cluster_bits
        first_index = host_offset >> bits
        count = (host_offset + length - 1 >> bits) - first_index + 1
        if structure is None:
            owned = self._protected.first_owned(first_index, count)
            if owned is not None:
                self._report_owned(owned)
        pending = self.pending
        if pending:
            last = pending[-1]
            if last[0] + last[1] == first_index and last[2] == structure and last[3] is punch:
                pending[-1] = Dropped(last[0], last[1] + count, structure, punch)
                return
        pending.append(Dropped(first_index, count, structure, punch))

    def drop_many(
        self,
        cluster_indexes: "NDArray[np.uint64]",
        *,
        structure: str | None = None,
        punch: bool = False,
    ) -> None:
        """Queue the removal of one reference for each element; sorted, repeats allowed."""
        import numpy as np

        rest = np.asarray(cluster_indexes).astype(np.int64)
        while len(rest):
            repeated = np.zeros(len(rest), dtype=bool)
            repeated[1:] = rest[1:] == rest[:-1]
            unique = rest[~repeated]
            breaks = np.flatnonzero(np.diff(unique) != 1) + 1
            starts = np.concatenate(([0], breaks))
            ends = np.concatenate((breaks, [len(unique)]))
            bits = self._geometry.cluster_bits
            for first, count in zip(unique[starts].tolist(), (ends - starts).tolist(), strict=True):
                self.drop(first << bits, count << bits, structure=structure, punch=punch)
            rest = rest[repeated]

    def published(self, barrier: int) -> None:
        """A commit made all queued removals durable; `barrier` is the generation begun then."""
        if self.pending:
            # Neighbours together: one refcount block after the other.
            self.pending.sort(key=_by_first_index)
            self.settling.append((barrier, self.pending))
            self.pending = []

    def settle_due(self) -> bool:
        """Whether counts may be lowered now."""
        return bool(self.settling) and self._requests.oldest() >= self.settling[0][0]

    async def settle(self) -> None:
        """Lower the counts of durable removals that no request can still know; lock held.

        Interrupted (cancelled, or a block cannot be read), it goes on where it
        was the next time.
        """
        punched: list[tuple[int, int]] = []
        while self.settle_due():
            batch = self.settling[0][1]
            while batch:
                await self._lower_some(batch, punched)
                if len(batch) % _PAUSE_COUNT == 0:
                    await trio.lowlevel.checkpoint()
            self.settling.popleft()
        if punched:
            await self._punch(punched)

    async def lower_run(
        self, first_index: int, count: int, *, structure: str | None = None
    ) -> None:
        """Take a reference off each cluster of a run at once, with no commit to wait for.

        For references whose removal is durable and which no request can know
        any more; lock held. Raises CorruptImage (after failsafe), OSError.
        """
        per_block = self._geometry.refcounts_per_block
        while count:
            index, place = divmod(first_index, per_block)
            part = min(count, per_block - place)
            if not self._refcounts.block_offset(index):
                self._report(self._refcounts.without_block(first_index))
            block = self._refcounts.block_now(index) or await self._refcounts.block(index)
            for free_place, free_count in self._refcounts.lower_run(block, place, part):
                self._set_free(index, free_place, free_count, structure)
            await self._refcounts.relieve()
            first_index += part
            count -= part

    async def lower_many(
        self, cluster_indexes: "NDArray[np.uint64]", amounts: "NDArray[np.uint64]"
    ) -> None:
        """As `lower_run`, for so many references to each of many clusters of guest data.

        `cluster_indexes` sorted and unique, `amounts` beside them.
        """
        import numpy as np

        per_block = self._geometry.refcounts_per_block
        bits = self._geometry.cluster_bits
        cached = np.array(self._tables.cached_tables(), dtype=np.int64) >> bits
        for index, places in await self._refcounts.lower_many(cluster_indexes, amounts):
            freed = places + index * per_block
            owned = self._protected.first_owned_among(freed.astype(np.uint64))
            if owned is not None:
                self._report_owned(owned)
            for cluster_index in cached[np.isin(cached, freed)].tolist():
                self._tables.forget_run(cluster_index << bits, 1)
            self._counters.frees += len(places)
            self._on_free(index, int(places[0]), int(places[-1] - places[0]) + 1)

    # Inner parts

    async def _lower_some(self, batch: list[Dropped], punched: list[tuple[int, int]]) -> None:
        """Apply the last run of a batch, as far as one refcount block describes it."""
        dropped = batch[-1]
        per_block = self._geometry.refcounts_per_block
        index, place = divmod(dropped.first_index, per_block)
        count = min(dropped.cluster_count, per_block - place)
        if not self._refcounts.block_offset(index):
            self._report(self._refcounts.without_block(dropped.first_index))
        block = await self._refcounts.block(index)
        for free_place, free_count in self._refcounts.lower_run(block, place, count):
            self._set_free(index, free_place, free_count, dropped.structure)
            if dropped.punch:
                punched.append((index * per_block + free_place, free_count))
        if count == dropped.cluster_count:
            batch.pop()
        else:
            batch[-1] = dropped._replace(
                first_index=dropped.first_index + count, cluster_count=dropped.cluster_count - count
            )

    async def _punch(self, runs: list[tuple[int, int]]) -> None:
        """Give the host the room of free clusters; that it cannot is no error of the image."""
        bits = self._geometry.cluster_bits
        joined: list[tuple[int, int]] = []
        for first_index, count in sorted(runs):
            if joined and sum(joined[-1]) == first_index:
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((first_index, count))
        try:
            for first_index, count in joined:
                if not await self._storage.punch(first_index << bits, count << bits):
                    return
        except OSError as error:
            logger.debug("%s: cannot punch a hole: %s", self._storage.name, error)

    def _set_free(self, block_index: int, place: int, count: int, structure: str | None) -> None:
        """Clusters whose count became 0 are nobody's from now on."""
        first_index = block_index * self._geometry.refcounts_per_block + place
        protected = self._protected
        if structure is None:
            owned = protected.first_owned(first_index, count)
            if owned is not None:
                self._report_owned(owned)
        else:
            for cluster_index in range(first_index, first_index + count):
                if not protected.release(structure, cluster_index):
                    self._report_owned(cluster_index)
        self._counters.frees += count
        self._tables.forget_run(first_index << self._geometry.cluster_bits, count)
        self._on_free(block_index, place, count)

    def _report_owned(self, cluster_index: int) -> NoReturn:
        host_offset = cluster_index << self._geometry.cluster_bits
        owner = self._protected.owner(cluster_index)
        self._report(
            CorruptImage(
                f"would free the cluster at {host_offset:#x}, which belongs to the {owner}",
                structure=owner,
                host_offset=host_offset,
            )
        )
