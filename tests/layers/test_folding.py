"""What is folded into a layer is in its output."""

import pytest
import torch
from torch import nn

from effbackbones.layers import DepthwiseResidual, fold_norm, fold_norm_before, fold_scales, ops_backend


def randomised(module):
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor, dtype=torch.float64) + 0.5
    return module.eval()


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv_without_bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("affine", [False, True])
def test_norm_behind_a_convolution_folds_into_it(layer, affine):
    model = randomised(nn.Sequential(LAYERS[layer](), nn.BatchNorm2d(6, affine=affine)))
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = model(x)
    fold_norm(model, "1", model[0])
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_norm_in_front_of_a_layer_folds_into_it(bias):
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    for layer in (nn.Conv2d(4, 6, 3, bias=bias), nn.Linear(4, 6, bias=bias)):
        norm, layer = model = randomised(nn.Sequential(nn.BatchNorm2d(4), layer))

        def tokens(y, layer=layer):
            return y.permute(0, 2, 3, 1) if isinstance(layer, nn.Linear) else y

        expected = layer(tokens(norm(x)))
        fold_norm_before(model, "0", layer)
        assert isinstance(model[0], nn.Identity)
        torch.testing.assert_close(layer(tokens(x)), expected)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"groups": 2}])
def test_norm_in_front_of_a_convolution_of_groups_or_padding_is_refused(settings):
    with pytest.raises(ValueError, match="does not fold into it: it has groups or padding"):
        fold_norm_before(nn.Sequential(nn.BatchNorm2d(4)), "0", nn.Conv2d(4, 6, 3, **settings))


def test_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match="keeps no running statistics"):
        fold_norm(nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False)), "0", nn.Conv2d(4, 6, 3))


def test_layer_scales_fold_into_the_last_layers_of_their_branches():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6, bias=False), nn.Conv2d(4, 6, 1)
            self.gamma1, self.gamma2 = nn.Parameter(torch.rand(6)), None

    block, x = randomised(Block()), torch.randn(3, 4, dtype=torch.float64)
    expected, conv = block.first(x) * block.gamma1, block.second.weight.clone()
    fold_scales(block, block.first, block.second)
    assert block.gamma1 is None
    torch.testing.assert_close(block.first(x), expected)
    torch.testing.assert_close(block.second.weight, conv)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_depthwise_residual_is_the_map_plus_its_convolution_before_and_after_folding(dtype):
    torch.manual_seed(0)
    conv, x = DepthwiseResidual(4).to(dtype), torch.randn(2, 4, 5, 6).to(dtype)
    plain = nn.Conv2d(4, 4, 3, padding=1, groups=4).to(dtype)
    plain.load_state_dict(conv.state_dict())
    expected = x + plain(x)
    torch.testing.assert_close(conv(x), expected)
    with ops_backend("reference"):
        assert torch.equal(conv(x), expected)
    conv.fold()
    conv.fold()  # once is enough
    torch.testing.assert_close(conv(x), expected, **({"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}))


def test_depthwise_residual_keeps_small_weights_under_autocast():
    conv = DepthwiseResidual(1)
    with torch.no_grad():
        conv.weight.fill_(1e-3)
        conv.bias.zero_()
    x = torch.ones(1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.item(), 1.001, atol=1e-5, rtol=0)
