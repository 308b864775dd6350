"""Softmax over tiles of logits, that no tile has to outlive: what the kernels of attention share."""

import triton
import triton.language as tl


@triton.jit
def absorb(top, total, y, logits, v, PRECISION: tl.constexpr):
    """Take a tile of logits (queries, keys) and its values into a running softmax; return the three anew.

    They are the largest logit so far, the sum of the exponentials below it, and the values weighted by these.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    shrink, weights = tl.exp(top - higher), tl.exp(logits - higher[:, None])
    y = y * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), y


@triton.jit
def slopes_of(weights, v, grad, delta, PRECISION: tl.constexpr):
    """Return the gradients of a tile of logits: delta is the product of the output and its gradient."""
    return weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
