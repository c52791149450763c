"""The exceptions of qcowfs: each class carries the errno that its cause deserves.

A message names the structure, the index, the hex value and the rule that was
broken, in one line, so that it can be printed after ``qcowfs: FILE:`` as it is.
"""

import errno
from typing import ClassVar


class QcowfsError(Exception):
    """Base of all expected errors; `errno` is what a system call would answer.

    `structure`, `index` and `host_offset` are facts for programs and log
    records; the message (`str(error)`) already contains what a reader needs.
    """

    errno: ClassVar[int] = errno.EIO

    def __init__(
        self,
        message: str,
        *,
        structure: str | None = None,
        index: int | None = None,
        host_offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.structure = structure
        self.index = index
        self.host_offset = host_offset
        self.hint = hint


class CorruptImage(QcowfsError):
    """The bytes of an image break a rule of its format."""

    errno: ClassVar[int] = errno.EIO


class UnsupportedFeature(QcowfsError):
    """The image, or the request, needs something that cannot be done here."""

    errno: ClassVar[int] = errno.ENOTSUP


class ReadOnlyImage(QcowfsError):
    """A change was asked of an image that is read-only or in failsafe."""

    errno: ClassVar[int] = errno.EROFS


class BadRequest(QcowfsError):
    """The caller's arguments are wrong."""

    errno: ClassVar[int] = errno.EINVAL


class NotFound(QcowfsError):
    """There is no such snapshot, bitmap or file."""

    errno: ClassVar[int] = errno.ENOENT


class AlreadyExists(QcowfsError):
    """The name is taken."""

    errno: ClassVar[int] = errno.EEXIST


class ImageBusy(QcowfsError):
    """Another process, or another user of the same mount, holds the image."""

    errno: ClassVar[int] = errno.EBUSY


class KeyRequired(QcowfsError):
    """A secret is missing or wrong."""

    errno: ClassVar[int] = errno.EACCES


class ImageFull(QcowfsError):
    """There is no room: in the image, in a table, or behind its end."""

    errno: ClassVar[int] = errno.ENOSPC
