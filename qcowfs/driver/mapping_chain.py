"""Where guest bytes come from through a whole backing chain: extents with a depth.

Works on the Node protocol alone and knows no format but raw, whose bytes lie at
their own offsets. The walk over the layers keeps its own stack, so that no
chain is too long for it, and each step asks a layer for a bounded number of
extents.

Invariants: results are in guest order without gaps; a range behind the end of
a backing file is not asked of it.
"""

from typing import Any, NamedTuple

import trio

from qcowfs.driver.extent import Extent, ExtentKind
from qcowfs.driver.node import Node

# The most extents that one call of a layer may return; bounds memory and time of a step.
_STEP_COUNT = 1024
# The first and the longest range of one step in the search for data or a hole.
_SEEK_LENGTH = 64 << 20
_SEEK_LENGTH_MAX = 64 << 30


class ChainExtent(NamedTuple):
    """A run of guest bytes and the layer that they come from; offsets and lengths in bytes.

    `depth` counts layers from 0, the top. `node` is that layer. UNALLOCATED
    here means that no layer holds the range: it reads as zeros. A COMPRESSED
    extent is a part of one cluster; `host_offset` and `stored_length` tell its
    stream, as in `Extent`.
    """

    kind: ExtentKind
    guest_offset: int
    length: int
    depth: int
    host_offset: int | None
    node: Node
    stored_length: int = 0

    @property
    def start(self) -> int:
        """The guest offset, by the name that qemu-img map gives it."""
        return self.guest_offset

    @property
    def data(self) -> bool:
        """Whether the layer stores bytes for the range."""
        return self.kind is ExtentKind.DATA or self.kind is ExtentKind.COMPRESSED

    @property
    def zero(self) -> bool:
        """Whether the range is known to read as zeros."""
        return not self.data

    @property
    def present(self) -> bool:
        """Whether the layer decides what the range reads as."""
        return self.kind is not ExtentKind.UNALLOCATED

    def as_map_entry(self) -> dict[str, Any]:
        """The extent under the keys of `qemu-img map --output=json`.

        QEMU sometimes looks for holes of the host file below data as well
        (then both data and zero are true); that is not done here.
        """
        entry: dict[str, Any] = {
            "start": self.guest_offset,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.kind is ExtentKind.COMPRESSED,
        }
        if self.kind is not ExtentKind.COMPRESSED:
            offset = self.host_offset
            if offset is None and self.node.format_name == "raw":
                offset = self.guest_offset
            if offset is not None:
                entry["offset"] = offset
        return entry


class _Range(NamedTuple):
    """A part of the walk still to do: a range of one layer."""

    node: Node
    depth: int
    guest_offset: int
    end: int


async def chain_extents(
    node: Node, guest_offset: int, length: int, limit: int | None = None
) -> list[ChainExtent]:
    """What the range is made of through the chain below `node`, in order and without gaps.

    Neighbours of one layer and kind that continue each other are one extent;
    compressed clusters stay apart. With `limit`, at most so many extents: then
    they may end before the range does. Raises what the nodes raise.
    """
    step_count = _STEP_COUNT if limit is None else min(_STEP_COUNT, limit + 1)
    result: list[ChainExtent] = []
    todo: list[_Range | ChainExtent] = []
    if length > 0:
        todo.append(_Range(node, 0, guest_offset, guest_offset + length))
    while todo:
        item = todo.pop()
        if isinstance(item, ChainExtent):
            _append(result, item)
            if limit is not None and len(result) > limit:
                # The one before is complete only now that its neighbour is known.
                return result[:limit]
            continue
        extents = await item.node.extents(
            item.guest_offset, item.end - item.guest_offset, limit=step_count
        )
        last = extents[-1]
        covered = last.guest_offset + last.length
        if covered < item.end:
            todo.append(item._replace(guest_offset=covered))
        for extent in reversed(extents):
            _push(todo, extent, item.node, item.depth)
    return result


def _push(todo: list[_Range | ChainExtent], extent: Extent, node: Node, depth: int) -> None:
    """Put on the stack what `extent` of one layer means: itself, or a range of the next."""
    kind, guest_offset, length, host_offset, stored_length = extent
    backing = node.backing
    if kind is ExtentKind.UNALLOCATED and backing is not None:
        end = guest_offset + length
        backing_end = min(end, backing.virtual_size)
        if backing_end < end:
            start = max(guest_offset, backing_end)
            if host_offset is not None:
                host_offset += start - guest_offset
            todo.append(ChainExtent(kind, start, end - start, depth, host_offset, node))
        if guest_offset < backing_end:
            todo.append(_Range(backing, depth + 1, guest_offset, backing_end))
        return
    todo.append(ChainExtent(kind, guest_offset, length, depth, host_offset, node, stored_length))


def _append(result: list[ChainExtent], extent: ChainExtent) -> None:
    """Add an extent, joined to the last one where they continue each other."""
    if result:
        last = result[-1]
        if (
            last.kind is extent.kind
            and last.kind is not ExtentKind.COMPRESSED
            and last.node is extent.node
            and _continues(last.host_offset, last.length, extent.host_offset)
        ):
            result[-1] = last._replace(length=last.length + extent.length)
            return
    result.append(extent)


def _continues(host_offset: int | None, length: int, next_offset: int | None) -> bool:
    if host_offset is None or next_offset is None:
        return host_offset is next_offset
    return host_offset + length == next_offset


async def map_entries(
    node: Node, guest_offset: int, length: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """The extents as `qemu-img map --output=json` lists them, compressed neighbours joined."""
    entries: list[dict[str, Any]] = []
    end = guest_offset + length
    while guest_offset < end:
        extents = await chain_extents(node, guest_offset, end - guest_offset, _STEP_COUNT)
        for extent in extents:
            entry = extent.as_map_entry()
            if entries and _same_entry(entries[-1], entry):
                entries[-1]["length"] += entry["length"]
            else:
                if limit is not None and len(entries) == limit:
                    return entries
                entries.append(entry)
        guest_offset = extents[-1].guest_offset + extents[-1].length
    return entries


def _same_entry(last: dict[str, Any], entry: dict[str, Any]) -> bool:
    keys = ("depth", "present", "zero", "data", "compressed")
    if any(last[key] != entry[key] for key in keys):
        return False
    return _continues(last.get("offset"), last["length"], entry.get("offset"))


async def data_or_hole(node: Node, guest_offset: int, want_data: bool) -> int | None:
    """The next offset at or after `guest_offset` that is data, or a hole.

    A hole is what reads as zeros without any layer storing it; the end of the
    disk is one. None at and past the end, and when no data follows. Each step
    looks at a bounded range and number of extents, with a checkpoint between.
    """
    size = node.virtual_size
    if guest_offset >= size:
        return None
    step_length = _SEEK_LENGTH
    while guest_offset < size:
        length = min(step_length, size - guest_offset)
        extents = await chain_extents(node, guest_offset, length, _STEP_COUNT)
        for extent in extents:
            if extent.data is want_data:
                return extent.guest_offset
        guest_offset = extents[-1].guest_offset + extents[-1].length
        step_length = min(step_length * 2, _SEEK_LENGTH_MAX)
        await trio.lowlevel.checkpoint()
    return None if want_data else size
