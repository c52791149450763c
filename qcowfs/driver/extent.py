"""What a range of guest bytes is made of, in one layer of an image.

Four kinds, with or without a host offset, express all that the formats know:
a ZERO extent with a host offset is a preallocated zero cluster, an
UNALLOCATED one with a host offset is an unwritten subcluster of an allocated
cluster.
"""

import enum
from typing import NamedTuple


class ExtentKind(enum.Enum):
    """How the bytes of an extent are to be found."""

    DATA = "data"
    ZERO = "zero"
    COMPRESSED = "compressed"
    UNALLOCATED = "unallocated"


class Extent(NamedTuple):
    """A run of guest bytes of one kind; offsets and lengths in bytes.

    `host_offset` is where `guest_offset` itself lies in the host file, so it
    grows with it inside a run. A COMPRESSED extent covers a part of one
    cluster: its `host_offset` is where the compressed stream begins, its
    `stored_length` the bytes that the stream may occupy.
    """

    kind: ExtentKind
    guest_offset: int
    length: int
    host_offset: int | None = None
    stored_length: int = 0
