"""Recipes of dense tasks with few blocks, as far as the mm bridge reads them."""

from types import SimpleNamespace
from typing import Any

from effbackbones.mm.config import build_from_cfg, build_model_cfg, load_head

CLASSES = ("bag", "boot", "coat", "dress", "shirt")
MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
UPERNET = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"


def recipe(head: str, overrides: dict[str, Any] | None = None, name: str = "uniformer_xxs", **model: Any) -> Any:
    """Return a recipe of a small backbone under `head`."""
    fields = {
        "name": name,
        "args": {"depths": [1, 1, 1, 1]},
        "drop_path_rate": 0.0,
        "norm_eval": False,
        "grad_checkpointing": False,
        "frozen_stages": -1,
        "head": head,
        "head_overrides": overrides or {},
    }
    data = SimpleNamespace(size=64, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return SimpleNamespace(model=SimpleNamespace(**{**fields, **model}), data=data)


def build(head: str, overrides: dict[str, Any] | None = None, **model: Any) -> Any:
    """Return a small model under `head`, not tried."""
    scope = load_head(head).default_scope
    return build_from_cfg(build_model_cfg(recipe(head, overrides, **model), CLASSES), scope)
