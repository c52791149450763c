"""Every change of the header: pointer switches, feature bits, whole rewrites.

Implements docs/interop/qcow2, "Header", for changes. The only module that
writes the header cluster. May not: allocate, free, know what the pointers
lead to. Invariants:

- Fields that belong together go out in one write inside the first 512 bytes,
  followed by a sync; `header` in memory changes only after that.
- What the new pointers lead to has been made durable by the caller.
"""

import dataclasses
import logging
import struct

from qcowfs.driver.layout import header as fields
from qcowfs.driver.layout.header import Header
from qcowfs.driver.qcow2.guard import HEADER, MetadataWriter
from qcowfs.errors import ReadOnlyImage

logger = logging.getLogger(__name__)

# Autoclear features whose data stays true through every change that is made here.
_KEPT_AUTOCLEAR = fields.AUTOCLEAR_DATA_FILE_RAW


class HeaderSwitch:
    """The header of one image, `header`, and the writes that change it; lock held for all."""

    __slots__ = ("_writer", "header")

    def __init__(self, writer: MetadataWriter, header: Header) -> None:
        self._writer = writer
        self.header = header

    def check_may_write(self) -> None:
        """Raise ReadOnlyImage when the header's flags forbid to write before a repair."""
        if self.header.incompatible & fields.INCOMPATIBLE_CORRUPT:
            raise ReadOnlyImage("the image is marked as corrupt: it can be read only")
        if self.header.incompatible & fields.INCOMPATIBLE_DIRTY:
            raise ReadOnlyImage("the image is marked as dirty: its refcounts need a repair first")

    async def clear_autoclear(self, name: str) -> None:
        """Clear the autoclear bits of data that is not kept up to date here; durable."""
        kept = self.header.autoclear & _KEPT_AUTOCLEAR
        if kept == self.header.autoclear:
            return
        if self.header.autoclear & fields.AUTOCLEAR_BITMAPS:
            logger.warning(
                "%s: writing to the image makes its dirty bitmaps invalid; they are marked so", name
            )
        await self._write(fields.autoclear_field(kept))
        self.header = dataclasses.replace(self.header, autoclear=kept)

    async def set_l1(self, l1_size: int, l1_table_offset: int, virtual_size: int) -> None:
        """Switch to another active L1 table, and to a disk size with it; durable."""
        place, data = fields.l1_field(l1_size, l1_table_offset)
        if virtual_size != self.header.virtual_size:
            # Size, encryption method and L1 fields are neighbours in one sector.
            size_place, size_data = fields.virtual_size_field(virtual_size)
            method = struct.pack(">I", self.header.crypt_method)
            assert size_place + len(size_data) + len(method) == place
            place, data = size_place, size_data + method + data
        await self._write((place, data))
        self.header = dataclasses.replace(
            self.header,
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            virtual_size=virtual_size,
        )

    async def set_refcount_table(self, table_offset: int, cluster_count: int) -> None:
        """Switch to another refcount table; durable."""
        await self._write(fields.refcount_table_field(table_offset, cluster_count))
        self.header = dataclasses.replace(
            self.header,
            refcount_table_offset=table_offset,
            refcount_table_clusters=cluster_count,
        )

    async def set_snapshots(self, snapshot_count: int, table_offset: int) -> None:
        """Switch to another snapshot table; durable."""
        await self._write(fields.snapshots_field(snapshot_count, table_offset))
        self.header = dataclasses.replace(
            self.header, nb_snapshots=snapshot_count, snapshots_offset=table_offset
        )

    async def write_whole(self, header: Header) -> None:
        """Rewrite the header cluster, extensions included; durable. Raises ImageFull."""
        await self._write((0, fields.serialize(header)))
        self.header = header

    async def _write(self, place_and_data: tuple[int, bytes]) -> None:
        place, data = place_and_data
        await self._writer.write(HEADER, place, [data])
        await self._writer.sync()
