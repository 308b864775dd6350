"""Datasets, transforms and loaders. `build_data` makes the LightningDataModule of a recipe."""

from collections.abc import Callable
from pathlib import Path

from timm.data import Mixup

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data.datamodule import ImageData, RecipeData
from effbackbones.data.datasets import LEFT_OUT, ImageSource
from effbackbones.data.errors import BadImageError, DataError
from effbackbones.data.fashion_mnist import FashionMnist
from effbackbones.data.folder import load_folders
from effbackbones.data.synthetic import SyntheticImages

__all__ = ["LEFT_OUT", "BadImageError", "DataError", "ImageData", "RecipeData", "build_data", "build_mixup"]


def build_data(data: DataConfig, augment: AugmentConfig, *, seed: int, overfit: bool = False) -> ImageData:
    """Open the dataset of a recipe. `seed` fixes order and augmentation; `overfit` is that of :class:`ImageData`.

    Raises DataError where the dataset is absent, damaged or not what the recipe says.
    """
    train, val = _SOURCES[data.source](data, seed)
    if data.num_classes not in (None, len(train.classes)):
        raise DataError(
            f"data.num_classes={data.num_classes}, but the {data.source} dataset has {len(train.classes)} classes: "
            "correct it or leave it out"
        )
    return ImageData(train, val, data, augment, seed=seed, overfit=overfit)


def build_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    """Return what mixes a batch (in place, one mix for all) and gives soft, smoothed targets (B, num_classes).

    It needs an even B and draws from numpy's global generator. None where neither mixup nor cutmix is on.
    """
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.switch_prob,
        mode="batch",
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


def _fashion_mnist(data: DataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    if data.root is None:
        from effbackbones.assets import asset_dir

        root = asset_dir("data") / "fashion-mnist"
    else:
        root = Path(data.root)
    return FashionMnist(root, "train"), FashionMnist(root, "t10k")


def _folder(data: DataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    if data.root is None:
        raise DataError("data.source=folder needs data.root: the folder that holds train/<class>/ and val/<class>/")
    return load_folders(Path(data.root))


def _synthetic(data: DataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    if data.num_classes is None:
        raise DataError("data.source=synthetic needs data.num_classes")
    images, size, classes = data.synthetic_images, data.size, data.num_classes
    train, val = (SyntheticImages(images, size, classes, (seed, split)) for split in (0, 1))
    return train, val


_SOURCES: dict[str, Callable[[DataConfig, int], tuple[ImageSource, ImageSource]]] = {
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "synthetic": _synthetic,
}
