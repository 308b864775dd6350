"""mm's metrics under the names of our logs, as shares of 1."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from mmdet.evaluation import CocoMetric
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric

from effbackbones.data import DataError
from effbackbones.mm.data import DenseData


class Metric:
    """Collects predictions over an evaluation on all ranks, then computes shares of 1 by name.

    Args:
        metric: A metric of mm.
        names: Our name of each of its results; a result it does not have is left out, as is a negative one, which
            stands for objects of a kind the dataset has none of.
        scale: What its results are divided by.
        images: Images of the evaluation dataset.
    """

    def __init__(self, metric: Any, names: dict[str, str], scale: float, images: int) -> None:
        self.metric = metric
        self.names = names
        self.scale = scale
        self.images = images

    def update(self, samples: Sequence[Any]) -> None:
        """Take mm's data samples with their predictions."""
        self.metric.process(None, [sample.to_dict() for sample in samples])

    def compute(self) -> dict[str, float]:
        """Return the results of all ranks, the same on each, and begin anew.

        Raises:
            DataError: No image was evaluated.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            results = self.metric.evaluate(self.images)
        found = {name: results[key] / self.scale for key, name in self.names.items() if key in results}
        return {name: value for name, value in found.items() if not value < 0}


class _CocoMetric(CocoMetric):
    """COCO's average precisions over the images that were evaluated: those that could not be read do not count."""

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        if not results:
            raise DataError("no evaluation image could be used: repair the dataset")
        self.img_ids = [ground_truth["img_id"] for ground_truth, _ in results]
        nothing = {f"{kind}_{name}": 0.0 for kind in self.metrics for name in ("mAP", "mAP_50", "mAP_75")}
        return {**nothing, **super().compute_metrics(results)}


class _IoUMetric(IoUMetric):
    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        if not results:
            raise DataError("no evaluation image could be used: repair the dataset")
        found: dict[str, float] = super().compute_metrics(results)
        return found


_PRECISIONS = {"mAP": "ap", "mAP_50": "ap50", "mAP_75": "ap75", "mAP_s": "ap_s", "mAP_m": "ap_m", "mAP_l": "ap_l"}


def average_precision(data: DenseData, masks: bool) -> Metric:
    """Return box_ap, box_ap50 and so on, and with `masks` the same of masks, as COCO defines them."""
    kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
    with contextlib.redirect_stdout(io.StringIO()):
        metric = _CocoMetric(ann_file=data.val_annotations.ann_file, metric=list(kinds))
    metric.dataset_meta = data.val_annotations.metainfo
    names = {
        f"coco/{kind}_{theirs}": f"{ours}_{name}"
        for kind, ours in kinds.items()
        for theirs, name in _PRECISIONS.items()
    }
    return Metric(metric, names, 1, len(data.val_dataset))


def mean_iou(data: DenseData) -> Metric:
    """Return miou, macc (both means over classes) and aacc (over pixels)."""
    metric = _IoUMetric(iou_metrics=["mIoU"], prefix="seg")
    metric.dataset_meta = data.val_annotations.metainfo
    return Metric(metric, {"seg/mIoU": "miou", "seg/mAcc": "macc", "seg/aAcc": "aacc"}, 100, len(data.val_dataset))


def quiet() -> None:
    """Have mm's logger tell warnings and errors alone: results are in our progress line and metrics.csv."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)
