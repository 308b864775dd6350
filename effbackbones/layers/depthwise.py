"""Depthwise convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.layers.cached import constant
from effbackbones.layers.folding import fold_identity
from effbackbones.layers.reference import use_reference


class DepthwiseResidual(nn.Conv2d):
    """A map plus its depthwise 3x3 convolution.

    On a CPU, in full precision, the kernel's centre takes the map in, which saves a pass over both; in fewer bits 1 + w
    would leave little of w.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.folded = False

    def forward(self, input: Tensor) -> Tensor:
        if self.folded:
            return super().forward(input)
        if (
            input.device.type == "cpu"
            and self.weight.dtype in (torch.float32, torch.float64)
            and not (torch.is_autocast_enabled("cpu") or use_reference())
        ):
            return self._conv_forward(input, self.weight + _centre(self.weight.dtype, self.weight.device), self.bias)
        output = super().forward(input)
        # Under autocast the sum keeps the precision of the residual stream. In place: these are the largest maps.
        return output.add_(input) if output.dtype == input.dtype else output + input

    def fold(self) -> None:
        if not self.folded:
            fold_identity(self)
            self.folded = True


@constant
def _centre(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the 3x3 kernel that changes nothing."""
    return F.pad(torch.ones(1, 1, dtype=dtype, device=device), (1, 1, 1, 1))
