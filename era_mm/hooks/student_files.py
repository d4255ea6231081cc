"""Writes the students of a mutual distillation as plain host files."""

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
    """Write each student of a checkpoint beside it, as ``<stem>_<name>.pth``.

    The files hold the student's own keys and what the checkpoint says of
    itself (``meta``: classes, epoch); stock hosts load them.

    Args:
        checkpoint: A file that the training of a ``MutualDistillation`` has
            written.

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
            'checkpoint that the training of a MutualDistillation wrote.'
        )
    files = []
    for name, state_dict in students.items():
        file = checkpoint.with_name(f'{checkpoint.stem}_{name}.pth')
        part = file.with_suffix('.part')
        torch.save(
            {'meta': content.get('meta', {}), 'state_dict': state_dict}, part
        )
        # So that an interrupted run leaves no half a file under the name.
        os.replace(part, file)
        files.append(file)
    return files


@HOOKS.register_module()
class StudentFilesHook(Hook):
    """After training, writes each student of the last and best checkpoint.

    ``epoch_12.pth`` gives ``epoch_12_first.pth`` and ``epoch_12_second.pth``;
    see :func:`write_students`, which does the same for any checkpoint.

    Source: ours.
    """

    # After mmengine's CheckpointHook, which writes the last one.
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
                runner.logger.info(f'A plain student: {file}')
