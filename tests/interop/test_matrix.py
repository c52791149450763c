"""Images of every make by qemu-img read byte-identical: the active disk and every snapshot.

Each image is filled by seeded qemu-io commands, with snapshots on the way.
The judge is qemu-img alone: `convert` for the active disk, and for a snapshot
`snapshot -a` on a copy, which knows its true size.
"""

import json
import os
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import KIB, MIB

pytestmark = tools.needs_fuse


@dataclass(frozen=True)
class Case:
    """One image: how it is created, what lies under it, how often it is snapshotted."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    size: int = 4 * MIB
    snapshots: int = 2
    resize: bool = False
    compress: bool = False
    # Sizes and formats of the layers below, nearest first.
    backing: tuple[tuple[str, int], ...] = ()
    writes: int = 24


def _all_cases() -> list[Case]:
    cases = []
    for compat, version in (("0.10", "v2"), ("1.1", "v3")):
        for bits in range(9, 22):
            options: dict[str, object] = {"compat": compat, "cluster_size": 1 << bits}
            size = (1 if bits < 12 else 4 if bits < 18 else 16) * MIB
            cases.append(Case(f"{version}-cluster-{1 << bits}", options, size))
    for bits in (1, 2, 4, 8, 32, 64):
        cases.append(Case(f"refcount-{bits}", {"refcount_bits": bits, "cluster_size": 4 * KIB},
                          snapshots={1: 0, 2: 1}.get(bits, 5)))  # fmt: skip
    for bits in (14, 15, 16, 17, 19, 21):
        options = {"extended_l2": "on", "cluster_size": 1 << bits}
        cases.append(Case(f"subclusters-{1 << bits}", options, (16 if bits > 17 else 4) * MIB))
    for kind in ("zlib", "zstd"):
        for bits in (12, 16, 21):
            options = {"compression_type": kind, "cluster_size": 1 << bits}
            cases.append(Case(f"{kind}-{1 << bits}", options, compress=True))
    cases += [
        Case("zlib-v2", {"compat": "0.10"}, compress=True),
        Case("zlib-512", {"cluster_size": 512}, 1 * MIB, compress=True),
        Case("zstd-subclusters", {"extended_l2": "on", "compression_type": "zstd"}, compress=True),
    ]
    layer = ("qcow2", 4 * MIB)
    cases += [
        Case("over-raw", backing=(("raw", 4 * MIB),)),
        Case("over-short-raw", backing=(("raw", 1 * MIB + 512),)),
        Case("over-long-raw", backing=(("raw", 6 * MIB),)),
        Case("over-short-qcow2", backing=(("qcow2", 2 * MIB + 512),)),
        Case("over-long-qcow2", backing=(("qcow2", 7 * MIB),)),
        Case("v2-over-raw", {"compat": "0.10"}, backing=(("raw", 3 * MIB),)),
        Case("subclusters-over-qcow2", {"extended_l2": "on"}, backing=(layer,)),
        Case("chain-3", backing=(layer, ("qcow2", 3 * MIB), ("raw", 5 * MIB)), snapshots=3),
        Case("chain-5", {"cluster_size": 4 * KIB}, backing=(layer,) * 5, snapshots=1),
        Case("chain-10", backing=(*(layer,) * 8, ("qcow2", 1 * MIB), ("raw", 9 * MIB))),
        Case("compressed-over-qcow2", compress=True, backing=(layer,)),
    ]
    cases += [
        Case("snapshots-0", snapshots=0),
        Case("snapshots-1", snapshots=1),
        Case("snapshots-5-of-differing-sizes", snapshots=5, resize=True),
        Case("snapshots-20", {"cluster_size": 16 * KIB}, 2 * MIB, snapshots=20, writes=6),
        Case("snapshots-20-of-differing-sizes", {"cluster_size": 4 * KIB}, 2 * MIB, 20, True,
             writes=6),
        Case("subclusters-of-differing-sizes", {"extended_l2": "on"}, snapshots=4, resize=True),
    ]
    for size in (512, 65536 + 512, 3 * MIB - 512, 1000 * 512, 12_345 * 512):
        cases.append(Case(f"size-{size}", size=size))
    for mode in ("metadata", "falloc", "full"):
        cases.append(Case(f"preallocation-{mode}", {"preallocation": mode}))
    cases += [
        Case("preallocation-subclusters", {"preallocation": "metadata", "extended_l2": "on"}),
        Case("preallocation-v2", {"preallocation": "metadata", "compat": "0.10"}),
        Case("lazy-refcounts", {"lazy_refcounts": "on"}),
        Case("empty", size=0, snapshots=1),
    ]
    return cases


CASES = _all_cases()


def _commands(case: Case, chance: random.Random, size: int, cluster: int) -> list[str]:
    """Seeded qemu-io commands inside `size`: data, zeros of both kinds, discards."""
    commands = []
    for _ in range(case.writes):
        kind = chance.choice(("data", "data", "data", "data", "zero", "unmap", "discard"))
        length = 512 * chance.randrange(1, max(2, min(size, 300_000) // 512))
        offset = 512 * chance.randrange((size - length) // 512 + 1)
        if kind != "data" and size > cluster and chance.random() < 0.7:
            length = min(cluster * chance.randrange(1, 4), size // cluster * cluster)
            offset = cluster * chance.randrange((size - length) // cluster + 1)
        if kind == "data":
            commands.append(f"write -P {chance.randrange(1, 256)} {offset} {length}")
        elif kind == "zero":
            commands.append(f"write -z {offset} {length}")
        elif kind == "unmap":
            commands.append(f"write -z -u {offset} {length}")
        else:
            commands.append(f"discard {offset} {length}")
    return commands


def _fill(case: Case, image: Path, chance: random.Random, size: int) -> None:
    if size:
        cluster = int(str(case.options.get("cluster_size", 64 * KIB)))
        tools.qemu_io(image, *_commands(case, chance, size, cluster), options=("-d", "unmap"))


def _compressible(chance: random.Random, size: int) -> bytes:
    """Bytes of which some clusters shrink a lot, some a little, some not at all."""
    pieces = []
    while sum(map(len, pieces)) < size:
        kind = chance.randrange(4)
        length = chance.randrange(1, 100_000)
        if kind == 0:
            pieces.append(chance.randbytes(length))
        elif kind == 1:
            pieces.append(bytes(length))
        else:
            word = chance.randbytes(chance.randrange(1, 60))
            pieces.append(word * (length // len(word) + 1))
    return b"".join(pieces)[:size]


def _make_backing(case: Case, folder: Path, chance: random.Random) -> list[str]:
    """The layers below, from the bottom up; the options that name the uppermost."""
    below: list[str] = []
    for number, (kind, size) in reversed(list(enumerate(case.backing))):
        path = folder / f"layer{number}"
        if kind == "raw":
            path.write_bytes(_compressible(chance, size))
        else:
            tools.qemu_img("create", "-q", "-f", "qcow2", *below, path, str(size))
            _fill(case, path, chance, size)
        below = ["-b", path.name, "-F", kind]
    return below


def _build(case: Case, folder: Path) -> Path:
    chance = random.Random(zlib.crc32(case.name.encode()))
    image = folder / "image.qcow2"
    below = _make_backing(case, folder, chance)
    words = ",".join(f"{name}={value}" for name, value in case.options.items())
    options = ["-o", words] if words else []
    if case.compress:
        raw = folder / "source.raw"
        raw.write_bytes(_compressible(chance, case.size))
        if below:
            options += ["-B", below[1], "-F", below[3]]
        tools.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, raw, image)
        raw.unlink()
    else:
        tools.qemu_img("create", "-q", "-f", "qcow2", *options, *below, image, str(case.size))
        _fill(case, image, chance, case.size)
    size = case.size
    for number in range(case.snapshots):
        tools.qemu_img("snapshot", "-c", f"snapshot {number}", image)
        if case.resize:
            size = 512 * chance.randrange(1, 2 * case.size // 512)
            tools.qemu_img("resize", "-q", "--shrink", image, str(size))
        _fill(case, image, chance, size)
    return image


def test_the_matrix_is_as_large_as_promised() -> None:
    """At least 58 images, each with a name of its own."""
    assert len(CASES) >= 58
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reads_as_qemu_reads(case: Case, tmp_path: Path) -> None:
    """Active disk and snapshots have QEMU's bytes and sizes; a read-only mount changes nothing."""
    image = _build(case, tmp_path)
    virtual_size = json.loads(tools.qemu_img("info", "--output=json", image))["virtual-size"]
    expected = tools.raw_sha256(image)
    entries = tools.snapshot_list(image)
    assert len(entries) == case.snapshots
    kept = {entry["name"]: tools.snapshot_digest(image, entry["id"]) for entry in entries}
    before = tools.sha256(image)

    # The judge of reading is the read-only mount; every second image is opened for
    # writing instead, where opening and closing must leave it clean.
    writable = CASES.index(case) % 2 == 1
    with tools.mounted(image, *([] if writable else ["-r"])) as mount:
        assert mount.active.stat().st_size == virtual_size
        assert tools.sha256(mount.active) == expected
        assert len(os.listdir(mount.snapshots)) == len(entries)
        for name, (digest, size) in kept.items():
            path = mount.snapshots / f"{name}.raw"
            assert path.stat().st_size == size, name
            assert tools.sha256(path) == digest, name
    if writable:
        tools.check_image(image)
        assert tools.raw_sha256(image) == expected
    else:
        assert tools.sha256(image) == before
