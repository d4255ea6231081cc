"""Toy models, toy data and assertions, for our tests and for others'."""

from .runs import recorded_run
from .toy import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
    save_teacher,
    two_stage_config,
    write_coco,
)

__all__ = [
    'classifier_config',
    'detection_batch',
    'detector_config',
    'distillation_config',
    'recorded_run',
    'run_config',
    'save_teacher',
    'two_stage_config',
    'write_coco',
]
