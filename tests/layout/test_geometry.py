"""Geometry: the arithmetic of clusters, tables and refcounts."""

import pytest

from qcowfs.driver.layout.geometry import Geometry


def geometry(cluster_bits: int = 16, **changes: object) -> Geometry:
    """An ordinary version 3 geometry of 1 GiB."""
    values = {
        "version": 3,
        "virtual_size": 1 << 30,
        "extended_l2": False,
        "refcount_order": 4,
    } | changes
    return Geometry(cluster_bits, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_an_l2_table_fills_one_cluster(cluster_bits: int) -> None:
    """Entries times their length is the cluster size, for both lengths of entries."""
    standard = geometry(cluster_bits)
    assert standard.l2_entry_count * 8 == 1 << cluster_bits
    extended = geometry(cluster_bits, extended_l2=True)
    assert extended.l2_entry_count * 16 == 1 << cluster_bits
    assert extended.subcluster_size * 32 == 1 << cluster_bits


def test_l2_coverage_is_what_one_table_maps() -> None:
    """64 KiB clusters: 8192 entries of 64 KiB."""
    assert geometry().l2_coverage == 512 << 20


@pytest.mark.parametrize("order", range(7))
def test_a_refcount_block_fills_one_cluster(order: int) -> None:
    """Refcounts times their width is the cluster size, and the maximum fills the width."""
    found = geometry(refcount_order=order)
    assert found.refcounts_per_block << order == found.cluster_size * 8
    assert found.refcount_max == (1 << (1 << order)) - 1


@pytest.mark.parametrize(
    ("cluster_bits", "shift", "mask"),
    [(9, 61, 0x1), (12, 58, 0xF), (16, 54, 0xFF), (21, 49, 0x1FFF)],
)
def test_compressed_descriptor_fields(cluster_bits: int, shift: int, mask: int) -> None:
    """The sector count begins at bit 62 - (cluster_bits - 8)."""
    found = geometry(cluster_bits)
    assert (found.csize_shift, found.csize_mask) == (shift, mask)
    assert found.compressed_offset_mask == (1 << shift) - 1


def test_a_size_that_is_no_multiple_of_a_sector_is_floored() -> None:
    """What lies beyond the last whole sector is no part of the disk."""
    assert geometry(virtual_size=1023).virtual_size == 512


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (512 << 20, 1), ((512 << 20) + 1, 2)])
def test_l1_count_rounds_up(size: int, count: int) -> None:
    """A disk needs an L1 entry for each L2 table begun; an empty one needs none."""
    assert geometry().l1_count(size) == count


def test_vm_state_begins_after_the_last_l1_entry_of_the_disk() -> None:
    """Its guest offset is the number of L1 entries times the coverage of a table."""
    assert geometry().vm_state_offset((512 << 20) + 1) == 1 << 30


def test_indexes_of_a_guest_offset() -> None:
    """The L1 index counts tables, the L2 index entries within one."""
    found = geometry()
    guest_offset = 3 * found.l2_coverage + 5 * found.cluster_size + 77
    assert (found.l1_index(guest_offset), found.l2_index(guest_offset)) == (3, 5)


def test_rounding_to_clusters() -> None:
    """Down, up and counting agree at and around a boundary."""
    found = geometry(9)
    assert [found.round_down(n) for n in (511, 512, 513)] == [0, 512, 512]
    assert [found.round_up(n) for n in (511, 512, 513)] == [512, 512, 1024]
    assert [found.cluster_count(n) for n in (0, 1, 512, 513)] == [0, 1, 1, 2]


def test_a_resized_geometry_differs_in_its_size_alone() -> None:
    """All other fields, derived ones included, stay."""
    found = geometry(extended_l2=True).with_virtual_size(512)
    assert found == geometry(extended_l2=True, virtual_size=512)
    assert found.l2_entry_length == 16
