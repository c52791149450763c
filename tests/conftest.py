"""What every test rests on: a known process state, and nothing left behind.

A test fails when it leaves a mount, a loop device or a descriptor, or when
something logs a warning that it did not ask for (by `@pytest.mark.expects_warnings`
or by taking `caplog`). Mounts and loop devices of others on the machine are
not looked at: only what lies in this run's own temporary folders counts.
"""

import faulthandler
import gc
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from qcowfs.cli.common import all_mounts

# Folders that a test makes outside of pytest's own begin so (see interop/tools.py).
PUBLIC_PREFIX = f"qcowfs-test-{os.getpid()}-"
_RUN_FOLDER = tempfile.mkdtemp(prefix="qcowfs-tests-")

hypothesis.settings.register_profile(
    "qcowfs",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("qcowfs")


def pytest_configure() -> None:
    """Undo what the process that started the tests may have handed down."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.umask(0o022)
    for name in [name for name in os.environ if name.startswith("LC_") or name == "LANGUAGE"]:
        del os.environ[name]
    os.environ["LANG"] = "C.UTF-8"
    path = os.environ.get("PATH", "/usr/bin:/bin").split(":")
    folders = [*path, "/usr/local/sbin", "/usr/sbin", "/sbin"]
    os.environ["PATH"] = ":".join(dict.fromkeys(folders))
    # A folder of this run alone: runs beside it must not clear it away.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = _RUN_FOLDER


def pytest_unconfigure() -> None:
    """Remove what failed tests left, from under mounts that are still there too."""
    for point in reversed(_mounts((os.path.realpath(_RUN_FOLDER),))):
        subprocess.run(["umount", "--lazy", point], capture_output=True)
    shutil.rmtree(_RUN_FOLDER, ignore_errors=True)


def _mounts(roots: tuple[str, ...]) -> list[str]:
    return [mount.mountpoint for mount in all_mounts() if mount.mountpoint.startswith(roots)]


def _loop_devices(roots: tuple[str, ...]) -> list[str]:
    devices = []
    for name in sorted(os.listdir("/sys/block")):
        if not name.startswith("loop"):
            continue
        try:
            backing = Path(f"/sys/block/{name}/loop/backing_file").read_text(errors="replace")
        except OSError:
            continue
        if backing.startswith(roots):
            devices.append(f"/dev/{name} on {backing.strip()}")
    return devices


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            # The listing's own descriptor.
            continue
    return found


def _new_descriptors(before: dict[str, str]) -> list[str]:
    after = _descriptors()
    if after == before:
        return []
    gc.collect()
    after = _descriptors()
    return [f"{name} -> {target}" for name, target in after.items() if before.get(name) != target]


@pytest.fixture(scope="session")
def own_roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The beginnings of all paths that belong to this run."""
    public = os.path.join(os.path.realpath(tempfile.gettempdir()), PUBLIC_PREFIX)
    return (os.path.realpath(tmp_path_factory.getbasetemp()), public)


@pytest.fixture(autouse=True)
def _nothing_left_behind(own_roots: tuple[str, ...]) -> Iterator[None]:
    mounts = _mounts(own_roots)
    devices = _loop_devices(own_roots)
    descriptors = _descriptors()
    yield
    left = [f"mount {point}" for point in _mounts(own_roots) if point not in mounts]
    left += [device for device in _loop_devices(own_roots) if device not in devices]
    left += [f"descriptor {text}" for text in _new_descriptors(descriptors)]
    assert not left, f"left behind: {'; '.join(left)}"


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _no_unexpected_warnings(request: pytest.FixtureRequest) -> Iterator[None]:
    node = request.node
    if node.get_closest_marker("expects_warnings") or "caplog" in request.fixturenames:
        yield
        return
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    yield
    logging.getLogger().removeHandler(collector)
    assert not collector.lines, "unexpected log records:\n" + "\n".join(collector.lines)
