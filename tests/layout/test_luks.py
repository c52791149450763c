"""The LUKS1 header: what is read back, and what is not believed."""

import struct
from collections.abc import Callable

import pytest

from qcowfs.driver.layout.luks import (
    MAX_ITERATIONS,
    STRIPES,
    KeySlot,
    LuksHeader,
    empty_slots,
    parse_luks_header,
    serialize_luks_header,
    total_length,
)
from qcowfs.errors import CorruptImage, UnsupportedFeature

LENGTH = total_length(64)


def good_header() -> LuksHeader:
    """An aes-xts header whose first slot is active."""
    slots = empty_slots(64)
    first = KeySlot(True, 1000, b"s" * 32, slots[0].material_sector, STRIPES)
    return LuksHeader(
        "aes", "xts-plain64", "sha256", LENGTH // 512, 64, b"d" * 20, b"t" * 32, 1000,
        "d5d6ed95-472b-4345-b64c-0a23d72446f6", (first, *slots[1:]),
    )  # fmt: skip


def test_what_was_written_is_read() -> None:
    """Serialising and parsing gives the same values."""
    data = serialize_luks_header(good_header())
    assert len(data) == 592
    assert parse_luks_header(data, LENGTH) == good_header()


def test_slots_lie_behind_each_other() -> None:
    """No material overlaps another's or the header, and all fit the total length."""
    slots = empty_slots(64)
    ends = [0x250] + [slot.material_offset + 64 * STRIPES for slot in slots]
    assert all(slot.material_offset >= end for slot, end in zip(slots, ends[:-1], strict=True))
    assert ends[-1] <= LENGTH


def patch(offset: int, value: bytes) -> Callable[[bytearray], None]:
    """A mutation that overwrites bytes."""

    def change(data: bytearray) -> None:
        data[offset : offset + len(value)] = value

    return change


def word(offset: int, value: int) -> Callable[[bytearray], None]:
    """A mutation of one 32-bit field."""
    return patch(offset, struct.pack(">I", value))


SLOT = 208

DAMAGE = {
    "magic": patch(0, b"LUKX"),
    "key of 2^32-1 bytes": word(108, 2**32 - 1),
    "key of 0 bytes": word(108, 0),
    "digest iterations 0": word(164, 0),
    "digest iterations 2^32-1": word(164, 2**32 - 1),
    "slot state": word(SLOT, 5),
    "slot iterations 0": word(SLOT + 4, 0),
    "slot iterations above the limit": word(SLOT + 4, MAX_ITERATIONS + 1),
    "stripes 0": word(SLOT + 44, 0),
    "stripes 2^32-1": word(SLOT + 44, 2**32 - 1),
    "material in the header": word(SLOT + 40, 0),
    "material past the end": word(SLOT + 40, 2**32 - 1),
    "cipher name that is no text": patch(8, b"\xff\xfe"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str) -> None:
    """A field out of range is a CorruptImage that says which."""
    data = bytearray(serialize_luks_header(good_header()))
    DAMAGE[name](data)
    with pytest.raises(CorruptImage) as caught:
        parse_luks_header(bytes(data), LENGTH)
    assert "LUKS header" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (patch(6, b"\0\2"), "version 2"),
        (patch(8, b"serpent\0"), "serpent-xts-plain64"),
        (patch(40, b"xts-plain\0\0"), "aes-xts-plain"),
        (patch(72, b"md5\0\0\0"), "md5"),
        (patch(8, b"cipher_null\0"), "cipher_null"),
    ],
)
def test_unknown_methods_are_named(change: Callable[[bytearray], None], text: str) -> None:
    """A version, cipher or hash that is not implemented is refused by name."""
    data = bytearray(serialize_luks_header(good_header()))
    change(data)
    with pytest.raises(UnsupportedFeature, match=text):
        parse_luks_header(bytes(data), LENGTH)


@pytest.mark.parametrize("length", [0, 6, 100, 591])
def test_a_cut_off_header(length: int) -> None:
    """A header shorter than 592 bytes is refused."""
    data = serialize_luks_header(good_header())
    with pytest.raises(CorruptImage, match="592"):
        parse_luks_header(data[:length], LENGTH)


def test_an_inactive_slot_may_hold_anything() -> None:
    """Only the fields of active slots matter."""
    data = bytearray(serialize_luks_header(good_header()))
    word(SLOT + 48 + 4, 2**32 - 1)(data)
    word(SLOT + 48 + 40, 2**32 - 1)(data)
    assert not parse_luks_header(bytes(data), LENGTH).slots[1].active
