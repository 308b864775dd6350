"""How a run ends at a number of optimizer steps."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAtStep(Callback):
    """Ends the run after `steps` optimizer steps, with an evaluation; Lightning's max_steps leaves that out."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self.steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1


def total_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of the whole run; infinite where neither the data nor the trainer has an end."""
    estimated = trainer.estimated_stepping_batches
    limits = [callback.steps for callback in trainer.callbacks if isinstance(callback, StopAtStep)]  # type: ignore[attr-defined]
    return min([float("inf") if estimated < 0 else estimated, *limits])
