"""What command lines mean: groups of cases, and what cannot be measured."""

import contextlib

import pytest
import torch

from effbackbones.bench import BenchError, Case, cases, plan
from effbackbones.bench.operators import OPERATORS
from effbackbones.layers.attention import attend, last_backend
from effbackbones.ops import use_reference


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register an operator `toy`."""
    monkeypatch.setitem(OPERATORS, "toy", lambda example: lambda: example.randn(1))


def group(*versus: str, name: str = "uniformer_xxs", **settings: object) -> list[Case]:
    (cases_,) = plan([name], versus, device="cpu", **settings)  # type: ignore[arg-type]
    return cases_


# Groups


def test_group_for_each_name_and_configuration_in_order() -> None:
    groups = plan(
        ["uniformer_xxs", "resnet18"],
        modes=["inference", "train"],
        batches=[1, 8],
        sizes=[(64, 64), (64, 96)],
        dtypes=["float32", "bfloat16"],
        device="cpu",
    )
    found = [(case.name, case.size, case.mode, case.dtype, case.batch) for (case,) in groups]
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert found[0] == ("uniformer_xxs", (64, 64), "inference", "float32", 1)
    assert found[1] == ("uniformer_xxs", (64, 64), "inference", "float32", 8)
    assert found[16][0] == "resnet18"


def test_size_is_the_models_own_where_none_is_given() -> None:
    assert group()[0].size == (224, 224)
    assert group("resnet18", name="vit_tiny_patch16_384")[1].size == (384, 384)
    assert group(name="op:toy")[0].size == (224, 224)


def test_settings_alone_are_the_same_model_with_these() -> None:
    subject, plain, both = group("attention=plain", "attention=sdpa,ops=reference", batches=[4], dense=True)
    assert (subject.label, subject.attention, subject.ops) == ("uniformer_xxs", None, None)
    assert (plain.name, plain.attention, plain.ops, plain.batch, plain.dense) == (
        "uniformer_xxs",
        "plain",
        None,
        4,
        True,
    )
    assert (both.label, both.attention, both.ops) == ("attention=sdpa,ops=reference", "sdpa", "reference")


def test_settings_add_to_those_of_the_subject_but_a_name_begins_anew() -> None:
    subject, more, other = group("dtype=bfloat16", "resnet18", name="uniformer_xxs,attention=plain,compile=yes")
    assert (subject.attention, subject.compile) == ("plain", True)
    assert (more.attention, more.compile, more.dtype) == ("plain", True, "bfloat16")
    assert (other.name, other.attention, other.compile, other.dtype) == ("resnet18", None, False, "float32")


def test_settings_undo_those_of_the_command() -> None:
    eager, contiguous = group("compile=no", "channels_last=no", compile=True, channels_last=True)[1:]
    assert (eager.compile, eager.channels_last) == (False, True)
    assert (contiguous.compile, contiguous.channels_last) == (True, False)


def test_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(cases.torch.cuda, "is_available", lambda available=available: available)
        assert plan(["resnet18"])[0][0].device == device


# Backends


def test_backends_are_forced_within_the_block_and_restored() -> None:
    q = torch.ones(1, 1, 4, 4)
    attend(q, q, q)
    before = last_backend(), use_reference()
    with contextlib.suppress(KeyError), group("attention=plain,ops=reference")[1].backends():
        attend(q, q, q)
        assert (last_backend(), use_reference()) == ("plain", True)
        raise KeyError
    attend(q, q, q)
    assert (last_backend(), use_reference()) == before


# What cannot be measured

BAD = {
    "model_misspelt": ("uniformer_xss", "", "'uniformer_xss'", "nearest: uniformer_xs, uniformer_xxs"),
    "model_with_tag": ("resnet18.a1_in1k", "", "without a weights tag", "nearest: resnet18"),
    "operator_misspelt": ("op:tyo", "", "'op:tyo'", "op:toy"),
    "no_name": ("attention=plain", "", "'attention=plain'", "expected the name of a model"),
    "two_names": ("resnet18", "resnet18,resnet34", "two names, resnet18 and resnet34"),
    "no_such_setting": ("resnet18", "atention=plain", "atention is no setting", "attention, ops, dtype"),
    "no_such_attention": ("uniformer_xxs", "attention=fast", "'fast'", "auto, xformers, sdpa, triton, plain"),
    "no_such_ops": ("uniformer_xxs", "ops=slow", "'slow'", "auto, torch, reference"),
    "no_such_dtype": ("resnet18", "dtype=int8", "'int8' is no dtype", "float32, bfloat16, float16"),
    "neither_yes_nor_no": ("resnet18", "compile=maybe", "'maybe'", "expected yes or no"),
    "attention_of_timms_model": ("resnet18", "attention=plain", "resnet18 is no model of effbackbones"),
    "ops_of_timms_model": ("resnet18", "ops=reference", "resnet18 is no model of effbackbones"),
    "channels_last_operator": ("op:toy", "channels_last=yes", "op:toy is an operator"),
    "fused_model_of_timm": ("resnet18", "fused=yes", "resnet18 is no model of effbackbones: there is nothing to fuse"),
    "fused_operator": ("op:toy", "fused=yes", "op:toy is no model of effbackbones: there is nothing to fuse"),
    "onnx_of_timms_model": ("resnet18", "onnx=yes", "resnet18 is no model of effbackbones", "exports those alone"),
    "onnx_operator": ("op:toy", "onnx=yes", "op:toy is no model of effbackbones", "exports those alone"),
    "onnx_in_16_bits": ("uniformer_xxs", "onnx=yes,dtype=bfloat16", "for inference in float32", "not compiled"),
    "onnx_compiled": ("uniformer_xxs", "onnx=yes,compile=yes", "for inference in float32", "not compiled"),
    "xformers_on_cpu": ("uniformer_xxs", "attention=xformers", "cannot serve float32 on cpu", "CUDA devices only"),
    "xformers_compiled": ("uniformer_xxs", "attention=xformers,compile=yes", "under torch.compile", "sdpa or plain"),
}


def test_fused_training_is_refused() -> None:
    with pytest.raises(BenchError, match="fused=yes is for inference alone"):
        group("fused=yes", name="uniformer_xxs", modes=["inference", "train"])


def test_training_in_onnxruntime_is_refused() -> None:
    with pytest.raises(BenchError, match="onnx=yes is for inference in float32"):
        group("onnx=yes", name="uniformer_xxs", modes=["train"])


def test_onnx_without_its_packages_says_how_to_install_them(monkeypatch) -> None:
    monkeypatch.setattr("effbackbones.export.missing_packages", lambda form: f"{form}tools not installed")
    with pytest.raises(BenchError, match=r"^onnx=yes: onnxtools not installed$"):
        group("onnx=yes", name="uniformer_xxs")


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_one_message(case: str) -> None:
    name, other, *expected = BAD[case]
    with pytest.raises(BenchError) as error:
        group(*([other] if other else []), name=name)
    assert "\n" not in str(error.value)
    assert [part for part in expected if part not in str(error.value)] == []


def test_dense_operator_is_refused() -> None:
    with pytest.raises(BenchError, match="dense and channels_last are of models"):
        group(name="op:toy", dense=True)


def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="device cuda: torch finds no CUDA device"):
        plan(["resnet18"], device="cuda")


def test_dtype_that_the_device_cannot_compute_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.conv2d

    def conv2d(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("not implemented for 'Half'\nwith a second line")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(cases.torch, "conv2d", conv2d)
    assert group("dtype=bfloat16")[1].dtype == "bfloat16"
    with pytest.raises(BenchError, match=r"^dtype float16 does not work on cpu: RuntimeError: not .* 'Half'$"):
        group("dtype=float16")
