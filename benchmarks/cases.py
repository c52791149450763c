"""The cases: which image, which work, which ratio to reach.

`ratio` is our time by that of QEMU's FUSE export of version 11.1, to be
reached; `seconds` a time to stay under where no ratio means anything. A case
with `missing` is listed and not run, and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images
from benchmarks.client import Workload
from benchmarks.images import GIB, MIB, TIB, Images
from benchmarks.measure import (
    Bench,
    Sample,
    Side,
    client,
    copying_a_tree,
    discarding,
    mounting,
    snapshot_by_attribute,
    snapshot_by_command,
)

Measure = Callable[[Bench, Side, Path], Sample]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    what: str
    ratio: float | None
    image_name: str
    make_image: Callable[[Images, Path], None]
    measure: Measure
    measure_peer: Measure | None = None
    fresh: bool = True
    needs_root: bool = False
    seconds: float | None = None
    missing: str = ""


def _reads(
    name: str, what: str, ratio: float | None, image: str,
    make: Callable[[Images, Path], None], workload: Workload,
) -> Case:  # fmt: skip
    return Case(name, what, ratio, image, make, client(workload), fresh=False)


def _writes(
    name: str, what: str, ratio: float | None, image: str,
    make: Callable[[Images, Path], None], workload: Workload,
) -> Case:  # fmt: skip
    return Case(name, what, ratio, image, make, client(workload))


def _random_4k(
    span: int, count: int, *, write: bool = False, jobs: int = 1, sync_every: int = 0,
    final_sync: bool = False, warm_up: bool = False,
) -> Workload:  # fmt: skip
    return Workload(
        write, "random", 4096, count, span, jobs=jobs, sync_every=sync_every,
        final_sync=final_sync, warm_up=warm_up,
    )  # fmt: skip


def _sequential_1m(
    span: int, *, write: bool = False, final_sync: bool = False, warm_up: bool = False
) -> Workload:
    return Workload(
        write, "sequential", MIB, span // MIB, span, final_sync=final_sync, warm_up=warm_up
    )


def all_cases(length: int) -> list[Case]:
    """The table, for disks of `length` bytes where nothing else is said."""
    full = images.full()
    empty = images.empty()
    return [
        *_in_place(length, full),
        *_allocating(length, empty),
        *_other_layouts(length),
        *_by_size(length),
        *_whole_tools(empty, full),
    ]


def _in_place(length: int, full: Callable[[Images, Path], None]) -> list[Case]:
    return [
        _reads("randread4k", "4 KiB random reads, one reader", 0.5, "full", full,
               _random_4k(length, 50_000)),
        _reads("randread4k_4jobs", "4 KiB random reads, four readers", 0.9, "full", full,
               _random_4k(length, 25_000, jobs=4)),
        _writes("randwrite4k", "4 KiB random writes in place", 0.5, "full", full,
                _random_4k(length, 40_000, write=True, warm_up=True)),
        _writes("randwrite4k_4jobs", "the same by four writers", 0.9, "full", full,
                _random_4k(length, 15_000, write=True, jobs=4, warm_up=True)),
        _writes("randwrite4k_sync16", "the same, fdatasync every 16", 1.0, "full", full,
                _random_4k(length, 3_200, write=True, sync_every=16)),
        _reads("seqread1m", "1 MiB sequential reads", 0.5, "full", full,
               _sequential_1m(length)),
        _writes("seqwrite1m", "1 MiB sequential writes in place", 0.5, "full", full,
                _sequential_1m(length, write=True, warm_up=True)),
    ]  # fmt: skip


def _allocating(length: int, empty: Callable[[Images, Path], None]) -> list[Case]:
    return [
        _writes("alloc_seqwrite1m", "1 MiB writes into an empty image, then fdatasync", 0.8,
                "empty", empty, _sequential_1m(length, write=True, final_sync=True)),
        _writes("alloc_randwrite4k", "4 KiB random writes into an empty image, then fdatasync",
                0.8, "empty", empty, _random_4k(length, 16_000, write=True, final_sync=True)),
        _writes("alloc_randwrite4k_sync16", "the same, fdatasync every 16", 1.0,
                "empty", empty, _random_4k(length, 1_600, write=True, sync_every=16)),
        _writes("cow_randwrite4k", "4 KiB random writes just after a snapshot", 0.8,
                "snapshotted", images.snapshotted,
                _random_4k(length, 4_000, write=True, final_sync=True)),
    ]  # fmt: skip


def _other_layouts(length: int) -> list[Case]:
    luks = "the driver does not open encrypted images yet"
    return [
        _reads("seqread1m_4k_clusters", "1 MiB reads over 4 KiB clusters", 0.8, "full-4k",
               images.full("cluster_size=4096"), _sequential_1m(length)),
        _reads("seqread1m_512_clusters", "1 MiB reads over 512-byte clusters", 0.8, "full-512",
               images.full("cluster_size=512"), _sequential_1m(length)),
        _writes("subcluster_alloc_randwrite4k",
                "4 KiB random writes, extended L2 in 128 KiB clusters", 0.8,
                "extended", images.empty("extended_l2=on", "cluster_size=128k"),
                _random_4k(length, 16_000, write=True, final_sync=True)),
        _reads("zlib_seqread1m", "1 MiB reads, all compressed by zlib", 0.7, "zlib",
               images.compressed("zlib"), _sequential_1m(length)),
        _reads("zstd_seqread1m", "1 MiB reads, all compressed by zstd", 0.7, "zstd",
               images.compressed("zstd"), _sequential_1m(length)),
        _reads("chain4_randread4k", "4 KiB random reads through four layers", 0.6, "chain",
               images.chain, _random_4k(length, 50_000)),
        *(
            Case(f"luks_{name}", f"{what}, aes-256-xts", 0.8, "luks", images.empty(),
                 mounting, missing=luks)
            for name, what in (("seqread1m", "1 MiB reads"), ("seqwrite1m", "1 MiB writes"),
                               ("randread4k", "4 KiB random reads"))
        ),
    ]  # fmt: skip


def _by_size(length: int) -> list[Case]:
    return [
        _reads(f"randread4k_{name}", f"4 KiB random reads, all of a sparse {label} disk", None,
               f"mapped-{name}", images.mapped(size), _random_4k(size, 50_000))
        for name, label, size in (
            ("1GiB", "1 GiB", GIB), ("64GiB", "64 GiB", 64 * GIB), ("1TiB", "1 TiB", TIB),
        )
    ]  # fmt: skip


def _whole_tools(
    empty: Callable[[Images, Path], None], full: Callable[[Images, Path], None]
) -> list[Case]:
    return [
        Case("loop_ext4_cp", "mkfs.ext4 on a loop device, copy 5,000 files, sync", 0.9, "empty",
             empty, copying_a_tree(5_000), needs_root=True),
        Case("mount_1TiB", "command start to ready, empty 1 TiB image", None, "empty-1TiB",
             images.empty(length=TIB), mounting, fresh=False, seconds=0.3),
        Case("mount_16TiB_full", "the same, 16 TiB image with a full L1 table", None, "full-l1",
             images.full_l1, mounting, fresh=False, seconds=0.3),
        Case("snapshot_create", "a snapshot of 100 GiB allocated; peer: qemu-img snapshot -c", 1.0,
             "mapped-100GiB", images.mapped(100 * GIB), snapshot_by_attribute,
             measure_peer=snapshot_by_command),
        Case("discard", "blkdiscard of a full loop device", 1.0, "full", full, discarding,
             needs_root=True),
    ]  # fmt: skip
