"""The filesystem's requests, as pyfuse3 hands them over (INTERFACE).

Complete by itself; the lane answers the hot requests of disk files instead,
on the targets that `hot_target` gives it. It does no arithmetic on offsets but
to clip a request to the disk, and knows nothing of an image's insides.

Invariants:
- Every handler answers, whatever is raised inside it: `_handler` wraps each.
- What the kernel may cache is either true for as long as it may cache it, or
  invalidated when it changes: snapshot names are not cached at all, attributes
  of disk files until a request through the kernel, or an apply, changes them.
- No notification is sent while a lock is held, and none about a directory from
  inside a request that holds that directory.
- Handles and inode numbers are functions of the image; what is kept about an
  open handle can be lost without a request being answered wrongly.
"""

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from qcowfs.driver.node import Node
from qcowfs.errors import BadRequest, CorruptImage
from qcowfs.fuse import xattrs
from qcowfs.fuse.changes import Changes, Effect
from qcowfs.fuse.files import BlockCounts, HotTarget, OpenFiles, inode_of
from qcowfs.fuse.kernel import Notifier, is_expected, to_errno
from qcowfs.fuse.status import Presentation, Status
from qcowfs.fuse.tree import (
    ACTIVE_INODE,
    INFO_INODE,
    NAME_MAX,
    SNAPSHOTS_INODE,
    Entry,
    EntryKind,
    snapshot_name_of,
)
from qcowfs.fuse.xattrs import Attributes, Verb

log = logging.getLogger(__name__)

_Parameters = ParamSpec("_Parameters")
_Answer = TypeVar("_Answer")


def _error(number: int) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(number)


def _handler(
    *, touches_image: bool = False
) -> Callable[
    [Callable[Concatenate["Operations", _Parameters], Coroutine[Any, Any, _Answer]]],
    Callable[Concatenate["Operations", _Parameters], Coroutine[Any, Any, _Answer]],
]:
    """Turn whatever a handler raises into an answer.

    Without this one place an exception would end pyfuse3's loop and leave the
    caller hanging. With `touches_image` an unexpected one also ends all writing.
    """

    def wrap(
        method: Callable[Concatenate["Operations", _Parameters], Coroutine[Any, Any, _Answer]],
    ) -> Callable[Concatenate["Operations", _Parameters], Coroutine[Any, Any, _Answer]]:
        @functools.wraps(method)
        async def answered(
            self: "Operations", /, *args: _Parameters.args, **kwargs: _Parameters.kwargs
        ) -> _Answer:
            try:
                return await method(self, *args, **kwargs)
            except pyfuse3.FUSEError:
                raise
            except Exception as error:
                self.note_failure(method.__name__, error, touches_image=touches_image)
                raise _error(to_errno(error)) from None

        return answered

    return wrap


class Operations(pyfuse3.Operations):
    """All handlers of one mount.

    Shapes: names and attribute values are bytes, offsets and sizes bytes of the
    guest's disk. Errors reach the kernel as errno alone, the log in words.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        node: Node,
        *,
        kernel: Notifier,
        nursery: trio.Nursery,
        presentation: Presentation,
        is_attached: Callable[[], bool] = lambda: False,
    ) -> None:
        """`nursery` holds the tasks that outlive a request; it may be cancelled at any time.

        `is_attached` says whether a loop device works on the active disk; it
        must not ask this mount.
        """
        super().__init__()
        self._node = node
        self._kernel = kernel
        self._nursery = nursery
        self._show = presentation
        self._files = OpenFiles(node, growable=presentation.growable)
        counts = BlockCounts(nursery)
        self._changes = Changes(node, self._files, counts, is_attached)
        self._attributes = Attributes(node, self._using)
        self._status = Status(node, self._files, counts, self._changes, presentation, self._using)
        self._last_complaint = ""

    # What the lane asks

    def hot_target(self, inode: int, fh: int) -> HotTarget | None:
        """What a hot request works on; None for what the lane does not serve."""
        return self._files.target(fh)

    def hot_failed(self, node: Node, exception: Exception) -> None:
        """An exception that nobody expected, in a hot request: log it and end all writing."""
        self.note_failure("request", exception, touches_image=True)

    def note_failure(self, what: str, error: Exception, *, touches_image: bool) -> None:
        """Log what an errno does not say; with `touches_image` trust the state no more."""
        if is_expected(error):
            if isinstance(error, CorruptImage) or to_errno(error) == errno.EIO:
                complaint = str(error)
                if complaint != self._last_complaint:
                    log.error("%s: %s", what, complaint)
                self._last_complaint = complaint
            else:
                log.debug("%s: %s", what, error)
            return
        log.error("%s failed unexpectedly", what, exc_info=error)
        enter_failsafe: Callable[[str], object] | None = getattr(self._node, "enter_failsafe", None)
        if touches_image and enter_failsafe is not None:
            enter_failsafe(f"unexpected {type(error).__name__} in {what}")

    async def aclose(self) -> None:
        """Close the snapshots' nodes; the image itself is the session's."""
        await self._files.aclose()

    # Names

    @_handler()
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """The attributes of what is called `name` in a directory; ENOENT."""
        if len(name) > NAME_MAX:
            raise _error(errno.ENAMETOOLONG)
        entry = self._changes.tree.lookup(parent_inode, name)
        if entry is None:
            raise _error(errno.ENOENT)
        return await self._status.of(entry)

    @_handler()
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept about an inode because the kernel knows it."""

    @_handler()
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """A directory's handle is its inode number."""
        if self._entry(inode).kind is not EntryKind.DIRECTORY:
            raise _error(errno.ENOTDIR)
        return inode

    @_handler()
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The entries behind offset `start_id`; an entry's offset is its inode number and 2."""
        tree = self._changes.tree
        directory = self._entry(fh)
        reply = pyfuse3.readdir_reply
        dots = ((b".", directory), (b"..", self._entry(directory.parent_inode)))
        for offset, (name, entry) in enumerate(dots, start=1):
            if start_id < offset and not reply(token, name, self._status.guess(entry), offset):
                return
        for entry in tree.listing(fh, start_id - 2):
            if not reply(token, entry.name, self._status.guess(entry), entry.inode + 2):
                return

    @_handler()
    async def releasedir(self, fh: int) -> None:
        """Nothing is kept about an open directory."""

    @_handler(touches_image=True)
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make all that was acknowledged durable."""
        await self._flush_image()

    @_handler(touches_image=True)
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Delete the snapshot that a file in snapshots/ shows."""
        entry = self._changes.tree.lookup(parent_inode, name)
        if entry is None:
            raise _error(errno.ENOENT)
        if entry.snapshot is None:
            raise _error(errno.EPERM)
        effect = await self._changes.delete(entry.snapshot.id)
        self._announce_later(effect, besides=name)

    @_handler(touches_image=True)
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename a snapshot; EEXIST rather than replace another one."""
        tree = self._changes.tree
        entry = tree.lookup(parent_inode_old, name_old)
        if entry is None:
            raise _error(errno.ENOENT)
        if entry.snapshot is None or parent_inode_new != SNAPSHOTS_INODE:
            raise _error(errno.EPERM)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise _error(errno.EINVAL)
        if name_new == name_old:
            return
        if tree.lookup(parent_inode_new, name_new) is not None:
            raise _error(errno.EEXIST)
        try:
            new_name = snapshot_name_of(name_new)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        effect = await self._changes.rename(entry.snapshot.id, new_name)
        self._announce_later(effect, besides=name_old)

    @_handler()
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Directories are not removed."""
        raise _error(errno.EPERM)

    @_handler()
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """There are no links."""
        raise _error(errno.EINVAL)

    @_handler()
    async def create(self, *arguments: Any, **named: Any) -> Any:
        """Files are not made by hand; a snapshot is taken by its verb."""
        raise _error(errno.EPERM)

    mknod = create
    mkdir = create
    symlink = create
    link = create

    # Attributes

    @_handler()
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """The attributes of an inode; ESTALE when its snapshot is gone."""
        return await self._status.of(self._entry(inode))

    @_handler(touches_image=True)
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Accept what changes nothing and the times of the active disk; EPERM for the rest."""
        entry = self._entry(inode)
        current = self._status.guess(entry)
        if fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(current.st_mode):
            raise _error(errno.EPERM)
        if (fields.update_uid and attr.st_uid != current.st_uid) or (
            fields.update_gid and attr.st_gid != current.st_gid
        ):
            raise _error(errno.EPERM)
        if fields.update_size and attr.st_size != current.st_size:
            is_growth = attr.st_size > current.st_size
            if inode != ACTIVE_INODE or not is_growth or not self._show.growable:
                raise _error(errno.EPERM)
            await self._changes.grow(attr.st_size)
        if fields.update_mtime and inode == ACTIVE_INODE:
            self._status.set_mtime(attr.st_mtime_ns)
        return await self._status.of(entry)

    @_handler()
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """The kernel checks permissions by the modes; it does not ask."""
        return True

    @_handler()
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The active disk in clusters: those allocated are used, the others free."""
        return self._status.of_filesystem()

    # Content

    @_handler(touches_image=True)
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Count a handle; EROFS where nothing may be written, EPERM for O_TRUNC."""
        entry = self._entry(inode)
        if entry.kind is EntryKind.DIRECTORY:
            raise _error(errno.EISDIR)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            if entry.kind is not EntryKind.ACTIVE or self._show.read_only or self._node.read_only:
                raise _error(errno.EROFS)
            if flags & os.O_TRUNC and self._node.virtual_size:
                raise _error(errno.EPERM)
            await self._changes.wait_writable()
        handle = await self._files.open(entry, writable=writable)
        if self._changes.tree.entry(inode) is None:
            # Deleted while its node was being opened.
            await self._files.close(handle)
            raise _error(errno.ENOENT)
        # The content of info.json changes by itself: it is never cached.
        return pyfuse3.FileInfo(fh=handle, direct_io=entry.kind is EntryKind.INFO)

    @_handler(touches_image=True)
    async def read(self, fh: int, off: int, size: int) -> Any:
        """Up to `size` bytes; fewer at the end, none behind it."""
        if inode_of(fh) == INFO_INODE:
            return self._status.info[off : off + size]
        target = self._files.target(fh)
        if target is not None:
            return await _read(target.node, off, size)
        async with self._using(self._entry(inode_of(fh))) as node:
            return await _read(node, off, size)

    @_handler(touches_image=True)
    async def write(self, fh: int, off: int, buf: bytes | memoryview) -> int:
        """Write up to the end of the disk; ENOSPC at and behind it."""
        target = self._files.target(fh)
        if target is None or not target.writable:
            raise _error(errno.EBADF)
        node = target.node
        if target.growable and off + len(buf) > node.virtual_size:
            await self._changes.grow(off + len(buf))
        count = min(len(buf), node.virtual_size - off)
        if count <= 0:
            if not buf:
                return 0
            raise _error(errno.ENOSPC)
        data = buf if count == len(buf) else memoryview(buf)[:count]
        if not node.try_write(off, data):
            await node.write_from(off, data)
        target.touch()
        return count

    @_handler(touches_image=True)
    async def flush(self, fh: int) -> None:
        """A close(2): what was written through any handle becomes durable."""
        target = self._files.target(fh)
        if target is None or not target.writable or target.changed_ns <= target.flushed_ns:
            return
        begun_ns = time.time_ns()
        await target.node.flush()
        target.flushed_ns = max(target.flushed_ns, begun_ns)

    @_handler(touches_image=True)
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make all that was acknowledged durable; the mapping belongs to the data."""
        if inode_of(fh) == ACTIVE_INODE:
            await self._flush_image()

    @_handler(touches_image=True)
    async def release(self, fh: int) -> None:
        """The last of one open's descriptors is closed."""
        await self._files.close(fh)

    # Extended attributes

    @_handler()
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """The value of one of our attributes; ENODATA for all others, verbs too."""
        if not xattrs.is_ours(name):
            # Asked before many writes (security.capability): no record, no lookup.
            raise _error(errno.ENODATA)
        return await self._attributes.get(self._changes.tree, self._entry(inode), name)

    @_handler()
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """The attributes that have a value."""
        return self._attributes.names(self._entry(inode))

    @_handler(touches_image=True)
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Do what a verb says; EPERM for what can only be read, ENOTSUP for the rest."""
        entry = self._entry(inode)
        verb = xattrs.verb_of(entry, name)
        if verb is None:
            known = name in self._attributes.names(entry)
            raise _error(errno.EPERM if known else errno.ENOTSUP)
        changes = self._changes
        if verb is Verb.CREATE:
            effect = await changes.create(value)
        elif verb is Verb.DELETE:
            effect = await changes.delete(value)
        elif verb is Verb.RENAME:
            effect = await changes.rename(*xattrs.rename_arguments(value))
        else:
            try:
                effect = await changes.apply(value)
            finally:
                # Also after a failure: nobody knows how far it came.
                await self._kernel.invalidate_inode(ACTIVE_INODE)
        self._announce_later(effect)

    @_handler()
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Nothing can be removed."""
        known = name in self._attributes.names(self._entry(inode))
        raise _error(errno.EPERM if known else errno.ENODATA)

    # Inside

    def _entry(self, inode: int) -> Entry:
        entry = self._changes.tree.entry(inode)
        if entry is None:
            raise _error(errno.ESTALE)
        return entry

    @asynccontextmanager
    async def _using(self, entry: Entry) -> AsyncIterator[Node]:
        """The node of a disk's entry, kept open meanwhile."""
        if entry.kind is not EntryKind.SNAPSHOT:
            yield self._node
            return
        file = await self._files.acquire(entry)
        try:
            yield file.target.node
        finally:
            await self._files.release(file)

    async def _flush_image(self) -> None:
        if not self._show.read_only:
            await self._node.flush()

    def _announce_later(self, effect: Effect, *, besides: bytes = b"") -> None:
        """Tell the kernel about names that are gone, once this request is answered.

        Names in snapshots/ are looked up anew each time, so that nothing wrong
        is seen until then; those who watch a file learn of its end by this.
        """
        for entry in effect.gone:
            if entry.name != besides:
                self._nursery.start_soon(
                    self._kernel.delete_entry, entry.parent_inode, entry.name, entry.inode
                )


async def _read(node: Node, offset: int, size: int) -> bytes | bytearray | memoryview:
    size = min(size, node.virtual_size - offset)
    if size <= 0:
        return b""
    found = node.try_read(offset, size)
    if found is not None:
        return found
    buffer = bytearray(size)
    await node.read_into(offset, memoryview(buffer))
    return buffer
