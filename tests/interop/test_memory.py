"""Memory stays within bounds, however large the image is."""

import os
import random
from pathlib import Path

from tests.interop import tools
from tests.interop.tools import MIB, TIB

pytestmark = tools.needs_fuse

LIMIT = 120 * MIB
WRITES = 2500


def test_random_writes_over_a_tebibyte(tmp_path: Path) -> None:
    """Random writes over 1 TiB, nearly each in an L2 table of its own, need less than 120 MiB."""
    image = tools.create(tmp_path / "large.qcow2", TIB)
    chance = random.Random(5)
    places = [chance.randrange(TIB // 4096) * 4096 for _ in range(WRITES)]
    with tools.mounted(image) as mount:
        descriptor = os.open(mount.active, os.O_RDWR)
        try:
            for number, place in enumerate(places):
                os.pwrite(descriptor, number.to_bytes(4, "little") * 1024, place)
            assert tools.peak_memory(mount.pid) < LIMIT
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for number, place in enumerate(places):
                assert os.pread(descriptor, 4, place) == number.to_bytes(4, "little")
        finally:
            os.close(descriptor)
        assert tools.peak_memory(mount.pid) < LIMIT
    tools.check_image(image)
