"""The machinery that all methods share; it knows none of them."""

from .base_distiller import BaseDistiller, Features
from .build import distillation_kind, student_config_of
from .checkpoint import (
    extras_of,
    load_strictly,
    read_checkpoint,
    students_of,
)
from .distillation import Distillation
from .host_models import HostModel
from .mutual import MutualDistillation, MutualOptimWrapperConstructor
from .phase import Phase
from .plan import MeasuredPair, Plan
from .recorder import Recorder
from .schedule import LossSchedule
from .step import DistilledStudent
from .teacher import Teacher
from .utils import Unregistered

__all__ = [
    'BaseDistiller',
    'Distillation',
    'DistilledStudent',
    'Features',
    'HostModel',
    'LossSchedule',
    'MeasuredPair',
    'MutualDistillation',
    'MutualOptimWrapperConstructor',
    'Phase',
    'Plan',
    'Recorder',
    'Teacher',
    'Unregistered',
    'distillation_kind',
    'extras_of',
    'load_strictly',
    'read_checkpoint',
    'student_config_of',
    'students_of',
]
