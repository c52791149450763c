"""What the metadata of one open image consists of, and its state: wiring, no I/O.

May not: wait, read or write. Invariants:

- Every part knows only the parts that it was given here.
- `can_write` is True only after a preparation, never again in failsafe.
"""

from array import array

import trio

from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.layout.header import Header
from qcowfs.driver.qcow2.allocator import Allocator
from qcowfs.driver.qcow2.commit import Committer
from qcowfs.driver.qcow2.counters import Counters
from qcowfs.driver.qcow2.failsafe import Changing, Failsafe
from qcowfs.driver.qcow2.guard import MetadataWriter, ProtectedMap
from qcowfs.driver.qcow2.l1 import L1View
from qcowfs.driver.qcow2.l2_tables import L2Tables
from qcowfs.driver.qcow2.lookup import Lookup
from qcowfs.driver.qcow2.refcounting import RefcountCache
from qcowfs.driver.qcow2.requests import Requests
from qcowfs.driver.qcow2.switching import HeaderSwitch
from qcowfs.driver.qcow2.tables import TableCache
from qcowfs.driver.storage import Storage

DEFAULT_CACHE_SIZE = 32 << 20


class Parts(Lookup):
    """The parts of one image's metadata; `Metadata` puts them to work.

    `storage` holds the metadata, `data_storage` the guest data (the same
    object without an external data file). Offsets and lengths in bytes.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        *,
        read_only: bool,
        cache_size: int = DEFAULT_CACHE_SIZE,
        data_storage: Storage | None = None,
        requests: Requests | None = None,
    ) -> None:
        """Wire the parts; no I/O. Use `Metadata.open`."""
        geometry = header.geometry()
        self.data_storage = data_storage if data_storage is not None else storage
        self.geometry: Geometry = geometry
        self.lock = trio.Lock()
        self.requests = requests if requests is not None else Requests()
        self.counters = counters = Counters()
        self._state = state = Failsafe(storage, header, read_only=read_only)
        self.protected = ProtectedMap(geometry.cluster_bits)
        self.writer = MetadataWriter(
            storage,
            geometry,
            self.protected,
            counters,
            state.check,
            state.report,
            state.sync_failed,
        )
        tables = TableCache(storage, self.writer, geometry, counters, cache_size * 3 // 4)
        super().__init__(storage, geometry, tables)
        self.refcounts = RefcountCache(
            storage, self.writer, geometry, counters, cache_size // 4, state.report
        )
        self.active = L1View(array("Q"), header.l1_table_offset, geometry, writable=True)
        self.switch = HeaderSwitch(self.writer, header)
        self.allocator = Allocator(
            storage,
            geometry,
            self.refcounts,
            self.protected,
            self.tables,
            self.requests,
            counters,
            state.check,
            state.report,
        )
        self._frees = self.allocator.frees
        self._l2_tables = L2Tables(
            self.writer,
            geometry,
            self.tables,
            self.allocator,
            self.protected,
            self.active,
            state.report,
        )
        self._committer = Committer(
            self.writer,
            self.data_storage,
            self.tables,
            self.refcounts,
            self.allocator,
            self.protected,
            self.switch,
            self.requests,
            counters,
        )
        self._changing = Changing(state)

    @property
    def header(self) -> Header:
        """The header as it is on disk, or will be after the commit under way."""
        return self.switch.header

    @property
    def files(self) -> tuple[Storage, ...]:
        """The image file, and the external data file if there is one."""
        if self.data_storage is self.storage:
            return (self.storage,)
        return self.storage, self.data_storage

    @property
    def dirty(self) -> bool:
        """Whether a commit has something to write."""
        return bool(
            self.tables.dirty or self.active.dirty or self.refcounts.dirty or self._frees.pending
        )

    def statistics(self) -> dict[str, int]:
        """Totals since the image was opened, by name; see `Counters`."""
        return self.counters.as_dict() | {"slice_hits": self.tables.hits}

    @property
    def failsafe(self) -> str | None:
        """Why the image went read-only, None while all is well."""
        return self._state.reason

    @property
    def can_write(self) -> bool:
        """Whether changes are possible now: prepared, not read-only, not in failsafe."""
        return self._state.can_write

    @property
    def read_only(self) -> bool:
        """Whether changes are refused, from the beginning or by failsafe."""
        return self._state.read_only or self._state.reason is not None

    @property
    def name(self) -> str:
        """The image file's name, for messages."""
        return self.storage.name

    def check_writable(self) -> None:
        """Raise ReadOnlyImage when the image is read-only or in failsafe."""
        self._state.check()

    @property
    def under_pressure(self) -> bool:
        """Whether so much waits for a commit that one must come before the next change."""
        return (
            len(self.tables.dirty) >= self.tables.dirty_limit
            or len(self.refcounts.dirty_blocks) >= self.refcounts.dirty_limit
            or len(self._frees.pending) >= self._frees.pending_limit
        )

    def changing(self) -> Changing:
        """A context manager: any exception out of it puts the image into failsafe.

        CorruptImage also sets the corrupt bit on disk. For the steps after
        which memory would not be what the tables say.
        """
        return self._changing

    def enter_failsafe(self, reason: str, *, corrupt: bool = False) -> None:
        """From now on read-only: reads go on, writes raise ReadOnlyImage, nothing is written.

        One log line the first time. `corrupt` sets the corrupt bit on disk,
        the one exception to "nothing is written".
        """
        self._state.enter(reason, corrupt=corrupt)
