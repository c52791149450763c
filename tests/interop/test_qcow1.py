"""qcow version 1 against QEMU and libqcow: what they wrote is read, what is written they read.

Everything goes through a real mount. `qemu-img convert -c` of QEMU 7.2 leaves
with 1 after a complete copy to this format, so `qemu-img compare` says whether
it is one.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import KIB, MIB

pytestmark = tools.needs_fuse

SIZE = 5 * MIB + 512
PASSPHRASE = b"twenty bytes of this"
SECRET = ("--object", "secret,id=s,file=")


def sparse_content(seed: int, size: int = SIZE) -> bytearray:
    """Zeros with runs of noise and of one value among them."""
    chance = random.Random(seed)
    content = bytearray(size)
    for _ in range(24):
        length = chance.choice((100, 512, 5000, 70_000, 140_000))
        start = chance.randrange(size - length)
        noise = chance.random() < 0.5
        content[start : start + length] = (
            chance.randbytes(length) if noise else bytes([chance.randrange(256)]) * length
        )
    return content


def image_options(image: Path, key: Path | None) -> list[str]:
    """How QEMU's tools are told of an image, encrypted or not."""
    if key is None:
        return ["--image-opts", f"driver=qcow,file.filename={image}"]
    options = f"driver=qcow,encrypt.format=aes,encrypt.key-secret=s,file.filename={image}"
    return [*secret(key), "--image-opts", options]


def secret(key: Path) -> list[str]:
    """A secret object of the passphrase in a file."""
    return [SECRET[0], SECRET[1] + str(key)]


def raw_of(image: Path, key: Path | None = None) -> bytes:
    """All bytes of the disk as QEMU reads them."""
    target = image.with_suffix(".out")
    tools.run("qemu-img", "convert", *image_options(image, key), "-O", "raw", target)
    try:
        return target.read_bytes()
    finally:
        target.unlink()


def make_image(folder: Path, kind: str, content: bytearray) -> tuple[Path, Path | None]:
    """An image of a kind that shows `content`, made by QEMU, and the file of its passphrase."""
    source, image = folder / "source.raw", folder / f"{kind}.qcow"
    source.write_bytes(content)
    key = None
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow"]
    if kind == "plain":
        tools.run(*convert, source, image)
    elif kind == "compressed":
        tools.run(*convert, "-c", source, image, check=False)
        tools.run("qemu-img", "compare", "-f", "raw", "-F", "qcow", source, image)
    elif kind == "aes":
        key = folder / "key"
        key.write_bytes(PASSPHRASE)
        words = [*convert[:2], *secret(key), *convert[2:]]
        tools.run(*words, "-o", "encrypt.format=aes,encrypt.key-secret=s", source, image)
    else:
        tools.run("qemu-img", "create", "-q", "-f", "qcow", "-b", source.name, "-F", "raw", image)
        chance = random.Random(77)
        commands = []
        for _ in range(12):
            start, length = chance.randrange(SIZE // 512 - 200) * 512, chance.randint(1, 100) * 512
            value = chance.randrange(1, 256)
            commands.append(f"write -P {value} {start} {length}")
            content[start : start + length] = bytes([value]) * length
        tools.qemu_io(image, *commands, options=("-f", "qcow"))
    return image, key


def change(path: Path, content: bytearray, seed: int, *, punching: bool = True) -> None:
    """Random writes, and unless libfuse alone serves, holes, through a file and into its model."""
    chance = random.Random(seed)
    with path.open("r+b", buffering=0) as file:
        for number in range(60):
            length = chance.choice((1, 100, 512, 4096, 70_000))
            start = chance.randrange(len(content) - length)
            if punching and number % 5 == 4:
                mode = (tools.FALLOC_PUNCH_HOLE, tools.FALLOC_ZERO_RANGE)[number % 2]
                tools.fallocate(file.fileno(), mode | tools.FALLOC_KEEP_SIZE, start, length)
                data = bytes(length)
            else:
                data = chance.randbytes(length)
                os.pwrite(file.fileno(), data, start)
            content[start : start + length] = data
            if number % 20 == 19:
                os.fsync(file.fileno())


@pytest.mark.parametrize("lane", ["--poll-us=50", "--no-lane"])
@pytest.mark.parametrize("kind", ["plain", "compressed", "aes", "backing"])
def test_images_by_qemu(kind: str, lane: str, tmp_path: Path) -> None:
    """Each kind reads byte-identical, and after random writes QEMU reads what was written."""
    content = sparse_content(1)
    image, key = make_image(tmp_path, kind, content)
    options = [lane, "--backing-format", "raw"]
    if key is not None:
        options += ["--key-file", str(key)]
    with tools.mounted(image, *options, "-r") as mount:
        assert mount.active.read_bytes() == content
    with tools.mounted(image, *options) as mount:
        assert mount.active.read_bytes() == content
        change(mount.active, content, 2, punching=lane != "--no-lane")
        tools.drop_caches(mount.active)
        assert mount.active.read_bytes() == content
    assert raw_of(image, key) == content
    with tools.mounted(image, *options) as mount:
        assert mount.active.read_bytes() == content


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 16384, 65536])
@pytest.mark.parametrize("backed", [False, True])
def test_our_images_in_qemu(cluster_size: int, backed: bool, tmp_path: Path) -> None:
    """QEMU reads and writes what `create -f qcow` made and the mount filled, and we read that."""
    content = sparse_content(3) if backed else bytearray(SIZE)
    image = tmp_path / "new.qcow"
    options = ["-o", f"cluster_size={cluster_size}"]
    if backed:
        (tmp_path / "base.raw").write_bytes(content)
        options += ["-b", "base.raw", "-F", "raw"]
    tools.qcowfs("create", "-q", "-f", "qcow", *options, image, str(SIZE))
    mount_options = ["--backing-format", "raw"] if backed else []
    with tools.mounted(image, *mount_options) as mount:
        change(mount.active, content, 4)
    assert raw_of(image) == content
    # QEMU copies nothing along, so over a backing file it only writes whole clusters.
    start = 3 * MIB
    tools.qemu_io(image, f"write -P 9 {start} 64k", options=("-f", "qcow"))
    content[start : start + 64 * KIB] = b"\x09" * (64 * KIB)
    with tools.mounted(image, *mount_options) as mount:
        assert mount.active.read_bytes() == content


@contextmanager
def by_libqcow(image: Path) -> Iterator[Path]:
    """The disk as qcowmount shows it."""
    folder = image.with_suffix(".libqcow")
    folder.mkdir()
    server = subprocess.Popen(
        ["qcowmount", "-v", image, folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        path = folder / "qcow1"
        tools.wait_until(path.exists, "qcowmount to show its file")
        yield path
    finally:
        tools.run("fusermount3", "-u", folder, check=False)
        server.wait(60)
        tools.force_away(folder)


@pytest.mark.skipif(shutil.which("qcowmount") is None, reason="no libqcow-utils")
def test_libqcow_agrees(tmp_path: Path) -> None:
    """A second reader sees the same bytes in a plain image after random writes."""
    content = sparse_content(5)
    image, _ = make_image(tmp_path, "plain", content)
    with tools.mounted(image) as mount:
        change(mount.active, content, 6)
    with by_libqcow(image) as path:
        assert path.read_bytes() == content


def test_what_the_format_cannot(tmp_path: Path) -> None:
    """No snapshots: ENOTSUP; info, statistics and map answer; the folder of snapshots is empty."""
    image, _ = make_image(tmp_path, "plain", sparse_content(7))
    with tools.mounted(image) as mount:
        assert list(mount.snapshots.iterdir()) == []
        with pytest.raises(OSError, match="not supported") as refusal:
            os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"one")
        assert refusal.value.errno == 95
        facts = json.loads((mount.folder / "info.json").read_text())
        assert (facts["format"], facts["cluster-size"]) == ("qcow", 4096)
        theirs = json.loads(tools.qemu_img("info", "-U", "--output=json", image))
        assert facts == theirs | {"filename": facts["filename"]}
        assert mount.statistics()["slices"] >= 0
        extents = json.loads(os.getxattr(mount.active, "user.qcowfs.map"))
        ours = [(row["start"], row["length"], row["data"]) for row in extents]
        rows = json.loads(tools.qemu_img("map", "-U", "--output=json", image))
        joined: list[tuple[int, int, bool]] = []
        for row in rows:
            kind = row["data"]
            if joined and joined[-1][2] == kind:
                joined[-1] = (joined[-1][0], joined[-1][1] + row["length"], kind)
            else:
                joined.append((row["start"], row["length"], kind))
        merged: list[tuple[int, int, bool]] = []
        for start, length, kind in ours:
            if merged and merged[-1][2] == kind:
                merged[-1] = (merged[-1][0], merged[-1][1] + length, kind)
            else:
                merged.append((start, length, kind))
        assert merged == joined
    assert "file format: qcow" in tools.qcowfs("info", image).stdout


def test_a_grown_disk(tmp_path: Path) -> None:
    """With -o growable a longer file is a longer disk, whose L1 table may move; QEMU follows."""
    content = sparse_content(8)
    image, _ = make_image(tmp_path, "plain", content)
    size = 300 * MIB
    with tools.mounted(image, "-o", "growable") as mount:
        os.truncate(mount.active, size)
        tools.pwrite(mount.active, b"end", size - 3)
        assert mount.active.stat().st_size == size
    tools.run("qemu-img", "info", image)
    tools.qemu_io(image, f"read -v {size - 512} 512", options=("-r", "-f", "qcow"))
    facts = json.loads(tools.qemu_img("info", "--output=json", image))
    assert facts["virtual-size"] == size
    with tools.mounted(image, "-r") as mount:
        assert tools.pread(mount.active, SIZE, 0) == content
        assert tools.pread(mount.active, 512, size - 512) == bytes(509) + b"end"
        assert not any(tools.pread(mount.active, MIB, SIZE))


def test_a_missing_key_is_one_line(tmp_path: Path) -> None:
    """An encrypted image without its passphrase is refused in one line that says what is needed."""
    image, _ = make_image(tmp_path, "aes", sparse_content(9))
    folder = tmp_path / "mnt"
    folder.mkdir()
    refused = tools.qcowfs("mount", image, folder, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "passphrase" in refused.stderr
    assert "encrypted: yes" in tools.qcowfs("info", image).stdout


def test_two_writers_never_meet(tmp_path: Path) -> None:
    """QEMU does not open what we write, nor we what QEMU writes; reading beside reading goes."""
    image, _ = make_image(tmp_path, "plain", sparse_content(10))
    with tools.mounted(image):
        refused = tools.run("qemu-io", "-f", "qcow", "-c", "write 0 512", image, check=False)
        assert 'Failed to get "write" lock' in refused.stderr + refused.stdout
    folder = tmp_path / "other"
    folder.mkdir()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(b"write 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()
        refused = tools.qcowfs("mount", image, folder, check=False)
        assert "Failed to get" in refused.stderr
        writer.stdin.close()
        writer.stdout.read()
    with tools.mounted(image, "-r"):
        tools.qemu_io(image, "read 0 512", options=("-r", "-f", "qcow"))
