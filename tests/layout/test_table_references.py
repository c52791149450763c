"""What an L2 table refers to: as runs and as an array, held against entry by entry."""

import random
from array import array
from collections import Counter
from dataclasses import replace

import pytest

from qcowfs.driver.layout import table_references
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED, Geometry
from qcowfs.driver.layout.mapping import (
    ALL_ALLOCATED,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
    compressed_clusters,
    compressed_entry,
)
from qcowfs.driver.layout.table_references import (
    estimated_run_count,
    is_scattered,
    placed_runs,
    run_cost,
    table_clusters,
    table_runs,
)
from qcowfs.errors import CorruptImage

GEOMETRIES = {
    "standard": Geometry(12, 3, 1 << 40, False, 4),
    "version-2": Geometry(12, 2, 1 << 40, False, 4),
    "small": Geometry(9, 3, 1 << 40, False, 4),
    "large": Geometry(16, 3, 1 << 40, False, 4),
    "extended": Geometry(14, 3, 1 << 40, True, 4),
}
EACH = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def entry_and_bitmap(choice: random.Random, cluster: int, geometry: Geometry) -> tuple[int, int]:
    """A valid entry for a host cluster, of any kind that refers to it."""
    kind = choice.random()
    offset = cluster << geometry.cluster_bits
    if kind < 0.2:
        stream = offset + choice.randrange(geometry.cluster_size)
        length = choice.randint(1, geometry.cluster_size - 1)
        return compressed_entry(stream, length, geometry), 0
    flag = choice.choice((0, OFLAG_COPIED))
    if geometry.extended_l2:
        allocated = choice.choice((ALL_ALLOCATED, 0, choice.getrandbits(32)))
        return offset | flag, allocated | (choice.getrandbits(32) & ~allocated) << 32
    if kind < 0.3 and geometry.version > 2:
        return offset | flag | OFLAG_ZERO, 0
    return offset | flag, 0


def table(choice: random.Random, geometry: Geometry) -> "array[int]":
    """A valid table with runs, scattered entries, compressed ones and holes."""
    words = array("Q")
    cluster = 1000
    while len(words) < geometry.cluster_size // 8:
        if choice.random() < 0.1:
            cluster = choice.randrange(1, 1 << 20)
        kind = choice.random()
        entry, bitmap = 0, 0
        if kind < 0.6:
            entry, bitmap = OFLAG_COPIED | cluster << geometry.cluster_bits, ALL_ALLOCATED
        elif kind < 0.85:
            entry, bitmap = entry_and_bitmap(choice, cluster, geometry)
        elif kind < 0.9 and geometry.version > 2 and not geometry.extended_l2:
            entry = OFLAG_ZERO
        cluster += 1
        words.append(entry)
        if geometry.extended_l2:
            words.append(bitmap)
    return words


def model_of(words: "array[int]", geometry: Geometry) -> "Counter[int]":
    """How many references to each host cluster."""
    found: Counter[int] = Counter()
    for entry in words[:: geometry.words_per_entry]:
        if entry & OFLAG_COMPRESSED:
            first, count = compressed_clusters(entry, geometry)
            first >>= geometry.cluster_bits
            found.update(range(first, first + count))
        elif entry & OFFSET_MASK:
            found[(entry & OFFSET_MASK) >> geometry.cluster_bits] += 1
    return found


@EACH
@pytest.mark.parametrize("seed", range(12))
def test_runs_and_arrays_agree(geometry: Geometry, seed: int) -> None:
    """Every reference is told once, whichever way it is asked for."""
    words = table(random.Random(seed), geometry)
    wanted = model_of(words, geometry)
    by_runs: Counter[int] = Counter()
    for first, count in table_runs(words, 0, geometry):
        by_runs.update(range(first, first + count))
    assert by_runs == wanted
    clusters = table_clusters(words, geometry)
    assert clusters is not None
    assert Counter(clusters.tolist()) == wanted


@EACH
@pytest.mark.parametrize("seed", range(4))
def test_placed_runs_tell_the_entries(geometry: Geometry, seed: int) -> None:
    """Each entry with a host cluster that is not compressed is told with its cluster."""
    words = table(random.Random(seed), geometry)
    entries = words[:: geometry.words_per_entry]
    found = {
        index + step: first + step
        for index, first, count in placed_runs(words, 0, geometry)
        for step in range(count)
    }
    assert found == {
        index: (entry & OFFSET_MASK) >> geometry.cluster_bits
        for index, entry in enumerate(entries)
        if entry & OFFSET_MASK and not entry & OFLAG_COMPRESSED
    }


@EACH
def test_an_empty_table_refers_to_nothing(geometry: Geometry) -> None:
    """No reference in a table of zeros."""
    words = array("Q", bytes(geometry.cluster_size))
    assert table_runs(words, 0, geometry) == []
    clusters = table_clusters(words, geometry)
    assert clusters is not None
    assert len(clusters) == 0
    assert estimated_run_count(words, geometry) == 1


BROKEN = {
    "reserved": (GEOMETRIES["standard"], 0x5000 | 4, 0),
    "high": (GEOMETRIES["standard"], 0x5000 | 1 << 57, 0),
    "unaligned": (GEOMETRIES["standard"], 0x5200, 0),
    "zero-in-v2": (GEOMETRIES["version-2"], 0x5000 | OFLAG_ZERO, 0),
    "both": (GEOMETRIES["extended"], 0x8000, 1 | 1 << 32),
    "no-offset": (GEOMETRIES["extended"], 0, 1),
    "bitmap": (GEOMETRIES["extended"], OFLAG_COMPRESSED | 0x8000, 1),
    "zero-flag": (GEOMETRIES["extended"], 0x8000 | OFLAG_ZERO, 0),
}


@pytest.mark.parametrize(("geometry", "entry", "bitmap"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_entry_is_told(geometry: Geometry, entry: int, bitmap: int) -> None:
    """The array is refused, the runs say which entry it is."""
    words = table(random.Random(1), geometry)
    index = 17
    words[index * geometry.words_per_entry] = entry
    if geometry.extended_l2:
        words[2 * index + 1] = bitmap
    assert table_clusters(words, geometry) is None
    with pytest.raises(CorruptImage) as caught:
        table_runs(words, 0, geometry)
    assert caught.value.index == index


def test_a_compressed_piece_may_touch_three_clusters() -> None:
    """The length field can say more than a cluster; each cluster that it touches is held."""
    geometry = GEOMETRIES["small"]
    entry = OFLAG_COMPRESSED | geometry.csize_mask << geometry.csize_shift | 0x4001
    words = array("Q", [entry] + [0] * 63)
    clusters = table_clusters(words, geometry)
    assert clusters is not None
    assert sorted(clusters.tolist()) == sorted(model_of(words, geometry))


def test_nothing_is_an_array_with_a_data_file() -> None:
    """There, an entry needs more than a look at itself."""
    geometry = replace(GEOMETRIES["large"], has_data_file=True)
    assert table_clusters(array("Q", bytes(65536)), geometry) is None


def test_a_table_in_order_is_not_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run is one run, with numpy in memory or not; a shuffled table costs its entries."""
    geometry = GEOMETRIES["large"]
    words = array("Q", range(1 << 30, (1 << 30) + (8192 << 16), 1 << 16))
    assert run_cost(words, geometry) == 1
    assert not is_scattered(run_cost(words, geometry), 0x10000)
    mixed = list(words)
    random.Random(1).shuffle(mixed)
    cost = run_cost(array("Q", mixed), geometry)
    assert 8000 < cost <= 8192
    assert is_scattered(cost, 1 << 20)
    monkeypatch.setattr(table_references, "sys", replace_modules())
    assert not is_scattered(cost, 1 << 20)
    assert is_scattered(cost, 4096)


def test_what_is_gone_through_entry_by_entry_costs_more() -> None:
    """Extended tables, and counts that share a byte, are not cheap in one run either."""
    words = array("Q", range(1 << 30, (1 << 30) + (8192 << 16), 1 << 16))
    narrow = replace(GEOMETRIES["large"], refcount_order=2)
    assert run_cost(words, narrow) > 1000
    extended = replace(GEOMETRIES["large"], extended_l2=True)
    assert run_cost(array("Q", bytes(65536)), extended) > 500


def replace_modules() -> object:
    """A `sys` in whose modules there is no numpy."""

    class NoModules:
        modules: dict[str, object] = {}  # noqa: RUF012

    return NoModules
