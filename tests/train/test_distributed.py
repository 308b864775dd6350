"""Two processes on CPU train like one with their batches together, and stop together."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import checkpoint, train, train_command, write_recipe

from effbackbones.config import load_recipe
from effbackbones.train.run import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


ALONE = ["trainer.devices=1", "trainer.strategy=auto"]


def last_evaluation(folder):
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/top1"]]
    return {name: float(rows[-1][f"val/{name}"]) for name in ("top1", "top5", "loss")}


# The quickstart

BATCH = 8
STEPS = 20
OVERRIDES = [
    "trainer.accelerator=cpu",
    f"trainer.steps={STEPS}",
    "model.drop_path_rate=0",  # drawn for each process
    "model.norm_eval=true",  # statistics of a batch are those of a process
    "ema.decay=null",
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The run folder of the quickstart in two processes, the command as a user gives it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    own = ["trainer.devices=2", "trainer.strategy=ddp", f"data.batch_size={BATCH}"]
    images = ["data.eval_batch_size=25", "trainer.limit_val=2"]
    command = train_command("quickstart", *OVERRIDES, *own, *images, f"run.dir={folder}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_two_processes_give_the_weights_of_one_with_their_batches_together(two_processes, tmp_path):
    own = ["trainer.devices=1", f"data.batch_size={2 * BATCH}", "trainer.limit_val=1", "data.eval_batch_size=1"]
    one = checkpoint(train(load_recipe("quickstart", [*OVERRIDES, *own, f"run.dir={tmp_path / 'run'}"])))
    two = checkpoint(two_processes)
    assert one["global_step"] == two["global_step"] == STEPS
    assert one["state_dict"].keys() == two["state_dict"].keys()
    distance = {
        name: (value.double() - two["state_dict"][name].double()).abs().max().item()
        for name, value in one["state_dict"].items()
    }
    largest = max(distance, key=distance.__getitem__)
    print(f"largest difference: {distance[largest]:.1e}, of {largest}")
    assert distance[largest] < 1e-5, largest


def test_two_processes_evaluate_like_one(two_processes):
    alone = evaluate(str(two_processes), [*ALONE, "data.eval_batch_size=100", "trainer.limit_val=1"])
    assert last_evaluation(two_processes) == pytest.approx(alone, rel=1e-5)


# A bad value in one process

POISONED_IN_RANK_1 = """
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from small_runs import train

from effbackbones.config import load_recipe


class Poison(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]
        if trainer.global_step == 4 and trainer.global_rank == 1:
            batch[0][0] = torch.nan

    def on_exception(self, trainer, pl_module, exception):
        pairs = zip(self.before, pl_module.parameters(), strict=True)
        report = {
            "kind": type(exception).__name__,
            "message": str(exception),
            "unchanged": all(torch.equal(before, after) for before, after in pairs),
            "sum": sum(before.double().sum().item() for before in self.before),
        }
        Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


train(load_recipe(sys.argv[1], sys.argv[2:]), Poison())
"""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The folder of a run in two processes, one of which gets a bad image at step 5, and what both had to say."""
    folder = tmp_path_factory.mktemp("poisoned")
    script = folder / "poisoned.py"
    script.write_text(POISONED_IN_RANK_1)
    # 3 batches in an epoch; evaluation has 13 images on one rank and 12 on the other: 4 and 3 batches.
    own = ["trainer.devices=2", "trainer.strategy=ddp", "data.synthetic_images=25", f"run.dir={folder / 'run'}"]
    command = [sys.executable, str(script), str(write_recipe(folder)), *own]
    helpers = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.run(command, cwd=folder, env=helpers, stdout=subprocess.DEVNULL)
    assert process.returncode != 0
    return folder / "run", [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_bad_value_in_one_process_stops_both_before_the_step(poisoned):
    _, reports = poisoned
    for report in reports:
        assert report["kind"] == "NonFiniteError"
        assert report["unchanged"]
    assert math.isfinite(reports[0]["sum"])
    assert reports[0]["sum"] == reports[1]["sum"]


def test_each_process_says_what_it_knows_of_a_bad_value(poisoned):
    _, (healthy, bad) = poisoned
    assert bad["message"].startswith("rank 1, epoch 2, step 5: the loss is nan.\nFirst bad value: the input batch.\n")
    assert healthy["message"].startswith("rank 0, epoch 2, step 5: the loss of another rank is not finite")
    assert "First bad value" not in healthy["message"]


def test_uneven_shares_of_the_evaluation_count_every_image_once(poisoned):
    folder, _ = poisoned
    assert last_evaluation(folder) == pytest.approx(evaluate(str(folder), ALONE), rel=1e-5)
    right = 25 * last_evaluation(folder)["top1"]
    assert right == pytest.approx(round(right), abs=1e-4)
