"""Zeroing and discarding: flags, freed clusters, and nothing hidden is ever revealed."""

import random

import pytest
import trio
import trio.testing

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED
from qcowfs.driver.layout.mapping import ALL_ZERO, OFLAG_ZERO
from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import BadRequest, ReadOnlyImage
from tests.driver.qcow2_images import (
    KIB,
    MIB,
    close_and_judge,
    entry_of,
    make_image,
    open_node,
    read,
)
from tests.fakes import MemoryFile

CLUSTER = 64 * KIB
BASE = random.Random(8).randbytes(MIB)
FULL = ("write -P 1 0 1M",)


async def frees_of(node: Qcow2Node) -> int:
    """Clusters that have become free, once all that was queued has gone through."""
    await node.flush()
    return node.statistics()["frees"]


async def test_zeroed_cluster_is_given_back() -> None:
    """With `unmap` a whole cluster becomes a plain zero cluster and its host cluster free."""
    node = await open_node(make_image(MIB, commands=FULL))
    await node.write_zeroes(CLUSTER, 2 * CLUSTER)
    assert entry_of(node, CLUSTER) == (OFLAG_ZERO, 0)
    assert entry_of(node, 2 * CLUSTER) == (OFLAG_ZERO, 0)
    assert await frees_of(node) == 2
    model = bytearray(b"\1" * MIB)
    model[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    assert await read(node, 0, MIB) == model
    await close_and_judge(node, model)


async def test_zeroed_cluster_is_kept_without_unmap() -> None:
    """Without `unmap` a cluster that was allocated keeps its place behind a zero flag."""
    node = await open_node(make_image(MIB, commands=FULL))
    entry, _ = entry_of(node, 0)
    await node.write_zeroes(0, CLUSTER, unmap=False)
    assert entry_of(node, 0) == (entry | OFLAG_ZERO, 0)
    assert await frees_of(node) == 0
    await close_and_judge(node, bytes(CLUSTER) + b"\1" * (MIB - CLUSTER))


async def test_kept_cluster_is_given_back_later() -> None:
    """A zero cluster that kept its place loses it to a zeroing with `unmap`."""
    node = await open_node(make_image(MIB, commands=FULL))
    await node.write_zeroes(0, CLUSTER, unmap=False)
    await node.write_zeroes(0, CLUSTER, unmap=True)
    assert entry_of(node, 0) == (OFLAG_ZERO, 0)
    assert await frees_of(node) == 1
    await close_and_judge(node)


async def test_edges_are_written_as_bytes() -> None:
    """Around the whole clusters of a range the bytes are zeroed, and no others."""
    node = await open_node(make_image(MIB, commands=FULL))
    start, end = CLUSTER - 1000, 3 * CLUSTER + 777
    await node.write_zeroes(start, end - start)
    model = bytearray(b"\1" * MIB)
    model[start:end] = bytes(end - start)
    assert entry_of(node, 0)[0] & OFLAG_COPIED
    await close_and_judge(node, model)


async def test_zeros_over_zeros_change_nothing() -> None:
    """A range that reads as zeros already is not written, whatever its alignment."""
    node = await open_node(make_image(MIB, commands=("write -z 0 128k",)))
    await node.metadata.prepare_writing()
    await node.write_zeroes(100, MIB - 200)
    await node.discard(0, MIB)
    assert not node.metadata.dirty
    await close_and_judge(node, bytes(MIB))


@pytest.mark.parametrize("unmap", [True, False])
async def test_backing_file_is_hidden(unmap: bool) -> None:
    """Zeroing what was never written puts zero flags over the backing file."""
    node = await open_node(make_image(MIB, backing=BASE), backing=BASE)
    await node.write_zeroes(CLUSTER, CLUSTER, unmap=unmap)
    assert entry_of(node, CLUSTER) == (OFLAG_ZERO, 0)
    model = bytearray(BASE)
    model[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    await close_and_judge(node, model, backing=BASE)


async def test_discard_over_a_backing_file_reads_as_zeros() -> None:
    """What was written over a backing file is zeros after a discard; the rest stays as it was."""
    image = make_image(MIB, backing=BASE, commands=("write -P 1 64k 64k",))
    node = await open_node(image, backing=BASE)
    await node.discard(0, MIB)
    assert entry_of(node, CLUSTER) == (OFLAG_ZERO, 0)
    assert entry_of(node, 0) == (0, 0)
    model = bytearray(BASE)
    model[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    await close_and_judge(node, model, backing=BASE)


async def test_discard_without_a_backing_file_unallocates() -> None:
    """Without anything to hide, a discarded cluster is as if never written."""
    node = await open_node(make_image(MIB, commands=FULL))
    await node.discard(CLUSTER - 512, 2 * CLUSTER)
    assert entry_of(node, CLUSTER) == (0, 0)
    assert entry_of(node, 0)[0] & OFFSET_MASK
    assert entry_of(node, 2 * CLUSTER)[0] & OFFSET_MASK
    assert await frees_of(node) == 1
    model = bytearray(b"\1" * MIB)
    model[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    await close_and_judge(node, model)


async def test_last_cluster_counts_as_whole() -> None:
    """A range that ends where the disk ends takes its last cluster, however short that is."""
    size = CLUSTER + 512
    node = await open_node(make_image(size, commands=(f"write -P 1 0 {size}",)))
    await node.discard(CLUSTER, 512)
    assert entry_of(node, CLUSTER) == (0, 0)
    await node.write_zeroes(0, size)
    assert entry_of(node, 0) == (OFLAG_ZERO, 0)
    await close_and_judge(node, bytes(size))


async def test_version_2_discard_never_reveals() -> None:
    """Without a zero flag, a discard over the backing file does nothing, and beyond it frees."""
    base = BASE[: 5 * CLUSTER + 512]
    image = make_image(MIB, "compat=0.10", backing=base, commands=FULL)
    node = await open_node(image, backing=base)
    await node.discard(0, MIB)
    model = b"\1" * 6 * CLUSTER + bytes(MIB - 6 * CLUSTER)
    assert await read(node, 0, MIB) == model
    assert await frees_of(node) == 10
    await close_and_judge(node, model, backing=base)


async def test_version_2_zeroes_are_bytes_over_a_backing_file() -> None:
    """Without a zero flag, zeroing over the backing file writes zeros, and beyond it frees."""
    base = BASE[: 5 * CLUSTER + 512]
    image = make_image(MIB, "compat=0.10", backing=base, commands=("write -P 1 128k 640k",))
    node = await open_node(image, backing=base)
    await node.write_zeroes(1000, MIB - 2000)
    model = base[:1000] + bytes(MIB - 1000)
    assert await read(node, 0, MIB) == model
    assert entry_of(node, 0)[0] & OFFSET_MASK
    assert entry_of(node, 8 * CLUSTER) == (0, 0)
    await close_and_judge(node, model, backing=base)


@pytest.mark.parametrize("extended", ["off", "on"])
async def test_compressed_clusters_are_given_back(extended: str) -> None:
    """Whole compressed clusters go away; of those at the edges the rest stays."""
    content = (BASE[:100] * (MIB // 100 + 1))[:MIB]
    image = make_image(MIB, f"extended_l2={extended}", content=content, compressed=True)
    for keep in (True, False):
        node = await open_node(image)
        start, end = 10 * KIB, 5 * CLUSTER + 10 * KIB
        await node.write_zeroes(start, end - start, unmap=not keep)
        model = bytearray(content)
        model[start:end] = bytes(end - start)
        assert await read(node, 0, MIB) == model
        assert not entry_of(node, CLUSTER)[0] & OFFSET_MASK
        await node.discard(8 * CLUSTER, CLUSTER)
        model[8 * CLUSTER : 9 * CLUSTER] = bytes(CLUSTER)
        await close_and_judge(node, model)


async def test_subclusters_are_zeroed_by_their_bits() -> None:
    """With extended L2 entries the unit is the subcluster; others in the cluster keep theirs."""
    node = await open_node(make_image(MIB, "extended_l2=on", commands=FULL))
    host_offset = entry_of(node, 0)[0]
    await node.write_zeroes(4 * KIB, 6 * KIB)
    assert entry_of(node, 0) == (host_offset, 0b11100 << 32 | 0xFFFF_FFFF & ~0b11100)
    await node.write_zeroes(CLUSTER, CLUSTER)
    assert entry_of(node, CLUSTER) == (0, ALL_ZERO)
    kept = entry_of(node, 2 * CLUSTER)[0]
    await node.write_zeroes(2 * CLUSTER, CLUSTER, unmap=False)
    assert entry_of(node, 2 * CLUSTER) == (kept, ALL_ZERO)
    await node.discard(3 * CLUSTER, CLUSTER)
    assert entry_of(node, 3 * CLUSTER) == (0, 0)
    model = bytearray(b"\1" * MIB)
    model[4 * KIB : 10 * KIB] = bytes(6 * KIB)
    model[CLUSTER : 4 * CLUSTER] = bytes(3 * CLUSTER)
    assert await read(node, 0, MIB) == model
    await close_and_judge(node, model)


async def test_last_data_of_a_cluster_frees_it() -> None:
    """When all its subclusters with data are zeroed, a cluster is given back."""
    image = make_image(MIB, "extended_l2=on", backing=BASE, commands=("write -P 1 4k 4k",))
    node = await open_node(image, backing=BASE)
    await node.write_zeroes(4 * KIB, 4 * KIB)
    assert entry_of(node, 0) == (0, 0b1100 << 32)
    assert await frees_of(node) == 1
    model = BASE[: 4 * KIB] + bytes(4 * KIB) + BASE[8 * KIB :]
    await close_and_judge(node, model, backing=BASE)


async def test_shared_cluster_stays_the_snapshots() -> None:
    """Zeroing and discarding what a snapshot shares drops the disk's reference alone."""
    node = await open_node(make_image(MIB, commands=FULL, snapshots=("s",)))
    await node.write_zeroes(0, CLUSTER)
    await node.write_zeroes(CLUSTER, CLUSTER, unmap=False)
    await node.discard(2 * CLUSTER, CLUSTER)
    assert await frees_of(node) == 0
    await close_and_judge(node, bytes(3 * CLUSTER) + b"\1" * (MIB - 3 * CLUSTER))


async def test_range_without_tables_needs_none() -> None:
    """Zeroing and discarding a huge empty disk creates no table and takes no time."""
    node = await open_node(make_image(1 << 42, commands=("write -P 1 1T 64k",)))
    await node.write_zeroes(0, 1 << 42)
    await node.discard(0, 1 << 42)
    assert node.statistics()["allocations"] == 0
    assert await read(node, 1 << 40, 512) == bytes(512)
    await close_and_judge(node)


async def test_backing_file_of_holes_needs_no_tables() -> None:
    """Where the backing file is known to be zeros, zeroing creates no table."""
    base = bytes(8 * MIB)
    image = make_image(8 * MIB, "cluster_size=4k", backing=base)
    node = await open_node(image, backing=base)
    await node.write_zeroes(0, 8 * MIB)
    assert node.statistics()["allocations"] == 0
    await close_and_judge(node, base, backing=base)


async def test_caches_stay_small_over_a_long_range() -> None:
    """However many tables a discard changes, what is dirty stays inside the cache."""
    image = make_image(32 * MIB, "cluster_size=512,preallocation=metadata")
    node = await open_node(image, cache_size=64 * KIB)
    await node.discard(0, 32 * MIB)
    assert len(node.metadata.tables.dirty) * 512 <= 64 * KIB
    assert len(node.metadata.tables.slices) * 512 <= 64 * KIB
    await close_and_judge(node, bytes(32 * MIB))


async def test_zeroing_waits_for_an_allocating_write() -> None:
    """Zeros are not overtaken by a write that began before them."""
    storage = MemoryFile(make_image(MIB), refusal_rate=1.0)
    node = await open_node(storage)
    await node.write_from(MIB - 512, b"t" * 512)
    order: list[str] = []

    async def write() -> None:
        await node.write_from(0, b"x" * CLUSTER)
        order.append("written")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        while not node.metadata.requests.allocations:
            await trio.lowlevel.checkpoint()
        await node.write_zeroes(0, CLUSTER)
        order.append("zeroed")
    assert order == ["written", "zeroed"]
    assert await read(node, 0, CLUSTER) == bytes(CLUSTER)
    await close_and_judge(node, bytes(MIB - 512) + b"t" * 512)


async def test_closed_gate_keeps_zeroing_out() -> None:
    """Zeroing and discarding wait at the gate as writes do."""
    node = await open_node(make_image(MIB, commands=FULL))
    async with trio.open_nursery() as nursery:
        async with node.metadata.requests.close_gate():
            nursery.start_soon(node.discard, 0, CLUSTER)
            await trio.testing.wait_all_tasks_blocked()
            assert entry_of(node, 0)[0]
    assert entry_of(node, 0) == (0, 0)
    await node.aclose()


async def test_outside_and_read_only_are_refused() -> None:
    """A range outside the disk raises BadRequest, a read-only node ReadOnlyImage."""
    node = await open_node(make_image())
    for call in (node.write_zeroes, node.discard):
        with pytest.raises(BadRequest):
            await call(MIB - 512, 1024)
    await node.aclose()
    node = await open_node(make_image(), read_only=True)
    for call in (node.write_zeroes, node.discard):
        with pytest.raises(ReadOnlyImage):
            await call(0, 512)
    await node.aclose()


@pytest.mark.parametrize("options", ["", "extended_l2=on", "compat=0.10", "cluster_size=512"])
async def test_freed_clusters_are_used_again(options: str) -> None:
    """Writing, discarding and flushing in turns does not make the file grow."""
    storage = MemoryFile(make_image(MIB, options))
    node = await open_node(storage)
    sizes = []
    for turn in range(6):
        await node.write_from(0, bytes([turn + 1]) * (MIB // 2))
        await node.flush()
        await node.discard(0, MIB // 2)
        await node.flush()
        sizes.append(len(storage.content))
    assert sizes[-1] <= sizes[1]
    kinds = {extent.kind for extent in await node.extents(0, MIB)}
    assert ExtentKind.DATA not in kinds
    await close_and_judge(node, bytes(MIB))
