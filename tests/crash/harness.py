"""Replay of crashes: random workloads, rebuilt at sampled points, judged.

A workload runs the real driver on a CrashFile. A `Witness` writes down, beside
every call, where in the file's log it began and ended, so that for each state
that a crash may leave it can say what each sector may hold:

- the value that the last finished flush made durable, or
- any value that a call put there which began before the crash and was not
  covered by that flush.

Each sector's value names its write and its own place in the disk, so bytes of
another write, of another sector or of a freed cluster are always noticed.
Then two judges look at a state: `qemu-img check` may find leaks and nothing
else, and the driver, reading the state, must find only values that may be
there, and every snapshot that was acknowledged, unchanged. Within a snapshot
call QEMU's complaints about COPIED flags alone are tolerated (RELIABILITY.md).
"""

import json
import random
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio

from qcowfs.driver.node import Node
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from tests.fakes import CrashFile, CrashState, MemoryFile

SECTOR = 512
Stamps = np.ndarray[tuple[int], np.dtype[np.uint64]]


def content_of(stamps: Stamps, first_sector: int = 0) -> bytes:
    """The bytes of sectors with these stamps; a stamp of 0 is a sector of zeros."""
    places = np.arange(first_sector, first_sector + len(stamps), dtype=np.uint64)
    words = np.where(stamps == 0, np.uint64(0), (stamps << np.uint64(24)) | places)
    return np.repeat(words[:, None], SECTOR // 8, axis=1).astype("<u8").tobytes()


def stamps_of(content: bytes | bytearray) -> Stamps:
    """The stamps of sectors; one that is torn or out of its place gets a stamp that none has."""
    words = np.frombuffer(content, dtype="<u8").reshape(-1, SECTOR // 8)
    first = words[:, 0]
    places = np.arange(len(words), dtype=np.uint64)
    whole = (words == first[:, None]).all(axis=1)
    placed = (first == 0) | ((first & np.uint64(0xFFFFFF)) == places)
    stamps: Stamps = np.where(whole & placed, first >> np.uint64(24), np.uint64(2**40 - 1))
    return stamps


@dataclass
class Change:
    """A call that gives a run of sectors new values from a position of the log on.

    `ended` is the witness's own clock, since a call may leave no trace in the log.
    """

    first_sector: int
    stamps: Stamps
    begin: int
    ended: int | None = None


@dataclass
class Durable:
    """What a flush made durable that ended at `position` of the log and began at a clock time."""

    position: int
    began: int
    stamps: Stamps


@dataclass
class Kept:
    """A snapshot and the positions between which it is sure to be there, or may be."""

    name: bytes
    stamps: Stamps
    begin: int
    end: int | None = None
    delete_begin: int | None = None
    delete_end: int | None = None


@dataclass
class Witness:
    """What every sector may hold after a crash at any position of the log."""

    current: Stamps
    changes: list[Change] = field(default_factory=list)
    durable: list[Durable] = field(default_factory=list)
    snapshots: list[Kept] = field(default_factory=list)
    snapshot_calls: list[tuple[int, int]] = field(default_factory=list)
    clock: int = 0

    def now(self) -> int:
        """A later time than every time before."""
        self.clock += 1
        return self.clock

    def unexpected(self, point: int, found: Stamps) -> list[int]:
        """The sectors of a state at `point` that hold what they may not hold."""
        floor = [known for known in self.durable if known.position <= point][-1]
        suspects = np.nonzero(found != floor.stamps)[0]
        return [
            int(sector)
            for sector in suspects
            if not any(
                change.begin <= point
                and (change.ended is None or change.ended > floor.began)
                and 0 <= sector - change.first_sector < len(change.stamps)
                and change.stamps[sector - change.first_sector] == found[sector]
                for change in self.changes
            )
        ]

    def in_snapshot_call(self, point: int) -> bool:
        """Whether a crash at `point` falls into a snapshot operation."""
        return any(begin <= point <= end for begin, end in self.snapshot_calls)


class Workload:
    """Random calls on an open image, each written down by the witness."""

    def __init__(self, node: Qcow2Node, file: CrashFile, rng: random.Random, base: bytes) -> None:
        self.node = node
        self.file = file
        self.rng = rng
        self.sector_count = node.virtual_size // SECTOR
        self.next_stamp = 1 << 20
        self.witness = Witness(stamps_of(base))
        self.witness.durable.append(Durable(0, 0, self.witness.current.copy()))

    def pick(self, longest: int) -> tuple[int, int]:
        """A run of sectors: (first, count)."""
        first = self.rng.randrange(self.sector_count)
        return first, min(self.rng.randint(1, longest), self.sector_count - first)

    async def write(self, first: int, count: int) -> None:
        """Write new stamps."""
        self.next_stamp += 1
        stamps = np.full(count, self.next_stamp, dtype=np.uint64)
        change = Change(first, stamps, self.file.position)
        self.witness.changes.append(change)
        data = content_of(stamps, first)
        if self.rng.random() < 0.5 or not self.node.try_write(first * SECTOR, data):
            await self.node.write_from(first * SECTOR, data)
        change.ended = self.witness.now()
        self.witness.current[first : first + count] = stamps

    async def write_together(self, longest: int, tasks: int) -> None:
        """Several writes at once, to places of their own."""
        width = self.sector_count // tasks
        async with trio.open_nursery() as nursery:
            for index in range(tasks):
                first = index * width + self.rng.randrange(width)
                count = min(self.rng.randint(1, longest), (index + 1) * width - first)
                nursery.start_soon(self.write, first, count)

    async def clear(self, first: int, count: int, *, discard: bool) -> None:
        """Zero or discard; what the driver made of a discard is read back."""
        before = self.witness.current[first : first + count].copy()
        zeros = np.zeros(count, dtype=np.uint64)
        change = Change(first, zeros, self.file.position)
        self.witness.changes.append(change)
        if discard:
            await self.node.discard(first * SECTOR, count * SECTOR)
        else:
            await self.node.write_zeroes(
                first * SECTOR, count * SECTOR, unmap=self.rng.random() < 0.5
            )
        change.ended = self.witness.now()
        found = await self.read(first, count)
        assert ((found == 0) | (found == before)).all()
        if not discard:
            assert not found.any()
        self.witness.current[first : first + count] = found

    async def read(self, first: int, count: int) -> Stamps:
        """The stamps of a run of sectors as the driver reads them now."""
        data = bytearray(count * SECTOR)
        await self.node.read_into(first * SECTOR, memoryview(data))
        words = np.frombuffer(data, dtype="<u8").reshape(-1, SECTOR // 8)
        stamps: Stamps = words[:, 0] >> np.uint64(24)
        return stamps

    async def flush(self) -> None:
        """Flush; what was acknowledged before it is then durable."""
        began, stamps = self.witness.now(), self.witness.current.copy()
        await self.node.flush()
        self.witness.durable.append(Durable(self.file.position, began, stamps))

    async def create_snapshot(self) -> None:
        """Take a snapshot under a name of its own."""
        self.next_stamp += 1
        name = b"s%d" % self.next_stamp
        kept = Kept(name, self.witness.current.copy(), self.file.position)
        began = self.witness.now()
        self.witness.snapshots.append(kept)
        await self.node.create_snapshot(name)
        kept.end = self.file.position
        self.witness.snapshot_calls.append((kept.begin, kept.end))
        self.witness.durable.append(Durable(kept.end, began, kept.stamps.copy()))

    def _existing(self) -> list[Kept]:
        return [kept for kept in self.witness.snapshots if kept.delete_begin is None]

    async def delete_snapshot(self) -> None:
        """Delete one, if there is one."""
        existing = self._existing()
        if existing:
            kept = self.rng.choice(existing)
            kept.delete_begin = self.file.position
            await self.node.delete_snapshot(kept.name)
            kept.delete_end = self.file.position
            self.witness.snapshot_calls.append((kept.delete_begin, kept.delete_end))

    async def apply_snapshot(self) -> None:
        """Go back to one, if there is one: the whole disk changes at once."""
        existing = self._existing()
        if existing:
            kept = self.rng.choice(existing)
            begin = self.file.position
            change = Change(0, kept.stamps, begin)
            self.witness.changes.append(change)
            await self.node.apply_snapshot(kept.name)
            change.ended = self.witness.now()
            end = self.file.position
            self.witness.snapshot_calls.append((begin, end))
            self.witness.current[:] = kept.stamps
            self.witness.durable.append(Durable(end, change.ended, kept.stamps.copy()))


Step = Callable[[Workload], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """A kind of image and workload.

    `options` goes to `qemu-img create -o`; `fill` is the share of the disk
    that is stamped before the log begins, `compressed` whether it is then
    compressed, `backed` whether those bytes lie in a backing file instead.
    """

    name: str
    options: str
    size: int
    steps: tuple[tuple[int, Step], ...]
    step_count: int = 60
    fill: float = 0.5
    compressed: bool = False
    backed: bool = False
    sync_weight: int = 8
    cache_size: int = 1 << 20


def run_tool(*arguments: object) -> None:
    """Run a command of QEMU's that must succeed."""
    subprocess.run([str(argument) for argument in arguments], check=True, capture_output=True)


def build_image(kind: Kind, folder: Path, rng: random.Random) -> tuple[Path, Path | None, bytes]:
    """Make the image that a workload starts from: (image, backing file, guest content)."""
    sector_count = kind.size // SECTOR
    stamps = np.zeros(sector_count, dtype=np.uint64)
    run = 64
    for first in range(0, sector_count, run):
        if rng.random() < kind.fill:
            stamps[first : first + run] = rng.randrange(1, 1 << 16)
    content = content_of(stamps)
    raw, image = folder / f"{kind.name}.raw", folder / f"{kind.name}.qcow2"
    image.unlink(missing_ok=True)
    raw.write_bytes(content)
    if kind.backed:
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", kind.options, "-b", raw,
                 "-F", "raw", image, kind.size)  # fmt: skip
        return image, raw, content
    flags = ["-c"] if kind.compressed else []
    run_tool("qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", "-o", kind.options, raw,
             image)  # fmt: skip
    return image, None, content


async def open_backing(path: Path | None) -> Node | None:
    """The backing file of a crash image, as a node."""
    if path is None:
        return None
    from qcowfs.driver.opening import open_image

    return await open_image(str(path), format="raw", read_only=True, lock=False)


async def run_workload(
    kind: Kind, folder: Path, seed: int, *, drop_every_second_sync: bool = False
) -> tuple[CrashFile, Witness, Path | None]:
    """Run a kind's workload once and give the log and the witness."""
    rng = random.Random(seed)
    image, backing_path, content = build_image(kind, folder, rng)
    file = CrashFile(
        image.read_bytes(),
        drop_every_second_sync=drop_every_second_sync,
        miss_rate=0.2,
        seed=seed,
    )
    node = await open_qcow2(
        file,
        path=str(image),
        read_only=False,
        backing=await open_backing(backing_path),
        cache_size=kind.cache_size,
    )
    workload = Workload(node, file, rng, content)
    steps = [step for _, step in kind.steps] + [Workload.flush]
    weights = [weight for weight, _ in kind.steps] + [kind.sync_weight]
    for step in rng.choices(steps, weights, k=kind.step_count):
        await step(workload)
    await workload.flush()
    await node.aclose()
    image.write_bytes(file.content)
    run_tool("qemu-img", "check", "-U", image)
    return file, workload.witness, backing_path


@dataclass
class Tally:
    """What the states of one kind came to."""

    kind: str
    states: int = 0
    reordered: int = 0
    torn: int = 0
    leaks: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kind:<22} states {self.states:>6}  reordered {self.reordered:>6}"
            f"  torn {self.torn:>6}  leaks {self.leaks:>6}  failures {len(self.failures)}"
        )


class Judge:
    """Judges states of one workload."""

    def __init__(self, kind: Kind, witness: Witness, backing: Path | None, folder: Path) -> None:
        self.kind = kind
        self.witness = witness
        self.backing = backing
        self.path = folder / f"{kind.name}.state.qcow2"
        self.tally = Tally(kind.name)

    async def judge(self, state: CrashState) -> None:
        """Count a state and note what is wrong with it."""
        self.tally.states += 1
        self.tally.torn += state.description.startswith("torn")
        self.tally.reordered += "order" in state.description or "subset" in state.description
        try:
            problem = self._check(state) or await self._read(state)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.tally.failures.append(
                f"{self.kind.name}, after {state.point} operations, {state.description}: {problem}"
            )

    def _check(self, state: CrashState) -> str | None:
        self.path.write_bytes(state.content)
        result = subprocess.run(
            ["qemu-img", "check", "-U", "--output=json", str(self.path)],
            capture_output=True,
            text=True,
        )
        report = json.loads(result.stdout[result.stdout.index("{\n") :]) if result.stdout else {}
        if "filename" not in report:
            return f"qemu-img check: {result.stderr.strip()}"
        self.tally.leaks += bool(report.get("leaks"))
        if report.get("corruptions") or report.get("check-errors"):
            text = result.stdout[: result.stdout.index("{\n")] + result.stderr
            lines = [line for line in text.splitlines() if line.startswith("ERROR")]
            if self.witness.in_snapshot_call(state.point) and lines and all(
                "OFLAG_COPIED" in line for line in lines
            ):
                return None
            return f"qemu-img check: {report['corruptions']} corruptions: {lines[:3]}"
        return None

    async def _read(self, state: CrashState) -> str | None:
        node = await open_qcow2(
            MemoryFile(state.content, read_only=True),
            path=str(self.path),
            read_only=True,
            backing=await open_backing(self.backing),
            cache_size=1 << 20,
        )
        try:
            wrong = self.witness.unexpected(state.point, await self._stamps(node))
            if wrong:
                return f"{len(wrong)} sectors hold what they may not hold: {wrong[:8]}"
            return await self._read_snapshots(node, state.point)
        finally:
            await node.aclose()

    async def _stamps(self, node: Node) -> Stamps:
        data = bytearray(node.virtual_size)
        await node.read_into(0, memoryview(data))
        return stamps_of(data)

    async def _read_snapshots(self, node: Qcow2Node, point: int) -> str | None:
        there = {snapshot.name: snapshot for snapshot in node.snapshots()}
        for kept in self.witness.snapshots:
            sure = kept.end is not None and kept.end <= point
            gone = kept.delete_begin is not None and kept.delete_begin <= point
            if kept.name not in there:
                if sure and not gone:
                    return f"the snapshot {kept.name!r} is lost"
                continue
            if kept.delete_end is not None and kept.delete_end <= point:
                return f"the snapshot {kept.name!r} is back"
            view = await node.open_snapshot(there[kept.name])
            changed = np.nonzero(await self._stamps(view) != kept.stamps)[0]
            if len(changed):
                return f"{len(changed)} sectors of {kept.name!r} changed: {changed[:8]}"
        return None


async def judge_kind(
    kind: Kind,
    folder: Path,
    count: int,
    seed: int,
    *,
    drop_every_second_sync: bool = False,
    stop_at_failure: bool = False,
) -> Tally:
    """Run workloads of a kind until `count` states have been judged."""
    total = Tally(kind.name)
    while total.states < count:
        file, witness, backing = await run_workload(
            kind, folder, seed, drop_every_second_sync=drop_every_second_sync
        )
        judge = Judge(kind, witness, backing, folder)
        judge.tally = total
        wanted = min(count - total.states, 400)
        states = list_sample(file, wanted, seed)
        for state in states:
            await judge.judge(state)
            if total.failures and stop_at_failure:
                return total
        seed += 1
    return total


def list_sample(file: CrashFile, count: int, seed: int) -> list[CrashState]:
    """`count` states of a log: a few at each of many points, every manner among them."""
    rng = random.Random(seed)
    states: list[CrashState] = []
    by_manner: Counter[str] = Counter()
    for state in file.states(
        point_count=max(8, count // 6),
        each_limit=3,
        subset_count=2,
        order_count=1,
        torn_count=2,
        seed=seed,
    ):
        states.append(state)
        by_manner[state.description.split()[0]] += 1
    if len(states) > count:
        states = [states[index] for index in sorted(rng.sample(range(len(states)), count))]
    return states
