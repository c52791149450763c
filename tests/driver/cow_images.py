"""COW images in memory, in every layout, built from the rules and filled sector by sector."""

from qcowfs.driver.layout.uml_cow import (
    LAYOUT_BY_NAME,
    CowHeader,
    parse_cow_header,
    serialize_cow_header,
)
from qcowfs.driver.node import Node
from qcowfs.driver.storage import Storage
from qcowfs.driver.uml_cow import CowNode, open_cow
from tests.driver import contract
from tests.fakes import MemoryFile


def empty_image(
    layout: str,
    size: int,
    *,
    backing_file: bytes | None = b"/base.raw",
    mtime: int = 1_000_000_000,
    sector_length: int = 512,
    alignment: int = 4096,
) -> bytes:
    """An image without a set bit, as long as its disk."""
    header = CowHeader(
        LAYOUT_BY_NAME[layout], backing_file, mtime, size, sector_length, alignment
    )
    return serialize_cow_header(header).ljust(header.data_offset + size, b"\0")


async def open_file(
    storage: Storage, *, backing: Node | None = None, cache_size: int = 1 << 20
) -> CowNode:
    """The node of an image in any storage."""
    head = await storage.pread(min(storage.size(), 65536), 0)
    header = parse_cow_header(bytes(head), storage.size())
    return await open_cow(
        storage, header, path="image.cow", backing=backing, cache_size=cache_size
    )


def set_sectors(image: bytes, content: bytes) -> bytes:
    """`image` with the sectors of `content` that are not zeros, their bits set one by one."""
    header = parse_cow_header(image[:65536], len(image))
    result = bytearray(image)
    for number in range(len(content) // 512):
        sector = content[number * 512 : number * 512 + 512]
        if any(sector):
            start = header.data_offset + number * 512
            result[start : start + 512] = sector
            bit = number * 512 // header.sector_length
            result[header.bitmap_offset + bit // 8] |= 1 << bit % 8
    return bytes(result)


def make_node_of(layout: str, rate: float = 0.0, **options: int) -> contract.MakeNode:
    """The maker of nodes that the contract suite asks for."""

    async def make_node(content: bytes, *, read_only: bool = False) -> Node:
        image = empty_image(layout, len(content), backing_file=None, **options)
        if layout == "uml-3":
            image = empty_image(layout, len(content), **options)
        image = set_sectors(image, content)
        file = MemoryFile(image, read_only=read_only, miss_rate=rate, refusal_rate=rate, seed=5)
        return await open_file(file)

    return make_node
