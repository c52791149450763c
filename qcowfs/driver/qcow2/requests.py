"""Requests under way on one open qcow2 image: the write gate, Allocations, generations.

Three questions are answered here, all without touching the image. May a write
begin (the gate; snapshot operations and resizes close it and wait until it is
drained)? Is another write already allocating clusters for this guest range (an
`Allocation`)? May a freed host cluster be handed out again, or can a request
that began earlier still use its old place (a generation)?

Nothing here does I/O or knows tables. Invariants:

- A closed gate with no writers inside means that no guest write, zeroing or
  discard is under way and none begins until the gate opens.
- No two Allocations in flight overlap, in guest bytes rounded to clusters.
- A generation number only grows; `oldest()` never falls.
- Order of waiting: gate, then Allocations, then the metadata lock. Whoever
  holds the lock never waits for an Allocation.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Allocation:
    """One allocating write in flight: guest bytes [guest_offset, guest_end).

    The range is rounded to clusters, since copy-on-write takes whole clusters
    (or, with extended L2 entries, may change any subcluster of them). Others
    wait on `done` and must then look everything up again.
    """

    __slots__ = ("_done", "guest_end", "guest_offset")

    def __init__(self, guest_offset: int, guest_end: int) -> None:
        self.guest_offset = guest_offset
        self.guest_end = guest_end
        self._done: trio.Event | None = None

    async def wait_done(self) -> None:
        """Wait until the write is linked or has failed; only while it is registered."""
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def wake(self) -> None:
        """Let those who wait go on; called once, after the Allocation is unregistered."""
        if self._done is not None:
            self._done.set()


class Requests:
    """The requests under way on one image; every method without `async` is atomic.

    `gate_open` and `allocations` are public for the fast paths: a write may go
    on without an await when the gate is open and nothing is allocating.
    `generation` is the current one: what was learnt of a host cluster's content
    holds while it does not change.
    """

    __slots__ = (
        "_active",
        "_drained",
        "_opened",
        "allocations",
        "gate_open",
        "generation",
        "writer_count",
    )

    def __init__(self) -> None:
        self.gate_open = True
        self.writer_count = 0
        self.allocations: list[Allocation] = []
        self._opened: trio.Event | None = None
        self._drained: trio.Event | None = None
        self.generation = 1
        # Requests under way by the generation in which they began, oldest first.
        self._active: dict[int, int] = {}

    # The write gate

    async def enter_write(self) -> None:
        """Count one writer in, waiting while the gate is closed; no checkpoint when open."""
        while not self.gate_open:
            assert self._opened is not None
            await self._opened.wait()
        self.writer_count += 1

    def leave_write(self) -> None:
        """Count one writer out; the last one lets a waiting `close_gate` go on."""
        self.writer_count -= 1
        if self.writer_count == 0 and self._drained is not None:
            self._drained.set()

    @asynccontextmanager
    async def close_gate(self) -> AsyncIterator[None]:
        """Hold the gate closed and drained for the block; others that close it take turns.

        Must not be entered by a task that is counted as a writer, nor while
        holding the metadata lock: writers need it to finish.
        """
        while not self.gate_open:
            assert self._opened is not None
            await self._opened.wait()
        opened = self._opened = trio.Event()
        self.gate_open = False
        try:
            while self.writer_count:
                self._drained = trio.Event()
                await self._drained.wait()
            self._drained = None
            yield
        finally:
            self._drained = None
            self.gate_open = True
            self._opened = None
            opened.set()

    # Allocations

    def overlapping(self, guest_offset: int, length: int) -> Allocation | None:
        """An Allocation in flight that shares a byte with the range, or None."""
        guest_end = guest_offset + length
        for allocation in self.allocations:
            if allocation.guest_offset < guest_end and guest_offset < allocation.guest_end:
                return allocation
        return None

    async def wait_overlapping(self, guest_offset: int, length: int) -> bool:
        """Wait until no Allocation overlaps; True when anything was waited for.

        The caller must not hold the metadata lock. After any later await the
        answer is stale, so it is asked again under the lock.
        """
        waited = False
        while (allocation := self.overlapping(guest_offset, length)) is not None:
            waited = True
            await allocation.wait_done()
        return waited

    def register(self, guest_offset: int, guest_end: int) -> Allocation:
        """Announce an allocating write; the range, rounded to clusters, must be free."""
        assert self.overlapping(guest_offset, guest_end - guest_offset) is None
        allocation = Allocation(guest_offset, guest_end)
        self.allocations.append(allocation)
        return allocation

    def finish(self, allocation: Allocation) -> None:
        """Unregister an Allocation, linked or failed, and wake those who wait for it."""
        self.allocations.remove(allocation)
        allocation.wake()

    # Generations

    def begin(self) -> int:
        """A token for a request that may use a host offset after an await.

        Taken before (or, without an await between, right after) the lookup,
        and given back with `end` exactly once.
        """
        generation = self.generation
        self._active[generation] = self._active.get(generation, 0) + 1
        return generation

    def end(self, token: int) -> None:
        """The request of `token` uses no host offset any more."""
        remaining = self._active[token] - 1
        if remaining:
            self._active[token] = remaining
        else:
            del self._active[token]

    def advance(self) -> int:
        """Begin a new generation and return its number.

        A commit that removed references calls it once the removal is what
        lookups see: clusters freed by it may be handed out again when
        `oldest()` has reached the number returned.
        """
        self.generation += 1
        return self.generation

    def oldest(self) -> int:
        """The generation of the oldest request under way; the current one when idle."""
        for generation in self._active:
            return generation
        return self.generation
