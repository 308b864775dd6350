"""Datasets in the layouts of COCO and ADE20K: mm's datasets and pipelines in loaders of ours."""

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import mmcv.transforms as T
import mmdet.datasets.transforms as det
import mmseg.datasets.transforms as seg
import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset, pseudo_collate
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image
from torch import Tensor

from effbackbones.config import Recipe
from effbackbones.data import BadImageError, DataError, RecipeData
from effbackbones.data.datasets import BadImages, EvalSamples, TrainSamples
from effbackbones.data.images import load_image
from effbackbones.data.sampler import EpochBatches
from effbackbones.mm.config import predicts_masks

log = logging.getLogger(__name__)

Transform = Callable[[dict[str, Any]], Any]
Policy = Literal["error", "skip"]

IGNORED = 255
"""Label of pixels of a segmentation map that neither train nor count."""

_DET_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
_SEG_META = (
    "img_path",
    "seg_map_path",
    "ori_shape",
    "img_shape",
    "pad_shape",
    "scale_factor",
    "flip",
    "flip_direction",
)


class DenseData(RecipeData):
    """Batches of mm: `inputs`, a list of uint8 images (3, H, W) in BGR, and `data_samples`, what is known of each.

    Attributes:
        train_annotations: The mm dataset that training reads.
        val_annotations: The mm dataset that is evaluated.
    """

    def __init__(
        self,
        train: BaseDataset,
        val: BaseDataset,
        augment: Transform,
        test: Transform,
        recipe: Recipe,
    ) -> None:
        data, overfit = recipe.data, recipe.trainer.overfit
        bad = BadImages(data.on_bad_image, data.max_bad_images, train=len(train), val=len(val))
        self.train_annotations, self.val_annotations = train, train if overfit else val
        super().__init__(
            TrainSamples(_Samples(train, augment), bad),
            EvalSamples(_Samples(self.val_annotations, test), bad, "train" if overfit else "val"),
            bad,
            train.metainfo["classes"],
            data,
            seed=recipe.trainer.seed,
            overfit=overfit,
            collate=_collate,
            batches=partial(OrientedBatches, train.upright) if isinstance(train, _Coco) else EpochBatches,
        )


class OrientedBatches(EpochBatches):
    """Batches of images that are all upright or all not, so that little is padded; the last of an epoch may mix them.

    It is a global batch that is of one kind: the same images make it on any number of ranks.

    Args:
        upright: Whether each image is higher than wide, (images,) bool.
        args: As of the base class, as is `options`.
    """

    def __init__(self, upright: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.upright = upright

    def _order(self, epoch: int) -> Tensor:
        order, size = super()._order(epoch), self.batch_size * self.sharing * self.accumulate
        upright = self.upright[order]
        places = [place for kind in (upright, ~upright) for place in kind.nonzero().flatten().split(size)]
        # A batch comes when it is full, at the last of its places; what fills none comes at the end.
        places.sort(key=lambda place: (len(place) < size, place[-1:].tolist()))
        return order[torch.cat(places)]


def build_data(recipe: Recipe) -> DenseData:
    """Open the dataset of a recipe of a dense task.

    Raises:
        DataError: The dataset is absent, damaged or not what the recipe says.
        HeadError: There is no mm config of the name of the head.
    """
    data, augment = recipe.data, recipe.augment
    root = Path(data.root or "")
    flip = T.RandomFlip if recipe.task == "segmentation" else det.RandomFlip
    scale = cast(tuple[int, int], tuple(data.scale))
    if recipe.task == "detection":
        masks = predicts_masks(recipe)
        train, val = (_open_coco(root, split, masks, data.on_bad_image) for split in ("train", "val"))
        changes = [*_resize(augment.resize, scale), flip(prob=augment.hflip)]
        photometric: Any = det.PhotoMetricDistortion
    else:
        train, val = (_open_ade20k(root, split) for split in ("training", "validation"))
        changes = [
            T.RandomResize(scale=scale, ratio_range=tuple(augment.zoom), keep_ratio=True),
            seg.RandomCrop(crop_size=(data.size, data.size), cat_max_ratio=0.75),
            flip(prob=augment.hflip),
        ]
        photometric = seg.PhotoMetricDistortion
    if augment.photometric:
        changes.append(photometric())
    train_classes, val_classes = train.metainfo["classes"], val.metainfo["classes"]
    if train_classes != val_classes:
        differing = sorted(set(train_classes) ^ set(val_classes)) or ["their order"]
        raise DataError(f"{root}: training and validation differ in their classes: {', '.join(differing)}")
    if data.num_classes not in (None, len(train_classes)):
        raise DataError(
            f"data.num_classes={data.num_classes}, but {root} has {len(train_classes)} classes: correct it or leave it "
            "out"
        )
    return DenseData(train, val, T.Compose([*changes, _pack(recipe)]), test_transform(recipe), recipe)


def test_transform(recipe: Recipe) -> Transform:
    """Return what makes a model's input of a read image; with `data.test_flip`, lists of it and its mirror image."""
    scale = cast(tuple[int, int], tuple(recipe.data.scale))
    resize = (det.Resize if recipe.task == "detection" else _ImageResize)(scale=scale, keep_ratio=True)
    if not recipe.data.test_flip:
        return cast(Transform, T.Compose([resize, _pack(recipe)]))
    flip = det.RandomFlip if recipe.task == "detection" else T.RandomFlip
    return cast(Transform, T.TestTimeAug([[resize], [flip(prob=0.0), flip(prob=1.0)], [_pack(recipe)]]))


def read_image(image: Image.Image, path: str | Path) -> dict[str, Any]:
    """Return an RGB image as mm's transforms take one that was read."""
    image_hwc = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # mm reads BGR
    shape = image_hwc.shape[:2]
    return {"img": image_hwc, "img_path": str(path), "img_shape": shape, "ori_shape": shape}


def _pack(recipe: Recipe) -> Transform:
    if recipe.task == "detection":
        return cast(Transform, det.PackDetInputs(meta_keys=_DET_META))
    return cast(Transform, seg.PackSegInputs(meta_keys=_SEG_META))


def read_instances(dataset: CocoDataset, index: int, masks: bool) -> tuple[Any, Any, Any]:
    """Return the annotated boxes (K, 4), labels (K,) and masks (K, H, W) of an image; None for masks not asked for."""
    read = det.LoadAnnotations(with_bbox=True, with_mask=masks, box_type=None)
    info = dataset.get_data_info(index)
    found = read({**info, "ori_shape": (info["height"], info["width"])})
    return found["gt_bboxes"], found["gt_bboxes_labels"], found["gt_masks"].masks.astype(bool) if masks else None


def read_labels(dataset: BaseSegDataset, index: int) -> Any:
    """Return the annotated labels (H, W) of an image."""
    return seg.LoadAnnotations()(dataset.get_data_info(index))["gt_seg_map"]


class _ImageResize(T.Resize):
    """Resizes the image of an evaluation, not its segmentation map: predictions come back in the image's size."""

    def _resize_seg(self, results: dict[str, Any]) -> None:
        pass


class _Samples:
    """What a dataset's pipeline reads, then a further transform.

    Whatever goes wrong in reading is a BadImageError that names the image; what goes wrong later is an error of ours.
    """

    def __init__(self, dataset: BaseDataset, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.dataset.prepare_data(index)
        except BadImageError:
            raise
        except Exception as error:  # readers of images, maps and masks raise nearly every built-in error
            path = self.dataset.get_data_info(index)["img_path"]
            raise BadImageError(f"{path}: cannot be used ({type(error).__name__}: {error})") from error
        return self.transform(sample)


def _collate(samples: Sequence[Any]) -> dict[str, list[Any]]:
    used = [sample for sample in samples if sample is not None]
    return cast(dict[str, list[Any]], pseudo_collate(used)) if used else {"inputs": [], "data_samples": []}


def _resize(policy: str, scale: tuple[int, int]) -> list[Transform]:
    """Return the resizing of a detection recipe. The shares of the shorter side are those of 480 to 800 out of 800."""
    long, short = scale
    if policy == "fixed":
        return [det.Resize(scale=scale, keep_ratio=True)]
    sizes = [(long, round(short * (0.6 + 0.04 * i))) for i in range(11)]
    multiscale = T.RandomChoiceResize(scales=sizes, keep_ratio=True, resize_type="mmdet.Resize")
    if policy == "multiscale":
        return [multiscale]
    # 400, 500 or 600 of 800 whatever the longer side, then a crop of 384 to 600 a side.
    wide = T.RandomChoiceResize(
        scales=[(8 * short, round(short * share)) for share in (0.5, 0.625, 0.75)],
        keep_ratio=True,
        resize_type="mmdet.Resize",
    )
    sides = (round(0.48 * short), round(0.75 * short))
    crop = det.RandomCrop(crop_type="absolute_range", crop_size=sides, allow_negative_crop=True)
    return [T.RandomChoice(transforms=[[multiscale], [wide, crop, multiscale]])]


class _Coco(CocoDataset):
    """COCO's layout, whose classes are those of the annotation file, with what does not fit counted or refused.

    Boxes without area, of which COCO itself has some, are left out and counted whatever the policy.

    Attributes:
        unusable: Identifiers of the annotations that do not fit and are left out.
        upright: Whether each image is higher than wide, (images,) bool.
    """

    COCOAPI: Any
    upright: Tensor

    def __init__(self, policy: Policy, **kwargs: Any) -> None:
        self._policy = policy
        self._left_out: list[str] = []
        self.unusable: set[int] = set()
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            coco = self.COCOAPI(self.ann_file)
        self._metainfo["classes"] = tuple(category["name"] for category in coco.dataset["categories"])
        self.COCOAPI = lambda path: coco  # it is read once
        try:
            samples = super().load_data_list()
        finally:
            del self.COCOAPI
        if not samples:
            raise DataError(f"{self.ann_file}: no images in it")
        if self._left_out:
            log.warning(
                "%s: left out %d annotations, such as %s", self.ann_file, len(self._left_out), self._left_out[0]
            )
        return samples

    def filter_data(self) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = super().filter_data()
        if not samples:
            raise DataError(
                f"{self.ann_file}: nothing to train on: no image of it has an annotation and sides of at least "
                f"{self.filter_cfg['min_size']} pixels"
            )
        self.upright = torch.tensor([sample["height"] > sample["width"] for sample in samples])
        return samples

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        image = raw_data_info["raw_img_info"]
        kept = []
        for annotation in raw_data_info["raw_ann_info"]:
            name = f"annotation {annotation['id']} of {image['file_name']}"
            box, mask = annotation["bbox"], annotation.get("segmentation")
            problem = None
            if not _is_box(box):
                problem = f"bbox {box}, expected [x, y, width, height]"
            elif annotation["category_id"] not in self.cat_ids:
                problem = f"category_id {annotation['category_id']}, which categories does not list"
            elif isinstance(mask, dict) and list(mask["size"]) != [image["height"], image["width"]]:
                problem = f"a mask of {mask['size']}, expected {[image['height'], image['width']]} (rows, columns)"
            if problem:
                self._refuse(f"{name}: {problem}")
                self.unusable.add(annotation["id"])
            elif min(box[2:]) < 1 or annotation["area"] <= 0:
                self._left_out.append(f"{name}: a box of {box[2]} x {box[3]} pixels, area {annotation['area']}")
            else:
                kept.append(annotation)
        return cast(dict[str, Any], super().parse_data_info({**raw_data_info, "raw_ann_info": kept}))

    def _refuse(self, problem: str) -> None:
        if self._policy == "error":
            raise DataError(
                f"{self.ann_file}: {problem}. Repair the file, or set data.on_bad_image=skip to go on without such ones"
            )
        self._left_out.append(problem)


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    return numbers and len(box) == 4


def _open_coco(root: Path, split: str, masks: bool, policy: Policy) -> CocoDataset:
    """Open root/annotations/instances_<split>2017.json and the images of root/<split>2017/."""
    file = root / "annotations" / f"instances_{split}2017.json"
    reading = [_load_image, _check_image_size]
    if split == "train":
        reading.append(det.LoadAnnotations(with_bbox=True, with_mask=masks))
    if not file.is_file():
        raise DataError(
            f"{file}: no such file; data.root must hold annotations/, train2017/ and val2017/, as COCO does"
        )
    try:
        return _Coco(
            policy,
            data_root=str(root),
            ann_file=str(file.relative_to(root)),
            data_prefix={"img": f"{split}2017/"},
            filter_cfg={"filter_empty_gt": True, "min_size": 32},
            pipeline=reading,
            test_mode=split == "val",
        )
    except (AssertionError, AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not an annotation file of COCO's kind ({type(error).__name__}: {error})") from error


def _load_image(results: dict[str, Any]) -> dict[str, Any]:
    path = results["img_path"]
    return {**results, **read_image(load_image(path, upright=True), path)}


def _check_image_size(results: dict[str, Any]) -> dict[str, Any]:
    if tuple(results["ori_shape"]) != (results["height"], results["width"]):
        raise BadImageError(
            f"{results['img_path']}: {results['ori_shape']} pixels (rows, columns), the annotation file says "
            f"{(results['height'], results['width'])}: boxes and masks would not fit"
        )
    return results


class _ADE20K(BaseSegDataset):
    """ADE20K's layout, whatever the classes."""

    def load_data_list(self) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = super().load_data_list()
        if not samples:
            raise DataError(f"{self.data_prefix['img_path']}: no .jpg images in it")
        return samples


def _open_ade20k(root: Path, split: str) -> BaseSegDataset:
    """Open root/images/<split>/*.jpg and root/annotations/<split>/*.png, whose label 0 is no class."""
    classes = _ade20k_classes(root)
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; data.root must hold images/ and annotations/, as ADE20K does")
    reading = [_load_image, seg.LoadAnnotations(), _LabelCheck(len(classes))]
    return _ADE20K(
        data_root=str(root),
        data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
        metainfo={"classes": classes},
        reduce_zero_label=True,
        pipeline=reading,
        test_mode=split == "validation",
    )


def _ade20k_classes(root: Path) -> tuple[str, ...]:
    """Return the names in root/objectInfo150.txt, the first of each class; without the file, ADE20K's own 150."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return tuple(ADE20KDataset.METAINFO["classes"])
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if (
        not rows
        or rows[0][0] != "Idx"
        or rows[0][-1] != "Name"
        or len({len(row) for row in rows}) > 1
        or len(rows) == 1
    ):
        raise DataError(
            f"{file}: expected a table with tabs between its columns, from Idx to Name, and a row per class"
        )
    return tuple(row[-1].split(",")[0].strip() for row in rows[1:])


class _LabelCheck:
    """Refuses a segmentation map of another size than its image, or with a label that is no class."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        map_hw, path = results["gt_seg_map"], results["seg_map_path"]
        if map_hw.shape != tuple(results["ori_shape"]):
            raise BadImageError(f"{path}: {map_hw.shape} pixels (rows, columns), its image has {results['ori_shape']}")
        if (wrong := map_hw[(map_hw >= self.classes) & (map_hw != IGNORED)]).size:
            raise BadImageError(f"{path}: label {wrong[0] + 1}, expected 0 (no class) to {self.classes}")
        return results
