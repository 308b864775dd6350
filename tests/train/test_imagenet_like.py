"""Published recipes as they are but for the batch, one of each family, on a set with the layout of ImageNet."""

import runpy
from pathlib import Path

import pytest
from small_runs import TOOLS, BreakOff, BrokenOffError, checkpoint, train

from effbackbones.config import load_recipe
from effbackbones.train.logger import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:lightning")]

MODELS = (
    "uniformer_xxs",
    "gc_vit_xxtiny",
    "transnext_micro",
    "s2aformer_mini",
    "sgformer_s",
    "stvit_small",
    "stvit_r_swin_tiny",
)


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 3,000 + 1,000 images of 1,000 classes: folders/ and shards/."""
    out = tmp_path_factory.mktemp("imagenet") / "like"
    runpy.run_path(str(TOOLS / "make_imagenet_like.py"))["main"](["--out", str(out)])
    return out


@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_published_recipe_trains_and_goes_on(
    name: str, source: str, imagenet_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = imagenet_like / ("shards" if source == "shards" else "folders")
    overrides = [
        *(f"data.source={source}", f"data.root={root}", f"run.dir={tmp_path / 'run'}", "data.batch_size=2"),
        *("data.workers=1", "trainer.accelerator=cpu", "trainer.precision=32", "trainer.limit_val=1"),
        *("trainer.steps=6", "trainer.save_every=2", "trainer.log_every=1"),
    ]
    with pytest.raises(BrokenOffError):
        train(load_recipe(f"in1k/{name}", overrides), BreakOff("on_train_batch_start", 3))
    folder = train(load_recipe(f"in1k/{name}", overrides))
    assert checkpoint(folder)["global_step"] == 6
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [1, 2, 3, 4, 5, 6]
