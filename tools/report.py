"""Write one page that shows what distillations did."""

import sys

from era_mm.cli import run_report

if __name__ == '__main__':
    sys.exit(run_report())
