"""Encrypted qcow2 images made, written and read by QEMU's tools."""

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

PASSPHRASE = b"geheim"

# What qemu-img create takes after `encrypt.`, by the names that LUKS gives the ciphers.
CIPHERS = {
    "aes-256-xts-plain64": "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
    "aes-128-xts-plain64": "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha1",
    "aes-256-cbc-plain64": "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha512",
    "aes-256-cbc-essiv:sha256": "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,"
    "ivgen-hash-alg=sha256,hash-alg=sha256",
    "aes": "",
}


def run_tool(*command: str | Path) -> str:
    """Run a tool that must succeed; LUKS may fail to measure a busy machine, so it tries again."""
    for _ in range(30):
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = done.stdout + done.stderr
        if "accurate CPU usage" in said:
            continue
        assert done.returncode == 0, said
        return done.stdout
    pytest.fail(said)


class Secret:
    """Passphrases as qemu's tools take them: files in a folder, each an object `s0`, `s1`, ..."""

    def __init__(self, folder: Path, *passphrases: bytes) -> None:
        self.options: list[str] = []
        for number, passphrase in enumerate(passphrases or (PASSPHRASE,)):
            file = folder / f"secret{number}"
            file.write_bytes(passphrase)
            self.options += ["--object", f"secret,id=s{number},file={file}"]


def image_options(image: Path, cipher: str, *, secret: str = "s0", prefix: str = "") -> str:
    """What `--image-opts` takes for an encrypted image; `prefix` for a layer below."""
    method = "aes" if cipher == "aes" else "luks"
    options = {
        "driver": "qcow2",
        "encrypt.format": method,
        "encrypt.key-secret": secret,
        "file.driver": "file",
        "file.filename": str(image),
    }
    return ",".join(f"{prefix}{name}={value}" for name, value in options.items())


def create_options(cipher: str, options: str = "") -> str:
    """What `qemu-img create -o` takes for an encrypted image."""
    method = "aes" if cipher == "aes" else "luks"
    wanted = [f"encrypt.format={method}", "encrypt.key-secret=s0"]
    if method == "luks":
        wanted += ["encrypt.iter-time=10"]
        wanted += [f"encrypt.{option}" for option in CIPHERS[cipher].split(",")]
    return ",".join(wanted + ([options] if options else []))


@functools.lru_cache(maxsize=64)
def make_encrypted(
    cipher: str,
    size: int,
    options: str = "",
    *,
    commands: Sequence[str] = (),
    snapshots: Sequence[str] = (),
) -> bytes:
    """The bytes of an image that qemu-img made, with qemu-io commands run on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image.qcow2"
        secret = Secret(folder)
        run_tool("qemu-img", "create", "-q", *secret.options, "-f", "qcow2",
                 "-o", create_options(cipher, options), image, str(size))  # fmt: skip
        opened = image_options(image, cipher)
        for command in commands:
            run_tool("qemu-io", *secret.options, "-c", command, "--image-opts", opened)
        for snapshot in snapshots:
            run_tool("qemu-img", "snapshot", *secret.options, "--image-opts", "-c", snapshot,
                     opened)  # fmt: skip
        return image.read_bytes()


def qemu_bytes(image: Path, cipher: str, *, passphrase: bytes = PASSPHRASE) -> bytes:
    """The guest bytes of an encrypted image as QEMU reads them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        secret = Secret(folder, passphrase)
        target = folder / "raw"
        run_tool("qemu-img", "convert", *secret.options, "--image-opts",
                 image_options(image, cipher), "-O", "raw", target)  # fmt: skip
        return target.read_bytes()


def assert_encrypted(image: Path, cipher: str, expected: bytes | bytearray) -> None:
    """qemu-img finds neither an error nor a leak, and reads `expected`."""
    with tempfile.TemporaryDirectory() as name:
        secret = Secret(Path(name))
        opened = image_options(image, cipher)
        run_tool("qemu-img", "check", *secret.options, "--image-opts", opened)
    assert qemu_bytes(image, cipher) == bytes(expected)
