"""Encrypted images: reading, writing, copy-on-write, snapshots, passphrases; QEMU is the judge."""

import random
import struct
from pathlib import Path

import pytest
import trio

from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.qcow2.new_luks import Encryption
from qcowfs.driver.secrets import Secrets
from qcowfs.errors import BadRequest, CorruptImage, KeyRequired, UnsupportedFeature
from tests.driver.encrypted_images import PASSPHRASE, assert_encrypted, make_encrypted
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


@pytest.mark.parametrize("shape", [0, 4, 6], ids=lambda number: SHAPES[number][0])
async def test_snapshots(tmp_path: Path, shape: int) -> None:
    """A snapshot keeps its bytes while what it shares is copied, and can be applied again."""
    cipher, options, size = SHAPES[shape]
    storage = MemoryFile(make_encrypted(cipher, size, options), miss_rate=0.3, seed=2)
    node = await open_memory(storage)
    model = bytearray(size)
    await random_steps(node, model, seed=1, count=40)
    snapshot = await node.create_snapshot(b"one")
    before = bytes(model)
    await random_steps(node, model, seed=2, count=40)
    assert await read_all(await node.open_snapshot(snapshot)) == before
    assert await read_all(node) == model
    await node.aclose()
    path = tmp_path / "image.qcow2"
    path.write_bytes(storage.content)
    assert_encrypted(path, cipher, model)
    node = await open_memory(bytes(storage.content))
    storage = node.metadata.storage
    assert isinstance(storage, MemoryFile)
    await node.apply_snapshot(b"one")
    assert await read_all(node) == before
    await node.aclose()
    path.write_bytes(storage.content)
    assert_encrypted(path, cipher, before)


@pytest.mark.parametrize("shape", [0, 4, 6], ids=lambda number: SHAPES[number][0])
async def test_writes_in_one_sector_at_once(shape: int) -> None:
    """Tasks that write different bytes of the same sectors do not undo each other."""
    cipher, options, size = SHAPES[shape]
    storage = MemoryFile(
        make_encrypted(cipher, size, options), miss_rate=0.5, refusal_rate=0.7, seed=7
    )
    node = await open_memory(storage)
    model = bytearray(size)
    start, piece = 64 * KIB - 700, 50

    async def write(number: int) -> None:
        for turn in range(3):
            data = bytes([number * 3 + turn + 1]) * piece
            where = start + number * piece
            if turn < 2:
                await node.write_from(where, data)
            else:
                await write_either_way(node, where, data)
            model[where : where + piece] = data

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(write, number)
    assert await read_all(node) == model
    await node.aclose()


async def test_zeroing_beside_writes_of_parts_of_sectors() -> None:
    """What a zeroing took away does not come back with the rest of a sector being written."""
    cipher, options, size = SHAPES[0]
    image = make_encrypted(cipher, size, options)
    for seed in range(12):
        storage = MemoryFile(image, miss_rate=0.6, refusal_rate=0.9, seed=seed)
        node = await open_memory(storage)
        await node.write_from(0, b"x" * (128 * KIB))

        async def zero(node: Qcow2Node = node) -> None:
            await node.write_zeroes(0, 128 * KIB)

        async def write(node: Qcow2Node = node) -> None:
            await node.write_from(100, b"y" * 10)

        async with trio.open_nursery() as nursery:
            for job in (zero, write) if seed % 2 else (write, zero):
                nursery.start_soon(job)
        content = await read_all(node)
        assert content[:100] == bytes(100)
        assert content[110:] == bytes(size - 110)
        assert content[100:110] in (bytes(10), b"y" * 10)
        await node.aclose()


async def test_an_encrypted_overlay_and_an_encrypted_base(tmp_path: Path) -> None:
    """Each layer is opened by its own passphrase, whichever of them is encrypted."""
    content = random.Random(9).randbytes(2 * MIB)
    cipher, options, _ = SHAPES[0]
    base = await open_memory(MemoryFile(make_encrypted(cipher, 2 * MIB, options)))
    await base.write_from(0, content)
    other = make_encrypted("aes-128-xts-plain64", 2 * MIB, "cluster_size=4k")
    top = await open_memory(MemoryFile(other), backing=base)
    model = bytearray(content)
    assert await read_all(top) == content
    for start in (0, 4096 * 7 + 13, MIB - 3):
        await top.write_from(start, b"new bytes")
        model[start : start + 9] = b"new bytes"
    assert await read_all(top) == model
    await top.aclose()


@pytest.mark.parametrize("secret", [None, b"", b"wrong"])
async def test_no_or_a_wrong_passphrase(tmp_path: Path, secret: bytes | None) -> None:
    """One line, with a hint when there is none, and nothing is written."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(make_encrypted("aes-256-xts-plain64", 2 * MIB + 512, "cluster_size=64k"))
    before = path.read_bytes()
    with pytest.raises(KeyRequired) as refusal:
        await open_image(path, key=Secrets(secret))
    assert "\n" not in str(refusal.value)
    assert (refusal.value.hint is None) == bool(secret)
    assert path.read_bytes() == before


async def test_described_without_a_passphrase(tmp_path: Path) -> None:
    """What the image is can be told, its bytes cannot, and snapshots need no passphrase."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(make_encrypted("aes-256-xts-plain64", 2 * MIB + 512, "cluster_size=64k"))
    node = await open_image(path, describe_only=True)
    assert isinstance(node, Qcow2Node)
    facts = node.info()["format-specific"]["data"]["encrypt"]
    assert facts["cipher-alg"] == "aes-256"
    assert facts["slots"][0]["active"]
    with pytest.raises(BadRequest):
        node.try_read(0, 512)
    with pytest.raises(BadRequest):
        node.try_write(0, b"x" * 512)
    with pytest.raises(BadRequest):
        await node.write_zeroes(0, 512)
    with pytest.raises(BadRequest):
        await node.discard(0, 64 * KIB)
    await node.create_snapshot(b"one")
    await node.aclose()
    assert_encrypted(path, "aes-256-xts-plain64", bytes(2 * MIB + 512))


def test_passphrases_are_not_shown() -> None:
    """No repr of what carries a passphrase shows it."""
    from qcowfs.fuse.session import MountOptions

    secret = b"open sesame"
    secrets = Secrets(secret, {"/a": secret})
    for holder in (
        secrets,
        Encryption(secret),
        MountOptions(image=Path("a"), mountpoint=Path("b"), key=secrets),
    ):
        assert "sesame" not in repr(holder) + str(holder)


def test_secrets_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own passphrase comes before the default, however the path is written."""
    monkeypatch.chdir(tmp_path)
    secrets = Secrets(b"all", {"base.qcow2": b"base"})
    (tmp_path / "x").mkdir()
    assert secrets.of(tmp_path / "x" / ".." / "base.qcow2") == b"base"
    assert secrets.of("top.qcow2") == b"all"
    assert Secrets().of("top.qcow2") is None


def luks_place(image: bytes) -> int:
    """Where the LUKS header of an image begins."""
    place = parse_header(image, len(image)).crypto()
    assert place is not None
    return place.offset


def crypto_extension(image: bytes) -> int:
    """Where the fields of the crypto extension lie in the header."""
    return image.index(struct.pack(">II", 0x0537BE77, 16)) + 8


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({8: b"serpent\0"}, UnsupportedFeature, "serpent"),
        ({40: b"ctr-plain\0\0\0"}, UnsupportedFeature, "aes-ctr-plain"),
        ({72: b"md5\0\0\0\0"}, UnsupportedFeature, "md5"),
        ({6: b"\0\2"}, UnsupportedFeature, "LUKS version 2"),
        ({0: b"nonsense"}, CorruptImage, "magic"),
        ({208 + 4: b"\xff\xff\xff\xff"}, CorruptImage, "iterations"),
        ({208 + 44: b"\0\0\0\0"}, CorruptImage, "stripes"),
        ({208 + 40: b"\x7f\0\0\0"}, CorruptImage, "outside"),
        ({208: b"\0\0\xde\xad"}, KeyRequired, "no key slot"),
    ],
)
async def test_hostile_luks_headers(
    changes: dict[int, bytes], kind: type[Exception], words: str
) -> None:
    """What a LUKS header must not say is refused by name, with nothing written."""
    image = bytearray(make_encrypted("aes-256-xts-plain64", MIB, ""))
    start = luks_place(bytes(image))
    for offset, data in changes.items():
        image[start + offset : start + offset + len(data)] = data
    storage = MemoryFile(image)
    with pytest.raises(kind, match=words):
        await open_memory(storage)
    assert storage.content == image


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 2 << 20), (512, 2 << 20), (1 << 40, 2 << 20), (1 << 63, 1), (None, 591), (None, 1 << 62)],
)
async def test_hostile_crypto_extensions(offset: int | None, length: int) -> None:
    """A LUKS header outside the file, not aligned, too short or too long is refused."""
    image = bytearray(make_encrypted("aes-256-xts-plain64", MIB, ""))
    place = crypto_extension(bytes(image))
    if offset is None:
        offset = luks_place(bytes(image))
    struct.pack_into(">QQ", image, place, offset, length)
    with pytest.raises(CorruptImage, match="LUKS header"):
        await open_memory(MemoryFile(image))


async def test_unlocking_can_be_abandoned() -> None:
    """A header that asks for many iterations does not hold the caller who gives up."""
    image = bytearray(make_encrypted("aes-256-xts-plain64", MIB, ""))
    struct.pack_into(">I", image, luks_place(bytes(image)) + 208 + 4, 1 << 22)
    with trio.move_on_after(0.02) as scope:
        await open_memory(bytes(image), secret=b"wrong")
    assert scope.cancelled_caught
