"""From a passphrase to the master key of a LUKS1 header, and back (FORMATS.md 2).

Bytes in, bytes out: key derivation (PBKDF2), the anti-forensic split, and the
proof of a master key by its digest. The material of a slot is ciphered with
the payload's own cipher, sector numbers from 0.

The functions here run for a second or more by design: call them in a worker
thread. No key and no passphrase appears in an exception or a log record.
"""

import hashlib
import hmac
import os
import struct
import time
import uuid as uuids
from collections.abc import Callable

from qcowfs.driver.layout.luks import (
    DIGEST_LENGTH,
    MAX_ITERATIONS,
    SALT_LENGTH,
    SECTOR,
    STRIPES,
    KeySlot,
    LuksHeader,
    empty_slots,
    total_length,
)
from qcowfs.driver.transform.cipher import make_cipher

# Fewer iterations than this would be a favour to nobody but a guesser.
_MIN_ITERATIONS = 1000
_PROBE_ITERATIONS = 20_000


def _derive(secret: bytes, salt: bytes, iterations: int, hash_name: str, length: int) -> bytes:
    return hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, length)


def _diffuse(block: bytes, hash_name: str) -> bytes:
    """Hash each digest-sized piece of `block` together with its index."""
    size = hashlib.new(hash_name).digest_size
    pieces = []
    for index, start in enumerate(range(0, len(block), size)):
        piece = block[start : start + size]
        pieces.append(hashlib.new(hash_name, struct.pack(">I", index) + piece).digest())
    return b"".join(pieces)[: len(block)]


def _xor(left: bytes, right: bytes) -> bytes:
    length = len(left)
    mixed = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return mixed.to_bytes(length, "little")


def merge(material: bytes, key_length: int, hash_name: str) -> bytes:
    """The key that `split` spread over `material`, STRIPES pieces of `key_length` bytes."""
    state = bytes(key_length)
    for index in range(STRIPES - 1):
        state = _diffuse(
            _xor(state, material[index * key_length : (index + 1) * key_length]), hash_name
        )
    return _xor(state, material[(STRIPES - 1) * key_length : STRIPES * key_length])


def split(key: bytes, hash_name: str) -> bytes:
    """Spread `key` over STRIPES random-looking pieces, all of which are needed again."""
    length = len(key)
    pieces = os.urandom(length * (STRIPES - 1))
    state = bytes(length)
    for index in range(STRIPES - 1):
        state = _diffuse(_xor(state, pieces[index * length : (index + 1) * length]), hash_name)
    return pieces + _xor(state, key)


def _digest(header: LuksHeader, key: bytes) -> bytes:
    return _derive(
        key, header.digest_salt, header.digest_iterations, header.hash_name, DIGEST_LENGTH
    )


def _padded(length: int) -> int:
    return -(-length // SECTOR) * SECTOR


def open_slot(
    header: LuksHeader, index: int, passphrase: bytes, material: bytes
) -> bytes | None:
    """The master key if `passphrase` opens slot `index`, else None.

    `material` is what lies at the slot's material offset, `material_length`
    bytes rounded up to a sector.
    """
    slot = header.slots[index]
    key = _derive(passphrase, slot.salt, slot.iterations, header.hash_name, header.key_length)
    cipher = make_cipher(header.cipher_name, header.cipher_mode, key)
    plain = bytes(cipher.decrypt(material, 0))
    master = merge(plain, header.key_length, header.hash_name)
    return master if hmac.compare_digest(_digest(header, master), header.digest) else None


def unlock(
    header: LuksHeader, passphrase: bytes, read_material: Callable[[int], bytes]
) -> bytes | None:
    """Try every active slot; the master key, or None when none opens.

    `read_material(index)` gives the material of a slot as `open_slot` takes it.
    """
    for index, slot in enumerate(header.slots):
        if slot.active:
            master = open_slot(header, index, passphrase, read_material(index))
            if master is not None:
                return master
    return None


def iterations_for(milliseconds: int, hash_name: str, length: int) -> int:
    """How many iterations take about `milliseconds` of this machine's time."""
    started = time.thread_time()
    _derive(b"probe", bytes(SALT_LENGTH), _PROBE_ITERATIONS, hash_name, length)
    elapsed = max(time.thread_time() - started, 1e-4)
    wanted = int(_PROBE_ITERATIONS * milliseconds / 1000 / elapsed)
    return min(max(wanted, _MIN_ITERATIONS), MAX_ITERATIONS)


def close_slot(
    header: LuksHeader, index: int, master: bytes, passphrase: bytes, iterations: int
) -> tuple[LuksHeader, bytes]:
    """Put `master` under `passphrase` into slot `index`.

    Returns the new header and the slot's material, padded to a sector: the
    material has to be durable before the header that calls the slot active.
    """
    salt = os.urandom(SALT_LENGTH)
    key = _derive(passphrase, salt, iterations, header.hash_name, header.key_length)
    cipher = make_cipher(header.cipher_name, header.cipher_mode, key)
    plain = split(master, header.hash_name)
    material = bytes(cipher.encrypt(plain.ljust(_padded(len(plain)), b"\0"), 0))
    old = header.slots[index]
    slot = KeySlot(True, iterations, salt, old.material_sector, STRIPES)
    return header.with_slot(index, slot), material


def new_header(
    *, cipher_mode: str, key_length: int, hash_name: str, digest_iterations: int
) -> tuple[LuksHeader, bytes]:
    """A header with a fresh master key and eight inactive slots; the key is second."""
    master = os.urandom(key_length)
    header = LuksHeader(
        cipher_name="aes",
        cipher_mode=cipher_mode,
        hash_name=hash_name,
        payload_sector=total_length(key_length) // SECTOR,
        key_length=key_length,
        digest=bytes(DIGEST_LENGTH),
        digest_salt=os.urandom(SALT_LENGTH),
        digest_iterations=digest_iterations,
        uuid=str(uuids.uuid4()),
        slots=empty_slots(key_length),
    )
    digest = _digest(header, master)
    return (
        LuksHeader(
            header.cipher_name,
            header.cipher_mode,
            header.hash_name,
            header.payload_sector,
            header.key_length,
            digest,
            header.digest_salt,
            header.digest_iterations,
            header.uuid,
            header.slots,
        ),
        master,
    )
