"""What cannot be mounted is refused in one line, and nothing is changed by it.

Images in use, both ways; images that are none, or broken, or unknown; mount
points and options that are wrong.
"""

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = tools.needs_fuse


def _refused(image: Path, *options: str, folder: Path | None = None) -> str:
    """The one line of a mount that fails; nothing is mounted by it."""
    if folder is None:
        folder = image.parent / "mnt"
        folder.mkdir(exist_ok=True)
    finished = tools.qcowfs("mount", *options, image, folder, check=False)
    if tools.is_mounted(folder):
        tools.force_away(folder)
        pytest.fail("it was mounted")
    assert finished.returncode == 1
    assert finished.stdout == ""
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("qcowfs: ")
    assert "Traceback" not in lines[0] and "internal error" not in lines[0]
    return lines[0]


# --- Bad images: each function spoils a good one, whose bytes it is given.


def _patch(offset: int, data: bytes) -> Callable[[bytearray], None]:
    def spoil(image: bytearray) -> None:
        image[offset : offset + len(data)] = data

    return spoil


def _cut(length: int) -> Callable[[bytearray], None]:
    def spoil(image: bytearray) -> None:
        del image[length:]

    return spoil


def _u32(offset: int, value: int) -> Callable[[bytearray], None]:
    return _patch(offset, struct.pack(">I", value))


def _u64(offset: int, value: int) -> Callable[[bytearray], None]:
    return _patch(offset, struct.pack(">Q", value))


def _noise(image: bytearray) -> None:
    image[:] = bytes(range(256)) * 512


def _rename_feature(image: bytearray) -> None:
    """Incompatible bit 7, with a feature table entry that names it."""
    image[72:80] = struct.pack(">Q", 1 << 7)
    place = image.index(b"\x00\x00dirty bit")
    image[place : place + 48] = b"\x00\x07flux capacitor".ljust(48, b"\0")


BAD_IMAGES = {
    "noise": _noise,
    "empty": _cut(0),
    "one byte": _cut(1),
    "half a magic": _cut(3),
    "half a version 2 header": _cut(50),
    "no version 3 header": _cut(75),
    "end of header cut": _cut(103),
    "tables cut": _cut(512),
    "refcounts cut": _cut(65536),
    "L1 cut": _cut(3 * 65536),
    "version 0": _u32(4, 0),
    "version 4": _u32(4, 4),
    "cluster bits 8": _u32(20, 8),
    "cluster bits 22": _u32(20, 22),
    "cluster bits huge": _u32(20, 0xFFFFFFFF),
    "size huge": _u64(24, 1 << 63),
    "encryption method 3": _u32(32, 3),
    "L1 size huge": _u32(36, 0xFFFFFFFF),
    "L1 size too small": _u32(36, 0),
    "L1 unaligned": _u64(40, 0x30001),
    "L1 past the end": _u64(40, 1 << 50),
    "refcount table unaligned": _u64(48, 0x10200),
    "refcount table past the end": _u64(48, 1 << 50),
    "refcount table huge": _u32(56, 0xFFFFFFFF),
    "refcount table none": _u32(56, 0),
    "snapshots too many": _u32(60, 65537),
    "incompatible bit unnamed": _u64(72, 1 << 40),
    "incompatible bit named": _rename_feature,
    "corrupt bit": _u64(72, 1 << 1),
    "refcount order 7": _u32(96, 7),
    "header length 0": _u32(100, 0),
    "header length 103": _u32(100, 103),
    "header length huge": _u32(100, 0xFFFFFFFF),
    "compression type 2": _patch(104, b"\x02"),
    "extension past the cluster": _u32(116, 0xFFFFFFFF),
}


@pytest.fixture(scope="module")
def good_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an image with a little data in it."""
    image = tools.create(tmp_path_factory.mktemp("good") / "good.qcow2", 4 * MIB)
    tools.qemu_io(image, "write -P 1 0 256k")
    return image.read_bytes()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image(tmp_path: Path, good_image: bytes, name: str) -> None:
    """One line that names the file; the image stays byte for byte."""
    spoiled = bytearray(good_image)
    BAD_IMAGES[name](spoiled)
    image = tmp_path / "bad.qcow2"
    image.write_bytes(spoiled)
    assert _refused(image).startswith(f"qcowfs: {image}: ")
    assert image.read_bytes() == spoiled


def test_an_unknown_feature_is_called_by_its_name(tmp_path: Path, good_image: bytes) -> None:
    """The image's own feature table says what it is that we do not know."""
    spoiled = bytearray(good_image)
    _rename_feature(spoiled)
    image = tmp_path / "bad.qcow2"
    image.write_bytes(spoiled)
    assert "flux capacitor" in _refused(image)


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    """A file name cannot write on the terminal, nor make a second line."""
    image = tmp_path / "evil\x1b[2J\nname"
    image.write_bytes(b"nothing")
    line = _refused(image)
    assert "\x1b" not in line
    assert "evil\\x1b[2J\\x0aname" in line


# --- Backing files.


def test_a_missing_backing_file(tmp_path: Path) -> None:
    """The line names the image, and the file that is missing."""
    base = tools.create(tmp_path / "base.qcow2", MIB)
    image = tmp_path / "top.qcow2"
    tools.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image)
    base.unlink()
    before = tools.sha256(image)
    line = _refused(image)
    assert "top.qcow2" in line and "base.qcow2" in line
    assert tools.sha256(image) == before


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_of_backing_files(tmp_path: Path, length: int) -> None:
    """An image that is its own backing file, over however many others."""
    names = [f"layer{number}" for number in range(length)]
    for name in names:
        tools.create(tmp_path / name, MIB)
    for name, below in zip(names, [*names[1:], names[0]], strict=True):
        tools.qemu_img("rebase", "-u", "-b", below, "-F", "qcow2", tmp_path / name)
    before = [tools.sha256(tmp_path / name) for name in names]
    _refused(tmp_path / names[0])
    assert [tools.sha256(tmp_path / name) for name in names] == before


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_a_backing_file_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """Only regular files and block devices are opened, and opening never waits."""
    if kind == "folder":
        (tmp_path / "base").mkdir()
    elif kind == "fifo":
        os.mkfifo(tmp_path / "base")
    name = "/dev/zero" if kind == "device" else "base"
    image = tmp_path / "top.qcow2"
    words = ["-u", "-f", "qcow2", "-b", name, "-F", "raw", str(image), "1M"]
    tools.qemu_img("create", "-q", *words)
    _refused(image)


# --- Wrong files, mount points and options.


def test_raw_is_never_guessed(tmp_path: Path) -> None:
    """A file that has no known magic is mounted only by `--format raw`."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"some disk" * 1000)
    _refused(image)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device"])
def test_an_image_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """What is not there, or neither a regular file nor a block device, is refused at once."""
    image = tmp_path / "image"
    if kind == "folder":
        image.mkdir()
    elif kind == "fifo":
        os.mkfifo(image)
    elif kind == "device":
        image = Path("/dev/zero")
    folder = tmp_path / "mnt"
    folder.mkdir()
    _refused(image, folder=folder)


@pytest.mark.parametrize("kind", ["missing", "file", "full"])
def test_a_wrong_mount_point(tmp_path: Path, kind: str) -> None:
    """Missing, not a directory, or not empty: the line names the mount point."""
    image = tools.create(tmp_path / "disk.qcow2", MIB)
    before = tools.sha256(image)
    folder = tmp_path / "point"
    if kind == "file":
        folder.write_text("")
    elif kind == "full":
        folder.mkdir()
        (folder / "something").write_text("")
    assert str(folder) in _refused(image, folder=folder)
    assert tools.sha256(image) == before


@pytest.mark.parametrize(
    "option",
    ["-ononsense", "-oro=1", "-ocache_size=x", "--cache-size=12Q", "--nonsense", "--format=vmdk",
     "--poll-us=-1", "--ready-fd=77", "-oformat", "--log-file=/nonexistent/log"],
)  # fmt: skip
def test_a_wrong_option(tmp_path: Path, option: str) -> None:
    """An option that is unknown, or has a wrong value."""
    image = tools.create(tmp_path / "disk.qcow2", MIB)
    before = tools.sha256(image)
    _refused(image, option)
    assert tools.sha256(image) == before


def test_umount_of_what_is_not_ours(tmp_path: Path) -> None:
    """`qcowfs umount` touches no mount of others, and says what is not there."""
    for point in (tmp_path, tmp_path / "missing", Path("/proc")):
        finished = tools.qcowfs("umount", point, check=False)
        assert finished.returncode == 1
        assert len(finished.stderr.splitlines()) == 1
    assert tools.is_mounted("/proc")


# --- Images in use.


@contextmanager
def _held_by_qemu(image: Path, *, read_only: bool = False) -> Iterator[None]:
    """QEMU has the image open, as a running machine would."""
    words = ["qemu-io", *(["-r"] if read_only else []), str(image)]
    holder = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        said = b""
        while b"iB" not in said and b"bytes" not in said:
            piece = os.read(holder.stdout.fileno(), 4096)
            assert piece, said
            said += piece
        yield
    finally:
        holder.communicate(b"quit\n", timeout=tools.PATIENCE_SECONDS)


def test_a_disk_that_qemu_writes_is_refused(tmp_path: Path) -> None:
    """One line with QEMU's own words; `--force-share` reads it all the same."""
    image = tools.create(tmp_path / "disk.qcow2", MIB)
    with _held_by_qemu(image):
        _refused(image, "-r")
        line = _refused(image)
        assert 'Failed to get "write" lock' in line
        assert "Is another process using the image" in line
        with tools.mounted(image, "-r", "--force-share") as mount:
            assert mount.active.stat().st_size == MIB
    with tools.mounted(image):
        pass


def test_a_disk_that_qemu_reads_can_be_read_and_not_written(tmp_path: Path) -> None:
    """Two readers agree; a writer is refused."""
    image = tools.create(tmp_path / "disk.qcow2", MIB)
    with _held_by_qemu(image, read_only=True):
        _refused(image)
        with tools.mounted(image, "-r"):
            pass


def test_a_backing_file_that_qemu_writes_is_refused(tmp_path: Path) -> None:
    """Every file of the chain is locked: the base of the overlay must not change."""
    base = tools.create(tmp_path / "base.qcow2", MIB)
    image = tmp_path / "top.qcow2"
    tools.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image)
    with _held_by_qemu(base):
        assert "lock" in _refused(image)


def test_a_mounted_image_is_refused_to_others(tmp_path: Path) -> None:
    """qemu-img, qemu-io and a second mount are refused, in QEMU's words; readers may force it."""
    base = tools.create(tmp_path / "base.qcow2", MIB)
    image = tmp_path / "top.qcow2"
    tools.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image)
    with tools.mounted(image) as mount:
        for command in (
            ["qemu-img", "info", image],
            ["qemu-img", "check", image],
            ["qemu-io", "-c", "write 0 512", image],
            ["qemu-io", "-c", "write 0 512", base],
        ):
            finished = tools.run(*command, check=False)
            said = finished.stdout + finished.stderr
            assert finished.returncode != 0, command
            assert "lock" in said and "Is another process using the image" in said
        (tmp_path / "second").mkdir()
        line = _refused(image, folder=tmp_path / "second")
        assert 'Failed to get "write" lock' in line
        again = tools.qcowfs("mount", image, mount.folder, check=False)
        assert again.returncode == 1
        assert f"{mount.folder} is not empty" in again.stderr
        assert "virtual size" in tools.qemu_img("info", "-U", image)
        for words in (["info", image], ["snapshot", "create", image, "x"]):
            finished = tools.qcowfs(*words, check=False)
            assert finished.returncode == 1
            assert "lock" in finished.stderr
    tools.qemu_img("info", image)
    tools.check_image(image)


def test_a_read_only_mount_leaves_readers_alone(tmp_path: Path) -> None:
    """While we read, QEMU may read and must not write."""
    image = tools.create(tmp_path / "disk.qcow2", MIB)
    with tools.mounted(image, "-r"):
        tools.qemu_img("info", image)
        finished = tools.run("qemu-io", "-c", "write 0 512", image, check=False)
        assert "lock" in finished.stdout + finished.stderr
