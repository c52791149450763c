"""The passphrases that an image and its backing layers need, kept out of sight.

A container and no more: it reads no file and opens nothing. Invariant: nothing
that prints, logs or compares a `Secrets` shows a passphrase, and neither does
whatever holds one as a field.
"""

import os
from collections.abc import Mapping


class Secrets:
    """Passphrases by the path of the image file that they open.

    `default` is for every layer that has none of its own.
    """

    __slots__ = ("_by_path", "_default")

    def __init__(
        self,
        default: bytes | None = None,
        by_path: Mapping[str | os.PathLike[str], bytes] | None = None,
    ) -> None:
        self._default = default
        items = by_path.items() if by_path is not None else ()
        self._by_path = {os.path.realpath(path): secret for path, secret in items}

    def of(self, path: str | os.PathLike[str]) -> bytes | None:
        """The passphrase for the image file at `path`, or None."""
        if not self._by_path:
            return self._default
        return self._by_path.get(os.path.realpath(path), self._default)

    def __repr__(self) -> str:
        return "<Secrets>"
