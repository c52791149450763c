"""Fixtures of the tests of the filesystem: handlers without a kernel, and real mounts."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from qcowfs.fuse.kernel import Notifier
from qcowfs.fuse.operations import Operations
from qcowfs.fuse.status import Presentation
from tests.fuse.fake_node import FakeNode

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 60


class RecordingKernel(Notifier):
    """Remembers what the kernel would have been told."""

    def __init__(self) -> None:
        super().__init__()
        self.inodes: list[int] = []
        self.entries: list[bytes] = []

    async def invalidate_inode(self, inode: int, *, attributes_only: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self.inodes.append(inode)

    async def delete_entry(self, parent_inode: int, name: bytes, inode: int) -> None:
        await trio.lowlevel.checkpoint()
        self.entries.append(name)


@dataclass
class Filesystem:
    """The handlers over a fake image, without a kernel."""

    node: FakeNode
    kernel: RecordingKernel
    nursery: trio.Nursery
    operations: Operations = field(init=False)

    def __post_init__(self) -> None:
        self.show()

    def show(self, **options: int) -> Operations:
        """Handlers as after a mount with these options of `Presentation`."""
        options = {"uid": 1000, "gid": 1001} | options
        self.operations = Operations(
            self.node,
            kernel=self.kernel,
            nursery=self.nursery,
            presentation=Presentation(**options),
        )
        return self.operations


@pytest.fixture
async def filesystem() -> AsyncIterator[Filesystem]:
    """A fake image of 1 MiB with the handlers on top."""
    async with trio.open_nursery() as nursery:
        filesystem = Filesystem(FakeNode(), RecordingKernel(), nursery)
        yield filesystem
        await filesystem.operations.aclose()
        nursery.cancel_scope.cancel()


class Daemon:
    """A process that serves a mount; see tests/fuse/daemon.py."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.mountpoint = Path(request["options"]["mountpoint"])
        self.active = self.mountpoint / "active.raw"
        self.snapshots = self.mountpoint / "snapshots"
        reading, writing = os.pipe()
        request["ready_fd"] = writing
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuse.daemon", json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
        os.close(writing)
        with open(reading, "rb") as pipe:
            self.is_ready = pipe.read() == b"ready"
        self.log = ""

    def wait(self) -> int:
        """The exit code, once it has ended; `log` is complete then."""
        _, stderr = self.process.communicate(timeout=PATIENCE)
        self.log = stderr.decode()
        return self.process.returncode

    def umount(self, *options: str) -> int:
        """Unmount as an administrator does; the daemon's exit code."""
        subprocess.run(["umount", *options, str(self.mountpoint)], check=True)
        return self.wait()

    def end(self) -> None:
        """Leave nothing behind, whatever state the test left it in."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        subprocess.run(
            ["umount", "-l", str(self.mountpoint)], check=False, stderr=subprocess.DEVNULL
        )


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon for `tmp_path/mnt`; keywords of a request, or of MountOptions."""
    daemons: list[Daemon] = []
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()

    def start(**values: Any) -> Daemon:
        own = {"fake", "size", "hostile_signals", "fail_close"}
        request = {name: values.pop(name) for name in own & values.keys()}
        options = {"image": str(tmp_path / "image"), "mountpoint": str(mountpoint)}
        (tmp_path / "image").touch()
        daemon = Daemon({**request, "options": {**options, **values}})
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        daemon.end()


@pytest.fixture(params=[True, False], ids=["lane", "plain"])
def use_lane(request: pytest.FixtureRequest) -> bool:
    """Both ways in which requests are served."""
    return bool(request.param)
