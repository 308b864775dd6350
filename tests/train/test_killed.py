"""A run that is killed at any moment, and given again, ends with the bits of the run that was never killed."""

import mmap
import os
import random
import signal
import struct
import subprocess
import time

import pytest
from small_runs import differences, outcome, train_command, write_recipe

from effbackbones.checkpoint import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

KILLS = 20

# 14 epochs of 6 steps, each of them saved, and of 7 batches of evaluation.
OVERRIDES = ("trainer.epochs=14", "trainer.save_every=1", "ema.decay=0.9", "augment.mixup=0.8")

# The command, which counts on a board of shared memory what it begins to do, and notes the step that it has saved.
WATCHED = """
import mmap
import struct
import sys

from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.train import run
from effbackbones.train.callbacks import checkpoints
from effbackbones.train.callbacks.pictures import Pictures

with open(sys.argv[1], "r+b") as file:
    board = mmap.mmap(file.fileno(), 0)


def count(place, value=None):
    value = struct.unpack_from("q", board, place * 8)[0] + 1 if value is None else value
    struct.pack_into("q", board, place * 8, value)


class Counting(Callback):
    def on_train_batch_start(self, *args):
        count(0)

    def on_validation_batch_start(self, *args):
        count(1)


def write_checkpoint(checkpoint, path):
    count(2)
    write(checkpoint, path)
    if path.name == "last.ckpt":
        count(3, checkpoint["global_step"])


write, checkpoints.write_checkpoint = checkpoints.write_checkpoint, write_checkpoint
own = run._callbacks
run._callbacks = lambda *args: [Counting(), *(c for c in own(*args) if not isinstance(c, Pictures))]
sys.exit(main(["train", *sys.argv[2:]]))
"""
STEPPING, EVALUATING, SAVING, SAVED = range(4)  # places on the board
MOMENTS = {STEPPING: (3, 0.04), EVALUATING: (7, 0.02), SAVING: (3, 0.02)}  # at most so many times, and seconds later


class Board:
    """What a process does, on the memory that it shares."""

    def __init__(self, path):
        path.write_bytes(bytes(8 * 4))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, place):
        return struct.unpack_from("q", self.memory, place * 8)[0]


@pytest.fixture
def dice():
    """The source of what is random in a test, which tells how to repeat it."""
    seed = int(os.environ.get("KILLED_SEED") or random.randrange(2**32))
    print(f"repeat this with KILLED_SEED={seed}")
    return random.Random(seed)


def last_step(folder):
    """Return the step of the last checkpoint, whose checksums hold; 0 where there is none."""
    path = folder / "checkpoints" / "last.ckpt"
    return read_checkpoint(path)["global_step"] if path.exists() else 0


def test_run_killed_twenty_times_ends_like_the_one_that_was_never_killed(forks, uninterrupted, tmp_path, dice):
    folder, step = tmp_path / "run", 0
    arguments = [str(write_recipe(tmp_path)), f"run.dir={folder}", *OVERRIDES]
    doings = dice.sample([STEPPING, EVALUATING, SAVING] * 7, KILLS)
    for number, doing in enumerate(doings):
        board = Board(tmp_path / f"board{number}")
        process = forks.start(str(tmp_path / f"board{number}"), *arguments, code=WATCHED)
        most, seconds = MOMENTS[doing]
        times, delay = dice.randint(1, most), dice.uniform(0, seconds)
        while board[doing] < times:
            assert process.poll() is None, process.said
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.said
        assert not step or f"at step {step}." in process.said
        kept = last_step(folder)
        print(f"killed while {('stepping', 'evaluating', 'saving')[doing]}: step {step} to {kept}")
        assert kept >= max(board[SAVED], step)
        step = kept
    process = forks.start("train", *arguments)
    assert process.wait() == 0, process.said
    assert f"at step {step}." in process.said
    assert differences(uninterrupted(OVERRIDES), outcome(folder)) == []
    assert sorted(os.listdir(folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]


KILLED_IN_SAVING = """
import os
import signal
import sys

import torch

from effbackbones.cli import main

save = torch.save


def save_half(checkpoint, file):
    save(checkpoint, file)
    if checkpoint["global_step"] == 5:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_half
main(["train", *sys.argv[1:]])
"""


def test_half_written_checkpoint_is_never_picked_up(forks, tmp_path):
    folder = tmp_path / "run"
    arguments = [str(write_recipe(tmp_path)), f"run.dir={folder}", "trainer.save_every=2", "trainer.steps=5"]
    assert forks.start(*arguments, code=KILLED_IN_SAVING).wait() == -signal.SIGKILL
    assert any(name.endswith(".part") for name in os.listdir(folder / "checkpoints"))
    assert last_step(folder) == 4
    process = forks.start("train", *arguments)
    assert process.wait() == 0, process.said
    assert "at step 4." in process.said
    assert sorted(os.listdir(folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]


# The real command, as it is started anew each time

REAL = ("trainer.epochs=4", "trainer.save_every=7", "ema.decay=0.9")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_command_killed_twenty_times_ends_like_the_one_that_was_never_killed(tmp_path, dice, devices):
    images = f"data.synthetic_images={402 * devices}"  # 4 epochs of 100 steps
    ranks = (images, f"trainer.devices={devices}", "trainer.strategy=auto")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    recipe = str(write_recipe(tmp_path))
    arguments = train_command(recipe, *REAL, *ranks, f"run.dir={folder}")
    for _ in range(KILLS):
        before = last_step(folder)
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True)
        rows, enough, started = folder / "metrics.csv", before + dice.randint(0, 4), time.time_ns()
        while not (
            rows.exists() and rows.stat().st_mtime_ns > started and len(rows.read_text().splitlines()) > enough + 1
        ):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        print(f"killed after step {before}, now at {last_step(folder)}")
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(train_command(recipe, *REAL, *ranks, f"run.dir={whole}"), check=True, stdout=subprocess.DEVNULL)
    assert differences(outcome(whole), outcome(folder)) == []
