"""`qcowfs umount`: unmounts, and returns when the image is flushed, closed and unlocked.

Unmounting is over for the kernel when the directory is empty again, which is
before the daemon has written out what it holds. So the daemon is found first
(it tells its process id in an attribute of the mount), and its end is waited
for through a pidfd, which cannot come to mean another process.

May not import trio or the driver.
"""

import fcntl
import json
import os
import select
import struct
import time

from qcowfs.cli.common import (
    CommandError,
    Mount,
    Parser,
    all_mounts,
    clear_dead_mount,
    escape,
    find_mounts,
    is_ours,
    naming,
    print_error,
)
from qcowfs.errors import ImageBusy

_STATISTICS = "user.qcowfs.stats"

# ioctl PIDFD_GET_INFO and struct pidfd_info of <linux/pidfd.h>, 64 bytes, exit code last;
# kernels before 6.15 do not know the bit.
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO = struct.Struct("=Q52xi")

_REAP_SECONDS = 2.0
_PATIENCE_SECONDS = 10


def _pid_from_attribute(mountpoint: str) -> int | None:
    try:
        pid = json.loads(os.getxattr(mountpoint, _STATISTICS)).get("pid")
    except (OSError, ValueError, AttributeError):
        return None
    return pid if isinstance(pid, int) and pid > 0 else None


def _serves(pid: str, connection: str) -> bool:
    """Whether a process holds the FUSE descriptor of that connection."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}") != "/dev/fuse":
            continue
        with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as information:
            for line in information:
                key, _, value = line.partition(":")
                if key == "fuse_connection" and value.strip() == connection:
                    return True
    return False


def _pid_from_descriptors(mount: Mount) -> int | None:
    """Who serves the mount, by the connection number that recent kernels tell."""
    connection = mount.device.partition(":")[2]
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            if _serves(pid, connection):
                return int(pid)
        except OSError:
            continue
    return None


def _open_daemon(mount: Mount) -> tuple[int, int] | None:
    """(pid, pidfd) of the process behind a mount; None when it cannot be told."""
    pid = _pid_from_attribute(mount.mountpoint) or _pid_from_descriptors(mount)
    if pid is None:
        return None
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        return None


def _flush(mount: Mount) -> str | None:
    """Write out what the image has not got yet; the cause when that failed.

    The daemon does the same at its end, where only its log could tell the cause.
    """
    try:
        descriptor = os.open(os.path.join(mount.mountpoint, "active.raw"), os.O_RDONLY)
    except OSError:
        # Not ours to read: the daemon's own last flush has to do.
        return None
    try:
        os.fsync(descriptor)
    except OSError as error:
        return error.strerror
    finally:
        os.close(descriptor)
    return None


def _exit_status(pid: int, pidfd: int) -> int | None:
    """The wait status of an ended process that is nobody's child here, where it can be known."""
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            data = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, data)
            mask, status = _PIDFD_INFO.unpack(data)
            if mask & _PIDFD_INFO_EXIT:
                return int(status)
        except OSError:
            pass
        try:
            # A process that nobody has reaped still has its row; the status is its last field.
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as row:
                fields = row.read().rpartition(")")[2].split()
            if fields[0] == "Z":
                return int(fields[-1])
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(0.01)
    return None


def _wait_for_daemon(mountpoint: str, pid: int, pidfd: int) -> str | None:
    """Return when the daemon has ended; what was wrong with its end, if anything was."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(_PATIENCE_SECONDS * 1000):
        print_error(f"qcowfs: {escape(mountpoint)}: process {pid} is still writing; waiting")
        poll.poll()
    status = _exit_status(pid, pidfd)
    if not status:
        return None
    code = os.waitstatus_to_exitcode(status)
    return f"process {pid} was killed by signal {-code}" if code < 0 else f"process {pid} failed"


def _unmount(mountpoint: str, *, lazy: bool) -> None:
    clear = find_mounts(mountpoint)
    if not clear:
        os.stat(mountpoint)
        raise CommandError("nothing is mounted there", file=mountpoint)
    mount = clear[-1]
    if not is_ours(mount):
        raise CommandError(f"not a mount of qcowfs but of {mount.type}", file=mountpoint)
    daemon = _open_daemon(mount)
    failure = None if lazy else _flush(mount)
    from qcowfs.fuse.device import unmount

    try:
        unmount(mount.mountpoint, lazy=lazy)
    except ImageBusy as error:
        raise CommandError(
            "in use", file=mountpoint, hint="close its files and loop devices, or use --lazy"
        ) from error
    if daemon is not None and not lazy:
        if any(other.device == mount.device for other in all_mounts()):
            print_error(f"qcowfs: {escape(mountpoint)}: unmounted, but still mounted elsewhere")
        else:
            failure = _wait_for_daemon(mountpoint, *daemon) if failure is None else failure
    if failure is not None:
        raise CommandError(
            f"unmounted, but the last flush failed: {failure}",
            file=mountpoint,
            hint="what was written since the last fsync may be lost",
        )


def run(arguments: list[str]) -> int:
    """Run `qcowfs umount`; answers the exit code."""
    parser = Parser("umount", "Unmount; returns when the image is flushed, closed and unlocked.")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, and end when the last file is closed"
    )
    options = parser.parse_args(arguments)
    with naming(options.mountpoint):
        if clear_dead_mount(options.mountpoint):
            print_error(f"qcowfs: {escape(options.mountpoint)}: cleared a mount whose process died")
            return 0
        _unmount(options.mountpoint, lazy=options.lazy)
    return 0
