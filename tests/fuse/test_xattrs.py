"""Extended attributes: which there are, what they answer, what differs between snapshots."""

import errno
import json
import os
from typing import Any

import pyfuse3
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.errors import BadRequest
from qcowfs.fuse.operations import Operations
from qcowfs.fuse.tree import ACTIVE_INODE, INFO_INODE, ROOT_INODE, SNAPSHOTS_INODE
from qcowfs.fuse.xattrs import rename_arguments
from tests.fuse.conftest import Filesystem, RecordingKernel
from tests.fuse.fake_node import CLUSTER, FakeNode

CTX: Any = None
PREFIX = b"user.qcowfs."
VERBS = [PREFIX + b"snapshot." + verb for verb in (b"create", b"delete", b"apply", b"rename")]


async def get(operations: Operations, inode: int, name: bytes) -> bytes:
    return bytes(await operations.getxattr(inode, PREFIX + name, CTX))


async def get_json(operations: Operations, inode: int, name: bytes) -> Any:
    return json.loads(await get(operations, inode, name))


async def get_error(operations: Operations, inode: int, name: bytes) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.getxattr(inode, name, CTX)
    return caught.value.errno


async def inode_of(operations: Operations, name: bytes) -> int:
    return (await operations.lookup(SNAPSHOTS_INODE, name, CTX)).st_ino


@pytest.mark.parametrize("inode", [ROOT_INODE, ACTIVE_INODE])
async def test_names_of_the_active_disk(filesystem: Filesystem, inode: int) -> None:
    """The disk and the root list what can be read, and no verb."""
    names = await filesystem.operations.listxattr(inode, CTX)
    assert names == [PREFIX + name for name in (b"info", b"stats", b"map")]


@pytest.mark.parametrize("inode", [SNAPSHOTS_INODE, INFO_INODE])
async def test_other_files_have_no_attributes(filesystem: Filesystem, inode: int) -> None:
    """The folder of snapshots and info.json have none."""
    assert not await filesystem.operations.listxattr(inode, CTX)
    error = await get_error(filesystem.operations, inode, PREFIX + b"info")
    assert error == errno.ENODATA


@pytest.mark.parametrize("verb", VERBS)
async def test_verbs_have_no_value(filesystem: Filesystem, verb: bytes) -> None:
    """Reading a verb answers ENODATA."""
    assert await get_error(filesystem.operations, ACTIVE_INODE, verb) == errno.ENODATA


@pytest.mark.parametrize("name", [b"user.other", b"security.capability", b"user.qcowfs.x"])
async def test_unknown_names(filesystem: Filesystem, name: bytes) -> None:
    """What is not there is ENODATA to read and to remove, ENOTSUP to set."""
    operations = filesystem.operations
    assert await get_error(operations, ACTIVE_INODE, name) == errno.ENODATA
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.removexattr(ACTIVE_INODE, name, CTX)
    assert caught.value.errno == errno.ENODATA
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.setxattr(ACTIVE_INODE, name, b"x", CTX)
    assert caught.value.errno == errno.ENOTSUP


async def test_facts_cannot_be_set(filesystem: Filesystem) -> None:
    """What can only be read is EPERM to set and to remove."""
    operations = filesystem.operations
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.setxattr(ACTIVE_INODE, PREFIX + b"info", b"x", CTX)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.removexattr(ACTIVE_INODE, PREFIX + b"info", CTX)
    assert caught.value.errno == errno.EPERM


async def test_verbs_belong_to_the_active_disk(filesystem: Filesystem) -> None:
    """On a snapshot a verb means nothing."""
    filesystem.node.add(b"a")
    operations = filesystem.show()
    inode = await inode_of(operations, b"a.raw")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.setxattr(inode, VERBS[0], b"x", CTX)
    assert caught.value.errno == errno.ENOTSUP


async def test_info(filesystem: Filesystem) -> None:
    """info is the facts as JSON."""
    facts = await get_json(filesystem.operations, ACTIVE_INODE, b"info")
    assert facts["virtual-size"] == filesystem.node.virtual_size


async def test_stats(filesystem: Filesystem) -> None:
    """stats has the counters and who serves the mount, in a length that rarely changes."""
    value = await get(filesystem.operations, ROOT_INODE, b"stats")
    assert json.loads(value)["pid"] == os.getpid()
    assert len(value) % 512 == 0


async def test_map(filesystem: Filesystem) -> None:
    """map lists what the disk is made of."""
    assert filesystem.node.try_write(CLUSTER, b"x")
    entries = await get_json(filesystem.operations, ACTIVE_INODE, b"map")
    assert [(entry["start"], entry["data"]) for entry in entries] == [
        (0, False),
        (CLUSTER, True),
        (2 * CLUSTER, False),
    ]
    assert entries[1]["offset"] == filesystem.node.clusters[1] * CLUSTER


async def test_long_map_is_whole_json(filesystem: Filesystem) -> None:
    """A map that no attribute can hold is cut at an entry."""
    filesystem.node.virtual_size = CLUSTER * 4000
    for index in range(0, 4000, 2):
        assert filesystem.node.try_write(index * CLUSTER, b"x")
    value = await get(filesystem.operations, ACTIVE_INODE, b"map")
    entries = json.loads(value)
    assert len(value) <= 65536
    assert entries[-1]["start"] + entries[-1]["length"] < filesystem.node.virtual_size


async def test_facts_of_a_snapshot(filesystem: Filesystem) -> None:
    """A snapshot's file tells its table entry."""
    filesystem.node.add(
        b"a/b", date_sec=0, date_nsec=7, vm_clock_nsec=8, vm_state_size=9, disk_size=10, icount=11
    )
    operations = filesystem.show()
    inode = await inode_of(operations, b"a%2Fb.raw")
    prefix = PREFIX + b"snapshot."
    found = {
        name.removeprefix(prefix): await operations.getxattr(inode, name, CTX)
        for name in await operations.listxattr(inode, CTX)
    }
    assert found == {
        b"id": b"1",
        b"name": b"a/b",
        b"date": b"1970-01-01T00:00:00.000000007Z",
        b"vm_clock_nsec": b"8",
        b"vm_state_size": b"9",
        b"disk_size": b"10",
        b"icount": b"11",
    }


async def test_facts_that_an_old_snapshot_lacks(filesystem: Filesystem) -> None:
    """What a table entry does not tell is not listed, and ENODATA."""
    filesystem.node.add(b"a", disk_size=None)
    operations = filesystem.show()
    inode = await inode_of(operations, b"a.raw")
    for name in (b"snapshot.disk_size", b"snapshot.icount"):
        assert PREFIX + name not in await operations.listxattr(inode, CTX)
        assert await get_error(operations, inode, PREFIX + name) == errno.ENODATA


async def test_difference_from_the_active_disk(filesystem: Filesystem) -> None:
    """What was written since a snapshot differs; neighbours are one range."""
    node = filesystem.node
    assert node.try_write(0, bytes(10 * CLUSTER))
    node.add(b"a")
    assert node.try_write(3 * CLUSTER, b"x")
    assert node.try_write(4 * CLUSTER, b"x")
    assert node.try_write(20 * CLUSTER, b"x")
    operations = filesystem.show()
    inode = await inode_of(operations, b"a.raw")
    assert await get_json(operations, inode, b"diff.active") == [
        {"start": 3 * CLUSTER, "length": 2 * CLUSTER},
        {"start": 20 * CLUSTER, "length": CLUSTER},
    ]


async def test_difference_between_snapshots(filesystem: Filesystem) -> None:
    """Another snapshot is named by its ID or name, and read through its own mapping."""
    node = filesystem.node
    node.add(b"a")
    assert node.try_write(CLUSTER, b"x")
    node.add(b"b")
    operations = filesystem.show()
    inode = await inode_of(operations, b"a.raw")
    expected = [{"start": CLUSTER, "length": CLUSTER}]
    for other in (b"b", b"2"):
        assert await get_json(operations, inode, b"diff." + other) == expected
    assert await get_json(operations, inode, b"diff.a") == []
    assert await get_error(operations, inode, PREFIX + b"diff.x") == errno.ENOENT


async def test_difference_of_sizes(filesystem: Filesystem) -> None:
    """What only the larger disk has differs, joined to what differs before it."""
    node = filesystem.node
    node.add(b"a")
    assert node.try_write(node.virtual_size - CLUSTER, b"x")
    size = node.virtual_size
    node.virtual_size += CLUSTER
    operations = filesystem.show()
    inode = await inode_of(operations, b"a.raw")
    expected = [{"start": size - CLUSTER, "length": 2 * CLUSTER}]
    assert await get_json(operations, inode, b"diff.active") == expected


@given(
    st.sets(st.integers(0, 30), max_size=12),
    st.sets(st.integers(0, 30), max_size=12),
)
def test_difference_is_exact(before: set[int], after: set[int]) -> None:
    """The ranges are exactly the clusters written since the snapshot."""

    async def check() -> None:
        async with trio.open_nursery() as nursery:
            filesystem = Filesystem(FakeNode(31 * CLUSTER), RecordingKernel(), nursery)
            for index in before:
                assert filesystem.node.try_write(index * CLUSTER, b"x")
            filesystem.node.add(b"a")
            for index in after:
                assert filesystem.node.try_write(index * CLUSTER, b"y")
            operations = filesystem.show()
            inode = await inode_of(operations, b"a.raw")
            ranges = await get_json(operations, inode, b"diff.active")
            found = {
                (entry["start"] + step) // CLUSTER
                for entry in ranges
                for step in range(0, entry["length"], CLUSTER)
            }
            assert found == after
            await operations.aclose()
            nursery.cancel_scope.cancel()

    trio.run(check)


def test_rename_arguments() -> None:
    """OLD=NEW with %XX for a byte in either."""
    assert rename_arguments(b"a%3Db=c%2Fd") == (b"a=b", b"c/d")
    for value in (b"", b"a", b"a=b=c"):
        with pytest.raises(BadRequest):
            rename_arguments(value)
