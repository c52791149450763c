"""Raw disks and mixed chains through real mounts, and the folder that confines a chain."""

import os
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.test_qcow1 import change, raw_of, sparse_content
from tests.interop.tools import KIB, MIB

pytestmark = tools.needs_fuse

SIZE = 4 * MIB


def seek(path: Path, offset: int, whence: int) -> int:
    """lseek on a file of its own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(descriptor, offset, whence)
    finally:
        os.close(descriptor)


def test_a_raw_disk(tmp_path: Path) -> None:
    """With --format raw a disk reads and writes, a hole punched is one of the host file."""
    image = tmp_path / "disk.img"
    content = bytearray(b"r" * MIB).ljust(SIZE, b"\0")
    with image.open("wb") as file:
        file.write(content[:MIB])
        file.truncate(SIZE)
    with tools.mounted(image, "--format", "raw") as mount:
        assert mount.active.read_bytes() == content
        assert seek(mount.active, 0, os.SEEK_HOLE) == MIB
        with pytest.raises(OSError, match="No such device or address"):
            seek(mount.active, MIB, os.SEEK_DATA)
        before = image.stat().st_blocks
        descriptor = os.open(mount.active, os.O_RDWR)
        mode = tools.FALLOC_PUNCH_HOLE | tools.FALLOC_KEEP_SIZE
        tools.fallocate(descriptor, mode, 128 * KIB, 512 * KIB)
        os.close(descriptor)
        content[128 * KIB : 640 * KIB] = bytes(512 * KIB)
        assert image.stat().st_blocks <= before - 1024
        assert seek(mount.active, 128 * KIB, os.SEEK_DATA) == 640 * KIB
        change(mount.active, content, 1)
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"one")
    assert image.read_bytes() == content


def test_five_layers_and_their_root(tmp_path: Path) -> None:
    """A chain made by the commands mounts, writes to its top alone, and stays below its root."""
    folder = tmp_path / "chain"
    folder.mkdir()
    content = sparse_content(1, SIZE)
    (folder / "base.raw").write_bytes(content)
    layers = (
        ("qcow", "a.qcow", "base.raw", "raw"),
        ("cow", "b.cow", "a.qcow", "qcow"),
        ("qcow", "c.qcow", "b.cow", "cow"),
        ("qcow2", "d.qcow2", "c.qcow", "qcow"),
    )
    for number, (kind, name, lower, lower_kind) in enumerate(layers):
        words = ("-b", lower, "-F", lower_kind, folder / name)
        tools.qcowfs("create", "-q", "-f", kind, *words)
        with tools.mounted(folder / name, "--backing-root", str(folder)) as mount:
            assert mount.active.read_bytes() == content
            change(mount.active, content, number + 2)
    with tools.mounted(folder / "d.qcow2", "-r") as mount:
        assert mount.active.read_bytes() == content
    (folder / "a.qcow").rename(tmp_path / "a.qcow")
    (folder / "a.qcow").symlink_to(tmp_path / "a.qcow")
    point = tmp_path / "mnt"
    point.mkdir()
    refused = tools.qcowfs(
        "mount", "--backing-root", folder, folder / "d.qcow2", point, check=False
    )
    assert refused.returncode == 1
    assert "outside of the backing root" in refused.stderr.splitlines()[-1]


def test_a_filesystem_on_a_qcow_disk(tmp_path: Path) -> None:
    """mkfs, files, fstrim and fsck through a loop device, and QEMU reads the same disk."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    image = tmp_path / "disk.qcow"
    tools.qcowfs("create", "-q", "-f", "qcow", image, "48M")
    with tools.mounted(image) as mount:
        with tools.loop_device(mount.active) as device:
            tools.run("mkfs.ext4", "-q", device)
            with tools.filesystem(device, tmp_path / "fs") as folder:
                tools.make_tree(folder / "tree", 60, 3)
                wanted = tools.tree_digest(folder / "tree")
                (folder / "gone").write_bytes(b"g" * (8 * MIB))
                os.sync()
                used = image.stat().st_blocks
                (folder / "gone").unlink()
                os.sync()
                tools.run("fstrim", folder)
            tools.run("fsck.ext4", "-f", "-n", device)
        os.fsync(descriptor := os.open(mount.active, os.O_RDWR))
        os.close(descriptor)
        # What was trimmed is back, less what the filesystem wrote about it.
        assert image.stat().st_blocks < used - 7 * MIB // 512
        with tools.loop_device(mount.active) as device:
            with tools.filesystem(device, tmp_path / "fs") as folder:
                assert tools.tree_digest(folder / "tree") == wanted
        content = mount.active.read_bytes()
    assert raw_of(image) == content
