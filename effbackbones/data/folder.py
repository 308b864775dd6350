"""Image folders: root/train/<class>/* and root/val/<class>/*, or root/<class>/* to be split."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from effbackbones.data.datasets import class_differences
from effbackbones.data.errors import DataError
from effbackbones.data.images import load_image


class PathIndex:
    """Many paths with a class each, in memory that worker processes share, however those are started.

    Args:
        listings: Class indices with paths of that class, in the order of the index.
    """

    def __init__(self, listings: Iterable[tuple[int, list[str]]]) -> None:
        text, ends, targets = bytearray(), array("q"), array("i")
        for target, paths in listings:
            encoded = list(map(os.fsencode, paths))
            ends.extend(accumulate(map(len, encoded[1:]), initial=len(text) + len(encoded[0])) if encoded else ())
            targets.extend([target] * len(encoded))
            text += b"".join(encoded)
        self._text, self._ends, self._targets = (
            torch.from_numpy(np.asarray(memoryview(part))).share_memory_() for part in (text, ends, targets)
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[str, int]:
        start, end = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
        return os.fsdecode(self._text[start:end].numpy().tobytes()), int(self._targets[index])

    @property
    def targets(self) -> np.ndarray:
        """Class indices (N,) int32."""
        return self._targets.numpy()


class FolderImages:
    """The images below folder/<class>/, numbered as torchvision's ImageFolder does: by class, folder and file name.

    Raises DataError where the folder is missing or holds no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; data.root must hold train/<class>/ and val/<class>/, or <class>/ alone"
            )
        self.folder = folder
        with os.scandir(folder) as entries:
            self.classes = sorted(entry.name for entry in entries if entry.is_dir())
        if not self.classes:
            raise DataError(f"{folder}: no folder in it; expected one for each class")
        self._index = PathIndex(_listings(folder, self.classes))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, target = self._index[index]
        return load_image(os.path.join(self.folder, self.classes[target], name)), target

    @property
    def targets(self) -> np.ndarray:
        """Class indices (N,) int32."""
        return self._index.targets

    @property
    def empty_classes(self) -> list[str]:
        """Names of the classes without an image."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]


def load_folders(root: Path) -> tuple[FolderImages, FolderImages]:
    """Find the images of root/train and root/val; classes are numbered in the order of their names.

    Raises DataError where a folder is missing, a class is empty, or the classes of train and val differ.
    """
    train, val = FolderImages(root / "train"), FolderImages(root / "val")
    for split in (train, val):
        if split.empty_classes:
            raise DataError(
                f"{split.folder}: no image in {', '.join(split.empty_classes)}. Every class needs images, of the "
                f"suffixes {' '.join(IMG_EXTENSIONS)}: fill or remove the folder"
            )
    if differences := class_differences(train.classes, val.classes):
        raise DataError(f"{root}: train and val must have the same classes, but {'; '.join(differences)}")
    return train, val


class Part:
    """Some of the images of a folder, as a set of their own.

    Args:
        images: All of them.
        indices: Those of the part, (N,) int64.
    """

    def __init__(self, images: FolderImages, indices: np.ndarray) -> None:
        self.classes = images.classes
        self._images = images
        self._indices = torch.from_numpy(indices).share_memory_()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[int(self._indices[index])]


def split_folder(root: Path, val_share: float) -> tuple[Part, Part]:
    """Split the images below root/<class>/ into those to train on and those to evaluate, the same ones every time.

    Of each class about `val_share` is evaluated, and at least one image; at least one is left to train on.

    Raises DataError where there is no class, or one has fewer than two images.
    """
    images, generator = FolderImages(root), np.random.default_rng(0)
    train, val = [], []
    for target, name in enumerate(images.classes):
        of_class = generator.permutation(np.flatnonzero(images.targets == target))
        if len(of_class) < 2:
            raise DataError(
                f"{root / name}: {len(of_class)} images, expected at least 2, to train on one and evaluate the other, "
                f"of the suffixes {' '.join(IMG_EXTENSIONS)}: fill or remove the folder"
            )
        count = min(max(1, round(val_share * len(of_class))), len(of_class) - 1)
        val.append(of_class[:count])
        train.append(of_class[count:])
    return Part(images, np.sort(np.concatenate(train))), Part(images, np.sort(np.concatenate(val)))


def _listings(folder: Path, classes: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the class index and the images, as paths below the class, of each folder below the classes, in order."""
    for target, name in enumerate(classes):
        found, pending = [], [""]
        while pending:
            below = pending.pop()
            images = []
            with os.scandir(os.path.join(folder, name, below)) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append(os.path.join(below, entry.name))
                    elif entry.name.lower().endswith(IMG_EXTENSIONS):
                        images.append(entry.name)
            found.append((below, sorted(images)))
        for below, images in sorted(found):
            yield target, [os.path.join(below, image) for image in images]
