"""Compressed clusters: one stream in, one cluster out, and the other way round.

Implements the compressed clusters of FORMATS.md 1.1 and 1.4: raw deflate with a
window of 2^12, or zstd in any number of frames. Bytes in, bytes out: no files,
no tables, no waiting; every call may run in a worker thread and releases the
interpreter lock for the heavy part.

Invariants: a decompressor never yields more than one cluster, and its working
memory is bounded by the window limit, whatever the stream says. The stored
length of a stream is only known to a sector, so bytes after the point where
the cluster is full are ignored; a stream that ends before it is corrupt.
"""

import functools
import sys
import zlib
from typing import Any

from qcowfs.errors import CorruptImage, UnsupportedFeature

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

# A deflate stream of a cluster may look back 4 KiB, whatever its size.
_DEFLATE_WINDOW_BITS = -12
_DEFLATE_MEMORY_LEVEL = 9

# The largest window that the reference decoder takes without being told to.
_ZSTD_WINDOW_LOG_MAX = 27
# One a sector of the largest cluster: more only serve to waste a reader's time.
_ZSTD_FRAME_COUNT_MAX = 4096
_ZSTD_SKIPPABLE_MAGIC = 0x184D2A50
_ZSTD_SKIPPABLE_MASK = 0xFFFFFFF0
_ZSTD_SKIPPABLE_HEADER_LENGTH = 8

Buffer = bytes | bytearray | memoryview


def inflate_cluster(compression_type: int, stored: Buffer, cluster_size: int) -> bytes:
    """The `cluster_size` bytes of one compressed cluster.

    `stored` begins with the stream and may go on behind it. Raises
    CorruptImage when the stream is damaged or yields less than a cluster, and
    UnsupportedFeature for an unknown `compression_type`.
    """
    if compression_type == COMPRESSION_ZLIB:
        return _inflate_deflate(stored, cluster_size)
    if compression_type == COMPRESSION_ZSTD:
        return _inflate_zstd(memoryview(stored), cluster_size)
    raise _unknown_type(compression_type)


def compress_cluster(compression_type: int, data: Buffer) -> bytes | None:
    """The stream for one whole cluster, or None when it would not be shorter than it."""
    if compression_type == COMPRESSION_ZLIB:
        deflate = _deflate_module()
        compressor = deflate.compressobj(
            deflate.Z_DEFAULT_COMPRESSION,
            deflate.DEFLATED,
            _DEFLATE_WINDOW_BITS,
            _DEFLATE_MEMORY_LEVEL,
        )
        stream: bytes = compressor.compress(data) + compressor.flush()
    elif compression_type == COMPRESSION_ZSTD:
        stream = _zstd_module().compress(data)
    else:
        raise _unknown_type(compression_type)
    return stream if len(stream) < len(data) else None


def _unknown_type(compression_type: int) -> UnsupportedFeature:
    return UnsupportedFeature(f"header: compression type {compression_type} is not known")


def _damaged(method: str, cause: object) -> CorruptImage:
    return CorruptImage(f"compressed cluster: {method}: {cause}", structure="compressed cluster")


@functools.cache
def _deflate_module() -> Any:
    # zlib-ng inflates about twice as fast as zlib, whose interface it has.
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng


@functools.cache
def _zstd_module() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _inflate_deflate(stored: Buffer, cluster_size: int) -> bytes:
    deflate = _deflate_module()
    try:
        data: bytes = deflate.decompressobj(_DEFLATE_WINDOW_BITS).decompress(stored, cluster_size)
    except deflate.error as error:
        raise _damaged("deflate", error) from None
    if len(data) != cluster_size:
        raise _damaged("deflate", f"the stream ends after {len(data)} of {cluster_size} bytes")
    return data


def _inflate_zstd(stored: memoryview, cluster_size: int) -> bytes:
    """One cluster out of any number of frames, skippable ones among them."""
    zstd = _zstd_module()
    pieces: list[bytes] = []
    missing_length = cluster_size
    start = 0
    frame_count = 0
    try:
        while missing_length:
            rest = stored[start:]
            if not rest:
                raise _damaged("zstd", f"the stream ends {missing_length} bytes too early")
            if _is_skippable(rest):
                start += _skippable_length(rest)
                continue
            frame_count += 1
            if frame_count > _ZSTD_FRAME_COUNT_MAX:
                raise _damaged("zstd", f"more than {_ZSTD_FRAME_COUNT_MAX} frames in a cluster")
            frame = rest[: _frame_length(zstd, rest)]
            missing_length -= _inflate_frame(zstd, frame, missing_length, pieces)
            start += len(frame)
    except zstd.ZstdError as error:
        raise _damaged("zstd", error) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _frame_length(zstd: Any, rest: memoryview) -> int:
    # A decompressor copies the input behind its frame: with many tiny frames
    # that would be quadratic, so each gets its own bytes only.
    try:
        length: int = zstd.get_frame_size(rest)
    except zstd.ZstdError:
        return len(rest)
    return length


def _inflate_frame(zstd: Any, frame: memoryview, limit: int, pieces: list[bytes]) -> int:
    """Append at most `limit` bytes of one frame to `pieces`; how many they are."""
    decompressor = zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX}
    )
    produced_length = 0
    piece = decompressor.decompress(frame, max_length=limit)
    while piece:
        pieces.append(piece)
        produced_length += len(piece)
        if decompressor.eof or produced_length == limit:
            break
        piece = decompressor.decompress(b"", max_length=limit - produced_length)
    return produced_length


def _is_skippable(rest: memoryview) -> bool:
    magic = int.from_bytes(rest[:4], "little")
    return magic & _ZSTD_SKIPPABLE_MASK == _ZSTD_SKIPPABLE_MAGIC


def _skippable_length(rest: memoryview) -> int:
    return _ZSTD_SKIPPABLE_HEADER_LENGTH + int.from_bytes(rest[4:8], "little")
