"""Passphrases, key slots and the master key, against an image that QEMU made."""

import struct
import subprocess
from pathlib import Path

import pytest

from qcowfs.driver.layout.luks import LuksHeader, parse_luks_header, total_length
from qcowfs.driver.transform import keys


def luks_bytes(image: Path) -> bytes:
    """The bytes that the crypto header extension of a qcow2 image names."""
    data = image.read_bytes()
    (cursor,) = struct.unpack_from(">I", data, 100)
    while True:
        kind, length = struct.unpack_from(">II", data, cursor)
        if kind == 0x0537BE77:
            offset, size = struct.unpack_from(">QQ", data, cursor + 8)
            return data[offset : offset + size]
        assert kind
        cursor += 8 + -(-length // 8) * 8


def material_of(header: LuksHeader, data: bytes, index: int) -> bytes:
    """The key material of a slot, whole sectors."""
    begin = header.slots[index].material_offset
    return data[begin : begin + -(-header.material_length // 512) * 512]


def make_luks_image(image: Path, options: str) -> None:
    """Have QEMU make an image; on a busy machine its measurement of the CPU may fail."""
    command = ["qemu-img", "create", "-q", "--object", "secret,id=s,data=geheim", "-f", "qcow2",
               "-o", options, str(image), "1M"]  # fmt: skip
    for _ in range(20):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        assert "accurate CPU usage" in result.stderr, result.stderr
    pytest.fail(result.stderr)


@pytest.mark.parametrize(
    ("cipher", "mode", "ivgen", "digest"),
    [
        ("aes-256", "xts", "plain64", "sha256"),
        ("aes-128", "xts", "plain64", "sha1"),
        ("aes-256", "cbc", "plain64", "sha512"),
        ("aes-256", "cbc", "essiv", "sha256"),
    ],
)
def test_a_header_that_qemu_wrote(
    tmp_path: Path, cipher: str, mode: str, ivgen: str, digest: str
) -> None:
    """The right passphrase opens QEMU's slot, a wrong one opens none."""
    image = tmp_path / "luks.qcow2"
    options = (
        f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg={cipher}"
        f",encrypt.cipher-mode={mode},encrypt.ivgen-alg={ivgen},encrypt.hash-alg={digest}"
    )
    if ivgen == "essiv":
        options += ",encrypt.ivgen-hash-alg=sha256"
    make_luks_image(image, options)
    data = luks_bytes(image)
    header = parse_luks_header(data[:592], len(data))
    assert f"{header.cipher_name}-{header.cipher_mode}" == "aes-" + mode + "-" + (
        "essiv:sha256" if ivgen == "essiv" else ivgen
    )
    assert keys.unlock(header, b"geheim", lambda index: material_of(header, data, index))
    assert keys.unlock(header, b"Geheim", lambda index: material_of(header, data, index)) is None


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha512"])
def test_split_and_merge(digest: str) -> None:
    """Merging the stripes gives the key back; a changed stripe gives another."""
    key = bytes(range(64))
    material = bytearray(keys.split(key, digest))
    assert keys.merge(bytes(material), 64, digest) == key
    material[5] ^= 1
    assert keys.merge(bytes(material), 64, digest) != key


def test_several_slots_open_the_same_master_key() -> None:
    """Each passphrase opens its own slot and all give the one master key."""
    header, master = keys.new_header(
        cipher_mode="xts-plain64", key_length=64, hash_name="sha256", digest_iterations=1000
    )
    materials: dict[int, bytes] = {}
    for index, passphrase in ((0, b"one"), (7, b"two")):
        header, materials[index] = keys.close_slot(header, index, master, passphrase, 1000)
    assert keys.unlock(header, b"one", materials.__getitem__) == master
    assert keys.unlock(header, b"two", materials.__getitem__) == master
    assert keys.unlock(header, b"three", materials.__getitem__) is None
    end = header.slots[7].material_offset + len(materials[7])
    assert end <= total_length(64)


def test_iterations_follow_the_time_asked_for() -> None:
    """A longer time never gives fewer iterations than the least that is allowed."""
    assert keys.iterations_for(1, "sha256", 64) >= 1000
