"""The pictures of a run folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from effbackbones.viz.curves import plot_curves


class Pictures(Callback):
    """Draws curves.png after every evaluation, and predictions.png when training ends.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            plot_curves(self.folder / "metrics.csv", self.folder / "curves.png")

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.draw(self.folder / "predictions.png")
