"""What is told of an image, with the keys and in the words that `qemu-img info` has.

Scripts read these keys, and people know the text, so both follow QEMU's to the
letter; only control characters of names out of an image are escaped in the
text, where QEMU prints them as they are. Values in, dictionaries and text out:
nothing is read here.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from qcowfs.driver.layout.bitmap_directory import BitmapEntry
from qcowfs.driver.layout.geometry import Geometry
from qcowfs.driver.layout.header import (
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    CRYPT_NONE,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    Header,
)
from qcowfs.driver.layout.luks import LuksHeader
from qcowfs.driver.layout.snapshot_table import Snapshot

_NANOSECONDS = 10**9
_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_COMPAT = {2: "0.10", 3: "1.1"}


def describe(
    header: Header,
    geometry: Geometry,
    snapshots: Sequence[Snapshot],
    *,
    filename: str,
    actual_size: int,
    dirty: bool | None = None,
    bitmaps: Sequence[BitmapEntry] = (),
    luks: LuksHeader | None = None,
) -> dict[str, Any]:
    """The facts of one image, ready for JSON.

    `filename` is the image as it was named, `actual_size` what the host has set
    aside for it, in bytes; `dirty` overrides what the header says. `geometry`
    gives the virtual size.
    """
    facts: dict[str, Any] = {}
    if snapshots:
        facts["snapshots"] = [_describe_snapshot(snapshot) for snapshot in snapshots]
    facts |= {
        "virtual-size": geometry.virtual_size,
        "filename": filename,
        "cluster-size": geometry.cluster_size,
        "format": "qcow2",
        "actual-size": actual_size,
        "format-specific": {"type": "qcow2", "data": _describe_format(header, bitmaps, luks)},
    }
    if header.backing_file is not None:
        backing = _text(header.backing_file)
        facts["full-backing-filename"] = _full_name(filename, backing)
        facts["backing-filename"] = backing
        if header.backing_format is not None:
            facts["backing-filename-format"] = header.backing_format
    if header.crypt_method != CRYPT_NONE:
        facts["encrypted"] = True
    if dirty is None:
        dirty = bool(header.incompatible & INCOMPATIBLE_DIRTY)
    facts["dirty-flag"] = dirty
    return facts


def render(facts: dict[str, Any]) -> str:
    """The text for people of what `describe` gives, or another format's facts of that shape.

    Without a newline at the end.
    """
    actual_size = facts.get("actual-size")
    disk_size = "unavailable" if actual_size is None else format_size(actual_size)
    virtual_size = facts["virtual-size"]
    lines = [
        f"image: {escape(facts['filename'])}",
        f"file format: {escape(facts['format'])}",
        f"virtual size: {format_size(virtual_size)} ({virtual_size} bytes)",
        f"disk size: {disk_size}",
    ]
    if facts.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    if facts.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in facts:
        lines += _render_backing(facts)
    if "snapshots" in facts:
        lines.append("Snapshot list:")
        lines += render_snapshots(facts["snapshots"])
    if "format-specific" in facts:
        lines.append("Format specific information:")
        lines += _render_value(facts["format-specific"]["data"], 4)
    return "\n".join(lines)


def render_snapshots(snapshots: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a snapshot list, heading included; times in the local time zone."""
    lines = [_snapshot_line("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")]
    for facts in snapshots:
        date = datetime.fromtimestamp(facts["date-sec"], tz=UTC).astimezone()
        seconds = facts["vm-clock-sec"]
        milliseconds = facts["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        lines.append(
            _snapshot_line(
                escape(facts["id"]),
                escape(facts["name"]),
                format_size(facts["vm-state-size"]),
                f"{date:%Y-%m-%d %H:%M:%S}",
                clock,
                str(facts.get("icount", "")),
            )
        )
    return lines


def format_size(length: int) -> str:
    """A size in three digits and a binary unit: "1.5 GiB"."""
    unit = 0
    # 1000 rather than 1024, so that three digits always do.
    while length / (1 << 10 * unit) >= 1000 and unit + 1 < len(_SIZE_UNITS):
        unit += 1
    return f"{length / (1 << 10 * unit):.3g} {_SIZE_UNITS[unit]}"


def escape(text: str) -> str:
    """`text` with everything escaped that a terminal might act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if snapshot.icount is not None:
        facts["icount"] = snapshot.icount
    facts |= {
        "vm-clock-nsec": snapshot.vm_clock_nsec % _NANOSECONDS,
        "name": _text(snapshot.name),
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // _NANOSECONDS,
        "id": _text(snapshot.id),
        "vm-state-size": snapshot.vm_state_size,
    }
    return facts


def _describe_format(
    header: Header, bitmaps: Sequence[BitmapEntry], luks: LuksHeader | None
) -> dict[str, Any]:
    compression = "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib"
    facts: dict[str, Any] = {"compat": _COMPAT[header.version], "compression-type": compression}
    if header.version >= 3:
        facts["lazy-refcounts"] = bool(header.compatible & COMPATIBLE_LAZY_REFCOUNTS)
        if bitmaps:
            facts["bitmaps"] = [_describe_bitmap(bitmap) for bitmap in bitmaps]
    facts["refcount-bits"] = 1 << header.refcount_order
    if header.has_data_file:
        if header.data_file is not None:
            facts["data-file"] = _text(header.data_file)
        facts["data-file-raw"] = header.data_file_raw
    if header.crypt_method == CRYPT_AES:
        facts["encrypt"] = {"format": "aes"}
    elif luks is not None:
        facts["encrypt"] = _describe_luks(luks)
    elif header.crypt_method != CRYPT_NONE:
        facts["encrypt"] = {"format": "luks"}
    if header.version >= 3:
        facts["corrupt"] = bool(header.incompatible & INCOMPATIBLE_CORRUPT)
        facts["extended-l2"] = header.extended_l2
    return facts


def _describe_bitmap(bitmap: BitmapEntry) -> dict[str, Any]:
    flags = []
    if bitmap.in_use:
        flags.append("in-use")
    if bitmap.auto:
        flags.append("auto")
    return {
        "flags": flags,
        "name": _text(bitmap.name),
        "granularity": 1 << bitmap.granularity_bits,
    }


def _describe_luks(luks: LuksHeader) -> dict[str, Any]:
    mode, _, iv_generator = luks.cipher_mode.partition("-")
    generator, _, generator_hash = iv_generator.partition(":")
    # XTS has two keys in one.
    cipher_key_length = luks.key_length // 2 if mode == "xts" else luks.key_length
    facts: dict[str, Any] = {
        "ivgen-alg": generator,
        "hash-alg": luks.hash_name,
        "cipher-alg": f"{luks.cipher_name}-{cipher_key_length * 8}",
        "uuid": luks.uuid,
    }
    if generator_hash:
        facts["ivgen-hash-alg"] = generator_hash
    facts |= {"format": "luks", "cipher-mode": mode}
    slots = []
    for slot in luks.slots:
        shown: dict[str, Any] = {"active": slot.active}
        if slot.active:
            shown["iters"] = slot.iterations
        shown["key-offset"] = slot.material_offset
        if slot.active:
            shown["stripes"] = slot.stripes
        slots.append(shown)
    facts["slots"] = slots
    facts["payload-offset"] = luks.payload_sector * 512
    facts["master-key-iters"] = luks.digest_iterations
    return facts


def _full_name(filename: str, backing: str) -> str:
    """The backing file's name as seen from where the image is: beside the image."""
    before_slash = backing.split("/", 1)[0]
    if backing.startswith("/") or ":" in before_slash:
        return backing
    return filename[: filename.rfind("/") + 1] + backing


def _render_backing(facts: dict[str, Any]) -> list[str]:
    name = facts["backing-filename"]
    full_name = facts.get("full-backing-filename", name)
    line = f"backing file: {escape(name)}"
    if full_name != name:
        line += f" (actual path: {escape(full_name)})"
    lines = [line]
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {escape(facts['backing-filename-format'])}")
    return lines


def _snapshot_line(
    snapshot_id: str, name: str, vm_size: str, date: str, clock: str, icount: str
) -> str:
    return f"{snapshot_id:<9} {name:<16} {vm_size:>8}{date:>20}{clock:>13}{icount:>11}"


def _render_value(value: Any, indent: int) -> list[str]:
    """The lines of a dictionary or list, each level four columns further in."""
    items: list[tuple[str, Any]]
    if isinstance(value, dict):
        items = [(key.replace("-", " "), item) for key, item in value.items()]
    else:
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    lines = []
    for key, item in items:
        if isinstance(item, dict | list):
            lines.append(f"{'':{indent}}{key}:")
            lines += _render_value(item, indent + 4)
        else:
            shown = str(item).lower() if isinstance(item, bool) else escape(str(item))
            lines.append(f"{'':{indent}}{key}: {shown}")
    return lines
