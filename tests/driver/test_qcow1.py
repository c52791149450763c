"""The node of qcow version 1: the contract suite, discards, commits, keys, growing, failures."""

import errno
import os
import random
import struct
import subprocess
import tempfile
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.errors import (
    BadRequest,
    CorruptImage,
    KeyRequired,
    QcowfsError,
    ReadOnlyImage,
    UnsupportedFeature,
)
from tests.driver import contract
from tests.driver.format_model import OPERATIONS, SEED, FormatModel, replay_crashes
from tests.driver.qcow1_images import (
    check,
    compressed_image,
    empty_image,
    filled_image,
    header_of,
    make_node_of,
    open_file,
)
from tests.fakes import CrashFile, FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]

SHAPES: dict[str, dict[str, object]] = {
    "qemu": {},
    "overlay": {"cluster_bits": 9, "l2_bits": 12},
    "one-cluster-tables": {"cluster_bits": 16, "l2_bits": 13},
    "small-tables": {"cluster_bits": 9, "l2_bits": 6},
    "tables-smaller-than-clusters": {"cluster_bits": 16, "l2_bits": 6},
    "aes": {"encrypted": True},
    "aes-64k": {"encrypted": True, "cluster_bits": 16, "l2_bits": 6},
}


def _empty(shape: str) -> Callable[[int], bytes]:
    return lambda size: empty_image(size, **SHAPES[shape])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract(rule: Check, shape: str) -> None:
    """A node of any cluster and table size, encrypted or not, keeps the contract of nodes."""
    await rule(make_node_of(_empty(shape)))


@pytest.mark.parametrize("shape", ["qemu", "overlay", "aes"])
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract_where_little_is_at_once(rule: Check, shape: str) -> None:
    """The contract holds where bytes are rarely resident and writes are refused inline."""
    await rule(make_node_of(_empty(shape), miss_rate=0.6, refusal_rate=0.6))


@pytest.mark.parametrize("rates", [0.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
async def test_overlay(shape: str, rates: float) -> None:
    """Over a shorter backing file its bytes show until they are changed, and never again after."""

    async def make_overlay(backing: bytes, size: int) -> Node:
        image = empty_image(size, backing_file=b"base", **SHAPES[shape])  # type: ignore[arg-type]
        file = MemoryFile(image, miss_rate=rates, refusal_rate=rates)
        return await open_file(file, backing=RawNode(MemoryFile(backing, read_only=True)))

    await contract.check_overlay(make_overlay)


# The model, crashes


@dataclass(frozen=True)
class ModelCase:
    """An image to begin with; `layer` is none, shorter or longer."""

    name: str
    shape: dict[str, object]
    layer: str = "none"
    compressed: bool = False
    size: int = 400 * 1024 + 512


CASES = (
    ModelCase("plain", {}),
    ModelCase("small-tables-shorter", {"cluster_bits": 9, "l2_bits": 6}, "shorter"),
    ModelCase("overlay-longer", {"cluster_bits": 9, "l2_bits": 12}, "longer"),
    ModelCase("compressed", {}, compressed=True),
    ModelCase("compressed-64k-shorter", {"cluster_bits": 16, "l2_bits": 6}, "shorter", True),
    ModelCase("aes", {"encrypted": True}),
    ModelCase("aes-compressed-longer", {"encrypted": True, "cluster_bits": 13}, "longer", True),
)


def model_of(case: ModelCase) -> FormatModel:
    """The model of a case, judged by the checker, and by QEMU where that needs no more files."""
    rng = random.Random(21)
    layer = None
    if case.layer != "none":
        length = case.size * (3 if case.layer == "shorter" else 7) // 5 // 512 * 512
        layer = contract.pattern(length, seed=8)
    image = empty_image(case.size, backing_file=b"base" if layer else None, **case.shape)  # type: ignore[arg-type]
    content = bytearray((layer or b"")[: case.size].ljust(case.size, b"\0"))
    if case.compressed:
        unit = header_of(image).cluster_size
        text = b"".join(rng.randbytes(16) * 32 for _ in range(case.size // 512))
        image = compressed_image(image, text)
        for start in range(0, case.size, 2 * unit):
            content[start : start + unit] = text[start : start + unit]

    async def open_one(file: MemoryFile) -> Node:
        backing = None if layer is None else RawNode(MemoryFile(layer, read_only=True))
        return await open_file(file, backing=backing)

    async def judge(image: bytes, content: bytes) -> None:
        report = await check(image)
        assert not report.problems, report.problems
        if layer is None and "encrypted" not in case.shape:
            assert seen_by_qemu(image) == content
        else:
            node = await open_one(MemoryFile(image, read_only=True))
            assert await contract.whole(node) == content
            await node.aclose()

    return FormatModel(image, content, header_of(image).cluster_size, open_one, judge)


def seen_by_qemu(image: bytes) -> bytes:
    """The disk's bytes as qemu-img reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path, raw = Path(folder) / "image", Path(folder) / "raw"
        path.write_bytes(image)
        command = ["qemu-img", "convert", "-f", "qcow", "-O", "raw", str(path), str(raw)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=120)
        return raw.read_bytes()


@pytest.fixture
def _one_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks take turns by the seed, as far as no thread is waited for."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True, raising=False)
    monkeypatch.setattr("trio._core._run._r", random.Random(SEED), raising=False)


@pytest.mark.timeout(max(300, OPERATIONS))
@pytest.mark.usefixtures("_one_order_of_tasks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_the_image_is_what_the_model_is(case: ModelCase) -> None:
    """After any steps the disk shows the model's bytes, and the checker finds nothing."""
    await model_of(case).run()


async def _problem(state: bytes) -> str | None:
    report = await check(state)
    return "; ".join(report.problems) or None


async def _crashes(case: str, **options: object) -> list[str]:
    model = model_of(next(one for one in CASES if one.name == case))
    stamped = b"".join(struct.pack("<Q", 1 << 24 | n) * 64 for n in range(800))
    node = await model.open_file(file := MemoryFile(model.image))
    await node.write_zeroes(0, node.virtual_size)
    await node.write_from(0, stamped[: 500 * 512])
    await node.aclose()
    content = stamped[: 500 * 512].ljust(len(model.content), b"\0")
    return await replay_crashes(
        bytes(file.content), content, model.open_file, _problem, **options  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("case", ["plain", "small-tables-shorter", "compressed", "aes"])
async def test_a_crash_leaks_at_worst(case: str) -> None:
    """No corruption, nothing durable lost, nothing that was never written, in any state."""
    failures = await _crashes(case)
    assert not failures, "\n".join(failures[:5])


async def test_the_judge_notices_lost_flushes() -> None:
    """With every second flush dropped from the log, damage is found."""
    assert await _crashes("plain", count=200, drop_every_second_sync=True)


# What the format asks of a writer


async def test_a_commit_writes_in_order() -> None:
    """New tables and data, a sync, entries that show them, a sync; in place only one sync."""
    file = CrashFile(empty_image(8 << 20))
    node = await open_file(file)
    await node.write_from(0, b"x" * 4096)
    await node.flush()
    l1_end = header_of(file.content).l1_table_offset + 8
    steps = [(step.kind, step.host_offset) for step in file.log]
    table, data = 4096, 8192
    assert steps == [
        ("pwrite", table),
        ("pwrite", data),
        ("pwrite", table),
        ("sync", 0),
        ("pwrite", l1_end - 8),
        ("sync", 0),
    ]
    await node.write_from(4096, b"y" * 4096)
    await node.write_from(100, b"z")
    await node.flush()
    steps = [(step.kind, step.host_offset) for step in file.log[6:]]
    assert steps == [
        ("pwrite", 12288),
        ("pwrite", data + 100),
        ("sync", 0),
        ("pwrite", table + 8),
        ("sync", 0),
    ]
    await node.write_from(100, b"z")
    await node.flush()
    assert [step.kind for step in file.log[11:]] == ["pwrite", "sync"]
    await node.aclose()


async def test_a_commit_that_failed_half_way() -> None:
    """Once an L1 entry may be in the file, entries of its table follow their data and a sync."""
    crash = CrashFile(empty_image(8 << 20))
    file = FaultyFile(crash)
    node = await open_file(file)
    await node.write_from(0, b"x" * 4096)
    file.fail("write", 2, errno.EIO, written=8)
    with pytest.raises(OSError, match="rror"):
        await node.flush()
    assert struct.unpack_from(">Q", crash.content, 48)[0] == 4096
    start = crash.position
    await node.write_from(4096, b"y" * 4096)
    await node.flush()
    steps = [(step.kind, step.host_offset) for step in crash.log[start:]]
    assert steps == [
        ("pwrite", 12288),
        ("sync", 0),
        ("pwrite", 4096),
        ("pwrite", 48),
        ("sync", 0),
    ]
    await node.aclose()


async def test_neighbours_become_one_run() -> None:
    """A long write and writes that follow each other lie side by side in the file."""
    node = await open_file(MemoryFile(empty_image(8 << 20)))
    await node.write_from(0, b"a" * 100_000)
    await node.write_from(102_400, b"b" * 100_000)
    extents = await node.extents(0, 200_000)
    assert [extent.kind for extent in extents] == [ExtentKind.DATA]
    await node.aclose()


async def test_a_discarded_cluster_gives_its_room_back_once_that_is_durable() -> None:
    """Without a backing file an entry becomes 0; its place is punched after the commit."""
    file = FaultyFile(MemoryFile(await filled_image(b"d" * 65536, empty_image(65536))))
    node = await open_file(file)
    await node.discard(4096, 8192)
    assert file.calls["punch"] == 0
    extents = await node.extents(0, 65536)
    assert [(extent.kind, extent.length) for extent in extents][1] == (ExtentKind.UNALLOCATED, 8192)
    await node.flush()
    assert file.calls["punch"] == 1
    assert await contract.whole(node) == b"d" * 4096 + bytes(8192) + b"d" * (65536 - 12288)
    await node.aclose()


async def test_an_encrypted_cluster_is_not_punched_under_its_reader() -> None:
    """Who looked a cluster up before it was discarded reads what it was, or zeros, never noise."""

    class SlowFile(MemoryFile):
        async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
            if slow:
                reading.set()
                await going_on.wait()
            await super().pread_into(buffers, host_offset)

    reading, going_on, slow = trio.Event(), trio.Event(), False
    file = SlowFile(empty_image(65536, encrypted=True))
    node = await open_file(file)
    await node.write_from(0, b"e" * 65536)
    await node.flush()
    file.miss_rate, slow = 1.0, True
    buffer = bytearray(65536)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.read_into, 0, memoryview(buffer))
        await reading.wait()
        await node.discard(0, 65536)
        await node.flush()
        going_on.set()
    assert buffer == b"e" * 65536
    await node.aclose()
    assert not any(file.content[8192:])


async def test_a_backing_file_that_is_not_open_is_not_revealed_later() -> None:
    """Opened without its backing file, zeroed clusters are zeros when it is there again."""
    file = MemoryFile(empty_image(65536, backing_file=b"base"))
    node = await open_file(file)
    await node.write_from(0, b"n" * 16384)
    await node.write_zeroes(4096, 4096)
    await node.write_zeroes(32768, 4096)
    await node.discard(8192, 4096)
    await node.aclose()
    again = MemoryFile(bytes(file.content))
    node = await open_file(again, backing=RawNode(MemoryFile(b"S" * 65536, read_only=True)))
    wanted = bytearray(b"S" * 65536)
    wanted[:16384] = b"n" * 16384
    wanted[4096:12288] = bytes(8192)
    wanted[32768:36864] = bytes(4096)
    assert await contract.whole(node) == wanted
    await node.aclose()


async def test_a_small_cache_commits_on_its_way() -> None:
    """More changed tables than the budget allows are written before more are changed."""
    size = 64 << 20
    file = MemoryFile(empty_image(size, cluster_bits=9, l2_bits=6))
    node = await open_file(file, cache_size=4096)
    for start in range(0, size, 1 << 20):
        await contract.write(node, start, b"c" * 512)
    assert node.statistics()["dirty_slices"] <= 8
    assert node.statistics()["commits"] > 0
    for start in range(0, size, 1 << 20):
        assert await contract.read(node, start, 1024) == b"c" * 512 + bytes(512)
    await node.aclose()
    assert not (await check(file.content)).problems


async def test_growing_moves_the_table_and_never_reveals() -> None:
    """The longer L1 table is new; what lay behind the old end of the disk becomes zeros."""
    size = 8192 + 512
    file = MemoryFile(await filled_image(b"g" * size, empty_image(size)))
    # Bytes behind the end of the disk in its last cluster, as another program may leave them.
    start = file.content.rindex(b"g") + 1
    file.content[start : start + 512] = b"!" * 512
    node = await open_file(file)
    for wrong in (4096, size + 100):
        with pytest.raises(BadRequest, match="grow"):
            await node.grow(wrong)
    for larger in (10_240, 64 << 20):
        await node.grow(larger)
        assert node.virtual_size == larger
        await node.write_from(larger - 1, b"e")
    await node.aclose()
    content = (b"g" * size).ljust(10_239, b"\0") + b"e"
    node = await open_file(MemoryFile(bytes(file.content)))
    assert await contract.read(node, 0, 10_240) == content
    assert await contract.read(node, (64 << 20) - 2, 2) == b"\0e"
    await node.aclose()
    assert not (await check(file.content)).problems
    overlay = await open_file(
        MemoryFile(empty_image(8192, backing_file=b"b")), backing=RawNode(MemoryFile(bytes(9216)))
    )
    with pytest.raises(UnsupportedFeature, match="longer"):
        await overlay.grow(16384)
    await overlay.aclose()


# Keys


async def test_an_encrypted_image_needs_a_key() -> None:
    """No key is KeyRequired; the key is the first 16 bytes of the passphrase, zero padded."""
    file = MemoryFile(empty_image(65536, encrypted=True))
    with pytest.raises(KeyRequired, match="passphrase"):
        await open_file(file, key=None)
    node = await open_file(file, key=b"short")
    await node.write_from(1000, b"secret text")
    await node.aclose()
    assert b"secret" not in file.content
    for key, is_right in ((b"short\0\0", True), (b"other", False)):
        node = await open_file(MemoryFile(bytes(file.content), read_only=True), key=key)
        assert (await contract.read(node, 1000, 11) == b"secret text") is is_right
        await node.aclose()


# Failures and broken images


@pytest.mark.expects_warnings
async def test_a_failed_sync_is_final() -> None:
    """After a failed sync the node is read-only; no entry was written."""
    inner = MemoryFile(empty_image(65536))
    file = FaultyFile(inner)
    node = await open_file(file)
    await node.write_from(0, b"x" * 512)
    file.fail("sync", error_number=errno.EIO)
    with pytest.raises(OSError, match="rror"):
        await node.flush()
    assert node.read_only
    with pytest.raises(ReadOnlyImage, match="since an error"):
        await node.write_from(0, b"y")
    assert (await check(inner.content)).l2_tables == 0
    await node.aclose()


@pytest.mark.parametrize("nth", range(1, 8))
async def test_a_full_host(nth: int) -> None:
    """A write or a commit that finds no room answers ENOSPC; all else stays and can go on."""
    inner = MemoryFile(empty_image(1 << 20))
    file = FaultyFile(inner)
    node = await open_file(file)
    model = bytearray(1 << 20)
    await node.write_from(0, b"a" * 8192)
    model[:8192] = b"a" * 8192
    file.fail("write", nth, errno.ENOSPC, written=700)
    failed = 0
    for start in (4096, 65536, 70_000, 300_000):
        data = bytes([start % 251]) * 5000
        try:
            await contract.write(node, start, data)
            await node.flush()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed += 1
            await contract.write(node, start, data)
        model[start : start + 5000] = data
    assert failed == 1
    assert not node.read_only
    assert await contract.whole(node) == model
    await node.aclose()
    assert seen_by_qemu(bytes(inner.content)) == model
    assert not (await check(inner.content)).problems


async def _broken(l1: int = 4096, l2: int = 0) -> bytes:
    """An image of one table, at 4096, with these first entries."""
    image = bytearray(empty_image(1 << 20)).ljust(16384, b"\0")
    struct.pack_into(">Q", image, 48, l1)
    struct.pack_into(">Q", image, 4096, l2)
    return bytes(image)


@pytest.mark.parametrize(
    ("l1", "l2", "cause"),
    [
        (1 << 40, 0, "outside the file"),
        (8, 0, "outside the file"),
        (1 << 63, 0, "outside the file"),
        (4096, 8200, "not aligned"),
        (4096, 1 << 40, "outside the file"),
        (4096, (1 << 63) | 8192, "no compressed stream"),
        (4096, (1 << 63) | (100 << 51) | (1 << 40), "no compressed stream"),
    ],
)
async def test_a_bad_entry_costs_its_range(l1: int, l2: int, cause: str) -> None:
    """Reading through it is EIO for its range alone; the image is not opened for writing."""
    image = await _broken(l1, l2)
    with pytest.raises(CorruptImage, match="not opened for writing"):
        await open_file(MemoryFile(image))
    node = await open_file(MemoryFile(image, read_only=True))
    with pytest.raises(CorruptImage, match=cause):
        await node.read_into(0, memoryview(bytearray(512)))
    if l1 == 4096:
        assert await contract.read(node, 4096, 4096) == bytes(4096)
    await node.aclose()


@pytest.mark.parametrize("l2", [512, 4096, 4096 + 3584, 1024])
async def test_guest_data_never_runs_over_tables(l2: int) -> None:
    """An entry that leads into the header or a table is found before anything is written."""
    image = await _broken(4096, l2)
    is_sound = l2 in {512, 1024} and l2 + 4096 <= 4096
    assert not is_sound
    with pytest.raises(CorruptImage, match="overlap"):
        await open_file(MemoryFile(image))
    assert (await check(image)).problems


async def test_the_checker_finds_shared_clusters() -> None:
    """Two entries of one cluster, and a stream inside one, are problems; leaks are counted."""
    image = bytearray(await filled_image(b"s" * 16384, empty_image(1 << 20)))
    report = await check(image)
    assert (report.problems, report.data_clusters, report.l2_tables) == ([], 4, 1)
    unused = report.unused_length
    image.extend(bytes(4096))
    assert (await check(image)).unused_length == unused + 4096
    entry = struct.unpack_from(">Q", image, 4096)[0]
    struct.pack_into(">Q", image, 4096 + 8, entry)
    assert "overlap each other" in (await check(image)).problems[0]


async def test_two_tables_in_one_place_are_not_written_to() -> None:
    """Two L1 entries for one table would let one guest write appear in two places."""
    image = bytearray(await filled_image(b"s" * 4096, empty_image(8 << 20)))
    image[56:64] = image[48:56]
    with pytest.raises(CorruptImage, match="tables overlap"):
        await open_file(MemoryFile(bytes(image)))
    node = await open_file(MemoryFile(bytes(image), read_only=True))
    assert await contract.read(node, 2 << 20, 4096) == b"s" * 4096
    await node.aclose()


async def test_damaged_streams() -> None:
    """A stream that is cut, too short or no deflate at all is EIO for its cluster alone."""
    text = b"text " * 4096
    image = bytearray(compressed_image(empty_image(16384), text[:16384]))
    entry = struct.unpack_from(">Q", image, 4096)[0]
    host_offset, length = header_of(image).compressed_location(entry)
    image[host_offset : host_offset + length] = b"\xff" * length
    node = await open_file(MemoryFile(bytes(image), read_only=True))
    with pytest.raises(CorruptImage, match="compressed cluster"):
        await node.read_into(0, memoryview(bytearray(100)))
    assert await contract.read(node, 8192, 4096) == text[8192:12288]
    await node.aclose()


MUTATIONS = int(os.environ.get("QCOWFS_FUZZ_MUTATIONS", "300"))


async def test_mutated_images() -> None:
    """Any header and tables give bytes or an error of the caller's, in little memory."""
    rng = random.Random(17)
    whole = compressed_image(empty_image(70_000 // 512 * 512), b"fuzz" * 17_500)
    tracemalloc.start()
    try:
        for number in range(MUTATIONS):
            image = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                tables = (48, 64), (4096, 4256), (0, len(image)), (0, 48)
                at = rng.randrange(*rng.choice(tables))
                image[at] = rng.choice((0, 1, 9, 16, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            if rng.random() < 0.1:
                del image[rng.randrange(len(image)) :]
            try:
                node = await open_file(MemoryFile(bytes(image), read_only=number % 2 == 0))
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
        start = rng.randrange(node.virtual_size) if node.virtual_size else 0
        length = min(rng.choice((1, 512, 65536)), node.virtual_size - start)
        try:
            await node.extents(0, node.virtual_size, limit=50)
            await contract.read(node, start, length)
            if not node.read_only:
                await contract.write(node, start, bytes(length))
                await node.write_zeroes(start, length)
                await node.discard(start, length)
                await node.flush()
        except (QcowfsError, OSError) as error:
            assert "\n" not in str(error)
    await node.aclose()
