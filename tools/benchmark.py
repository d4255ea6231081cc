"""Measure time and memory of distillations beside their plain student."""

import sys

from era_mm.cli import run_benchmark

if __name__ == '__main__':
    sys.exit(run_benchmark())
