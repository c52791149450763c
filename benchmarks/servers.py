"""The things measured: processes that show an image as a raw file.

Each server is a context manager around one process: started on an image, ready
when its file answers, unmounted and gone at the end, whatever happened inside.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """A server did not start; the message has its last words."""


class Server:
    """One process that serves `image`; `file` is what clients use."""

    name = ""

    def __init__(self, image: Path, folder: Path, options: tuple[str, ...] = ()) -> None:
        self.image = image
        self.folder = folder
        self.options = options
        self.file = folder / "disk"
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds_to_ready = 0.0
        self.peak_memory = 0
        self._log = folder.with_suffix(".log")

    def command(self) -> list[str]:
        """The command line that serves the image."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Whether the file answers."""
        raise NotImplementedError

    def ask_to_stop(self) -> None:
        """Begin an orderly end."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the command needs."""
        self.folder.mkdir()

    def tidy(self) -> None:
        """Remove what `prepare` made."""
        self.folder.rmdir()

    def __enter__(self) -> Self:
        self.prepare()
        begun = time.perf_counter()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(os.environ, PYTHONPATH=str(ROOT)),
            )
        try:
            while not self.is_ready():
                if self.process.poll() is not None:
                    raise ServerFailed(f"{self.name}: {self._last_words()}")
                if time.perf_counter() - begun > _PATIENCE:
                    raise ServerFailed(f"{self.name} is not ready after {_PATIENCE:.0f} s")
                time.sleep(0.0005)
        except BaseException:
            self._end()
            raise
        self.seconds_to_ready = time.perf_counter() - begun
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._note_costs()
        self._end()

    def cpu_so_far(self) -> float:
        """Seconds of processor time that the process has used, in all its threads."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def _note_costs(self) -> None:
        assert self.process is not None
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.peak_memory = int(line.split()[1]) * 1024

    def _end(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.ask_to_stop()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for point in (self.folder, self.file):
            if _is_mounted(point):
                subprocess.run(["fusermount3", "-u", "-z", "--", point], check=False)
        self.tidy()
        self._log.unlink(missing_ok=True)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "ended without a word"


class Qcowfs(Server):
    """This project, as users run it."""

    name = "qcowfs"

    def __init__(self, image: Path, folder: Path, options: tuple[str, ...] = ()) -> None:
        super().__init__(image, folder, options)
        self.file = folder / "active.raw"

    def command(self) -> list[str]:
        """`qcowfs mount` in the foreground."""
        command = [sys.executable, "-m", "qcowfs", "mount", "-f", *self.options]
        return [*command, str(self.image), str(self.folder)]

    def is_ready(self) -> bool:
        """The tree is there once the mount answers."""
        return self.file.exists()

    def ask_to_stop(self) -> None:
        """A plain unmount."""
        subprocess.run(["fusermount3", "-u", "--", self.folder], check=False)


class QemuExport(Server):
    """qemu-storage-daemon's FUSE export of the same image."""

    name = "qemu-storage-daemon"
    program = "qemu-storage-daemon"

    def command(self) -> list[str]:
        """One file node, one qcow2 node, one writable export."""
        return [
            self.program,
            "--blockdev",
            f"file,node-name=f,filename={_escaped(self.image)},discard=unmap",
            "--blockdev",
            "qcow2,node-name=q,file=f,discard=unmap",
            "--export",
            f"fuse,id=e,node-name=q,mountpoint={_escaped(self.file)},writable=on",
        ]

    def prepare(self) -> None:
        """The export is mounted on a file."""
        self.folder.mkdir()
        self.file.touch()

    def tidy(self) -> None:
        """The file goes with its folder."""
        self.file.unlink(missing_ok=True)
        self.folder.rmdir()

    def is_ready(self) -> bool:
        """The empty file has the disk's size once the export answers."""
        return self.file.stat().st_size > 0

    def ask_to_stop(self) -> None:
        """It unmounts and closes the image on SIGTERM."""
        assert self.process is not None
        self.process.terminate()


def qemu_export(program: str) -> Callable[[Path, Path], Server]:
    """A maker of exports by the qemu-storage-daemon at `program`."""

    def make(image: Path, folder: Path) -> Server:
        server = QemuExport(image, folder)
        server.program = program
        return server

    return make


def qcowfs(*options: str) -> Callable[[Path, Path], Server]:
    """A maker of mounts with these command line options."""
    return lambda image, folder: Qcowfs(image, folder, options)


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _is_mounted(point: Path) -> bool:
    wanted = str(point)
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        return any(line.split(" ")[1] == wanted for line in table)
