"""STViT: Vision Transformer with Super Token Sampling, also called SViT.

Paper: "Vision Transformer with Super Token Sampling", arXiv 2211.11167.
Written from the paper and a specification of the official release (hhb072/STViT; its model file says MIT), whose
weights it loads and whose numbers it gives.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order, d channels of a head.
Maps are stored channels last from the stem on: `x_bchw` and its permutation `x_bhwc` are views of each other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError, KeyMap
from effbackbones.layers import (
    ConvDownsample,
    DepthwiseResidual,
    Linear,
    ProjectionHead,
    attend,
    fold_norm_before,
    fold_scales,
    laid_out,
    layer_scales,
    recomputed,
    scaled,
    use_reference,
)
from effbackbones.models._hierarchical import HierarchicalBackbone, Stage, backbone_cfg, create_backbone, init_linear
from effbackbones.ops import sample_super_tokens, super_token_attention


class ConvLayer(nn.Module):
    """A 3x3 convolution, GELU and a batch norm, in this order."""

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x_bchw)))


class Stem(nn.Sequential):
    """Four convolutions, the first and the third of stride 2."""

    def __init__(self, in_chans: int, dim: int):
        half = dim // 2
        super().__init__(
            ConvLayer(in_chans, half, 2), ConvLayer(half, half, 1), ConvLayer(half, dim, 2), ConvLayer(dim, dim, 1)
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        return super().forward(laid_out(x_bchw))


def conv1x1(layer: nn.Linear, x_bchw: Tensor) -> Tensor:
    """Apply a linear layer as the release does in all blocks: as a convolution of a map with the channels first."""
    return F.conv2d(x_bchw, layer.weight[:, :, None, None], layer.bias)


class ConvMlp(nn.Module):
    """Two linear layers with a GELU and a depthwise residual between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.conv = DepthwiseResidual(hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        if use_reference():
            x_bchw = self.conv(self.act(conv1x1(self.fc1, x_bhwc.permute(0, 3, 1, 2))))
            return conv1x1(self.fc2, x_bchw).permute(0, 2, 3, 1)
        x_bchw = recomputed(lambda y_bhwc: self.conv(self.act(y_bhwc).permute(0, 3, 1, 2)), self.fc1(x_bhwc))
        return self.fc2(x_bchw.permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of a map (B, H, W, C), without a bias or a mask.

    The channels of `qkv` are ordered head, part, channel of the head, as the release has them.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        _, h, w, c = x_bhwc.shape
        if use_reference():
            qkv_bcn = conv1x1(self.qkv, x_bhwc.permute(0, 3, 1, 2).contiguous()).flatten(2)
            q_bhdn, k_bhdn, v_bhdn = qkv_bcn.unflatten(1, (self.num_heads, -1)).chunk(3, 2)
            weights_bhmn = ((k_bhdn.mT @ q_bhdn) * (c // self.num_heads) ** -0.5).softmax(2)
            return conv1x1(self.proj, (v_bhdn @ weights_bhmn).reshape(-1, c, h, w)).permute(0, 2, 3, 1)
        qkv = self.qkv(x_bhwc).reshape(-1, h * w, self.num_heads, 3, c // self.num_heads)
        q_bhnd, k_bhnd, v_bhnd = qkv.transpose(1, 2).unbind(3)
        return self.proj(attend(q_bhnd, k_bhnd, v_bhnd).transpose(1, 2).reshape(-1, h, w, c))


class SuperTokenAttention(Attention):
    """Self-attention over the super tokens of a map (B, H, W, C): one for each cell of `cell` x `cell` positions."""

    def __init__(self, dim: int, num_heads: int, cell: int, n_iter: int):
        super().__init__(dim, num_heads)
        self.cell = cell
        self.n_iter = n_iter

    def forward(self, x_bhwc: Tensor) -> Tensor:
        return super_token_attention(x_bhwc, self.cell, self.n_iter, refine=super().forward)

    def sample(self, x_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        """Return the super tokens (B, h, w, C) of a map, and how positions belong to them, (B, H, W, 9)."""
        return sample_super_tokens(x_bhwc, self.cell, self.n_iter)


class Block(nn.Module):
    """A depthwise position residual, attention, an MLP; attention is through super tokens where `cell` is above 1."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        cell: int,
        n_iter: int,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.pos_embed = DepthwiseResidual(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads) if cell == 1 else SuperTokenAttention(dim, num_heads, cell, n_iter)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((1, dim, 1, 1), layer_scale)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.pos_embed(x_bchw)
        y = self.attn(self.norm1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = x + self.drop_path(scaled(y, self.gamma1))
        y = self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.drop_path(scaled(y, self.gamma2))

    def fold(self) -> None:
        fold_norm_before(self, "norm2", self.mlp.fc1)
        fold_scales(self, self.attn.proj, self.mlp.fc2)


class STViT(HierarchicalBackbone):
    """STViT: in the shallow stages attention among super tokens, in the deep ones among all tokens.

    Takes images of any size from 32 pixels up; maps round up (ceil(n / 2) at every step). Nothing depends on the size
    but the number of cells: a map is padded to whole cells after the norm, padding takes part, and is cut off again.
    Dense mode is the same network.

    Args:
        depths: Blocks of the four stages.
        dims: Channels of the four stages.
        num_heads: Attention heads of the four stages.
        stoken_size: Side of a cell, the area of a super token, in the four stages; 1 for attention among all positions.
            Weights fit every choice; 16, 8, 2, 1 makes large images cheaper.
        n_iter: Rounds of association of pixels and super tokens, in the four stages.
        mlp_ratio: Hidden width of an MLP over its width.
        projection: Width of the 1x1 convolution in front of the classifier's pooling.
        layer_scale: Initial layer scale of the four stages; None for none.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier, as in timm; the release, trained without any, has it in other
            places.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Taken for uniformity; nothing depends on it.
        dense: Dense-prediction mode: no classifier.

    Raises:
        ValueError: `stoken_size` or `n_iter` is neither a positive number nor four, or `num_heads` do not divide
            `dims`.
    """

    official_keys: ClassVar[KeyMap] = (
        # Constants and the parts of a withdrawn release keep their names: adapt_weights looks at them.
        (r"\.(fold|unfold)\.weights$|\.shortcut$", lambda m: m[0]),
        (r"^patch_embed\.proj\.(\d+)\.", lambda m: f"stem.{int(m[1]) // 3}.{'norm' if int(m[1]) % 3 else 'conv'}."),
        (r"^layers\.(\d)\.downsample\.proj\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.proj."),
        (r"^layers\.(\d)\.downsample\.proj\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
        (r"^layers\.(\d\.blocks\.\d+\.)pos_embed\.conv\.", r"stages.\1pos_embed."),
        (r"^layers\.(\d\.blocks\.\d+\.)norm1\.norm\.", r"stages.\1norm1."),
        (r"^layers\.(\d\.blocks\.\d+\.)attn\.stoken_refine\.", r"stages.\1attn."),
        (r"^layers\.(\d\.blocks\.\d+\.)mlp2\.conv\.conv\.", r"stages.\1mlp.conv."),
        (r"^layers\.(\d\.blocks\.\d+\.)mlp2\.", r"stages.\1mlp."),
        (r"^layers\.(\d\.blocks\.\d+\.)gamma_", r"stages.\1gamma"),
        (r"^layers\.(\d\.blocks\.\d+\.)", r"stages.\1"),
        (r"^proj\.", "head.conv."),
        (r"^norm\.", "head.bn."),
        (r"^head\.", "head.fc."),
    )

    def __init__(
        self,
        depths: Sequence[int] = (3, 5, 9, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        stoken_size: int | Sequence[int] = (8, 4, 1, 1),
        n_iter: int | Sequence[int] = 1,
        mlp_ratio: float = 4.0,
        projection: int = 1024,
        layer_scale: Sequence[float | None] = (None, None, None, None),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
    ):
        cells, rounds = of_stages("stoken_size", stoken_size), of_stages("n_iter", n_iter)
        if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads={tuple(num_heads)} do not divide dims={tuple(dims)}")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                Block(dim, num_heads[i], mlp_ratio, cells[i], rounds[i], rate, layer_scale[i]) for rate in rates[i]
            ]
            stages.append(Stage(ConvDownsample(dims[i - 1], dim) if i else None, blocks))
        head = None
        if not dense:
            head = ProjectionHead(
                dims[-1], projection, num_classes, nn.SiLU(), bias=True, pool_type=global_pool, drop_rate=drop_rate
            )
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            dims,
            norm=nn.Identity(),
            output_norms=[nn.Identity() for _ in dims] if dense else None,
            head=head,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        init_linear(self.head.fc)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with 1x1 convolutions as linear layers and without the release's constants.

        Raises:
            CheckpointError: A constant is not the identity, or the weights are of a withdrawn release.
        """
        adapted = {}
        for key, value in weights.items():
            if key.endswith(".shortcut"):
                raise CheckpointError(
                    f"{key}: of a release between April and November 2023 that was withdrawn, as its residuals were no "
                    "identities and training failed; expected weights of the present release, which has no such entry"
                )
            if key.endswith((".fold.weights", ".unfold.weights")):
                if not torch.equal(value, torch.eye(9).to(value).reshape(9, 1, 3, 3)):
                    raise CheckpointError(
                        f"{key}: not the identity, (9, 1, 3, 3), which is all that the architecture has"
                    )
                continue
            if key.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) and value.shape[2:] == (1, 1):
                value = value.flatten(1)
            adapted[key] = value
        return adapted

    def super_tokens(self, x: Tensor, stage: int, block: int = -1) -> tuple[Tensor, Tensor]:
        """Return the super tokens of a block, and how the positions of its map belong to them.

        Args:
            x: Images, (B, in_chans, H, W).
            stage: Index of the stage.
            block: Index of the block in the stage.

        Returns:
            Super tokens before attention, (B, C, h, w), one for each cell; and the association (B, 9, H_i, W_i): the
            weights of each position for the super tokens of the 3 x 3 cells around it, row by row. They sum to 1,
            with those of cells beyond the border.

        Raises:
            ValueError: The stage has no super tokens.
        """
        target: Any = self.stages[stage]
        blocks = list(target.blocks)
        if not isinstance(blocks[block].attn, SuperTokenAttention):
            raise ValueError(f"stage {stage} has no super tokens: its stoken_size is 1")
        x_bchw = self.stem(x)
        for module in (*self.stages[:stage], target.downsample, *blocks[:block]):
            x_bchw = module(x_bchw)
        x_bchw = blocks[block].pos_embed(x_bchw)
        s_bhwc, q_bhwk = blocks[block].attn.sample(blocks[block].norm1(x_bchw.permute(0, 2, 3, 1)))
        return s_bhwc.permute(0, 3, 1, 2), q_bhwk.permute(0, 3, 1, 2)


def of_stages(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Return the positive numbers of the four stages that `value`, one number or four, gives for argument `name`."""
    values = (value,) * 4 if isinstance(value, int) else tuple(value)
    if len(values) != 4 or min(values) < 1:
        raise ValueError(f"{name}={value!r}: expected a positive number, or four of them")
    return values


_cfg = partial(
    backbone_cfg,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2211.11167",
    paper_name="Vision Transformer with Super Token Sampling",
    origin_url="https://github.com/hhb072/STViT",
)


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "stvit_small.in1k": _cfg(),
        "stvit_small.ft_in1k_384": _cfg(**_AT_384),
        "stvit_base.in1k": _cfg(),
        "stvit_base.ft_in1k_384": _cfg(**_AT_384),
        "stvit_large.in1k": _cfg(),
        "stvit_large.ft_in1k_384": _cfg(**_AT_384),
    }
)

_create = partial(create_backbone, STViT)


@register_model
def stvit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-S, in the paper's tables SViT-S."""
    return _create("stvit_small", pretrained, {}, kwargs)


@register_model
def stvit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-B, in the paper's tables SViT-B."""
    args = {
        "depths": (4, 6, 14, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (2, 3, 6, 8),
        "layer_scale": (None, None, 1e-6, 1e-6),
    }
    return _create("stvit_base", pretrained, args, kwargs)


@register_model
def stvit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-L, in the paper's tables SViT-L."""
    args = {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (2, 3, 7, 10),
        "layer_scale": (None, None, 1e-6, 1e-6),
    }
    return _create("stvit_large", pretrained, args, kwargs)
