"""The handlers, called as pyfuse3 calls them, over a fake image."""

import errno
import json
import os
import stat
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from qcowfs.errors import CorruptImage, ImageFull
from qcowfs.fuse.operations import Operations
from qcowfs.fuse.tree import ACTIVE_INODE, INFO_INODE, ROOT_INODE, SNAPSHOTS_INODE
from tests.fuse.conftest import Filesystem
from tests.fuse.fake_node import CLUSTER, Layer, failure

CREATE = b"user.qcowfs.snapshot.create"
DELETE = b"user.qcowfs.snapshot.delete"
APPLY = b"user.qcowfs.snapshot.apply"
RENAME = b"user.qcowfs.snapshot.rename"

CTX: Any = None
FIELDS = ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")


async def error_of(call: Callable[..., Awaitable[object]], *arguments: object) -> int:
    """The errno that a handler answers; 0 for none."""
    try:
        await call(*arguments)
    except pyfuse3.FUSEError as error:
        return error.errno
    return 0


async def open_active(operations: Operations, flags: int = os.O_RDWR) -> int:
    return (await operations.open(ACTIVE_INODE, flags, CTX)).fh


async def snapshot_inode(operations: Operations, name: bytes) -> int:
    return (await operations.lookup(SNAPSHOTS_INODE, name, CTX)).st_ino


async def change(operations: Operations, inode: int, **values: int) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    fields: Any = SimpleNamespace(**{f"update_{name}": False for name in FIELDS})
    for name, value in values.items():
        setattr(attributes, f"st_{name}", value)
        setattr(fields, f"update_{name.removesuffix('_ns')}", True)
    return await operations.setattr(inode, attributes, fields, None, CTX)


# Attributes


async def test_attributes_of_the_active_disk(filesystem: Filesystem) -> None:
    """The size is exact, the block size a cluster, the mode 0600, the owner as mounted."""
    filesystem.node.virtual_size = CLUSTER * 3 + 512
    attributes = await filesystem.operations.getattr(ACTIVE_INODE, CTX)
    assert attributes.st_size == CLUSTER * 3 + 512
    assert attributes.st_blksize == CLUSTER
    assert attributes.st_mode == stat.S_IFREG | 0o600
    assert (attributes.st_uid, attributes.st_gid) == (1000, 1001)


async def test_modes_of_a_read_only_mount(filesystem: Filesystem) -> None:
    """Read-only, nothing shows a write permission."""
    operations = filesystem.show(read_only=True)
    for inode, mode in [(ACTIVE_INODE, 0o400), (ROOT_INODE, 0o500), (INFO_INODE, 0o400)]:
        attributes = await operations.getattr(inode, CTX)
        assert stat.S_IMODE(attributes.st_mode) == mode


async def test_umask(filesystem: Filesystem) -> None:
    """The umask option says what others may do; snapshots stay read-only."""
    filesystem.node.add(b"a")
    operations = filesystem.show(umask=0o002)
    modes = [
        stat.S_IMODE((await operations.getattr(inode, CTX)).st_mode)
        for inode in (
            ROOT_INODE,
            ACTIVE_INODE,
            await snapshot_inode(operations, b"a.raw"),
        )
    ]
    assert modes == [0o775, 0o664, 0o444]


async def test_attributes_of_a_snapshot(filesystem: Filesystem) -> None:
    """A snapshot has its own size, and its date as mtime."""
    filesystem.node.add(b"a", disk_size=12345, date_sec=1_600_000_000, date_nsec=7)
    operations = filesystem.show()
    attributes = await operations.lookup(SNAPSHOTS_INODE, b"a.raw", CTX)
    assert attributes.st_size == 12345
    assert attributes.st_mtime_ns == 1_600_000_000_000_000_007
    assert attributes.st_mode == stat.S_IFREG | 0o400


async def test_blocks_show_what_is_allocated(filesystem: Filesystem) -> None:
    """st_blocks counts allocated clusters, and is true again after a write."""
    operations = filesystem.operations
    assert (await operations.getattr(ACTIVE_INODE, CTX)).st_blocks == 0
    handle = await open_active(operations)
    await operations.write(handle, 0, bytes(2 * CLUSTER))
    assert (await operations.getattr(ACTIVE_INODE, CTX)).st_blocks == 2 * CLUSTER // 512


async def test_blocks_are_counted_once(filesystem: Filesystem) -> None:
    """A stat of an unchanged disk walks no table again."""
    for _ in range(3):
        await filesystem.operations.getattr(ACTIVE_INODE, CTX)
    assert filesystem.node.calls.count("extents") == 1


async def test_blocks_that_cannot_be_counted(filesystem: Filesystem) -> None:
    """What cannot be counted is taken as allocated, and stat succeeds."""
    filesystem.node.failures["extents"] = CorruptImage("bad")
    attributes = await filesystem.operations.getattr(ACTIVE_INODE, CTX)
    assert attributes.st_blocks == filesystem.node.virtual_size // 512


async def test_blocks_while_a_count_is_slow(filesystem: Filesystem) -> None:
    """A stat does not wait for a long count; its answer is not to be cached."""
    filesystem.node.gate = trio.Event()
    attributes = await filesystem.operations.getattr(ACTIVE_INODE, CTX)
    assert attributes.st_blocks == filesystem.node.virtual_size // 512
    assert attributes.attr_timeout == 0


async def test_statfs(filesystem: Filesystem) -> None:
    """The filesystem's unit is a cluster, its size the disk's."""
    data = await filesystem.operations.statfs(CTX)
    assert data.f_bsize == CLUSTER
    assert data.f_blocks * CLUSTER == filesystem.node.virtual_size
    assert data.f_namemax == 255


async def test_write_changes_mtime(filesystem: Filesystem) -> None:
    """A write moves the mtime on."""
    operations = filesystem.show(mtime_ns=10**9)
    assert (await operations.getattr(ACTIVE_INODE, CTX)).st_mtime_ns == 10**9
    handle = await open_active(operations)
    await operations.write(handle, 0, b"x")
    assert (await operations.getattr(ACTIVE_INODE, CTX)).st_mtime_ns > 10**9


async def test_touch(filesystem: Filesystem) -> None:
    """touch(1) and cp -p may set the times of the active disk."""
    attributes = await change(filesystem.operations, ACTIVE_INODE, mtime_ns=5 * 10**9)
    assert attributes.st_mtime_ns == 5 * 10**9


@pytest.mark.parametrize(
    "values", [{"mode": stat.S_IFREG | 0o777}, {"uid": 5}, {"gid": 5}, {"size": 0}]
)
async def test_changes_of_attributes_are_refused(
    filesystem: Filesystem, values: dict[str, int]
) -> None:
    """chmod, chown and truncate to another size answer EPERM."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await change(filesystem.operations, ACTIVE_INODE, **values)
    assert caught.value.errno == errno.EPERM


async def test_attributes_may_be_set_to_what_they_are(filesystem: Filesystem) -> None:
    """A truncate to the same size, and the same mode and owner, succeed."""
    size = filesystem.node.virtual_size
    mode = stat.S_IFREG | 0o600
    attributes = await change(
        filesystem.operations, ACTIVE_INODE, size=size, mode=mode, uid=1000, gid=1001
    )
    assert attributes.st_size == size


async def test_growable(filesystem: Filesystem) -> None:
    """With growable, truncate to a larger size resizes the image, to a smaller one does not."""
    operations = filesystem.show(growable=True)
    size = filesystem.node.virtual_size
    assert (await change(operations, ACTIVE_INODE, size=2 * size)).st_size == 2 * size
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await change(operations, ACTIVE_INODE, size=size)
    assert caught.value.errno == errno.EPERM


# Names


async def test_lookup_of_what_is_not_there(filesystem: Filesystem) -> None:
    """A name that is not there is ENOENT, one that cannot be is ENAMETOOLONG."""
    operations = filesystem.operations
    assert await error_of(operations.lookup, ROOT_INODE, b"x", CTX) == errno.ENOENT
    assert await error_of(operations.lookup, ROOT_INODE, b"x" * 256, CTX) == errno.ENAMETOOLONG


async def test_snapshot_names_are_not_cached(filesystem: Filesystem) -> None:
    """The kernel asks for a name in snapshots/ each time, so that it is always true."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    attributes = await operations.lookup(SNAPSHOTS_INODE, b"a.raw", CTX)
    assert attributes.entry_timeout == 0


async def test_unknown_inode(filesystem: Filesystem) -> None:
    """An inode number of another time is ESTALE."""
    assert await error_of(filesystem.operations.getattr, 1 << 40, CTX) == errno.ESTALE


async def test_opendir_of_a_file(filesystem: Filesystem) -> None:
    """Only directories are listed."""
    operations = filesystem.operations
    assert await error_of(operations.opendir, ACTIVE_INODE, CTX) == errno.ENOTDIR
    assert await operations.opendir(ROOT_INODE, CTX) == ROOT_INODE


@pytest.mark.parametrize("call", ["create", "mknod", "mkdir", "symlink", "link", "rmdir"])
async def test_nothing_is_made_by_hand(filesystem: Filesystem, call: str) -> None:
    """Files and directories are neither made nor removed."""
    method = getattr(filesystem.operations, call)
    arguments = [ROOT_INODE, b"x", CTX] if call == "rmdir" else [ROOT_INODE, b"x", 0, 0, CTX]
    assert await error_of(method, *arguments) == errno.EPERM


async def test_unlink_deletes_the_snapshot(filesystem: Filesystem) -> None:
    """rm of a snapshot's file deletes the snapshot."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    await operations.unlink(SNAPSHOTS_INODE, b"a.raw", CTX)
    assert filesystem.node.table == []
    assert await error_of(operations.lookup, SNAPSHOTS_INODE, b"a.raw", CTX) == errno.ENOENT


async def test_unlink_of_the_wrong_thing(filesystem: Filesystem) -> None:
    """Other files are not removed."""
    operations = filesystem.operations
    assert await error_of(operations.unlink, ROOT_INODE, b"active.raw", CTX) == errno.EPERM
    assert await error_of(operations.unlink, SNAPSHOTS_INODE, b"x.raw", CTX) == errno.ENOENT


async def test_unlink_means_the_file_and_not_a_namesake(filesystem: Filesystem) -> None:
    """rm deletes the snapshot that the file shows, though another has its ID as a name."""
    filesystem.node.add(b"2", id=b"1")
    filesystem.node.add(b"b", id=b"2")
    operations = filesystem.show()
    await operations.unlink(SNAPSHOTS_INODE, b"2.raw", CTX)
    assert [snapshot.name for snapshot in filesystem.node.table] == [b"b"]


async def test_deletion_renames_the_namesake(filesystem: Filesystem) -> None:
    """When one of two namesakes goes, the other's NAME@ID goes too, and the kernel is told."""
    for name in (b"a", b"a"):
        filesystem.node.add(name)
    operations = filesystem.show()
    await operations.unlink(SNAPSHOTS_INODE, b"a@1.raw", CTX)
    await trio.testing.wait_all_tasks_blocked()
    assert await error_of(operations.lookup, SNAPSHOTS_INODE, b"a.raw", CTX) == 0
    assert filesystem.kernel.entries == [b"a@2.raw"]


async def test_rename(filesystem: Filesystem) -> None:
    """mv inside snapshots/ renames the snapshot; its inode stays."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    inode = await snapshot_inode(operations, b"a.raw")
    arguments = (SNAPSHOTS_INODE, b"a.raw", SNAPSHOTS_INODE, b"b%2Fc.raw", 0, CTX)
    await operations.rename(*arguments)
    assert filesystem.node.table[0].name == b"b/c"
    assert await snapshot_inode(operations, b"b%2Fc.raw") == inode


@pytest.mark.parametrize(
    ("parent", "name", "flags", "expected"),
    [
        (SNAPSHOTS_INODE, b"b.raw", 0, errno.EEXIST),
        (SNAPSHOTS_INODE, b"b.raw", pyfuse3.RENAME_NOREPLACE, errno.EEXIST),
        (SNAPSHOTS_INODE, b"b.raw", pyfuse3.RENAME_EXCHANGE, errno.EINVAL),
        (SNAPSHOTS_INODE, b"c.img", 0, errno.EINVAL),
        (SNAPSHOTS_INODE, b"%.raw", 0, errno.EINVAL),
        (ROOT_INODE, b"c.raw", 0, errno.EPERM),
    ],
)
async def test_refused_renames(
    filesystem: Filesystem, parent: int, name: bytes, flags: int, expected: int
) -> None:
    """A rename never replaces a snapshot, nor makes a name that would not be shown so."""
    filesystem.node.add(b"a")
    filesystem.node.add(b"b")
    operations = filesystem.show()
    arguments = (SNAPSHOTS_INODE, b"a.raw", parent, name, flags, CTX)
    assert await error_of(operations.rename, *arguments) == expected


# Content


async def test_read_is_short_at_the_end(filesystem: Filesystem) -> None:
    """A read across the end is short, one behind it empty."""
    operations = filesystem.operations
    handle = await open_active(operations)
    size = filesystem.node.virtual_size
    assert len(await operations.read(handle, size - 10, 100)) == 10
    assert len(await operations.read(handle, size, 100)) == 0
    assert len(await operations.read(handle, size + 5, 100)) == 0


@pytest.mark.parametrize("is_slow", [False, True])
async def test_write_and_read_back(filesystem: Filesystem, is_slow: bool) -> None:
    """What is written is read, by the instant and by the waiting calls alike."""
    filesystem.node.is_slow = is_slow
    operations = filesystem.operations
    handle = await open_active(operations)
    assert await operations.write(handle, 100, b"abc") == 3
    assert bytes(await operations.read(handle, 99, 5)) == b"\0abc\0"


async def test_write_ends_at_the_end(filesystem: Filesystem) -> None:
    """A write across the end is short, as on a block device; behind it ENOSPC."""
    operations = filesystem.operations
    handle = await open_active(operations)
    size = filesystem.node.virtual_size
    assert await operations.write(handle, size - 2, b"abcd") == 2
    assert bytes(await operations.read(handle, size - 2, 10)) == b"ab"
    assert await error_of(operations.write, handle, size, b"x") == errno.ENOSPC


async def test_growable_write(filesystem: Filesystem) -> None:
    """With growable, a write across the end makes the disk longer."""
    operations = filesystem.show(growable=True)
    handle = await open_active(operations)
    size = filesystem.node.virtual_size
    assert await operations.write(handle, size - 2, b"abcd") == 4
    assert filesystem.node.virtual_size == size + 2


async def test_read_only_handle_does_not_write(filesystem: Filesystem) -> None:
    """A handle opened for reading cannot write."""
    operations = filesystem.operations
    handle = await open_active(operations, os.O_RDONLY)
    assert await error_of(operations.write, handle, 0, b"x") == errno.EBADF


async def test_open_for_writing_is_refused_where_nothing_is_written(
    filesystem: Filesystem,
) -> None:
    """Snapshots, info.json, read-only mounts and an image in failsafe answer EROFS."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    snapshot = await snapshot_inode(operations, b"a.raw")
    for inode in (snapshot, INFO_INODE):
        assert await error_of(operations.open, inode, os.O_RDWR, CTX) == errno.EROFS
    read_only = filesystem.show(read_only=True)
    assert await error_of(read_only.open, ACTIVE_INODE, os.O_WRONLY, CTX) == errno.EROFS
    filesystem.node.enter_failsafe("test")
    assert await error_of(operations.open, ACTIVE_INODE, os.O_RDWR, CTX) == errno.EROFS


async def test_open_with_truncation(filesystem: Filesystem) -> None:
    """O_TRUNC is a truncate to another size: programs rely on its zeros."""
    flags = os.O_WRONLY | os.O_TRUNC
    assert await error_of(filesystem.operations.open, ACTIVE_INODE, flags, CTX) == errno.EPERM


async def test_read_of_a_snapshot(filesystem: Filesystem) -> None:
    """A snapshot's file shows what the disk was."""
    operations = filesystem.operations
    handle = await open_active(operations)
    await operations.write(handle, 0, b"old")
    await operations.setxattr(ACTIVE_INODE, CREATE, b"a", CTX)
    await operations.write(handle, 0, b"new")
    inode = await snapshot_inode(operations, b"a.raw")
    snapshot = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    assert bytes(await operations.read(snapshot, 0, 3)) == b"old"


async def test_handles_are_functions_of_inode_and_access(filesystem: Filesystem) -> None:
    """Opening makes no number that a later process could not know."""
    operations = filesystem.operations
    assert await open_active(operations) == await open_active(operations)
    assert await open_active(operations, os.O_RDONLY) != await open_active(operations)


async def test_handle_that_is_not_open_still_reads(filesystem: Filesystem) -> None:
    """A read by a handle that another process opened is answered."""
    filesystem.node.add(b"a")
    first = filesystem.show()
    inode = await snapshot_inode(first, b"a.raw")
    handle = (await first.open(inode, os.O_RDONLY, CTX)).fh
    second = filesystem.show()
    assert second.hot_target(inode, handle) is None
    assert len(await second.read(handle, 0, 100)) == 100
    await first.aclose()


async def test_snapshot_that_cannot_be_opened(
    filesystem: Filesystem, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad snapshot costs its own file alone: EIO on open, and it is listed."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    filesystem.node.failures["open_snapshot"] = CorruptImage("a bad L1 table")
    inode = await snapshot_inode(operations, b"a.raw")
    filesystem.node.failures["open_snapshot"] = CorruptImage("a bad L1 table")
    assert await error_of(operations.open, inode, os.O_RDONLY, CTX) == errno.EIO
    assert await error_of(operations.open, ACTIVE_INODE, os.O_RDWR, CTX) == 0
    assert "a bad L1 table" in caplog.text


async def test_idle_snapshots_are_closed(filesystem: Filesystem) -> None:
    """A few idle snapshot nodes are kept open, not all of them."""
    for number in range(40):
        filesystem.node.add(b"%d" % number)
    operations = filesystem.show()
    for entry in filesystem.node.table:
        inode = await snapshot_inode(operations, entry.name + b".raw")
        handle = (await operations.open(inode, os.O_RDONLY, CTX)).fh
        await operations.release(handle)
    assert sum(not layer.is_closed for layer in filesystem.node.opened) == 16


async def test_open_snapshots_are_not_closed(filesystem: Filesystem) -> None:
    """However many are open, each handle keeps its node."""
    for number in range(40):
        filesystem.node.add(b"%d" % number)
    operations = filesystem.show()
    handles = []
    for entry in filesystem.node.table:
        inode = await snapshot_inode(operations, entry.name + b".raw")
        handles.append((await operations.open(inode, os.O_RDONLY, CTX)).fh)
    for handle in handles:
        assert len(await operations.read(handle, 0, 10)) == 10


async def test_info_json(filesystem: Filesystem) -> None:
    """info.json holds the facts, in exactly st_size bytes."""
    operations = filesystem.operations
    attributes = await operations.getattr(INFO_INODE, CTX)
    opened = await operations.open(INFO_INODE, os.O_RDONLY, CTX)
    content = await operations.read(opened.fh, 0, 1 << 20)
    assert len(content) == attributes.st_size
    assert json.loads(bytes(content))["virtual-size"] == filesystem.node.virtual_size


# Durability


async def test_close_commits_what_was_written(filesystem: Filesystem) -> None:
    """close(2) of a handle that may write flushes once for all that was written."""
    operations = filesystem.operations
    handle = await open_active(operations)
    await operations.flush(handle)
    assert filesystem.node.calls.count("flush") == 0
    await operations.write(handle, 0, b"x")
    await operations.flush(handle)
    await operations.flush(handle)
    assert filesystem.node.calls.count("flush") == 1


async def test_failed_flush_is_told_again(filesystem: Filesystem) -> None:
    """A close after a failed one does not pretend that all is well."""
    operations = filesystem.operations
    handle = await open_active(operations)
    await operations.write(handle, 0, b"x")
    for _ in range(2):
        filesystem.node.failures["flush"] = failure(errno.ENOSPC)
        assert await error_of(operations.flush, handle) == errno.ENOSPC


async def test_fsync_flushes(filesystem: Filesystem) -> None:
    """fsync and fdatasync make all durable, on any handle of the disk."""
    operations = filesystem.operations
    await operations.fsync(await open_active(operations, os.O_RDONLY), True)
    assert filesystem.node.calls.count("flush") == 1


# Failures


async def test_expected_errors_keep_their_errno(filesystem: Filesystem) -> None:
    """An error of image or host reaches the caller with its errno."""
    operations = filesystem.operations
    handle = await open_active(operations)
    filesystem.node.failures["try_write"] = ImageFull("no room")
    assert await error_of(operations.write, handle, 0, b"x") == errno.ENOSPC
    filesystem.node.failures["try_read"] = failure(errno.EACCES)
    assert await error_of(operations.read, handle, 0, 1) == errno.EACCES
    assert filesystem.node.failsafe is None


async def test_unexpected_error_ends_writing(
    filesystem: Filesystem, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody expected is EIO, a record with traceback, and no more writing."""
    operations = filesystem.operations
    handle = await open_active(operations)
    filesystem.node.failures["try_write"] = RuntimeError("a mistake")
    assert await error_of(operations.write, handle, 0, b"x") == errno.EIO
    assert filesystem.node.failsafe is not None
    assert caplog.records[-1].exc_info is not None


async def test_corruption_is_told_once(
    filesystem: Filesystem, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader of a bad range gets EIO each time, the log its cause once."""
    operations = filesystem.operations
    handle = await open_active(operations)
    for _ in range(3):
        filesystem.node.failures["try_read"] = CorruptImage("L2 entry 5 is bad")
        assert await error_of(operations.read, handle, 0, 1) == errno.EIO
    assert [record.getMessage() for record in caplog.records] == ["read: L2 entry 5 is bad"]


async def test_hot_failed(filesystem: Filesystem, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception in the lane is logged and ends all writing."""
    filesystem.operations.hot_failed(filesystem.node, KeyError("x"))
    assert filesystem.node.failsafe is not None
    assert len(caplog.records) == 1


# Snapshots


async def test_create(filesystem: Filesystem) -> None:
    """Setting the create attribute takes a snapshot, seen at once; EEXIST the second time."""
    operations = filesystem.operations
    for inode, name in ((ACTIVE_INODE, b"a"), (ROOT_INODE, b"b")):
        await operations.setxattr(inode, CREATE, name, CTX)
        assert await error_of(operations.lookup, SNAPSHOTS_INODE, name + b".raw", CTX) == 0
        assert await error_of(operations.setxattr, inode, CREATE, name, CTX) == errno.EEXIST


@pytest.mark.parametrize("name", [b"", b"a\0b"])
async def test_names_that_cannot_be(filesystem: Filesystem, name: bytes) -> None:
    """A snapshot without a name, or with a NUL in it, is EINVAL."""
    call = filesystem.operations.setxattr
    assert await error_of(call, ACTIVE_INODE, CREATE, name, CTX) == errno.EINVAL


async def test_delete_by_id_before_name(filesystem: Filesystem) -> None:
    """A reference is an ID first, then a name."""
    filesystem.node.add(b"2", id=b"1")
    filesystem.node.add(b"b", id=b"2")
    operations = filesystem.show()
    await operations.setxattr(ACTIVE_INODE, DELETE, b"2", CTX)
    assert [snapshot.id for snapshot in filesystem.node.table] == [b"1"]
    assert await error_of(operations.setxattr, ACTIVE_INODE, DELETE, b"x", CTX) == errno.ENOENT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"a=b", 0),
        (b"1=b", 0),
        (b"a=c%3Dd", 0),
        (b"x=b", errno.ENOENT),
        (b"a", errno.EINVAL),
        (b"a=", errno.EINVAL),
        (b"a=b=c", errno.EINVAL),
        (b"a=taken", errno.EEXIST),
    ],
)
async def test_rename_verb(filesystem: Filesystem, value: bytes, expected: int) -> None:
    """OLD=NEW renames; an equals sign in a name is written %3D."""
    filesystem.node.add(b"a")
    filesystem.node.add(b"taken")
    operations = filesystem.show()
    assert await error_of(operations.setxattr, ACTIVE_INODE, RENAME, value, CTX) == expected
    if expected == 0:
        new_name = value.partition(b"=")[2].replace(b"%3D", b"=")
        assert filesystem.node.table[0].name == new_name


async def test_apply(filesystem: Filesystem) -> None:
    """Apply brings back content and size, and the kernel forgets what it had cached."""
    operations = filesystem.operations
    await operations.setxattr(ACTIVE_INODE, CREATE, b"a", CTX)
    handle = await open_active(operations)
    await operations.write(handle, 0, b"new")
    await operations.release(handle)
    filesystem.node.virtual_size *= 2
    await operations.setxattr(ROOT_INODE, APPLY, b"a", CTX)
    reader = await open_active(operations, os.O_RDONLY)
    assert bytes(await operations.read(reader, 0, 3)) == bytes(3)
    assert (await operations.getattr(ACTIVE_INODE, CTX)).st_size == 1 << 20
    assert filesystem.kernel.inodes == [ACTIVE_INODE]


async def test_apply_while_open_for_writing(filesystem: Filesystem) -> None:
    """Apply is EBUSY while a handle may write; readers do not hinder it."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    writer = await open_active(operations)
    await open_active(operations, os.O_RDONLY)
    call = operations.setxattr
    assert await error_of(call, ACTIVE_INODE, APPLY, b"a", CTX) == errno.EBUSY
    await operations.release(writer)
    assert await error_of(call, ACTIVE_INODE, APPLY, b"a", CTX) == 0


async def test_apply_waits_for_a_handle_that_is_being_released(filesystem: Filesystem) -> None:
    """A writer that has closed its file, but of whom the kernel has not told yet, is no user."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    writer = await open_active(operations)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.setxattr, ACTIVE_INODE, APPLY, b"a", CTX)
        await trio.testing.wait_all_tasks_blocked()
        await operations.release(writer)
    assert "apply_snapshot" in filesystem.node.calls


async def test_opening_for_writing_waits_for_apply(filesystem: Filesystem) -> None:
    """Nobody gets a handle that may write in the middle of an apply."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    filesystem.node.gate = trio.Event()
    opened = trio.Event()

    async def open_writer() -> None:
        await open_active(operations)
        opened.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.setxattr, ACTIVE_INODE, APPLY, b"a", CTX)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(open_writer)
        await trio.testing.wait_all_tasks_blocked()
        assert not opened.is_set()
        filesystem.node.gate.set()
    assert opened.is_set()


async def test_failed_apply_invalidates_too(filesystem: Filesystem) -> None:
    """After an apply that failed half way, nothing cached is believed."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    filesystem.node.failures["apply_snapshot"] = failure(errno.ENOSPC)
    call = operations.setxattr
    assert await error_of(call, ACTIVE_INODE, APPLY, b"a", CTX) == errno.ENOSPC
    assert filesystem.kernel.inodes == [ACTIVE_INODE]


async def test_deletion_under_a_reader(filesystem: Filesystem) -> None:
    """A reader whose snapshot is deleted gets ESTALE, in the lane too, never other bytes."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    inode = await snapshot_inode(operations, b"a.raw")
    handle = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    target = operations.hot_target(inode, handle)
    assert target is not None
    await operations.unlink(SNAPSHOTS_INODE, b"a.raw", CTX)
    assert await error_of(operations.read, handle, 0, 10) == errno.ESTALE
    with pytest.raises(OSError, match="Stale"):
        target.node.try_read(0, 10)
    await operations.release(handle)
    assert all(layer.is_closed for layer in filesystem.node.opened)


async def test_failed_deletion_gives_the_reader_back(filesystem: Filesystem) -> None:
    """When a deletion fails, open files go on working."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    inode = await snapshot_inode(operations, b"a.raw")
    handle = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    filesystem.node.failures["delete_snapshot"] = failure(errno.ENOSPC)
    error = await error_of(operations.unlink, SNAPSHOTS_INODE, b"a.raw", CTX)
    assert error == errno.ENOSPC
    assert len(await operations.read(handle, 0, 10)) == 10
    await operations.release(handle)


async def test_reader_across_a_rename(filesystem: Filesystem) -> None:
    """A file stays readable under its handle when its snapshot is renamed."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    inode = await snapshot_inode(operations, b"a.raw")
    handle = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    await operations.setxattr(ACTIVE_INODE, RENAME, b"a=b", CTX)
    assert len(await operations.read(handle, 0, 10)) == 10


async def test_changes_come_one_after_the_other(filesystem: Filesystem) -> None:
    """Two changes at once are both made, and the tree shows both."""
    filesystem.node.gate = trio.Event()
    operations = filesystem.operations
    async with trio.open_nursery() as nursery:
        for name in (b"a", b"b"):
            nursery.start_soon(operations.setxattr, ACTIVE_INODE, CREATE, name, CTX)
        await trio.testing.wait_all_tasks_blocked()
        assert filesystem.node.calls.count("create_snapshot") == 1
        filesystem.node.gate.set()
    for name in (b"a.raw", b"b.raw"):
        assert await error_of(operations.lookup, SNAPSHOTS_INODE, name, CTX) == 0


async def test_verbs_on_a_read_only_image(filesystem: Filesystem) -> None:
    """An image that may not be written answers EROFS."""
    filesystem.node.read_only = True
    call = filesystem.operations.setxattr
    assert await error_of(call, ACTIVE_INODE, CREATE, b"a", CTX) == errno.EROFS


async def test_duplicate_ids_are_not_guessed(filesystem: Filesystem) -> None:
    """Where a broken image has an ID twice, nothing is deleted by it."""
    filesystem.node.add(b"a", id=b"1")
    filesystem.node.add(b"b", id=b"1")
    operations = filesystem.show()
    for reference in (b"1", b"a"):
        error = await error_of(operations.setxattr, ACTIVE_INODE, DELETE, reference, CTX)
        assert error == errno.EINVAL
    assert len(filesystem.node.table) == 2


async def test_format_without_snapshots(filesystem: Filesystem) -> None:
    """A format that has no snapshots shows an empty folder and answers ENOTSUP."""
    node: Any = Layer("plain.raw", {}, {})
    filesystem.node = node
    operations = filesystem.show()
    assert await error_of(operations.lookup, ROOT_INODE, b"snapshots", CTX) == 0
    call = operations.setxattr
    assert await error_of(call, ACTIVE_INODE, CREATE, b"a", CTX) == errno.ENOTSUP
