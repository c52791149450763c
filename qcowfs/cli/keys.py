"""Passphrases and ciphers on the command line: `--key-file`, and what `create` takes.

A passphrase is never an argument, which everybody on the machine could read:
it comes from a file or is typed. One newline at the end of a file is cut, since
editors and `echo` leave one (QEMU's `secret,file=` takes it for a part of the
passphrase). Invariant: nothing read here is printed, logged or kept in a field
that is shown.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qcowfs.cli.common import CommandError, Parser, naming
from qcowfs.errors import BadRequest

if TYPE_CHECKING:
    from qcowfs.driver.qcow2.new_luks import Encryption
    from qcowfs.driver.secrets import Secrets

KEY_FILE_HELP = (
    "an encrypted image's passphrase, without one newline at its end; - asks for it; may be "
    "repeated as PATH=FILE for the backing file at PATH"
)
# A passphrase longer than this is a mistake: the wrong file.
_KEY_LENGTH_MAX = 1 << 20


def read_key(path: str, *, prompt: str = "Passphrase: ") -> bytes:
    """The passphrase in a file, or of `-` what is typed; standard input otherwise to its end."""
    with naming("standard input" if path == "-" else path):
        if path != "-":
            with open(path, "rb") as file:
                key = file.read(_KEY_LENGTH_MAX + 2)
        elif os.isatty(0):
            import getpass

            key = os.fsencode(getpass.getpass(prompt))
        else:
            with open(0, "rb", closefd=False) as file:
                key = file.read(_KEY_LENGTH_MAX + 2)
        key = key.removesuffix(b"\n")
        if not 0 < len(key) <= _KEY_LENGTH_MAX:
            raise BadRequest(f"a passphrase has 1 to {_KEY_LENGTH_MAX} bytes")
        return key


def read_secrets(texts: Sequence[str]) -> "Secrets | None":
    """The passphrases of `--key-file FILE` and `--key-file PATH=FILE`; None without any.

    Raises CommandError for a file that cannot be read and a second plain one.
    """
    if not texts:
        return None
    from qcowfs.driver.secrets import Secrets

    default: bytes | None = None
    by_path: dict[str | os.PathLike[str], bytes] = {}
    for text in texts:
        path, file = _split(text)
        if path is not None:
            by_path[path] = read_key(file, prompt=f"Passphrase of {path}: ")
        elif default is None:
            default = read_key(file)
        else:
            raise CommandError("given twice without a path", file="--key-file", hint="PATH=FILE")
    return Secrets(default, by_path)


def _split(text: str) -> tuple[str | None, str]:
    """(image, key file) of one option; a file whose own name has a `=` in it is found first."""
    path, equals, file = text.partition("=")
    if not equals or os.path.exists(text):
        return None, text
    while not os.path.exists(path) and "=" in file:
        more, _, file = file.partition("=")
        path = f"{path}={more}"
    return path, file


def add_encryption_options(parser: Parser) -> None:
    """The options of `create` that have to do with encryption."""
    add = parser.add_argument
    add("--encrypt", choices=("luks",), help="encrypt what the guest writes")
    add("--cipher", metavar="NAME", help="aes-256-xts-plain64 (default), aes-128-xts-plain64, "
        "aes-256-cbc-plain64, aes-256-cbc-essiv:sha256")  # fmt: skip
    add("--hash", metavar="NAME", help="sha256 (default), sha1, sha512")
    add("--iter-time", metavar="MS", type=int,
        help="milliseconds that trying a passphrase is to take (2000)")  # fmt: skip
    add("--key-file", metavar="FILE", help="the passphrase, without one newline at its end; "
        "- asks for it")  # fmt: skip


# qemu-img's names, all after `encrypt.`, and the parts of a cipher's name.
_QEMU_NAMES = ("format", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg",
               "iter-time")  # fmt: skip


def is_encryption_option(name: str) -> bool:
    """Whether `-o NAME=...` is one of qemu-img's options of a LUKS header."""
    return name.removeprefix("encrypt.") in _QEMU_NAMES and name.startswith("encrypt.")


def _cipher_name(options: Mapping[str, str]) -> str | None:
    """One name from qemu-img's options; None when they leave all to the default."""
    parts = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg")
    if not any(f"encrypt.{part}" in options for part in parts):
        return None
    name = options.get("encrypt.cipher-alg", "aes-256")
    name += "-" + options.get("encrypt.cipher-mode", "xts")
    generator = options.get("encrypt.ivgen-alg", "plain64")
    if generator == "essiv":
        generator += ":" + options.get("encrypt.ivgen-hash-alg", "sha256")
    return f"{name}-{generator}"


def _milliseconds(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f'encrypt.iter-time: "{text}" is not a number')
    return int(text)


def read_encryption(
    parsed: Mapping[str, object], options: Mapping[str, str]
) -> "Encryption | None":
    """What `create` is asked to encrypt with; `options` are qemu-img's, by their names.

    Raises BadRequest for options that contradict each other, CommandError for
    a key file that cannot be read.
    """
    method = parsed["encrypt"] or options.get("encrypt.format")
    given = [name for name in ("cipher", "hash", "iter_time", "key_file") if parsed[name]]
    if method is None:
        if given or options:
            raise BadRequest("encryption options without encryption", hint="--encrypt luks")
        return None
    if method != "luks":
        raise BadRequest(f'encrypt.format: "{method}": only luks is made')
    if parsed["key_file"] is None:
        raise BadRequest("an encrypted image needs a passphrase", hint="--key-file FILE")
    from qcowfs.driver.qcow2.new_luks import DEFAULT_CIPHER, DEFAULT_ITERATION_TIME, Encryption

    time = parsed["iter_time"]
    if time is None:
        time = _milliseconds(options.get("encrypt.iter-time", str(DEFAULT_ITERATION_TIME)))
    assert isinstance(time, int)
    return Encryption(
        secret=read_key(str(parsed["key_file"])),
        cipher=str(parsed["cipher"] or _cipher_name(options) or DEFAULT_CIPHER),
        hash_name=str(parsed["hash"] or options.get("encrypt.hash-alg", "sha256")),
        iteration_time=time,
    )
