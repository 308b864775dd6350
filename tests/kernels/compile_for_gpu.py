"""Compile, without a GPU, the kernels that small calls of every module launch; print what each one takes, as JSON."""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from effbackbones.kernels import aggregated_attention, super_tokens, window_attention

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
found: list[dict[str, Any]] = []


def compile_call(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Compile a kernel for what it is called with, in place of a launch."""
    options = {"num_warps": kwargs.pop("num_warps")}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants = {}, {}
    for i, parameter in enumerate(self.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    kernel = triton.compile(ASTSource(self, signature, constants), target=HOPPER, options=options)
    found.append({"kernel": self.__name__, "shared": kernel.metadata.shared, "binary": len(kernel.asm["cubin"])})


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def main() -> None:
    JITFunction.run = compile_call
    for dtype in (torch.float32, torch.bfloat16):
        tokens, pooled = (1, 2, 24, 100), (1, 2, 24, 70)
        q, k, k_pool, bias, more, pool_bias = tensors(
            tokens, tokens, pooled, (2, 9), (1, 2, 9, 100), (2, 7, 10, 10, 10), dtype=torch.float32
        )
        v, v_pool = tensors(tokens, pooled, dtype=dtype)
        inputs = q, k, v, k_pool, v_pool, bias, more, pool_bias
        exact = dtype == torch.float32
        aggregated_attention.aggregated_attention(*inputs, (10, 10), exact=exact).sum().backward()
        for n in (49, 70):
            q, k, v, bias = tensors(*((2, 1, n, 32),) * 3, (1, 1, n, n), dtype=dtype)
            window_attention.window_attention(q, k, v, bias, 1.0).sum().backward()
        s, x = tensors((1, 2, 2, 96), (4, 64, 96), dtype=dtype)
        weights, _ = super_tokens.associate(s.detach(), x.detach())
        super_tokens.spread(weights, super_tokens.gather(weights, x, 2, 2)).sum().backward()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
