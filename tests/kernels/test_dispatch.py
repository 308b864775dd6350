"""When operators and attention take the kernels, and that they give the same by them."""

import logging
import sys

import pytest
import torch
from kernel_device import DEVICE

from effbackbones import kernels
from effbackbones.bench import Example
from effbackbones.bench.operators import OPERATORS
from effbackbones.kernels import problem, window_attention
from effbackbones.layers import attend, attention, attention_backend, last_backend, ops_backend, reference
from effbackbones.layers.reference import use_kernels


@pytest.mark.parametrize("name", ["aggregated_attention", "super_token_attention"])
def test_operator_gives_the_same_by_kernels(name, monkeypatch):
    example = Example(1, 52, 68, torch.float32, DEVICE.type, True)
    torch.manual_seed(0)
    call, found = OPERATORS[name](example), []
    for taken in (False, True):
        for module in ("aggregated_attention", "super_tokens"):
            monkeypatch.setattr(sys.modules[f"effbackbones.ops.{module}"], "use_kernels", lambda *_, taken=taken: taken)
        output = call()
        found.append([output, *torch.autograd.grad(output.square().mean(), example.tensors)])
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).abs().max() < 5e-5 * expected.abs().max()


def test_float64_takes_no_kernel(monkeypatch):
    for module in ("aggregated_attention", "super_tokens"):
        monkeypatch.setattr(sys.modules[f"effbackbones.ops.{module}"], "use_kernels", lambda *_: pytest.fail("taken"))
    for name in ("aggregated_attention", "super_token_attention"):
        assert OPERATORS[name](Example(1, 32, 32, torch.float64, DEVICE.type, False))().isfinite().all()


def test_kernels_are_taken_on_a_gpu_alone_where_they_work_and_nothing_else_is_forced(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(reference, "problem", lambda name, device: "" if name == "works" else "no")
    assert use_kernels("works", cuda)
    assert not use_kernels("fails", cuda)
    assert not use_kernels("works", torch.device("cpu"))
    for name in ("torch", "reference"):
        with ops_backend(name):
            assert not use_kernels("works", cuda)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not use_kernels("works", cuda)


@pytest.mark.parametrize("name", ["aggregated_attention", "super_tokens", "window_attention"])
def test_kernels_that_work_have_no_problem(name):
    problem.cache_clear()
    assert problem(name, DEVICE) == ""


def test_kernels_that_fail_are_logged_once(monkeypatch, caplog):
    def fail(device: torch.device) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(window_attention, "trial", fail)
    device = torch.device("cpu", 7)  # not asked for before
    with caplog.at_level(logging.WARNING, kernels.__name__):
        assert [problem("window_attention", device) for _ in range(2)] == ["RuntimeError: no compiler"] * 2
    assert [record.message for record in caplog.records] == [
        "the Triton kernels of window_attention are off on cpu:7: RuntimeError: no compiler"
    ]


def test_attention_serves_a_shared_bias_by_the_kernels_where_they_are_forced(monkeypatch):
    monkeypatch.setattr(attention, "_why_not_triton", lambda *_: [])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 9, 8, generator=generator).to(DEVICE).requires_grad_() for _ in range(3))
    for shape in ((1, 2, 9, 9), (2, 9, 9), (2, 1, 9)):
        bias = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
        found = []
        for name in ("triton", "plain"):
            with attention_backend(name):
                y = attend(q, k, v, bias)
            assert last_backend() == name
            found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias))])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_forced_kernels_refuse_what_they_cannot_serve():
    q = torch.ones(2, 1, 4, 300)
    with attention_backend("triton"), pytest.raises(RuntimeError) as error:
        attend(q, q, q, torch.ones(2, 1, 4, 4), dropout_p=0.5)
    for reason in ("a bias that the batch shares", "head dims 300", "dropout 0.5", "on cpu: triton serves CUDA"):
        assert reason in str(error.value)
