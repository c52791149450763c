"""External data files, raw and not: guest bytes lie at their own offset in another file."""

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.storage import Buffer
from qcowfs.errors import BadRequest, CorruptImage, ImageBusy, NotFound, UnsupportedFeature
from tests.driver.test_encryption import random_steps, read_all
from tests.fakes import MemoryFile

KIB = 1 << 10
MIB = 1 << 20

SHAPES = ["", "cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=2M"]


def run(*command: str | Path) -> str:
    """Run a tool that must succeed."""
    return subprocess.run(
        [str(word) for word in command],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def make_image(folder: Path, options: str = "", *, raw: bool = False, size: int = 3 * MIB) -> Path:
    """An image made by qemu-img, its data in `disk.raw` beside it, named as such."""
    wanted = f"data_file=disk.raw,data_file_raw={'on' if raw else 'off'}"
    if options:
        wanted += f",{options}"
    image = folder / "image.qcow2"
    done = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", wanted, image.name, str(size)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return image


async def open_node(image: Path, **options: Any) -> Qcow2Node:
    """The node of an image with its data file."""
    node = await open_image(image, **options)
    assert isinstance(node, Qcow2Node)
    return node


def judge(image: Path, expected: bytes | bytearray) -> None:
    """qemu-img finds neither an error nor a leak, and reads `expected`."""
    opened = f"driver=qcow2,file.filename={image},data-file.filename={image.parent / 'disk.raw'}"
    run("qemu-img", "check", "--image-opts", opened)
    target = image.parent / "judged"
    run("qemu-img", "convert", "--image-opts", opened, "-O", "raw", target)
    assert target.read_bytes() == expected
    target.unlink()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("options", SHAPES)
async def test_random_changes(tmp_path: Path, options: str, raw: bool) -> None:
    """Writes, zeroes and discards leave what QEMU reads; a raw data file is the disk itself."""
    size = 3 * MIB + 512
    image = make_image(tmp_path, options, raw=raw, size=size)
    model = bytearray(size)
    for seed in range(2):
        node = await open_node(image)
        await random_steps(node, model, seed=seed, count=100)
        assert await read_all(node) == model
        if raw:
            assert (tmp_path / "disk.raw").read_bytes()[:size] == model
        await node.aclose()
        judge(image, model)


@pytest.mark.parametrize("raw", [False, True])
async def test_what_qemu_wrote_is_read(tmp_path: Path, raw: bool) -> None:
    """The first cluster, whose host offset is 0, and others, zeros and discarded ones."""
    image = make_image(tmp_path, raw=raw)
    commands = ["write -P 5 0 100k", "write -P 6 1M 64k", "write -z 64k 64k", "discard 1M 64k"]
    opened = f"driver=qcow2,discard=unmap,file.filename={image}"
    opened += f",data-file.filename={tmp_path / 'disk.raw'}"
    run("qemu-io", "--image-opts", *[w for c in commands for w in ("-c", c)], opened)
    expected = bytearray(3 * MIB)
    expected[: 64 * KIB] = b"\5" * (64 * KIB)
    node = await open_node(image, read_only=True)
    assert await read_all(node) == expected
    await node.aclose()


async def test_over_a_backing_file(tmp_path: Path) -> None:
    """Edges of a new cluster come from the backing file; what is discarded stays hidden."""
    content = random.Random(1).randbytes(MIB)
    (tmp_path / "base.raw").write_bytes(content)
    image = make_image(tmp_path, "backing_file=base.raw,backing_fmt=raw", size=2 * MIB)
    model = bytearray(content + bytes(MIB))
    node = await open_node(image)
    await random_steps(node, model, seed=4, count=80)
    assert await read_all(node) == model
    await node.aclose()
    judge(image, model)


async def test_growing(tmp_path: Path) -> None:
    """The data file grows with the disk; a raw one shows the new part at once."""
    for raw in (False, True):
        folder = tmp_path / str(raw)
        folder.mkdir()
        image = make_image(folder, raw=raw, size=MIB + 512)
        node = await open_node(image)
        await node.write_from(0, b"x" * MIB)
        await node.grow(5 * MIB)
        model = bytearray(b"x" * MIB + bytes(4 * MIB))
        assert await read_all(node) == model
        await node.write_from(4 * MIB - 7, b"yyyyyyyyyy")
        model[4 * MIB - 7 : 4 * MIB + 3] = b"y" * 10
        await node.aclose()
        assert (folder / "disk.raw").stat().st_size == 5 * MIB
        judge(image, model)
        if raw:
            with (folder / "disk.raw").open("r+b") as file:
                file.seek(3 * MIB)
                file.write(b"z" * 512)
            model[3 * MIB : 3 * MIB + 512] = b"z" * 512
            judge(image, model)


async def test_a_discard_gives_the_room_back(tmp_path: Path) -> None:
    """What nothing shows any more is a hole in the data file."""
    image = make_image(tmp_path)
    node = await open_node(image)
    await node.write_from(0, b"x" * MIB)
    await node.flush()
    before = (tmp_path / "disk.raw").stat().st_blocks
    await node.discard(0, MIB)
    await node.flush()
    assert (tmp_path / "disk.raw").stat().st_blocks < before
    await node.aclose()


async def test_a_data_file_is_locked(tmp_path: Path) -> None:
    """Two images cannot write to one data file, and it is free again after the close."""
    first = make_image(tmp_path)
    second = tmp_path / "second.qcow2"
    second.write_bytes(first.read_bytes())
    node = await open_node(first)
    with pytest.raises(ImageBusy, match=r"disk\.raw"):
        await open_image(second)
    await node.aclose()
    node = await open_node(second)
    await node.aclose()


async def test_snapshots_are_refused(tmp_path: Path) -> None:
    """An external data file allows no internal snapshots."""
    node = await open_node(make_image(tmp_path))
    with pytest.raises(UnsupportedFeature, match="external data file"):
        await node.create_snapshot(b"one")
    await node.aclose()


async def test_a_missing_data_file(tmp_path: Path) -> None:
    """The line names both files; describing the image does not need the data file."""
    image = make_image(tmp_path)
    (tmp_path / "disk.raw").unlink()
    before = image.read_bytes()
    with pytest.raises(NotFound, match=r'data file "disk\.raw" of ".*image\.qcow2" does not exist'):
        await open_image(image)
    node = await open_node(image, read_only=True, describe_only=True)
    facts = node.info()["format-specific"]["data"]
    assert facts["data-file"] == "disk.raw"
    with pytest.raises(BadRequest):
        node.try_read(0, 512)
    await node.aclose()
    assert image.read_bytes() == before


@pytest.mark.parametrize("raw", [False, True])
async def test_a_data_file_that_was_cut_off(
    tmp_path: Path, raw: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not written to; read, what is missing is zeros, with a warning."""
    image = make_image(tmp_path, raw=raw)
    node = await open_node(image)
    await node.write_from(0, b"x" * MIB)
    await node.aclose()
    os.truncate(tmp_path / "disk.raw", 512 * KIB)
    before = image.read_bytes()
    with pytest.raises(CorruptImage, match="cut off"):
        await open_image(image)
    node = await open_node(image, read_only=True)
    assert await read_all(node) == b"x" * 512 * KIB + bytes(3 * MIB - 512 * KIB)
    await node.aclose()
    assert "cut off" in caplog.text
    assert image.read_bytes() == before


async def test_a_short_data_file_with_nothing_missing(tmp_path: Path) -> None:
    """A data file that ends after the last cluster in use is whole."""
    image = make_image(tmp_path)
    node = await open_node(image)
    await node.write_from(0, b"x" * MIB)
    await node.aclose()
    os.truncate(tmp_path / "disk.raw", MIB)
    node = await open_node(image)
    await node.write_from(2 * MIB, b"yy")
    model = b"x" * MIB + bytes(MIB) + b"yy" + bytes(MIB - 2)
    assert await read_all(node) == model
    await node.aclose()
    judge(image, model)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "disk.raw")


def _folder(folder: Path) -> None:
    (folder / "disk.raw").mkdir()


def _itself(folder: Path) -> None:
    os.link(folder / "image.qcow2", folder / "disk.raw")


@pytest.mark.parametrize(
    ("replace", "kind"),
    [(_fifo, BadRequest), (_folder, BadRequest), (_itself, CorruptImage)],
)
async def test_what_is_no_data_file(tmp_path: Path, replace: Any, kind: type[Exception]) -> None:
    """A FIFO, a folder, the image itself: one line, and nothing is changed."""
    image = make_image(tmp_path)
    (tmp_path / "disk.raw").unlink()
    replace(tmp_path)
    before = image.read_bytes()
    with pytest.raises(kind, match=r'data file "disk\.raw"') as refusal:
        await open_image(image)
    assert "\n" not in str(refusal.value)
    assert image.read_bytes() == before


@pytest.mark.parametrize("name", ["json:{}", "nbd://host/x", "json:file.raw"])
async def test_names_with_a_protocol_are_refused(tmp_path: Path, name: str) -> None:
    """A data file's name is a name: no protocol and no json: is followed."""
    from qcowfs.driver.data_file import data_file_path
    from qcowfs.driver.layout.header import Header

    header = Header(
        version=3, cluster_bits=16, virtual_size=0, l1_size=0, l1_table_offset=0,
        refcount_table_offset=0, refcount_table_clusters=0, data_file=name.encode(),
    )  # fmt: skip
    with pytest.raises(UnsupportedFeature, match="protocol"):
        data_file_path(header, str(tmp_path / "image.qcow2"))


async def test_without_a_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name counts from the image's folder, wherever the process is."""
    image = make_image(tmp_path)
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    node: Node = await open_image(image)
    await node.aclose()


class LoggedFile(MemoryFile):
    """A MemoryFile that writes down its writes and syncs in a list that others share."""

    def __init__(self, name: str, log: list[str], content: bytes = b"") -> None:
        super().__init__(content, name=name)
        self._log = log

    def try_pwrite(self, buffers: Sequence[Buffer], host_offset: int) -> bool:
        """As MemoryFile, and noted."""
        self._log.append(f"write {self.name}")
        return super().try_pwrite(buffers, host_offset)

    async def sync(self) -> None:
        """As MemoryFile, and noted."""
        self._log.append(f"sync {self.name}")
        await super().sync()


async def test_data_is_durable_before_what_points_to_it(tmp_path: Path) -> None:
    """A commit syncs the data file, then the image, and only then writes L2 entries."""
    image = make_image(tmp_path, size=MIB)
    log: list[str] = []
    data = LoggedFile("data", log, bytes(MIB))
    node = await open_qcow2(
        LoggedFile("image", log, image.read_bytes()),
        path="image.qcow2",
        read_only=False,
        backing=None,
        data_storage=data,
    )
    await node.write_from(5 * 64 * KIB, b"x" * 512)
    await node.flush()
    log.clear()
    await node.write_from(6 * 64 * KIB, b"y" * 512)
    await node.flush()
    assert log == ["write data", "sync data", "sync image", "write image", "sync image"]
    log.clear()
    await node.write_from(6 * 64 * KIB, b"z" * 512)
    await node.flush()
    assert log == ["write data", "sync data", "sync image"]
    await node.aclose()
