"""`python -m qcowfs`: the same as the command `qcowfs`."""

import sys

from qcowfs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
