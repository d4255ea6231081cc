"""``python -m era_mm.train <config> ...``."""

import sys

from era_mm.cli import run_train

if __name__ == '__main__':
    sys.exit(run_train())
