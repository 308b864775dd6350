"""Linear layers, by the faster of torch's two ways on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.layers.reference import use_reference


class Linear(nn.Linear):
    """A linear layer, (..., C_in) to (..., C), computed by :func:`apply_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return apply_linear(input, self.weight, self.bias)


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight, bias), (..., C_in) to (..., C); on a CPU as a 1x1 convolution.

    Torch gives linear layers in float32 to MKL, convolutions to oneDNN, which took half the time where this was
    measured (AMD EPYC). In other dtypes, on other devices, of few rows, under autocast, torch.compile and torch.export,
    and where the operators' references are forced, it is F.linear.
    """
    if x.dim() < 3 or not _convolves(x, weight.numel()):
        return F.linear(x, weight, bias)
    rows_bc1n = x.contiguous().view(-1, 1, *x.shape[-2:]).permute(0, 3, 1, 2)
    out_bc1n = F.conv2d(rows_bc1n, weight[:, :, None, None], bias)
    return out_bc1n.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _convolves(x: Tensor, weights: int) -> bool:
    """Return whether torch gives the convolution to oneDNN, and that is faster."""
    if (
        torch.compiler.is_compiling()
        or use_reference()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    rows, tokens = x.shape[:-2].numel(), x.shape[:-1].numel()
    # Torch's own conditions for 1x1 convolutions: a batch of 16, or more threads than one and no small image.
    if rows < 16 and (torch.get_num_threads() == 1 or (rows == 1 and x.numel() <= 20480)):
        return False
    # What it saves for each product must make up for one call's and one weight's reordering (two threads).
    return (tokens - 128) * weights >= 2**23
