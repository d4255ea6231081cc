"""``python -m era_mm.suite FILE``."""

import sys

from era_mm.cli import run_suite

if __name__ == '__main__':
    sys.exit(run_suite())
