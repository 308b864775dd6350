"""The pyramid of every family under a detector: torchvision's Faster R-CNN with its own FPN."""

from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
from models.test_contract import SMALLEST
from small_models import depths
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

WIDTH = 32


class Pyramid(nn.Module):
    """A backbone under an FPN, as torchvision's detectors take it."""

    def __init__(self, name: str, dense: bool):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, depths=depths(name), dense=dense).eval()
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, WIDTH, extra_blocks=LastLevelMaxPool())
        self.out_channels = WIDTH

    def forward(self, x: Tensor) -> Any:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", SMALLEST)
def test_faster_rcnn_on_the_pyramid_has_finite_losses_and_reaches_the_stem(name, dense):
    torch.manual_seed(0)
    pyramid = Pyramid(name, dense)
    detector = FasterRCNN(pyramid, num_classes=3, min_size=203, max_size=301, rpn_pre_nms_top_n_train=200)
    detector.transform.size_divisible = 1  # no padding: the backbone sees 203 x 301
    sizes = []
    pyramid.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    detector.train()
    pyramid.body.eval()
    images = list(torch.rand(2, 3, 203, 301, generator=torch.Generator().manual_seed(1)))
    boxes = torch.tensor([[20.0, 30.0, 120.0, 150.0], [150.0, 10.0, 290.0, 190.0]])
    losses = detector(images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images])
    assert sizes == [(2, 3, 203, 301)]
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    grad = next(pyramid.body.model.stem.parameters()).grad
    assert grad.isfinite().all()
    assert grad.any()
