"""Memory of calls whose allocations are known."""

import os

import pytest
import torch
from torch import nn

from effbackbones.bench import memory
from effbackbones.bench.memory import peak_bytes

MIB = 2**20


def floats(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB) // 4)


def test_peak_is_what_is_held_at_one_time() -> None:
    def call() -> None:
        a = floats(3)
        b = floats(4)
        del a
        c = floats(2)
        del b, c

    assert peak_bytes(call, "cpu") == 7 * MIB


def test_peak_counts_what_operators_allocate() -> None:
    x = floats(1)
    with torch.inference_mode():
        for function, mib in ((lambda: x.exp(), 1), (lambda: (x.exp() * 2).sum(), 2), (lambda: x.exp().exp_(), 1)):
            assert mib * MIB <= peak_bytes(function, "cpu") < mib * MIB + 1024


def test_peak_leaves_out_what_was_there_and_views() -> None:
    x = floats(5)
    assert peak_bytes(lambda: x.view(-1, 2).mT[0], "cpu") == 0
    assert peak_bytes(lambda: None, "cpu") == 0


def test_peak_of_training_has_activations_and_gradients() -> None:
    layer = nn.Linear(512, 512, bias=False)
    x = torch.ones(2048, 512)

    def train() -> None:
        layer(x).sigmoid().square().mean().backward()
        layer.zero_grad()

    def infer() -> None:
        with torch.inference_mode():
            layer(x).sigmoid_().square_().mean()

    activation = x.nbytes
    assert activation <= peak_bytes(infer, "cpu") < 1.1 * activation
    assert peak_bytes(train, "cpu") >= 2 * activation + layer.weight.nbytes


def test_peak_is_the_same_in_every_run() -> None:
    layer, x = nn.Conv2d(8, 16, 3), torch.ones(2, 8, 20, 20)
    peaks = {peak_bytes(lambda: layer(x).sum().backward(), "cpu") for _ in range(3) if layer.zero_grad() is None}
    assert len(peaks) == 1


def test_profiler_is_quiet_and_the_environment_as_before(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_bytes(lambda: None, "cpu")
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    peak_bytes(lambda: None, "cpu")
    assert os.environ["KINETO_LOG_LEVEL"] == "99"
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_peak_on_cuda_is_the_rise_of_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(memory.torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(memory.torch.cuda, "reset_peak_memory_stats", lambda: happened.append("reset"))
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(memory.torch.cuda, "max_memory_allocated", lambda: 170)
    assert peak_bytes(lambda: happened.append("call"), "cuda") == 70
    assert happened == ["wait", "reset", "call", "wait"]


@pytest.mark.gpu
def test_peak_on_cuda_of_a_known_allocation() -> None:
    def call() -> None:
        a = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        b = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        del a, b

    assert peak_bytes(call, "cuda") == 7 * MIB
