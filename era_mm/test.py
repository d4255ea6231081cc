"""``python -m era_mm.test <config> <checkpoint> ...``."""

import sys

from era_mm.cli import run_test

if __name__ == '__main__':
    sys.exit(run_test())
