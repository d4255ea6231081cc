"""``python -m era_mm.benchmark <config> ...``."""

import sys

from era_mm.cli import run_benchmark

if __name__ == '__main__':
    sys.exit(run_benchmark())
