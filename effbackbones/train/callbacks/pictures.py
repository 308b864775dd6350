"""The pictures of a run folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from effbackbones.train.fsdp import whole_weights
from effbackbones.viz.curves import plot_curves


class Pictures(Callback):
    """Draws curves.png after every evaluation, and predictions.png when training ends.

    A picture that cannot be written, as on a full disk, is left out; the first time, a warning says so.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._warned = False

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._draw(partial(plot_curves, self.folder / "metrics.csv"), self.folder / "curves.png")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with whole_weights(pl_module):
            if trainer.is_global_zero:
                self._draw(pl_module.draw, self.folder / "predictions.png")

    def _draw(self, draw: Callable[[Path], Any], out: Path) -> None:
        try:
            draw(out)
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"{out} cannot be written: {error}. The run goes on without its pictures")
            self._warned = True
