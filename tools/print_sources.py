"""List a model's modules with the shapes they put out."""

import sys

from era_mm.cli import run_print_sources

if __name__ == '__main__':
    sys.exit(run_print_sources())
