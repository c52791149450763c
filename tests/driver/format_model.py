"""A model of an image without snapshots: a bytearray, and seeded steps tried on both.

For the formats beside qcow2. A step is plain data whose inside comes from its
own seed. The image lies in memory, where the driver has to wait more or less
often; whenever it is closed, a judge of the format looks at its bytes.
Invariant: between two steps the model is what the image has to show. Of a
discard, each byte may read as before or as zero: what it is, is adopted.

`replay_crashes` runs a workload with the witness of the crash harness and
judges the states that a crash may leave.
"""

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import trio

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
from tests.crash.harness import Workload, list_sample, stamps_of
from tests.driver.model import History, random_range
from tests.fakes import CrashFile, MemoryFile

OPERATIONS = int(os.environ.get("QCOWFS_MODEL_OPERATIONS", "200"))
CRASH_STATES = int(os.environ.get("QCOWFS_CRASH_STATES", "420")) // 12
SEED = int(os.environ.get("QCOWFS_MODEL_SEED", "1"))

Opener = Callable[[MemoryFile], Awaitable[Node]]
Judge = Callable[[bytes, bytes], Awaitable[None]]

_KINDS = {"write": 36, "zero": 10, "discard": 10, "read": 10, "extents": 5, "flush": 6,
          "mingled": 5, "reopen": 2}  # fmt: skip


@dataclass
class FormatModel:
    """One image in memory and its model.

    `open_file` makes the node over a file; `judge(image, content)` fails when
    the image's bytes do not show the content, or break a rule of the format.
    `content` is what the image shows in the beginning.
    """

    image: bytes
    content: bytearray
    cluster_size: int
    open_file: Opener
    judge: Judge

    async def run(self, count: int = OPERATIONS, seed: int = SEED) -> None:
        """Open the image, take `count` steps, close and judge it; a failure names its step."""
        rng = random.Random(seed)
        kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=count)
        await self._open(rng)
        try:
            for number, kind in enumerate(kinds):
                step_seed = rng.getrandbits(32)
                try:
                    await self._take(kind, random.Random(step_seed))
                except BaseException as error:
                    error.add_note(f"seed {seed}, step {number}: {kind}, {step_seed}")
                    raise
        finally:
            with trio.CancelScope(shield=True):
                await self._node.aclose()
        await self.judge(bytes(self._file.content), bytes(self.content))

    async def _open(self, rng: random.Random) -> None:
        rate = rng.choice((0.0, 0.3, 0.8))
        self._file = MemoryFile(
            self.image,
            miss_rate=rate,
            refusal_rate=rate,
            seed=rng.getrandbits(16),
            can_punch=rng.random() < 0.8,
        )
        self._node = await self.open_file(self._file)

    async def _take(self, kind: str, rng: random.Random) -> None:
        node, content = self._node, self.content
        start, length = random_range(rng, len(content), self.cluster_size)
        if kind == "write":
            data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
            if rng.random() < 0.5 or not node.try_write(start, data):
                await node.write_from(start, data)
            content[start : start + length] = data
        elif kind == "zero":
            await node.write_zeroes(start, length, unmap=rng.random() < 0.6)
            content[start : start + length] = bytes(length)
        elif kind == "discard":
            await node.discard(start, length)
            found = await self._read(start, length)
            old = np.frombuffer(bytes(content[start : start + length]), dtype=np.uint8)
            new = np.frombuffer(found, dtype=np.uint8)
            assert ((new == 0) | (new == old)).all(), "a discard left bytes of another"
            content[start : start + length] = found
        elif kind == "read":
            assert await self._read(start, length) == content[start : start + length]
        elif kind == "extents":
            await self._check_extents(start, length)
        elif kind == "flush":
            await node.flush()
        elif kind == "mingled":
            await self._mingle(rng)
        else:
            assert await self._read(0, len(content)) == content
            await node.aclose()
            self.image = bytes(self._file.content)
            await self.judge(self.image, bytes(content))
            await self._open(rng)
            assert await self._read(0, len(content)) == content

    async def _read(self, start: int, length: int) -> bytearray:
        buffer = bytearray(length)
        await self._node.read_into(start, memoryview(buffer))
        instant = self._node.try_read(start, length)
        assert instant is None or instant == buffer, "try_read disagrees with read_into"
        return buffer

    async def _check_extents(self, start: int, length: int) -> None:
        covered = start
        for extent in await self._node.extents(start, length):
            assert extent.guest_offset == covered
            covered += extent.length
            if extent.kind is ExtentKind.UNALLOCATED and self._node.backing is None:
                assert not any(self.content[extent.guest_offset : covered])
        assert covered == start + length

    async def _mingle(self, rng: random.Random) -> None:
        """Tasks that change and read the same ranges all at once."""
        history = History(self.content)

        async def work(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(own.randint(1, 5)):
                start, length = random_range(own, len(self.content), self.cluster_size)
                kind = own.choice(("write", "write", "zero", "discard", "read", "flush"))
                if kind == "flush":
                    await self._node.flush()
                elif kind == "read":
                    begin = history.tick()
                    buffer = bytearray(length)
                    await self._node.read_into(start, memoryview(buffer))
                    history.check(buffer, start, begin)
                else:
                    data = own.randbytes(length) if kind == "write" else bytes(length)
                    change = history.add(start, data, sure=kind != "discard")
                    if kind == "zero":
                        await self._node.write_zeroes(start, length, unmap=own.random() < 0.6)
                    elif kind == "discard":
                        await self._node.discard(start, length)
                    elif own.random() < 0.5 or not self._node.try_write(start, data):
                        await self._node.write_from(start, data)
                    change.end = history.tick()

        async with trio.open_nursery() as nursery:
            for _ in range(rng.randint(2, 5)):
                nursery.start_soon(work, rng.getrandbits(32))
        begin = history.tick()
        found = await self._read(0, len(self.content))
        history.check(found, 0, begin)
        self.content[:] = found


async def replay_crashes(
    image: bytes,
    content: bytes,
    open_file: Opener,
    check: Callable[[bytes], Awaitable[str | None]],
    *,
    count: int = CRASH_STATES,
    seed: int = SEED,
    drop_every_second_sync: bool = False,
) -> list[str]:
    """What is wrong with `count` states that a crash under a random workload may leave.

    `check(state)` answers what breaks a rule of the format. Each sector may
    hold what the last flush made durable, or what a later call put there.
    """
    rng = random.Random(seed)
    file = CrashFile(
        image, drop_every_second_sync=drop_every_second_sync, miss_rate=0.2, seed=seed
    )
    node = await open_file(file)
    load = Workload(node, file, rng, content)  # type: ignore[arg-type]
    for _ in range(60):
        kind = rng.random()
        if kind < 0.35:
            await load.write(*load.pick(8))
        elif kind < 0.5:
            await load.write(*load.pick(200))
        elif kind < 0.6:
            await load.write_together(64, 5)
        elif kind < 0.8:
            await load.clear(*load.pick(200), discard=kind < 0.7)
        else:
            await load.flush()
    await load.flush()
    await node.aclose()
    failures = []
    for state in list_sample(file, count, seed):
        problem = await check(state.content)
        if problem is None:
            found = await open_file(MemoryFile(state.content, read_only=True))
            data = bytearray(found.virtual_size)
            await found.read_into(0, memoryview(data))
            await found.aclose()
            wrong = load.witness.unexpected(state.point, stamps_of(data))
            problem = f"sectors hold what they may not hold: {wrong[:8]}" if wrong else None
        if problem is not None:
            failures.append(f"after {state.point} operations, {state.description}: {problem}")
    return failures
