"""A process that serves one disk in memory through the lane and pyfuse3.

`python -m tests.fuse.lane_server MOUNTPOINT` prints "ready", then why it ended.
The mount shows `disk` (reads of its last MiB take a while), `stats` (the calls
that the node has seen, as JSON, without a node of its own), and looking up the
name `die` takes libfuse's end of the channel away.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

import pyfuse3
import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.fuse import device
from qcowfs.fuse.files import HotTarget
from qcowfs.fuse.lane import Lane

MIB = 1 << 20
DISK_LENGTH = 16 * MIB
SLOW_FROM = DISK_LENGTH - MIB
PAGE = 4096
DISK, STATS = 2, 3
DISK_FH, STATS_FH = 20, 30


class PagedNode:
    """A disk in memory whose zero pages are holes."""

    name = "memory"
    format_name = "raw"
    cluster_size = PAGE
    backing = None
    read_only = False
    virtual_size = DISK_LENGTH

    def __init__(self) -> None:
        self.content = bytearray(DISK_LENGTH)
        self.calls: list[Any] = []

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        # Every fourth page goes the way of a request that has to wait.
        if guest_offset >= SLOW_FROM or guest_offset // PAGE % 4 == 3:
            return False
        buffer[:] = self.content[guest_offset : guest_offset + len(buffer)]
        return True

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        await trio.sleep(0.5 if guest_offset >= SLOW_FROM else 0)
        buffer[:] = self.content[guest_offset : guest_offset + len(buffer)]

    def try_write(self, guest_offset: int, data: bytes | memoryview) -> bool:
        if guest_offset // PAGE % 4 == 2:
            return False
        self.content[guest_offset : guest_offset + len(data)] = data
        return True

    async def write_from(self, guest_offset: int, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.content[guest_offset : guest_offset + len(data)] = data

    async def write_zeroes(self, guest_offset: int, length: int, *, unmap: bool = True) -> None:
        self.calls.append(["zeroes", guest_offset, length, unmap])
        self.content[guest_offset : guest_offset + length] = bytes(length)

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> Sequence[Extent]:
        found = []
        for start in range(guest_offset, guest_offset + length, PAGE):
            part = min(PAGE - start % PAGE, guest_offset + length - start)
            is_data = any(self.content[start : start + part])
            kind = ExtentKind.DATA if is_data else ExtentKind.ZERO
            found.append(Extent(kind, start, part, start if is_data else None))
        return found[:limit]

    async def flush(self) -> None:
        self.calls.append(["flush"])


class ServerOperations(pyfuse3.Operations):
    """Names and attributes of the three files, the bytes of `stats`."""

    def __init__(self, node: PagedNode, libfuse_fd: int) -> None:
        super().__init__()
        self.node = node
        self.target = HotTarget(node, True)
        self.libfuse_fd = libfuse_fd

    def hot_target(self, inode: int, fh: int) -> HotTarget | None:
        return self.target if fh == DISK_FH else None

    def hot_failed(self, node: Any, exception: Exception) -> None:
        print("failed", repr(exception), flush=True)

    def _stats(self) -> bytes:
        return json.dumps(self.node.calls).encode()

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_nlink = 1
        attributes.st_mode = stat.S_IFREG | 0o600
        if inode == pyfuse3.ROOT_INODE:
            attributes.st_mode = stat.S_IFDIR | 0o700
        elif inode == DISK:
            attributes.st_size = DISK_LENGTH
        else:
            attributes.st_size = len(self._stats())
        return attributes

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name == b"die":
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, self.libfuse_fd)
            os.close(null)
        inode = {b"disk": DISK, b"stats": STATS}.get(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if inode == DISK:
            return pyfuse3.FileInfo(fh=DISK_FH, keep_cache=False)
        return pyfuse3.FileInfo(fh=STATS_FH, direct_io=True)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for number, (name, inode) in enumerate(((b"disk", DISK), (b"stats", STATS)), 1):
            if number > start_id:
                pyfuse3.readdir_reply(token, name, await self.getattr(inode), number)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._stats()[off : off + size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        raise pyfuse3.FUSEError(errno.ENOSPC)

    async def flush(self, fh: int) -> None:
        return

    async def release(self, fh: int) -> None:
        return


async def serve(mountpoint: str) -> None:
    """Mount, serve, say why it ended."""
    kernel = device.mount(mountpoint, {"fsname": "memory"})
    ours, theirs = device.open_channel()
    operations = ServerOperations(PagedNode(), theirs)
    pyfuse3.init(operations, f"/dev/fd/{theirs}", set())
    lane = Lane(kernel, ours, operations)

    async def libfuse() -> None:
        try:
            await pyfuse3.main()
        except* OSError:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(libfuse)
        print("ready", flush=True)
        print((await lane.run()).name, flush=True)
        pyfuse3.terminate()
        nursery.cancel_scope.cancel()
    lane.close()
    pyfuse3.close()


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
