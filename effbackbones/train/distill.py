"""Distillation: a student learns what a teacher says of the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.checkpoint import load_weights
from effbackbones.config import Recipe, RecipeError, load_recipe
from effbackbones.config.load import pretrained_normalisation

Criterion = Callable[[Tensor, Tensor], Tensor]


class Distillation(nn.Module):
    """The losses of a student beside a teacher. Its parameters are trained with the student, and no part of it.

    The teacher is no part of this module either: it is not trained, averaged, saved or wrapped.

    Args:
        recipe: The student's recipe.
        classes: Names of the classes.
        student: The student, whose pooled features are those that its classifier gets.

    Raises:
        RecipeError: Teacher and student do not go together.
        CheckpointError: The teacher's weights cannot be read or do not fit.
    """

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], student: Any):
        super().__init__()
        self.cfg = recipe.distill
        self._teacher = Teacher(recipe, classes)
        self._pooled_bc: Tensor | None = None
        self.projection: nn.Linear | None = None
        if self.cfg.features:
            classifier = student.get_classifier()
            if not isinstance(classifier, nn.Linear):
                raise RecipeError(f"distill.features: {recipe.model.name} has no single linear classifier; set it to 0")
            self.projection = nn.Linear(classifier.in_features, self._teacher.model.head_hidden_size)
            classifier.register_forward_pre_hook(self._keep_pooled)

    def _keep_pooled(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.training:
            self._pooled_bc = args[0]

    def forward(
        self, images_bchw: Tensor, label: Tensor, loss: Callable[[Tensor, Criterion], Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses of a batch that the student has just seen: `loss`, their weighted sum, and each of them.

        Args:
            images_bchw: The images, normalised for the student.
            label: The loss of the labels.
            loss: Gives the student's loss of targets (B, K) under a criterion.
        """
        logits_bk, features_bc = self._teacher(images_bchw)
        losses = {"loss": (1 - self.cfg.alpha) * label, "label": label}
        if self.cfg.alpha:
            losses["teacher"] = loss(logits_bk, self._criterion)
            losses["loss"] = losses["loss"] + self.cfg.alpha * losses["teacher"]
        if self.projection is not None:
            assert self._pooled_bc is not None
            projected_bc, self._pooled_bc = self.projection(self._pooled_bc), None
            losses["features"] = (1 - F.cosine_similarity(projected_bc.float(), features_bc.float())).mean()
            losses["loss"] = losses["loss"] + self.cfg.features * losses["features"]
        return losses

    def _criterion(self, logits_nk: Tensor, teacher_nk: Tensor) -> Tensor:
        if self.cfg.hard:
            return F.cross_entropy(logits_nk, teacher_nk.argmax(1))
        student, teacher = ((x_nk.float() / self.cfg.temperature).log_softmax(1) for x_nk in (logits_nk, teacher_nk))
        # The gradient goes by the square of the temperature: this keeps the balance with the labels.
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.cfg.temperature**2


class Teacher:
    """A model of timm with weights, in evaluation mode, for images that are normalised as a student's recipe says.

    Images that are of another size than the one size a model takes are resized to it.

    Args:
        recipe: The student's recipe.
        classes: Names of the classes.
    """

    def __init__(self, recipe: Recipe, classes: tuple[str, ...]):
        cfg, data = recipe.distill, recipe.data
        assert cfg.teacher is not None
        assert cfg.checkpoint is not None
        args, ema = {}, False
        if Path(cfg.checkpoint).is_dir():
            run = load_recipe(Path(cfg.checkpoint) / "recipe.yaml").recipe
            if run.model.name != cfg.teacher:
                raise RecipeError(f"distill.teacher={cfg.teacher}: {cfg.checkpoint} is a run of {run.model.name}")
            args, ema = run.model.args, run.monitor.endswith("_ema")
        self.model: Any = timm.create_model(cfg.teacher, num_classes=len(classes) if cfg.alpha else 0, **args)
        loaded = load_weights(self.model, cfg.checkpoint, ema, classes=classes)
        if cfg.alpha and loaded.fresh:
            raise RecipeError(
                f"distill.checkpoint={cfg.checkpoint}: not made for the {len(classes)} classes of the dataset, so that "
                "its logits say nothing of these: train it on this dataset first, or set distill.alpha=0 and "
                "distill.features=1 to learn its features alone"
            )
        self.model.requires_grad_(False)
        self.model.eval()

        normal = pretrained_normalisation(cfg.teacher, cfg.checkpoint) or {"mean": data.mean, "std": data.std}
        values = torch.tensor([data.mean, data.std, normal["mean"], normal["std"]])
        mean, std, own_mean, own_std = values[..., None, None]
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std
        own: Any = self.model.pretrained_cfg
        self._size: tuple[int, int] | None = own["input_size"][-2:] if own.get("fixed_input_size") else None

    @torch.no_grad()
    def __call__(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the pooled features (B, C)."""
        device = images_bchw.device
        if self._scale.device != device:
            self.model.to(device)
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        images_bchw = images_bchw * self._scale + self._shift
        if self._size is not None and images_bchw.shape[-2:] != self._size:
            images_bchw = F.interpolate(images_bchw, self._size, mode="bilinear", antialias=True)
        map_bchw = self.model.forward_features(images_bchw)
        return self.model.forward_head(map_bchw), self.model.forward_head(map_bchw, pre_logits=True)
