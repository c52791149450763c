"""The references that one L1 table holds: to its L2 tables, and through them to guest data.

Implements docs/interop/qcow2, "Host cluster management", for snapshots: what a
snapshot shares is counted once more, what it gave up is counted once less. For
snapshot operations, under a closed gate and the lock. May not: change tables
or the header, decide about COPIED flags. Invariants:

- `raise_all` that fails leaves every count as it was.
- `drop_all` only queues: counts fall after the commit that made the removal
  durable. What is damaged, or cannot be read, is left alone, which leaks its
  clusters at worst.
- No reference that leads into metadata is counted or dropped.
- One L2 table is in memory at a time.
"""

import logging
from array import array
from collections.abc import Iterator

import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, Geometry
from qcowfs.driver.layout.mapping import (
    OFLAG_COMPRESSED,
    check_entry,
    classify,
    compressed_clusters,
)
from qcowfs.driver.qcow2 import guard
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.errors import CorruptImage, QcowfsError

logger = logging.getLogger(__name__)

# A run of clusters: (index of the first, count).
Run = tuple[int, int]


def table_runs(words: "array[int]", guest_offset: int, geometry: Geometry) -> list[Run]:
    """The host clusters that an L2 table refers to, one run for each piece that adjoins.

    `guest_offset` is where the table's disk range begins, for messages. A
    cluster that holds several compressed pieces appears once for each. Raises
    CorruptImage for an entry that breaks a rule.
    """
    found = _extended_runs if geometry.extended_l2 else _standard_runs
    runs: list[Run] = []
    first, count = 0, 0
    for index, length in found(words, guest_offset, geometry):
        if index == first + count:
            count += length
            continue
        if count:
            runs.append((first, count))
        first, count = index, length
    if count:
        runs.append((first, count))
    return runs


def _standard_runs(
    words: "array[int]", guest_offset: int, geometry: Geometry
) -> Iterator[Run]:
    bits = geometry.cluster_bits
    for kind, start, length, host_offset, _ in classify(
        words, 0, guest_offset, geometry.l2_coverage, geometry
    ):
        if kind is ExtentKind.COMPRESSED:
            first, count = compressed_clusters(words[start - guest_offset >> bits], geometry)
            yield first >> bits, count
        elif host_offset is not None:
            yield host_offset >> bits, length >> bits


def _extended_runs(
    words: "array[int]", guest_offset: int, geometry: Geometry
) -> Iterator[Run]:
    bits = geometry.cluster_bits
    for index in range(0, len(words), 2):
        entry = words[index]
        if entry:
            check_entry(
                entry, words[index + 1], guest_offset + (index // 2 << bits), geometry
            )
            if entry & OFLAG_COMPRESSED:
                first, count = compressed_clusters(entry, geometry)
                yield first >> bits, count
            elif entry & OFFSET_MASK:
                yield (entry & OFFSET_MASK) >> bits, 1


async def raise_all(metadata: Metadata, view: L1View) -> None:
    """Count every reference that a view's L1 and its L2 tables hold once more.

    Raises ImageFull where a refcount cannot rise, CorruptImage where a table
    or an entry is damaged, OSError; then no count has changed.
    """
    done: list[tuple[int, int]] = []
    try:
        for l1_index, table_offset in metadata.table_offsets(view):
            runs = await _runs_of(metadata, view, l1_index, table_offset)
            _check_runs(metadata, runs)
            await _raise_runs(metadata, runs)
            done.append((l1_index, table_offset))
    except BaseException:
        with trio.CancelScope(shield=True):
            for l1_index, table_offset in done:
                runs = await _runs_of(metadata, view, l1_index, table_offset)
                await _lower_runs(metadata, runs)
        raise


async def lower_raised(metadata: Metadata, view: L1View) -> None:
    """Take back what `raise_all` did; for references that were never published."""
    for l1_index, table_offset in metadata.table_offsets(view):
        await _lower_runs(metadata, await _runs_of(metadata, view, l1_index, table_offset))


async def drop_all(metadata: Metadata, view: L1View, label: str) -> None:
    """Queue the removal of every reference that a view's L1 and its L2 tables hold.

    Whatever is damaged or cannot be read is left as it is, with one warning.
    Commits on the way when much is queued. `label` names the view in the
    warning. Raises what a commit does.
    """
    leaked: QcowfsError | OSError | None = None
    for l1_index in range(len(view.words)):
        try:
            table_offset = view.table_at(l1_index, metadata.storage.size())
            if not table_offset:
                continue
            runs = await _runs_of(metadata, view, l1_index, table_offset)
            _check_runs(metadata, runs)
        except (QcowfsError, OSError) as error:
            leaked = leaked or error
            continue
        bits = metadata.geometry.cluster_bits
        for first, count in runs[:-1]:
            metadata.allocator.drop(first << bits, count << bits)
        metadata.allocator.drop(table_offset, 1, structure=guard.L2_TABLE)
        if metadata.under_pressure:
            await metadata.commit()
    if leaked is not None:
        logger.warning(
            "%s: a part of %s is damaged or cannot be read, its clusters stay in use: %s",
            metadata.name,
            label,
            leaked,
        )


async def _runs_of(
    metadata: Metadata, view: L1View, l1_index: int, table_offset: int
) -> list[Run]:
    """All that one L1 entry refers to; the L2 table itself comes last."""
    words = await metadata.tables.read_table(table_offset)
    coverage = metadata.geometry.l2_coverage
    runs = table_runs(words, l1_index * coverage, metadata.geometry)
    runs.append((table_offset >> metadata.geometry.cluster_bits, 1))
    return runs


def _check_runs(metadata: Metadata, runs: list[Run]) -> None:
    """Nothing that `_runs_of` found lies in other metadata: such an entry is damage."""
    bits = metadata.geometry.cluster_bits
    owner = metadata.protected.owner(runs[-1][0])
    if owner not in (None, guard.L2_TABLE):
        raise CorruptImage(
            f"an L1 entry leads to {runs[-1][0] << bits:#x}, which belongs to the {owner}",
            structure="L1 table",
            host_offset=runs[-1][0] << bits,
        )
    for first, count in runs[:-1]:
        owned = metadata.protected.first_owned(first, count)
        if owned is not None:
            raise CorruptImage(
                f"an L2 entry leads to {owned << bits:#x}, which belongs to the "
                f"{metadata.protected.owner(owned)}",
                structure="L2 table",
                host_offset=owned << bits,
            )


async def _raise_runs(metadata: Metadata, runs: list[Run]) -> None:
    """Raise all counts of the runs, or none."""
    refcounts = metadata.refcounts
    done: list[Run] = []
    try:
        for index, place, count in _by_block(metadata, runs):
            if not refcounts.block_offset(index):
                raise refcounts.without_block(
                    index * metadata.geometry.refcounts_per_block + place
                )
            block = refcounts.block_now(index) or await refcounts.block(index)
            refcounts.raise_run(block, place, count)
            done.append((index * metadata.geometry.refcounts_per_block + place, count))
            if len(refcounts.dirty_blocks) >= refcounts.dirty_limit:
                await refcounts.write_blocks()
                refcounts.mark_blocks_clean()
    except BaseException:
        with trio.CancelScope(shield=True):
            await _lower_runs(metadata, done)
        raise


async def _lower_runs(metadata: Metadata, runs: list[Run]) -> None:
    for index, place, count in _by_block(metadata, runs):
        metadata.refcounts.lower_run(await metadata.refcounts.block(index), place, count)


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
