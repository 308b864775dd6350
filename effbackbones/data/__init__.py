"""Datasets, transforms and loaders. `build_data` makes the LightningDataModule of a recipe."""

from collections.abc import Callable
from pathlib import Path

from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from timm.data import Mixup

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data.datamodule import ImageData, RecipeData
from effbackbones.data.datasets import LEFT_OUT, ImageSource
from effbackbones.data.errors import BadImageError, DataError
from effbackbones.data.fashion_mnist import FashionMnist
from effbackbones.data.folder import load_folders, split_folder
from effbackbones.data.hf import load_hf
from effbackbones.data.shards import ShardImages, find_shards, shard_classes
from effbackbones.data.synthetic import SyntheticImages

__all__ = ["LEFT_OUT", "BadImageError", "DataError", "ImageData", "RecipeData", "build_data", "build_mixup"]


def build_data(
    data: DataConfig, augment: AugmentConfig, *, seed: int, overfit: bool = False, nodes: int = 1
) -> ImageData:
    """Open the dataset of a recipe.

    Args:
        data: What to open.
        augment: How to augment it.
        seed: Fixes order and augmentation.
        overfit: That of :class:`ImageData`.
        nodes: Machines of the run.

    Raises DataError where the dataset is absent, damaged or not what the recipe says.
    """
    train, val = _SOURCES[data.source](data, seed, nodes)
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


def _fashion_mnist(data: DataConfig, seed: int, nodes: int) -> tuple[ImageSource, ImageSource]:
    if data.root is None:
        from effbackbones.assets import asset_dir

        root = asset_dir("data") / "fashion-mnist"
    else:
        root = Path(data.root)
    return FashionMnist(root, "train"), FashionMnist(root, "t10k")


def _folder(data: DataConfig, seed: int, nodes: int) -> tuple[ImageSource, ImageSource]:
    root = _root(data, "the folder that holds train/<class>/ and val/<class>/, or <class>/ alone")
    split = (root / "train").is_dir() or (root / "val").is_dir()
    return load_folders(root) if split else split_folder(root, data.val_share)


def _shards(data: DataConfig, seed: int, nodes: int) -> tuple[ImageSource, ImageSource]:
    root = _root(data, "the folder that holds the shards")
    classes = shard_classes(root, data.num_classes)
    train, val = find_shards(root, data.train_shards), find_shards(root, data.val_shards)
    if data.split_by_node:
        if len(train) < nodes:
            raise DataError(f"data.split_by_node: {len(train)} shards in data.train_shards for {nodes} nodes")
        train = train[_node() :: nodes]
    return ShardImages(train, classes), ShardImages(val, classes)


def _hf(data: DataConfig, seed: int, nodes: int) -> tuple[ImageSource, ImageSource]:
    return load_hf(_root(data, "the folder that save_to_disk of a DatasetDict wrote"))


def _root(data: DataConfig, what: str) -> Path:
    if data.root is None:
        raise DataError(f"data.source={data.source} needs data.root: {what}")
    return Path(data.root)


def _node() -> int:
    """Return the number of this machine, before there is a Trainer to ask; it asks the same."""
    environments = TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment
    return next((kind for kind in environments if kind.detect()), LightningEnvironment)().node_rank()


def _synthetic(data: DataConfig, seed: int, nodes: int) -> tuple[ImageSource, ImageSource]:
    if data.num_classes is None:
        raise DataError("data.source=synthetic needs data.num_classes")
    images, size, classes = data.synthetic_images, data.size, data.num_classes
    train, val = (SyntheticImages(images, size, classes, (seed, split)) for split in (0, 1))
    return train, val


_SOURCES: dict[str, Callable[[DataConfig, int, int], tuple[ImageSource, ImageSource]]] = {
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "shards": _shards,
    "hf": _hf,
    "synthetic": _synthetic,
}
