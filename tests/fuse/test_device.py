"""Mounting by descriptor: options, the descriptor itself, errors, unmounting."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.errors import BadRequest
from qcowfs.fuse import device

ROOT = Path(__file__).resolve().parent.parent.parent

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse"
)


def mount_line(point: Path) -> list[str]:
    """The fields of /proc/self/mounts for a mount point: source, point, type, options."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split(" ")
        if fields[1] == str(point):
            return fields
    return []


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A folder to mount on; whatever is on it afterwards is unmounted."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    if mount_line(folder):
        device.unmount(folder, lazy=True)


def test_options_are_joined() -> None:
    """None and True are bare flags, False leaves an option out."""
    options = {"ro": None, "allow_other": True, "dev": False, "max_read": "4096"}
    assert device.option_string(options) == "ro,allow_other,max_read=4096"


def test_options_are_escaped() -> None:
    """A comma or backslash in fsname ends no option."""
    assert device.option_string({"fsname": r"/a,suid\b"}) == r"fsname=/a\,suid\\b"


@pytest.mark.parametrize(
    "options",
    [
        {"max_read": "1,suid"},
        {"context": "a\\"},
        {"a,b": None},
        {"": None},
        {"fsname": "a\0b"},
        {"auto_unmount": None},
    ],
)
def test_options_that_could_inject_are_refused(options: dict[str, str | None]) -> None:
    """What cannot be said safely is not said."""
    with pytest.raises(BadRequest):
        device.option_string(options)


@needs_fuse
def test_mount_gives_a_descriptor(point: Path) -> None:
    """It is above 2, non-blocking and close-on-exec, and the mount shows type and source."""
    source = "/images/a,b \\c.qcow2"
    fd = device.mount(point, {"fsname": source, "ro": None})
    try:
        assert fd > 2
        assert not os.get_blocking(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        shown, _, kind, options = mount_line(point)[:4]
        assert shown == source.replace("\\", "\\134").replace(" ", "\\040")
        assert kind == "fuse.qcowfs"
        assert {"ro", "nosuid", "nodev"} <= set(options.split(","))
    finally:
        os.close(fd)
        device.unmount(point)
    assert not mount_line(point)


@needs_fuse
def test_mount_in_a_process_without_standard_streams(point: Path) -> None:
    """The descriptors that mounting needs survive being opened as 0, 1 and 2."""
    code = (
        "import os, sys\n"
        "from qcowfs.fuse import device\n"
        "report = os.dup(1)\n"
        "for fd in range(3): os.close(fd)\n"
        "fd = device.mount(sys.argv[1])\n"
        "ends = device.open_channel()\n"
        "os.write(report, b'%d %d %d' % (fd, *ends))\n"
        "os.close(fd)\n"
        "device.unmount(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(point)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    assert all(int(word) > 2 for word in done.stdout.split())
    assert not mount_line(point)


def test_mount_point_that_is_missing(tmp_path: Path) -> None:
    """A missing mount point is a plain ENOENT."""
    with pytest.raises(FileNotFoundError):
        device.mount(tmp_path / "missing")


def test_mount_point_that_is_a_file(tmp_path: Path) -> None:
    """A tree cannot be mounted on a file."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        device.mount(tmp_path / "file")


@needs_fuse
def test_mount_point_that_is_dead(point: Path) -> None:
    """Over a mount whose process is gone: ENOTCONN, so that the caller can clear it."""
    os.close(device.mount(point))
    with pytest.raises(OSError) as caught:
        device.mount(point)
    assert caught.value.errno == errno.ENOTCONN


@needs_fuse
def test_refusal_is_one_line(point: Path) -> None:
    """What fusermount3 says becomes the message, in one line and without its name."""
    with pytest.raises(device.MountFailed) as caught:
        device.mount(point, {"no_such_option": "x"})
    assert "unknown option" in str(caught.value)
    assert "fusermount3" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mount_line(point)


@needs_fuse
def test_mount_point_that_looks_like_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leading dash in the mount point's name is part of the name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-u").mkdir()
    fd = device.mount("-u")
    try:
        assert mount_line(tmp_path / "-u")
    finally:
        os.close(fd)
        device.unmount("-u")


@needs_fuse
def test_unmount_of_what_is_not_mounted(point: Path) -> None:
    """Unmounting a plain folder fails with a message."""
    with pytest.raises(device.MountFailed, match="cannot unmount"):
        device.unmount(point)


def test_helper_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fusermount3 the message names it."""
    monkeypatch.setattr(device, "_HELPER", "no-such-fusermount")
    with pytest.raises(device.MountFailed, match="not installed"):
        device.mount(tmp_path)


def test_channel_keeps_boundaries() -> None:
    """Two messages stay two, and the ends are non-blocking and close-on-exec."""
    ours, theirs = device.open_channel()
    try:
        for fd in (ours, theirs):
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
        os.write(ours, b"first")
        os.write(ours, b"second")
        assert os.read(theirs, 100) == b"first"
        assert os.read(theirs, 100) == b"second"
    finally:
        os.close(ours)
        os.close(theirs)


def test_channel_carries_a_megabyte_where_it_may() -> None:
    """Where the system allows the buffer, a whole 1 MiB request fits one message."""
    ours, theirs = device.open_channel()
    try:
        with socket.socket(fileno=os.dup(ours)) as end:
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 << 20:
                pytest.skip("net.core.wmem_max is too small for that")
        assert os.write(ours, bytes((1 << 20) + 80)) == (1 << 20) + 80
        assert len(os.read(theirs, 2 << 20)) == (1 << 20) + 80
    finally:
        os.close(ours)
        os.close(theirs)
