"""Linear layers, by the fastest of torch's ways on a CPU."""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from effbackbones.cpu import cpu_field
from effbackbones.layers.reference import use_reference


def _mkl_leaves_avx512() -> bool:
    """Return whether this CPU has AVX-512 and MKL does not use it, as on AMD's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in (cpu_field("vendor_id") or platform.processor())


# torch gives F.linear in float32 to MKL. Where that leaves AVX-512 unused, oneDNN took half the time (AMD EPYC); where
# there is none, it took as long at inference and a fourth more in training. It serves convolutions, and an operator
# made for torch.compile that has no gradient.
_ONEDNN = torch.backends.mkldnn.is_available() and _mkl_leaves_avx512()
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """A linear layer, (..., C_in) to (..., C), computed by :func:`apply_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return apply_linear(input, self.weight, self.bias)


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight, bias), (..., C_in) to (..., C); on a CPU, in float32, by oneDNN where that is faster.

    With gradients it is a 1x1 convolution. In other dtypes, on other devices, under autocast, where a graph is
    captured, and where the operators' references are forced, it is F.linear.
    """
    if _is_plain(x, weight):
        tokens = x.shape[:-1].numel()
        if _infers(tokens, x, weight, bias):
            out: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
            return out
        # Torch gives 1x1 convolutions to oneDNN from a batch of 16 up; what that saves must make up for their cost.
        worth = (tokens - 128) * weight.numel() >= 2**23
        if worth and (images := next((n for n in range(16, 64) if tokens % n == 0), 0)):
            x_bc1n = x.contiguous().view(images, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
            out_bc1n = F.conv2d(x_bc1n, weight[:, :, None, None], bias)
            return out_bc1n.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def apply_linear_bcn(x_bnc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return F.linear(x_bnc, weight, bias) with the channels first, (B, C, N); by oneDNN as in `apply_linear`."""
    b, n, _ = x_bnc.shape
    if not (_is_plain(x_bnc, weight) and _infers(n, x_bnc, weight, bias)):
        return torch.baddbmm(bias.unsqueeze(-1), weight.expand(b, -1, -1), x_bnc.mT)
    out_bcn = x_bnc.new_empty(b, len(weight), n)
    for x_nc, out_cn in zip(x_bnc, out_bcn, strict=True):
        torch.add(_onednn_linear(weight, x_nc, None, "none", [], ""), bias.unsqueeze(-1), out=out_cn)
    return out_bcn


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Return whether these are float32 tensors on a CPU, and nothing records or changes what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and _ONEDNN
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not use_reference()
    )


def _infers(tokens: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN's operator, which has no gradient, serves plain tensors, and is faster."""
    if _onednn_linear is None or tokens < 32 or tokens * weight.numel() < 2**21:
        return False
    parts = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return False
    return all(unpack_dual(part).tangent is None for part in parts)


if _onednn_linear is not None:

    @register_flop_formula(_onednn_linear)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x_shape.numel() * weight_shape[0]
