"""The structs of the kernel's protocol, as far as the lane uses them."""

import errno
import struct

import pytest

from qcowfs.fuse import wire


@pytest.mark.parametrize(
    ("layout", "length"),
    [
        (wire.IN_HEADER, 40),
        (wire.OUT_HEADER, 16),
        (wire.FLUSH_OR_FSYNC_IN, 16),
        (wire.FALLOCATE_IN, 32),
        (wire.LSEEK_IN, 24),
        (wire.OPEN_IN, 8),
        (wire.OPEN_OUT, 16),
        (wire.WRITE_OUT, 8),
        (wire.LSEEK_OUT, 8),
        (wire.INIT_IN, 16),
    ],
)
def test_lengths(layout: struct.Struct, length: int) -> None:
    """Each struct is as long as the protocol says."""
    assert layout.size == length


def test_hot_request_fields() -> None:
    """One unpacking finds header and body fields of READ and WRITE at their offsets."""
    message = bytearray(80)
    struct.pack_into("=I", message, 0, 80)
    struct.pack_into("=I", message, 4, wire.WRITE)
    struct.pack_into("=Q", message, 8, 11)
    struct.pack_into("=Q", message, 16, 12)
    struct.pack_into("=Q", message, 40, 13)
    struct.pack_into("=Q", message, 48, 14)
    struct.pack_into("=I", message, 56, 15)
    struct.pack_into("=I", message, 72, 16)
    assert wire.HOT_REQUEST.unpack_from(message) == (80, wire.WRITE, 11, 12, 13, 14, 15, 16)


def test_error_answer() -> None:
    """An errno travels negated, with the request's unique."""
    answer = wire.error_answer(77, errno.ENOSPC)
    assert wire.OUT_HEADER.unpack(answer) == (16, -errno.ENOSPC, 77)


def test_body_answer() -> None:
    """A body follows a header that counts it."""
    answer = wire.body_answer(5, b"12345678")
    assert wire.OUT_HEADER.unpack_from(answer) == (24, 0, 5)
    assert answer[16:] == b"12345678"


def _init_request(flags: int, flags2: int | None) -> memoryview:
    body = wire.INIT_IN.pack(7, 38, 131072, flags)
    if flags2 is not None:
        body += wire.FLAGS2.pack(flags2) + bytes(44)
    return memoryview(bytes(wire.REQUEST_BODY_AT) + body)


def _init_answer(*, error: int = 0, major: int = 7, flags: int = 0, flags2: int = 0) -> bytearray:
    body = wire.INIT_OUT.pack(major, 38, 131072, flags, 0, 0, 131072, 1, 32, 0, flags2)
    return bytearray(wire.OUT_HEADER.pack(16 + 64, error, 1) + body + bytes(64 - len(body)))


def _fields(answer: bytearray) -> dict[str, int]:
    names = "major minor max_readahead flags max_background congestion_threshold max_write"
    names += " time_gran max_pages map_alignment flags2"
    values = wire.INIT_OUT.unpack_from(answer, wire.ANSWER_BODY_AT)
    return dict(zip(names.split(), values, strict=True))


def test_init_switches_on_what_was_offered() -> None:
    """1 MiB requests, asynchronous reads and direct I/O, parallel lookups: where offered."""
    offer = wire.parse_init_request(_init_request(0x7FFFFFFF, 0xFFFFFFFF))
    answer = _init_answer(flags=1 << 13 | wire.UNWANTED_FLAGS)
    assert wire.amend_init_answer(offer, answer)
    fields = _fields(answer)
    assert fields["max_write"] == 1 << 20
    assert fields["max_pages"] == 256
    assert fields["flags"] & wire.WANTED_FLAGS == wire.WANTED_FLAGS
    assert fields["flags"] & (1 << 13)
    assert not fields["flags"] & wire.UNWANTED_FLAGS
    assert fields["flags2"] == wire.INIT2_DIRECT_IO_ALLOW_MMAP
    assert fields["max_background"] == wire.MAX_BACKGROUND
    assert (fields["major"], fields["minor"], fields["max_readahead"]) == (7, 38, 131072)


def test_init_adds_nothing_that_was_not_offered() -> None:
    """A flag that the kernel does not know is never set in the answer."""
    offer = wire.parse_init_request(_init_request(wire.INIT_ASYNC_READ, None))
    answer = _init_answer(flags2=0xFFFF)
    assert wire.amend_init_answer(offer, answer)
    fields = _fields(answer)
    assert fields["flags"] == wire.INIT_ASYNC_READ
    assert fields["max_pages"] == 32
    assert fields["flags2"] == 0, "without INIT_EXT the field has no meaning and must be zero"


def test_init_keeps_what_libfuse_put_into_the_second_word() -> None:
    """flags2 of an answer that has INIT_EXT keeps libfuse's bits."""
    offer = wire.parse_init_request(_init_request(wire.INIT_EXT, 0))
    answer = _init_answer(flags=wire.INIT_EXT, flags2=1 << 5)
    assert wire.amend_init_answer(offer, answer)
    assert _fields(answer)["flags2"] == 1 << 5


@pytest.mark.parametrize(
    "answer",
    [_init_answer(error=-errno.EPROTO), _init_answer(major=8), _init_answer()[:40], bytearray(3)],
    ids=["refused", "other major", "short", "tiny"],
)
def test_init_leaves_other_answers_alone(answer: bytearray) -> None:
    """A refusal, another major version and a short answer pass unchanged."""
    offer = wire.parse_init_request(_init_request(0x7FFFFFFF, 0))
    before = bytes(answer)
    assert not wire.amend_init_answer(offer, answer)
    assert bytes(answer) == before


def test_init_request_of_an_old_kernel() -> None:
    """A short INIT request offers nothing."""
    assert wire.parse_init_request(memoryview(bytes(48))) == wire.InitOffer(0, 0, 0, 0, 0)
