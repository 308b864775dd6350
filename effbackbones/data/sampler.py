"""The order of training: a pure function of the seed, the epoch and the position in the epoch.

Neither the number of worker processes nor what ran before has a say in it, so a run that resumes in the middle of an
epoch sees exactly the batches, and the augmentation, that it would have seen without the interruption. The ranks of a
distributed run share each global batch, so 2 ranks with batch size 8 see what 1 rank with batch size 16 sees.
"""

from collections.abc import Callable, Iterator
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from effbackbones.data.errors import DataError

Key = tuple[int, int]
"""Index of an image and the seed of its augmentation."""


def derive_seed(seed: int, *position: int) -> int:
    """Return the 32-bit seed of a position, such as (epoch,) or (epoch, place in the epoch)."""
    return int(np.random.SeedSequence(seed, spawn_key=position).generate_state(1)[0])


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys of one rank, for one epoch per iteration.

    Args:
        images: images of the dataset; the last incomplete global batch of an epoch is dropped.
        batch_size: images per rank and batch.
        position: asked when an iteration starts: the epoch, and how many of its batches are consumed already.
        repeats: how often an image stands in a row; the epoch keeps its length and has fewer different images.
        overfit: every batch is the first one of epoch 0.

    Raises DataError where the dataset is smaller than one global batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int,
        position: Callable[[], tuple[int, int]],
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        overfit: bool = False,
    ) -> None:
        if images < batch_size * world:
            raise DataError(
                f"the training set has {images} images, fewer than one global batch of {batch_size * world} "
                f"(data.batch_size={batch_size} on {world} devices): choose a smaller batch size"
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.repeats = repeats
        self.rank = rank
        self.world = world
        self.overfit = overfit

    def __len__(self) -> int:
        return self.images // (self.batch_size * self.world)

    # Not a generator function: the position must be asked now, not when the first batch is drawn.
    def __iter__(self) -> Iterator[list[Key]]:
        epoch, consumed = self.position()
        if self.overfit:
            return repeat(self._batch(self._order(0), 0, 0), len(self) - consumed)
        order = self._order(epoch)
        return (self._batch(order, epoch, step) for step in range(consumed, len(self)))

    def first_images(self) -> list[int]:
        """Return the different images of the first global batch of epoch 0, in ascending order."""
        return sorted(set(self._order(0)[: self.batch_size * self.world].tolist()))

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.images]

    def _batch(self, order: Tensor, epoch: int, step: int) -> list[Key]:
        start = (step * self.world + self.rank) * self.batch_size
        indices = order[start : start + self.batch_size].tolist()
        return [(index, derive_seed(self.seed, epoch, place)) for place, index in enumerate(indices, start)]
