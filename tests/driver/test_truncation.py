"""Files that were cut off: refused for writing, whatever is missing; sound ones pass."""

import pytest

from qcowfs.driver.layout.geometry import OFFSET_MASK
from qcowfs.driver.layout.header import parse_header
from qcowfs.driver.qcow2.truncation import require_whole_file
from qcowfs.errors import CorruptImage, QcowfsError
from tests.driver.engine import MIB, blank_image, open_metadata
from tests.fakes import MemoryFile, resize


async def _check(content: bytes | bytearray) -> None:
    metadata = await open_metadata(MemoryFile(content), prepared=False)
    await require_whole_file(metadata)


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "options", "writes"),
    [
        (65536, 16, "", ()),
        (65536, 16, "", ("write 0 1M", "discard 64k 128k")),
        (65536, 16, ",preallocation=metadata", ()),
        (512, 1, "", ("write 0 1M",)),
        (65536, 16, "", ("write -c 0 64k", "write -c 64k 64k")),
        (16384, 64, ",extended_l2=on", ("write 0 1M",)),
    ],
)
async def test_a_sound_image_passes(
    cluster_size: int, refcount_bits: int, options: str, writes: tuple[str, ...]
) -> None:
    """Whatever QEMU makes is whole, preallocated and compressed images included."""
    await _check(
        blank_image(
            4 * MIB,
            cluster_size=cluster_size,
            refcount_bits=refcount_bits,
            options=options,
            writes=writes,
        )
    )


async def test_every_cut_that_loses_something_is_found() -> None:
    """An image cut at any cluster is refused, by its header or by this check."""
    content = blank_image(
        4 * MIB, cluster_size=4096, writes=("write -P 5 0 64k", "write -P 6 3M 64k")
    )
    for length in range(4096, len(content), 4096):
        with pytest.raises(QcowfsError, match=r"cut off|end of the file|outside|past|header"):
            await _check(content[:length])


async def test_a_missing_guest_cluster_is_named() -> None:
    """When only data at the end is missing, the message names its guest offset."""
    content = blank_image(4 * MIB, writes=("write -P 5 1M 64k",))
    with pytest.raises(CorruptImage, match="cluster of guest offset 0x100000"):
        await _check(content[: len(content) - 65536])


async def test_a_missing_table_is_named() -> None:
    """An L2 table past the end is found without reading any table."""
    content = bytearray(blank_image(4 * MIB, writes=("write -P 5 1M 64k",)))
    header = parse_header(content, len(content))
    entry = int.from_bytes(content[header.l1_table_offset :][:8], "big")
    with pytest.raises(CorruptImage, match="the L2 table reaches"):
        await _check(content[: entry & OFFSET_MASK])


async def test_a_leak_past_the_end_is_no_cut() -> None:
    """Counts without references, as a crash leaves them, are no damage."""
    content = bytearray(blank_image())
    header = parse_header(content, len(content))
    block = int.from_bytes(content[header.refcount_table_offset :][:8], "big")
    content[block + 2000 : block + 2002] = b"\0\1"
    await _check(content)


async def test_a_longer_file_passes() -> None:
    """Bytes behind everything in use do no harm."""
    content = bytearray(blank_image())
    resize(content, len(content) + 100000)
    await _check(content)
