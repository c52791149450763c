"""Snapshots through a mount: taken, kept, applied, renamed and deleted, with QEMU as the judge."""

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import KIB, MIB

pytestmark = tools.needs_fuse

SIZE = 32 * MIB


def _scribble(path: Path, seed: int, count: int = 60) -> None:
    """Seeded writes all over the disk, without a sync."""
    chance = random.Random(seed)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for _ in range(count):
            length = chance.choice((512, 4096, 5000, 65536, 200_000))
            os.pwrite(descriptor, chance.randbytes(length), chance.randrange(SIZE - length))
    finally:
        os.close(descriptor)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small empty image."""
    return tools.create(tmp_path / "disk.qcow2", SIZE)


def test_a_snapshot_is_taken_in_the_middle_of_writing(image: Path) -> None:
    """It has what the active file had, keeps it, and is the same for qemu-img."""
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            _scribble(mount.active, seed=1)
            os.pwrite(descriptor, b"not synced", 12345)
            before = tools.sha256(mount.active)
            mount.snapshot("create", "before")
            kept = mount.snapshots / "before.raw"
            assert tools.sha256(kept) == before
            _scribble(mount.active, seed=2)
            os.pwrite(descriptor, b"afterwards", 12345)
            after = tools.sha256(mount.active)
            assert after != before
            assert tools.sha256(kept) == before
            tools.drop_caches(kept)
            assert tools.sha256(kept) == before
        finally:
            os.close(descriptor)
    tools.check_image(image)
    assert tools.raw_sha256(image, "-l", "snapshot.name=before") == before
    assert tools.raw_sha256(image) == after
    assert "before" in tools.qemu_img("snapshot", "-l", image)


def test_a_snapshot_has_a_prefix_of_the_writes(image: Path) -> None:
    """Of one writer's blocks, in order, a snapshot has the first so many and none of the rest."""
    block, blocks = 4 * KIB, 2000
    with tools.mounted(image) as mount:
        done = threading.Event()
        written = 0

        def write_in_order() -> None:
            nonlocal written
            descriptor = os.open(mount.active, os.O_WRONLY)
            try:
                for index in range(blocks):
                    os.pwrite(descriptor, (index + 1).to_bytes(8, "little") * (block // 8),
                              index * block)  # fmt: skip
                    written = index + 1
            finally:
                os.close(descriptor)
                done.set()

        writer = threading.Thread(target=write_in_order)
        writer.start()
        bounds = []
        for number in range(4):
            goal = blocks * (number + 1) // 5
            tools.wait_until(lambda goal=goal: written >= goal or done.is_set(), "the writer")
            least = written
            os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"s%d" % number)
            bounds.append((least, written + 1))
        writer.join()
        for number, (least, most) in enumerate(bounds):
            data = (mount.snapshots / f"s{number}.raw").read_bytes()
            stamps = [
                int.from_bytes(data[place : place + 8], "little")
                for place in range(0, blocks * block, block)
            ]
            count = next((place for place, stamp in enumerate(stamps) if stamp == 0), blocks)
            assert least <= count <= most
            assert stamps == [*range(1, count + 1), *[0] * (blocks - count)]
    tools.check_image(image)


@tools.needs_root
def test_a_snapshot_mounts_read_only_through_a_loop_device(image: Path, tmp_path: Path) -> None:
    """A filesystem in a snapshot can be mounted and holds the files that it held."""
    tree = tmp_path / "tree"
    tools.make_tree(tree, 200, seed=3)
    with tools.mounted(image) as mount:
        with tools.loop_device(mount.active) as device:
            tools.run("mkfs.ext4", "-q", "-F", device)
            with tools.filesystem(device, tmp_path / "ext4") as folder:
                tools.run("cp", "-a", tree, folder)
            mount.snapshot("create", "full")
            with tools.filesystem(device, tmp_path / "ext4") as folder:
                tools.run("rm", "-r", folder / "tree")
        with tools.loop_device(mount.snapshots / "full.raw", "--read-only") as device:
            with tools.filesystem(device, tmp_path / "ext4", "ro,noload") as folder:
                assert tools.tree_digest(folder / "tree") == tools.tree_digest(tree)
    tools.check_image(image)


def _take_three(image: Path) -> list[str]:
    """Snapshots s0, s1 and s2 of differing content; their digests, and the active disk's."""
    digests = []
    with tools.mounted(image) as mount:
        for number in range(3):
            _scribble(mount.active, seed=10 + number)
            digests.append(tools.sha256(mount.active))
            mount.snapshot("create", f"s{number}")
        _scribble(mount.active, seed=13)
        digests.append(tools.sha256(mount.active))
    tools.check_image(image)
    return digests


def _names(mount: tools.Mounted) -> list[str]:
    return sorted(os.listdir(mount.snapshots))


def test_apply(image: Path) -> None:
    """The active disk becomes the snapshot again, at once for all readers, and for QEMU."""
    digests = _take_three(image)
    with tools.mounted(image) as mount:
        assert tools.sha256(mount.active) == digests[3]
        mount.snapshot("apply", "s1")
        assert tools.sha256(mount.active) == digests[1]
        _scribble(mount.active, seed=20)
        assert [tools.sha256(mount.snapshots / f"s{n}.raw") for n in range(3)] == digests[:3]
        mount.snapshot("apply", "s1")
    tools.check_image(image)
    assert tools.raw_sha256(image) == digests[1]


def test_apply_is_refused_while_the_disk_is_written(image: Path) -> None:
    """EBUSY while another handle may write; the disk stays as it was."""
    _take_three(image)
    with tools.mounted(image) as mount:
        before = tools.sha256(mount.active)
        descriptor = os.open(mount.active, os.O_WRONLY)
        try:
            with pytest.raises(OSError) as caught:
                os.setxattr(mount.active, "user.qcowfs.snapshot.apply", b"s0")
            assert caught.value.errno == errno.EBUSY
        finally:
            os.close(descriptor)
        assert tools.sha256(mount.active) == before
    tools.check_image(image)


def _delete_by_attribute(mount: tools.Mounted) -> None:
    mount.snapshot("delete", "s1")


def _delete_by_rm(mount: tools.Mounted) -> None:
    tools.run("rm", mount.snapshots / "s1.raw")


@pytest.mark.parametrize("delete", [_delete_by_attribute, _delete_by_rm])
def test_delete(image: Path, delete: Callable[[tools.Mounted], None]) -> None:
    """The snapshot is gone at once; the others and the active disk keep all they have."""
    digests = _take_three(image)
    with tools.mounted(image) as mount:
        delete(mount)
        assert _names(mount) == ["s0.raw", "s2.raw"]
        assert not (mount.snapshots / "s1.raw").exists()
        assert tools.sha256(mount.snapshots / "s0.raw") == digests[0]
        assert tools.sha256(mount.snapshots / "s2.raw") == digests[2]
        assert tools.sha256(mount.active) == digests[3]
    tools.check_image(image)
    assert [entry["name"] for entry in tools.snapshot_list(image)] == ["s0", "s2"]


def _rename_by_attribute(mount: tools.Mounted) -> None:
    mount.snapshot("rename", "s1=a new name")


def _rename_by_mv(mount: tools.Mounted) -> None:
    tools.run("mv", mount.snapshots / "s1.raw", mount.snapshots / "a new name.raw")


@pytest.mark.parametrize("rename", [_rename_by_attribute, _rename_by_mv])
def test_rename(image: Path, rename: Callable[[tools.Mounted], None]) -> None:
    """The snapshot has the new name at once, and its bytes."""
    digests = _take_three(image)
    with tools.mounted(image) as mount:
        rename(mount)
        assert _names(mount) == ["a new name.raw", "s0.raw", "s2.raw"]
        assert tools.sha256(mount.snapshots / "a new name.raw") == digests[1]
    tools.check_image(image)
    assert [entry["name"] for entry in tools.snapshot_list(image)] == ["s0", "a new name", "s2"]


@pytest.mark.parametrize(
    ("verb", "value", "number"),
    [
        ("create", b"s0", errno.EEXIST),
        ("create", b"", errno.EINVAL),
        ("delete", b"nothing", errno.ENOENT),
        ("apply", b"nothing", errno.ENOENT),
        ("rename", b"nothing=x", errno.ENOENT),
        ("rename", b"s0", errno.EINVAL),
        ("rename", b"s0=s1", errno.EEXIST),
    ],
)
def test_errors(image: Path, verb: str, value: bytes, number: int) -> None:
    """A wrong request has its own errno and changes nothing."""
    tools.qemu_img("snapshot", "-c", "s0", image)
    tools.qemu_img("snapshot", "-c", "s1", image)
    with tools.mounted(image) as mount:
        with pytest.raises(OSError) as caught:
            os.setxattr(mount.active, f"user.qcowfs.snapshot.{verb}", value)
        assert caught.value.errno == number
        assert _names(mount) == ["s0.raw", "s1.raw"]
    tools.check_image(image)


def test_a_read_only_mount_changes_no_snapshot(image: Path) -> None:
    """EROFS for every verb, for rm and for mv; the image stays byte for byte."""
    tools.qemu_img("snapshot", "-c", "s0", image)
    before = tools.sha256(image)
    with tools.mounted(image, "-r") as mount:
        for verb, value in (("create", b"x"), ("delete", b"s0"), ("apply", b"s0")):
            with pytest.raises(OSError) as caught:
                os.setxattr(mount.active, f"user.qcowfs.snapshot.{verb}", value)
            assert caught.value.errno == errno.EROFS
        for change in (
            lambda: os.unlink(mount.snapshots / "s0.raw"),
            lambda: os.rename(mount.snapshots / "s0.raw", mount.snapshots / "x.raw"),
            lambda: os.open(mount.active, os.O_WRONLY),
        ):
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno in {errno.EROFS, errno.EACCES}
    assert tools.sha256(image) == before


def test_verbs_are_write_only(image: Path) -> None:
    """Reading a verb answers ENODATA, and no listing names it."""
    with tools.mounted(image) as mount:
        assert not any("snapshot." in name for name in os.listxattr(mount.active))
        for verb in ("create", "delete", "apply", "rename"):
            with pytest.raises(OSError) as caught:
                os.getxattr(mount.active, f"user.qcowfs.snapshot.{verb}")
            assert caught.value.errno == errno.ENODATA


def test_names_are_escaped_and_told_apart(image: Path) -> None:
    """Names that no file can have, and those that two snapshots share, lead to their bytes."""
    names = ["a/b", "..", "same", "same", "plain", "per%cent"]
    for number, name in enumerate(names):
        tools.qemu_io(image, f"write -P {number + 1} 0 64k")
        tools.qemu_img("snapshot", "-c", name, image)
    with tools.mounted(image) as mount:
        shown = _names(mount)
        assert len(shown) == len(names)
        assert "plain.raw" in shown
        assert {"same@3.raw", "same@4.raw"} <= set(shown)
        assert "a%2Fb.raw" in shown
        for file in shown:
            path = mount.snapshots / file
            identifier = int(os.getxattr(path, "user.qcowfs.snapshot.id"))
            name = os.getxattr(path, "user.qcowfs.snapshot.name").decode()
            assert name == names[identifier - 1]
            assert tools.pread(path, 1, 0) == bytes([identifier])


def test_many_snapshots(image: Path) -> None:
    """Hundreds of snapshots are taken, listed and read through one mount."""
    count = 400
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            for number in range(count):
                os.pwrite(descriptor, number.to_bytes(8, "little"), 4096)
                os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"n%d" % number)
        finally:
            os.close(descriptor)
        assert sorted(os.listdir(mount.snapshots)) == sorted(f"n{n}.raw" for n in range(count))
        for number in (0, 1, 199, 398, 399):
            stamp = tools.pread(mount.snapshots / f"n{number}.raw", 8, 4096)
            assert int.from_bytes(stamp, "little") == number
    tools.check_image(image)
    assert len(tools.snapshot_list(image)) == count


@pytest.mark.parametrize("verb", ["create", "apply", "delete", "rename"])
def test_at_rest(image: Path, verb: str) -> None:
    """`qcowfs snapshot` does on an image at rest what the attributes do on a mounted one."""
    digests = _take_three(image)
    if verb == "create":
        tools.qcowfs("snapshot", "create", image, "fourth")
        expected = ["s0", "s1", "s2", "fourth"]
    elif verb == "apply":
        tools.qcowfs("snapshot", "apply", image, "s0")
        expected = ["s0", "s1", "s2"]
        assert tools.raw_sha256(image) == digests[0]
    elif verb == "delete":
        tools.qcowfs("snapshot", "delete", image, "s0")
        expected = ["s1", "s2"]
    else:
        tools.qcowfs("snapshot", "rename", image, "s0", "zero")
        expected = ["zero", "s1", "s2"]
    tools.check_image(image)
    assert [entry["name"] for entry in tools.snapshot_list(image)] == expected


def test_list_is_that_of_qemu_img(image: Path) -> None:
    """`qcowfs snapshot list` prints the table that `qemu-img snapshot -l` prints."""
    for name in ("one", "a longer name than its column", "3"):
        tools.qemu_img("snapshot", "-c", name, image)
    theirs = tools.qemu_img("snapshot", "-l", image).splitlines()
    assert tools.qcowfs("snapshot", "list", image).stdout.splitlines() == theirs[1:]
