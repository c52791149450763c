"""The references that one L1 table holds: to its L2 tables, and through them to guest data.

Implements docs/interop/qcow2, "Host cluster management", for snapshots: what a
snapshot shares is counted once more, what it gave up is counted once less. For
snapshot operations, under a closed gate and the lock. May not: change tables
or the header, decide about COPIED flags.

L2 tables are taken in batches. Tables of few runs are counted run by run, which
is the quickest way for a disk that was written in order and needs no numpy.
Those that are scattered or compressed are gathered as arrays of cluster indexes
until there are `_BATCH_COUNT`, and counted refcount block by refcount block.

Invariants:

- `raise_all` that fails leaves every count as it was (one too high where the
  host cannot read what was counted already).
- `lower_all` begins when the removal is durable and no request can know what is
  given up. What is damaged, or cannot be read, is left alone, which leaks its
  clusters at worst.
- No reference that leads into metadata is counted or given up.
- A batch is all that is in memory.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import trio

from qcowfs.driver.layout.table_references import (
    RUNS_BEFORE_NUMPY,
    Run,
    is_scattered,
    run_cost,
    table_clusters,
    table_runs,
)
from qcowfs.driver.qcow2 import guard
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage, QcowfsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# References of scattered tables that are counted together: 8 MiB; and runs.
_BATCH_COUNT = 1 << 20
_BATCH_RUNS = 1 << 16
# How long to wait between looks at requests that began before references went.
_SETTLE_INTERVAL = 0.0005


class _Batch:
    """What some L2 tables refer to.

    `tables` are cluster indexes, one for each; `runs` and `arrays` hold the
    references to guest data, of which the arrays have `array_count` in all.
    """

    __slots__ = ("array_count", "arrays", "runs", "tables")

    def __init__(self) -> None:
        self.tables: list[int] = []
        self.runs: list[Run] = []
        self.arrays: list[NDArray[np.uint64]] = []
        self.array_count = 0

    def clusters(self) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
        """(sorted unique cluster indexes, references to each) of the arrays."""
        import numpy as np

        found = np.concatenate(self.arrays)
        if found.max() < 1 << 32:
            # Four times as fast to sort.
            found = found.astype(np.uint32)
        found.sort()
        starts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1])))
        counts = np.diff(np.concatenate((starts, [len(found)])))
        return found[starts].astype(np.uint64), counts.astype(np.uint64)


class _Gatherer:
    """Reads L2 tables, (L1 index, host offset) each, batch by batch; `done` of them so far."""

    def __init__(
        self, metadata: Metadata, tables: Sequence[tuple[int, int]], *, skip: bool = False
    ) -> None:
        self._metadata = metadata
        self._tables = tables
        self._skip = skip
        self._cost_left = RUNS_BEFORE_NUMPY
        self.done = 0
        self.skipped: Exception | None = None

    async def next_batch(self) -> _Batch | None:
        """The next tables' references, None when all are done.

        Raises CorruptImage for damage and OSError of the host; or, with `skip`,
        notes the first one as `skipped` and passes the table by.
        """
        if self.done == len(self._tables):
            return None
        batch = _Batch()
        while (
            self.done < len(self._tables)
            and batch.array_count < _BATCH_COUNT
            and len(batch.runs) < _BATCH_RUNS
        ):
            l1_index, table_offset = self._tables[self.done]
            try:
                await self._add(batch, l1_index, table_offset)
            except (QcowfsError, OSError) as error:
                if not self._skip:
                    raise
                self.skipped = self.skipped or error
            self.done += 1
            await trio.lowlevel.checkpoint()
        return batch

    async def _add(self, batch: _Batch, l1_index: int, table_offset: int) -> None:
        metadata = self._metadata
        geometry = metadata.geometry
        table_index = table_offset >> geometry.cluster_bits
        owner = metadata.protected.owner(table_index)
        if owner not in (None, guard.L2_TABLE):
            raise CorruptImage(
                f"L1 entry {l1_index} leads to {table_offset:#x}, which belongs to the {owner}",
                structure="L1 table",
                index=l1_index,
                host_offset=table_offset,
            )
        words = await metadata.tables.read_table(table_offset)
        cost = run_cost(words, geometry)
        if is_scattered(cost, self._cost_left):
            clusters = table_clusters(words, geometry)
            if clusters is not None:
                if len(clusters):
                    _check_clusters(metadata, clusters)
                    batch.arrays.append(clusters)
                    batch.array_count += len(clusters)
                batch.tables.append(table_index)
                return
        runs = table_runs(words, l1_index * geometry.l2_coverage, geometry)
        if geometry.has_data_file:
            # Nobody counts the clusters of a data file.
            runs = []
        for first, count in runs:
            _refuse_owned(metadata, metadata.protected.first_owned(first, count))
        self._cost_left -= cost
        batch.runs += runs
        batch.tables.append(table_index)


def _check_clusters(metadata: Metadata, clusters: "NDArray[np.uint64]") -> None:
    clusters.sort()
    _refuse_owned(metadata, metadata.protected.first_owned_among(clusters))


def _refuse_owned(metadata: Metadata, owned: int | None) -> None:
    """An entry that leads guest data into metadata is damage."""
    if owned is not None:
        host_offset = owned << metadata.geometry.cluster_bits
        raise CorruptImage(
            f"an L2 entry leads to {host_offset:#x}, which belongs to the "
            f"{metadata.protected.owner(owned)}",
            structure="L2 table",
            host_offset=host_offset,
        )


async def raise_all(metadata: Metadata, view: L1View) -> None:
    """Count every reference that a view's L1 and its L2 tables hold once more.

    Raises ImageFull where a refcount cannot rise, CorruptImage where a table
    or an entry is damaged, OSError; then no count has changed.
    """
    tables = _tables_of(metadata, view)
    gatherer = _Gatherer(metadata, tables)
    counted = 0
    try:
        while (batch := await gatherer.next_batch()) is not None:
            await _raise_batch(metadata, batch)
            counted = gatherer.done
    except BaseException:
        with trio.CancelScope(shield=True):
            await _lower_raised(metadata, tables[:counted])
        raise


async def lower_raised(metadata: Metadata, view: L1View) -> None:
    """Take back what `raise_all` did; for references that were never published."""
    await _lower_raised(metadata, _tables_of(metadata, view))


async def lower_all(metadata: Metadata, view: L1View, label: str) -> None:
    """Give up every reference that a view's L1 and its L2 tables hold.

    Called when no durable pointer leads to that L1 any more; waits for the
    requests that may know it. Whatever is damaged or cannot be read is left as
    it is, with one warning. `label` names the view in the warning. The next
    commit makes the counts durable. Raises CorruptImage, after failsafe, for a
    count that would fall below 0.
    """
    file_size = metadata.storage.size()
    tables: list[tuple[int, int]] = []
    skipped: Exception | None = None
    for l1_index, entry in enumerate(view.words):
        if entry:
            try:
                table_offset = view.table_at(l1_index, file_size)
            except CorruptImage as error:
                skipped = skipped or error
            else:
                tables.append((l1_index, table_offset))
    await _wait_for_requests(metadata)
    gatherer = _Gatherer(metadata, [table for table in tables if table[1]], skip=True)
    while (batch := await gatherer.next_batch()) is not None:
        try:
            await _lower_batch(metadata, batch)
        except OSError as error:
            skipped = skipped or error
    skipped = skipped or gatherer.skipped
    if skipped is not None:
        logger.warning(
            "%s: a part of %s is damaged or cannot be read, its clusters stay in use: %s",
            metadata.name,
            label,
            skipped,
        )


def _tables_of(metadata: Metadata, view: L1View) -> list[tuple[int, int]]:
    """(L1 index, host offset) of each L2 table of a view. Raises CorruptImage."""
    return [table for table in metadata.table_offsets(view) if table[1]]


async def _wait_for_requests(metadata: Metadata) -> None:
    """Return when every request that began earlier has ended."""
    requests = metadata.requests
    barrier = requests.advance()
    while True:
        if requests.oldest() >= barrier:
            return
        await trio.sleep(_SETTLE_INTERVAL)


async def _lower_batch(metadata: Metadata, batch: _Batch) -> None:
    frees = metadata.allocator.frees
    for first, count in batch.runs:
        await frees.lower_run(first, count)
    if batch.arrays:
        await frees.lower_many(*batch.clusters())
    for table_index in batch.tables:
        await frees.lower_run(table_index, 1, structure=guard.L2_TABLE)


async def _lower_raised(metadata: Metadata, tables: Sequence[tuple[int, int]]) -> None:
    gatherer = _Gatherer(metadata, tables)
    while (batch := await gatherer.next_batch()) is not None:
        await _lower_runs(metadata, [*batch.runs, *((index, 1) for index in batch.tables)])
        if batch.arrays:
            await metadata.refcounts.lower_many(*batch.clusters())


async def _raise_batch(metadata: Metadata, batch: _Batch) -> None:
    """Raise all counts of a batch, or none."""
    runs = [*batch.runs, *((index, 1) for index in batch.tables)]
    await _raise_runs(metadata, runs)
    if batch.arrays:
        try:
            await metadata.refcounts.raise_many(*batch.clusters())
        except BaseException:
            with trio.CancelScope(shield=True):
                await _lower_runs(metadata, runs)
            raise


async def _raise_runs(metadata: Metadata, runs: list[Run]) -> None:
    """Raise all counts of the runs, or none."""
    refcounts = metadata.refcounts
    per_block = metadata.geometry.refcounts_per_block
    done: list[Run] = []
    try:
        for index, place, count in _by_block(metadata, runs):
            if not refcounts.block_offset(index):
                raise refcounts.without_block(index * per_block + place)
            block = refcounts.block_now(index) or await refcounts.block(index)
            refcounts.raise_run(block, place, count)
            done.append((index * per_block + place, count))
            await refcounts.relieve()
    except BaseException:
        with trio.CancelScope(shield=True):
            await _lower_runs(metadata, done)
        raise


async def _lower_runs(metadata: Metadata, runs: list[Run]) -> None:
    refcounts = metadata.refcounts
    for index, place, count in _by_block(metadata, runs):
        block = refcounts.block_now(index) or await refcounts.block(index)
        refcounts.lower_run(block, place, count)
        await refcounts.relieve()


def _by_block(metadata: Metadata, runs: list[Run]) -> Iterator[tuple[int, int, int]]:
    """Runs cut at refcount blocks: (block index, place in it, count)."""
    per_block = metadata.geometry.refcounts_per_block
    for first, count in runs:
        while count:
            index, place = divmod(first, per_block)
            part = min(count, per_block - place)
            yield index, place, part
            first += part
            count -= part
