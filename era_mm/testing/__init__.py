"""Toy models, toy data and assertions, for our tests and for others'."""

from .checks import (
    assert_same_steps,
    checksums,
    differ,
    noise,
    run_ranks,
    train_steps,
)
from .runs import recorded_run
from .toy import (
    classifier_config,
    classifier_loader,
    detection_batch,
    detector_config,
    distillation_config,
    era_model,
    give_opinions,
    run_config,
    save_teacher,
    two_stage_config,
    write_class_folders,
    write_coco,
)

__all__ = [
    'assert_same_steps',
    'checksums',
    'classifier_config',
    'classifier_loader',
    'detection_batch',
    'detector_config',
    'differ',
    'distillation_config',
    'era_model',
    'give_opinions',
    'noise',
    'recorded_run',
    'run_config',
    'run_ranks',
    'save_teacher',
    'train_steps',
    'two_stage_config',
    'write_class_folders',
    'write_coco',
]
