"""The main job: partition, format and fill a mounted image with ordinary tools, and find it all."""

from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = [tools.needs_root, tools.needs_fuse]

_FILES = 3000
_FAT_FILES = 200

# Two primary partitions, the second of type W95 FAT32; then written.
_FDISK = "o\nn\np\n1\n\n+160M\nn\np\n2\n\n\nt\n2\nc\nw\n"


def _partition_and_fill(mount: tools.Mounted, tree: Path, fat_tree: Path, scratch: Path) -> None:
    with tools.loop_device(mount.active) as device:
        # Its exit code tells whether the kernel read the table, which partx does here.
        tools.run("fdisk", device, stdin=_FDISK, check=False)
        first, second = tools.scan_partitions(device, 2)
        table = tools.run("fdisk", "--list", device).stdout
        assert f"{device}p1" in table and f"{device}p2" in table
        tools.run("mkfs.ext4", "-q", "-F", first)
        tools.run("mkfs.vfat", "-n", "SECOND", second)
        with tools.filesystem(first, scratch / "ext4") as folder:
            tools.run("cp", "-a", tree, folder)
        tools.run("mcopy", "-s", "-Q", "-i", second, fat_tree, "::")


def _find_everything(mount: tools.Mounted, tree: Path, fat_tree: Path, scratch: Path) -> None:
    with tools.loop_device(mount.active) as device:
        first, second = tools.scan_partitions(device, 2)
        tools.run("fsck.ext4", "-fn", first)
        tools.run("fsck.vfat", "-n", second)
        with tools.filesystem(first, scratch / "ext4", "ro") as folder:
            assert tools.tree_digest(folder / tree.name) == tools.tree_digest(tree)
        tools.run("mcopy", "-s", "-Q", "-i", second, f"::{fat_tree.name}", scratch / "from-fat")
    assert tools.tree_digest(scratch / "from-fat") == tools.tree_digest(fat_tree)


@pytest.mark.parametrize("lane", ["lane", "no-lane"])
def test_partition_format_fill_and_find(tmp_path: Path, lane: str) -> None:
    """What ordinary tools put on the disk is there after a remount, for us and for QEMU."""
    image = tools.create(tmp_path / "disk.qcow2", 256 * MIB)
    tree, fat_tree = tmp_path / "tree", tmp_path / "fat"
    tools.make_tree(tree, _FILES if lane == "lane" else 500, seed=1)
    tools.make_tree(fat_tree, _FAT_FILES, seed=2)
    options = [] if lane == "lane" else ["--no-lane"]

    with tools.mounted(image, *options) as mount:
        _partition_and_fill(mount, tree, fat_tree, tmp_path)
    tools.check_image(image)
    expected = tools.raw_sha256(image)

    with tools.mounted(image, *options) as mount:
        assert tools.sha256(mount.active) == expected
        _find_everything(mount, tree, fat_tree, tmp_path)
    tools.check_image(image)
