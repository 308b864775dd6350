"""UniFormer: convolution in the shallow stages, self-attention in the deep ones.

Paper: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", arXiv 2201.09450.
Written from the paper and a specification of the official release (Sense-X/UniFormer, Apache-2.0), whose weights it
loads and whose numbers it gives.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order, d channels of a head.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effbackbones.checkpoint import KeyMap
from effbackbones.layers import (
    ConvDownsample,
    DepthwiseResidual,
    Linear,
    Mlp,
    attend,
    fold_norm,
    fold_norm_before,
    fold_scales,
    join_windows,
    laid_out,
    layer_scales,
    pad_to_windows,
    scaled,
    split_windows,
    use_reference,
)
from effbackbones.models._hierarchical import HierarchicalBackbone, Stage, backbone_cfg, create_backbone, init_linear


class PatchEmbed(nn.Module):
    """Non-overlapping patches of `size` pixels and a layer norm; what does not fill a patch is cut off."""

    def __init__(self, in_dim: int, dim: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, size, stride=size)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return laid_out(self.norm(self.proj(x_bchw)))


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a batch norm."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.act(self.norm1(self.conv1(laid_out(x_bchw))))
        return self.norm2(self.conv2(x_bchw))

    def fold(self) -> None:
        fold_norm(self, "norm1", self.conv1)
        fold_norm(self, "norm2", self.conv2)


class ConvBlock(nn.Module):
    """Local block: a depthwise position residual, a 5x5 depthwise convolution in place of attention, an MLP."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        pointwise = partial(nn.Conv2d, kernel_size=1)
        self.pos_embed = DepthwiseResidual(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv1 = pointwise(dim, dim)
        self.dwconv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = pointwise(dim, dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), pointwise)
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((1, dim, 1, 1), layer_scale)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.pos_embed(x_bchw)
        x = x + self.drop_path(scaled(self.conv2(self.dwconv(self.conv1(self.norm1(x)))), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))

    def fold(self) -> None:
        fold_norm_before(self, "norm1", self.conv1)
        fold_norm_before(self, "norm2", self.mlp.fc1)
        fold_scales(self, self.conv2, self.mlp.fc2)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C), without a bias or a mask."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def _qkv(self, x_bnc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x_bnc.shape
        q_bhnd, k_bhnd, v_bhnd = self.qkv(x_bnc).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q_bhnd, k_bhnd, v_bhnd

    def forward(self, x_bnc: Tensor) -> Tensor:
        return self.proj(attend(*self._qkv(x_bnc)).transpose(1, 2).reshape(x_bnc.shape))

    def with_class_row(self, x_bnc: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and how much token 0 attends to each other token: (B, N - 1), the mean over heads."""
        q_bhnd, k_bhnd, v_bhnd = self._qkv(x_bnc)
        row_bhn = (q_bhnd[:, :, :1] * self.head_dim**-0.5 @ k_bhnd.transpose(-1, -2)).squeeze(2)
        dtype = torch.float64 if row_bhn.dtype == torch.float64 else torch.float32
        row_bn = row_bhn.softmax(-1, dtype=dtype).mean(1)
        return self.proj(attend(q_bhnd, k_bhnd, v_bhnd).transpose(1, 2).reshape(x_bnc.shape)), row_bn[:, 1:]


class AttentionBlock(nn.Module):
    """Global block: a depthwise position residual, self-attention, an MLP.

    Where `window` is set, attention is within non-overlapping windows of that side. The map is padded with zeros at the
    bottom and the right after the norm; padding takes part as keys and values, and is cut off again.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.window: int | None = None
        self.pos_embed = DepthwiseResidual(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((dim,), layer_scale)

    def _windowed(self, x_bhwc: Tensor, w: int) -> Tensor:
        height, width = x_bhwc.shape[1:3]
        x = pad_to_windows(x_bhwc, (w, w))
        x = join_windows(self.attn(split_windows(x, (w, w))), (w, w), (x.shape[1], x.shape[2]))
        return x[:, :height, :width]

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.pos_embed(x_bchw).permute(0, 2, 3, 1)
        y = self.norm1(x)
        y = self.attn(y.flatten(1, 2)).reshape(y.shape) if self.window is None else self._windowed(y, self.window)
        x = x + self.drop_path(scaled(y, self.gamma1))
        x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))
        return laid_out(x.permute(0, 3, 1, 2))

    def fold(self) -> None:
        fold_scales(self, self.attn.proj, self.mlp.fc2)


def shares(score_bn: Tensor) -> Tensor:
    """Return scores divided by their sum over tokens, (B, N); zeros stay zeros.

    Scores are probabilities: those of a part may be anything down to zero, and the gradient of a quotient squares its
    denominator. The largest becomes 1 first, by a number that is no part of the graph.
    """
    limits = torch.finfo(score_bn.dtype)
    score_bn = score_bn / score_bn.detach().amax(1, keepdim=True).clamp_min(limits.tiny / limits.eps)
    return score_bn / score_bn.sum(1, keepdim=True).clamp_min(1)


class PruningBlock(AttentionBlock):
    """Global block of the light models: a class token scores the tokens, and the lower half shares one update.

    Without a score (the first such block) all tokens take part. Otherwise attention and MLP see the class token, the
    better half of the tokens, and one token that stands for the rest: their mean weighted by score. Each of the rest
    then takes over what was added to that one. The score is a running mean of the class token's attention to a token.
    """

    def forward(  # type: ignore[override]
        self, x_bchw: Tensor, cls_b1c: Tensor, score_bn: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_bchw = self.pos_embed(x_bchw)
        x_bnc = x_bchw.flatten(2).transpose(1, 2)
        if score_bn is None:
            t = torch.cat([cls_b1c, x_bnc], 1)
            update, score_bn = self.attn.with_class_row(self.norm1(t))
            t = t + self.drop_path(update)
            t = t + self.drop_path(self.mlp(self.norm2(t)))
            x_bnc = t[:, 1:]
        elif use_reference():
            x_bnc, t, score_bn = self._reference(x_bnc, cls_b1c, score_bn)
        else:
            n = x_bnc.shape[1]
            kept_bk = score_bn.topk(n // 2, dim=1, sorted=False).indices
            kept_bkc = kept_bk.unsqueeze(-1).expand(-1, -1, x_bnc.shape[2])
            rest_bn = shares(score_bn.scatter(1, kept_bk, 0.0))
            rest_b1c = rest_bn.to(x_bnc.dtype).unsqueeze(1) @ x_bnc

            t = torch.cat([cls_b1c, x_bnc.gather(1, kept_bkc), rest_b1c], 1)
            update, row_bk = self.attn.with_class_row(self.norm1(t))
            shared_b1c = update[:, -1:]
            t = t + self.drop_path(update)
            update = self.mlp(self.norm2(t))
            shared_b1c = shared_b1c + update[:, -1:]
            t = t + self.drop_path(update)
            x_bnc = (x_bnc + shared_b1c).scatter(1, kept_bkc, t[:, 1:-1])

            # The rest keeps its score, except where it is a single token: the reference updates that one too.
            seen_bn = row_bk[:, -1:].expand(-1, n) if n - n // 2 == 1 else score_bn
            score_bn = 0.5 * score_bn + 0.5 * seen_bn.scatter(1, kept_bk, row_bk[:, :-1])
        return laid_out(x_bnc.transpose(1, 2).reshape(x_bchw.shape)), t[:, :1], score_bn

    def _reference(self, x_bnc: Tensor, cls_b1c: Tensor, score_bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, those that attention saw, and scores as the release does: all are sorted, and sorted back."""
        n, k = x_bnc.shape[1], x_bnc.shape[1] // 2
        order_bn = score_bn.argsort(dim=1, descending=True, stable=True)
        x_bnc = x_bnc.gather(1, order_bn.unsqueeze(-1).expand_as(x_bnc))
        score_bn = score_bn.gather(1, order_bn)
        rest_b1c = (shares(score_bn[:, k:]).to(x_bnc.dtype).unsqueeze(-1) * x_bnc[:, k:]).sum(1, keepdim=True)
        t = torch.cat([cls_b1c, x_bnc[:, :k], rest_b1c], 1)
        update, row_bk = self.attn.with_class_row(self.norm1(t))
        shared_b1c = update[:, -1:]
        t = t + self.drop_path(update)
        update = self.mlp(self.norm2(t))
        shared_b1c = shared_b1c + update[:, -1:]
        t = t + self.drop_path(update)
        x_bnc = torch.cat([t[:, 1:-1], x_bnc[:, k:] + shared_b1c], 1)
        seen = n if n - k == 1 else k
        score_bn = torch.cat([0.5 * score_bn[:, :seen] + 0.5 * row_bk[:, :seen], score_bn[:, seen:]], 1)
        raster_bn = order_bn.argsort(1)
        return x_bnc.gather(1, raster_bn.unsqueeze(-1).expand_as(x_bnc)), t, score_bn.gather(1, raster_bn)


class PruningStage(Stage):
    """A deep stage of the light models: the class token (B, 1, C) and the score (B, N) go along with the map.

    The first one owns the class token; the next one widens it, and pools the score as its downsampling does the map.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, cls_dim: int | None):
        super().__init__(downsample, blocks)
        if cls_dim is None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        else:
            self.cls_proj = nn.Linear(cls_dim, dim)

    def forward(  # type: ignore[override]
        self, x_bchw: Tensor, cls_b1c: Tensor | None = None, score_bn: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        cls_b1c = self.cls_token.expand(x_bchw.shape[0], -1, -1) if cls_b1c is None else self.cls_proj(cls_b1c)
        if score_bn is not None:
            pooled_bn = F.avg_pool2d(score_bn.unflatten(1, x_bchw.shape[2:]), 2).flatten(1)
            score_bn = shares(pooled_bn) * score_bn.sum(1, keepdim=True)
        x_bchw = self.downsample(x_bchw)
        for block in self.blocks:
            x_bchw, cls_b1c, score_bn = self.run(block, x_bchw, cls_b1c, score_bn)
        return x_bchw, cls_b1c, score_bn


class UniFormer(HierarchicalBackbone):
    """UniFormer: two stages of convolution blocks, two of attention blocks.

    Takes images of any size from 32 pixels up. Patch embeddings round down (n // 4, then n // 2), convolutional ones
    round up.

    Args:
        depths: Blocks of the four stages.
        dims: Channels of the four stages.
        head_dim: Channels of an attention head; a checkpoint's shapes do not tell it.
        mlp_ratio: Hidden width of an MLP over its width.
        conv_stem: Convolutional stem instead of 4x4 patches.
        conv_downsample: Convolutional downsampling instead of 2x2 patches.
        conv_layer_scale: Initial layer scale of convolution blocks; None for none.
        attn_layer_scale: Initial layer scale of attention blocks; None for none.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Taken for uniformity; nothing depends on it.
        dense: Dense-prediction mode: an output norm on every map, no classifier.
        attention: Reach of attention in stage 2: global, window, or hybrid (every fourth block global). None is
            hybrid in dense mode, else global. Weights fit every choice.
        window_size: Side of a window, in tokens.

    Raises:
        ValueError: `attention` is unknown, or `head_dim` does not divide the widths of stages 2 and 3.
    """

    attention_block: ClassVar[type[AttentionBlock]] = AttentionBlock
    official_keys: ClassVar[KeyMap] = (
        (r"^patch_embed1\.proj\.0\.", "stem.conv1."),
        (r"^patch_embed1\.proj\.1\.", "stem.norm1."),
        (r"^patch_embed1\.proj\.3\.", "stem.conv2."),
        (r"^patch_embed1\.proj\.4\.", "stem.norm2."),
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.proj\.0\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.proj."),
        (r"^patch_embed(\d)\.proj\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^blocks([12])\.(\d+)\.attn\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.dwconv."),
        (r"^blocks(\d)\.(\d+)\.gamma_", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.gamma"),
        (r"^blocks(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"norms.{int(m[1]) - 1}."),
        (r"^head\.(?!fc\.)", "head.fc."),
        (r"^aux_head\.", "head_aux."),
        (r"^cls_token$", "stages.2.cls_token"),
        (r"^cls_upsample\.", "stages.3.cls_proj."),
    )

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 8, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        conv_stem: bool = False,
        conv_downsample: bool = False,
        conv_layer_scale: float | None = None,
        attn_layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
        attention: Literal["global", "window", "hybrid"] | None = None,
        window_size: int = 14,
    ):
        attention = attention or ("hybrid" if dense else "global")
        if attention not in ("global", "window", "hybrid"):
            raise ValueError(f"attention={attention!r}: expected global, window or hybrid")
        if dims[2] % head_dim or dims[3] % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide dims {dims[2]} and {dims[3]} of stages 2 and 3")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        downsample = ConvDownsample if conv_downsample else partial(PatchEmbed, size=2)
        stages = []
        for i, dim in enumerate(dims):
            down: Any = downsample(dims[i - 1], dim) if i else None
            if i < 2:
                stages.append(Stage(down, [ConvBlock(dim, mlp_ratio, rate, conv_layer_scale) for rate in rates[i]]))
                continue
            blocks = [self.attention_block(dim, head_dim, mlp_ratio, rate, attn_layer_scale) for rate in rates[i]]
            for j, block in enumerate(blocks):
                if i == 2 and attention != "global" and not (attention == "hybrid" and j % 4 == 3):
                    block.window = window_size
            stages.append(self.attention_stage(i, down, blocks, dims))
        super().__init__(
            ConvStem(in_chans, dims[0]) if conv_stem else PatchEmbed(in_chans, dims[0], 4),
            stages,
            dims,
            norm=nn.BatchNorm2d(dims[-1]),
            output_norms=[LayerNorm2d(dim, eps=1e-6) for dim in dims] if dense else None,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)

    @staticmethod
    def attention_stage(i: int, downsample: nn.Module, blocks: Sequence[nn.Module], dims: Sequence[int]) -> Stage:
        """Return stage `i`, 2 or 3, of the given blocks."""
        return Stage(downsample, blocks)


class UniFormerLight(UniFormer):
    """UniFormer XXS and XS: tokens are pruned in the attention stages, guided by a class token.

    In training, the output is a pair of logits: of the pooled map, and of the class token, which has a head of its own.
    In evaluation it is the first alone.

    Raises:
        ValueError: Windows or layer scale are asked for; light models have neither.
    """

    attention_block = PruningBlock
    continuous: ClassVar[bool] = False  # which tokens are pruned
    official_keys: ClassVar[KeyMap] = (
        (r"^norm_cls\.", "head_cls.norm."),
        (r"^head_cls\.", "head_cls.fc."),
        *UniFormer.official_keys,
    )

    def __init__(
        self,
        attention: Literal["global"] | None = None,
        window_size: None = None,
        conv_layer_scale: None = None,
        attn_layer_scale: None = None,
        **kwargs: Any,
    ):
        if attention not in (None, "global") or (window_size, conv_layer_scale, attn_layer_scale) != (None, None, None):
            raise ValueError(
                "light UniFormers have global attention only, and no layer scale: drop attention, window_size, "
                "conv_layer_scale and attn_layer_scale"
            )
        super().__init__(attention="global", **kwargs)
        if not self.dense:
            self.head_cls = class_token_head(self.num_features, self.num_classes)

    @staticmethod
    def attention_stage(i: int, downsample: nn.Module, blocks: Sequence[nn.Module], dims: Sequence[int]) -> Stage:
        return PruningStage(downsample, blocks, dims[i], cls_dim=dims[2] if i == 3 else None)

    def no_weight_decay(self) -> set[str]:
        return {"stages.2.cls_token"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if not self.dense:
            self.head_cls = class_token_head(self.num_features, num_classes).to(next(self.parameters()))

    def iter_states(self, x_bchw: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield, stage by stage, the map and what goes along with it: at first nothing, then class token and score."""
        state: tuple[Tensor, ...] = (x_bchw,)
        for i, stage in enumerate(self.stages):
            state = stage(*state) if i >= 2 else (stage(*state),)
            yield state

    def iter_stages(self, x_bchw: Tensor) -> Iterator[Tensor]:
        for state in self.iter_states(x_bchw):
            yield state[0]

    def forward(self, x: Tensor) -> Any:
        if not self.training or not self.num_classes:
            return super().forward(x)
        for state in self.iter_states(self.stem(x)):
            x_bchw, *rest = state
        return self.forward_head(x_bchw), self.head_cls(rest[0][:, 0])

    def loss(self, output: Any, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return 0.5 * criterion(output[0], target) + 0.5 * criterion(output[1], target)


class UniFormerTokenLabelling(UniFormer):
    """UniFormer with a second classifier on every token of the last map, trained by token labelling.

    In evaluation half of the best token's logit, class by class, is added to the logits. In training a box of the
    stem's map is exchanged with that of the batch in reverse order (MixToken), and the output is a triple: the logits,
    the logits of the tokens (B, N, num_classes), each put back to the image it is of, and the box on the grid of the
    tokens (top, bottom, left, right).
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if not self.dense:
            self.head_aux = token_head(self.num_features, self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if not self.dense:
            self.head_aux = token_head(self.num_features, num_classes).to(next(self.parameters()))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x_bchw = self.norm(x)
        logits = self.head(x_bchw, pre_logits=pre_logits)
        if pre_logits or not self.num_classes:
            return logits
        return logits + 0.5 * self.head_aux(x_bchw.flatten(2).transpose(1, 2)).amax(1)

    def forward(self, x: Tensor) -> Any:
        if not self.training or not self.num_classes:
            return super().forward(x)
        x_bchw = self.stem(x)
        box = random_box(x_bchw.shape[2], x_bchw.shape[3], x.device)
        x_bchw = exchange(x_bchw, box)
        for x_bchw in self.iter_stages(x_bchw):  # noqa: B007, B020
            pass
        x_bchw = self.norm(x_bchw)
        box = box // 8
        aux_bkhw = self.head_aux(x_bchw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x_bchw), exchange(aux_bkhw, box).flatten(2).transpose(1, 2), box

    def loss(self, output: Any, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the token-labelling loss; every token has its image's label, as there are no label maps here."""
        logits, aux_bnk, (top, bottom, left, right) = output
        n = aux_bnk.shape[1]
        exchanged = (bottom - top) * (right - left) / n
        mixed = (1 - exchanged) * criterion(logits, target) + exchanged * criterion(logits, target.flip(0))
        return mixed + criterion(aux_bnk.flatten(0, 1), target.repeat_interleave(n, 0))


def random_box(height: int, width: int, device: torch.device) -> Tensor:
    """Return top, bottom, left and right of a box of uniformly random area and centre, cut off at the borders."""
    side = torch.rand((), device=device).sqrt()
    edges = []
    for size in (height, width):
        centre = torch.randint(size, (), device=device)
        half = (size * side).long() // 2
        edges += [centre - half, centre + half]
    return torch.stack(edges).clamp_min(0).minimum(torch.tensor([height, height, width, width], device=device))


def exchange(x_bchw: Tensor, box: Tensor) -> Tensor:
    """Return the maps with what is inside `box` taken from the batch in reverse order."""
    top, bottom, left, right = box
    rows = torch.arange(x_bchw.shape[2], device=x_bchw.device)[:, None]
    cols = torch.arange(x_bchw.shape[3], device=x_bchw.device)
    inside_hw = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)
    return torch.where(inside_hw, x_bchw.flip(0), x_bchw)


def token_head(dim: int, num_classes: int) -> nn.Module:
    """Return a classifier of tokens (..., dim), freshly initialised; the identity where there are no classes."""
    head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
    init_linear(head)
    return head


def class_token_head(dim: int, num_classes: int) -> nn.Module:
    """Return a classifier of the class token (B, dim), with a norm of its own."""
    if not num_classes:
        return nn.Identity()
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(dim, eps=1e-5), fc=token_head(dim, num_classes)))


_cfg = partial(
    backbone_cfg,
    first_conv="stem.proj",
    license="apache-2.0",
    paper_ids="arXiv:2201.09450",
    paper_name="UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
    origin_url="https://github.com/Sense-X/UniFormer",
)


_LIGHT = {"first_conv": "stem.conv1", "classifier": ("head.fc", "head_cls")}
# Which mean, deviation and crop the token-labelling checkpoints expect is not published: timm's defaults of their time.
_TL = {"classifier": ("head.fc", "head_aux"), "crop_pct": 0.9}

default_cfgs = generate_default_cfgs(
    {
        "uniformer_small.in1k": _cfg(),
        "uniformer_small_plus.in1k": _cfg(first_conv="stem.conv1"),
        "uniformer_small_plus_dim64.in1k": _cfg(first_conv="stem.conv1"),
        "uniformer_base.in1k": _cfg(),
        "uniformer_base_ls.in1k": _cfg(),
        "uniformer_xxs.in1k": _cfg(**_LIGHT),
        "uniformer_xs.in1k": _cfg(**_LIGHT),
        "uniformer_small_tl.in1k": _cfg(**_TL),
        "uniformer_small_dim64_tl.in1k": _cfg(**_TL),
        "uniformer_small_plus_tl.in1k": _cfg(**_TL, first_conv="stem.conv1"),
        "uniformer_small_plus_dim64_tl.in1k": _cfg(**_TL, first_conv="stem.conv1"),
        "uniformer_base_tl.in1k": _cfg(**_TL),
        "uniformer_base_dim64_tl.in1k": _cfg(**_TL),
        "uniformer_large_ls_tl.in1k": _cfg(**_TL),
    }
)

_SMALL = {"depths": (3, 4, 8, 3)}
_SMALL_PLUS = {"depths": (3, 5, 9, 3), "conv_stem": True, "conv_downsample": True}
_BASE = {"depths": (5, 8, 20, 7)}
_LIGHT_ARGS = {"mlp_ratio": 3.0, "conv_stem": True}


_plain = partial(create_backbone, UniFormer)
_light = partial(create_backbone, UniFormerLight)
_tl = partial(create_backbone, UniFormerTokenLabelling)


@register_model
def uniformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S."""
    return _plain("uniformer_small", pretrained, _SMALL, kwargs)


@register_model
def uniformer_small_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S+, heads of 32 channels."""
    return _plain("uniformer_small_plus", pretrained, {**_SMALL_PLUS, "head_dim": 32}, kwargs)


@register_model
def uniformer_small_plus_dim64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S+, heads of 64 channels."""
    return _plain("uniformer_small_plus_dim64", pretrained, _SMALL_PLUS, kwargs)


@register_model
def uniformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-B."""
    return _plain("uniformer_base", pretrained, _BASE, kwargs)


@register_model
def uniformer_base_ls(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-B with layer scale in the attention blocks."""
    return _plain("uniformer_base_ls", pretrained, {**_BASE, "attn_layer_scale": 1e-6}, kwargs)


@register_model
def uniformer_xxs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-XXS, with token pruning."""
    args = {"depths": (2, 5, 8, 2), "dims": (56, 112, 224, 448), "head_dim": 28, **_LIGHT_ARGS}
    return _light("uniformer_xxs", pretrained, args, kwargs)


@register_model
def uniformer_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-XS, with token pruning."""
    args = {"depths": (3, 5, 9, 3), "dims": (64, 128, 256, 512), "head_dim": 32, **_LIGHT_ARGS}
    return _light("uniformer_xs", pretrained, args, kwargs)


@register_model
def uniformer_small_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S trained by token labelling, heads of 32 channels."""
    return _tl("uniformer_small_tl", pretrained, {**_SMALL, "head_dim": 32}, kwargs)


@register_model
def uniformer_small_dim64_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S trained by token labelling, heads of 64 channels."""
    return _tl("uniformer_small_dim64_tl", pretrained, _SMALL, kwargs)


@register_model
def uniformer_small_plus_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S+ trained by token labelling, heads of 32 channels."""
    return _tl("uniformer_small_plus_tl", pretrained, {**_SMALL_PLUS, "head_dim": 32}, kwargs)


@register_model
def uniformer_small_plus_dim64_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S+ trained by token labelling, heads of 64 channels."""
    return _tl("uniformer_small_plus_dim64_tl", pretrained, _SMALL_PLUS, kwargs)


@register_model
def uniformer_base_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-B trained by token labelling, heads of 32 channels."""
    return _tl("uniformer_base_tl", pretrained, {**_BASE, "head_dim": 32}, kwargs)


@register_model
def uniformer_base_dim64_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-B trained by token labelling, heads of 64 channels."""
    return _tl("uniformer_base_dim64_tl", pretrained, _BASE, kwargs)


@register_model
def uniformer_large_ls_tl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-L with layer scale in every block, trained by token labelling."""
    args = {
        "depths": (5, 10, 24, 7),
        "dims": (128, 192, 448, 640),
        "conv_layer_scale": 1e-6,
        "attn_layer_scale": 1e-6,
    }
    return _tl("uniformer_large_ls_tl", pretrained, args, kwargs)
