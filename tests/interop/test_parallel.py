"""Many processes at once: each finds exactly what it wrote, and all of it is there in the end."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import tools
from tests.interop.tools import MIB

pytestmark = tools.needs_fuse

PROCESSES = 16
REGION = 2 * MIB
OPERATIONS = 120

# One process: seeded writes, reads and syncs inside its own region, checked against a
# model of it; the digest of the region is its last word.
_WORKER = """
import hashlib, os, random, sys
path, number, region, count = sys.argv[1], *map(int, sys.argv[2:5])
chance = random.Random(number)
base = number * region
model = bytearray(region)
descriptor = os.open(path, os.O_RDWR)
for step in range(count):
    length = chance.choice((1, 511, 512, 4096, 4097, 65536, 150_000))
    place = chance.randrange(region - length)
    action = chance.random()
    if action < 0.6:
        data = chance.randbytes(length)
        assert os.pwrite(descriptor, data, base + place) == length
        model[place:place + length] = data
    elif action < 0.97:
        found = os.pread(descriptor, length, base + place)
        assert found == model[place:place + length], f"process {number}, step {step}"
    else:
        os.fsync(descriptor)
assert os.pread(descriptor, region, base) == model
os.close(descriptor)
print(hashlib.sha256(model).hexdigest())
"""


def _start(path: Path, number: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _WORKER, path, number, REGION, OPERATIONS]
    return subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(worker: subprocess.Popen[str]) -> str:
    said, complaint = worker.communicate(timeout=tools.COMMAND_SECONDS)
    assert worker.returncode == 0, complaint
    return said.strip()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("small-clusters", {"cluster_size": 512}),
        ("subclusters", {"extended_l2": "on", "cluster_size": 131072}),
    ],
)
@pytest.mark.parametrize("lane", ["lane", "no-lane"])
def test_disjoint_parts(tmp_path: Path, name: str, options: dict[str, object], lane: str) -> None:
    """16 processes on disjoint parts, beside a snapshot, leave exactly what they wrote."""
    image = tools.create(tmp_path / "disk.qcow2", PROCESSES * REGION, **options)
    with tools.mounted(image, *([] if lane == "lane" else ["--no-lane"])) as mount:
        workers = [_start(mount.active, number) for number in range(PROCESSES)]
        try:
            os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"meanwhile")
            digests = [_finish(worker) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        found = [
            hashlib.sha256(tools.pread(mount.active, REGION, number * REGION)).hexdigest()
            for number in range(PROCESSES)
        ]
        assert found == digests
        expected = tools.sha256(mount.active)
    tools.check_image(image)
    assert tools.raw_sha256(image) == expected
