"""What need not be computed in every call: constants of a size, and what follows from weights while these rest."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from effbackbones.layers.reference import use_reference

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function of hashable arguments that makes index tables, masks and the like: keep its last 64 results.

    Under torch.compile, torch.export and modes that trace or fake tensors, and where the operators' references are
    forced, the function is called instead.
    """

    @functools.lru_cache(maxsize=64)
    def cached(*args: Hashable, **kwargs: Hashable) -> T:
        # A tensor made in inference mode could never take part in a graph later.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)  # type: ignore[arg-type]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs) if _traced() or use_reference() else cached(*args, **kwargs)

    return wrapper


def _traced() -> bool:
    """Return whether tensors may be other than what they seem: what is made of them must not outlive the call."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


class Cached(nn.Module):
    """A module that keeps what it derives from its parameters while it evaluates without gradients.

    Nothing is kept in training, under torch.compile and torch.export, or where a gradient has to flow or the operators'
    references are forced; what was kept is dropped when the mode, the dtype or the device changes, and computed anew
    when a parameter has been written to (through `parameter.data` alone it is not noticed). It is no part of state
    dicts, copies and pickles.
    """

    max_kept: ClassVar[int] = 2
    """Values kept at most; the oldest goes first."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Hashable, tuple[list[tuple[Tensor, int]], Any]] = {}

    def kept(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """Return compute(), or what it returned before for the same `key` and unchanged `sources`.

        Args:
            key: What the value depends on besides weights: a window, a map's size, a dtype.
            sources: The parameters it is computed from.
            compute: Computes it, a tensor or a tuple of tensors.
        """
        needs_grad = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        passing = _traced() or use_reference() or any(source.is_inference() or source.is_meta for source in sources)
        if self.training or needs_grad or passing:
            return compute()
        device = sources[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (key, autocast)
        state = [(source, source._version) for source in sources]
        before = self._kept.pop(key, None)
        unchanged = before is not None and all(
            a is b and version == now for (a, version), (b, now) in zip(before[0], state, strict=True)
        )
        if before is not None and unchanged:
            value = before[1]
        else:
            with torch.inference_mode(False), torch.no_grad():  # as above
                value = compute()
        self._kept[key] = (state, value)
        while len(self._kept) > self.max_kept:
            del self._kept[next(iter(self._kept))]
        return value

    def train(self, mode: bool = True) -> "Cached":
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Cached":
        self._kept.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}
