"""Refcounts of all widths: packing, scanning, limits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.layout.refcounts import (
    RefcountBlock,
    find_free_run,
    pack_all,
    refcount_table_entry_offset,
    unpack_all,
)
from qcowfs.errors import CorruptImage, ImageFull

ORDERS = range(7)


def block(order: int, values: list[int]) -> RefcountBlock:
    """A block of 512 bytes that begins with `values`; the rest are 1."""
    made = RefcountBlock(bytearray(512), order)
    made.fill(0, made.count, 1)
    for index, value in enumerate(values):
        made.set(index, value)
    return made


@pytest.mark.parametrize(
    ("order", "data", "values"),
    [
        (0, b"\x05", [1, 0, 1, 0, 0, 0, 0, 0]),
        (1, b"\xe4", [0, 1, 2, 3]),
        (2, b"\x21", [1, 2]),
        (3, b"\x07\xff", [7, 255]),
        (4, b"\x01\x02", [0x102]),
        (5, b"\x01\x02\x03\x04", [0x01020304]),
        (6, b"\x80\0\0\0\0\0\0\1", [0x8000000000000001]),
    ],
)
def test_bytes_of_each_width(order: int, data: bytes, values: list[int]) -> None:
    """Below 8 bits the first refcount is in the lowest bits; from 16 bits on, big-endian."""
    made = RefcountBlock(bytearray(data), order)
    assert [made.get(index) for index in range(made.count)] == values
    assert unpack_all(data, order).tolist() == values
    assert pack_all(unpack_all(data, order), order) == data


@pytest.mark.parametrize("order", ORDERS)
def test_set_changes_one_refcount_alone(order: int) -> None:
    """Its neighbours in the same byte stay."""
    choice = random.Random(order)
    made = RefcountBlock(bytearray(64), order)
    model = [0] * made.count
    for _ in range(300):
        index = choice.randrange(made.count)
        model[index] = choice.randint(0, made.maximum)
        made.set(index, model[index])
    assert [made.get(index) for index in range(made.count)] == model
    assert unpack_all(made.buffer, order).tolist() == model


@pytest.mark.parametrize("order", ORDERS)
def test_refcounts_never_wrap(order: int) -> None:
    """One more than the width can hold, or less than 0, is refused and changes nothing."""
    made = block(order, [])
    before = bytes(made.buffer)
    for value in (made.maximum + 1, -1):
        with pytest.raises(ImageFull):
            made.set(3, value)
        with pytest.raises(ImageFull):
            made.fill(3, 2, value)
    assert bytes(made.buffer) == before


@pytest.mark.parametrize("order", ORDERS[:6])
def test_packing_refuses_what_does_not_fit(order: int) -> None:
    """Whole arrays are checked like single values."""
    import numpy as np

    values = np.zeros(8, dtype=np.uint64)
    values[5] = 1 << (1 << order)
    with pytest.raises(ImageFull, match="index 5"):
        pack_all(values, order)


@pytest.mark.parametrize("order", ORDERS)
def test_fill_sets_a_range(order: int) -> None:
    """And nothing beside it."""
    made = RefcountBlock(bytearray(512), order)
    made.fill(5, 20, 1)
    assert [made.get(index) for index in range(30)] == [0] * 5 + [1] * 20 + [0] * 5


@given(
    st.sampled_from(list(ORDERS)),
    st.lists(st.sampled_from([0, 0, 1, 256, 1 << 24, 1 << 40]), max_size=200),
    st.integers(0, 250),
    st.integers(1, 40),
    st.integers(1, 12),
)
def test_free_runs_are_found(
    order: int, values: list[int], start: int, count: int, minimum: int
) -> None:
    """The first run from `start` on that is long enough, cut at `count`; zero bytes do not fool."""
    minimum = min(minimum, count)
    maximum = (1 << (1 << order)) - 1
    made = RefcountBlock(bytearray(512 if order < 5 else 2048), order)
    made.fill(0, made.count, 1)
    for index, value in enumerate(values[: made.count]):
        made.set(index, min(value, maximum))
    start = min(start, made.count)
    model = [made.get(index) for index in range(made.count)]
    expected = None
    index = start
    while index < len(model) and expected is None:
        length = 0
        while index + length < len(model) and length < count and model[index + length] == 0:
            length += 1
        if length >= minimum:
            expected = (index, length)
        index += length + 1
    assert find_free_run(made, start, count, minimum=minimum) == expected
    assert made.free_count() == model.count(0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_full_block_has_no_free_run(order: int) -> None:
    """Neither from its beginning nor from its end."""
    made = block(order, [])
    assert find_free_run(made, 0, 10) is None
    assert find_free_run(made, made.count, 10) is None


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_block_is_one_free_run(order: int) -> None:
    """All of it is free."""
    made = RefcountBlock(bytearray(512), order)
    assert find_free_run(made, 0, 1 << 20) == (0, made.count)


@pytest.mark.parametrize(
    ("order", "first", "count", "expected"),
    [(0, 3, 2, (0, 1)), (0, 7, 2, (0, 2)), (2, 1, 1, (0, 1)), (4, 3, 2, (6, 4)), (6, 1, 1, (8, 8))],
)
def test_the_bytes_that_hold_a_range(
    order: int, first: int, count: int, expected: tuple[int, int]
) -> None:
    """Dirty ranges are written by whole bytes."""
    assert RefcountBlock(bytearray(64), order).byte_range(first, count) == expected


def test_a_refcount_table_entry_names_an_aligned_block() -> None:
    """0 names none."""
    geometry = Geometry(16, 3, 0, False, 4)
    assert refcount_table_entry_offset(0, 5, geometry) == 0
    assert refcount_table_entry_offset(0x20000, 5, geometry) == 0x20000


@pytest.mark.parametrize("entry", [1, 0x1FF, 0x20200, 1 << 56, 2**64 - 65536])
def test_broken_refcount_table_entries_are_refused(entry: int) -> None:
    """Reserved bits, an offset inside a cluster, or one that nothing could name."""
    with pytest.raises(CorruptImage, match="refcount table entry 5") as caught:
        refcount_table_entry_offset(entry, 5, Geometry(16, 3, 0, False, 4))
    assert f"{entry:#018x}" in str(caught.value)


def some_counts(choice: random.Random, order: int) -> tuple[RefcountBlock, list[int]]:
    """A block of 256 counts, extremes among them."""
    made = RefcountBlock(bytearray(256 << order >> 3), order)
    top = made.maximum
    model = [
        min(top, choice.choice((0, 1, 1, 2, top - 1, top, choice.randint(0, top))))
        for _ in range(256)
    ]
    for index, value in enumerate(model):
        made.set(index, value)
    return made, model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(20))
def test_questions_about_a_run(order: int, seed: int) -> None:
    """What is 0, what is 1, what is full in a run: the same as one count after the other."""
    choice = random.Random(seed)
    made, model = some_counts(choice, order)
    first = choice.randrange(256)
    run = model[first : first + choice.randint(1, 256)]
    count = len(run)
    assert made.values(first, count) == run
    assert made.find_zero(first, count) == (first + run.index(0) if 0 in run else -1)
    full = first + run.index(made.maximum) if made.maximum in run else -1
    assert made.find_maximum(first, count) == full
    assert made.ones(first, count) == bytes(value == 1 for value in run)
    zeros = [index for start, length in made.zero_runs(first, count)
             for index in range(start, start + length)]  # fmt: skip
    assert zeros == [index for index, value in enumerate(run, first) if value == 0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("step", [1, -1])
def test_a_run_is_shifted_alone(order: int, step: int) -> None:
    """Every count of the run changes by one, its neighbours stay."""
    made = RefcountBlock(bytearray(256 << order >> 3), order)
    choice = random.Random(order)
    low, high = (0, made.maximum - 1) if step > 0 else (1, made.maximum)
    model = [choice.randint(low, high) for _ in range(256)]
    for index, value in enumerate(model):
        made.set(index, value)
    made.shift_run(37, 150, step)
    model[37:187] = [value + step for value in model[37:187]]
    assert made.values(0, 256) == model


@pytest.mark.parametrize("order", ORDERS)
def test_uniform_tells_equal_counts(order: int) -> None:
    """The value that all share; None where they differ, or share bytes."""
    made = RefcountBlock(bytearray(512), order)
    made.fill(3, 20, 1)
    assert made.uniform(3, 20) == (1 if order >= 3 else None)
    assert made.uniform(3, 21) is None
