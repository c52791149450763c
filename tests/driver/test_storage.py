"""Storage: one contract over host files and the fakes."""

import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from qcowfs.driver.storage import Buffer, DataRun, HostFile, LockRole, Storage
from qcowfs.errors import ReadOnlyImage
from tests.fakes import CrashFile, FaultyFile, MemoryFile

Make = Callable[[bytes, bool], Awaitable[Storage]]


@pytest.fixture(params=["host", "memory", "slow memory", "crash", "faulty"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Gives a storage with the content asked for."""

    async def make_one(content: bytes, read_only: bool = False) -> Storage:
        if request.param == "host":
            path = tmp_path / "file"
            path.write_bytes(content)
            return await HostFile.open(path, writable=not read_only, role=LockRole.QCOW2_READ)
        if request.param == "slow memory":
            return MemoryFile(content, read_only=read_only, miss_rate=0.7, refusal_rate=0.7, seed=3)
        if request.param == "crash":
            return CrashFile(content, read_only=read_only)
        inner = MemoryFile(content, read_only=read_only)
        if request.param == "faulty":
            return FaultyFile(inner, piece_length=700, interruptions=2)
        return inner

    return make_one


async def put(file: Storage, buffers: Sequence[Buffer], host_offset: int) -> None:
    """Write as a driver does: inline if possible."""
    if not file.try_pwrite(buffers, host_offset):
        await file.pwrite(buffers, host_offset)


# The contract


async def test_reads_scatter_and_end_in_zeros(make: Make) -> None:
    """Buffers fill one after the other; bytes past the end are zeros, in both calls."""
    content = random.Random(1).randbytes(10_000)
    file = await make(content, False)
    padded = content + bytes(20_000)
    for start in (0, 1, 4095, 9_999, 10_000, 15_000):
        for lengths in ((1,), (100, 0, 5000), (0,), (), (4096, 4096, 4096), (7,) * 50):
            total = sum(lengths)
            buffers = [memoryview(bytearray(b"?" * length)) for length in lengths]
            await file.pread_into(buffers, start)
            assert b"".join(buffers) == padded[start : start + total]
            buffers = [memoryview(bytearray(b"?" * length)) for length in lengths]
            if file.try_pread_into(buffers, start):
                assert b"".join(buffers) == padded[start : start + total]
            assert await file.pread(total, start) == padded[start : start + total]
    await file.aclose()


async def test_writes_gather_and_grow_the_file(make: Make) -> None:
    """Buffers of any kind land one after the other; a write past the end grows the file."""
    file = await make(b"a" * 1000, False)
    await put(file, [b"one", bytearray(b"two"), memoryview(b"three")], 10)
    await put(file, [], 50)
    await put(file, [b""], 5000)
    assert file.size() == 1000
    await file.pwrite([b"end"], 2000)
    assert file.size() == 2003
    content = b"a" * 10 + b"onetwothree" + b"a" * 979 + bytes(1000) + b"end"
    assert await file.pread(2003, 0) == content
    await file.aclose()


async def test_more_buffers_than_one_system_call_takes(make: Make) -> None:
    """A transfer over thousands of buffers is complete."""
    file = await make(b"", False)
    data = random.Random(2).randbytes(3 * 2500)
    await put(file, [data[start : start + 3] for start in range(0, len(data), 3)], 5)
    buffers = [memoryview(bytearray(3)) for _ in range(2600)]
    await file.pread_into(buffers, 5)
    assert b"".join(buffers) == data + bytes(300)
    buffers = [memoryview(bytearray(3)) for _ in range(2600)]
    if file.try_pread_into(buffers, 5):
        assert b"".join(buffers) == data + bytes(300)
    await file.aclose()


@pytest.mark.parametrize("length", [1, 4096, 70_000, 3 << 20])
async def test_zeroes_reach_past_the_end(make: Make, length: int) -> None:
    """Writing zeros leaves the rest alone and grows the file to the end of the range."""
    file = await make(b"z" * 100_000, False)
    await file.write_zeroes(50_001, length)
    assert file.size() == max(100_000, 50_001 + length)
    model = bytearray(b"z" * 100_000)
    model[50_001 : 50_001 + length] = bytes(length)
    assert await file.pread(file.size(), 0) == model
    await file.aclose()


async def test_punching_keeps_the_size(make: Make) -> None:
    """A punched range reads as zeros; the file does not grow or shrink by it."""
    file = await make(b"p" * 100_000, False)
    assert await file.punch(10_000, 30_000)
    assert await file.punch(90_000, 1 << 20)
    assert await file.punch(0, 0)
    assert file.size() == 100_000
    content = b"p" * 10_000 + bytes(30_000) + b"p" * 50_000 + bytes(10_000)
    assert await file.pread(100_000, 0) == content
    await file.aclose()


async def test_truncating_and_allocating(make: Make) -> None:
    """A file is cut, grown with zeros, and grown by a reservation; contents stay."""
    file = await make(b"t" * 5000, False)
    await file.truncate(1000)
    await file.truncate(3000)
    assert await file.pread(3000, 0) == b"t" * 1000 + bytes(2000)
    await file.allocate(500, 100)
    assert file.size() == 3000
    await file.allocate(2000, 6000)
    await file.allocate(0, 0)
    assert file.size() == 8000
    assert await file.pread(8000, 0) == b"t" * 1000 + bytes(7000)
    await file.aclose()


async def test_runs_cover_the_range_and_tell_the_truth(make: Make) -> None:
    """Runs alternate, cover the range, and a hole reads as zeros; past the end is a hole."""
    file = await make(b"r" * 65536 + bytes(65536) + b"r" * 10, False)
    await file.punch(65536, 65536)
    for start, length in ((0, 1 << 20), (100, 70_000), (131_080, 2), (1 << 20, 5), (7, 0)):
        runs = file.data_runs(start, length)
        end = start
        for number, (is_data, run_start, run_length) in enumerate(runs):
            assert run_start == end
            assert run_length > 0
            end += run_length
            assert number == 0 or runs[number - 1].is_data != is_data
            if not is_data:
                assert not any(await file.pread(run_length, run_start))
        assert end == start + length
        assert file.data_runs(start, length, limit=1) == runs[:1]
    assert file.data_runs(1 << 20, 5) == [DataRun(False, 1 << 20, 5)]
    await file.aclose()


async def test_a_read_only_storage_refuses_every_change(make: Make) -> None:
    """Each changing call raises ReadOnlyImage and the content stays."""
    file = await make(b"r" * 1000, True)
    assert file.read_only
    with pytest.raises(ReadOnlyImage):
        file.try_pwrite([b"x"], 0)
    with pytest.raises(ReadOnlyImage):
        await file.pwrite([b"x"], 0)
    with pytest.raises(ReadOnlyImage):
        await file.write_zeroes(0, 10)
    with pytest.raises(ReadOnlyImage):
        await file.write_zeroes(0, 1 << 20)
    with pytest.raises(ReadOnlyImage):
        await file.punch(0, 10)
    with pytest.raises(ReadOnlyImage):
        await file.truncate(0)
    with pytest.raises(ReadOnlyImage):
        await file.allocate(0, 5000)
    assert await file.pread(1001, 0) == b"r" * 1000 + b"\0"
    await file.aclose()


async def test_closing_twice_and_using_it_afterwards(make: Make) -> None:
    """Closing is idempotent; a closed storage raises EBADF rather than touch another file."""
    file = await make(b"c" * 10, False)
    await file.sync()
    await file.aclose()
    await file.aclose()
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        await file.pread(1, 0)
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        await file.pwrite([b"x"], 0)
