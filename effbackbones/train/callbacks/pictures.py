"""The pictures of a run folder."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from effbackbones.data import LEFT_OUT
from effbackbones.viz.curves import plot_curves
from effbackbones.viz.predictions import draw_predictions


class Pictures(Callback):
    """Draws curves.png after every evaluation, and predictions.png when training ends.

    Args:
        folder: The run folder.
        mean: Per-channel mean that was taken off the images.
        std: Per-channel deviation that the images were divided by.
        images: Evaluation images in predictions.png.
    """

    def __init__(self, folder: Path, mean: Sequence[float], std: Sequence[float], images: int = 24):
        self.folder = folder
        self.mean = mean
        self.std = std
        self.images = images

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            plot_curves(self.folder / "metrics.csv", self.folder / "curves.png")

    @rank_zero_only
    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        # Images in a fixed random order: folders are sorted by class.
        order = torch.randperm(len(data.val_dataset), generator=torch.Generator().manual_seed(0)).tolist()
        readable = (sample for sample in map(data.val_dataset.__getitem__, order) if sample[1] != LEFT_OUT)
        images, targets = zip(*islice(readable, self.images), strict=True)
        images_bchw = torch.stack(images)
        model.eval()
        probs_bk = model(images_bchw.to(pl_module.device)).float().softmax(-1).cpu()
        out = self.folder / "predictions.png"
        draw_predictions(images_bchw, probs_bk, data.classes, torch.tensor(targets), out, mean=self.mean, std=self.std)
