"""The qcow2 driver against a model: seeded steps of all kinds over every shape of image.

QCOWFS_MODEL_OPERATIONS steps a shape, QCOWFS_MODEL_SEED chooses them. A failure
names the shape, the seed and the step.
"""

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.driver.model import KIB, KINDS, SHAPES, Model, Shape, Step, random_steps

OPERATIONS = int(os.environ.get("QCOWFS_MODEL_OPERATIONS", "200"))
SEED = int(os.environ.get("QCOWFS_MODEL_SEED", "1"))


@pytest.fixture(autouse=True)
def _one_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks take turns by the seed, as far as no thread is waited for."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True, raising=False)
    monkeypatch.setattr("trio._core._run._r", random.Random(SEED), raising=False)


@pytest.mark.timeout(max(300, OPERATIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
async def test_the_image_is_what_the_model_is(shape: Shape, tmp_path: Path) -> None:
    """After any steps the disk and its snapshots show the model's bytes, to QEMU as well."""
    await Model(shape, tmp_path, SEED).run(random_steps(shape, OPERATIONS, SEED))


DRAWN_SIZE = 70 * KIB + 512
DRAWN_SHAPES = (
    Shape(512, backing="raw", start="compressed", size=DRAWN_SIZE),
    Shape(4 * KIB, version=2, backing="qcow2", size=DRAWN_SIZE),
    Shape(16 * KIB, extended_l2=True, backing="raw", refcount_bits=8, size=DRAWN_SIZE),
)
DRAWN_KINDS = sorted(set(KINDS) - {"foreign"})
STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(DRAWN_KINDS),
        st.one_of(
            st.integers(0, DRAWN_SIZE - 1), st.integers(0, 17).map(lambda index: index * 4 * KIB)
        ),
        st.one_of(st.integers(0, 9 * KIB), st.sampled_from((512, 4 * KIB, 16 * KIB, DRAWN_SIZE))),
        st.integers(0, 255),
    ),
    max_size=30,
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(shape=st.sampled_from(DRAWN_SHAPES), steps=STEPS)
async def test_any_list_of_steps(shape: Shape, steps: list[Step]) -> None:
    """The same for drawn lists of steps, which shrink to the fewest that fail."""
    with tempfile.TemporaryDirectory(prefix="qcowfs-model-") as folder:
        await Model(shape, Path(folder), 1).run(steps)
