"""How a run ends."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EndOfRun(Callback):
    """Ends the run after `steps` optimizer steps, where that is not None, and has it end with an evaluation.

    Lightning's max_steps leaves that out, and so does an interval of evaluations that does not divide the epochs.
    """

    def __init__(self, steps: int | None = None):
        self.steps = math.inf if steps is None else steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self.steps
        self._evaluate_at_the_end(trainer)  # or one more step would be trained where that evaluation was the last thing

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.steps
        self._evaluate_at_the_end(trainer)

    def _evaluate_at_the_end(self, trainer: Trainer) -> None:
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


def total_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of the whole run; infinite where neither the data nor the trainer has an end."""
    estimated = trainer.estimated_stepping_batches
    limits = [callback.steps for callback in trainer.callbacks if isinstance(callback, EndOfRun)]  # type: ignore[attr-defined]
    return min([math.inf if estimated < 0 else estimated, *limits])
