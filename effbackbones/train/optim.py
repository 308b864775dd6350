"""The optimizer and the learning-rate schedule of a recipe, both timm's."""

import functools
from typing import Any

import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from effbackbones.config.schema import OptimConfig, ScheduleConfig


def scaled_lr(optim: OptimConfig, global_batch: int) -> float:
    """Return the peak learning rate at a global batch: `lr`, scaled linearly where `lr_batch` says what it is for."""
    return optim.lr if optim.lr_batch is None else optim.lr * global_batch / optim.lr_batch


FUSED = ("adam", "adamw", "sgd", "momentum")


def build_optimizer(
    model: nn.Module | list[dict[str, Any]],
    optim: OptimConfig,
    global_batch: int,
    fused: bool = False,
    foreach: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters, grouped by weight decay and, with `layer_decay`, by layer.

    Groups that are given in place of a model are taken as they are, with their rates and weight decays.

    With `fused`, the optimizers that have one take a step in a single kernel. Under fp16's scaler, that is where the
    gradients lose their scale: too late to check and clip them. With `foreach`, the same ones step through all tensors
    in a few calls, which torch does not choose for shards by itself. A state that is loaded leaves the settings as they
    are.
    """
    options: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps, "momentum": optim.momentum}
    options["fused"] = True if fused and optim.name in FUSED else None
    options["foreach"] = True if foreach and optim.name in FUSED else None
    optimizer = create_optimizer_v2(
        model,
        optim.name,
        lr=scaled_lr(optim, global_batch),
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay if isinstance(model, nn.Module) else None,
        **{name: value for name, value in options.items() if value is not None},
    )
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    if isinstance(optimizer, timm.optim.muon.Muon):
        _orthogonalise_in_float32_on_cpu()
    return optimizer


@functools.cache
def _orthogonalise_in_float32_on_cpu() -> None:
    """Change the precision of timm's Muon on a CPU, which timm has no setting for.

    Its bfloat16 products take a CPU without instructions for them much longer than all else of a training step.
    """
    muon: Any = timm.optim.muon
    theirs = muon.zeropower_via_newtonschulz

    def orthogonalise(update: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if update.device.type == "cpu" else torch.bfloat16
        return theirs(update, *args, dtype=dtype, **kwargs)

    muon.zeropower_via_newtonschulz = orthogonalise


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with the settings of `optimizer`, weight decay and the like, in place of its own."""
    groups = [
        {**saved, **own, "params": saved["params"]}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {**state, "param_groups": groups}


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, steps: int, steps_per_epoch: int
) -> Scheduler:
    """Return the schedule of `steps` optimizer steps; `step_update(n)` of it sets the rate of step n, from 0 on."""
    epochs: Any = steps / steps_per_epoch
    warmup: Any = schedule.warmup_epochs
    if schedule.warmup_steps is not None:
        warmup = schedule.warmup_steps / steps_per_epoch
    options: dict[str, Any] = {}
    if schedule.name == "poly":
        options["decay_rate"] = schedule.power
    elif schedule.name == "step":
        options.update(decay_rate=schedule.decay_rate, decay_epochs=schedule.decay_epochs)
    elif schedule.name == "multistep":
        options.update(decay_rate=schedule.decay_rate, decay_milestones=schedule.milestones)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        schedule.name,
        num_epochs=epochs,
        warmup_epochs=warmup,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
        **options,
    )
    return scheduler
