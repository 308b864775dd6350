"""A signal stops a run after its step, saved, and the same command goes on to the same bits."""

import os
import signal

import pytest
from small_runs import checkpoint, differences, outcome, small_recipe, train, write_recipe

from effbackbones.cli import COMMANDS, main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

# The command, whose process gets signals in one hook after some steps: `effb train` with hook, step and signals first.
SIGNALLED = """
import os
import signal
import sys

from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.train import run
from effbackbones.train.callbacks.pictures import Pictures

hook, step, numbers, *arguments = sys.argv[1:]
rank = int(os.environ.get("SIGNALLED_RANK", 0))


def send(trainer, *args):
    if trainer.global_step == int(step) and trainer.global_rank == rank:
        for number in map(int, numbers.split()):
            os.killpg(0, number) if group else os.kill(os.getpid(), number)


group = hook.startswith("group:")
if group:
    os.setsid()
sender = Callback()
setattr(sender, hook.removeprefix("group:"), send)
own = run._callbacks
run._callbacks = lambda *args: [sender, *(c for c in own(*args) if not isinstance(c, Pictures))]
sys.exit(main(["train", *arguments]))
"""
TERM, USR1, INT = (str(int(number)) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
SAID = {TERM: "SIGTERM", USR1: "SIGUSR1", INT: "SIGINT"}


def signalled(forks, folder, hook, step, numbers, overrides=(), **env):
    """Start a run that gets signals; return its process."""
    arguments = [str(write_recipe(folder.parent)), f"run.dir={folder}", *overrides]
    return forks.start(hook, str(step), numbers, *arguments, code=SIGNALLED, env=env)


@pytest.mark.parametrize(
    ("number", "code", "hook", "step", "saved", "overrides"),
    [
        pytest.param(TERM, 143, "on_train_batch_start", 3, 4, (), id="in an epoch"),
        pytest.param(USR1, 143, "on_train_batch_start", 3, 4, (), id="SIGUSR1"),
        pytest.param(INT, 130, "on_train_batch_start", 3, 4, (), id="Ctrl-C"),
        pytest.param(TERM, 143, "on_train_start", 0, 1, (), id="before the first step"),
        pytest.param(TERM, 143, "on_train_batch_start", 5, 6, (), id="before an evaluation"),
        pytest.param(TERM, 143, "on_validation_batch_start", 6, 6, (), id="in an evaluation"),
        pytest.param(TERM, 143, "on_validation_end", 6, 7, (), id="after an evaluation"),
        pytest.param(TERM, 143, "on_validation_batch_start", 12, 12, (), id="in the last evaluation"),
        pytest.param(TERM, 143, "on_validation_batch_start", 8, 8, ("trainer.steps=8",), id="in that of limited steps"),
        pytest.param(
            TERM, 143, "on_train_batch_start", 5, 6, ("trainer.val_every=2",), id="at the end of an epoch without one"
        ),
        pytest.param(TERM, 143, "on_before_zero_grad", 1, 2, ("trainer.accumulate=2",), id="accumulating"),
        pytest.param(TERM, 143, "group:on_train_batch_start", 3, 4, ("data.workers=2",), id="loader processes too"),
        pytest.param(INT, 130, "group:on_train_batch_start", 3, 4, ("data.workers=2",), id="Ctrl-C in a terminal"),
    ],
)
def test_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(
    forks, uninterrupted, tmp_path, number, code, hook, step, saved, overrides
):
    folder = tmp_path / "run"
    process = signalled(forks, folder, hook, step, number, overrides)
    assert process.wait() == code, process.said
    assert f"{SAID[number]}: stopped at step {saved}; the same command goes on from step {saved}." in process.said
    assert checkpoint(folder)["global_step"] == saved
    train(small_recipe(folder, overrides))
    assert differences(uninterrupted(overrides), outcome(folder)) == []


def test_second_interrupt_ends_the_run_at_once(forks, tmp_path):
    process = signalled(forks, tmp_path / "run", "on_train_batch_start", 3, f"{INT} {INT}")
    assert process.wait() == -signal.SIGINT
    assert "Ctrl-C again ends the run at once" in process.said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_interrupt_of_a_command_that_does_not_train_ends_it_with_130(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "ls", interrupt)
    assert main(["ls"]) == 130


def test_signal_of_slurm_is_left_to_the_script_of_the_job(forks, tmp_path):
    folder, caller = tmp_path / "run", tmp_path / "scontrol"
    caller.write_text(f"#!/bin/sh\ntouch {tmp_path / 'requeued'}\n")
    caller.chmod(0o755)
    job = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in job.items()}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = signalled(forks, folder, "on_train_batch_start", 3, USR1, PATH=path, **slurm)
    assert process.wait() == 143, process.said
    assert checkpoint(folder)["global_step"] == 4
    assert not list(folder.glob("hpc_ckpt*"))
    assert not (tmp_path / "requeued").exists()


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(forks, tmp_path_factory):
    """The outcome of a run of two ranks that nothing stops."""
    folder = tmp_path_factory.mktemp("two") / "run"
    for process in forks.start_ranks("train", str(write_recipe(folder.parent)), f"run.dir={folder}"):
        assert process.wait() == 0, process.said
    return outcome(folder)


@pytest.mark.parametrize(
    ("hook", "step", "rank", "saved"),
    [
        pytest.param("on_train_batch_start", 1, 1, 2, id="in an epoch"),
        pytest.param("on_validation_batch_start", 3, 1, 3, id="in an evaluation"),
    ],
)
def test_signal_to_one_rank_stops_both(forks, two_ranks, tmp_path, hook, step, rank, saved):
    folder = tmp_path / "run"
    arguments = [str(write_recipe(tmp_path)), f"run.dir={folder}"]
    processes = forks.start_ranks(hook, str(step), TERM, *arguments, code=SIGNALLED, env={"SIGNALLED_RANK": str(rank)})
    codes = [process.wait() for process in processes]
    assert codes == [143, 0], [process.said for process in processes]  # of the launcher's, one speaks for all
    assert checkpoint(folder)["global_step"] == saved
    for process in forks.start_ranks("train", *arguments):
        assert process.wait() == 0, process.said
    assert differences(two_ranks, outcome(folder)) == []
