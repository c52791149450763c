"""A new LUKS header for a new image: its cipher, its master key, its first key slot.

Implements the LUKS row of FORMATS.md 1.4 for creation. No file is touched here:
bytes are made for `create` to place. Invariants:

- The passphrase is used and forgotten; nothing here shows it.
- Keys are derived in a worker thread, since that takes seconds by design.
"""

from dataclasses import dataclass, field
from functools import partial

import trio

from qcowfs.driver.layout.luks import HASHES, serialize_luks_header, total_length
from qcowfs.driver.transform import keys
from qcowfs.errors import BadRequest, KeyRequired

# Cipher name -> (mode of the LUKS header, key length in bytes).
CIPHERS = {
    "aes-256-xts-plain64": ("xts-plain64", 64),
    "aes-128-xts-plain64": ("xts-plain64", 32),
    "aes-256-cbc-plain64": ("cbc-plain64", 32),
    "aes-256-cbc-essiv:sha256": ("cbc-essiv:sha256", 32),
}
DEFAULT_CIPHER = "aes-256-xts-plain64"
DEFAULT_ITERATION_TIME = 2000
# The digest of the master key is no way in for a guesser: it may cost less than a slot.
_DIGEST_SHARE = 8
_LEAST_ITERATIONS = 1000
_FIRST_SLOT = 0


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a new image is to be encrypted; `iteration_time` is in milliseconds."""

    secret: bytes = field(repr=False)
    cipher: str = DEFAULT_CIPHER
    hash_name: str = "sha256"
    iteration_time: int = DEFAULT_ITERATION_TIME

    @property
    def key_length(self) -> int:
        """Bytes of the master key."""
        return CIPHERS[self.cipher][1]

    @property
    def header_length(self) -> int:
        """Bytes of the LUKS header with the room of all its key slots."""
        return total_length(self.key_length)

    def check(self) -> None:
        """Raise BadRequest for what is not supported, KeyRequired without a passphrase."""
        if self.cipher not in CIPHERS:
            raise BadRequest(f'cipher "{self.cipher}": must be one of {", ".join(CIPHERS)}')
        if self.hash_name not in HASHES:
            raise BadRequest(f'hash "{self.hash_name}": must be one of {", ".join(HASHES)}')
        if self.iteration_time <= 0:
            raise BadRequest(f"iteration time {self.iteration_time}: must be positive")
        if not self.secret:
            raise KeyRequired("an encrypted image needs a passphrase", hint="--key-file FILE")


def _make(encryption: Encryption) -> list[tuple[int, bytes]]:
    mode, key_length = CIPHERS[encryption.cipher]
    hash_name = encryption.hash_name
    iterations = keys.iterations_for(encryption.iteration_time, hash_name, key_length)
    header, master = keys.new_header(
        cipher_mode=mode,
        key_length=key_length,
        hash_name=hash_name,
        digest_iterations=max(iterations // _DIGEST_SHARE, _LEAST_ITERATIONS),
    )
    header, material = keys.close_slot(header, _FIRST_SLOT, master, encryption.secret, iterations)
    return [
        (header.slots[_FIRST_SLOT].material_offset, material),
        (0, serialize_luks_header(header)),
    ]


async def make_luks_header(encryption: Encryption) -> list[tuple[int, bytes]]:
    """The pieces (offset from the LUKS header's beginning, bytes); the rest of it is zeros."""
    return await trio.to_thread.run_sync(partial(_make, encryption), abandon_on_cancel=True)
