"""`qcowfs amend`: changes of an image at rest that touch no guest data.

Today the key slots of an encrypted image: listed, added, removed. The image
must not be in use, and its locks see to that. Passphrases come from files or
are typed, never from the command line.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowfs.cli.common import Parser, naming, print_lines, run_async
from qcowfs.cli.keys import read_key
from qcowfs.errors import BadRequest, UnsupportedFeature

if TYPE_CHECKING:
    from qcowfs.driver.qcow2.image import Qcow2Node

_ITERATION_TIME = 2000


def _parser() -> Parser:
    parser = Parser("amend", "Change an image at rest.")
    add = parser.add_argument
    add("image", metavar="IMAGE")
    verbs = parser.add_mutually_exclusive_group(required=True)
    verbs.add_argument("--list-keys", action="store_true", help="show the key slots")
    verbs.add_argument("--add-key", metavar="FILE",
        help="let the passphrase in FILE open the image; - asks for it")  # fmt: skip
    verbs.add_argument("--remove-key", metavar="FILE",
        help="remove the key slots that the passphrase in FILE opens; - asks for it")  # fmt: skip
    verbs.add_argument("--remove-slot", metavar="N", type=int, help="remove key slot N")
    add("--key-file", metavar="FILE",
        help="for --add-key, a passphrase that opens the image now, without one newline at its "
        "end; - asks for it")  # fmt: skip
    add("--slot", metavar="N", type=int, help="for --add-key, 0 to 7 (the first free one)")
    add("--iter-time", metavar="MS", type=int, default=_ITERATION_TIME,
        help=f"for --add-key, milliseconds that trying it is to take ({_ITERATION_TIME})",
        )  # fmt: skip
    add("--force", action="store_true", help="remove the last key slot too")
    add("--json", action="store_true", help="for --list-keys, with qemu-img's keys")
    return parser


async def _open(image: str, *, read_only: bool) -> "Qcow2Node":
    from qcowfs.driver.opening import open_image
    from qcowfs.driver.qcow2.image import Qcow2Node

    node = await open_image(Path(image), read_only=read_only, backing=False, describe_only=True)
    if not isinstance(node, Qcow2Node):
        format_name = node.format_name
        await node.aclose()
        raise UnsupportedFeature(f"the format {format_name} has no key slots")
    return node


async def _list(image: str) -> list[dict[str, Any]]:
    """The slots as `qemu-img info` tells them."""
    from qcowfs.driver.qcow2.key_slots import load_luks

    node = await _open(image, read_only=True)
    try:
        await load_luks(node.metadata)
        slots: list[dict[str, Any]] = node.info()["format-specific"]["data"]["encrypt"]["slots"]
        return slots
    finally:
        await node.aclose()


async def _add(image: str, options: argparse.Namespace, secret: bytes, new: bytes) -> int:
    from qcowfs.driver.qcow2.key_slots import add_key

    node = await _open(image, read_only=False)
    try:
        return await add_key(
            node.metadata, secret, new, index=options.slot, iteration_time=options.iter_time
        )
    finally:
        await node.aclose()


async def _remove(image: str, options: argparse.Namespace, secret: bytes | None) -> list[int]:
    from qcowfs.driver.qcow2.key_slots import remove_slots, slots_opened_by

    node = await _open(image, read_only=False)
    try:
        indexes = [options.remove_slot]
        if secret is not None:
            indexes = await slots_opened_by(node.metadata, secret)
        await remove_slots(node.metadata, indexes, force=options.force)
        return indexes
    finally:
        await node.aclose()


def _lines(slots: list[dict[str, Any]]) -> list[str]:
    return [
        f"{number}: in use, {slot['iters']} iterations" if slot["active"] else f"{number}: free"
        for number, slot in enumerate(slots)
    ]


def run(arguments: list[str]) -> int:
    """Run `qcowfs amend`; answers the exit code."""
    options = _parser().parse_args(arguments)
    image = options.image
    with naming(image):
        if options.list_keys:
            slots = run_async(lambda: _list(image))
            if options.json:
                print(json.dumps(slots, indent=4))
            else:
                print_lines(_lines(slots))
            return 0
        if options.add_key is not None:
            if options.key_file is None:
                raise BadRequest("--add-key needs a passphrase that opens the image now",
                                 hint="--key-file FILE")  # fmt: skip
            if options.iter_time <= 0:
                raise BadRequest("--iter-time: a positive number of milliseconds")
            secret = read_key(options.key_file, prompt="Passphrase that opens the image now: ")
            new = read_key(options.add_key, prompt="New passphrase: ")
            index = run_async(lambda: _add(image, options, secret, new))
            print_lines([f"{image}: key slot {index} is in use now"])
            return 0
        old = None
        if options.remove_key is not None:
            old = read_key(options.remove_key, prompt="Passphrase to remove: ")
        removed = run_async(lambda: _remove(image, options, old))
        print_lines([f"{image}: key slot {index} is free now" for index in removed])
    return 0
