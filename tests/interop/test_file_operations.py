"""The exposed file behaves as a file: seeded operations of all kinds against a model.

Reads and writes through the page cache, past it (O_DIRECT) and by mmap; holes
punched, ranges zeroed and allocated; SEEK_DATA and SEEK_HOLE; syncs; and
truncates, which are refused.
"""

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    KIB,
    MIB,
)

pytestmark = tools.needs_fuse

OPERATIONS = int(os.environ.get("QCOWFS_FILE_OPERATIONS", "400"))
SIZE = 6 * MIB + 512
SECTOR = 512


class _Exercise:
    """One open file, the model of its bytes, and the operations that are tried on both."""

    def __init__(self, path: Path, seed: int, initial: bytes, *, allocates: bool) -> None:
        self.allocates = allocates
        self.chance = random.Random(seed)
        self.model = bytearray(initial)
        self.size = len(initial)
        self.file = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.map = mmap.mmap(self.file, self.size)
        # O_DIRECT wants aligned memory; an anonymous mapping is.
        self.aligned = mmap.mmap(-1, 512 * KIB)

    def close(self) -> None:
        self.aligned.close()
        self.map.close()
        os.close(self.file)
        os.close(self.direct)

    def _range(self, unit: int = 1) -> tuple[int, int]:
        length = self.chance.choice((1, 3, 8, 127, 128, 129, 300, 1000)) * max(unit, 1)
        if unit == 1:
            length *= self.chance.choice((1, 61, 512))
        length = min(length, 500 * KIB, self.size)
        offset = self.chance.randrange((self.size - length) // unit + 1) * unit
        return offset, length

    def _data(self, length: int) -> bytes:
        if self.chance.random() < 0.1:
            return bytes(length)
        return self.chance.randbytes(length)

    def write(self) -> None:
        offset, length = self._range()
        data = self._data(length)
        assert os.pwrite(self.file, data, offset) == length
        self.model[offset : offset + length] = data

    def read(self) -> None:
        offset, length = self._range()
        assert os.pread(self.file, length, offset) == self.model[offset : offset + length]

    def write_directly(self) -> None:
        offset, length = self._range(SECTOR)
        data = self._data(length)
        self.aligned[:length] = data
        with memoryview(self.aligned)[:length] as view:
            assert os.pwritev(self.direct, [view], offset) == length
        self.model[offset : offset + length] = data

    def read_directly(self) -> None:
        offset, length = self._range(SECTOR)
        with memoryview(self.aligned)[:length] as view:
            assert os.preadv(self.direct, [view], offset) == length
        assert self.aligned[:length] == self.model[offset : offset + length]

    def write_mapped(self) -> None:
        offset, length = self._range()
        data = self._data(length)
        self.map[offset : offset + length] = data
        self.map.flush()
        self.model[offset : offset + length] = data

    def read_mapped(self) -> None:
        offset, length = self._range()
        assert self.map[offset : offset + length] == self.model[offset : offset + length]

    def _clear(self, mode: int) -> None:
        offset, length = self._range(self.chance.choice((1, SECTOR, 64 * KIB)))
        tools.fallocate(self.file, mode | FALLOC_KEEP_SIZE, offset, length)
        self.model[offset : offset + length] = bytes(length)

    def punch(self) -> None:
        self._clear(FALLOC_PUNCH_HOLE)

    def zero(self) -> None:
        self._clear(FALLOC_ZERO_RANGE)

    def allocate(self) -> None:
        offset, length = self._range()
        tools.fallocate(self.file, 0, offset, length)

    def sync(self) -> None:
        self.chance.choice((os.fsync, os.fdatasync))(self.file)

    def seek(self) -> None:
        """A hole reads as zeros; data begins where SEEK_DATA says, at the latest."""
        start = self.chance.randrange(self.size)
        try:
            data = os.lseek(self.file, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = self.size
        assert start <= data <= self.size
        assert not any(self.model[start:data])
        hole = os.lseek(self.file, start, os.SEEK_HOLE)
        assert start <= hole <= self.size
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(OSError) as caught:
                os.lseek(self.file, self.size, whence)
            assert caught.value.errno == errno.ENXIO

    def refused(self) -> None:
        """Another size is EPERM, a write past the end ENOSPC, and a read there short."""
        for size in (0, self.size - 1, self.size + 1):
            with pytest.raises(OSError) as caught:
                os.ftruncate(self.file, size)
            assert caught.value.errno == errno.EPERM
        os.ftruncate(self.file, self.size)
        with pytest.raises(OSError) as caught:
            os.pwrite(self.file, b"x", self.size)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(self.file, 100, self.size) == b""
        assert os.pread(self.file, 100, self.size - 10) == self.model[-10:]

    def run(self, count: int) -> None:
        kinds = [self.write, self.read, self.write_directly, self.read_directly, self.write_mapped,
                 self.read_mapped, self.punch, self.zero, self.allocate, self.sync, self.seek,
                 self.refused]  # fmt: skip
        weights = [8, 8, 6, 6, 3, 3, 4, 3, 2, 1, 3, 1]
        if not self.allocates:
            weights[6:9] = [0, 0, 0]
        for kind in self.chance.choices(kinds, weights, k=count):
            kind()


def _base(folder: Path, chance: random.Random) -> list[str]:
    """A raw backing file, shorter than what lies over it, with holes."""
    data = bytearray(4 * MIB)
    for _ in range(20):
        place = chance.randrange(len(data) - 50_000)
        data[place : place + 50_000] = chance.randbytes(50_000)
    (folder / "base.raw").write_bytes(data)
    return ["-b", "base.raw", "-F", "raw"]


CASES = {
    "plain": ({}, False),
    "version-2": ({"compat": "0.10"}, False),
    "version-2-over-a-base": ({"compat": "0.10", "cluster_size": 4 * KIB}, True),
    "clusters-512": ({"cluster_size": 512}, True),
    "clusters-2M": ({"cluster_size": 2 * MIB}, True),
    "subclusters-over-a-base": ({"extended_l2": "on"}, True),
}


@pytest.mark.parametrize("lane", ["lane", "no-lane"])
@pytest.mark.parametrize("name", CASES)
def test_seeded_operations(tmp_path: Path, name: str, lane: str) -> None:
    """File and model agree after each operation, after a snapshot, and after a remount."""
    options, has_base = CASES[name]
    chance = random.Random(len(name))
    below = _base(tmp_path, chance) if has_base else []
    image = tmp_path / "disk.qcow2"
    words = ",".join(f"{key}={value}" for key, value in options.items())
    arguments = [*(["-o", words] if words else []), *below, str(image), str(SIZE)]
    tools.qemu_img("create", "-q", "-f", "qcow2", *arguments)
    model = bytearray((tmp_path / "base.raw").read_bytes() if below else b"").ljust(SIZE, b"\0")
    for part in range(2):
        with tools.mounted(image, *([] if lane == "lane" else ["--no-lane"])) as mount:
            assert mount.active.read_bytes() == model
            # libfuse's handlers know no fallocate: without the lane there is none.
            exercise = _Exercise(
                mount.active, seed=part, initial=bytes(model), allocates=lane == "lane"
            )
            try:
                exercise.run(OPERATIONS // 4)
                mount.snapshot("create", f"part{part}")
                kept = bytes(exercise.model)
                exercise.run(OPERATIONS // 4)
                assert (mount.snapshots / f"part{part}.raw").read_bytes() == kept
                model = exercise.model
            finally:
                exercise.close()
            assert mount.active.read_bytes() == model
        tools.check_image(image)
        raw = tools.raw_copy(image)
        assert raw.read_bytes() == model
        raw.unlink()
