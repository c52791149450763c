"""Changing who can open an encrypted image: key slots added and removed, at rest.

Implements the LUKS row of FORMATS.md 1.4 and the slots of FORMATS.md 2. Writes
through the metadata's one door, into the clusters of the LUKS header alone.
Invariants:

- A new slot's material and fields are durable before the word that calls the
  slot active, which is one write of four bytes: a slot may lie on a boundary of
  512 bytes, so it cannot be written whole.
- The material of a slot that is removed is overwritten first, so that a crash
  leaves a slot that opens nothing rather than one that can be brought back.
- The last slot is removed only by force: nothing opens the image after that.
"""

import os
from functools import partial

import trio

from qcowfs.driver.layout.luks import (
    SLOT_COUNT,
    KeySlot,
    LuksHeader,
    serialize_luks_slot,
    slot_offset,
)
from qcowfs.driver.qcow2 import guard
from qcowfs.driver.qcow2.metadata import Metadata
from qcowfs.driver.qcow2.unlocking import read_luks_header, read_materials, unlock_master_key
from qcowfs.errors import BadRequest, CorruptImage, ImageFull, KeyRequired, NotFound

_SECTOR = 512
_STATE_LENGTH = 4


async def load_luks(metadata: Metadata) -> LuksHeader:
    """The LUKS header as it is now. Raises BadRequest for an image that has none."""
    if metadata.header.crypto() is None:
        raise BadRequest("the image has no LUKS header, so it has no key slots")
    return await read_luks_header(metadata.storage, metadata.header)


async def add_key(
    metadata: Metadata,
    secret: bytes,
    new_secret: bytes,
    *,
    index: int | None = None,
    iteration_time: int,
) -> int:
    """Let `new_secret` open the image as `secret` does; answers the slot, durable on return.

    `index` is the slot to use, by default the first one that is free;
    `iteration_time` is in milliseconds. Raises KeyRequired, BadRequest (the
    slot is in use), ImageFull (all are), CorruptImage, ReadOnlyImage, OSError.
    """
    from qcowfs.driver.transform import keys

    await metadata.prepare_writing()
    luks = await load_luks(metadata)
    free = [number for number, slot in enumerate(luks.slots) if not slot.active]
    if index is None:
        if not free:
            raise ImageFull(f"all {SLOT_COUNT} key slots are in use")
        index = free[0]
    elif not 0 <= index < SLOT_COUNT:
        raise BadRequest(f"key slot {index}: 0 to {SLOT_COUNT - 1}")
    elif index not in free:
        raise BadRequest(f"key slot {index} is in use")
    _check_room(metadata, luks, index)
    materials = await read_materials(metadata.storage, metadata.header, luks)
    master = await unlock_master_key(luks, materials, secret)

    def work() -> tuple[LuksHeader, bytes]:
        iterations = keys.iterations_for(iteration_time, luks.hash_name, luks.key_length)
        return keys.close_slot(luks, index, master, new_secret, iterations)

    changed, material = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    data = serialize_luks_slot(changed.slots[index])
    place = slot_offset(index)
    with trio.CancelScope(shield=True):
        async with metadata.lock:
            await _write(metadata, changed.slots[index].material_offset, material)
            await _write(metadata, place + _STATE_LENGTH, data[_STATE_LENGTH:])
            await metadata.writer.sync()
            await _write(metadata, place, data[:_STATE_LENGTH])
            await metadata.writer.sync()
    return index


async def slots_opened_by(metadata: Metadata, secret: bytes) -> list[int]:
    """The slots that a passphrase opens. Raises KeyRequired when there are none."""
    from qcowfs.driver.transform.keys import open_slot

    luks = await load_luks(metadata)
    opened = []
    materials = await read_materials(metadata.storage, metadata.header, luks)
    for index, material in materials.items():
        work = partial(open_slot, luks, index, secret, material)
        if await trio.to_thread.run_sync(work, abandon_on_cancel=True) is not None:
            opened.append(index)
    if not opened:
        raise KeyRequired("the passphrase is wrong: it opens no key slot")
    return opened


async def remove_slots(metadata: Metadata, indexes: list[int], *, force: bool = False) -> None:
    """Overwrite key slots, so that their passphrases open nothing any more; durable on return.

    Raises NotFound (no such slot in use), BadRequest (no slot would be left,
    and no force), CorruptImage, ReadOnlyImage, OSError.
    """
    await metadata.prepare_writing()
    luks = await load_luks(metadata)
    active = {number for number, slot in enumerate(luks.slots) if slot.active}
    for index in indexes:
        if index not in active:
            raise NotFound(f"key slot {index} is not in use")
    if active <= set(indexes) and not force:
        raise BadRequest(
            "no key slot would be left, and nothing could open the image again", hint="--force"
        )
    length = -(-luks.material_length // _SECTOR) * _SECTOR
    with trio.CancelScope(shield=True):
        async with metadata.lock:
            for index in indexes:
                slot = luks.slots[index]
                await _write(metadata, slot.material_offset, os.urandom(length))
                await metadata.writer.sync()
                empty = KeySlot(False, 0, bytes(len(slot.salt)), slot.material_sector, slot.stripes)
                await _write(metadata, slot_offset(index), serialize_luks_slot(empty))
                await metadata.writer.sync()


def _check_room(metadata: Metadata, luks: LuksHeader, index: int) -> None:
    """Raise CorruptImage unless a free slot's material has a place of its own."""
    place = metadata.header.crypto()
    assert place is not None
    length = -(-luks.material_length // _SECTOR) * _SECTOR
    start = luks.slots[index].material_offset
    fits = slot_offset(SLOT_COUNT) <= start and start + length <= place.length
    for number, slot in enumerate(luks.slots):
        other = slot.material_offset
        if slot.active and number != index and start < other + length and other < start + length:
            fits = False
    if not fits:
        raise CorruptImage(
            f"key slot {index} of the LUKS header has no room of its own for its material, "
            f"which would begin at {start:#x}",
            structure="LUKS header",
            index=index,
        )


async def _write(metadata: Metadata, offset: int, data: bytes) -> None:
    """Write into the LUKS header, `offset` from its beginning."""
    place = metadata.header.crypto()
    assert place is not None
    await metadata.writer.write(guard.CRYPTO_HEADER, place.offset + offset, [data])
