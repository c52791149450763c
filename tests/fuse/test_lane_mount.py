"""The lane under a real kernel: a process of its own serves, this one is the client."""

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs.errors import ImageBusy
from qcowfs.fuse import device
from tests.fuse.lane_server import DISK_LENGTH, MIB, PAGE, SLOW_FROM

ROOT = Path(__file__).resolve().parent.parent.parent
CONNECTIONS = Path("/sys/fs/fuse/connections")
PATIENCE = 60
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE = 1, 2, 16, 8

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse"
)


class Server:
    """A mount and the process behind it."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self.disk = point / "disk"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuse.lane_server", str(point)],
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def calls(self) -> list[list[object]]:
        """What the node has been asked, by way of a file without a node."""
        return json.loads((self.point / "stats").read_bytes())

    def wait(self) -> str:
        """The last words of the process."""
        words, _ = self.process.communicate(timeout=PATIENCE)
        return words.strip()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    point = tmp_path / "mnt"
    point.mkdir()
    server = Server(point)
    yield server
    try:
        device.unmount(point, lazy=True)
    except device.MountFailed:
        pass
    if server.process.poll() is None:
        server.process.wait(PATIENCE)
    assert server.process.stdout is not None
    server.process.stdout.close()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2); 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return ctypes.get_errno() if libc.fallocate(fd, mode, offset, length) else 0


def test_bytes_written_are_bytes_read(server: Server) -> None:
    """Writes of any size and alignment, buffered, are what is read, buffered or direct."""
    rng = random.Random(1)
    expected = bytearray(SLOW_FROM)
    with opened(server.disk, os.O_RDWR) as fd:
        for _ in range(200):
            length = rng.choice([1, 511, 4096, 70_000, MIB])
            offset = rng.randrange(SLOW_FROM - length)
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            expected[offset : offset + length] = data
        os.fsync(fd)
        assert os.pread(fd, SLOW_FROM, 0) == expected
    with opened(server.disk, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, MIB) as buffer:
        for offset in range(0, SLOW_FROM, MIB):
            assert os.preadv(fd, [buffer], offset) == MIB
            assert buffer[:] == expected[offset : offset + MIB]


def test_direct_writers_side_by_side(server: Server) -> None:
    """Direct writes of several threads to one disk all arrive where they belong."""
    area = MIB

    def write(number: int) -> None:
        rng = random.Random(number)
        with opened(server.disk, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, MIB) as buffer:
            for page in rng.sample(range(area // PAGE), area // PAGE):
                buffer[:PAGE] = bytes([number * 16 + page % 16]) * PAGE
                with memoryview(buffer) as view:
                    assert os.pwritev(fd, [view[:PAGE]], number * area + page * PAGE) == PAGE

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    with opened(server.disk, os.O_RDONLY) as fd:
        for number in range(6):
            content = os.pread(fd, area, number * area)
            for page in range(area // PAGE):
                page_bytes = content[page * PAGE : page * PAGE + PAGE]
                assert page_bytes == bytes([number * 16 + page % 16]) * PAGE


def test_mapped_memory(server: Server) -> None:
    """A shared mapping sees writes, and its own stores reach the disk."""
    with opened(server.disk, os.O_RDWR) as fd:
        os.pwrite(fd, b"before", 5 * PAGE)
        with mmap.mmap(fd, 16 * PAGE) as mapping:
            assert mapping[5 * PAGE : 5 * PAGE + 6] == b"before"
            mapping[9 * PAGE : 9 * PAGE + 5] = b"after"
            mapping.flush()
    with opened(server.disk, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, PAGE) as buffer:
        os.preadv(fd, [buffer], 9 * PAGE)
        assert buffer[:5] == b"after"


def test_mapped_memory_of_a_direct_handle(server: Server) -> None:
    """A handle opened with O_DIRECT can be mapped, where the kernel offers that."""
    with opened(server.disk, os.O_RDWR | os.O_DIRECT) as fd:
        try:
            mapping = mmap.mmap(fd, PAGE)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            pytest.skip("this kernel maps no direct handles")
        with mapping:
            mapping[:3] = b"abc"
            mapping.flush()
    with opened(server.disk, os.O_RDONLY) as fd:
        assert os.pread(fd, 3, 0) == b"abc"


def test_holes(server: Server) -> None:
    """Punching, zeroing and seeking agree with each other."""
    with opened(server.disk, os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 10 * PAGE, 0)
        assert fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * PAGE, 3 * PAGE) == 0
        assert fallocate(fd, ZERO_RANGE, 6 * PAGE, PAGE) == 0
        assert fallocate(fd, COLLAPSE, 0, PAGE) == errno.EOPNOTSUPP
        assert fallocate(fd, 0, DISK_LENGTH, PAGE) == errno.ENOSPC
        assert os.pread(fd, 10 * PAGE, 0) == (
            b"x" * 2 * PAGE + bytes(3 * PAGE) + b"x" * PAGE + bytes(PAGE) + b"x" * 3 * PAGE
        )
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 2 * PAGE
        assert os.lseek(fd, 2 * PAGE, os.SEEK_DATA) == 5 * PAGE
        assert os.lseek(fd, 5 * PAGE, os.SEEK_HOLE) == 6 * PAGE
        assert os.lseek(fd, 9 * PAGE, os.SEEK_HOLE) == 10 * PAGE
        for offset, whence in ((10 * PAGE, os.SEEK_DATA), (DISK_LENGTH, os.SEEK_HOLE)):
            with pytest.raises(OSError) as caught:
                os.lseek(fd, offset, whence)
            assert caught.value.errno == errno.ENXIO
    assert server.calls()[:2] == [
        ["zeroes", 2 * PAGE, 3 * PAGE, True],
        ["zeroes", 6 * PAGE, PAGE, False],
    ]


def test_seeking_goes_on_after_a_file_without_a_node(server: Server) -> None:
    """No answer for such a file makes the kernel stop asking for all files."""
    with opened(server.point / "stats", os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_HOLE) == len(repr(server.calls()))
    with opened(server.disk, os.O_RDWR) as fd:
        os.pwrite(fd, b"x", PAGE)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_DATA) == PAGE


def test_flushes(server: Server) -> None:
    """fsync and fdatasync reach the node each time, close only after a change."""
    with opened(server.disk, os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 0)
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(server.disk, os.O_RDWR) as fd:
        os.pwrite(fd, b"y", 0)
    with opened(server.disk, os.O_RDWR):
        pass
    assert server.calls() == [["flush"]] * 3


def test_synchronous_writes(server: Server) -> None:
    """A write through O_DSYNC is durable when it returns, direct or not."""
    for extra in (0, os.O_DIRECT):
        before = len(server.calls())
        with (
            opened(server.disk, os.O_RDWR | os.O_DSYNC | extra) as fd,
            mmap.mmap(-1, PAGE) as buffer,
        ):
            os.pwritev(fd, [buffer], 0)
            assert len(server.calls()) > before


def test_listing_with_a_large_buffer(server: Server) -> None:
    """However large the caller's buffer, a directory is listed whole."""
    assert sorted(os.listdir(server.point)) == ["disk", "stats"]


def test_a_killed_reader(server: Server) -> None:
    """A client killed inside a slow request disturbs nobody."""
    code = "import os,sys; fd=os.open(sys.argv[1],0); print(flush=True); os.pread(fd,10,%d)"
    reader = subprocess.Popen(
        [sys.executable, "-c", code % SLOW_FROM, str(server.disk)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    reader.send_signal(signal.SIGINT)
    reader.kill()
    reader.wait(PATIENCE)
    reader.stdout.close()
    with opened(server.disk, os.O_RDONLY) as fd:
        assert os.pread(fd, 10, SLOW_FROM) == bytes(10)


class Load:
    """Threads that read and write until they are refused."""

    def __init__(self, disk: Path) -> None:
        self.failures: list[OSError] = []
        self.counts = [0] * 4
        self.stopping = threading.Event()
        self.fds = [os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC) for _ in range(4)]
        self.threads = [threading.Thread(target=self._run, args=(n,)) for n in range(4)]
        for thread in self.threads:
            thread.start()
        while not all(self.counts):
            assert not self.failures

    def _run(self, number: int) -> None:
        with mmap.mmap(-1, 64 * PAGE) as buffer:
            try:
                while not self.stopping.is_set():
                    offset = self.counts[number] % 32 * 64 * PAGE
                    call = os.pwritev if number % 2 else os.preadv
                    call(self.fds[number], [buffer], offset)
                    self.counts[number] += 1
            except OSError as error:
                self.failures.append(error)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a client hangs"
        for fd in self.fds:
            try:
                os.close(fd)
            except OSError as error:
                self.failures.append(error)

    def stop(self) -> None:
        self.stopping.set()
        self.join()


def test_unmount_under_load(server: Server) -> None:
    """A plain unmount is refused as busy; a lazy one serves until the last close, then ends."""
    load = Load(server.disk)
    with pytest.raises(ImageBusy):
        device.unmount(server.point)
    device.unmount(server.point, lazy=True)
    counts = list(load.counts)
    while any(now < before + 10 for now, before in zip(load.counts, counts, strict=True)):
        assert not load.failures
    load.stop()
    assert not load.failures
    assert server.wait() == "UNMOUNTED"


@pytest.fixture
def connections() -> Iterator[Path]:
    """The fusectl filesystem, mounted for the test where it is not."""
    if os.geteuid() != 0:
        pytest.skip("aborting a connection by number is tried as root")
    mounted_here = not any(CONNECTIONS.iterdir()) and not os.path.ismount(CONNECTIONS)
    if mounted_here:
        done = subprocess.run(
            ["mount", "-t", "fusectl", "fusectl", str(CONNECTIONS)],
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            pytest.skip("fusectl cannot be mounted")
    yield CONNECTIONS
    if mounted_here:
        subprocess.run(["umount", str(CONNECTIONS)], stdin=subprocess.DEVNULL, check=True)


def test_aborted_connection(server: Server, connections: Path) -> None:
    """After an abort clients are refused, none hangs, and the lane ends."""
    number = os.minor(os.stat(server.point).st_dev)
    load = Load(server.disk)
    (connections / str(number) / "abort").write_text("1")
    load.join()
    assert {failure.errno for failure in load.failures} <= {
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EIO,
    }
    assert load.failures
    assert server.wait() == "ABORTED"


def test_killed_server(server: Server) -> None:
    """After a kill -9 clients are refused and none hangs."""
    load = Load(server.disk)
    server.process.kill()
    load.join()
    assert load.failures
    with pytest.raises(OSError) as caught:
        os.stat(server.point)
    assert caught.value.errno == errno.ENOTCONN


def test_dying_libfuse(server: Server) -> None:
    """When libfuse's side is gone the lane ends the connection, and no client hangs."""
    load = Load(server.disk)
    with pytest.raises(OSError):
        os.stat(server.point / "die")
    load.join()
    assert load.failures
    assert server.wait() == "PEER_CLOSED"
