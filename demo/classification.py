"""Teach a small classifier with ERA, from nothing to a table.

python -m demo.classification

Makes the digit crops, trains a teacher, a plain student and an ERA student
(same schedule, same seed) and writes table.json and table.md into
work_dirs/demo_classification. What is finished and unchanged is not repeated:
after an interruption, run it again.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from demo.base import Demo, main
from demo.report import Table
from demo.stages import Stage
from era_mm.datasets import digit_crops


class ClassificationDemo(Demo):
    """The classification demo."""

    configs = {
        'teacher': 'plain/plain_resnet18w16_digit_crops',
        'plain': 'plain/plain_resnet18w8_digit_crops',
        'era': 'era/era_normalised_resnet18w16_resnet18w8_digit_crops',
    }
    expected = {
        'data': 33,
        'teacher': 438,
        'plain': 195,
        'era': 261,
        'test_teacher': 18,
        'test_plain': 17,
        'test_era': 17,
        'measure': 14,
        'stock': 14,
    }
    least_teacher = 75.0
    table = Table(
        host='mmpretrain',
        noun='classifier',
        metrics={'top1': 'accuracy/top1'},
        percent=1.0,
        digits=2,
        caption='Top-1 accuracy in percent on the {} test crops',
        timed='from pixels to class',
    )
    images = 'crops'
    params_type = digit_crops.CropParams
    make_data = staticmethod(digit_crops.make_digit_crops)
    manifest = digit_crops.MANIFEST
    measure_module = 'demo.measure_classification'
    measure_title = 'time'

    def stages(self) -> list[Stage]:
        """All stages in order."""
        return [*super().stages(), self.stock_stage()]

    def stock_stage(self) -> Stage:
        """Test the ERA student with mmpretrain's own script and no era_mm."""
        script = Path(
            find_spec('mmpretrain').submodule_search_locations[0],
            '.mim/tools/test.py',
        )
        return self.evaluation_stage(
            'stock',
            'test the ERA student with stock mmpretrain',
            lambda: self.command(
                str(script), 'plain', self.result('era')['checkpoint']
            ),
            lambda: {
                **self.inputs('plain'),
                'checkpoint': self.result('era')['sha256'],
            },
        )

    def stock(self) -> dict:
        """How stock mmpretrain loads the ERA student."""
        return {
            **self.result('measure')['stock'],
            'top1': self.result('stock')['accuracy/top1'] / 100,
        }


if __name__ == '__main__':
    sys.exit(
        main(
            ClassificationDemo,
            __doc__.splitlines()[0],
            'work_dirs/demo_classification',
        )
    )
