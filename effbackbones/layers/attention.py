"""Softmax attention: the one function that every softmax attention of the zoo goes through.

`attend` serves a call with one of four backends:

- `xformers`: memory-efficient attention, on CUDA, where the installed xformers can serve the call;
- `sdpa`: torch's scaled_dot_product_attention, which serves every call;
- `triton`: our own kernels, on CUDA, for a bias that the batch shares, whose gradient they never hold for each of it;
- `plain`: the formula in plain PyTorch, which keeps the N x M weights; for reference and debugging.

By default (`auto`) that is xformers where it can serve the call, plain on a CPU for a bias that needs a gradient while
the weights are few (torch's sdpa serves it by the same formula in more steps), else sdpa. The environment variable
`EFFBACKBONES_ATTENTION` (read once, at import) and the context manager `attention_backend` force one.
Under torch.compile and torch.export it is sdpa, unless plain is forced. `triton` serves where it is forced alone.

Legend: B batch, N queries, M keys, d head dim of q and k, d_v head dim of v.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from effbackbones.kernels import problem as kernel_problem

_log = logging.getLogger(__name__)

_ENV = "EFFBACKBONES_ATTENTION"
_NAMES = ("auto", "xformers", "sdpa", "triton", "plain")


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_NAMES)}")
    return name


_choice = _checked(os.environ.get(_ENV, "auto"), f"environment variable {_ENV}")
_last: str | None = None
_served: set[str] = set()


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Force one attention backend within the block: auto, xformers, sdpa, triton or plain.

    Raises ValueError for another name. The choice is one of the process, not of the thread.
    """
    global _choice
    before, _choice = _choice, _checked(name, "the attention backend")
    try:
        yield
    finally:
        _choice = before


def last_backend() -> str | None:
    """Return the backend that served the last eager call of `attend`; None before the first."""
    return _last


@contextmanager
def served_backends() -> Iterator[set[str]]:
    """Collect, in the set it gives, the backends that serve eager calls of `attend` within the block."""
    global _served
    before, _served = _served, set()
    try:
        yield _served
    finally:
        _served = before


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Return softmax(scale * q k^T + bias) v, with dropout on the weights.

    q: (B, heads, N, d); k: (B, heads, M, d); v: (B, heads, M, d_v); returns (B, heads, N, d_v).
    bias: floating point, broadcastable to (B, heads, N, M); xformers and sdpa take it in q's dtype.
    scale: d ** -0.5 where None. dropout_p: applied whenever above 0, so pass 0 in evaluation.
    Raises RuntimeError where a forced backend cannot serve the call, TypeError for a bias that is not floating point.
    """
    global _last
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias has dtype {bias.dtype}; expected a floating-point bias, which is added to the scores")
    if torch.compiler.is_compiling():
        function = _plain if _choice == "plain" else _sdpa
    else:
        _last = _pick(q, k, v, bias, dropout_p)
        _served.add(_last)
        function = _FUNCTIONS[_last]
    if k.shape[2] == 1 and not dropout_p:
        function = _one_key
    elif function in (_sdpa, _xformers) and q.shape[-1] < v.shape[-1]:
        # Fused kernels have one head dim: zeros, which change no score, widen q and k to that of v.
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
    return function(q, k, v, bias, scale, dropout_p)


def _pick(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> str:
    if _choice == "auto":
        if _differentiates_bias_on_cpu(q, bias) and not _goes_by_blocks(q, k, v, bias, dropout_p):
            return "plain"
        host = _host(q.device)
        return "sdpa" if host.problems or why_not("xformers", q, k, v, bias, host) else "xformers"
    if reasons := why_not(_choice, q, k, v, bias, dropout_p=dropout_p):
        raise RuntimeError(
            f"attention backend {_choice!r} is forced but cannot serve q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}: {'; '.join(reasons)}. Choose auto or sdpa through {_ENV} or attention_backend()."
        )
    return _choice


class Host(NamedTuple):
    """What a device offers to xformers: why it cannot serve there at all (empty: it can), and its CUDA capability."""

    problems: tuple[str, ...] = ()
    capability: tuple[int, int] = (8, 0)


def why_not(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    host: Host | None = None,
    dropout_p: float = 0.0,
) -> list[str]:
    """Return every reason why a backend cannot serve an eager call of `attend`; empty where it can.

    Only shapes and dtypes are read (autocast counted in): strides and the alignment of the bias are no reason, since
    `attend` copies what xformers would refuse. host: what another device offers; that of q where None. dropout_p: the
    call's dropout.
    """
    if backend == "triton":
        return _why_not_triton(q, k, v, bias, dropout_p)
    if backend != "xformers":
        return []
    host = host or _host(q.device)
    reasons = list(host.problems)
    q_dtype, k_dtype, v_dtype = _autocast_dtype(q), _autocast_dtype(k), _autocast_dtype(v)
    d_v = v.shape[-1]
    d = max(q.shape[-1], d_v)  # narrower ones are widened
    if not q_dtype == k_dtype == v_dtype:
        reasons.append(f"q, k and v have dtypes {q_dtype}, {k_dtype} and {v_dtype}: xformers needs one")
    if q_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {q_dtype}: xformers serves float32, float16 and bfloat16")
    elif q_dtype == torch.bfloat16 and host.capability < (8, 0):
        reasons.append(f"bfloat16 needs compute capability 8.0, this device has {_dotted(host.capability)}")
    step = 16 // q_dtype.itemsize  # CUTLASS and flash load 16 bytes at a time
    if d % step or d_v % step:
        reasons.append(f"head dims {d} (q, k) and {d_v} (v): xformers needs multiples of {step} in {q_dtype}")
    if max(q.shape[:2]) > 65535:
        reasons.append(f"batch {q.shape[0]} and heads {q.shape[1]}: the kernels' CUDA grid ends at 65535")
    if 0 in q.shape or 0 in v.shape:
        reasons.append("a tensor is empty")
    if host.capability > (9, 0) and (bias is not None or q_dtype == torch.float32 or d != d_v or d > 256):
        reasons.append(
            f"on compute capability {_dotted(host.capability)} xformers has flash attention only: "
            "16 bits, no bias, one head dim up to 256"
        )
    return reasons


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> list[str]:
    reasons = []
    dtypes = {_autocast_dtype(x) for x in (q, k, v)}
    if not any(dtypes == {dtype} for dtype in (torch.float32, torch.float16, torch.bfloat16)):
        reasons.append("triton serves q, k and v of one dtype: float32, float16 or bfloat16")
    if bias is None or (bias.dim() == 4 and bias.shape[0] > 1):
        reasons.append("triton serves a bias that the batch shares")
    if dropout_p:
        reasons.append(f"dropout {dropout_p}: triton has none")
    if max(q.shape[-1], v.shape[-1]) > 256:
        reasons.append(f"head dims {q.shape[-1]} (q, k) and {v.shape[-1]} (v): triton serves up to 256")
    if 0 in q.shape or 0 in v.shape:
        reasons.append("a tensor is empty")
    if q.device.type != "cuda":
        reasons.append(f"the tensors are on {q.device.type}: triton serves CUDA devices only")
    elif found := kernel_problem("window_attention", q.device):
        reasons.append(found)
    return reasons


def aligned_bias(bias: Tensor) -> Tensor:
    """Return an equal bias whose last dim is contiguous and whose other strides are multiples of 8, as xformers needs.

    bias: (..., N, M). It is returned itself where it is stored so, else as a slice of a padded copy; differentiable.
    """
    if _is_aligned(bias, 8):
        return bias
    length = bias.shape[-1]
    padded = bias.new_zeros(*bias.shape[:-1], (length + 7) // 8 * 8)
    padded[..., :length] = bias
    return padded[..., :length]


def attention_report() -> dict[str, str]:
    """Try a tiny forward and backward pass of each backend on this machine (its GPU if any).

    Returns for each backend "works", or why it does not.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return {
        "xformers": "; ".join(_host(device).problems) or "works",
        "sdpa": _failure("sdpa", device, Host()) or "works",
        "triton": (kernel_problem("window_attention", device) if cuda else "serves CUDA devices only") or "works",
        "plain": _failure("plain", device, Host()) or "works",
    }


# ---- backends


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    # The scale comes first: q k^T alone leaves the range of float16 where the scaled scores do not.
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return weights.to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    # Without contiguous head dims, or with a 3-d bias, torch leaves its fused kernels.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if bias is not None:
        if not torch.compiler.is_compiling() and _goes_by_blocks(q, k, v, bias, dropout_p):
            q, k, v = (x.to(_autocast_dtype(x)) for x in (q, k, v))
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            q, bias = _fused_bias(q, k, v, bias)
            out: Tensor = _BiasedByBlocks.apply(q, k, v, bias, scale)[0]
            return out
        q, bias = _fused_bias(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _differentiates_bias_on_cpu(q: Tensor, bias: Tensor | None) -> bool:
    return q.device.type == "cpu" and bias is not None and bias.requires_grad and torch.is_grad_enabled()


_LEAST_WEIGHTS = 2**22  # fewer of them stay in the caches, where plain attention is as fast
_LEAST_WINDOW = 2**14  # queries times keys; torch's batched products of smaller ones cost more than memory does
_BLOCK = 2**18


def _goes_by_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> bool:
    """Return whether attention with a bias that needs a gradient goes by blocks on this CPU."""
    return (
        _differentiates_bias_on_cpu(q, bias)
        and not dropout_p
        and q.shape[-1] <= v.shape[-1]  # narrower ones are widened
        and q.shape[2] * k.shape[2] >= _LEAST_WINDOW
        and q.shape[:3].numel() * k.shape[2] >= _LEAST_WEIGHTS
    )


class _BiasedByBlocks(torch.autograd.Function):
    """Attention with a bias on a CPU, where torch's fused kernel has no gradient for the bias.

    The forward pass is that kernel. The backward pass makes the weights again, a block of the batch at a time, and has
    no derivative of its own.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum_bhn = kernel(q, k, v, attn_mask=bias, scale=scale)
        return out, log_sum_bhn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, bias, out, log_sum_bhn = ctx.saved_tensors
        dtype = log_sum_bhn.dtype  # float32 for the narrower ones
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        grad_bias = torch.zeros_like(bias, dtype=dtype)
        block = max(1, _BLOCK // (q.shape[1:3].numel() * k.shape[2]))
        for i in range(0, len(q), block):
            part = slice(i, i + block)
            q_, k_, v_, out_, grad_ = (x[part].to(dtype) for x in (q, k, v, out, grad))
            bias_, grad_bias_ = (x if len(bias) == 1 else x[part] for x in (bias, grad_bias))
            q_ = q_ * ctx.scale
            weights = (q_ @ k_.mT).add_(bias_).sub_(log_sum_bhn[part].unsqueeze(-1)).exp_()
            scores = (grad_ @ v_.mT).sub_((grad_ * out_).sum(-1, keepdim=True)).mul_(weights)  # their gradient
            grad_bias_ += scores.sum_to_size(grad_bias_.shape)
            grad_q[part] = (scores @ k_).mul_(ctx.scale)
            grad_k[part] = scores.mT @ q_
            grad_v[part] = weights.mT @ grad_
        return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype), None


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.to(_autocast_dtype(x)) for x in (q, k, v))
    if bias is not None:
        q, bias = _fused_bias(q, k, v, bias)
        rows = bias.expand(*bias.shape[:-1], k.shape[2])
        bias = aligned_bias(rows).expand(*q.shape[:3], k.shape[2])  # aligned first: B copies of it are never stored
    step = 16 // q.element_size()
    q_bnhd, k_bmhd, v_bmhd = (
        (x if _is_aligned(x, step) else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)
        for x in (q, k, v)
    )
    return memory_efficient_attention(q_bnhd, k_bmhd, v_bmhd, bias, dropout_p, scale).transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    from effbackbones.kernels.window_attention import window_attention

    assert bias is not None  # `why_not` says so
    q, k, v = (x.to(_autocast_dtype(x)) for x in (q, k, v))
    bias = bias.expand(1, q.shape[1], q.shape[2], k.shape[2])
    return window_attention(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)


def _one_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    # The one weight is 1, whatever the score. Fused kernels give q and k rounding noise for a gradient that is zero,
    # and Adam makes full steps of it. Empty sums keep q, k and bias in the graph, with that zero.
    zero = sum(x[..., :0].sum() for x in (q, k, bias) if x is not None)
    return (v + zero).to(_autocast_dtype(v)).expand(-1, -1, q.shape[2], -1)


_FUNCTIONS = {"xformers": _xformers, "sdpa": _sdpa, "triton": _triton, "plain": _plain}


def _fused_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and the bias as the fused kernels need them: the bias 4-d and in q's dtype, q in the bias's graph."""
    bias = bias.to(q.dtype).reshape((1,) * (4 - bias.dim()) + bias.shape)
    if bias.requires_grad and torch.is_grad_enabled() and not (q.requires_grad or k.requires_grad or v.requires_grad):
        # Where none of q, k, v needs a gradient, xformers returns none for the bias, and the CUDA kernel of torch
        # before pytorch#188302 reads invalid memory in its backward pass. An empty sum is an exact zero.
        q = q + bias[..., :0].sum()
    return q, bias


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives x in attention (float64 keeps its own)."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_aligned(x: Tensor, step: int) -> bool:
    *strides, last = x.stride()
    # A storage offset cannot be traced; compiled attention has no need of it.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    return last == 1 and all(stride % step == 0 for stride in (offset, *strides))


# ---- what this machine offers


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


@functools.cache
def _host(device: torch.device) -> Host:
    """Return what a device offers to xformers; on CUDA, import it and make a trial call."""
    if device.type != "cuda":
        return Host((f"the tensors are on {device.type}: xformers serves CUDA devices only",))
    host = Host(capability=torch.cuda.get_device_capability(device))
    problem = _import_problem() or _failure("xformers", device, host)
    if problem and problem != _NOT_INSTALLED:
        _log.warning("xformers attention is off on %s: %s", device, problem)
    return host._replace(problems=(problem,)) if problem else host


_NOT_INSTALLED = "xformers is not installed: pip install 'effbackbones[xformers]'"
_KNOWN_VERSION = "0.0.35"  # whose rules `why_not` states


@functools.cache
def _import_problem() -> str:
    """Import xformers and return why it cannot be used; empty where it can."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns at length about its own C++ extension, which attention does not need
    try:
        import xformers
        from xformers.ops.fmha import common, cutlass
    except ModuleNotFoundError as error:
        return _NOT_INSTALLED if error.name == "xformers" else f"xformers does not import: {error}"
    except Exception as error:
        return f"xformers does not import: {type(error).__name__}: {error}"
    finally:
        logger.setLevel(level)
    if not xformers.__version__.startswith(_KNOWN_VERSION):
        return f"xformers {xformers.__version__} is installed; expected {_KNOWN_VERSION}"
    # Where its extension does not load (built for another CUDA), xformers refuses all of CUDA by this flag, although
    # the attention kernels it calls are torch's own, and it has checked that they fit.
    common._built_with_cuda = common._built_with_cuda or cutlass.FwOp.OPERATOR is not None
    return ""


def _failure(backend: str, device: torch.device, host: Host) -> str:
    """Return the error of tiny forward and backward passes of a backend on a device; empty where they work."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for dtype, biased in ((torch.float16, False), (torch.float32, True)):  # on CUDA: flash, then CUTLASS
            q = torch.ones(1, 1, 8, 8, device=device, dtype=dtype, requires_grad=True)
            bias = q.detach() if biased else None
            if why_not(backend, q, q, q, bias, host):
                continue
            try:
                _FUNCTIONS[backend](q, q, q, bias, None, 0.0).sum().backward()
            except Exception as error:
                return f"a trial call raised {type(error).__name__}: {error}"
    return ""
