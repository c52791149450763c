"""The images that cases start from: made once a run, kept sparse, deleted at the end.

All by qemu-img and qemu-io, so that neither side is measured on an image of its
own making; but for the image with a full L1 table, which no tool makes in
reasonable time and room.
"""

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SEED = 7


def qemu_img(*arguments: str | Path) -> None:
    """Run qemu-img; raises CalledProcessError with its words on stderr."""
    subprocess.run(
        ["qemu-img", *map(str, arguments)], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip


class Images:
    """Makes each image once, under its name, in `folder`; `length` is the disk's usual size."""

    def __init__(self, folder: Path, length: int) -> None:
        self._folder = folder
        self.length = length

    def get(self, name: str, make: Callable[["Images", Path], None]) -> Path:
        """The image called `name`."""
        path = self._folder / f"{name}.qcow2"
        if not path.exists():
            partial = path.with_suffix(".partial")
            make(self, partial)
            partial.rename(path)
        return path

    def raw(self) -> Path:
        """A raw disk whose bytes compress to about half."""
        path = self._folder / "content.raw"
        if not path.exists():
            rng = random.Random(_SEED)
            with path.open("wb") as file:
                for _ in range(self.length // MIB):
                    noise = rng.randbytes(MIB // 2)
                    pieces = [noise[n : n + 2048] + bytes([n % 251]) * 2048
                              for n in range(0, MIB // 2, 2048)]  # fmt: skip
                    file.write(b"".join(pieces))
        return path

    def forget(self) -> None:
        """Delete all images that were made."""
        for path in self._folder.iterdir():
            path.unlink()


def full(*options: str) -> Callable[[Images, Path], None]:
    """All clusters allocated and holding data; `options` are qemu-img's -o."""

    def make(images: Images, path: Path) -> None:
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *_dash_o(options), images.raw(), path)

    return make


def compressed(kind: str) -> Callable[[Images, Path], None]:
    """All clusters compressed by `kind`, zlib or zstd."""

    def make(images: Images, path: Path) -> None:
        qemu_img(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-W",
            "-o", f"compression_type={kind}", images.raw(), path,
        )  # fmt: skip

    return make


def empty(*options: str, length: int | None = None) -> Callable[[Images, Path], None]:
    """Nothing allocated."""

    def make(images: Images, path: Path) -> None:
        size = str(length or images.length)
        qemu_img("create", "-f", "qcow2", *_dash_o(options), path, size)

    return make


def mapped(length: int) -> Callable[[Images, Path], None]:
    """All clusters allocated, the host file full of holes."""
    return empty("preallocation=metadata", length=length)


def snapshotted(images: Images, path: Path) -> None:
    """Full, and a snapshot just taken: every write copies."""
    full()(images, path)
    qemu_img("snapshot", "-c", "before", path)


def chain(images: Images, path: Path) -> None:
    """Four layers; each of the upper three holds every fourth cluster of its own."""
    below = images.get("full", full())
    for layer in range(1, 4):
        name = f"chain-layer{layer}"
        target = path if layer == 3 else path.with_name(f"{name}.overlay")
        qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", below, target)
        commands = [
            f"write -q -P {layer} {number * 65536} 65536\n"
            for number in range(layer, images.length // 65536, 4)
        ]
        subprocess.run(
            ["qemu-io", "-f", "qcow2", str(target)],
            input="".join(commands), text=True, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        below = target


def full_l1(images: Images, path: Path) -> None:
    """16 TiB at 64 KiB clusters: all 32,768 L2 tables there, each empty and a hole."""
    cluster = 65536
    l1_count = 16 * TIB // (cluster * cluster // 8)
    l1_clusters = l1_count * 8 // cluster
    block_entries = cluster // 2
    l1_cluster = 2
    first_block = l1_cluster + l1_clusters
    block_count = 1
    while first_block + block_count + l1_count > block_count * block_entries:
        block_count += 1
    first_l2 = first_block + block_count
    used = first_l2 + l1_count
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 16 * TIB, 0, l1_count,
        l1_cluster * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    blocks = [(first_block + n) * cluster for n in range(block_count)]
    tables = [(first_l2 + n) * cluster | 1 << 63 for n in range(l1_count)]
    with path.open("wb") as file:
        file.write(header)
        file.seek(cluster)
        file.write(struct.pack(f">{block_count}Q", *blocks))
        file.seek(l1_cluster * cluster)
        file.write(struct.pack(f">{l1_count}Q", *tables))
        file.seek(first_block * cluster)
        file.write(struct.pack(">H", 1) * used)
        file.truncate(used * cluster)


def _dash_o(options: tuple[str, ...]) -> list[str]:
    return ["-o", ",".join(options)] if options else []
