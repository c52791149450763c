"""Which host clusters hold metadata, and the one door for writing to them.

Implements the overlap rule (docs/interop/qcow2, "corrupt bit"): no allocation
hands out, no free releases and no write touches a cluster that belongs to
another structure. The map is filled before the first write of an image, never
by a reader.

Order of the engine's modules: requests, counters, guard, tables, refcounting,
allocator, l1, switching, protecting, commit, metadata.

May not: decide what is free, know L1 or L2 entries. Invariants:

- A cluster has at most one owner; one claimed by two structures is pinned: it
  keeps its first owner and is never released again.
- Every metadata byte goes through `MetadataWriter`, which raises CorruptImage
  unless each touched cluster is owned by the structure that is written.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.node import Buffer
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER = "header"
L1_TABLE = "active L1 table"
L2_TABLE = "L2 table"
REFCOUNT_TABLE = "refcount table"
REFCOUNT_BLOCK = "refcount block"
SNAPSHOT_TABLE = "snapshot table"
SNAPSHOT_L1_TABLE = "snapshot L1 table"
CRYPTO_HEADER = "encryption header"

# Above this many L2 tables a dict would cost tens of megabytes: they are kept
# as one sorted array of 8 bytes each instead.
BULK_LIMIT = 131072


class ProtectedMap:
    """Cluster index -> name of the metadata structure that lies there."""

    __slots__ = ("_bulk", "_bulk_released", "_cluster_bits", "_owners", "_pinned")

    def __init__(self, cluster_bits: int) -> None:
        self._cluster_bits = cluster_bits
        self._owners: dict[int, str] = {}
        self._pinned: set[int] = set()
        self._bulk: Any = None
        self._bulk_released: set[int] = set()

    def clear(self) -> None:
        """Forget everything; before the map is filled."""
        self._owners.clear()
        self._pinned.clear()
        self._bulk = None
        self._bulk_released.clear()

    def owner(self, cluster_index: int) -> str | None:
        """The structure that lies in the cluster, or None for guest data and free space."""
        name = self._owners.get(cluster_index)
        if name is None and self._bulk is not None and self._in_bulk(cluster_index):
            return L2_TABLE
        return name

    def first_owned(self, first_index: int, count: int) -> int | None:
        """The first protected cluster index of a run, or None."""
        owners = self._owners
        run = range(first_index, first_index + count)
        if count <= len(owners):
            for cluster_index in run:
                if cluster_index in owners:
                    return cluster_index
        else:
            found = min((each for each in owners if each in run), default=None)
            if found is not None:
                return found
        if self._bulk is not None:
            for cluster_index in run:
                if self._in_bulk(cluster_index):
                    return cluster_index
        return None

    def first_owned_among(self, cluster_indexes: "NDArray[np.uint64]") -> int | None:
        """The first protected one of many cluster indexes, sorted, or None."""
        import numpy as np

        if not len(cluster_indexes):
            return None
        owned = np.fromiter(self._owners, dtype=np.uint64, count=len(self._owners))
        if self._bulk is not None:
            released = np.fromiter(
                self._bulk_released, dtype=np.uint64, count=len(self._bulk_released)
            )
            owned = np.concatenate((owned, np.setdiff1d(self._bulk, released)))
        places = np.searchsorted(cluster_indexes, owned)
        places[places == len(cluster_indexes)] = 0
        hits = owned[cluster_indexes[places] == owned]
        return int(hits.min()) if len(hits) else None

    def is_sole_owner(self, structure: str, host_offset: int, length: int) -> bool:
        """Whether all clusters of a range belong to a structure, and were claimed once only."""
        bits = self._cluster_bits
        return all(
            self.owner(cluster_index) == structure and cluster_index not in self._pinned
            for cluster_index in range(host_offset >> bits, (host_offset + length - 1 >> bits) + 1)
        )

    def claim(self, structure: str, host_offset: int, length: int) -> None:
        """Register a structure; a cluster that has an owner keeps it and is pinned."""
        bits = self._cluster_bits
        for cluster_index in range(host_offset >> bits, (host_offset + length - 1 >> bits) + 1):
            if self.owner(cluster_index) is None:
                self._owners[cluster_index] = structure
            else:
                self._pinned.add(cluster_index)

    def claim_l2_tables(self, host_offsets: Sequence[int]) -> None:
        """Register the L2 tables of an L1; offsets cluster-aligned, duplicates are pinned."""
        if len(host_offsets) <= BULK_LIMIT:
            for host_offset in host_offsets:
                self.claim(L2_TABLE, host_offset, 1)
            return
        import numpy as np

        shift = np.uint64(self._cluster_bits)
        indexes = np.array(host_offsets, dtype=np.uint64) >> shift
        unique, counts = np.unique(indexes, return_counts=True)
        self._pinned.update(unique[counts > 1].tolist())
        self._bulk = unique
        self._pinned.update(index for index in self._owners if self._in_bulk(index))

    def adopt_l2_tables(self, host_offsets: Sequence[int]) -> None:
        """Register the tables of an L1 that takes the place of another; those known stay."""
        bits = self._cluster_bits
        for host_offset in host_offsets:
            owner = self.owner(host_offset >> bits)
            if owner is None:
                self._owners[host_offset >> bits] = L2_TABLE
            elif owner != L2_TABLE:
                self._pinned.add(host_offset >> bits)

    def release(self, structure: str, cluster_index: int) -> bool:
        """Forget the owner of a cluster that becomes free; False when it must not become free."""
        owner = self.owner(cluster_index)
        if owner is None:
            return True
        if owner != structure or cluster_index in self._pinned:
            return False
        if self._owners.pop(cluster_index, None) is None:
            self._bulk_released.add(cluster_index)
        return True

    def _in_bulk(self, cluster_index: int) -> bool:
        bulk = self._bulk
        place = int(bulk.searchsorted(bulk.dtype.type(cluster_index)))
        return (
            place < len(bulk)
            and int(bulk[place]) == cluster_index
            and cluster_index not in self._bulk_released
        )


class MetadataWriter:
    """The only way to write metadata: checks ownership, then hands on to the storage.

    `permit` raises ReadOnlyImage once the image may not be written to any more.
    `report` receives a CorruptImage and raises it, `sync_failed` the error of a
    sync before that goes on: failsafe and the corrupt bit are their business.
    """

    __slots__ = (
        "_cluster_bits",
        "_counters",
        "_permit",
        "_protected",
        "_report",
        "_sync_failed",
        "storage",
    )

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        protected: ProtectedMap,
        counters: Counters,
        permit: Callable[[], None],
        report: Callable[[CorruptImage], NoReturn],
        sync_failed: Callable[[BaseException], None],
    ) -> None:
        self.storage = storage
        self._cluster_bits = geometry.cluster_bits
        self._protected = protected
        self._counters = counters
        self._permit = permit
        self._report = report
        self._sync_failed = sync_failed

    def try_write(self, structure: str, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Write without waiting; False when the storage cannot. Raises as `write`."""
        self._check(structure, host_offset, buffers)
        return self.storage.try_pwrite(buffers, host_offset)

    async def write(self, structure: str, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers from `host_offset` on; CorruptImage, ReadOnlyImage, OSError."""
        self._check(structure, host_offset, buffers)
        if not self.storage.try_pwrite(buffers, host_offset):
            await self.storage.pwrite(buffers, host_offset)

    async def sync(self, storage: Storage | None = None) -> None:
        """Make every earlier write to the image file (or a data file) durable."""
        self._counters.syncs += 1
        try:
            await (storage if storage is not None else self.storage).sync()
        except BaseException as error:
            self._sync_failed(error)
            raise

    def _check(self, structure: str, host_offset: int, buffers: Sequence[Buffer]) -> None:
        self._permit()
        length = sum(len(buffer) for buffer in buffers)
        bits = self._cluster_bits
        owner = self._protected.owner
        for cluster_index in range(host_offset >> bits, (host_offset + length - 1 >> bits) + 1):
            found = owner(cluster_index)
            if found != structure:
                self._report(
                    CorruptImage(
                        f"writing the {structure} at {host_offset:#x} would overwrite "
                        f"{'a cluster of the ' + found if found else 'guest data'}",
                        structure=structure,
                        host_offset=host_offset,
                    )
                )
