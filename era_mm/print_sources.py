"""``python -m era_mm.print_sources <config>``."""

import sys

from era_mm.cli import run_print_sources

if __name__ == '__main__':
    sys.exit(run_print_sources())
