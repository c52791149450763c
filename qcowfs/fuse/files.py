"""Open files: the node behind each, how often it is open, and how much it has allocated.

Shared by the handlers and by the lane, so that both see one truth. It must not
know names, pyfuse3, or offsets inside an image.

Invariants:
- A file handle is a function of inode and access mode, so that it means the
  same to a process that takes the mount over.
- A snapshot's node stays open while a handle to it is open or a count of its
  blocks runs; a few idle ones are kept, the least recently used is closed.
- A node whose snapshot is deleted answers no further request, whoever still
  holds its HotTarget.
- A count of blocks that is not known is never given too low: tools take a file
  without blocks for one hole.
"""

import errno
import logging
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.mapping_chain import chain_extents
from qcowfs.driver.node import Buffer, Node
from qcowfs.errors import QcowfsError
from qcowfs.fuse.tree import ACTIVE_INODE, Entry, EntryKind, SnapshotRecord

log = logging.getLogger(__name__)

NodeContext = AbstractAsyncContextManager[Node]

_IDLE_NODES = 16
_BLOCK = 512
# A getattr waits so long for a count that has just begun, then answers what is known.
_COUNT_PATIENCE = 0.1
# Counting anew may take so much of the time in the long run, and so many
# seconds at once: the kernel may ask after every write.
_RECOUNT_SHARE = 0.05
_RECOUNT_CREDIT = 0.25
_COUNT_STEP = 1 << 36
_COUNT_EXTENTS = 4096
_CONCURRENT_COUNTS = 2


@runtime_checkable
class SnapshotStore(Protocol):
    """What a node that can have snapshots offers beside the Node protocol."""

    def snapshots(self) -> tuple[SnapshotRecord, ...]:
        """All of them, in the order of the table."""
        ...

    async def create_snapshot(self, name: bytes) -> Any:
        """Take one of the active disk."""
        ...

    async def delete_snapshot(self, reference: Any) -> Any:
        """Delete the one with that ID or name."""
        ...

    async def apply_snapshot(self, reference: Any) -> Any:
        """Make the active disk what that snapshot shows."""
        ...

    async def rename_snapshot(self, reference: Any, new_name: bytes) -> Any:
        """Give it another name."""
        ...

    async def open_snapshot(self, snapshot: Any) -> Node:
        """A read-only node of one; closed by the caller."""
        ...


@dataclass(slots=True, eq=False)
class HotTarget:
    """What a request on an open file works on; one object for all handles of a kind.

    Whoever changed bytes of `node` calls `touch` afterwards
    (mtime, st_blocks and the commit at close rest on it). `node` is looked up
    anew for each request: it is replaced when its snapshot is deleted. With
    `growable` a write may go past the end, by way of `Operations.write`.
    """

    node: Node
    writable: bool
    growable: bool = False
    changed_ns: int = 0
    flushed_ns: int = 0

    def touch(self) -> None:
        """Note that the content has changed just now."""
        now = time.time_ns()
        # Later than every earlier change, though the clock be set back.
        self.changed_ns = now if now > self.changed_ns else self.changed_ns + 1


class GoneNode:
    """Stands for a snapshot that was deleted while a file on it was open."""

    read_only = True
    cluster_size = 4096
    backing = None
    format_name = "raw"

    def __init__(self, name: str, virtual_size: int) -> None:
        self.name = name
        self.virtual_size = virtual_size

    def _refuse(self) -> OSError:
        return OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.name)

    def try_read(self, guest_offset: int, length: int) -> bytes | None:
        """Refuse with ESTALE."""
        raise self._refuse()

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Refuse with ESTALE."""
        raise self._refuse()

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def discard(self, guest_offset: int, length: int) -> None:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> Sequence[Extent]:
        """Refuse with ESTALE."""
        raise self._refuse()

    async def flush(self) -> None:
        """Nothing is left to be done."""

    async def aclose(self) -> None:
        """Nothing is left to be done."""


def handle_of(inode: int, *, writable: bool) -> int:
    """The file handle of all opens of `inode` with this access."""
    return inode * 2 + writable


def inode_of(handle: int) -> int:
    """The inode that a file handle belongs to."""
    return handle // 2


@dataclass(slots=True, eq=False)
class _SnapshotFile:
    """An open snapshot node and how many handles and counts use it."""

    target: HotTarget
    users: int = 0


class OpenFiles:
    """The handles of one mount and the nodes behind them."""

    def __init__(self, node: Node, *, growable: bool = False) -> None:
        self._store = node if isinstance(node, SnapshotStore) else None
        self._opens: Counter[int] = Counter()
        self.active = HotTarget(node, writable=True, growable=growable)
        self._targets = {
            handle_of(ACTIVE_INODE, writable=False): HotTarget(node, writable=False),
            handle_of(ACTIVE_INODE, writable=True): self.active,
        }
        self._snapshots: OrderedDict[int, _SnapshotFile] = OrderedDict()
        self._by_handle: dict[int, _SnapshotFile] = {}
        self._opening = trio.Lock()
        self._writers_gone = trio.Event()

    def target(self, handle: int) -> HotTarget | None:
        """What requests on a handle work on; None for a snapshot that is not open."""
        return self._targets.get(handle)

    def is_open(self, inode: int) -> bool:
        """Whether any handle of the inode is open."""
        return bool(
            self._opens[handle_of(inode, writable=False)]
            or self._opens[handle_of(inode, writable=True)]
        )

    @property
    def writer_count(self) -> int:
        """Handles of the active disk that may write."""
        return self._opens[handle_of(ACTIVE_INODE, writable=True)]

    async def wait_no_writers(self) -> None:
        """Return when no handle of the active disk may write."""
        while self.writer_count:
            await self._writers_gone.wait()

    async def open(self, entry: Entry, *, writable: bool) -> int:
        """Count one more handle of a disk file and answer it.

        Raises what opening the snapshot's node raises.
        """
        handle = handle_of(entry.inode, writable=writable)
        if entry.kind is EntryKind.SNAPSHOT:
            file = await self.acquire(entry)
            self._by_handle[handle] = file
            self._targets[handle] = file.target
        elif writable and self._writers_gone.is_set():
            self._writers_gone = trio.Event()
        self._opens[handle] += 1
        return handle

    async def close(self, handle: int) -> None:
        """Count one handle less; one that is not open is ignored."""
        if not self._opens[handle]:
            return
        self._opens[handle] -= 1
        file = self._by_handle.get(handle)
        if file is None:
            if not self.writer_count:
                self._writers_gone.set()
            return
        if not self._opens[handle]:
            del self._opens[handle], self._targets[handle], self._by_handle[handle]
        await self.release(file)

    async def acquire(self, entry: Entry) -> _SnapshotFile:
        """The node of a snapshot, opened where it is not yet; `release` it afterwards."""
        file = self._snapshots.get(entry.inode)
        if file is None:
            async with self._opening:
                file = self._snapshots.get(entry.inode)
                if file is None:
                    assert self._store is not None
                    node = await self._store.open_snapshot(entry.snapshot)
                    file = _SnapshotFile(HotTarget(node, writable=False))
                    self._snapshots[entry.inode] = file
        file.users += 1
        self._snapshots.move_to_end(entry.inode)
        return file

    async def release(self, file: _SnapshotFile) -> None:
        """Give back what `acquire` answered; idle nodes beyond a few are closed."""
        file.users -= 1
        while True:
            # Looked for anew each time: others come and go while one is being closed.
            idle = [inode for inode, other in self._snapshots.items() if not other.users]
            if len(idle) <= _IDLE_NODES:
                return
            await self._snapshots.pop(idle[0]).target.node.aclose()

    @asynccontextmanager
    async def without(self, entry: Entry) -> AsyncIterator[None]:
        """Around a deletion: no request meets the node of a snapshot that is going.

        Handles that are open answer ESTALE from here on; when the body raises
        they work again.
        """
        async with self._opening:
            file = self._snapshots.pop(entry.inode, None)
        if file is None:
            yield
            return
        node = file.target.node
        file.target.node = GoneNode(node.name, node.virtual_size)
        try:
            yield
        except BaseException:
            file.target.node = node
            self._snapshots.setdefault(entry.inode, file)
            raise
        await node.aclose()

    async def aclose(self) -> None:
        """Close every snapshot's node; the image itself is the session's."""
        while self._snapshots:
            _, file = self._snapshots.popitem()
            await file.target.node.aclose()


class BlockCounts:
    """st_blocks of the disk files: how many blocks of 512 bytes hold something.

    Counted through the whole backing chain, since a reader sees through it. A
    count runs as a task of its own; what cannot be counted, and what is not
    counted yet, is taken as allocated.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._counts: dict[int, _Count] = {}
        self._limiter = trio.CapacityLimiter(_CONCURRENT_COUNTS)
        self._credit = _RECOUNT_CREDIT
        self._credit_at = -math.inf

    def known(self, inode: int) -> int | None:
        """The result of the last count, however old; None before the first one has ended."""
        count = self._counts.get(inode)
        return None if count is None else count.blocks

    def forget(self, inode: int) -> None:
        """The inode is gone, or shows something else now."""
        self._counts.pop(inode, None)

    async def blocks(
        self, inode: int, size: int, changed_ns: int, using: Callable[[], NodeContext]
    ) -> tuple[int, bool]:
        """The count, and whether it is exact: as of now where that is to be had soon.

        `changed_ns` is when the content last changed (time_ns), `using` opens
        the node for as long as it is counted. Never raises for a bad image.
        """
        count = self._counts.get(inode)
        if count is None:
            count = self._counts[inode] = _Count()
        if count.begun_ns > changed_ns and count.blocks is not None:
            return count.blocks, True
        if count.running is None and (count.blocks is None or self._has_credit()):
            count.running = trio.Event()
            self._nursery.start_soon(self._run, count, size, using)
        if count.running is not None:
            with trio.move_on_after(_COUNT_PATIENCE):
                await count.running.wait()
        if count.blocks is None:
            return _blocks_of(size), False
        if count.begun_ns > changed_ns:
            return count.blocks, True
        # A stale 0 would make a hole of a file that has just been written to.
        return count.blocks or 1, False

    def _has_credit(self) -> bool:
        now = trio.current_time()
        earned = _RECOUNT_SHARE * (now - self._credit_at)
        self._credit = min(self._credit + earned, _RECOUNT_CREDIT)
        self._credit_at = now
        return self._credit > 0

    async def _run(self, count: "_Count", size: int, using: Callable[[], NodeContext]) -> None:
        begun_ns = time.time_ns()
        started = trio.current_time()
        allocated = size
        try:
            async with self._limiter, using() as node:
                begun_ns = time.time_ns()
                started = trio.current_time()
                allocated = await _allocated_bytes(node, size)
        except (QcowfsError, OSError) as error:
            log.debug("blocks cannot be counted: %s", error)
        except Exception:
            log.exception("counting blocks failed")
        finally:
            now = trio.current_time()
            if count.blocks is not None:
                self._credit -= now - started
            count.blocks = _blocks_of(allocated)
            count.begun_ns = begun_ns
            assert count.running is not None
            count.running.set()
            count.running = None


@dataclass(slots=True, eq=False)
class _Count:
    blocks: int | None = None
    begun_ns: int = -1
    running: trio.Event | None = None


def _blocks_of(length: int) -> int:
    return -(-length // _BLOCK)


async def _allocated_bytes(node: Node, size: int) -> int:
    allocated = 0
    guest_offset = 0
    while guest_offset < size:
        length = min(_COUNT_STEP, size - guest_offset)
        try:
            extents = await chain_extents(node, guest_offset, length, limit=_COUNT_EXTENTS)
        except (QcowfsError, OSError) as error:
            log.debug("blocks from %#x on cannot be counted: %s", guest_offset, error)
            return allocated + size - guest_offset
        for extent in extents:
            if extent.kind is ExtentKind.COMPRESSED:
                allocated += min(extent.stored_length, extent.length)
            elif extent.kind is ExtentKind.DATA or extent.host_offset is not None:
                allocated += extent.length
        if extents:
            length = extents[-1].guest_offset + extents[-1].length - guest_offset
        guest_offset += length
        await trio.lowlevel.checkpoint()
    return allocated
