"""Compressed clusters: deflate with a 4 KiB window, and zstd frames."""

import random
import zlib
from typing import Any

import pytest

from qcowfs.driver.transform import compression
from qcowfs.driver.transform.compression import (
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    compress_cluster,
    inflate_cluster,
)
from qcowfs.errors import CorruptImage, UnsupportedFeature

CLUSTER = 65536
BOTH = pytest.mark.parametrize("method", [COMPRESSION_ZLIB, COMPRESSION_ZSTD])


def zstd() -> Any:
    return compression._zstd_module()


def compressible(length: int = CLUSTER) -> bytes:
    chance = random.Random(7)
    words = [chance.randbytes(chance.randrange(3, 40)) for _ in range(50)]
    data = b"".join(chance.choice(words) for _ in range(length // 3))
    return data[:length]


def deflated(data: bytes, window_bits: int = -12) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, window_bits)
    return compressor.compress(data) + compressor.flush()


@BOTH
def test_round_trip(method: int) -> None:
    """What was compressed comes back."""
    data = compressible()
    stream = compress_cluster(method, data)
    assert stream is not None
    assert inflate_cluster(method, stream, CLUSTER) == data


@BOTH
def test_incompressible_cluster_stays_plain(method: int) -> None:
    """A stream that would not be shorter than the cluster is not made."""
    assert compress_cluster(method, random.Random(1).randbytes(CLUSTER)) is None


@BOTH
def test_bytes_behind_the_stream_are_ignored(method: int) -> None:
    """The stored length is rounded up to sectors: what follows the stream is not looked at."""
    stream = compress_cluster(method, compressible())
    assert stream is not None
    assert inflate_cluster(method, stream + b"\xff" * 511, CLUSTER) == compressible()


@BOTH
def test_truncated_stream_is_corrupt(method: int) -> None:
    """A stream that ends before the cluster is full raises CorruptImage."""
    stream = compress_cluster(method, compressible())
    assert stream is not None
    with pytest.raises(CorruptImage):
        inflate_cluster(method, stream[:-20], CLUSTER)


@BOTH
def test_short_stream_is_corrupt(method: int) -> None:
    """A whole stream that yields less than a cluster raises CorruptImage."""
    stream = compress_cluster(method, compressible(CLUSTER // 2))
    assert stream is not None
    with pytest.raises(CorruptImage):
        inflate_cluster(method, stream, CLUSTER)


@BOTH
def test_longer_stream_is_cut(method: int) -> None:
    """Output past the cluster is never produced, whatever the stream holds."""
    stream = compress_cluster(method, bytes(64 << 20))
    assert stream is not None
    assert inflate_cluster(method, stream, CLUSTER) == bytes(CLUSTER)


@BOTH
@pytest.mark.parametrize("garbage", [b"", b"\0" * 512, b"\xff" * 512, b"no stream at all"])
def test_garbage_is_corrupt(method: int, garbage: bytes) -> None:
    """What is no stream raises CorruptImage."""
    with pytest.raises(CorruptImage):
        inflate_cluster(method, garbage, CLUSTER)


@BOTH
def test_memoryview_input(method: int) -> None:
    """A stream may be given as a view of a larger buffer."""
    stream = compress_cluster(method, compressible())
    assert stream is not None
    view = memoryview(b"head" + stream)[4:]
    assert inflate_cluster(method, view, CLUSTER) == compressible()


def test_deflate_window_is_four_kibibytes() -> None:
    """Our streams look back at most 4 KiB: a decoder with that window reads them."""
    data = random.Random(3).randbytes(8192) * 8
    stream = compress_cluster(COMPRESSION_ZLIB, data) or deflated(data)
    assert zlib.decompressobj(-12).decompress(stream) == data


def test_deflate_of_the_reference_library() -> None:
    """Streams made by zlib itself are read."""
    assert inflate_cluster(COMPRESSION_ZLIB, deflated(compressible()), CLUSTER) == compressible()


def test_zstd_frames_follow_each_other() -> None:
    """A cluster may lie in several frames, empty and skippable ones between them."""
    data = compressible()
    skippable = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    stream = b"".join(
        [
            skippable,
            zstd().compress(data[:1000]),
            zstd().compress(b""),
            skippable,
            zstd().compress(data[1000:]),
            b"\0" * 100,
        ]
    )
    assert inflate_cluster(COMPRESSION_ZSTD, stream, CLUSTER) == data


def test_zstd_frame_without_content_size() -> None:
    """A frame need not say how long its content is."""
    compressor = zstd().ZstdCompressor(options={zstd().CompressionParameter.content_size_flag: 0})
    stream = compressor.compress(compressible()) + compressor.flush()
    assert inflate_cluster(COMPRESSION_ZSTD, stream, CLUSTER) == compressible()


def test_zstd_window_is_bounded() -> None:
    """A frame that asks for a window above 2^27 bytes is refused, not allocated."""
    # Magic, no content size, a window descriptor of 2^31, one raw block.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x09\0\0a"
    with pytest.raises(CorruptImage):
        inflate_cluster(COMPRESSION_ZSTD, frame, CLUSTER)


def test_zstd_dictionary_is_refused() -> None:
    """There is no dictionary in an image, so a frame that needs one is corrupt."""
    # Magic, a one-byte dictionary id, window 2^16, id 7, one raw block.
    frame = b"\x28\xb5\x2f\xfd\x01" + bytes([(16 - 10) << 3]) + b"\x07\x09\0\0a"
    with pytest.raises(CorruptImage):
        inflate_cluster(COMPRESSION_ZSTD, frame, CLUSTER)


def test_zstd_flood_of_frames_is_refused() -> None:
    """Hundreds of thousands of empty frames end in an error before they cost seconds."""
    with pytest.raises(CorruptImage, match="frames"):
        inflate_cluster(COMPRESSION_ZSTD, zstd().compress(b"") * 20000, CLUSTER)


def test_skippable_frame_past_the_end() -> None:
    """A skippable frame that claims more than there is ends the stream."""
    with pytest.raises(CorruptImage):
        inflate_cluster(COMPRESSION_ZSTD, b"\x50\x2a\x4d\x18\xff\xff\xff\xff", CLUSTER)


def test_unknown_type_is_unsupported() -> None:
    """Only the types 0 and 1 exist."""
    with pytest.raises(UnsupportedFeature):
        inflate_cluster(2, b"", CLUSTER)
    with pytest.raises(UnsupportedFeature):
        compress_cluster(2, b"")
