"""How calls are timed and compared: interleaved samples, medians, ratios of neighbours in time."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

MIN_ROUNDS = 3
LONG = 60.0
"""Seconds of measuring after which fewer rounds will do: calls so long even out what disturbs them."""
MIN_SAMPLE = 0.01


class Spread(NamedTuple):
    """Median and quartiles of a number of values."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated between neighbours; all are the value itself where there is one."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def order(variants: int, round_: int) -> list[int]:
    """Return the order of a round: all variants forth and back, each round beginning one further on.

    Two variants: 0 1 1 0, 1 0 0 1, ... All have the same mean position in a round.
    """
    start = round_ % variants
    forth = [*range(start, variants), *range(start)]
    return forth + forth[::-1]


def paired_ratios(samples: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return one ratio for each round: the time of the other variant in that round over that of the first.

    Both samples of a round go into its ratio. As both variants have the same mean position in it, a machine that slows
    down steadily falls out of each ratio exactly, and one that is slow for some rounds falls out nearly, which a ratio
    of two medians over the whole run does not give. The median of these ratios is what is reported.

    samples, others: two for each round, in order of time; ratios above 1 say that the first variant is the faster.
    """
    rounds = range(0, len(samples), 2)
    return [(others[i] + others[i + 1]) / (samples[i] + samples[i + 1]) for i in rounds]


def seconds_per_call(call: Callable[[], None], calls: int, device: str) -> float:
    """Return the mean wall-clock time of `calls` calls, from an idle device to an idle one."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def calls_per_sample(seconds: float) -> int:
    """Return how many calls of that length make up a sample of 10 ms, which the clock and a GPU's start do not blur."""
    return max(1, round(MIN_SAMPLE / max(seconds, 1e-9)))


def interleave(
    samplers: Sequence[Callable[[], float]],
    rounds: int | None,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float] | Exception]:
    """Take samples of each variant in turn, and return them by variant, in order of time.

    One that raises is left alone from then on; its exception stands in the place of its samples.

    Args:
        samplers: One for each variant; takes a sample.
        rounds: Rounds to take, of two samples of each variant; None for as many as take `seconds` for each variant,
            at least three, or one and those begun in the first minute.
        seconds: As above.
        clock: Seconds that pass.
    """
    taken: list[list[float] | Exception] = [[] for _ in samplers]
    begin, done = clock(), 0

    def wanted() -> bool:
        if all(isinstance(samples, Exception) for samples in taken):
            return False
        if rounds or not done:
            return done < (rounds or 1)
        spent = clock() - begin
        return spent < seconds * len(samplers) or (done < MIN_ROUNDS and spent < LONG)

    while wanted():
        for i in order(len(samplers), done):
            samples = taken[i]
            if isinstance(samples, Exception):
                continue
            try:
                samples.append(samplers[i]())
            except Exception as error:
                taken[i] = error.with_traceback(None)  # whose frames would keep their tensors
        done += 1
    return taken


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage first, and then not within the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def synchronize(device: str) -> None:
    """Wait until a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
