"""Hooks that several methods share."""

from .modes import ModesHook
from .student_files import StudentFilesHook

__all__ = ['ModesHook', 'StudentFilesHook']
