"""``python -m era_mm train ...``, ``test`` and the other commands."""

import sys

from era_mm.cli import main

if __name__ == '__main__':
    sys.exit(main())
