"""The command killed at any moment, given again, ends with the bits of the run that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from small_runs import checkpoint, differences, outcome, small_recipe, train, train_command, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

# Two epochs of 40 steps.
OVERRIDES = ("data.synthetic_images=162", "trainer.save_every=7", "ema.decay=0.9", "augment.mixup=0.8")

KILLED_IN_SAVING = """
import os, signal, sys
import torch
from effbackbones.cli import main

save = torch.save

def save_half(checkpoint, path):
    save(checkpoint, path)
    if checkpoint["global_step"] >= 50:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
main(["train", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its first epoch, resumed and killed while it saves in the second, and resumed to its end."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [str(write_recipe(folder.parent)), f"run.dir={folder}", *OVERRIDES]
    found = {"folder": folder}

    process = subprocess.Popen(train_command(*arguments), stdout=subprocess.DEVNULL)
    kill_at, metrics = random.randrange(8, 20), folder / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > kill_at):
        time.sleep(0.005)
    process.kill()
    found["first code"] = process.wait()
    found["first step"] = checkpoint(folder)["global_step"]

    in_saving = [sys.executable, "-c", KILLED_IN_SAVING, *arguments]
    found["second code"] = subprocess.run(in_saving, stdout=subprocess.DEVNULL).returncode
    found["second step"] = checkpoint(folder)["global_step"]
    found["second files"] = sorted(path.name for path in (folder / "checkpoints").iterdir())

    last = subprocess.run(train_command(*arguments), capture_output=True, text=True, check=True)
    found["words"] = last.stdout
    return found


def test_run_killed_in_an_epoch_leaves_its_last_checkpoint(killed):
    assert killed["first code"] == -signal.SIGKILL
    assert 7 <= killed["first step"] < 40
    assert killed["first step"] % 7 == 0


def test_run_killed_while_it_saves_leaves_the_checkpoint_before(killed):
    assert killed["second code"] == -signal.SIGKILL
    assert killed["second step"] == 49
    assert any(name.endswith(".part") for name in killed["second files"])


def test_run_killed_twice_ends_like_the_one_that_was_never_killed(killed, tmp_path):
    assert "at step 49" in killed["words"]
    whole = train(small_recipe(tmp_path / "whole", OVERRIDES))
    assert differences(outcome(whole), outcome(killed["folder"])) == []


def test_resumed_run_removes_what_the_killed_one_was_writing(killed):
    assert sorted(os.listdir(killed["folder"] / "checkpoints")) == ["best.ckpt", "last.ckpt"]
