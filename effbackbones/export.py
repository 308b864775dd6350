"""Models written for other runtimes: torch.export programs and ONNX files, of any batch, checked before they are kept.

The image size is fixed. Models are fused (:meth:`HierarchicalBackbone.fuse`) unless told otherwise.
"""

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from effbackbones.checkpoint import load_weights
from effbackbones.config import Recipe, check
from effbackbones.config.load import pretrained_normalisation
from effbackbones.config.schema import ModelConfig
from effbackbones.data.classes import imagenet_classes, what_classes_show
from effbackbones.files import replacing
from effbackbones.models._hierarchical import HierarchicalBackbone
from effbackbones.predict import Predictor
from effbackbones.train.run import load_target

TOLERANCE = 1e-4
"""Largest difference from eager execution that a file may have, as a share of the largest output."""

Size = tuple[int, int]


class ExportError(ValueError):
    """A model cannot be exported; the message says why, and what to do."""


@dataclass
class Deployable:
    """A model in evaluation mode, and what its users have to know.

    Attributes:
        model: Images (B, 3, H, W) to logits (B, K), or to four maps where it is dense.
        size: Rows and columns of the images.
        notes: What is stored beside it: how images are normalised, what the classes are called.
    """

    model: Any
    size: Size
    notes: dict[str, Any]

    @classmethod
    def from_run(cls, folder: str | Path, size: Size | None = None) -> "Deployable":
        """Open the best checkpoint of a run of classification; images are of its size unless told otherwise.

        Raises:
            ExportError: It is a run of another task.
            CheckpointError: The folder holds no run with a checkpoint, or the checkpoint cannot be read.
        """
        recipe = load_target(str(folder)).recipe
        if recipe.task != "classification":
            raise ExportError(f"{folder} is a run of {recipe.task}: `effb export mm {folder}` writes it for mm's tools")
        predictor = Predictor.from_run(folder)
        notes = {"mean": list(recipe.data.mean), "std": list(recipe.data.std), "classes": list(predictor.classes)}
        own = (recipe.data.size, recipe.data.size)
        return cls(predictor.model.eval(), size or own, {"model": recipe.model.name, **notes})

    @classmethod
    def from_model(
        cls, name: str, checkpoint: str | None = None, size: Size | None = None, dense: bool = False
    ) -> "Deployable":
        """Build a registered model for images of a size, its own unless told otherwise.

        Args:
            name: The model.
            checkpoint: ImageNet-1K weights, as :func:`~effbackbones.checkpoint.load_weights` takes them. Without, the
                weights are random ones.
            size: Rows and columns of the images.
            dense: The backbone of a dense task, which gives four maps.

        Raises:
            ExportError: There is no model of ours of that name.
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        for keys, problem in check(Recipe(model=ModelConfig(name=name))):
            if keys == ("model.name",):
                raise ExportError(problem)
        kwargs: Any = {"dense": True} if dense else {}
        if size:
            kwargs["img_size"] = size
        model: Any = timm.create_model(name, **kwargs)
        if not isinstance(model, HierarchicalBackbone):
            raise ExportError(f"{name} is no model of effbackbones: `effb ls models` lists those that can be exported")
        if checkpoint:
            load_weights(model, checkpoint, same_classes=not dense)
        cfg = timm.data.resolve_model_data_config(model) | pretrained_normalisation(name, str(checkpoint or ""))
        notes = {"model": name, "mean": list(cfg["mean"]), "std": list(cfg["std"])}
        if not dense:
            notes["classes"] = list(what_classes_show(imagenet_classes()))
        return cls(model.eval(), size or tuple(cfg["input_size"][1:]), notes)


class _Maps(nn.Module):
    """A dense model as a function of images alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.forward_intermediates(x, intermediates_only=True))


def missing_packages(form: str) -> str:
    """Return what a form of export, `torch` or `onnx`, lacks, and how to install it; empty where nothing is missing."""
    missing = [name for name in _PACKAGES[form] if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'effbackbones[export]'" if missing else ""


@torch.no_grad()
def export(source: Deployable, form: str, path: Path, fuse: bool = True) -> float:
    """Write a model as one file, and return how far its outputs are from those of eager execution.

    The file is read back and run on batches of one and three images before it takes its place at `path`.

    Args:
        source: The model; it is fused in place.
        form: `torch` for a program of torch.export, `onnx` for an ONNX file.
        path: The file.
        fuse: Fuse the model first.

    Returns:
        The largest difference, as a share of the largest output.

    Raises:
        ExportError: A package is missing, the model is not traced, or the outputs differ by more than `TOLERANCE`
            (only where the model is a continuous function, which one that ranks tokens is not).
    """
    if missing := missing_packages(form):
        raise ExportError(missing)
    model, names = source.model, ["logits"]
    expected = {batch: _outputs(model, _images(batch, source.size)) for batch in (1, 3)}
    if fuse:
        model.fuse()
    if model.dense:
        names = [f"map_{i}" for i in range(len(model.stages))]
    called = _Maps(model) if model.dense else model
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            try:
                program = torch.export.export(
                    called, (_images(2, source.size),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
                )
                run = _WRITERS[form](program, names, source.notes, part)
            except Exception as error:
                raise ExportError(f"{source.notes['model']} is not exported as {form}: {error}") from error
            differences = [_difference(run(_images(batch, source.size)), expected[batch]) for batch in expected]
        difference = max(differences)
        if not difference <= TOLERANCE and model.continuous:
            raise ExportError(
                f"{path} is not written: its outputs differ from eager ones by {difference:.1e} of the largest, more "
                f"than {TOLERANCE:.0e}"
            )
    return difference


Run = Callable[[Tensor], Sequence[Tensor]]


def _write_program(program: Any, names: Sequence[str], notes: dict[str, Any], path: Path) -> Run:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"effbackbones.json": json.dumps(notes)})
    with path.open("rb") as file:
        module: Any = torch.export.load(file).module()
    return lambda x_bchw: _listed(module(x_bchw))


def _write_onnx(program: Any, names: Sequence[str], notes: dict[str, Any], path: Path) -> Run:
    written: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=list(names)
    )
    written.model.metadata_props.update({key: json.dumps(value) for key, value in notes.items()})
    written.save(str(path))
    return open_onnx(path)


def open_onnx(path: Path) -> Run:
    """Return the model of an ONNX file as a function of images; it runs on the CPU, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads go on taking time after it
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x_bchw: [torch.from_numpy(y) for y in session.run(None, {"images": x_bchw.numpy()})]


_WRITERS: dict[str, Callable[[Any, Sequence[str], dict[str, Any], Path], Run]] = {
    "torch": _write_program,
    "onnx": _write_onnx,
}
_PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def _images(batch: int, size: Size) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def _outputs(model: Any, x_bchw: Tensor) -> Sequence[Tensor]:
    return _listed(_Maps(model)(x_bchw) if model.dense else model(x_bchw))


def _listed(output: Any) -> Sequence[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    shares = [((y - z).abs().max() / z.abs().max()).item() for y, z in zip(outputs, expected, strict=True)]
    return max(shares)
