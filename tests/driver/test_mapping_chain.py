"""Extents through a backing chain: against a model, against qemu-img map, and for SEEK_DATA."""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.mapping_chain import ChainExtent, chain_extents, data_or_hole, map_entries
from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.raw import RawNode
from tests.fakes import MemoryFile

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-io") and shutil.which("qemu-img")), reason="no QEMU tools"
)

UNIT = 4096
D, Z, C, U = ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED
LETTERS = {"D": D, "Z": Z, "C": C, ".": U}


class Layer:
    """A node of which only the mapping exists: one letter a unit, data in place."""

    format_name = "qcow2"

    def __init__(self, letters: str, backing: "Layer | None" = None) -> None:
        self.letters = letters
        self.backing = backing
        self.virtual_size = len(letters) * UNIT
        self.longest = 0

    async def extents(
        self, guest_offset: int, length: int, *, limit: int | None = None
    ) -> list[Extent]:
        """The units of the range, neighbours joined but for compressed ones."""
        assert guest_offset + length <= self.virtual_size
        found: list[Extent] = []
        end = guest_offset + length
        while guest_offset < end:
            unit = guest_offset // UNIT
            stop = min(end, (unit + 1) * UNIT)
            kind = LETTERS[self.letters[unit]]
            last = found[-1] if found else None
            if last is not None and last.kind is kind and kind is not C:
                found[-1] = last._replace(length=last.length + stop - guest_offset)
            else:
                if len(found) == limit:
                    break
                host_offset = guest_offset if kind is D else unit * UNIT if kind is C else None
                stored_length = 99 if kind is C else 0
                found.append(
                    Extent(kind, guest_offset, stop - guest_offset, host_offset, stored_length)
                )
            guest_offset = stop
        self.longest = max(self.longest, len(found))
        return found


def as_node(layer: Layer) -> Node:
    """The layer, as far as the mapping needs one."""
    return cast("Node", layer)


def expected(layer: Layer, unit: int) -> tuple[ExtentKind, int]:
    """Kind and depth of one unit, by looking from the top down."""
    depth = 0
    below: Layer | None = layer
    while True:
        assert below is not None
        kind = LETTERS[below.letters[unit]]
        below = below.backing
        if kind is not U or below is None or unit >= len(below.letters):
            return kind, depth
        depth += 1


def shown(extents: list[ChainExtent]) -> list[tuple[ExtentKind, int, int, int]]:
    """Kind, first unit, unit count, depth."""
    return [(e.kind, e.guest_offset // UNIT, e.length // UNIT, e.depth) for e in extents]


async def test_a_layer_shows_the_one_below_where_it_has_nothing() -> None:
    """Depths count from the top; behind the end of a backing file nothing is asked of it."""
    base = Layer("DDDZ.")
    middle = Layer("..Z..D", base)
    top = Layer("C......D", middle)
    extents = await chain_extents(as_node(top), 0, top.virtual_size)
    assert shown(extents) == [
        (C, 0, 1, 0),
        (D, 1, 1, 2),
        (Z, 2, 1, 1),
        (Z, 3, 1, 2),
        (U, 4, 1, 2),
        (D, 5, 1, 1),
        (U, 6, 1, 0),
        (D, 7, 1, 0),
    ]
    assert [e.node for e in extents[:3]] == [as_node(layer) for layer in (top, base, middle)]
    assert (extents[0].host_offset, extents[0].stored_length) == (0, 99)


@pytest.mark.parametrize("seed", range(8))
async def test_any_chain_maps_as_looking_down_says(seed: int) -> None:
    """Every range of random chains has the kind and depth of each of its units."""
    rng = random.Random(seed)
    layer: Layer | None = None
    for _ in range(rng.randint(1, 5)):
        layer = Layer("".join(rng.choices("DZC.", (2, 1, 1, 5), k=rng.randint(1, 60))), layer)
    assert layer is not None
    for _ in range(20):
        start = rng.randrange(layer.virtual_size)
        length = rng.randint(1, layer.virtual_size - start)
        extents = await chain_extents(as_node(layer), start, length)
        covered = start
        for number, extent in enumerate(extents):
            assert extent.guest_offset == covered
            covered += extent.length
            for byte in range(extent.guest_offset, covered, 512):
                assert expected(layer, byte // UNIT) == (extent.kind, extent.depth)
            if number and extent.kind is not C:
                last = extents[number - 1]
                assert (last.kind, last.depth) != (extent.kind, extent.depth)
        assert covered == start + length
        for limit in (1, 3):
            assert await chain_extents(as_node(layer), start, length, limit) == extents[:limit]


async def test_a_very_long_chain_is_no_deeper_than_others() -> None:
    """A thousand layers are walked without recursion."""
    layer = Layer("D")
    for _ in range(3000):
        layer = Layer(".", layer)
    assert shown(await chain_extents(as_node(layer), 0, UNIT)) == [(D, 0, 1, 3000)]


async def test_a_limit_bounds_what_a_layer_is_asked_for() -> None:
    """A few extents of a fragmented layer do not cost all of its extents."""
    layer = Layer("DZ" * 5000)
    assert len(await chain_extents(as_node(layer), 0, layer.virtual_size, limit=10)) == 10
    assert layer.longest <= 11
    assert len(await chain_extents(as_node(layer), 0, layer.virtual_size)) == 10_000
    assert layer.longest <= 1024


async def test_data_and_holes_alternate() -> None:
    """Data is what some layer stores; zeros and what no layer has are holes, as is the end."""
    top = as_node(Layer("..Z.D.C", Layer("D..D..")))
    size = 7 * UNIT
    assert await data_or_hole(top, 0, want_data=True) == 0
    assert await data_or_hole(top, 0, want_data=False) == UNIT
    assert await data_or_hole(top, UNIT + 5, want_data=False) == UNIT + 5
    assert await data_or_hole(top, UNIT, want_data=True) == 3 * UNIT
    assert await data_or_hole(top, 3 * UNIT + 7, want_data=True) == 3 * UNIT + 7
    assert await data_or_hole(top, 3 * UNIT, want_data=False) == 5 * UNIT
    assert await data_or_hole(top, 6 * UNIT, want_data=False) == size
    for want_data in (True, False):
        for past in (size, size + 1, 1 << 62):
            assert await data_or_hole(top, past, want_data=want_data) is None
    tail = as_node(Layer("D..."))
    assert await data_or_hole(tail, UNIT, want_data=True) is None


async def test_data_is_found_behind_a_huge_hole() -> None:
    """The search goes on in growing steps and finds the end of a disk of terabytes."""

    class Huge(Layer):
        async def extents(
            self, guest_offset: int, length: int, *, limit: int | None = None
        ) -> list[Extent]:
            """All hole but for the last unit."""
            end = guest_offset + length
            last_unit = self.virtual_size - UNIT
            found = []
            if guest_offset < last_unit:
                found.append(Extent(U, guest_offset, min(end, last_unit) - guest_offset))
            if end > last_unit:
                start = max(guest_offset, last_unit)
                found.append(Extent(D, start, end - start, start))
            return found

    disk = Huge("")
    disk.virtual_size = 64 << 40
    assert await data_or_hole(as_node(disk), 0, want_data=True) == (64 << 40) - UNIT


async def test_an_empty_range_and_an_empty_disk() -> None:
    """There is nothing to tell of no bytes."""
    node = RawNode(MemoryFile())
    assert await chain_extents(node, 0, 0) == []
    assert await map_entries(node, 0, 0) == []
    assert await data_or_hole(node, 0, want_data=False) is None
    await node.aclose()


# Against qemu-img map


def run(*command: str | Path) -> str:
    """Run a tool that has to succeed; its output."""
    return subprocess.run(
        [str(part) for part in command],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    ).stdout


def comparable(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries without what only some versions of qemu-img say, joined anew.

    QEMU calls data zero where it suspects preallocation and the host file has a
    hole; a mapping does not look below the image.
    """
    result: list[dict[str, Any]] = []
    for entry in entries:
        kept = {key: value for key, value in entry.items() if key != "compressed"}
        kept["zero"] = entry["zero"] and not entry["data"]
        if result:
            last = result[-1]
            follows = dict(kept, start=last["start"], length=last["length"])
            if "offset" in last:
                follows["offset"] = kept.get("offset", -1) - last["length"]
            if follows == last:
                last["length"] += kept["length"]
                continue
        result.append(kept)
    return result


def qemu_map(path: Path, format_name: str) -> list[dict[str, Any]]:
    """What qemu-img map says."""
    return comparable(json.loads(run("qemu-img", "map", "--output=json", "-f", format_name, path)))


async def our_map(path: Path, format_name: str) -> list[dict[str, Any]]:
    """What we say."""
    node = await open_image(path, format=format_name, read_only=True)
    try:
        return comparable(await map_entries(node, 0, node.virtual_size))
    finally:
        await node.aclose()


def base_image(folder: Path) -> Path:
    """A sparse raw file of 3 MiB."""
    path = folder / "base.raw"
    with path.open("wb") as file:
        for start in (0, 1 << 20, (2 << 20) + 8192):
            file.seek(start)
            file.write(b"b" * 100_000)
        file.truncate(3 << 20)
    return path


@needs_qemu
async def test_a_raw_map_is_that_of_qemu(tmp_path: Path) -> None:
    """Data and holes of a host file, each at its own offset."""
    path = base_image(tmp_path)
    assert await our_map(path, "raw") == qemu_map(path, "raw")


@needs_qemu
@pytest.mark.parametrize(
    "options",
    ["cluster_size=64k", "cluster_size=4k,compat=0.10", "extended_l2=on,cluster_size=64k",
     "cluster_size=512", "compression_type=zstd"],
)  # fmt: skip
async def test_a_chain_maps_as_in_qemu(tmp_path: Path, options: str) -> None:
    """Data, zeros, compressed clusters, discards and subclusters, over three layers."""
    base = base_image(tmp_path)
    middle = tmp_path / "middle.qcow2"
    top = tmp_path / "top.qcow2"
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options)
    run(*create, "-b", base, "-F", "raw", middle, "4M")
    run("qemu-io", "-c", "write -c 1M 64k", "-c", "write 1200k 10k", "-c", "write 3500k 70k",
        "-c", "write -z 64k 128k", "-c", "discard 3520k 64k", middle)  # fmt: skip
    run(*create, "-b", middle, "-F", "qcow2", top, "5M")
    run(
        "qemu-io",
        "-c",
        "write 300k 33k",
        "-c",
        "write -z 1216k 16k",
        "-c",
        "write 4900k 5k",
        "-c",
        "write -c 2M 64k",
        "-c",
        "write -z 4M 128k",
        "-c",
        "write -zu 256k 64k",
        top,
    )
    for path in (middle, top):
        assert await our_map(path, "qcow2") == qemu_map(path, "qcow2")
