"""A training loop that can resume inside an epoch."""

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop


class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which can also resume inside an epoch.

    mmengine's own would start such an epoch again: it would train on the
    first batches twice, and longer than the config says.
    """

    #: Number of batches of the next epoch that were already trained on.
    num_done = 0

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it."""
        done, self.num_done = self.num_done, 0
        if not done:
            super().run_epoch()
            return
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        # The batches before are read as well: with data workers, the others
        # then have the order and augmentation that they had.
        for idx, data_batch in enumerate(self.dataloader):
            if idx >= done:
                self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def validates_now(loop: BaseLoop) -> bool:
    """Whether a loop that was just resumed has to validate first.

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
