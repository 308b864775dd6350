"""Sharding over devices: torch's fully_shard as a strategy of Lightning.

Each device keeps a part of every weight, gradient and optimizer state. The weights of a block are gathered in whole
while it computes; evaluation has all of them in whole, so that ranks need not have equally many batches. Checkpoints
hold whole tensors, as those of every other strategy do, and load into any of them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

_BLOCK = re.compile(r"(^|\.)blocks\.\d+$")


class FullySharded(DDPStrategy):
    """The processes of DDP, with fully_shard instead of the wrapper; evaluation outside of a training has no shards.

    Lightning's own ModelParallelStrategy refuses fp16, leaves batch norms unsynchronised, and restores checkpoints by
    rules of its own.
    """

    def configure_ddp(self) -> None:
        """Shard what the module calls: model, average and what else has weights, each block by itself."""
        assert self.lightning_module is not None
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for child in self.lightning_module.children():
            called: Any = child.module if isinstance(child, ModelEmaV3) else child
            if list(called.parameters()):
                called.to(memory_format=torch.contiguous_format)  # all that fully_shard takes
                for part in (*sharded_units(called), called):
                    fully_shard(part, mesh=mesh)

    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        for buffer in self.lightning_module.buffers():  # the statistics of batch norms, as under DDP
            torch.distributed.broadcast(buffer, 0)
        self._evaluating = ExitStack()
        self._evaluating.enter_context(whole_weights(self.lightning_module))

    def on_validation_end(self) -> None:
        self._evaluating.close()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole state dict on rank 0, nothing on the others. All ranks have to call it."""
        return self._gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state of an optimizer on rank 0, nothing on the others. All ranks have to call it."""
        return self._gathered(super().optimizer_state(optimizer))

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(tensor: Tensor) -> Tensor | None:
            tensor = whole(tensor)
            return tensor.cpu() if self.is_global_zero else None

        state = tree_map_only(Tensor, gather, state)
        return state if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {key: shard_as(value, own.get(key)) for key, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = [
            _shard_optimizer(optimizer, state)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({"optimizer_states": states})

    def teardown(self) -> None:
        """Leave the shards where they are."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def sharded_units(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model whose weights are gathered together: its blocks, outermost ones only.

    What lies in none of them is gathered with the model as a whole.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _BLOCK.search(name) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = module
    return list(found.values())


def shard_as(value: Any, own: Any) -> Any:
    """Return the part of a whole tensor that this rank keeps, as `own` is sharded; anything else as it is."""
    if not (isinstance(value, Tensor) and isinstance(own, DTensor) and value.shape == own.shape):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _shard_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an optimizer's whole state that this rank keeps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shards = {
        number: {name: shard_as(value, parameter) for name, value in state["state"].get(number, {}).items()}
        for number, parameter in zip(numbers, parameters, strict=True)
    }
    return {**state, "state": {number: values for number, values in shards.items() if values}}


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Have every sharded part of a module in whole on every rank, so that each may call it or not.

    All ranks have to enter together.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    roots = [part for part in parts if not any(part is not other and part in other.modules() for other in parts)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part not in roots, recurse=False)
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or the whole of a sharded one, which all ranks have to ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def average_shards(ema: ModelEmaV3, model: nn.Module, step: int) -> None:
    """Update the average of a model, both sharded, as `ema.update` does, which mixes shards and buffers in one call."""
    states = (part.state_dict().values() for part in (ema.module, model))
    pairs = [tuple(x.to_local() if isinstance(x, DTensor) else x for x in pair) for pair in zip(*states, strict=True)]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([own for own, _ in floating], [new for _, new in floating], weight=1.0 - ema.get_decay(step))
    for own, new in pairs:
        if not own.is_floating_point():
            own.copy_(new)
