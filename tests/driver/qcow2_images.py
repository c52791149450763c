"""qcow2 images made by qemu-img, opened over storages in memory, and judged by qemu-img."""

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.node import Node
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.qcow2.metadata import ABSENT
from qcowfs.driver.raw import RawNode
from qcowfs.driver.storage import Buffer, Storage
from tests.fakes import MemoryFile

KIB = 1 << 10
MIB = 1 << 20


def run(*command: str) -> str:
    """Run a tool that must succeed; its standard output."""
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    ).stdout


@functools.lru_cache(maxsize=128)
def make_image(
    size: int = MIB,
    options: str = "",
    *,
    content: bytes | None = None,
    compressed: bool = False,
    backing: bytes | None = None,
    commands: Sequence[str] = (),
    snapshots: Sequence[str] = (),
) -> bytes:
    """The bytes of an image: empty, or converted from `content`.

    `backing` is what the backing file had when the image was made; qemu-io
    `commands` run on the image, then `snapshots` are taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "image.qcow2")
        wanted = ["-o", options] if options else []
        if content is not None:
            source = Path(folder) / "source.raw"
            source.write_bytes(content)
            flags = ["-c"] if compressed else []
            run("qemu-img", "convert", "-q", *flags, "-f", "raw", "-O", "qcow2", *wanted,
                str(source), image)  # fmt: skip
        else:
            base: list[str] = []
            if backing is not None:
                (Path(folder) / "base.raw").write_bytes(backing)
                base = ["-b", "base.raw", "-F", "raw"]
            run("qemu-img", "create", "-q", "-f", "qcow2", *wanted, *base, image, str(size))
        for command in commands:
            run("qemu-io", "-f", "qcow2", "-c", command, image)
        for name in snapshots:
            run("qemu-img", "snapshot", "-c", name, image)
        return Path(image).read_bytes()


async def open_node(
    image: bytes | Storage,
    *,
    backing: Node | bytes | None = None,
    read_only: bool = False,
    miss_rate: float = 0.0,
    refusal_rate: float = 0.0,
    cache_size: int = MIB,
) -> Qcow2Node:
    """The node of an image, over a MemoryFile of its own if bytes are given."""
    storage = image
    if isinstance(image, bytes):
        storage = MemoryFile(
            image, read_only=read_only, miss_rate=miss_rate, refusal_rate=refusal_rate, seed=5
        )
    if isinstance(backing, bytes):
        backing = RawNode(MemoryFile(backing, read_only=True, miss_rate=miss_rate, seed=6))
    assert not isinstance(storage, bytes)
    return await open_qcow2(
        storage, path="image.qcow2", read_only=read_only, backing=backing, cache_size=cache_size
    )


def assert_sound(
    image: Buffer, expected: Buffer | None = None, *, backing: bytes | None = None, leaks: int = 0
) -> None:
    """qemu-img finds no error (and so many leaks at most), and reads `expected`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        path.write_bytes(image)
        if backing is not None:
            (Path(folder) / "base.raw").write_bytes(backing)
        done = subprocess.run(
            ["qemu-img", "check", "-f", "qcow2", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found = done.stdout + done.stderr
        assert done.returncode == 0 or (leaks and done.returncode == 3), found
        if done.returncode == 3:
            assert found.count("Leaked cluster") <= leaks, found
        if expected is not None:
            model = Path(folder) / "model.raw"
            model.write_bytes(expected)
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(model), str(path))


async def close_and_judge(
    node: Qcow2Node, expected: Buffer | None = None, *, backing: bytes | None = None, leaks: int = 0
) -> None:
    """Close a node over a MemoryFile and let qemu-img judge what is left."""
    storage = node.metadata.storage
    await node.aclose()
    while not isinstance(storage, MemoryFile):
        storage = storage.inner  # type: ignore[attr-defined]
    assert_sound(storage.content, expected, backing=backing, leaks=leaks)


async def read(node: Node, guest_offset: int, length: int) -> bytes:
    """The bytes by the waiting call."""
    buffer = bytearray(b"\xa5" * length)
    await node.read_into(guest_offset, memoryview(buffer))
    return bytes(buffer)


def entry_of(node: Qcow2Node, guest_offset: int) -> tuple[int, int]:
    """The L2 entry and bitmap (0 without extended L2) that map `guest_offset` now."""
    metadata = node.metadata
    geometry = metadata.geometry
    piece = metadata.load_now(metadata.active, guest_offset)
    assert piece is not None
    if piece is ABSENT:
        return 0, 0
    index = (guest_offset >> geometry.cluster_bits) % metadata.tables.slice_entry_count
    if geometry.extended_l2:
        return piece.words[2 * index], piece.words[2 * index + 1]
    return piece.words[index], 0


def entry_place(image: Buffer, guest_offset: int) -> int:
    """The place in the file of the L2 entry that maps `guest_offset`; standard entries."""
    head = bytes(image[:104])
    cluster_bits = int.from_bytes(head[20:24], "big")
    l1_table_offset = int.from_bytes(head[40:48], "big")
    l2_bits = cluster_bits - 3
    l1_place = l1_table_offset + 8 * (guest_offset >> (cluster_bits + l2_bits))
    table = int.from_bytes(image[l1_place : l1_place + 8], "big") & OFFSET_MASK
    assert table
    return table + 8 * (guest_offset >> cluster_bits & (1 << l2_bits) - 1)


def with_entry(image: bytes, guest_offset: int, entry: int) -> bytes:
    """The image with another L2 entry for one cluster."""
    place = entry_place(image, guest_offset)
    return image[:place] + entry.to_bytes(8, "big") + image[place + 8 :]
