"""Sector ciphers of encrypted images: AES in XTS and CBC, many sectors at once.

Implements the ciphers of FORMATS.md 2 (LUKS1: aes-xts-plain64, aes-cbc-plain64,
aes-cbc-essiv:sha256) and the old AES-128-CBC of qcow and qcow2. Bytes in, bytes
out: this module knows neither files nor clusters nor where a key came from.

A cipher object per 512-byte sector costs ten times the encryption itself, so a
whole request is one ECB call and a few vector operations:

- XTS: the tweak of block j of a sector is T * x^j in GF(2^128), where T is the
  encrypted sector number. For j < 32 that is a shift by j bits whose overflow,
  less than 32 bits, folds back with x^7 + x^2 + x + 1: all blocks of all
  sectors at once, with no loop over j.
- CBC decryption is ECB and one XOR with the shifted ciphertext; encryption
  chains inside a sector, so block j of every sector goes into one ECB call.

Invariants: length is a multiple of 512; an object may be used from several
threads at once (each call takes a context of its own from a pool).
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from qcowfs.errors import BadRequest, UnsupportedFeature

if TYPE_CHECKING:
    import numpy as np

SECTOR = 512
_BLOCK = 16
_BLOCKS_PER_SECTOR = SECTOR // _BLOCK
# Working sets of the vector operations stay inside a core's second-level cache.
_CHUNK_LENGTH = 128 * 1024

Buffer = bytes | bytearray | memoryview


class SectorCipher(Protocol):
    """Length-preserving encryption of 512-byte sectors."""

    def encrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """Encrypt whole sectors, the first of which has the number `first_sector`."""
        ...

    def decrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """Undo `encrypt`."""
        ...


class _Ecb:
    """AES-ECB in one direction, with contexts that are made once and used again."""

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import ECB

        # ECB is only the building block here: the modes around it are XTS and CBC.
        cipher = Cipher(AES(key), ECB())
        self._make: Callable[[], Any] = cipher.encryptor if encrypting else cipher.decryptor
        self._idle: list[Any] = []

    def __call__(self, data: Any) -> bytes:
        try:
            context = self._idle.pop()
        except IndexError:
            context = self._make()
        result: bytes = context.update(data)
        self._idle.append(context)
        return result


def _check(data: Buffer, first_sector: int) -> None:
    if len(data) % SECTOR or first_sector < 0:
        raise BadRequest(f"a cipher request of {len(data)} bytes is not made of whole sectors")


def _sector_numbers(first_sector: int, count: int) -> "np.ndarray[Any, Any]":
    """The numbers as little-endian 128-bit values: an array of (count, 2) words."""
    import numpy as np

    numbers = np.zeros((count, 2), dtype="<u8")
    numbers[:, 0] = np.arange(first_sector, first_sector + count, dtype=np.uint64)
    return numbers


class XtsCipher:
    """AES-XTS with plain64 sector numbers; the key is two AES keys, 32 or 64 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) not in (32, 64):
            raise UnsupportedFeature(f"aes-xts takes a key of 32 or 64 bytes, not {len(key)}")
        half = len(key) // 2
        self._encrypt_block = _Ecb(key[:half], encrypting=True)
        self._decrypt_block = _Ecb(key[:half], encrypting=False)
        self._encrypt_tweak = _Ecb(key[half:], encrypting=True)

    def encrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        return self._run(self._encrypt_block, data, first_sector)

    def decrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        return self._run(self._decrypt_block, data, first_sector)

    def _run(self, block: _Ecb, data: Buffer, first_sector: int) -> bytearray:
        import numpy as np

        _check(data, first_sector)
        result = bytearray(len(data))
        source = np.frombuffer(data, dtype=np.uint64)
        target = np.frombuffer(result, dtype=np.uint64)
        words = _CHUNK_LENGTH // 8
        for start in range(0, len(source), words):
            part = source[start : start + words]
            sector = first_sector + start * 8 // SECTOR
            tweaks = self._tweaks(sector, len(part) * 8 // SECTOR)
            ciphered = block((part ^ tweaks).data.cast("B"))
            np.bitwise_xor(
                np.frombuffer(ciphered, dtype=np.uint64), tweaks, out=target[start : start + words]
            )
        return result

    def _tweaks(self, first_sector: int, count: int) -> "np.ndarray[Any, Any]":
        """All tweaks of `count` sectors, as a flat array of native 64-bit words."""
        import numpy as np

        numbers = _sector_numbers(first_sector, count)
        first = np.frombuffer(self._encrypt_tweak(numbers.data.cast("B")), dtype="<u8")
        low = first[0::2].astype(np.uint64)[:, None]
        high = first[1::2].astype(np.uint64)[:, None]
        shift = np.arange(_BLOCKS_PER_SECTOR, dtype=np.uint64)
        # A shift by 64 is undefined, so the bits that leave a word go in two steps.
        rest = np.uint64(63) - shift
        one = np.uint64(1)
        carry = (high >> one) >> rest
        tweaks = np.empty((count, _BLOCKS_PER_SECTOR, 2), dtype="<u8")
        folded = carry ^ (carry << one) ^ (carry << np.uint64(2)) ^ (carry << np.uint64(7))
        np.bitwise_xor(low << shift, folded, out=tweaks[:, :, 0])
        np.bitwise_or(high << shift, (low >> one) >> rest, out=tweaks[:, :, 1])
        return tweaks.reshape(-1).view(np.uint64)


class CbcCipher:
    """AES-CBC over each sector by itself, the first value from the sector number.

    `essiv` is the hash that derives the key of the initial values ("sha256"),
    or None for plain64: the number itself, little-endian, padded with zeros.
    """

    def __init__(self, key: bytes, *, essiv: str | None = None) -> None:
        if len(key) not in (16, 24, 32):
            raise UnsupportedFeature(f"aes-cbc takes a key of 16, 24 or 32 bytes, not {len(key)}")
        self._encrypt_block = _Ecb(key, encrypting=True)
        self._decrypt_block = _Ecb(key, encrypting=False)
        self._encrypt_number: _Ecb | None = None
        if essiv is not None:
            self._encrypt_number = _Ecb(hashlib.new(essiv, key).digest(), encrypting=True)

    def _initial_values(self, first_sector: int, count: int) -> "np.ndarray[Any, Any]":
        """An array of (count, 2) native words."""
        import numpy as np

        numbers = _sector_numbers(first_sector, count)
        if self._encrypt_number is None:
            return numbers.view(np.uint64)
        ciphered = self._encrypt_number(numbers.data.cast("B"))
        return np.frombuffer(ciphered, dtype=np.uint64).reshape(count, 2)

    def decrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        import numpy as np

        _check(data, first_sector)
        count = len(data) // SECTOR
        if not count:
            return bytearray()
        result = bytearray(self._decrypt_block(data))
        shape = (count, _BLOCKS_PER_SECTOR, 2)
        plain = np.frombuffer(result, dtype=np.uint64).reshape(shape)
        ciphered = np.frombuffer(data, dtype=np.uint64).reshape(shape)
        plain[:, 1:] ^= ciphered[:, :-1]
        plain[:, 0] ^= self._initial_values(first_sector, count)
        return result

    def encrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        import numpy as np

        _check(data, first_sector)
        count = len(data) // SECTOR
        result = bytearray(len(data))
        if not count:
            return result
        shape = (count, _BLOCKS_PER_SECTOR, 2)
        plain = np.frombuffer(data, dtype=np.uint64).reshape(shape)
        target = np.frombuffer(result, dtype=np.uint64).reshape(shape)
        previous = self._initial_values(first_sector, count)
        for index in range(_BLOCKS_PER_SECTOR):
            mixed = np.ascontiguousarray(plain[:, index] ^ previous)
            ciphered = self._encrypt_block(mixed.data.cast("B"))
            previous = np.frombuffer(ciphered, dtype=np.uint64).reshape(count, 2)
            target[:, index] = previous
        return result


def make_cipher(name: str, mode: str, key: bytes) -> SectorCipher:
    """The cipher that a LUKS header names, as `aes` and `xts-plain64`.

    Raises UnsupportedFeature, naming the cipher, for anything that is not
    aes-xts-plain64, aes-cbc-plain64 or aes-cbc-essiv:sha256.
    """
    if name == "aes":
        if mode == "xts-plain64":
            return XtsCipher(key)
        if mode == "cbc-plain64":
            return CbcCipher(key)
        if mode == "cbc-essiv:sha256":
            return CbcCipher(key, essiv="sha256")
    raise UnsupportedFeature(f"the cipher {name}-{mode} is not supported")
