"""How the options of `qcowfs mount` are read: long ones, `-o`, and what mount(8) adds."""

import os
from pathlib import Path

import pytest

from qcowfs.cli import mount
from qcowfs.cli.common import CommandError


def _read(*arguments: str) -> mount._Request:
    return mount._read_request([*arguments, "disk", "mnt"])


def test_nothing_said() -> None:
    """Read and write, locked, with the backing chain, in the background."""
    request = _read()
    assert (request.image, request.mountpoint) == ("disk", "mnt")
    assert not request.foreground
    assert not request.read_only
    assert request.lock
    assert request.backing
    assert request.use_lane
    assert request.fuse_options == {}


@pytest.mark.parametrize(
    ("arguments", "attribute", "value"),
    [
        (["-r"], "read_only", True),
        (["-o", "ro"], "read_only", True),
        (["-r", "-o", "rw"], "read_only", True),
        (["-o", "rw"], "read_only", False),
        (["-o", "growable"], "growable", True),
        (["-o", "format=raw"], "format", "raw"),
        (["-o", "backing_format=raw"], "backing_format", "raw"),
        (["-o", "no_backing"], "backing", False),
        (["-o", "force_share"], "force_share", True),
        (["-o", "no_lock"], "lock", False),
        (["-o", "no_lane"], "use_lane", False),
        (["-o", "cache_size=2M"], "cache_size", 2 << 20),
        (["--cache-size", "64K"], "cache_size", 65536),
        (["-o", "poll_us=0"], "poll_us", 0),
        (["-o", "log_file=/x"], "log_file", "/x"),
    ],
)
def test_own_options(arguments: list[str], attribute: str, value: object) -> None:
    """Each long option has a name for -o, so that an fstab line can say all of them."""
    assert getattr(_read(*arguments), attribute) == value


def test_options_of_the_mount_are_handed_on() -> None:
    """What the kernel or fusermount3 understands goes on, split at commas that are not escaped."""
    request = _read("-o", "allow_other,noatime,uid=5", "-o", r"fsname=a\,b,umask=022")
    assert request.fuse_options == {
        "allow_other": None,
        "noatime": None,
        "uid": "5",
        "fsname": "a,b",
        "umask": "022",
    }


def test_what_mount_adds_is_not_handed_on() -> None:
    """Options that are meant for mount(8), fstab or systemd are dropped."""
    request = _read("-o", "defaults,noauto,user,nofail,_netdev,x-systemd.automount,comment=a")
    assert request.fuse_options == {}


@pytest.mark.parametrize(
    "option",
    ["nonsense", "ro=1", "growable=1", "uid", "allow_other=1", "cache_size=x", "cache_size=1K",
     "cache_size", "poll_us=x", "poll_us=-1", "format"],
)  # fmt: skip
def test_wrong_options(option: str) -> None:
    """An unknown option, a value too many or one too few ends the command, naming the image."""
    with pytest.raises(CommandError) as caught:
        _read("-o", option)
    assert caught.value.file == "disk"


def test_a_ready_descriptor_that_is_none() -> None:
    """--ready-fd names a descriptor that the caller has opened."""
    with pytest.raises(CommandError):
        _read("--ready-fd", "999")


def test_the_pid_file_is_ours_alone(tmp_path: Path) -> None:
    """It holds the process id, and goes away, but not when another has taken the name."""
    path = tmp_path / "pid"
    first = mount._PidFile(str(path))
    first.write()
    assert path.read_text() == f"{os.getpid()}\n"
    first.finish()
    assert not path.exists()

    second = mount._PidFile(str(path))
    second.write()
    path.unlink()
    path.write_text("somebody else's\n")
    second.finish()
    assert path.read_text() == "somebody else's\n"


def test_a_pid_file_that_was_there_stays_when_the_mount_fails(tmp_path: Path) -> None:
    """Only a mount that was ready has written, and only what was written is removed."""
    path = tmp_path / "pid"
    path.write_text("12\n")
    pid_file = mount._PidFile(str(path))
    pid_file.finish()
    assert path.read_text() == "12\n"
