"""Linear layers over channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.layers.reference import use_reference


class Linear(nn.Linear):
    """A linear layer over a map, (B, H, W, C_in) to (B, H, W, C), computed by :func:`linear_bhwc`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_bhwc(input, self.weight, self.bias)


def linear_bhwc(x_bhwc: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear(x_bhwc, weight, bias), on a CPU as a 1x1 convolution of the map's rows.

    Torch gives linear layers in float32 to MKL, convolutions to oneDNN, which took half the time where this was
    measured (AMD EPYC, one thread). In other dtypes, on other devices, under autocast, torch.compile and torch.export,
    and where the operators' references are forced, it is F.linear.
    """
    images, height, width, channels = x_bhwc.shape
    if (
        torch.compiler.is_compiling()
        or use_reference()
        or x_bhwc.device.type != "cpu"
        or x_bhwc.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or images * height < 16  # torch takes oneDNN from a batch of 16 up, if there is one thread
    ):
        return F.linear(x_bhwc, weight, bias)
    rows = x_bhwc.reshape(images * height, 1, width, channels).permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(images, height, width, -1)
