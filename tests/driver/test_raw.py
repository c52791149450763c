"""RawNode: the contract of every Node, and what is raw's own."""

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.errors import BadRequest, ReadOnlyImage
from tests.driver import contract
from tests.fakes import FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]
checks = pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)


@checks
async def test_a_raw_file_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    """Every rule of the contract holds over a file of the host."""
    count = 0

    async def make_node(content: bytes, *, read_only: bool = False) -> Node:
        nonlocal count
        count += 1
        path = tmp_path / f"{count}.raw"
        path.write_bytes(content)
        return RawNode(await HostFile.open(path, writable=not read_only, role=LockRole.RAW_WRITE))

    await check(make_node)


@checks
async def test_a_raw_node_keeps_the_contract_when_it_has_to_wait(check: Check) -> None:
    """Every rule holds where bytes are rarely resident and writes are refused inline."""

    async def make_node(content: bytes, *, read_only: bool = False) -> Node:
        return RawNode(
            MemoryFile(content, read_only=read_only, miss_rate=0.6, refusal_rate=0.6, seed=7)
        )

    await check(make_node)


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4097])
async def test_the_size_is_exact(size: int) -> None:
    """A raw file of an odd length is a disk of that length."""
    content = contract.pattern(size)
    node = RawNode(MemoryFile(content))
    assert node.virtual_size == size
    assert await contract.whole(node) == content
    with pytest.raises(BadRequest):
        await node.write_from(size, b"x")
    await node.aclose()


async def test_holes_are_zero_extents(tmp_path: Path) -> None:
    """A hole of the host file is a ZERO extent that takes no host bytes."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.write(b"d" * 65536)
        file.truncate(1 << 20)
    node = RawNode(await HostFile.open(path, writable=True, role=LockRole.RAW_WRITE))
    extents = await node.extents(0, 1 << 20)
    assert [(e.kind, e.guest_offset, e.length, e.host_offset) for e in extents] == [
        (ExtentKind.DATA, 0, 65536, 0),
        (ExtentKind.ZERO, 65536, (1 << 20) - 65536, None),
    ]
    await node.aclose()


async def test_discard_gives_room_back_to_the_host(tmp_path: Path) -> None:
    """Discarded pages leave the host file, whose size stays."""
    path = tmp_path / "full.raw"
    path.write_bytes(b"f" * (1 << 20))
    node = RawNode(await HostFile.open(path, writable=True, role=LockRole.RAW_WRITE))
    before = node.info()["actual-size"]
    await node.discard(65536, 1 << 19)
    assert node.info()["actual-size"] <= before - (1 << 19)
    assert node.virtual_size == path.stat().st_size == 1 << 20
    await node.aclose()


async def test_a_discard_that_the_host_cannot_do_changes_nothing() -> None:
    """Without holes on the host, a discard leaves the bytes and zeroing writes zeros."""
    file = MemoryFile(b"k" * 8192, can_punch=False)
    node = RawNode(file)
    await node.discard(0, 4096)
    assert file.content == b"k" * 8192
    await node.write_zeroes(0, 4096, unmap=True)
    assert file.content == bytes(4096) + b"k" * 4096
    await node.aclose()


async def test_a_host_error_passes_with_its_errno() -> None:
    """A write that fails for want of room answers ENOSPC and the node goes on."""
    file = FaultyFile(MemoryFile(bytes(8192)))
    node = RawNode(file)
    file.fail("write", error_number=errno.ENOSPC)
    with pytest.raises(OSError, match="space") as failure:
        await contract.write(node, 0, b"x" * 512)
    assert failure.value.errno == errno.ENOSPC
    assert not node.read_only
    await contract.write(node, 0, b"y" * 512)
    assert await contract.read(node, 0, 512) == b"y" * 512
    await node.aclose()


@pytest.mark.expects_warnings
async def test_after_a_failed_sync_nothing_more_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failed flush answers its errno, makes the node read-only and says so once."""
    file = FaultyFile(MemoryFile(bytes(8192)))
    node = RawNode(file)
    file.fail("sync", error_number=errno.EIO)
    await node.write_from(0, b"x")
    with pytest.raises(OSError, match="rror") as failure:
        await node.flush()
    assert failure.value.errno == errno.EIO
    assert node.read_only
    with pytest.raises(ReadOnlyImage, match="since an error"):
        await node.write_from(0, b"y")
    with pytest.raises(ReadOnlyImage):
        await node.flush()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    await node.aclose()
    assert file.closed


@pytest.mark.expects_warnings
async def test_a_failed_flush_at_the_end_is_told_once_all_is_closed() -> None:
    """Closing reports the failure of the last flush and still closes the file."""
    inner = MemoryFile(bytes(8192))
    file = FaultyFile(inner)
    node = RawNode(file)
    await node.write_from(0, b"x")
    file.fail("sync")
    with pytest.raises(OSError, match="rror"):
        await node.aclose()
    assert inner.closed
    await node.aclose()


async def test_growing_adds_zeros_and_never_cuts() -> None:
    """A grown disk ends in zeros; a smaller size is refused."""
    file = MemoryFile(b"g" * 1000)
    node = RawNode(file)
    await node.grow(5000)
    assert node.virtual_size == 5000
    assert await contract.whole(node) == b"g" * 1000 + bytes(4000)
    with pytest.raises(BadRequest, match="grow"):
        await node.grow(4999)
    await node.aclose()


async def test_a_read_only_node_syncs_nothing() -> None:
    """A read-only mount writes nothing to any file: not even a sync is asked for."""
    file = FaultyFile(MemoryFile(bytes(512), read_only=True))
    node = RawNode(file)
    await node.flush()
    await node.aclose()
    assert file.calls["sync"] == 0
