"""Message buffers of the lane: a bounded pool, each large enough for any request.

Pure memory; no I/O, no protocol beyond where the bytes of a message lie.

Invariants: at most `count` buffers exist; the bytes of a WRITE, and those of a
READ's answer, begin on a page boundary, whatever header lies before them; a
buffer has one user at a time, and `take` is asked only while `free_count` > 0.
"""

import mmap
from typing import Final

from qcowfs.fuse import wire

_PAGE: Final = 4096
_CACHED_VIEWS: Final = 64


class MessageBuffer:
    """Room for one message of the largest transfer, with its views made once.

    `message` is what a request is read into; its header and body end where the
    bytes of a WRITE begin.
    """

    __slots__ = ("_answer_views", "_data_views", "_memory", "message", "vector")

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, _PAGE + wire.MAX_TRANSFER))
        self.message = self._memory[_PAGE - wire.WRITE_DATA_AT :]
        self.vector = [self.message]
        self._data_views: dict[int, memoryview] = {}
        self._answer_views: dict[int, tuple[memoryview, memoryview]] = {}

    def data(self, length: int) -> memoryview:
        """The first `length` bytes that a WRITE in this buffer carries."""
        view = self._data_views.get(length)
        if view is None:
            if len(self._data_views) >= _CACHED_VIEWS:
                self._data_views.clear()
            view = self._memory[_PAGE : _PAGE + length]
            self._data_views[length] = view
        return view

    def answer(self, length: int) -> tuple[memoryview, memoryview]:
        """An answer with a body of `length` bytes: the whole of it, and its body."""
        views = self._answer_views.get(length)
        if views is None:
            if len(self._answer_views) >= _CACHED_VIEWS:
                self._answer_views.clear()
            whole = self._memory[_PAGE - wire.ANSWER_BODY_AT : _PAGE + length]
            views = whole, whole[wire.ANSWER_BODY_AT :]
            self._answer_views[length] = views
        return views


class BufferPool:
    """Up to `count` buffers, made when they are first needed and then kept."""

    def __init__(self, count: int) -> None:
        self._kept: list[MessageBuffer] = []
        self.free_count = count

    def take(self) -> MessageBuffer:
        """A free buffer; the last one given back comes first, its pages being warm."""
        if self.free_count <= 0:
            raise RuntimeError("the buffer pool is empty")
        self.free_count -= 1
        return self._kept.pop() if self._kept else MessageBuffer()

    def give_back(self, buffer: MessageBuffer) -> None:
        """End the use of a buffer that `take` answered."""
        self.free_count += 1
        self._kept.append(buffer)
