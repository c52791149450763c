"""Opening an image by its path: format, backing chain, locks, and what is refused.

The formats are qcow2, qcow, cow and raw; others are recognised only to be
refused by name. Nothing here parses more than a header. Rules that hold:

- A file is locked before it is read, and it is the file that was looked at:
  all names are resolved once, all later work goes through the descriptor.
- An image is taken for raw only where that was said, or where an image names a
  backing file without its format. Whenever a backing file's format is found by
  looking at it, a warning tells of the danger.
- A backing file is opened read-only. Its name counts from the folder of the
  image that names it, as that image was named. Loops are found by identity.
  With a backing root, whatever it turned out to be has to lie below that.
- The chain is walked without recursion, first down through the headers, then
  up making the nodes. Whatever was opened is closed when a later step fails.
"""

import logging
import os
import stat
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import trio

from qcowfs.driver import data_file
from qcowfs.driver.backing_names import FORMATS, Reference, resolve_backing, shown
from qcowfs.driver.layout.extensions import printable
from qcowfs.driver.layout.header import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    MAGIC,
    Header,
    parse_header,
    probe_cluster_size,
)
from qcowfs.driver.layout.qcow1 import Qcow1Header, parse_qcow1_header
from qcowfs.driver.layout.uml_cow import CowHeader, parse_cow_header
from qcowfs.driver.node import Node
from qcowfs.driver.qcow1 import open_qcow1
from qcowfs.driver.qcow2.image import open_qcow2
from qcowfs.driver.qcow2.metadata import DEFAULT_CACHE_SIZE
from qcowfs.driver.raw import RawNode
from qcowfs.driver.secrets import Secrets
from qcowfs.driver.storage import HostFile, LockRole
from qcowfs.driver.uml_cow import open_cow
from qcowfs.driver.window import WindowStorage
from qcowfs.errors import BadRequest, CorruptImage, NotFound, QcowfsError, UnsupportedFeature

logger = logging.getLogger(__name__)

# Every layer costs a descriptor, its caches, and some frames of the stack in a read.
MAX_CHAIN_DEPTH = 100

# Enough for every magic number, and for the header of all but the largest clusters.
_HEAD_LENGTH = 1 << 16

_FOREIGN_MAGIC = (
    (0, MAGIC + b"\x00\x00\x00\x01", "qcow"),
    (0, b"OOOM", "cow"),
    (0, b"MOOO\x01\x00\x00\x00", "cow"),
    (0, b"QED\x00", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
)


@dataclass(slots=True)
class _Layer:
    """An opened file of the chain that has no node yet; `header` is None for raw."""

    reference: Reference
    storage: HostFile
    header: Header | Qcow1Header | CowHeader | None
    data_storage: HostFile | None = None


@dataclass(frozen=True, slots=True)
class _Manner:
    """How a chain is opened: what `open_image` was asked for, `backing_root` resolved."""

    read_only: bool
    force_share: bool
    lock: bool
    backing_root: str | None
    force: bool
    secrets: Secrets
    describe_only: bool
    cache_size: int


def probe(head: bytes | bytearray) -> str | None:
    """The format that the first bytes of a file (0x44 or more) speak for; None for none.

    None also means raw. A guest that may write to a raw disk decides these bytes.
    """
    for host_offset, magic, name in _FOREIGN_MAGIC:
        if head[host_offset : host_offset + len(magic)] == magic:
            return name
    return "qcow2" if head[: len(MAGIC)] == MAGIC else None


async def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    read_only: bool = False,
    force_share: bool = False,
    lock: bool = True,
    backing: bool = True,
    backing_format: str | None = None,
    backing_root: str | os.PathLike[str] | None = None,
    force: bool = False,
    key: bytes | Secrets | None = None,
    describe_only: bool = False,
    cache_size: int = DEFAULT_CACHE_SIZE,
) -> Node:
    """The image at `path` with its backing chain, locked; closing the node closes all of it.

    `format` is qcow2, qcow, cow, raw or None: then the file is looked at, and
    raw is not among the answers. `backing_format` overrides what the image says
    of its backing file's; without `backing` that is not opened, and unallocated
    ranges are zeros. With `backing_root`, every backing file has to lie below
    that folder, symbolic links resolved. `force` opens a COW image for writing
    though its backing file was changed after it was made. `key` is the
    passphrase of the layers that are encrypted, or tells each layer's own. With
    `describe_only` neither that nor a data file is asked for, and the node is
    good for `info` and for what is done to snapshots. `cache_size`, in bytes, is
    shared by the layers.

    Raises OSError, ImageBusy, BadRequest (format not known or not as said, no
    regular file, outside of the backing root), UnsupportedFeature,
    CorruptImage, KeyRequired, NotFound (backing file).
    """
    root = None
    if backing_root is not None:
        root = os.path.realpath(backing_root, strict=True)
    secrets = key if isinstance(key, Secrets) else Secrets(key)
    manner = _Manner(read_only, force_share, lock, root, force, secrets, describe_only, cache_size)
    layers: list[_Layer] = []
    try:
        reference: Reference | None = Reference(os.fspath(path), format)
        while reference is not None:
            is_top = not layers
            layer = await _open_layer(reference, layers, manner)
            reference = None
            if backing and layer.header is not None and layer.header.backing_file is not None:
                reference = _backing_of(layer, layer.header.backing_file)
                if is_top and backing_format is not None:
                    reference = replace(reference, format=backing_format)
        return await _build(layers, manner)
    except BaseException:
        with trio.CancelScope(shield=True):
            for layer in layers:
                await layer.storage.aclose()
                if layer.data_storage is not None:
                    await layer.data_storage.aclose()
        raise


def _backing_of(layer: _Layer, name: bytes) -> Reference:
    """What the backing file name of a layer refers to; a message names both files."""
    try:
        reference = resolve_backing(name, layer.reference.path)
    except QcowfsError as error:
        raise _about_backing(error, printable(name), layer.reference.path) from None
    if reference.format is None and isinstance(layer.header, Header):
        reference = replace(reference, format=layer.header.backing_format or None)
    return reference


async def _open_layer(reference: Reference, layers: list[_Layer], manner: _Manner) -> _Layer:
    """Open one file, lock it, read its header and append it to `layers`."""
    writable = not layers and not manner.read_only
    try:
        if len(layers) >= MAX_CHAIN_DEPTH:
            raise UnsupportedFeature(f"the chain has more than {MAX_CHAIN_DEPTH} layers")
        _check_format_name(reference.format)
        storage = await HostFile.open(
            reference.path,
            writable=writable,
            role=LockRole.QCOW2_READ,
            force_share=manner.force_share,
            lock=False,
        )
        layer = _Layer(reference, storage, None)
        layers.append(layer)
        if reference.label is not None and manner.backing_root is not None:
            _require_below(manner.backing_root, storage, reference.path)
        # A file that is met again would be refused for our own lock on it.
        if storage.identity in _identities(layers[:-1]):
            raise CorruptImage("the backing chain is a loop: the file is in it already")
        if manner.lock and not manner.force_share:
            storage.acquire_locks(_role(reference.format, writable, is_top=len(layers) == 1))
        layer.header = await _read_header(storage, reference)
        if isinstance(layer.header, Header) and not writable:
            _warn_of_marks(layer.header, reference.path)
        if isinstance(layer.header, Header) and layer.header.has_data_file:
            await _open_data_file(layer, layers, manner, writable=writable)
        if len(layers) > 1 and isinstance(layers[-2].header, CowHeader):
            writes = len(layers) == 2 and not manner.read_only
            _compare_times(layers[-2], layer, writable=writes, force=manner.force)
    except (QcowfsError, OSError) as error:
        if reference.label is None:
            raise
        upper_layers = [upper for upper in layers if upper.reference is not reference]
        raise _about_backing(error, reference.label, upper_layers[-1].reference.path) from error
    return layer


def _identities(layers: list[_Layer]) -> set[tuple[int, int]]:
    """The identities of all files that the layers have open."""
    data_files = [layer.data_storage for layer in layers if layer.data_storage is not None]
    return {file.identity for file in [*data_files, *(layer.storage for layer in layers)]}


async def _open_data_file(
    layer: _Layer, layers: list[_Layer], manner: _Manner, *, writable: bool
) -> None:
    """Open and lock the external data file of a layer; a message names both files."""
    assert isinstance(layer.header, Header)
    if manner.describe_only:
        return
    image_path = layer.reference.path
    try:
        path = data_file.data_file_path(layer.header, image_path)
        layer.data_storage = await data_file.open_data_file(
            path,
            writable=writable,
            lock=manner.lock and not manner.force_share,
            taken=_identities(layers),
        )
        if manner.backing_root is not None:
            _require_below(manner.backing_root, layer.data_storage, path)
    except (QcowfsError, OSError) as error:
        label = printable(layer.header.data_file or b"")
        raise _about(error, "data file", label, image_path) from error


def _status_of(path: str, storage: HostFile) -> os.stat_result:
    """What stat tells of the file at `path`; BadRequest when that is not `storage` any more."""
    status = os.stat(path)
    is_device = stat.S_ISBLK(status.st_mode)
    identity = (status.st_rdev, 0) if is_device else (status.st_dev, status.st_ino)
    if identity != storage.identity:
        raise BadRequest("the file was replaced while it was opened")
    return status


def _require_below(root: str, storage: HostFile, path: str) -> None:
    """Refuse a file that, symbolic links resolved, does not lie below the folder `root`."""
    real_path = os.path.realpath(path)
    _status_of(real_path, storage)
    if os.path.commonpath((real_path, root)) != root:
        raise BadRequest(f"it lies outside of the backing root {shown(root)}")


def _compare_times(upper: _Layer, layer: _Layer, *, writable: bool, force: bool) -> None:
    """Warn of a backing file that was changed after the COW image over it was made.

    Raises BadRequest where the image is to be written, unless forced.
    """
    assert isinstance(upper.header, CowHeader)
    recorded = upper.header.mtime
    found = int(_status_of(layer.reference.path, layer.storage).st_mtime)
    if not recorded or recorded == found & 0xFFFFFFFF:
        return
    cause = (
        f"it was changed at {_utc(found)}, the image over it is made for its state "
        f"of {_utc(recorded)}"
    )
    if writable and not force:
        raise BadRequest(cause, hint="--force, to write all the same, or mount read-only")
    logger.warning('%s: backing file "%s": %s', upper.reference.path, layer.reference.path, cause)


def _utc(seconds: int) -> str:
    """A time of a file for a message."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):
        return f"{seconds} s"


def _role(stated_format: str | None, writable: bool, *, is_top: bool) -> LockRole:
    if is_top and stated_format == "raw":
        return LockRole.RAW_WRITE if writable else LockRole.RAW_READ
    return LockRole.QCOW2_WRITE if writable else LockRole.QCOW2_READ


def _about_backing(error: QcowfsError | OSError, label: str, image_path: str) -> Exception:
    """`error` with the names of the backing file and of the image that names it."""
    return _about(error, "backing file", label, image_path)


def _about(error: QcowfsError | OSError, role: str, label: str, image_path: str) -> Exception:
    about = f'{role} "{label}" of "{printable(os.fsencode(image_path))}"'
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{about} does not exist")
    if isinstance(error, OSError):
        return OSError(error.errno, f"{about}: {error.strerror}")
    return type(error)(
        f"{about}: {error}",
        structure=error.structure,
        index=error.index,
        host_offset=error.host_offset,
        hint=error.hint,
    )


def _check_format_name(name: str | None) -> None:
    if name is not None and name not in FORMATS:
        raise UnsupportedFeature(f'the format "{shown(name)}" is not supported')


async def _read_header(
    storage: HostFile, reference: Reference
) -> Header | Qcow1Header | CowHeader | None:
    """The header of an image; None for a raw one. Probes where no format was said."""
    stated = reference.format
    if stated == "raw":
        return None
    size = storage.size()
    head = await storage.pread(min(size, _HEAD_LENGTH), 0)
    if stated is None:
        found = probe(head)
        if reference.label is not None:
            _warn_of_probing(found or "raw", reference.path)
            if found is None:
                return None
        elif found is None:
            what = "the file is empty" if size == 0 else "the format is not recognised"
            raise BadRequest(what, hint="--format raw, if it is a raw disk")
        _check_format_name(found)
        stated = found
    if stated == "qcow":
        return parse_qcow1_header(bytes(head), size)
    if stated == "cow":
        return parse_cow_header(bytes(head), size)
    cluster_size = probe_cluster_size(head)
    if cluster_size > len(head):
        head = await storage.pread(min(size, cluster_size), 0)
    return parse_header(head, size)


def _warn_of_probing(found: str, path: str) -> None:
    """Say that a backing file's format was guessed, and why that is dangerous."""
    if found == "raw":
        danger = "whoever writes to it could make it pass for an image that names other files"
    else:
        danger = "if it is a raw disk, whoever wrote to it decides which files are read"
    logger.warning(
        '%s: backing file of unstated format, taken for "%s": %s; state its format '
        "in the image or with --backing-format",
        path,
        found,
        danger,
    )


def _warn_of_marks(header: Header, path: str) -> None:
    """Say what an image that is only read is marked with; for writing it is refused later."""
    marks = []
    if header.incompatible & INCOMPATIBLE_CORRUPT:
        marks.append("corrupt")
    if header.incompatible & INCOMPATIBLE_DIRTY:
        marks.append("dirty (its refcounts may be wrong)")
    if marks:
        logger.warning("%s: the image is marked %s", path, " and ".join(marks))


async def _build(layers: list[_Layer], manner: _Manner) -> Node:
    """Make the nodes from the lowest layer up; each takes its file out of `layers`."""
    share = manner.cache_size // max(1, sum(layer.header is not None for layer in layers))
    node: Node | None = None
    try:
        while layers:
            is_top = len(layers) == 1
            node = await _make_node(
                layers[-1], node, manner, read_only=manner.read_only or not is_top, cache_size=share
            )
            layers.pop()
    except BaseException as error:
        if node is not None:
            with trio.CancelScope(shield=True):
                await node.aclose()
        label = layers[-1].reference.label
        if label is not None and isinstance(error, QcowfsError | OSError):
            raise _about_backing(error, label, layers[-2].reference.path) from error
        raise
    assert node is not None
    return node


async def _make_node(
    layer: _Layer, backing: Node | None, manner: _Manner, *, read_only: bool, cache_size: int
) -> Node:
    """The node of one layer; it owns the layer's file, and `backing`, once it is made."""
    reference, header = layer.reference, layer.header
    path = reference.path
    if header is None:
        if reference.start or reference.length is not None:
            window = WindowStorage(layer.storage, reference.start, reference.length)
            return RawNode(window, path=path)
        return RawNode(layer.storage, path=path)
    if isinstance(header, Qcow1Header):
        return await open_qcow1(
            layer.storage,
            header,
            path=path,
            backing=backing,
            key=manner.secrets.of(path),
            describe_only=manner.describe_only,
            cache_size=cache_size,
        )
    if isinstance(header, CowHeader):
        return await open_cow(
            layer.storage, header, path=path, backing=backing, cache_size=cache_size
        )
    return await open_qcow2(
        layer.storage,
        path=path,
        read_only=read_only,
        backing=backing,
        cache_size=cache_size,
        secret=manner.secrets.of(path),
        data_storage=layer.data_storage,
        describe_only=manner.describe_only,
    )
