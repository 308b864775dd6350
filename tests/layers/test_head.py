"""The classifier that widens the map before it pools."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.layers import ProjectionHead


def head(**kwargs: object) -> ProjectionHead:
    """Return a head in float64 with random statistics."""
    torch.manual_seed(0)
    arguments = {"in_dim": 3, "dim": 8, "num_classes": 5, "act": nn.GELU(), "bias": False, **kwargs}
    model = ProjectionHead(**arguments).double()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 1.5)
    return model.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def widened(model: ProjectionHead, x_bchw: Tensor) -> Tensor:
    """Return the map that is pooled, of the layers' formulas."""
    x_bchw = torch.einsum("bchw,kc->bkhw", x_bchw, model.conv.weight[:, :, 0, 0])
    if model.conv.bias is not None:
        x_bchw = x_bchw + model.conv.bias[:, None, None]
    mean, var, weight, bias = (
        t[:, None, None] for t in (model.bn.running_mean, model.bn.running_var, model.bn.weight, model.bn.bias)
    )
    return model.act((x_bchw - mean) / (var + 1e-5).sqrt() * weight + bias)


@pytest.mark.parametrize("act", [nn.GELU(), nn.Hardswish()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_formula(act, bias):
    model, x = head(act=act, bias=bias), image()
    assert (model.conv.bias is not None) is bias
    pooled = widened(model, x).mean((2, 3))
    torch.testing.assert_close(model(x, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), F.linear(pooled, model.fc.weight, model.fc.bias))


@torch.no_grad()
def test_head_without_classes_gives_the_pooled_vector():
    model, x = head(num_classes=0), image()
    torch.testing.assert_close(model(x), widened(model, x).mean((2, 3)))
    assert {key.split(".")[0] for key, _ in model.named_parameters()} == {"conv", "bn"}


@torch.no_grad()
def test_pooling_is_the_one_asked_for():
    model, x = head(pool_type="max"), image()
    torch.testing.assert_close(model(x, pre_logits=True), widened(model, x).amax((2, 3)))


@torch.no_grad()
def test_reset_replaces_the_linear_layer_alone():
    model, x = head(), image()
    before = model(x, pre_logits=True)
    model.reset(7)
    assert model.in_features == 8
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x, pre_logits=True), before)
    model.reset(0)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_dropout_is_in_front_of_the_linear_layer_in_training_only():
    model, x = head(dim=1000, drop_rate=0.25), image()
    assert model(x, pre_logits=True).all()
    model.drop.train()
    assert 0.2 < (model(x, pre_logits=True) == 0).double().mean() < 0.3
