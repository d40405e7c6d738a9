"""``python -m fmeta``, and ``torchrun ... -m fmeta``: the command line."""

import sys

from fmeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
