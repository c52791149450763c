"""kill -9 under load: what was synced is there, the image opens, at worst clusters have leaked."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import tools

pytestmark = tools.needs_fuse

ROUNDS = int(os.environ.get("QCOWFS_KILL_ROUNDS", "4"))
BLOCK = 4096
BLOCKS = 2048

# Writes numbered blocks for ever; after each fsync it says which number is durable.
_LOAD = """
import os, random, sys
path, seed, first, blocks, block = sys.argv[1], *map(int, sys.argv[2:6])
chance = random.Random(seed)
descriptor = os.open(path, os.O_RDWR)
number = first
while True:
    for _ in range(chance.randrange(1, 40)):
        number += 1
        place = chance.randrange(blocks)
        stamp = number.to_bytes(8, "little") + place.to_bytes(8, "little")
        os.pwrite(descriptor, stamp * (block // 16), place * block)
        print("w", number, place, flush=True)
    os.fsync(descriptor)
    print("s", number, flush=True)
"""


class _History:
    """Per block the number that is durable at least, and the greatest that was tried since."""

    def __init__(self) -> None:
        self.durable = [0] * BLOCKS
        self.tried: list[list[int]] = [[] for _ in range(BLOCKS)]
        self.last = 0

    def learn(self, lines: list[str]) -> None:
        """Take in what a load said; the write that it was at when it ended is unknown to it."""
        for line in lines:
            fields = line.split()
            if fields[0] == "w" and len(fields) == 3:
                self.last, place = int(fields[1]), int(fields[2])
                self.tried[place].append(self.last)
            elif fields[0] == "s":
                for place, numbers in enumerate(self.tried):
                    if numbers:
                        self.durable[place] = numbers[-1]
                        numbers.clear()

    def check(self, data: bytes) -> None:
        """Every block has its durable content or a later one, whole."""
        for place in range(BLOCKS):
            block = data[place * BLOCK : (place + 1) * BLOCK]
            number = int.from_bytes(block[:8], "little")
            allowed = {self.durable[place], *self.tried[place]}
            # The one write that was under way when everything ended was not told.
            assert number in allowed or number > self.last, f"block {place}: {number} {allowed}"
            if number:
                assert block == block[:16] * (BLOCK // 16)
                assert int.from_bytes(block[8:16], "little") == place
            else:
                assert block == bytes(BLOCK)
            self.durable[place] = number
            self.tried[place].clear()
        self.last += 1000


def _load_and_kill(mount: tools.Mounted, seed: int, history: _History) -> None:
    words = [sys.executable, "-c", _LOAD, mount.active, seed, history.last, BLOCKS, BLOCK]
    load = subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    try:
        assert load.stdout is not None
        goal = random.Random(seed).randrange(60, 500)
        for line in load.stdout:
            lines.append(line)
            if len(lines) == goal:
                if seed % 2:
                    os.setxattr(mount.active, "user.qcowfs.snapshot.create", b"r%d" % seed)
                os.kill(mount.pid, signal.SIGKILL)
    finally:
        load.kill()
        load.communicate()
    tools.wait_for_end(mount.pid)
    history.learn(lines)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("subclusters", {"extended_l2": "on"}),
        ("small", {"cluster_size": 1024, "refcount_bits": 64}),
    ],
)
def test_rounds_of_killing(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    """Mount, load, kill, mount again: each block is one that was written, and none older."""
    image = tools.create(tmp_path / "disk.qcow2", BLOCKS * BLOCK, **options)
    folder = tmp_path / "mnt"
    history = _History()
    for seed in range(1, ROUNDS + 1):
        with tools.mounted(image, folder=folder) as mount:
            _load_and_kill(mount, seed, history)
        finished = tools.run("qemu-img", "check", image, check=False)
        # 3: leaked clusters, and nothing worse.
        assert finished.returncode in {0, 3}, finished.stdout + finished.stderr
        with tools.mounted(image, "-r", folder=folder) as mount:
            history.check(mount.active.read_bytes())
    tools.qemu_img("check", "-q", "-r", "leaks", image)
    tools.check_image(image)
