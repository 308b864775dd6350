"""Reading recipes: a YAML file, what it extends and the command line's overrides become one checked `Recipe`.

A recipe is plain data. Names in it resolve in registries and fixed choices; nothing in it is imported, called or
evaluated. Whatever is wrong with it is one `RecipeError` that lists every error with file, line and key.
"""

import contextlib
import difflib
import functools
import math
import operator
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from effbackbones.assets import list_recipes, recipe_dirs
from effbackbones.config.schema import METRICS, DataConfig, DistillConfig, LoraConfig, Recipe, ScheduleConfig

COMMAND_LINE = "command line"
DEFAULT = "default"
OF_WEIGHTS = "weights"
MAX_BYTES = 64 * 1024
MAX_DEPTH = 16

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"(?<!\\)\$\{([A-Za-z][A-Za-z0-9_.]*)\}")


class RecipeError(ValueError):
    """A recipe that cannot be used: one line per error."""


class _Problem(NamedTuple):
    origin: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def _is_name(name: str, prefix: str) -> bool:
    """Return whether a key below `prefix` may have that name; `_delete_` has mm replace a mapping, not merge it."""
    replaces = name == "_delete_" and prefix.startswith("model.head_overrides.")
    return replaces or _NAME.fullmatch(name) is not None


def _nearest(name: str, options: Iterable[str], count: int = 1) -> str:
    names = difflib.get_close_matches(name, options, n=count)
    return f"; nearest: {', '.join(names)}" if names else ""


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The dialect of YAML: the scalars of YAML 1.2 (1e-3 is a number, yes and no are text); no tags, anchors or aliases.


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        refusal = None
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            refusal = "anchors and aliases are not allowed; refer to a key as in ${data.size}"
        elif event.tag:
            refusal = f"the tag {_show(event.tag)} is not allowed; write a plain value"
        elif self.depth > MAX_DEPTH:
            refusal = f"nested more than {MAX_DEPTH} deep"
        if refusal:
            raise yaml.composer.ComposerError(None, None, refusal, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in {
    "null": r"(?:null|Null|NULL|~|)\Z",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)\Z",
    "int": r"[-+]?[0-9]+\Z",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z",
}.items():
    for _dialect in (_Loader, _Dumper):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)
_Dumper.add_representer(list, lambda dumper, v: dumper.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


@dataclass
class _Layer:
    """What one file or one override sets: plain values, where each key is written, and what is wrong."""

    label: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)

    def where(self, mark: yaml.Mark | None) -> str:
        return self.label if mark is None or self.label == COMMAND_LINE else f"{self.label}:{mark.line + 1}"

    def note(self, key: str, message: str, mark: yaml.Mark | None = None) -> None:
        self.problems.append(_Problem(self.where(mark), key, message))

    def parse(self, text: str, key: str) -> Any:
        """Return the plain value that `text` holds for `key` ("" for a whole file); None where it is broken."""
        try:
            node = _Loader(text).get_single_node()
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets int() and chr() fail on bad escapes
            reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            self.note(key, f"cannot be read as YAML: {reason}", getattr(error, "problem_mark", None))
            return None
        return None if node is None else self.value(node, key)

    def value(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, key) for item in node.value]
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "str":
            # Another "$" would be a resolver call, an escape or a shell variable; "???" is OmegaConf's missing value.
            if "$" not in _REFERENCE.sub("", text) and text != "???":
                return text
            message = f"{_show(text)}: $ is only for references to other keys, as in ${{data.size}}"
        elif abs(float(text)) < 2**63:
            return int(text) if kind == "int" else float(text)
        else:
            message = f"the number {_show(text)} is out of range"
        self.note(key, message, node.start_mark)
        return None

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            key = f"{prefix}.{name}".lstrip(".")
            if not _is_name(name, prefix):
                message = "unknown key: keys are names such as batch_size, nested by section"
                self.note(_show(key), message, key_node.start_mark)
            elif name in tree:
                self.note(key, f"set twice, first at {self.origins[key]}", key_node.start_mark)
            else:
                self.origins[key] = self.where(key_node.start_mark)
                tree[name] = self.value(value_node, key)
        return tree


def _read_file(path: Path) -> _Layer:
    layer = _Layer(str(path))
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        layer.note("", f"larger than {MAX_BYTES // 1024} KiB: not a recipe")
        return layer
    try:
        tree = layer.parse(data.decode("utf-8"), "")
    except UnicodeDecodeError as error:
        layer.note("", f"not UTF-8 text (at byte {error.start})")
        return layer
    if isinstance(tree, dict):
        layer.tree = tree
    elif not layer.problems:
        got = "nothing" if tree is None else _show(tree)
        layer.note("", f"expected sections such as model: and data:, got {got}")
    return layer


def _read_override(text: str) -> _Layer:
    layer = _Layer(COMMAND_LINE)
    key, equals, value_text = text.partition("=")
    names = key.split(".")
    if not equals or not all(_is_name(names[i], ".".join(names[:i])) for i in range(len(names))):
        layer.note(_show(text), "expected section.key=value, such as data.size=224")
        return layer
    tree = layer.parse(value_text, key)
    for depth in range(len(names), 0, -1):
        tree = {names[depth - 1]: tree}
        layer.origins[".".join(names[:depth])] = COMMAND_LINE
    layer.tree = tree
    return layer


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    recipes = list_recipes()
    if name not in recipes:
        message = "no such recipe: expected the path of a .yaml file, a run folder, or a name that `effb ls` lists"
        raise RecipeError(f"{_show(name)}: {message}{_nearest(name, recipes, count=3)}")
    return recipes[name]


def _read_with_base(path: Path) -> list[_Layer]:
    """Return the layers of a recipe file: the one it extends, if any, and its own."""
    layer = _read_file(path)
    if "extends" not in layer.tree:
        return [layer]
    name, origin = layer.tree.pop("extends"), layer.origins["extends"]
    try:
        candidates = (path.parent / f"{name}{suffix}" for suffix in ("", ".yaml"))
        base = _read_file(next((path for path in candidates if path.is_file()), None) or _find(str(name)))
    except (RecipeError, OSError) as error:
        layer.problems.append(_Problem(origin, "extends", str(error)))
        return [layer]
    if "extends" in base.tree:
        message = f"{path} extends this recipe, so this one may not extend another"
        base.problems.append(_Problem(base.origins["extends"], "extends", message))
    return [base, layer]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; anything else replaces (OmegaConf.merge fails where a mapping meets a list)."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _replace_references(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tree with its references replaced, and a message per key whose reference cannot be (null there)."""
    leaves = dict(_leaves(tree))
    config = OmegaConf.create(tree)
    errors = {}
    for key, value in leaves.items():
        for name in _REFERENCE.findall(str(value)):
            if name not in leaves or isinstance(leaves[name], dict):
                errors[key] = f"${{{name}}} refers to no value{_nearest(name, leaves)}"
            elif "$" in str(leaves[name]):
                errors[key] = f"${{{name}}} refers to a reference; give its value"
        if key in errors:
            OmegaConf.update(config, key, None)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return resolved, errors


# Types


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {_describe(get_args(hint)[0])}"
    if get_origin(hint) is dict or is_dataclass(hint):
        return "a mapping of keys"
    return "null" if hint is type(None) else hint.__name__


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint` says; TypeError where it is of another one."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        text = str(value) if type(value) is int else value  # precision: 32
        if text in args:
            return text
    elif origin in (Union, types.UnionType):
        for arg in args:
            with contextlib.suppress(TypeError):
                return _convert(value, arg)
    elif origin is list and isinstance(value, list):
        return [_convert(item, args[0]) for item in value]
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is (origin or hint):  # bool is no int
        return value
    raise TypeError(f"expected {_describe(hint)}, got {_show(value)}")


_BOUNDS = {"ge": (operator.ge, ">="), "gt": (operator.gt, ">"), "le": (operator.le, "<=")}


def _bounded(value: Any, metadata: Mapping[str, Any]) -> Any:
    for bound, (holds, sign) in _BOUNDS.items():
        limit = metadata.get(bound)
        if limit is not None and isinstance(value, (int, float)) and not holds(value, limit):
            raise TypeError(f"expected a value {sign} {limit}, got {_show(value)}")
    return value


def _schema(cls: type, prefix: str = "") -> dict[str, Field[Any]]:
    """Return the dataclass field of every key that is not a section, by dotted name."""
    keys: dict[str, Field[Any]] = {}
    hints = get_type_hints(cls)
    for each in fields(cls):
        section = is_dataclass(hints[each.name])
        keys |= _schema(hints[each.name], f"{prefix}{each.name}.") if section else {f"{prefix}{each.name}": each}
    return keys


_SCHEMA = _schema(Recipe)
_SECTIONS = [each.name for each in fields(Recipe) if each.name not in _SCHEMA]


def _unknown(key: str) -> str:
    misplaced = [known for known in _SCHEMA if known.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = f"; nearest: {misplaced[0]}" if misplaced else _nearest(key, [*_SECTIONS, *_SCHEMA])
    return f"unknown key{nearest}"


def _build(cls: type, tree: dict[str, Any], broken: set[str], errors: dict[str, str], prefix: str = "") -> Any:
    """Return the dataclass a tree describes; keys that are `broken` or get an entry in `errors` keep their default."""
    hints, metadata = get_type_hints(cls), {each.name: each.metadata for each in fields(cls)}
    arguments = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in broken:
            continue
        if name not in hints:
            errors[key] = _unknown(key)
        elif is_dataclass(hints[name]) and isinstance(value, dict):
            arguments[name] = _build(hints[name], value, broken, errors, f"{key}.")
        else:
            try:
                arguments[name] = _bounded(_convert(value, hints[name]), metadata[name])
            except TypeError as error:
                errors[key] = str(error)
    return cls(**arguments)


# Combinations

# Constructor arguments that a key of the recipe already decides.
_OWNED_ARGS = {
    "pretrained": "model.checkpoint",
    "pretrained_cfg": "model.checkpoint",
    "pretrained_cfg_overlay": "model.checkpoint",
    "checkpoint_path": "model.checkpoint",
    "drop_rate": "model.drop_rate",
    "drop_path_rate": "model.drop_path_rate",
    "num_classes": "data.num_classes",
}

# Those of the backbone of dense tasks.
_OWNED_DENSE_ARGS = {
    "type": "model.name",
    "model": "model.name",
    "checkpoint": "model.checkpoint",
    "init_cfg": "model.checkpoint",
    "out_indices": "model.head",
    "frozen_stages": "model.frozen_stages",
    "norm_eval": "model.norm_eval",
    "with_cp": "model.grad_checkpointing",
}


# Those whose steps of shards are equal to their steps of whole tensors, and whose state is shaped like the parameters.
SHARDED_OPTIMIZERS = (
    *("adamw", "adam", "sgd", "momentum", "nadamw", "radam", "rmsprop", "lamb", "lars", "lion", "adan", "adopt"),
    *("adabelief", "laprop"),
)


def check(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what does not go together in a recipe of valid types.

    Each entry holds the keys that are involved, the one to blame first, and a message.
    """
    import timm
    import timm.optim

    model, data, augment, optim, trainer = recipe.model, recipe.data, recipe.augment, recipe.optim, recipe.trainer
    if not model.name:
        yield ("model.name",), "required: a model of timm's registry"
    elif not timm.is_model(model.name) or "." in model.name:
        nearest = _nearest(model.name, map(str, timm.list_models()), count=3)
        yield ("model.name",), f"expected a registered model, without a weights tag, got {_show(model.name)}{nearest}"
    owners = _OWNED_ARGS if recipe.task == "classification" else _OWNED_ARGS | _OWNED_DENSE_ARGS
    if owned := [f"{name} ({key} sets it)" for name, key in owners.items() if name in model.args]:
        yield ("model.args",), f"does not take {', '.join(owned)}"
    if optim.name not in (optimizers := [str(name) for name in timm.optim.list_optimizers()]):
        nearest = _nearest(optim.name, optimizers, count=3)
        yield ("optim.name",), f"expected an optimizer of timm, got {_show(optim.name)}{nearest}"
    if optim.betas is not None and not (len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)):
        yield ("optim.betas",), f"expected two numbers from 0 to below 1, got {optim.betas}"
    for key, values in {"data.mean": data.mean, "data.std": data.std}.items():
        if len(values) != 3:
            yield (key,), f"expected 3 numbers, one per channel, got {values}"
    if min(data.std, default=1) <= 0:
        yield ("data.std",), f"expected positive numbers, got {data.std}"
    for key, values, limit in (("augment.scale", augment.scale, 1), ("augment.ratio", augment.ratio, math.inf)):
        if not (len(values) == 2 and 0 < values[0] <= values[1] <= limit):
            yield (key,), f"expected two increasing numbers above 0 and up to {limit}, got {values}"
    stages = model.grad_checkpointing
    if isinstance(stages, list) and (not stages or stages != sorted(set(stages) & set(range(4)))):
        message = f"expected true, false, or increasing numbers of stages from 0 to 3, got {stages}"
        yield ("model.grad_checkpointing",), message
    if trainer.strategy == "fsdp" and optim.name not in SHARDED_OPTIMIZERS:
        message = f"{optim.name} is not known to work with trainer.strategy=fsdp: use ddp, or one of "
        yield ("optim.name", "trainer.strategy"), message + ", ".join(SHARDED_OPTIMIZERS)
    if data.source == "synthetic" and data.num_classes is None:
        yield ("data.num_classes", "data.source"), "required where data.source is synthetic"
    if data.source not in ("fashion_mnist", "synthetic") and data.root is None:
        yield ("data.root", "data.source"), f"required where data.source is {data.source}"
    yield from _check_task(recipe)
    yield from _check_shards(recipe)
    yield from _check_transfer(recipe)
    yield from _check_schedule(recipe.schedule)
    if data.batch_size % 2 and (augment.mixup or augment.cutmix) and data.global_batch is None:
        keys: tuple[str, ...] = ("data.batch_size", "augment.mixup", "augment.cutmix")
        yield keys, f"expected an even number, as mixup and cutmix mix pairs, got {data.batch_size}"
    if recipe.schedule.warmup_epochs > trainer.epochs:
        keys = "schedule.warmup_epochs", "trainer.epochs"
        yield keys, f"{recipe.schedule.warmup_epochs:g} do not fit into trainer.epochs: {trainer.epochs}"
    if recipe.monitor.endswith("_ema") and recipe.ema.decay is None:
        yield ("trainer.monitor", "ema.decay"), f"{recipe.monitor} needs an average of the weights: set ema.decay"
    if not re.fullmatch("auto|0*[1-9][0-9]*", str(trainer.devices)):
        yield ("trainer.devices",), f"expected auto or a positive number, got {_show(trainer.devices)}"


_SOURCES = {
    "classification": ("fashion_mnist", "folder", "shards", "hf", "synthetic"),
    "detection": ("coco",),
    "segmentation": ("ade20k",),
}

# Keys that only classification heeds, those that only dense tasks do, and all that a task does not heed.
_IMAGE_KEYS = (
    *("model.channels_last", "model.drop_rate", "augment.scale", "augment.ratio", "augment.color_jitter"),
    *("augment.policy", "augment.erase", "augment.repeats", "augment.mixup", "augment.cutmix", "augment.smoothing"),
    *("augment.mix_prob", "augment.switch_prob", "data.crop_pct", "data.interpolation", "data.synthetic_images"),
    *("model.linear_probe", "lora", "distill"),
)
_DENSE_KEYS = (
    *("model.head", "model.head_overrides", "data.scale", "data.test_flip", "augment.resize"),
    *("augment.zoom", "augment.photometric", "optim.backbone_lr", "optim.no_decay"),
)
_UNHEEDED = {
    "classification": _DENSE_KEYS,
    "detection": (*_IMAGE_KEYS, "augment.zoom", "data.size"),
    "segmentation": (*_IMAGE_KEYS, "augment.resize"),
}


def _check_task(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    task, data = recipe.task, recipe.data
    if data.source not in _SOURCES[task]:
        yield ("data.source", "task"), f"expected one of {', '.join(_SOURCES[task])} for {task}, got {data.source}"
    if recipe.monitor.removesuffix("_ema") not in METRICS[task]:
        yield ("trainer.monitor", "task"), f"expected one of {', '.join(METRICS[task])} for {task}"
    values, defaults = dict(_leaves(asdict(recipe))), dict(_leaves(asdict(Recipe())))
    for key in _UNHEEDED[task]:
        if any(
            values.get(leaf) != defaults.get(leaf) for leaf in {*values, *defaults} if f"{leaf}.".startswith(f"{key}.")
        ):
            yield (key, "task"), f"has no effect in {task}: leave it out"
    if task != "classification" and not recipe.model.head:
        yield ("model.head", "task"), f"required for {task}: an mm config such as mmdet::retinanet/FILE.py"
    if not (len(data.scale) == 2 and data.scale[0] >= data.scale[1] >= 32):
        yield ("data.scale",), f"expected the longer side, then the shorter one of at least 32 pixels, got {data.scale}"
    zoom = recipe.augment.zoom
    if not (len(zoom) == 2 and 0 < zoom[0] <= zoom[1]):
        yield ("augment.zoom",), f"expected two increasing numbers above 0, got {zoom}"


def _check_shards(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    data, default = recipe.data, DataConfig()
    for name in ("train_shards", "val_shards", "split_by_node"):
        if data.source != "shards" and getattr(data, name) != getattr(default, name):
            yield (f"data.{name}", "data.source"), f"has no effect where data.source is {data.source}: leave it out"
    if data.split_by_node and recipe.trainer.overfit:
        keys = "data.split_by_node", "trainer.overfit"
        yield keys, "not beside trainer.overfit: nodes with images of their own would each evaluate others"
    if data.split_by_node and data.shrink_batch:
        keys = "data.shrink_batch", "data.split_by_node"
        yield keys, "not beside data.split_by_node: nodes with images of their own would each have another batch size"


def _check_transfer(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    import timm

    from effbackbones.models._zoo import ZOO

    model, lora, distill = recipe.model, recipe.lora, recipe.distill
    of_stages = {
        "model.frozen_stages": model.frozen_stages >= 0,
        "model.grad_checkpointing": isinstance(model.grad_checkpointing, list),
    }
    for key, given in of_stages.items():
        if given and model.name not in {row.model for row in ZOO}:
            yield (key, "model.name"), f"{model.name} is no model of the zoo, all of which have stages"
    if model.linear_probe:
        for key, given in {"model.frozen_stages": model.frozen_stages >= 0, "lora.rank": lora.rank is not None}.items():
            if given:
                yield (key, "model.linear_probe"), "has no effect beside model.linear_probe, which trains no block"
    if lora.rank is None and lora != LoraConfig():
        yield ("lora", "lora.rank"), "has no effect without lora.rank: leave it out"
    if distill.teacher is None:
        if distill != DistillConfig():
            yield ("distill", "distill.teacher"), "has no effect without distill.teacher: leave it out"
        return
    if not timm.is_model(distill.teacher) or "." in distill.teacher:
        nearest = _nearest(distill.teacher, map(str, timm.list_models()), count=3)
        message = f"expected a registered model, without a weights tag, got {_show(distill.teacher)}{nearest}"
        yield ("distill.teacher",), message
    if distill.checkpoint is None:
        keys: tuple[str, ...] = ("distill.checkpoint", "distill.teacher")
        yield keys, "required: the weights of the teacher, a file, a run folder or timm::NAME"
    if not (distill.alpha or distill.features):
        yield ("distill.alpha", "distill.features"), "expected one above 0: nothing of the teacher is learnt"
    if distill.temperature != 1 and (distill.hard or not distill.alpha):
        keys = "distill.temperature", "distill.hard", "distill.alpha"
        yield keys, "has no effect where no probabilities are learnt: leave it out"


# Keys of some of the schedules, and which these are.
_SCHEDULE_KEYS = {
    "decay_epochs": ("step",),
    "decay_rate": ("step", "multistep"),
    "milestones": ("multistep",),
    "power": ("poly",),
}


def _check_schedule(schedule: ScheduleConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, schedules in _SCHEDULE_KEYS.items():
        default = getattr(ScheduleConfig(), name)
        if schedule.name not in schedules and getattr(schedule, name) != default:
            keys = f"schedule.{name}", "schedule.name"
            yield keys, f"has no effect where schedule.name is {schedule.name}: leave it out, or at {default}"
    milestones = schedule.milestones
    if schedule.name == "multistep" and not (milestones and milestones == sorted(set(milestones))):
        keys = "schedule.milestones", "schedule.name"
        yield keys, f"expected increasing epochs where schedule.name is multistep, such as [8, 11], got {milestones}"


# The whole


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, its name, its file and the origin of every key.

    That is a file:line, "command line", "default", or "weights" for what is that of the model's pretrained weights.
    """

    recipe: Recipe
    name: str
    path: Path
    origins: dict[str, str]

    def to_yaml(self) -> str:
        """Return every key with its value, as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.dump(asdict(self.recipe), Dumper=_Dumper, sort_keys=False)


def _recipe_name(path: Path) -> str:
    for folder in recipe_dirs():
        if path.resolve().is_relative_to(folder.resolve()):
            return path.resolve().relative_to(folder.resolve()).with_suffix("").as_posix()
    return path.stem


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe by name (in1k/uniformer_small) or path, with `section.key=value` overrides.

    Names are looked up in ./recipes, then among the recipes that come with the package. Whatever is wrong, from a
    missing file to an impossible combination of values, is one RecipeError that lists every error.
    """
    try:
        path = _find(str(name_or_path))
        layers = _read_with_base(path) + [_read_override(text) for text in overrides]
        name = _recipe_name(path)
    except OSError as error:
        raise RecipeError(f"{_show(str(name_or_path))}: {error}") from error

    problems = [problem for layer in layers for problem in layer.problems]
    unread = any(problem.key in ("", "extends") for problem in problems)
    origins = {key: origin for layer in layers for key, origin in layer.origins.items()}
    tree, errors = _replace_references(functools.reduce(_merge, (layer.tree for layer in layers), asdict(Recipe())))
    recipe = _build(Recipe, tree, {problem.key for problem in problems} | set(errors), errors)
    problems += [_Problem(origins.get(key, str(path)), key, message) for key, message in errors.items()]
    broken = tuple(f"{problem.key}." for problem in problems)
    for keys, message in () if unread else check(recipe):
        if not any(f"{key}.".startswith(broken) for key in keys):
            origin = next((origins[key] for key in keys if key in origins), str(path))
            problems.append(_Problem(origin, keys[0], message))
    if problems:
        raise RecipeError("\n".join(map(str, problems)))
    if recipe.task == "classification":
        for key, values in pretrained_normalisation(recipe.model.name, recipe.model.checkpoint).items():
            if f"data.{key}" not in origins and values != getattr(recipe.data, key):
                setattr(recipe.data, key, values)
                origins[f"data.{key}"] = OF_WEIGHTS
    return LoadedRecipe(recipe, name, path, {key: origins.get(key, DEFAULT) for key, _ in _leaves(asdict(recipe))})


def pretrained_normalisation(name: str, checkpoint: str | None) -> dict[str, list[float]]:
    """Return `mean` and `std` that the weights of a registered model go with, by its name and `model.checkpoint`.

    They are those of a run folder's recipe, those of the weights in timm's hub, or those of the model's pretrained
    config; nothing where it has none.
    """
    from timm.models import get_pretrained_cfg, is_model_pretrained

    from effbackbones.checkpoint import HUB

    if checkpoint is not None and (path := Path(checkpoint) / "recipe.yaml").is_file():
        data = load_recipe(path).recipe.data
        return {"mean": data.mean, "std": data.std}
    tagged = checkpoint.removeprefix(HUB) if checkpoint is not None and checkpoint.startswith(HUB) else name
    cfg = get_pretrained_cfg(tagged if is_model_pretrained(tagged) else name)
    return {} if cfg is None else {"mean": list(cfg.mean), "std": list(cfg.std)}


def explain(loaded: LoadedRecipe) -> list[tuple[str, Any, str, str]]:
    """Return (key, value, origin, help) of every key, in the order of the schema."""
    rows = []
    for key, value in _leaves(asdict(loaded.recipe)):
        field_of_key = _SCHEMA.get(key) or _SCHEMA[".".join(key.split(".")[:2])]  # args and head_overrides are open
        rows.append((key, value, loaded.origins[key], field_of_key.metadata["help"]))
    return rows
