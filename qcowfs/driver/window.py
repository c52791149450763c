"""A part of a file as a storage of its own: what a raw backing file with offset and size is.

It knows no format. A window is for reading: nothing names a part of a file as
a disk to be written. Invariants: no byte outside the window is ever read; the
file under it is the window's, and closed with it.
"""

from collections.abc import Sequence
from typing import NoReturn

from qcowfs.driver.storage import Buffer, DataRun, Storage
from qcowfs.errors import BadRequest, ReadOnlyImage

_SECTOR = 512


class WindowStorage:
    """`length` bytes of `inner` from `start` on, all the rest of it when `length` is None.

    Raises BadRequest for a window that is not inside the file, or not made of
    whole sectors.
    """

    read_only = True

    def __init__(self, inner: Storage, start: int, length: int | None) -> None:
        size = inner.size()
        if start < 0 or start > size:
            raise BadRequest(f"offset {start} is outside of the file of {size} bytes")
        if length is None:
            length = size - start
        elif length < 0 or length % _SECTOR:
            raise BadRequest(f"size {length} is not a multiple of {_SECTOR}")
        elif start + length > size:
            raise BadRequest(
                f"offset {start} and size {length} reach past the file of {size} bytes"
            )
        self._inner = inner
        self._start = start
        self._length = length
        self.name = inner.name
        self.identity = inner.identity

    def size(self) -> int:
        """The length of the window."""
        return self._length

    def _inside(
        self, buffers: Sequence[memoryview], host_offset: int
    ) -> tuple[list[memoryview], list[memoryview]]:
        """The parts of the buffers that the window has bytes for, and the rest."""
        left = max(0, self._length - host_offset)
        inside: list[memoryview] = []
        beyond: list[memoryview] = []
        for buffer in buffers:
            if left:
                inside.append(buffer[:left])
            if len(buffer) > left:
                beyond.append(buffer[left:])
            left = max(0, left - len(buffer))
        return inside, beyond

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        """As `Storage.try_pread_into`; bytes past the window are zeros."""
        inside, beyond = self._inside(buffers, host_offset)
        if inside and not self._inner.try_pread_into(inside, self._start + host_offset):
            return False
        for buffer in beyond:
            buffer[:] = bytes(len(buffer))
        return True

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """As `Storage.pread_into`; bytes past the window are zeros."""
        inside, beyond = self._inside(buffers, host_offset)
        if inside:
            await self._inner.pread_into(inside, self._start + host_offset)
        for buffer in beyond:
            buffer[:] = bytes(len(buffer))

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """As `Storage.pread`; bytes past the window are zeros."""
        data = bytearray(length)
        await self.pread_into((memoryview(data),), host_offset)
        return data

    def data_runs(
        self, host_offset: int, length: int, *, limit: int | None = None
    ) -> list[DataRun]:
        """As `Storage.data_runs`."""
        inside = max(0, min(length, self._length - host_offset))
        runs = [
            DataRun(is_data, start - self._start, run_length)
            for is_data, start, run_length in (
                self._inner.data_runs(self._start + host_offset, inside, limit=limit)
                if inside
                else ()
            )
        ]
        covered = sum(run.length for run in runs)
        if inside < length and covered == inside and (limit is None or len(runs) < limit):
            runs.append(DataRun(False, host_offset + inside, length - inside))
        return runs

    def allocated_bytes(self) -> int:
        """What the host has set aside for the whole file, the window at most."""
        return min(self._inner.allocated_bytes(), self._length)

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def write_zeroes(self, host_offset: int, length: int) -> None:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def punch(self, host_offset: int, length: int) -> bool:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def truncate(self, size: int) -> None:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def allocate(self, host_offset: int, length: int) -> None:
        """Raises ReadOnlyImage."""
        self._refuse()

    async def sync(self) -> None:
        """Nothing: a window never changes."""

    async def aclose(self) -> None:
        """Close the file."""
        await self._inner.aclose()

    def _refuse(self) -> NoReturn:
        raise ReadOnlyImage("a part of a file is for reading alone")
