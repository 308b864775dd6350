"""Operators that no library has: each a readable reference, a fast path in PyTorch and, for two, Triton kernels.

All give equal numbers. `EFFBACKBONES_OPS=auto|torch|reference` (read once, at import) and the context manager
`ops_backend` choose: `auto` takes the kernels on CUDA, where they work, else the fast path, as `torch` does everywhere.
"""

from effbackbones.layers.reference import ops_backend, use_reference
from effbackbones.ops.aggregated_attention import ResizedBias, aggregated_attention
from effbackbones.ops.super_tokens import sample_super_tokens, super_token_attention
from effbackbones.ops.token_merging import token_merging

__all__ = [
    "ResizedBias",
    "aggregated_attention",
    "ops_backend",
    "sample_super_tokens",
    "super_token_attention",
    "token_merging",
    "use_reference",
]
