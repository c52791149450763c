"""Sizes, indexes and limits of a qcow2 image (qcow2 specification, "General").

Pure arithmetic: no I/O, no state. A Geometry is computed once from a header and
never changes; its derived fields are plain attributes, since hot paths read
them for each request.

Invariants: `cluster_size == 1 << cluster_bits`; one L2 table fills one cluster;
`virtual_size` is a multiple of 512 (what a header says beyond that is cut off).
"""

from dataclasses import dataclass, field, replace

SECTOR = 512
SECTOR_BITS = 9

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_CLUSTER_SIZE = 1 << MAX_CLUSTER_BITS
MIN_EXTENDED_L2_CLUSTER_BITS = 14
SUBCLUSTERS_PER_CLUSTER = 32
MAX_REFCOUNT_ORDER = 6

# Bounds on what an image may make its reader allocate; the same as QEMU's, so
# that whatever one of the two accepts the other does too.
MAX_L1_LENGTH = 32 << 20
MAX_REFCOUNT_TABLE_LENGTH = 8 << 20
MAX_SNAPSHOT_COUNT = 65536
MAX_SNAPSHOT_TABLE_LENGTH = 64 << 20
MAX_SNAPSHOT_EXTRA_LENGTH = 1024
MAX_SNAPSHOT_ID_LENGTH = 65535
MAX_SNAPSHOT_NAME_LENGTH = 65535
MAX_BACKING_NAME_LENGTH = 1023
MAX_BACKING_FORMAT_LENGTH = 15
MAX_BITMAP_COUNT = 65535
MAX_BITMAP_DIRECTORY_LENGTH = 1024 * MAX_BITMAP_COUNT

L1_ENTRY_LENGTH = 8
REFCOUNT_TABLE_ENTRY_LENGTH = 8

# Bits 9 to 55 of an L1 or L2 entry.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
MAX_HOST_OFFSET = (1 << 56) - 1
OFLAG_COPIED = 1 << 63

_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image is cut into clusters and tables; sizes and coverage in bytes.

    `plain_mask` has a bit set for everything that an L2 entry of an ordinary
    data cluster does not have: an entry with no such bit and a host offset
    other than 0 is that cluster (all bits set with an external data file, where
    an entry needs more than a look at itself).
    """

    cluster_bits: int
    version: int
    virtual_size: int
    extended_l2: bool
    refcount_order: int
    has_data_file: bool = False
    data_file_raw: bool = False

    cluster_size: int = field(init=False, repr=False, compare=False)
    cluster_mask: int = field(init=False, repr=False, compare=False)
    l2_bits: int = field(init=False, repr=False, compare=False)
    l2_entry_count: int = field(init=False, repr=False, compare=False)
    l2_index_mask: int = field(init=False, repr=False, compare=False)
    l2_entry_length: int = field(init=False, repr=False, compare=False)
    words_per_entry: int = field(init=False, repr=False, compare=False)
    subclusters_per_cluster: int = field(init=False, repr=False, compare=False)
    subcluster_bits: int = field(init=False, repr=False, compare=False)
    subcluster_size: int = field(init=False, repr=False, compare=False)
    l2_coverage: int = field(init=False, repr=False, compare=False)
    l2_coverage_bits: int = field(init=False, repr=False, compare=False)
    refcount_bits: int = field(init=False, repr=False, compare=False)
    refcount_max: int = field(init=False, repr=False, compare=False)
    refcounts_per_block: int = field(init=False, repr=False, compare=False)
    refcount_block_bits: int = field(init=False, repr=False, compare=False)
    csize_shift: int = field(init=False, repr=False, compare=False)
    csize_mask: int = field(init=False, repr=False, compare=False)
    compressed_offset_mask: int = field(init=False, repr=False, compare=False)
    plain_mask: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cluster_bits = self.cluster_bits
        cluster_size = 1 << cluster_bits
        l2_bits = cluster_bits - (4 if self.extended_l2 else 3)
        subcluster_bits = cluster_bits - (5 if self.extended_l2 else 0)
        refcount_block_bits = cluster_bits + 3 - self.refcount_order
        csize_shift = 62 - (cluster_bits - 8)
        plain = OFLAG_COPIED | (OFFSET_MASK & -cluster_size)
        derived = {
            "virtual_size": self.virtual_size & -SECTOR,
            "cluster_size": cluster_size,
            "cluster_mask": cluster_size - 1,
            "l2_bits": l2_bits,
            "l2_entry_count": 1 << l2_bits,
            "l2_index_mask": (1 << l2_bits) - 1,
            "l2_entry_length": 16 if self.extended_l2 else 8,
            "words_per_entry": 2 if self.extended_l2 else 1,
            "subclusters_per_cluster": SUBCLUSTERS_PER_CLUSTER if self.extended_l2 else 1,
            "subcluster_bits": subcluster_bits,
            "subcluster_size": 1 << subcluster_bits,
            "l2_coverage": 1 << (cluster_bits + l2_bits),
            "l2_coverage_bits": cluster_bits + l2_bits,
            "refcount_bits": 1 << self.refcount_order,
            "refcount_max": (1 << (1 << self.refcount_order)) - 1,
            "refcounts_per_block": 1 << refcount_block_bits,
            "refcount_block_bits": refcount_block_bits,
            "csize_shift": csize_shift,
            "csize_mask": (1 << (cluster_bits - 8)) - 1,
            "compressed_offset_mask": (1 << csize_shift) - 1,
            "plain_mask": _ALL_BITS if self.has_data_file else _ALL_BITS & ~plain,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def with_virtual_size(self, virtual_size: int) -> "Geometry":
        """The same image with another disk size, in bytes."""
        return replace(self, virtual_size=virtual_size)

    def l1_index(self, guest_offset: int) -> int:
        """The index of the L1 entry that covers `guest_offset`."""
        return guest_offset >> self.l2_coverage_bits

    def l2_index(self, guest_offset: int) -> int:
        """The index of the L2 entry, in its table, that covers `guest_offset`."""
        return (guest_offset >> self.cluster_bits) & self.l2_index_mask

    def l1_count(self, virtual_size: int) -> int:
        """How many L1 entries a disk of `virtual_size` bytes needs.

        This is also the index of the first L1 entry of the VM state.
        """
        return -(-virtual_size >> self.l2_coverage_bits)

    def vm_state_offset(self, virtual_size: int) -> int:
        """The guest offset at which the VM state of a disk of that size begins."""
        return self.l1_count(virtual_size) << self.l2_coverage_bits

    def round_down(self, offset: int) -> int:
        """`offset` rounded down to a multiple of the cluster size."""
        return offset & -self.cluster_size

    def round_up(self, offset: int) -> int:
        """`offset` rounded up to a multiple of the cluster size."""
        return (offset + self.cluster_mask) & -self.cluster_size

    def cluster_count(self, length: int) -> int:
        """How many clusters `length` bytes fill, the last one perhaps in part."""
        return -(-length >> self.cluster_bits)
