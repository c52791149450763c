"""`qcowfs mount`: options, the way into the background, readiness, and where the log goes.

The process forks before trio is imported. The parent stays on the terminal
until the child says through a pipe that the mount answers, or why there is
none; so a script may use the mount as soon as the command has returned.

May not touch the image, the mount or a request: that is `qcowfs.fuse.session`.
Invariant: no file is created, and no process left, when the exit code is not 0.
"""

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from qcowfs.cli.common import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    CommandError,
    Parser,
    absolute,
    describe_error,
    escape,
    naming,
    parse_size,
    print_error,
    size_argument,
)
from qcowfs.cli.keys import KEY_FILE_HELP, read_secrets

if TYPE_CHECKING:
    from qcowfs.driver.secrets import Secrets
    from qcowfs.fuse.session import MountOptions

logger = logging.getLogger("qcowfs")

_FIRST_ORDINARY_FD = 3

_READY = b"+"
_FAILED = b"-"

# What mount(8), fstab and systemd add for themselves, and what fusermount3 does
# not know and means nothing here: no access times are kept, and there are no links.
_IGNORED_OPTIONS = frozenset(
    "defaults auto noauto user nouser users owner nouser group nofail _netdev"
    " diratime nodiratime relatime norelatime strictatime nostrictatime lazytime nolazytime"
    " symfollow nosymfollow".split()
)
# The subtype is by what `qcowfs umount` knows its own.
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "subtype=")

_FUSE_FLAGS = frozenset(
    "allow_other allow_root default_permissions suid nosuid dev nodev exec noexec sync async"
    " dirsync atime noatime".split()
)
_FUSE_VALUES = frozenset("fsname uid gid umask context fscontext defcontext rootcontext".split())


@dataclass(slots=True)
class _Request:
    """The command line, read and checked; paths as the user wrote them."""

    image: str
    mountpoint: str
    foreground: bool = False
    read_only: bool = False
    format: str | None = None
    backing_format: str | None = None
    backing: bool = True
    force_share: bool = False
    lock: bool = True
    backing_root: str | None = None
    force: bool = False
    key_files: list[str] = field(default_factory=list)
    key: "Secrets | None" = None
    cache_size: int | None = None
    growable: bool = False
    use_lane: bool = True
    poll_us: int = 50
    ready_fd: int | None = None
    pid_file: str | None = None
    log_file: str | None = None
    verbosity: int = 0
    fuse_options: dict[str, str | None] = field(default_factory=dict)


def _parser() -> Parser:
    parser = Parser("mount", "Show an image as a directory of raw files.")
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("mountpoint", metavar="MOUNTPOINT", help="an empty directory")
    add("-f", "--foreground", action="store_true", help="stay in the foreground")
    add("-r", "--read-only", action="store_true", help="write nothing to any file")
    add("-o", dest="options", metavar="OPT,...", action="append", default=[],
        help="ro, rw, growable, allow_other, uid=, gid=, umask=, fsname=, and the long options "
        "below with _ for -")  # fmt: skip
    add("--format", metavar="FORMAT", help="the image's format; raw is never guessed")
    add("--backing-format", metavar="FORMAT", help="the backing file's format")
    add("--no-backing", dest="backing", action="store_false", help="open no backing file")
    add("--backing-root", metavar="DIR", help="refuse backing files that do not lie below DIR")
    add("--force", action="store_true",
        help="write to a COW image though its backing file has changed")  # fmt: skip
    add("--key-file", dest="key_files", metavar="FILE", action="append", default=[],
        help=KEY_FILE_HELP)  # fmt: skip
    add("-U", "--force-share", action="store_true",
        help="take no locks; with -r, an image that is in use can be read")  # fmt: skip
    add("--no-lock", dest="lock", action="store_false", help="neither take nor honour locks")
    add("--cache-size", metavar="SIZE", type=size_argument, help="memory for the image's tables")
    add("--no-lane", dest="use_lane", action="store_false",
        help="answer every request by way of libfuse")  # fmt: skip
    add("--poll-us", metavar="N", type=int, default=50,
        help="microseconds to wait busily for the next request (50; 0 never)")  # fmt: skip
    add("--ready-fd", metavar="N", type=int, help="write a line to descriptor N when mounted")
    add("--pid-file", metavar="FILE", help="keep the process id here while mounted")
    add("--log-file", metavar="FILE", help="write the log here (default: the system's log)")
    add("-v", "--verbose", dest="verbosity", action="count", default=0, help="log more; twice: all")
    return parser


def _split_options(texts: list[str]) -> list[str]:
    r"""The single options of `-o a,b -o c`; `\,` is a comma inside one."""
    options = []
    for text in texts:
        mended = text.replace("\\,", "\0")
        options += [part.replace("\0", ",") for part in mended.split(",") if part]
    return options


def _apply_own_option(request: _Request, name: str, value: str | None) -> bool:
    """Set what the long option of that name sets; False when there is none."""
    flags: dict[str, tuple[str, bool]] = {
        "ro": ("read_only", True),
        "rw": ("read_only", False),
        "no_backing": ("backing", False),
        "force_share": ("force_share", True),
        "no_lock": ("lock", False),
        "force": ("force", True),
        "growable": ("growable", True),
        "no_lane": ("use_lane", False),
    }
    if name in flags and value is None:
        attribute, setting = flags[name]
        # -r on the command line is stronger than the rw that mount(8) adds.
        if name != "rw":
            setattr(request, attribute, setting)
        return True
    if value is None:
        return False
    if name in {
        "format", "backing_format", "backing_root", "pid_file", "log_file",
    }:  # fmt: skip
        setattr(request, name, value)
    elif name == "key_file":
        request.key_files.append(value)
    elif name == "cache_size":
        request.cache_size = parse_size(value)
    elif name == "poll_us" and value.isascii() and value.isdigit():
        request.poll_us = int(value)
    else:
        return False
    return True


def _apply_options(request: _Request, texts: list[str]) -> None:
    for option in _split_options(texts):
        if option in _IGNORED_OPTIONS or option.startswith(_IGNORED_PREFIXES):
            continue
        name, equals, text = option.partition("=")
        value = text if equals else None
        if _apply_own_option(request, name, value):
            continue
        if (name in _FUSE_FLAGS and value is None) or (name in _FUSE_VALUES and value is not None):
            request.fuse_options[name] = value
            continue
        raise CommandError(f'unknown mount option "{option}"', file=request.image)


def _read_request(arguments: list[str]) -> _Request:
    parsed = _parser().parse_args(arguments)
    values = vars(parsed)
    texts = values.pop("options")
    request = _Request(**values)
    with naming(request.image):
        _apply_options(request, texts)
    if request.poll_us < 0:
        raise CommandError("--poll-us: not negative", file=request.image)
    if request.cache_size is not None and request.cache_size < 1 << 16:
        raise CommandError("--cache-size: at least 64 KiB", file=request.image)
    # Before the process leaves its terminal and its standard input.
    request.key = read_secrets(request.key_files)
    if request.ready_fd is not None:
        with naming(f"--ready-fd {request.ready_fd}"):
            if request.ready_fd < _FIRST_ORDINARY_FD:
                # A standard stream, which the background takes another file for.
                copy = fcntl.fcntl(request.ready_fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_ORDINARY_FD)
                request.ready_fd = copy
            # Helpers that the mount starts must not keep the reader waiting.
            os.set_inheritable(request.ready_fd, False)
    return request


class _PidFile:
    """A file that holds the daemon's process id while the mount lives.

    Opened at the start, so that a wrong path is told before anything happens;
    written when ready; removed in the end, unless another took the name.
    """

    def __init__(self, path: str) -> None:
        self._path = absolute(path)
        self._created = not os.path.lexists(self._path)
        self.descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, b"%d\n" % os.getpid(), 0)
        self._created = True

    def finish(self) -> None:
        if self._created:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self._path), os.fstat(self.descriptor)):
                    os.unlink(self._path)
        os.close(self.descriptor)


class _DescriptorHandler(logging.Handler):
    """Log records as lines on standard error, whatever that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        data = (self.format(record) + "\n").encode(errors="backslashreplace")
        room = select.poll()
        room.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            # A pipe that nobody empties costs the rest of the record, not the mount.
            while data and room.poll(0):
                data = data[os.write(2, data[: select.PIPE_BUF]) :]


class _SystemLogHandler(logging.Handler):
    """Log records to the machine's log, by the old datagram socket that all daemons know."""

    def emit(self, record: logging.LogRecord) -> None:
        # Facility 3 is "daemon"; severities 3, 4 and 6 are error, warning and information.
        severity = 3 if record.levelno >= logging.ERROR else 4
        if record.levelno < logging.WARNING:
            severity = 6
        text = f"<{3 * 8 + severity}>qcowfs[{os.getpid()}]: {self.format(record)}"
        log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with log, contextlib.suppress(OSError):
            log.setblocking(False)
            log.sendto(text.encode(errors="backslashreplace"), "/dev/log")


class _LineFormatter(logging.Formatter):
    """One line a record (a traceback follows on lines of its own)."""

    def __init__(self, image: str, *, timed: bool) -> None:
        super().__init__()
        self._image = escape(image)
        self._timed = timed

    def format(self, record: logging.LogRecord) -> str:
        line = f"qcowfs: {self._image}: {escape(record.getMessage())}"
        if self._timed:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            line = f"{stamp} {record.levelname.lower()} {line}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _set_up_log(request: _Request, handler: logging.Handler) -> None:
    handler.setFormatter(_LineFormatter(request.image, timed=request.log_file is not None))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    root.setLevel(levels[min(request.verbosity, 2)])


def _mount_options(request: _Request) -> "MountOptions":
    from qcowfs.fuse.session import MountOptions

    return MountOptions(
        image=Path(absolute(request.image)),
        mountpoint=Path(absolute(request.mountpoint)),
        read_only=request.read_only,
        format=request.format,
        backing_format=request.backing_format,
        backing_root=None if request.backing_root is None else Path(absolute(request.backing_root)),
        force=request.force,
        key=request.key,
        backing=request.backing,
        force_share=request.force_share,
        lock=request.lock,
        cache_size=request.cache_size,
        fuse_options=request.fuse_options,
        growable=request.growable,
        use_lane=request.use_lane,
        poll_us=request.poll_us,
        debug=request.verbosity >= 2,
    )


def _serve(request: _Request, on_ready: Callable[[], None]) -> int:
    """Serve until the mount has ended; CommandError when there never was one."""
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        on_ready()
        is_ready = True
        if request.ready_fd is not None:
            with contextlib.suppress(OSError):
                os.write(request.ready_fd, b"ready\n")
                os.close(request.ready_fd)

    try:
        import trio

        from qcowfs.fuse.session import serve

        options = _mount_options(request)

        async def main() -> int:
            return await serve(options, ready=ready)

        return trio.run(main)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_ready:
            if request.verbosity:
                logger.exception("the mount failed")
            raise describe_error(error, request.image) from error
        logger.exception("the mount ended by an unexpected error")
        return EXIT_FAILURE


def _serve_in_foreground(request: _Request, pid_file: _PidFile | None, log: int | None) -> int:
    def on_ready() -> None:
        if pid_file is not None:
            pid_file.write()
        if log is not None:
            os.dup2(log, 2)

    return _serve(request, on_ready)


def _inherited_descriptors(own: set[int | None]) -> list[int]:
    """What the parent left open beside the standard streams and `own`."""
    inherited = []
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor >= _FIRST_ORDINARY_FD and descriptor not in own:
            # One of them was the listing's and is closed by now.
            with contextlib.suppress(OSError):
                os.fstat(descriptor)
                inherited.append(descriptor)
    return inherited


def _serve_in_child(
    request: _Request, pid_file: _PidFile | None, log: int | None, pipe: int
) -> int:
    """The daemon's whole life; `pipe` takes the verdict for the parent.

    Descriptors that were handed down are closed when the mount is ready and not
    before: a path on the command line may be one of them, as /dev/fd/N.
    """
    pid_descriptor = None if pid_file is None else pid_file.descriptor
    inherited = _inherited_descriptors({pipe, log, request.ready_fd, pid_descriptor})

    def on_ready() -> None:
        if pid_file is not None:
            pid_file.write()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null if descriptor == 0 or log is None else log, descriptor)
        os.close(null)
        for descriptor in inherited:
            os.close(descriptor)
        if log is None:
            _set_up_log(request, _SystemLogHandler())
        # So that no directory is held busy.
        os.chdir("/")
        try:
            os.write(pipe, _READY)
        except BrokenPipeError:
            # Whoever asked for the mount has died and will never unmount it.
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(pipe)

    os.setsid()
    try:
        return _serve(request, on_ready)
    except CommandError as error:
        with contextlib.suppress(OSError):
            os.write(pipe, _FAILED + error.line().encode(errors="backslashreplace"))
            os.close(pipe)
        return error.exit_code


def _wait_for_child(child: int, pipe: int) -> int:
    """The parent's part: answer the exit code of `qcowfs mount`."""
    verdict = b""
    try:
        while piece := os.read(pipe, 4096):
            verdict += piece
            if verdict.startswith(_READY):
                return 0
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
        return EXIT_INTERRUPTED
    if verdict.startswith(_FAILED):
        print_error(verdict[1:].decode(errors="replace"))
    elif os.WIFSIGNALED(status):
        print_error(f"qcowfs: the mount was ended by signal {os.WTERMSIG(status)}")
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else EXIT_FAILURE


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _serve_in_background(request: _Request, pid_file: _PidFile | None, log: int | None) -> int:
    # However the parent is asked to end, it takes the child along.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        exit_code = EXIT_FAILURE
        try:
            exit_code = _serve_in_child(request, pid_file, log, writing)
        except Exception:
            logger.exception("the mount ended by an unexpected error")
        finally:
            if pid_file is not None:
                pid_file.finish()
            # The parent's buffers and exit handlers are not the child's to run.
            os._exit(exit_code)
    os.close(writing)
    return _wait_for_child(child, reading)


def run(arguments: list[str]) -> int:
    """Run `qcowfs mount`; answers the exit code."""
    request = _read_request(arguments)
    log = None
    if request.log_file is not None:
        with naming(request.log_file):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            log = os.open(request.log_file, flags, 0o640)
    pid_file = None
    if request.pid_file is not None:
        with naming(request.pid_file):
            pid_file = _PidFile(request.pid_file)
    _set_up_log(request, _DescriptorHandler())
    if not request.foreground:
        exit_code = _serve_in_background(request, pid_file, log)
        if exit_code != 0 and pid_file is not None:
            pid_file.finish()
        return exit_code
    try:
        return _serve_in_foreground(request, pid_file, log)
    finally:
        if pid_file is not None:
            pid_file.finish()
