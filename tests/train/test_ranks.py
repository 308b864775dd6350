"""A rank that dies, fails or hangs ends the others, which say what became of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import TOOLS, train_command, write_recipe

# The command, one rank of which does something in the middle of an epoch; waiting is cut short.
DOOMED = """
import os
import signal
import sys
import time

from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.data import DataError
from effbackbones.train import run
from effbackbones.train.callbacks import ranks

ranks.BEAT, ranks.PATIENCE, ranks.GRACE = 0.2, 6, 1


class Doom(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2 and trainer.global_rank == int(sys.argv[1]):
            if sys.argv[2] == "fail":
                raise DataError("no more images")
            os.kill(os.getpid(), int(sys.argv[2]))


own = run._callbacks
run._callbacks = lambda *args: [*own(*args), Doom()]
sys.exit(main(["train", *sys.argv[3:]]))
"""


@pytest.mark.parametrize(
    ("rank", "doom", "word"),
    [
        pytest.param(0, signal.SIGKILL, "was killed or is out of reach", id="the first one killed"),
        pytest.param(1, signal.SIGKILL, "gives no sign of life", id="the other one killed"),
        pytest.param(0, signal.SIGSTOP, "was killed or is out of reach", id="the first one hanging"),
        pytest.param(1, signal.SIGSTOP, "gives no sign of life", id="the other one hanging"),
        pytest.param(1, "fail", "failed: no more images", id="failing"),
    ],
)
def test_rank_that_ends_ends_the_other_which_names_it(forks, tmp_path, rank, doom, word):
    doom = str(doom if doom == "fail" else int(doom))
    processes = forks.start_ranks(
        str(rank), doom, str(write_recipe(tmp_path)), f"run.dir={tmp_path / 'run'}", code=DOOMED
    )
    doomed, other = processes[rank], processes[1 - rank]
    try:
        assert other.wait() == 1, other.said
    finally:
        doomed.kill()
    (verdict,) = [line for line in other.said.splitlines() if line.endswith("goes on from the last checkpoint.")]
    assert verdict.startswith(f"rank {rank}")
    assert word in verdict
    assert f"rank {1 - rank} (process {other.pid} on " in verdict


def ranks_of(process):
    """Return the processes below a command's, or its own, that have a rank, by that."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        ranks = [int(entry.partition(b"=")[2]) for entry in environment if entry.startswith(b"LOCAL_RANK=")]
        found |= {rank: int(folder.name) for rank in ranks if parent == process.pid}
    return found


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(None, id="Lightning"),
        pytest.param("torch.distributed.run", id="torchrun", marks=pytest.mark.slow),
    ],
)
def test_killed_rank_ends_the_run_within_a_minute_and_is_named(tmp_path, launcher):
    recipe = [str(write_recipe(tmp_path)), "trainer.devices=2", "trainer.strategy=ddp", "trainer.epochs=10000"]
    folder = tmp_path / "run"
    command = train_command(*recipe, f"run.dir={folder}")
    if launcher:
        torchrun = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, str(TOOLS / "train.py"), *command[2:]]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        started = time.monotonic()
        assert process.wait(60) != 0
    finally:
        process.kill()
    text = (tmp_path / "said").read_text()
    print(f"ended {time.monotonic() - started:.0f} s later:", text[-3000:])
    assert "rank: 1" in text or "rank 1" in text
    assert not ranks_of(process)
