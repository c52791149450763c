"""Whatever ends a mount, and however it was started: what was written is in the image."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = tools.needs_fuse


def _sigterm(mount: tools.Mounted) -> None:
    os.kill(mount.pid, signal.SIGTERM)


def _sigint(mount: tools.Mounted) -> None:
    os.kill(mount.pid, signal.SIGINT)


def _umount(mount: tools.Mounted) -> None:
    tools.run("umount", mount.folder)


def _fusermount(mount: tools.Mounted) -> None:
    tools.run("fusermount3", "-u", mount.folder)


def _qcowfs_umount(mount: tools.Mounted) -> None:
    mount.umount()


def _qcowfs_lazily(mount: tools.Mounted) -> None:
    tools.qcowfs("umount", "--lazy", mount.folder)


ENDS = [
    _sigterm,
    _sigint,
    pytest.param(_umount, marks=tools.needs_root),
    _fusermount,
    _qcowfs_umount,
    _qcowfs_lazily,
]


@pytest.mark.parametrize("lane", ["lane", "no-lane"])
@pytest.mark.parametrize("end", ENDS)
def test_an_end_flushes_and_closes(
    tmp_path: Path, end: Callable[[tools.Mounted], None], lane: str
) -> None:
    """Writes that nobody synced are in the image, it is clean, and QEMU may open it."""
    image = tools.create(tmp_path / "disk.qcow2", 64 * MIB)
    with tools.mounted(image, *([] if lane == "lane" else ["--no-lane"])) as mount:
        for number in range(40):
            tools.pwrite(mount.active, bytes([number + 1]) * 70_000, number * 1_000_000)
        end(mount)
        tools.wait_for_end(mount.pid)
        assert not tools.is_mounted(mount.folder)
    tools.check_image(image)
    checks = [f"read -P {number + 1} {number * 1_000_000} 70000" for number in range(40)]
    tools.qemu_io(image, *checks)


def test_a_signal_while_a_file_is_open(tmp_path: Path) -> None:
    """SIGTERM ends a mount that is in use, too: the image is closed, its files answer errors."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            os.pwrite(descriptor, b"kept" * 1024, 4096)
            os.kill(mount.pid, signal.SIGTERM)
            tools.wait_for_end(mount.pid)
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    tools.check_image(image)
    assert tools.pread(tools.raw_copy(image), 4, 4096) == b"kept"


@contextlib.contextmanager
def _in_foreground(image: Path, folder: Path, *, shell: str) -> Iterator[subprocess.Popen[bytes]]:
    """`qcowfs mount -f` started by a shell that first does `shell`; ready when this yields."""
    folder.mkdir()
    reading, writing = os.pipe()
    words = [*tools.QCOWFS, "mount", "-f", f"--ready-fd={writing}", str(image), str(folder)]
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'{shell} exec "$@"', "sh", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[writing],
        env=tools.environment(),
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"ready\n", process.communicate()[1].decode()
        yield process
    finally:
        tools.force_away(folder, process.pid)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_foreground_with_signals_ignored_by_the_parent(tmp_path: Path, number: int) -> None:
    """A shell that ignores signals does not make a mount that no signal ends."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    folder = tmp_path / "mnt"
    with _in_foreground(image, folder, shell="trap '' INT TERM HUP;") as process:
        tools.pwrite(folder / "active.raw", b"x" * 5000, 5000)
        process.send_signal(number)
        complaint = process.communicate(timeout=tools.PATIENCE_SECONDS)[1]
        assert process.returncode == 0, complaint
        assert not tools.is_mounted(folder)
    tools.check_image(image)
    tools.qemu_io(image, "read -P 120 5000 5000")


def test_standard_descriptors_closed(tmp_path: Path) -> None:
    """With descriptors 0, 1 and 2 closed the image takes none of their numbers."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    folder = tmp_path / "mnt"
    folder.mkdir()
    words = [*tools.QCOWFS, "mount", str(image), str(folder)]
    tools.run("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words)
    try:
        mount = tools.Mounted(image, folder)
        links = [os.readlink(f"/proc/{mount.pid}/fd/{number}") for number in range(3)]
        assert links == ["/dev/null"] * 3
        tools.pwrite(mount.active, b"y" * 5000, 5000)
        mount.umount()
    finally:
        tools.force_away(folder)
    tools.check_image(image)
    tools.qemu_io(image, "read -P 121 5000 5000")


def test_relative_paths_and_files_of_the_mount(tmp_path: Path) -> None:
    """Paths count from where the command was started; pid and log files are kept there."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    (tmp_path / "mnt").mkdir()
    words = ["--pid-file", "pid", "--log-file", "log", "disk.qcow2", "mnt"]
    tools.qcowfs("mount", *words, cwd=tmp_path)
    try:
        mount = tools.Mounted(image, tmp_path / "mnt")
        assert (tmp_path / "pid").read_text() == f"{mount.pid}\n"
        assert os.readlink(f"/proc/{mount.pid}/cwd") == "/"
        assert os.readlink(f"/proc/{mount.pid}/fd/2") == str(tmp_path / "log")
        tools.qcowfs("umount", "mnt", cwd=tmp_path)
        assert not tools.is_alive(mount.pid)
    finally:
        tools.force_away(tmp_path / "mnt")
    assert not (tmp_path / "pid").exists()
    assert (tmp_path / "log").read_text() == ""


def test_called_as_a_mount_helper_calls(tmp_path: Path) -> None:
    """`qcowfs IMAGE MOUNTPOINT -o ...` is `qcowfs mount`, with all that mount(8) adds."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    folder = tmp_path / "mnt"
    folder.mkdir()
    tools.qcowfs(image, folder, "-o", "ro,nosuid,nodev,noatime,_netdev,x-systemd.automount,user")
    try:
        mount = tools.Mounted(image, folder)
        with pytest.raises(OSError):
            os.close(os.open(mount.active, os.O_WRONLY))
        mount.umount()
    finally:
        tools.force_away(folder)


def test_a_dead_mount_is_cleared(tmp_path: Path) -> None:
    """After a kill -9 `qcowfs mount` mounts anew and `qcowfs umount` clears, each in one line."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    folder = tmp_path / "mnt"
    for again in (True, False):
        with tools.mounted(image, folder=folder) as mount:
            tools.pwrite(mount.active, b"z" * 4096, 0, sync=True)
            os.kill(mount.pid, signal.SIGKILL)
            tools.wait_for_end(mount.pid)
            if again:
                said = tools.qcowfs("mount", image, folder).stderr
                assert len(said.splitlines()) == 1 and "cleared" in said
                tools.Mounted(image, folder).umount()
            else:
                said = tools.qcowfs("umount", folder).stderr
                assert len(said.splitlines()) == 1 and "cleared" in said
                assert not tools.is_mounted(folder)
    tools.qemu_io(image, "read -P 122 0 4096")


def test_umount_of_a_busy_mount(tmp_path: Path) -> None:
    """Refused in one line while a file is open; nothing has changed, and later it succeeds."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            finished = tools.qcowfs("umount", mount.folder, check=False)
            assert finished.returncode == 1
            assert len(finished.stderr.splitlines()) == 1 and "in use" in finished.stderr
            assert os.pwrite(descriptor, b"w" * 4096, 0) == 4096
        finally:
            os.close(descriptor)
    tools.qemu_io(image, "read -P 119 0 4096")


def test_a_lazy_umount_serves_until_the_last_close(tmp_path: Path) -> None:
    """The directory is empty at once; a file that is open works until it is closed."""
    image = tools.create(tmp_path / "disk.qcow2", 8 * MIB)
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            tools.qcowfs("umount", "--lazy", mount.folder)
            assert os.listdir(mount.folder) == []
            assert os.pwrite(descriptor, b"v" * 4096, 0) == 4096
            assert os.pread(descriptor, 4096, 0) == b"v" * 4096
        finally:
            os.close(descriptor)
        tools.wait_for_end(mount.pid)
    tools.check_image(image)
    tools.qemu_io(image, "read -P 118 0 4096")


@tools.needs_root
@pytest.mark.parametrize("lane", ["lane", "no-lane"])
def test_a_failed_last_flush_is_told(tmp_path: Path, lane: str) -> None:
    """When the host cannot write, `qcowfs umount` unmounts, says so, and exits with 1.

    The image lies on a loop device whose file cannot grow, as on a full thin
    pool: writes go into the page cache, and the flush fails.
    """
    small = tmp_path / "small"
    small.mkdir()
    tools.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
    try:
        with (small / "disk").open("wb") as disk:
            disk.truncate(16 * MIB)
        with tools.loop_device(small / "disk") as device:
            tools.qemu_img("create", "-q", "-f", "qcow2", device, "8M")
            options = [] if lane == "lane" else ["--no-lane"]
            with tools.mounted(Path(device), *options, folder=tmp_path / "mnt") as mount:
                with (small / "filler").open("wb", buffering=0) as filler:
                    with contextlib.suppress(OSError):
                        while True:
                            filler.write(bytes(4096))
                descriptor = os.open(mount.active, os.O_WRONLY)
                os.pwrite(descriptor, b"u" * 500_000, 0)
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                finished = tools.qcowfs("umount", mount.folder, check=False)
                assert finished.returncode == 1
                assert "the last flush failed" in finished.stderr
                assert len(finished.stderr.splitlines()) == 1
                assert not tools.is_mounted(mount.folder)
                assert not tools.is_alive(mount.pid)
    finally:
        tools.run("umount", small)
