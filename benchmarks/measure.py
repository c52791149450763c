"""Measuring one case: A B, then B A, each on a copy of the same image.

A ratio belongs to two runs beside each other, so what else the machine does
weighs on both; the median over the pairs is what is reported. No sample leaves
a copy, a mount, a loop device or a process behind.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.client import Workload
from benchmarks.images import Images, qemu_img
from benchmarks.servers import ROOT, Server

_PATIENCE = 1200
_CHUNK = 1 << 20

MakeServer = Callable[[Path, Path], Server]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one side: the clock's seconds and the requests in them, the peak in bytes.

    `cpu_seconds` is the server's processor time for one request, warm-up included.
    """

    seconds: float
    request_count: int = 0
    peak_memory: int = 0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Side:
    """How one of the two is measured in a case: image in, sample out."""

    name: str
    make: MakeServer
    measure: Callable[["Bench", "Side", Path], Sample]


@dataclass(slots=True)
class Result:
    """All samples of one case, in pairs."""

    case: str
    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the pairs of our time by the peer's; below 1: ours is faster."""
        pairs = zip(self.ours, self.peer, strict=True)
        return statistics.median(one.seconds / other.seconds for one, other in pairs)


def median(samples: list[Sample]) -> Sample:
    """The sample of medians, with the highest peak."""
    return Sample(
        statistics.median(sample.seconds for sample in samples),
        samples[0].request_count,
        max(sample.peak_memory for sample in samples),
        statistics.median(sample.cpu_seconds for sample in samples),
    )


class Bench:
    """The folder that samples work in, and what they have in common."""

    def __init__(self, folder: Path, images: Images) -> None:
        self.folder = folder
        self.images = images
        self._serial = 0

    def new_path(self, stem: str) -> Path:
        """A name in the work folder that is not taken."""
        self._serial += 1
        return self.folder / f"{stem}{self._serial}"

    @contextmanager
    def copy_of(self, image: Path) -> Iterator[Path]:
        """A copy of an image, on the disk and in the page cache, deleted afterwards."""
        path = self.new_path("copy")
        try:
            subprocess.run(
                ["cp", "--sparse=always", "--reflink=auto", image, path],
                stdin=subprocess.DEVNULL, check=True,
            )  # fmt: skip
            with path.open("rb") as file:
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def run_pairs(
        self, name: str, image: Path, ours: Side, peer: Side, *, rounds: int, fresh: bool
    ) -> Result:
        """`rounds` times A B B A."""
        result = Result(name)
        for _ in range(rounds):
            for order in ((ours, peer), (peer, ours)):
                for side in order:
                    with ExitStack() as stack:
                        path = stack.enter_context(self.copy_of(image)) if fresh else image
                        warm(path)
                        sample = side.measure(self, side, path)
                        if fresh and side is ours:
                            _check(path)
                    (result.ours if side is ours else result.peer).append(sample)
        return result


def _check(image: Path) -> None:
    """What was measured must have left a sound image, or its time means nothing."""
    done = subprocess.run(
        ["qemu-img", "check", "-q", image],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode not in (0, 3, 63):
        raise RuntimeError(f"qemu-img check: {done.stdout.decode(errors='replace')[-400:]}")


def warm(path: Path) -> None:
    """Bring the data of a sparse file into the page cache."""
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        offset = 0
        while offset < size:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for at in range(start, offset, _CHUNK):
                os.preadv(file.fileno(), [buffer], at)


def client(*workloads: Workload) -> Callable[[Bench, Side, Path], Sample]:
    """Measure the workloads, one after the other, through a served file."""

    def measure(bench: Bench, side: Side, image: Path) -> Sample:
        seconds = 0.0
        with side.make(image, bench.new_path("mount")) as server:
            cpu_before = server.cpu_so_far()
            for workload in workloads:
                seconds += run_client(server.file, workload)
            cpu_seconds = server.cpu_so_far() - cpu_before
        count = sum(workload.count * workload.jobs for workload in workloads)
        all_count = sum(
            workload.count * workload.jobs * (1 + workload.warm_up) for workload in workloads
        )
        return Sample(seconds, count, server.peak_memory, cpu_seconds / all_count)

    return measure


def run_client(path: Path, workload: Workload) -> float:
    """Run a workload in a process of its own; its seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.client", str(path), workload.dump()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=_PATIENCE,
        check=True,
    )
    return float(done.stdout.split(b":")[1].rstrip(b" }\n"))


def mounting(bench: Bench, side: Side, image: Path) -> Sample:
    """From the command's start until the file answers."""
    with side.make(image, bench.new_path("mount")) as server:
        pass
    return Sample(server.seconds_to_ready, 1, server.peak_memory)


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


@contextmanager
def _loop_device(path: Path) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", path)
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


def copying_a_tree(count: int) -> Callable[[Bench, Side, Path], Sample]:
    """A loop device, a fresh ext4 on it, a tree of `count` files copied in, all synced."""

    def measure(bench: Bench, side: Side, image: Path) -> Sample:
        tree = bench.folder / "tree"
        if not tree.exists():
            _make_tree(tree, count)
        point = bench.new_path("ext4")
        point.mkdir()
        try:
            with (
                side.make(image, bench.new_path("mount")) as server,
                _loop_device(server.file) as device,
            ):
                begun = time.perf_counter()
                _run("mkfs.ext4", "-q", "-F", device)
                _run("mount", device, point)
                try:
                    _run("cp", "-r", tree, point)
                    _run("sync", "--file-system", point)
                finally:
                    _run("umount", point)
                seconds = time.perf_counter() - begun
        finally:
            point.rmdir()
        return Sample(seconds, 1, server.peak_memory)

    return measure


def _make_tree(tree: Path, count: int) -> None:
    content = os.urandom(1 << 16)
    for number in range(count):
        folder = tree / f"{number % 50:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.bin").write_bytes(content[: 500 + number * 7919 % 40_000])


def discarding(bench: Bench, side: Side, image: Path) -> Sample:
    """blkdiscard of all of a loop device, until it is durable."""
    with (
        side.make(image, bench.new_path("mount")) as server,
        _loop_device(server.file) as device,
    ):
        begun = time.perf_counter()
        _run("blkdiscard", "-f", device)
        with server.file.open("rb") as file:
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
    return Sample(seconds, 1, server.peak_memory)


def snapshot_by_attribute(bench: Bench, side: Side, image: Path) -> Sample:
    """Our way: one extended attribute set on the mounted file."""
    with side.make(image, bench.new_path("mount")) as server:
        begun = time.perf_counter()
        os.setxattr(server.file, "user.qcowfs.snapshot.create", b"measured")
        seconds = time.perf_counter() - begun
    return Sample(seconds, 1, server.peak_memory)


def snapshot_by_command(bench: Bench, side: Side, image: Path) -> Sample:
    """The peer's way: qemu-img on the file."""
    begun = time.perf_counter()
    qemu_img("snapshot", "-c", "measured", image)
    return Sample(time.perf_counter() - begun, 1)


def remove_folder(folder: Path) -> None:
    """Delete the work folder; nothing is mounted below it by now."""
    shutil.rmtree(folder, ignore_errors=True)
