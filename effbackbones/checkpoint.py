"""The only place that reads or writes weights.

Everything is read with `weights_only=True` (or from safetensors): nothing in a weight file can run code. Everything is
written to a temporary file beside its place, flushed to the disk and renamed: a reader finds the old file or the new
one, never a half.
"""

import argparse
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import load_pretrained
from torch import Tensor

from effbackbones.files import replacing

_logger = logging.getLogger(__name__)

KeyMap = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]


HUB = "timm::"
"""In front of the name of weights that timm fetches from its hub, such as timm::resnet50.a1_in1k."""


LORA_SCALING = "lora_scaling"
"""Entry of a checkpoint with adapters of LoRA: the factor on their product."""


class CheckpointError(ValueError):
    """A weight file cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class Loaded:
    """What a model took of a checkpoint.

    Attributes:
        source: The file, or the name of the hub.
        tensors: How many tensors were taken.
        fresh: Tensors of the model that keep their initial values.
        left_out: Tensors of the checkpoint that the model has no place for.
    """

    source: str
    tensors: int
    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        fresh = _layers(self.fresh)
        layers = {"fresh": fresh, "left out": [name for name in _layers(self.left_out) if name not in fresh]}
        parts = [
            f"{self.tensors} tensors loaded",
            *(f"{what}: {_listed(names)}" for what, names in layers.items() if names),
        ]
        return f"Started from {self.source}: {'; '.join(parts)}"


def _layers(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(f"{key.rpartition('.')[0]}.*" for key in keys))


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join([*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])])


class _LeftOut:
    """Stands for an object beside the weights that is not made: it takes whatever its file gives, and drops it."""

    def __new__(cls, *args: Any) -> "_LeftOut":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Curves that mm's runner keeps in its checkpoints, and what they consist of.
_LEFT_OUT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # names the methods of a HistoryBuffer
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return what the weight file `path` holds: a mapping of names to tensors or of a training tool's entries.

    Of NumPy's arrays and the logs of mm's runner, which may lie beside the weights, only their places are kept.

    A safetensors file has no checksums: damage within its numbers goes unnoticed.

    Raises:
        CheckpointError: The file is missing, damaged, or holds objects other than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a weight file or a run folder")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_sums(path)
        # timm's and the official training scripts keep their arguments beside the weights, mm's runner its logs.
        with torch.serialization.safe_globals([argparse.Namespace, *((_LeftOut, name) for name in _LEFT_OUT)]):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the readers
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: holds {foreign[1]}, which is neither weights nor a plain type, and is not read, as it could "
                "run code. Save the state dict alone where the file comes from."
            ) from error
        reason = re.split(r"\.\s", f"{type(error).__name__}: {error}", maxsplit=1)[0]
        raise CheckpointError(f"{path}: not a weight file, or a damaged or incomplete one: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a mapping of names to tensors")
    return dict(content)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint to `path`; the file that was there stays until the new one is complete.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # which torch's own error says nothing of
                raise error.__context__ from None
            raise


def _check_sums(path: Path) -> None:
    """Raise an error where the checksums in a file of torch.save, which torch.load ignores, do not hold."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PK\x03\x04":
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not have its checksum")
    elif magic[:1] != b"\x80":  # before torch 1.6, a bare pickle
        raise ValueError(f"starts with {magic!r}")


def strip_wrappers(checkpoint: Mapping[str, Any], ema: bool = False, official_ema: bool = False) -> dict[str, Tensor]:
    """Return the backbone's weights in a checkpoint without what training tools put around them.

    Known: an entry `state_dict` or `model` (with `ema`, first `state_dict_ema` or `model_ema`; with `official_ema`
    these too, where there are any), the prefixes of DDP and torch.compile, our own training checkpoints, and the
    `backbone.` of mm detectors and segmentors (neck and heads are left out), our EffBackbone's `model.` below it too.

    Raises:
        CheckpointError: There are no weights, no averaged ones where `ema` asks for them, or something else among them.
    """
    averaged, raw = (
        [checkpoint[key] for key in keys if isinstance(checkpoint.get(key), Mapping)]
        for keys in (("state_dict_ema", "model_ema"), ("state_dict", "model"))
    )
    candidates = [*(averaged if ema or official_ema else ()), *raw, checkpoint]
    weights = {str(key): value for key, value in candidates[0].items()}
    for prefix in ("module.", "_orig_mod.", "module."):
        if weights and all(key.startswith(prefix) for key in weights):
            weights = _below(prefix, weights)
    if ema and not averaged:
        weights = _below("ema.module.", weights)
        if not weights:
            raise CheckpointError("the checkpoint holds no averaged weights; load it without ema")
    elif any(key.startswith("model.") for key in weights):
        weights = _below("model.", weights)
    for prefix in ("backbone.", "model."):
        if any(key.startswith(prefix) for key in weights):
            weights = _below(prefix, weights)
    strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange or not weights:
        found = f"entries that are no tensors: {', '.join(map(str, strange[:5]))}" if strange else "no weights"
        raise CheckpointError(f"the checkpoint holds {found}; expected a state dict, flat or under state_dict or model")
    return _merged(weights, checkpoint.get(LORA_SCALING))


_ADAPTED = re.compile(r"(.+)\.base_layer\.(\w+)")


def _merged(weights: dict[str, Tensor], scaling: float | None) -> dict[str, Tensor]:
    """Return weights with the adapters of LoRA, as peft names them, added to the layers they belong to."""
    merged = {}
    for key, value in weights.items():
        if match := _ADAPTED.fullmatch(key):
            layer, name = match.groups()
            if name == "weight":
                if scaling is None:
                    raise CheckpointError(
                        f"the checkpoint holds adapters of LoRA, but no {LORA_SCALING}: give the whole checkpoint"
                    )
                down, up = (weights[f"{layer}.lora_{part}.default.weight"] for part in "AB")
                value = value + scaling * (up.flatten(1) @ down.flatten(1)).view_as(value)
            key = f"{layer}.{name}"
        if ".lora_" not in key:
            merged[key] = value
    return merged


def _below(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Return `state_dict`, an official checkpoint's or ours, as a complete state dict of `model`.

    `model` is a backbone of ours, or another model of timm, which has its one format. Whatever a training
    tool wrapped around the weights is taken off. The classifier of a checkpoint is left out where the model has another
    number of classes than `model.pretrained_cfg` names, and in dense mode, where the output norms that a classifier's
    checkpoint lacks keep their fresh values; the log names both.

    Raises:
        CheckpointError: Keys are missing, unknown or of the wrong shape; the message names them all.
    """
    return _fitted(state_dict, model, "a checkpoint")[0]


def _fitted(state_dict: dict[str, Any], model: Any, source: str) -> tuple[dict[str, Tensor], Loaded]:
    """Return what :func:`checkpoint_filter_fn` does, and what of it comes from `state_dict`, which the log says too."""
    weights = strip_wrappers(state_dict, official_ema=getattr(model, "official_ema", False))
    if not any(key.startswith("stages.0.blocks.") for key in weights):
        key_map = getattr(model, "official_keys", ())
        renamed = {_our_key(key, key_map): value for key, value in weights.items()}
        weights = {key: value for key, value in renamed.items() if key is not None}
    if adapt := getattr(model, "adapt_weights", None):
        weights = adapt(weights)
    own = model.state_dict()
    cfg = model.pretrained_cfg

    optional: tuple[str, ...] = ()
    norms: list[str] = []
    if getattr(model, "dense", False):
        optional = ("norm.", "head.", "head_")
        norms = [key for key in own if key.startswith("norms.") and key not in weights]
        weights.update({key: own[key] for key in norms})
    elif model.num_classes != cfg.get("num_classes", model.num_classes):
        optional = tuple(f"{name}." for name in _names(cfg["classifier"]))
    left_out = [key for key in weights if key.startswith(optional)]
    taken = len(weights) - len(left_out) - len(norms)

    # The number of steps a batch norm has seen has no influence at a fixed momentum, and some files lack it.
    weights.update({k: own[k] for k in own if k.endswith("num_batches_tracked") and k not in weights})

    missing = [key for key in own if key not in weights and not key.startswith(optional)]
    unknown = [key for key in weights if key not in own and key not in left_out]
    fitting = {key: [value.shape] for key, value in own.items()}
    for key in (f"{name}.weight" for name in _names(cfg["first_conv"])):
        # timm adapts the image channels of its pretrained weights to the model's.
        fitting[key].append(torch.Size([len(own[key]), cfg["input_size"][0], *own[key].shape[2:]]))
    shapes = [
        f"{key}: {tuple(value.shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key, value in weights.items()
        if key in own and key not in left_out and value.shape not in fitting[key]
    ]
    if missing or unknown or shapes:
        problems = [
            *([f"missing: {', '.join(missing)}"] if missing else []),
            *([f"unknown: {', '.join(unknown)}"] if unknown else []),
            *([f"wrong shape: {'; '.join(shapes)}"] if shapes else []),
        ]
        name = cfg.get("architecture", type(model).__name__)
        raise CheckpointError(
            f"the checkpoint does not fit {name}: " + "\n  ".join(problems) + "\nIs it a checkpoint of another variant?"
        )
    weights = {key: value for key, value in weights.items() if key not in left_out}
    fresh = (*norms, *(key for key in own if key not in weights))
    loaded = Loaded(source, taken, fresh, tuple(left_out))
    _logger.info("%s", loaded)
    return weights, loaded


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the layers that an entry of a pretrained config names: one, several or none."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _our_key(key: str, key_map: KeyMap) -> str | None:
    for pattern, replacement in key_map:
        if replacement is None:
            if re.search(pattern, key):
                return None
            continue
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


def run_checkpoint(run: str | Path, which: str = "best") -> Path:
    """Return the `best` checkpoint of a run folder, or the last one where there is no best yet.

    Raises:
        CheckpointError: The folder holds no checkpoint.
    """
    folder = Path(run) / "checkpoints"
    for name in dict.fromkeys((which, "last")):
        if (folder / f"{name}.ckpt").is_file():
            return folder / f"{name}.ckpt"
    raise CheckpointError(f"{run}: no checkpoint in {folder}; expected best.ckpt or last.ckpt: is it a run folder?")


def _hub_weights(model: Any, name: str) -> dict[str, Tensor]:
    """Return the weights that timm's hub has under `name`, an architecture, or one and a tag. This uses the network.

    Raises:
        CheckpointError: They are of another architecture than the model, there are none, or they cannot be had.
    """
    architecture = model.pretrained_cfg["architecture"]
    if name.partition(".")[0] != architecture or not timm.models.is_model_pretrained(name):
        known = [f"{HUB}{tagged}" for tagged in timm.list_pretrained(f"{architecture}.*")]
        expected = f"one of {', '.join(known)}" if known else "a file or a run folder"
        raise CheckpointError(f"{HUB}{name}: no weights of {architecture} in timm's hub; expected {expected}")
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of timm, of the hub's client, of its transport
        raise CheckpointError(
            f"{HUB}{name}: cannot be fetched ({type(error).__name__}: {error}). Where there is no network, fetch the "
            "file elsewhere and give its path"
        ) from error
    return weights


_OTHER_CLASSES = -1
"""Stands for the number of classes of a classifier that has other ones, perhaps as many."""


def load_weights(
    model: Any,
    path: str | Path,
    ema: bool = False,
    same_classes: bool = False,
    classes: Sequence[str] | None = None,
) -> Loaded:
    """Load a weight file (official format or ours) or a run folder's best checkpoint into a model built by timm.

    Adapters of LoRA are added to the weights they belong to. A classifier of other classes than the model's is left
    out; weights of the first convolution are adapted to the model's image channels.

    Args:
        model: A model of the zoo, or any other timm model.
        path: Weight file, run folder, or `timm::NAME`, weights of this architecture that timm fetches from its hub.
        ema: Take the averaged weights, which must be there. Without it, those of an official checkpoint are taken where
            the published accuracy is theirs (`official_ema` of the model).
        same_classes: Refuse a classifier of other classes: for a model that is not going to be trained.
        classes: Names of the model's classes, to be compared with those that our checkpoints hold. Without either,
            classes are other ones where they are of another number.

    Raises:
        CheckpointError: The file cannot be read or does not fit; nothing has been loaded then.
    """
    if str(path).startswith(HUB):
        checkpoint: dict[str, Any] = _hub_weights(model, str(path).removeprefix(HUB))
    else:
        path = run_checkpoint(path) if Path(path).is_dir() else Path(path)
        checkpoint = read_checkpoint(path)
    original = model.pretrained_cfg
    loaded: list[Loaded] = []

    def fit(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
        weights, report = _fitted(state_dict, model, str(path))
        loaded.append(report)
        return weights

    try:
        weights = strip_wrappers(checkpoint, ema, getattr(model, "official_ema", False))
        cfg = {**original, "source": None, "state_dict": weights}
        name = cfg["classifier"] if isinstance(cfg["classifier"], str) else cfg["classifier"][0]
        classifier = weights.get(f"{name}.weight", weights.get("head.weight"))  # ours, official
        number = 0 if classifier is None else len(classifier)
        named = checkpoint.get("classes") if classes is not None else None
        renamed = isinstance(named, list) and named != list(classes or ())
        if same_classes and number != model.num_classes:
            raise CheckpointError(f"made for {number or 'no'} classes, expected {model.num_classes}")
        if same_classes and renamed:
            raise CheckpointError(f"made for the classes {_listed(named or ())}; expected {_listed(classes or ())}")
        cfg["num_classes"] = _OTHER_CLASSES if renamed else number or cfg["num_classes"]
        model.pretrained_cfg = cfg  # which the filter reads
        load_pretrained(model, cfg, model.num_classes, model.in_chans, filter_fn=fit)
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    finally:
        model.pretrained_cfg = original
    return loaded[0]


def load_model_weights(model: Any, path: str | Path, ema: bool = False, same_classes: bool = False) -> Loaded:
    """Load weights into a detector or segmentor of mm whose backbone is an `EffBackbone`.

    A checkpoint of the same detector, ours or of mm's runner, is taken as a whole; what depends on the number of
    classes is left out where that is another. Of any other file or run folder, the backbone's weights are taken.

    Args:
        model: The detector or segmentor.
        path: Weight file or run folder.
        ema: Take the averaged weights, which must be there.
        same_classes: Refuse everything but a checkpoint of the same detector with the same classes.

    Raises:
        CheckpointError: The file cannot be read or does not fit; nothing has been loaded then.
    """
    path = run_checkpoint(path) if Path(path).is_dir() else Path(path)
    checkpoint = read_checkpoint(path)
    own = model.state_dict()
    weights = {str(key): value for key, value in checkpoint.get("state_dict", checkpoint).items()}
    for prefix in ("ema.module.",) if ema else ("model.", "module."):
        if any(key.startswith(prefix) for key in weights):
            weights = _below(prefix, weights)
    if weights.keys() != own.keys():
        if same_classes:
            differing = sorted(weights.keys() ^ own.keys())
            raise CheckpointError(
                f"{path}: not a checkpoint of this model: {len(differing)} names differ, such as "
                f"{', '.join(differing[:3])}; expected one of the same head and backbone"
            )
        loaded: Loaded = model.backbone.load_weights(path, ema)
        rest = (key for key in own if not key.startswith("backbone."))
        return replace(loaded, fresh=(*loaded.fresh, *dict.fromkeys(f"{key.partition('.')[0]}.*" for key in rest)))
    misfits = [key for key, value in weights.items() if value.shape != own[key].shape]
    if misfits and (same_classes or any(key.startswith("backbone.") for key in misfits)):
        raise CheckpointError(
            f"{path}: wrong shape: "
            + "; ".join(
                f"{k}: {tuple(weights[k].shape)} in the checkpoint, {tuple(own[k].shape)} in the model" for k in misfits
            )
        )
    weights = {key: value for key, value in weights.items() if key not in misfits}
    model.load_state_dict(weights, strict=False)
    return Loaded(str(path), len(weights), tuple(misfits), tuple(misfits))
