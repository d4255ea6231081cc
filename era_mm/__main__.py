"""``python -m era_mm`` prints the packages era_mm found.

``python -m era_mm report ...`` writes a page about runs.
"""

import sys

from era_mm.hosts import print_hosts

if __name__ == '__main__':
    if sys.argv[1:2] == ['report']:
        from era_mm.cli import run_report

        sys.exit(run_report(sys.argv[2:]))
    print_hosts()
