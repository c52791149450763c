"""L1 and L2 entries, subclusters, and the one classifier of guest ranges.

Implements "Cluster mapping", "Standard Cluster Descriptor", "Compressed
Clusters Descriptor" and "Extended L2 Entries" of the qcow2 specification. Pure:
words in, extents out. It never reads, writes or caches anything.

Tables are `array('Q')` in native byte order, one word an entry, or two (entry,
then bitmap) with extended L2 entries. Whoever reads a range, on the fast path
or on the slow one, goes through `classify` or, for a range inside one cluster,
`classify_one`; both raise CorruptImage for an entry that breaks a rule, and
only when the range touches that entry.

A long run costs few Python steps: entry by entry for the first few, then by
comparing slices of the array with a slice that is computed at once.
"""

import enum
import struct
import sys
from array import array

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.layout.geometry import OFFSET_MASK, OFLAG_COPIED, Geometry
from qcowfs.errors import CorruptImage

OFLAG_COMPRESSED = 1 << 62
OFLAG_ZERO = 1 << 0
L1_RESERVED_MASK = 0x7F00_0000_0000_01FF
L2_RESERVED_MASK = 0x3F00_0000_0000_01FE
L2_EXTENDED_RESERVED_MASK = 0x3F00_0000_0000_01FF
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF_0000_0000
_UNIFORM_BITMAPS = (0, ALL_ALLOCATED, ALL_ZERO)

_BIG_ENDIAN = sys.byteorder == "big"
_LOW_HALF = 0xFFFF_FFFF
_COMPRESSED_SECTOR = 512
_DATA = ExtentKind.DATA
_ZERO = ExtentKind.ZERO
_COMPRESSED = ExtentKind.COMPRESSED
_UNALLOCATED = ExtentKind.UNALLOCATED
# What Extent(...) comes to, without the cost of its argument handling.
_new_tuple = tuple.__new__
# Most runs of a fragmented image end within a few entries, where a loop beats
# building a slice to compare with.
_STEPWISE_COUNT = 12
_FIRST_BLOCK_COUNT = 64
_MAX_BLOCK_COUNT = 4096
# Long numbers whose 64-bit digits are 1, 1, 1... and, from the lowest on, 0, 1, 2...
_ONES = int.from_bytes(struct.pack("<Q", 1) * _MAX_BLOCK_COUNT, "little")
_RAMP = int.from_bytes(struct.pack(f"<{_MAX_BLOCK_COUNT}Q", *range(_MAX_BLOCK_COUNT)), "little")


class ClusterType(enum.Enum):
    """What an L2 entry by itself says of its cluster."""

    UNALLOCATED = "unallocated"
    ZERO_PLAIN = "zero"
    ZERO_ALLOCATED = "zero, allocated"
    NORMAL = "normal"
    COMPRESSED = "compressed"


class SubclusterKind(enum.Enum):
    """What an L2 entry and its bitmap say of one subcluster."""

    UNALLOCATED_PLAIN = "unallocated"
    UNALLOCATED_ALLOCATED = "unallocated, in an allocated cluster"
    ZERO_PLAIN = "zero"
    ZERO_ALLOCATED = "zero, in an allocated cluster"
    NORMAL = "normal"
    COMPRESSED = "compressed"


def load_words(data: bytes | bytearray | memoryview) -> "array[int]":
    """The big-endian 64-bit words of `data` (a multiple of 8 bytes) in native order."""
    words = array("Q")
    words.frombytes(data)
    if not _BIG_ENDIAN:
        words.byteswap()
    return words


def store_words(words: "array[int]", first: int = 0, count: int | None = None) -> bytes:
    """The big-endian bytes of `count` words from index `first` on (of all to the end)."""
    last = len(words) if count is None else first + count
    part = words[first:last]
    if not _BIG_ENDIAN:
        part.byteswap()
    return part.tobytes()


def l1_entry_offset(entry: int, l1_index: int, geometry: Geometry) -> int:
    """The host offset of the L2 table that an L1 entry names; 0 for none.

    Raises CorruptImage for reserved bits and an offset that is not aligned.
    """
    if entry & L1_RESERVED_MASK:
        raise CorruptImage(
            f"L1 entry {l1_index}: {entry:#018x} has reserved bits set",
            structure="L1 table",
            index=l1_index,
        )
    host_offset = entry & OFFSET_MASK
    if host_offset & geometry.cluster_mask:
        raise CorruptImage(
            f"L1 entry {l1_index}: {entry:#018x} names an L2 table not aligned to a cluster",
            structure="L1 table",
            index=l1_index,
            host_offset=host_offset,
        )
    return host_offset


def data_entry(host_offset: int, *, zero: bool = False) -> int:
    """The L2 entry of a data cluster with refcount 1 (with `zero`, a standard zero cluster)."""
    return OFLAG_COPIED | host_offset | (OFLAG_ZERO if zero else 0)


def compressed_entry(host_offset: int, stored_length: int, geometry: Geometry) -> int:
    """The L2 entry of a compressed cluster stored in `stored_length` bytes."""
    sectors = (host_offset + stored_length - 1) // _COMPRESSED_SECTOR
    sectors -= host_offset // _COMPRESSED_SECTOR
    return OFLAG_COMPRESSED | sectors << geometry.csize_shift | host_offset


def compressed_location(entry: int, geometry: Geometry) -> tuple[int, int]:
    """(host offset, stored length) of a compressed cluster.

    The length reaches to the end of the last 512-byte sector that the stream
    may use, so it bounds the stream; what follows it there is not part of it.
    """
    host_offset = entry & geometry.compressed_offset_mask
    sectors = (entry >> geometry.csize_shift & geometry.csize_mask) + 1
    return host_offset, sectors * _COMPRESSED_SECTOR - (host_offset & _COMPRESSED_SECTOR - 1)


def compressed_clusters(entry: int, geometry: Geometry) -> tuple[int, int]:
    """(host offset of the first cluster, count) that a compressed cluster holds a reference to."""
    host_offset, stored_length = compressed_location(entry, geometry)
    first = host_offset & -geometry.cluster_size
    last = host_offset + stored_length - 1 & -geometry.cluster_size
    return first, (last - first >> geometry.cluster_bits) + 1


def allocation_bits(first_subcluster: int, count: int) -> int:
    """The bitmap bits that say "allocated" for subclusters of an extended L2 entry."""
    return ((1 << count) - 1) << first_subcluster


def zero_bits(first_subcluster: int, count: int) -> int:
    """The bitmap bits that say "reads as zeros" for subclusters of an extended L2 entry."""
    return ((1 << count) - 1) << (first_subcluster + 32)


def invalid_rule(entry: int, bitmap: int, guest_offset: int, geometry: Geometry) -> str | None:
    """The rule that an L2 entry breaks, or None for a valid one.

    `guest_offset` is that of the cluster's beginning.
    """
    if entry & OFLAG_COMPRESSED:
        if geometry.has_data_file:
            return "a compressed cluster in an image with an external data file"
        return "a compressed cluster with a subcluster bitmap" if bitmap else None
    host_offset = entry & OFFSET_MASK
    reserved = L2_EXTENDED_RESERVED_MASK if geometry.extended_l2 else L2_RESERVED_MASK
    if entry & reserved:
        return "reserved bits are set"
    if entry & OFLAG_ZERO and geometry.version < 3:
        return "a zero cluster in a version 2 image"
    if host_offset & geometry.cluster_mask:
        return "the host offset is not aligned to a cluster"
    if bitmap and bitmap >> 32 & bitmap & _LOW_HALF:
        return "a subcluster is both allocated and zero"
    if not host_offset and not (geometry.has_data_file and entry & OFLAG_COPIED):
        return "subclusters are allocated without a host offset" if bitmap & _LOW_HALF else None
    if geometry.has_data_file and host_offset != guest_offset:
        has_host_offset = host_offset or not entry & OFLAG_ZERO
        return "host and guest offset differ in the external data file" if has_host_offset else None
    return None


def check_entry(entry: int, bitmap: int, guest_offset: int, geometry: Geometry) -> None:
    """Raise CorruptImage when an L2 entry (and its bitmap) breaks a rule."""
    rule = invalid_rule(entry, bitmap, guest_offset & -geometry.cluster_size, geometry)
    if rule is None:
        return
    index = geometry.l2_index(guest_offset)
    shown = f"{entry:#018x}/{bitmap:#018x}" if geometry.extended_l2 else f"{entry:#018x}"
    raise CorruptImage(
        f"L2 entry {index} for guest offset {guest_offset:#x}: {shown}: {rule}",
        structure="L2 table",
        index=index,
        host_offset=entry & OFFSET_MASK,
    )


def cluster_type(entry: int, geometry: Geometry) -> ClusterType:
    """The type of an L2 entry that is taken to be valid."""
    if entry & OFLAG_COMPRESSED:
        return ClusterType.COMPRESSED
    host_offset = entry & OFFSET_MASK
    if entry & OFLAG_ZERO and not geometry.extended_l2:
        return ClusterType.ZERO_ALLOCATED if host_offset else ClusterType.ZERO_PLAIN
    # Host offset 0 is a place of its own in an external data file only: COPIED tells.
    if host_offset or (geometry.has_data_file and entry & OFLAG_COPIED):
        return ClusterType.NORMAL
    return ClusterType.UNALLOCATED


def subcluster_kind(entry: int, bitmap: int, subcluster: int, geometry: Geometry) -> SubclusterKind:
    """The kind of one subcluster of a valid entry; 0 is the only one without extended L2."""
    kind = cluster_type(entry, geometry)
    if kind is ClusterType.COMPRESSED:
        return SubclusterKind.COMPRESSED
    if not geometry.extended_l2:
        return _STANDARD_SUBCLUSTER[kind]
    has_host_offset = kind is ClusterType.NORMAL
    if bitmap >> subcluster & 1:
        return SubclusterKind.NORMAL
    if bitmap >> (subcluster + 32) & 1:
        if has_host_offset:
            return SubclusterKind.ZERO_ALLOCATED
        return SubclusterKind.ZERO_PLAIN
    if has_host_offset:
        return SubclusterKind.UNALLOCATED_ALLOCATED
    return SubclusterKind.UNALLOCATED_PLAIN


_STANDARD_SUBCLUSTER = {
    ClusterType.UNALLOCATED: SubclusterKind.UNALLOCATED_PLAIN,
    ClusterType.ZERO_PLAIN: SubclusterKind.ZERO_PLAIN,
    ClusterType.ZERO_ALLOCATED: SubclusterKind.ZERO_ALLOCATED,
    ClusterType.NORMAL: SubclusterKind.NORMAL,
}


def _equal_step_count(words: "array[int]", first: int, count: int, step: int, stride: int) -> int:
    """How many of `count` values from word `first` on each exceed the one before by `step`.

    The values are `stride` words apart. Nothing may carry out of 64 bits.
    """
    expected = words[first]
    done = 1
    word = first + stride
    while done < count and done < _STEPWISE_COUNT:
        expected += step
        if words[word] != expected:
            return done
        word += stride
        done += 1
    block_count = _FIRST_BLOCK_COUNT
    while done < count:
        block_count = min(block_count, count - done)
        found = words[word : word + block_count * stride : stride]
        equal = _equal_prefix(found, expected + step, step)
        if equal < block_count:
            return done + equal
        expected += step * block_count
        word += block_count * stride
        done += block_count
        block_count = min(block_count * 4, _MAX_BLOCK_COUNT)
    return count


def _equal_prefix(found: "array[int]", start: int, step: int) -> int:
    """How many leading words of `found` are `start`, `start + step`, `start + 2 * step`, ...

    One multiplication of long numbers makes all the words to compare with: for
    2,048 words 8 times as fast as a range of numbers put into an array.
    """
    count = len(found)
    if step:
        kept = (1 << 64 * count) - 1
        numbers = start * (_ONES & kept) + step * (_RAMP & kept)
        wanted = array("Q")
        wanted.frombytes(numbers.to_bytes(8 * count, "little"))
        if _BIG_ENDIAN:
            wanted.byteswap()
    else:
        wanted = array("Q", (start,)) * count
    if found == wanted:
        return count
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if found[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _run_count(
    words: "array[int]", index: int, count: int, entry: int, bitmap: int, geometry: Geometry
) -> int:
    """How many of `count` entries from `index` on continue it: offset by offset, or all alike."""
    if entry & OFLAG_COMPRESSED:
        return 1
    host_offset = entry & OFFSET_MASK
    step = 0
    if host_offset or (geometry.has_data_file and entry & OFLAG_COPIED and not entry & OFLAG_ZERO):
        step = geometry.cluster_size
        # One step beyond the mask would carry into flag bits and could look like a run.
        count = min(count, (OFFSET_MASK - host_offset >> geometry.cluster_bits) + 1)
    if not geometry.extended_l2:
        return _equal_step_count(words, index, count, step, 1)
    if bitmap not in _UNIFORM_BITMAPS:
        return 1
    count = _equal_step_count(words, 2 * index, count, step, 2)
    return _equal_step_count(words, 2 * index + 1, count, 0, 2)


def _bit_run(bits: int, first: int) -> int:
    """How many bits from `first` on equal that bit, in a value of 32 bits."""
    bits >>= first
    if bits & 1:
        bits = ~bits
    # The lowest set bit ends the run; a guard bit ends it at 32.
    bits |= 1 << (32 - first)
    return (bits & -bits).bit_length() - 1


def _classify_extended(
    entry: int, bitmap: int, guest_offset: int, length: int, geometry: Geometry
) -> Extent:
    """The first extent of a range inside one cluster of an extended entry, checked here."""
    in_cluster = guest_offset & geometry.cluster_mask
    if bitmap == ALL_ALLOCATED and not entry & geometry.plain_mask and entry & OFFSET_MASK:
        host_offset = (entry & OFFSET_MASK) + in_cluster
        return _new_tuple(Extent, (_DATA, guest_offset, length, host_offset, 0))
    check_entry(entry, bitmap, guest_offset, geometry)
    if entry & OFLAG_COMPRESSED:
        stream_offset, stored_length = compressed_location(entry, geometry)
        return Extent(_COMPRESSED, guest_offset, length, stream_offset, stored_length)
    subcluster = in_cluster >> geometry.subcluster_bits
    allocated = bitmap & _LOW_HALF
    zero = bitmap >> 32
    subcluster_count = min(_bit_run(allocated, subcluster), _bit_run(zero, subcluster))
    run_end = subcluster + subcluster_count << geometry.subcluster_bits
    length = min(length, run_end - in_cluster)
    found_offset: int | None = None
    if entry & OFFSET_MASK or (geometry.has_data_file and entry & OFLAG_COPIED):
        found_offset = (entry & OFFSET_MASK) + in_cluster
    if allocated >> subcluster & 1:
        kind = _DATA
    elif zero >> subcluster & 1:
        kind = _ZERO
    else:
        kind = _UNALLOCATED
    return Extent(kind, guest_offset, length, found_offset)


def _classify_standard(entry: int, guest_offset: int, length: int, geometry: Geometry) -> Extent:
    """The extent of a range inside one cluster of a standard entry, checked here."""
    in_cluster = guest_offset & geometry.cluster_mask
    host_offset = entry & OFFSET_MASK
    if not entry & geometry.plain_mask:
        if host_offset:
            return _new_tuple(Extent, (_DATA, guest_offset, length, host_offset + in_cluster, 0))
        return _new_tuple(Extent, (_UNALLOCATED, guest_offset, length, None, 0))
    check_entry(entry, 0, guest_offset, geometry)
    kind = cluster_type(entry, geometry)
    if kind is ClusterType.COMPRESSED:
        host_offset, stored_length = compressed_location(entry, geometry)
        return Extent(_COMPRESSED, guest_offset, length, host_offset, stored_length)
    if kind is ClusterType.UNALLOCATED:
        return Extent(_UNALLOCATED, guest_offset, length)
    if kind is ClusterType.ZERO_PLAIN:
        return Extent(_ZERO, guest_offset, length)
    host_offset += in_cluster
    if kind is ClusterType.ZERO_ALLOCATED:
        return Extent(_ZERO, guest_offset, length, host_offset)
    return Extent(_DATA, guest_offset, length, host_offset)


def classify_one(
    entry: int, bitmap: int, guest_offset: int, length: int, geometry: Geometry
) -> Extent:
    """The first extent of a range that lies in one cluster.

    It covers the whole range unless the range spans subclusters of different
    kinds. `bitmap` is 0 without extended L2. Raises CorruptImage.
    """
    if geometry.extended_l2:
        return _classify_extended(entry, bitmap, guest_offset, length, geometry)
    return _classify_standard(entry, guest_offset, length, geometry)


def append_extent(extents: list[Extent], extent: Extent) -> None:
    """Add `extent`, joined to the last one where it continues that."""
    if extents:
        kind, guest_offset, length, host_offset, _ = extents[-1]
        if (
            kind is extent[0]
            and extent[3] == (None if host_offset is None else host_offset + length)
            and kind is not _COMPRESSED
        ):
            extents[-1] = Extent(kind, guest_offset, length + extent[2], host_offset)
            return
    extents.append(extent)


def _first_extent(
    words: "array[int]", index: int, guest_offset: int, length: int, geometry: Geometry
) -> Extent:
    """The first extent of a range, not joined to what a differently flagged entry continues."""
    reach = geometry.cluster_size - (guest_offset & geometry.cluster_mask)
    if geometry.extended_l2:
        entry = words[2 * index]
        bitmap = words[2 * index + 1]
        if length <= reach:
            return _classify_extended(entry, bitmap, guest_offset, length, geometry)
        extent = _classify_extended(entry, bitmap, guest_offset, reach, geometry)
        if extent.length < reach:
            return extent
        following = words[2 * index + 2]
    else:
        entry = words[index]
        if length <= reach:
            return _classify_standard(entry, guest_offset, length, geometry)
        extent = _classify_standard(entry, guest_offset, reach, geometry)
        bitmap = 0
        following = words[index + 1]
    if following not in (entry, entry + geometry.cluster_size):
        return extent
    count = 1 + (length - reach + geometry.cluster_mask >> geometry.cluster_bits)
    count = _run_count(words, index, count, entry, bitmap, geometry)
    if count == 1:
        return extent
    reach += count - 1 << geometry.cluster_bits
    return Extent(extent.kind, guest_offset, min(length, reach), extent.host_offset)


def classify(
    words: "array[int]",
    first_index: int,
    guest_offset: int,
    length: int,
    geometry: Geometry,
) -> list[Extent]:
    """The extents of a guest range, in order, without gaps, neighbours joined.

    `words` holds at least all entries of the range; the cluster of
    `guest_offset` is its entry `first_index` (word `2 * first_index` with
    extended L2 entries). Raises CorruptImage for an entry that breaks a rule.
    """
    extent = _first_extent(words, first_index, guest_offset, length, geometry)
    extents = [extent]
    if extent.length == length:
        return extents
    end = guest_offset + length
    cluster_bits = geometry.cluster_bits
    index_bias = first_index - (guest_offset >> cluster_bits)
    guest_offset += extent.length
    while guest_offset < end:
        index = (guest_offset >> cluster_bits) + index_bias
        extent = _first_extent(words, index, guest_offset, end - guest_offset, geometry)
        append_extent(extents, extent)
        guest_offset += extent[2]
    return extents


def in_place_extent(
    words: "array[int]",
    first_index: int,
    guest_offset: int,
    length: int,
    geometry: Geometry,
) -> Extent | None:
    """The DATA extent at the beginning of a range that may be overwritten where it lies.

    None when the first byte may not: its cluster is shared (COPIED is clear),
    compressed, zero or unallocated. Arguments and errors as of `classify`.
    """
    if not words[first_index * geometry.words_per_entry] & OFLAG_COPIED:
        return None
    extent = _first_extent(words, first_index, guest_offset, length, geometry)
    return extent if extent.kind is _DATA else None
