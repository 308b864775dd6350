"""Downsampling between stages."""

from torch import Tensor, nn

from effbackbones.layers.folding import fold_norm


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 with a batch norm."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.norm(self.proj(x_bchw))

    def fold(self) -> None:
        fold_norm(self, "norm", self.proj)
