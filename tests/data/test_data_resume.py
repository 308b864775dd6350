"""Training that resumes from a checkpoint sees exactly the batches that were left, in Lightning's own loops."""

import warnings
from contextlib import suppress
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import build_data
from effbackbones.data.errors import DataError

BATCHES = 5  # per epoch


class BrokenOffError(Exception):
    pass


class Keys(Dataset):
    """Gives the keys themselves for images."""

    def __len__(self):
        return 22

    def __getitem__(self, key):
        return torch.tensor(key)


class Recorder(LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.fail_at = fail_at

    def training_step(self, batch):
        if len(self.seen) == self.fail_at:
            raise BrokenOffError
        self.seen.append(batch.tolist())
        return self.weight.sum()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint in one hook, after a number of steps."""

    def __init__(self, hook, step, path):
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(checkpoint=None, callback=None, fail_at=None, batch_size=4, workers=0, **options):
    config = DataConfig(source="synthetic", num_classes=2, size=32, synthetic_images=22, batch_size=batch_size)
    config.workers = workers
    data = build_data(config, AugmentConfig(), seed=3)
    data.train_dataset = Keys()
    module = Recorder(fail_at)
    trainer = Trainer(
        **({"max_epochs": 3} | options),
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        callbacks=callback,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with suppress(BrokenOffError):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=checkpoint is not None)
    return module.seen


@pytest.fixture(scope="module")
def uninterrupted():
    return fit()


def test_epochs_differ_and_every_image_is_seen_at_most_once_in_each(uninterrupted):
    assert len(uninterrupted) == 3 * BATCHES
    epochs = [list(chain(*uninterrupted[i : i + BATCHES])) for i in (0, BATCHES, 2 * BATCHES)]
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert all(len(set(order)) == 4 * BATCHES for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert len({seed for epoch in epochs for _, seed in epoch}) == 3 * 4 * BATCHES


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", BATCHES),
        ("on_train_batch_end", BATCHES + 3),
        ("on_validation_end", BATCHES),
        ("on_train_epoch_end", BATCHES),
        ("on_train_epoch_end", 2 * BATCHES),
    ],
)
def test_run_resumed_from_any_kind_of_checkpoint_sees_exactly_the_rest(uninterrupted, tmp_path, hook, step):
    path = tmp_path / "saved.ckpt"
    assert fit(callback=SaveAt(hook, step, path)) == uninterrupted
    assert fit(path) == uninterrupted[step:]


@pytest.mark.parametrize("step", [2, BATCHES + 3])
def test_run_with_persistent_workers_resumes_to_the_same_batches(uninterrupted, tmp_path, step):
    path = tmp_path / "saved.ckpt"
    assert fit(callback=SaveAt("on_train_batch_end", step, path), workers=2) == uninterrupted
    assert fit(path, workers=2) == uninterrupted[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_limited_epochs_resume_to_the_same_batches(tmp_path, workers):
    path = tmp_path / "saved.ckpt"
    whole = fit(callback=SaveAt("on_train_batch_end", 4, path), limit_train_batches=3, workers=workers)
    assert len(whole) == 9
    assert fit(path, limit_train_batches=3, workers=workers) == whole[4:]


def test_run_that_is_resumed_twice_sees_every_batch_once(uninterrupted, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    fit(callback=SaveAt("on_train_batch_end", 3, first))
    fit(first, callback=SaveAt("on_train_batch_end", 7, second))
    assert fit(second) == uninterrupted[7:]


def test_run_saved_while_a_batch_breaks_off_sees_that_batch_again(uninterrupted, tmp_path):
    path = tmp_path / "saved.ckpt"
    callback = Callback()
    callback.on_exception = lambda trainer, *args: trainer.save_checkpoint(path)
    assert fit(callback=callback, fail_at=7) == uninterrupted[:7]
    assert fit(path) == uninterrupted[7:]


def test_run_stopped_by_its_step_limit_goes_on_where_it_stopped(uninterrupted, tmp_path):
    path = tmp_path / "saved.ckpt"
    assert fit(callback=SaveAt("on_train_end", 7, path), max_steps=7) == uninterrupted[:7]
    assert fit(path, max_steps=12, max_epochs=-1) == uninterrupted[7:12]


def test_resuming_mid_epoch_does_not_warn_of_a_loader_that_cannot_resume(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(callback=SaveAt("on_train_batch_end", 2, path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        fit(path)


def test_resuming_with_another_number_of_batches_is_an_error(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(callback=SaveAt("on_train_epoch_end", BATCHES, path))
    with pytest.raises(DataError, match="a run with 20 images per epoch, this one has 22"):
        fit(path, batch_size=2)
