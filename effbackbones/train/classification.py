"""The LightningModule of image classification."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from effbackbones.checkpoint import LORA_SCALING, Loaded, load_weights
from effbackbones.config import Recipe, RecipeError
from effbackbones.data import LEFT_OUT, build_mixup
from effbackbones.data.classes import what_classes_show
from effbackbones.train.distill import Criterion, Distillation
from effbackbones.train.freezing import classifier_layers, freeze_stages, rest_batch_norms, rest_frozen
from effbackbones.train.module import TrainingModule
from effbackbones.viz.predictions import draw_predictions

Batch = tuple[Tensor, Tensor]

DRAWN = 24  # images in predictions.png


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


def choose_trained(model: Any, recipe: Recipe) -> None:
    """Freeze of a model what the recipe does not train, and add what LoRA trains instead.

    Raises:
        RecipeError: LoRA cannot be had, or has no place.
    """
    freeze_stages(model, recipe.model.frozen_stages)
    if recipe.lora.rank is not None:
        try:
            from effbackbones.train.lora import add_adapters
        except ImportError as error:
            raise RecipeError(f"lora.rank needs peft, but {error}: pip install 'effbackbones[lora]'") from error
        add_adapters(model, recipe.lora)
    elif recipe.model.linear_probe:
        model.requires_grad_(False)
    for layer in classifier_layers(model):
        layer.requires_grad_(True)


class ClassificationModule(TrainingModule):
    """Trains a classifier. Batches are images (B, 3, size, size) and class indices (B,)."""

    metrics: Any  # of MetricCollections, which nn.ModuleList hides

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], recipe_yaml: str):
        model = build_model(recipe, len(classes))
        choose_trained(model, recipe)
        if stages := recipe.model.grad_checkpointing:
            model.set_grad_checkpointing(*([True] if stages is True else [True, stages]))  # timm's own take no stages
        super().__init__(recipe, classes, recipe_yaml, model)
        if recipe.model.compile:
            self.model.compile()
        teaches = recipe.distill.teacher is not None
        self.distillation = Distillation(recipe, classes, self.model) if teaches else None
        self.mixup = build_mixup(recipe.augment, len(classes))
        # Mixed targets are smoothed already.
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else recipe.augment.smoothing)
        accuracy = {
            f"top{k}": MulticlassAccuracy(len(classes), min(k, len(classes)), average="micro", ignore_index=LEFT_OUT)
            for k in (1, 5)
        }
        loss = MeanMetric(nan_strategy=math.nan)  # batches whose loss is not a number count, unlike by default
        metrics = MetricCollection({**accuracy, "loss": loss}, prefix="val/")
        self.metrics = nn.ModuleList([metrics.clone(postfix=suffix) for suffix in self.evaluated])

    def load_weights(self, path: str | Path, ema: bool = False, same_classes: bool = False) -> Loaded:
        """Start from the weights of a file or a run folder, as :func:`effbackbones.checkpoint.load_weights` does."""
        if self.recipe.lora.rank is None:
            loaded = load_weights(self.model, path, ema, same_classes, self.classes)
        else:
            from effbackbones.train.lora import load_beneath

            plain = build_model(self.recipe, len(self.classes))
            loaded = load_weights(plain, path, ema, same_classes, self.classes)
            load_beneath(self.model, plain.state_dict())
        if self.ema is not None:
            self.ema.set(self.model)
        return loaded

    def parameters_beside_model(self) -> list[nn.Parameter]:
        return [] if self.distillation is None else list(self.distillation.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.recipe.lora.rank is not None:
            checkpoint[LORA_SCALING] = self.recipe.lora.alpha / self.recipe.lora.rank

    def on_train_start(self) -> None:
        super().on_train_start()
        rest_frozen(self.model)
        if self.recipe.model.norm_eval:
            rest_batch_norms(self.model)

    def forward_loss(self, batch: Batch) -> dict[str, Tensor]:
        images, targets = self._layout(batch[0]), batch[1]
        if self.mixup is not None:
            images, targets = self.mixup(images.clone(), targets)
        output = self.model(images)

        def loss(targets: Tensor, criterion: Criterion) -> Tensor:
            own: Any = getattr(self.model, "loss", None)
            return own(output, targets, criterion) if own else criterion(output, targets)

        label = loss(targets, self.criterion)
        return {"loss": label} if self.distillation is None else self.distillation(images, label, loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = self._layout(batch[0]), batch[1]
        count = (targets != LEFT_OUT).sum()
        for model, metrics in zip(self.evaluated.values(), self.metrics, strict=True):
            logits = model(images).float()
            metrics["top1"].update(logits, targets)
            metrics["top5"].update(logits, targets)
            loss = F.cross_entropy(logits, targets, ignore_index=LEFT_OUT, reduction="sum")
            metrics["loss"].update(loss / count.clamp_min(1), weight=count)

    def on_validation_epoch_end(self) -> None:
        for metrics in self.metrics:
            self.log_dict(metrics.compute())
            metrics.reset()

    @torch.no_grad()
    def draw(self, out: Path) -> None:
        """Draw evaluation images with the class that the model sees in each, and the true one where it is another."""
        dataset, cfg = self.trainer.datamodule.val_dataset, self.recipe.data  # type: ignore[attr-defined]
        # Images in a fixed random order: folders are sorted by class.
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        readable = (sample for sample in map(dataset.__getitem__, order) if sample[1] != LEFT_OUT)
        images, targets = zip(*islice(readable, DRAWN), strict=True)
        images_bchw = torch.stack(images)
        self.model.eval()
        probs_bk = self.model(images_bchw.to(self.device)).float().softmax(-1).cpu()
        names = what_classes_show(self.classes)
        draw_predictions(images_bchw, probs_bk, names, torch.tensor(targets), out, mean=cfg.mean, std=cfg.std)

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.model.channels_last else images
