"""``python -m era_mm.make_config --student S --teacher T --out FILE``."""

import sys

from era_mm.cli import run_make_config

if __name__ == '__main__':
    sys.exit(run_make_config())
