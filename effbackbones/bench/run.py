"""A group of cases, measured side by side."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from effbackbones.bench.cases import Case, first_line
from effbackbones.bench.memory import peak_bytes
from effbackbones.bench.subjects import Subject, build
from effbackbones.bench.timing import (
    Spread,
    calls_per_sample,
    interleave,
    no_garbage_collection,
    paired_ratios,
    seconds_per_call,
    spread,
)
from effbackbones.layers import served_backends


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        warmup: Calls before the first sample, 1 at least; the first call and the one for memory are not counted.
        rounds: Rounds of two samples of each case; None for as many as take `seconds` for each case.
        seconds: As above.
    """

    warmup: int = 3
    rounds: int | None = None
    seconds: float = 2.0


@dataclass
class Result:
    """What came of a case.

    Attributes:
        case: The case.
        error: Why it could not be measured; empty where it could.
        parameters: Number of the model's parameters.
        weight_bytes: Bytes of the model's weights, or of the operator's inputs.
        peak_bytes: The most bytes that a call holds at one time besides those; None where torch does not allocate them.
        first_call: Seconds of the first call; compilation is part of it.
        calls: Calls of a sample.
        samples: Seconds of a call, mean over each sample, in order of time.
        attention: Attention backends that served eager calls.
        ratios: The case's time over that of the first of its group, round by round; empty for that one itself.
    """

    case: Case
    error: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    peak_bytes: int | None = 0
    first_call: float = 0.0
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def time(self) -> Spread:
        """Median and quartiles of the seconds of a call."""
        return spread(self.samples)

    @property
    def ratio(self) -> Spread:
        """Median and quartiles of the ratios."""
        return spread(self.ratios)

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return self.case.batch / self.time.median


def measure(group: Sequence[Case], effort: Effort) -> list[Result]:
    """Measure cases side by side in this process; return their results in the same order.

    A case that fails (memory runs out, say) has its error in its result, and the others are measured all the same.
    Each is built from the same seed; the state of the generators is restored.
    """
    results = [Result(case) for case in group]
    ready: list[tuple[Result, Callable[[], float]]] = []
    devices = [torch.cuda.current_device()] if group[0].device == "cuda" else []
    with torch.random.fork_rng(devices):
        if any(case.compile for case in group):
            torch.compiler.reset()  # a function that has been compiled for too many models is not compiled any more
        for result in results:
            torch.manual_seed(0)
            try:
                subject = _prepare(result, effort.warmup)
            except Exception as error:
                _fail(result, error)
            else:
                ready.append((result, partial(_sample, result, subject)))
        with no_garbage_collection():
            outcomes = interleave([sampler for _, sampler in ready], effort.rounds, effort.seconds)
    for (result, _), outcome in zip(ready, outcomes, strict=True):
        if isinstance(outcome, Exception):
            _fail(result, outcome)
        else:
            result.samples = outcome
    first, *others = results
    for other in others:
        if first.samples and other.samples:
            other.ratios = paired_ratios(first.samples, other.samples)
    return results


def _prepare(result: Result, warmup: int) -> Subject:
    """Build a case, make its first calls, and note what they show."""
    case = result.case
    with case.backends(), served_backends() as served:
        subject = build(case)
        result.parameters, result.weight_bytes = subject.parameters, subject.weight_bytes
        result.first_call = seconds_per_call(subject.call, 1, case.device)
        result.peak_bytes = None if case.onnx else peak_bytes(subject.call, case.device)
        result.calls = calls_per_sample(min(seconds_per_call(subject.call, 1, case.device) for _ in range(warmup)))
        result.attention = [] if case.onnx else sorted(served)  # the export was checked against an eager call
    return subject


def _sample(result: Result, subject: Subject) -> float:
    with result.case.backends():
        return seconds_per_call(subject.call, result.calls, result.case.device)


def _fail(result: Result, error: Exception) -> None:
    result.error = first_line(error)
    error.__traceback__ = None  # its frames keep their tensors
    gc.collect()
    if result.case.device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch compute on so many CPU threads within the block; None leaves it as it is."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
