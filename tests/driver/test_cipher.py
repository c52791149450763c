"""The sector ciphers against the library's own modes, one sector at a time."""

import random
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB, XTS

from qcowfs.driver.transform.cipher import CbcCipher, XtsCipher, make_cipher
from qcowfs.errors import BadRequest, UnsupportedFeature

SECTOR = 512


def reference(key: bytes, data: bytes, first: int, mode: Callable[[int], object]) -> bytes:
    """Encrypt sector by sector with the library's mode for each number."""
    parts = []
    for start in range(0, len(data), SECTOR):
        encryptor = Cipher(AES(key), mode(first + start // SECTOR)).encryptor()  # type: ignore[arg-type]
        parts.append(encryptor.update(data[start : start + SECTOR]) + encryptor.finalize())
    return b"".join(parts)


@pytest.mark.parametrize("first", [0, 1, 2**32 - 3, 2**40 + 7])
@pytest.mark.parametrize("key_length", [32, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 300])
def test_xts_plain64(first: int, key_length: int, count: int) -> None:
    """Block j of sector n has the tweak E(n) * x^j, whatever the request's length."""
    rng = random.Random(count)
    key, data = rng.randbytes(key_length), rng.randbytes(count * SECTOR)
    cipher = XtsCipher(key)
    encrypted = cipher.encrypt(data, first)
    assert encrypted == reference(key, data, first, lambda n: XTS(n.to_bytes(16, "little")))
    assert cipher.decrypt(encrypted, first) == data


@pytest.mark.parametrize("key_length", [16, 24, 32])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_cbc_plain64(key_length: int, count: int) -> None:
    """Each sector is a CBC chain of its own that begins with the sector's number."""
    rng = random.Random(count)
    key, data = rng.randbytes(key_length), rng.randbytes(count * SECTOR)
    cipher = CbcCipher(key)
    encrypted = cipher.encrypt(data, 77)
    assert encrypted == reference(key, data, 77, lambda n: CBC(n.to_bytes(16, "little")))
    assert cipher.decrypt(encrypted, 77) == data


def test_cbc_essiv() -> None:
    """ESSIV ciphers the sector number with the hash of the key."""
    import hashlib

    rng = random.Random(5)
    key, data = rng.randbytes(32), rng.randbytes(9 * SECTOR)
    salt_key = hashlib.sha256(key).digest()

    def mode(number: int) -> CBC:
        encryptor = Cipher(AES(salt_key), ECB()).encryptor()
        return CBC(encryptor.update(number.to_bytes(16, "little")))

    cipher = make_cipher("aes", "cbc-essiv:sha256", key)
    encrypted = cipher.encrypt(data, 12345)
    assert encrypted == reference(key, data, 12345, mode)
    assert cipher.decrypt(encrypted, 12345) == data


def test_a_part_of_a_request_deciphers_by_itself() -> None:
    """A sector's bytes depend on its number alone, not on the request it came in."""
    rng = random.Random(6)
    cipher = XtsCipher(rng.randbytes(64))
    data = rng.randbytes(1000 * SECTOR)
    encrypted = cipher.encrypt(data, 4)
    piece = memoryview(encrypted)[300 * SECTOR : 310 * SECTOR]
    assert cipher.decrypt(piece, 304) == data[300 * SECTOR : 310 * SECTOR]


@pytest.mark.parametrize("cipher", [XtsCipher(bytes(32)), CbcCipher(bytes(16))])
def test_half_a_sector_is_refused(cipher: XtsCipher | CbcCipher) -> None:
    """Only whole sectors can be ciphered."""
    for call in (cipher.encrypt, cipher.decrypt):
        with pytest.raises(BadRequest, match="whole sectors"):
            call(bytes(513), 0)


@pytest.mark.parametrize(
    ("name", "mode", "length"),
    [
        ("aes", "xts-plain", 32),
        ("serpent", "xts-plain64", 32),
        ("cipher_null", "ecb", 16),
        ("aes", "xts-plain64", 48),
        ("aes", "cbc-plain64", 20),
    ],
)
def test_others_are_refused_by_name(name: str, mode: str, length: int) -> None:
    """What is not implemented is named."""
    with pytest.raises(UnsupportedFeature, match=r"serpent|cipher_null|xts|cbc"):
        make_cipher(name, mode, bytes(length))
