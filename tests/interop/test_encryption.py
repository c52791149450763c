"""Encrypted images and data files through the command and the mount, both ways with QEMU."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.driver.encrypted_images import (
    PASSPHRASE,
    Secret,
    assert_encrypted,
    create_options,
    image_options,
    qemu_bytes,
    run_tool,
)
from tests.interop import tools

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB

pytestmark = tools.needs_fuse

CIPHERS = ["aes-256-xts-plain64", "aes-128-xts-plain64", "aes-256-cbc-plain64",
           "aes-256-cbc-essiv:sha256"]  # fmt: skip


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key file as an editor leaves it: the passphrase and a newline."""
    path = tmp_path / "key"
    path.write_bytes(PASSPHRASE + b"\n")
    return path


def change(path: Path, content: bytearray, seed: int) -> None:
    """Random writes and holes through a file, and in its model; short ones and long ones."""
    chance = random.Random(seed)
    with path.open("r+b", buffering=0) as file:
        for number in range(60):
            length = chance.choice((1, 100, 512, 4096, 70_000, 600_000))
            start = chance.randrange(len(content) - length)
            data = chance.randbytes(length)
            if number % 6 == 5:
                mode = (tools.FALLOC_PUNCH_HOLE, tools.FALLOC_ZERO_RANGE)[number % 2]
                tools.fallocate(file.fileno(), mode | tools.FALLOC_KEEP_SIZE, start, length)
                data = bytes(length)
            else:
                os.pwrite(file.fileno(), data, start)
            content[start : start + length] = data
            if number % 20 == 19:
                os.fsync(file.fileno())


def create(image: Path, key: Path, *options: str) -> None:
    """`qcowfs create --encrypt luks`, with a key that is quickly tried."""
    tools.qcowfs("create", "-q", "--encrypt", "luks", "--iter-time", "10", "--key-file", key,
                 *options, image, str(SIZE))  # fmt: skip


@pytest.mark.parametrize("lane", ["--poll-us=50", "--no-lane"])
def test_images_by_qemu(lane: str, tmp_path: Path, key: Path) -> None:
    """An image that QEMU made and wrote reads identical, and QEMU reads what the mount wrote."""
    cipher = CIPHERS[0]
    image = tmp_path / "image.qcow2"
    secret = Secret(tmp_path)
    run_tool("qemu-img", "create", "-q", *secret.options, "-f", "qcow2", "-o",
             create_options(cipher), image, str(SIZE))  # fmt: skip
    opened = image_options(image, cipher)
    run_tool("qemu-io", *secret.options, "-c", "write -P 3 100k 1M", "--image-opts", opened)
    content = bytearray(SIZE)
    content[100 * KIB : 100 * KIB + MIB] = b"\3" * MIB
    with tools.mounted(image, lane, "-r", "--key-file", str(key)) as mount:
        assert mount.active.read_bytes() == content
    with tools.mounted(image, lane, "--key-file", str(key)) as mount:
        if lane != "--no-lane":
            change(mount.active, content, 2)
        else:
            tools.pwrite(mount.active, b"some bytes", 70_001)
            content[70_001:70_011] = b"some bytes"
        tools.drop_caches(mount.active)
        assert mount.active.read_bytes() == content
    assert_encrypted(image, cipher, content)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_our_images_in_qemu(cipher: str, tmp_path: Path, key: Path) -> None:
    """QEMU opens what `create --encrypt luks` made and the mount filled, and we read its writes."""
    image = tmp_path / "image.qcow2"
    create(image, key, "--cipher", cipher)
    content = bytearray(SIZE)
    with tools.mounted(image, "--key-file", str(key)) as mount:
        change(mount.active, content, 4)
        mount.snapshot("create", "one")
        before = bytes(content)
        change(mount.active, content, 5)
        assert (mount.snapshots / "one.raw").read_bytes() == before
    assert_encrypted(image, cipher, content)
    secret = Secret(tmp_path)
    run_tool("qemu-io", *secret.options, "-c", "write -P 9 1M 65k", "--image-opts",
             image_options(image, cipher))  # fmt: skip
    content[MIB : MIB + 65 * KIB] = b"\x09" * (65 * KIB)
    with tools.mounted(image, "-r", "--key-file", str(key)) as mount:
        assert mount.active.read_bytes() == content
        assert (mount.snapshots / "one.raw").read_bytes() == before


@pytest.mark.parametrize("encrypted", [("top",), ("base",), ("top", "base")])
def test_chains(encrypted: Sequence[str], tmp_path: Path, key: Path) -> None:
    """Encrypted overlays over plain bases and the reverse, each layer with its own passphrase."""
    other = tmp_path / "other"
    other.write_bytes(b"another")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    content = bytearray(SIZE)
    options: list[str] = []
    if "base" in encrypted:
        create(base, other)
        options += ["--key-file", f"{base}={other}"]
    else:
        tools.qcowfs("create", "-q", base, str(SIZE))
    with tools.mounted(base, *(["--key-file", str(other)] if "base" in encrypted else [])) as mount:
        change(mount.active, content, 6)
    layers = ("-b", base.name, "-F", "qcow2")
    if "top" in encrypted:
        create(top, key, *layers)
        options += ["--key-file", str(key)]
    else:
        tools.qcowfs("create", "-q", *layers, top)
    with tools.mounted(top, *options) as mount:
        assert mount.active.read_bytes() == content
        change(mount.active, content, 7)
        assert mount.active.read_bytes() == content
    secret = Secret(tmp_path, PASSPHRASE, b"another")
    opened = f"driver=qcow2,file.filename={top}"
    if "top" in encrypted:
        opened += ",encrypt.key-secret=s0"
    if "base" in encrypted:
        opened += ",backing.encrypt.key-secret=s1"
    target = tmp_path / "raw"
    run_tool("qemu-img", "convert", *secret.options, "--image-opts", opened, "-O", "raw", target)
    assert target.read_bytes() == content


def test_refusals(tmp_path: Path, key: Path) -> None:
    """No passphrase, a wrong one, no key file: one line, exit code 1, and nothing is written."""
    image, folder = tmp_path / "image.qcow2", tmp_path / "mnt"
    folder.mkdir()
    create(image, key)
    before = image.read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"sesame")
    for options, words in (
        ([], "the image is encrypted; hint: --key-file FILE"),
        (["--key-file", wrong], "the passphrase is wrong: it opens no key slot"),
        (["--key-file", tmp_path / "none"], "No such file or directory"),
        (["--key-file", os.devnull], "a passphrase has"),
    ):
        done = tools.qcowfs("mount", *options, image, folder, check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert "sesame" not in done.stderr
    assert image.read_bytes() == before


def test_a_passphrase_is_nowhere_to_be_seen(tmp_path: Path, key: Path) -> None:
    """Neither the log at its most talkative, nor the argument list, nor the environment has it."""
    image = tmp_path / "image.qcow2"
    create(image, key)
    log = tmp_path / "log"
    with tools.mounted(image, "-vv", "--log-file", str(log), "--key-file", str(key)) as mount:
        tools.pwrite(mount.active, b"x" * 100, 5)
        for name in ("cmdline", "environ"):
            assert PASSPHRASE not in Path(f"/proc/{mount.pid}/{name}").read_bytes()
        shown = tools.run("getfattr", "-d", "-m", "-", mount.active).stdout
        assert PASSPHRASE.decode() not in shown
        assert PASSPHRASE not in (mount.folder / "info.json").read_bytes()
    assert PASSPHRASE not in log.read_bytes()


def test_key_slots(tmp_path: Path, key: Path) -> None:
    """`amend` lists, adds and removes passphrases, and does not remove the last one unasked."""
    image = tmp_path / "image.qcow2"
    create(image, key)
    other = tmp_path / "other"
    other.write_bytes(b"another")
    quick = ("--iter-time", "10")
    tools.qcowfs("amend", image, "--add-key", other, "--key-file", key, *quick, "--slot", "5")
    assert "5: in use" in tools.qcowfs("amend", image, "--list-keys").stdout
    for secret in (PASSPHRASE, b"another"):
        assert qemu_bytes(image, CIPHERS[0], passphrase=secret) == bytes(SIZE)
    tools.qcowfs("amend", image, "--remove-key", key)
    with tools.mounted(image, "--key-file", str(other)) as mount:
        assert mount.active.read_bytes() == bytes(SIZE)
        busy = tools.qcowfs("amend", image, "--remove-slot", "5", "--force", check=False)
        assert "lock" in busy.stderr
    last = tools.qcowfs("amend", image, "--remove-slot", "5", check=False)
    assert last.returncode == 1
    assert "--force" in last.stderr
    tools.qcowfs("amend", image, "--remove-slot", "5", "--force")
    assert "in use" not in tools.qcowfs("amend", image, "--list-keys").stdout


def test_snapshot_commands_need_no_passphrase(tmp_path: Path, key: Path) -> None:
    """Snapshots of an encrypted image at rest are created and listed without one."""
    image = tmp_path / "image.qcow2"
    create(image, key)
    tools.qcowfs("snapshot", "create", image, "one")
    assert "one" in tools.qcowfs("snapshot", "list", image).stdout
    assert "encrypted: yes" in tools.qcowfs("info", image).stdout
    assert_encrypted(image, CIPHERS[0], bytes(SIZE))


def data_file_options(image: Path, data: Path) -> str:
    """How QEMU's tools are told of an image with a data file, wherever they run."""
    return f"driver=qcow2,file.filename={image},data-file.filename={data}"


@pytest.mark.parametrize("raw", [False, True])
def test_data_files(raw: bool, tmp_path: Path) -> None:
    """A data file made by `create` serves mount and QEMU alike; a raw one is the disk."""
    folder = tmp_path / "images"
    folder.mkdir()
    image, data = folder / "image.qcow2", folder / "disk.raw"
    flags = ["--data-file-raw"] if raw else []
    tools.qcowfs("create", "-q", "--data-file", data.name, *flags, image, str(SIZE))
    content = bytearray(SIZE)
    for seed in (1, 2):
        with tools.mounted(image) as mount:
            assert mount.active.read_bytes() == content
            change(mount.active, content, seed)
            if raw:
                descriptor = os.open(mount.active, os.O_RDWR)
                os.fsync(descriptor)
                os.close(descriptor)
                assert data.read_bytes() == content
        opened = data_file_options(image, data)
        run_tool("qemu-img", "check", "--image-opts", opened)
        run_tool("qemu-io", "-c", f"write -P {seed} 1M 100k", "-c", "write -z 2M 64k",
                 "--image-opts", opened)  # fmt: skip
        content[MIB : MIB + 100 * KIB] = bytes([seed]) * (100 * KIB)
        content[2 * MIB : 2 * MIB + 64 * KIB] = bytes(64 * KIB)
        target = tmp_path / "raw"
        run_tool("qemu-img", "convert", "--image-opts", opened, "-O", "raw", target)
        assert target.read_bytes() == content
    assert f"data file: {data.name}" in tools.qcowfs("info", image).stdout
    refused = tools.qcowfs("snapshot", "create", image, "one", check=False)
    assert "external data file" in refused.stderr


def test_an_existing_disk_becomes_a_data_file(tmp_path: Path) -> None:
    """A raw disk is taken over as it is with --data-file-raw, and never emptied without it."""
    disk, image = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    content = bytearray(random.Random(3).randbytes(MIB))
    disk.write_bytes(content)
    refused = tools.qcowfs("create", "--data-file", disk.name, image, "1M", check=False)
    assert refused.returncode == 1
    assert "--data-file-raw" in refused.stderr
    assert not image.exists()
    tools.qcowfs("create", "-q", "--data-file", disk.name, "--data-file-raw", image)
    assert disk.read_bytes() == content
    with tools.mounted(image) as mount:
        assert mount.active.read_bytes() == content
        tools.pwrite(mount.active, b"changed", 1000)
    content[1000:1007] = b"changed"
    assert disk.read_bytes() == content


def test_a_missing_data_file(tmp_path: Path) -> None:
    """Mounting says which file is missing, in one line; info tells of it all the same."""
    image = tmp_path / "image.qcow2"
    folder = tmp_path / "mnt"
    folder.mkdir()
    tools.qcowfs("create", "-q", "--data-file", "disk.raw", image, "1M")
    (tmp_path / "disk.raw").unlink()
    done = tools.qcowfs("mount", image, folder, check=False)
    assert done.returncode == 1
    assert 'data file "disk.raw" of' in done.stderr
    assert done.stderr.count("\n") == 1
    assert "data file: disk.raw" in tools.qcowfs("info", image).stdout
