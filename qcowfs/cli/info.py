"""`qcowfs info`: what an image is, as text or as JSON with qemu-img's keys.

Reads only. The facts are those of `info.json` in a mount; their wording as text
is that of `qcowfs.driver.qcow2.description`.
"""

import json
from pathlib import Path
from typing import Any

from qcowfs.cli.common import Parser, naming, print_lines, run_async


def _parser() -> Parser:
    parser = Parser("info", "Show what an image is.")
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("--json", action="store_true", help="the keys of qemu-img info --output=json")
    add("--format", metavar="FORMAT", help="the image's format; raw is never guessed")
    add("-U", "--force-share", action="store_true", help="read it even while it is in use")
    return parser


async def _describe(options: Any) -> dict[str, Any]:
    from qcowfs.driver.opening import open_image
    from qcowfs.fuse.xattrs import info_of

    node = await open_image(
        Path(options.image),
        format=options.format,
        read_only=True,
        force_share=options.force_share,
        backing=False,
        describe_only=True,
    )
    try:
        return info_of(node)
    finally:
        await node.aclose()


def run(arguments: list[str]) -> int:
    """Run `qcowfs info`; answers the exit code."""
    options = _parser().parse_args(arguments)
    with naming(options.image):
        facts = run_async(lambda: _describe(options))
        if options.json:
            print(json.dumps(facts, indent=4))
        else:
            from qcowfs.driver.qcow2.description import render

            print_lines(render(facts).splitlines())
    return 0
