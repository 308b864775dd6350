"""The LightningModule of image classification."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from effbackbones.checkpoint import load_weights
from effbackbones.config import Recipe, RecipeError
from effbackbones.data import LEFT_OUT, build_mixup
from effbackbones.data.sampler import derive_seed
from effbackbones.train.optim import build_optimizer, build_schedule

Batch = tuple[Tensor, Tensor]


def build_model(recipe: Recipe, num_classes: int) -> Any:
    """Return the recipe's model with `num_classes` outputs and fresh weights.

    Raises:
        RecipeError: The model does not take `model.args`.
    """
    cfg = recipe.model
    try:
        model: Any = timm.create_model(
            cfg.name, num_classes=num_classes, drop_rate=cfg.drop_rate, drop_path_rate=cfg.drop_path_rate, **cfg.args
        )
    except (TypeError, ValueError) as error:
        if not cfg.args:
            raise
        raise RecipeError(f"model.args: {cfg.name} does not take {cfg.args}: {error}") from error
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


class ClassificationModule(LightningModule):
    """Trains a classifier from a recipe.

    Everything random in a step (dropout, stochastic depth, mixup) follows from the seed, the number of the batch and
    the rank, so that a resumed run repeats what the uninterrupted one does.

    Args:
        recipe: The whole recipe.
        classes: Names of the classes; written into every checkpoint, with the recipe.
        recipe_yaml: The recipe as text.
    """

    metrics: Any  # of MetricCollections, which nn.ModuleList hides

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], recipe_yaml: str):
        super().__init__()
        self.recipe = recipe
        self.classes = classes
        self.recipe_yaml = recipe_yaml
        self.model = build_model(recipe, len(classes))
        if recipe.model.grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        ema = recipe.ema
        self.ema = ModelEmaV3(self.model, ema.decay, use_warmup=ema.warmup) if ema.decay is not None else None
        if self.ema is not None:
            self.ema.requires_grad_(False)
        if recipe.model.compile:
            self.model.compile()
        self.mixup = build_mixup(recipe.augment, len(classes))
        # Mixed targets are smoothed already.
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else recipe.augment.smoothing)
        accuracy = {
            f"top{k}": MulticlassAccuracy(len(classes), min(k, len(classes)), average="micro", ignore_index=LEFT_OUT)
            for k in (1, 5)
        }
        loss = MeanMetric(nan_strategy=math.nan)  # batches whose loss is not a number count, unlike by default
        metrics = MetricCollection({**accuracy, "loss": loss}, prefix="val/")
        # One collection for each model that is evaluated: the trained one and, where it is kept, its average.
        self.metrics = nn.ModuleList([metrics] if self.ema is None else [metrics, metrics.clone(postfix="_ema")])

    def load_weights(self, path: str | Path, ema: bool = False, same_classes: bool = False) -> None:
        """Start from the weights of a file or a run folder, as :func:`effbackbones.checkpoint.load_weights` does."""
        load_weights(self.model, path, ema, same_classes)
        if self.ema is not None:
            self.ema.set(self.model)

    def configure_optimizers(self) -> Any:
        trainer, cfg = self.trainer, self.recipe.trainer
        # Counted without the trainer, which would start to load: a checkpoint's position is restored after this only.
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        steps_per_epoch = math.ceil(min(batches, cfg.limit_train or batches) / cfg.accumulate)
        steps = min(cfg.epochs * steps_per_epoch, cfg.steps or sys.maxsize)
        global_batch = self.recipe.data.batch_size * trainer.world_size * cfg.accumulate
        fused = self.recipe.trainer.precision != "fp16"
        optimizer = build_optimizer(self.model, self.recipe.optim, global_batch, fused)
        schedule = build_schedule(optimizer, self.recipe.schedule, steps, steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []  # a schedule follows from the recipe and the step

    def on_train_start(self) -> None:
        self.lr_scheduler_step(self.lr_schedulers(), None)
        if self.recipe.model.norm_eval:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def seed_step(self) -> None:
        """Seed python, numpy and torch for the present batch of this rank."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed = derive_seed(self.recipe.trainer.seed, batches, self.global_rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.step_loss(batch)
        self.log("train/loss", loss)
        self.log("lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return loss

    def step_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a training batch, with its dropout and mixup."""
        self.seed_step()
        images, targets = self._layout(batch[0]), batch[1]
        if self.mixup is not None:
            images, targets = self.mixup(images.clone(), targets)
        output = self.model(images)
        if hasattr(self.model, "loss"):
            return self.model.loss(output, targets, self.criterion)
        return self.criterion(output, targets)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step + 1)  # steps taken: the trainer has yet to count this one

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = self._layout(batch[0]), batch[1]
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        count = (targets != LEFT_OUT).sum()
        for model, metrics in zip(models, self.metrics, strict=True):
            logits = model(images).float()
            metrics["top1"].update(logits, targets)
            metrics["top5"].update(logits, targets)
            loss = F.cross_entropy(logits, targets, ignore_index=LEFT_OUT, reduction="sum")
            metrics["loss"].update(loss / count.clamp_min(1), weight=count)

    def on_validation_epoch_end(self) -> None:
        for metrics in self.metrics:
            self.log_dict(metrics.compute())
            metrics.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe_yaml
        checkpoint["classes"] = list(self.classes)

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.model.channels_last else images
