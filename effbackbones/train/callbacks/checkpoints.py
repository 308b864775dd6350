"""Which checkpoints a run keeps, and how they are written and read."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from effbackbones.checkpoint import read_checkpoint, write_checkpoint


class RunCheckpoints(Checkpoint):
    """Keeps last.ckpt, from which the run goes on, and best.ckpt, the weights of the best evaluation so far.

    Both are written after each evaluation; last.ckpt also at the end of an epoch without one, and every so many steps.
    Never between the last batch of an epoch or of the run and its evaluation: a run resumed from there would leave that
    out. An evaluation whose score is not a number is never the best.

    Args:
        folder: Folder of the checkpoints.
        monitor: Logged metric that decides which evaluation is best: the higher the better, except a loss.
        every: Optimizer steps from one last.ckpt to the next within an epoch; None for none.
    """

    def __init__(self, folder: Path, monitor: str, every: int | None = None):
        self.best, self.last = folder / "best.ckpt", folder / "last.ckpt"
        self.monitor = monitor
        self.every = every
        self.best_score: float | None = None
        self._saved_at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step  # what the run resumed from

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        evaluation_follows = trainer.is_last_batch or trainer.should_stop
        if self.every and trainer.global_step % self.every == 0 and not evaluation_follows:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        score = trainer.callback_metrics[self.monitor].item()
        if self._is_best(score):
            self.best_score = score
            trainer.save_checkpoint(self.best, weights_only=True)
        self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_last(trainer)

    def _is_best(self, score: float) -> bool:
        if self.best_score is None:
            return not math.isnan(score)
        return score < self.best_score if self.monitor.endswith("loss") else score > self.best_score

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_at:
            self._saved_at = trainer.global_step
            trainer.save_checkpoint(self.last)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files: written whole or not at all, read with plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`, whatever `weights_only` says with plain types only."""
        return read_checkpoint(path, map_location)
