"""The host clusters that an L2 table refers to, as runs or as an array.

Implements docs/interop/qcow2, "Host cluster management": a data cluster holds
one reference to its host cluster, a compressed one to every cluster that its
sectors touch. Pure: words in, cluster indexes out.

A table of few runs is cheapest as runs, without numpy; one that is scattered or
compressed as an array. `run_cost` tells by a look at some entries, and
`is_scattered` decides. Invariant: both say the same of a table that breaks no rule, and only
`table_runs` says which rule another one breaks.
"""

import sys
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, Geometry
from qcowfs.driver.layout.mapping import (
    ALL_ALLOCATED,
    L2_EXTENDED_RESERVED_MASK,
    L2_RESERVED_MASK,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    check_entry,
    classify,
    compressed_clusters,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A run of clusters: (index of the first, count).
Run = tuple[int, int]

# Runs that cost in Python what importing numpy costs, for one whole operation;
# and, once it is there, what a table costs as an array.
RUNS_BEFORE_NUMPY = 8192
_RUNS_BESIDE_NUMPY = 24
_SAMPLE_COUNT = 64
_SECTOR_MASK = 511


def run_cost(words: "array[int]", geometry: Geometry) -> int:
    """About what it costs to go through a table by runs, in runs."""
    entry_count = len(words) // geometry.words_per_entry
    cost = estimated_run_count(words, geometry)
    if geometry.extended_l2:
        # Gone through entry by entry, whatever the runs are.
        cost += entry_count // 8
    if geometry.refcount_bits < 8:
        # Counts that share bytes are changed one by one.
        cost += entry_count // 4
    return cost


def is_scattered(cost: int, cost_left: int) -> bool:
    """Whether a table of that cost is cheaper as an array, the import of numpy included.

    `cost_left` is what is left of `RUNS_BEFORE_NUMPY` for the operation.
    """
    return cost > (_RUNS_BESIDE_NUMPY if "numpy" in sys.modules else cost_left)


def estimated_run_count(words: "array[int]", geometry: Geometry) -> int:
    """About how many runs `table_runs` would find; exact for tables of few entries."""
    step = geometry.words_per_entry
    pair_count = len(words) // step - 1
    stride = max(1, pair_count // _SAMPLE_COUNT)
    breaks = 0
    looked = 0
    for index in range(0, pair_count, stride):
        entry = words[index * step]
        following = words[(index + 1) * step]
        looked += 1
        if following not in (entry, entry + geometry.cluster_size) or entry & OFLAG_COMPRESSED:
            breaks += 1
    return 1 + (breaks * pair_count // looked if looked else 0)


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


def _standard_runs(words: "array[int]", guest_offset: int, geometry: Geometry) -> Iterator[Run]:
    bits = geometry.cluster_bits
    for kind, start, length, host_offset, _ in classify(
        words, 0, guest_offset, geometry.l2_coverage, geometry
    ):
        if kind is ExtentKind.COMPRESSED:
            first, count = compressed_clusters(words[start - guest_offset >> bits], geometry)
            yield first >> bits, count
        elif host_offset is not None:
            yield host_offset >> bits, length >> bits


def _extended_runs(words: "array[int]", guest_offset: int, geometry: Geometry) -> Iterator[Run]:
    bits = geometry.cluster_bits
    plain_mask = geometry.plain_mask
    for index in range(0, len(words), 2):
        entry = words[index]
        bitmap = words[index + 1]
        if not entry and not bitmap:
            continue
        if entry & plain_mask or bitmap != ALL_ALLOCATED:
            check_entry(entry, bitmap, guest_offset + (index // 2 << bits), geometry)
        if entry & OFLAG_COMPRESSED:
            first, count = compressed_clusters(entry, geometry)
            yield first >> bits, count
        elif entry & OFFSET_MASK:
            yield (entry & OFFSET_MASK) >> bits, 1


def placed_runs(
    words: "array[int]", guest_offset: int, geometry: Geometry
) -> Iterator[tuple[int, int, int]]:
    """(entry index, first cluster, count) of what is not compressed; errors as of `table_runs`."""
    bits = geometry.cluster_bits
    if not geometry.extended_l2:
        for kind, start, length, host_offset, _ in classify(
            words, 0, guest_offset, geometry.l2_coverage, geometry
        ):
            if kind is not ExtentKind.COMPRESSED and host_offset is not None:
                yield start - guest_offset >> bits, host_offset >> bits, length >> bits
        return
    for index in range(len(words) // 2):
        entry = words[2 * index]
        if entry:
            check_entry(entry, words[2 * index + 1], guest_offset + (index << bits), geometry)
            if entry & OFFSET_MASK and not entry & OFLAG_COMPRESSED:
                yield index, (entry & OFFSET_MASK) >> bits, 1


def table_clusters(words: "array[int]", geometry: Geometry) -> "NDArray[np.uint64] | None":
    """The index of a host cluster for each reference of an L2 table, in no order.

    None for a table with an entry that breaks a rule (or may, with an external
    data file): ask `table_runs`.
    """
    import numpy as np

    step = geometry.words_per_entry
    all_words = np.frombuffer(words, dtype=np.uint64)
    entries = all_words[::step]
    compressed = (entries & np.uint64(OFLAG_COMPRESSED)) != 0
    reserved = L2_EXTENDED_RESERVED_MASK if geometry.extended_l2 else L2_RESERVED_MASK
    broken = reserved | (OFFSET_MASK & geometry.cluster_mask)
    if geometry.version < 3:
        broken |= OFLAG_ZERO
    bad = ((entries & np.uint64(broken)) != 0) & ~compressed
    offsets = entries & np.uint64(OFFSET_MASK)
    mapped = (offsets != 0) & ~compressed
    if geometry.extended_l2:
        bitmaps = all_words[1::2]
        low = bitmaps & np.uint64(ALL_ALLOCATED)
        bad |= (low & (bitmaps >> np.uint64(32))) != 0
        bad |= (low != 0) & ~mapped & ~compressed
        bad |= (bitmaps != 0) & compressed
    if geometry.has_data_file or bad.any():
        return None
    clusters: NDArray[np.uint64] = offsets[mapped] >> np.uint64(geometry.cluster_bits)
    if not compressed.any():
        return clusters
    return np.concatenate((clusters, *_compressed_clusters(entries[compressed], geometry)))


def _compressed_clusters(
    entries: "NDArray[np.uint64]", geometry: Geometry
) -> "Iterator[NDArray[np.uint64]]":
    """The first cluster of each compressed entry, then the second of those that have one, ..."""
    import numpy as np

    bits = np.uint64(geometry.cluster_bits)
    starts = entries & np.uint64(geometry.compressed_offset_mask)
    sectors = (entries >> np.uint64(geometry.csize_shift)) & np.uint64(geometry.csize_mask)
    ends = (starts & ~np.uint64(_SECTOR_MASK)) + ((sectors + np.uint64(1)) << np.uint64(9))
    clusters = starts >> bits
    last = (ends - np.uint64(1)) >> bits
    while len(clusters):
        yield clusters
        more = clusters < last
        clusters, last = clusters[more] + np.uint64(1), last[more]
