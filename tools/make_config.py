"""Write the config that distils one existing model into another."""

import sys

from era_mm.cli import run_make_config

if __name__ == '__main__':
    sys.exit(run_make_config())
