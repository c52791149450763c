"""The kinds of image and workload whose crashes are replayed.

The four on which QEMU's own driver fails are among them: writes mixed with
discards, extended L2 overwrites, the lazy-refcounts bit, and a compressed base
with one sector written in each cluster.
"""

from tests.crash.harness import Kind, Workload

MIB = 1 << 20


async def small_write(load: Workload) -> None:
    """Up to 4 KiB."""
    await load.write(*load.pick(8))


async def one_sector(load: Workload) -> None:
    """A single sector."""
    await load.write(*load.pick(1))


async def large_write(load: Workload) -> None:
    """Up to 192 KiB, over several clusters."""
    await load.write(*load.pick(384))


async def together(load: Workload) -> None:
    """Six writes at once."""
    await load.write_together(64, 6)


async def discard(load: Workload) -> None:
    """Up to 256 KiB."""
    await load.clear(*load.pick(512), discard=True)


async def zero(load: Workload) -> None:
    """Up to 128 KiB."""
    await load.clear(*load.pick(256), discard=False)


async def take(load: Workload) -> None:
    """A snapshot."""
    await load.create_snapshot()


async def drop(load: Workload) -> None:
    """One snapshot less."""
    await load.delete_snapshot()


async def go_back(load: Workload) -> None:
    """Apply a snapshot."""
    await load.apply_snapshot()


WRITES = ((8, small_write), (4, large_write), (3, together))
CLEARS = ((6, discard), (3, zero))
SNAPSHOTS = ((4, take), (2, drop), (2, go_back))

KINDS = (
    Kind("plain", "cluster_size=64k", 4 * MIB, WRITES),
    Kind("discards", "cluster_size=64k", 4 * MIB, WRITES + CLEARS, fill=0.9),
    Kind("extended", "cluster_size=64k,extended_l2=on", 4 * MIB, WRITES + CLEARS, fill=0.2),
    Kind(
        "extended-overwrites",
        "cluster_size=64k,extended_l2=on",
        2 * MIB,
        ((8, small_write), (4, one_sector), (3, zero), (2, discard)),
        fill=0.9,
    ),
    Kind("snapshots", "cluster_size=16k", 2 * MIB, WRITES + SNAPSHOTS + CLEARS),
    Kind(
        "snapshots-extended",
        "cluster_size=16k,extended_l2=on",
        2 * MIB,
        WRITES + SNAPSHOTS + CLEARS,
    ),
    Kind(
        "compressed-base",
        "cluster_size=64k",
        4 * MIB,
        ((12, one_sector), (2, large_write), (1, discard)),
        fill=1.0,
        compressed=True,
    ),
    Kind(
        "compressed-snapshots",
        "cluster_size=16k",
        2 * MIB,
        ((8, one_sector), (2, large_write), *SNAPSHOTS),
        fill=1.0,
        compressed=True,
    ),
    # At 512 bytes a cluster both the refcount table and the L2 tables grow all the time.
    Kind("512-byte-clusters", "cluster_size=512", 1 * MIB, WRITES + CLEARS, fill=0.05),
    Kind("64-bit-refcounts", "cluster_size=4k,refcount_bits=64", 2 * MIB, WRITES + SNAPSHOTS),
    Kind(
        "lazy-refcounts",
        "cluster_size=64k,lazy_refcounts=on",
        4 * MIB,
        WRITES + CLEARS,
        fill=0.7,
    ),
    Kind("version-2-backed", "compat=0.10", 4 * MIB, WRITES + CLEARS, backed=True),
    Kind("version-3-backed", "cluster_size=16k", 2 * MIB, WRITES + CLEARS, backed=True),
    Kind(
        "little-cache",
        "cluster_size=4k",
        8 * MIB,
        WRITES + CLEARS,
        fill=0.1,
        cache_size=0,
        sync_weight=2,
    ),
)
