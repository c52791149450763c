"""After any crash the image is whole: promises 1 to 3 of the reliability rules.

QCOWFS_CRASH_STATES states in all (`make crash COUNT=n`), QCOWFS_CRASH_SEED
chooses the workloads.
"""

import os
from pathlib import Path

import pytest

from tests.crash.harness import Kind, judge_kind
from tests.crash.kinds import KINDS

STATES = int(os.environ.get("QCOWFS_CRASH_STATES", "420"))
SEED = int(os.environ.get("QCOWFS_CRASH_SEED", "1"))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_crash_leaks_at_worst(kind: Kind, tmp_path: Path) -> None:
    """No corruption, nothing durable lost, nothing that was never written, in any state."""
    tally = await judge_kind(kind, tmp_path, -(-STATES // len(KINDS)), SEED)
    print(tally)
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.states >= STATES // len(KINDS)


LOSING = [kind for kind in KINDS if kind.name in {"plain", "discards", "snapshots", "extended"}]


@pytest.mark.parametrize("kind", LOSING, ids=lambda kind: kind.name)
async def test_the_judge_notices_lost_flushes(kind: Kind, tmp_path: Path) -> None:
    """With every second flush dropped from the log, damage is found within 400 states."""
    tally = await judge_kind(
        kind, tmp_path, 400, SEED, drop_every_second_sync=True, stop_at_failure=True
    )
    assert tally.failures
