"""`qcowfs snapshot`: the snapshots of an image at rest.

On a mounted image the same is done by attributes and by `rm` and `mv` inside
`snapshots/`; here the image must not be in use, and its locks see to that.
Backing files and data files are not opened, and no passphrase is asked for: no
snapshot operation needs them.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs.cli.common import CommandError, Parser, naming, print_lines, run_async
from qcowfs.errors import UnsupportedFeature

if TYPE_CHECKING:
    from qcowfs.driver.qcow2.image import Qcow2Node

_USAGE = {
    "list": "IMAGE",
    "create": "IMAGE NAME",
    "apply": "IMAGE NAME|ID",
    "delete": "IMAGE NAME|ID",
    "rename": "IMAGE NAME|ID NEW",
}


def _parser(verb: str) -> Parser:
    parser = Parser(f"snapshot {verb}", f"{verb.capitalize()}: {_USAGE[verb]}")
    parser.add_argument("image", metavar="IMAGE")
    if verb == "list":
        parser.add_argument("--json", action="store_true", help="as JSON, with qemu-img's keys")
        parser.add_argument(
            "-U", "--force-share", action="store_true", help="read it even while it is in use"
        )
    else:
        parser.add_argument("name", metavar="NAME" if verb == "create" else "NAME|ID")
    if verb == "rename":
        parser.add_argument("new", metavar="NEW")
    return parser


async def _open(image: str, *, read_only: bool, force_share: bool = False) -> "Qcow2Node":
    from qcowfs.driver.opening import open_image
    from qcowfs.driver.qcow2.image import Qcow2Node

    node = await open_image(
        Path(image),
        read_only=read_only,
        force_share=force_share,
        backing=False,
        describe_only=True,
    )
    if not isinstance(node, Qcow2Node):
        format_name = node.format_name
        await node.aclose()
        raise UnsupportedFeature(f"the format {format_name} has no internal snapshots")
    return node


async def _list(image: str, *, force_share: bool) -> list[dict[str, Any]]:
    """The entries of `qemu-img info`, and each snapshot's own disk size where it is known."""
    node = await _open(image, read_only=True, force_share=force_share)
    try:
        entries: list[dict[str, Any]] = node.info().get("snapshots", [])
        for entry, snapshot in zip(entries, node.snapshots(), strict=True):
            if snapshot.disk_size is not None:
                entry["disk-size"] = snapshot.disk_size
        return entries
    finally:
        await node.aclose()


async def _change(verb: str, image: str, name: bytes, new: bytes) -> None:
    node = await _open(image, read_only=False)
    try:
        if verb == "create":
            await node.create_snapshot(name)
        elif verb == "apply":
            await node.apply_snapshot(name)
        elif verb == "delete":
            await node.delete_snapshot(name)
        else:
            await node.rename_snapshot(name, new)
    finally:
        await node.aclose()


def run(arguments: list[str]) -> int:
    """Run `qcowfs snapshot`; answers the exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print("usage: " + "\n       ".join(f"qcowfs snapshot {v} {_USAGE[v]}" for v in _USAGE))
        return 0 if arguments else 1
    verb = arguments[0]
    if verb not in _USAGE:
        raise CommandError(
            f'there is no "snapshot {verb}"', file="snapshot", hint=f"one of {', '.join(_USAGE)}"
        )
    options = _parser(verb).parse_args(arguments[1:])
    with naming(options.image):
        if verb != "list":
            new = os.fsencode(options.new) if verb == "rename" else b""
            name = os.fsencode(options.name)
            run_async(lambda: _change(verb, options.image, name, new))
            return 0
        snapshots = run_async(lambda: _list(options.image, force_share=options.force_share))
        if options.json:
            print(json.dumps(snapshots, indent=4))
        elif snapshots:
            from qcowfs.driver.qcow2.description import render_snapshots

            print_lines(render_snapshots(snapshots))
    return 0
