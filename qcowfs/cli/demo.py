"""`make demo`: a tour in a temporary folder that leaves nothing behind.

It runs the commands that a reader would type, prints them, and takes
everything away again, whatever happens on the way. Loop devices are used where
this user may; otherwise the partition table is written into the file itself.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from qcowfs.cli.common import CommandError, Parser, naming

_FIRST = b"the first version: what the snapshot has to keep"
_SECOND = b"the second version: written over it afterwards"

# Where the first of the two partitions begins.
_DATA_OFFSET = 1 << 20

_LAYOUT = "label: dos\nstart=2048, size=32768, type=83\ntype=c\n"


def _say(text: str = "") -> None:
    print(text, flush=True)


def _run(*command: str, show: str | None = None, stdin: str | None = None) -> str:
    """Run a command that has to succeed, and show it; answers what it printed."""
    _say(f"$ {show or ' '.join(command)}")
    finished = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise CommandError(
            f"{command[0]} failed: {(finished.stderr or finished.stdout).strip()}", file="demo"
        )
    return finished.stdout


def _qcowfs(*arguments: str) -> str:
    return _run(sys.executable, "-m", "qcowfs", *arguments, show=f"qcowfs {' '.join(arguments)}")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder as the working directory, gone in the end."""
    previous = os.getcwd()
    folder = Path(tempfile.mkdtemp(prefix="qcowfs-demo-"))
    try:
        os.chdir(folder)
        yield folder
    finally:
        os.chdir(previous)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _mounted(image: str, mountpoint: str) -> Iterator[None]:
    _qcowfs("mount", image, mountpoint)
    try:
        yield
    except BaseException:
        command = [sys.executable, "-m", "qcowfs", "umount", "--lazy", mountpoint]
        subprocess.run(command, capture_output=True, check=False)
        raise
    _qcowfs("umount", mountpoint)


@contextlib.contextmanager
def _disk(path: str) -> Iterator[str]:
    """A loop device on `path` where this user may have one; otherwise `path` itself."""
    device = path
    if os.geteuid() == 0 and shutil.which("losetup") and os.path.exists("/dev/loop-control"):
        with contextlib.suppress(CommandError):
            device = _run("losetup", "--find", "--partscan", "--show", path).strip()
    if device == path:
        _say("(no loop device for this user: working on the file itself)")
    try:
        yield device
    finally:
        if device != path:
            subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data.ljust(512, b"."), _DATA_OFFSET)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, 512, _DATA_OFFSET).rstrip(b".").decode(errors="replace")
    finally:
        os.close(descriptor)


def _tour() -> None:
    _say("1. An image, and the directory that shows it")
    _say(_qcowfs("create", "disk.qcow2", "64M").rstrip())
    os.mkdir("mnt")
    with _mounted("disk.qcow2", "mnt"):
        _say("\n2. Two partitions, made by ordinary tools, as fdisk sees them")
        with _disk("mnt/active.raw") as disk:
            _run("sfdisk", "--quiet", "--no-reread", disk, stdin=_LAYOUT)
            _say(_run("fdisk", "-l", disk).rstrip())
            _write(disk, _FIRST)

        _say("\n3. A snapshot, and then the disk is overwritten")
        _say("$ setfattr -n user.qcowfs.snapshot.create -v before mnt/active.raw")
        os.setxattr("mnt/active.raw", "user.qcowfs.snapshot.create", b"before")
        _write("mnt/active.raw", _SECOND)
        kept, current = _read("mnt/snapshots/before.raw"), _read("mnt/active.raw")
        _say(f"mnt/active.raw            has  {current}")
        _say(f"mnt/snapshots/before.raw  kept {kept}")
        if kept.encode() != _FIRST or current.encode() != _SECOND:
            raise CommandError("the snapshot did not keep what it had to", file="demo")

        _say("\n4. What there is")
        for folder, _, names in sorted(os.walk("mnt")):
            for name in sorted(names):
                path = os.path.join(folder, name)
                _say(f"{os.stat(path).st_size:>12}  {path}")
        _say()
    _say("\n5. Unmounted: flushed, closed and unlocked")
    _say(_qcowfs("snapshot", "list", "disk.qcow2").rstrip())
    if shutil.which("qemu-img"):
        _say(_run("qemu-img", "check", "disk.qcow2").rstrip())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run the tour; answers the exit code."""
    Parser("demo", "A tour of qcowfs in a temporary folder.").parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    path = [*os.environ.get("PATH", "/usr/bin:/bin").split(":"), "/usr/sbin", "/sbin"]
    os.environ["PATH"] = ":".join(dict.fromkeys(path))
    # The commands run in another folder, where an uninstalled package is not found.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    with naming("demo"), _folder():
        _tour()
    _say("\nDone; nothing is left behind.")
    return 0


if __name__ == "__main__":
    from qcowfs.cli.main import main

    sys.exit(main(["demo", *sys.argv[1:]]))
