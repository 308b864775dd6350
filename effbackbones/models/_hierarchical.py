"""The base class of every backbone: stem, four stages, norm, head, and timm's whole method set.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from effbackbones.checkpoint import KeyMap, checkpoint_filter_fn, load_weights


class Stage(nn.Module):
    """A downsampling layer and the blocks that follow it: (B, C_in, H, W) to (B, C, ~H/2, ~W/2).

    Stage 0 has no downsampling of its own where the stem in front of it has stride 4.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call one block, recomputing its activations in the backward pass if that is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args)
        return block(*args)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.downsample(x_bchw)
        for block in self.blocks:
            x_bchw = self.run(block, x_bchw)
        return x_bchw


class HierarchicalBackbone(nn.Module):
    """A four-stage backbone whose maps have strides 4, 8, 16 and 32.

    A family builds its `stem` and its `stages` and hands them over; it overrides :meth:`iter_stages` only where
    something besides the map passes from stage to stage. Parameter names are the same everywhere: `stem`,
    `stages.{i}.downsample`, `stages.{i}.blocks.{j}`, `norm` or `norms.{i}`, `head`.

    In dense mode (`output_norms` given) there is no classifier, and every map goes through its output norm.

    Args:
        stem: (B, in_chans, H, W) to (B, C_0, ~H/4, ~W/4), or half as far where stage 0 has a downsampling.
        stages: Four modules, each a :class:`Stage` or one with its interface.
        dims: Channels of the four maps.
        norm: What stands between the last map and the pooling of the classifier.
        output_norms: Dense mode: norms of the four maps, (B, C_i, H_i, W_i) to the same; identities where the family
            has none.
        head: The classifier, where it is more than pooling and a linear layer. Dense mode has none.
        num_classes: Width of the classifier; 0 for none. Dense mode has none.
        in_chans: Channels of the image.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
    """

    official_keys: ClassVar[KeyMap] = ()
    """Substitutions (pattern, replacement) from an official checkpoint's keys to ours; the first match counts.

    The replacement None leaves an entry out: a constant of the architecture, made anew here.
    """
    continuous: ClassVar[bool] = True
    """Whether outputs follow weights and images without jumps, so that rounding alone changes little."""
    official_ema: ClassVar[bool] = False
    """Whether the published accuracy is that of averaged weights, in official checkpoints that hold raw ones too."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        *,
        norm: nn.Module,
        output_norms: Sequence[nn.Module] | None = None,
        head: ClassifierHead | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.dense = output_norms is not None
        self.num_classes = 0 if self.dense else num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        if output_norms is not None:
            self.norms = nn.ModuleList(output_norms)
        self.norm = nn.Identity() if self.dense else norm
        self.head = head or ClassifierHead(dims[-1], self.num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.in_features

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's weights, under our names, as this model holds them.

        For what names do not settle: a family resizes tables, joins what its release splits, and checks constants of
        the release before it leaves them out. What fits nowhere is left as it is: it is named by the check that
        follows.

        Raises:
            CheckpointError: A constant is not the architecture's; the message names it.
        """
        return weights

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load the file that timm's `pretrained=True` has found: by our reader, strictly."""
        load_weights(self, path)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, besides norms and biases."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's pattern of layer groups, from the stem down to the head.

        What a stage holds besides its blocks (downsampling, a class token) belongs to its first block.
        """
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.", (0,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] | None = None) -> None:
        """Recompute the activations of the blocks of `stages` (None: all) in the backward pass, or stop doing so."""
        stage: Any
        for i, stage in enumerate(self.stages):
            stage.grad_checkpointing = enable and (stages is None or i in stages)

    @torch.jit.ignore
    def fuse(self) -> "HierarchicalBackbone":
        """Fold norms, scales and residuals into the layers beside them, for inference: in place, once and for all.

        Outputs are the same up to rounding. Parameters are other ones, which fit no checkpoint and take no gradient.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.training:
            raise RuntimeError("fuse() is for inference: call model.eval() first")
        for module in reversed(list(self.modules())):  # what is inside first
            if callable(fold := getattr(module, "fold", None)):
                fold()
        self.requires_grad_(False)
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier of `num_classes`; 0 removes it.

        Raises:
            ValueError: The model is in dense mode and `num_classes` is not 0.
        """
        if self.dense and num_classes:
            raise ValueError(
                f"a dense model has no classifier to give {num_classes} classes: build it with dense=False"
            )
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        init_linear(self.head.fc)

    def iter_maps(self, x_bchw: Tensor) -> Iterator[Tensor]:
        """Yield the raw output of each stage in turn, (B, C_i, H_i, W_i), of images (B, in_chans, H, W)."""
        return self.iter_stages(self.stem(x_bchw))

    def iter_stages(self, x_bchw: Tensor) -> Iterator[Tensor]:
        """Yield the raw output of each stage in turn, of the stem's output."""
        for stage in self.stages:
            x_bchw = stage(x_bchw)
            yield x_bchw

    def _output(self, i: int, x_bchw: Tensor) -> Tensor:
        return self.norms[i](x_bchw) if self.dense else x_bchw

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the chosen stages, and the last map too unless `intermediates_only`.

        Args:
            x: Images, (B, in_chans, H, W), at least 32 pixels a side.
            indices: Stages to take, in this order; an int takes the last so many, None takes all.
            norm: Put the last map through the classifier's norm.
            stop_early: Stop after the last chosen stage; the last map is then that stage's.
            output_fmt: NCHW, the only layout there is.
            intermediates_only: Return the list alone.

        Raises:
            ValueError: `output_fmt` is not NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: maps are NCHW only")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = {}
        for i, x_bchw in enumerate(self.iter_maps(x)):
            if i in take:
                out_bchw = self._output(i, x_bchw)
                maps[i] = self.norm(out_bchw) if norm and i == 3 else out_bchw
            if i == last and (stop_early or intermediates_only):
                break
        taken = [maps[i] for i in take]
        return taken if intermediates_only else (self._output(i, x_bchw), taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head; return `indices` as non-negative numbers."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if self.dense:
            self.norms = self.norms[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.head = ClassifierHead(self.num_features, 0)
            self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, (B, C_3, ~H/32, ~W/32): what `features_only` gives for stage 3."""
        for i, x_bchw in enumerate(self.iter_maps(x)):  # noqa: B007
            pass
        return self._output(i, x_bchw)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of the last map, (B, num_classes); its pooled vector with `pre_logits`."""
        return self.head(self.norm(x), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Any:
        """Return the logits of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def loss(self, output: Any, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the training loss of what :meth:`forward` gave in training mode.

        Args:
            output: The logits, or what the family returns beside them.
            target: Class indices (B,) or class probabilities (B, num_classes).
            criterion: Loss of logits and such a target.
        """
        return criterion(output, target)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer (nothing else): truncated normal of deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def backbone_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return an entry of timm's pretrained configs: of ImageNet-1K at 224 pixels, unless told otherwise."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **kwargs,
    }


def init_conv(module: nn.Module) -> None:
    """Initialise a convolution (nothing else): normal, by the outputs of an input over the kernel, zero bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(2 * module.groups / module.weight[:, 0].numel()) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_backbone(
    cls: type[HierarchicalBackbone],
    variant: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """Build a registered variant of `cls` as timm builds its own: configs, weights and `features_only` included.

    Args:
        cls: The family's class.
        variant: Registered name.
        pretrained: Load the weights that the variant's pretrained config names.
        defaults: Constructor arguments that make the variant.
        kwargs: What the caller of timm.create_model gave, which comes first.
    """
    arguments = {**defaults, **kwargs}
    # A file goes to load_pretrained: timm's own reader takes averaged weights wherever there are any.
    overlay = {"custom_load": True, **(arguments.pop("pretrained_cfg_overlay", None) or {})}
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )
