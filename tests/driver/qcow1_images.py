"""Images of qcow version 1 in memory: empty ones laid out by the rules, and what a test opens."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

from qcowfs.driver.layout.qcow1 import (
    CRYPT_AES,
    CRYPT_NONE,
    HEADER_LENGTH,
    Qcow1Header,
    parse_qcow1_header,
    serialize_qcow1_header,
)
from qcowfs.driver.node import Node
from qcowfs.driver.qcow1 import Qcow1Node, open_qcow1
from qcowfs.driver.qcow1_check import Qcow1Report, check_qcow1
from qcowfs.driver.qcow1_tables import load_l1
from qcowfs.driver.storage import Storage
from tests.driver import contract
from tests.fakes import MemoryFile

KEY = b"a passphrase longer than sixteen bytes"


def empty_image(
    size: int,
    *,
    cluster_bits: int = 12,
    l2_bits: int = 9,
    backing_file: bytes | None = None,
    encrypted: bool = False,
) -> bytes:
    """An image of `size` bytes without a cluster; its L1 table follows the header unaligned."""
    header = Qcow1Header(
        backing_file=backing_file,
        mtime=0,
        virtual_size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=CRYPT_AES if encrypted else CRYPT_NONE,
        l1_table_offset=HEADER_LENGTH + -(-len(backing_file or b"") // 8) * 8,
    )
    head = serialize_qcow1_header(header).ljust(header.l1_table_offset, b"\0")
    return head + bytes(header.l1_size * 8)


async def open_file(
    storage: Storage,
    *,
    backing: Node | None = None,
    key: bytes | None = KEY,
    cache_size: int = 1 << 20,
) -> Qcow1Node:
    """The node of an image in any storage."""
    head = await storage.pread(min(storage.size(), 65536), 0)
    header = parse_qcow1_header(bytes(head), storage.size())
    return await open_qcow1(
        storage, header, path="image.qcow", backing=backing, key=key, cache_size=cache_size
    )


async def check(content: bytes | bytearray) -> Qcow1Report:
    """What the checker finds in the bytes of an image."""
    storage = MemoryFile(content, read_only=True)
    header = parse_qcow1_header(bytes(content[:65536]), len(content))
    return await check_qcow1(storage, header, await load_l1(storage, header))


async def filled_image(content: bytes, empty: bytes) -> bytes:
    """`empty` with `content` written where it is not zeros."""
    storage = MemoryFile(empty)
    node = await open_file(storage)
    for start in range(0, len(content), 4096):
        part = content[start : start + 4096]
        if any(part):
            await contract.write(node, start, part)
    await node.aclose()
    return bytes(storage.content)


def make_node_of(
    make_empty: Callable[[int], bytes], *, miss_rate: float = 0.0, refusal_rate: float = 0.0
) -> contract.MakeNode:
    """The maker of nodes that the contract suite asks for."""

    async def make_node(content: bytes, *, read_only: bool = False) -> Node:
        image = await filled_image(content, make_empty(len(content)))
        return await open_file(
            MemoryFile(
                image,
                read_only=read_only,
                miss_rate=miss_rate,
                refusal_rate=refusal_rate,
                seed=5,
            )
        )

    return make_node


def header_of(content: bytes | bytearray, **changes: object) -> Qcow1Header:
    """The header of an image's bytes, with other values."""
    return replace(parse_qcow1_header(bytes(content[:65536]), len(content)), **changes)  # type: ignore[arg-type]


def compressed_image(empty: bytes, content: bytes) -> bytes:
    """Every second cluster of `content` as a compressed one, streams side by side."""
    header = header_of(empty)
    result = bytearray(empty)
    size = header.cluster_size
    for index in range(0, -(-len(content) // size), 2):
        l1_at = header.l1_table_offset + index // header.l2_entry_count * 8
        table = struct.unpack_from(">Q", result, l1_at)[0]
        if not table:
            table = -(-len(result) // size) * size
            result.extend(bytes(table - len(result) + header.l2_table_length))
            struct.pack_into(">Q", result, l1_at, table)
        cluster = content[index * size : (index + 1) * size].ljust(size, b"\0")
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        stream = packer.compress(cluster) + packer.flush()
        if len(stream) < size:
            entry = header.compressed_entry(len(result), len(stream))
            struct.pack_into(">Q", result, table + index % header.l2_entry_count * 8, entry)
            result.extend(stream)
    return bytes(result)
