"""The LightningDataModule of a recipe: what is the same for every task, and that of image classification."""

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

    @property
    def bad_images(self) -> int:
        """Images skipped so far by this rank, over all its worker processes."""
        return self._bad.count

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
        return {"batches_per_epoch": self._batches_per_epoch()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that counted batches still mean the same position. Raises DataError where they do not."""
        saved = state_dict["batches_per_epoch"]
        assert self.trainer is not None
        if self.trainer.state.fn == TrainerFn.FITTING and saved != self._batches_per_epoch():
            raise DataError(
                f"the checkpoint comes from a run with {saved} batches per epoch, this one has "
                f"{self._batches_per_epoch()}, so that it cannot go on where that one was: resume with the same number "
                "of images, global batch size and trainer.limit_train, or start a new run from its weights"
            )

    def _epoch_batches(self) -> EpochBatches:
        rank, world = self._rank_and_world()
        return EpochBatches(
            len(self.train_dataset),
            self._data.batch_size,
            seed=self._seed,
            position=self._position,
            repeats=self._repeats,
            rank=rank,
            world=world,
            overfit=self._overfit,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_per_epoch(self) -> int:
        length = len(self._epoch_batches())
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(length, limit) if isinstance(limit, int) else int(length * limit)

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
        )


class _ResumableLoader(DataLoader):
    """A loader that Lightning takes as resumable; it needs no state, as its batch sampler knows the position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
