"""Counts of what the engine of one image has done since it was opened.

Plain integers, changed in place by the modules that do the work; nothing is
ever decided by them.
"""


class Counters:
    """Totals since the image was opened; clusters for allocations and frees."""

    __slots__ = (
        "allocations",
        "commits",
        "frees",
        "refcount_block_loads",
        "slice_hits",
        "slice_loads",
        "syncs",
    )

    def __init__(self) -> None:
        self.commits = 0
        self.syncs = 0
        self.allocations = 0
        self.frees = 0
        self.slice_hits = 0
        self.slice_loads = 0
        self.refcount_block_loads = 0

    def as_dict(self) -> dict[str, int]:
        """All totals by name."""
        return {name: getattr(self, name) for name in self.__slots__}
