"""Parameter groups of detectors and segmentors, for our training and for mm's runner."""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_with_matcher
from torch import nn

from effbackbones.mm.backbone import EffBackbone

_PREFIX = "backbone.model."
_DEFAULTS: dict[str, Any] = {"layer_decay": None, "backbone_lr": 1.0, "no_decay": None}
_REST = ""  # stands for all that is not the backbone, which comes after its last layer


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    backbone_lr: float = 1.0,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the parameters to train of a detector or segmentor, grouped by learning rate and weight decay.

    As in timm's own groups, `lr_scale` is the factor on the rate that timm's schedules heed; `lr` is without it.

    Args:
        model: Its `backbone` is an :class:`EffBackbone`.
        lr: Peak learning rate of neck and heads.
        weight_decay: For what is not exempt from it: one-dimensional parameters, biases, and what the backbone's
            `no_weight_decay` names.
        layer_decay: Factor of the rate per layer of the backbone, from the heads down. The layers are those of its
            `group_matcher`; what belongs to none, such as an output norm, counts as heads do.
        backbone_lr: Further factor for the whole backbone.
        no_decay: Parts of the names of the parameters without weight decay; these alone are exempt then.

    Raises:
        TypeError: The backbone is another.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, EffBackbone):
        raise TypeError(f"expected a model whose backbone is an EffBackbone, got {type(backbone).__name__}")
    names = [(name, None) for name, _ in backbone.model.named_parameters()]
    layers = group_with_matcher(iter([*names, (_REST, None)]), backbone.model.group_matcher(), reverse=True)
    exempt = backbone.model.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix(_PREFIX)
        of_backbone = inner != name
        scale = backbone_lr if of_backbone else 1.0
        if of_backbone and layer_decay is not None:
            scale *= layer_decay ** (layers[_REST] - layers[inner])
        if no_decay is not None:
            spared = any(part in name for part in no_decay)
        else:
            spared = parameter.ndim <= 1 or name.endswith(".bias")
            spared |= of_backbone and any(fnmatch(inner, pattern) for pattern in exempt)
        decay = 0.0 if spared else weight_decay
        group = {"params": [], "lr": lr, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class EffOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives an optimizer of mm's runner the groups of :func:`param_groups`.

    `paramwise_cfg` may hold `layer_decay`, `backbone_lr` and `no_decay`.

    Raises:
        ValueError: `paramwise_cfg` holds something else, or the optimizer has no `lr`.
    """

    paramwise_cfg: dict[str, Any]

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if unknown := self.paramwise_cfg.keys() - _DEFAULTS:
            raise ValueError(f"paramwise_cfg holds {', '.join(sorted(unknown))}; expected {', '.join(_DEFAULTS)}")
        self.paramwise_cfg = {**_DEFAULTS, **self.paramwise_cfg}  # where it is empty, the parent makes no groups
        if self.base_lr is None:
            raise ValueError(f"optimizer={dict(self.optimizer_cfg)}: expected lr, which the groups' rates start from")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Add the groups of the whole model to `params`."""
        for group in param_groups(module, self.base_lr, self.base_wd or 0.0, **self.paramwise_cfg):
            group["lr"] *= group.pop("lr_scale")
            params.append(group)
