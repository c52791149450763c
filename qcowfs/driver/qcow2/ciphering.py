"""The open cipher of one encrypted image: which number a sector has, and who ciphers where.

Implements the encryption rows of FORMATS.md 1.1 and 1.4. With LUKS a sector's
number is its host offset in sectors, so bytes that move to another cluster are
ciphered anew; with the old AES method it is its guest offset. Compressed
clusters are never ciphered. This module reads and writes no file and knows no
table. Invariants:

- Requests are made of whole sectors, one run of the host at a time.
- Short requests are ciphered at once, long ones in worker threads.
- The key is inside the cipher object and nowhere else; nothing here shows it.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from qcowfs.driver.layout.geometry import SECTOR
from qcowfs.driver.node import Buffer
from qcowfs.driver.qcow2.parallel import run_all
from qcowfs.driver.qcow2.requests import Allocation
from qcowfs.driver.transform.cipher import SectorCipher

# Up to here a hop into a thread, and the wait for its turn, cost more than they save.
INLINE_LENGTH = 128 << 10
# Each thread gets at least so much of a long request.
_THREAD_LENGTH = 256 << 10
_THREAD_COUNT_MAX = 4

_Transform = Callable[[Buffer, int], bytearray]


class Ciphering:
    """Encrypts and decrypts the sectors of one image.

    `by_guest_offset` says which offset gives a sector its number. Lengths and
    offsets are multiples of 512 bytes.
    """

    __slots__ = ("_by_guest_offset", "_cipher")

    def __init__(self, cipher: SectorCipher, *, by_guest_offset: bool) -> None:
        self._cipher = cipher
        self._by_guest_offset = by_guest_offset

    def __repr__(self) -> str:
        return "<Ciphering>"

    def _sector(self, guest_offset: int, host_offset: int) -> int:
        return (guest_offset if self._by_guest_offset else host_offset) // SECTOR

    def encrypt(self, data: Buffer, guest_offset: int, host_offset: int) -> bytearray:
        """The bytes to store for guest bytes that will lie at `host_offset`."""
        return self._cipher.encrypt(data, self._sector(guest_offset, host_offset))

    def decrypt(self, data: Buffer, guest_offset: int, host_offset: int) -> bytearray:
        """The guest bytes for what is stored at `host_offset`."""
        return self._cipher.decrypt(data, self._sector(guest_offset, host_offset))

    async def encrypt_long(self, data: Buffer, guest_offset: int, host_offset: int) -> bytearray:
        """As `encrypt`, in threads when there is much of it."""
        sector = self._sector(guest_offset, host_offset)
        if len(data) <= INLINE_LENGTH:
            return self._cipher.encrypt(data, sector)
        target = bytearray(len(data))
        await _in_threads(self._cipher.encrypt, memoryview(data), sector, memoryview(target))
        return target

    async def decrypt_long(self, buffer: memoryview, guest_offset: int, host_offset: int) -> None:
        """Decrypt `buffer` in place, in threads when there is much of it."""
        sector = self._sector(guest_offset, host_offset)
        if len(buffer) <= INLINE_LENGTH:
            buffer[:] = self._cipher.decrypt(buffer, sector)
        else:
            await _in_threads(self._cipher.decrypt, buffer, sector, buffer)


async def _in_threads(
    transform: _Transform, source: memoryview, sector: int, target: memoryview
) -> None:
    """Transform `source` into `target` (which may be the same), split among some threads."""
    length = len(source)
    thread_count = min(_THREAD_COUNT_MAX, os.cpu_count() or 1, -(-length // _THREAD_LENGTH))
    step = -(-length // (thread_count * SECTOR)) * SECTOR

    def work(start: int) -> None:
        part = source[start : start + step]
        target[start : start + step] = transform(part, sector + start // SECTOR)

    jobs = [partial(trio.to_thread.run_sync, work, start) for start in range(0, length, step)]
    await run_all(jobs, thread_count)


class HeldRanges:
    """Guest ranges whose sectors somebody is about to change, or is changing.

    A write of part of a sector stores the whole of it, so between its reading
    and its storing nobody else may change the rest. Taken after the write
    gate, before Allocations and the lock.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: list[Allocation] = []

    def overlapping(self, start: int, end: int) -> Allocation | None:
        """A range held by somebody that shares a byte with [start, end), or None."""
        for held in self._held:
            if held.guest_offset < end and start < held.guest_end:
                return held
        return None

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold [start, end) for the block, once nobody else holds any of it."""
        while (other := self.overlapping(start, end)) is not None:
            await other.wait_done()
        mine = Allocation(start, end)
        self._held.append(mine)
        try:
            yield
        finally:
            self._held.remove(mine)
            mine.wake()
