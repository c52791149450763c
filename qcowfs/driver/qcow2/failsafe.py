"""Read-only failsafe: what an image falls back to when its state can no longer be trusted.

Implements the corrupt bit of docs/interop/qcow2, "Incompatible features", and
the damage table of driver/README.md. May not: know tables, commit, allocate.
Invariants:

- Entered once, with one log line; there is no way back but to open the image
  again.
- From then on nothing is written, the corrupt bit excepted.
"""

import logging
from types import TracebackType
from typing import Literal, NoReturn

from qcowfs.driver.layout import header as fields
from qcowfs.driver.layout.header import Header
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage, QcowfsError, ReadOnlyImage

logger = logging.getLogger(__name__)


def describe(error: BaseException) -> str:
    """An exception as one line for a log record."""
    if isinstance(error, QcowfsError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


class Changing:
    """A block in which memory and file may disagree: an exception out of it means failsafe."""

    __slots__ = ("_failsafe",)

    def __init__(self, failsafe: "Failsafe") -> None:
        self._failsafe = failsafe

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        if error is not None:
            self._failsafe.enter(describe(error), corrupt=isinstance(error, CorruptImage))
        return False


class Failsafe:
    """Whether an image may be changed; `reason` is why not any more, None while all is well.

    `can_write` is True between a successful preparation and failsafe; `header`
    is the image's, for its incompatible bits.
    """

    __slots__ = ("_corrupt_bit_due", "_storage", "can_write", "header", "read_only", "reason")

    def __init__(self, storage: Storage, header: Header, *, read_only: bool) -> None:
        self._storage = storage
        self.header = header
        self._corrupt_bit_due = False
        self.read_only = read_only
        self.can_write = False
        self.reason: str | None = None

    def check(self) -> None:
        """Raise ReadOnlyImage when the image is read-only or in failsafe."""
        if self.reason is not None:
            raise ReadOnlyImage(f"the image went read-only: {self.reason}")
        if self.read_only:
            raise ReadOnlyImage("the image is open read-only")

    def enter(self, reason: str, *, corrupt: bool = False) -> None:
        """Go into failsafe, with one log line the first time; later calls do nothing.

        `corrupt` sets the corrupt bit on disk, at once where the storage
        writes without waiting and else by `write_corrupt_bit`.
        """
        if self.reason is not None:
            return
        self.reason = reason
        self.can_write = False
        logger.error("%s: %s; the image is read-only from now on", self._storage.name, reason)
        if not corrupt or self.read_only or self.header.version < 3:
            return
        place, data = self._corrupt_field()
        try:
            self._corrupt_bit_due = not self._storage.try_pwrite([data], place)
        except OSError as error:
            logger.warning("%s: cannot set the corrupt bit: %s", self._storage.name, error)

    def report(self, error: CorruptImage) -> NoReturn:
        """Go into failsafe with the corrupt bit set, and raise the error."""
        self.enter(describe(error), corrupt=True)
        raise error

    def sync_failed(self, error: BaseException) -> None:
        """A sync failed: what it should have made durable may be lost for good."""
        self.enter(f"a sync of the host file failed: {describe(error)}")

    async def write_corrupt_bit(self) -> None:
        """Set the corrupt bit if that could not be done at once; never raises OSError."""
        if not self._corrupt_bit_due:
            return
        self._corrupt_bit_due = False
        place, data = self._corrupt_field()
        try:
            await self._storage.pwrite([data], place)
        except OSError as error:
            logger.warning("%s: cannot set the corrupt bit: %s", self._storage.name, error)

    def _corrupt_field(self) -> tuple[int, bytes]:
        return fields.incompatible_field(self.header.incompatible | fields.INCOMPATIBLE_CORRUPT)
