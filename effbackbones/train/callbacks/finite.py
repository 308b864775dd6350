"""The guard between the gradients and the weights."""

from collections.abc import Iterable
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from effbackbones.train.fsdp import whole


class NonFiniteError(FloatingPointError):
    """A training step has a loss or a gradient that is not finite; it did not reach the weights."""


class FiniteGuard(Callback):
    """Stops the run before a step whose loss or gradient is not finite reaches the weights, on all ranks together.

    In fp16, the gradient scaler leaves out steps whose scaled gradient overflows and lowers its scale; that is normal,
    and the guard lets up to `max_skipped` of them pass in a row.

    It also clips the gradient, by the norm that it has computed anyway: that takes as long as reading all weights.

    Args:
        max_skipped: Steps in a row that fp16's scaler may leave out.
        clip: Norm that a larger gradient is scaled down to; None for no clipping.
    """

    def __init__(self, max_skipped: int = 25, clip: float | None = None):
        self.max_skipped = max_skipped
        self.clip = clip
        self._skipped = 0
        self._loss: Tensor | None = None
        self._batch: object = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Summed over accumulated batches: one that is not finite stays visible.
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Raises NonFiniteError, naming rank, step and the first module with a bad value."""
        assert self._loss is not None
        loss, self._loss = self._loss.float(), None
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        # A gradient too large for its norm counts as not finite.
        bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(whole(norm).to(loss.device))]).float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        bad_loss, bad_grad = bad.bool().tolist()
        if not bad_loss and not bad_grad:
            self._skipped = 0
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(weights, self.clip, norm)
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not bad_loss:
            self._skipped += 1
            if self._skipped <= self.max_skipped:
                return
        first = self._first_bad(pl_module)
        if torch.isfinite(loss) and bad_loss:
            what = "the loss of another rank is not finite: see its message"
        else:
            what = f"the loss is {loss.item()}" if bad_loss else "the loss is finite, the gradient is not"
            what += f".\nFirst bad value: {first}"
        raise NonFiniteError(
            f"rank {trainer.global_rank}, epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}: {what}.\n"
            "The step did not reach the weights; the last checkpoint holds those of an earlier step. What helps most: "
            "a lower optim.lr or a longer schedule.warmup_epochs, optim.clip_grad=1, trainer.precision=bf16 or 32."
        )

    def _first_bad(self, pl_module: LightningModule) -> str:
        # All of these on every rank: the forward passes wait for each other where batch norms synchronise, and so does
        # what asks for shards. The backward pass goes from the last module to the first.
        parameters = list(pl_module.named_parameters())
        gradient = _first_not_finite((name, parameter.grad) for name, parameter in reversed(parameters))
        weight = _first_not_finite(parameters)
        outputs = self._bad_outputs(pl_module)
        if weight:
            return f"the weight {weight}"
        if _has_bad(self._batch):
            return "the input batch"
        if outputs:
            return f"the output of {outputs[0]}"
        return f"the gradient of {gradient}" if gradient else "the loss"

    def _bad_outputs(self, pl_module: LightningModule) -> list[str]:
        """Return the modules with a bad output when the last batch is repeated, the first to have one first."""
        found: list[str] = []

        def look_at(name: str, module: nn.Module, args: object, output: object) -> None:
            if _has_bad(output):
                found.append(name)

        hooks = [
            module.register_forward_hook(partial(look_at, name or type(module).__name__))
            for name, module in pl_module.named_modules()
        ]
        try:
            with torch.no_grad(), pl_module.trainer.precision_plugin.forward_context():
                pl_module.step_losses(self._batch)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _first_not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    bad = (name for name, tensor in tensors if tensor is not None and not whole(tensor.isfinite().all()))
    return next(bad, None)


def _has_bad(values: object) -> bool:
    tensors = [
        value for value in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(value, Tensor)
    ]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return any(part.is_floating_point() and not part.isfinite().all() for part in parts)
