"""The driver against the model over encrypted images and external data files.

QCOWFS_MODEL_OPERATIONS steps a shape, QCOWFS_MODEL_SEED chooses them.
"""

import os
import random
from pathlib import Path

import pytest

from tests.driver.model_features import FEATURE_SHAPES, FeatureModel, FeatureShape, feature_steps

OPERATIONS = int(os.environ.get("QCOWFS_MODEL_OPERATIONS", "200"))
SEED = int(os.environ.get("QCOWFS_MODEL_SEED", "1"))


@pytest.fixture(autouse=True)
def _one_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks take turns by the seed, as far as no thread is waited for."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True, raising=False)
    monkeypatch.setattr("trio._core._run._r", random.Random(SEED), raising=False)


@pytest.mark.timeout(max(300, OPERATIONS))
@pytest.mark.parametrize("shape", FEATURE_SHAPES, ids=lambda shape: shape.name)
async def test_the_image_is_what_the_model_is(shape: FeatureShape, tmp_path: Path) -> None:
    """After any steps the disk and its snapshots show the model's bytes, to QEMU as well."""
    await FeatureModel(shape, tmp_path, SEED).run(feature_steps(shape, OPERATIONS, SEED))
