"""The LightningDataModule of a recipe: what is the same for every task, and that of image classification."""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data.datasets import BadImages, EvalImages, EvalSamples, ImageSource, TrainImages, TrainSamples
from effbackbones.data.errors import DataError
from effbackbones.data.sampler import EpochBatches
from effbackbones.data.transforms import eval_transform, train_transform


class RecipeData(LightningDataModule):
    """Loaders of a training and an evaluation dataset.

    The order and the augmentation of training follow from `seed` and the progress of the trainer, which must have
    `use_distributed_sampler=False`: see :mod:`.sampler`. Evaluation takes every image once, in order; rank r of W takes
    every W-th from r on. With `overfit`, every training batch is the first one, and evaluation takes its images.

    Args:
        train: Training samples.
        val: Evaluation samples.
        bad: What counts the images that are skipped.
        classes: Names of the classes.
        collate: Makes a batch of a list of samples; None: torch's.
        batches: Chooses what is in the batches of training: :class:`EpochBatches`, or a kind of it.
        parts: Sizes of the parts that the training samples lie in, where they do; their order is block-shuffled.
    """

    def __init__(
        self,
        train: TrainSamples,
        val: EvalSamples,
        bad: BadImages,
        classes: Sequence[str],
        data: DataConfig,
        *,
        seed: int,
        overfit: bool = False,
        repeats: int = 1,
        collate: Callable[[list[Any]], Any] | None = None,
        batches: Callable[..., EpochBatches] = EpochBatches,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.train_dataset = train
        self.val_dataset = val
        self._bad = bad
        self._data = data
        self._repeats = repeats
        self._seed = seed
        self._overfit = overfit
        self._collate = collate
        self._batches = batches
        self._parts = parts
        self._fewest: int | None = None

    @property
    def bad_images(self) -> int:
        """Images skipped so far by this rank, over all its worker processes."""
        return self._bad.count

    def setup(self, stage: str) -> None:
        """Agree on the length of an epoch where each node has training images of its own: the fewest are everyone's.

        Say how small a batch has become.
        """
        if stage == "fit" and self.batch_size < self._data.batch_size:
            assert self.trainer is not None
            reason = f"as the training set has {len(self.train_dataset)} images (data.shrink_batch)"
            self.trainer.print(f"Batches of {self.batch_size} per device instead, {reason}.")
        if self._data.split_by_node and stage == "fit":
            assert self.trainer is not None
            strategy = self.trainer.strategy
            images = torch.tensor(len(self.train_dataset), device=strategy.root_device)
            self._fewest = int(strategy.reduce(images, reduce_op="min"))

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, batch_sampler=self._epoch_batches())

    def val_dataloader(self) -> DataLoader:
        images = self._epoch_batches().first_images() if self._overfit else range(len(self.val_dataset))
        rank, world = self._rank_and_world()
        batch_size = self._data.eval_batch_size or self._data.batch_size
        return self._loader(self.val_dataset, batch_size=batch_size, sampler=images[rank::world])

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {"images_per_epoch": self._images_per_epoch(), "nodes": self._nodes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that counted images still mean the same position. Raises DataError where they do not."""
        saved, nodes = state_dict["images_per_epoch"], state_dict["nodes"]
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        if nodes != self._nodes:
            raise DataError(
                f"the checkpoint comes from a run whose training images were split over {nodes} nodes, here they are "
                f"over {self._nodes}, in another order: resume with the same trainer.nodes and data.split_by_node"
            )
        if saved != self._images_per_epoch():
            raise DataError(
                f"the checkpoint comes from a run with {saved} images per epoch, this one has "
                f"{self._images_per_epoch()}, so that it cannot go on where that one was: resume with the same number "
                "of images, global batch size and trainer.limit_train, or start a new run from its weights"
            )

    @property
    def batch_size(self) -> int:
        """Training images per device and step; an even number where `data.shrink_batch` has made it smaller."""
        images = len(self.train_dataset) // self._rank_and_world()[1]
        if not self._data.shrink_batch or images >= self._data.batch_size:
            return self._data.batch_size
        return max(1, images - images % 2)

    def _epoch_batches(self) -> EpochBatches:
        rank, world = self._rank_and_world()
        return self._batches(
            self._fewest or len(self.train_dataset),
            self.batch_size,
            seed=self._seed,
            position=self._position,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            repeats=self._repeats,
            rank=rank,
            world=world,
            overfit=self._overfit,
            parts=self._parts,
            nodes=self._nodes,
        )

    @property
    def _nodes(self) -> int:
        """Nodes with training images of their own; 1 where all have the same."""
        return self.trainer.num_nodes if self.trainer and self._data.split_by_node else 1

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_per_epoch(self) -> int:
        length = len(self._epoch_batches())
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(length, limit) if isinstance(limit, int) else int(length * limit)

    def _images_per_epoch(self) -> int:
        return self._batches_per_epoch() * self.batch_size * self._rank_and_world()[1]

    def _position(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        # Lightning starts an iteration when it has restored its progress and before it fetches a batch, so at that
        # moment the total is exact: it counts finished batches over all epochs, unlike `ready` not a broken-off one.
        consumed = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        return divmod(consumed, self._batches_per_epoch())

    def _loader(self, dataset: Dataset[Any], **batches: Any) -> DataLoader:
        return _ResumableLoader(
            dataset,
            num_workers=self._data.workers,
            persistent_workers=self._data.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # loaders draw from the global generator otherwise
            collate_fn=self._collate,
            worker_init_fn=_outlive_signals,
            **batches,
        )


class ImageData(RecipeData):
    """Batches of normalised images (B, 3, size, size) float32 with class indices (B,) int64."""

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        overfit: bool = False,
    ) -> None:
        bad = BadImages(data.on_bad_image, data.max_bad_images, train=len(train), val=len(val))
        self.eval_transform = eval_transform(data)
        evaluated = (train, "train") if overfit else (val, "val")
        super().__init__(
            TrainImages(train, train_transform(data, augment), bad),
            EvalImages(evaluated[0], self.eval_transform, bad, evaluated[1], data.size),
            bad,
            train.classes,
            data,
            seed=seed,
            overfit=overfit,
            repeats=augment.repeats,
            parts=getattr(train, "parts", None),
        )


class _ResumableLoader(DataLoader):
    """A loader that Lightning takes as resumable; it needs no state, as its batch sampler knows the position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _outlive_signals(worker: int) -> None:
    """Have a loader process outlive the signals that stop a run, which needs its batches to finish a step."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # SIGUSR1 is not on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A second SIGTERM is that of the loader, which ends its processes by it.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
