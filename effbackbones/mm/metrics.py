"""mm's metrics under the names of our logs, as shares of 1."""

import contextlib
import io
import logging
import math
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
        names: Our name of each of its results; a result it does not have is left out.
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
        if not results:
            raise DataError("no evaluation image could be used: repair the dataset")
        return {name: results[key] / self.scale for key, name in self.names.items() if key in results}


class _CocoMetric(CocoMetric):
    """COCO's average precisions over the images that were evaluated: those that could not be read do not count.

    Without any object to find, they are not a number; those of a size that no object has are left out.
    """

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        if not results:
            return {}
        self.img_ids = [ground_truth["img_id"] for ground_truth, _ in results]
        objects = self._coco_api.get_ann_ids(img_ids=self.img_ids)
        unseen = 0.0 if objects else math.nan  # without a prediction, mm has no results
        overall = {f"{kind}_{name}": unseen for kind in self.metrics for name in ("mAP", "mAP_50", "mAP_75")}
        found = {**overall, **super().compute_metrics(results)}
        return {
            name: math.nan if value < 0 else value for name, value in found.items() if name in overall or value >= 0
        }


class _IoUMetric(IoUMetric):
    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return super().compute_metrics(results) if results else {}


_GATHERED = "gpu"
"""How ranks are gathered: by torch.distributed, whatever its backend. mm's "cpu" is files in the working directory."""

_PRECISIONS = {"mAP": "ap", "mAP_50": "ap50", "mAP_75": "ap75", "mAP_s": "ap_s", "mAP_m": "ap_m", "mAP_l": "ap_l"}


def average_precision(data: DenseData, masks: bool) -> Metric:
    """Return box_ap, box_ap50 and so on, and with `masks` the same of masks, as COCO defines them."""
    kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
    with contextlib.redirect_stdout(io.StringIO()):
        metric = _CocoMetric(data.val_annotations.ann_file, list(kinds), collect_device=_GATHERED)
        coco, unusable = metric._coco_api, data.val_annotations.unusable
        usable = [a for a in coco.dataset.get("annotations", []) if a["id"] not in unusable]
        coco.dataset["annotations"] = [{"iscrowd": 0, **annotation} for annotation in usable]  # some files leave it out
        coco.createIndex()
    metric.dataset_meta = data.val_annotations.metainfo
    names = {
        f"coco/{kind}_{theirs}": f"{ours}_{name}"
        for kind, ours in kinds.items()
        for theirs, name in _PRECISIONS.items()
    }
    return Metric(metric, names, 1, len(data.val_dataset))


def mean_iou(data: DenseData) -> Metric:
    """Return miou, macc (both means over classes) and aacc (over pixels)."""
    metric = _IoUMetric(iou_metrics=["mIoU"], prefix="seg", collect_device=_GATHERED)
    metric.dataset_meta = data.val_annotations.metainfo
    return Metric(metric, {"seg/mIoU": "miou", "seg/mAcc": "macc", "seg/aAcc": "aacc"}, 100, len(data.val_dataset))


def quiet() -> None:
    """Have mm's logger tell warnings and errors alone: results are in our progress line and metrics.csv."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)
