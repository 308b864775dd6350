"""mm's own runner trains our backbones from plain mm configs, and ours takes up what it leaves."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from small_scenes import scenes

from effbackbones.assets import asset_dir
from effbackbones.config import load_recipe
from effbackbones.predict_dense import sample_of
from effbackbones.train.run import build_task, evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

WIDTHS = [16, 16, 320, 192]
LAYERS = 5  # stem, and a block in each stage
SMALL = {
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.dims": WIDTHS,
    "model.neck.in_channels": WIDTHS,
    "optim_wrapper.paramwise_cfg": {"layer_decay": 0.5},
    "randomness": {"seed": 0},
    "train_dataloader.batch_size": 2,
    **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")},
    **{f"{split}_dataloader.persistent_workers": False for split in ("train", "val", "test")},
}
DETECTOR = {"train_cfg.max_epochs": 1}
SEGMENTOR = {
    "model.decode_head.norm_cfg.type": "BN",  # the config's synchronises, on CUDA only
    "model.data_preprocessor.size": (64, 64),
    "train_dataloader.dataset.pipeline.2.scale": (128, 96),
    "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
    "val_dataloader.dataset.pipeline.1.scale": (128, 96),
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 4,
}
RECIPE = """
task: {task}
model:
  name: s2aformer_mini
  args: {{depths: [1, 1, 1, 1], dims: [16, 16, 320, 192]}}
  head: {head}
  checkpoint: {checkpoint}
data: {{source: {source}, root: {root}, scale: {scale}, workers: 0}}
trainer: {{accelerator: cpu}}
"""


def train_under_mm(config: str, folder: Path, options: dict[str, Any]) -> Any:
    """Train a config of recipes/mm/, made small, under mm's runner; return the runner."""
    cfg = Config.fromfile(asset_dir("recipes") / "mm" / config)
    cfg.merge_from_dict({**SMALL, **options, "work_dir": str(folder)})
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@torch.no_grad()
def predictions(runner: Any) -> list[Any]:
    """Return mm's data samples with what the trained model sees in the evaluation images."""
    model = runner.model.eval()
    return [sample for batch in runner.val_loop.dataloader for sample in model.test_step(batch)]


def rates(runner: Any) -> list[float]:
    return sorted({group["initial_lr"] for group in runner.optim_wrapper.optimizer.param_groups})


def recipe_of(folder: Path, **values: Any) -> Path:
    path = folder / "ours.yaml"
    path.write_text(RECIPE.format(**values))
    return path


def our_predictions(recipe: Path, files: Iterable[str]) -> list[Any]:
    """Return the same of the model that our recipe makes of its checkpoint."""
    loaded = load_recipe(recipe)
    module: Any = build_task(loaded)[0]
    module.load_weights(loaded.recipe.model.checkpoint, same_classes=True)
    module.eval()
    return [sample_of(module, file) for file in files]


def test_detector_trained_under_mm_predicts_and_evaluates_the_same_in_ours(tmp_path, monkeypatch):
    root = scenes() / "coco"
    monkeypatch.setenv("SCENES_ROOT", str(root))
    runner = train_under_mm("scenes_mask_rcnn.py", tmp_path, DETECTOR)
    assert runner.iter == 4
    assert rates(runner) == pytest.approx([5e-4 * 0.5**n for n in range(LAYERS, -1, -1)])
    recipe = recipe_of(
        tmp_path,
        task="detection",
        head=tmp_path / "scenes_mask_rcnn.py",  # as the runner left it
        checkpoint=tmp_path / "epoch_1.pth",
        source="coco",
        root=root,
        scale=[192, 144],
    )
    theirs = predictions(runner)
    for their, our in zip(theirs, our_predictions(recipe, [sample.img_path for sample in theirs]), strict=True):
        their, our = their.pred_instances, our.pred_instances
        assert len(their.bboxes) > 0
        assert all(torch.equal(their[key], our[key]) for key in ("bboxes", "scores", "labels", "masks"))
    assert evaluate(str(recipe))["box_ap"] == runner.message_hub.get_scalar("val/coco/bbox_mAP").current()


def test_segmentor_trained_under_mm_predicts_and_evaluates_the_same_in_ours(tmp_path, monkeypatch):
    root = Path(shutil.copytree(scenes() / "ade20k", tmp_path / "ade20k"))
    (root / "objectInfo150.txt").unlink()  # the classes are ADE20K's own
    monkeypatch.setenv("ADE20K_ROOT", str(root))
    runner = train_under_mm("semantic_fpn_s2aformer_mini.py", tmp_path, SEGMENTOR)
    assert runner.iter == 4
    assert rates(runner) == pytest.approx([1e-4 * 0.5**n for n in range(LAYERS, -1, -1)])
    recipe = recipe_of(
        tmp_path,
        task="segmentation",
        head=tmp_path / "semantic_fpn_s2aformer_mini.py",
        checkpoint=tmp_path / "iter_4.pth",
        source="ade20k",
        root=root,
        scale=[128, 96],
    )
    theirs = predictions(runner)
    for their, our in zip(theirs, our_predictions(recipe, [sample.img_path for sample in theirs]), strict=True):
        assert torch.equal(their.seg_logits.data, our.seg_logits.data)
    miou = runner.message_hub.get_scalar("val/mIoU").current()
    assert evaluate(str(recipe))["miou"] == pytest.approx(miou / 100)
    assert miou > 0
