"""Which checkpoints a run keeps, and how they are written and read."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from effbackbones.checkpoint import read_checkpoint, write_checkpoint
from effbackbones.train.callbacks.signals import StopSignals, stop


class RunCheckpoints(Checkpoint):
    """Keeps last.ckpt, from which the run goes on, and best.ckpt, the weights of the best evaluation so far.

    last.ckpt is written before and after each evaluation, at the end of an epoch without one, every so many steps, and
    when a signal stops the run, which ends here. A run that goes on from before an evaluation begins with it. An
    evaluation whose score is not a number is never the best. What cannot be written keeps its old content.

    Args:
        folder: Folder of the checkpoints.
        monitor: Logged metric that decides which evaluation is best: the higher the better, except a loss.
        every: Optimizer steps from one last.ckpt to the next within an epoch; None for none.
        signals: What may stop the run.
    """

    def __init__(self, folder: Path, monitor: str, every: int | None = None, signals: StopSignals | None = None):
        self.best, self.last = folder / "best.ckpt", folder / "last.ckpt"
        self.monitor = monitor
        self.every = every
        self.signals = signals or StopSignals()
        self.best_score: float | None = None
        self._evaluation_due = False  # the trainer stands before an evaluation, or in it
        self._saved = (0, False)  # the step in last.ckpt, and whether its evaluation is due
        self._step = 0
        self._stopping = 0  # the signal that all ranks have agreed to stop by

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "evaluation_due": self._evaluation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self._evaluation_due = state_dict.get("evaluation_due", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._saved = self._step, self._evaluation_due  # what the run resumed from
        if self._evaluation_due:
            pl_module.on_train_start()  # it sets the learning rate, which is saved after the evaluation
            self._evaluate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # between the batches of an accumulated step
            return
        self._step = trainer.global_step
        self._stopping = self.signals.agree(trainer)
        if trainer.is_last_batch or trainer.should_stop:  # an evaluation or the end of the epoch follows
            return
        if self._stopping or (self.every and self._step % self.every == 0):
            # The step's row of metrics first: a run that is killed in between would go on without it.
            pl_module.on_train_batch_end(outputs, batch, batch_idx)
            trainer._logger_connector.update_train_step_metrics()
            self._save_last(trainer)
        self._stop_if(self._stopping, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluation_due = True
            self._save_last(trainer)
            self._stop_if(self._stopping, trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            # Ranks do not have equally many batches to agree after; those without the signal learn of it by RankWatch.
            self._stop_if(self.signals.received, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._evaluation_due = False
        score = trainer.callback_metrics[self.monitor].item()
        if self._is_best(score):
            before, self.best_score = self.best_score, score
            if not self._save(trainer, self.best, weights_only=True):
                self.best_score = before
        self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_last(trainer)
        self._stop_if(self._stopping, trainer)

    def _is_best(self, score: float) -> bool:
        if self.best_score is None:
            return not math.isnan(score)
        return score < self.best_score if self.monitor.endswith("loss") else score > self.best_score

    def _evaluate(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating = True
        loop.run()
        trainer.training = True
        loop._has_run = False  # that the loop of the epoch, which resumes after its last batch, counts it to its end

    def _save_last(self, trainer: Trainer) -> None:
        now = trainer.global_step, self._evaluation_due
        if now != self._saved and self._save(trainer, self.last):
            self._saved = now

    def _save(self, trainer: Trainer, path: Path, weights_only: bool = False) -> bool:
        """Write a checkpoint, and return on all ranks whether that succeeded."""
        trainer.save_checkpoint(path, weights_only)
        complete: bool = trainer.strategy.broadcast(trainer.strategy.checkpoint_io.complete)  # type: ignore[attr-defined]
        return complete

    def _stop_if(self, number: int, trainer: Trainer) -> None:
        if number:
            stop(trainer, number, self._saved[0])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files: written whole or not at all, read with plain types only.

    One that cannot be written, as on a full disk, is no error: a warning says so, the first time of several in a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.complete = True
        """Whether the last checkpoint was written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            if self.complete:
                rank_zero_warn(
                    f"{path} cannot be written: {error}. The run goes on, and what was saved before stays; make room, "
                    "or what is trained from here on is lost when the run stops"
                )
            self.complete = False
        else:
            self.complete = True

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`, whatever `weights_only` says with plain types only."""
        return read_checkpoint(path, map_location)
