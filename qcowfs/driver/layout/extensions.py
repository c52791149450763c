"""Header extensions and the feature name table of a qcow2 image.

Implements "Header extensions" and "Feature name table" of the qcow2
specification. Bytes <-> values: no I/O. What an extension means for an image is
decided in `header`; here its length is held against the room that it has.

Invariants: no length in an extension is believed beyond the header cluster; the
same extensions give the same bytes.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcowfs.driver.layout.geometry import MAX_BACKING_FORMAT_LENGTH
from qcowfs.errors import BadRequest, CorruptImage

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE279_2ACA
EXTENSION_FEATURE_TABLE = 0x6803_F857
EXTENSION_BITMAPS = 0x2385_2875
EXTENSION_CRYPTO = 0x0537_BE77
EXTENSION_DATA_FILE = 0x4441_5441

FEATURE_INCOMPATIBLE = 0
FEATURE_COMPATIBLE = 1
FEATURE_AUTOCLEAR = 2

_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension, its data without the padding to 8 bytes."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class FeatureName:
    """One row of the feature name table: `kind` is a FEATURE_ constant."""

    kind: int
    bit: int
    name: bytes


# The names are part of the format in use: QEMU prints them for what it cannot do.
KNOWN_FEATURES = (
    FeatureName(FEATURE_INCOMPATIBLE, 0, b"dirty bit"),
    FeatureName(FEATURE_INCOMPATIBLE, 1, b"corrupt bit"),
    FeatureName(FEATURE_INCOMPATIBLE, 2, b"external data file"),
    FeatureName(FEATURE_INCOMPATIBLE, 3, b"compression type"),
    FeatureName(FEATURE_INCOMPATIBLE, 4, b"extended L2 entries"),
    FeatureName(FEATURE_COMPATIBLE, 0, b"lazy refcounts"),
    FeatureName(FEATURE_AUTOCLEAR, 0, b"bitmaps"),
    FeatureName(FEATURE_AUTOCLEAR, 1, b"raw external data"),
)


@dataclass(frozen=True, slots=True)
class CryptoExtension:
    """The full disk encryption extension: where the LUKS header lies."""

    offset: int
    length: int


def printable(text: bytes) -> str:
    """Text out of an image for a message: what a terminal could act on is escaped."""
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def read_extensions(data: bytes, start: int, end: int) -> Iterator[Extension]:
    """The extensions of a header cluster between two offsets, up to the end marker.

    The end marker itself may be missing. Raises CorruptImage for an extension
    that reaches beyond `end`.
    """
    offset = start
    while offset < end:
        if end - offset < _EXTENSION.size:
            # An end marker need not be there: a backing name may follow directly.
            return
        extension_type, length = _EXTENSION.unpack_from(data, offset)
        if extension_type == EXTENSION_END:
            return
        offset += _EXTENSION.size
        if length > end - offset:
            raise _corrupt(
                f"extension {extension_type:#010x} of {length} bytes at {offset - 8:#x} "
                f"does not end before {end:#x}"
            )
        yield Extension(extension_type, data[offset : offset + length])
        offset += (length + 7) & -8


def pack_extensions(extensions: Sequence[Extension]) -> bytes:
    """The bytes of the extensions, each padded to 8 bytes, and of the end marker."""
    return b"".join(
        _EXTENSION.pack(e.type, len(e.data)) + e.data + bytes(-len(e.data) % 8)
        for e in (*extensions, Extension(EXTENSION_END, b""))
    )


def parse_backing_format(data: bytes) -> str | None:
    """The name of a backing format; None for an empty one. CorruptImage over 15 bytes."""
    if len(data) > MAX_BACKING_FORMAT_LENGTH:
        raise _corrupt(
            f"backing format of {len(data)} bytes, must be at most {MAX_BACKING_FORMAT_LENGTH}"
        )
    # Writers of 2009 stored the padded length, so the name ends at its first NUL.
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") or None


def pack_backing_format(name: str) -> Extension:
    """The extension that names a backing format; BadRequest over 15 bytes."""
    data = name.encode("utf-8", "surrogateescape")
    if len(data) > MAX_BACKING_FORMAT_LENGTH:
        raise BadRequest(
            f"backing format of {len(data)} bytes, at most {MAX_BACKING_FORMAT_LENGTH}"
        )
    return Extension(EXTENSION_BACKING_FORMAT, data)


def parse_feature_table(data: bytes) -> tuple[FeatureName, ...]:
    """The rows of a feature name table; what does not fill a row is ignored."""
    whole = len(data) - len(data) % _FEATURE.size
    return tuple(
        FeatureName(kind, bit, name.split(b"\0", 1)[0])
        for kind, bit, name in _FEATURE.iter_unpack(data[:whole])
    )


def pack_feature_table(others: Sequence[FeatureName]) -> bytes:
    """The table of all known features, and of those `others` that are not known."""
    known = {(feature.kind, feature.bit) for feature in KNOWN_FEATURES}
    rows = list(KNOWN_FEATURES)
    rows += [f for f in others if (f.kind, f.bit) not in known]
    return b"".join(_FEATURE.pack(f.kind, f.bit, f.name) for f in rows)


def _corrupt(rule: str) -> CorruptImage:
    return CorruptImage(f"header: {rule}", structure="header")
