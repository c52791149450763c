"""The real commands on real files: mounts, loop devices, qemu-img, and what they leave.

Everything here waits by looking again until it is so, a minute at most, since
the machine may be busy with other work. Nothing depends on a terminal, on
standard input or on the working directory.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qcowfs.cli.common import find_mounts

ROOT = Path(__file__).resolve().parents[2]
QCOWFS = (sys.executable, "-m", "qcowfs")
PATIENCE_SECONDS = 60
COMMAND_SECONDS = 240

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def environment() -> dict[str, str]:
    """What commands see: our package first, one language, and compiled modules kept."""
    settings = dict(os.environ, PYTHONPATH=str(ROOT), LC_ALL="C.UTF-8")
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    return settings


def run(
    *command: str | os.PathLike[str],
    check: bool = True,
    stdin: str | bytes | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command; with `check` a failure shows what it said."""
    words = [os.fspath(word) for word in command]
    data = stdin.encode() if isinstance(stdin, str) else stdin
    feed: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    options.setdefault("env", environment())
    limits: dict[str, Any] = {"capture_output": True, "timeout": COMMAND_SECONDS}
    finished = subprocess.run(words, **limits, **feed, **options)
    stdout = finished.stdout.decode(errors="surrogateescape")
    stderr = finished.stderr.decode(errors="surrogateescape")
    if check and finished.returncode != 0:
        pytest.fail(f"{' '.join(words)}: exit {finished.returncode}: {stdout}{stderr}")
    return subprocess.CompletedProcess(words, finished.returncode, stdout, stderr)


def qcowfs(
    *arguments: str | os.PathLike[str], check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `qcowfs ARGUMENTS`."""
    return run(*QCOWFS, *arguments, check=check, **options)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true answer of `condition`; fails after a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = 0.002
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_SECONDS} s in vain: {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def is_mounted(folder: str | os.PathLike[str]) -> bool:
    """Whether something is mounted exactly there, alive or dead."""
    return bool(find_mounts(os.fspath(folder)))


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and is not yet reaped does not."""
    try:
        row = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return row.rpartition(")")[2].split()[0] not in {"Z", "X"}


def wait_for_end(pid: int) -> None:
    """Return when the process has ended."""
    wait_until(lambda: not is_alive(pid), f"the end of process {pid}")


class Mounted:
    """A mounted image: its folder, its files, and the process that serves it."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image = image
        self.folder = folder
        self.active = folder / "active.raw"
        self.snapshots = folder / "snapshots"
        self.pid = int(self.statistics()["pid"])

    def statistics(self) -> dict[str, Any]:
        """The attribute user.qcowfs.stats."""
        answer: dict[str, Any] = json.loads(os.getxattr(self.folder, "user.qcowfs.stats"))
        return answer

    def snapshot(self, verb: str, value: str) -> None:
        """Set user.qcowfs.snapshot.VERB by setfattr, as a user does."""
        run("setfattr", "-n", f"user.qcowfs.snapshot.{verb}", "-v", value, self.active)

    def umount(self) -> None:
        """`qcowfs umount`, and what it promises: the process has ended."""
        qcowfs("umount", self.folder)
        assert not is_mounted(self.folder)
        assert not is_alive(self.pid), "umount returned before the process had ended"


def force_away(folder: Path, pid: int | None = None) -> None:
    """After a failure: no mount and no process is left, whatever state they are in."""
    if is_mounted(folder):
        subprocess.run(["umount", "--lazy", folder], capture_output=True)
    if pid is not None and is_alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def mounted(image: Path, *options: str, folder: Path | None = None) -> Iterator[Mounted]:
    """`qcowfs mount IMAGE FOLDER`, unmounted by `qcowfs umount` in the end.

    The block may unmount by itself; then nothing more is done.
    """
    folder = folder or image.parent / f"{image.name}.mnt"
    folder.mkdir(exist_ok=True)
    qcowfs("mount", *options, image, folder)
    pid = None
    try:
        mount = Mounted(image, folder)
        pid = mount.pid
        yield mount
        if is_mounted(folder):
            mount.umount()
    finally:
        force_away(folder, pid)


def _detach(device: str) -> None:
    run("losetup", "--detach", device, check=False)
    sysfs = Path(f"/sys/block/{Path(device).name}/loop")
    # A device that is still held goes away with its last holder.
    wait_until(lambda: not sysfs.exists(), f"{device} to be detached")


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A loop device on a file, with its partitions; two searchers may meet, so it tries again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        made = run("losetup", "--find", "--show", "--partscan", *options, path, check=False)
        if made.returncode == 0:
            break
        if time.monotonic() > deadline:
            pytest.fail(f"losetup: {made.stderr}")
        time.sleep(0.2)
    device = made.stdout.strip()
    try:
        yield device
    finally:
        run("partx", "--delete", device, check=False)
        _detach(device)


def scan_partitions(device: str, count: int) -> list[str]:
    """The partitions' devices, told to the kernel by partx where it cannot read the table."""
    run("partx", "--update", device, check=False)
    names = [f"{device}p{number}" for number in range(1, count + 1)]
    for name in names:
        wait_until(lambda name=name: stat.S_ISBLK(os.stat(name).st_mode), name)
    return names


@contextlib.contextmanager
def filesystem(device: str, folder: Path, options: str = "rw") -> Iterator[Path]:
    """An ext4 mounted by the kernel."""
    folder.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", options, device, folder)
    try:
        yield folder
    finally:
        finished = run("umount", folder, check=False)
        if finished.returncode != 0:
            run("umount", "--lazy", folder, check=False)


def qemu_img(*arguments: str | os.PathLike[str], check: bool = True) -> str:
    """What `qemu-img ARGUMENTS` prints."""
    return run("qemu-img", *arguments, check=check).stdout


def qemu_io(image: Path, *commands: str, options: Sequence[str] = ()) -> None:
    """Run qemu-io's commands on an image; each has to succeed."""
    words = [word for command in commands for word in ("-c", command)]
    finished = run("qemu-io", *options, *words, image)
    said = finished.stdout + finished.stderr
    assert "failed" not in said and "rror" not in said, said


def create(path: Path, size: int | str, **options: object) -> Path:
    """`qemu-img create -f qcow2 -o OPTIONS`."""
    words = ",".join(f"{name}={value}" for name, value in options.items())
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", words] if words else []), path, str(size))
    return path


def check_image(image: Path) -> None:
    """`qemu-img check` finds neither corruption nor a leak."""
    finished = run("qemu-img", "check", image, check=False)
    assert finished.returncode == 0, f"qemu-img check: {finished.stdout}{finished.stderr}"


def sha256(path: Path) -> str:
    """The digest of a file's bytes, all of them."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def raw_copy(image: Path, *options: str) -> Path:
    """`qemu-img convert -O raw` into a sparse file beside the image."""
    target = image.with_name(f"{image.name}.raw")
    qemu_img("convert", *options, "-O", "raw", image, target)
    return target


def raw_sha256(image: Path, *options: str) -> str:
    """The digest of the active disk as QEMU reads it."""
    target = raw_copy(image, *options)
    try:
        return sha256(target)
    finally:
        target.unlink()


def snapshot_digest(image: Path, identifier: str) -> tuple[str, int]:
    """(digest, size) of a snapshot, by QEMU: applied to a copy, which knows its true size."""
    copy = image.with_name(f"{image.name}.copy")
    run("cp", "--sparse=always", image, copy)
    try:
        qemu_img("snapshot", "-a", identifier, copy)
        raw = raw_copy(copy)
        try:
            return sha256(raw), raw.stat().st_size
        finally:
            raw.unlink()
    finally:
        copy.unlink()


def snapshot_list(image: Path) -> list[dict[str, Any]]:
    """The snapshots as `qemu-img info` tells them."""
    facts = json.loads(qemu_img("info", "-U", "--output=json", image))
    answer: list[dict[str, Any]] = facts.get("snapshots", [])
    return answer


def make_tree(folder: Path, count: int, seed: int) -> None:
    """`count` files of 0 to 20,000 seeded bytes, in some tens of folders."""
    chance = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        place = folder / f"folder{number % 37:02d}"
        if number < 37:
            place.mkdir()
        length = chance.choice((0, 1, 100, 700, 1500, 4096, 5000, 20_000))
        (place / f"file-{number:05d}.dat").write_bytes(chance.randbytes(length))


def tree_digest(folder: Path) -> dict[str, str]:
    """Relative path to digest, of every file."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pwrite(path: Path, data: bytes, offset: int, *, sync: bool = False) -> None:
    """Write at an offset of a file that exists."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view = view[written:]
            offset += written
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pread(path: Path, length: int, offset: int) -> bytes:
    """Read from an offset of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def peak_memory(pid: int) -> int:
    """VmHWM in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def drop_caches(path: Path) -> None:
    """Forget the kernel's cached pages of one file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
needs_fuse = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None,
    reason="no /dev/fuse, or no fusermount3",
)

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), whose modes Python does not have."""
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
