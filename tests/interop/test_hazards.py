"""What the world does to the command: its parent, its options, strange names, read-only loops."""

import errno
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from qcowfs.cli.mount import _DescriptorHandler
from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = tools.needs_fuse


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty disk of 4 MiB."""
    return tools.create(tmp_path / "disk.qcow2", 4 * MIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def test_the_background_holds_nothing_of_its_parent(image: Path, folder: Path) -> None:
    """Whoever reads a pipe that was handed down sees its end while the mount lives."""
    reading, writing = os.pipe()
    try:
        tools.qcowfs("mount", image, folder, pass_fds=[writing])
        os.close(writing)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b""
        assert tools.is_mounted(folder)
        tools.qcowfs("umount", folder)
    finally:
        os.close(reading)
        tools.force_away(folder)


def test_readiness_on_standard_output(image: Path, folder: Path) -> None:
    """--ready-fd may name a standard stream, which the background gives up."""
    try:
        assert tools.qcowfs("mount", "--ready-fd=1", image, folder).stdout == "ready\n"
        tools.qcowfs("umount", folder)
    finally:
        tools.force_away(folder)


def test_a_working_directory_that_is_gone(image: Path, folder: Path, tmp_path: Path) -> None:
    """Absolute paths need no working directory."""
    gone = tmp_path / "gone"
    gone.mkdir()
    words = [*tools.QCOWFS, "mount", str(image), str(folder)]
    try:
        tools.run("/bin/sh", "-c", f'rmdir "{gone}" && exec "$@"', "sh", *words, cwd=gone)
        tools.qcowfs("umount", folder)
    finally:
        tools.force_away(folder)


@pytest.mark.parametrize("lane", ["lane", "no-lane"])
def test_a_mount_point_behind_a_symbolic_link(image: Path, folder: Path, lane: str) -> None:
    """The link's target is mounted on, and a signal unmounts it again."""
    link = folder.with_name("link")
    link.symlink_to(folder)
    options = [] if lane == "lane" else ["--no-lane"]
    with tools.mounted(image, *options, folder=link) as mount:
        assert tools.is_mounted(folder)
        os.kill(mount.pid, signal.SIGTERM)
        tools.wait_for_end(mount.pid)
        assert not tools.is_mounted(folder)


_GIVEN_BY_OTHERS = (
    "defaults,relatime,diratime,nodiratime,norelatime,strictatime,nostrictatime,lazytime,"
    "nolazytime,symfollow,nosymfollow,subtype=other,x-systemd.automount,_netdev"
)


@pytest.mark.parametrize("lane", ["rw", "no_lane"])
def test_options_that_mean_nothing_here(image: Path, folder: Path, lane: str) -> None:
    """What fstab lines say of access times and links hinders no mount, nor does a subtype."""
    try:
        tools.qcowfs(image, folder, "-o", f"{lane},{_GIVEN_BY_OTHERS}")
        tools.qcowfs("umount", folder)
    finally:
        tools.force_away(folder)


@pytest.mark.parametrize("option", ["uid=-1", "gid=4294967295", "uid=99999999999", "umask=-1"])
def test_an_owner_that_cannot_be(image: Path, folder: Path, option: str) -> None:
    """A user number that the kernel does not know is refused in one line."""
    finished = tools.qcowfs("mount", "-o", option, image, folder, check=False)
    assert finished.returncode == 1
    assert finished.stderr == f"qcowfs: {image}: mount option {option} is out of range\n"
    assert not tools.is_mounted(folder)


@pytest.mark.parametrize(
    "name", ["carriage\rreturn", "new\nline", "back\\slash", "com,ma", "spa ce\t", "b\udcff"]
)
def test_a_strange_name(tmp_path: Path, name: str) -> None:
    """Image and mount point may lie under any name."""
    place = tmp_path / name
    place.mkdir()
    image = tools.create(tmp_path / "disk.qcow2", MIB).rename(place / "disk.qcow2")
    folder = place / "mnt"
    folder.mkdir()
    try:
        tools.qcowfs("mount", image, folder)
        assert (folder / "active.raw").stat().st_size == MIB
        tools.qcowfs("umount", folder)
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["fusermount3", "-q", "-u", "-z", folder], capture_output=True)


@pytest.mark.parametrize("command", [("info",), ("snapshot", "list")])
def test_names_that_the_locale_has_no_letters_for(image: Path, command: tuple[str, ...]) -> None:
    """What a terminal's character set lacks is shown by its number."""
    tools.qcowfs("snapshot", "create", image, "n\u00e4me")
    settings = tools.environment() | {"PYTHONIOENCODING": "ascii"}
    assert "n\\xe4me" in tools.qcowfs(*command, image, env=settings).stdout


_SLOW_HELPER = """#!/bin/sh
echo $PPID > "{0}/starting" && mv "{0}/starting" "{0}/started"
while [ ! -e "{0}/go" ]; do sleep 0.01; done
exec "{1}" "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_parent_that_is_ended_while_it_waits(
    image: Path, folder: Path, tmp_path: Path, number: int
) -> None:
    """A `qcowfs mount` that is ended before the mount is ready leaves no mount and no process."""
    helper = shutil.which("fusermount3")
    place = tmp_path / "bin"
    place.mkdir()
    (place / "fusermount3").write_text(_SLOW_HELPER.format(tmp_path, helper))
    (place / "fusermount3").chmod(0o755)
    settings = tools.environment()
    settings["PATH"] = f"{place}:{settings['PATH']}"
    pid = None
    try:
        parent = subprocess.Popen(
            [*tools.QCOWFS, "mount", str(image), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=settings,
        )
        tools.wait_until((tmp_path / "started").exists, "the helper to be started")
        pid = int((tmp_path / "started").read_text())
        parent.send_signal(number)
        if number == signal.SIGKILL:
            parent.wait(tools.PATIENCE_SECONDS)
        (tmp_path / "go").touch()
        assert parent.wait(tools.PATIENCE_SECONDS) == (-9 if number == signal.SIGKILL else 130)
        tools.wait_for_end(pid)
        assert not tools.is_mounted(folder)
    finally:
        (tmp_path / "go").touch()
        tools.force_away(folder, pid)


@tools.needs_root
def test_apply_is_refused_while_a_read_only_loop_device_is_attached(image: Path) -> None:
    """A loop device that only reads keeps pages of its own, which an apply could not renew."""
    with tools.mounted(image) as mount:
        mount.snapshot("create", "kept")
        with tools.loop_device(mount.active, "--read-only"):
            with pytest.raises(OSError) as caught:
                os.setxattr(mount.active, "user.qcowfs.snapshot.apply", b"kept")
            assert caught.value.errno == errno.EBUSY
        mount.snapshot("apply", "kept")


def test_a_log_that_nobody_reads() -> None:
    """A full pipe on standard error costs log records, and stops nothing."""
    reading, writing = os.pipe()
    kept = os.dup(2)
    try:
        os.set_blocking(writing, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        os.dup2(writing, 2)
        handler = _DescriptorHandler()
        handler.emit(logging.makeLogRecord({"msg": "x" * 100_000}))
    finally:
        os.dup2(kept, 2)
        for descriptor in (reading, writing, kept):
            os.close(descriptor)
