"""New images: clean for qemu-img, as asked for, and never half made."""

import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowfs.driver.layout.geometry import MAX_CLUSTER_SIZE
from qcowfs.driver.layout.header import Header, parse_header
from qcowfs.driver.locking import LockRole
from qcowfs.driver.qcow2.create import create_qcow2
from qcowfs.driver.storage import HostFile
from qcowfs.errors import BadRequest, ImageBusy, ImageFull

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def run(*command: str | Path) -> str:
    """The standard output of a command that has to succeed."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check(path: Path) -> None:
    """Have qemu-img find the image clean, leaks included."""
    run("qemu-img", "check", "-f", "qcow2", path)


def info(path: Path) -> dict[str, Any]:
    """What qemu-img tells of the image."""
    facts: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return facts


def mapping(path: Path) -> list[dict[str, Any]]:
    """The extents that qemu-img sees."""
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", path))
    return extents


def header_of(path: Path) -> Header:
    """The header of an image, as this project reads it."""
    with path.open("rb") as file:
        return parse_header(file.read(MAX_CLUSTER_SIZE), path.stat().st_size)


@pytest.mark.parametrize(
    ("size", "virtual_size"),
    [(0, 0), (1, 512), (512, 512), (GIB + 5, GIB + 512), (3 * TIB, 3 * TIB), (1 << 50, 1 << 50)],
)
async def test_sizes_are_rounded_up_to_sectors(
    tmp_path: Path, size: int, virtual_size: int
) -> None:
    """As qemu-img create does, from nothing to a petabyte."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, size)
    check(path)
    assert info(path)["virtual-size"] == virtual_size
    assert path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("cluster_bits", range(9, 22))
@pytest.mark.parametrize("version", [2, 3])
async def test_all_cluster_sizes(tmp_path: Path, cluster_bits: int, version: int) -> None:
    """512 bytes to 2 MiB, in both versions."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, 64 * MIB, cluster_size=1 << cluster_bits, version=version)
    check(path)
    facts = info(path)
    assert facts["cluster-size"] == 1 << cluster_bits
    assert facts["format-specific"]["data"]["compat"] == {2: "0.10", 3: "1.1"}[version]


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
async def test_all_refcount_widths(tmp_path: Path, refcount_bits: int) -> None:
    """With several refcount blocks, the last one in part."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(
        path, 8 * MIB + 512, refcount_bits=refcount_bits, cluster_size=512, preallocation="metadata"
    )
    check(path)
    assert info(path)["format-specific"]["data"]["refcount-bits"] == refcount_bits


async def test_options_reach_the_image(tmp_path: Path) -> None:
    """Extended L2 entries, zstd and lazy refcounts together."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, GIB, extended_l2=True, compression_type="zstd", lazy_refcounts=True)
    check(path)
    data = info(path)["format-specific"]["data"]
    assert (data["extended-l2"], data["compression-type"], data["lazy-refcounts"]) == (
        True, "zstd", True,
    )  # fmt: skip


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512}, {"extended_l2": True, "cluster_size": 16384}, {"version": 2}],
    ids=["64k", "512", "extended", "v2"],
)
async def test_preallocated_images_are_clean(
    tmp_path: Path, preallocation: str, options: dict[str, Any]
) -> None:
    """Every cluster is mapped, the last one in part, and the image reads as zeros."""
    path = tmp_path / "new.qcow2"
    size = 2 * MIB + 1536
    await create_qcow2(path, size, preallocation=preallocation, **options)
    check(path)
    report = json.loads(run("qemu-img", "check", "--output=json", path))
    assert report["allocated-clusters"] == -(-size // options.get("cluster_size", 65536))
    raw = tmp_path / "new.raw"
    run("qemu-img", "convert", "-O", "raw", path, raw)
    assert hashlib.sha256(raw.read_bytes()).digest() == hashlib.sha256(bytes(size)).digest()


@pytest.mark.parametrize(("preallocation", "reserved"), [("metadata", False), ("falloc", True)])
async def test_room_on_the_host(tmp_path: Path, preallocation: str, reserved: bool) -> None:
    """Metadata alone leaves the data sparse, falloc reserves it."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, 4 * MIB, preallocation=preallocation)
    assert (path.stat().st_blocks * 512 >= 4 * MIB) is reserved


async def test_preallocated_data_is_one_run(tmp_path: Path) -> None:
    """All data clusters lie behind each other on the host."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, 2 * GIB, preallocation="metadata")
    extents = mapping(path)
    assert len({extent["offset"] - extent["start"] for extent in extents}) == 1


async def test_a_large_preallocation_describes_itself(tmp_path: Path) -> None:
    """Many refcount blocks, in a refcount table of several clusters."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(
        path, 256 * MIB, cluster_size=512, refcount_bits=64, preallocation="metadata"
    )
    assert header_of(path).refcount_table_clusters > 1
    check(path)


async def test_preallocated_subclusters_show_the_backing_file(tmp_path: Path) -> None:
    """With extended L2 entries they have room but are not allocated."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"\x55" * MIB)
    path = tmp_path / "new.qcow2"
    await create_qcow2(
        path, MIB, extended_l2=True, preallocation="metadata",
        backing_file="base.raw", backing_format="raw",
    )  # fmt: skip
    check(path)
    raw = tmp_path / "out.raw"
    run("qemu-img", "convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == b"\x55" * MIB


async def test_a_backing_file_is_named_and_not_opened(tmp_path: Path) -> None:
    """The name is stored as given, with its format."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, MIB, backing_file="missing.raw", backing_format="raw")
    header = header_of(path)
    assert (header.backing_file, header.backing_format) == (b"missing.raw", "raw")


async def test_a_name_of_1023_bytes_fits(tmp_path: Path) -> None:
    """The largest that the format allows."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, MIB, backing_file="n" * 1023, backing_format="raw")
    assert header_of(path).backing_file == b"n" * 1023


@pytest.mark.parametrize(
    "options",
    [
        {"version": 1},
        {"version": 4},
        {"version": 2, "refcount_bits": 8},
        {"version": 2, "lazy_refcounts": True},
        {"version": 2, "extended_l2": True},
        {"version": 2, "compression_type": "zstd"},
        {"cluster_size": 0},
        {"cluster_size": -65536},
        {"cluster_size": 256},
        {"cluster_size": 65537},
        {"cluster_size": 4 * MIB},
        {"extended_l2": True, "cluster_size": 8192},
        {"refcount_bits": 0},
        {"refcount_bits": 3},
        {"refcount_bits": 128},
        {"compression_type": "lzma"},
        {"preallocation": "some"},
        {"preallocation": "metadata", "backing_file": "base", "backing_format": "raw"},
        {"backing_format": "raw"},
        {"backing_file": "n" * 1024},
        {"backing_file": "base", "backing_format": "f" * 16},
        {"cluster_size": 512, "backing_file": "n" * 500},
    ],
    ids=str,
)
async def test_what_the_format_does_not_allow_is_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Before any file is made."""
    path = tmp_path / "new.qcow2"
    with pytest.raises((BadRequest, ImageFull)):
        await create_qcow2(path, MIB, **options)
    assert not path.exists()


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [(-1, 65536), ((128 << 30) + 1, 512), (1 << 63, 65536), (1 << 64, 2 * MIB)],
)
async def test_sizes_beyond_the_l1_limit_are_refused(
    tmp_path: Path, size: int, cluster_size: int
) -> None:
    """An L1 table has at most 32 MiB."""
    with pytest.raises(BadRequest):
        await create_qcow2(tmp_path / "new.qcow2", size, cluster_size=cluster_size)
    assert not (tmp_path / "new.qcow2").exists()


async def test_the_largest_size_of_small_clusters(tmp_path: Path) -> None:
    """128 GiB at 512 bytes: exactly the L1 limit."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, 128 << 30, cluster_size=512)
    assert info(path)["virtual-size"] == 128 << 30


async def test_a_refcount_table_over_its_limit_is_refused(tmp_path: Path) -> None:
    """Preallocating 64 GiB of 512-byte clusters with 64-bit refcounts needs too many blocks."""
    path = tmp_path / "new.qcow2"
    with pytest.raises(BadRequest, match="refcount table"):
        await create_qcow2(
            path, 64 << 30, cluster_size=512, refcount_bits=64, preallocation="metadata"
        )
    assert not path.exists()


async def test_an_image_may_not_be_its_own_backing_file(tmp_path: Path) -> None:
    """The file that is to be shown is not emptied."""
    path = tmp_path / "base.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(BadRequest, match="itself"):
        await create_qcow2(path, MIB, backing_file="./base.qcow2", backing_format="qcow2")
    assert path.read_bytes() == b"precious"


async def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    """As qemu-img create does; what was in it is gone."""
    path = tmp_path / "new.qcow2"
    path.write_bytes(b"\xff" * MIB)
    await create_qcow2(path, MIB)
    check(path)
    assert path.stat().st_size < MIB


async def test_an_image_in_use_is_left_alone(tmp_path: Path) -> None:
    """The lock is taken before the file is emptied."""
    path = tmp_path / "new.qcow2"
    await create_qcow2(path, MIB)
    before = path.read_bytes()
    user = await HostFile.open(path, writable=True, role=LockRole.QCOW2_WRITE)
    try:
        with pytest.raises(ImageBusy):
            await create_qcow2(path, 2 * MIB)
    finally:
        await user.aclose()
    assert path.read_bytes() == before


class _FailingFile(HostFile):
    """A host file whose nth write or sync fails as a full disk does."""

    countdown = 0

    def _step(self) -> None:
        type(self).countdown -= 1
        if type(self).countdown < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def pwrite(self, *arguments: Any) -> None:
        self._step()
        await super().pwrite(*arguments)

    async def sync(self) -> None:
        self._step()
        await super().sync()


async def _create_with_failure(path: Path, monkeypatch: pytest.MonkeyPatch, countdown: int) -> bool:
    """Whether creating succeeded although its call number `countdown` failed."""
    monkeypatch.setattr(_FailingFile, "countdown", countdown)
    monkeypatch.setattr("qcowfs.driver.qcow2.create.HostFile", _FailingFile)
    try:
        await create_qcow2(path, MIB, preallocation="full")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


async def test_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write or sync fails, the new file is removed."""
    path = tmp_path / "new.qcow2"
    countdown = 0
    while not await _create_with_failure(path, monkeypatch, countdown):
        assert not path.exists()
        countdown += 1
    assert countdown >= 6
    check(path)


async def test_a_failure_keeps_a_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not ours to remove; and it is no image, since the header comes last."""
    path = tmp_path / "new.qcow2"
    path.write_bytes(b"old")
    assert not await _create_with_failure(path, monkeypatch, 3)
    assert path.read_bytes()[:4] != b"QFI\xfb"


async def test_the_header_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a sync of all that it points to, and is synced itself."""
    events: list[str] = []

    class Recording(HostFile):
        async def pwrite(self, buffers: Any, host_offset: int) -> None:
            events.append("header" if host_offset == 0 else "table")
            await super().pwrite(buffers, host_offset)

        async def sync(self) -> None:
            events.append("sync")
            await super().sync()

    monkeypatch.setattr("qcowfs.driver.qcow2.create.HostFile", Recording)
    await create_qcow2(tmp_path / "new.qcow2", MIB, preallocation="metadata")
    assert events[-3:] == ["sync", "header", "sync"]
    assert set(events[:-3]) == {"table"}


async def test_header_fields_are_qemus(tmp_path: Path) -> None:
    """For the same options the header differs from QEMU's in where the tables lie alone."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    await create_qcow2(
        ours, GIB, backing_file="b", backing_format="raw", lazy_refcounts=True, refcount_bits=32
    )
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "b", "-F", "raw",
        "-o", "lazy_refcounts=on,refcount_bits=32", theirs, "1G",
    )  # fmt: skip
    made, expected = bytearray(ours.read_bytes()[:65536]), bytearray(theirs.read_bytes()[:65536])
    for cluster in (made, expected):
        cluster[40:56] = bytes(16)
    assert made == expected
