"""COW images against User-mode-Linux's own tools: uml_mkcow makes them, uml_moo merges them.

Today's uml_mkcow writes version 3 alone; the other layouts that uml_moo still
reads are built from the rules, and its merge judges them. QEMU's layouts have
no reader left, so there the rules are the judge.
"""

import json
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qcowfs.driver.layout.uml_cow import LAYOUT_BY_NAME, CowHeader, parse_cow_header
from tests.driver.cow_images import empty_image
from tests.interop import tools
from tests.interop.test_qcow1 import change, sparse_content
from tests.interop.tools import MIB

pytestmark = [
    tools.needs_fuse,
    pytest.mark.skipif(
        not (shutil.which("uml_mkcow") and shutil.which("uml_moo")), reason="no uml-utilities"
    ),
]

SIZE = 3 * MIB
RAW = ("--backing-format", "raw")


def make_base(folder: Path, content: bytes) -> Path:
    """A raw backing file."""
    base = folder / "base.raw"
    base.write_bytes(content)
    return base


def merge(image: Path) -> bytes:
    """The bytes that uml_moo makes of an image and its backing file."""
    target = image.with_suffix(".merged")
    tools.run("uml_moo", image, target)
    return target.read_bytes()


@pytest.mark.parametrize("lane", ["--poll-us=50", "--no-lane"])
def test_images_by_uml_mkcow(lane: str, tmp_path: Path) -> None:
    """What uml_mkcow made reads as its backing file; uml_moo merges what we wrote to the byte."""
    content = sparse_content(1, SIZE)
    base = make_base(tmp_path, content)
    image = tmp_path / "disk.cow"
    tools.run("uml_mkcow", image, base)
    with tools.mounted(image, lane, *RAW) as mount:
        assert mount.active.stat().st_size == SIZE
        assert mount.active.read_bytes() == content
        change(mount.active, content, 2, punching=lane != "--no-lane")
        tools.drop_caches(mount.active)
        assert mount.active.read_bytes() == content
    assert merge(image) == content
    with tools.mounted(image, *RAW, "-r") as mount:
        assert mount.active.read_bytes() == content


@pytest.mark.parametrize("layout", ["uml-1-32", "uml-2-32", "uml-3", "uml-3-unpacked"])
def test_every_version_that_uml_moo_reads(layout: str, tmp_path: Path) -> None:
    """Images of versions 1, 2 and 3, built from the rules, merge to what we wrote.

    The old headers are those of 32-bit compilers, the only ones that it reads.
    """
    content = sparse_content(3, SIZE)
    base = make_base(tmp_path, content)
    image = tmp_path / "disk.cow"
    mtime = int(base.stat().st_mtime)
    image.write_bytes(empty_image(layout, SIZE, backing_file=os.fsencode(base), mtime=mtime))
    with tools.mounted(image, *RAW) as mount:
        assert mount.active.read_bytes() == content
        change(mount.active, content, 4)
        assert mount.active.read_bytes() == content
    assert merge(image) == content


@pytest.mark.parametrize("layout", ["qemu-2-64", "qemu-2-32"])
@pytest.mark.parametrize("backed", [False, True])
def test_layouts_of_qemu(layout: str, backed: bool, tmp_path: Path) -> None:
    """QEMU's layouts read and write; bits and sectors lie where its driver looks for them."""
    content = sparse_content(5, SIZE) if backed else bytearray(SIZE)
    name = None
    if backed:
        name = os.fsencode(make_base(tmp_path, content).name)
    image = tmp_path / "disk.cow"
    image.write_bytes(empty_image(layout, SIZE, backing_file=name, mtime=0))
    # That driver makes a file only as long as its bitmap.
    header = CowHeader(LAYOUT_BY_NAME[layout], name, 0, SIZE)
    os.truncate(image, header.bitmap_offset + SIZE // 4096)
    with tools.mounted(image, *(RAW if backed else ())) as mount:
        assert mount.active.read_bytes() == content
        change(mount.active, content, 6)
    stored = image.read_bytes()
    base = bytes(SIZE) if not backed else (tmp_path / "base.raw").read_bytes()
    for sector in range(SIZE // 512):
        start = sector * 512
        place = header.data_offset + start
        bit = stored[header.bitmap_offset + sector // 8] >> sector % 8 & 1
        shown = stored[place : place + 512].ljust(512, b"\0") if bit else base[start : start + 512]
        assert shown == content[start : start + 512], f"sector {sector}"


def test_our_images_in_uml_moo(tmp_path: Path) -> None:
    """What `create -f cow` made is version 3, stays sparse, and merges."""
    content = sparse_content(7, SIZE)
    make_base(tmp_path, content)
    image = tmp_path / "disk.cow"
    tools.qcowfs("create", "-q", "-f", "cow", "-b", "base.raw", "-F", "raw", image)
    assert parse_cow_header(image.read_bytes()[:8192], image.stat().st_size).layout.version == 3
    with tools.mounted(image, *RAW) as mount:
        tools.pwrite(mount.active, b"here", 1_000_001)
        content[1_000_001:1_000_005] = b"here"
    assert image.stat().st_blocks * 512 < 64 * 1024
    # The name counts from the image's folder for us, from the current one for uml_moo.
    target = tmp_path / "merged"
    tools.run("uml_moo", image, target, cwd=tmp_path)
    assert target.read_bytes() == content


def test_a_changed_backing_file(tmp_path: Path) -> None:
    """A changed time is a warning that names both; to write to the image takes --force."""
    base = make_base(tmp_path, bytes(SIZE))
    image = tmp_path / "disk.cow"
    tools.run("uml_mkcow", image, base)
    recorded = base.stat().st_mtime
    os.utime(base, (1_600_000_000, 1_600_000_000))
    folder = tmp_path / "mnt"
    folder.mkdir()
    refused = tools.qcowfs("mount", *RAW, image, folder, check=False)
    assert refused.returncode == 1
    assert "2020-09-13 12:26:40 UTC" in refused.stderr
    assert "--force" in refused.stderr
    said = tools.qcowfs("mount", *RAW, "-r", image, folder).stderr
    tools.qcowfs("umount", folder)
    assert "2020-09-13 12:26:40 UTC" in said
    assert datetime.fromtimestamp(recorded, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") in said
    with tools.mounted(image, *RAW, "--force") as mount:
        tools.pwrite(mount.active, b"forced", 0)
    assert merge_with_time(image, base, recorded)[:6] == b"forced"


def merge_with_time(image: Path, base: Path, mtime: float) -> bytes:
    """uml_moo's merge, once the backing file has the time that the image states."""
    os.utime(base, (mtime, mtime))
    return merge(image)


def test_what_the_format_cannot(tmp_path: Path) -> None:
    """No snapshots: ENOTSUP; info, statistics and map answer; the disk does not grow."""
    base = make_base(tmp_path, random.Random(8).randbytes(SIZE))
    image = tmp_path / "disk.cow"
    tools.run("uml_mkcow", image, base)
    with tools.mounted(image, *RAW, "-o", "growable") as mount:
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"one")
        facts = json.loads((mount.folder / "info.json").read_text())
        assert (facts["format"], facts["virtual-size"]) == ("cow", SIZE)
        assert facts["backing-filename"] == str(base)
        assert "commits" in mount.statistics()
        tools.pwrite(mount.active, b"x" * 1024, 4096)
        extents = json.loads(os.getxattr(mount.active, "user.qcowfs.map"))
        assert [(row["start"], row["length"], row["depth"]) for row in extents] == [
            (0, 4096, 1),
            (4096, 1024, 0),
            (5120, SIZE - 5120, 1),
        ]
        with pytest.raises(OSError, match="not supported"):
            os.truncate(mount.active, 2 * SIZE)
    assert "file format: cow" in tools.qcowfs("info", image).stdout
