"""L1 tables in memory: the active one with its dirty entries, and snapshots' read-only ones.

Implements the L1 table of docs/interop/qcow2, "Cluster mapping". May not:
allocate, read L2 tables, write guest data. Invariants:

- `words` are kept as they lie in the file, but in native byte order.
- An entry that changed stays in `dirty` until a commit has made it durable.
"""

from array import array

from qcowfs.driver.layout.geometry import SECTOR, Geometry
from qcowfs.driver.layout.mapping import l1_entry_offset, load_words, store_words
from qcowfs.driver.qcow2.guard import L1_TABLE, MetadataWriter
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage


class L1View:
    """One L1 table: of the active disk (`writable`) or of a snapshot.

    `table_offset` in bytes of the image file, `virtual_size` in guest bytes of
    that disk; `words` one entry per L2 table.
    """

    __slots__ = ("dirty", "geometry", "table_offset", "virtual_size", "words", "writable")

    def __init__(
        self,
        words: "array[int]",
        table_offset: int,
        geometry: Geometry,
        *,
        writable: bool,
    ) -> None:
        self.words = words
        self.table_offset = table_offset
        self.geometry = geometry
        self.virtual_size = geometry.virtual_size
        self.writable = writable
        self.dirty: set[int] = set()

    def table_at(self, l1_index: int, file_size: int) -> int:
        """The host offset of an L2 table, 0 when there is none.

        Raises CorruptImage for reserved bits, an offset that is not
        cluster-aligned, or one at or past `file_size`.
        """
        entry = self.words[l1_index]
        table_offset = l1_entry_offset(entry, l1_index, self.geometry)
        if table_offset >= file_size:
            raise CorruptImage(
                f"L1 entry {l1_index} ({entry:#018x}): the L2 table at {table_offset:#x} "
                f"lies past the end of the file ({file_size:#x})",
                structure="L1 table",
                index=l1_index,
                host_offset=table_offset,
            )
        return table_offset

    def set_entry(self, l1_index: int, entry: int) -> None:
        """Change one entry in memory; the next commit publishes it."""
        self.words[l1_index] = entry
        self.dirty.add(l1_index)

    async def write_dirty(self, writer: MetadataWriter) -> None:
        """Write the sectors that hold dirty entries, neighbours in one write."""
        words_per_sector = SECTOR // 8
        sectors = sorted({l1_index // words_per_sector for l1_index in self.dirty})
        place = 0
        while place < len(sectors):
            first = last = sectors[place]
            while place + 1 < len(sectors) and sectors[place + 1] == last + 1:
                place += 1
                last = sectors[place]
            place += 1
            words = self.words[first * words_per_sector : (last + 1) * words_per_sector]
            await writer.write(L1_TABLE, self.table_offset + first * SECTOR, [store_words(words)])


async def load_l1(storage: Storage, table_offset: int, entry_count: int) -> "array[int]":
    """The words of an L1 table; its place and size must have been checked by the caller."""
    if not entry_count:
        return array("Q")
    return load_words(await storage.pread(entry_count * 8, table_offset))
