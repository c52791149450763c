"""Key slots added and removed, and new LUKS headers, with QEMU as the judge and under crashes."""

from pathlib import Path

import pytest

from qcowfs.driver.layout.luks import LuksHeader
from qcowfs.driver.qcow2 import key_slots
from qcowfs.driver.qcow2.create import create_qcow2
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.qcow2.new_luks import CIPHERS, Encryption
from qcowfs.errors import BadRequest, ImageFull, KeyRequired, NotFound
from tests.driver.encrypted_images import assert_encrypted, qemu_bytes
from tests.fakes import CrashFile

MIB = 1 << 20
FIRST = b"geheim"
SECOND = b"another"


async def make_image(path: Path, cipher: str = "aes-128-xts-plain64", **options: object) -> Path:
    """An image made here, of 1 MiB, whose key is quickly tried."""
    encryption = Encryption(FIRST, cipher=cipher, iteration_time=1)
    await create_qcow2(path, MIB, encryption=encryption, **options)  # type: ignore[arg-type]
    return path


async def open_described(content: bytes | CrashFile) -> Qcow2Node:
    """The node of an image without its guest data."""
    storage = CrashFile(content) if isinstance(content, bytes) else content
    return await open_qcow2(
        storage, path="image.qcow2", read_only=False, backing=None, describe_only=True
    )


async def slots_in_use(node: Qcow2Node) -> list[int]:
    """The indexes of the active slots, as the file says them."""
    luks: LuksHeader = await key_slots.load_luks(node.metadata)
    return [index for index, slot in enumerate(luks.slots) if slot.active]


async def add(node: Qcow2Node, secret: bytes, new: bytes, index: int | None = None) -> int:
    """Add a key that is quickly tried."""
    return await key_slots.add_key(node.metadata, secret, new, index=index, iteration_time=1)


@pytest.mark.parametrize(
    ("cipher", "hash_name", "options"),
    [
        ("aes-256-xts-plain64", "sha256", {}),
        ("aes-128-xts-plain64", "sha512", {"cluster_size": 512}),
        ("aes-256-cbc-plain64", "sha1", {"version": 2, "cluster_size": 4096}),
        ("aes-256-cbc-essiv:sha256", "sha256", {"extended_l2": True, "preallocation": "metadata"}),
    ],
)
async def test_new_images_open_in_qemu(
    tmp_path: Path, cipher: str, hash_name: str, options: dict[str, object]
) -> None:
    """QEMU takes the passphrase of an image made here, and finds it sound and full of zeros."""
    path = tmp_path / "image.qcow2"
    encryption = Encryption(FIRST, cipher=cipher, hash_name=hash_name, iteration_time=1)
    await create_qcow2(path, MIB, encryption=encryption, **options)  # type: ignore[arg-type]
    assert_encrypted(path, cipher, bytes(MIB))


async def test_what_cannot_be_made(tmp_path: Path) -> None:
    """Unknown ciphers, no passphrase, preallocated noise: refused, and no file is left."""
    path = tmp_path / "image.qcow2"
    for encryption, options in (
        (Encryption(FIRST, cipher="serpent-256-xts-plain64"), {}),
        (Encryption(FIRST, hash_name="md5"), {}),
        (Encryption(FIRST, iteration_time=0), {}),
        (Encryption(FIRST), {"preallocation": "metadata"}),
        (Encryption(FIRST), {"data_file": "a.raw", "data_file_raw": True}),
        (Encryption(b""), {}),
    ):
        with pytest.raises((BadRequest, KeyRequired)):
            await create_qcow2(path, MIB, encryption=encryption, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert set(CIPHERS) >= {"aes-256-xts-plain64"}


async def test_an_encrypted_image_over_a_data_file(tmp_path: Path) -> None:
    """The data file holds ciphertext, numbered by its own offsets, as QEMU has it."""
    path = tmp_path / "image.qcow2"
    encryption = Encryption(FIRST, iteration_time=1)
    await create_qcow2(path, MIB, encryption=encryption, data_file=str(tmp_path / "disk.raw"))
    from qcowfs.driver.opening import open_image

    node = await open_image(path, key=FIRST)
    model = bytearray(MIB)
    for start, data in ((0, b"a" * 700), (65536 * 3 + 5, b"b" * 100_000)):
        await node.write_from(start, data)
        model[start : start + len(data)] = data
    await node.write_zeroes(65536 * 4, 65536)
    model[65536 * 4 : 65536 * 5] = bytes(65536)
    await node.aclose()
    assert b"bbbb" not in (tmp_path / "disk.raw").read_bytes()
    assert_encrypted(path, "aes-256-xts-plain64", model)


async def test_add_and_remove(tmp_path: Path) -> None:
    """A second passphrase opens the image in QEMU too; removed, it opens nothing."""
    path = await make_image(tmp_path / "image.qcow2")
    storage = CrashFile(path.read_bytes())
    node = await open_described(storage)
    assert await add(node, FIRST, SECOND) == 1
    assert await add(node, SECOND, b"third", 6) == 6
    assert await slots_in_use(node) == [0, 1, 6]
    path.write_bytes(storage.content)
    for secret in (FIRST, SECOND, b"third"):
        assert qemu_bytes(path, "aes-128-xts-plain64", passphrase=secret) == bytes(MIB)
    assert await key_slots.slots_opened_by(node.metadata, SECOND) == [1]
    await key_slots.remove_slots(node.metadata, [0, 1])
    assert await slots_in_use(node) == [6]
    with pytest.raises(KeyRequired):
        await key_slots.slots_opened_by(node.metadata, FIRST)
    await node.aclose()
    path.write_bytes(storage.content)
    assert_encrypted_with(path, b"third")


def assert_encrypted_with(path: Path, secret: bytes) -> None:
    """QEMU reads zeros with that passphrase."""
    assert qemu_bytes(path, "aes-128-xts-plain64", passphrase=secret) == bytes(MIB)


async def test_refusals(tmp_path: Path) -> None:
    """A slot in use, none free, a wrong passphrase, the last slot: refused with nothing written."""
    path = await make_image(tmp_path / "image.qcow2")
    node = await open_described(path.read_bytes())
    with pytest.raises(BadRequest, match="in use"):
        await add(node, FIRST, SECOND, 0)
    with pytest.raises(BadRequest, match="0 to 7"):
        await add(node, FIRST, SECOND, 8)
    with pytest.raises(KeyRequired):
        await add(node, SECOND, SECOND)
    with pytest.raises(NotFound):
        await key_slots.remove_slots(node.metadata, [3])
    with pytest.raises(BadRequest) as refusal:
        await key_slots.remove_slots(node.metadata, [0])
    assert refusal.value.hint == "--force"
    storage = node.metadata.storage
    assert isinstance(storage, CrashFile)
    assert storage.content == path.read_bytes()
    for _ in range(7):
        await add(node, FIRST, SECOND)
    with pytest.raises(ImageFull):
        await add(node, FIRST, SECOND)
    await key_slots.remove_slots(node.metadata, list(range(8)), force=True)
    assert await slots_in_use(node) == []
    await node.aclose()


@pytest.mark.parametrize("slot", [1, 6])
async def test_crashes(tmp_path: Path, slot: int) -> None:
    """Whatever survives a crash, the old passphrase opens, and so does each active new slot."""
    path = await make_image(tmp_path / "image.qcow2")
    storage = CrashFile(path.read_bytes())
    node = await open_described(storage)
    await add(node, FIRST, SECOND, slot)
    added = storage.position
    seen = set()
    for state in storage.states(point_count=12, each_limit=3, subset_count=1, torn_count=2):
        if state.content in seen:
            continue
        seen.add(state.content)
        after = await open_described(state.content)
        assert await key_slots.slots_opened_by(after.metadata, FIRST) == [0], state.description
        if await slots_in_use(after) != [0]:
            assert await key_slots.slots_opened_by(after.metadata, SECOND) == [slot]
        else:
            assert state.point < added
    await node.aclose()
