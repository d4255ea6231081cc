"""Train the model of a config, with the flags of mmdet's script."""

import sys

from era_mm.cli import run_train

if __name__ == '__main__':
    sys.exit(run_train())
