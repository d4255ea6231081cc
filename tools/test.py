"""Evaluate a checkpoint, with the flags of mmdet's script."""

import sys

from era_mm.cli import run_test

if __name__ == '__main__':
    sys.exit(run_test())
