"""`qcowfs create`: makes a qcow2 image, with qemu-img's option names or long options.

Paths and options only: what an image may be is decided, and refused, in
`qcowfs.driver.qcow2.create`. A backing file is opened to learn its size and
format; its name goes into the image as it was given, and is resolved from the
folder of the image, as every reader will do.
"""

import os
from pathlib import Path
from typing import Any

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
from qcowfs.errors import BadRequest

_VERSIONS = {"2": 2, "3": 3, "v2": 2, "v3": 3, "0.10": 2, "1.1": 3}
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_COMPRESSIONS = ("zlib", "zstd")


def _parser() -> Parser:
    parser = Parser("create", "Make a new qcow2 image.")
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("size", metavar="SIZE", nargs="?", help="10G; a backing file's own when left out")
    add("-f", "--format", metavar="FORMAT", default="qcow2", help="qcow2")
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
        case "extended_l2" | "lazy_refcounts":
            return name, parse_switch(value, name)
        case "backing_file":
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
            path, format=settings.get("backing_format"), read_only=True, force_share=True
        )
    try:
        settings.setdefault("size", node.virtual_size)
        settings.setdefault("backing_format", node.format_name)
    finally:
        await node.aclose()


async def _create(image: Path, settings: dict[str, Any], *, unsafe: bool) -> dict[str, Any]:
    from qcowfs.driver.qcow2.create import create_qcow2

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
    await create_qcow2(image, size, **settings)
    return {"size": size, **settings}


def run(arguments: list[str]) -> int:
    """Run `qcowfs create`; answers the exit code."""
    parsed = vars(_parser().parse_args(arguments))
    image = parsed["image"]
    if parsed["format"] != "qcow2":
        raise CommandError(f'cannot create the format "{parsed["format"]}"', file=image)
    with naming(image):
        settings = _read_settings(parsed)

        async def main() -> dict[str, Any]:
            return await _create(Path(image), settings, unsafe=parsed["unsafe"])

        made = run_async(main)
    if not parsed["quiet"]:
        from qcowfs.driver.qcow2.description import format_size

        cluster_size = made.get("cluster_size", 1 << 16)
        text = f"{image}: qcow2, {format_size(made['size'])} ({made['size']} bytes)"
        text += f", clusters of {format_size(cluster_size)}"
        if made.get("backing_file"):
            text += f", backing file {made['backing_file']} ({made['backing_format']})"
        print_lines([text])
    return 0
