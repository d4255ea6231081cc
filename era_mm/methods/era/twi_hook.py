"""TWIHook: checks the teacher's weights and reports each inference mode."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.model import is_model_wrapper
from torch import Tensor

from ...core import Distillation
from ...hooks import ModesHook
from ...registry import HOOKS

#: Share of the teacher's variance that a branch should explain.
LEAST_GAIN = 0.001


@HOOKS.register_module()
class TWIHook(ModesHook):
    """Checks the teacher's weights and evaluates the inference modes.

    Before and after training it checks, bit for bit, that the teacher has the
    weights of its checkpoint. In validation and test it is a ``ModesHook``:
    every mode is evaluated in the same pass over the data, with the student's
    features computed once, and reported under its name:
    ``T/coco/bbox_mAP``. The metrics of the student itself (S) have their
    ordinary names.

    If the branches work in a normalised space, it also compares the estimates
    with the teacher's feature on the first validation batches, and reports
    the unexplained share of the variance, ``era/unexplained_e0`` and so on.
    Branches that explain less than 0.1 % are named in the log.

    Source: ERA's three modes ([note] in its dossier); the rest is ours.

    Args:
        modes: Any of 'T' (final estimate through the teacher's head), 'ST'
            (blend), 'E0', 'E1', ... (earlier estimates). 'S' is allowed and
            has no effect.
        unexplained_batches: Batches of each rank on which estimates are
            compared with the teacher's feature. 0: none.
    """

    def __init__(
        self,
        modes: Sequence[str] = ('T', 'ST'),
        unexplained_batches: int = 8,
    ) -> None:
        super().__init__(modes)
        if unexplained_batches < 0:
            raise ValueError(
                '`unexplained_batches` must not be negative, but got '
                f'{unexplained_batches}.'
            )
        self.unexplained_batches = unexplained_batches
        self._unexplained: dict[str, list[Tensor]] = {}

    @staticmethod
    def _model(runner: Any) -> Distillation:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, Distillation):
            raise TypeError(
                'TWIHook needs a model of type era_mm.Distillation, but the '
                f'runner trains a {type(model).__name__}.'
            )
        return model

    def before_train(self, runner: Any) -> None:
        """Check that the teachers hold their checkpoints' weights."""
        self._model(runner).load_teachers()
        self._check_teachers(runner, 'before training')

    def after_train(self, runner: Any) -> None:
        """Check that training has not changed the teachers."""
        self._check_teachers(runner, 'after training')

    def _check_teachers(self, runner: Any, when: str) -> None:
        for teacher in self._model(runner).teachers.values():
            if teacher.fingerprint() != teacher.loaded_fingerprint:
                raise RuntimeError(
                    f'The weights of the {teacher.name} {when} are not those '
                    f'of {teacher.checkpoint!r}: something has changed '
                    'them. No hook or wrapper may train, average or fuse '
                    'the teacher.'
                )

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Collect the modes' predictions, and compare the estimates."""
        super().after_val_iter(runner, batch_idx, data_batch, outputs)
        if batch_idx < self.unexplained_batches:
            values = self._model(runner).compare(data_batch)
            for name, shares in values.items():
                self._unexplained.setdefault(name, []).append(shares)

    def after_val_epoch(
        self, runner: Any, metrics: dict | None = None
    ) -> None:
        """Add the modes' metrics and the unexplained shares."""
        super().after_val_epoch(runner, metrics)
        own = {
            name: torch.stack(shares).tolist()
            for name, shares in self._unexplained.items()
        }
        self._unexplained = {}
        found: dict[str, list] = {}
        # A rank may have had no batch, so it does not know the names.
        for of_rank in all_gather_object(own):
            for name, rows in of_rank.items():
                found.setdefault(name, []).extend(rows)
        several = len(found) > 1
        for name, rows in found.items():
            prefix = f'{name}.era' if several else 'era'
            values = torch.tensor(rows).mean(dim=0).tolist()
            if metrics is not None:
                metrics |= {
                    f'{prefix}/unexplained_e{step}': value
                    for step, value in enumerate(values)
                }
            idle = [
                str(step)
                for step in range(1, len(values))
                if values[step - 1] - values[step] < LEAST_GAIN
            ]
            if idle:
                runner.logger.info(
                    f"{prefix}: of the teacher's variance e_0 leaves "
                    f'{values[0]:.1%} and e_{len(values) - 1} '
                    f'{values[-1]:.1%}; branch {", ".join(idle)} adds less '
                    f'than {LEAST_GAIN:.1%}.'
                )
