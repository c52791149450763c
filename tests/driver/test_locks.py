"""Image locks: the bytes of each role, conflicts among ourselves and with QEMU."""

import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.driver import locking
from qcowfs.driver.locking import LockRole, lock_bytes
from qcowfs.driver.storage import HostFile
from qcowfs.errors import ImageBusy

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-io") and shutil.which("qemu-img")), reason="no QEMU tools"
)

# RELIABILITY: role, bytes locked.
TABLE = {
    LockRole.QCOW2_WRITE: {100, 101, 103, 201, 203},
    LockRole.QCOW2_READ: {100, 201, 203},
    LockRole.DATA_FILE_WRITE: {100, 101, 103, 203},
    LockRole.DATA_FILE_READ: {100, 203},
    LockRole.RAW_WRITE: {100, 101},
    LockRole.RAW_READ: {100},
}

# Which roles may be on one file at the same time (unordered pairs; the others conflict).
TOGETHER = {
    (LockRole.QCOW2_READ, LockRole.QCOW2_READ),
    (LockRole.QCOW2_READ, LockRole.DATA_FILE_READ),
    (LockRole.QCOW2_READ, LockRole.RAW_READ),
    (LockRole.QCOW2_WRITE, LockRole.RAW_READ),
    (LockRole.DATA_FILE_WRITE, LockRole.RAW_READ),
    (LockRole.DATA_FILE_WRITE, LockRole.RAW_WRITE),
    (LockRole.DATA_FILE_READ, LockRole.DATA_FILE_READ),
    (LockRole.DATA_FILE_READ, LockRole.RAW_WRITE),
    (LockRole.DATA_FILE_READ, LockRole.RAW_READ),
    (LockRole.RAW_WRITE, LockRole.RAW_WRITE),
    (LockRole.RAW_WRITE, LockRole.RAW_READ),
    (LockRole.RAW_READ, LockRole.RAW_READ),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw file of 1 MiB."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


def locked_bytes(path: Path) -> set[int]:
    """The offsets of the file that anybody holds a lock on, as the kernel lists them."""
    inode = path.stat().st_ino
    held: set[int] = set()
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if "->" not in fields and fields[1] == "OFDLCK" and fields[5].endswith(f":{inode}"):
            assert fields[3] == "READ"
            held.update(range(int(fields[6]), int(fields[7]) + 1))
    return held


async def open_role(path: Path, role: LockRole) -> HostFile:
    """Open with the locks of a role."""
    return await HostFile.open(path, writable="WRITE" in role.name, role=role)


@pytest.mark.parametrize("role", list(LockRole), ids=lambda role: role.name)
async def test_a_role_locks_exactly_its_bytes(image: Path, role: LockRole) -> None:
    """The kernel's list shows the bytes of the table; they are gone once it is closed."""
    file = await open_role(image, role)
    assert set(lock_bytes(role)) == locked_bytes(image) == TABLE[role]
    await file.aclose()
    assert locked_bytes(image) == set()


@pytest.mark.parametrize("second", list(LockRole), ids=lambda role: role.name)
@pytest.mark.parametrize("first", list(LockRole), ids=lambda role: role.name)
async def test_which_roles_meet(image: Path, first: LockRole, second: LockRole) -> None:
    """Two roles share a file unless one uses what the other denies; a refusal leaves no lock."""
    holder = await open_role(image, first)
    if (first, second) in TOGETHER or (second, first) in TOGETHER:
        file = await open_role(image, second)
        await file.aclose()
    else:
        with pytest.raises(ImageBusy) as refusal:
            await open_role(image, second)
        assert str(refusal.value).startswith("Failed to get ")
        assert refusal.value.hint == f"Is another process using the image [{image}]?"
        assert refusal.value.errno == errno.EBUSY
    assert locked_bytes(image) == TABLE[first]
    await holder.aclose()


async def test_the_words_of_a_refusal_are_those_of_qemu(image: Path) -> None:
    """A second writer misses the write lock; a reader below a writer the shared one."""
    holder = await open_role(image, LockRole.QCOW2_WRITE)
    with pytest.raises(ImageBusy, match=r'^Failed to get "write" lock$'):
        await open_role(image, LockRole.QCOW2_WRITE)
    with pytest.raises(ImageBusy, match=r'^Failed to get shared "write" lock$'):
        await open_role(image, LockRole.QCOW2_READ)
    await holder.aclose()


async def test_no_locks_by_force_or_by_wish(image: Path) -> None:
    """`force_share` and `lock=False` take none and heed none."""
    holder = await open_role(image, LockRole.QCOW2_WRITE)
    one = await HostFile.open(image, writable=False, role=LockRole.QCOW2_READ, force_share=True)
    two = await HostFile.open(image, writable=True, role=LockRole.QCOW2_WRITE, lock=False)
    assert locked_bytes(image) == TABLE[LockRole.QCOW2_WRITE]
    for file in (one, two, holder):
        await file.aclose()


async def test_locks_outlive_other_descriptors_of_the_file(image: Path) -> None:
    """Closing another descriptor of the file, as POSIX locks would not survive, changes nothing."""
    holder = await open_role(image, LockRole.QCOW2_WRITE)
    image.read_bytes()
    os.close(os.open(image, os.O_RDWR))
    assert locked_bytes(image) == TABLE[LockRole.QCOW2_WRITE]
    await holder.aclose()


async def test_a_busy_file_is_not_emptied(image: Path) -> None:
    """Creating over an image in use fails before a byte of it is lost."""
    image.write_bytes(b"precious")
    holder = await open_role(image, LockRole.QCOW2_WRITE)
    with pytest.raises(ImageBusy):
        await HostFile.create(image)
    assert image.read_bytes() == b"precious"
    await holder.aclose()


@pytest.mark.expects_warnings
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL])
async def test_a_filesystem_without_locks_gives_a_warning(
    image: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ENOLCK and EINVAL are one warning, and the image opens."""

    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    file = await open_role(image, LockRole.QCOW2_WRITE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(image) in caplog.text
    await file.aclose()


async def test_another_failure_of_locking_is_an_error(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that does not mean that there are no locks ends the opening."""
    monkeypatch.setattr(locking, "_conflict", _fail)
    with pytest.raises(OSError, match="rror") as failure:
        await open_role(image, LockRole.QCOW2_WRITE)
    assert failure.value.errno == errno.EIO
    assert locked_bytes(image) == set()


def _fail(*_: object) -> str | None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# Against QEMU


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """An empty qcow2 image."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    return path


def run(*command: str, check: bool = True) -> str:
    """Run a tool without input; its standard error."""
    done = subprocess.run(
        command, check=check, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    return done.stderr


@pytest.fixture(params=[("qcow2", False), ("qcow2", True), ("raw", False)], ids=str)
def held_by_qemu(request: pytest.FixtureRequest, qcow2: Path) -> Iterator[tuple[Path, str, bool]]:
    """An image that qemu-io holds open: (path, format, read-only)."""
    format_name, read_only = request.param
    command = ["qemu-io", "-f", format_name, *(["-r"] if read_only else []), str(qcow2)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not locked_bytes(qcow2) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield qcow2, format_name, read_only
    finally:
        process.communicate(b"quit\n", timeout=60)


@needs_qemu
async def test_qemu_locks_the_same_bytes(held_by_qemu: tuple[Path, str, bool]) -> None:
    """The bytes that QEMU locks in a role are those of ours."""
    path, format_name, read_only = held_by_qemu
    role = LockRole.QCOW2_READ if read_only else LockRole.QCOW2_WRITE
    if format_name == "raw":
        role = LockRole.RAW_WRITE
    assert locked_bytes(path) == TABLE[role]


@needs_qemu
async def test_an_image_that_qemu_holds_is_busy(held_by_qemu: tuple[Path, str, bool]) -> None:
    """No writer beside any QEMU; a reader beside a reader."""
    path, _, read_only = held_by_qemu
    with pytest.raises(ImageBusy):
        await open_role(path, LockRole.QCOW2_WRITE)
    if read_only:
        file = await open_role(path, LockRole.QCOW2_READ)
        await file.aclose()
    else:
        with pytest.raises(ImageBusy):
            await open_role(path, LockRole.QCOW2_READ)


@needs_qemu
async def test_qemu_finds_an_image_of_ours_busy(qcow2: Path) -> None:
    """QEMU refuses an image that we write, and one that we read where it would write."""
    file = await open_role(qcow2, LockRole.QCOW2_WRITE)
    message = run("qemu-img", "check", str(qcow2), check=False)
    assert 'Failed to get shared "write" lock' in message
    message = run("qemu-io", "-c", "quit", str(qcow2), check=False)
    assert 'Failed to get "write" lock' in message
    run("qemu-img", "info", "-U", str(qcow2))
    await file.aclose()
    file = await open_role(qcow2, LockRole.QCOW2_READ)
    run("qemu-img", "check", str(qcow2))
    message = run("qemu-io", "-c", "quit", str(qcow2), check=False)
    assert 'Failed to get "write" lock' in message
    await file.aclose()
    run("qemu-io", "-c", "quit", str(qcow2))
