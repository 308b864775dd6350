"""The zoo as one backbone type of mmengine."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from effbackbones.checkpoint import Loaded, load_weights
from effbackbones.models._zoo import ZOO
from effbackbones.train.freezing import freeze_stages, rest_batch_norms, rest_frozen

STAGES = 4


@MODELS.register_module()
class EffBackbone(BaseModule):
    """A model of the zoo as the backbone of an mm detector or segmentor.

    What lies behind the last stage taken, and the output norms of stages that are not, is left out: every parameter
    gets a gradient, as DDP wants it.

    Args:
        model: Name in the zoo, such as `transnext_tiny`.
        out_indices: Stages whose maps are given out, in increasing order; stage i has stride 4 * 2**i.
        checkpoint: What :meth:`init_weights` loads: a weight file (official format or ours), a run folder of ours, or
            the checkpoint of a detector or segmentor, whose backbone is taken.
        dense: Use the mode that the papers' detection and segmentation backbones have; False: the classifier's.
        drop_path_rate: Stochastic depth of the last block.
        frozen_stages: -1 trains everything, n keeps the stem and the first n stages as they are, in evaluation mode.
        norm_eval: Keep the statistics of batch norms frozen while training.
        with_cp: Recompute activations in the backward pass: of all stages, or of those in a list.
        init_cfg: mm's way of naming `checkpoint`: `dict(type='Pretrained', checkpoint=...)`.
        args: Further constructor arguments of the model, such as `attention='window'`.

    Raises:
        ValueError: The zoo has no such model, or a value is out of range.
        TypeError: The model does not take `args`.
    """

    model: Any  # a HierarchicalBackbone

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        checkpoint: str | None = None,
        dense: bool = True,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | Sequence[int] = False,
        init_cfg: Mapping[str, Any] | None = None,
        **args: Any,
    ):
        super().__init__()
        if "pretrained" in args:
            raise TypeError("EffBackbone has no `pretrained`: drop it from the model's config, and set `checkpoint`")
        if init_cfg is not None:
            if init_cfg.get("type") != "Pretrained" or checkpoint is not None:
                raise ValueError(f"init_cfg={dict(init_cfg)}: expected none, and the weights' file in `checkpoint`")
            checkpoint = init_cfg["checkpoint"]
        names = dict.fromkeys(row.model for row in ZOO)
        if model not in names:
            nearest = ", ".join(difflib.get_close_matches(str(model), names, n=3)) or "`effb ls` lists them"
            raise ValueError(f"model={model!r}: expected a model of the zoo; nearest: {nearest}")
        taken = list(out_indices)
        if not taken or taken != sorted(set(taken) & set(range(STAGES))):
            raise ValueError(f"out_indices={tuple(taken)}: expected increasing numbers of stages, of 0 to {STAGES - 1}")
        if frozen_stages not in range(-1, STAGES + 1):
            raise ValueError(f"frozen_stages={frozen_stages}: expected -1 (none), or 0 (stem) to {STAGES}")
        self.name = model
        self.out_indices = tuple(taken)
        self.checkpoint = checkpoint
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._arguments = {"dense": dense, "drop_path_rate": drop_path_rate, **args}
        self.model = timm.create_model(model, **self._arguments)
        self.feature_info = [self.model.feature_info[i] for i in taken]
        self._prune()
        if with_cp:
            self.model.set_grad_checkpointing(True, None if with_cp is True else with_cp)
        freeze_stages(self.model, frozen_stages)
        self.train()

    def _prune(self) -> None:
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        if self.model.dense:
            for i in set(range(len(self.model.norms))) - set(self.out_indices):
                self.model.norms[i] = nn.Identity()

    def init_weights(self) -> None:
        """Load `checkpoint`, and say in mmengine's log what was loaded and what is not in it.

        Raises:
            CheckpointError: The file cannot be read or does not fit.
        """
        self._is_init = True
        if self.checkpoint is not None:
            self.load_weights(self.checkpoint)

    def load_weights(self, path: str | Path, ema: bool = False) -> Loaded:
        """Load the weights of a file or a run folder, of which this model may be a part; return what was taken.

        Args:
            path: As `checkpoint` of the class.
            ema: Take the averaged weights, which must be there.

        Raises:
            CheckpointError: The file cannot be read or does not fit; nothing has been loaded then.
        """
        whole = timm.create_model(self.name, **self._arguments)
        loaded = load_weights(whole, path, ema)
        weights = whole.state_dict()
        self.model.load_state_dict({key: weights[key] for key in self.model.state_dict()})
        print_log(f"{self.name}: {loaded}", logger="current")
        return loaded

    def train(self, mode: bool = True) -> "EffBackbone":
        """Set the mode of all but what is frozen."""
        super().train(mode)
        rest_frozen(self.model)
        if self.norm_eval:
            rest_batch_norms(self.model)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the chosen stages, (B, C_i, ~H/stride, ~W/stride), of images (B, 3, H, W)."""
        maps = self.model.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        # Operators of mmcv, RoIAlign among them, take memory for rows of channels-first maps whatever the strides say.
        return tuple(x_bchw.contiguous() for x_bchw in maps)
