"""The LUKS version 1 header as it lies inside a qcow2 image (FORMATS.md 2).

Pure: bytes to values and back, no cryptography and no I/O. The header's bytes
lie at the host offset that the crypto header extension names; key material
offsets count 512-byte sectors from there. The payload offset is written by
QEMU and used by nobody: in qcow2 the payload is the guest's clusters.

No field is believed before it is checked: what `parse_luks_header` returns
names only material that lies inside the announced header and costs a bounded
number of iterations.
"""

import struct
from dataclasses import dataclass, replace

from qcowfs.errors import CorruptImage, UnsupportedFeature

MAGIC = b"LUKS\xba\xbe"
HEADER_LENGTH = 592
SLOT_COUNT = 8
STRIPES = 4000
DIGEST_LENGTH = 20
SALT_LENGTH = 32
SECTOR = 512
# A minute or two of one core: what an iteration time of some seconds gives, with room,
# and still something that a person waits for.
MAX_ITERATIONS = 1 << 28
HASHES = ("sha1", "sha256", "sha512")
KEY_LENGTHS = {"xts-plain64": (32, 64), "cbc-plain64": (16, 24, 32), "cbc-essiv:sha256": (16, 32)}

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_ACTIVE = 0x00AC71F3
_INACTIVE = 0x0000DEAD
# Material of the slots begins at multiples of 4 KiB, as everybody else lays it out.
_MATERIAL_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One key slot; `material_sector` counts 512-byte sectors from the LUKS header."""

    active: bool
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int

    @property
    def material_offset(self) -> int:
        """Where the material begins, in bytes from the LUKS header."""
        return self.material_sector * SECTOR


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """All that a LUKS1 header says; `key_length` is in bytes."""

    cipher_name: str
    cipher_mode: str
    hash_name: str
    payload_sector: int
    key_length: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def material_length(self) -> int:
        """The bytes of one slot's key material, without padding."""
        return self.key_length * STRIPES

    def with_slot(self, index: int, slot: KeySlot) -> "LuksHeader":
        """The same header with slot `index` exchanged."""
        slots = (*self.slots[:index], slot, *self.slots[index + 1 :])
        return replace(self, slots=slots)


def _text(field: bytes, what: str) -> str:
    try:
        return field.split(b"\0", 1)[0].decode("ascii")
    except UnicodeDecodeError:
        raise CorruptImage(
            f"the {what} in the LUKS header is not text", structure="LUKS header"
        ) from None


def _corrupt(message: str, index: int | None = None) -> CorruptImage:
    return CorruptImage(message, structure="LUKS header", index=index)


def _check_iterations(iterations: int, what: str, index: int | None = None) -> None:
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise _corrupt(
            f"{what} of the LUKS header asks for {iterations} iterations"
            f" (1 to {MAX_ITERATIONS} are allowed)",
            index,
        )


def _parse_slot(data: bytes, index: int, header_length: int, material_length: int) -> KeySlot:
    state, iterations, salt, sector, stripes = _SLOT.unpack_from(
        data, _HEADER.size + index * _SLOT.size
    )
    if state not in (_ACTIVE, _INACTIVE):
        raise _corrupt(f"key slot {index} of the LUKS header has the state {state:#x}", index)
    if state == _ACTIVE:
        _check_iterations(iterations, f"key slot {index}", index)
        if stripes != STRIPES:
            raise _corrupt(
                f"key slot {index} of the LUKS header has {stripes} stripes (it must be {STRIPES})",
                index,
            )
        begin = sector * SECTOR
        if begin < HEADER_LENGTH or begin + material_length > header_length:
            raise _corrupt(
                f"the key material of slot {index} at {begin:#x} is outside the LUKS header"
                f" of {header_length} bytes",
                index,
            )
    return KeySlot(state == _ACTIVE, iterations, salt, sector, stripes)


def parse_luks_header(data: bytes, header_length: int) -> LuksHeader:
    """Parse the first 592 bytes of a LUKS header that spans `header_length` bytes.

    Raises CorruptImage for values out of range and UnsupportedFeature, by
    name, for a version, cipher or hash that is not implemented.
    """
    if len(data) < HEADER_LENGTH or header_length < HEADER_LENGTH:
        raise _corrupt(f"the LUKS header has {min(len(data), header_length)} bytes, 592 are needed")
    (
        magic,
        version,
        cipher_name,
        cipher_mode,
        hash_name,
        payload_sector,
        key_length,
        digest,
        digest_salt,
        digest_iterations,
        uuid,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _corrupt(f"the LUKS header has the magic {magic.hex()}")
    if version != 1:
        raise UnsupportedFeature(f"LUKS version {version} is not supported inside qcow2")
    name, mode = _text(cipher_name, "cipher name"), _text(cipher_mode, "cipher mode")
    digest_name = _text(hash_name, "hash name")
    lengths = KEY_LENGTHS.get(mode)
    if name != "aes" or lengths is None:
        raise UnsupportedFeature(f"the cipher {name}-{mode} is not supported")
    if digest_name not in HASHES:
        raise UnsupportedFeature(f"the hash {digest_name} is not supported")
    if key_length not in lengths:
        raise _corrupt(f"the LUKS header gives {name}-{mode} a key of {key_length} bytes")
    _check_iterations(digest_iterations, "the master key's digest")
    slots = tuple(
        _parse_slot(data, index, header_length, key_length * STRIPES) for index in range(SLOT_COUNT)
    )
    return LuksHeader(
        name,
        mode,
        digest_name,
        payload_sector,
        key_length,
        digest,
        digest_salt,
        digest_iterations,
        _text(uuid, "UUID"),
        slots,
    )


def serialize_luks_header(header: LuksHeader) -> bytes:
    """The 592 bytes of a header."""
    parts = [
        _HEADER.pack(
            MAGIC,
            1,
            header.cipher_name.encode(),
            header.cipher_mode.encode(),
            header.hash_name.encode(),
            header.payload_sector,
            header.key_length,
            header.digest,
            header.digest_salt,
            header.digest_iterations,
            header.uuid.encode(),
        )
    ]
    parts.extend(serialize_luks_slot(slot) for slot in header.slots)
    return b"".join(parts)


def serialize_luks_slot(slot: KeySlot) -> bytes:
    """The 48 bytes of a key slot; the first four say whether it is active."""
    return _SLOT.pack(
        _ACTIVE if slot.active else _INACTIVE,
        slot.iterations,
        slot.salt,
        slot.material_sector,
        slot.stripes,
    )


def slot_offset(index: int) -> int:
    """Where key slot `index` begins, in bytes from the LUKS header; `SLOT_COUNT` gives its end."""
    return _HEADER.size + index * _SLOT.size


def empty_slots(key_length: int) -> tuple[KeySlot, ...]:
    """Eight inactive slots whose material lies one behind the other, each 4 KiB aligned."""
    stride = -(-key_length * STRIPES // _MATERIAL_ALIGNMENT) * _MATERIAL_ALIGNMENT
    return tuple(
        KeySlot(
            False, 0, bytes(SALT_LENGTH), (_MATERIAL_ALIGNMENT + index * stride) // SECTOR, STRIPES
        )
        for index in range(SLOT_COUNT)
    )


def total_length(key_length: int) -> int:
    """The bytes that a header with the material of all eight slots needs."""
    stride = -(-key_length * STRIPES // _MATERIAL_ALIGNMENT) * _MATERIAL_ALIGNMENT
    return _MATERIAL_ALIGNMENT + SLOT_COUNT * stride
