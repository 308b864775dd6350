"""What a recipe takes before it runs: the memory of a device, the batch, the learning rate, the steps of an epoch.

Nothing is computed: the model is made of fake tensors, which have shapes and no numbers, so that a plan takes seconds
and no memory whatever it is for.
"""

import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.config import LoadedRecipe, Recipe, RecipeError
from effbackbones.data import DataError
from effbackbones.layers import attention_backend
from effbackbones.train.batch import describe_batch, device_batch, global_batch
from effbackbones.train.classification import ClassificationModule
from effbackbones.train.fsdp import sharded_units
from effbackbones.train.optim import build_optimizer
from effbackbones.train.run import module_class, open_data

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MIN_NORM_BATCH = 16
"""Images that a batch norm needs at a time for steady statistics."""

MAX_DROPPED = 0.01
"""Share of the training images that the last, incomplete batch of an epoch may leave out without a warning."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training takes of one device at its peak, by what they are for.

    What torch's allocator does not hand out is not among them: the context of CUDA and the scratch memory of its
    libraries, together around 1 GiB, and what the allocator keeps in reserve.

    Attributes:
        weights: Parameters and buffers, with those of a teacher.
        gradients: Of the parameters that are trained.
        optimizer: What the optimizer remembers of them.
        average: The running average of the weights.
        activations: A batch and what of its forward pass is kept for the backward pass, with temporary results.
        communication: Buckets of gradients under DDP; weights and gradients of a block in whole under FSDP.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    communication: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = sorted(asdict(self).items(), key=lambda part: -part[1])
        return f"{gib(self.total)} a device: " + ", ".join(f"{name} {gib(size)}" for name, size in parts if size)


def gib(size: int) -> str:
    """Return a number of bytes in GiB, or MiB where it is small."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a number of devices, and what speaks against it.

    Attributes:
        recipe: Its name.
        model: Name of the model, with its head.
        parameters: Number of parameters.
        trained: Number of those that are trained.
        gmacs: Multiply-adds of the backbone for one image in 1e9.
        batch: What :func:`describe_batch` says of an optimizer step.
        images: Training images; None where the dataset is not there.
        steps_per_epoch: Optimizer steps of an epoch; None likewise.
        steps: Those of the run; None likewise.
        memory: What training takes of each device, by strategy.
        warnings: What to look at before the run.
    """

    recipe: str
    model: str
    parameters: int
    trained: int
    gmacs: float
    batch: str
    images: int | None
    steps_per_epoch: int | None
    steps: int | None
    memory: dict[str, MemoryPlan]
    warnings: list[str]

    def __str__(self) -> str:
        trained = "" if self.trained == self.parameters else f", {self.trained / 1e6:.2f} M trained"
        epoch = "unknown" if self.images is None else f"{self.steps_per_epoch} an epoch of {self.images} images"
        rows = {
            "Recipe": self.recipe,
            "Model": f"{self.model}, {self.parameters / 1e6:.2f} M parameters{trained}, {self.gmacs:.2f} GMACs",
            "Batch": self.batch,
            "Steps": epoch if self.steps is None else f"{epoch}, {self.steps} in all",
            **{f"Memory, {strategy}": str(memory) for strategy, memory in self.memory.items()},
        }
        lines = [f"{name:14} {text}" for name, text in rows.items()]
        return "\n".join(lines + [f"Warning: {warning}" for warning in self.warnings])


def make_plan(loaded: LoadedRecipe, world: int, images: int | None = None) -> Plan:
    """Return the plan of a recipe on `world` devices.

    Args:
        loaded: The recipe.
        world: Devices, over all nodes.
        images: Training images; None: as many as the dataset has, where it is there.

    Raises:
        RecipeError: The model cannot be built, or the global batch does not divide.
    """
    recipe = loaded.recipe
    batch, warnings, classes = global_batch(recipe, world), [], None
    if images is None:
        try:
            data = open_data(recipe)
            images, classes = len(data.train_dataset), len(data.classes)
        except (DataError, OSError) as error:
            warnings.append(f"the dataset is not there, --images N stands for it: {error}")
    if recipe.task != "classification":
        warnings.append("the activations of the head, which depend on what it finds, come on top of the memory")
    whole = footprint(recipe, world, classes)
    steps_per_epoch = steps = None
    if images is not None:
        accumulate = recipe.trainer.accumulate
        batches = min(images // batch * accumulate, recipe.trainer.limit_train or sys.maxsize)
        steps_per_epoch = math.ceil(batches / accumulate)
        steps = min(recipe.trainer.epochs * steps_per_epoch, recipe.trainer.steps or sys.maxsize)
    return Plan(
        recipe=loaded.name,
        model=recipe.model.name + (f" under {recipe.model.head}" if recipe.model.head else ""),
        parameters=whole.parameters,
        trained=whole.trained,
        gmacs=whole.gmacs,
        batch=describe_batch(recipe, world),
        images=images,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        memory={strategy: whole.on(strategy, world) for strategy in ("ddp", "fsdp")},
        warnings=[*warnings, *_doubts(recipe, world, images, whole.batch_norms)],
    )


def _doubts(recipe: Recipe, world: int, images: int | None, batch_norms: bool) -> Iterator[str]:
    """Yield what to look at in the batch of a recipe."""
    batch, own = global_batch(recipe, world), device_batch(recipe, world)
    if batch_norms and not recipe.model.norm_eval:
        together = own * world if recipe.trainer.sync_bn else own
        if together < MIN_NORM_BATCH:
            yield (
                f"batch norms see {together} images at a time, and are unsteady below {MIN_NORM_BATCH}: "
                "trainer.sync_bn=true, a larger batch per device, or model.norm_eval=true"
            )
    if recipe.optim.lr_batch is None and recipe.data.global_batch is None:
        yield (
            f"optim.lr={recipe.optim.lr:g} stays whatever the batch, which is {batch} here: set optim.lr_batch to the "
            "batch that the rate is for, and it scales linearly, or data.global_batch to that batch, which then stays"
        )
    if images is None:
        return
    if images < batch:
        yield f"the training set has {images} images, fewer than one global batch of {batch}: the run would not start"
    elif images % batch > MAX_DROPPED * images:
        yield (
            f"{images % batch} of {images} images ({images % batch / images:.1%}), others in each epoch, are left out: "
            f"they fill no global batch of {batch}"
        )


def estimate_memory(recipe: Recipe, world: int, classes: int | None = None) -> MemoryPlan:
    """Return what a training step of a recipe takes of each of `world` devices, as its `trainer.strategy` shares it.

    Of dense tasks, the activations are those of backbone and neck: what a head keeps depends on what it finds.

    Args:
        recipe: The whole recipe.
        world: Devices.
        classes: Number of classes; None: `data.num_classes`, or 1000.

    Raises:
        RecipeError: The model cannot be built or estimated, or the global batch does not divide.
    """
    return footprint(recipe, world, classes).on(recipe.trainer.strategy, world)


@dataclass(frozen=True)
class Footprint:
    """Bytes that training takes of a device that holds everything; `on` says what it takes of one of several.

    Attributes:
        whole: What there is on the device, without communication.
        parameters: Number of parameters of the model.
        trained: Number of those that are trained.
        buffers: Bytes of the weights that are no parameters.
        teacher: Bytes of the weights of a teacher.
        unit: Bytes of the parameters of the largest block.
        rest: Bytes of the parameters that lie in no block.
        gmacs: Multiply-adds of the backbone for one image in 1e9.
        batch_norms: Whether the model has batch norms that are trained.
    """

    whole: MemoryPlan
    parameters: int
    trained: int
    buffers: int
    teacher: int
    unit: int
    rest: int
    gmacs: float
    batch_norms: bool

    def on(self, strategy: str, world: int) -> MemoryPlan:
        """Return what training takes of each of `world` devices under a strategy."""
        whole = self.whole
        if strategy != "fsdp":
            return replace(whole, communication=whole.gradients if world > 1 else 0)  # DDP copies into its buckets
        kept = self.buffers + self.teacher
        return MemoryPlan(
            weights=kept + -(-(whole.weights - kept) // world),
            gradients=-(-whole.gradients // world),
            optimizer=-(-whole.optimizer // world),
            average=-(-whole.average // world),
            activations=whole.activations,
            # A block, the next one, which is fetched ahead, and the gradient of the block.
            communication=self.rest + 3 * self.unit,
        )


def footprint(recipe: Recipe, world: int, classes: int | None = None) -> Footprint:
    """Return what a training step takes on a device that holds everything. Arguments as :func:`estimate_memory`."""
    module = _build(recipe, classes or recipe.data.num_classes or 1000)
    model = module.model
    units = [_bytes(unit.parameters()) for unit in sharded_units(model)]
    parameters, buffers = _bytes(model.parameters()), _bytes(model.buffers())
    teacher = _teacher_bytes(recipe)
    batch = device_batch(recipe, world)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(module)
        try:
            gmacs = _gmacs(model, recipe)
            activations = _peak_of_step(module, recipe, batch)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            reason = f"computes by the numbers in its tensors, of which an estimate has none: {error}"
            raise RecipeError(f"{recipe.model.name} {reason}") from error
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer([{"params": trained}], recipe.optim, 1, recipe.trainer.precision != "fp16")
        optimizer.step()
        state = _bytes(value for value in tree_leaves(list(optimizer.state.values())) if isinstance(value, Tensor))
    return Footprint(
        MemoryPlan(
            weights=parameters + buffers + teacher,
            gradients=_bytes(trained),
            optimizer=state,
            average=parameters + buffers if recipe.ema.decay is not None else 0,
            activations=activations,
            communication=0,
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        buffers=buffers,
        teacher=teacher,
        unit=max(units, default=0),
        rest=parameters - sum(units),
        gmacs=gmacs,
        batch_norms=any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()),
    )


def _build(recipe: Recipe, classes: int) -> Any:
    """Return the training module of a recipe without numbers, average, teacher and compilation."""
    recipe = replace(
        recipe,
        model=replace(recipe.model, compile=False, checkpoint=None),
        ema=replace(recipe.ema, decay=None),
        distill=replace(recipe.distill, teacher=None),
    )
    names = tuple(map(str, range(classes)))
    if recipe.task == "classification":
        with torch.device("meta"):
            return ClassificationModule(recipe, names, "")
    return module_class(recipe.task)(recipe, names, "")


def _teacher_bytes(recipe: Recipe) -> int:
    if recipe.distill.teacher is None:
        return 0
    with torch.device("meta"):
        teacher = timm.create_model(recipe.distill.teacher)
    return _bytes([*teacher.parameters(), *teacher.buffers()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _make_fake(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module by tensors of the present mode, as if on a CPU."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    for part in module.modules():
        all_tensors: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in all_tensors:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def _peak_of_step(module: Any, recipe: Recipe, batch: int) -> int:
    """Return the most bytes that forward and backward pass hold at one time, besides weights and gradients."""
    dtype = AUTOCAST[recipe.trainer.precision]
    meter = Meter([*module.parameters(), *module.buffers()])
    hooks = [
        parameter.register_post_accumulate_grad_hook(meter.leave_out_gradient)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    # Lightning does not cache casts either.
    with meter, torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
        loss = _loss(module, recipe, batch)
    with meter:
        loss.backward()
    for hook in hooks:
        hook.remove()
    return meter.peak


def _loss(module: Any, recipe: Recipe, batch: int) -> Tensor:
    data = recipe.data
    if recipe.task == "classification":
        images_bchw = torch.empty(batch, 3, data.size, data.size)
        loss: Tensor = module.forward_loss((images_bchw, torch.zeros(batch, dtype=torch.long)))["loss"]
        return loss
    from effbackbones.bench.subjects import dense_loss

    model = module.model
    return dense_loss(model.extract_feat(torch.empty(batch, 3, *dense_size(recipe))))


def _gmacs(model: Any, recipe: Recipe) -> float:
    """Return the multiply-adds of the backbone for one image in 1e9: with plain attention, whose products count."""
    dense = recipe.task != "classification"
    size = dense_size(recipe) if dense else (recipe.data.size, recipe.data.size)
    counter = FlopCounterMode(display=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)  # the counter hooks itself into gradients
    with attention_backend("plain"), counter:
        (model.backbone if dense else model)(torch.empty(1, 3, *size))
    model.train()
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops() / 2e9


def dense_size(recipe: Recipe) -> tuple[int, int]:
    """Return height and width of a training image of a dense task, the largest that its recipe makes."""
    if recipe.task == "segmentation":
        return recipe.data.size, recipe.data.size
    long, short = (-(-side // 32) * 32 for side in recipe.data.scale)
    return short, long


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, from what operators return to when it is dropped.

    Args:
        known: Tensors that were there before, which do not count.

    Attributes:
        live: Bytes at present.
        peak: The most there were.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def leave_out_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter no longer."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0
