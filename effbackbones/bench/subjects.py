"""The call that is timed: a forward pass, or a training step, of a model or an operator with random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.bench.cases import Case, is_ours
from effbackbones.bench.operators import OPERATORS, PREFIX, Example


@dataclass
class Subject:
    """A case ready to be measured.

    Attributes:
        call: Does the work once; what it computes is dropped.
        parameters: Number of a model's parameters; 0 for an operator.
        weight_bytes: Bytes of a model's parameters and buffers, or of an operator's inputs.
    """

    call: Callable[[], None]
    parameters: int
    weight_bytes: int


def build(case: Case) -> Subject:
    """Build what a case measures.

    Inference is a forward pass in evaluation and inference mode. A training step is forward pass, loss and backward
    pass, without an optimizer: the gradients are dropped. The loss is that of the model where it has one of its own,
    else cross entropy; the sum of the mean squares of the maps for a dense backbone; the mean square of the output for
    an operator. Drop path and dropout are off.
    """
    return _operator(case) if case.is_operator else _model(case)


def _model(case: Case) -> Subject:
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    model = create(case).train(case.mode == "train").to(device=case.device, memory_format=layout)
    if case.fused:
        (model.model if case.dense else model).fuse()
    images_bchw = torch.randn(case.batch, 3, *case.size).to(device=case.device, memory_format=layout)
    forward: Any = torch.compile(model, dynamic=False) if case.compile else model
    if case.onnx:
        forward = _in_onnxruntime(case, model.model if case.dense else model)
    autocast = partial(torch.autocast, case.device, case.torch_dtype, enabled=case.dtype != "float32")

    def infer() -> None:
        with torch.inference_mode(), autocast():
            forward(images_bchw)

    target_b = torch.zeros(case.batch, dtype=torch.long, device=case.device)

    def train() -> None:
        with autocast():
            output = forward(images_bchw)
            loss = dense_loss(output) if case.dense else classification_loss(model, output, target_b)
        loss.backward()
        model.zero_grad()

    weights = [*model.parameters(), *model.buffers()]
    return Subject(
        train if case.mode == "train" else infer,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(weight.nbytes for weight in weights),
    )


def _in_onnxruntime(case: Case, model: Any) -> Any:
    from effbackbones.export import Deployable, export, open_onnx  # with all of training: for those who ask

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(Deployable(model, case.size, {"model": case.name}), "onnx", path, fuse=False)
        return open_onnx(path)


def create(case: Case) -> Any:
    """Return the model of a case, freshly initialised; one of a fixed image size is built for the case's."""
    kwargs: dict[str, Any] = {}
    if case.dense:
        kwargs["features_only"] = True
        if is_ours(case.name):
            kwargs["dense"] = True
    cfg = timm.get_pretrained_cfg(case.name)
    if cfg and cfg.fixed_input_size:
        kwargs["img_size"] = case.size
    return timm.create_model(case.name, **kwargs)


def classification_loss(model: Any, output: Any, target_b: Tensor) -> Tensor:
    """Return the loss of a classifier's output (B, K) in training, or of what its own `loss` takes."""
    if hasattr(model, "loss"):
        loss: Tensor = model.loss(output, target_b, F.cross_entropy)
        return loss
    return F.cross_entropy(output, target_b)


def dense_loss(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of the mean squares of maps."""
    return torch.stack([mean_square(x_bchw) for x_bchw in maps]).sum()


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of the squares, in float32."""
    return x.float().square().mean()


def _operator(case: Case) -> Subject:
    example = Example(case.batch, *case.size, case.torch_dtype, case.device, case.mode == "train")
    function = OPERATORS[case.name.removeprefix(PREFIX)](example)
    forward: Any = torch.compile(function, dynamic=False) if case.compile else function

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def train() -> None:
        mean_square(forward()).backward()
        for tensor in example.tensors:
            tensor.grad = None

    return Subject(train if example.train else infer, 0, sum(tensor.nbytes for tensor in example.tensors))
