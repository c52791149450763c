"""What the nodes of qcow and COW images have in common: range checks, failsafe, flush, the end.

It knows no format and no table. A format fills in how its changes are
committed and whether there are any. Invariants:

- One commit at a time, shielded from cancellation; a failed sync makes the node
  read-only (failsafe), with one log record.
- A read-only node writes nothing to any file, not even a sync is asked for.
- Closing flushes, then closes the file, then the backing chain, whatever fails.
"""

import logging
from typing import Any

import trio

from qcowfs.driver.node import Node
from qcowfs.driver.storage import Storage
from qcowfs.errors import BadRequest, QcowfsError, ReadOnlyImage

logger = logging.getLogger(__name__)

# What has been changed for so long is committed without being asked, in seconds.
COMMIT_AFTER = 5.0


class ImageBase:
    """An image over `storage`, which it owns with its backing node, and closes."""

    format_name = ""

    def __init__(
        self, storage: Storage, path: str, virtual_size: int, backing: Node | None
    ) -> None:
        self._storage = storage
        self._commit_lock = trio.Lock()
        self._closed = False
        self.name = path
        self.virtual_size = virtual_size
        self.backing = backing
        self.failsafe: str | None = None
        self.commits = 0

    # For the formats to fill in

    def _has_changes(self) -> bool:
        """Whether a commit would write tables."""
        raise NotImplementedError

    async def _commit(self) -> None:
        """Make everything acknowledged durable, in the order of the format; one at a time."""
        raise NotImplementedError

    # Whether and where

    @property
    def read_only(self) -> bool:
        """Whether a write would be refused: opened so, or failsafe."""
        return self.failsafe is not None or self._storage.read_only

    def enter_failsafe(self, reason: str) -> None:
        """Refuse every later change, with one log record; the first reason stays."""
        if self.failsafe is None:
            self.failsafe = reason
            logger.error("%s is read-only from now on: %s", self.name, reason)

    def check_range(self, guest_offset: int, length: int) -> None:
        """Raise BadRequest for a range that is not inside the disk."""
        if guest_offset < 0 or length < 0 or guest_offset + length > self.virtual_size:
            raise BadRequest(
                f"{length} bytes at {guest_offset:#x} are not inside the disk of "
                f"{self.virtual_size} bytes"
            )

    def check_change(self, guest_offset: int, length: int) -> None:
        """Raise ReadOnlyImage, or BadRequest as `check_range`."""
        if self.failsafe is not None or self._storage.read_only:
            self._check_failsafe()
            raise ReadOnlyImage("the image is open for reading alone")
        self.check_range(guest_offset, length)

    def _check_failsafe(self) -> None:
        if self.failsafe is not None:
            raise ReadOnlyImage(f"the image is read-only since an error: {self.failsafe}")

    # Durability and the end

    async def sync_storage(self) -> None:
        """Sync the file; a failure is final."""
        try:
            await self._storage.sync()
        except OSError as error:
            self.enter_failsafe(f"its file could not be synced: {error.strerror}")
            raise

    async def commit(self) -> None:
        """Commit, one at a time, whatever happens to the task that asks for it."""
        with trio.CancelScope(shield=True):
            async with self._commit_lock:
                self._check_failsafe()
                await self._commit()

    async def flush(self) -> None:
        """Make everything acknowledged so far durable. Raises ReadOnlyImage, OSError."""
        if self.read_only:
            self._check_failsafe()
            return
        await self.commit()

    async def maintain(self) -> None:
        """Commit every few seconds what has been changed; runs until cancelled.

        A failure is logged (once while it lasts) and tried again.
        """
        failed = False
        while True:
            await trio.sleep(COMMIT_AFTER)
            if self.read_only or not self._has_changes():
                continue
            try:
                await self.flush()
                failed = False
            except (OSError, QcowfsError) as error:
                if not failed:
                    logger.warning("%s: cannot commit: %s", self.name, error)
                failed = True

    async def aclose(self) -> None:
        """Flush, close the file and the backing chain; what failed first is raised in the end."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                if not self.read_only:
                    await self.flush()
            finally:
                try:
                    await self._storage.aclose()
                finally:
                    if self.backing is not None:
                        await self.backing.aclose()

    def _facts(
        self, cluster_size: int, backing_file: bytes | None, *, encrypted: bool = False
    ) -> dict[str, Any]:
        """What qemu-img info tells of any image, under its keys."""
        facts: dict[str, Any] = {
            "virtual-size": self.virtual_size,
            "filename": self.name,
            "cluster-size": cluster_size,
            "format": self.format_name,
            "actual-size": self._storage.allocated_bytes(),
        }
        if encrypted:
            facts["encrypted"] = True
        if backing_file is not None:
            name = backing_file.decode("utf-8", "backslashreplace")
            facts["full-backing-filename"] = self._full_name(name)
            facts["backing-filename"] = name
        facts["dirty-flag"] = False
        return facts

    def _full_name(self, name: str) -> str:
        """A backing file's name from the folder of the image as that was named."""
        scheme, colon, _ = name.partition(":")
        folder, slash, _ = self.name.rpartition("/")
        if name.startswith("/") or (colon and "/" not in scheme):
            return name
        return f"{folder}{slash}{name}"
