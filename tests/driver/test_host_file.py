"""HostFile: what the host does to it, from short transfers to failing syncs."""

import errno
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from qcowfs.driver import hostcalls, storage
from qcowfs.driver.storage import Buffer, DataRun, HostFile, LockRole
from qcowfs.errors import BadRequest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 100,000 bytes."""
    path = tmp_path / "file.img"
    path.write_bytes(random.Random(5).randbytes(100_000))
    return path


async def open_file(path: Path, *, writable: bool = True) -> HostFile:
    """Open for a test, without locks."""
    return await HostFile.open(path, writable=writable, role=LockRole.QCOW2_WRITE, lock=False)


async def test_two_names_of_a_file_have_one_identity(path: Path, tmp_path: Path) -> None:
    """Symbolic and hard links are recognised as the same file."""
    (tmp_path / "soft").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "other").write_bytes(b"")
    files = [await open_file(tmp_path / name) for name in (path.name, "soft", "hard", "other")]
    assert files[0].identity == files[1].identity == files[2].identity
    assert files[3].identity != files[0].identity
    assert files[1].name == str(tmp_path / "soft")
    for file in files:
        await file.aclose()


async def test_only_files_and_block_devices_are_opened(tmp_path: Path) -> None:
    """A folder, a FIFO, a socket, a character device: refused at once, without an open."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        handle = os.open(tmp_path, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{handle}/socket")
        finally:
            os.close(handle)
    cases = ((tmp_path, "directory"), (tmp_path / "fifo", "FIFO"),
             (tmp_path / "socket", "socket"), (Path("/dev/null"), "character device"))  # fmt: skip
    for place, word in cases:
        with pytest.raises(BadRequest, match=word):
            await open_file(place)
        with pytest.raises(BadRequest, match=word):
            await HostFile.create(place)


async def test_a_missing_file_and_an_impossible_name(tmp_path: Path) -> None:
    """The host's error names the file; a name with a NUL is refused in words."""
    with pytest.raises(FileNotFoundError) as failure:
        await open_file(tmp_path / "none")
    assert failure.value.filename == str(tmp_path / "none")
    with pytest.raises(BadRequest, match="name"):
        await HostFile.open("a\0b", writable=False, role=LockRole.QCOW2_READ)


async def test_sharing_by_force_is_for_readers(path: Path) -> None:
    """Writing without locks by force is refused."""
    with pytest.raises(BadRequest, match="force"):
        await HostFile.open(path, writable=True, role=LockRole.QCOW2_WRITE, force_share=True)


async def test_creating_empties_a_file_or_makes_it(path: Path, tmp_path: Path) -> None:
    """An existing file is emptied, a missing one made; `created` tells them apart."""
    file = await HostFile.create(path)
    assert (file.created, file.size()) == (False, 0)
    await file.aclose()
    file = await HostFile.create(tmp_path / "new")
    assert (file.created, file.size()) == (True, 0)
    await file.pwrite([b"n"], 0)
    await file.aclose()
    assert (tmp_path / "new").read_bytes() == b"n"


class Calls:
    """Stands for preadv: answers not resident, or only a few bytes at a time."""

    def __init__(self, *, nowait_errno: int = 0, longest: int = 1 << 30) -> None:
        self.nowait_errno = nowait_errno
        self.longest = longest
        self.flags: list[int] = []

    def preadv(
        self, fd: int, buffers: Sequence[memoryview], host_offset: int, flags: int = 0
    ) -> int:
        """Read as told."""
        self.flags.append(flags)
        if flags and self.nowait_errno:
            raise OSError(self.nowait_errno, os.strerror(self.nowait_errno))
        return os.preadv(fd, [buffers[0][: self.longest]], host_offset)


async def test_what_is_not_in_memory_comes_by_a_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGAIN makes the instant call answer False; the waiting call reads it all."""
    calls = Calls(nowait_errno=errno.EAGAIN)
    monkeypatch.setattr(storage, "_preadv", calls.preadv)
    file = await open_file(path)
    buffer = bytearray(100)
    assert not file.try_pread_into([memoryview(buffer)], 0)
    assert await file.pread(110_000, 0) == path.read_bytes() + bytes(10_000)
    assert calls.flags == [os.RWF_NOWAIT, os.RWF_NOWAIT]
    await file.aclose()


async def test_a_short_read_is_not_resident_unless_the_file_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short instant read in the middle is False; at the end the rest is zeros."""
    monkeypatch.setattr(storage, "_preadv", Calls(longest=300).preadv)
    file = await open_file(path)
    content = path.read_bytes()
    buffer = bytearray(b"?" * 400)
    assert not file.try_pread_into([memoryview(buffer)], 0)
    assert await file.pread(5000, 0) == content[:5000]
    assert file.try_pread_into([memoryview(buffer)], len(content) - 300)
    assert buffer == content[-300:] + bytes(100)
    await file.aclose()


async def test_a_filesystem_without_nowait_is_read_by_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOPNOTSUPP never reaches the caller; only a filesystem in memory is read inline."""
    calls = Calls(nowait_errno=errno.EOPNOTSUPP)
    monkeypatch.setattr(storage, "_preadv", calls.preadv)
    content = path.read_bytes()
    for in_memory in (False, True):
        monkeypatch.setattr(storage, "lives_in_memory", lambda fd, answer=in_memory: answer)
        file = await open_file(path)
        buffer = bytearray(10)
        assert file.try_pread_into([memoryview(buffer)], 5) is in_memory
        assert file.try_pread_into([memoryview(buffer)], 5) is in_memory
        assert not in_memory or buffer == content[5:15]
        assert await file.pread(100_000, 0) == content
        await file.aclose()


async def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that takes a few bytes at a time still gets all of them, in place."""

    def pwritev(fd: int, buffers: Sequence[Buffer], host_offset: int) -> int:
        first = next(buffer for buffer in buffers if len(buffer))
        return os.pwrite(fd, memoryview(first)[:7], host_offset)

    monkeypatch.setattr(storage, "_pwritev", pwritev)
    file = await open_file(path)
    assert file.try_pwrite([b"", b"0123456789", b"abcdefghij" * 3], 1000)
    assert await file.pread(42, 999) == (
        path.read_bytes()[999:1000]
        + b"0123456789"
        + b"abcdefghij" * 3
        + path.read_bytes()[1040:1041]
    )
    await file.aclose()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_a_failing_write_keeps_its_errno(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After a part was written, the host's error still arrives as it was."""
    count = 0

    def pwritev(fd: int, buffers: Sequence[Buffer], host_offset: int) -> int:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(number, os.strerror(number))
        return os.pwrite(fd, memoryview(buffers[0])[:5], host_offset)

    monkeypatch.setattr(storage, "_pwritev", pwritev)
    file = await open_file(path)
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        await file.pwrite([b"x" * 10], 0)
    assert failure.value.errno == number
    await file.aclose()


async def test_a_host_that_writes_nothing_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of no bytes without an error ends in EIO, not in a loop."""
    monkeypatch.setattr(storage, "_pwritev", lambda fd, buffers, host_offset: 0)
    file = await open_file(path)
    with pytest.raises(OSError, match="nothing"):
        await file.pwrite([b"x"], 0)
    await file.aclose()


async def test_long_writes_go_through_a_thread(path: Path) -> None:
    """A write of many megabytes is complete as well."""
    file = await open_file(path)
    data = random.Random(6).randbytes(5 << 20)
    await file.pwrite([data[:100], data[100:]], 3)
    assert await file.pread(len(data), 3) == data
    await file.aclose()


async def test_a_failed_sync_is_never_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a lost write once; here every later sync fails too."""
    monkeypatch.setattr(os, "fdatasync", _fail_with(errno.EIO))
    file = await open_file(path)
    with pytest.raises(OSError, match="rror"):
        await file.sync()
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    with pytest.raises(OSError, match="rror") as failure:
        await file.sync()
    assert failure.value.errno == errno.EIO
    await file.aclose()


def _fail_with(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def fallocate_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the C library's fallocate answers, one call after the other; then 0."""
    answers: list[int] = []

    def call(fd: int, mode: int, host_offset: int, length: int) -> int:
        return answers.pop(0) if answers else 0

    monkeypatch.setattr(hostcalls, "_fallocate_function", lambda: call)
    yield answers
    assert not answers


async def test_zeroes_are_written_where_the_host_cannot_make_them(
    path: Path, fallocate_answers: list[int]
) -> None:
    """Without ZERO_RANGE, or at an alignment it refuses, zeros are written out."""
    fallocate_answers.extend([errno.EINVAL, errno.EOPNOTSUPP])
    file = await open_file(path)
    for start in (1000, 2 << 20, 5 << 20):
        await file.pwrite([b"n" * (2 << 20)], start)
        await file.write_zeroes(start + 1, (2 << 20) - 2)
        assert await file.pread(2 << 20, start) == b"n" + bytes((2 << 20) - 2) + b"n"
    await file.aclose()


async def test_punching_says_when_the_host_cannot(path: Path, fallocate_answers: list[int]) -> None:
    """Unsupported is False, an error is raised, an interruption is retried."""
    file = await open_file(path)
    fallocate_answers.extend([errno.EOPNOTSUPP])
    assert not await file.punch(0, 4096)
    fallocate_answers.extend([errno.EINTR, errno.EINTR, errno.ENOSPC])
    with pytest.raises(OSError, match="space"):
        await file.punch(0, 4096)
    fallocate_answers.extend([errno.EINTR])
    assert await file.punch(0, 4096)
    await file.aclose()


async def test_closing_waits_for_calls_in_threads(path: Path) -> None:
    """A descriptor is never closed under a thread that still uses it."""
    file = await open_file(path)
    data = b"w" * (8 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.pwrite, [data], 0)
        await trio.lowlevel.checkpoint()
        nursery.start_soon(file.aclose)
    assert path.read_bytes() == data


async def test_a_filesystem_that_cannot_tell_holes_has_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SEEK_DATA is unknown, all is data up to the end of the file."""
    real = os.lseek

    def lseek(fd: int, host_offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, host_offset, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    file = await open_file(path)
    assert file.data_runs(10, 200_000) == [
        DataRun(True, 10, 99_990),
        DataRun(False, 100_000, 100_010),
    ]
    await file.aclose()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 1 MiB."""
    backing = tmp_path / "device.img"
    backing.write_bytes(bytes(1 << 20))
    command = ["losetup", "--find", "--show", str(backing)]
    try:
        made = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no loop device to be had")
    name = made.stdout.strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, timeout=30)


async def test_a_block_device_is_an_image(device: Path) -> None:
    """A device is read, written, zeroed and synced; its size is fixed."""
    file = await open_file(device)
    try:
        assert file.is_device
        assert file.size() == 1 << 20
        await file.pwrite([b"dev"], 1000)
        await file.write_zeroes(4096, 131_072)
        await file.write_zeroes(1001, 100_001)
        assert await file.pread(4, 999) == b"\0d\0\0"
        assert await file.pread(10, (1 << 20) - 5) == bytes(10)
        await file.allocate(0, 1 << 20)
        await file.truncate(1 << 19)
        with pytest.raises(OSError, match="small"):
            await file.truncate((1 << 20) + 1)
        with pytest.raises(OSError, match="small"):
            await file.allocate(4096, 1 << 20)
        with pytest.raises(OSError, match="space"):
            await file.pwrite([b"xx"], (1 << 20) - 1)
        assert file.data_runs(0, 1 << 20) == [DataRun(True, 0, 1 << 20)]
        await file.sync()
    finally:
        await file.aclose()
