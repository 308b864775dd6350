"""What training has in common whatever the task."""

import math
import random
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from effbackbones.checkpoint import Loaded
from effbackbones.config import Recipe
from effbackbones.data.sampler import derive_seed
from effbackbones.train.batch import global_batch
from effbackbones.train.fsdp import average_shards
from effbackbones.train.optim import build_optimizer, build_schedule


def has_sync_bn(accelerator: str) -> bool:
    """Return whether batch norms can synchronise over devices on an accelerator: torch's do on CUDA only."""
    return accelerator in ("auto", "cuda") and torch.cuda.is_available()


class TrainingModule(LightningModule):
    """Trains a model from a recipe: optimizer, schedule, average of the weights, seeds, what a checkpoint tells.

    Everything random in a step (dropout, stochastic depth, mixup, sampled boxes) follows from the seed, the number of
    the batch and the rank, so that a resumed run repeats what the uninterrupted one does.

    Args:
        recipe: The whole recipe.
        classes: Names of the classes; written into every checkpoint, with the recipe.
        recipe_yaml: The recipe as text.
        model: What is trained.

    Attributes:
        step_metrics: Losses and learning rate of the last training batch, by the names they are logged under.
    """

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], recipe_yaml: str, model: nn.Module):
        super().__init__()
        self.recipe = recipe
        self.classes = classes
        self.recipe_yaml = recipe_yaml
        self.model: Any = model
        ema = recipe.ema
        self.ema = ModelEmaV3(self.model, ema.decay, use_warmup=ema.warmup) if ema.decay is not None else None
        if self.ema is not None:
            self.ema.requires_grad_(False)
        self.step_metrics: dict[str, Any] = {}

    @property
    def evaluated(self) -> dict[str, Any]:
        """The models that are evaluated, by the suffix of their metrics: the trained one and its average, if kept."""
        return {"": self.model} if self.ema is None else {"": self.model, "_ema": self.ema.module}

    @abstractmethod
    def load_weights(self, path: str | Path, ema: bool = False, same_classes: bool = False) -> Loaded:
        """Start from the weights of a file or a run folder; return what was taken.

        Args:
            path: Weight file or run folder.
            ema: Take the averaged weights, which must be there.
            same_classes: Refuse weights made for other classes.

        Raises:
            CheckpointError: The file cannot be read or does not fit.
        """

    @abstractmethod
    def forward_loss(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a training batch by name; `loss`, their sum, is what is trained."""

    @abstractmethod
    def draw(self, out: Path) -> None:
        """Draw predictions of a few evaluation images into the picture `out`."""

    def parameters_beside_model(self) -> list[nn.Parameter]:
        """Return what is trained, at the full rate and without weight decay, and is no part of the model."""
        return []

    def parameters_to_train(self) -> Any:
        """Return what the optimizer takes: a model, or groups of parameters."""
        return self.model

    def configure_optimizers(self) -> Any:
        trainer, cfg = self.trainer, self.recipe.trainer
        # Counted without the trainer, which would start to load: a checkpoint's position is restored after this only.
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        steps_per_epoch = math.ceil(min(batches, cfg.limit_train or batches) / cfg.accumulate)
        steps = min(cfg.epochs * steps_per_epoch, cfg.steps or sys.maxsize)
        # Of torch 2.11, the fused step of shards on CPU leaves them as they are.
        sharded = cfg.strategy == "fsdp"
        fused = cfg.precision != "fp16" and not sharded
        optimizer = build_optimizer(self.parameters_to_train(), self.recipe.optim, self.global_batch, fused, sharded)
        if beside := self.parameters_beside_model():
            optimizer.add_param_group({"params": beside, "weight_decay": 0.0})
        schedule = build_schedule(optimizer, self.recipe.schedule, steps, steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step."""
        return global_batch(self.recipe, self.trainer.world_size)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []  # a schedule follows from the recipe and the step
        saved, own = (
            step // accumulate
            for step, accumulate in (
                (checkpoint["global_batch"], checkpoint["accumulate"]),
                (self.global_batch, self.recipe.trainer.accumulate),
            )
        )
        _count_batches_anew(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], saved, own)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe_yaml
        checkpoint["classes"] = list(self.classes)
        checkpoint["global_batch"] = self.global_batch
        checkpoint["accumulate"] = self.recipe.trainer.accumulate

    def on_train_start(self) -> None:
        self.lr_scheduler_step(self.lr_schedulers(), None)

    def seed_step(self) -> None:
        """Seed python, numpy and torch for the present batch of this rank."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed = derive_seed(self.recipe.trainer.seed, batches, self.global_rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":  # torch.manual_seed seeds every kind of device, which takes a millisecond
            getattr(torch, self.device.type).manual_seed(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.step_losses(batch)
        self.step_metrics = {f"train/{name}": loss.detach() for name, loss in losses.items()}
        self.step_metrics["lr"] = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        return losses["loss"]

    def on_train_batch_end(self, *args: Any) -> None:
        # Only where a row is due: what is logged costs time whether it is written or not, and waits for the device.
        if self.trainer.should_stop or self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log_dict(self.step_metrics)

    def step_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of the present training batch, its randomness seeded."""
        self.seed_step()
        return self.forward_loss(batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            steps = self.global_step + 1  # the trainer has yet to count this one
            if self.recipe.trainer.strategy == "fsdp":
                average_shards(self.ema, self.model, steps)
            else:
                self.ema.update(self.model, step=steps)


def _count_batches_anew(progress: dict[str, Any], saved: int, own: int) -> None:
    """Have Lightning's counts of batches of `saved` images each stand for the same images in batches of `own`."""
    for counts in (progress["total"], progress["current"]):
        shift = counts["ready"] * saved // own - counts["ready"]  # what a batch still lacked when it was saved remains
        counts.update({name: count + shift for name, count in counts.items()})
