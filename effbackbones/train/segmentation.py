"""The LightningModule of semantic segmentation."""

from typing import Any

import numpy as np
from PIL import Image

from effbackbones.mm.data import read_labels
from effbackbones.mm.metrics import Metric, mean_iou
from effbackbones.train.dense import DenseModule
from effbackbones.viz.dense import draw_segmentation


class SegmentationModule(DenseModule):
    """Trains a segmentor of mmseg; evaluates the mean intersection over union."""

    def build_metric(self) -> Metric:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return mean_iou(data)

    def draw_sample(self, image: Image.Image, sample: Any) -> Image.Image:
        labels_hw = sample.pred_sem_seg.data[0].cpu().numpy()
        return draw_segmentation(np.asarray(image), labels_hw, self.classes)

    def draw_truth(self, image: Image.Image, index: int) -> Image.Image:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return draw_segmentation(np.asarray(image), read_labels(data.val_annotations, index), self.classes)
