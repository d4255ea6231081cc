"""Writes the students of a mutual distillation as plain checkpoints."""

import os
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook

from ..core import students_of
from ..core.safe_files import load_file
from ..registry import HOOKS


def write_students(checkpoint: str | Path) -> list[Path]:
    """Write each student of a checkpoint to ``<stem>_<name>.pth`` next to it.

    The files hold the student's own keys and the checkpoint's ``meta``
    (classes, epoch). Stock hosts load them.

    Args:
        checkpoint: A checkpoint of a ``MutualDistillation``.

    Returns:
        The files, one per student.

    Raises:
        ValueError: The checkpoint has no students.
    """
    checkpoint = Path(checkpoint)
    content = load_file(checkpoint)
    students = students_of(content['state_dict'])
    if not students:
        raise ValueError(
            f'{str(checkpoint)!r} holds no `students.<name>` weights. Give a '
            'checkpoint of a MutualDistillation.'
        )
    files = []
    for name, state_dict in students.items():
        file = checkpoint.with_name(f'{checkpoint.stem}_{name}.pth')
        part = file.with_suffix('.part')
        torch.save(
            {'meta': content.get('meta', {}), 'state_dict': state_dict}, part
        )
        # So that an interrupted run leaves no incomplete file.
        os.replace(part, file)
        files.append(file)
    return files


@HOOKS.register_module()
class StudentFilesHook(Hook):
    """After training, writes each student of the last and best checkpoint.

    From ``epoch_12.pth`` come ``epoch_12_first.pth`` and
    ``epoch_12_second.pth``. :func:`write_students` does the same for any
    checkpoint.

    Source: ours.
    """

    # After mmengine's CheckpointHook has written the last checkpoint.
    priority = 'LOWEST'

    @master_only
    def after_train(self, runner: Any) -> None:
        """Write the files."""
        found = {
            str(value)
            for key, value in runner.message_hub.runtime_info.items()
            if key == 'last_ckpt' or key.startswith('best_ckpt')
        }
        for checkpoint in sorted(found):
            for file in write_students(checkpoint):
                runner.logger.info(f'Plain student: {file}')
