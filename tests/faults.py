"""A storage that fails on demand: the nth call of a named method, short transfers, bad syncs.

It is a part of `tests.fakes`, whose users import it from there.
"""

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from qcowfs.driver.storage import Buffer, DataRun, Storage

# Names that stand for several methods, since a driver chooses among them by what is resident.
GROUPS: dict[str, tuple[str, ...]] = {
    "read": ("try_pread_into", "pread_into", "pread"),
    "write": ("try_pwrite", "pwrite"),
    "change": ("try_pwrite", "pwrite", "write_zeroes", "punch", "truncate", "allocate"),
    "any": (
        "try_pread_into",
        "pread_into",
        "pread",
        "try_pwrite",
        "pwrite",
        "write_zeroes",
        "punch",
        "truncate",
        "allocate",
        "sync",
    ),
}


@dataclass
class Fault:
    """An error that waits for its call; `remaining` calls succeed before it."""

    methods: tuple[str, ...]
    remaining: int
    error_number: int
    repeat: bool
    written: int
    hit_count: int = 0


class FaultyFile:
    """Wraps a storage and passes every call on, but for the faults that were ordered.

    `calls` counts the calls by method name. `piece_length` splits every
    transfer into pieces with other tasks running between them; `interruptions`
    lets other tasks run so many times before each asynchronous call, as system
    calls that are interrupted and retried do.
    """

    def __init__(
        self, inner: Storage, *, piece_length: int | None = None, interruptions: int = 0
    ) -> None:
        self.inner = inner
        self.piece_length = piece_length
        self.interruptions = interruptions
        self.calls: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.closed = False
        self._sync_error: int | None = None

    def fail(
        self,
        method: str,
        nth: int = 1,
        error_number: int = errno.EIO,
        *,
        repeat: bool = False,
        written: int = 0,
    ) -> Fault:
        """Let the nth call from now (1: the next) of `method` raise OSError(error_number).

        `method` is a method's name or a key of GROUPS. With `repeat`, all later
        calls fail as well. A failing write still transfers its first `written` bytes.
        """
        fault = Fault(GROUPS.get(method, (method,)), nth - 1, error_number, repeat, written)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Cancel all faults; a failed sync goes on failing, as the contract of Storage asks."""
        self.faults.clear()

    def _due(self, method: str) -> Fault | None:
        """Count the call, and the fault that strikes it."""
        self.calls[method] += 1
        due = None
        for fault in list(self.faults):
            if method not in fault.methods:
                continue
            if fault.remaining > 0:
                fault.remaining -= 1
            elif due is None:
                due = fault
                fault.hit_count += 1
                if not fault.repeat:
                    self.faults.remove(fault)
        return due

    def _strike(self, method: str) -> None:
        fault = self._due(method)
        if fault is not None:
            raise _error(fault)

    async def _interrupt(self) -> None:
        for _ in range(self.interruptions):
            await trio.lowlevel.checkpoint()

    @property
    def name(self) -> str:
        """The name of the wrapped storage."""
        return self.inner.name

    @property
    def read_only(self) -> bool:
        """Whether the wrapped storage is read-only."""
        return self.inner.read_only

    @property
    def identity(self) -> tuple[int, int]:
        """The identity of the wrapped storage."""
        return self.inner.identity

    def size(self) -> int:
        """The size of the wrapped storage."""
        self._strike("size")
        return self.inner.size()

    def allocated_bytes(self) -> int:
        """The room that the wrapped storage takes."""
        self._strike("allocated_bytes")
        return self.inner.allocated_bytes()

    def data_runs(
        self, host_offset: int, length: int, *, limit: int | None = None
    ) -> list[DataRun]:
        """The runs of the wrapped storage."""
        self._strike("data_runs")
        return self.inner.data_runs(host_offset, length, limit=limit)

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        """Pass on, or fail."""
        self._strike("try_pread_into")
        return self.inner.try_pread_into(buffers, host_offset)

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """Pass on, in pieces where asked for, or fail."""
        self._strike("pread_into")
        await self._interrupt()
        if self.piece_length is None:
            await self.inner.pread_into(buffers, host_offset)
            return
        for buffer in buffers:
            for start in range(0, len(buffer), self.piece_length):
                piece = buffer[start : start + self.piece_length]
                await self.inner.pread_into((piece,), host_offset + start)
            host_offset += len(buffer)

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """Pass on, or fail."""
        self._strike("pread")
        await self._interrupt()
        return await self.inner.pread(length, host_offset)

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """Pass on, or fail, perhaps after a part."""
        fault = self._due("try_pwrite")
        if fault is None:
            return self.inner.try_pwrite(buffers, host_offset)
        if fault.written:
            self.inner.try_pwrite((b"".join(buffers)[: fault.written],), host_offset)
        raise _error(fault)

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Pass on, in pieces where asked for, or fail, perhaps after a part."""
        fault = self._due("pwrite")
        await self._interrupt()
        if fault is None and self.piece_length is None:
            await self.inner.pwrite(buffers, host_offset)
            return
        data = b"".join(buffers)
        if fault is not None:
            data = data[: fault.written]
        step = self.piece_length or max(len(data), 1)
        for start in range(0, len(data), step):
            await self.inner.pwrite((data[start : start + step],), host_offset + start)
        if fault is not None:
            raise _error(fault)

    async def write_zeroes(self, host_offset: int, length: int) -> None:
        """Pass on, or fail."""
        self._strike("write_zeroes")
        await self._interrupt()
        await self.inner.write_zeroes(host_offset, length)

    async def punch(self, host_offset: int, length: int) -> bool:
        """Pass on, or fail."""
        self._strike("punch")
        await self._interrupt()
        return await self.inner.punch(host_offset, length)

    async def truncate(self, size: int) -> None:
        """Pass on, or fail."""
        self._strike("truncate")
        await self._interrupt()
        await self.inner.truncate(size)

    async def allocate(self, host_offset: int, length: int) -> None:
        """Pass on, or fail."""
        self._strike("allocate")
        await self._interrupt()
        await self.inner.allocate(host_offset, length)

    async def sync(self) -> None:
        """Pass on, or fail now and for ever."""
        fault = self._due("sync")
        await self._interrupt()
        if fault is not None and self._sync_error is None:
            self._sync_error = fault.error_number
        if self._sync_error is not None:
            raise OSError(self._sync_error, os.strerror(self._sync_error))
        await self.inner.sync()

    async def aclose(self) -> None:
        """Close the wrapped storage, whatever happens."""
        self.closed = True
        await self.inner.aclose()
        self._strike("aclose")


def _error(fault: Fault) -> OSError:
    return OSError(fault.error_number, os.strerror(fault.error_number))
