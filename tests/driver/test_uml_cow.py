"""The node of COW images: the contract suite over all layouts, commits, sparseness, failures."""

import errno
from collections.abc import Awaitable, Callable

import pytest

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.layout.uml_cow import LAYOUTS, parse_cow_header
from qcowfs.driver.node import Node
from qcowfs.driver.raw import RawNode
from qcowfs.errors import ReadOnlyImage, UnsupportedFeature
from tests.driver import contract
from tests.driver.cow_images import empty_image, make_node_of, open_file
from tests.fakes import CrashFile, FaultyFile, MemoryFile

Check = Callable[[contract.MakeNode], Awaitable[None]]
NAMES = [layout.name for layout in LAYOUTS]


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("layout", ["qemu-2-64", "uml-3"])
@pytest.mark.parametrize("rule", contract.CHECKS, ids=lambda rule: rule.__name__)
async def test_contract(rule: Check, layout: str, rate: float) -> None:
    """A COW node keeps the contract of nodes, whether or not it must wait."""
    await rule(make_node_of(layout, rate))


@pytest.mark.parametrize("layout", NAMES)
async def test_contract_in_every_layout(layout: str) -> None:
    """Headers of all versions and structures lead to the same disk."""
    for rule in (contract.check_reads, contract.check_writes, contract.check_zeroes):
        await rule(make_node_of(layout))


async def test_contract_with_larger_sectors() -> None:
    """User-mode-Linux lets the header choose the sector; a part of one is filled up."""
    for rule in contract.CHECKS:
        await rule(make_node_of("uml-3", sector_length=4096))


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("sector_length", [512, 4096])
async def test_overlay(sector_length: int, rate: float) -> None:
    """Over a shorter backing file its bytes show until they are changed, and never again after."""

    async def make_overlay(backing: bytes, size: int) -> Node:
        file = MemoryFile(
            empty_image("uml-3", size, sector_length=sector_length),
            miss_rate=rate,
            refusal_rate=rate,
        )
        return await open_file(file, backing=RawNode(MemoryFile(backing, read_only=True)))

    await contract.check_overlay(make_overlay)
