"""Compressed clusters of one image: fetched, inflated in threads, the last ones kept.

Reads the compressed clusters of FORMATS.md 1.1 and 1.4. Nothing here knows
tables: a cluster is named by the place of its stream. Invariants:

- A kept cluster is used only in the generation in which its stream was looked
  up: a host cluster is never handed out again inside one, so that the name of
  a stream cannot come to mean other bytes.
- Whoever awaits `fill` holds a generation token for the streams it names.
- What is kept stays inside a budget of bytes, one cluster excepted.
- A request first inflates what it announced itself and only then waits for
  what others announced, so that two of them never wait for each other.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import trio

from qcowfs.driver.qcow2.parallel import run_all
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.storage import Storage
from qcowfs.driver.transform.compression import inflate_cluster
from qcowfs.errors import CorruptImage

# Up to this many bytes of output, inflating costs little more than a thread's hop.
_INLINE_LENGTH = 64 << 10
# Streams whose places touch are fetched in one read of up to this length.
_FETCH_LENGTH = 4 << 20
_THREAD_COUNT_MAX = 4
DEFAULT_BUDGET = 8 << 20


class Piece(NamedTuple):
    """A part of one compressed cluster that a request wants, in bytes.

    The stream lies at `host_offset` and has at most `stored_length` bytes; from
    the inflated cluster, `target` wants what begins at `start`.
    """

    host_offset: int
    stored_length: int
    start: int
    target: memoryview


_Key = tuple[int, int]
_Job = tuple[Piece, memoryview]


class Inflater:
    """The inflated clusters of one image, shared by its active disk and its snapshots."""

    __slots__ = (
        "_budget",
        "_cluster_size",
        "_compression_type",
        "_generation",
        "_kept",
        "_pending",
        "_requests",
        "_storage",
        "inflated_count",
    )

    def __init__(
        self,
        storage: Storage,
        requests: Requests,
        *,
        compression_type: int,
        cluster_size: int,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        self._storage = storage
        self._requests = requests
        self._compression_type = compression_type
        self._cluster_size = cluster_size
        self._budget = budget
        self._generation = requests.generation
        # Least recently used first.
        self._kept: dict[_Key, bytes] = {}
        self._pending: dict[_Key, trio.Event] = {}
        self.inflated_count = 0

    def try_fill(self, piece: Piece, *, alone: bool) -> bool:
        """Fill the target of `piece` without waiting, or answer False.

        A small cluster that is the only one (`alone`) of its request is
        inflated at once when its stream is in the host's cache. Raises
        CorruptImage when its stream is damaged.
        """
        data = self._recall(piece.host_offset, piece.stored_length)
        if data is None:
            if not alone or self._cluster_size > _INLINE_LENGTH:
                return False
            stored = memoryview(bytearray(piece.stored_length))
            if not self._storage.try_pread_into((stored,), piece.host_offset):
                return False
            data = self._inflate_one(piece, stored)
            self._keep(piece, data, self._requests.generation)
        _copy(piece, data)
        return True

    async def fill(self, pieces: Sequence[Piece]) -> None:
        """Fill the targets of all pieces, inflating in several threads at once.

        Raises CorruptImage for a damaged stream, OSError when it cannot be read.
        """
        missing: list[Piece] = []
        awaited: list[tuple[Piece, trio.Event]] = []
        for piece in pieces:
            key = (piece.host_offset, piece.stored_length)
            data = self._recall(*key)
            if data is not None:
                _copy(piece, data)
            elif key in self._pending:
                awaited.append((piece, self._pending[key]))
            else:
                missing.append(piece)
        if missing:
            await self._fill_announced(missing)
        late: list[Piece] = []
        for piece, event in awaited:
            await event.wait()
            data = self._recall(piece.host_offset, piece.stored_length)
            if data is not None:
                _copy(piece, data)
            else:
                # The other one failed or its result is gone already.
                late.append(piece)
        if late:
            await self._fill_all(late)

    async def _fill_announced(self, pieces: list[Piece]) -> None:
        event = trio.Event()
        keys = {(piece.host_offset, piece.stored_length) for piece in pieces}
        self._pending.update(dict.fromkeys(keys, event))
        try:
            await self._fill_all(pieces)
        finally:
            for key in keys:
                del self._pending[key]
            event.set()

    async def _fill_all(self, pieces: list[Piece]) -> None:
        generation = self._requests.generation
        jobs: list[_Job] = []
        for group in _contiguous(pieces):
            jobs.extend(await self._fetch(group))
        inflated: list[tuple[Piece, bytes]] = []
        if len(jobs) * self._cluster_size <= _INLINE_LENGTH:
            inflated = self._inflate(jobs)
        else:
            thread_count = min(len(jobs), _THREAD_COUNT_MAX, os.cpu_count() or 1)
            share = -(-len(jobs) // thread_count)
            shares = [jobs[first : first + share] for first in range(0, len(jobs), share)]

            async def run(part: list[_Job]) -> None:
                inflated.extend(await trio.to_thread.run_sync(self._inflate, part))

            await run_all([partial(run, part) for part in shares], thread_count)
        for piece, data in inflated:
            self._keep(piece, data, generation)

    async def _fetch(self, group: list[Piece]) -> list[_Job]:
        """The streams of pieces whose places touch, by one read."""
        start = group[0].host_offset
        end = max(piece.host_offset + piece.stored_length for piece in group)
        stored = memoryview(bytearray(end - start))
        if not self._storage.try_pread_into((stored,), start):
            await self._storage.pread_into((stored,), start)
        jobs: list[_Job] = []
        for piece in group:
            first = piece.host_offset - start
            jobs.append((piece, stored[first : first + piece.stored_length]))
        return jobs

    def _inflate(self, jobs: list[_Job]) -> list[tuple[Piece, bytes]]:
        """Inflate and copy; runs in a thread, so it touches nothing but its jobs."""
        inflated = []
        for piece, stored in jobs:
            data = self._inflate_one(piece, stored)
            _copy(piece, data)
            inflated.append((piece, data))
        return inflated

    def _inflate_one(self, piece: Piece, stored: memoryview) -> bytes:
        try:
            return inflate_cluster(self._compression_type, stored, self._cluster_size)
        except CorruptImage as error:
            raise CorruptImage(
                f"{error} (its stream lies at host offset {piece.host_offset:#x})",
                structure="compressed cluster",
                host_offset=piece.host_offset,
            ) from None

    def _recall(self, host_offset: int, stored_length: int) -> bytes | None:
        if self._generation != self._requests.generation:
            self._kept.clear()
            self._generation = self._requests.generation
            return None
        key = (host_offset, stored_length)
        data = self._kept.pop(key, None)
        if data is not None:
            self._kept[key] = data
        return data

    def _keep(self, piece: Piece, data: bytes, generation: int) -> None:
        self.inflated_count += 1
        if generation != self._requests.generation:
            return
        if self._generation != generation:
            self._kept.clear()
            self._generation = generation
        kept = self._kept
        kept[(piece.host_offset, piece.stored_length)] = data
        while len(kept) > 1 and len(kept) * self._cluster_size > self._budget:
            del kept[next(iter(kept))]


def _copy(piece: Piece, data: bytes) -> None:
    target = piece.target
    target[:] = memoryview(data)[piece.start : piece.start + len(target)]


def _contiguous(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in groups whose streams touch or overlap, each of a bounded length."""
    groups: list[list[Piece]] = []
    group_end = -1
    for piece in sorted(pieces, key=lambda piece: piece.host_offset):
        end = piece.host_offset + piece.stored_length
        if piece.host_offset <= group_end and end - groups[-1][0].host_offset <= _FETCH_LENGTH:
            groups[-1].append(piece)
            group_end = max(group_end, end)
        else:
            groups.append([piece])
            group_end = end
    return groups
