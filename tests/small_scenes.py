"""A few scenes in the layouts of COCO and ADE20K, and recipes of a second or less on them."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from effbackbones.config import LoadedRecipe, load_recipe
from effbackbones.data.scenes import make_scenes

MODEL = """
model:
  name: s2aformer_mini
  args: {depths: [1, 1, 1, 1], dims: [16, 16, 320, 192]}
"""

DETECTION = f"""
task: detection
{MODEL}
  head: mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py
  head_overrides:
    neck: {{out_channels: 16}}
    rpn_head: {{in_channels: 16, feat_channels: 16}}
    roi_head:
      bbox_roi_extractor: {{out_channels: 16}}
      mask_roi_extractor: {{out_channels: 16}}
      bbox_head: {{in_channels: 16, fc_out_channels: 32}}
      mask_head: {{in_channels: 16, conv_out_channels: 16, num_convs: 1}}
    train_cfg:
      rcnn: {{sampler: {{num: 32}}}}
data:
  source: coco
  scale: [128, 96]
  batch_size: 2
  workers: 0
trainer:
  epochs: 2
  accelerator: cpu
  log_every: 1
"""

SEGMENTATION = f"""
task: segmentation
{MODEL}
  head: mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py
  head_overrides:
    neck: {{out_channels: 16}}
    decode_head: {{in_channels: [16, 16, 16, 16], channels: 16}}
data:
  source: ade20k
  scale: [128, 96]
  size: 64
  batch_size: 2
  workers: 0
trainer:
  epochs: 2
  accelerator: cpu
  log_every: 1
"""

RECIPES = {"detection": DETECTION, "segmentation": SEGMENTATION}
ROOTS = {"detection": "coco", "segmentation": "ade20k"}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="scenes")  # removed when the tests end
    make_scenes(Path(folder.name) / "scenes", train=8, val=3, size=(96, 128))
    return folder


def scenes() -> Path:
    """Return a folder of 8 training and 3 evaluation scenes of 96 by 128 pixels: coco/ and ade20k/."""
    return Path(_folder().name) / "scenes"


def dense_recipe(task: str, folder: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return a recipe of two epochs of 4 steps, with the run folder `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{task}.yaml"
    path.write_text(RECIPES[task])
    return load_recipe(path, [f"data.root={scenes() / ROOTS[task]}", f"run.dir={folder}", *overrides])
