"""The FUSE messages that the lane reads or writes by itself.

Implements the part of the kernel's published protocol (7.x, native byte
order) that carries READ, WRITE, FLUSH, FSYNC, FALLOCATE and LSEEK, and the
few fields of INIT, OPEN, READDIR and INTERRUPT that the lane looks at. It does
no I/O and knows neither nodes nor inodes.

Invariants: every request begins with IN_HEADER, every answer and notification
with OUT_HEADER; the struct of an opcode lies at REQUEST_BODY_AT; a field that
this module does not name is passed on as it came.
"""

import struct
from typing import Final, NamedTuple

FORGET: Final = 2
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
FLUSH: Final = 25
INIT: Final = 26
READDIR: Final = 28
FSYNCDIR: Final = 30
INTERRUPT: Final = 36
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
LSEEK: Final = 46

UNANSWERED: Final = frozenset({FORGET, BATCH_FORGET, INTERRUPT, NOTIFY_REPLY})
"""Requests that the kernel expects no answer to."""

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""

OUT_HEADER: Final = struct.Struct("=IiQ")
"""len, error (0, -errno, or a notification's code when unique is 0), unique."""

HOT_REQUEST: Final = struct.Struct("=IIQQ16xQQI12xI")
"""len, opcode, unique, nodeid; fh, offset, size, flags: IN_HEADER with READ's or WRITE's body.

Other opcodes are decoded with it too, since only the first four fields are
used of them before their own struct is.
"""

FLUSH_OR_FSYNC_IN: Final = struct.Struct("=QI4x")
"""fh; then FSYNC's flags, unused in FLUSH."""

FALLOCATE_IN: Final = struct.Struct("=QQQI4x")
"""fh, offset, length, mode."""

LSEEK_IN: Final = struct.Struct("=QQI4x")
"""fh, offset, whence."""

OPEN_IN: Final = struct.Struct("=II")
"""flags of open(2), flags of FUSE."""

INTERRUPT_IN: Final = struct.Struct("=Q")
"""unique of the request that its caller no longer waits for."""

SIZED_READ_IN: Final = struct.Struct("=QQI")
"""fh, offset, size: READDIR, READDIRPLUS."""

XATTR_IN: Final = struct.Struct("=I4x")
"""size: GETXATTR, LISTXATTR."""

INIT_IN: Final = struct.Struct("=IIII")
"""major, minor, max_readahead, flags."""

FLAGS2: Final = struct.Struct("=I")
"""The upper half of INIT's flags; there only when INIT_EXT is among the lower."""

INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI")
"""major, minor, max_readahead, flags, max_background, congestion_threshold,
max_write, time_gran, max_pages, map_alignment, flags2."""

OPEN_OUT: Final = struct.Struct("=QI4x")
"""fh, open flags."""

WRITE_OUT: Final = struct.Struct("=I4x")
"""Bytes written."""

LSEEK_OUT: Final = struct.Struct("=Q")
"""Resulting offset."""

REQUEST_BODY_AT: Final = IN_HEADER.size
ANSWER_BODY_AT: Final = OUT_HEADER.size
WRITE_DATA_AT: Final = 80
"""Where the bytes of a WRITE begin: after the header and its 40-byte body."""

SETXATTR_FLAGS_AT: Final = 44
"""Where SETXATTR's flags (struct FLAGS2's shape) lie: behind the header and the size."""

READ_REQUEST_LENGTH: Final = 80

WRITE_CACHE: Final = 1 << 0
"""A WRITE's own flag: written back from the page cache."""

OPEN_DIRECT_IO: Final = 1 << 0
OPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

INIT_ASYNC_READ: Final = 1 << 0
INIT_BIG_WRITES: Final = 1 << 5
INIT_AUTO_INVAL_DATA: Final = 1 << 12
INIT_ASYNC_DIO: Final = 1 << 15
INIT_PARALLEL_DIROPS: Final = 1 << 18
INIT_ABORT_ERROR: Final = 1 << 21
INIT_MAX_PAGES: Final = 1 << 22
INIT_HANDLE_KILLPRIV_V2: Final = 1 << 28
"""No file here has a set-user-ID bit; without this the kernel asks for
security.capability before every buffered write."""

INIT_EXT: Final = 1 << 30
INIT2_DIRECT_IO_ALLOW_MMAP: Final = 1 << 4

WANTED_FLAGS: Final = (
    INIT_ASYNC_READ
    | INIT_BIG_WRITES
    | INIT_ASYNC_DIO
    | INIT_PARALLEL_DIROPS
    | INIT_ABORT_ERROR
    | INIT_MAX_PAGES
    | INIT_HANDLE_KILLPRIV_V2
)

UNWANTED_FLAGS: Final = INIT_AUTO_INVAL_DATA
"""With it the kernel asks for attributes between a write and the next cached
read, and drops all it has cached when the time of the last write has moved.
What changes behind its back here is invalidated by name."""

MAX_TRANSFER: Final = 1 << 20
"""Bytes of the largest READ or WRITE: what 256 pages of 4 KiB hold."""

MAX_BACKGROUND: Final = 64
"""Asynchronous requests that the kernel may have under way; its own default
of 12 would cap a queue of 32 direct requests."""

KERNEL_PAGE: Final = 4096

MAX_KERNEL_ERRNO: Final = 511
"""Above it are numbers that the kernel keeps to itself and refuses in an answer."""


class InitOffer(NamedTuple):
    """What the kernel said in its INIT request."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int


def parse_init_request(message: memoryview) -> InitOffer:
    """The offer in a whole INIT request; an old kernel's short one has no flags."""
    body = message[REQUEST_BODY_AT:]
    if len(body) < INIT_IN.size:
        return InitOffer(0, 0, 0, 0, 0)
    major, minor, max_readahead, flags = INIT_IN.unpack_from(body)
    flags2 = 0
    if flags & INIT_EXT and len(body) >= INIT_IN.size + FLAGS2.size:
        (flags2,) = FLAGS2.unpack_from(body, INIT_IN.size)
    return InitOffer(major, minor, max_readahead, flags, flags2)


def amend_init_answer(offer: InitOffer, answer: bytearray | memoryview) -> bool:
    """Raise what libfuse answered to what the lane can do; False when left alone.

    Only what the kernel offered is switched on; of what libfuse chose, only
    UNWANTED_FLAGS are switched off. A refused or short answer, or another major version (then
    the kernel asks again), stays as it is.
    """
    if len(answer) < ANSWER_BODY_AT + INIT_OUT.size:
        return False
    _, error, _ = OUT_HEADER.unpack_from(answer)
    fields = list(INIT_OUT.unpack_from(answer, ANSWER_BODY_AT))
    if error != 0 or fields[0] != offer.major:
        return False
    flags = (fields[3] | (offer.flags & WANTED_FLAGS)) & ~UNWANTED_FLAGS
    flags2 = fields[10] if flags & INIT_EXT else 0
    if offer.flags & INIT_EXT:
        flags |= INIT_EXT
        flags2 |= offer.flags2 & INIT2_DIRECT_IO_ALLOW_MMAP
    fields[3] = flags
    fields[4] = max(fields[4], MAX_BACKGROUND)
    fields[5] = max(fields[5], MAX_BACKGROUND * 3 // 4)
    fields[6] = MAX_TRANSFER
    if flags & INIT_MAX_PAGES:
        fields[8] = MAX_TRANSFER // KERNEL_PAGE
    fields[10] = flags2
    INIT_OUT.pack_into(answer, ANSWER_BODY_AT, *fields)
    return True


def error_answer(unique: int, number: int) -> bytes:
    """The answer that reports errno `number` (0: done, no body).

    ENOSYS must not be given for a hot opcode: the kernel would never send that
    opcode again on this mount.
    """
    return OUT_HEADER.pack(ANSWER_BODY_AT, -number, unique)


def body_answer(unique: int, body: bytes) -> bytes:
    """A successful answer with a small body."""
    return OUT_HEADER.pack(ANSWER_BODY_AT + len(body), 0, unique) + body
