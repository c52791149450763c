"""Storages for tests: in memory, with a log of what a crash may lose, with faults.

All three fulfil `qcowfs.driver.storage.Storage` wholly, so the driver above
them is the real one. They are deterministic: a choice comes from a seed.

- `MemoryFile` can claim that bytes are not resident and that it cannot write
  inline, so that a test drives the waiting paths as well as the instant ones.
- `CrashFile` rebuilds the file as a crash may leave it. Model: what was written
  since the last finished sync may have reached the disk or not, in any order,
  in pieces of 512 bytes.
- `FaultyFile` wraps another storage and fails the nth call of a named method.
"""

import errno
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from qcowfs.driver.storage import Buffer, DataRun
from qcowfs.errors import ReadOnlyImage
from tests.faults import Fault, FaultyFile

__all__ = [
    "CrashFile",
    "CrashState",
    "Fault",
    "FaultyFile",
    "MemoryFile",
    "Operation",
    "resize",
    "write_into",
]

SECTOR = 512
PAGE = 4096


class MemoryFile:
    """A file that is a bytearray, public as `content`; it survives `aclose`.

    `miss_rate` is the share of `try_pread_into` calls, `refusal_rate` that of
    `try_pwrite` calls, from 0 to 1, that answer False; the asynchronous
    calls let other tasks run first.
    """

    _inode_count = 0

    def __init__(
        self,
        content: Buffer = b"",
        *,
        name: str = "memory.img",
        read_only: bool = False,
        miss_rate: float = 0.0,
        refusal_rate: float = 0.0,
        seed: int = 0,
        can_punch: bool = True,
    ) -> None:
        MemoryFile._inode_count += 1
        self.content = bytearray(content)
        self.name = name
        self.read_only = read_only
        self.identity = (-1, MemoryFile._inode_count)
        self.miss_rate = miss_rate
        self.refusal_rate = refusal_rate
        self.can_punch = can_punch
        self.closed = False
        self.sync_count = 0
        self._random = random.Random(seed)

    # Reading

    def size(self) -> int:
        """The length of the content."""
        self._require_open()
        return len(self.content)

    def try_pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> bool:
        """Fill the buffers, or by the seeded choice answer False with garbage in them."""
        self._require_open()
        if self._chance(self.miss_rate):
            for buffer in buffers:
                buffer[:] = b"\xdb" * len(buffer)
            return False
        self._read(buffers, host_offset)
        return True

    async def pread_into(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        """Fill the buffers after letting others run."""
        await self._pause()
        self._read(buffers, host_offset)

    async def pread(self, length: int, host_offset: int) -> bytearray:
        """`length` bytes, zeros past the end, after letting others run."""
        result = bytearray(length)
        await self.pread_into((memoryview(result),), host_offset)
        return result

    def data_runs(
        self, host_offset: int, length: int, *, limit: int | None = None
    ) -> list[DataRun]:
        """Pages of nothing but zeros are holes."""
        self._require_open()
        runs: list[DataRun] = []
        end = host_offset + length
        start = host_offset
        while start < end:
            stop = min(end, (start // PAGE + 1) * PAGE)
            if start >= len(self.content):
                stop = end
            is_data = any(self.content[start:stop])
            if runs and runs[-1].is_data == is_data:
                runs[-1] = DataRun(is_data, runs[-1].start, stop - runs[-1].start)
            elif limit is not None and len(runs) >= limit:
                break
            else:
                runs.append(DataRun(is_data, start, stop - start))
            start = stop
        return runs

    def allocated_bytes(self) -> int:
        """The pages that are not all zeros."""
        runs = self.data_runs(0, len(self.content))
        return sum(-(-run.length // PAGE) * PAGE for run in runs if run.is_data)

    # Changing

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """Write at once, or by the seeded choice answer False and do nothing."""
        self._require_writable()
        if self._chance(self.refusal_rate):
            return False
        self._write(b"".join(buffers), host_offset)
        return True

    async def pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> None:
        """Write after letting others run."""
        self._require_writable()
        await self._pause()
        self._write(b"".join(buffers), host_offset)

    async def write_zeroes(self, host_offset: int, length: int) -> None:
        """Zero the range, growing the content."""
        self._require_writable()
        await self._pause()
        self._zero(host_offset, length)

    async def punch(self, host_offset: int, length: int) -> bool:
        """Zero what of the range exists; False where `can_punch` is."""
        self._require_writable()
        await self._pause()
        if not self.can_punch:
            return False
        self._punch(host_offset, length)
        return True

    async def truncate(self, size: int) -> None:
        """Cut or grow the content."""
        self._require_writable()
        await self._pause()
        self._truncate(size)

    async def allocate(self, host_offset: int, length: int) -> None:
        """Grow the content to the end of the range."""
        self._require_writable()
        await self._pause()
        self._allocate(host_offset, length)

    async def sync(self) -> None:
        """Let others run; memory is as durable as it gets."""
        self._require_open()
        await self._pause()
        self.sync_count += 1

    async def aclose(self) -> None:
        """Refuse every later call; `content` stays readable."""
        if not self.closed:
            with trio.CancelScope(shield=True):
                await self._pause()
            self.closed = True

    # What really happens, for subclasses to watch

    def _read(self, buffers: Sequence[memoryview], host_offset: int) -> None:
        self._require_open()
        for buffer in buffers:
            piece = self.content[host_offset : host_offset + len(buffer)]
            buffer[: len(piece)] = piece
            buffer[len(piece) :] = bytes(len(buffer) - len(piece))
            host_offset += len(buffer)

    def _write(self, data: bytes, host_offset: int) -> None:
        write_into(self.content, data, host_offset)

    def _zero(self, host_offset: int, length: int) -> None:
        write_into(self.content, bytes(length), host_offset)

    def _punch(self, host_offset: int, length: int) -> None:
        end = min(host_offset + length, len(self.content))
        if host_offset < end:
            self.content[host_offset:end] = bytes(end - host_offset)

    def _truncate(self, size: int) -> None:
        resize(self.content, size)

    def _allocate(self, host_offset: int, length: int) -> None:
        resize(self.content, max(len(self.content), host_offset + length))

    def _chance(self, rate: float) -> bool:
        return rate > 0 and self._random.random() < rate

    async def _pause(self) -> None:
        self._require_open()
        await trio.lowlevel.checkpoint()
        self._require_open()

    def _require_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)

    def _require_writable(self) -> None:
        self._require_open()
        if self.read_only:
            raise ReadOnlyImage(f"{self.name} is open for reading alone")


def resize(content: bytearray, size: int) -> None:
    """Cut `content` or grow it with zeros."""
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def write_into(content: bytearray, data: bytes, host_offset: int) -> None:
    """Put `data` into `content`, growing it where needed."""
    if data:
        resize(content, max(len(content), host_offset + len(data)))
        content[host_offset : host_offset + len(data)] = data


@dataclass(frozen=True, slots=True)
class Operation:
    """One change, or one finished sync, in the order in which they took effect.

    `kind` is pwrite, zero, punch, truncate, allocate or sync. For a sync,
    `covers` counts the log's entries that existed when it began: these are
    durable once it has ended. For a truncate, `host_offset` is the new size.
    """

    kind: str
    host_offset: int = 0
    length: int = 0
    data: bytes = b""
    covers: int = 0

    def pieces(self) -> list[tuple[int, int]]:
        """The (start, end) of the parts that a power loss keeps or loses as a whole."""
        if self.kind not in {"pwrite", "zero", "punch"}:
            return [(self.host_offset, self.host_offset + self.length)]
        end = self.host_offset + self.length
        starts = range(self.host_offset - self.host_offset % SECTOR, end, SECTOR)
        return [(max(start, self.host_offset), min(start + SECTOR, end)) for start in starts]

    def apply(self, content: bytearray, kept: Collection[int] | None = None) -> None:
        """Redo the change on `content`; with `kept`, only those of its pieces."""
        if self.kind == "truncate":
            resize(content, self.host_offset)
        elif self.kind == "allocate":
            resize(content, max(len(content), self.host_offset + self.length))
        elif self.kind != "sync":
            ranges = self.pieces()
            chosen = (
                [(self.host_offset, self.host_offset + self.length)]
                if kept is None
                else [ranges[number] for number in kept]
            )
            for start, end in chosen:
                self._apply_range(content, start, end)

    def _apply_range(self, content: bytearray, start: int, end: int) -> None:
        if self.kind == "pwrite":
            write_into(content, self.data[start - self.host_offset : end - self.host_offset], start)
            return
        if self.kind == "punch":
            end = min(end, len(content))
        if start < end:
            write_into(content, bytes(end - start), start)

    def __str__(self) -> str:
        return f"{self.kind} {self.host_offset:#x}+{self.length:#x}"


@dataclass(frozen=True, slots=True)
class CrashState:
    """The file as a crash after `point` entries of the log may leave it."""

    point: int
    description: str
    content: bytes


class CrashFile(MemoryFile):
    """A MemoryFile whose changes are logged, to be rebuilt as a crash may leave them.

    The initial content is durable. `position` is the log's length now: note it
    when something is acknowledged, and compare it with a state's `point`. With
    `drop_every_second_sync`, every other sync is taken to have done nothing,
    from the first one on with `drop_first_sync`, else from the second: a judge
    must then find damage, or it is no judge.
    """

    def __init__(
        self,
        content: Buffer = b"",
        *,
        drop_every_second_sync: bool = False,
        drop_first_sync: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(content, **options)
        self.initial = bytes(content)
        self.log: list[Operation] = []
        self.drop_every_second_sync = drop_every_second_sync
        self.drop_first_sync = drop_first_sync

    @property
    def position(self) -> int:
        """How many entries the log has."""
        return len(self.log)

    def _write(self, data: bytes, host_offset: int) -> None:
        super()._write(data, host_offset)
        if data:
            self.log.append(Operation("pwrite", host_offset, len(data), bytes(data)))

    def _zero(self, host_offset: int, length: int) -> None:
        super()._zero(host_offset, length)
        if length:
            self.log.append(Operation("zero", host_offset, length))

    def _punch(self, host_offset: int, length: int) -> None:
        super()._punch(host_offset, length)
        if length:
            self.log.append(Operation("punch", host_offset, length))

    def _truncate(self, size: int) -> None:
        super()._truncate(size)
        self.log.append(Operation("truncate", size))

    def _allocate(self, host_offset: int, length: int) -> None:
        super()._allocate(host_offset, length)
        if length:
            self.log.append(Operation("allocate", host_offset, length))

    async def sync(self) -> None:
        """Make durable what was in the log when the call began."""
        covers = len(self.log)
        await super().sync()
        self.log.append(Operation("sync", covers=covers))

    # Crashes

    def durable_count(self, point: int | None = None) -> int:
        """How many entries of the log a crash after `point` entries cannot touch."""
        covers = 0
        sync_index = 0
        for operation in self.log[: len(self.log) if point is None else point]:
            if operation.kind == "sync":
                is_dropped = (sync_index + self.drop_first_sync) % 2 == 1
                if not (self.drop_every_second_sync and is_dropped):
                    covers = max(covers, operation.covers)
                sync_index += 1
        return covers

    def pending(self, point: int | None = None) -> list[int]:
        """The indexes in the log of the changes that a crash after `point` entries may lose."""
        point = len(self.log) if point is None else point
        durable_count = self.durable_count(point)
        return [index for index in range(durable_count, point) if self.log[index].kind != "sync"]

    def rebuild(
        self,
        survivors: Iterable[int] | None = None,
        *,
        point: int | None = None,
        torn: Mapping[int, Collection[int]] | None = None,
    ) -> bytes:
        """The file after a crash: what is durable at `point`, then `survivors` in their order.

        Without `survivors`, every pending change survives. `torn` names for
        some of them the pieces (see `Operation.pieces`) that got through.
        """
        content = bytearray(self.initial)
        for operation in self.log[: self.durable_count(point)]:
            operation.apply(content)
        return self._finish(content, self.pending(point) if survivors is None else survivors, torn)

    def _finish(
        self,
        durable: Buffer,
        survivors: Iterable[int],
        torn: Mapping[int, Collection[int]] | None = None,
    ) -> bytes:
        content = bytearray(durable)
        for index in survivors:
            self.log[index].apply(content, torn.get(index) if torn else None)
        return bytes(content)

    def states(
        self,
        *,
        first_point: int = 0,
        point_count: int | None = None,
        each_limit: int | None = 24,
        subset_count: int = 3,
        order_count: int = 1,
        torn_count: int = 2,
        seed: int = 0,
    ) -> Iterator[CrashState]:
        """States that a crash may leave, at every point of the log or at `point_count` of them.

        At each point: everything survives; only the durable does; each pending
        change missing and each one alone (a sample of `each_limit` where there
        are more); random subsets, random orders, torn writes.
        """
        choice = random.Random(seed)
        points = list(range(first_point, len(self.log) + 1))
        if point_count is not None and len(points) > point_count:
            points = sorted([*choice.sample(points[:-1], point_count - 1), points[-1]])
        base = bytearray(self.initial)
        applied_count = 0
        for point in points:
            durable_count = self.durable_count(point)
            for operation in self.log[applied_count:durable_count]:
                operation.apply(base)
            applied_count = max(applied_count, durable_count)
            pending = self.pending(point)
            seen: set[tuple[int, ...]] = set()
            for description, survivors in _choices(
                pending, choice, each_limit, subset_count, order_count
            ):
                if tuple(survivors) not in seen:
                    seen.add(tuple(survivors))
                    yield CrashState(point, description, self._finish(base, survivors))
            for number in range(torn_count if pending else 0):
                torn = self._tear(pending, choice)
                content = self._finish(base, pending, torn)
                yield CrashState(point, f"torn writes {number}: {torn}", content)

    def _tear(self, pending: Sequence[int], choice: random.Random) -> dict[int, list[int]]:
        """For some of the pending changes, at least one, a random part of their pieces."""
        chosen = choice.sample(pending, choice.randint(1, len(pending)))
        torn = {}
        for index in sorted(chosen):
            piece_count = len(self.log[index].pieces())
            torn[index] = sorted(choice.sample(range(piece_count), choice.randint(0, piece_count)))
        return torn


def _choices(
    pending: Sequence[int],
    choice: random.Random,
    each_limit: int | None,
    subset_count: int,
    order_count: int,
) -> Iterator[tuple[str, list[int]]]:
    """Descriptions and lists of the changes that survive, in the order in which they land."""
    yield "everything survives", list(pending)
    yield "only the durable survives", []
    singles = list(pending)
    if each_limit is not None and len(singles) > each_limit:
        singles = sorted(choice.sample(singles, each_limit))
    for index in singles:
        yield f"all but {index} survive", [other for other in pending if other != index]
    for index in singles:
        yield f"only {index} survives", [index]
    for number in range(subset_count if len(pending) > 1 else 0):
        subset = [index for index in pending if choice.random() < 0.5]
        yield f"random subset {number}: {subset}", subset
    for number in range(order_count if len(pending) > 1 else 0):
        order = choice.sample(pending, choice.randint(1, len(pending)))
        yield f"random order {number}: {order}", order
