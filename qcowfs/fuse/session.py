"""One mount from opening the image to closing it: options, signals, readiness, the end.

It answers no request. Order: check the mount point, open and lock the image,
mount, serve; then stop serving, flush, close, unlock. Invariants:

- What fails before the mount answers is raised, and leaves nothing mounted,
  open or locked.
- A signal never ends the process by itself, whatever its disposition was
  before; the image is flushed and closed on every way out.
- A failed last flush is told by the log and by the exit code.
"""

import ctypes
import errno
import gc
import logging
import os
import signal
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pyfuse3
import trio

from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.secrets import Secrets
from qcowfs.errors import BadRequest, NotFound, QcowfsError
from qcowfs.fuse import device
from qcowfs.fuse.kernel import DescriptorKernel, Notifier, SessionKernel
from qcowfs.fuse.lane import Lane
from qcowfs.fuse.operations import Operations
from qcowfs.fuse.status import Presentation
from qcowfs.fuse.tree import ACTIVE_NAME

log = logging.getLogger(__name__)

EXIT_FAILURE = 1

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# After a signal the mount is out of sight at once, and whoever still has a file
# open is given so long to close it.
_GRACE_SECONDS = 3
_STOP_SECONDS = 10
_PR_SET_IO_FLUSHER = 57
# One below the number that means "no such user" to the kernel.
_LARGEST_ID = (1 << 32) - 2

# Options that are ours, and those that only mount(2) itself understands.
_OWN_OPTIONS = frozenset({"uid", "gid", "umask", "nonempty", "ro", "rw"})
_MOUNT_ONLY_OPTIONS = frozenset({"context", "fscontext", "defcontext", "rootcontext"})


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What one mount is asked to do; the command line fills it in.

    `fuse_options` maps an option's name to its value (None: a flag): allow_other,
    allow_root, default_permissions, fsname, subtype, uid, gid, umask, and what
    else the kernel or fusermount3 understands (context=, nosuid, noexec, ...).
    `cache_size` is in bytes, `poll_us` in microseconds.
    """

    image: Path
    mountpoint: Path
    read_only: bool = False
    format: str | None = None
    backing_format: str | None = None
    backing: bool = True
    force_share: bool = False
    lock: bool = True
    backing_root: Path | None = None
    force: bool = False
    key: Secrets | None = None
    cache_size: int | None = None
    fuse_options: Mapping[str, str | None] = field(default_factory=dict)
    growable: bool = False
    use_lane: bool = True
    poll_us: int = 50
    debug: bool = False


async def serve(options: MountOptions, *, ready: Callable[[], None] | None = None) -> int:
    """Open the image, mount it, serve until it is unmounted or a signal ends it.

    `ready` is called once, synchronously, when the mount answers requests.
    Answers the exit code: 0, or 1 when the mount ended by a fault or the last
    flush failed (logged). Raises QcowfsError or OSError when nothing could be
    mounted. Runs in the main thread, whose signals it takes over.
    """
    # fusermount3 neither mounts through a symbolic link nor unmounts through one.
    real = Path(os.path.realpath(options.mountpoint))
    options = replace(options, mountpoint=real)
    presentation = _presentation(options)
    with _signals_disarmed(), trio.open_signal_receiver(*_SIGNALS) as signals:
        _ask_for_io_flusher()
        await trio.to_thread.run_sync(_check_mountpoint, options)
        node = await _open(options)
        session = _Session(options, node, presentation)
        exit_code = EXIT_FAILURE
        try:
            exit_code = await session.run(signals, ready)
        except BaseExceptionGroup as group:
            raise _first_cause(group) from None
        finally:
            with trio.CancelScope(shield=True):
                if not await _close(node):
                    exit_code = EXIT_FAILURE
        return exit_code


@contextmanager
def _signals_disarmed() -> Iterator[None]:
    """Take the signals over from whatever the parent did to them.

    trio hands a signal that came too late for its receiver to the handler from
    before: that must not end a process whose image is closed in good order.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        log.info("%s: ending already", signal.Signals(number).name)

    earlier = {number: signal.signal(number, ignore) for number in _SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in earlier.items():
            if handler is not None:
                signal.signal(number, handler)


async def _open(options: MountOptions) -> Node:
    arguments: dict[str, Any] = {}
    if options.cache_size is not None:
        arguments["cache_size"] = options.cache_size
    return await open_image(
        options.image,
        format=options.format,
        read_only=options.read_only,
        force_share=options.force_share,
        lock=options.lock,
        backing=options.backing,
        backing_format=options.backing_format,
        backing_root=options.backing_root,
        force=options.force,
        key=options.key,
        **arguments,
    )


async def _close(node: Node) -> bool:
    """Flush, close and unlock; False, and logged, when something was lost."""
    try:
        await node.aclose()
    except (QcowfsError, OSError) as error:
        log.error("the last flush failed, what was written last may be lost: %s", error)
        return False
    except Exception:
        log.exception("closing the image failed, what was written last may be lost")
        return False
    if getattr(node, "failsafe", None) is not None:
        log.error("the image had gone read-only, what was written last may be lost")
        return False
    return True


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that made the others: the first that is not itself a group."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


class _Session:
    """The life of the mount of an open image."""

    def __init__(self, options: MountOptions, node: Node, presentation: Presentation) -> None:
        self._options = options
        self._node = node
        self._show = presentation
        self._mountpoint = os.fspath(options.mountpoint)
        self._active_path = os.fsencode(self._mountpoint) + b"/" + ACTIVE_NAME
        self._device: int | None = None
        self._exit_code = 0
        self._is_mounted = False
        self._was_ready = False
        self._was_stopped = False
        self._lane: Lane | None = None
        self._lane_scope = trio.CancelScope()
        self._serving_scope = trio.CancelScope()

    async def run(self, signals: AsyncIterator[int], ready: Callable[[], None] | None) -> int:
        """Mount and serve; answers the exit code once nothing is mounted any more."""
        try:
            async with trio.open_nursery() as nursery:
                kernel, operations = await self._mount(nursery)
                # What lives as long as the mount (imports, tables, the tree) need
                # not be looked through again by each collection.
                gc.freeze()
                try:
                    nursery.start_soon(self._maintain, operations)
                    nursery.start_soon(self._announce, ready)
                    nursery.start_soon(self._end_on_signals, signals, nursery)
                    with self._serving_scope:
                        await self._serve()
                finally:
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await self._disconnect(kernel)
                        await operations.aclose()
        finally:
            if self._is_mounted:
                with trio.CancelScope(shield=True):
                    await self._clear_mountpoint()
        return self._exit_code if self._was_ready else EXIT_FAILURE

    async def _mount(self, nursery: trio.Nursery) -> tuple[Notifier, Operations]:
        wanted = _mount_options(self._options, self._show)
        if not self._options.use_lane or not _MOUNT_ONLY_OPTIONS.isdisjoint(wanted):
            kernel: Notifier = SessionKernel()
            operations = self._operations(kernel, nursery)
            _start_libfuse(operations, self._mountpoint, _libfuse_options(wanted))
            self._is_mounted = True
            return kernel, operations
        libfuse_options = {"debug"} if self._options.debug else set()
        if "allow_root" in wanted:
            # The kernel lets everybody in, libfuse turns away all but root and the owner.
            del wanted["allow_root"]
            wanted["allow_other"] = None
            libfuse_options.add("allow_root")
        descriptor = await trio.to_thread.run_sync(device.mount, self._mountpoint, wanted)
        self._is_mounted = True
        lane_end, libfuse_end = device.open_channel()
        kernel = DescriptorKernel(descriptor)
        operations = self._operations(kernel, nursery)
        self._lane = Lane(descriptor, lane_end, operations, self._options.poll_us)
        try:
            _start_libfuse(operations, f"/dev/fd/{libfuse_end}", libfuse_options)
        except BaseException:
            os.close(libfuse_end)
            self._lane.close()
            await kernel.aclose()
            raise
        return kernel, operations

    def _operations(self, kernel: Notifier, nursery: trio.Nursery) -> Operations:
        return Operations(
            self._node,
            kernel=kernel,
            nursery=nursery,
            presentation=self._show,
            is_attached=lambda: _is_attached(self._active_path),
        )

    async def _serve(self) -> None:
        """Return when the kernel has hung up, or `_stop_serving` was called."""
        if self._lane is None:
            await self._run_libfuse()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_libfuse)
            with self._lane_scope:
                await self._lane.run()
            pyfuse3.terminate()

    async def _run_libfuse(self) -> None:
        try:
            await pyfuse3.main()
        except ExceptionGroup as group:
            cause = _first_cause(group)
            if not isinstance(cause, OSError):
                raise
            log.error("the connection to the kernel failed: %s", cause)
            self._exit_code = EXIT_FAILURE
        self._lane_scope.cancel()

    def _stop_serving(self) -> None:
        """Read no more requests; those under way are answered."""
        self._was_stopped = True
        self._lane_scope.cancel()
        pyfuse3.terminate()

    async def _maintain(self, operations: Operations) -> None:
        maintain: Callable[[], Awaitable[None]] | None = getattr(self._node, "maintain", None)
        if maintain is None:
            return
        try:
            await maintain()
        except Exception as error:
            operations.note_failure("maintenance", error, touches_image=True)

    async def _announce(self, ready: Callable[[], None] | None) -> None:
        status = await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        self._device = status.st_dev
        self._was_ready = True
        log.info("mounted on %s", self._mountpoint)
        if ready is not None:
            ready()

    async def _end_on_signals(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        """The first signal ends the mount in an orderly way, the second one at once."""
        is_first = True
        async for number in signals:
            log.info("%s: unmounting %s", signal.Signals(number).name, self._mountpoint)
            if is_first:
                nursery.start_soon(self._shut_down)
            else:
                self._stop_serving()
            is_first = False

    async def _shut_down(self) -> None:
        await trio.to_thread.run_sync(self._detach, abandon_on_cancel=True)
        # The kernel hangs up at the last close, which cancels this task.
        await trio.sleep(_GRACE_SECONDS)
        log.warning("files are still open; they answer no more")
        self._stop_serving()
        await trio.sleep(_STOP_SECONDS)
        log.error("requests under way did not end in %d seconds", _STOP_SECONDS)
        self._serving_scope.cancel()

    def _detach(self) -> None:
        """Take the mount out of sight, unless another one covers it."""
        try:
            if self._device in (None, os.stat(self._mountpoint).st_dev):
                device.unmount(self._mountpoint, lazy=True)
        except (QcowfsError, OSError) as error:
            log.warning("%s: %s", self._mountpoint, error)

    async def _disconnect(self, kernel: Notifier) -> None:
        """End the connection: what is asked from now on fails in the kernel."""
        if self._lane is not None:
            self._lane.close()
        # A thread that is still inside libfuse must not lose its session.
        if await kernel.aclose():
            pyfuse3.close(unmount=False)

    async def _clear_mountpoint(self) -> None:
        """Leave no dead mount behind: what is still there was cut off, not unmounted."""

        def clear() -> bool:
            try:
                os.stat(self._mountpoint)
            except OSError as error:
                if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                    device.unmount(self._mountpoint, lazy=True)
                    return True
            return False

        was_there = False
        try:
            with trio.move_on_after(_STOP_SECONDS):
                was_there = await trio.to_thread.run_sync(clear, abandon_on_cancel=True)
        except (QcowfsError, OSError) as error:
            log.warning("%s: %s", self._mountpoint, error)
        if was_there and self._was_ready and not self._was_stopped:
            log.error("the connection to the kernel was aborted")
            self._exit_code = EXIT_FAILURE


def _start_libfuse(operations: Operations, mountpoint: str, options: set[str]) -> None:
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        # What it was is on standard error, in libfuse's words.
        raise device.MountFailed(f"cannot mount on {mountpoint}: {error}") from error


def _is_attached(path: bytes) -> bool:
    """Whether a loop device, be it a read-only one, works on the file at `path`.

    Asks the kernel's tables alone, never the file.
    """
    for name in os.listdir("/sys/block") if os.path.isdir("/sys/block") else []:
        if not name.startswith("loop"):
            continue
        try:
            with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
                if file.read().removesuffix(b"\n") == path:
                    return True
        except OSError:
            continue
    return False


def _mount_options(options: MountOptions, show: Presentation) -> dict[str, str | bool | None]:
    """The options of the mount itself, defaults first."""
    wanted: dict[str, str | bool | None] = {
        "fsname": os.fspath(options.image),
        "subtype": "qcowfs",
        "default_permissions": None,
    }
    others = options.fuse_options.items()
    wanted.update((name, value) for name, value in others if name not in _OWN_OPTIONS)
    if show.read_only:
        wanted["ro"] = None
    return wanted


def _libfuse_options(wanted: Mapping[str, str | bool | None]) -> set[str]:
    """The same for libfuse, which takes them apart at commas and knows ASCII only."""
    texts = set()
    for name, value in wanted.items():
        if value is None:
            texts.add(name)
            continue
        text = str(value).encode("ascii", "backslashreplace").decode()
        text = text.replace("\\", "\\\\").replace(",", "\\,")
        texts.add(f"{name}={text}")
    return texts


def _presentation(options: MountOptions) -> Presentation:
    wanted = options.fuse_options

    def number(name: str, default: int, base: int = 10) -> int:
        text = wanted.get(name)
        if text is None:
            return default
        try:
            value = int(text, base)
        except ValueError:
            raise BadRequest(f"mount option {name}={text} is not a number") from None
        if not 0 <= value <= _LARGEST_ID:
            raise BadRequest(f"mount option {name}={text} is out of range")
        return value

    return Presentation(
        uid=number("uid", os.getuid()),
        gid=number("gid", os.getgid()),
        umask=number("umask", 0o077, 8) & 0o777,
        read_only=options.read_only or "ro" in wanted,
        growable=options.growable,
        mtime_ns=os.stat(options.image).st_mtime_ns,
    )


def _check_mountpoint(options: MountOptions) -> None:
    """Refuse what cannot be mounted on; clear what a killed process left there.

    Raises NotFound, BadRequest, OSError.
    """
    path = os.fspath(options.mountpoint)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise NotFound(f"mount point {path} does not exist") from None
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        device.unmount(path, lazy=True)
        log.warning("%s: cleared a mount whose process has died", path)
        status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise BadRequest(f"mount point {path} is not a directory")
    image = os.path.realpath(options.image)
    if image.startswith(os.path.join(os.path.realpath(path), "")):
        raise BadRequest(f"the image lies under the mount point {path}")
    if "nonempty" not in options.fuse_options:
        with os.scandir(path) as entries:
            if next(entries, None) is not None:
                raise BadRequest(f"mount point {path} is not empty")


def _ask_for_io_flusher() -> None:
    """Keep memory pressure from making this process wait for writes to its own mount.

    Needs CAP_SYS_RESOURCE; without it a loop device on the mount can stall
    under memory pressure. Threads inherit it, so it comes first.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
