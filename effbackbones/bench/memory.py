"""How much memory a call takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """Return the most bytes that a call holds at one time of what it allocates itself.

    That is what comes on top of weights and inputs: activations, workspaces and, in training, gradients.
    On CUDA it is the rise of torch's max_memory_allocated. On CPU it is counted from the allocations and releases that
    torch's profiler records, one by one, so that it is exact and the same in every run; what a library allocates past
    torch's allocator (scratch memory of its threads, for one) is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    results: Any = trace.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler from complaining, on stderr, that a machine has no GPU."""
    key = "KINETO_LOG_LEVEL"
    before = os.environ.get(key)
    os.environ[key] = before or "5"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
