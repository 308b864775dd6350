"""Runs on tar shards: as on folders, resumed within an epoch, and on nodes with shards of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BreakOff, BrokenOffError, checkpoint, differences, outcome, small_recipe, train
from small_sets import COUNTS, write_folders, write_shards

from effbackbones.config import RecipeError, load_recipe
from effbackbones.data import DataError, sampler
from effbackbones.predict import Predictor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(folder, root, source="shards"):
    return small_recipe(folder, [f"data.source={source}", f"data.root={root}", "data.num_classes=2"])


def test_run_on_shards_is_that_on_folders_where_their_order_is_the_same(tmp_path, monkeypatch):
    shards, folders = write_shards(tmp_path / "shards"), write_folders(tmp_path / "folders")
    monkeypatch.setattr(sampler, "shuffled_parts", lambda parts, rng: torch.randperm(sum(parts), generator=rng))
    runs = [train(recipe(tmp_path / "a", shards)), train(recipe(tmp_path / "b", folders, "folder"))]
    assert differences(*map(outcome, runs)) == []


def test_run_on_shards_broken_off_within_an_epoch_resumes_to_the_same_bits(tmp_path):
    root = write_shards(tmp_path / "shards")
    whole = outcome(train(recipe(tmp_path / "whole", root)))
    loaded = recipe(tmp_path / "broken", root)
    loaded.recipe.trainer.save_every = 1
    with pytest.raises(BrokenOffError):
        train(loaded, BreakOff("on_train_batch_start", 4))  # the second of the second epoch
    assert differences(whole, outcome(train(loaded))) == []


def test_predictions_of_a_run_say_what_its_classes_show(tmp_path):
    root = write_shards(tmp_path / "shards")
    (root / "classes.txt").write_text("n01440764\nn01443537\n")
    loaded = recipe(tmp_path / "run", root)
    loaded.recipe.trainer.epochs = 1
    run = train(loaded)
    assert checkpoint(run)["classes"] == ["n01440764", "n01443537"]
    assert Predictor.from_run(run).classes == ["tench, Tinca tinca", "goldfish, Carassius auratus"]


NODE = """
import json
import sys
from pathlib import Path

from lightning.pytorch import Callback
from small_runs import train

from effbackbones.config import load_recipe


class Record(Callback):
    def on_train_start(self, trainer, module):
        data = trainer.datamodule
        source = data.train_dataset.source
        found = {
            "shards": [path.name for path in source.shards],
            "images": len(source),
            "order": [index for batch in data.train_dataloader().batch_sampler for index, _ in batch],
            "val": list(data.val_dataloader().sampler),
        }
        Path(sys.argv[2]).write_text(json.dumps(found))


train(load_recipe(sys.argv[1], sys.argv[3:]), Record())
"""


def test_nodes_train_on_their_own_shards_for_as_many_steps(tmp_path):
    shards = write_shards(tmp_path / "shards", per_shard=5)
    script, recipe_file = tmp_path / "node.py", small_recipe(tmp_path / "run").path
    script.write_text(NODE)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = []
    for node in (0, 1):
        root = tmp_path / f"node{node}"  # has the shards that this node trains on, and all of evaluation
        root.mkdir()
        for path in shards.iterdir():
            if not path.name.startswith("train") or int(path.stem[-1]) % 2 == node:
                (root / path.name).symlink_to(path)
        overrides = [
            *("data.source=shards", f"data.root={root}", "data.train_shards=train-{0000..0002}.tar"),
            *("data.split_by_node=true", "data.num_classes=2", "data.batch_size=2"),
            *("trainer.nodes=2", "trainer.devices=1", "trainer.strategy=ddp", "trainer.epochs=1"),
            f"run.dir={tmp_path / f'run{node}'}",
        ]
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": str(node),
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "train")]),
        }
        command = [sys.executable, str(script), str(recipe_file), str(tmp_path / f"{node}.json"), *overrides]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    first, second = (json.loads((tmp_path / f"{node}.json").read_text()) for node in (0, 1))
    assert (first["shards"], second["shards"]) == (["train-0000.tar", "train-0002.tar"], ["train-0001.tar"])
    assert (first["images"], second["images"]) == (7, 5)
    for node in (first, second):
        assert len(node["order"]) == len(set(node["order"])) == 4  # two batches, as 5 images make
    assert sorted(first["val"] + second["val"]) == list(range(COUNTS["val"]))
    alone = load_recipe(
        tmp_path / "run0" / "recipe.yaml", ["trainer.nodes=1", "data.batch_size=4", f"data.root={shards}"]
    )
    alone.recipe.run.dir = str(tmp_path / "run0")
    with pytest.raises(RecipeError, match=r"trainer\.nodes: 2 then, 1 now"):
        train(alone)
    alone.recipe.run.force = True
    with pytest.raises(DataError, match="were split over 2 nodes, here they are over 1, in another order"):
        train(alone)
