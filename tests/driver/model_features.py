"""The model over encrypted images and external data files: how these are made, opened and judged.

What a step does and what must hold are those of `model`; here are only the ways
in which QEMU's tools and the driver are told of a passphrase or a data file.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfs.driver.extent import ExtentKind
from qcowfs.driver.node import Node
from qcowfs.driver.opening import open_image
from qcowfs.driver.qcow2.create import create_qcow2
from qcowfs.driver.qcow2.image import Qcow2Node, open_qcow2
from qcowfs.driver.qcow2.new_luks import Encryption
from qcowfs.errors import ReadOnlyImage
from tests.driver.encrypted_images import PASSPHRASE, Secret, create_options, run_tool
from tests.driver.model import (
    CACHE_SIZES,
    KIB,
    KINDS,
    Model,
    Shape,
    SlowFile,
    Step,
    random_range,
    random_steps,
    sample,
    write_sparse,
)

DATA_FILE = "disk.raw"
_SNAPSHOT_KINDS = {"create", "delete", "apply", "rename", "look", "refuse", "mingled"}
_OTHER_KINDS = sorted(KINDS.keys() - _SNAPSHOT_KINDS)


@dataclass(frozen=True)
class FeatureShape(Shape):
    """A shape with `cipher` (a key of CIPHERS, or aes) or `data_file` (plain or raw), or both."""

    cipher: str = ""
    data_file: str = ""

    @property
    def name(self) -> str:
        """What names it in test ids."""
        parts = [Shape.name.__get__(self), self.cipher.replace(":", "-"), self.data_file]
        return "-".join(part for part in parts if part)


FEATURE_SHAPES = (
    FeatureShape(512, cipher="aes-256-xts-plain64"),
    FeatureShape(64 * KIB, cipher="aes-256-xts-plain64", backing="raw"),
    FeatureShape(16 * KIB, extended_l2=True, cipher="aes-128-xts-plain64", backing="qcow2"),
    FeatureShape(4 * KIB, version=2, cipher="aes", backing="raw"),
    FeatureShape(16 * KIB, extended_l2=True, cipher="aes"),
    FeatureShape(4 * KIB, cipher="aes-256-cbc-essiv:sha256", refcount_bits=64),
    FeatureShape(2 << 20, cipher="aes-256-cbc-plain64", backing="qcow2"),
    FeatureShape(4 * KIB, data_file="plain"),
    FeatureShape(64 * KIB, data_file="plain", backing="qcow2"),
    FeatureShape(16 * KIB, extended_l2=True, data_file="plain", backing="raw"),
    FeatureShape(64 * KIB, data_file="raw"),
    FeatureShape(16 * KIB, extended_l2=True, data_file="raw"),
    FeatureShape(64 * KIB, data_file="plain", cipher="aes-256-xts-plain64"),
)


def feature_steps(shape: FeatureShape, count: int, seed: int) -> list[Step]:
    """Steps that suit a shape: no snapshots where there is a data file."""
    steps = list(random_steps(shape, count, seed))
    if not shape.data_file:
        return steps
    rng = random.Random(seed)
    return [
        step._replace(kind=rng.choice(_OTHER_KINDS)) if step.kind in _SNAPSHOT_KINDS else step
        for step in steps
    ]


class FeatureModel(Model):
    """A model of an image that is encrypted, or whose data lies in another file."""

    shape: FeatureShape

    def __init__(self, shape: FeatureShape, folder: Path, seed: int) -> None:
        super().__init__(shape, folder, seed)
        self.shape = shape
        self.secret = Secret(folder)
        self.data_path = folder / DATA_FILE
        self._data_memory: SlowFile | None = None

    @property
    def key(self) -> bytes | None:
        """The passphrase, if there is one."""
        return PASSPHRASE if self.shape.cipher else None

    @property
    def opened(self) -> str:
        """What QEMU's tools take after --image-opts."""
        options = f"driver=qcow2,file.filename={self.path}"
        if self.shape.cipher:
            options += ",encrypt.key-secret=s0"
        if self.shape.data_file:
            options += f",data-file.filename={self.data_path}"
        return options

    def tool(self, *command: str | Path) -> str:
        """Run a tool with the passphrase at hand; it must succeed."""
        return run_tool(*command[:1], command[1], *self.secret.options, *command[2:])

    async def take(self, step: Step) -> None:
        """As of the model, but QEMU's own changes are told of passphrase and data file."""
        if step.kind != "foreign":
            await super().take(step)
            return
        rng = random.Random(step.seed)
        await self._close()
        for _ in range(rng.randint(1, 6)):
            guest_offset, length = random_range(rng, len(self.content), self.shape.cluster_size)
            verb = rng.choice(("write -P 17", "write -z", "write -z -u"))
            if self.shape.cipher:
                guest_offset, length = guest_offset & -512, length & -512
            if length and guest_offset + length <= len(self.content):
                run_tool("qemu-io", *self.secret.options, "--image-opts", "-c",
                         f"{verb} {guest_offset} {length}", self.opened)  # fmt: skip
                data = bytes(length) if "-z" in verb else b"\x11" * length
                self.content[guest_offset : guest_offset + length] = data
        await self._open(rng)
        await self._compare_whole()

    # The life of the image

    async def _make(self) -> None:
        rng = random.Random(self.seed)
        shape = self.shape
        names: dict[str, str] = {}
        size = shape.disk_size
        if shape.backing != "none":
            share = size * 3 // 5 if shape.backing == "raw" else size * 5 // 4
            self.base = sample(rng, share & -512)
            self.base_path = self.folder / f"base.{shape.backing}"
            write_sparse(self.folder / "raw", self.base)
            run_tool("qemu-img", "convert", "-f", "raw", "-O", shape.backing,
                     self.folder / "raw", self.base_path)  # fmt: skip
            names = {"backing_file": self.base_path.name, "backing_format": shape.backing}
        if shape.cipher == "aes" or rng.random() < 0.5:
            options = [shape.options] + [f"{name}={value}" for name, value in names.items()]
            if shape.data_file:
                raw = "on" if shape.data_file == "raw" else "off"
                options += [f"data_file={self.data_path}", f"data_file_raw={raw}"]
            wanted = ",".join(options).replace("backing_format", "backing_fmt")
            if shape.cipher:
                wanted = create_options(shape.cipher, wanted)
            self.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", wanted, self.path, str(size))
        else:
            encryption = None
            if shape.cipher:
                encryption = Encryption(PASSPHRASE, cipher=shape.cipher, iteration_time=1)
            await create_qcow2(
                self.path,
                size,
                version=shape.version,
                cluster_size=shape.cluster_size,
                refcount_bits=shape.refcount_bits,
                extended_l2=shape.extended_l2,
                encryption=encryption,
                data_file=DATA_FILE if shape.data_file else None,
                data_file_raw=shape.data_file == "raw",
                backing_file=names.get("backing_file"),
                backing_format=names.get("backing_format"),
            )
        self.content = self._seen_by_qemu()

    async def _open(self, rng: random.Random) -> None:
        cache_size = rng.choice(CACHE_SIZES)
        self._memory = self._data_memory = None
        if rng.random() < 0.5:
            node = await open_image(self.path, cache_size=cache_size, key=self.key)
            assert isinstance(node, Qcow2Node)
        else:
            rate = rng.choice((0.1, 0.4))
            self._memory = SlowFile(
                self.path.read_bytes(), rng.getrandbits(32), miss_rate=rate, refusal_rate=rate
            )
            if self.shape.data_file:
                self._data_memory = SlowFile(
                    self.data_path.read_bytes(),
                    rng.getrandbits(32),
                    miss_rate=rate,
                    refusal_rate=rate,
                    can_punch=rng.random() < 0.7,
                )
            backing = None
            if self.base_path is not None:
                backing = await open_image(
                    self.base_path, format=self.shape.backing, read_only=True
                )
            node = await open_qcow2(
                self._memory,
                path=str(self.path),
                read_only=False,
                backing=backing,
                cache_size=cache_size,
                secret=self.key,
                data_storage=self._data_memory,
            )
        self._node = node

    async def _close(self) -> None:
        memory = self._data_memory
        for kept in self.snapshots.values():
            kept.node = None
        await self.node.aclose()
        self._node = None
        if self._memory is not None:
            write_sparse(self.path, self._memory.content)
        if memory is not None:
            write_sparse(self.data_path, memory.content)
        self._judge()

    def _judge(self) -> None:
        self.tool("qemu-img", "check", "--image-opts", self.opened)
        assert self._seen_by_qemu() == self.content, "QEMU sees another disk"
        if self.shape.data_file == "raw":
            # QEMU makes it as long as its clusters are.
            held = self.data_path.read_bytes()[: len(self.content)]
            assert held == self.content, "the data file is another disk"
        for key, kept in self.snapshots.items():
            found = self._seen_by_qemu(key)
            length = min(len(found), len(kept.content))
            assert found[:length] == kept.content[:length], f"QEMU sees another {kept.name!r}"

    def _seen_by_qemu(self, key: bytes | None = None) -> bytearray:
        chosen = [] if key is None else ["-l", f"snapshot.id={key.decode()}"]
        copy = self.folder / "copy"
        self.tool("qemu-img", "convert", *chosen, "--image-opts", self.opened, "-O", "raw", copy)
        content = bytearray(copy.read_bytes())
        copy.unlink()
        return content

    async def _read_only(self) -> None:
        before = self.path.read_bytes()
        node = await open_image(self.path, read_only=True, cache_size=64 * KIB, key=self.key)
        try:
            await self._compare(node, self.content, 0, len(self.content))
            with pytest.raises(ReadOnlyImage):
                await node.write_from(0, b"1")
        finally:
            await node.aclose()
        assert self.path.read_bytes() == before

    async def _check_extents(
        self,
        node: Node,
        content: bytes | bytearray,
        whole: tuple[int, int],
        limit: int | None = None,
    ) -> None:
        """Extents lie end to end; what a data file that is not encrypted holds is the content."""
        covered, length = whole
        for extent in await node.extents(covered, length, limit=limit):
            assert extent.guest_offset == covered
            covered += extent.length
            wanted = content[extent.guest_offset : covered]
            if extent.kind is ExtentKind.ZERO:
                assert not any(wanted), f"not zeros: {extent}"
            elif extent.kind is ExtentKind.DATA and self.shape.data_file:
                assert extent.host_offset == extent.guest_offset
                if not self.shape.cipher:
                    files = self.node.metadata.data_storage
                    assert await files.pread(extent.length, extent.host_offset) == wanted
