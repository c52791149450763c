"""Opening: formats, backing chains, locks, and everything that has to be refused."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcowfs.driver import opening
from qcowfs.driver.layout.header import parse_header, serialize
from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image, probe
from qcowfs.driver.storage import HostFile
from qcowfs.errors import (
    BadRequest,
    CorruptImage,
    ImageBusy,
    KeyRequired,
    NotFound,
    QcowfsError,
    UnsupportedFeature,
)

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-io") and shutil.which("qemu-img")), reason="no QEMU tools"
)

CLUSTER = 65536


def run(*command: str | Path) -> None:
    """Run a tool that has to succeed."""
    subprocess.run(
        [str(part) for part in command],
        check=True,
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def make_raw(path: Path, size: int = 1 << 20, fill: bytes = b"") -> Path:
    """A raw file, `fill` repeated through its first 64 KiB."""
    with path.open("wb") as file:
        file.write((fill * CLUSTER)[:CLUSTER])
        file.truncate(size)
    return path


def make_qcow2(
    path: Path,
    *options: str | Path,
    backing: str | None = None,
    backing_format: str | None = None,
    size: int = 1 << 20,
) -> Path:
    """A qcow2 image; its backing file is named but not looked at."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    if backing is not None:
        change_header(path, backing_file=backing.encode(), backing_format=backing_format)
    return path


def change_header(path: Path, **fields: Any) -> None:
    """Rewrite the header cluster of an image with other values."""
    with path.open("r+b") as file:
        head = file.read(CLUSTER)
        header = parse_header(head, path.stat().st_size)
        file.seek(0)
        file.write(serialize(replace(header, **fields)))


async def content(node: Node, length: int = 16, guest_offset: int = 0) -> bytes:
    """Some bytes of a disk."""
    buffer = bytearray(length)
    await node.read_into(guest_offset, memoryview(buffer))
    return bytes(buffer)


async def refusal(kind: type[Exception], path: Path | str, **options: Any) -> Exception:
    """The exception with which opening ends; one line of text."""
    with pytest.raises(kind) as caught:
        await open_image(path, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def layers(node: Node) -> list[tuple[str, str, bool]]:
    """File name, format and read_only of every layer from the top."""
    found = []
    layer: Node | None = node
    while layer is not None:
        found.append((Path(layer.name).name, layer.format_name, layer.read_only))
        layer = layer.backing
    return found


# Formats


async def test_a_qcow2_image_is_recognised(tmp_path: Path) -> None:
    """Without a stated format the magic number decides."""
    path = make_qcow2(tmp_path / "a.img")
    for stated in (None, "qcow2"):
        node = await open_image(path, format=stated)
        assert layers(node) == [("a.img", "qcow2", False)]
        assert node.name == str(path)
        assert node.virtual_size == 1 << 20
        await node.aclose()


async def test_raw_only_when_asked_for(tmp_path: Path) -> None:
    """A file without a known magic number is refused with a hint; stated raw, it opens."""
    path = make_raw(tmp_path / "disk.raw", fill=b"r")
    error = await refusal(BadRequest, path)
    assert isinstance(error, QcowfsError)
    assert error.hint is not None
    assert "--format raw" in error.hint
    node = await open_image(path, format="raw")
    assert layers(node) == [("disk.raw", "raw", False)]
    assert await content(node) == b"r" * 16
    await node.aclose()


async def test_stated_raw_is_believed_over_the_magic_number(tmp_path: Path) -> None:
    """A qcow2 file opened as raw shows its own header; a raw one as qcow2 is refused."""
    path = make_qcow2(tmp_path / "a.qcow2")
    node = await open_image(path, format="raw", read_only=True)
    assert (await content(node))[:4] == b"QFI\xfb"
    await node.aclose()
    await refusal(BadRequest, make_raw(tmp_path / "b.raw", fill=b"r"), format="qcow2")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"KDMV", "vmdk"),
        (b"conectix", "vpc"),
        (b"vhdxfile", "vhdx"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe", "luks"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
    ],
)
async def test_other_formats_are_refused_by_name(tmp_path: Path, start: bytes, name: str) -> None:
    """A known magic number of an unsupported format names it; so does a stated one."""
    assert probe(start.ljust(512, b"\0")) == name
    path = tmp_path / "x.img"
    path.write_bytes(start.ljust(4096, b"\0"))
    assert f'"{name}"' in str(await refusal(UnsupportedFeature, path))
    assert f'"{name}"' in str(await refusal(UnsupportedFeature, path, format=name))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 23, 71, 103, 111, 65535])
async def test_a_piece_of_a_header_is_a_clear_error(tmp_path: Path, length: int) -> None:
    """A file cut inside its header is refused in one line, however short."""
    path = make_qcow2(tmp_path / "cut.qcow2")
    os.truncate(path, length)
    await refusal(BadRequest if length < 4 else CorruptImage, path)


async def test_large_clusters_have_their_whole_header_read(tmp_path: Path) -> None:
    """A header cluster of 2 MiB with the backing name at its end is read whole."""
    make_raw(tmp_path / "base.raw", fill=b"b")
    path = make_qcow2(tmp_path / "a.qcow2", "-o", "cluster_size=2M")
    name = b"base.raw"
    with path.open("r+b") as file:
        place = (2 << 20) - len(name)
        file.seek(place)
        file.write(name)
        file.seek(8)
        file.write(place.to_bytes(8, "big") + len(name).to_bytes(4, "big"))
    node = await open_image(path, read_only=True, backing_format="raw")
    assert await content(node) == b"b" * 16
    await node.aclose()


# What is marked or cannot be served


@pytest.mark.expects_warnings
@pytest.mark.parametrize(("bit", "word"), [(1, "dirty"), (2, "corrupt")])
async def test_a_marked_image_is_only_read(
    tmp_path: Path, bit: int, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the dirty or the corrupt bit: no writing, reading with a warning."""
    path = make_qcow2(tmp_path / "a.qcow2")
    change_header(path, incompatible=bit)
    before = path.read_bytes()
    error = await refusal(CorruptImage, path)
    assert word in str(error)
    assert isinstance(error, QcowfsError)
    assert error.hint
    assert not caplog.records
    node = await open_image(path, read_only=True)
    assert node.read_only
    assert word in caplog.text
    await node.aclose()
    assert path.read_bytes() == before


async def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    """Neither reading nor writing shows ciphertext as if it were the disk."""
    path = make_qcow2(tmp_path / "a.qcow2")
    change_header(path, crypt_method=1)
    for read_only in (False, True):
        assert "encrypted" in str(await refusal(KeyRequired, path, read_only=read_only))


async def test_a_cut_off_image_is_not_written(tmp_path: Path) -> None:
    """An image whose clusters lie past the end of its file opens for reading alone."""
    path = make_qcow2(tmp_path / "a.qcow2")
    run("qemu-io", "-c", "write -P 7 0 512k", path)
    os.truncate(path, path.stat().st_size - (256 << 10))
    await refusal(CorruptImage, path)
    node = await open_image(path, read_only=True)
    assert await content(node) == b"\7" * 16
    await node.aclose()


# Chains


async def test_a_chain_is_read_through(tmp_path: Path) -> None:
    """Each layer comes from the folder of the one above; only the top is writable."""
    folder = tmp_path / "lower"
    folder.mkdir()
    make_raw(folder / "base.raw", fill=b"b")
    make_qcow2(folder / "middle.qcow2", backing="base.raw", backing_format="raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="lower/middle.qcow2", backing_format="qcow2")
    node = await open_image(top)
    assert layers(node) == [
        ("top.qcow2", "qcow2", False),
        ("middle.qcow2", "qcow2", True),
        ("base.raw", "raw", True),
    ]
    assert await content(node) == b"b" * 16
    await node.aclose()


async def test_names_count_from_the_image_as_it_was_named(tmp_path: Path) -> None:
    """Through a symbolic link, the link's folder is where the backing file is looked for."""
    real, named = tmp_path / "real", tmp_path / "named"
    for folder, fill in ((real, b"r"), (named, b"n")):
        folder.mkdir()
        make_raw(folder / "base.raw", fill=fill)
    make_qcow2(real / "top.qcow2", backing="base.raw", backing_format="raw")
    (named / "link.qcow2").symlink_to(real / "top.qcow2")
    node = await open_image(named / "link.qcow2", read_only=True)
    assert await content(node) == b"n" * 16
    await node.aclose()


@pytest.mark.expects_warnings
async def test_a_backing_file_of_unstated_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is looked at, with a warning that names the danger; there is none where it was stated."""
    make_raw(tmp_path / "base.raw", fill=b"b")
    make_qcow2(tmp_path / "middle.qcow2", backing="base.raw", backing_format="raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="middle.qcow2")
    node = await open_image(top)
    assert [layer[1] for layer in layers(node)] == ["qcow2", "qcow2", "raw"]
    await node.aclose()
    assert len(caplog.records) == 1
    assert 'taken for "qcow2": if it is a raw disk' in caplog.text
    caplog.clear()
    guess = make_qcow2(tmp_path / "guess.qcow2", backing="base.raw")
    node = await open_image(guess)
    assert [layer[1] for layer in layers(node)] == ["qcow2", "raw"]
    await node.aclose()
    assert len(caplog.records) == 1
    assert "base.raw" in caplog.text
    node = await open_image(guess, backing_format="raw")
    await node.aclose()
    assert len(caplog.records) == 1


async def test_a_raw_base_that_looks_like_an_image_stays_raw(tmp_path: Path) -> None:
    """Stated raw, a qcow2 header that a guest wrote opens no file that it names."""
    base = make_qcow2(tmp_path / "base.raw", backing="/etc/shadow", backing_format="raw")
    os.truncate(base, 1 << 20)
    top = make_qcow2(tmp_path / "top.qcow2", backing="base.raw", backing_format="raw")
    node = await open_image(top)
    assert [layer[1] for layer in layers(node)] == ["qcow2", "raw"]
    assert (await content(node))[:4] == b"QFI\xfb"
    await node.aclose()


async def test_a_json_name_opens_its_file(tmp_path: Path) -> None:
    """The plain kind of json name states file and format."""
    make_raw(tmp_path / "base.raw", fill=b"j")
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}'
    node = await open_image(make_qcow2(tmp_path / "top.qcow2", backing=name))
    assert await content(node) == b"j" * 16
    await node.aclose()


async def test_without_backing_none_is_opened(tmp_path: Path) -> None:
    """`backing=False` opens an image whose backing file is missing."""
    top = make_qcow2(tmp_path / "top.qcow2", backing="gone", backing_format="raw")
    node = await open_image(top, read_only=True, backing=False)
    assert node.backing is None
    await node.aclose()


async def test_a_missing_backing_file_is_named_with_its_image(tmp_path: Path) -> None:
    """The message has both names and the error ENOENT; nothing stays locked."""
    make_qcow2(tmp_path / "middle.qcow2", backing="gone.raw", backing_format="raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="middle.qcow2", backing_format="qcow2")
    error = await refusal(NotFound, top)
    assert '"gone.raw"' in str(error)
    assert str(tmp_path / "middle.qcow2") in str(error)
    node = await open_image(top, backing=False)
    await node.aclose()


async def test_a_backing_file_that_is_no_image(tmp_path: Path) -> None:
    """A folder, a FIFO, an unreadable format, an unsupported one: each names both files."""
    os.mkfifo(tmp_path / "fifo")
    make_raw(tmp_path / "plain", fill=b"p")
    cases: list[tuple[str, str | None, type[QcowfsError], str]] = [
        (".", "raw", BadRequest, "directory"),
        ("fifo", "raw", BadRequest, "FIFO"),
        ("/dev/zero", "raw", BadRequest, "character device"),
        ("plain", "qcow2", BadRequest, "not a qcow2 image"),
        ("plain", "vmdk", UnsupportedFeature, "vmdk"),
        ("nbd://host", "raw", UnsupportedFeature, "nbd"),
        ("a\0b", "raw", BadRequest, "name"),
        ("plain/", "raw", QcowfsError, ""),
    ]
    for number, (name, stated, kind, word) in enumerate(cases[:-1]):
        top = make_qcow2(tmp_path / f"{number}.qcow2", backing=name, backing_format=stated)
        error = await refusal(kind, top, read_only=True)
        assert word in str(error)
        assert str(top) in str(error)
    top = make_qcow2(tmp_path / "last.qcow2", backing="plain/", backing_format="raw")
    host_error = await refusal(OSError, top, read_only=True)
    assert isinstance(host_error, OSError)
    assert host_error.errno == errno.ENOTDIR
    assert str(top) in str(host_error)


async def test_terminal_codes_in_names_are_escaped(tmp_path: Path) -> None:
    """A name out of an image reaches a message with its control characters escaped."""
    top = make_qcow2(tmp_path / "top.qcow2", backing="\x1b[2Jgone", backing_format="raw")
    assert "\\x1b[2Jgone" in str(await refusal(NotFound, top))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3])
async def test_a_loop_is_found(tmp_path: Path, length: int, read_only: bool) -> None:
    """A chain that comes back to a file of its own, by any name of it, is refused."""
    for number in range(length):
        next_name = f"{(number + 1) % length}.qcow2"
        if number == length - 1:
            (tmp_path / "link").symlink_to(next_name)
            next_name = "link"
        make_qcow2(tmp_path / f"{number}.qcow2", backing=next_name, backing_format="qcow2")
    assert "loop" in str(await refusal(CorruptImage, tmp_path / "0.qcow2", read_only=read_only))


async def test_a_long_chain_opens_and_a_longer_one_does_not(tmp_path: Path) -> None:
    """The limit is generous, a read through it works, and one layer more is refused."""
    make_raw(tmp_path / "0", fill=b"d")
    template = make_qcow2(tmp_path / "template", backing="0", backing_format="raw")
    for number in range(1, opening.MAX_CHAIN_DEPTH + 1):
        path = tmp_path / str(number)
        shutil.copy(template, path)
        stated = "raw" if number == 1 else "qcow2"
        change_header(path, backing_file=b"%d" % (number - 1), backing_format=stated)
    node = await open_image(tmp_path / str(opening.MAX_CHAIN_DEPTH - 1))
    assert len(layers(node)) == opening.MAX_CHAIN_DEPTH
    assert await content(node) == b"d" * 16
    assert bytes(node.try_read(0, 16) or b"") in {b"", b"d" * 16}
    await node.write_from(100, b"top")
    assert await content(node, 5, 99) == b"dtopd"
    await node.aclose()
    path = tmp_path / str(opening.MAX_CHAIN_DEPTH)
    assert "layers" in str(await refusal(UnsupportedFeature, path))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[HostFile]:
    """Every host file that is opened during the test."""
    files: list[HostFile] = []
    real: Callable[..., Any] = HostFile.open

    async def watch(*arguments: Any, **options: Any) -> HostFile:
        file: HostFile = await real(*arguments, **options)
        files.append(file)
        return file

    monkeypatch.setattr(HostFile, "open", watch)
    return files


async def test_a_failure_in_the_middle_closes_everything(
    tmp_path: Path, opened: list[HostFile]
) -> None:
    """When the top cannot be made after the layers below were, no file stays open."""
    make_raw(tmp_path / "base.raw")
    make_qcow2(tmp_path / "middle.qcow2", backing="base.raw", backing_format="raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="middle.qcow2", backing_format="qcow2")
    change_header(top, incompatible=2)
    await refusal(CorruptImage, top)
    assert len(opened) == 3
    for file in opened:
        with pytest.raises(OSError, match=r"\[Errno 9\]"):
            file.size()


async def test_closing_the_node_closes_the_chain(tmp_path: Path, opened: list[HostFile]) -> None:
    """One close releases the files of all layers."""
    make_raw(tmp_path / "base.raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="base.raw", backing_format="raw")
    node = await open_image(top)
    await node.aclose()
    assert len(opened) == 2
    for file in opened:
        with pytest.raises(OSError, match=r"\[Errno 9\]"):
            file.size()


# Locks


async def test_two_writers_never_meet(tmp_path: Path) -> None:
    """Of an image that is being written no second opening succeeds, but one by force."""
    top = make_qcow2(tmp_path / "top.qcow2")
    node = await open_image(top)
    assert "write" in str(await refusal(ImageBusy, top))
    await refusal(ImageBusy, top, read_only=True)
    other = await open_image(top, read_only=True, force_share=True)
    await other.aclose()
    await node.aclose()
    node = await open_image(top, read_only=True)
    other = await open_image(top, read_only=True)
    await refusal(ImageBusy, top)
    await node.aclose()
    await other.aclose()


async def test_a_backing_file_in_use_is_not_written(tmp_path: Path) -> None:
    """A base below an open overlay cannot be opened for writing, nor the other way round."""
    make_raw(tmp_path / "base.raw")
    base = make_qcow2(tmp_path / "base.qcow2", backing="base.raw", backing_format="raw")
    top = make_qcow2(tmp_path / "top.qcow2", backing="base.qcow2", backing_format="qcow2")
    node = await open_image(top)
    await refusal(ImageBusy, base)
    await refusal(ImageBusy, tmp_path / "base.raw", format="raw")
    await node.aclose()
    node = await open_image(base)
    error = await refusal(ImageBusy, top)
    assert str(top) in str(error)
    await node.aclose()


async def test_one_base_serves_many_overlays(tmp_path: Path) -> None:
    """Readers of one base do not shut each other out."""
    make_raw(tmp_path / "base.raw", fill=b"s")
    nodes = []
    for number in range(3):
        top = make_qcow2(tmp_path / f"{number}.qcow2", backing="base.raw", backing_format="raw")
        nodes.append(await open_image(top))
    for node in nodes:
        assert await content(node) == b"s" * 16
        await node.aclose()


async def test_sharing_by_force_does_not_write(tmp_path: Path) -> None:
    """`force_share` without `read_only` is refused."""
    await refusal(BadRequest, make_qcow2(tmp_path / "a.qcow2"), force_share=True)


async def test_reading_changes_no_byte(tmp_path: Path) -> None:
    """Opening, reading and closing read-only leaves every file of the chain as it was."""
    make_raw(tmp_path / "base.raw", fill=b"b")
    top = make_qcow2(tmp_path / "top.qcow2", backing="base.raw", backing_format="raw")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    node = await open_image(top, read_only=True)
    await content(node, 4096)
    await node.flush()
    await node.aclose()
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert before == after
