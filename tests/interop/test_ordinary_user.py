"""An ordinary user mounts, writes and unmounts: all that fusermount3 allows.

The interpreter and the package may lie where only root can go. So a launcher
loads all of it as root and then becomes the user for good, before it looks at
the command line; what the user does to files is done by the system's own tools.
"""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PUBLIC_PREFIX
from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = [tools.needs_root, tools.needs_fuse]

USER = 65534

# PR_SET_DUMPABLE: without it /proc/self would belong to root after the change of user.
_LAUNCHER = """
import ctypes, importlib, os, pkgutil, sys
import qcowfs
for module in pkgutil.walk_packages(qcowfs.__path__, "qcowfs."):
    if module.name != "qcowfs.__main__":
        importlib.import_module(module.name)
import encodings.idna, json, multiprocessing, numpy, trio, zlib
from importlib.metadata import version
user = int(sys.argv[1])
os.setgroups([]); os.setgid(user); os.setuid(user)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
from qcowfs.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def _as_user(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`qcowfs ARGUMENTS` as the ordinary user."""
    words = [str(argument) for argument in arguments]
    return tools.run(
        tools.QCOWFS[0], "-c", _LAUNCHER, str(USER), *words, check=check, cwd="/"
    )


def _tool_as_user(*command: object, stdin: bytes | None = None) -> str:
    """A tool of the system as the ordinary user."""
    words = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *map(str, command)]
    return tools.run(*words, stdin=stdin, cwd="/").stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the user's own that the user can reach."""
    path = Path(tempfile.mkdtemp(prefix=PUBLIC_PREFIX))
    try:
        os.chown(path, USER, USER)
        path.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _device_for_all() -> Iterator[None]:
    """/dev/fuse as distributions have it, 0666; put back in the end."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", mode | 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)


def _image(folder: Path) -> Path:
    image = tools.create(folder / "disk.qcow2", 16 * MIB)
    os.chown(image, USER, USER)
    image.chmod(0o600)
    (folder / "mnt").mkdir()
    os.chown(folder / "mnt", USER, USER)
    return image


@pytest.mark.parametrize("lane", ["lane", "no-lane"])
def test_mount_write_snapshot_unmount(folder: Path, lane: str) -> None:
    """The whole round without any privilege but fusermount3's; root sees nothing of the mount."""
    image = _image(folder)
    point = folder / "mnt"
    _as_user("mount", *([] if lane == "lane" else ["--no-lane"]), image, point)
    try:
        assert os.stat(folder).st_uid == USER
        listing = _tool_as_user("stat", "--format=%n %u %a", f"{point}/active.raw").strip()
        assert listing == f"{point}/active.raw {USER} 600"
        words = ["dd", "status=none", "conv=notrunc", "bs=64k", f"of={point}/active.raw"]
        _tool_as_user(*words, stdin=b"mine " * 20_000)
        _tool_as_user("setfattr", "-n", "user.qcowfs.snapshot.create", "-v", "s", point)
        _tool_as_user(*words, stdin=b"late " * 20_000)
        said = _tool_as_user("head", "-c", "5", f"{point}/snapshots/s.raw")
        assert said == "mine "
        _as_user("umount", point)
        assert not tools.is_mounted(point)
    finally:
        tools.force_away(point)
    tools.check_image(image)
    assert tools.pread(tools.raw_copy(image), 5, 99_990) == b"late "


def test_an_image_that_the_user_must_not_read(folder: Path) -> None:
    """One line, `Permission denied`, and nothing is mounted."""
    image = _image(folder)
    os.chown(image, 0, 0)
    finished = _as_user("mount", image, folder / "mnt", check=False)
    assert finished.returncode == 1
    assert finished.stderr == f"qcowfs: {image}: Permission denied\n"
    assert not tools.is_mounted(folder / "mnt")


def test_a_mount_point_of_somebody_else(folder: Path) -> None:
    """fusermount3's refusal is one line, the image is not left locked."""
    image = _image(folder)
    os.chown(folder / "mnt", 0, 0)
    finished = _as_user("mount", image, folder / "mnt", check=False)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert not tools.is_mounted(folder / "mnt")
    tools.qemu_img("info", image)
