"""Errors of the host at every call of every operation, and cancellation at every await."""

import errno
import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from qcowfs.driver.qcow2.image import Qcow2Node
from qcowfs.errors import QcowfsError
from tests.driver.engine import judge
from tests.driver.qcow2_images import KIB, MIB, assert_sound, make_image, open_node, read
from tests.fakes import FaultyFile, MemoryFile

ONE = b"\x01" * 512 * KIB + bytes(512 * KIB)
TWO = ONE[: 100 * KIB] + b"\x02" * 200 * KIB + ONE[300 * KIB :]
THREE = TWO[: 200 * KIB] + b"\x03" * 200 * KIB + TWO[400 * KIB :]

Operation = Callable[[Qcow2Node], Awaitable[object]]

# What is done, and how the active disk may read afterwards.
OPERATIONS: dict[str, tuple[Operation, bytes]] = {
    "create": (lambda node: node.create_snapshot(b"new"), THREE),
    "delete": (lambda node: node.delete_snapshot(b"two"), THREE),
    "apply": (lambda node: node.apply_snapshot(b"one"), ONE),
    "rename": (lambda node: node.rename_snapshot(b"two", b"other"), THREE),
    "grow": (lambda node: node.grow(3 * MIB), THREE),
}
EXPECTED = {b"one": ONE, b"two": TWO, b"other": TWO, b"new": THREE}
FAULTS = [("write", errno.ENOSPC), ("write", errno.EIO), ("read", errno.EIO), ("sync", errno.EIO)]


async def _prepare(options: str) -> tuple[MemoryFile, FaultyFile, Qcow2Node]:
    """A disk that reads as THREE over snapshots that read as ONE and TWO."""
    image = make_image(MIB, options, commands=("write -P 1 0 512k",), snapshots=("one",))
    memory = MemoryFile(image)
    storage = FaultyFile(memory)
    node = await open_node(storage)
    await node.write_from(100 * KIB, b"\x02" * 200 * KIB)
    await node.create_snapshot(b"two")
    await node.write_from(200 * KIB, b"\x03" * 200 * KIB)
    await node.flush()
    return memory, storage, node


async def _check_disks(node: Qcow2Node, choices: tuple[bytes, ...]) -> None:
    """The active disk reads as one of the choices, each snapshot as it was taken."""
    content = await read(node, 0, node.virtual_size)
    assert content[:MIB] in choices
    assert not any(content[MIB:])
    for entry in node.snapshots():
        view = await node.open_snapshot(entry)
        assert await read(view, 0, MIB) == EXPECTED[entry.name]


@pytest.mark.expects_warnings
@pytest.mark.parametrize(("calls", "error_number"), FAULTS)
@pytest.mark.parametrize("options", ["", "cluster_size=4096,refcount_bits=8"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_error_costs_no_disk_anything(
    name: str, options: str, calls: str, error_number: int
) -> None:
    """Whichever call of the host fails: all disks stay whole, and no sound image is left unsound.

    Clusters may leak where a table could not be read, or after failsafe; a
    failsafe may also leave COPIED flags that are not set.
    """
    operation, after = OPERATIONS[name]
    nth = 0
    hit_count = 1
    while hit_count:
        nth += 1
        memory, storage, node = await _prepare(options)
        fault = storage.fail(calls, nth, error_number)
        try:
            await operation(node)
        except (OSError, QcowfsError):
            assert fault.hit_count
        hit_count = fault.hit_count
        storage.faults.clear()
        await _check_disks(node, (THREE, after))
        if node.failsafe is None:
            await node.write_from(0, THREE[:4096])
        is_safe = node.failsafe is not None
        await node.aclose()
        corruptions, leaks = judge(memory.content)
        assert corruptions == 0 or is_safe
        assert leaks == 0 or is_safe or calls == "read"
        left = await open_node(bytes(memory.content), read_only=True)
        await _check_disks(left, (THREE, after))


@pytest.mark.expects_warnings
@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_that_failed_can_be_repeated(name: str) -> None:
    """When the host has room again, the same operation succeeds and nothing is left behind."""
    operation, after = OPERATIONS[name]
    for nth in range(1, 12):
        memory, storage, node = await _prepare("")
        storage.fail("write", nth, errno.ENOSPC)
        try:
            await operation(node)
        except OSError:
            pass
        storage.faults.clear()
        if node.failsafe is None:
            try:
                await operation(node)
            except QcowfsError as error:
                assert error.errno in {errno.EEXIST, errno.ENOENT}
            await _check_disks(node, (after,))
            await node.aclose()
            assert_sound(memory.content)


@pytest.mark.expects_warnings
@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=512"])
@pytest.mark.parametrize(("calls", "error_number"), [*FAULTS[:3], ("punch", errno.EIO)])
async def test_guest_writes_survive_a_failing_host(
    options: str, calls: str, error_number: int
) -> None:
    """What was not part of a failed request stays; nothing leaks, whichever call fails."""
    choose = random.Random(len(options) + len(calls) + error_number)
    memory = MemoryFile(make_image(MIB, options), refusal_rate=0.5, miss_rate=0.5, seed=3)
    storage = FaultyFile(memory)
    node = await open_node(storage)
    model = bytearray(MIB)
    is_known = bytearray(b"\x01") * MIB
    for number in range(60):
        start = choose.randrange(MIB)
        length = min(choose.choice([512, 5000, 70000, 150000]), MIB - start)
        data = choose.randbytes(length) if number % 4 else bytes(length)
        storage.fail(calls, choose.randrange(1, 9), error_number)
        try:
            if number % 4:
                await node.write_from(start, data)
            else:
                await node.write_zeroes(start, length, unmap=bool(number % 8))
            if number % 10 == 0:
                await node.flush()
        except OSError:
            is_known[start : start + length] = bytes(length)
        else:
            model[start : start + length] = data
            is_known[start : start + length] = b"\x01" * length
        storage.faults.clear()
        if node.failsafe is not None:
            break
    content = await read(node, 0, MIB)
    assert all(
        found == wanted
        for found, wanted, known in zip(content, model, is_known, strict=True)
        if known
    )
    is_safe = node.failsafe is not None
    await node.aclose()
    assert_sound(memory.content, None if is_safe else content, leaks=1000 if is_safe else 0)


@pytest.mark.parametrize("options", ["", "extended_l2=on", "cluster_size=512"])
@pytest.mark.parametrize("name", [*OPERATIONS, "write", "zero", "discard"])
async def test_a_cancelled_request_leaves_a_sound_image(name: str, options: str) -> None:
    """Cancelled at whichever await, a request has happened or not, in part for a write."""
    operations: dict[str, Operation] = {
        "write": lambda node: node.write_from(50 * KIB, THREE[50 * KIB : 500 * KIB]),
        "zero": lambda node: node.write_zeroes(600 * KIB, 300 * KIB),
        "discard": lambda node: node.discard(600 * KIB, 300 * KIB),
    }
    operation, after = OPERATIONS.get(name) or (operations[name], THREE)
    for count in range(0, 60, 3):
        memory = MemoryFile(
            make_image(MIB, options, commands=("write -P 1 0 512k",), snapshots=("one",)),
            miss_rate=0.7,
            refusal_rate=0.7,
            seed=count,
        )
        node = await open_node(memory)
        await node.write_from(100 * KIB, b"\x02" * 200 * KIB)
        await node.create_snapshot(b"two")
        await node.write_from(200 * KIB, b"\x03" * 200 * KIB)
        async with trio.open_nursery() as nursery:

            async def cancel(scope: trio.CancelScope, pauses: int) -> None:
                for _ in range(pauses):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            nursery.start_soon(cancel, nursery.cancel_scope, count)
            await operation(node)
        assert node.failsafe is None
        await _check_disks(node, (THREE, after))
        await node.aclose()
        assert_sound(memory.content)
