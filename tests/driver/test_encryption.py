"""Encrypted images: reading, writing, copy-on-write, snapshots, passphrases; QEMU is the judge."""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.node import Node
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.errors import KeyRequired
from tests.driver.encrypted_images import (
    CIPHERS,
    PASSPHRASE,
    assert_encrypted,
    make_encrypted,
)
from tests.fakes import MemoryFile

KIB = 1 << 10
MIB = 1 << 20

# (cipher, options of qemu-img create, size)
SHAPES = [
    ("aes-256-xts-plain64", "cluster_size=64k", 2 * MIB + 512),
    ("aes-256-xts-plain64", "cluster_size=512", 128 * KIB + 512),
    ("aes-128-xts-plain64", "cluster_size=4k", 512 * KIB),
    ("aes-256-cbc-plain64", "cluster_size=16k,extended_l2=on", MIB + 1024),
    ("aes-256-xts-plain64", "cluster_size=64k,extended_l2=on", 2 * MIB),
    ("aes-256-cbc-essiv:sha256", "cluster_size=2M", 5 * MIB),
    ("aes", "cluster_size=64k", MIB + 512),
    ("aes", "cluster_size=16k,extended_l2=on", MIB),
    ("aes", "cluster_size=4k,compat=0.10", 512 * KIB),
]


async def open_memory(
    image: bytes | MemoryFile,
    *,
    secret: bytes | None = PASSPHRASE,
    read_only: bool = False,
    miss_rate: float = 0.0,
    backing: Node | None = None,
) -> Qcow2Node:
    """The node of an image in memory."""
    storage = image
    if isinstance(storage, bytes):
        storage = MemoryFile(
            storage, read_only=read_only, miss_rate=miss_rate, refusal_rate=miss_rate, seed=3
        )
    return await open_qcow2(
        storage, path="image.qcow2", read_only=read_only, backing=backing, secret=secret
    )


async def read_all(node: Node) -> bytes:
    """Every guest byte, in one request."""
    content = bytearray(node.virtual_size)
    await node.read_into(0, memoryview(content))
    return bytes(content)


async def write_either_way(node: Node, guest_offset: int, data: bytes) -> None:
    """As the lane writes: without waiting if possible."""
    if not node.try_write(guest_offset, data):
        await node.write_from(guest_offset, data)


async def random_steps(node: Qcow2Node, model: bytearray, seed: int, count: int) -> None:
    """Writes, zeroes, discards and reads at any alignment, on the node and on the model."""
    chance = random.Random(seed)
    size = len(model)
    for _ in range(count):
        length = min(chance.choice((1, 511, 512, 700, 4096, 9000, 70_000, 300_000)), size)
        start = chance.randrange(size - length + 1)
        if chance.random() < 0.5:
            start &= -512
        kind = chance.random()
        if kind < 0.6:
            data = chance.randbytes(length)
            await write_either_way(node, start, data)
            model[start : start + length] = data
        elif kind < 0.7:
            await node.write_zeroes(start, length, unmap=chance.random() < 0.5)
            model[start : start + length] = bytes(length)
        elif kind < 0.75:
            start, length = start & -4096, length & -4096
            await node.discard(start, length)
            content = bytearray(length)
            await node.read_into(start, memoryview(content))
            model[start : start + length] = content
        elif kind < 0.8:
            await node.flush()
        else:
            content = bytearray(length)
            if not node.try_read_into(start, memoryview(content)):
                await node.read_into(start, memoryview(content))
            assert content == model[start : start + length], f"{start:#x} {length}"


@pytest.mark.parametrize(("cipher", "options", "size"), SHAPES)
async def test_what_qemu_wrote_is_read(cipher: str, options: str, size: int) -> None:
    """Guest bytes that QEMU encrypted are read at any alignment, at once and by waiting."""
    commands = (f"write -P 7 0 {64 * KIB}", f"write -P 9 {100 * 512} 1024", "write -z 8k 4k")
    image = make_encrypted(cipher, size, options, commands=commands)
    expected = bytearray(size)
    expected[: 64 * KIB] = b"\7" * (64 * KIB)
    expected[100 * 512 : 102 * 512] = b"\x09" * 1024
    expected[8 * KIB : 12 * KIB] = bytes(4 * KIB)
    for miss_rate in (0.0, 0.6):
        node = await open_memory(image, read_only=True, miss_rate=miss_rate)
        assert await read_all(node) == expected
        for start, length in ((1, 3), (511, 2), (8 * KIB - 5, 9), (100 * 512 - 1, 1026)):
            content = bytearray(length)
            if not node.try_read_into(start, memoryview(content)):
                await node.read_into(start, memoryview(content))
            assert content == expected[start : start + length]
        await node.aclose()


@pytest.mark.parametrize("miss_rate", [0.0, 0.5])
@pytest.mark.parametrize(("cipher", "options", "size"), SHAPES)
async def test_what_is_written_is_read_by_qemu(
    tmp_path: Path, cipher: str, options: str, size: int, miss_rate: float
) -> None:
    """Random writes, zeroes and discards leave a sound image with the bytes written."""
    storage = MemoryFile(
        make_encrypted(cipher, size, options), miss_rate=miss_rate, refusal_rate=miss_rate, seed=11
    )
    node = await open_memory(storage)
    model = bytearray(size)
    await random_steps(node, model, seed=size + int(miss_rate * 10), count=120)
    assert await read_all(node) == model
    await node.aclose()
    path = tmp_path / "image.qcow2"
    path.write_bytes(bytes(storage.content))
    assert_encrypted(path, cipher, model)
