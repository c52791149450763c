"""The header cluster of a qcow2 image: fields, feature bits, extensions.

Implements "Header" of the qcow2 specification, versions 2 and 3; extensions by
themselves are in `extensions`. Bytes in, values out, and back: no I/O. No size
in the header is believed before it is held against its limit, the header
cluster and the length of the file; nothing is allocated by such a size.

Invariants: a Header that `parse_header` returned has all its tables aligned to
clusters, beginning inside the file and apart from each other and from the
header cluster. Unknown header bytes and unknown extensions survive
`serialize`; the feature name table and the zero padding are made anew.
"""

import itertools
import struct
from dataclasses import dataclass, replace

from qcowfs.driver.layout.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_CRYPTO,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_TABLE,
    FEATURE_INCOMPATIBLE,
    CryptoExtension,
    Extension,
    FeatureName,
    pack_backing_format,
    pack_extensions,
    pack_feature_table,
    parse_backing_format,
    parse_feature_table,
    printable,
    read_extensions,
)
from qcowfs.driver.layout.geometry import (
    L1_ENTRY_LENGTH,
    MAX_BACKING_NAME_LENGTH,
    MAX_CLUSTER_BITS,
    MAX_L1_LENGTH,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_LENGTH,
    MAX_SNAPSHOT_COUNT,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR,
    Geometry,
)
from qcowfs.errors import BadRequest, CorruptImage, ImageFull, UnsupportedFeature

MAGIC = b"QFI\xfb"
V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
V3_HEADER_LENGTH = 112

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_KNOWN = 0b11111
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1
AUTOCLEAR_KNOWN = 0b11

CRYPT_NONE = 0
CRYPT_AES = 1
CRYPT_LUKS = 2

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
# In clusters of 4 KiB and less the feature table would take a good part of the
# room that a backing file name may need; QEMU leaves it out there as well.
_FEATURE_TABLE_MIN_CLUSTER_BITS = 13


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one image; changed by `dataclasses.replace`.

    Offsets are host offsets and lengths bytes. `backing_format` and `data_file`
    come from extensions, which are not in `extensions` then; nor are the
    feature name table and the end marker. `data_file` is a name, or None when
    the image says none, even where the incompatible bit is set.
    """

    version: int
    cluster_bits: int
    virtual_size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing_file: bytes | None = None
    backing_format: str | None = None
    crypt_method: int = CRYPT_NONE
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V3_HEADER_LENGTH
    compression_type: int = COMPRESSION_ZLIB
    unknown_bytes: bytes = b""
    data_file: bytes | None = None
    extensions: tuple[Extension, ...] = ()
    feature_names: tuple[FeatureName, ...] = ()

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in an external data file."""
        return bool(self.incompatible & INCOMPATIBLE_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """Whether the external data file is a complete raw image by itself."""
        return bool(self.autoclear & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes and clusters 32 subclusters."""
        return bool(self.incompatible & INCOMPATIBLE_EXTENDED_L2)

    def geometry(self) -> Geometry:
        """The Geometry of the active disk."""
        return Geometry(
            cluster_bits=self.cluster_bits,
            version=self.version,
            virtual_size=self.virtual_size,
            extended_l2=self.extended_l2,
            refcount_order=self.refcount_order,
            has_data_file=self.has_data_file,
            data_file_raw=self.data_file_raw,
        )

    def extension(self, extension_type: int) -> bytes | None:
        """The data of the last extension of a type in `extensions`, or None."""
        for extension in reversed(self.extensions):
            if extension.type == extension_type:
                return extension.data
        return None

    def crypto(self) -> CryptoExtension | None:
        """Where the LUKS header is, or None; `parse_header` has checked the extension."""
        data = self.extension(EXTENSION_CRYPTO)
        if data is None:
            return None
        return CryptoExtension(*struct.unpack(">QQ", data))


def probe_cluster_size(prefix: bytes | bytearray | memoryview) -> int:
    """The cluster size in bytes of a qcow2 image of which the first bytes are given.

    `parse_header` wants that many bytes (or all of a shorter file). Raises
    BadRequest("not a qcow2 image"), UnsupportedFeature for another version,
    CorruptImage.
    """
    if len(prefix) < 4 or bytes(prefix[:4]) != MAGIC:
        raise BadRequest("not a qcow2 image")
    if len(prefix) < 24:
        raise CorruptImage(
            f"header: the file ends after {len(prefix)} bytes, a header has at least "
            f"{V2_HEADER_LENGTH}",
            structure="header",
        )
    version = int.from_bytes(prefix[4:8], "big")
    if version not in (2, 3):
        raise UnsupportedFeature(f"header: unsupported qcow2 version {version}", structure="header")
    cluster_bits = int.from_bytes(prefix[20:24], "big")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise _corrupt(
            f"cluster_bits {cluster_bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
    return 1 << cluster_bits


def parse_header(
    first_cluster: bytes | bytearray | memoryview, file_size: int, *, checking: bool = False
) -> Header:
    """The header in the first cluster of a file that is `file_size` bytes long.

    `first_cluster` is the first cluster (more is ignored) or the whole of a
    shorter file. With `checking`, an image without refcounts passes.

    Raises BadRequest("not a qcow2 image"), UnsupportedFeature for versions,
    features and methods that are unknown, CorruptImage for any rule broken.
    """
    cluster_size = probe_cluster_size(first_cluster)
    data = bytes(memoryview(first_cluster)[:cluster_size])
    if len(data) < V2_HEADER_LENGTH:
        raise _corrupt(f"the file ends after {len(data)} bytes, before {V2_HEADER_LENGTH}")
    (
        _magic,
        version,
        backing_offset,
        backing_length,
        cluster_bits,
        stored_size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = _FIXED.unpack_from(data)
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size=stored_size & -SECTOR,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        crypt_method=crypt_method,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        header_length=V2_HEADER_LENGTH,
    )
    if version >= 3:
        header = _with_version_3_fields(header, data)
    if backing_offset > cluster_size:
        raise _corrupt(f"backing file name at {backing_offset:#x}, outside the header cluster")
    extensions_end = backing_offset or len(data)
    header = _with_extensions(header, data, header.header_length, extensions_end)
    _check_features(header)
    if len(data) < cluster_size:
        raise _corrupt(f"the file ends inside the header cluster, after {len(data)} bytes")
    if backing_offset:
        header = replace(header, backing_file=_backing_name(data, backing_offset, backing_length))
    _check_methods(header)
    _check_tables(header, stored_size, file_size, checking)
    return header


def serialize(header: Header) -> bytes:
    """The header cluster, zero-padded to one cluster; the same header gives the same bytes.

    The feature name table is left out for clusters of 4 KiB and less, and
    where the rest leaves it no room. Raises ImageFull when the header does not
    fit into a cluster, BadRequest for a backing name or format over its limit.
    """
    backing = header.backing_file or b""
    if len(backing) > MAX_BACKING_NAME_LENGTH:
        raise BadRequest(
            f"backing file name of {len(backing)} bytes, at most {MAX_BACKING_NAME_LENGTH}"
        )
    with_table = header.version >= 3 and header.cluster_bits >= _FEATURE_TABLE_MIN_CLUSTER_BITS
    known_length = V2_HEADER_LENGTH if header.version == 2 else V3_HEADER_LENGTH
    prefix_length = known_length + len(header.unknown_bytes)
    tail = _pack_extensions(header, with_table)
    if with_table and prefix_length + len(tail) + len(backing) > header.cluster_size:
        tail = _pack_extensions(header, with_table=False)
    backing_offset = prefix_length + len(tail) if backing else 0
    length = prefix_length + len(tail) + len(backing)
    if length > header.cluster_size:
        raise ImageFull(
            f"header: needs {length} bytes, a cluster has {header.cluster_size}",
            structure="header",
        )
    fixed = _FIXED.pack(
        MAGIC,
        header.version,
        backing_offset,
        len(backing),
        header.cluster_bits,
        header.virtual_size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fixed += _V3.pack(
            header.incompatible,
            header.compatible,
            header.autoclear,
            header.refcount_order,
            prefix_length,
        )
        fixed += bytes([header.compression_type]) + bytes(7)
    whole = fixed + header.unknown_bytes + tail + backing
    return whole + bytes(header.cluster_size - len(whole))


# The fields below change by one write inside one sector, so that a crash leaves
# the old pair or the new one. Each function gives (file offset, bytes).


def virtual_size_field(virtual_size: int) -> tuple[int, bytes]:
    """The write that changes the size of the active disk."""
    return 24, struct.pack(">Q", virtual_size)


def l1_field(l1_size: int, l1_table_offset: int) -> tuple[int, bytes]:
    """The write that switches to another active L1 table."""
    return 36, struct.pack(">IQ", l1_size, l1_table_offset)


def refcount_table_field(refcount_table_offset: int, clusters: int) -> tuple[int, bytes]:
    """The write that switches to another refcount table."""
    return 48, struct.pack(">QI", refcount_table_offset, clusters)


def snapshots_field(nb_snapshots: int, snapshots_offset: int) -> tuple[int, bytes]:
    """The write that switches to another snapshot table."""
    return 60, struct.pack(">IQ", nb_snapshots, snapshots_offset)


def incompatible_field(bits: int) -> tuple[int, bytes]:
    """The write that sets the incompatible feature bits (version 3 only)."""
    return 72, struct.pack(">Q", bits)


def autoclear_field(bits: int) -> tuple[int, bytes]:
    """The write that sets the autoclear feature bits (version 3 only)."""
    return 88, struct.pack(">Q", bits)


def _corrupt(rule: str) -> CorruptImage:
    return CorruptImage(f"header: {rule}", structure="header")


def _with_version_3_fields(header: Header, data: bytes) -> Header:
    if len(data) < V3_MIN_HEADER_LENGTH:
        raise _corrupt(f"the file ends after {len(data)} bytes, before {V3_MIN_HEADER_LENGTH}")
    incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(
        data, V2_HEADER_LENGTH
    )
    if header_length < V3_MIN_HEADER_LENGTH:
        raise _corrupt(f"header_length {header_length}, must be at least {V3_MIN_HEADER_LENGTH}")
    if header_length > header.cluster_size:
        raise _corrupt(
            f"header_length {header_length} exceeds the cluster of {header.cluster_size}"
        )
    if header_length > len(data):
        raise _corrupt(f"the file ends after {len(data)} bytes, before {header_length}")
    compression_type = data[104] if header_length > 104 else COMPRESSION_ZLIB
    return replace(
        header,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=header_length,
        compression_type=compression_type,
        unknown_bytes=data[V3_HEADER_LENGTH:header_length],
    )


def _with_extensions(header: Header, data: bytes, start: int, end: int) -> Header:
    kept: list[Extension] = []
    backing_format: str | None = None
    data_file: bytes | None = None
    feature_names: tuple[FeatureName, ...] = ()
    for extension in read_extensions(data, start, min(end, len(data))):
        if extension.type == EXTENSION_BACKING_FORMAT:
            backing_format = parse_backing_format(extension.data)
        elif extension.type == EXTENSION_FEATURE_TABLE:
            feature_names = parse_feature_table(extension.data)
        elif extension.type == EXTENSION_DATA_FILE:
            data_file = extension.data
        else:
            kept.append(extension)
    return replace(
        header,
        extensions=tuple(kept),
        backing_format=backing_format,
        data_file=data_file,
        feature_names=feature_names,
    )


def _backing_name(data: bytes, offset: int, length: int) -> bytes | None:
    if length > min(MAX_BACKING_NAME_LENGTH, len(data) - offset):
        raise _corrupt(
            f"backing file name of {length} bytes at {offset:#x}, must be at most "
            f"{MAX_BACKING_NAME_LENGTH} and inside the header cluster"
        )
    return data[offset : offset + length] or None


def _check_features(header: Header) -> None:
    unknown = header.incompatible & ~INCOMPATIBLE_KNOWN
    if unknown:
        names = {
            feature.bit: printable(feature.name)
            for feature in header.feature_names
            if feature.kind == FEATURE_INCOMPATIBLE and feature.name
        }
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        listed = ", ".join(names.get(bit, f"bit {bit}") for bit in bits)
        raise UnsupportedFeature(
            f"header: unsupported incompatible feature(s): {listed}", structure="header"
        )
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise _corrupt(
            f"refcount_order {header.refcount_order}, must be at most {MAX_REFCOUNT_ORDER}"
        )
    if header.compression_type not in (COMPRESSION_ZLIB, COMPRESSION_ZSTD):
        raise UnsupportedFeature(
            f"header: unknown compression type {header.compression_type}", structure="header"
        )
    has_bit = bool(header.incompatible & INCOMPATIBLE_COMPRESSION)
    if has_bit != (header.compression_type != COMPRESSION_ZLIB):
        raise _corrupt(
            f"compression type {header.compression_type} with the compression type bit "
            f"{'set' if has_bit else 'clear'}"
        )
    if header.extended_l2 and header.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        raise _corrupt(
            f"extended L2 entries with clusters of {header.cluster_size} bytes, need "
            f"{1 << MIN_EXTENDED_L2_CLUSTER_BITS}"
        )
    if header.data_file_raw and not header.has_data_file:
        raise _corrupt("the raw external data bit is set without an external data file")


def _check_methods(header: Header) -> None:
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        raise UnsupportedFeature(
            f"header: unknown encryption method {header.crypt_method}", structure="header"
        )
    crypto = header.extension(EXTENSION_CRYPTO)
    if header.crypt_method == CRYPT_LUKS and crypto is None:
        raise _corrupt("LUKS encryption without a crypto extension")
    if crypto is not None and header.crypt_method != CRYPT_LUKS:
        raise _corrupt(f"crypto extension with encryption method {header.crypt_method}")
    if crypto is not None and len(crypto) != 16:
        raise _corrupt(f"crypto extension: {len(crypto)} bytes long, must be 16")


def _check_tables(header: Header, stored_size: int, file_size: int, checking: bool) -> None:
    geometry = header.geometry()
    tables = [
        (
            "refcount table",
            header.refcount_table_offset,
            header.refcount_table_clusters * header.cluster_size,
            MAX_REFCOUNT_TABLE_LENGTH,
        ),
        ("L1 table", header.l1_table_offset, header.l1_size * L1_ENTRY_LENGTH, MAX_L1_LENGTH),
    ]
    if header.refcount_table_clusters == 0 and not checking:
        raise _corrupt("the refcount table has no clusters")
    if header.nb_snapshots > MAX_SNAPSHOT_COUNT:
        raise _corrupt(f"{header.nb_snapshots} snapshots, must be at most {MAX_SNAPSHOT_COUNT}")
    if header.nb_snapshots or header.snapshots_offset & geometry.cluster_mask:
        # The table's length is not known before it is read; one byte stands for it.
        tables.append(("snapshot table", header.snapshots_offset, 1, 1))
    file_end = geometry.round_up(file_size)
    for name, offset, length, limit in tables:
        if length > limit:
            raise _corrupt(f"{name} of {length} bytes, must be at most {limit}")
        if offset & geometry.cluster_mask:
            raise _corrupt(f"{name} at {offset:#x}, not aligned to a cluster")
        if length and offset == 0:
            raise _corrupt(f"{name} at 0x0, where the header is")
        if length and (offset >= file_size or offset + length > file_end):
            raise _corrupt(f"{name} of {length} bytes at {offset:#x}, past the end of the file")
    needed = geometry.l1_count(stored_size)
    if header.l1_size < needed:
        raise _corrupt(
            f"L1 table has {header.l1_size} entries, too few for {stored_size} bytes ({needed})"
        )
    ranges = sorted((offset, offset + length, name) for name, offset, length, _ in tables if length)
    for (_, end, name), (offset, _, other) in itertools.pairwise(ranges):
        if offset < end:
            raise _corrupt(f"{name} and {other} overlap at {offset:#x}")


def _pack_extensions(header: Header, with_table: bool) -> bytes:
    """All extensions and the end marker, in the order that QEMU writes."""
    packed: list[Extension] = []
    if header.backing_format:
        packed.append(pack_backing_format(header.backing_format))
    if header.data_file is not None:
        packed.append(Extension(EXTENSION_DATA_FILE, header.data_file))
    packed += [e for e in header.extensions if e.type == EXTENSION_CRYPTO]
    if with_table:
        packed.append(Extension(EXTENSION_FEATURE_TABLE, pack_feature_table(header.feature_names)))
    packed += [e for e in header.extensions if e.type == EXTENSION_BITMAPS]
    placed = (EXTENSION_CRYPTO, EXTENSION_BITMAPS)
    packed += [e for e in header.extensions if e.type not in placed]
    return pack_extensions(packed)
