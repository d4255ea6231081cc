"""PolicyHook: records how the policy changes."""

import json
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...registry import HOOKS
from .dafa import DAFA
from .distiller import SoKDDistiller

FILE = 'sokd_policy.jsonl'


def policy_record(policy: DAFA, step: int) -> dict[str, Any]:
    """A policy at one step, as a line of the file.

    Returns:
        ``step``; ``usage``, for each operation how much it is used and its
        mean magnitude, see ``DAFA.usage``; ``policies``, the names of each
        sub-policy's operations; ``probability`` softmax(alpha), ``(S,)``;
        ``gate`` beta and ``magnitude`` m, ``(S, K)``.
    """
    return {
        'step': step,
        'usage': policy.usage(),
        'policies': [
            [type(op).__name__ for op in ops] for ops in policy.policies
        ],
        'probability': policy.alpha.detach().softmax(0).tolist(),
        'gate': policy.beta.tolist(),
        'magnitude': policy.magnitude.tolist(),
    }


def describe(policy: DAFA, num: int = 4) -> str:
    """The operations used most, in one line."""
    usage = sorted(
        policy.usage().items(), key=lambda item: item[1], reverse=True
    )
    return ', '.join(
        f'{name} {use:.3f} (m {magnitude:.2f})'
        for name, (use, magnitude) in usage[:num]
    )


@HOOKS.register_module()
class PolicyHook(Hook):
    """Writes SoKD's policy to ``sokd_policy.jsonl`` in the work folder.

    One line per ``interval`` iterations, see :func:`policy_record`, and the
    most used operations to the log. A resumed run appends to the file;
    repeated steps occur twice, and the last line of a step is valid.
    ``tools/sokd_pictures.py`` draws it.

    Source: ours.

    Args:
        interval: Iterations between two lines.

    Raises:
        TypeError: At the start of the run, if the model has no
            ``SoKDDistiller`` with a policy.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        """Begin the file."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        found = [
            distiller.policy
            for distiller in getattr(model, 'distillers', {}).values()
            if isinstance(distiller, SoKDDistiller) and distiller.policy
        ]
        if len(found) != 1:
            raise TypeError(
                'PolicyHook needs a model with one SoKDDistiller that has a '
                f'policy, but the model ({type(model).__name__}) has '
                f'{len(found)}. Remove the hook.'
            )
        self._policy = found[0]
        self._file = Path(runner.work_dir, FILE)
        if runner.iter == 0 and is_main_process():
            self._file.write_text('')
        self._write(runner, runner.iter)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Write a line per interval and at the end."""
        done = runner.iter + 1
        if done % self.interval == 0 or done == runner.max_iters:
            self._write(runner, done)

    def _write(self, runner: Any, step: int) -> None:
        if is_main_process():
            with self._file.open('a') as file:
                file.write(json.dumps(policy_record(self._policy, step)))
                file.write('\n')
        runner.logger.info(f'SoKD policy: {describe(self._policy)}')
