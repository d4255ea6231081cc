"""Write a distilled student as an ordinary model of its host."""

import sys

from era_mm.cli import run_export_student

if __name__ == '__main__':
    sys.exit(run_export_student())
