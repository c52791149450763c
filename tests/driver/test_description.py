"""Descriptions of images, held against qemu-img info word for word."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcowfs.driver.layout.bitmap_directory import (
    BitmapEntry,
    parse_bitmap_directory,
    parse_bitmap_extension,
)
from qcowfs.driver.layout.extensions import EXTENSION_BITMAPS, EXTENSION_CRYPTO, Extension
from qcowfs.driver.layout.header import parse_header, serialize
from qcowfs.driver.layout.luks import (
    STRIPES,
    KeySlot,
    LuksHeader,
    empty_slots,
    parse_luks_header,
    serialize_luks_header,
    total_length,
)
from qcowfs.driver.layout.snapshot_table import parse_snapshot_table
from qcowfs.driver.qcow2.description import describe, format_size, render

SECRET = ("--object", "secret,id=s,data=abc")


def run(*command: str | Path) -> str:
    """The standard output of a command that has to succeed."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def facts_of(path: Path) -> dict[str, Any]:
    """The description of an image file, everything it can hold included."""
    with path.open("rb+") as file:
        # What the host has set aside is settled only once it is written out.
        os.fsync(file.fileno())
        data = file.read()
    header = parse_header(data, len(data))
    geometry = header.geometry()
    snapshots = parse_snapshot_table(data[header.snapshots_offset :], header.nb_snapshots)
    luks: LuksHeader | None = None
    if crypto := header.crypto():
        luks = parse_luks_header(data[crypto.offset : crypto.offset + crypto.length], crypto.length)
    bitmaps: tuple[BitmapEntry, ...] = ()
    if raw := header.extension(EXTENSION_BITMAPS):
        where = parse_bitmap_extension(raw, geometry.cluster_size)
        directory = data[where.directory_offset :][: where.directory_length]
        bitmaps = parse_bitmap_directory(
            directory,
            where.count,
            cluster_size=geometry.cluster_size,
            virtual_size=geometry.virtual_size,
        )
    return describe(
        header,
        geometry,
        snapshots,
        filename=str(path),
        actual_size=path.stat().st_blocks * 512,
        bitmaps=bitmaps,
        luks=luks,
    )


def make(path: Path, *arguments: str, size: str = "1G") -> None:
    """An image by qemu-img."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, size)


def _snapshots(path: Path) -> None:
    make(path)
    for name in ("plain", "with space", "long" * 60):
        run("qemu-img", "snapshot", "-c", name, path)


def _odd_snapshot(path: Path) -> None:
    """A VM state of 5 GiB, a clock of 34 hours, no icount; and the dirty bit."""
    make(path)
    run("qemu-img", "snapshot", "-c", "vm", path)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    struct.pack_into(">Q", data, table + 24, 123_456_789_012_345)
    struct.pack_into(">QQQ", data, table + 40, 5 << 30, 1 << 30, 2**64 - 1)
    data[79] |= 1
    path.write_bytes(data)


def _bitmaps(path: Path) -> None:
    make(path)
    run("qemu-img", "bitmap", "--add", path, "one")
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "4096", path, "two")


def _backing(path: Path) -> None:
    make(path.parent / "base.qcow2")
    make(path, "-b", "base.qcow2", "-F", "qcow2", "-o", "cluster_size=128k")


def _corrupt(path: Path) -> None:
    make(path)
    data = bytearray(path.read_bytes())
    data[79] |= 2
    path.write_bytes(data)


def _luks(path: Path, cipher_mode: str, key_length: int) -> None:
    """An image with a LUKS header behind its end, the first key slot active.

    Not by qemu-img: on a busy machine it fails to measure its key derivation.
    """
    make(path, size="1M")
    data = bytearray(path.read_bytes())
    data += bytes(-len(data) % 65536)
    slots = empty_slots(key_length)
    active = KeySlot(True, 33300, b"s" * 32, slots[0].material_sector, STRIPES)
    length = total_length(key_length)
    luks = LuksHeader(
        "aes",
        cipher_mode,
        "sha256",
        length // 512,
        key_length,
        b"d" * 20,
        b"t" * 32,
        8302,
        "53b7130e-07c5-47ed-8235-c6cac4889c16",
        (active, *slots[1:]),
    )
    crypto = Extension(EXTENSION_CRYPTO, struct.pack(">QQ", len(data), length))
    header = parse_header(data, len(data))
    data[:65536] = serialize(replace(header, crypt_method=2, extensions=(crypto,)))
    data += serialize_luks_header(luks)
    path.write_bytes(data + bytes(-len(data) % 512))
    os.truncate(path, len(data) + length)


IMAGES: dict[str, Callable[[Path], None]] = {
    "plain": make,
    "empty": lambda path: make(path, size="0"),
    "version 2": lambda path: make(path, "-o", "compat=0.10,cluster_size=512"),
    "options": lambda path: make(
        path, "-o", "extended_l2=on,compression_type=zstd,lazy_refcounts=on,refcount_bits=64"
    ),
    "backing": _backing,
    "absolute backing": lambda path: make(path, "-u", "-b", "/nowhere/b.raw", "-F", "raw"),
    "backing url": lambda path: make(path, "-u", "-b", "nbd://host/x", "-F", "raw"),
    "data file": lambda path: make(
        path, "-o", f"data_file={path.parent}/d.raw,data_file_raw=on", size="1M"
    ),
    "snapshots": _snapshots,
    "odd snapshot": _odd_snapshot,
    "bitmaps": _bitmaps,
    "corrupt": _corrupt,
    "aes": lambda path: make(
        path, *SECRET, "-o", "encrypt.format=aes,encrypt.key-secret=s", size="1M"
    ),
    "luks": lambda path: _luks(path, "xts-plain64", 64),
    "luks cbc": lambda path: _luks(path, "cbc-essiv:sha256", 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_facts_are_qemus(tmp_path: Path, kind: str) -> None:
    """The same keys with the same values, no more and no fewer."""
    path = tmp_path / "image.qcow2"
    IMAGES[kind](path)
    assert facts_of(path) == json.loads(run("qemu-img", "info", "--output=json", path))


@pytest.mark.parametrize("kind", IMAGES)
def test_the_text_is_qemus(tmp_path: Path, kind: str) -> None:
    """The same lines in the same order."""
    path = tmp_path / "image.qcow2"
    IMAGES[kind](path)
    assert render(facts_of(path)) + "\n" == run("qemu-img", "info", path)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1_000_448, "977 KiB"),
        (1_500_000_256, "1.4 GiB"),
        (5_000_000_000_000, "4.55 TiB"),
        (1 << 60, "1 EiB"),
    ],
)
def test_sizes_have_three_digits(length: int, text: str) -> None:
    """From 1000 on the next unit is used."""
    assert format_size(length) == text


def test_control_characters_are_escaped_in_the_text(tmp_path: Path) -> None:
    """Names out of an image cannot reach a terminal's controls; JSON keeps them."""
    path = tmp_path / "image.qcow2"
    (tmp_path / "b\x1b[2J\n").write_bytes(bytes(512))
    make(path, "-b", "b\x1b[2J\n", "-F", "raw")
    run("qemu-img", "snapshot", "-c", "s\x07\x9b", path)
    facts = facts_of(path)
    assert facts["backing-filename"] == "b\x1b[2J\n"
    text = render(facts)
    assert "b\\x1b[2J\\n" in text
    assert "s\\x07\\x9b" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_other_formats_are_rendered_too() -> None:
    """A description without clusters or format facts has only the lines that it can fill."""
    facts = {"filename": "x.raw", "format": "raw", "virtual-size": 512, "dirty-flag": False}
    assert render(facts).splitlines() == [
        "image: x.raw",
        "file format: raw",
        "virtual size: 512 B (512 bytes)",
        "disk size: unavailable",
    ]
