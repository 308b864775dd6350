"""Datasets as Hugging Face's `datasets` writes them with `save_to_disk`. Nothing is fetched, and no script is run."""

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from effbackbones.data.errors import BadImageError, DataError
from effbackbones.data.images import load_image

VAL_NAMES = ("validation", "val", "test")
"""Names of the split that is evaluated: the first one that is there."""


class HfImages:
    """The images of a split of a dataset, in its order, from files that all processes map into memory.

    Args:
        split: A `datasets.Dataset` with one column of images and one of class labels.
        name: What errors call it.

    Attributes:
        classes: Names of the classes.

    Raises DataError where the columns are not there, or a row has no class.
    """

    def __init__(self, split: Any, name: str) -> None:
        import datasets

        image, label = (_only_column(split, kind, name) for kind in (datasets.Image, datasets.ClassLabel))
        self.name = name
        self.classes = tuple(split.features[label].names)
        column = split.select_columns([label]).with_format("arrow")[:][label]
        targets = column.fill_null(-1).to_numpy().astype(np.int32)
        if (wrong := np.flatnonzero((targets < 0) | (targets >= len(self.classes)))).size:
            raise DataError(f"{name}: row {wrong[0]} has no class; remove such rows ({wrong.size} in all)")
        self._targets = torch.from_numpy(targets).share_memory_()
        self._images = split.select_columns([image]).with_format(None).cast_column(image, datasets.Image(decode=False))
        self._column = image

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        cell = self._images[index][self._column]
        if cell is None or cell["bytes"] is None:
            raise BadImageError(f"{self.name}: row {index}: no image in it")
        name = f"{self.name}: row {index}" + (f" ({cell['path']})" if cell["path"] else "")
        return load_image(io.BytesIO(cell["bytes"]), name), int(self._targets[index])

    @property
    def targets(self) -> np.ndarray:
        """Class indices (N,) int32."""
        return cast(np.ndarray, self._targets.numpy())


def load_hf(root: Path) -> tuple[HfImages, HfImages]:
    """Open the splits that train and evaluate of a DatasetDict that `save_to_disk` wrote.

    Raises DataError where `datasets` is not installed, the directory is no such dataset, or the splits do not match.
    """
    splits = open_splits(root)
    train, val = (HfImages(split, f"{root}: {name}") for name, split in splits.items())
    if train.classes != val.classes:
        raise DataError(f"{root}: {' and '.join(splits)} must have the same classes in the same order")
    return train, val


def open_splits(root: Path) -> dict[str, Any]:
    """Return the `datasets.Dataset` of the training split and of the one that is evaluated, by their names.

    Raises DataError where `datasets` is not installed, or the directory is no dataset with these splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.source=hf needs the package datasets ({error}): pip install 'effbackbones[data]'"
        ) from error
    if not (root / "dataset_dict.json").is_file():
        raise DataError(f"{root}: no dataset_dict.json in it; expected what save_to_disk of a DatasetDict writes")
    try:
        splits = datasets.load_from_disk(str(root))
    except Exception as error:  # damaged files lead pyarrow and json to nearly every built-in error
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{root}: cannot be read as a dataset ({reason}): write it again with save_to_disk") from error
    val = next((name for name in VAL_NAMES if name in splits), None)
    if "train" not in splits or val is None:
        raise DataError(f"{root}: splits {', '.join(splits)}; expected train, and one of {', '.join(VAL_NAMES)}")
    return {name: splits[name] for name in ("train", val)}


def _only_column(split: Any, kind: type, name: str) -> str:
    columns = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if len(columns) != 1:
        raise DataError(f"{name}: columns of {kind.__name__}: {', '.join(columns) or 'none'}; expected one")
    return columns[0]
