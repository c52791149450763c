"""The write gate, Allocations in flight, and generations."""

import pytest
import trio
import trio.testing

from qcowfs.driver.qcow2.requests import Requests


async def test_open_gate_lets_writers_in_without_a_checkpoint() -> None:
    """Entering an open gate counts the writer and never yields."""
    requests = Requests()
    with trio.testing.assert_no_checkpoints():
        await requests.enter_write()
    assert requests.writer_count == 1
    requests.leave_write()
    assert requests.writer_count == 0


async def test_closing_waits_until_the_last_writer_has_left() -> None:
    """The block of `close_gate` begins only when no writer is inside."""
    requests = Requests()
    events: list[str] = []
    await requests.enter_write()
    await requests.enter_write()

    async def close() -> None:
        async with requests.close_gate():
            events.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        requests.leave_write()
        await trio.testing.wait_all_tasks_blocked()
        assert events == []
        requests.leave_write()
    assert events == ["closed"]


async def test_writer_waits_while_the_gate_is_closed() -> None:
    """A write that comes while the gate is closed begins after it opened."""
    requests = Requests()
    events: list[str] = []

    async def write() -> None:
        await requests.enter_write()
        events.append("write")
        requests.leave_write()

    async with trio.open_nursery() as nursery:
        async with requests.close_gate():
            assert not requests.gate_open
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            events.append("opened")
    assert events == ["opened", "write"]
    assert requests.gate_open


async def test_two_closers_take_turns() -> None:
    """The gate has one closer at a time."""
    requests = Requests()
    inside = 0
    most = 0

    async def close() -> None:
        nonlocal inside, most
        async with requests.close_gate():
            inside += 1
            most = max(most, inside)
            await trio.lowlevel.checkpoint()
            inside -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(close)
    assert most == 1


async def test_cancelled_closer_opens_the_gate() -> None:
    """A closer that gives up while draining lets writers in again."""
    requests = Requests()
    await requests.enter_write()
    with trio.move_on_after(0):
        async with requests.close_gate():
            pytest.fail("the gate was not drained")
    assert requests.gate_open
    await requests.enter_write()


@pytest.mark.parametrize(
    ("guest_offset", "length", "hit"),
    [(0, 100, False), (0, 101, True), (150, 10, True), (199, 1, True), (200, 5, False)],
)
def test_overlap_is_by_shared_bytes(guest_offset: int, length: int, hit: bool) -> None:
    """Touching ranges do not overlap; one shared byte does."""
    requests = Requests()
    allocation = requests.register(100, 200)
    expected = allocation if hit else None
    assert requests.overlapping(guest_offset, length) is expected


async def test_finish_wakes_all_who_wait() -> None:
    """Everybody who waits for an Allocation goes on when it is finished."""
    requests = Requests()
    allocation = requests.register(0, 100)
    woken = 0

    async def wait() -> None:
        nonlocal woken
        assert await requests.wait_overlapping(50, 10)
        woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == 0
        requests.finish(allocation)
    assert woken == 2
    assert not requests.allocations


async def test_nothing_overlapping_is_no_wait() -> None:
    """Without an overlap the answer is False at once."""
    requests = Requests()
    requests.register(0, 100)
    with trio.testing.assert_no_checkpoints():
        assert not await requests.wait_overlapping(100, 10)


def test_generation_is_current_when_idle() -> None:
    """With no request under way the oldest generation is the current one."""
    requests = Requests()
    assert requests.advance() == requests.oldest()


def test_freed_cluster_waits_for_every_earlier_request() -> None:
    """A generation is reached only when all requests begun before it have ended."""
    requests = Requests()
    first = requests.begin()
    second = requests.begin()
    freed_at = requests.advance()
    later = requests.begin()
    assert requests.oldest() < freed_at
    requests.end(first)
    assert requests.oldest() < freed_at
    requests.end(second)
    assert requests.oldest() >= freed_at
    requests.end(later)
    assert requests.oldest() >= freed_at


def test_later_requests_do_not_hold_back_earlier_frees() -> None:
    """A request that began after the free may go on for ever."""
    requests = Requests()
    freed_at = requests.advance()
    requests.begin()
    requests.advance()
    assert requests.oldest() == freed_at
