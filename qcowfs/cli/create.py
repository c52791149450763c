"""`qcowfs create`: makes an image, with qemu-img's option names or long options.

Paths and options only: what an image may be is decided, and refused, in
`create_qcow2`, `create_qcow1` and `create_cow` of the driver. A backing file is
opened to learn its size and format; its name goes into the image as it was
given, and is resolved from the folder of the image, as every reader will do.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs.cli.common import (
    CommandError,
    Parser,
    naming,
    parse_size,
    parse_switch,
    print_lines,
    run_async,
    size_argument,
)
from qcowfs.cli.keys import add_encryption_options, is_encryption_option, read_encryption
from qcowfs.errors import BadRequest

if TYPE_CHECKING:
    from qcowfs.driver.qcow2.new_luks import Encryption

_FORMATS = ("qcow2", "qcow", "cow")
# What the formats besides qcow2 have of the options, by the keywords of their functions.
_OPTIONS_OF = {
    "qcow": {"size", "backing_file", "backing_format", "cluster_size", "encryption"},
    "cow": {"size", "backing_file", "backing_format"},
}
_VERSIONS = {"2": 2, "3": 3, "v2": 2, "v3": 3, "0.10": 2, "1.1": 3}
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_COMPRESSIONS = ("zlib", "zstd")


def _parser() -> Parser:
    parser = Parser("create", "Make a new image.")
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("size", metavar="SIZE", nargs="?", help="10G; a backing file's own when left out")
    add("-f", "--format", metavar="FORMAT", default="qcow2", help="qcow2, qcow, cow (qcow2)")
    add("-b", "--backing-file", metavar="FILE", help="what unwritten parts show")
    add("-F", "--backing-format", metavar="FORMAT", help="its format; raw is never guessed")
    add("-u", "--unsafe", action="store_true", help="do not open the backing file")
    add("-o", dest="options", metavar="NAME=VALUE,...", action="append", default=[],
        help="the options below by qemu-img's names")  # fmt: skip
    add("--version", dest="compat", metavar="N", help="2 or 3 (3)")
    add("--cluster-size", metavar="SIZE", type=size_argument, help="512 to 2M (64K)")
    add("--refcount-bits", metavar="N", type=int, help="1 to 64 (16)")
    add("--extended-l2", action="store_true", default=None, help="subclusters")
    add("--preallocation", choices=_PREALLOCATIONS, help="off")
    add("--compression-type", choices=_COMPRESSIONS, help="zlib")
    add("--lazy-refcounts", action="store_true", default=None, help="set the permission bit")
    add("--data-file", metavar="FILE", help="keep what the guest writes in another file")
    add("--data-file-raw", action="store_true", default=None,
        help="which is the disk itself; one that exists is taken over")  # fmt: skip
    add_encryption_options(parser)
    add("-q", "--quiet", action="store_true", help="print nothing")
    return parser


def _split_options(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of name and value; `,,` is a comma inside a value, as qemu-img has it."""
    pairs = []
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            name, equals, value = part.replace("\0", ",").partition("=")
            if name and not equals:
                value = "on"
            if name:
                pairs.append((name, value))
    return pairs


def _choice(value: str, choices: tuple[str, ...], name: str) -> str:
    if value not in choices:
        raise BadRequest(f'{name}: "{value}" is not one of {", ".join(choices)}')
    return value


def _number(value: str, name: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise BadRequest(f'{name}: "{value}" is not a number')
    return int(value)


def _read_option(name: str, value: str) -> tuple[str, Any]:
    """The keyword of `create_qcow2` (or `size`) that an `-o` option sets, and its value."""
    match name:
        case "compat":
            if value not in _VERSIONS:
                raise BadRequest(f'compat: "{value}" is not one of v2, v3, 0.10, 1.1')
            return "version", _VERSIONS[value]
        case "size" | "cluster_size":
            return name, parse_size(value)
        case "refcount_bits":
            return name, _number(value, name)
        case "extended_l2" | "lazy_refcounts" | "encryption" | "data_file_raw":
            return name, parse_switch(value, name)
        case "backing_file" | "data_file":
            return name, value
        case "backing_fmt" | "backing_format":
            return "backing_format", value
        case "preallocation":
            return name, _choice(value, _PREALLOCATIONS, name)
        case "compression_type":
            return name, _choice(value, _COMPRESSIONS, name)
    raise BadRequest(f'unknown option "{name}"')


def _read_settings(parsed: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `create_qcow2`, `size` among them when it was given."""
    settings: dict[str, Any] = {}
    for name, value in _split_options(parsed["options"]):
        if is_encryption_option(name):
            continue
        keyword, setting = _read_option(name, value)
        settings[keyword] = setting
    if parsed["compat"] is not None:
        settings["version"] = _read_option("compat", parsed["compat"])[1]
    if parsed["size"] is not None:
        settings["size"] = parse_size(parsed["size"])
    for name in (
        "backing_file",
        "backing_format",
        "cluster_size",
        "refcount_bits",
        "extended_l2",
        "preallocation",
        "compression_type",
        "lazy_refcounts",
        "data_file",
        "data_file_raw",
    ):
        if parsed[name] is not None:
            settings[name] = parsed[name]
    return settings


async def _inspect_backing(image: Path, settings: dict[str, Any]) -> None:
    """Fill in the size and the format that the backing file has."""
    from qcowfs.driver.opening import open_image

    name = settings["backing_file"]
    path = image.parent / name
    with naming(os.fspath(path)):
        node = await open_image(
            path,
            format=settings.get("backing_format"),
            read_only=True,
            force_share=True,
            describe_only=True,
        )
    try:
        settings.setdefault("size", node.virtual_size)
        settings.setdefault("backing_format", node.format_name)
    finally:
        await node.aclose()


def _check_options(kind: str, settings: dict[str, Any]) -> None:
    """Refuse what the format does not have."""
    if kind == "qcow2":
        allowed = settings.keys() - {"encryption"}
    else:
        allowed = _OPTIONS_OF[kind]
    for name in settings.keys() - allowed:
        raise BadRequest(f'the format "{kind}" has no option "{name}"')


async def _make(kind: str, image: Path, size: int, settings: dict[str, Any]) -> int:
    """Make the image; answers its cluster size."""
    if kind == "qcow2":
        from qcowfs.driver.qcow2.create import create_qcow2

        await create_qcow2(image, size, **settings)
        cluster_size: int = settings.get("cluster_size", 1 << 16)
        return cluster_size
    # Neither format has a place for the backing file's format.
    named = {name: value for name, value in settings.items() if name != "backing_format"}
    if kind == "qcow":
        from qcowfs.driver.qcow1_create import create_qcow1

        return await create_qcow1(image, size, **named)
    from qcowfs.driver.uml_cow_create import create_cow

    if "backing_file" in named:
        path = image.parent / named["backing_file"]
        with naming(os.fspath(path)):
            named["mtime"] = int(path.stat().st_mtime)
    await create_cow(image, size, **named)
    return 512


def _size_of_data_file(image: Path, settings: dict[str, Any]) -> None:
    """A raw data file that exists is the disk, so it tells the size."""
    path = image.parent / settings.get("data_file", "")
    if settings.get("data_file_raw") and path.is_file():
        settings.setdefault("size", path.stat().st_size)


async def _create(
    kind: str,
    image: Path,
    settings: dict[str, Any],
    encryption: "Encryption | None",
    *,
    unsafe: bool,
) -> dict[str, Any]:
    _check_options(kind, settings)
    if encryption is not None:
        if kind != "qcow2":
            raise BadRequest(f'the format "{kind}" has no LUKS encryption')
        settings["encryption"] = encryption
    _size_of_data_file(image, settings)
    if settings.get("backing_file"):
        if not unsafe:
            await _inspect_backing(image, settings)
        elif "backing_format" not in settings:
            raise BadRequest("a backing file that is not opened needs its format", hint="-F")
    elif "backing_format" in settings:
        raise BadRequest("a backing format without a backing file")
    if "size" not in settings:
        raise BadRequest("a size is needed", hint="qcowfs create FILE 10G")
    size = settings.pop("size")
    cluster_size = await _make(kind, image, size, settings)
    return {"size": size, **settings, "cluster_size": cluster_size}


def run(arguments: list[str]) -> int:
    """Run `qcowfs create`; answers the exit code."""
    parsed = vars(_parser().parse_args(arguments))
    image = parsed["image"]
    if parsed["format"] not in _FORMATS:
        raise CommandError(f'cannot create the format "{parsed["format"]}"', file=image)
    with naming(image):
        settings = _read_settings(parsed)
        pairs = _split_options(parsed["options"])
        named = {name: value for name, value in pairs if is_encryption_option(name)}
        encryption = read_encryption(parsed, named)

        async def main() -> dict[str, Any]:
            return await _create(
                parsed["format"], Path(image), settings, encryption, unsafe=parsed["unsafe"]
            )

        made = run_async(main)
    if not parsed["quiet"]:
        from qcowfs.driver.qcow2.description import format_size

        cluster_size = made["cluster_size"]
        text = f"{image}: {parsed['format']}, {format_size(made['size'])} ({made['size']} bytes)"
        text += f", clusters of {format_size(cluster_size)}"
        if made.get("backing_file"):
            text += f", backing file {made['backing_file']} ({made['backing_format']})"
        if made.get("data_file"):
            text += f", data file {made['data_file']}"
        if encryption is not None:
            text += f", encrypted ({encryption.cipher})"
        print_lines([text])
    return 0
