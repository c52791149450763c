"""The command `qcowfs`: finds the command's module, runs it, and answers its exit code.

Each command is a module with `run(arguments) -> int`, imported only when it is
called for. `qcowfs IMAGE MOUNTPOINT -o ...` is `qcowfs mount`, because that is
how mount.fuse3 calls a filesystem.
"""

import importlib
import os
import sys

from qcowfs.cli.common import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    CommandError,
    prepare_process,
    print_error,
)

COMMANDS = {
    "mount": "show an image as a directory: the active disk and every snapshot as raw files",
    "umount": "unmount, and return when the image is flushed, closed and unlocked",
    "create": "make a new qcow2 image",
    "info": "show what an image is",
    "amend": "change an image at rest: the key slots of an encrypted one",
    "snapshot": "list, create, apply, delete or rename the snapshots of an image at rest",
}
_HIDDEN = ("demo",)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    return (
        "usage: qcowfs COMMAND [options] ...\n"
        "       qcowfs IMAGE MOUNTPOINT [-o OPTION,...]\n\n"
        f"{rows}\n\n"
        "qcowfs COMMAND --help tells more about each."
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qcowfs")
    except PackageNotFoundError:
        return "(not installed)"


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_help())
        return 0 if arguments else EXIT_FAILURE
    first = arguments[0]
    if first in {"-V", "--version"}:
        print(f"qcowfs {_version()}")
        return 0
    if first in COMMANDS or first in _HIDDEN:
        command, rest = first, arguments[1:]
    elif len(arguments) >= 2:
        command, rest = "mount", arguments
    else:
        raise CommandError("there is no such command", file=first, hint="qcowfs --help")
    module = importlib.import_module(f"qcowfs.cli.{command}")
    exit_code: int = module.run(rest)
    return exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; answers the exit code."""
    prepare_process()
    try:
        exit_code = _dispatch(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return exit_code
    except CommandError as error:
        print_error(error.line())
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; the interpreter's own last flush
        # must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
