"""LoRA: low-rank additions to the linear layers of a model, by peft."""

import re
from typing import Any

import peft
from peft.tuners import lora
from torch import Tensor, nn

from effbackbones.config import RecipeError
from effbackbones.config.schema import LoraConfig

_IN_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.")


class _AdaptedWeight:
    """What `weight` of an adapted layer is: its own with the addition, for families that compute with it themselves."""

    @property
    def weight(self) -> Any:
        layer: Any = self
        return layer.get_base_layer().weight + layer.get_delta_weight(layer.active_adapters[0])


class _Linear(_AdaptedWeight, lora.Linear):
    pass


class _Conv2d(_AdaptedWeight, lora.Conv2d):
    pass


def adaptable(model: nn.Module, rank: int) -> list[str]:
    """Return the layers of the blocks that LoRA adapts: linear ones and 1x1 convolutions that are trained.

    Layers that are no larger than the addition would be, such as one that gives a single number for each head, are not
    among them.
    """
    return [
        name
        for name, module in model.named_modules()
        if _IN_BLOCK.search(name)
        and _is_linear(module)
        and module.weight.requires_grad
        and rank * sum(module.weight.shape[:2]) < module.weight.numel()
    ]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def add_adapters(model: nn.Module, cfg: LoraConfig) -> None:
    """Add LoRA to the layers of :func:`adaptable`; what is added is trained, nothing else any more.

    Raises:
        RecipeError: There is no such layer.
    """
    assert cfg.rank is not None
    targets = adaptable(model, cfg.rank)
    if not targets:
        raise RecipeError(f"lora.rank={cfg.rank}: no linear layer of {type(model).__name__}'s blocks takes that rank")
    config = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=targets,
    )
    config._register_custom_module({nn.Linear: _Linear, nn.Conv2d: _Conv2d})
    peft.inject_adapter_in_model(config, model)


def load_beneath(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a complete state dict, of the model as it was without adapters, into one with adapters."""
    own = {key.replace(".base_layer.", "."): key for key in model.state_dict() if ".lora_" not in key}
    model.load_state_dict({own[key]: value for key, value in weights.items()}, strict=False)
