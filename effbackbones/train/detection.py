"""The LightningModule of detection, with instance masks where the head has them."""

from typing import Any

import numpy as np
from PIL import Image

from effbackbones.config import Recipe, RecipeError
from effbackbones.mm.config import predicts_masks
from effbackbones.mm.data import read_instances
from effbackbones.mm.metrics import Metric, average_precision
from effbackbones.train.dense import DenseModule
from effbackbones.viz.dense import draw_boxes

SHOWN_SCORE = 0.5
"""Score from which on a box is drawn."""


class DetectionModule(DenseModule):
    """Trains a detector of mmdet; evaluates boxes, and masks where the head predicts them, as COCO does."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], recipe_yaml: str):
        self.masks = predicts_masks(recipe)
        if self.masks and recipe.data.test_flip:
            raise RecipeError(
                "data.test_flip: mm merges boxes only, and the head of this recipe predicts masks: leave it out"
            )
        if not self.masks and recipe.monitor.startswith("mask_ap"):
            raise RecipeError(
                f"trainer.monitor={recipe.monitor}: the head of this recipe predicts no masks: use box_ap"
            )
        super().__init__(recipe, classes, recipe_yaml)

    def build_metric(self) -> Metric:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return average_precision(data, self.masks)

    def draw_sample(self, image: Image.Image, sample: Any) -> Image.Image:
        instances = sample.pred_instances
        instances = instances[instances.scores >= SHOWN_SCORE].cpu().numpy()
        return draw_boxes(
            np.asarray(image),
            instances.bboxes,
            instances.labels,
            instances.scores,
            self.classes,
            instances.masks if "masks" in instances else None,
        )

    def draw_truth(self, image: Image.Image, index: int) -> Image.Image:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        boxes, labels, masks = read_instances(data.val_annotations, index, self.masks)
        return draw_boxes(np.asarray(image), boxes, labels, None, self.classes, masks)
