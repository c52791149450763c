"""The node of qcow version 1: the contract suite, discards, commits, keys, growing, failures."""

import errno
import random
import struct
import zlib
from collections.abc import Awaitable, Callable

import pytest

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.qcow1 import Qcow1Header, serialize_qcow1_header
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.errors import (
    BadRequest,
    CorruptImage,
    KeyRequired,
    ReadOnlyImage,
    UnsupportedFeature,
)
from tests.driver import contract
from tests.driver.qcow1_images import (
    check,
    empty_image,
    filled_image,
    header_of,
    make_node_of,
    open_file,
)
from tests.fakes import CrashFile, FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]

SHAPES: dict[str, dict[str, object]] = {
    "qemu": {},
    "overlay": {"cluster_bits": 9, "l2_bits": 12},
    "one-cluster-tables": {"cluster_bits": 16, "l2_bits": 13},
    "small-tables": {"cluster_bits": 9, "l2_bits": 6},
    "tables-smaller-than-clusters": {"cluster_bits": 16, "l2_bits": 6},
    "aes": {"encrypted": True},
    "aes-64k": {"encrypted": True, "cluster_bits": 16, "l2_bits": 6},
}


def _empty(shape: str) -> Callable[[int], bytes]:
    return lambda size: empty_image(size, **SHAPES[shape])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract(rule: Check, shape: str) -> None:
    """A node of any cluster and table size, encrypted or not, keeps the contract of nodes."""
    await rule(make_node_of(_empty(shape)))


@pytest.mark.parametrize("shape", ["qemu", "overlay", "aes"])
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract_where_little_is_at_once(rule: Check, shape: str) -> None:
    """The contract holds where bytes are rarely resident and writes are refused inline."""
    await rule(make_node_of(_empty(shape), miss_rate=0.6, refusal_rate=0.6))


@pytest.mark.parametrize("rates", [0.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
async def test_overlay(shape: str, rates: float) -> None:
    """Over a shorter backing file its bytes show until they are changed, and never again after."""

    async def make_overlay(backing: bytes, size: int) -> Node:
        image = empty_image(size, backing_file=b"base", **SHAPES[shape])  # type: ignore[arg-type]
        file = MemoryFile(image, miss_rate=rates, refusal_rate=rates)
        return await open_file(file, backing=RawNode(MemoryFile(backing, read_only=True)))

    await contract.check_overlay(make_overlay)
