"""Refcounts packed at widths of 1 to 64 bits (qcow2 specification, "Reference count").

Widths of 8 bits and more are big-endian; narrower ones are packed into bytes
from the least significant bits on. Pure: views over bytes, no I/O. It knows
nothing of what a cluster is used for.

Invariants: a refcount never wraps; a value that the width cannot hold raises
ImageFull and changes nothing.
"""

import re
from typing import TYPE_CHECKING

from qcowfs.driver.layout.geometry import MAX_HOST_OFFSET, Geometry
from qcowfs.errors import CorruptImage, ImageFull

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REFCOUNT_TABLE_RESERVED_MASK = 0x1FF


def refcount_table_entry_offset(entry: int, index: int, geometry: Geometry) -> int:
    """The host offset of the refcount block that a table entry names; 0 for none.

    Raises CorruptImage for reserved bits, an offset that is not aligned, or one
    beyond what a mapping could name.
    """
    if entry & REFCOUNT_TABLE_RESERVED_MASK:
        rule = "has reserved bits set"
    elif entry & geometry.cluster_mask:
        rule = "names a block that is not aligned to a cluster"
    elif entry > MAX_HOST_OFFSET:
        rule = "names a block beyond the largest host offset"
    else:
        return entry
    raise CorruptImage(
        f"refcount table entry {index}: {entry:#018x} {rule}",
        structure="refcount table",
        index=index,
        host_offset=entry,
    )


def _free_field_bytes(order: int) -> bytes:
    """For each byte value, 1 when one of its fields of `1 << order` bits is 0."""
    width = 1 << order
    mask = (1 << width) - 1
    return bytes(
        any(not value >> shift & mask for shift in range(0, 8, width)) for value in range(256)
    )


_HAS_FREE_FIELD = tuple(_free_field_bytes(order) for order in range(3))
_ZERO_RUN = re.compile(rb"\0+")
_IS_ONE = bytes([0, 1]) + bytes(254)
_IS_ZERO = bytes([1]) + bytes(255)


class RefcountBlock:
    """The refcounts in `buffer`, changed in place; `order` is log2 of their width in bits."""

    __slots__ = ("_width", "buffer", "count", "maximum", "order")

    def __init__(self, buffer: bytearray, order: int) -> None:
        self.buffer = buffer
        self.order = order
        self.count = len(buffer) * 8 >> order
        self.maximum = (1 << (1 << order)) - 1
        # Bytes of a refcount; 0 where several share one.
        self._width = 1 << order >> 3

    def get(self, index: int) -> int:
        """The refcount at `index`."""
        width = self._width
        if width == 2:
            return self.buffer[2 * index] << 8 | self.buffer[2 * index + 1]
        if width:
            return int.from_bytes(self.buffer[index * width : (index + 1) * width], "big")
        bit = index << self.order
        return self.buffer[bit >> 3] >> (bit & 7) & self.maximum

    def set(self, index: int, value: int) -> None:
        """Store a refcount; ImageFull when the width cannot hold it (nothing is changed)."""
        if not 0 <= value <= self.maximum:
            raise ImageFull(
                f"refcount of {value} at index {index}: {1 << self.order} bits hold 0 to "
                f"{self.maximum}",
                structure="refcount block",
                index=index,
            )
        width = self._width
        if width:
            self.buffer[index * width : (index + 1) * width] = value.to_bytes(width, "big")
            return
        bit = index << self.order
        shift = bit & 7
        kept = self.buffer[bit >> 3] & ~(self.maximum << shift)
        self.buffer[bit >> 3] = kept | value << shift

    def fill(self, first: int, count: int, value: int) -> None:
        """Store `value` at `count` indexes from `first` on; ImageFull as of `set`."""
        width = self._width
        if not width or not 0 <= value <= self.maximum:
            for index in range(first, first + count):
                self.set(index, value)
            return
        self.buffer[first * width : (first + count) * width] = value.to_bytes(width, "big") * count

    def byte_range(self, first: int, count: int) -> tuple[int, int]:
        """(first byte, length in bytes) of the buffer that hold `count` refcounts."""
        first_byte = first << self.order >> 3
        end_byte = ((first + count) << self.order) + 7 >> 3
        return first_byte, end_byte - first_byte

    def find_free(self, start: int = 0) -> int:
        """The first index from `start` on whose refcount is 0; `count` when there is none."""
        width = self._width
        if not width:
            return self._find_free_narrow(start)
        buffer = self.buffer
        wanted = bytes(width)
        found = buffer.find(wanted, start * width)
        while found >= 0:
            index, inside = divmod(found, width)
            if not inside:
                return index
            # Zero bytes of two neighbours look like one free refcount: begin at the second.
            found = buffer.find(wanted, (index + 1) * width)
        return self.count

    def free_length(self, start: int, limit: int) -> int:
        """How many refcounts from `start` on are 0, at most `limit`."""
        limit = min(limit, self.count - start)
        if limit <= 0:
            return 0
        width = self._width
        if width:
            part = self.buffer[start * width : (start + limit) * width]
            return (len(part) - len(part.lstrip(b"\0"))) // width
        length = 0
        per_byte = 8 >> self.order
        while length < limit:
            index = start + length
            if index % per_byte == 0 and not self.buffer[index // per_byte]:
                length += per_byte
            elif self.get(index):
                break
            else:
                length += 1
        return min(length, limit)

    # Runs as wholes: long numbers of as many digits as there are refcounts, so
    # that thousands of them cost some microseconds, and no numpy.

    def values(self, first: int, count: int) -> list[int]:
        """`count` refcounts from `first` on."""
        return [self.get(index) for index in range(first, first + count)]

    def uniform(self, first: int, count: int) -> int | None:
        """What each of `count` refcounts from `first` on is, None when they differ or may."""
        width = self._width
        found = self.buffer[first * width : (first + count) * width]
        if not width or found != found[:width] * count:
            return None
        return int.from_bytes(found[:width], "big")

    def shift_run(self, first: int, count: int, step: int) -> None:
        """Add `step`, 1 or -1, to `count` refcounts from `first` on, none of which may wrap."""
        width = self._width
        if not width:
            for index, value in enumerate(self.values(first, count), first):
                self.set(index, value + step)
            return
        part = slice(first * width, (first + count) * width)
        ones = int.from_bytes((1).to_bytes(width, "big") * count, "big")
        number = int.from_bytes(self.buffer[part], "big") + step * ones
        self.buffer[part] = number.to_bytes(width * count, "big")

    def find_zero(self, first: int, count: int) -> int:
        """The first of `count` indexes from `first` on whose refcount is 0, or -1."""
        if not self._width:
            index = self._find_free_narrow(first)
            return index if index < first + count else -1
        found = self._digits(first, count).find(0)
        return first + found if found >= 0 else -1

    def find_maximum(self, first: int, count: int) -> int:
        """The first of `count` indexes from `first` on whose refcount cannot rise, or -1."""
        if not self._width:
            values = self.values(first, count)
            return first + values.index(self.maximum) if self.maximum in values else -1
        found = self._digits(first, count, inverted=True).find(0)
        return first + found if found >= 0 else -1

    def zero_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        """The runs (first index, count) of refcounts of 0 among `count` from `first` on."""
        if self._width:
            digits = self._digits(first, count)
        else:
            digits = bytes(self.values(first, count))
        return [
            (first + found.start(), found.end() - found.start())
            for found in _ZERO_RUN.finditer(digits)
        ]

    def ones(self, first: int, count: int) -> bytes:
        """A byte for each of `count` refcounts from `first` on: 1 where it is 1, else 0."""
        width = self._width
        if not width:
            return bytes(self.values(first, count)).translate(_IS_ONE)
        part = self.buffer[first * width : (first + count) * width]
        low = part[width - 1 :: width].translate(_IS_ONE)
        if width == 1:
            return bytes(low)
        high = self._digits(first, count, digit_count=width - 1).translate(_IS_ZERO)
        both = int.from_bytes(low, "big") & int.from_bytes(high, "big")
        return both.to_bytes(count, "big")

    def _digits(
        self,
        first: int,
        count: int,
        *,
        inverted: bool = False,
        digit_count: int | None = None,
    ) -> bytes:
        """A byte for each refcount of whole bytes: 0 where all its (first) bytes are 0.

        With `inverted`, 0 where all are 255.
        """
        width = self._width
        part = self.buffer[first * width : (first + count) * width]
        if inverted:
            number = int.from_bytes(part, "big") ^ ((1 << 8 * len(part)) - 1)
            part = bytearray(number.to_bytes(len(part), "big"))
        joined = 0
        for digit in range(digit_count or width):
            joined |= int.from_bytes(part[digit::width], "big")
        return joined.to_bytes(count, "big")

    def free_count(self) -> int:
        """How many refcounts of the block are 0."""
        found = 0
        start = self.find_free()
        while start < self.count:
            length = self.free_length(start, self.count)
            found += length
            start = self.find_free(start + length)
        return found

    def _find_free_narrow(self, start: int) -> int:
        per_byte = 8 >> self.order
        index = start
        while index < self.count and index % per_byte:
            if not self.get(index):
                return index
            index += 1
        first_byte = index // per_byte
        flags = self.buffer[first_byte:].translate(_HAS_FREE_FIELD[self.order])
        found = flags.find(1)
        if found < 0:
            return self.count
        index = (first_byte + found) * per_byte
        while self.get(index):
            index += 1
        return index


def find_free_run(
    block: RefcountBlock, start: int, count: int, *, minimum: int = 1
) -> tuple[int, int] | None:
    """(first index, length) of the first run of free refcounts from `start` on, or None.

    The run has at least `minimum` and at most `count` refcounts; a run that
    reaches the end of the block may go on in the next one, which is not seen
    here.
    """
    index = block.find_free(start)
    while index + minimum <= block.count:
        length = block.free_length(index, count)
        if length >= minimum:
            return index, length
        index = block.find_free(index + length)
    return None


def unpack_all(data: bytes | bytearray | memoryview, order: int) -> "NDArray[np.uint64]":
    """All refcounts of `data` as an array of 64-bit numbers."""
    import numpy as np

    if order >= 3:
        return np.frombuffer(data, dtype=f">u{1 << order >> 3}").astype(np.uint64)
    width = 1 << order
    packed = np.frombuffer(data, dtype=np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = packed[:, None] >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(-1).astype(np.uint64)


def pack_all(refcounts: "NDArray[np.uint64]", order: int) -> bytes:
    """The bytes of an array of refcounts, of which a whole number of bytes must result.

    Raises ImageFull when one of them does not fit the width.
    """
    import numpy as np

    maximum = (1 << (1 << order)) - 1
    if len(refcounts) and int(refcounts.max()) > maximum:
        index = int(refcounts.argmax())
        raise ImageFull(
            f"refcount of {int(refcounts[index])} at index {index}: {1 << order} bits hold at "
            f"most {maximum}",
            structure="refcount block",
            index=index,
        )
    if order >= 3:
        return refcounts.astype(f">u{1 << order >> 3}").tobytes()
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = refcounts.astype(np.uint8).reshape(-1, 8 // width) << shifts
    packed: bytes = np.bitwise_or.reduce(fields, axis=1).astype(np.uint8).tobytes()
    return packed
