"""Interleaving, medians and ratios; no test depends on how long anything takes."""

import contextlib
import gc
import random
import statistics
from collections.abc import Callable
from itertools import count

import pytest

from effbackbones.bench import timing
from effbackbones.bench.timing import (
    MIN_ROUNDS,
    Spread,
    calls_per_sample,
    interleave,
    no_garbage_collection,
    order,
    paired_ratios,
    seconds_per_call,
    spread,
)


def test_order_of_two_variants() -> None:
    assert [order(2, i) for i in range(3)] == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize("variants", [1, 2, 3, 5])
def test_order_gives_every_variant_the_same_mean_position(variants: int) -> None:
    for round_ in range(2 * variants):
        taken = order(variants, round_)
        assert taken[0] == round_ % variants
        positions = [[i for i, variant in enumerate(taken) if variant == each] for each in range(variants)]
        assert all(len(each) == 2 and sum(each) == 2 * variants - 1 for each in positions)


def test_spread_of_known_values() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, lower=2.0, upper=4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_paired_ratios_are_of_the_sums_of_each_round() -> None:
    assert paired_ratios([1.0, 3.0, 2.0, 2.0], [4.0, 4.0, 1.0, 1.0]) == [2.0, 0.5]


@pytest.mark.parametrize("variants", [2, 3])
def test_steady_slowing_down_falls_out_of_the_ratios(variants: int) -> None:
    moment = count()
    samplers = [lambda cost=cost: cost * (100 + next(moment)) for cost in range(1, variants + 1)]
    first, *others = interleave(samplers, 6, 0)
    assert isinstance(first, list)
    for cost, other in enumerate(others, 2):
        assert isinstance(other, list)
        assert paired_ratios(first, other) == pytest.approx([cost] * 6)
    assert spread(first).median > 1.05 * first[0]


def test_rounds_that_are_slow_fall_out_of_the_median_of_the_ratios() -> None:
    rng = random.Random(0)
    speeds = [rng.choice([1.0, 1.0, 3.0]) for _ in range(100)]
    first, other = ([cost * speed for speed in speeds for _ in range(2)] for cost in (1.0, 1.1))
    assert spread(paired_ratios(first, other)) == pytest.approx((1.1, 1.1, 1.1))


def recorder(taken: list[str], name: str) -> Callable[[], float]:
    def sample() -> float:
        taken.append(name)
        return float(len(taken))

    return sample


def test_interleave_takes_the_order_and_keeps_samples_by_variant() -> None:
    taken: list[str] = []
    samples = interleave([recorder(taken, "a"), recorder(taken, "b")], 2, 0)
    assert "".join(taken) == "abbabaab"
    assert samples == [[1.0, 4.0, 6.0, 7.0], [2.0, 3.0, 5.0, 8.0]]


@pytest.mark.parametrize(
    ("call", "seconds", "rounds"),
    [(0.5, 0.0, MIN_ROUNDS), (0.5, 5.5, 6), (0.5, 8.0, 8), (10.0, 0.0, 2), (15.0, 1.0, 1), (15.0, 61.0, 3)],
)
def test_interleave_goes_on_until_each_variant_has_had_its_seconds(call: float, seconds: float, rounds: int) -> None:
    now = 0.0

    def sample() -> float:
        nonlocal now
        now += call
        return call

    samples = interleave([sample, sample], None, seconds, clock=lambda: now)
    assert samples == [[call] * 2 * rounds] * 2


def test_interleave_leaves_alone_what_fails_and_goes_on() -> None:
    taken: list[str] = []
    error = MemoryError("full")

    def fail() -> float:
        if taken.count("a") >= 3:
            raise error
        return 1.0

    samples, failure = interleave([recorder(taken, "a"), fail], 4, 0)
    assert isinstance(samples, list)
    assert len(samples) == 8
    assert failure is error
    assert error.__traceback__ is None


def test_interleave_ends_when_all_have_failed() -> None:
    def fail() -> float:
        raise MemoryError

    assert all(isinstance(each, MemoryError) for each in interleave([fail, fail], None, 1e9))


def test_seconds_per_call_is_a_mean_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 10.0 * len(made))
    assert seconds_per_call(lambda: made.append(1), 5, "cpu") == 10.0
    assert len(made) == 5


def test_seconds_per_call_waits_for_the_gpu_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: happened.append("wait"))
    assert seconds_per_call(lambda: happened.append("call"), 2, "cuda") > 0
    assert happened == ["wait", "call", "call", "wait"]


def test_calls_per_sample_fill_ten_milliseconds() -> None:
    assert [calls_per_sample(seconds) for seconds in (1.0, 0.01, 0.001, 1e-5)] == [1, 1, 10, 1000]
    assert calls_per_sample(0.0) > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was_afterwards(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(KeyError), no_garbage_collection():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_spread_agrees_with_the_statistics_module() -> None:
    values = [random.Random(1).random() for _ in range(101)]
    assert spread(values).median == statistics.median(values)
