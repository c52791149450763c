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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
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
    2 * MIB: 9 * MIB + SECTOR,
}
SNAPSHOT_LIMITS = {512: 12, 2 * MIB: 3}
CACHE_SIZES = (64 * KIB, 256 * KIB, MIB, 32 * MIB)
CHUNK = 64 * KIB


@dataclass(frozen=True)
class Shape:
    """A kind of image to begin with.

    `backing` is none, raw (shorter than the disk) or qcow2 (longer); `start` is
    empty, compressed, filled (half of it data) or preallocated.
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


SHAPES = tuple(all_shapes())


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
    "together_create": 1,
    "together_apply": 1,
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


class Change(NamedTuple):
    """Bytes that were written at a place."""

    guest_offset: int
    data: bytes


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
        assert not self.node.metadata.requests.allocations

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
        if shape.start in {"compressed", "filled"}:
            write_sparse(self.folder / "raw", sample(rng, size))
            flags = ["-c"] if shape.start == "compressed" else []
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
            self._memory = MemoryFile(
                self.path.read_bytes(),
                miss_rate=rate,
                refusal_rate=rate,
                seed=self.seed,
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
        if len(self.snapshots) >= SNAPSHOT_LIMITS.get(self.shape.cluster_size, 5):
            await self._delete(rng)
        await self._create_named(self._new_name(rng), bytes(self.content))

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
        try:
            await self.node.apply_snapshot(self._reference(key, rng))
        except ImageFull:
            assert self.shape.refcount_bits <= 8, "there was room for another reference"
            self.refused_count += 1
        else:
            self.content[:] = self.snapshots[key].content
        assert self.node.virtual_size == len(self.content)
        self._check_list()
        await self._compare_whole()

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

    async def _write_lane(
        self, lane: tuple[int, int], seed: int, changes: list[Change]
    ) -> None:
        """Writes and zeroes in one lane; each is noted when it has been done."""
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 4)):
            guest_offset, length = self._in_lane(lane, rng)
            if rng.random() < 0.3:
                data = bytes(length)
                changes.append(Change(guest_offset, data))
                await self.node.write_zeroes(guest_offset, length)
            else:
                data = rng.randbytes(length)
                changes.append(Change(guest_offset, data))
                if not self.node.try_write(guest_offset, data):
                    await self.node.write_from(guest_offset, data)
            if rng.random() < 0.3:
                await trio.lowlevel.checkpoint()

    async def _write_beside(
        self, rng: random.Random, call: Callable[[], Awaitable[None]]
    ) -> dict[tuple[int, int], list[Change]]:
        """Write in lanes while `call` runs; what was written, by lane."""
        done: dict[tuple[int, int], list[Change]] = {}
        async with trio.open_nursery() as nursery:
            for lane in self._lanes(rng):
                done[lane] = []
                nursery.start_soon(self._write_lane, lane, rng.getrandbits(32), done[lane])
            nursery.start_soon(call)
        return done

    async def _together_create(self, rng: random.Random) -> None:
        """A snapshot beside writes holds the first of each task's writes, whole, and no more."""
        if len(self.snapshots) >= SNAPSHOT_LIMITS.get(self.shape.cluster_size, 5):
            await self._delete(rng)
        name = self._new_name(rng)
        keys: list[bytes | None] = []

        async def create() -> None:
            keys.append(await self._create_named(name, b""))

        done = await self._write_beside(rng, create)
        key = keys[0]
        listed = {snapshot.id: snapshot for snapshot in self.node.snapshots()}
        found = bytearray(len(self.content))
        if key is not None:
            node = await self.node.open_snapshot(listed[key])
            await node.read_into(0, memoryview(found))
        for (start, end), changes in done.items():
            states = [self.content[start:end]]
            for change in changes:
                states.append(_changed(states[-1], start, [change]))
            if key is not None:
                assert found[start:end] in states, f"a write from {start:#x} on was torn"
            self.content[start:end] = states[-1]
        if key is not None:
            self.snapshots[key].content = bytes(found)
        await self._compare_whole()

    async def _together_apply(self, rng: random.Random) -> None:
        """Beside an apply, the last of each task's writes are in the new disk, and no others."""
        key = self._choose(rng)
        if key is None or len(self.snapshots[key].content) != len(self.content):
            await self._apply(rng)
            return
        outcome: list[bool] = []

        async def apply() -> None:
            try:
                await self.node.apply_snapshot(key)
            except ImageFull:
                assert self.shape.refcount_bits <= 8, "there was room for another reference"
                outcome.append(False)
            else:
                outcome.append(True)

        done = await self._write_beside(rng, apply)
        found = bytearray(len(self.content))
        await self.node.read_into(0, memoryview(found))
        under = self.snapshots[key].content if outcome[0] else bytes(self.content)
        for (start, end), changes in done.items():
            firsts = range(len(changes) + 1) if outcome[0] else (0,)
            states = [_changed(under[start:end], start, changes[first:]) for first in firsts]
            assert found[start:end] in states, f"a write from {start:#x} on was torn or lost"
        self.content[:] = found
        await self._compare_whole()

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


def _changed(content: bytes | bytearray, start: int, changes: Iterable[Change]) -> bytearray:
    """The bytes from `start` on after some writes."""
    result = bytearray(content)
    for change in changes:
        place = change.guest_offset - start
        result[place : place + len(change.data)] = change.data
    return result


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
    "together_create": Model._together_create,
    "together_apply": Model._together_apply,
    "reopen": Model._reopen,
    "foreign": Model._foreign,
}
