"""Classifiers."""

from timm.layers import ClassifierHead
from torch import Tensor, nn

from effbackbones.layers.folding import fold_norm


class ProjectionHead(ClassifierHead):
    """A classifier that widens the map by a 1x1 convolution, batch norm and activation before it pools.

    Args:
        in_dim: Channels of the map.
        dim: Channels after the convolution, those of the pooled vector.
        num_classes: Width of the classifier; 0 for none: the projection stays.
        act: The activation.
        bias: Whether the convolution has one.
        pool_type: Pooling, by timm's name.
        drop_rate: Dropout in front of the classifier.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_classes: int,
        act: nn.Module,
        *,
        bias: bool,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(dim, num_classes, pool_type, drop_rate)
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=bias)
        self.bn = nn.BatchNorm2d(dim)
        self.act = act

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward(self.act(self.bn(self.conv(x))), pre_logits)

    def fold(self) -> None:
        fold_norm(self, "bn", self.conv)
