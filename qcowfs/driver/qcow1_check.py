"""Checking a qcow image of version 1: overlaps, alignment, ranges (FORMATS.md 1.2).

The format has no refcounts: the tables are all there is, so what can be wrong
is an entry that leads out of the file, is not aligned, or shares bytes with
another structure. It trusts no cache, reads the file piece by piece, changes
nothing and prints nothing. Invariant: what is read is bounded by the size of
the file, whatever the tables say.
"""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.layout.qcow1 import COMPRESSED_FLAG, HEADER_LENGTH, Qcow1Header
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage

if TYPE_CHECKING:
    import numpy as np

    Words = np.ndarray[Any, np.dtype[np.uint64]]

_BATCH_LENGTH = 1 << 20
_PROBLEMS_MAX = 100


@dataclass
class Qcow1Report:
    """What a check found: counts of clusters and streams, and problems as lines of text.

    `unused_length` is how many bytes nothing points to: they were given up by
    overwriting compressed clusters, by discards or by a crash.
    """

    data_clusters: int = 0
    compressed_clusters: int = 0
    l2_tables: int = 0
    unused_length: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, count: int, problem: str) -> None:
        """Note a problem that `count` entries have."""
        if count:
            self.problem_count += int(count)
            if len(self.problems) < _PROBLEMS_MAX:
                self.problems.append(problem)


def _fixed_ranges(header: Qcow1Header) -> list[tuple[int, int]]:
    """(start, end) of the header with its backing name, and of the L1 table."""
    name_end = HEADER_LENGTH + len(header.backing_file or b"")
    return [
        (0, name_end),
        (header.l1_table_offset, header.l1_table_offset + header.l1_size * 8),
    ]


def _table_offsets(
    header: Qcow1Header, l1: "array[int]", file_size: int, report: Qcow1Report
) -> "Words":
    """The L2 tables' offsets, ascending, those that can be read."""
    import numpy as np

    entries = np.frombuffer(l1, dtype=np.uint64)
    entries = np.sort(entries[entries != 0])
    length = header.l2_table_length
    inside = (entries >= HEADER_LENGTH) & (entries <= max(file_size - length, 0))
    report.add(
        int((~inside).sum()), "L1 table: entries name L2 tables that are not inside the file"
    )
    entries = entries[inside]
    overlapping = int((np.diff(entries) < length).sum())
    report.add(overlapping, "L1 table: L2 tables overlap each other")
    for start, end in _fixed_ranges(header):
        hits = (entries < end) & (entries > start - length if start > length else entries >= 0)
        report.add(int(hits.sum()), f"L1 table: L2 tables overlap the bytes {start:#x} to {end:#x}")
    if overlapping:
        # Whoever reads each of them could be made to read the same bytes without end.
        keep = np.ones(len(entries), dtype=bool)
        keep[1:] = np.diff(entries) >= length
        entries = entries[keep]
    return entries


class _Checker:
    """One pass over the L2 tables of an image."""

    def __init__(
        self, storage: Storage, header: Qcow1Header, l1: "array[int]", *, keep_ranges: bool
    ) -> None:
        import numpy as np

        self.storage = storage
        self.header = header
        self.report = Qcow1Report()
        self.file_size = storage.size()
        self.tables = _table_offsets(header, l1, self.file_size, self.report)
        self.report.l2_tables = len(self.tables)
        fixed = _fixed_ranges(header)
        starts = np.array([start for start, _ in fixed], dtype=np.uint64)
        ends = np.array([end for _, end in fixed], dtype=np.uint64)
        self.meta_starts = np.concatenate((self.tables, starts))
        order = np.argsort(self.meta_starts, kind="stable")
        self.meta_starts = self.meta_starts[order]
        table_ends = self.tables + np.uint64(header.l2_table_length)
        self.meta_ends = np.concatenate((table_ends, ends))[order]
        self.kept: list[tuple[Words, Words]] | None = [] if keep_ranges else None

    async def run(self) -> None:
        """Look at every L2 table, about a mebibyte at a time."""
        import numpy as np

        length = self.header.l2_table_length
        batch: list[bytearray] = []
        for table in self.tables:
            data = bytearray(length)
            if not self.storage.try_pread_into((memoryview(data),), int(table)):
                data = await self.storage.pread(length, int(table))
            batch.append(data)
            if len(batch) * length >= _BATCH_LENGTH:
                self._look(np.frombuffer(b"".join(batch), dtype=">u8").astype(np.uint64))
                batch.clear()
                await trio.lowlevel.checkpoint()
        self._look(np.frombuffer(b"".join(batch), dtype=">u8").astype(np.uint64))

    def _look(self, words: "Words") -> None:
        import numpy as np

        report, header = self.report, self.header
        words = words[words != 0]
        is_compressed = (words & np.uint64(COMPRESSED_FLAG)) != 0
        plain = words[~is_compressed]
        streams = words[is_compressed]
        report.data_clusters += len(plain)
        report.compressed_clusters += len(streams)
        unaligned = (plain & np.uint64(SECTOR - 1)) != 0
        report.add(int(unaligned.sum()), "L2 table: clusters are not aligned to a sector")
        stream_offsets = streams & np.uint64(header.offset_mask)
        shift = np.uint64(63 - header.cluster_bits)
        lengths = (streams >> shift) & np.uint64(header.cluster_size - 1)
        report.add(int((lengths == 0).sum()), "L2 table: compressed clusters have no bytes")
        starts = np.concatenate((plain, stream_offsets))
        sizes = np.full(len(plain), header.cluster_size, dtype=np.uint64)
        ends = starts + np.concatenate((sizes, lengths))
        outside = starts >= self.file_size
        report.add(int(outside.sum()), "L2 table: clusters lie outside the file")
        starts, ends = starts[~outside], ends[~outside]
        # The structure that begins last before a cluster's end is the one it may run over.
        before = np.searchsorted(self.meta_starts, ends, side="left")
        hits = (before > 0) & (self.meta_ends[np.maximum(before, 1) - 1] > starts)
        report.add(int(hits.sum()), "L2 table: clusters overlap the header or a table")
        if self.kept is not None:
            self.kept.append((starts, ends))


async def require_sound_tables(storage: Storage, header: Qcow1Header, l1: "array[int]") -> None:
    """Raise CorruptImage for an image that cannot be written to safely.

    New clusters are taken behind the end of the file: what tables expect there
    already would come to show them.
    """
    checker = _Checker(storage, header, l1, keep_ranges=False)
    await checker.run()
    report = checker.report
    if report.problem_count:
        raise CorruptImage(
            f"it is not opened for writing: {report.problems[0]} ({report.problem_count} in all)",
            hint="open it read-only",
        )


async def check_qcow1(storage: Storage, header: Qcow1Header, l1: "array[int]") -> Qcow1Report:
    """Check everything, clusters that share bytes with each other among it."""
    import numpy as np

    checker = _Checker(storage, header, l1, keep_ranges=True)
    await checker.run()
    report = checker.report
    assert checker.kept is not None
    starts = np.concatenate([part[0] for part in checker.kept])
    ends = np.concatenate([part[1] for part in checker.kept])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    if len(starts) > 1:
        shared = starts[1:] < np.maximum.accumulate(ends)[:-1]
        report.add(int(shared.sum()), "L2 table: clusters overlap each other")
    used = int(np.minimum(ends, checker.file_size).sum() - starts.sum())
    used += sum(end - start for start, end in _fixed_ranges(header))
    used += len(checker.tables) * header.l2_table_length
    report.unused_length = max(0, checker.file_size - used)
    return report
