"""An epoch that goes on where a checkpoint inside it was written."""

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop


class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which would begin such an epoch again.

    It would train on the first batches of the epoch twice, and longer than
    the config says.
    """

    #: Batches of the next epoch that are trained on already.
    num_done = 0

    def run_epoch(self) -> None:
        """Iterate one epoch, or the rest of it."""
        done, self.num_done = self.num_done, 0
        if not done:
            super().run_epoch()
            return
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        # Reading what is thrown away keeps order and augmentation as they
        # were where workers read.
        for idx, data_batch in enumerate(self.dataloader):
            if idx >= done:
                self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def validates_now(loop: BaseLoop) -> bool:
    """Whether a loop that was just resumed had a validation before it.

    A checkpoint is written before the validation of its epoch or iteration,
    so a resumed run cannot know whether that took place.
    """
    if type(loop) in (ResumableEpochLoop, EpochBasedTrainLoop):
        if getattr(loop, 'num_done', 0):
            return False
        now, last = loop.epoch, loop.max_epochs
    elif type(loop) is IterBasedTrainLoop:
        now, last = loop.iter, loop.max_iters
    else:
        return False
    loop._decide_current_val_interval()
    return now >= max(loop.val_begin, 1) and (
        now % loop.val_interval == 0 or now == last
    )
