"""A process that serves one mount for a test: `python -m tests.fuse.daemon REQUEST`.

REQUEST is JSON: `options` for MountOptions; `fake` puts a fake image in the
place of the real one, with the snapshots named; `hostile_signals` starts as
under a parent that ignores and blocks them; `fail_close` loses the last flush.
It writes `ready` to descriptor `ready_fd` and its log to standard error.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from qcowfs.driver.node import Node
from qcowfs.errors import QcowfsError
from qcowfs.fuse import session
from tests.fuse.fake_node import FakeNode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(request: dict[str, Any]) -> int:
    options = request["options"]
    paths = {name: Path(options.pop(name)) for name in ("image", "mountpoint")}
    if "fake" in request:
        node = FakeNode(request.get("size", 1 << 20), read_only=options.get("read_only", False))
        for name in request["fake"]:
            node.add(name.encode())
        if request.get("fail_close"):

            async def fail() -> None:
                raise OSError(5, "injected")

            node.aclose = fail

        async def open_fake(*arguments: object, **values: object) -> Node:
            return node

        session.open_image = open_fake
    if request.get("hostile_signals"):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    mount_options = session.MountOptions(**paths, **options)

    def ready() -> None:
        os.write(request["ready_fd"], b"ready")
        os.close(request["ready_fd"])

    try:
        return trio.run(lambda: session.serve(mount_options, ready=ready))
    except (QcowfsError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    sys.exit(main(json.loads(sys.argv[1])))
