"""A bounded cache of table pages: L2 tables of qcow version 1, the bitmap of COW.

A page is a piece of fixed length of a table in the host file, its items in the
machine's own byte order. Nothing here knows what items mean, allocates, or
decides when something is written: an owner takes the dirty ranges of a commit,
writes them in its own order, and says how it ended.

Invariants:

- A page that is dirty, new, or part of a commit under way stays in memory, so
  that a load never reads what is about to be overwritten.
- What a commit takes is a copy: later changes belong to the next commit.
- Two tasks that want one page make one read.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import trio

from qcowfs.driver.storage import Storage

_BIG_ENDIAN = sys.byteorder == "big"
# However small the budget, a request must find the pages that it has just loaded.
_MIN_COUNT = 8


class Page:
    """One piece of a table; `items` in native order, dirty from `dirty_start` to `dirty_end`."""

    __slots__ = ("dirty_end", "dirty_start", "host_offset", "in_commit", "is_new", "items", "used")

    def __init__(self, host_offset: int, items: "array[int]", *, is_new: bool) -> None:
        self.host_offset = host_offset
        self.items = items
        self.is_new = is_new
        self.in_commit = False
        self.used = True
        self.dirty_start = 0
        self.dirty_end = 0


class DirtyRange(NamedTuple):
    """Items [start, end) of a page as they were when a commit began, in the file's byte order.

    `is_new`: nothing durable points to the page yet.
    """

    page: Page
    start: int
    end: int
    host_offset: int
    data: bytes
    is_new: bool


class PageCache:
    """The pages of one storage's tables; `length` in bytes, `typecode` of an item (B or Q).

    Methods without `async` are atomic. `budget` in bytes bounds clean pages.
    """

    __slots__ = ("_count_max", "_loading", "_storage", "dirty", "length", "loads", "pages",
                 "typecode")  # fmt: skip

    def __init__(self, storage: Storage, *, length: int, typecode: str, budget: int) -> None:
        self._storage = storage
        self._loading: dict[int, trio.Event] = {}
        self._count_max = max(_MIN_COUNT, budget // length)
        self.length = length
        self.typecode = typecode
        self.loads = 0
        self.pages: dict[int, Page] = {}
        self.dirty: dict[int, Page] = {}

    @property
    def is_full(self) -> bool:
        """Whether so much is dirty that a commit is due before more is changed."""
        return len(self.dirty) * 2 > self._count_max

    def try_load(self, host_offset: int) -> Page | None:
        """The page at `host_offset`, or None when something must be waited for."""
        page = self.pages.get(host_offset)
        if page is not None:
            page.used = True
            return page
        if host_offset in self._loading:
            # What that task has read may be older than what would be kept here meanwhile.
            return None
        data = bytearray(self.length)
        if not self._storage.try_pread_into((memoryview(data),), host_offset):
            return None
        return self._keep(host_offset, data)

    async def load(self, host_offset: int) -> Page:
        """The page at `host_offset`; what lies beyond the end of the file is zeros."""
        while (page := self.try_load(host_offset)) is None:
            event = self._loading.get(host_offset)
            if event is not None:
                await event.wait()
                continue
            event = self._loading[host_offset] = trio.Event()
            try:
                return self._keep(
                    host_offset, await self._storage.pread(self.length, host_offset)
                )
            finally:
                del self._loading[host_offset]
                event.set()
        return page

    def add_new(self, host_offset: int) -> Page:
        """A page of zeros that nothing durable points to yet."""
        items = array(self.typecode, bytes(self.length))
        page = self.pages[host_offset] = Page(host_offset, items, is_new=True)
        self.mark_dirty(page, 0, len(items))
        self._evict()
        return page

    def mark_dirty(self, page: Page, start: int, count: int) -> None:
        """Note that items [start, start + count) have been changed."""
        if page.dirty_end:
            page.dirty_start = min(page.dirty_start, start)
            page.dirty_end = max(page.dirty_end, start + count)
        else:
            page.dirty_start, page.dirty_end = start, start + count
            self.dirty[page.host_offset] = page

    # A commit

    def take_dirty(self) -> list[DirtyRange]:
        """Copies of all dirty ranges, which are clean from now on; ends with settle or give_back.

        A new page is taken whole. One commit at a time.
        """
        taken = []
        for page in self.dirty.values():
            start, end = (0, len(page.items)) if page.is_new else (page.dirty_start, page.dirty_end)
            part = page.items[start:end]
            if part.itemsize > 1 and not _BIG_ENDIAN:
                part.byteswap()
            host_offset = page.host_offset + start * part.itemsize
            taken.append(DirtyRange(page, start, end, host_offset, part.tobytes(), page.is_new))
            page.dirty_start = page.dirty_end = 0
            page.in_commit = True
        self.dirty.clear()
        return taken

    def settle(self, taken: Sequence[DirtyRange]) -> None:
        """The ranges are durable; new pages among them count as old ones by now."""
        for part in taken:
            part.page.in_commit = False
        self._evict()

    def give_back(self, taken: Sequence[DirtyRange]) -> None:
        """The commit failed: the ranges are dirty again."""
        for part in taken:
            part.page.in_commit = False
            self.mark_dirty(part.page, part.start, part.end - part.start)

    def _keep(self, host_offset: int, data: bytearray) -> Page:
        self.loads += 1
        items = array(self.typecode, bytes(data))
        if items.itemsize > 1 and not _BIG_ENDIAN:
            items.byteswap()
        page = self.pages[host_offset] = Page(host_offset, items, is_new=False)
        self._evict()
        return page

    def _evict(self) -> None:
        """Forget pages that were not used for long, the newest one excepted."""
        surplus = len(self.pages) - self._count_max
        if surplus <= 0:
            return
        for host_offset in list(self.pages)[:-1]:
            page = self.pages[host_offset]
            if page.dirty_end or page.is_new or page.in_commit:
                continue
            if page.used:
                page.used = False
                del self.pages[host_offset]
                self.pages[host_offset] = page
                continue
            del self.pages[host_offset]
            surplus -= 1
            if surplus <= 0:
                return
