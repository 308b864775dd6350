"""The order of training: a pure function of the seed, the epoch and the position in the epoch.

Neither the number of worker processes nor what ran before has a say in it, so a run that resumes in the middle of an
epoch sees exactly the batches, and the augmentation, that it would have seen without the interruption. The ranks of a
distributed run share each global batch, so 2 ranks with batch size 8 see what 1 rank with batch size 16 sees.

Images that lie in parts, such as tar shards, are shuffled in blocks: the parts first, then the images of a few parts
together, so that reading stays within a few files at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, repeat

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from effbackbones.data.errors import DataError

Key = tuple[int, int]
"""Index of an image and the seed of its augmentation."""

PARTS_TOGETHER = 8
"""Parts whose images are shuffled together."""


def derive_seed(seed: int, *position: int) -> int:
    """Return the 32-bit seed of a position, such as (epoch,) or (epoch, place in the epoch)."""
    return int(np.random.SeedSequence(seed, spawn_key=position).generate_state(1)[0])


def shuffled_parts(parts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return the indices of all images of parts of these sizes, one part after the other, in a block-shuffled order."""
    starts = list(accumulate(parts, initial=0))
    order = []
    for block in torch.randperm(len(parts), generator=generator).split(PARTS_TOGETHER):
        images = torch.cat([torch.arange(starts[part], starts[part + 1]) for part in block.tolist()])
        order.append(images[torch.randperm(len(images), generator=generator)])
    return torch.cat(order)


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys of one rank, for one epoch per iteration.

    Args:
        images: images of an epoch: those of the dataset, or as many of each node's own; the last incomplete global
            batch of an epoch is dropped.
        batch_size: images per rank and batch.
        accumulate: batches of a rank that make up its part of a global batch.
        position: asked when an iteration starts: the epoch, and how many of its batches are consumed already.
        repeats: how often an image stands in a row; the epoch keeps its length and has fewer different images.
        overfit: every batch is the first one of epoch 0.
        parts: sizes of the parts that the dataset lies in, one after the other; None: it is shuffled as a whole.
        nodes: over how many nodes, of as many consecutive ranks each, images of their own are spread. The ranks of a
            node then share the order of its images, and their part of each global batch.

    Raises DataError where the dataset is smaller than one global batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int,
        position: Callable[[], tuple[int, int]],
        accumulate: int = 1,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        overfit: bool = False,
        parts: Sequence[int] | None = None,
        nodes: int = 1,
    ) -> None:
        sharing = world // nodes
        needed = batch_size * sharing * accumulate
        if images < needed:
            more = f", {accumulate} times" if accumulate > 1 else ""
            raise DataError(
                f"the training set has {images} images, fewer than one global batch of {needed} "
                f"(data.batch_size={batch_size} on {sharing} devices{more}): choose a smaller batch size"
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.accumulate = accumulate
        self.repeats = repeats
        self.rank = rank
        self.world = world
        self.overfit = overfit
        self.parts = parts
        self.sharing = sharing

    def __len__(self) -> int:
        return self.images // (self.batch_size * self.sharing * self.accumulate) * self.accumulate

    # Not a generator function: the position must be asked now, not when the first batch is drawn.
    def __iter__(self) -> Iterator[list[Key]]:
        epoch, consumed = self.position()
        if self.overfit:
            return repeat(self._batch(self._order(0), 0, 0), len(self) - consumed)
        order = self._order(epoch)
        return (self._batch(order, epoch, step) for step in range(consumed, len(self)))

    def first_images(self) -> list[int]:
        """Return the different images of the first batch of epoch 0 over all ranks, in ascending order."""
        return sorted(set(self._order(0)[: self.batch_size * self.sharing].tolist()))

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        if self.parts is None:
            order = torch.randperm(self.images, generator=generator)
        else:
            order = shuffled_parts(self.parts, generator)
        return order.repeat_interleave(self.repeats)[: self.images]

    def _batch(self, order: Tensor, epoch: int, step: int) -> list[Key]:
        start = (step * self.sharing + self.rank % self.sharing) * self.batch_size
        indices = order[start : start + self.batch_size].tolist()
        place = (step * self.world + self.rank) * self.batch_size  # in the epoch of all nodes
        return [(index, derive_seed(self.seed, epoch, place + i)) for i, index in enumerate(indices)]
