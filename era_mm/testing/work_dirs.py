"""Work dirs as trainings leave them, written by hand for tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

STUDENT = "dict(type='RetinaNet', backbone=dict(type='ResNet', depth=18))"


def write_run(
    folder: str | Path,
    *,
    model: str = STUDENT,
    seed: int = 0,
    metrics: Sequence[dict] = (),
    train: Sequence[dict] = (),
    epochs: int = 2,
    stamp: str = '20260101_000000',
    log: str = '',
    checkpoint: str | None = 'epoch_2.pth',
    more: str = '',
) -> Path:
    """A work dir of one training.

    Args:
        folder: Where.
        model: Python text of its model config.
        seed: Of the config.
        metrics: A dict for each epoch with validation.
        train: A dict for each logged iteration.
        epochs: That the config asks for.
        stamp: Name of the log's folder.
        log: Text log.
        checkpoint: Name of its file, or None.
        more: Further lines of the config.
    """
    folder = Path(folder)
    data = folder / stamp / 'vis_data'
    data.mkdir(parents=True)
    config = (
        f'model = {model}\nrandomness = dict(seed={seed})\n'
        f'train_cfg = dict(by_epoch=True, max_epochs={epochs})\n{more}\n'
    )
    (data / 'config.py').write_text(config)
    (folder / 'recipe.py').write_text(config)
    lines = [json.dumps(line) for line in (*train, *metrics)]
    (data / 'scalars.json').write_text('\n'.join(lines) + '\n')
    (folder / stamp / f'{stamp}.log').write_text(log)
    if checkpoint:
        (folder / checkpoint).write_bytes(b'')
        (folder / 'last_checkpoint').write_text(str(folder / checkpoint))
    return folder


def distilled(
    teacher: str | Path = 'work_dirs/teacher/epoch_2.pth',
    student: str = STUDENT,
) -> str:
    """The model of a distillation, as text."""
    return (
        f"dict(type='era_mm.Distillation', student={student}, "
        f"teacher=dict(config='t.py', checkpoint={str(teacher)!r}), "
        "distiller=dict(type='era_mm.ERADistiller'))"
    )


def train_lines(
    number: int,
    start: int = 1,
    per_epoch: int = 10,
    **values: float | Callable[[int], float],
) -> list[dict]:
    """Logged iterations; a value may be a function of the iteration."""
    return [
        {
            'lr': 0.1,
            'epoch': (step - 1) // per_epoch + 1,
            'iter': step,
            'step': step,
            **{
                k: v(step) if callable(v) else v
                for k, v in {'loss': 1.0, **values}.items()
            },
        }
        for step in range(start, start + number)
    ]
