"""From a qcow2 header and a passphrase to the open cipher of the image.

Implements the encryption rows of FORMATS.md 1.1 and 1.4: the LUKS header that
the crypto extension names, and the old AES method, whose key is the passphrase
itself. Nothing is written here. Invariants:

- No size out of a header is believed before it is held against the file.
- Deriving a key takes seconds by design, and as long as the header likes within
  its limits: it runs in a thread that a cancelled caller leaves behind.
- No passphrase and no key is in a message.
"""

from functools import partial

import trio

from qcowfs.driver.layout.header import CRYPT_AES, CRYPT_LUKS, Header
from qcowfs.driver.layout.luks import HEADER_LENGTH, SECTOR, LuksHeader, parse_luks_header
from qcowfs.driver.qcow2.ciphering import Ciphering
from qcowfs.driver.storage import Storage
from qcowfs.errors import CorruptImage, KeyRequired

_AES_KEY_LENGTH = 16


async def read_luks_header(storage: Storage, header: Header) -> LuksHeader:
    """The LUKS header of an image that has one.

    Raises CorruptImage, UnsupportedFeature, OSError.
    """
    place = header.crypto()
    assert place is not None
    offset, length = place.offset, place.length
    size = storage.size()
    if not offset or offset & (header.cluster_size - 1) or offset >= size:
        raise CorruptImage(
            f"crypto extension: the LUKS header at {offset:#x} is not aligned to a cluster, "
            "or outside the file",
            structure="header",
            host_offset=offset,
        )
    if length < HEADER_LENGTH or offset + length > -(-size // header.cluster_size) * (
        header.cluster_size
    ):
        raise CorruptImage(
            f"crypto extension: the LUKS header of {length} bytes at {offset:#x} is too short, "
            "or reaches past the end of the file",
            structure="header",
            host_offset=offset,
        )
    return parse_luks_header(bytes(await storage.pread(HEADER_LENGTH, offset)), length)


async def read_materials(storage: Storage, header: Header, luks: LuksHeader) -> dict[int, bytes]:
    """The key material of each active slot, whole sectors, by slot index. Raises OSError."""
    place = header.crypto()
    assert place is not None
    length = -(-luks.material_length // SECTOR) * SECTOR
    return {
        index: bytes(await storage.pread(length, place.offset + slot.material_offset))
        for index, slot in enumerate(luks.slots)
        if slot.active
    }


async def unlock_master_key(luks: LuksHeader, materials: dict[int, bytes], secret: bytes) -> bytes:
    """The master key, from whichever slot the passphrase opens. Raises KeyRequired."""
    from qcowfs.driver.transform.keys import unlock

    if not materials:
        raise KeyRequired("no key slot of the image is in use: nothing can open it")
    work = partial(unlock, luks, secret, materials.__getitem__)
    key = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    if key is None:
        raise KeyRequired("the passphrase is wrong: it opens no key slot")
    return key


async def open_cipher(
    storage: Storage, header: Header, luks: LuksHeader | None, secret: bytes | None
) -> Ciphering | None:
    """The cipher of an image, whose LUKS header has been read; None where nothing is encrypted.

    Raises KeyRequired when `secret` is missing or wrong (the old AES method
    cannot tell a wrong one), UnsupportedFeature, OSError.
    """
    if header.crypt_method not in (CRYPT_AES, CRYPT_LUKS):
        return None
    if not secret:
        raise KeyRequired("the image is encrypted", hint="--key-file FILE")
    from qcowfs.driver.transform.cipher import CbcCipher, make_cipher

    if luks is None:
        key = secret[:_AES_KEY_LENGTH].ljust(_AES_KEY_LENGTH, b"\0")
        return Ciphering(CbcCipher(key), by_guest_offset=True)
    master = await unlock_master_key(luks, await read_materials(storage, header, luks), secret)
    cipher = make_cipher(luks.cipher_name, luks.cipher_mode, master)
    return Ciphering(cipher, by_guest_offset=False)
