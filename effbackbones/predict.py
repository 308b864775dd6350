"""Prediction: the most probable classes of image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from effbackbones.checkpoint import load_weights, read_checkpoint, run_checkpoint
from effbackbones.config import Recipe, RecipeError, check
from effbackbones.config.load import pretrained_normalisation
from effbackbones.config.schema import DataConfig, ModelConfig
from effbackbones.data import DataError
from effbackbones.data.classes import imagenet_classes, what_classes_show
from effbackbones.data.datasets import Transform
from effbackbones.data.images import load_image
from effbackbones.data.transforms import eval_transform
from effbackbones.train.classification import build_model
from effbackbones.train.run import load_target

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def image_files(paths: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Return the files that are given, and those with an image's suffix in the folders that are, below them too.

    Each is followed by its name: in a folder that is given, its path below it.

    Raises:
        DataError: A folder holds no image.
    """
    files = []
    for path in map(Path, paths):
        found, folder = [path], path.parent
        if path.is_dir():
            found, folder = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES), path
            if not found:
                raise DataError(f"{path}: no image in this folder; expected files such as *.jpg or *.png")
        files += [(file, file.relative_to(folder)) for file in found]
    return files


@dataclass
class Predictor:
    """A classifier, with what it needs to read image files and to name what it sees.

    Attributes:
        model: Images (B, 3, size, size) to logits (B, K).
        transform: PIL image to (3, size, size).
        classes: Names of the K classes.
    """

    model: nn.Module
    transform: Transform
    classes: Sequence[str]

    @classmethod
    def from_run(cls, folder: str | Path) -> "Predictor":
        """Open the best checkpoint of a run folder.

        Raises:
            CheckpointError: The folder holds no run with a checkpoint, or the checkpoint cannot be read.
        """
        path = run_checkpoint(folder)
        recipe = load_target(str(folder)).recipe
        classes = read_checkpoint(path)["classes"]
        model = build_model(recipe, len(classes))
        load_weights(model, path, recipe.monitor.endswith("_ema"), same_classes=True)
        return cls(model, eval_transform(recipe.data), what_classes_show(classes))

    @classmethod
    def from_model(cls, name: str, checkpoint: str | Path) -> "Predictor":
        """Open ImageNet-1K weights of a registered model, with the evaluation transform they are published with.

        Args:
            name: The model.
            checkpoint: As :func:`~effbackbones.checkpoint.load_weights` takes them.

        Raises:
            RecipeError: There is no model of that name.
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        for keys, problem in check(Recipe(model=ModelConfig(name=name))):
            if keys == ("model.name",):
                raise RecipeError(problem)
        model: Any = timm.create_model(name, num_classes=1000)
        load_weights(model, checkpoint, same_classes=True)
        cfg = timm.data.resolve_model_data_config(model) | pretrained_normalisation(name, str(checkpoint))
        data = DataConfig(
            size=cfg["input_size"][-1],
            mean=list(cfg["mean"]),
            std=list(cfg["std"]),
            crop_pct=cfg["crop_pct"],
            interpolation=cfg["interpolation"],
        )
        return cls(model, eval_transform(data), what_classes_show(imagenet_classes()))

    @torch.inference_mode()
    def __call__(self, paths: Sequence[str | Path], top: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Yield the `top` most probable classes of each image file, as (name, probability), the best first.

        Raises:
            BadImageError: A file cannot be read as an image.
        """
        self.model.eval()
        for path in paths:
            logits_k = self.model(self.transform(load_image(str(path))).unsqueeze(0))[0]
            probs, indices = logits_k.softmax(-1).topk(min(top, len(self.classes)))
            yield [(self.classes[i], p) for i, p in zip(indices.tolist(), probs.tolist(), strict=True)]
