"""The fakes themselves: what CrashFile rebuilds, when FaultyFile strikes.

That they keep the contract of Storage is tested in test_storage.
"""

import errno

import pytest
import trio
import trio.testing

from tests.fakes import CrashFile, FaultyFile, MemoryFile, Operation

OLD = b"o" * 4096


async def written(file: CrashFile, *writes: tuple[int, bytes]) -> None:
    """Write each of the (host offset, data)."""
    for host_offset, data in writes:
        await file.pwrite([data], host_offset)


# MemoryFile


async def test_a_miss_leaves_garbage_and_is_repeatable() -> None:
    """The same seed misses at the same calls; a missed buffer is not what the file holds."""

    def answers(seed: int) -> list[bool]:
        file = MemoryFile(OLD, miss_rate=0.5, refusal_rate=0.5, seed=seed)
        found = []
        for _ in range(50):
            buffer = bytearray(10)
            found.append(file.try_pread_into([memoryview(buffer)], 0))
            assert (buffer == OLD[:10]) is found[-1]
            found.append(file.try_pwrite([b"o"], 0))
        return found

    assert answers(1) == answers(1) != answers(2)
    assert {True, False} == set(answers(1))


async def test_a_waiting_call_lets_others_run() -> None:
    """Every waiting call gives other tasks a turn, the instant ones do not."""
    file = MemoryFile(OLD)
    with trio.testing.assert_checkpoints():
        await file.pwrite([b"n"], 0)
    with trio.testing.assert_checkpoints():
        await file.pread(1, 0)
    with trio.testing.assert_checkpoints():
        await file.sync()
    with trio.testing.assert_no_checkpoints():
        assert file.try_pwrite([b"n"], 0)


# CrashFile


async def test_everything_or_only_the_durable() -> None:
    """Without survivors only what a finished sync covers is there; with all, the file as it is."""
    file = CrashFile(OLD)
    await written(file, (0, b"first"))
    await file.sync()
    await written(file, (100, b"second"))
    assert file.position == 3
    assert file.pending() == [2]
    assert file.rebuild() == file.content
    durable = file.rebuild([])
    assert durable[:5] == b"first"
    assert durable[100:106] == b"oooooo"
    assert file.rebuild([], point=1) == OLD
    assert file.rebuild(point=0) == OLD


async def test_a_sync_covers_what_had_been_written_when_it_began() -> None:
    """A write that comes while a sync is under way is not durable by it."""
    file = CrashFile(OLD)
    await written(file, (0, b"early"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.sync)
        nursery.start_soon(written, file, (100, b"late"))
    kinds = [operation.kind for operation in file.log]
    assert sorted(kinds) == ["pwrite", "pwrite", "sync"]
    assert file.log[kinds.index("sync")].covers == 1
    assert file.rebuild([])[100:104] == b"oooo"


async def test_survivors_land_in_the_order_given() -> None:
    """Of two writes to one place the one that lands last is seen."""
    file = CrashFile(OLD)
    await written(file, (0, b"one"), (0, b"two"))
    assert file.rebuild([0, 1])[:3] == b"two"
    assert file.rebuild([1, 0])[:3] == b"one"
    assert file.rebuild([0])[:3] == b"one"


async def test_every_kind_of_change_is_replayed() -> None:
    """Zeroing, punching, cutting, growing and reserving are rebuilt as they happened."""
    file = CrashFile(OLD * 2)
    await file.write_zeroes(1000, 3000)
    await file.punch(5000, 10_000)
    await file.truncate(7000)
    await file.truncate(9000)
    await file.allocate(8000, 4000)
    await file.write_zeroes(11_000, 3000)
    assert file.try_pwrite([b"a", b"b"], 20_000)
    kinds = [operation.kind for operation in file.log]
    assert kinds == ["zero", "punch", "truncate", "truncate", "allocate", "zero", "pwrite"]
    assert file.rebuild() == file.content
    assert len(file.rebuild([0, 1])) == 8192
    assert len(file.rebuild([2])) == 7000


async def test_a_write_tears_at_sectors_of_the_file() -> None:
    """The pieces of a write are the 512-byte sectors of the file that it touches."""
    operation = Operation("pwrite", 500, 1000, b"x" * 1000)
    assert operation.pieces() == [(500, 512), (512, 1024), (1024, 1500)]
    assert Operation("truncate", 77).pieces() == [(77, 77)]
    file = CrashFile(OLD)
    await written(file, (500, b"x" * 1000))
    content = file.rebuild([0], torn={0: [1]})
    assert content == OLD[:512] + b"x" * 512 + OLD[1024:]
    assert file.rebuild([0], torn={0: []}) == OLD
    assert file.rebuild([0], torn={0: [0, 1, 2]}) == file.content


async def test_the_states_of_a_short_log() -> None:
    """All single losses and survivals at every point are among the states, each once."""
    file = CrashFile(OLD)
    await written(file, (0, b"A"), (1000, b"B"))
    await file.sync()
    await written(file, (2000, b"C"), (3000, b"D"))
    marks = {(0, b"A"), (1000, b"B"), (2000, b"C"), (3000, b"D")}
    seen: dict[int, set[bytes]] = {}
    for state in file.states(torn_count=0):
        shown = b"".join(sorted(mark for place, mark in marks if state.content[place] == mark[0]))
        seen.setdefault(state.point, set()).add(shown)
    assert seen == {
        0: {b""},
        1: {b"", b"A"},
        2: {b"", b"A", b"B", b"AB"},
        3: {b"AB"},
        4: {b"AB", b"ABC"},
        5: {b"AB", b"ABC", b"ABD", b"ABCD"},
    }


async def test_states_are_the_rebuilt_files() -> None:
    """Going forward through the points gives what rebuilding each from the start gives."""
    file = CrashFile(OLD)
    for number in range(6):
        await written(file, (number * 600, bytes([number]) * 700))
        if number % 2:
            await file.sync()
    for state in file.states():
        if state.description == "everything survives":
            assert state.content == file.rebuild(point=state.point)
        if state.description == "only the durable survives":
            assert state.content == file.rebuild([], point=state.point)


async def test_sampled_states_are_few_and_repeatable() -> None:
    """With `point_count` only so many points are looked at, the last among them."""
    file = CrashFile(OLD)
    for number in range(40):
        await written(file, (number, b"x"))
    states = list(file.states(point_count=5, each_limit=4))
    assert states == list(file.states(point_count=5, each_limit=4))
    points = {state.point for state in states}
    assert len(points) == 5
    assert max(points) == 40
    assert len(states) <= 5 * (2 + 2 * 4 + 3 + 1 + 2)
    assert min(state.point for state in file.states(first_point=30)) == 30


@pytest.mark.parametrize(("first", "durable"), [(False, b"A"), (True, b"AB")])
async def test_dropping_every_second_sync(first: bool, durable: bytes) -> None:
    """A dropped sync makes nothing durable; the next one makes up for it."""
    file = CrashFile(bytes(2), drop_every_second_sync=True, drop_first_sync=first)
    await written(file, (0, b"A"))
    await file.sync()
    assert file.rebuild([]) == (bytes(2) if first else b"A\0")
    await written(file, (1, b"B"))
    await file.sync()
    assert file.rebuild([]) == durable.ljust(2, b"\0")
    await file.sync()
    assert file.rebuild([]) == b"AB"


# FaultyFile


async def test_the_nth_call_fails_once() -> None:
    """The ordered call fails with its errno, those before and after do not."""
    file = FaultyFile(MemoryFile(OLD))
    fault = file.fail("pwrite", 3, errno.ENOSPC)
    await file.pwrite([b"1"], 0)
    await file.pwrite([b"2"], 1)
    await file.pread(1, 0)
    with pytest.raises(OSError, match="space") as failure:
        await file.pwrite([b"3"], 2)
    assert failure.value.errno == errno.ENOSPC
    await file.pwrite([b"4"], 3)
    assert await file.pread(4, 0) == b"12o4"
    assert fault.hit_count == 1
    assert file.calls == {"pwrite": 4, "pread": 2}


async def test_a_group_counts_all_its_methods() -> None:
    """`write` means the instant and the waiting call alike; `repeat` goes on until healed."""
    file = FaultyFile(MemoryFile(OLD))
    file.fail("write", 2, repeat=True)
    assert file.try_pwrite([b"1"], 0)
    with pytest.raises(OSError, match="rror"):
        await file.pwrite([b"2"], 1)
    with pytest.raises(OSError, match="rror"):
        file.try_pwrite([b"3"], 2)
    file.heal()
    assert file.try_pwrite([b"4"], 3)
    assert await file.pread(4, 0) == b"1oo4"


@pytest.mark.parametrize("inline", [True, False])
async def test_a_failing_write_may_leave_a_part(inline: bool) -> None:
    """With `written`, the first bytes are in the file when the error comes."""
    file = FaultyFile(MemoryFile(OLD))
    file.fail("write", written=3)
    with pytest.raises(OSError, match="rror"):
        if inline:
            file.try_pwrite([b"ab", b"cdef"], 0)
        else:
            await file.pwrite([b"ab", b"cdef"], 0)
    assert await file.pread(5, 0) == b"abcoo"


async def test_a_failed_sync_fails_for_ever() -> None:
    """Healing does not bring back the trust in a storage that lost a write."""
    inner = MemoryFile(OLD)
    file = FaultyFile(inner)
    file.fail("sync", 2)
    await file.sync()
    for _ in range(2):
        with pytest.raises(OSError, match="rror"):
            await file.sync()
        file.heal()
    assert inner.sync_count == 1


async def test_short_transfers_are_seen_half_done() -> None:
    """With `piece_length` another task can see a write between two of its pieces."""
    file = FaultyFile(MemoryFile(OLD), piece_length=100)
    seen: set[int] = set()

    async def watch() -> None:
        for _ in range(50):
            seen.add(bytes(await file.inner.pread(300, 0)).count(b"n"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await file.pwrite([b"n" * 150, b"n" * 150], 0)
    assert seen & {100, 200}
    assert await file.pread(301, 0) == b"n" * 300 + b"o"
