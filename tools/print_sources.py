"""List a model's modules with the shapes they output."""

import sys

from era_mm.cli import run_print_sources

if __name__ == '__main__':
    sys.exit(run_print_sources())
