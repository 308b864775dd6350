"""mm's configs with a backbone of the zoo in them.

A head is an mm config of which the model is taken: its backbone is replaced, what takes the backbone's maps is made for
ours, the rest stays as it is. Nothing is ever downloaded. The config is a program; a recipe's overrides of it are plain
data, which names nothing but mm's own classes.
"""

import copy
import difflib
import functools
import logging
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmcv.ops
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, TASK_UTILS, WEIGHT_INITIALIZERS, DefaultScope
from torch import Tensor, nn

from effbackbones.config import Recipe, RecipeError
from effbackbones.config.schema import DataConfig
from effbackbones.files import replacing
from effbackbones.mm.backbone import EffBackbone

log = logging.getLogger(__name__)

PACKAGES = ("mmdet", "mmseg")

_OLD_SIZE = 128  # pixels a side at which the maps of a config's own backbone are looked at

# What of a config makes a model.
_USED = ("custom_imports", "default_scope", "model")

# What of a model takes no maps: all else may be a head.
_NO_HEADS = ("type", "backbone", "neck", "data_preprocessor", "train_cfg", "test_cfg")

# What makes mm load weights.
_WEIGHTS = ("pretrained", "checkpoint", "checkpoint_path", "teacher_ckpt")

# mm takes other text for files, which it may unpickle or run, and for expressions, which it evaluates.
_WORD = re.compile(r"[\w-]*")

_FORCE_WEIGHTS_ONLY, _FORCE_NO_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class HeadError(RecipeError):
    """An mm config that cannot be used with a backbone of ours; the message names the field."""


def load_head(name: str) -> Config:
    """Return the mm config `name`; its `default_scope` is the package that its model is of.

    The config is a program: it is run, as mm runs it, once as long as its file stays the same.

    Args:
        name: `mmdet::FILE` or `mmseg::FILE`, relative to the config folder of the installed package, or a path.

    Raises:
        HeadError: There is no such config, or it cannot be read.
    """
    package, in_package, file = name.partition("::")
    path = _packaged(name, package, file) if in_package else Path(name)
    if not path.is_file():
        raise HeadError(
            f"{name}: no such file; expected a path, or mmdet::FILE or mmseg::FILE of the installed package"
        )
    try:
        config = copy.deepcopy(_run_config(path.resolve(), path.stat().st_mtime_ns))
    except Exception as error:  # a program can fail in any way
        raise HeadError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error
    if in_package:
        config.default_scope = package
    if config.get("default_scope") not in PACKAGES:
        raise HeadError(f"{name}: default_scope={config.get('default_scope')!r}, expected {' or '.join(PACKAGES)}")
    if not isinstance(config.get("model"), Mapping):
        raise HeadError(f"{name}: holds no model; expected the config of a detector or a segmentor")
    return config


def store_head(name: str, path: Path) -> None:
    """Write what :func:`load_head` takes of a config to a file of its own, which then stands for the config.

    Raises:
        HeadError: The config cannot be read, or holds what mm writes in no readable way, such as an infinite number.
    """
    config = Config(_used(load_head(name)), format_python_code=False)
    with replacing(path) as part:
        part.write_text(config.pretty_text, encoding="utf-8")
    load_head(str(path))


def same_head(one: str, other: str) -> bool:
    """Return whether two names are of the same config, wherever each is written.

    Raises:
        HeadError: One of them cannot be read.
    """
    return _used(load_head(one)) == _used(load_head(other))


def _used(config: Config) -> dict[str, Any]:
    """Return the parts of a config that make a model."""
    return {key: value for key, value in config.to_dict().items() if key in _USED}


@functools.cache
def _run_config(path: Path, modified: int) -> Config:
    return Config.fromfile(path)


def _packaged(name: str, package: str, file: str) -> Path:
    """Return the path of a config of an installed package."""
    if package not in PACKAGES:
        raise HeadError(f"{name}: expected mmdet::FILE, mmseg::FILE or the path of a config")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HeadError(f"{name}: {package} is not installed; `effb doctor` says how to install the mm extra")
    folder = Path(spec.submodule_search_locations[0]) / ".mim" / "configs"
    path = folder / file
    if path.suffix == ".py" and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
        return path
    known = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    elsewhere = [other for other in known if Path(other).name == Path(file).name]
    nearest = elsewhere or difflib.get_close_matches(file, known, n=3)
    hint = f"; nearest: {', '.join(f'{package}::{other}' for other in nearest)}" if nearest else ""
    raise HeadError(f"{name}: {package} has no such config{hint}")


def build_model(recipe: Recipe, classes: Sequence[str], sync_bn: bool = False) -> nn.Module:
    """Return the detector or segmentor of a recipe with fresh weights, tried on one blank image.

    The arguments are those of :func:`build_model_cfg`.

    Raises:
        HeadError: The config cannot be read, cannot take the backbone's maps or holds the backbone deeper inside.
    """
    scope = load_head(str(recipe.model.head)).default_scope
    model_cfg = build_model_cfg(recipe, classes, sync_bn)
    with _naming(recipe.model.head):
        model = build_from_cfg(model_cfg, scope)
        if not isinstance(getattr(model, "backbone", None), EffBackbone):
            raise HeadError(
                f"backbone: that of {model_cfg.type} is not EffBackbone; expected a plain detector or segmentor: "
                "wrappers of several, such as teacher and student, train under mm's own runner"
            )
        check_head(model, model_cfg, scope)
    return model


def build_model_cfg(recipe: Recipe, classes: Sequence[str], sync_bn: bool = False) -> ConfigDict:
    """Return the model's config of a recipe: its head's with our backbone, classes and overrides.

    Args:
        recipe: The whole recipe.
        classes: Names of the classes.
        sync_bn: Keep the batch norms of the config that are synchronised over processes, which torch has on CUDA only;
            otherwise they are plain ones.

    Raises:
        HeadError: The config cannot be read or cannot take the backbone's maps, or an override is more than plain data.
    """
    cfg = recipe.model
    config = load_head(str(cfg.head))
    backbone_cfg = {
        "model": cfg.name,
        "drop_path_rate": cfg.drop_path_rate,
        "frozen_stages": cfg.frozen_stages,
        "norm_eval": cfg.norm_eval,
        "with_cp": cfg.grad_checkpointing,
        **cfg.args,
    }
    with _naming(cfg.head):
        _check_plain(cfg.head_overrides, "model.head_overrides", _registered())
        model = swap_backbone(config.model, backbone_cfg, config.default_scope)
        old_classes = _count_classes(model)
        _merge(model, cfg.head_overrides, "model.head_overrides")
        _refuse_weights(model)
        _set_classes(model, old_classes, len(classes))
        _set_preprocessing(model, recipe.data)
        if not sync_bn and _use_plain_batch_norms(model):
            log.warning("%s: its synchronised batch norms are plain ones, as they synchronise on CUDA only", cfg.head)
    return model


@contextmanager
def _naming(head: str | None) -> Iterator[None]:
    """Begin the message of every HeadError with the config."""
    try:
        yield
    except HeadError as error:
        raise HeadError(f"{head}: {error}") from error


def predicts_masks(recipe: Recipe) -> bool:
    """Return whether the head of a detection recipe, with its overrides, learns and predicts instance masks.

    Raises:
        HeadError: The config cannot be read, or an override does not fit it.
    """
    model = load_head(str(recipe.model.head)).model
    with _naming(recipe.model.head):
        _merge(model, recipe.model.head_overrides, "model.head_overrides")
    return any(
        node.get("mask_head") or node.get("panoptic_head") or "RTMDetIns" in str(node.get("type"))
        for _, node in _nodes(model)
    )


def swap_backbone(model_cfg: Mapping[str, Any], backbone_cfg: Mapping[str, Any], scope: str) -> ConfigDict:
    """Return a model's config with an EffBackbone in place of its backbone, at whatever depth that sits.

    The old backbone is built and run once: our stages stand in for its maps of the same strides, or all four for four
    maps that a dilation keeps from getting smaller. The neck, or the heads where there is none, get the channels of our
    maps for those of the old ones. Stages whose maps nothing takes are left out, and the rest counted anew (`in_index`,
    `start_level`).

    Args:
        model_cfg: Of mmdet or mmseg, left as it is.
        backbone_cfg: Arguments of :class:`EffBackbone`, without `out_indices`.
        scope: `mmdet` or `mmseg`.

    Raises:
        HeadError: The maps or channels have no counterpart; the message names the field.
    """
    model = ConfigDict(copy.deepcopy(dict(model_cfg)))
    for _, node in list(_nodes(model)):
        _forget_weights(node)
    hosts = [node for _, node in _nodes(model) if isinstance(node.get("backbone"), Mapping)]
    if not hosts:
        raise HeadError("backbone: the model has none to replace")
    for host in hosts:
        old = _old_maps(host.backbone, scope)
        stages = _stages([stride for _, stride in old])
        takers = _takers(host, [width for width, _ in old])
        # A map that nothing takes would have an output norm without gradient, which DDP does not bear.
        kept = sorted({position for taker in takers for position in taker.positions})
        if any(taker.cfg.get("c1_in_channels") for taker in takers):  # DeepLabV3+ takes the first map besides
            kept = sorted({0, *kept})
        host.backbone = ConfigDict(
            type=EffBackbone.__name__, out_indices=tuple(stages[i] for i in kept), **backbone_cfg
        )
        with torch.device("meta"):
            widths = [info["num_chs"] for info in _build(host.backbone, scope, "backbone").feature_info]
        for taker in takers:
            taker.rewire(kept, widths)
    return model


def _nodes(cfg: Any, field: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """Yield every mapping in `cfg`, itself first, with its dotted place."""
    if isinstance(cfg, ConfigDict):
        yield field, cfg
        entries: Any = list(cfg.items())
    else:
        entries = list(enumerate(cfg)) if isinstance(cfg, (list, tuple)) else []
    for key, value in entries:
        yield from _nodes(value, f"{field}.{key}" if field else str(key))


def _forget_weights(node: ConfigDict) -> None:
    """Take away the pretrained weights of a module."""
    node.pop("pretrained", None)
    inits = node.get("init_cfg")
    inits = inits if isinstance(inits, (list, tuple)) else [inits]
    if any(init and "checkpoint" in init for init in inits):
        node.init_cfg = [init for init in inits if init and "checkpoint" not in init] or None


def _old_maps(backbone_cfg: ConfigDict, scope: str) -> list[tuple[int, int]]:
    """Return channels and stride of each map of a config's own backbone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = _build(backbone_cfg, scope, "backbone")
        backbone.eval()  # mm's return nothing from it
        try:
            maps = backbone(torch.zeros(1, 3, _OLD_SIZE, _OLD_SIZE))
            maps = [maps] if isinstance(maps, Tensor) else maps
            return [(x_bchw.shape[1], round(_OLD_SIZE / x_bchw.shape[3])) for x_bchw in maps]
        except Exception as error:  # of whatever kind mm's backbones have
            raise HeadError(f"backbone: cannot tell the maps of {backbone_cfg.type}: {error}") from error


def _stages(strides: Sequence[int]) -> tuple[int, ...]:
    """Return our stages that stand in for maps of these strides."""
    ours = [4, 8, 16, 32]
    if len(set(strides)) == len(strides) and set(strides) <= set(ours):
        stages = [ours.index(stride) for stride in strides]
        if stages == sorted(stages):
            return tuple(stages)
    if len(strides) == len(ours) and strides[0] == 4 and strides[1] == 8 and list(strides) == sorted(strides):
        return 0, 1, 2, 3
    raise HeadError(
        f"backbone: the config's own has maps of strides {', '.join(map(str, strides))}; expected some of "
        f"{', '.join(map(str, ours))} in this order, or four from 4 and 8 on"
    )


@dataclass
class _Taker:
    """A neck or head that takes maps of the backbone.

    Attributes:
        cfg: Its config.
        positions: Which maps it takes, in the order of its `in_channels`.
    """

    cfg: ConfigDict
    positions: list[int]

    def rewire(self, kept: Sequence[int], widths: Sequence[int]) -> None:
        """Have it take the same maps where only those at the old positions `kept` are left, of these widths."""
        new = [kept.index(position) for position in self.positions]
        channels = [widths[i] for i in new]
        several = isinstance(self.cfg.in_channels, (list, tuple))
        self.cfg.in_channels = channels if several else channels[0]
        if self.cfg.get("in_index") is not None:
            self.cfg.in_index = new if isinstance(self.cfg.in_index, (list, tuple)) else new[0]
        if self.cfg.get("c1_in_channels"):
            self.cfg.c1_in_channels = widths[0]


def _takers(host: ConfigDict, old: list[int]) -> list[_Taker]:
    """Return what takes the maps of the backbone in the mapping `host` that holds it: its neck, or else its heads.

    Args:
        host: A detector or segmentor, or what stands for one in a larger model.
        old: Channels of the old maps.

    Raises:
        HeadError: Which maps cannot be told; the message names the field.
    """
    neck = host.get("neck")
    if not neck:
        heads = {key: value for key, value in host.items() if key not in _NO_HEADS}
        return [taker for key, value in heads.items() for taker in _takers_in(value, key, old, required=True)]
    first, field = (neck[0], "neck.0") if isinstance(neck, (list, tuple)) else (neck, "neck")
    if "in_channels" not in first:
        raise HeadError(f"{field}: {first.get('type')} has no in_channels to set")
    taker = _Taker(first, _positions(first, field, old))
    if len(taker.positions) > 1:  # of an FPN: it never looks at the maps before start_level and after end_level
        start, end = first.get("start_level", 0), first.get("end_level", -1)
        taker.positions = taker.positions[start : len(old) if end == -1 else end + 1]
        first.update({key: value for key, value in (("start_level", 0), ("end_level", -1)) if key in first})
    return [taker]


def _takers_in(cfg: Any, field: str, old: list[int], required: bool) -> Iterator[_Taker]:
    """Yield what takes maps in a head, or in a list of them.

    With `required` it is a part of the model itself: if it has `in_channels`, they are those of maps. Within such a
    part a single number may be the width of anything, unless `in_index` stands beside it.
    """
    if isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            yield from _takers_in(value, f"{field}.{i}", old, required)
    if not isinstance(cfg, ConfigDict):
        return
    if "in_channels" in cfg:
        channels = cfg.in_channels
        if (
            required
            or cfg.get("in_index") is not None
            or (isinstance(channels, (list, tuple)) and list(channels) == old)
        ):
            yield _Taker(cfg, _positions(cfg, field, old))
    for key, value in cfg.items():
        yield from _takers_in(value, f"{field}.{key}", old, required=False)


def _positions(cfg: ConfigDict, field: str, old: list[int]) -> list[int]:
    """Return which of the old maps a neck or head takes."""
    channels, index = cfg.in_channels, cfg.get("in_index")
    widths = list(channels) if isinstance(channels, (list, tuple)) else [channels]
    if index is not None:
        positions = list(index) if isinstance(index, (list, tuple)) else [index]
    elif len(widths) == len(old) > 1:
        # Some necks list the channels from the last map to the first.
        positions = list(range(len(old))) if widths == old else list(range(len(old)))[::-1]
    else:
        positions = [-1]
    if all(-len(old) <= i < len(old) for i in positions):
        positions = [i % len(old) for i in positions]
        if [old[i] for i in positions] == widths:
            return positions
    maps = f" of the maps {index}" if index is not None else ""
    raise HeadError(
        f"{field}.in_channels: {channels}{maps} are not channels that the config's own backbone gives, {old}: "
        "which of our maps to take cannot be told"
    )


def _count_classes(model: ConfigDict) -> tuple[int, int]:
    """Return the number of classes of a model's heads, and that of its panoptic heads, things and stuff.

    Raises:
        HeadError: The model has no such head.
    """
    # That of a region proposal network is one, whatever the classes.
    nodes = [node for field, node in _nodes(model) if "rpn_head" not in field.split(".")]
    counts = Counter(node.num_classes for node in nodes if "num_classes" in node)
    panoptic = [node.num_things_classes + node.num_stuff_classes for node in nodes if "num_things_classes" in node]
    if not counts and not panoptic:
        raise HeadError("num_classes: no head has it: the number of classes cannot be set")
    single = counts.most_common(1)[0][0] if counts else panoptic[0]
    return single, panoptic[0] if panoptic else single


def _set_classes(model: ConfigDict, old: tuple[int, int], classes: int) -> None:
    """Set the number of classes wherever the old one is.

    Args:
        model: The config to change.
        old: What :func:`_count_classes` gave.
        classes: The new number.
    """
    for field, node in _nodes(model):
        if node.get("num_classes") == old[0] and "rpn_head" not in field.split("."):
            node.num_classes = classes
            if node.get("out_channels") == old[0]:
                node.out_channels = classes
        if "num_things_classes" in node:
            node.update(num_things_classes=classes, num_stuff_classes=0)
        weights = node.get("class_weight")
        if isinstance(weights, (list, tuple)) and len(weights) - 1 in old and len(set(weights[:-1])) == 1:
            node.class_weight = [weights[0]] * classes + [weights[-1]]  # the last is that of no object
        elif isinstance(weights, (list, tuple)) and len(weights) in old and classes != len(weights):
            del node.class_weight  # of other classes


def _set_preprocessing(model: ConfigDict, data: DataConfig) -> None:
    """Have the images, which mm reads as BGR from 0 to 255, made normalised RGB, and crops padded to their own size.

    Raises:
        HeadError: The model has no preprocessor.
    """
    if not model.get("data_preprocessor"):
        raise HeadError("data_preprocessor: the model has none, and would get unnormalised BGR; expected mm's")
    for _, node in _nodes(model):
        preprocessor = node.get("data_preprocessor")
        if isinstance(preprocessor, dict) and "data_preprocessor" not in preprocessor:
            preprocessor.pop("rgb_to_bgr", None)
            mean, std = ([255 * value for value in values] for values in (data.mean, data.std))
            preprocessor.update(mean=mean, std=std, bgr_to_rgb=True)
            if preprocessor.get("size"):  # of mmseg
                preprocessor.update(size=(data.size, data.size))


def _use_plain_batch_norms(model: ConfigDict) -> bool:
    """Replace synchronised batch norms; return whether there were any."""
    synchronised = [node for _, node in _nodes(model) if node.get("type") == "SyncBN"]
    for node in synchronised:
        node.type = "BN"
    return bool(synchronised)


def _registered() -> set[str]:
    """Return what the `type` of an override may be: the classes that models are made of, and mmcv's operators."""
    for package in PACKAGES:
        _register(package)
    names = set(mmcv.ops.__all__)
    for registry in (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS):
        for each in (registry, *registry.children.values()):
            names.update(each.module_dict)
    return names


def _check_plain(value: Any, field: str, types: set[str]) -> None:
    """Raise an error where an override is more than plain data: mm imports and calls whatever a `type` names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key in _WEIGHTS and part:
                raise HeadError(f"{field}.{key}: {part!r} would be loaded: weights to start from are model.checkpoint")
            if key != "type":
                _check_plain(part, f"{field}.{key}", types)
            elif not isinstance(part, str) or re.sub(r"^(mmengine|mmdet|mmseg)\.", "", part) not in types:
                raise HeadError(f"{field}.type: {part!r} is no part of models; expected a class of mmdet or mmseg")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            _check_plain(part, f"{field}.{i}", types)
    elif isinstance(value, str) and not _WORD.fullmatch(value):
        raise HeadError(f"{field}: {value!r}; expected a word, as overrides name neither files nor expressions")


def _merge(cfg: ConfigDict, overrides: Mapping[str, Any], field: str) -> None:
    """Merge overrides into a config: mappings key by key, for a list into each of its entries, anything else whole.

    Raises:
        HeadError: A mapping is given for something else.
    """
    for key, value in overrides.items():
        if key == "_delete_":
            continue
        if not isinstance(value, Mapping):
            cfg[key] = copy.deepcopy(value)
            continue
        if cfg.get(key) is None or value.get("_delete_"):
            cfg[key] = ConfigDict()
        old = cfg[key]
        targets = old if isinstance(old, (list, tuple)) else [old]
        if not targets or not all(isinstance(target, ConfigDict) for target in targets):
            raise HeadError(
                f"{field}.{key}: a mapping cannot be merged into {old!r}; add `_delete_: true` to replace that"
            )
        for target in targets:
            _merge(target, value, f"{field}.{key}")


def _refuse_weights(model: ConfigDict) -> None:
    """Raise an error where the model would load or fetch something, such as the weights of a teacher."""
    for field, node in _nodes(model):
        for key, value in node.items():
            if (key in _WEIGHTS and value) or (isinstance(value, str) and "://" in value):
                raise HeadError(
                    f"{field}.{key}: ".lstrip(".") + f"{value} would be loaded: the only weights to start from are "
                    "model.checkpoint; a model that needs others trains under mm's own runner"
                )


@contextmanager
def _only_weights_unpickled() -> Iterator[None]:
    """Keep mm, which unpickles whatever a file holds, to files of weights."""
    names = (_FORCE_WEIGHTS_ONLY, _FORCE_NO_WEIGHTS_ONLY)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE_WEIGHTS_ONLY]
        os.environ.update(before)


@_only_weights_unpickled()
def build_from_cfg(model_cfg: ConfigDict, scope: str) -> nn.Module:
    """Return the detector (scope `mmdet`) or segmentor (`mmseg`) of a model's config, its weights initialised.

    Raises:
        HeadError: mm does not take the config.
    """
    model = _build(model_cfg, scope, "model")
    with _quiet():
        model.init_weights()
    return model


@_only_weights_unpickled()
def _build(cfg: ConfigDict, scope: str, field: str) -> Any:
    _register(scope)
    registry = import_module(f"{scope}.registry").MODELS
    with DefaultScope.overwrite_default_scope(scope):
        try:
            return registry.build(copy.deepcopy(cfg))
        except Exception as error:  # mm asserts, and passes on whatever its classes raise
            raise HeadError(f"{field}: {scope} cannot build it: {error}") from error


def _register(package: str) -> None:
    import_module(f"{package}.utils").register_all_modules(init_default_scope=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine from logging how each single parameter was initialised."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def with_flip(model: nn.Module, task: str) -> nn.Module:
    """Return mm's test-time augmentation around a detector or segmentor, for lists of an image and its mirror image."""
    if task == "segmentation":
        from mmseg.models import SegTTAModel

        # Of every image whose merged prediction mmseg keeps without the axis that is then added.
        warnings.filterwarnings("ignore", message="The shape of value will convert")
        return SegTTAModel(module=model)
    from mmdet.models import DetTTAModel

    merge = ConfigDict(nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=100)  # those of mmdet's own configs
    return DetTTAModel(module=model, tta_cfg=merge)


def check_head(model: Any, model_cfg: ConfigDict, scope: str) -> None:
    """Run a model once on a blank image.

    Raises:
        HeadError: That fails; the message names the field of `model_cfg` whose module was running.
    """
    entered = [""]
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    # DETR-like detectors choose their queries among the cells of the maps, of which most have stride 8.
    queries = max(node.get("num_queries", 0) for _, node in _nodes(model_cfg))
    training, size = model.training, (64 * max(1, math.ceil(math.sqrt(queries) / 8)),) * 2
    kind = "DetDataSample" if scope == "mmdet" else "SegDataSample"
    meta = {"ori_shape": size, "img_shape": size, "pad_shape": size, "batch_input_shape": size, "scale_factor": (1, 1)}
    sample = getattr(import_module(f"{scope}.structures"), kind)(metainfo=meta)
    images = torch.zeros(1, 3, *size)
    model.eval()
    try:
        with torch.no_grad(), DefaultScope.overwrite_default_scope(scope):
            model.predict(images, [sample])
            if getattr(model, "with_auxiliary_head", False):
                maps = model.extract_feat(images)
                heads = model.auxiliary_head
                for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                    head(maps)
    except Exception as error:  # shapes that do not fit, or an assertion of a head
        raise HeadError(f"{_field(model_cfg, entered[-1])}: cannot take the backbone's maps: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def _field(cfg: Any, module: str) -> str:
    """Return the place in a model's config of the module of that name: as far as names and config go together."""
    names = []
    for name in module.split("."):
        if isinstance(cfg, Mapping) and isinstance(cfg.get(name), (Mapping, list, tuple)):
            cfg = cfg[name]
        elif isinstance(cfg, (list, tuple)) and name.isdigit() and int(name) < len(cfg):
            cfg = cfg[int(name)]
        else:
            break
        names.append(name)
    return ".".join(names) or "model"
