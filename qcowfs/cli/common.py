"""What the commands share: one-line errors, sizes, and the state that a process starts in.

May not import trio, numpy or the driver at module level: `qcowfs --help` and
`qcowfs umount` are to start at once.

Invariants: whatever is wrong reaches the user as one line on standard error,
`qcowfs: FILE: cause`, with the control characters of names and messages
escaped; only an unexpected exception under `-v` shows a traceback.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn, TypeVar

from qcowfs.errors import BadRequest, QcowfsError

Result = TypeVar("Result")

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


_SIZE_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


class CommandError(Exception):
    """A cause that ends the command: shown as one line, exit code `exit_code`."""

    def __init__(
        self,
        cause: str,
        *,
        file: str | None = None,
        hint: str | None = None,
        exit_code: int = EXIT_FAILURE,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.file = file
        self.hint = hint
        self.exit_code = exit_code

    def line(self) -> str:
        """The line for the terminal, without its end."""
        parts = ["qcowfs"]
        if self.file is not None:
            parts.append(self.file)
        parts.append(self.cause)
        text = ": ".join(parts)
        if self.hint:
            text += f"; hint: {self.hint}"
        return escape(text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line like all others."""

    def __init__(self, command: str, summary: str) -> None:
        super().__init__(
            prog=f"qcowfs {command}" if command else "qcowfs",
            description=summary,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise CommandError in place of printing the usage and leaving with 2."""
        command = self.prog.partition(" ")[2] or None
        raise CommandError(message, file=command, hint=f"{self.prog} --help")


def escape(text: str) -> str:
    r"""`text` with everything that a terminal would act on written as \xNN or \uNNNN."""
    shown = []
    for character in text:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            # A byte that was not UTF-8, as os.fsdecode keeps it.
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif character.isprintable():
            shown.append(character)
        elif code < 0x100:
            shown.append(f"\\x{code:02x}")
        else:
            shown.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return "".join(shown)


def parse_size(text: str) -> int:
    """Bytes from `10`, `64K`, `1.5G`, `2TiB`; raises BadRequest."""
    stripped = text.strip()
    number = stripped.rstrip("iIbBkKmMgGtTpPeE")
    suffix = stripped[len(number) :].lower().removesuffix("b").removesuffix("i")
    whole, dot, fraction = number.partition(".")
    plain = whole.isascii() and whole.isdigit()
    if suffix not in _SIZE_SUFFIXES or not plain or (dot and not fraction.isdigit()):
        raise BadRequest(f'"{text}" is not a size', hint="a number with K, M, G, T, P or E")
    scale = 1 << _SIZE_SUFFIXES[suffix]
    size = int(whole) * scale
    if dot:
        size += int(fraction) * scale // 10 ** len(fraction)
    if size >= 1 << 63:
        raise BadRequest(f'"{text}" is beyond the largest size, 8 EiB - 1')
    return size


def size_argument(text: str) -> int:
    """`parse_size` for argparse, which shows only the messages of its own exception."""
    try:
        return parse_size(text)
    except BadRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_switch(text: str, name: str) -> bool:
    """On or off, as qemu-img spells them; raises BadRequest."""
    if text in {"on", "yes", "true", "y"}:
        return True
    if text in {"off", "no", "false", "n"}:
        return False
    raise BadRequest(f'{name}: "{text}" is neither "on" nor "off"')


def print_error(text: str) -> None:
    """Write one line to standard error, if there is one."""
    data = (text + "\n").encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        os.write(2, data)


def _same_file(first: str, second: str) -> bool:
    return os.path.abspath(first) == os.path.abspath(second)


def describe_error(error: BaseException, file: str) -> CommandError:
    """The line for an exception that ended work on `file` (named as the user named it)."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, CommandError):
        return error
    if isinstance(error, QcowfsError):
        return CommandError(str(error), file=file, hint=error.hint)
    if isinstance(error, OSError):
        cause = error.strerror or str(error)
        other = error.filename
        if isinstance(other, bytes):
            other = os.fsdecode(other)
        if isinstance(other, str) and not other.startswith("/proc/"):
            if not _same_file(other, file):
                cause = f"{other}: {cause}"
        elif error.errno == errno.ENOSPC:
            cause = f"{cause} on the host"
        return CommandError(cause, file=file)
    return CommandError(f"internal error: {type(error).__name__}: {error}", file=file)


@contextlib.contextmanager
def naming(file: str, *, verbose: bool = False) -> Iterator[None]:
    """Turn whatever the block raises into a CommandError that names `file`.

    With `verbose` an unexpected exception keeps its traceback.
    """
    try:
        yield
    except CommandError:
        raise
    except (QcowfsError, OSError) as error:
        raise describe_error(error, file) from error
    except Exception as error:
        if verbose:
            raise
        raise describe_error(error, file) from error


def run_async(function: Callable[[], Awaitable[Result]]) -> Result:
    """Run an async function to its end under trio."""
    import trio

    return trio.run(function)


def absolute(path: str) -> str:
    """`path` from the root, its symbolic links and `..` untouched."""
    # The working directory is not asked for in vain: it may be gone.
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def prepare_process() -> None:
    """Undo what a parent may have left: closed standard descriptors, ignored signals.

    A shell starts background commands with SIGINT ignored, service managers
    with whatever mask they have; a mount has to end on SIGINT and SIGTERM all
    the same. A descriptor below 3 that is closed would be taken by the image.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


class Mount(NamedTuple):
    """A row of /proc/self/mountinfo; `device` is `major:minor` of the mounted filesystem."""

    mountpoint: str
    device: str
    type: str
    source: str


def _unescape_mount(data: bytes) -> str:
    pieces = data.split(b"\\")
    # Blanks, newlines and backslashes are three octal digits after a backslash.
    rest = [bytes([int(piece[:3], 8)]) + piece[3:] for piece in pieces[1:]]
    return os.fsdecode(pieces[0] + b"".join(rest))


def parse_mounts(table: bytes) -> list[Mount]:
    """The rows of a mountinfo table; only newlines end one, a name may hold any other byte."""
    mounts = []
    for row in table.split(b"\n"):
        before, _, after = row.partition(b" - ")
        fields, tail = before.split(b" "), after.split(b" ")
        # A row that changed while it was read can be cut off.
        if len(fields) >= 6 and len(tail) >= 2:
            point, kind, source = map(_unescape_mount, (fields[4], tail[0], tail[1]))
            mounts.append(Mount(point, fields[2].decode("ascii"), kind, source))
    return mounts


def all_mounts() -> list[Mount]:
    """What is mounted in this process's mount namespace, oldest first."""
    # Unbuffered: one read of the kernel's table is one consistent state.
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        table = b""
        while piece := file.read(1 << 20):
            table += piece
    return parse_mounts(table)


def find_mounts(mountpoint: str) -> list[Mount]:
    """What is mounted exactly there; the last one is what is seen."""
    path = os.path.realpath(mountpoint)
    return [mount for mount in all_mounts() if mount.mountpoint == path]


def is_ours(mount: Mount) -> bool:
    """Whether a mount is one of qcowfs."""
    return mount.type in {"fuse.qcowfs", "fuseblk.qcowfs"}


def clear_dead_mount(mountpoint: str) -> bool:
    """Take away a mount of ours whose process has died; True when there was one."""
    try:
        os.stat(mountpoint)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            return False
    else:
        return False
    mounts = find_mounts(mountpoint)
    if not mounts or not is_ours(mounts[-1]):
        return False
    from qcowfs.fuse.device import unmount

    unmount(mounts[-1].mountpoint, lazy=True)
    return True


def print_lines(lines: Sequence[str]) -> None:
    """Print to standard output, names from an image made harmless, in any locale."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        print(escape(line).encode(encoding, "backslashreplace").decode(encoding))
    if sys.stdout is not None:
        sys.stdout.flush()
