"""Hooks that several methods share."""

from .ema import EMAHook
from .modes import ModesHook
from .student_files import StudentFilesHook

__all__ = ['EMAHook', 'ModesHook', 'StudentFilesHook']
