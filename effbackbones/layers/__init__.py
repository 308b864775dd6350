"""Layers that two or more families share."""

from effbackbones.layers.attention import (
    aligned_bias,
    attend,
    attention_backend,
    attention_report,
    last_backend,
    served_backends,
    why_not,
)
from effbackbones.layers.cached import Cached, constant
from effbackbones.layers.depthwise import DepthwiseResidual
from effbackbones.layers.downsample import ConvDownsample
from effbackbones.layers.folding import fold_norm, fold_norm_before, fold_scales
from effbackbones.layers.head import ProjectionHead
from effbackbones.layers.linear import Linear, apply_linear, apply_linear_bcn
from effbackbones.layers.mlp import Mlp
from effbackbones.layers.pos_bias import RelativePositionBias, resize_table
from effbackbones.layers.recompute import recomputed
from effbackbones.layers.reference import laid_out, ops_backend, use_reference
from effbackbones.layers.scale import layer_scales, scaled
from effbackbones.layers.window import (
    join_window_heads,
    join_windows,
    pad_to_windows,
    split_window_heads,
    split_windows,
)

__all__ = [
    "Cached",
    "ConvDownsample",
    "DepthwiseResidual",
    "Linear",
    "Mlp",
    "ProjectionHead",
    "RelativePositionBias",
    "aligned_bias",
    "apply_linear",
    "apply_linear_bcn",
    "attend",
    "attention_backend",
    "attention_report",
    "constant",
    "fold_norm",
    "fold_norm_before",
    "fold_scales",
    "join_window_heads",
    "join_windows",
    "laid_out",
    "last_backend",
    "layer_scales",
    "ops_backend",
    "pad_to_windows",
    "recomputed",
    "resize_table",
    "scaled",
    "served_backends",
    "split_window_heads",
    "split_windows",
    "use_reference",
    "why_not",
]
