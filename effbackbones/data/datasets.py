"""What stands between a source of PIL images and a loader: transforms, seeds, and images that cannot be read."""

import logging
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from effbackbones.data.errors import BadImageError
from effbackbones.data.sampler import Key

log = logging.getLogger(__name__)

LEFT_OUT = -100
"""Target of an evaluation image that could not be read: losses ignore it by default, metrics must too."""

Transform = Callable[[Image.Image], Tensor]


class ImageSource(Protocol):
    """RGB images with their class indices; reading one may raise :class:`BadImageError`."""

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class BadImages:
    """The policy for images that cannot be read, and which ones they are, per split of the dataset.

    They are marked in memory that all worker processes share, however those are started; an image counts once.
    """

    def __init__(self, policy: Literal["error", "skip"], limit: int, **images: int) -> None:
        self.policy = policy
        self.limit = limit
        self._marks = {split: torch.zeros(n, dtype=torch.uint8).share_memory_() for split, n in images.items()}

    @property
    def count(self) -> int:
        return sum(int(marks.sum()) for marks in self._marks.values())

    def skip(self, split: str, index: int, error: BadImageError) -> None:
        """Mark and log an image that will be left out. Raises BadImageError where policy or limit forbid that."""
        if self.policy == "error":
            raise BadImageError(
                f"{error}. Repair or remove the file, or set data.on_bad_image=skip to go on without such images"
            ) from error
        if self._marks[split][index]:
            return
        self._marks[split][index] = 1
        count = self.count
        if count > self.limit:
            raise BadImageError(
                f"{count} images could not be read, more than data.max_bad_images={self.limit}. The last: {error}. "
                "Repair the dataset or raise the bound"
            ) from error
        log.warning("skipped image %d (of at most %d): %s", count, self.limit, error)


class TrainImages(Dataset[tuple[Tensor, int]]):
    """Augmented images by key. An image that cannot be read is replaced by the next one that can.

    Augmentation depends on the key alone, and leaves the random generators of the process as they were.
    """

    def __init__(self, source: ImageSource, transform: Transform, bad: BadImages) -> None:
        self.source = source
        self.transform = transform
        self.bad = bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, seed = key
        with isolate_rng(include_cuda=False):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the CUDA generators too
            image, target = self._read(index)
            return self.transform(image), target

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                return self.source[candidate]
            except BadImageError as error:
                self.bad.skip("train", candidate, error)
        raise BadImageError(f"none of the {len(self)} training images can be read: repair the dataset")


class EvalImages(Dataset[tuple[Tensor, int]]):
    """Images by index. One that cannot be read is zeros with the target `LEFT_OUT`."""

    def __init__(self, source: ImageSource, transform: Transform, bad: BadImages, split: str, size: int) -> None:
        self.source = source
        self.transform = transform
        self.bad = bad
        self.split = split
        self.size = size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, target = self.source[index]
        except BadImageError as error:
            self.bad.skip(self.split, index, error)
            return torch.zeros(3, self.size, self.size), LEFT_OUT
        return self.transform(image), target
