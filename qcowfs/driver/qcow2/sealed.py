"""An image that was opened without its guest data: described, and its snapshots managed.

Neither a passphrase nor an external data file is asked for where only tables
are read or changed. Invariant: no guest byte is read or written through what
is here, so that nobody takes ciphertext, or another file's bytes, for the disk.
"""

from typing import Never

from qcowfs.driver.node import Buffer
from qcowfs.driver.qcow2.reading import Reader
from qcowfs.driver.qcow2.writing import Writer
from qcowfs.errors import BadRequest


def _refuse() -> Never:
    raise BadRequest("the image was opened without its guest data")


class SealedReader(Reader):
    """Tells what a disk is made of; every read raises BadRequest."""

    __slots__ = ()

    def try_read_into(self, guest_offset: int, buffer: memoryview) -> bool:
        """Raises BadRequest."""
        _refuse()

    async def read_into(self, guest_offset: int, buffer: memoryview) -> None:
        """Raises BadRequest."""
        _refuse()


class SealedWriter(Writer):
    """Writes nothing; every change of guest data raises BadRequest."""

    __slots__ = ()

    async def prepare(self) -> None:
        """Raises BadRequest."""
        _refuse()

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """Raises BadRequest."""
        _refuse()

    async def write_entered(self, guest_offset: int, data: Buffer) -> None:
        """Raises BadRequest."""
        _refuse()
