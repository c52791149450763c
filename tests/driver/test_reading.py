"""Reading an image: all kinds of clusters, without waiting and with it, backing chains, damage."""

import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.errors import BadRequest, CorruptImage
from tests.driver.contract import pattern
from tests.driver.qcow2_images import KIB, MIB, entry_of, make_image, open_node, read, with_entry
from tests.fakes import MemoryFile

CONTENT = pattern(MIB, seed=11)
CLUSTER = 64 * KIB


class CountingFile(MemoryFile):
    """A MemoryFile that notes (host offset, length) of each read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def _read(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        self.reads.append((host_offset, sum(map(len, buffers))))
        super()._read(buffers, host_offset)


class HeldFile(MemoryFile):
    """A MemoryFile in which nothing is resident, and whose waiting reads wait for `release`."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.release: trio.Event | None = None

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        return self.release is None and super().try_pread_into(buffers, host_offset)

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        if self.release is not None:
            await self.release.wait()
        await super().pread_into(buffers, host_offset)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=16k,extended_l2=on",
    ],
)
@pytest.mark.parametrize("miss_rate", [0.0, 0.5, 1.0])
async def test_any_range_reads_as_the_content(options: str, miss_rate: float) -> None:
    """Whatever the geometry and whatever is resident, a range reads as what was put there."""
    node = await open_node(make_image(MIB, options, content=CONTENT), miss_rate=miss_rate)
    rng = random.Random(1)
    for _ in range(60):
        start = rng.randrange(MIB)
        length = min(rng.choice([1, 512, 5000, 300_000]), MIB - start)
        assert await read(node, start, length) == CONTENT[start : start + length]
        instant = node.try_read(start, length)
        assert instant is None or instant == CONTENT[start : start + length]
    await node.aclose()


async def test_what_is_resident_needs_no_wait() -> None:
    """Data, zero and unallocated clusters are answered without an await, slices included."""
    image = make_image(MIB, commands=("write -P 7 0 64k", "write -z 64k 64k"))
    node = await open_node(image)
    assert node.try_read(0, 4096) == b"\7" * 4096
    assert node.try_read(CLUSTER, 4096) == bytes(4096)
    assert node.try_read(CLUSTER - 512, 4 * CLUSTER) == b"\7" * 512 + bytes(4 * CLUSTER - 512)
    await node.aclose()


async def test_what_is_not_resident_is_declined() -> None:
    """The instant calls answer None and False where the file has to be waited for."""
    node = await open_node(make_image(MIB, content=CONTENT), miss_rate=1.0)
    await read(node, 0, 4096)
    assert node.try_read(0, 4096) is None
    assert not node.try_read_into(0, memoryview(bytearray(4096)))
    await node.aclose()


async def test_contiguous_clusters_are_one_read() -> None:
    """A run of clusters that lie behind each other in the file costs one system call."""
    storage = CountingFile(make_image(MIB, "cluster_size=512", commands=("write -P 1 0 16k",)))
    node = await open_node(storage)
    node.try_read(0, 16 * KIB)
    storage.reads.clear()
    assert node.try_read(0, 16 * KIB) == b"\1" * 16 * KIB
    assert [length for _, length in storage.reads] == [16 * KIB]
    await node.aclose()


async def test_zeros_cost_no_read() -> None:
    """Zero clusters and unallocated ones without a backing file touch no file."""
    storage = CountingFile(make_image(MIB, commands=("write -z 0 64k",)))
    node = await open_node(storage)
    node.try_read(0, 512)
    storage.reads.clear()
    assert node.try_read(0, MIB) == bytes(MIB)
    assert not storage.reads
    await node.aclose()


@pytest.mark.parametrize("backing_length", [512, 300 * KIB + 77, MIB, 2 * MIB])
@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
async def test_backing_file_of_another_length(backing_length: int, miss_rate: float) -> None:
    """A shorter backing file is followed by zeros, a longer one is cut at the disk's end."""
    base = random.Random(2).randbytes(backing_length)
    node = await open_node(make_image(MIB, backing=base), backing=base, miss_rate=miss_rate)
    shown = (base + bytes(MIB))[:MIB]
    assert await read(node, 0, MIB) == shown
    end = min(backing_length, MIB)
    assert (
        await read(node, max(0, end - 700), min(1400, MIB - max(0, end - 700)))
        == (shown[max(0, end - 700) : max(0, end - 700) + 1400])
    )
    instant = node.try_read(0, MIB)
    assert instant is None or instant == shown
    await node.aclose()


@pytest.mark.parametrize("extended", ["", ",extended_l2=on"])
async def test_chain_of_a_hundred_layers(extended: str) -> None:
    """Each layer shows through those above it, without recursion."""
    node: Node = RawNode(MemoryFile(b"\xff" * MIB, read_only=True))
    expected = bytearray(b"\xff" * MIB)
    for layer in range(100):
        start = layer % 16 * CLUSTER + layer * 512
        start = start // 512 * 512 % (MIB - 4096)
        image = make_image(
            MIB,
            f"cluster_size=64k{extended}",
            backing=bytes(MIB),
            commands=(f"write -z {start} 4k",) if layer % 20 == 0 else (),
        )
        top = layer % 20 == 0
        if top:
            # Without the lower layers qemu-io filled whole (sub)clusters from zeros.
            unit = 2 * KIB if extended else CLUSTER
            first = start // unit * unit
            last = (start + 4096 + unit - 1) // unit * unit
            expected[first:last] = bytes(last - first)
        node = await open_node(image, backing=node, read_only=True, cache_size=64 * KIB)
    assert await read(node, 0, MIB) == expected
    assert node.try_read(0, MIB) == expected
    for start in range(0, MIB, CLUSTER):
        assert node.try_read(start, 4096) == expected[start : start + 4096]
    await node.aclose()


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k", "extended_l2=on"])
@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
async def test_compressed_clusters(method: str, options: str, miss_rate: float) -> None:
    """Compressed clusters read as what was compressed, wherever a range begins and ends."""
    image = make_image(
        MIB, f"{options},compression_type={method}", content=CONTENT, compressed=True
    )
    node = await open_node(image, miss_rate=miss_rate)
    kinds = {extent.kind for extent in await node.extents(0, MIB)}
    assert ExtentKind.COMPRESSED in kinds
    assert await read(node, 0, MIB) == CONTENT
    for start, length in ((0, 512), (CLUSTER - 100, 200), (777, 300_000), (MIB - 9, 9)):
        assert await read(node, start, length) == CONTENT[start : start + length]
        instant = node.try_read(start, length)
        assert instant is None or instant == CONTENT[start : start + length]
    await node.aclose()


async def test_large_compressed_cluster_answers_instantly_once_inflated() -> None:
    """A cluster too large to be inflated in passing is waited for once, then remembered."""
    image = make_image(2 * MIB, "cluster_size=2M", content=CONTENT * 2, compressed=True)
    node = await open_node(image)
    assert node.try_read(0, 4096) is None
    assert await read(node, 4096, 4096) == CONTENT[4096:8192]
    assert node.try_read(0, 4096) == CONTENT[:4096]
    await node.aclose()


async def test_inflated_cluster_is_not_used_in_another_generation() -> None:
    """What was inflated is forgotten when host clusters may have been handed out again."""
    image = make_image(2 * MIB, "cluster_size=2M", content=CONTENT * 2, compressed=True)
    node = await open_node(image)
    await read(node, 0, 512)
    assert node.try_read(0, 512) is not None
    node.metadata.requests.advance()
    assert node.try_read(0, 512) is None
    await node.aclose()


async def test_two_readers_inflate_a_cluster_once() -> None:
    """Requests for one compressed cluster at one time share the work."""
    image = make_image(2 * MIB, "cluster_size=2M", content=CONTENT * 2, compressed=True)
    node = await open_node(image, miss_rate=1.0)

    async def reader(start: int) -> None:
        assert await read(node, start, 4096) == CONTENT[start : start + 4096]

    async with trio.open_nursery() as nursery:
        for start in range(0, 65536, 8192):
            nursery.start_soon(reader, start)
    assert node.statistics()["inflated_clusters"] == 1
    await node.aclose()


async def test_damaged_stream_costs_its_cluster_only() -> None:
    """A compressed cluster that cannot be inflated raises CorruptImage; its neighbours read."""
    image = bytearray(make_image(MIB, content=CONTENT, compressed=True))
    node = await open_node(bytes(image))
    extents = [e for e in await node.extents(0, MIB) if e.kind is ExtentKind.COMPRESSED]
    bad = extents[2]
    assert bad.host_offset is not None
    await node.aclose()
    image[bad.host_offset : bad.host_offset + 64] = b"\xff" * 64
    node = await open_node(bytes(image))
    with pytest.raises(CorruptImage):
        await read(node, bad.guest_offset, 512)
    with pytest.raises(CorruptImage):
        node.try_read(bad.guest_offset, 512)
    before = bad.guest_offset - CLUSTER
    assert await read(node, before, CLUSTER) == CONTENT[before : before + CLUSTER]
    assert not node.read_only
    await node.aclose()


@pytest.mark.parametrize(
    "entry",
    [
        1 << 63 | 0x50200,
        1 << 63 | 0x50000 | 2,
        1 << 61 | 0x50000,
    ],
    ids=["unaligned", "reserved low bit", "reserved high bit"],
)
async def test_damaged_entry_costs_its_cluster_only(entry: int) -> None:
    """An entry that breaks a rule raises CorruptImage for ranges that touch it, no others."""
    image = make_image(MIB, commands=("write -P 3 0 1M",))
    node = await open_node(with_entry(image, 3 * CLUSTER, entry))
    with pytest.raises(CorruptImage, match="L2 entry 3"):
        node.try_read(3 * CLUSTER + 512, 512)
    with pytest.raises(CorruptImage, match="L2 entry 3"):
        await read(node, 2 * CLUSTER, 3 * CLUSTER)
    assert await read(node, 0, 3 * CLUSTER) == b"\3" * 3 * CLUSTER
    assert node.try_read(4 * CLUSTER, 512) == b"\3" * 512
    await node.aclose()


async def test_data_past_the_end_of_the_file_is_zeros() -> None:
    """A cluster beyond the end of the file, or half in it, reads as zeros there."""
    image = make_image(MIB, commands=("write -P 3 0 128k",))
    node = await open_node(image[: len(image) - 1000], read_only=True)
    assert await read(node, 128 * KIB - 1024, 1024) == b"\3" * 24 + bytes(1000)
    await node.aclose()


@pytest.mark.parametrize(("start", "length"), [(MIB, 1), (MIB - 1, 2), (-1, 1), (MIB + 1, 0)])
async def test_range_outside_the_disk(start: int, length: int) -> None:
    """A range that is not inside the disk raises BadRequest, waiting or not."""
    node = await open_node(make_image())
    with pytest.raises(BadRequest):
        node.try_read(start, length)
    with pytest.raises(BadRequest):
        await read(node, start, length)
    with pytest.raises(BadRequest):
        await node.extents(start, length)
    await node.aclose()


@pytest.mark.parametrize("compressed", [False, True])
async def test_waiting_read_holds_its_generation(compressed: bool) -> None:
    """While a read waits with a host offset, no cluster freed since may be handed out."""
    content = CONTENT[:CLUSTER] * 2
    storage = HeldFile(make_image(2 * CLUSTER, content=content, compressed=compressed))
    node = await open_node(storage)
    await read(node, 0, 2 * CLUSTER)
    node.metadata.requests.advance()
    storage.release = trio.Event()
    requests = node.metadata.requests

    async def reader() -> None:
        assert await read(node, 0, 2 * CLUSTER) == content

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        freed_at = requests.advance()
        assert requests.oldest() < freed_at
        storage.release.set()
    assert requests.oldest() == freed_at
    storage.release = None
    await node.aclose()


async def test_extents_have_no_gaps_and_join() -> None:
    """Runs of one kind are one extent; a limit cuts the list, never an extent in it."""
    image = make_image(
        MIB, commands=("write -P 1 0 256k", "write -z 256k 128k", "write -P 2 512k 64k")
    )
    node = await open_node(image)
    found = [(extent.kind, extent.guest_offset, extent.length) for extent in
             await node.extents(0, MIB)]  # fmt: skip
    assert found == [
        (ExtentKind.DATA, 0, 256 * KIB),
        (ExtentKind.ZERO, 256 * KIB, 128 * KIB),
        (ExtentKind.UNALLOCATED, 384 * KIB, 128 * KIB),
        (ExtentKind.DATA, 512 * KIB, 64 * KIB),
        (ExtentKind.UNALLOCATED, 576 * KIB, 448 * KIB),
    ]
    first = (await node.extents(512, MIB - 512, limit=1))[0]
    assert first.host_offset == (entry_of(node, 0)[0] & OFFSET_MASK) + 512
    assert first.length == 256 * KIB - 512
    await node.aclose()
