"""Guest ranges that a waiting request holds, so that no other one changes them meanwhile.

For the formats without an engine of their own (qcow, cow): a request that
awaits between its lookup and its link holds the clusters that it changes. It
does no I/O. Invariants: no two ranges held overlap; whoever holds a range
waits for no other one.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class GuestRanges:
    """The ranges held on one disk; [start, end) in guest bytes."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], trio.Event] = {}

    def overlaps(self, start: int, end: int) -> bool:
        """Whether somebody holds a byte of the range; for those who cannot wait."""
        return bool(self._held) and self._overlapping(start, end) is not None

    def _overlapping(self, start: int, end: int) -> trio.Event | None:
        for (held_start, held_end), event in self._held.items():
            if held_start < end and start < held_end:
                return event
        return None

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold a range that is not empty for the block, once nobody else does."""
        while (event := self._overlapping(start, end)) is not None:
            await event.wait()
        event = self._held[start, end] = trio.Event()
        try:
            yield
        finally:
            del self._held[start, end]
            event.set()
