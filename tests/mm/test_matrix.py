"""Every family under every head: it builds, its losses are finite, its stem gets a gradient, it predicts at any size.

A head of each kind and a model of each family are in the pairs that are not slow.
"""

from typing import Any

import pytest
import torch
from mm.small_heads import build
from mm.test_config import (
    DINO,
    FCN,
    MASK2FORMER_SEG,
    MASK_RCNN,
    RETINANET,
    SEGFORMER,
    SEM_FPN,
    UPERNET,
    instances,
    segments,
)
from models.test_contract import SMALLEST
from small_models import depths

FEW = {"train_cfg": {"rcnn": {"sampler": {"num": 16}}}}
HEADS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "mask_rcnn": (MASK_RCNN, FEW),
    "cascade_mask_rcnn": ("mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", FEW),
    "retinanet": (RETINANET, None),
    "atss": ("mmdet::atss/atss_r50_fpn_1x_coco.py", None),
    "fcos": ("mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", None),
    "dino": (DINO, {"num_queries": 30, "test_cfg": {"max_per_img": 30}}),
    "upernet": (UPERNET, None),
    "semantic_fpn": (SEM_FPN, None),
    "fcn": (FCN, None),
    "segformer": (SEGFORMER, None),
    "mask2former": (MASK2FORMER_SEG, None),
}
SIZE = (203, 301)


def pairs() -> list[Any]:
    """Return all pairs; those of a diagonal, which has every head and every family, are not slow."""
    return [
        pytest.param(head, name, marks=[] if i % len(SMALLEST) == j else [pytest.mark.slow])
        for i, head in enumerate(HEADS)
        for j, name in enumerate(SMALLEST)
    ]


@pytest.mark.parametrize(("head", "name"), pairs())
def test_backbone_learns_and_predicts_under_the_head_at_a_size_no_stride_divides(head, name):
    config, overrides = HEADS[head]
    torch.manual_seed(0)
    model = build(config, overrides, name=name, args={"depths": list(depths(name, compiled=True))})
    model.data_preprocessor.pad_size_divisor = 1  # of mmdet
    sample = instances if config.startswith("mmdet") else segments
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)

    samples = [sample(SIZE) for _ in images]
    data = {"inputs": list(images), "data_samples": samples}
    if config.startswith("mmseg"):
        model.data_preprocessor.size = SIZE
    data = model.data_preprocessor(data, True)
    assert data["inputs"].shape[2:] == SIZE
    loss, losses = model.parse_losses(model(**data, mode="loss"))
    assert all(value.isfinite() for value in losses.values())
    loss.backward()
    stem = [parameter.grad for parameter in model.backbone.model.stem.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in stem)

    model.eval()
    with torch.no_grad():
        (predicted,) = model.test_step({"inputs": [images[0]], "data_samples": [sample(SIZE)]})
    if config.startswith("mmdet"):
        assert predicted.pred_instances.bboxes.isfinite().all()
    else:
        assert predicted.pred_sem_seg.data.shape == (1, *SIZE)
