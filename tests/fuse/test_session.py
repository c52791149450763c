"""Real mounts: what programs see through the kernel, and how a mount begins and ends."""

import contextlib
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.conftest import Daemon

Start = Callable[..., Daemon]

PREFIX = "user.qcowfs.snapshot."
MIB = 1 << 20


@contextlib.contextmanager
def raises_errno(number: int) -> Iterator[None]:
    """The body fails with that errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor for the length of the block."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def verb(daemon: Daemon, name: str, value: bytes) -> None:
    os.setxattr(daemon.active, PREFIX + name, value)


def raw_image(tmp_path: Path, size: int = 8 * MIB) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(size)
    return path


# What programs see


def test_tree(start_daemon: Start, use_lane: bool) -> None:
    """The mounted directory has the promised names and types."""
    daemon = start_daemon(fake=["a", "b"], use_lane=use_lane)
    assert sorted(os.listdir(daemon.mountpoint)) == ["active.raw", "info.json", "snapshots"]
    assert sorted(os.listdir(daemon.snapshots)) == ["a.raw", "b.raw"]
    assert daemon.snapshots.is_dir()
    assert json.loads((daemon.mountpoint / "info.json").read_text())["virtual-size"] == MIB
    assert os.statvfs(daemon.mountpoint).f_bsize == 4096
    assert daemon.umount() == 0


def test_data_reaches_the_image(tmp_path: Path, start_daemon: Start, use_lane: bool) -> None:
    """What is written and closed is in the image's file, and there after a remount."""
    image = raw_image(tmp_path)
    content = random.Random(1).randbytes(3 * MIB + 100)
    daemon = start_daemon(format="raw", use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        assert os.pwrite(descriptor, content, 5000) == len(content)
        os.fsync(descriptor)
    assert image.read_bytes()[5000 : 5000 + len(content)] == content
    assert daemon.umount() == 0
    daemon = start_daemon(format="raw", use_lane=use_lane)
    with opened(daemon.active, os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, len(content), 5000) == content
    assert daemon.umount() == 0


def test_end_of_the_disk(start_daemon: Start, use_lane: bool) -> None:
    """Reads and writes across the end are short, a write behind it is ENOSPC."""
    daemon = start_daemon(fake=[], size=MIB + 512, use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        assert os.fstat(descriptor).st_size == MIB + 512
        assert len(os.pread(descriptor, 4096, MIB)) == 512
        assert os.pread(descriptor, 4096, MIB + 512) == b""
        assert os.pwrite(descriptor, bytes(600), MIB) == 512
        with raises_errno(errno.ENOSPC):
            os.pwrite(descriptor, b"x", MIB + 512)
        with raises_errno(errno.EPERM):
            os.ftruncate(descriptor, MIB)
        os.ftruncate(descriptor, MIB + 512)
    with raises_errno(errno.EPERM):
        os.open(daemon.active, os.O_WRONLY | os.O_TRUNC)
    assert daemon.umount() == 0


def test_blocks_and_times(start_daemon: Start, use_lane: bool) -> None:
    """stat shows what is allocated, and moves on with a write."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    os.utime(daemon.active, (1000, 1000))
    before = os.stat(daemon.active)
    assert (before.st_blocks, before.st_blksize, before.st_mtime) == (0, 4096, 1000)
    with opened(daemon.active) as descriptor:
        os.pwrite(descriptor, bytes(8192), 0)
    after = os.stat(daemon.active)
    assert after.st_blocks == 16
    assert after.st_mtime > 1000
    assert daemon.umount() == 0


def test_snapshot_verbs(start_daemon: Start, use_lane: bool) -> None:
    """Snapshots are taken, renamed and deleted by attributes, and seen at once."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        os.pwrite(descriptor, b"old", 0)
        verb(daemon, "create", b"a")
        os.pwrite(descriptor, b"new", 0)
        assert (daemon.snapshots / "a.raw").read_bytes()[:3] == b"old"
    verb(daemon, "rename", b"a=b")
    assert os.listdir(daemon.snapshots) == ["b.raw"]
    assert not (daemon.snapshots / "a.raw").exists()
    assert (daemon.snapshots / "b.raw").read_bytes()[:3] == b"old"
    verb(daemon, "delete", b"b")
    assert os.listdir(daemon.snapshots) == []
    assert not (daemon.snapshots / "b.raw").exists()
    with raises_errno(errno.ENOENT):
        verb(daemon, "delete", b"b")
    assert daemon.umount() == 0


def test_verbs_with_flags(start_daemon: Start) -> None:
    """XATTR_CREATE and XATTR_REPLACE mean nothing for a verb."""
    daemon = start_daemon(fake=[])
    for name, flags in ((b"a", os.XATTR_CREATE), (b"b", os.XATTR_REPLACE)):
        os.setxattr(daemon.mountpoint, PREFIX + "create", name, flags)
    assert sorted(os.listdir(daemon.snapshots)) == ["a.raw", "b.raw"]
    assert daemon.umount() == 0


def test_rm_and_mv(start_daemon: Start, use_lane: bool) -> None:
    """rm deletes a snapshot, mv renames one, and neither touches another."""
    daemon = start_daemon(fake=["a", "b", "c"], use_lane=use_lane)
    inode = (daemon.snapshots / "a.raw").stat().st_ino
    os.rename(daemon.snapshots / "a.raw", daemon.snapshots / "d.raw")
    os.unlink(daemon.snapshots / "b.raw")
    with raises_errno(errno.EEXIST):
        os.rename(daemon.snapshots / "d.raw", daemon.snapshots / "c.raw")
    with raises_errno(errno.EPERM):
        os.unlink(daemon.active)
    assert sorted(os.listdir(daemon.snapshots)) == ["c.raw", "d.raw"]
    assert (daemon.snapshots / "d.raw").stat().st_ino == inode
    assert daemon.umount() == 0


def test_namesakes_are_true_at_once(start_daemon: Start, use_lane: bool) -> None:
    """When one of two namesakes goes, the other has its plain name at once, and only that."""
    daemon = start_daemon(fake=["a", "a"], use_lane=use_lane)
    assert (daemon.snapshots / "a@2.raw").exists()
    os.unlink(daemon.snapshots / "a@1.raw")
    assert (daemon.snapshots / "a.raw").exists()
    assert not (daemon.snapshots / "a@2.raw").exists()
    assert daemon.umount() == 0


def test_apply_is_seen_through_every_cache(start_daemon: Start, use_lane: bool) -> None:
    """After an apply, size and bytes are the snapshot's, for handles and maps opened before."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        os.pwrite(descriptor, b"old" * 1000, 0)
    verb(daemon, "create", b"a")
    with opened(daemon.active) as descriptor:
        os.pwrite(descriptor, b"new" * 1000, 0)
    with opened(daemon.active, os.O_RDONLY) as reader:
        with mmap.mmap(reader, 4096, prot=mmap.PROT_READ) as view:
            assert view[:3] == b"new"
            assert os.pread(reader, 3, 0) == b"new"
            verb(daemon, "apply", b"a")
            assert os.pread(reader, 3, 0) == b"old"
            assert view[:3] == b"old"
    assert daemon.umount() == 0


def test_apply_while_open_for_writing(start_daemon: Start, use_lane: bool) -> None:
    """A handle that may write makes apply EBUSY; once it is closed, apply works."""
    daemon = start_daemon(fake=["a"], use_lane=use_lane)
    with opened(daemon.active), raises_errno(errno.EBUSY):
        verb(daemon, "apply", b"a")
    verb(daemon, "apply", b"a")
    assert daemon.umount() == 0


def test_reader_of_a_deleted_snapshot(start_daemon: Start, use_lane: bool) -> None:
    """A handle to a deleted snapshot answers ESTALE, or bytes that were cached before."""
    daemon = start_daemon(fake=["a"], use_lane=use_lane)
    with opened(daemon.snapshots / "a.raw", os.O_RDONLY) as reader:
        os.unlink(daemon.snapshots / "a.raw")
        with raises_errno(errno.ESTALE):
            os.pread(reader, 4096, 0)
    assert daemon.umount() == 0


def test_mmap(start_daemon: Start, use_lane: bool) -> None:
    """Writes through a map and through write(2) see each other."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        with mmap.mmap(descriptor, MIB) as view:
            view[100:103] = b"map"
            assert os.pread(descriptor, 3, 100) == b"map"
            os.pwrite(descriptor, b"pwr", 200)
            assert view[200:203] == b"pwr"
            view.flush()
    assert daemon.umount() == 0


def test_many_snapshots_are_listed(start_daemon: Start, use_lane: bool) -> None:
    """Thousands of snapshots are listed completely, each once."""
    names = [f"snapshot {number}" for number in range(3000)]
    daemon = start_daemon(fake=names, use_lane=use_lane)
    assert sorted(os.listdir(daemon.snapshots)) == sorted(f"{name}.raw" for name in names)
    assert daemon.umount() == 0


def test_inodes_survive_a_remount(start_daemon: Start, use_lane: bool) -> None:
    """The same file has the same inode number at the next mount."""
    found = []
    for _ in range(2):
        daemon = start_daemon(fake=["a", "b"], use_lane=use_lane)
        found.append([path.stat().st_ino for path in sorted(daemon.mountpoint.rglob("*"))])
        assert daemon.umount() == 0
    assert found[0] == found[1]


def test_concurrent_clients(start_daemon: Start, use_lane: bool) -> None:
    """Many writers and readers at once, each of its own region, see what they wrote."""
    daemon = start_daemon(fake=[], size=4 * MIB, use_lane=use_lane)
    problems: list[object] = []

    def work(index: int) -> None:
        chance = random.Random(index)
        base = index * MIB // 2
        model = bytearray(MIB // 2)
        try:
            with opened(daemon.active) as descriptor:
                for _ in range(60):
                    start = chance.randrange(len(model) - 1)
                    length = chance.randrange(1, min(70_000, len(model) - start) + 1)
                    if chance.random() < 0.5:
                        piece = chance.randbytes(length)
                        model[start : start + length] = piece
                        assert os.pwrite(descriptor, piece, base + start) == length
                    else:
                        found = os.pread(descriptor, length, base + start)
                        assert found == model[start : start + length]
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert daemon.umount() == 0


def test_read_only_mount(start_daemon: Start, use_lane: bool) -> None:
    """Read-only, the kernel refuses every change."""
    daemon = start_daemon(fake=["a"], read_only=True, use_lane=use_lane)
    assert os.stat(daemon.active).st_mode & 0o777 == 0o400
    for change in (
        lambda: os.open(daemon.active, os.O_RDWR),
        lambda: verb(daemon, "create", b"b"),
        lambda: os.unlink(daemon.snapshots / "a.raw"),
    ):
        with raises_errno(errno.EROFS):
            change()
    assert daemon.umount() == 0


def test_owner_and_umask(start_daemon: Start, use_lane: bool) -> None:
    """The options uid, gid and umask say how files look."""
    options = {"uid": "12", "gid": "34", "umask": "022"}
    daemon = start_daemon(fake=[], use_lane=use_lane, fuse_options=options)
    status = os.stat(daemon.active)
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12, 34, 0o644)
    assert daemon.umount() == 0


def test_mount_table(start_daemon: Start, use_lane: bool) -> None:
    """The table of mounts shows the type, the given source, and the kernel's options."""
    options = {"fsname": "a,b\\c", "allow_other": None}
    daemon = start_daemon(fake=[], use_lane=use_lane, fuse_options=options)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    line = next(line for line in lines if str(daemon.mountpoint) in line)
    kind, source, flags = line.partition(" - ")[2].split(" ")
    assert kind == "fuse.qcowfs"
    assert source == "a,b\\134c"
    assert {"allow_other", "default_permissions"} <= set(flags.split(","))
    assert daemon.umount() == 0


def test_statistics_tell_the_process(start_daemon: Start, use_lane: bool) -> None:
    """Who waits for the end of a mount finds its process in the attribute stats."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    statistics = json.loads(os.getxattr(daemon.mountpoint, "user.qcowfs.stats"))
    assert statistics["pid"] == daemon.process.pid
    assert daemon.umount() == 0


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(start_daemon: Start, use_lane: bool, number: int) -> None:
    """A signal ends the mount in good order, even if the parent ignored and blocked it."""
    daemon = start_daemon(fake=[], use_lane=use_lane, hostile_signals=True)
    daemon.process.send_signal(number)
    assert daemon.wait() == 0
    assert not os.path.ismount(daemon.mountpoint)


def test_signal_keeps_what_was_written(tmp_path: Path, start_daemon: Start, use_lane: bool) -> None:
    """What was acknowledged before a SIGTERM is in the image, flushed or not."""
    image = raw_image(tmp_path)
    daemon = start_daemon(format="raw", use_lane=use_lane)
    descriptor = os.open(daemon.active, os.O_RDWR)
    os.pwrite(descriptor, b"kept" * 1000, 0)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    with raises_errno(errno.ENOTCONN):
        os.close(descriptor)
    assert image.read_bytes()[:4000] == b"kept" * 1000


def test_signal_while_files_are_open(start_daemon: Start, use_lane: bool) -> None:
    """After a moment of grace open files are given up; their users get an error."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    descriptor = os.open(daemon.active, os.O_RDWR)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "still open" in daemon.log
    with raises_errno(errno.ENOTCONN):
        os.pread(descriptor, 4096, 0)
    with raises_errno(errno.ENOTCONN):
        os.close(descriptor)


def test_lazy_unmount_is_served_until_the_last_close(
    tmp_path: Path, start_daemon: Start, use_lane: bool
) -> None:
    """After umount -l an open file still works, and the last close ends the mount."""
    image = raw_image(tmp_path)
    daemon = start_daemon(format="raw", use_lane=use_lane)
    with opened(daemon.active) as descriptor:
        subprocess.run(["umount", "-l", str(daemon.mountpoint)], check=True)
        assert os.pwrite(descriptor, b"late", 0) == 4
        assert daemon.process.poll() is None
    assert daemon.wait() == 0
    assert image.read_bytes()[:4] == b"late"


def test_fusermount_unmounts(start_daemon: Start, use_lane: bool) -> None:
    """fusermount3 -u ends the mount."""
    daemon = start_daemon(fake=[], use_lane=use_lane)
    subprocess.run(["fusermount3", "-u", str(daemon.mountpoint)], check=True)
    assert daemon.wait() == 0


def test_failed_last_flush(start_daemon: Start, use_lane: bool) -> None:
    """A flush that fails at the end is told by exit code and log."""
    daemon = start_daemon(fake=[], use_lane=use_lane, fail_close=True)
    assert daemon.umount() == 1
    assert "the last flush failed" in daemon.log


def test_aborted_connection(tmp_path: Path, start_daemon: Start, use_lane: bool) -> None:
    """A connection that is cut off from outside ends the process, and leaves no dead mount."""
    control = tmp_path / "control"
    control.mkdir()
    daemon = start_daemon(fake=[], use_lane=use_lane)
    number = os.minor(os.stat(daemon.mountpoint).st_dev)
    subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=True)
    try:
        (control / str(number) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", str(control)], check=True)
    assert daemon.wait() == 1
    assert not os.path.ismount(daemon.mountpoint)


# The beginning


def refuse(daemon: Daemon, words: str) -> None:
    assert not daemon.is_ready
    assert daemon.wait() == 3
    assert words in daemon.log
    assert not os.path.ismount(daemon.mountpoint)


def test_image_that_cannot_be_opened(tmp_path: Path, start_daemon: Start, use_lane: bool) -> None:
    """What is wrong with an image is told before anything is mounted."""
    raw_image(tmp_path)
    refuse(start_daemon(use_lane=use_lane), "BadRequest")


def test_missing_image(tmp_path: Path, start_daemon: Start) -> None:
    """An image that is not there is told."""
    refuse(start_daemon(image=str(tmp_path / "x"), format="raw"), "FileNotFoundError")


def test_missing_mount_point(tmp_path: Path, start_daemon: Start) -> None:
    """A mount point that is not there is told."""
    refuse(start_daemon(fake=[], mountpoint=str(tmp_path / "x")), "does not exist")


def test_mount_point_that_is_a_file(tmp_path: Path, start_daemon: Start) -> None:
    """Only a directory can be mounted on."""
    path = tmp_path / "file"
    path.touch()
    refuse(start_daemon(fake=[], mountpoint=str(path)), "not a directory")


def test_mount_point_that_is_not_empty(tmp_path: Path, start_daemon: Start) -> None:
    """A directory with files in it is not hidden."""
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "file").touch()
    refuse(start_daemon(fake=[], mountpoint=str(folder)), "not empty")


def test_image_under_the_mount_point(tmp_path: Path, start_daemon: Start) -> None:
    """An image cannot be mounted over itself."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "image").touch()
    daemon = start_daemon(fake=[], mountpoint=str(folder), image=str(folder / "image"))
    refuse(daemon, "under the mount point")


def test_bad_owner(start_daemon: Start) -> None:
    """An option that is no number is told."""
    refuse(start_daemon(fake=[], fuse_options={"uid": "x"}), "uid=x is not a number")


def test_unknown_mount_option(start_daemon: Start, use_lane: bool) -> None:
    """What neither fusermount3 nor libfuse knows ends the mount before it begins."""
    daemon = start_daemon(fake=[], use_lane=use_lane, fuse_options={"no_such_option": None})
    refuse(daemon, "no_such_option")


def test_dead_mount_is_cleared(start_daemon: Start, use_lane: bool) -> None:
    """A mount whose process was killed is cleared by the next one, which says so."""
    dead = start_daemon(fake=[], use_lane=use_lane)
    dead.process.kill()
    dead.wait()
    with raises_errno(errno.ENOTCONN):
        os.stat(dead.mountpoint)
    daemon = start_daemon(fake=[], use_lane=use_lane)
    assert daemon.is_ready
    assert daemon.umount() == 0
    assert "cleared a mount" in daemon.log


def test_image_in_use(tmp_path: Path, start_daemon: Start, use_lane: bool) -> None:
    """A second mount of one image for writing is refused by its locks."""
    image = str(tmp_path / "image")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    first = start_daemon(use_lane=use_lane)
    other = tmp_path / "other"
    other.mkdir()
    second = start_daemon(use_lane=use_lane, mountpoint=str(other))
    refuse(second, "Busy")
    assert first.umount() == 0


# Block devices on top


@pytest.fixture
def attach() -> Iterator[Callable[..., str]]:
    """Attach a file to a loop device; all are detached in the end."""
    devices: list[str] = []

    def attach(path: Path, *options: str) -> str:
        found = subprocess.run(
            ["losetup", "-f", "--show", *options, str(path)], capture_output=True, check=False
        )
        if found.returncode:
            pytest.skip(f"no loop device: {found.stderr.decode()}")
        devices.append(found.stdout.decode().strip())
        return devices[-1]

    yield attach
    for device in devices:
        subprocess.run(["losetup", "-d", device], check=False)


def test_loop_device(start_daemon: Start, use_lane: bool, attach: Callable[..., str]) -> None:
    """A loop device writes to the disk, keeps apply away, and attaches snapshots read-only."""
    daemon = start_daemon(fake=["a"], use_lane=use_lane)
    disk = attach(daemon.active)
    with opened(Path(disk)) as descriptor:
        os.pwrite(descriptor, b"block" * 200, 4096)
        os.fsync(descriptor)
    with opened(daemon.active, os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 1000, 4096) == b"block" * 200
    with raises_errno(errno.EBUSY):
        verb(daemon, "apply", b"a")
    snapshot = attach(daemon.snapshots / "a.raw")
    assert Path(f"/sys/block/{Path(snapshot).name}/ro").read_text().strip() == "1"
    for device in (disk, snapshot):
        subprocess.run(["losetup", "-d", device], check=True)
    assert daemon.umount() == 0
