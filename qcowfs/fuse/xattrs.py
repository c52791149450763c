"""Extended attributes: name -> what is answered, or which verb is meant (INTERFACE).

It may use a Node's public attributes and operations and the tree's entries; it
must not import trio or pyfuse3, change an image, or say who may do what.

Invariants: a verb is never listed and never has a value; whatever is listed can
be read; a JSON value is whole JSON however long the truth is (long lists are
cut at an element, and end before the disk does).
"""

import datetime as dt
import enum
import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.mapping_chain import map_entries
from qcowfs.driver.node import Node
from qcowfs.errors import BadRequest, NotFound
from qcowfs.fuse.tree import ROOT_INODE, Entry, EntryKind, SnapshotRecord, Tree, unescape_name

_PREFIX = b"user.qcowfs."
_INFO = _PREFIX + b"info"
_STATS = _PREFIX + b"stats"
_MAP = _PREFIX + b"map"
_SNAPSHOT_PREFIX = _PREFIX + b"snapshot."
_DIFF_PREFIX = _PREFIX + b"diff."
_ACTIVE = b"active"

# The kernel's XATTR_SIZE_MAX: more than this cannot be read by anybody.
_VALUE_MAX = 65536
_MAP_EXTENTS = 4096
_DIFF_STEP = 1 << 36
_DIFF_EXTENTS = 4096
# A value that grows between the call that asks for its length and the one that
# reads it would fail: numbers that grow are padded to a multiple of this.
_PADDING = 512


class Verb(enum.Enum):
    """What setting an attribute does."""

    CREATE = b"user.qcowfs.snapshot.create"
    DELETE = b"user.qcowfs.snapshot.delete"
    APPLY = b"user.qcowfs.snapshot.apply"
    RENAME = b"user.qcowfs.snapshot.rename"


_VERBS = {verb.value: verb for verb in Verb}


def no_attribute() -> OSError:
    """The error for an attribute that is not there, or has no value."""
    return OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def is_ours(name: bytes) -> bool:
    """Whether an attribute name is one of this filesystem's."""
    return name.startswith(_PREFIX)


def verb_of(entry: Entry, name: bytes) -> Verb | None:
    """The verb that setting `name` on an entry means, if any."""
    return _VERBS.get(name) if _is_disk(entry) else None


def rename_arguments(value: bytes) -> tuple[bytes, bytes]:
    """OLD and NEW of the value `OLD=NEW`, in which %XX stands for a byte as in file names.

    Raises BadRequest.
    """
    old, equals, new = value.partition(b"=")
    if not equals or b"=" in new:
        raise BadRequest("a rename is written OLD=NEW, with %3D for = inside a name")
    return unescape_name(old), unescape_name(new)


def find_snapshot(tree: Tree, reference: bytes) -> Entry:
    """The snapshot with that ID, else the one with that name.

    Raises NotFound, and BadRequest where a broken image has several of them.
    """
    entries = tree.snapshot_entries()
    for attribute in ("id", "name"):
        found = [entry for entry in entries if getattr(entry.snapshot, attribute) == reference]
        if len(found) == 1:
            return found[0]
        if found:
            text = ascii(reference.decode(errors="backslashreplace"))
            raise BadRequest(f"{len(found)} snapshots have the {attribute} {text}")
    raise NotFound(f"no snapshot {reference.decode(errors='backslashreplace')!a}")


def info_of(node: Node) -> dict[str, Any]:
    """What is told of an image: the keys of qemu-img info."""
    describe: Callable[[], dict[str, Any]] | None = getattr(node, "info", None)
    if describe is not None:
        return describe()
    return {
        "virtual-size": node.virtual_size,
        "filename": node.name,
        "format": node.format_name,
    }


def info_text(node: Node) -> bytes:
    """The content of info.json."""
    return json.dumps(info_of(node), indent=4).encode() + b"\n"


def statistics_of(node: Node) -> dict[str, Any]:
    """The counters of a node, and who serves it."""
    count: Callable[[], dict[str, Any]] | None = getattr(node, "statistics", None)
    return {"pid": os.getpid(), **(count() if count is not None else {})}


class Attributes:
    """The attributes of one mount.

    `open_node` gives the node of a disk's entry for the length of a with block.
    """

    def __init__(
        self, node: Node, open_node: Callable[[Entry], AbstractAsyncContextManager[Node]]
    ) -> None:
        self._node = node
        self._open_node = open_node

    def names(self, entry: Entry) -> list[bytes]:
        """The attributes that can be read."""
        if _is_disk(entry):
            return [_INFO, _STATS, _MAP]
        if entry.snapshot is None:
            return []
        return [_SNAPSHOT_PREFIX + name for name in _snapshot_values(entry.snapshot)]

    async def get(self, tree: Tree, entry: Entry, name: bytes) -> bytes:
        """The value of an attribute; OSError with ENODATA where there is none."""
        if _is_disk(entry):
            if name == _INFO:
                return _info_value(info_of(self._node))
            if name == _STATS:
                value = _compact(statistics_of(self._node))
                return value.ljust(-(-len(value) // _PADDING) * _PADDING)
            if name == _MAP:
                size = self._node.virtual_size
                return _array(await map_entries(self._node, 0, size, limit=_MAP_EXTENTS))
        elif entry.snapshot is not None:
            if name.startswith(_SNAPSHOT_PREFIX):
                value_of = _snapshot_values(entry.snapshot)
                found = value_of.get(name.removeprefix(_SNAPSHOT_PREFIX))
                if found is not None:
                    return found
            elif name.startswith(_DIFF_PREFIX):
                return await self._difference(tree, entry, name.removeprefix(_DIFF_PREFIX))
        raise no_attribute()

    async def _difference(self, tree: Tree, entry: Entry, reference: bytes) -> bytes:
        if reference == _ACTIVE:
            other = tree.active
        else:
            try:
                other = find_snapshot(tree, reference)
            except NotFound:
                other = find_snapshot(tree, unescape_name(reference))
        async with self._open_node(entry) as one, self._open_node(other) as two:
            elements: list[str] = []
            length = 0
            async for start, end in _differing_ranges(one, two):
                element = _compact({"start": start, "length": end - start}).decode()
                length += len(element) + 1
                if length >= _VALUE_MAX:
                    break
                elements.append(element)
        return ("[" + ",".join(elements) + "]").encode()


def _is_disk(entry: Entry) -> bool:
    return entry.kind is EntryKind.ACTIVE or entry.inode == ROOT_INODE


def _snapshot_values(snapshot: SnapshotRecord) -> dict[bytes, bytes]:
    values = {
        b"id": snapshot.id,
        b"name": snapshot.name,
        b"date": _date(snapshot),
        b"vm_clock_nsec": b"%d" % snapshot.vm_clock_nsec,
        b"vm_state_size": b"%d" % snapshot.vm_state_size,
    }
    if snapshot.disk_size is not None:
        values[b"disk_size"] = b"%d" % snapshot.disk_size
    if snapshot.icount is not None:
        values[b"icount"] = b"%d" % snapshot.icount
    return values


def _date(snapshot: SnapshotRecord) -> bytes:
    """ISO 8601 in UTC, with nanoseconds."""
    moment = dt.datetime.fromtimestamp(snapshot.date_sec, dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{snapshot.date_nsec % 1_000_000_000:09d}Z".encode()


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _info_value(info: dict[str, Any]) -> bytes:
    """`info` as an attribute's value: where it is too long, with as many snapshots as fit."""
    value = _compact(info)
    snapshots = info.get("snapshots")
    if len(value) <= _VALUE_MAX or not isinstance(snapshots, list):
        return value
    room = _VALUE_MAX - len(_compact({**info, "snapshots": []})) + len("[]")
    return _compact({**info, "snapshots": json.loads(_array(snapshots, max(room, 0)))})


def _array(elements: Iterable[dict[str, Any]], longest: int = _VALUE_MAX) -> bytes:
    """A JSON array of as many elements as `longest` bytes can hold."""
    texts: list[bytes] = []
    length = 2
    for element in elements:
        text = _compact(element)
        length += len(text) + 1
        if length > longest:
            break
        texts.append(text)
    return b"[" + b",".join(texts) + b"]"


async def _differing_ranges(one: Node, two: Node) -> AsyncIterator[tuple[int, int]]:
    """Ranges (start, end) in which two nodes of one image do not map the same bytes.

    No data is read: clusters of equal content at different places differ. What
    only the larger disk has differs too.
    """
    common = min(one.virtual_size, two.virtual_size)
    start = end = 0
    guest_offset = 0
    while guest_offset < common:
        length = min(_DIFF_STEP, common - guest_offset)
        first = await one.extents(guest_offset, length, limit=_DIFF_EXTENTS)
        second = await two.extents(guest_offset, length, limit=_DIFF_EXTENTS)
        for next_start, next_end in _differing_pieces(first, second, one.backing is not None):
            if next_start != end:
                if end > start:
                    yield start, end
                start = next_start
            end = next_end
        guest_offset = min(_end_of(first), _end_of(second))
    longest = max(one.virtual_size, two.virtual_size)
    if longest > common:
        if end != common:
            if end > start:
                yield start, end
            start = common
        end = longest
    if end > start:
        yield start, end


def _differing_pieces(
    first: Sequence[Extent], second: Sequence[Extent], has_backing: bool
) -> Iterator[tuple[int, int]]:
    """Where two lists of extents that begin together differ, as far as both reach."""
    first_index = second_index = 0
    while first_index < len(first) and second_index < len(second):
        one, two = first[first_index], second[second_index]
        start = max(one.guest_offset, two.guest_offset)
        one_end = one.guest_offset + one.length
        two_end = two.guest_offset + two.length
        if _content_at(one, start, has_backing) != _content_at(two, start, has_backing):
            yield start, min(one_end, two_end)
        first_index += one_end <= two_end
        second_index += two_end <= one_end


def _content_at(extent: Extent, guest_offset: int, has_backing: bool) -> tuple[ExtentKind, int]:
    """What decides the bytes at an offset inside an extent."""
    kind = extent.kind
    if kind is ExtentKind.DATA:
        assert extent.host_offset is not None
        return kind, extent.host_offset + guest_offset - extent.guest_offset
    if kind is ExtentKind.COMPRESSED:
        assert extent.host_offset is not None
        return kind, extent.host_offset
    if kind is ExtentKind.UNALLOCATED and not has_backing:
        kind = ExtentKind.ZERO
    return kind, 0


def _end_of(extents: Sequence[Extent]) -> int:
    last = extents[-1]
    return last.guest_offset + last.length
