"""Shows the decomposition of a few images while a distillation runs."""

import time
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from era_mm.core import Distillation
from era_mm.core.utils import preserve_rng
from era_mm.registry import HOOKS
from era_mm.report.runs import LEVEL_PREFIX


@HOOKS.register_module()
class ResidualVisHook(Hook):
    """Sends features and residuals of some images to the run's Visualizer.

    Every ``interval`` iterations and at the end, on one rank, for the first
    images of val:

    - a picture for each image and level: the teacher's feature and the
      estimates e_0 ... e_n; the residual of each; what each branch adds (root
      mean square over the channels, as ``heat_rows`` describes);
    - the scalars ``residuals/unexplained_e<i>_level<l>``: the share of the
      teacher's variance that e_i leaves on level l of these images.

    They go to every backend of the config (TensorBoard, Weights & Biases,
    MLflow, local files). mmengine's ``LoggerHook`` sends losses and shares
    over all levels there. The hook does not affect the run: modes of the
    model and random state are restored. It logs its own time at the end.

    For a method without estimates, the student's feature is shown next to the
    teacher's if both have the same shape.

    Source: ours.

    Args:
        interval: Iterations between two pictures. With 500, pictures that
            take as long as four iterations cost less than 1 %.
        num_images: Number of val images that are shown.

    Raises:
        ValueError: A number is below 1.
        TypeError: The model is not a ``Distillation``.
    """

    priority = 'LOWEST'

    def __init__(self, interval: int = 500, num_images: int = 2) -> None:
        for name, value in (
            ('interval', interval),
            ('num_images', num_images),
        ):
            if value < 1:
                raise ValueError(
                    f'`{name}` must be 1 or more, but got {value}. Remove the '
                    'hook to turn it off.'
                )
        self.interval = interval
        self.num_images = num_images
        self._batches: list[Any] = []
        self._seconds = 0.0
        self._began = 0.0
        self._looked_at = -1

    @staticmethod
    def _model(runner: Runner) -> Distillation:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, Distillation):
            raise TypeError(
                'ResidualVisHook needs a model of type era_mm.Distillation, '
                f'but the runner trains a {type(model).__name__}. Remove the '
                'hook.'
            )
        return model

    def before_run(self, runner: Runner) -> None:
        """Refuse other models before the run starts."""
        self._model(runner)

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Read the images, once."""
        self._began = time.perf_counter()
        self._seconds = 0.0
        if runner.val_loop is None:
            runner.logger.warning(
                'ResidualVisHook: the run has no val data, so there is '
                'nothing to show. Set `val_dataloader`, or remove the hook.'
            )
            return
        with preserve_rng():
            loader = runner.val_dataloader
            number = min(self.num_images, len(loader.dataset))
            self._batches = [
                loader.collate_fn([loader.dataset[i]]) for i in range(number)
            ]
        self._seconds = time.perf_counter() - self._began

    @master_only
    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Show the images every ``interval`` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            self._look(runner, runner.iter + 1)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Show the images once more, and log the time that all of it took."""
        if self._looked_at != runner.iter:
            self._look(runner, runner.iter)
        whole = time.perf_counter() - self._began
        runner.logger.info(
            f'ResidualVisHook took {self._seconds:.1f} s, '
            f'{self._seconds / whole:.2%} of the run.'
        )

    def _look(self, runner: Runner, step: int) -> None:
        from era_mm.report.heat import heat_rows, mosaic
        from era_mm.report.parts import parts_of

        began = time.perf_counter()
        model = self._model(runner)
        shares = []
        for number, batch in enumerate(self._batches):
            found = parts_of(model, batch)
            if found is None:
                break
            parts, names = found
            for level, target in enumerate(parts.teacher):
                rows = heat_rows(
                    target[0],
                    [estimate[level][0] for estimate in parts.estimates],
                    names,
                )
                runner.visualizer.add_image(
                    f'residuals_image{number}_level{level}',
                    mosaic(rows),
                    step,
                )
            if parts.shares is not None:
                shares.append(parts.shares)
        if shares:
            mean = torch.stack(shares).mean(dim=0)
            runner.visualizer.add_scalars(
                {
                    f'{LEVEL_PREFIX}unexplained_e{i}_level{level}': value
                    for level, row in enumerate(mean.tolist())
                    for i, value in enumerate(row)
                },
                step=step,
            )
        self._looked_at = step
        self._seconds += time.perf_counter() - began
