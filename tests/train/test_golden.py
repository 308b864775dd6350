"""The losses of a model of each family over its first ten steps stay what they are.

A change of them is a change of what is trained: where one is meant, write them anew by
`PYTHONPATH=tests python tests/train/test_golden.py`.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from small_runs import train

from effbackbones.config import load_recipe
from effbackbones.train.logger import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 10

RECIPE = """
data: {source: synthetic, num_classes: 5, size: 64, batch_size: 8, workers: 0, synthetic_images: 40}
augment: {color_jitter: 0.3, erase: 0.25, mixup: 0.4, cutmix: 1.0, smoothing: 0.1}
optim: {name: sgd, lr: 0.02, momentum: 0.9, clip_grad: 1.0}
schedule: {warmup_epochs: 1}
trainer: {epochs: 2, accelerator: cpu, log_every: 1, limit_val: 1}
"""

# Narrow and shallow; no stochastic depth or dropout but where a family would have it.
MODELS = {
    "uniformer_small": {"head_dim": 16, "dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "gc_vit_xxtiny": {"dim": 16, "num_heads": [1, 1, 2, 4], "depths": [2, 2, 2, 2]},
    "transnext_micro": {"dims": [24, 24, 48, 48], "depths": [1, 1, 1, 1]},
    "s2aformer_mini": {"dims": [8, 16, 20, 24], "depths": [1, 1, 1, 1], "head_hidden_size": 32},
    "sgformer_s": {"dims": [16, 16, 32, 32], "heads": [2, 2, 2, 2], "depths": [2, 2, 2, 1]},
    "stvit_small": {"dims": [16, 16, 20, 32], "depths": [1, 1, 1, 1], "projection": 64},
    "stvit_r_swin_tiny": {"dims": [16, 16, 32, 32], "head_dim": 16, "depths": [1, 1, 6, 1]},
}


def losses(name: str, folder: Path) -> list[float]:
    """Return the losses of the steps of a run."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "golden.yaml"
    recipe.write_text(f"model: {{name: {name}, drop_path_rate: 0.1, args: {json.dumps(MODELS[name])}}}\n{RECIPE}")
    run = train(load_recipe(recipe, [f"run.dir={folder / 'run'}"]))
    found = [row["train/loss"] for row in read_metrics(run / "metrics.csv")]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_the_first_steps_are_the_stored_ones(name, tmp_path):
    # Two kinds of CPU differ in the order of sums, by less than 1e-6 of these losses.
    assert losses(name, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-5)


def test_two_runs_of_one_seed_have_the_same_losses_and_of_two_seeds_have_not(tmp_path):
    name = "uniformer_small"
    first, second = (losses(name, tmp_path / folder) for folder in ("first", "second"))
    assert first == second
    recipe = tmp_path / "first" / "golden.yaml"
    other = train(load_recipe(recipe, [f"run.dir={tmp_path / 'other'}", "trainer.seed=1"]))
    assert [row["train/loss"] for row in read_metrics(other / "metrics.csv")] != first


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        golden = {name: losses(name, Path(scratch) / name) for name in MODELS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
