"""Hazards of a mounted filesystem: clocks, huge answers, writes that promise too much."""

import errno
import json
import os
from typing import Any

import pyfuse3
import pytest

from qcowfs.fuse.files import HotTarget
from qcowfs.fuse.operations import Operations
from qcowfs.fuse.status import Presentation
from qcowfs.fuse.tree import ACTIVE_INODE
from tests.fuse.conftest import Filesystem
from tests.fuse.fake_node import FakeNode
from tests.fuse.lane_support import FakeOperations, MemoryNode, lane_of

CTX: Any = None
INFO = b"user.qcowfs.info"
APPLY = b"user.qcowfs.snapshot.apply"


def test_a_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is later than the flush before it whatever the clock says, so close(2) commits."""
    target = HotTarget(FakeNode(), writable=True)
    target.touch()
    target.flushed_ns = target.changed_ns
    monkeypatch.setattr("qcowfs.fuse.files.time.time_ns", lambda: 1000)
    target.touch()
    assert target.changed_ns > target.flushed_ns


@pytest.mark.parametrize("snapshots", [[{"name": "n" * 65535}], [{"name": "x"}] * 20000])
async def test_facts_too_long_for_an_attribute(
    filesystem: Filesystem, snapshots: list[dict[str, str]]
) -> None:
    """user.qcowfs.info can be read whatever snapshots there are, and is whole JSON."""
    facts = {"virtual-size": 1, "snapshots": snapshots, "format": "qcow2"}
    filesystem.node.info = lambda: facts  # type: ignore[method-assign]
    value = bytes(await filesystem.operations.getxattr(ACTIVE_INODE, INFO, CTX))
    assert len(value) <= 65536
    shown = json.loads(value)
    assert shown["format"] == "qcow2"
    assert shown["snapshots"] == snapshots[: len(shown["snapshots"])]
    assert len(value) > 65000 or len(snapshots) == 1


async def test_apply_beneath_a_loop_device(filesystem: Filesystem) -> None:
    """Apply is EBUSY while a loop device is attached, with no handle that may write."""
    filesystem.node.add(b"a")
    operations = Operations(
        filesystem.node,
        kernel=filesystem.kernel,
        nursery=filesystem.nursery,
        presentation=Presentation(uid=0, gid=0),
        is_attached=lambda: True,
    )
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.setxattr(ACTIVE_INODE, APPLY, b"a", CTX)
    assert caught.value.errno == errno.EBUSY
    assert "apply_snapshot" not in filesystem.node.calls


async def test_a_synchronous_write_across_the_end() -> None:
    """O_DSYNC: what of the write fits is durable before the answer."""
    node = MemoryNode()
    async with lane_of(FakeOperations(node)) as harness:
        end = node.virtual_size
        assert await harness.write(end - 2, b"abcd", flags=os.O_DSYNC) == (0, 2)
        assert node.calls[-1] == ("flush",)
