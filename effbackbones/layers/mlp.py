"""The plain two-layer MLP."""

from collections.abc import Callable

from torch import Tensor, nn

from effbackbones.layers.linear import Linear
from effbackbones.layers.recompute import recomputed


class Mlp(nn.Module):
    """Two layers with a GELU between; `layer` makes them linear (channels last) or 1x1 convolutions (NCHW)."""

    def __init__(self, dim: int, hidden: int, layer: Callable[[int, int], nn.Linear | nn.Conv2d] = Linear):
        super().__init__()
        self.fc1 = layer(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = layer(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(lambda y: self.fc2(self.act(y)), self.fc1(x))
