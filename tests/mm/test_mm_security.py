"""No weight file runs code on its way into an mm detector or segmentor."""

import os
from pathlib import Path

import pytest
import torch
from small_scenes import dense_recipe, scenes

from effbackbones.checkpoint import CheckpointError
from effbackbones.cli import main
from effbackbones.mm.backbone import EffBackbone

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

WHY = "is not read, as it could run code"


class Payload:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def evil(tmp_path):
    """A weight file that would leave `trace` beside it; the test fails where it has."""
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": {"backbone.stem.weight": torch.zeros(1)}, "meta": Payload(trace)}, path)
    yield path
    assert not trace.exists()


def test_backbone_refuses_it(evil):
    backbone = EffBackbone("uniformer_xxs", checkpoint=str(evil), depths=(1, 1, 1, 1))
    with pytest.raises(CheckpointError, match=WHY):
        backbone.init_weights()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_commands_refuse_it_as_weights_and_in_a_run_folder(evil, tmp_path, capsys, task):
    run = tmp_path / "run"
    loaded = dense_recipe(task, run)
    recipe = [str(loaded.path), f"data.root={loaded.recipe.data.root}"]
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text(loaded.to_yaml())
    for name in ("last", "best"):
        (run / "checkpoints" / f"{name}.ckpt").hardlink_to(evil)
    image = str(next((scenes() / "coco" / "val2017").iterdir()))
    for command in (
        ["train", *recipe, f"model.checkpoint={evil}", f"run.dir={tmp_path / 'other'}"],
        ["eval", *recipe, f"model.checkpoint={evil}"],
        ["train", str(run)],
        ["eval", str(run)],
        ["predict", image, "--run", str(run)],
        ["export", "mm", str(run), "--out", str(tmp_path / "exported")],
    ):
        assert main(command) == 2, command
        assert WHY in capsys.readouterr().err, command
