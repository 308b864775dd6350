"""Walking a dataset of images: what is in it, and what is wrong with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from effbackbones.config.schema import DataConfig
from effbackbones.data.datasets import class_differences
from effbackbones.data.errors import BadImageError, DataError
from effbackbones.data.folder import FolderImages
from effbackbones.data.hf import HfImages, open_splits
from effbackbones.data.shards import ShardImages, find_shards, index_shard, shard_classes

BATCH = 32
"""Images between two reports of progress of a worker."""

Images = FolderImages | ShardImages | HfImages


@dataclass
class Split:
    """What is known of a split: its images with their classes, and (width, height) of those that can be read."""

    images: Images
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """Images per class (K,)."""
        return np.bincount(self.images.targets, minlength=len(self.images.classes))

    @property
    def present(self) -> list[str]:
        """Names of the classes that have images."""
        return [name for name, count in zip(self.images.classes, self.counts, strict=True) if count]


@dataclass
class Findings:
    """What a walk found.

    Attributes:
        layout: The kind of dataset, a value of data.source.
        splits: The splits that could be opened, by name.
        problems: What is wrong, a line each.
    """

    layout: str
    splits: dict[str, Split]
    problems: list[str]

    def lines(self) -> Iterator[str]:
        """Yield the report."""
        yield f"data.source={self.layout}"
        for name, split in self.splits.items():
            yield f"{name}: {len(split.images)} images of {len(split.present)} classes"
            if split.sizes:
                for side, values in zip(("width", "height"), np.transpose(split.sizes), strict=True):
                    yield f"  {side:9}  min {values.min()}, median {np.median(values):g}, max {values.max()} pixels"
            counts, classes = split.counts, split.images.classes
            least, most = (f"{counts[i]} ({classes[i]})" for i in (counts.argmin(), counts.argmax()))
            yield f"  per class  min {least}, median {np.median(counts):g}, max {most} images"
        yield f"problems: {len(self.problems)}"
        yield from (f"  {problem}" for problem in self.problems)


def check_dataset(root: Path, workers: int, progress: Callable[[int, int], None]) -> Findings:
    """Read every image of the class folders, tar shards or Hugging Face directory in `root`.

    Args:
        root: What data.root would be.
        workers: Processes that read; 0 reads in this one.
        progress: Told, again and again, how many images of all have been read.

    Raises DataError where `root` is none of these.
    """
    problems: list[str] = []
    layout = _layout(root)
    splits = {name: Split(images) for name, images in _OPEN[layout](root, problems)}
    done, total = 0, sum(len(split.images) for split in splits.values())
    for split in splits.values():
        loader = DataLoader(_Sizes(split.images), batch_size=BATCH, num_workers=workers, collate_fn=list)
        for batch in loader:
            split.sizes += [size for size in batch if isinstance(size, tuple)]
            problems += [error for error in batch if isinstance(error, str)]
            done += len(batch)
            progress(done, total)
    if len(splits) == 2:
        train, val = splits.values()
        problems += [f"classes {difference}" for difference in class_differences(train.present, val.present)]
    return Findings(layout, splits, problems)


class _Sizes(Dataset[Any]):
    """The size of each image that can be read whole, the error of each that cannot."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int] | str:
        try:
            return self.images[index][0].size
        except BadImageError as error:
            return str(error)


def _layout(root: Path) -> str:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folders = [path.name for path in root.iterdir() if path.is_dir()]
    if (root / "dataset_dict.json").is_file():
        return "hf"
    if {"train", "val"} & set(folders):
        return "folder"
    if any(root.glob("*.tar")):
        return "shards"
    if folders:
        return "folder"
    raise DataError(f"{root}: neither folders of classes, nor *.tar, nor dataset_dict.json in it")


Opened = Iterator[tuple[str, Images]]


def _open_folders(root: Path, problems: list[str]) -> Opened:
    split = (root / "train").is_dir() or (root / "val").is_dir()
    for folder in (root / "train", root / "val") if split else (root,):
        try:
            images = FolderImages(folder)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += [f"{folder / empty}: no image in it" for empty in images.empty_classes]
        yield folder.name if split else "all", images


def _open_shards(root: Path, problems: list[str]) -> Opened:
    whole: dict[str, list[Path]] = {}
    number = 0
    for name, pattern in (("train", DataConfig.train_shards), ("val", DataConfig.val_shards)):
        whole[name] = []
        try:
            paths = find_shards(root, pattern)
        except DataError as error:
            problems.append(str(error))
            continue
        for path in paths:
            try:
                number = max(number, int(index_shard(path)["target"].max(initial=-1)) + 1)
                whole[name].append(path)
            except DataError as error:
                problems.append(str(error))
    classes = shard_classes(root, number)
    for name, shards in whole.items():
        if shards:
            try:
                yield name, ShardImages(shards, classes)
            except DataError as error:
                problems.append(str(error))


def _open_hf(root: Path, problems: list[str]) -> Opened:
    for name, split in open_splits(root).items():
        try:
            yield name, HfImages(split, f"{root}: {name}")
        except DataError as error:
            problems.append(str(error))


_OPEN: dict[str, Callable[[Path, list[str]], Opened]] = {
    "folder": _open_folders,
    "shards": _open_shards,
    "hf": _open_hf,
}
