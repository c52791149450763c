"""Chains of any mixture of formats, parts of raw files, and what confines a chain to a folder."""

import json
import os
import random
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.qcow1_create import create_qcow1
from qcowfs.driver.qcow2.create import create_qcow2
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.driver.uml_cow_create import create_cow
from qcowfs.driver.window import WindowStorage
from qcowfs.errors import (
    BadRequest,
    CorruptImage,
    KeyRequired,
    QcowfsError,
    ReadOnlyImage,
    UnsupportedFeature,
)
from tests.driver import contract
from tests.driver.qcow1_images import KEY, compressed_image
from tests.fakes import MemoryFile

SIZE = 600 * 1024
ORDER = ("qcow2", "qcow", "cow", "qcow", "raw")


@dataclass(frozen=True)
class Variant:
    """What is special about one layer of the chain; depth 0 is the top."""

    what: str
    depth: int


def variants() -> list[Variant]:
    """Each layer alone encrypted, compressed, shorter and longer than the others."""
    found = [Variant("nothing", 0)]
    for what in ("encrypted", "compressed", "shorter", "longer"):
        # A raw base can be neither encrypted nor compressed.
        layer_count = 4 if what in {"encrypted", "compressed"} else 5
        found += [Variant(what, depth) for depth in range(layer_count)]
    return found


def size_of(variant: Variant, depth: int) -> int:
    """How long the disk of a layer is."""
    if depth != variant.depth:
        return SIZE
    return {"shorter": SIZE * 2 // 3, "longer": SIZE * 4 // 3}.get(variant.what, SIZE) // 512 * 512


async def make_layer(
    folder: Path, variant: Variant, depth: int, below: bytes | None
) -> bytes:
    """Make the file of one layer over the one below, write to it, and answer what it shows."""
    rng = random.Random(100 + depth)
    size = size_of(variant, depth)
    path, name = folder / f"layer{depth}", f"layer{depth + 1}"
    kind = ORDER[depth]
    is_special = depth == variant.depth
    if is_special and variant.what in {"encrypted", "compressed"} and kind != "qcow2":
        kind = "qcow"
    if is_special and variant.what == "encrypted":
        kind = "qcow"
    if below is None:
        content = bytearray(contract.pattern(size, seed=depth + 1))
        path.write_bytes(content)
        return bytes(content)
    content = bytearray(below[:size].ljust(size, b"\0"))
    if kind == "qcow2":
        lower = ORDER[depth + 1]
        await create_qcow2(path, size, cluster_size=4096, backing_file=name, backing_format=lower)
        if is_special and variant.what == "compressed":
            run("qemu-io", "-c", "write -c -P 7 8k 4k", "-c", "write -c -P 8 64k 4k",
                "--image-opts", f"driver=qcow2,backing=,file.filename={path}")  # fmt: skip
            content[8192:12288] = b"\x07" * 4096
            content[65536:69632] = b"\x08" * 4096
    elif kind == "qcow":
        encrypted = is_special and variant.what == "encrypted"
        await create_qcow1(
            path, size, cluster_size=4096, backing_file=name, encryption=encrypted
        )
        if is_special and variant.what == "compressed":
            text = b"".join(rng.randbytes(16) * 32 for _ in range(size // 512))
            path.write_bytes(compressed_image(path.read_bytes(), text))
            for start in range(0, size, 8192):
                content[start : start + 4096] = text[start : start + 4096]
    else:
        mtime = int((folder / name).stat().st_mtime)
        await create_cow(path, size, backing_file=name, mtime=mtime)
    node = await open_image(path, key=KEY)
    await change(node, content, rng)
    await node.aclose()
    return bytes(content)


async def change(node: Node, content: bytearray, rng: random.Random) -> None:
    """A few writes and zeroings, into the model too."""
    for number in range(14):
        start, length = contract.random_range(rng, len(content))
        length = min(length, 20_000)
        if number % 4 == 3:
            data = bytes(length)
            await node.write_zeroes(start, length)
        else:
            data = rng.randbytes(length)
            await contract.write(node, start, data)
        content[start : start + length] = data


def run(*command: str | Path) -> str:
    """Run a tool that has to succeed."""
    done = subprocess.run(
        [os.fspath(word) for word in command],
        check=False,
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.expects_warnings
@pytest.mark.parametrize("variant", variants(), ids=lambda one: f"{one.what}-{one.depth}")
async def test_five_layers(variant: Variant, tmp_path: Path) -> None:
    """A qcow2 over a qcow over a COW over a qcow over raw reads and writes as its layers say."""
    content: bytes | None = None
    contents = {}
    for depth in (4, 3, 2, 1, 0):
        content = contents[depth] = await make_layer(tmp_path, variant, depth, content)
    files = {depth: (tmp_path / f"layer{depth}").read_bytes() for depth in range(1, 5)}
    model = bytearray(contents[0])
    node = await open_image(tmp_path / "layer0", key=KEY)
    assert await contract.whole(node) == model
    rng = random.Random(5)
    await change(node, model, rng)
    await node.flush()
    assert await contract.whole(node) == model
    await node.aclose()
    node = await open_image(tmp_path / "layer0", key=KEY, read_only=True)
    assert await contract.whole(node) == model
    depth = 0
    layer: Node | None = node
    while layer is not None:
        assert layer.virtual_size == len(contents[depth])
        layer, depth = layer.backing, depth + 1
    assert depth == 5
    await node.aclose()
    for depth, data in files.items():
        assert (tmp_path / f"layer{depth}").read_bytes() == data, "a backing file was written to"


@pytest.mark.expects_warnings
async def test_qemu_reads_the_same_chain(tmp_path: Path) -> None:
    """A qcow2 over a qcow over raw, written to here, is the same disk to QEMU."""
    (tmp_path / "base.raw").write_bytes(content := contract.pattern(SIZE))
    await create_qcow1(tmp_path / "middle", SIZE, backing_file="base.raw")
    await create_qcow2(tmp_path / "top", SIZE, backing_file="middle", backing_format="qcow")
    model = bytearray(content)
    for name in ("middle", "top"):
        node = await open_image(tmp_path / name)
        await change(node, model, random.Random(len(name)))
        await node.aclose()
    run("qemu-img", "convert", "-O", "raw", tmp_path / "top", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == model


async def test_an_encrypted_layer_needs_its_key(tmp_path: Path) -> None:
    """Without a passphrase the chain is refused in one line that names the layer."""
    await create_qcow1(tmp_path / "base", SIZE, encryption=True)
    await create_qcow2(tmp_path / "top", SIZE, backing_file="base", backing_format="qcow")
    with pytest.raises(KeyRequired, match='backing file "base"'):
        await open_image(tmp_path / "top")
    node = await open_image(tmp_path / "top", key=b"secret")
    await node.aclose()


# Names


async def test_a_part_of_a_file_as_backing_file(tmp_path: Path) -> None:
    """A json: name of the driver raw with offset and size means those bytes, and no others."""
    content = contract.pattern(64 * 1024)
    (tmp_path / "big").write_bytes(b"!" * 1536 + content + b"!" * 4096)
    name = "json:" + json.dumps(
        {"driver": "raw", "offset": 1536, "size": str(len(content)),
         "file": {"driver": "file", "filename": "big"}}
    )  # fmt: skip
    await create_qcow2(tmp_path / "top", SIZE, backing_file=name)
    node = await open_image(tmp_path / "top")
    assert await contract.whole(node) == content.ljust(SIZE, b"\0")
    assert node.backing is not None
    assert node.backing.format_name == "raw"
    await node.aclose()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"offset": 1 << 20}, "outside of the file"),
        ({"offset": 512, "size": 65536}, "past the file"),
        ({"size": 1000}, "multiple of 512"),
        ({"driver": "qcow", "offset": 512}, "for the driver raw alone"),
        ({"driver": "nbd", "server": "x"}, '"nbd"'),
        ({"file": {"driver": "ssh", "filename": "x"}}, '"ssh"'),
    ],
)
async def test_names_that_are_refused(
    options: dict[str, object], cause: str, tmp_path: Path
) -> None:
    """A part that is not inside the file, or a protocol: one line that names it, nothing opened."""
    (tmp_path / "base").write_bytes(bytes(65536))
    name = {"driver": "raw", "file": {"driver": "file", "filename": "base"}, **options}
    await create_qcow2(tmp_path / "top", SIZE, backing_file="json:" + json.dumps(name))
    with pytest.raises(QcowfsError) as caught:
        await open_image(tmp_path / "top")
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", ["qcow", "cow"])
@pytest.mark.parametrize(
    "name", ["nbd://host/x", "fat:/tmp", 'json:{"driver":"ssh","host":"h"}', "missing", "top"]
)
async def test_backing_names_of_the_other_formats(make: str, name: str, tmp_path: Path) -> None:
    """What qcow and COW headers name goes through the same refusals: protocols, loops, no file."""
    path = tmp_path / "top"
    if make == "qcow":
        await create_qcow1(path, SIZE, backing_file=name if name != "top" else "./other")
    else:
        await create_cow(path, SIZE, backing_file=name if name != "top" else "./other")
    if name == "top":
        os.link(path, tmp_path / "other")
    with pytest.raises(QcowfsError) as caught:
        await open_image(path)
    assert "\n" not in str(caught.value)


# The backing root


async def test_a_chain_inside_its_root(tmp_path: Path) -> None:
    """Every backing file has to lie below the root, wherever the links to it lie."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "base.raw").write_bytes(b"in" * 512)
    (outside / "base.raw").write_bytes(b"no" * 512)
    (outside / "to-inside").symlink_to(root / "base.raw")
    (root / "to-outside").symlink_to(outside / "base.raw")
    cases: list[tuple[str, bool]] = [
        ("root/base.raw", True),
        (os.fspath(root / "base.raw"), True),
        ("outside/to-inside", True),
        ("root/../root/base.raw", True),
        ("outside/base.raw", False),
        ("root/to-outside", False),
        ("root/../outside/base.raw", False),
    ]
    for name, is_inside in cases:
        (tmp_path / "top").unlink(missing_ok=True)
        await create_qcow2(tmp_path / "top", SIZE, backing_file=name, backing_format="raw")
        if is_inside:
            node = await open_image(tmp_path / "top", backing_root=root)
            assert await contract.read(node, 0, 4) == b"inin"
            await node.aclose()
        else:
            with pytest.raises(BadRequest, match="outside of the backing root"):
                await open_image(tmp_path / "top", backing_root=root)
    (tmp_path / "rootless").mkdir()
    with pytest.raises(BadRequest, match="outside"):
        await create_qcow2(tmp_path / "top", SIZE, backing_file="root/base.raw",
                           backing_format="raw")  # fmt: skip
        await open_image(tmp_path / "top", backing_root=tmp_path / "rootless")
    with pytest.raises(FileNotFoundError):
        await open_image(tmp_path / "top", backing_root=tmp_path / "nothing")


@pytest.mark.expects_warnings
async def test_the_root_holds_for_the_whole_chain(tmp_path: Path) -> None:
    """A layer below the first one is confined as well."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    await create_qcow1(root / "middle", SIZE, backing_file="../base.raw")
    await create_cow(root / "top", SIZE, backing_file="middle")
    with pytest.raises(BadRequest, match="base.raw"):
        await open_image(root / "top", backing_root=root)
    node = await open_image(root / "top", backing_root=tmp_path)
    await node.aclose()


async def test_a_file_that_is_exchanged_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened counts, not what its name means by the time it is looked at."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 1024)
    (root / "inside").write_bytes(bytes(6144))
    link = root / "base"
    link.symlink_to(outside / "secret")
    await create_qcow2(root / "top", SIZE, backing_file="base", backing_format="raw")
    original = HostFile.open

    async def exchanging(path: str, **options: object) -> HostFile:
        file: HostFile = await original(path, **options)  # type: ignore[arg-type]
        if Path(path) == link:
            link.unlink()
            link.symlink_to(root / "inside")
        return file

    monkeypatch.setattr(HostFile, "open", exchanging)
    with pytest.raises(BadRequest, match="replaced"):
        await open_image(root / "top", backing_root=root)


# Windows


async def test_a_window_shows_its_bytes_alone() -> None:
    """Reads stop at the window's ends, whatever lies around it, on the waiting path too."""
    file = MemoryFile(b"a" * 1000 + b"w" * 1024 + b"z" * 1000, miss_rate=0.5)
    window = WindowStorage(file, 1000, 1024)
    assert window.size() == 1024
    for start, length in ((0, 1024), (1000, 100), (1024, 10), (5000, 10), (0, 3000)):
        wanted = (b"w" * max(0, min(length, 1024 - start))).ljust(length, b"\0")
        assert await window.pread(length, start) == wanted
        one, two = bytearray(length // 2), bytearray(length - length // 2)
        if window.try_pread_into((memoryview(one), memoryview(two)), start):
            assert one + two == wanted
    runs = window.data_runs(0, 2048)
    assert sum(run.length for run in runs) == 2048
    changes: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: window.pwrite((b"x",), 0),
        lambda: window.write_zeroes(0, 1),
        lambda: window.truncate(0),
        lambda: window.punch(0, 1),
    )
    for refused in changes:
        with pytest.raises(ReadOnlyImage):
            await refused()
    with pytest.raises(ReadOnlyImage):
        window.try_pwrite((b"x",), 0)
    await window.aclose()
    assert file.closed


async def test_refusals_say_what_is_wrong_with_a_layer(tmp_path: Path) -> None:
    """A broken header below is told with the names of both files, and nothing stays open."""
    (tmp_path / "base").write_bytes(b"OOOM\0\0\0\2" + bytes(9000))
    await create_qcow2(tmp_path / "top", SIZE, backing_file="base", backing_format="cow")
    with pytest.raises(CorruptImage, match='backing file "base" of'):
        await open_image(tmp_path / "top")
    (tmp_path / "base").write_bytes(b"QFI\xfb\0\0\0\1" + bytes(100))
    await create_qcow2(tmp_path / "other", SIZE, backing_file="base", backing_format="qcow")
    with pytest.raises(CorruptImage, match="cluster_bits"):
        await open_image(tmp_path / "other")
    await create_qcow2(tmp_path / "third", SIZE, backing_file="base", backing_format="vmdk")
    with pytest.raises(UnsupportedFeature, match="vmdk"):
        await open_image(tmp_path / "third")


@pytest.mark.parametrize("kind", ["qcow", "cow"])
async def test_locks_as_qemu_has_them(kind: str, tmp_path: Path) -> None:
    """Both formats are locked as QEMU locks an image of any format; two writers never meet."""
    path = tmp_path / "image"
    if kind == "qcow":
        await create_qcow1(path, SIZE)
    else:
        await create_cow(path, SIZE)
    node = await open_image(path)
    with pytest.raises(QcowfsError, match='"write" lock'):
        await HostFile.open(path, writable=True, role=LockRole.QCOW2_WRITE)
    await node.aclose()
    node = await open_image(path, read_only=True)
    other = await open_image(path, read_only=True)
    with pytest.raises(QcowfsError, match="lock"):
        await open_image(path)
    await other.aclose()
    await node.aclose()
