"""Mounting by descriptor, and the two descriptors that a lane works between.

The kernel's descriptor comes from fusermount3, which passes it over the socket
that `_FUSE_COMMFD` names; root and ordinary users go the same way. This module
parses no message and knows no image; it runs fusermount3 and nothing else.

Invariants: a descriptor that leaves here is above 2, close-on-exec and
non-blocking; after an error nothing is mounted and nothing is left open.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Mapping
from typing import Final

from qcowfs.errors import BadRequest, ImageBusy, QcowfsError

CHANNEL_LENGTH: Final = 8 << 20
"""Bytes that may wait in one direction between lane and libfuse, where the system allows."""

_HELPER: Final = "fusermount3"
_HELPER_PATHS: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_OPTION_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*")
_ESCAPED_OPTIONS: Final = frozenset({"fsname", "subtype"})
_FIRST_ORDINARY_FD: Final = 3
_SO_SNDBUFFORCE: Final = 32


class MountFailed(QcowfsError):
    """fusermount3 refused; the message is what it said."""


def option_string(options: Mapping[str, str | bool | None]) -> str:
    """`options` as fusermount3's -o reads them.

    A value of None or True is a bare flag, False leaves the option out. Commas
    and backslashes are escaped in fsname and subtype, the only two in which
    fusermount3 undoes that; anywhere else they are refused, so that no value
    can bring in an option of its own. Raises BadRequest.
    """
    parts = []
    for name, value in options.items():
        if not _OPTION_NAME.fullmatch(name):
            raise BadRequest(f"mount option {name!r} is not a name")
        if name == "auto_unmount":
            raise BadRequest("mount option auto_unmount is not supported")
        if value is False:
            continue
        if value is None or value is True:
            parts.append(name)
            continue
        if "\0" in value:
            raise BadRequest(f"mount option {name} has a NUL in its value")
        if name in _ESCAPED_OPTIONS:
            value = value.replace("\\", "\\\\").replace(",", "\\,")
        elif "," in value or "\\" in value:
            raise BadRequest(f"mount option {name} has a comma or backslash in its value")
        parts.append(f"{name}={value}")
    return ",".join(parts)


def mount(
    mountpoint: str | os.PathLike[str], options: Mapping[str, str | bool | None] | None = None
) -> int:
    """Mount on the directory `mountpoint`; the descriptor of the new connection.

    subtype=qcowfs, nosuid and nodev are set unless `options` say otherwise.
    The caller owns the descriptor; closing it ends the connection. Blocks
    while fusermount3 runs, and asks nothing of the mount itself. Raises
    OSError for a bad mount point (ENOTCONN: a dead mount lies there),
    BadRequest for a bad option, MountFailed.
    """
    merged: dict[str, str | bool | None] = {"subtype": "qcowfs", "nosuid": None, "nodev": None}
    for name, value in (options or {}).items():
        merged.pop(f"no{name}", None)
        merged[name] = value
    path = os.fspath(mountpoint)
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    arguments = ["-o", option_string(merged), "--", path]
    ours, theirs = (_above_stdio(end) for end in socket.socketpair())
    with ours:
        with theirs:
            child = _start_helper(arguments, pass_socket=theirs)
        try:
            descriptors = _receive_descriptor(ours)
        finally:
            complaint = _finish_helper(child)
    if not descriptors:
        raise MountFailed(f"cannot mount on {path}: {complaint}")
    for surplus in descriptors[1:]:
        os.close(surplus)
    return _ordinary(descriptors[0])


def unmount(mountpoint: str | os.PathLike[str], lazy: bool = False) -> None:
    """Unmount; with `lazy` the name goes at once and the rest at the last close.

    Blocks until the kernel has let go, which may need answers from the serving
    process: that one calls it in a thread. Raises ImageBusy, MountFailed.
    """
    path = os.fspath(mountpoint)
    child = _start_helper(["-u", *(["-z"] if lazy else []), "--", path], pass_socket=None)
    complaint = _finish_helper(child)
    if child.returncode == 0:
        return
    if "busy" in complaint:
        raise ImageBusy(f"cannot unmount {path}: {complaint}")
    raise MountFailed(f"cannot unmount {path}: {complaint}")


def open_channel() -> tuple[int, int]:
    """The two ends, (lane's, libfuse's), of a channel that keeps message boundaries.

    libfuse is given its end as the mount point /dev/fd/N and owns it from then
    on. Its buffer is as large as the system lets this user have; the lane
    keeps what it forwards within that.
    """
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (socket.SO_SNDBUF, _SO_SNDBUFFORCE):
            try:
                end.setsockopt(socket.SOL_SOCKET, option, CHANNEL_LENGTH // 2)
            except PermissionError:
                pass
    return _ordinary(pair[0].detach()), _ordinary(pair[1].detach())


def _start_helper(
    arguments: list[str], *, pass_socket: socket.socket | None
) -> subprocess.Popen[bytes]:
    search_path = f"{os.environ.get('PATH', '')}:{_HELPER_PATHS}"
    helper = shutil.which(_HELPER, path=search_path)
    if helper is None:
        raise MountFailed(f"{_HELPER} is not installed (package fuse3)")
    environment = dict(os.environ, LC_ALL="C")
    environment.pop("_FUSE_COMMFD", None)
    passed: tuple[int, ...] = ()
    if pass_socket is not None:
        environment["_FUSE_COMMFD"] = str(pass_socket.fileno())
        passed = (pass_socket.fileno(),)
    return subprocess.Popen(
        [_HELPER, *arguments],
        executable=helper,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        pass_fds=passed,
    )


def _finish_helper(child: subprocess.Popen[bytes]) -> str:
    """Wait for fusermount3; what it complained about, in one line."""
    _, stderr = child.communicate()
    lines = stderr.decode("utf-8", "replace").splitlines()
    words = [line.strip().removeprefix(f"{_HELPER}: ") for line in lines if line.strip()]
    return "; ".join(words) or f"{_HELPER} ended with status {child.returncode}"


def _receive_descriptor(channel: socket.socket) -> list[int]:
    """The descriptors in fusermount3's message; none when it hung up without one."""
    try:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return []
    return descriptors


def _above_stdio(end: socket.socket) -> socket.socket:
    """`end` under a number that the child's standard streams will not take.

    A caller that was started with 0, 1 or 2 closed gets those numbers here.
    """
    if end.fileno() >= _FIRST_ORDINARY_FD:
        return end
    moved = fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_ORDINARY_FD)
    end.close()
    return socket.socket(fileno=moved)


def _ordinary(fd: int) -> int:
    """`fd`, or a duplicate above 2 in its place: close-on-exec and non-blocking."""
    if fd < _FIRST_ORDINARY_FD:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_ORDINARY_FD)
        os.close(fd)
        fd = moved
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd
