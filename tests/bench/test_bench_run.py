"""Cases, measured side by side: what is called, what is restored, what becomes of failures."""

import gc
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbackbones.bench import Case, Effort, Example, measure, plan, subjects, threads
from effbackbones.bench.operators import OPERATORS
from effbackbones.bench.subjects import build, create
from effbackbones.bench.timing import paired_ratios
from effbackbones.layers import attend, served_backends
from effbackbones.models._hierarchical import HierarchicalBackbone
from effbackbones.ops import use_reference

ONCE = Effort(warmup=1, rounds=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register an operator `toy`, an attention, and return the list in which it notes its path at each call."""
    noted: list[str] = []

    def build(example: Example) -> Callable[[], Tensor]:
        x = example.randn(example.batch, 2, example.height // 4, 8)

        def call() -> Tensor:
            noted.append("reference" if use_reference() else "auto")
            return attend(x, x, x)

        return call

    monkeypatch.setitem(OPERATORS, "toy", build)
    return noted


def cases_of(name: str, *versus: str, **settings: Any) -> list[Case]:
    (group,) = plan([name], versus, device="cpu", **{"sizes": [(32, 32)], **settings})
    return group


# Measuring


def test_samples_are_interleaved_each_under_its_own_backends(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbackbones.bench.run.calls_per_sample", lambda seconds: 2)
    fast, reference = measure(cases_of("op:toy", "ops=reference"), Effort(warmup=2, rounds=2))
    prepare = 1 + 1 + 2  # first call, memory, warm-up
    assert calls[: 2 * prepare] == ["auto"] * prepare + ["reference"] * prepare
    paths = {"a": "auto", "r": "reference"}
    assert calls[2 * prepare :] == [paths[letter] for letter in "arraraar" for _ in range(2)]
    assert fast.calls == reference.calls == 2


def test_results_follow_from_the_samples(calls: list[str]) -> None:
    first, other = measure(cases_of("op:toy", "op:toy", batches=[3]), Effort(warmup=1, rounds=4))
    for result in (first, other):
        assert len(result.samples) == 8
        assert min(result.samples) > 0
        assert result.first_call > 0
        assert result.images_per_second == 3 / result.time.median
        assert result.peak_bytes >= 3 * 2 * 8 * 8 * 4  # the output
        assert not result.error
    assert (first.ratios, other.ratios) == ([], paired_ratios(first.samples, other.samples))


def test_attention_that_served_is_noted(calls: list[str]) -> None:
    results = measure(cases_of("op:toy", "attention=plain", "attention=auto"), ONCE)
    assert [result.attention for result in results] == [["sdpa"], ["plain"], ["sdpa"]]
    assert measure(cases_of("resnet18"), ONCE)[0].attention == []


def test_served_backends_collects_within_the_block_alone() -> None:
    q = torch.ones(1, 1, 4, 4)
    with served_backends() as outer:
        with served_backends() as inner:
            attend(q, q, q)
        assert (inner, outer) == ({"sdpa"}, set())


def test_training_of_a_model_is_measured() -> None:
    ours, plain = measure(cases_of("uniformer_xxs", "attention=plain", modes=["train"], batches=[2]), ONCE)
    assert ours.parameters == sum(p.numel() for p in timm.create_model("uniformer_xxs").parameters())
    assert ours.weight_bytes > 4 * ours.parameters  # there are buffers
    assert ours.peak_bytes > 4 * ours.parameters  # gradients are part of it
    assert (plain.parameters, plain.attention) == (ours.parameters, ["plain"])
    assert all(len(result.samples) == 2 and not result.error for result in (ours, plain))


# Failures


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Register an operator `bad` that runs out of memory from its `call`-th call on."""
    made = iter(range(10**6))

    def run() -> Tensor:
        if next(made) >= call:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return torch.ones(1)

    monkeypatch.setitem(OPERATORS, "bad", lambda example: run)


@pytest.mark.parametrize("call", [0, 1, 2, 3], ids=["first call", "memory", "warm-up", "samples"])
def test_case_that_fails_is_noted_and_the_others_go_on(
    call: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, call)
    first, bad, last = measure(cases_of("op:toy", "op:bad", "ops=reference"), ONCE)
    assert (bad.error, bad.samples, bad.ratios) == ("OutOfMemoryError: CUDA out of memory.", [], [])
    assert [len(first.samples), len(last.samples), len(last.ratios)] == [2, 2, 1]


def test_subject_that_fails_leaves_the_others_without_a_ratio(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 0)
    bad, other = measure(cases_of("op:bad", "op:toy"), ONCE)
    assert bad.error
    assert (len(other.samples), other.ratios) == (2, [])


def test_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 0)
    assert all(result.error for result in measure(cases_of("op:bad", "op:bad"), ONCE))


def test_interruption_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setitem(OPERATORS, "bad", lambda example: interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(cases_of("op:bad"), ONCE)


# What is restored


def state() -> list[object]:
    q = torch.ones(1, 1, 4, 4)
    with served_backends() as served:
        attend(q, q, q)
    autocast = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return [torch.get_num_threads(), torch.get_rng_state().sum(), served, use_reference(), gc.isenabled(), autocast]


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_measuring_leaves_the_process_as_it_was(mode: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 3)
    torch.manual_seed(5)
    before = state()
    with threads(2):
        assert torch.get_num_threads() == 2
        measure(cases_of("op:toy", "attention=plain,ops=reference", "op:bad", modes=[mode], dtypes=["bfloat16"]), ONCE)
    assert state() == before


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        raise KeyError
    with threads(None):
        assert torch.get_num_threads() == before


# The call that is timed


class Spy(nn.Module):
    """A model of one convolution that notes under which circumstances it is called."""

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.kwargs = kwargs
        self.conv = nn.Conv2d(3, 4, 4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        self.seen = {
            "training": self.training,
            "inference": torch.is_inference_mode_enabled(),
            "shape": tuple(x.shape),
            "x": x.dtype,
            "y": y.dtype,
            "last": x.is_contiguous(memory_format=torch.channels_last),
            "weight_last": self.conv.weight.is_contiguous(memory_format=torch.channels_last),
        }
        return [y, y * 2] if self.kwargs.get("features_only") else y.mean((2, 3))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spy]:
    """Return what builds a case's call around a spy, makes it once, and returns the spy."""

    def run(name: str = "resnet18", **settings: Any) -> Spy:
        (case,) = cases_of(name, **settings)
        made: list[Spy] = []
        monkeypatch.setattr(subjects.timm, "create_model", lambda name, **kwargs: made.append(Spy(**kwargs)) or made[0])
        build(case).call()
        return made[0]

    return run


def test_inference_is_in_evaluation_and_inference_mode(spy: Callable[..., Spy]) -> None:
    seen = spy(batches=[2], sizes=[(32, 64)]).seen
    assert seen == {
        "training": False,
        "inference": True,
        "shape": (2, 3, 32, 64),
        "x": torch.float32,
        "y": torch.float32,
        "last": False,
        "weight_last": False,
    }


def test_training_step_is_in_training_mode_and_drops_its_gradients(spy: Callable[..., Spy]) -> None:
    gradients: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spy, "zero_grad", lambda self: gradients.extend(p.grad for p in self.parameters()))
        model = spy(modes=["train"])
    assert (model.seen["training"], model.seen["inference"]) == (True, False)
    assert len(gradients) == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert all(p.grad is None for p in spy(modes=["train"]).parameters())


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_16_bits_are_those_of_autocast(mode: str, spy: Callable[..., Spy]) -> None:
    seen = spy(modes=[mode], dtypes=["bfloat16"]).seen
    assert (seen["x"], seen["y"]) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dense", [False, True])
def test_fused_model_is_measured(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    monkeypatch.setattr(HierarchicalBackbone, "fuse", lambda self: fused.append(self))
    plain, other = plan(["uniformer_xxs"], ["fused=yes"], sizes=[(32, 32)], dense=dense)[0]
    build(plain).call()
    assert fused == []
    build(other).call()
    assert [type(model).__name__ for model in fused] == ["UniFormerLight"]


@pytest.mark.parametrize("dense", [False, True])
def test_model_runs_in_onnxruntime(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda self, *args: ran.append(len(out := run(self, *args))) or out
    )
    eager, other = measure(plan(["s2aformer_mini"], ["onnx=yes,fused=yes"], sizes=[(32, 32)], dense=dense)[0], ONCE)
    assert (other.error, other.peak_bytes, other.attention) == ("", None, [])
    assert eager.peak_bytes
    assert other.ratios
    assert set(ran) == {4 if dense else 1}


def test_channels_last_is_of_weights_and_images(spy: Callable[..., Spy]) -> None:
    seen = spy(channels_last=True).seen
    assert (seen["last"], seen["weight_last"]) == (True, True)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_compiled_is_what_is_called(mode: str, spy: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile(model: nn.Module, dynamic: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: compiled.append(model) or model(x)  # type: ignore[func-returns-value]

    monkeypatch.setattr(subjects.torch, "compile", compile)
    assert compiled == [spy(modes=[mode], compile=True)]
    spy(modes=[mode])
    assert len(compiled) == 1


def test_loss_of_a_model_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases_of("uniformer_xxs", modes=["train"], batches=[2])
    losses: list[Any] = []
    model: Any = timm.create_model("uniformer_xxs")
    monkeypatch.setattr(subjects.timm, "create_model", lambda name, **kwargs: model)
    real = model.loss
    monkeypatch.setattr(type(model), "loss", lambda self, *args: losses.append(args) or real(*args))
    build(case).call()
    (((pooled, token), target_b, criterion),) = losses
    assert pooled.shape == token.shape == (2, 1000)
    assert (target_b.shape, criterion) == ((2,), F.cross_entropy)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_dense_model_is_a_backbone(mode: str, spy: Callable[..., Spy]) -> None:
    assert spy(modes=[mode], dense=True).kwargs == {"features_only": True}
    assert spy("uniformer_small", modes=[mode], dense=True).kwargs == {"features_only": True, "dense": True}


def test_dense_model_gives_four_maps() -> None:
    model = create(cases_of("uniformer_xxs", dense=True)[0])
    assert len(model(torch.ones(1, 3, 32, 32))) == 4
    build(cases_of("uniformer_xxs", dense=True, modes=["train"])[0]).call()


def test_dense_loss_is_the_sum_of_the_mean_squares() -> None:
    maps = [torch.full((1, 2, 4, 4), 2.0), torch.full((1, 4, 2, 2), 3.0, dtype=torch.bfloat16)]
    loss = subjects.dense_loss(maps)
    assert (loss, loss.dtype) == (13.0, torch.float32)


def test_model_of_a_fixed_image_size_is_built_for_it() -> None:
    (case,) = cases_of("vit_tiny_patch16_224", sizes=[(48, 64)])
    assert create(case).patch_embed.img_size == (48, 64)
    build(case).call()


# Operators


def test_operator_gets_its_example(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Example] = []

    def example_of(example: Example) -> Callable[[], Tensor]:
        seen.append(example)
        x, y = example.randn(example.batch, 3), example.randn(3)
        return lambda: x * y

    monkeypatch.setitem(OPERATORS, "product", example_of)
    for mode in ("inference", "train"):
        (case,) = cases_of("op:product", modes=[mode], batches=[5], sizes=[(32, 64)], dtypes=["bfloat16"])
        subject = build(case)
        subject.call()
        example = seen.pop()
        assert (example.height, example.width, example.device) == (32, 64, "cpu")
        assert [tuple(tensor.shape) for tensor in example.tensors] == [(5, 3), (3,)]
        assert all(tensor.dtype == torch.bfloat16 and tensor.grad is None for tensor in example.tensors)
        assert all(tensor.requires_grad == (mode == "train") for tensor in example.tensors)
        assert (subject.parameters, subject.weight_bytes) == (0, 2 * 18)


def test_operator_in_training_computes_the_gradients_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []

    def example_of(example: Example) -> Callable[[], Tensor]:
        x = example.randn(4)
        x.register_hook(gradients.append)
        return lambda: 2 * x

    monkeypatch.setitem(OPERATORS, "double", example_of)
    build(cases_of("op:double", modes=["train"])[0]).call()
    assert gradients[0].shape == (4,)
    assert gradients[0].abs().min() > 0
