"""A model of a qcow2 image: bytes for the disk and each snapshot, and steps tried on both.

A step is plain data, so that a list of steps can be made by a seed, drawn, and
cut down; what a step does inside comes from its own seed. The image is opened
now as a file, now in memory where the driver has to wait often. Whenever it is
closed, qemu-img judges it: no error, no leak, and the model's bytes in the
disk and in every snapshot. QEMU itself may then change it, and is believed.

Invariant: between two steps the model is what the image has to show. Of a
discard, each cluster may read as before or as zeros: what it is, is adopted.
"""

import json
import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Buffer, Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.qcow2.create import create_qcow2
from qcowfs.driver.qcow2.image import Qcow2Node, SnapshotNode, open_qcow2
from qcowfs.errors import AlreadyExists, BadRequest, ImageFull, NotFound, ReadOnlyImage
from tests.fakes import MemoryFile

KIB = 1 << 10
MIB = 1 << 20
SECTOR = 512
# Unaligned sizes: the last cluster of a disk is not whole.
SIZES = {
    512: 400 * KIB + SECTOR,
    4 * KIB: 1200 * KIB + 3 * SECTOR,
    16 * KIB: 2 * MIB + SECTOR,
    64 * KIB: 3 * MIB + 9 * SECTOR,
    2 * MIB: 7 * MIB + SECTOR,
}
SNAPSHOT_LIMITS = {512: 12, 2 * MIB: 3}
CACHE_SIZES = (64 * KIB, 256 * KIB, MIB, 32 * MIB)
CHUNK = 64 * KIB


@dataclass(frozen=True)
class Shape:
    """A kind of image to begin with.

    `backing` is none, raw (shorter than the disk) or qcow2 (longer); `start` is
    empty, compressed, dense (many compressed clusters in one), filled (half of
    it data) or preallocated.
    """

    cluster_size: int
    version: int = 3
    extended_l2: bool = False
    refcount_bits: int = 16
    backing: str = "none"
    start: str = "empty"
    compression_type: str = "zlib"
    size: int = 0

    @property
    def name(self) -> str:
        """What names it in test ids."""
        unit = f"{self.cluster_size // KIB}k" if self.cluster_size >= KIB else "512"
        return "-".join(
            (unit, f"v{self.version}{'x' if self.extended_l2 else ''}", f"r{self.refcount_bits}",
             self.backing, self.start)
        )  # fmt: skip

    @property
    def disk_size(self) -> int:
        """The size of the disk in the beginning."""
        return self.size or SIZES[self.cluster_size]

    @property
    def options(self) -> str:
        """What qemu-img create takes after -o."""
        options = [f"cluster_size={self.cluster_size}"]
        if self.version == 2:
            options.append("compat=0.10")
        else:
            options.append(f"refcount_bits={self.refcount_bits}")
            options.append(f"compression_type={self.compression_type}")
        if self.extended_l2:
            options.append("extended_l2=on")
        return ",".join(options)


def all_shapes() -> Iterator[Shape]:
    """Every cluster size with every kind of entry and width, each over two of the beginnings."""
    layers = [(backing, start) for start in ("empty", "compressed", "preallocated")
              for backing in ("none", "raw", "qcow2")]  # fmt: skip
    number = 0
    for cluster_size in SIZES:
        kinds = [(2, False, 16)] + [(3, False, bits) for bits in (1, 8, 16, 64)]
        if cluster_size >= 16 * KIB:
            kinds += [(3, True, bits) for bits in (1, 8, 16, 64)]
        for version, extended_l2, refcount_bits in kinds:
            for turn in (0, 4):
                backing, start = layers[(number + turn) % len(layers)]
                if start == "preallocated" and backing != "none" and not extended_l2:
                    # QEMU does not make these.
                    start = "filled"
                compression = "zstd" if version == 3 and number % 2 else "zlib"
                yield Shape(cluster_size, version, extended_l2, refcount_bits, backing, start,
                            compression)  # fmt: skip
            number += 1


# Counts that reach their limit on the way.
SATURATED = (
    Shape(512, refcount_bits=2, start="filled"),
    Shape(512, refcount_bits=4, backing="raw", start="dense"),
    Shape(4 * KIB, refcount_bits=8, start="dense"),
    Shape(4 * KIB, refcount_bits=2, backing="qcow2", start="dense"),
    Shape(16 * KIB, extended_l2=True, refcount_bits=8, start="dense", compression_type="zstd"),
)
SHAPES = (*all_shapes(), *SATURATED)


class Step(NamedTuple):
    """Something to do: a kind of `KINDS`, a range in bytes if it needs one, and a seed."""

    kind: str
    guest_offset: int
    length: int
    seed: int


# Kinds of steps, and how often each comes.
KINDS = {
    "write": 36,
    "zero": 9,
    "discard": 9,
    "read": 10,
    "extents": 5,
    "flush": 5,
    "create": 4,
    "delete": 3,
    "apply": 2,
    "rename": 1,
    "look": 5,
    "refuse": 1,
    "together": 4,
    "mingled": 4,
    "reopen": 2,
    "foreign": 1,
}


def random_range(rng: random.Random, size: int, cluster_size: int) -> tuple[int, int]:
    """A range inside `size`: of bytes, sectors, parts of clusters or whole ones."""
    if rng.random() < 0.02:
        return 0, size
    unit = rng.choice((1, SECTOR, max(cluster_size // 32, 1), cluster_size, cluster_size))
    longest = max(1, min(size // 3, 64 * cluster_size) // unit)
    count = min(rng.choice((1, 1, 2, 3, 7, rng.randint(1, 700))), longest)
    # Half of all comes to one place, so that it meets what was there.
    near = size if rng.random() < 0.5 else min(size, 12 * cluster_size)
    guest_offset = rng.randrange(0, near, unit)
    return guest_offset, min(count * unit, size - guest_offset)


def random_steps(shape: Shape, count: int, seed: int) -> Iterator[Step]:
    """`count` steps that suit a shape."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    for kind in rng.choices(kinds, weights, k=count):
        guest_offset, length = random_range(rng, shape.disk_size, shape.cluster_size)
        yield Step(kind, guest_offset, length, rng.getrandbits(32))


def run_tool(*arguments: str | Path) -> str:
    """Run one of QEMU's tools that must succeed; its standard output."""
    done = _run(*arguments)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def _run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [os.fspath(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_sparse(path: Path, content: bytes | bytearray) -> None:
    """Make a file of these bytes with holes where they are zeros."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), CHUNK):
            piece = content[start : start + CHUNK]
            if piece.count(0) != len(piece):
                file.seek(start)
                file.write(piece)


def dense_sample(rng: random.Random, size: int) -> bytes:
    """`size` bytes of which many clusters, compressed, fit into one."""
    return b"".join(
        bytes([rng.randrange(256)]) * (SECTOR * 2) for _ in range(size // (SECTOR * 2) + 1)
    )[:size]


def sample(rng: random.Random, size: int) -> bytes:
    """`size` bytes in which zeros, what compresses well and what does not alternate."""
    pieces = []
    length = 0
    while length < size:
        run = rng.choice((SECTOR, 4 * KIB, 16 * KIB, 64 * KIB, size // 5))
        kind = rng.random()
        if kind < 0.35:
            pieces.append(bytes(run))
        elif kind < 0.8:
            pieces.append(rng.randbytes(64) * (run // 64 + 1))
        else:
            pieces.append(rng.randbytes(run))
        length += len(pieces[-1])
    return b"".join(pieces)[:size]


@dataclass
class Kept:
    """A snapshot: its name, its bytes, and a node that was opened and is still in use."""

    name: bytes
    content: bytes
    node: SnapshotNode | None = None


@dataclass
class Change:
    """Bytes given to a place between two moments; `end` is None while it is under way.

    One that is not `sure` may leave bytes as they were.
    """

    begin: int
    guest_offset: int
    data: bytes
    sure: bool
    end: int | None = None


class History:
    """What each byte may be while changes and reads go on side by side."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.clock = 0
        self.changes = [Change(0, 0, bytes(content), sure=True, end=0)]

    def tick(self) -> int:
        """A moment of its own."""
        self.clock += 1
        return self.clock

    def add(self, guest_offset: int, data: bytes, *, sure: bool = True) -> Change:
        """Note a change that begins now."""
        change = Change(self.tick(), guest_offset, data, sure)
        self.changes.append(change)
        return change

    def check(
        self, found: bytearray, guest_offset: int, begin: int, end: int | None = None
    ) -> None:
        """What was read between two moments, now the later one, was there between them."""
        end = self.tick() if end is None else end
        bytes_found = np.frombuffer(found, dtype=np.uint8)
        allowed = np.zeros(len(found), dtype=bool)
        for change in self.changes:
            start = max(change.guest_offset, guest_offset)
            stop = min(change.guest_offset + len(change.data), guest_offset + len(found))
            if change.begin > end or start >= stop:
                continue
            data = np.frombuffer(change.data, dtype=np.uint8)
            data = data[start - change.guest_offset : stop - change.guest_offset]
            fits = data == bytes_found[start - guest_offset : stop - guest_offset]
            for later in self.changes:
                if (
                    later.sure
                    and change.end is not None
                    and later.end is not None
                    and change.end < later.begin
                    and later.end < begin
                ):
                    first = max(later.guest_offset - start, 0)
                    last = later.guest_offset + len(later.data) - start
                    fits[first : max(last, 0)] = False
            allowed[start - guest_offset : stop - guest_offset] |= fits
        wrong = np.flatnonzero(~allowed)
        assert not len(wrong), (
            f"{len(wrong)} bytes from {guest_offset + int(wrong[0]):#x} to "
            f"{guest_offset + int(wrong[-1]):#x} were never there, or not any more"
        )


class SlowFile(MemoryFile):
    """A file in memory; some reads and writes take so long that a commit fits into them."""

    def __init__(self, content: bytes, seed: int, **options: Any) -> None:
        super().__init__(content, seed=seed, **options)
        self._turns = random.Random(seed)

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """Read after others have had their turns."""
        await self._linger()
        await super().pread_into(buffers, host_offset)

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write after others have had their turns."""
        await self._linger()
        await super().pwrite(buffers, host_offset)

    async def _linger(self) -> None:
        for _ in range(self._turns.choice((0, 0, 0, 30, 300))):
            await trio.lowlevel.checkpoint()


class Model:
    """One image in a folder of its own, and what it has to show.

    `content` is the disk, `snapshots` what is kept, by id; `base` the bytes of
    the backing file.
    """

    def __init__(self, shape: Shape, folder: Path, seed: int) -> None:
        self.shape = shape
        self.folder = folder
        self.seed = seed
        self.path = folder / "image.qcow2"
        self.base = b""
        self.base_path: Path | None = None
        self.content = bytearray()
        self.snapshots: dict[bytes, Kept] = {}
        self.name_count = 0
        self.refused_count = 0
        self._node: Qcow2Node | None = None
        self._memory: MemoryFile | None = None

    @property
    def node(self) -> Qcow2Node:
        """The open image."""
        assert self._node is not None
        return self._node

    async def run(self, steps: Iterable[Step]) -> None:
        """Make the image, take every step, close it and have it judged.

        What fails carries the step as a note.
        """
        await self._make()
        await self._open(random.Random(self.seed))
        try:
            for number, step in enumerate(steps):
                try:
                    await self.take(step)
                except BaseException as error:
                    error.add_note(f"{self.shape}, seed {self.seed}, step {number}: {step}")
                    raise
            await self._compare_whole()
        except BaseException:
            with trio.CancelScope(shield=True):
                try:
                    await self.node.aclose()
                except Exception as error:
                    print(f"closing after a failure: {error!r}")
            raise
        await self._close()

    async def take(self, step: Step) -> None:
        """Do one step on the image and the model, and compare."""
        size = len(self.content)
        guest_offset = step.guest_offset % size
        length = min(step.length, size - guest_offset)
        rng = random.Random(step.seed)
        if step.kind in _RANGED:
            await _RANGED[step.kind](self, guest_offset, length, rng)
        else:
            await _OTHERS[step.kind](self, rng)
        assert self.node.failsafe is None
        requests = self.node.metadata.requests
        assert not requests.allocations
        assert not requests.writer_count
        assert requests.oldest() == requests.generation

    # The life of the image

    async def _make(self) -> None:
        shape, rng = self.shape, random.Random(self.seed)
        size = shape.disk_size
        backing: list[str | Path] = []
        if shape.backing == "raw":
            self.base = sample(rng, size * 3 // 5 // SECTOR * SECTOR)
            self.base_path = self.folder / "base.raw"
            write_sparse(self.base_path, self.base)
            backing = ["-F", "raw", "-b", "base.raw"]
        elif shape.backing == "qcow2":
            self.base = sample(rng, size * 5 // 4 // SECTOR * SECTOR)
            self.base_path = self.folder / "base.qcow2"
            write_sparse(self.folder / "raw", self.base)
            run_tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", self.folder / "raw",
                     self.base_path)  # fmt: skip
            backing = ["-F", "qcow2", "-b", "base.qcow2"]
        if shape.start in {"compressed", "dense", "filled"}:
            content = dense_sample if shape.start == "dense" else sample
            write_sparse(self.folder / "raw", content(rng, size))
            flags = [] if shape.start == "filled" else ["-c"]
            run_tool("qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", "-o",
                     shape.options, self.folder / "raw", self.path)  # fmt: skip
            if backing:
                run_tool("qemu-img", "rebase", "-u", *backing, self.path)
        else:
            await self._make_empty(rng, backing)
        self.content = self._seen_by_qemu()

    async def _make_empty(self, rng: random.Random, backing: list[str | Path]) -> None:
        shape = self.shape
        preallocation = "off"
        if shape.start == "preallocated":
            preallocation = rng.choice(("metadata", "falloc", "full"))
        if rng.random() < 0.5:
            options = f"{shape.options},preallocation={preallocation}"
            run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing,
                     self.path, str(shape.disk_size))  # fmt: skip
            return
        await create_qcow2(
            self.path,
            shape.disk_size,
            version=shape.version,
            cluster_size=shape.cluster_size,
            refcount_bits=shape.refcount_bits,
            extended_l2=shape.extended_l2,
            backing_file=os.fspath(backing[3]) if backing else None,
            backing_format=os.fspath(backing[1]) if backing else None,
            preallocation=preallocation,
            compression_type=shape.compression_type,
        )

    async def _open(self, rng: random.Random) -> None:
        """Open the file, or a copy of it in memory that makes the driver wait."""
        cache_size = rng.choice(CACHE_SIZES)
        self._memory = None
        if rng.random() < 0.5:
            node = await open_image(self.path, cache_size=cache_size)
            assert isinstance(node, Qcow2Node)
        else:
            rate = rng.choice((0.1, 0.4))
            self._memory = SlowFile(
                self.path.read_bytes(),
                rng.getrandbits(32),
                miss_rate=rate,
                refusal_rate=rate,
                can_punch=rng.random() < 0.8,
            )
            backing = None
            if self.base_path is not None:
                backing = await open_image(
                    self.base_path, format=self.shape.backing, read_only=True
                )
            node = await open_qcow2(
                self._memory,
                path=os.fspath(self.path),
                read_only=False,
                backing=backing,
                cache_size=cache_size,
            )
        self._node = node
        assert node.virtual_size == len(self.content)
        found = {snapshot.id: snapshot.name for snapshot in node.snapshots()}
        assert found == {key: kept.name for key, kept in self.snapshots.items()}

    async def _close(self) -> None:
        """Close the image and let QEMU judge it."""
        for kept in self.snapshots.values():
            kept.node = None
        await self.node.aclose()
        self._node = None
        if self._memory is not None:
            write_sparse(self.path, self._memory.content)
        self._judge()

    def _judge(self) -> None:
        done = _run("qemu-img", "check", "-f", "qcow2", self.path)
        assert done.returncode == 0, done.stdout + done.stderr
        write_sparse(self.folder / "raw", self.content)
        run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.folder / "raw", self.path)
        for key, kept in self.snapshots.items():
            found = self._seen_by_qemu(key)
            length = min(len(found), len(kept.content))
            assert found[:length] == kept.content[:length], f"QEMU sees another {kept.name!r}"

    def _seen_by_qemu(self, key: bytes | None = None) -> bytearray:
        """The bytes of the disk, or of the snapshot with an id, cut to the disk's size."""
        chosen = [] if key is None else ["-l", f"snapshot.id={key.decode()}"]
        copy = self.folder / "copy"
        run_tool("qemu-img", "convert", *chosen, "-f", "qcow2", "-O", "raw", self.path, copy)
        content = bytearray(copy.read_bytes())
        copy.unlink()
        return content

    async def _reopen(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            await self._compare_whole()
        await self._close()
        if rng.random() < 0.3:
            await self._read_only()
        await self._open(rng)
        await self._compare_whole()

    async def _read_only(self) -> None:
        """Opened for reading alone it shows the same, refuses changes and is not changed."""
        before = self.path.stat()
        node = await open_image(self.path, read_only=True, cache_size=64 * KIB)
        try:
            await self._compare(node, self.content, 0, len(self.content))
            with pytest.raises(ReadOnlyImage):
                await node.write_from(0, b"1")
        finally:
            await node.aclose()
        after = self.path.stat()
        assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)

    # Bytes

    async def _compare(
        self, node: Node, content: bytes | bytearray, guest_offset: int, length: int
    ) -> None:
        """All calls that read agree with the model where they answer."""
        wanted = content[guest_offset : guest_offset + length]
        buffer = bytearray(b"\xa5") * length
        instant = node.try_read(guest_offset, length)
        if instant is not None:
            _require_equal(bytes(instant), wanted, guest_offset, "try_read")
        if node.try_read_into(guest_offset, memoryview(buffer)):
            _require_equal(buffer, wanted, guest_offset, "try_read_into")
        buffer[:] = b"\x5a" * length
        await node.read_into(guest_offset, memoryview(buffer))
        _require_equal(buffer, wanted, guest_offset, "read_into")

    async def _compare_whole(self) -> None:
        await self._compare(self.node, self.content, 0, len(self.content))

    async def _read(self, guest_offset: int, length: int, _: random.Random) -> None:
        await self._compare(self.node, self.content, guest_offset, length)

    async def _write(self, guest_offset: int, length: int, rng: random.Random) -> None:
        data = rng.randbytes(length)
        if rng.random() < 0.3 or not self.node.try_write(guest_offset, data):
            await self.node.write_from(guest_offset, data)
        self.content[guest_offset : guest_offset + length] = data
        if rng.random() < 0.5:
            await self._compare(self.node, self.content, guest_offset, length)

    async def _zero(self, guest_offset: int, length: int, rng: random.Random) -> None:
        await self.node.write_zeroes(guest_offset, length, unmap=rng.random() < 0.6)
        self.content[guest_offset : guest_offset + length] = bytes(length)
        if rng.random() < 0.5:
            await self._compare(self.node, self.content, guest_offset, length)

    async def _discard(self, guest_offset: int, length: int, _: random.Random) -> None:
        """Each whole cluster becomes zeros or stays, what is not whole stays."""
        await self.node.discard(guest_offset, length)
        end = guest_offset + length
        buffer = bytearray(length)
        await self.node.read_into(guest_offset, memoryview(buffer))
        cluster_size = self.shape.cluster_size
        start = guest_offset
        while start < end:
            cluster_start = start & -cluster_size
            stop = min(cluster_start + cluster_size, end)
            found = buffer[start - guest_offset : stop - guest_offset]
            is_whole = start == cluster_start and (
                stop == cluster_start + cluster_size or stop == len(self.content)
            )
            if found != self.content[start:stop]:
                assert is_whole, f"a discard changed a part of the cluster at {cluster_start:#x}"
                assert not any(found), f"a discard filled the cluster at {cluster_start:#x}"
                self.content[start:stop] = found
            start = stop

    async def _extents(self, guest_offset: int, length: int, rng: random.Random) -> None:
        limit = rng.choice((None, None, 1, 3))
        await self._check_extents(self.node, self.content, (guest_offset, length), limit)

    async def _check_extents(
        self,
        node: Node,
        content: bytes | bytearray,
        whole: tuple[int, int],
        limit: int | None = None,
    ) -> None:
        """Extents lie end to end, and what each says of its bytes is so."""
        covered, length = whole
        end = covered + length
        extents = await node.extents(covered, length, limit=limit)
        assert limit is None or 1 <= len(extents) <= limit
        for extent in extents:
            assert extent.guest_offset == covered
            assert extent.length > 0
            covered += extent.length
            wanted = content[extent.guest_offset : covered]
            if extent.kind is ExtentKind.ZERO:
                assert not any(wanted), f"not zeros: {extent}"
            elif extent.kind is ExtentKind.UNALLOCATED:
                below = self.base[extent.guest_offset : covered]
                below += bytes(extent.length - len(below))
                assert wanted == below, f"not what lies below: {extent}"
            else:
                assert extent.host_offset is not None
            if extent.kind is ExtentKind.DATA:
                host = await self.node.metadata.storage.pread(extent.length, extent.host_offset)
                assert host == wanted, f"the file holds other bytes: {extent}"
        assert covered == end or (limit is not None and covered < end)

    async def _flush(self, _: random.Random) -> None:
        await self.node.flush()

    # Snapshots

    def _new_name(self, rng: random.Random) -> bytes:
        self.name_count += 1
        return b"kept %d" % self.name_count + b"\xc3\xa4" * rng.choice((0, 0, 1, 120))

    def _choose(self, rng: random.Random) -> bytes | None:
        """The id of some snapshot, None while there is none."""
        return rng.choice(sorted(self.snapshots)) if self.snapshots else None

    def _reference(self, key: bytes, rng: random.Random) -> bytes:
        return key if rng.random() < 0.5 else self.snapshots[key].name

    def _check_list(self) -> None:
        found = [(snapshot.id, snapshot.name) for snapshot in self.node.snapshots()]
        assert found == [(key, kept.name) for key, kept in self.snapshots.items()]

    async def _create(self, rng: random.Random) -> None:
        if self._is_crowded():
            await self._delete(rng)
        await self._create_named(self._new_name(rng), bytes(self.content))

    def _is_crowded(self) -> bool:
        return len(self.snapshots) >= SNAPSHOT_LIMITS.get(self.shape.cluster_size, 5)

    async def _create_named(self, name: bytes, content: bytes) -> bytes | None:
        """Take a snapshot; its id, or None where the counts cannot hold it."""
        shares = any(self.node.metadata.active.words)
        try:
            snapshot = await self.node.create_snapshot(name)
        except ImageFull:
            assert self.shape.refcount_bits <= 8, "there was room for another reference"
            self.refused_count += 1
            self._check_list()
            return None
        assert self.shape.refcount_bits > 1 or not shares, "a count of 1 bit went up to 2"
        assert snapshot.name == name
        assert snapshot.id not in self.snapshots
        self.snapshots[snapshot.id] = Kept(name, content)
        self._check_list()
        return snapshot.id

    async def _delete(self, rng: random.Random) -> None:
        key = self._choose(rng)
        if key is None:
            return
        reference = self._reference(key, rng)
        node = self.snapshots[key].node
        await self.node.delete_snapshot(reference)
        del self.snapshots[key]
        self._check_list()
        if node is not None:
            assert node.is_gone
            with pytest.raises(NotFound):
                node.try_read(0, SECTOR)
            with pytest.raises(NotFound):
                await node.read_into(0, memoryview(bytearray(SECTOR)))

    async def _apply(self, rng: random.Random) -> None:
        key = self._choose(rng)
        if key is None:
            return
        if await self._apply_one(self._reference(key, rng)):
            self.content[:] = self.snapshots[key].content
        assert self.node.virtual_size == len(self.content)
        self._check_list()
        await self._compare_whole()

    async def _apply_one(self, reference: bytes) -> bool:
        """Whether the counts could hold it."""
        try:
            await self.node.apply_snapshot(reference)
        except ImageFull:
            assert self.shape.refcount_bits <= 8, "there was room for another reference"
            self.refused_count += 1
            return False
        return True

    async def _rename(self, rng: random.Random) -> None:
        key = self._choose(rng)
        if key is not None:
            name = self._new_name(rng)
            snapshot = await self.node.rename_snapshot(self._reference(key, rng), name)
            assert (snapshot.id, snapshot.name) == (key, name)
            self.snapshots[key].name = name
            self._check_list()

    async def _look(self, rng: random.Random) -> None:
        """A snapshot's node shows what was kept, and stays valid between looks."""
        key = self._choose(rng)
        if key is None:
            return
        kept = self.snapshots[key]
        if kept.node is None or rng.random() < 0.5:
            listed = {snapshot.id: snapshot for snapshot in self.node.snapshots()}
            kept.node = await self.node.open_snapshot(listed[key])
        size = len(kept.content)
        assert kept.node.virtual_size == size
        place = random_range(rng, size, self.shape.cluster_size)
        if rng.random() < 0.3:
            place = (0, size)
        await self._compare(kept.node, kept.content, *place)
        await self._check_extents(kept.node, kept.content, place)

    async def _refuse(self, rng: random.Random) -> None:
        """What is refused changes nothing."""
        size = len(self.content)
        with pytest.raises(BadRequest):
            await self.node.write_from(size - 1, b"12")
        with pytest.raises(BadRequest):
            await self.node.write_zeroes(size, 1)
        with pytest.raises(BadRequest):
            await self.node.discard(size - 1, 2)
        with pytest.raises(BadRequest):
            await self.node.create_snapshot(b"")
        for call in (self.node.delete_snapshot, self.node.apply_snapshot):
            with pytest.raises(NotFound):
                await call(b"no such")
        with pytest.raises(NotFound):
            await self.node.rename_snapshot(b"no such", b"either")
        key = self._choose(rng)
        if key is not None:
            with pytest.raises(AlreadyExists):
                await self.node.create_snapshot(self.snapshots[key].name)
        self._check_list()

    # Several at once

    def _lanes(self, rng: random.Random) -> list[tuple[int, int]]:
        """Ranges (start, end) that do not overlap and share sectors and clusters."""
        size = len(self.content)
        near = size if rng.random() < 0.5 else min(size, 16 * self.shape.cluster_size)
        cuts = sorted(rng.sample(range(1, near), rng.randint(1, 4)))
        return list(zip([0, *cuts], [*cuts, size], strict=True))

    def _in_lane(self, lane: tuple[int, int], rng: random.Random) -> tuple[int, int]:
        start, length = random_range(rng, lane[1] - lane[0], self.shape.cluster_size)
        # Half of them at clusters of the disk rather than of the lane.
        if rng.random() < 0.5:
            aligned = (lane[0] + start) & -self.shape.cluster_size
            start = max(aligned - lane[0], 0)
        return lane[0] + start, min(length, lane[1] - lane[0] - start)

    async def _together(self, rng: random.Random) -> None:
        """Tasks that change and read ranges of their own, a reader of a snapshot beside them."""

        async def work(lane: tuple[int, int], seed: int) -> None:
            own = random.Random(seed)
            for _ in range(own.randint(1, 5)):
                guest_offset, length = self._in_lane(lane, own)
                kind = own.choice(("write", "write", "write", "zero", "discard", "read", "flush"))
                if kind == "flush":
                    await self.node.flush()
                else:
                    await _RANGED[kind](self, guest_offset, length, own)

        looker = random.Random(rng.getrandbits(32))
        async with trio.open_nursery() as nursery:
            for lane in self._lanes(rng):
                nursery.start_soon(work, lane, rng.getrandbits(32))
            nursery.start_soon(self._look, looker)

    async def _mingled(self, rng: random.Random) -> None:
        """Tasks that change and read the same ranges, and snapshots, all at once.

        A read, and a snapshot when it is taken, finds of each byte what one of
        the changes up to then gave it, and nothing that was overwritten before
        the read began.
        """
        history = History(self.content)
        old = list(self.snapshots.items())
        gone: list[bytes] = []

        async def look(seed: int) -> None:
            own = random.Random(seed)
            key, kept = own.choice(old)
            listed = {snapshot.id: snapshot for snapshot in self.node.snapshots()}
            guest_offset, length = random_range(own, len(kept.content), self.shape.cluster_size)
            buffer = bytearray(length)
            try:
                node = kept.node or await self.node.open_snapshot(listed[key])
                await node.read_into(guest_offset, memoryview(buffer))
            except (NotFound, KeyError):
                gone.append(key)
            else:
                wanted = kept.content[guest_offset : guest_offset + length]
                _require_equal(buffer, wanted, guest_offset, "a snapshot's read_into")

        async with trio.open_nursery() as nursery:
            for _ in range(rng.randint(2, 6)):
                nursery.start_soon(self._mingle, history, rng.getrandbits(32))
            for _ in range(rng.randint(0, 3) if old else 0):
                nursery.start_soon(look, rng.getrandbits(32))
            if rng.random() < 0.5:
                nursery.start_soon(self._mingle_snapshots, history, rng.getrandbits(32))
        assert not set(gone) & set(self.snapshots), "a snapshot is missing that is there"
        begin = history.tick()
        found = bytearray(len(self.content))
        await self.node.read_into(0, memoryview(found))
        history.check(found, 0, begin)
        self.content[:] = found
        await self._compare_whole()

    async def _mingle(self, history: "History", seed: int) -> None:
        """Some steps of one task among several, each noted in the history."""
        rng = random.Random(seed)
        size, cluster_size = len(self.content), self.shape.cluster_size
        for _ in range(rng.randint(1, 6)):
            guest_offset, length = random_range(rng, size, cluster_size)
            kind = rng.choice(
                ("write", "write", "zero", "discard", "read", "read", "flush", "flush")
            )
            if kind == "flush":
                await self.node.flush()
            elif kind == "read":
                begin = history.tick()
                buffer = bytearray(length)
                await self.node.read_into(guest_offset, memoryview(buffer))
                history.check(buffer, guest_offset, begin)
            elif kind == "discard":
                end = guest_offset + length
                first = (guest_offset + cluster_size - 1) & -cluster_size
                last = end if end == size else end & -cluster_size
                change = history.add(first, bytes(max(last - first, 0)), sure=False)
                await self.node.discard(guest_offset, length)
                change.end = history.tick()
            else:
                data = bytes(length) if kind == "zero" else rng.randbytes(length)
                change = history.add(guest_offset, data)
                if kind == "zero":
                    await self.node.write_zeroes(guest_offset, length, unmap=rng.random() < 0.6)
                elif rng.random() < 0.5 or not self.node.try_write(guest_offset, data):
                    await self.node.write_from(guest_offset, data)
                change.end = history.tick()

    async def _mingle_snapshots(self, history: "History", seed: int) -> None:
        """Snapshot operations beside other tasks; an apply is a write of the whole disk."""
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 2)):
            kind = rng.choice(("create", "delete", "apply"))
            key = self._choose(rng)
            if kind == "delete":
                await self._delete(rng)
            elif kind == "apply" and key is not None:
                content = self.snapshots[key].content
                # Tasks beside this one would not know the end of a shorter disk.
                if len(content) == len(self.content):
                    change = history.add(0, content)
                    if not await self._apply_one(key):
                        history.changes.remove(change)
                    change.end = history.tick()
            elif kind == "create" and not self._is_crowded():
                begin = history.tick()
                key = await self._create_named(self._new_name(rng), b"")
                end = history.tick()
                if key is not None:
                    listed = {snapshot.id: snapshot for snapshot in self.node.snapshots()}
                    node = await self.node.open_snapshot(listed[key])
                    found = bytearray(node.virtual_size)
                    await node.read_into(0, memoryview(found))
                    history.check(found, 0, begin, end)
                    self.snapshots[key].content = bytes(found)

    # QEMU's own changes

    async def _foreign(self, rng: random.Random) -> None:
        """QEMU changes the image between two times that it is open here, and is believed."""
        await self._compare_whole()
        await self._close()
        changes = [self._foreign_bytes, self._foreign_bytes, self._foreign_size]
        if self.shape.refcount_bits >= 16:
            changes += [self._foreign_snapshot, self._foreign_apply]
        rng.choice(changes)(rng)
        if _run("qemu-img", "check", "-q", "-f", "qcow2", self.path).returncode:
            run_tool("qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", self.path)
        self.content = self._seen_by_qemu()
        self._adopt_list()
        await self._open(rng)
        await self._compare_whole()

    def _adopt_list(self) -> None:
        listed = json.loads(run_tool("qemu-img", "info", "--output=json", self.path))
        for snapshot in listed.get("snapshots", []):
            key = snapshot["id"].encode()
            if key not in self.snapshots:
                self.snapshots[key] = Kept(snapshot["name"].encode(), bytes(self.content))

    def _foreign_bytes(self, rng: random.Random) -> None:
        commands: list[str | Path] = []
        for _ in range(rng.randint(1, 6)):
            guest_offset, length = random_range(rng, len(self.content), self.shape.cluster_size)
            verb = rng.choice(("write -P 17", "write -z", "write -z -u", "discard", "write -c"))
            if verb == "write -c":
                guest_offset &= -self.shape.cluster_size
                length = self.shape.cluster_size
            if guest_offset + length <= len(self.content):
                commands += ["-c", f"{verb} {guest_offset} {length}"]
        # Some are refused, which is QEMU's right.
        _run("qemu-io", "-f", "qcow2", *commands, self.path)

    def _foreign_size(self, rng: random.Random) -> None:
        size = rng.randint(self.shape.disk_size // 2, self.shape.disk_size * 5 // 4)
        flags = ["--shrink"] if size < len(self.content) else []
        size = size // SECTOR * SECTOR
        _run("qemu-img", "resize", "-q", *flags, "-f", "qcow2", self.path, str(size))

    def _foreign_snapshot(self, rng: random.Random) -> None:
        if len(self.snapshots) < 12:
            run_tool("qemu-img", "snapshot", "-c", self._new_name(rng).decode(), self.path)

    def _foreign_apply(self, rng: random.Random) -> None:
        key = self._choose(rng)
        if key is not None and len(self.snapshots[key].content) == len(self.content):
            run_tool("qemu-img", "snapshot", "-a", self.snapshots[key].name.decode(), self.path)


def _require_equal(
    found: bytes | bytearray, wanted: bytes | bytearray, guest_offset: int, call: str
) -> None:
    """Compare without a report of megabytes."""
    if found != wanted:
        assert len(found) == len(wanted), f"{call} gave {len(found)} bytes of {len(wanted)}"
        different = [index for index, pair in enumerate(zip(found, wanted, strict=True))
                     if pair[0] != pair[1]]  # fmt: skip
        first, last = guest_offset + different[0], guest_offset + different[-1]
        pytest.fail(f"{call}: {len(different)} bytes differ from {first:#x} to {last:#x}")


Ranged = Callable[[Model, int, int, random.Random], Awaitable[None]]
Other = Callable[[Model, random.Random], Awaitable[None]]

_RANGED: dict[str, Ranged] = {
    "write": Model._write,
    "zero": Model._zero,
    "discard": Model._discard,
    "read": Model._read,
    "extents": Model._extents,
}
_OTHERS: dict[str, Other] = {
    "flush": Model._flush,
    "create": Model._create,
    "delete": Model._delete,
    "apply": Model._apply,
    "rename": Model._rename,
    "look": Model._look,
    "refuse": Model._refuse,
    "together": Model._together,
    "mingled": Model._mingled,
    "reopen": Model._reopen,
    "foreign": Model._foreign,
}
