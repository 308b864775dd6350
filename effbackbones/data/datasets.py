"""What stands between a source of PIL images and a loader: transforms, seeds, and images that cannot be read."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, Protocol

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
    """RGB images with their class indices; reading one may raise :class:`BadImageError`.

    One whose images lie in files of many has `parts`, the images of each: its order of training is block-shuffled.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


def class_differences(train: Iterable[str], val: Iterable[str]) -> list[str]:
    """Say which classes only one split has; nothing where both have the same."""
    only = {"train": set(train) - set(val), "val": set(val) - set(train)}
    return [f"only in {split}: {', '.join(sorted(names))}" for split, names in only.items() if names]


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


class TrainSamples(Dataset[Any]):
    """Augmented samples by key. One that cannot be used is replaced by the next one that can.

    Augmentation depends on the key alone, and leaves the random generators of the process as they were.
    """

    def __init__(self, source: Any, bad: BadImages) -> None:
        self.source = source
        self.bad = bad

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Any:
        """Return a sample, augmented by the random generators of the process. Raises BadImageError."""
        return self.source[index]

    def __getitem__(self, key: Key) -> Any:
        index, seed = key
        with isolate_rng(include_cuda=False):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the CUDA generators too
            for candidate in chain(range(index, len(self)), range(index)):
                try:
                    return self.load(candidate)
                except BadImageError as error:
                    self.bad.skip("train", candidate, error)
        raise BadImageError(f"none of the {len(self)} training images can be read: repair the dataset")


class TrainImages(TrainSamples):
    """Augmented images with their class indices, by key."""

    def __init__(self, source: ImageSource, transform: Transform, bad: BadImages) -> None:
        super().__init__(source, bad)
        self.transform = transform

    def load(self, index: int) -> tuple[Tensor, int]:
        image, target = self.source[index]
        return self.transform(image), target


class EvalSamples(Dataset[Any]):
    """Samples by index. One that cannot be used is its `substitute`."""

    substitute: Any = None

    def __init__(self, source: Any, bad: BadImages, split: str) -> None:
        self.source = source
        self.bad = bad
        self.split = split

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Any:
        """Return a sample. Raises BadImageError."""
        return self.source[index]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.load(index)
        except BadImageError as error:
            self.bad.skip(self.split, index, error)
            return self.substitute


class EvalImages(EvalSamples):
    """Images with their class indices. One that cannot be read is zeros with the target `LEFT_OUT`."""

    def __init__(self, source: ImageSource, transform: Transform, bad: BadImages, split: str, size: int) -> None:
        super().__init__(source, bad, split)
        self.transform = transform
        self.substitute = (torch.zeros(3, size, size), LEFT_OUT)

    def load(self, index: int) -> tuple[Tensor, int]:
        image, target = self.source[index]
        return self.transform(image), target
