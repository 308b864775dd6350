"""What is measured: one model or operator, one configuration; and the groups of them that are compared."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import timm
import torch

from effbackbones.bench.operators import OPERATORS, PREFIX
from effbackbones.layers import attention_backend, why_not
from effbackbones.ops import ops_backend

DTYPES = ("float32", "bfloat16", "float16")


class BenchError(ValueError):
    """What was asked for cannot be measured; the message says why."""


@dataclass(frozen=True)
class Case:
    """One model or operator in one configuration.

    Attributes:
        label: The case as the user wrote it.
        name: Name of a model in timm's registry, or `op:` and that of an operator.
        mode: `inference` or `train`.
        batch: Images of a call.
        size: Height and width of the images in pixels.
        dtype: Name of the dtype; a 16-bit one is that of autocast, the weights of a model stay float32.
        device: `cpu` or `cuda`.
        channels_last: Whether weights and images are stored channels last.
        compile: Whether it goes through torch.compile.
        fused: Whether the model is fused for inference.
        onnx: Whether onnxruntime runs it, on the CPU and as many threads as torch.
        dense: Whether the model is the backbone of a dense task: feature maps out, no classifier.
        attention: Attention backend to force; None leaves it as the process has it.
        ops: Path of the operators to force; None leaves it as the process has it.
    """

    label: str
    name: str
    mode: str
    batch: int
    size: tuple[int, int]
    dtype: str
    device: str
    channels_last: bool
    compile: bool
    dense: bool
    attention: str | None = None
    ops: str | None = None
    fused: bool = False
    onnx: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def is_operator(self) -> bool:
        """Whether it is an operator, not a model."""
        return self.name.startswith(PREFIX)

    @contextmanager
    def backends(self) -> Iterator[None]:
        """Force the case's attention backend and operators within the block."""
        with ExitStack() as stack:
            if self.attention is not None:
                stack.enter_context(attention_backend(self.attention))
            if self.ops is not None:
                stack.enter_context(ops_backend(self.ops))
            yield


def plan(
    names: Sequence[str],
    versus: Sequence[str] = (),
    *,
    modes: Sequence[str] = ("inference",),
    batches: Sequence[int] = (1,),
    sizes: Sequence[tuple[int, int]] = (),
    dtypes: Sequence[str] = ("float32",),
    device: str | None = None,
    channels_last: bool = False,
    compile: bool = False,
    dense: bool = False,
) -> list[list[Case]]:
    """Return the groups to measure: for each name and configuration the case itself, then each of `versus`.

    Args:
        names: Models or operators. Each may have settings: `uniformer_small,attention=plain`.
        versus: What each is compared with, in the same notation. Without a name it is the same model or operator with
            other settings; with one, another of the command's settings, at the same images.
        modes, batches, sizes, dtypes: A group for each combination. Without sizes, a model has its own.
        device: `cpu` or `cuda`; None for cuda where there is one.
        channels_last, compile, dense: As in :class:`Case`, of all groups.

    Raises:
        BenchError: Something cannot be measured: an unknown name or setting, a device that is not there, a dtype or a
            backend that does not work on it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError("device cuda: torch finds no CUDA device here; `effb doctor` lists what there is")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    groups = []
    for name in names:
        template = Case(name, "", modes[0], 1, (224, 224), "float32", device, channels_last, compile, dense)
        subject = _variant(name, template, template)
        if not subject.name:
            raise BenchError(f"{name!r}: expected the name of a model, or {PREFIX} and that of an operator")
        for size, mode, dtype, batch in product(sizes or [_own_size(subject.name)], modes, dtypes, batches):
            common = replace(template, mode=mode, batch=batch, size=size, dtype=dtype)
            case = _variant(name, common, common)
            groups.append([case, *(_variant(other, common, case) for other in versus)])
    for group in groups:
        for case in group:
            _check(case)
    return groups


def _variant(text: str, common: Case, subject: Case) -> Case:
    """Return the case that `text` names: of the common settings, or without a name, `subject` with other settings."""
    settings: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals and "name" in settings:
            raise BenchError(f"{text!r}: two names, {settings['name']} and {key}; separate them by a space")
        if not equals:
            _check_name(key)
            settings["name"] = key
        elif key in _SETTINGS:
            settings[key] = _SETTINGS[key](text, value)
        else:
            raise BenchError(f"{text!r}: {key} is no setting; expected one of {', '.join(_SETTINGS)}")
    return replace(common if "name" in settings else subject, label=text, **settings)


def _check_name(name: str) -> None:
    if name.startswith(PREFIX):
        if name.removeprefix(PREFIX) not in OPERATORS:
            raise BenchError(f"{name!r}: no such operator; there are: {', '.join(map(PREFIX.__add__, OPERATORS))}")
    elif not timm.is_model(name) or "." in name:
        names = difflib.get_close_matches(name, map(str, timm.list_models()), n=3)
        nearest = f"; nearest: {', '.join(names)}" if names else ""
        raise BenchError(f"{name!r}: expected a registered model, without a weights tag{nearest}")


def _attention(text: str, value: str) -> str:
    try:
        with attention_backend(value):
            return value
    except ValueError as error:
        raise BenchError(f"{text!r}: {error}") from None


def _ops(text: str, value: str) -> str:
    try:
        with ops_backend(value):
            return value
    except ValueError as error:
        raise BenchError(f"{text!r}: {error}") from None


def _dtype(text: str, value: str) -> str:
    if value not in DTYPES:
        raise BenchError(f"{text!r}: {value!r} is no dtype; expected one of {', '.join(DTYPES)}")
    return value


def _yes_or_no(text: str, value: str) -> bool:
    if value not in ("yes", "no"):
        raise BenchError(f"{text!r}: {value!r}; expected yes or no")
    return value == "yes"


_SETTINGS = {
    "attention": _attention,
    "ops": _ops,
    "dtype": _dtype,
    "compile": _yes_or_no,
    "fused": _yes_or_no,
    "onnx": _yes_or_no,
    "channels_last": _yes_or_no,
}


def is_ours(name: str) -> bool:
    """Return whether a registered model is one of effbackbones."""
    return str(timm.model_entrypoint(name).__module__).startswith("effbackbones.")


def _own_size(name: str) -> tuple[int, int]:
    cfg = None if name.startswith(PREFIX) else timm.get_pretrained_cfg(name)
    _, height, width = cfg.input_size if cfg else (3, 224, 224)
    return height, width


def _check(case: Case) -> None:
    """Raise BenchError where it is plain before anything is built that the case cannot be measured."""
    if case.is_operator and (case.dense or case.channels_last):
        raise BenchError(f"{case.name} is an operator: dense and channels_last are of models")
    if not case.is_operator and not is_ours(case.name) and (case.attention or case.ops):
        raise BenchError(f"{case.name} is no model of effbackbones: attention and ops do not reach it")
    if case.fused and (case.is_operator or not is_ours(case.name)):
        raise BenchError(f"{case.name} is no model of effbackbones: there is nothing to fuse")
    if case.fused and case.mode == "train":
        raise BenchError("fused=yes is for inference alone: leave out --mode train")
    if case.onnx:
        _check_onnx(case)
    if problem := _dtype_problem(case.device, case.torch_dtype):
        raise BenchError(f"dtype {case.dtype} does not work on {case.device}: {problem}")
    if case.attention in ("xformers", "triton"):
        q = torch.zeros(1, 1, 64, 64, dtype=case.torch_dtype, device=case.device)
        if case.compile:
            raise BenchError(f"attention={case.attention}: under torch.compile attention is sdpa or plain")
        if reasons := why_not(case.attention, q, q, q, q if case.attention == "triton" else None):
            found = "; ".join(reasons)
            raise BenchError(f"attention={case.attention} cannot serve {case.dtype} on {case.device}: {found}")


def _check_onnx(case: Case) -> None:
    if case.is_operator or not is_ours(case.name):
        raise BenchError(f"{case.name} is no model of effbackbones: onnx=yes exports those alone")
    if (case.mode, case.dtype, case.device, case.compile) != ("inference", "float32", "cpu", False):
        raise BenchError("onnx=yes is for inference in float32 on the CPU, not compiled")
    from effbackbones.export import missing_packages  # with all of training: for those who ask

    if missing := missing_packages("onnx"):
        raise BenchError(f"onnx=yes: {missing}")


def _dtype_problem(device: str, dtype: torch.dtype) -> str:
    """Return the error of a small step of training in that dtype; empty where it works."""
    if dtype == torch.float32:
        return ""
    weight, x_bchw = torch.ones(8, 8, 3, 3, device=device, requires_grad=True), torch.ones(1, 8, 4, 4, device=device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, dtype):
            x_bchw = torch.conv2d(x_bchw, weight, padding=1)
            (x_bchw @ x_bchw.mT).float().sum().backward()
    except Exception as error:
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
