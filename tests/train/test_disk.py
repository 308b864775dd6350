"""A disk that is full or not to be written to: no run is lost by it, and none begins on one."""

import os
import resource

import pytest
import torch
from lightning.pytorch import Callback
from small_runs import checkpoint, differences, outcome, small_recipe, train

from effbackbones.checkpoint import write_checkpoint
from effbackbones.cli import main
from effbackbones.train.callbacks.signals import StoppedError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class SmallFiles:
    """Lets no file grow beyond some bytes, as a full disk would; other names for the error are all that differ."""

    def __init__(self, most):
        self.most = most

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class FullDisk(Callback):
    """Lets checkpoints find no room from one step to another; notes the step in last.ckpt at each step."""

    def __init__(self, first, end):
        self.first, self.end, self.limit = first, end, SmallFiles(100_000)
        self.kept = {}

    def on_train_batch_start(self, trainer, *args):
        last = trainer.checkpoint_callback.last
        self.kept[trainer.global_step] = last.exists() and checkpoint(last.parents[1])["global_step"]
        if trainer.global_step == self.first:
            self.limit.__enter__()
        elif trainer.global_step == self.end:
            self.limit.__exit__()

    def on_exception(self, *args):
        self.limit.__exit__()


@pytest.mark.parametrize("most", [100, 10_000, 300_000])
def test_checkpoint_without_room_is_an_error_of_the_disk_and_leaves_the_old_one(tmp_path, most):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)
    weights = {f"weight{i}": torch.zeros(100, 100) for i in range(10)}
    with SmallFiles(most), pytest.raises(OSError, match="File too large"):
        write_checkpoint(weights, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_run_on_a_full_disk_keeps_its_checkpoint_says_so_once_and_goes_on(tmp_path, uninterrupted):
    disk = FullDisk(4, 9)
    with pytest.warns(UserWarning, match="cannot be written") as warnings:
        folder = train(small_recipe(tmp_path / "run", ["trainer.save_every=2"]), disk)
    said = [str(warning.message) for warning in warnings if "cannot be written" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith(f"{folder / 'checkpoints' / 'last.ckpt'} cannot be written: [Errno ")
    assert {step: disk.kept[step] for step in range(4, 12)} == dict.fromkeys(range(4, 10), 4) | {10: 10, 11: 10}
    assert differences(uninterrupted()["last"]["state_dict"], outcome(folder)["last"]["state_dict"]) == []
    assert uninterrupted()["metrics"] == outcome(folder)["metrics"]


def test_signal_on_a_full_disk_tells_what_the_run_goes_on_from(tmp_path, capsys):
    signal = Callback()
    signal.on_train_batch_start = lambda trainer, *args: (
        trainer.global_step == 7 and setattr(trainer.checkpoint_callback.signals, "received", 15)
    )
    disk = FullDisk(7, 99)
    with pytest.warns(UserWarning, match="cannot be written"), pytest.raises(StoppedError):
        train(small_recipe(tmp_path / "run", ["trainer.save_every=4"]), disk, signal)
    assert "stopped at step 8; the same command goes on from step 6." in capsys.readouterr().out


def test_picture_without_room_is_left_out(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effbackbones.train.callbacks.pictures.plot_curves", fail)
    with pytest.warns(UserWarning, match=r"curves\.png cannot be written: \[Errno 28\]") as warnings:
        folder = train(small_recipe(tmp_path / "run"), pictures=True)
    assert len([warning for warning in warnings if "curves.png" in str(warning.message)]) == 1
    assert checkpoint(folder)["global_step"] == 12
    assert (folder / "predictions.png").exists()


@pytest.mark.parametrize("place", ["folder", "checkpoints"])
def test_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path, capsys, monkeypatch, place):
    folder = tmp_path / "run"
    if place == "folder":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "run"
    else:
        folder.mkdir()
        (folder / "checkpoints").symlink_to("/proc/self/fd")  # where nobody creates a file
    recipe = small_recipe(tmp_path / "run").path

    def step(*args):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("effbackbones.train.classification.ClassificationModule.forward_loss", step)
    assert main(["train", str(recipe), f"run.dir={folder}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"effb train: run.dir: {folder} cannot be written: ")
    assert message.endswith("set another run.dir\n")
