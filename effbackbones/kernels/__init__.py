"""Triton kernels, for CUDA, of the operators that no library has a kernel for.

Each module is imported where it is used: Triton need not be installed. Kernels compute in float32 whatever they are
given, and take rows of 16, 32, 64 or more numbers, the powers of two, of which what is beyond the tensor is masked.
"""

import functools
import logging
from importlib import import_module

import torch

_log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
@functools.cache
def problem(name: str, device: torch.device) -> str:
    """Return why a module of kernels does not work on a device; empty where it does.

    Triton has to be there, and a small call of the module's `trial` to succeed; what fails is logged, once.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            import_module(f"{__name__}.{name}").trial(device)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        _log.warning("the Triton kernels of %s are off on %s: %s", name, device, found)
        return found
    return ""
