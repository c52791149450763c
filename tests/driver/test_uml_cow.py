"""The node of COW images: the contract suite over all layouts, commits, sparseness, failures."""

import errno
import os
import random
import struct
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.uml_cow import LAYOUTS, parse_cow_header
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.errors import QcowfsError, ReadOnlyImage, UnsupportedFeature
from tests.driver import contract
from tests.driver.cow_images import empty_image, make_node_of, open_file
from tests.driver.format_model import OPERATIONS, SEED, FormatModel, replay_crashes
from tests.fakes import CrashFile, FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]
NAMES = [layout.name for layout in LAYOUTS]


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("layout", ["qemu-2-64", "uml-3"])
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract(rule: Check, layout: str, rate: float) -> None:
    """A COW node keeps the contract of nodes, whether or not it must wait."""
    await rule(make_node_of(layout, rate))


@pytest.mark.parametrize("layout", NAMES)
async def test_contract_in_every_layout(layout: str) -> None:
    """Headers of all versions and structures lead to the same disk."""
    for rule in (contract.check_reads, contract.check_writes, contract.check_zeroes):
        await rule(make_node_of(layout))


async def test_contract_with_larger_sectors() -> None:
    """User-mode-Linux lets the header choose the sector; a part of one is filled up."""
    for rule in contract.CHECKS:
        await rule(make_node_of("uml-3", sector_length=4096))


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("sector_length", [512, 4096])
async def test_overlay(sector_length: int, rate: float) -> None:
    """Over a shorter backing file its bytes show until they are changed, and never again after."""

    async def make_overlay(backing: bytes, size: int) -> Node:
        file = MemoryFile(
            empty_image("uml-3", size, sector_length=sector_length),
            miss_rate=rate,
            refusal_rate=rate,
        )
        return await open_file(file, backing=RawNode(MemoryFile(backing, read_only=True)))

    await contract.check_overlay(make_overlay)


# The model, crashes

MODEL_SIZE = 400 * 1024 + 512
# (layout, bytes of sectors, length of the backing file or 0)
CASES = (
    ("qemu-2-64", 512, 0),
    ("qemu-2-32", 512, 700 * 512),
    ("uml-3", 512, 1000 * 512),
    ("uml-3", 4096, 500 * 512),
    ("uml-2-64", 512, 500 * 512),
    ("uml-1-32", 512, 0),
)


def shown_by_the_rules(image: bytes, layer: bytes) -> bytes:
    """The disk's bytes, sector by sector, by what the format says of bits and places."""
    header = parse_cow_header(image[:65536], len(image))
    pieces = []
    for sector in range(header.disk_size // 512):
        bit = sector * 512 // header.sector_length
        start = sector * 512
        if image[header.bitmap_offset + bit // 8] >> bit % 8 & 1:
            place = header.data_offset + start
            pieces.append(image[place : place + 512].ljust(512, b"\0"))
        else:
            pieces.append(layer[start : start + 512].ljust(512, b"\0"))
    return b"".join(pieces)


def model_of(layout: str, sector_length: int, layer_length: int) -> FormatModel:
    """The model of a case, judged by the rules of the format."""
    layer = contract.pattern(layer_length, seed=8)
    image = empty_image(
        layout, MODEL_SIZE, backing_file=b"/base" if layer or layout == "uml-3" else None,
        sector_length=sector_length,
    )  # fmt: skip

    async def open_one(file: MemoryFile) -> Node:
        backing = RawNode(MemoryFile(layer, read_only=True)) if layer else None
        return await open_file(file, backing=backing)

    async def judge(image: bytes, content: bytes) -> None:
        assert shown_by_the_rules(image, layer) == content

    content = bytearray(layer[:MODEL_SIZE].ljust(MODEL_SIZE, b"\0"))
    return FormatModel(image, content, 4096, open_one, judge)


@pytest.fixture
def _one_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks take turns by the seed, as far as no thread is waited for."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True, raising=False)
    monkeypatch.setattr("trio._core._run._r", random.Random(SEED), raising=False)


@pytest.mark.timeout(max(300, OPERATIONS))
@pytest.mark.usefixtures("_one_order_of_tasks")
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_the_image_is_what_the_model_is(case: tuple[str, int, int]) -> None:
    """After any steps the bits and sectors show the model's bytes."""
    await model_of(*case).run()


async def _problem(state: bytes) -> str | None:
    return None


async def _crashes(case: tuple[str, int, int], **options: int) -> list[str]:
    model = model_of(*case)
    sectors = b"".join(struct.pack("<Q", 1 << 24 | n) * 64 for n in range(MODEL_SIZE // 512))
    node = await model.open_file(file := MemoryFile(model.image))
    await node.write_zeroes(0, node.virtual_size)
    await node.write_from(0, sectors[: 500 * 512])
    await node.aclose()
    content = sectors[: 500 * 512].ljust(MODEL_SIZE, b"\0")
    return await replay_crashes(
        bytes(file.content), content, model.open_file, _problem, **options
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
async def test_a_crash_loses_nothing_durable(case: tuple[str, int, int]) -> None:
    """Nothing durable lost and nothing that was never written, in any state."""
    failures = await _crashes(case)
    assert not failures, "\n".join(failures[:5])


async def test_the_judge_notices_lost_flushes() -> None:
    """With every second flush dropped from the log, damage is found."""
    assert await _crashes(CASES[0], count=200, drop_every_second_sync=True)


# What the format asks of a writer


async def test_data_is_durable_before_its_bit() -> None:
    """A commit syncs, writes bits, and syncs again; without new bits it syncs once."""
    file = CrashFile(empty_image("uml-3", MODEL_SIZE))
    node = await open_file(file)
    await node.write_from(0, b"x" * 1024)
    await node.flush()
    header = node.header
    kinds = [
        (step.kind, step.host_offset >= header.data_offset)
        for step in file.log
    ]
    assert kinds == [("pwrite", True), ("sync", False), ("pwrite", False), ("sync", False)]
    await node.write_from(512, b"y" * 512)
    await node.flush()
    assert [step.kind for step in file.log[4:]] == ["pwrite", "sync"]
    await node.aclose()


async def test_zeroing_leaves_a_sparse_file_sparse() -> None:
    """Over a backing file zeros are a hole with its bits set; nothing is written where none is."""
    layer = b"b" * MODEL_SIZE
    file = FaultyFile(MemoryFile(empty_image("uml-3", MODEL_SIZE)))
    node = await open_file(file, backing=RawNode(MemoryFile(layer, read_only=True)))
    await node.write_zeroes(4096, 65536)
    assert file.calls["punch"] == 1
    assert file.calls["write_zeroes"] == file.calls["try_pwrite"] == file.calls["pwrite"] == 0
    assert await contract.read(node, 4000, 70000) == b"b" * 96 + bytes(65536) + b"b" * 4368
    await node.aclose()
    file = FaultyFile(MemoryFile(empty_image("uml-3", MODEL_SIZE)))
    node = await open_file(file)
    await node.discard(0, MODEL_SIZE)
    assert file.calls["punch"] == 0
    await node.aclose()


async def test_sectors_without_a_bit() -> None:
    """What an old version left without bits reads as its backing file and cannot be written."""
    sectors = (4608 - 4128) * 8 + 3
    layer = b"k" * (sectors * 512)
    node = await open_file(
        MemoryFile(empty_image("uml-2-64", sectors * 512)),
        backing=RawNode(MemoryFile(layer, read_only=True)),
    )
    end = (sectors - 3) * 512
    await node.write_from(end - 512, b"w" * 512)
    assert await contract.read(node, end - 512, 1024) == b"w" * 512 + b"k" * 512
    for change in (node.write_from(end, b"w"), node.write_zeroes(end - 512, 1024)):
        with pytest.raises(UnsupportedFeature, match="no bits"):
            await change
    extents = await node.extents(end - 512, 4 * 512)
    assert [extent.kind for extent in extents] == [ExtentKind.DATA, ExtentKind.UNALLOCATED]
    await node.aclose()


@pytest.mark.expects_warnings
async def test_a_failed_sync_is_final() -> None:
    """After a failed sync the node is read-only; its bits are not written."""
    inner = MemoryFile(empty_image("uml-3", MODEL_SIZE))
    file = FaultyFile(inner)
    node = await open_file(file)
    await node.write_from(0, b"x" * 512)
    file.fail("sync", error_number=errno.EIO)
    with pytest.raises(OSError, match="rror"):
        await node.flush()
    assert node.read_only
    with pytest.raises(ReadOnlyImage, match="since an error"):
        await node.write_from(0, b"y")
    assert not inner.content[node.header.bitmap_offset]
    await node.aclose()


async def test_a_failed_commit_is_tried_again() -> None:
    """An error while bits are written leaves them to the next flush."""
    inner = MemoryFile(empty_image("uml-3", MODEL_SIZE))
    file = FaultyFile(inner)
    node = await open_file(file)
    await node.write_from(0, b"x" * 512)
    file.fail("write", error_number=errno.ENOSPC)
    with pytest.raises(OSError, match="space"):
        await node.flush()
    assert not node.read_only
    await node.flush()
    assert inner.content[node.header.bitmap_offset] == 1
    await node.aclose()


MUTATIONS = int(os.environ.get("QCOWFS_FUZZ_MUTATIONS", "300"))


async def test_mutated_images() -> None:
    """Any header gives bytes or an error of the caller's, in little memory."""
    rng = random.Random(19)
    tracemalloc.start()
    try:
        for number in range(MUTATIONS):
            layout = LAYOUTS[number % len(LAYOUTS)]
            image = bytearray(empty_image(layout.name, 70_144))
            for _ in range(rng.randint(1, 4)):
                fields = (0, layout.mtime_offset, layout.size_offset, layout.sector_offset)
                field = rng.choice((*fields, rng.randrange(layout.length)))
                image[field + rng.randrange(8)] = rng.choice((0, 1, 2, 0x10, 0x80, 0xFF))
            try:
                file = MemoryFile(bytes(image), read_only=number % 2 == 0)
                node = await open_file(file)
            except QcowfsError as error:
                assert "\n" not in str(error)
                continue
            await _use(node, rng)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


async def _use(node: Node, rng: random.Random) -> None:
    """Read, map and change some of a disk of which nothing is known."""
    for _ in range(4):
        # In memory a file is as long as its last byte: writes stay near the beginning.
        start = rng.randrange(min(node.virtual_size, 1 << 20))
        length = min(rng.choice((1, 512, 65536)), node.virtual_size - start)
        try:
            await node.extents(0, node.virtual_size, limit=50)
            await contract.read(node, node.virtual_size - 1, 1)
            await contract.read(node, start, length)
            if not node.read_only:
                await contract.write(node, start, bytes(length))
                await node.write_zeroes(start, length)
                await node.discard(start, length)
                await node.flush()
        except (QcowfsError, OSError) as error:
            assert "\n" not in str(error)
    await node.aclose()
