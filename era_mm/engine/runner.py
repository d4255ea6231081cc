"""mmengine's Runner, with an eye on what a former run has left."""

from typing import Any

from mmengine.runner import Runner


class TrainingRunner(Runner):
    """Writes the config into the work dir when training begins.

    mmengine's does so when it is built, and a run that then stops, because a
    file or a teacher is wrong, has overwritten the config of the run whose
    checkpoints lie there.
    """

    def dump_config(self) -> None:
        """Not yet."""

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; after those of ``before_train`` write the config."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_train':
            super().dump_config()
