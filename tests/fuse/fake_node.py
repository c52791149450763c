"""A node with snapshots in memory, for tests of what lies above the driver.

Clusters are shared between snapshots and copied on write, so that extents, and
what differs between two snapshots, can be told. `is_slow` sends every request
the asynchronous way; `gate` lets a test hold requests there; `failures` maps a
method's name to what its next call raises.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.node import Buffer, Node
from qcowfs.errors import (
    AlreadyExists,
    BadRequest,
    ImageFull,
    NotFound,
    ReadOnlyImage,
)

CLUSTER = 4096


@dataclass(frozen=True)
class FakeSnapshot:
    """What the table of snapshots holds; `clusters` maps cluster index to a key of the store."""

    id: bytes
    name: bytes
    date_sec: int = 1_700_000_000
    date_nsec: int = 5
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    clusters: dict[int, int] = field(default_factory=dict, compare=False)


class Layer:
    """Clusters read through a map; the base of the image and of its snapshots."""

    backing: Node | None = None
    format_name = "qcow2"
    cluster_size = CLUSTER

    def __init__(self, name: str, store: dict[int, bytes], clusters: dict[int, int]) -> None:
        self.name = name
        self.store = store
        self.clusters = clusters
        self.virtual_size = 0
        self.read_only = True
        self.is_closed = False
        self.is_slow = False
        self.gate: trio.Event | None = None
        self.failures: dict[str, Exception] = {}
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        failure = self.failures.pop(name, None)
        if failure is not None:
            raise failure
        if self.is_closed:
            raise OSError(errno.EBADF, "the node is closed")

    async def _wait(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()

    def _check(self, guest_offset: int, length: int) -> None:
        if guest_offset < 0 or guest_offset + length > self.virtual_size:
            raise BadRequest("out of range")

    def _bytes(self, guest_offset: int, length: int) -> bytes:
        self._check(guest_offset, length)
        first = guest_offset // CLUSTER
        last = -(-(guest_offset + length) // CLUSTER)
        whole = b"".join(
            self.store.get(self.clusters.get(index, -1), bytes(CLUSTER))
            for index in range(first, last)
        )
        start = guest_offset - first * CLUSTER
        return whole[start : start + length]

    def try_read(self, guest_offset: int, length: int) -> bytes | None:
        self._call("try_read")
        return None if self.is_slow else self._bytes(guest_offset, length)

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        self._call("try_read_into")
        if self.is_slow:
            return False
        buffer[:] = self._bytes(guest_offset, len(buffer))
        return True

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        self._call("read_into")
        await self._wait()
        buffer[:] = self._bytes(guest_offset, len(buffer))

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        self._call("try_write")
        raise ReadOnlyImage("a snapshot")

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        raise ReadOnlyImage("a snapshot")

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        raise ReadOnlyImage("a snapshot")

    async def discard(self, guest_offset: int, length: int) -> None:
        raise ReadOnlyImage("a snapshot")

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> Sequence[Extent]:
        self._call("extents")
        self._check(guest_offset, length)
        await self._wait()
        found: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end and (limit is None or len(found) < limit):
            index = guest_offset // CLUSTER
            piece = min((index + 1) * CLUSTER, end) - guest_offset
            key = self.clusters.get(index)
            if key is not None:
                host_offset = key * CLUSTER + guest_offset % CLUSTER
                found.append(Extent(ExtentKind.DATA, guest_offset, piece, host_offset))
            else:
                following = [other for other in self.clusters if other > index]
                stop = min([other * CLUSTER for other in following] + [end])
                piece = stop - guest_offset
                found.append(Extent(ExtentKind.UNALLOCATED, guest_offset, piece))
            guest_offset += piece
        return found

    async def flush(self) -> None:
        self._call("flush")
        await self._wait()

    async def aclose(self) -> None:
        self.calls.append("aclose")
        self.is_closed = True


class FakeNode(Layer):
    """The active disk and the table of snapshots."""

    def __init__(
        self, size: int = 1 << 20, *, name: str = "fake.qcow2", read_only: bool = False
    ) -> None:
        super().__init__(name, {}, {})
        self.virtual_size = size
        self.read_only = read_only
        self.table: list[FakeSnapshot] = []
        self.opened: list[Layer] = []
        self.failsafe: str | None = None
        self.is_maintained = False
        self._next_key = 1

    def _write(self, guest_offset: int, data: Buffer) -> None:
        if self.read_only:
            raise ReadOnlyImage("read-only")
        if guest_offset + len(data) > self.virtual_size:
            raise ImageFull("past the end")
        view = memoryview(data)
        while view:
            index, start = divmod(guest_offset, CLUSTER)
            piece = bytes(view[: CLUSTER - start])
            old = self.store.get(self.clusters.get(index, -1), bytes(CLUSTER))
            self.store[self._next_key] = old[:start] + piece + old[start + len(piece) :]
            self.clusters[index] = self._next_key
            self._next_key += 1
            guest_offset += len(piece)
            view = view[len(piece) :]

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        self._call("try_write")
        if self.is_slow:
            return False
        self._write(guest_offset, data)
        return True

    async def write_from(self, guest_offset: int, data: Buffer) -> None:
        self._call("write_from")
        await self._wait()
        self._write(guest_offset, data)

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        self._call("write_zeroes")
        await self._wait()
        self._write(guest_offset, bytes(length))

    async def discard(self, guest_offset: int, length: int) -> None:
        await self.write_zeroes(guest_offset, length)

    def enter_failsafe(self, reason: str) -> None:
        self.failsafe = reason
        self.read_only = True

    def info(self) -> dict[str, Any]:
        return {"virtual-size": self.virtual_size, "filename": self.name, "format": "qcow2"}

    def statistics(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    async def maintain(self) -> None:
        self.is_maintained = True
        await trio.sleep_forever()

    async def grow(self, size: int) -> None:
        self._call("grow")
        await self._wait()
        self.virtual_size = size

    def snapshots(self) -> tuple[FakeSnapshot, ...]:
        return tuple(self.table)

    def _find(self, reference: bytes) -> FakeSnapshot:
        for attribute in ("id", "name"):
            for snapshot in self.table:
                if getattr(snapshot, attribute) == reference:
                    return snapshot
        raise NotFound(f"no snapshot {reference!r}")

    def add(self, name: bytes, **values: Any) -> FakeSnapshot:
        """Put a snapshot of the present content into the table at once."""
        number = int(self.table[-1].id) + 1 if self.table else 1
        values.setdefault("id", b"%d" % number)
        values.setdefault("disk_size", self.virtual_size)
        values.setdefault("date_sec", 1_700_000_000 + number)
        snapshot = FakeSnapshot(name=name, clusters=dict(self.clusters), **values)
        self.table.append(snapshot)
        return snapshot

    async def create_snapshot(self, name: bytes) -> FakeSnapshot:
        self._call("create_snapshot")
        await self._wait()
        if any(other.name == name for other in self.table):
            raise AlreadyExists("the name is taken")
        return self.add(name)

    async def delete_snapshot(self, reference: bytes) -> None:
        self._call("delete_snapshot")
        await self._wait()
        self.table.remove(self._find(reference))

    async def apply_snapshot(self, reference: bytes) -> None:
        self._call("apply_snapshot")
        await self._wait()
        snapshot = self._find(reference)
        self.clusters = dict(snapshot.clusters)
        if snapshot.disk_size is not None:
            self.virtual_size = snapshot.disk_size

    async def rename_snapshot(self, reference: bytes, new_name: bytes) -> None:
        self._call("rename_snapshot")
        await self._wait()
        old = self._find(reference)
        self.table[self.table.index(old)] = replace(old, name=new_name)

    async def open_snapshot(self, snapshot: FakeSnapshot) -> Layer:
        self._call("open_snapshot")
        await self._wait()
        layer = Layer(f"{self.name}@{snapshot.id!r}", self.store, snapshot.clusters)
        size = snapshot.disk_size
        layer.virtual_size = self.virtual_size if size is None else size
        layer.is_slow = self.is_slow
        self.opened.append(layer)
        return layer


def failure(number: int) -> OSError:
    """An error of the host."""
    return OSError(number, "injected")
