"""What to say where memory does not suffice."""

import copy
import json
from typing import Any

from lightning.pytorch import Callback, Trainer

from effbackbones.config import Recipe, RecipeError, check
from effbackbones.train.batch import device_batch

SUGGESTIONS = 3
SIGNS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of torch's CPU allocator, CUDA, its libraries

Change = dict[str, Any]
"""Keys of a recipe with other values."""


class MemoryLimitError(RuntimeError):
    """A step needs more memory than there is."""


class MemoryAdvice(Callback):
    """Turns the errors of torch that say that memory does not suffice into a MemoryLimitError.

    It names the step, what the recipe is estimated to take, and the settings that help most.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Raises MemoryLimitError."""
        if isinstance(exception, MemoryError) or (
            isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in SIGNS)
        ):
            message = _explanation(self.recipe, trainer, len(pl_module.classes), exception)
            raise MemoryLimitError(message) from exception


def _explanation(recipe: Recipe, trainer: Trainer, classes: int, error: BaseException) -> str:
    from effbackbones.plan import estimate_memory, gib  # here: it imports what this module is imported by

    training, world = trainer.training, trainer.world_size
    place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}"
    if not training:
        place = f"evaluation at step {trainer.global_step}"
    reason = str(error).partition("\n")[0] or type(error).__name__
    lines = [f"rank {trainer.global_rank}, {place}: out of memory: {reason}"]
    changes = _changes(recipe, world, training)
    notes = ["" for _ in changes]
    try:
        plan = estimate_memory(recipe, world, classes)
        lines.append(f"A training step is estimated to take {plan}.")
        if training:
            totals = [estimate_memory(_changed(recipe, change), world, classes).total for change in changes]
            order = sorted((i for i, total in enumerate(totals) if total < plan.total), key=totals.__getitem__)
            changes, notes = [changes[i] for i in order], [f"  {gib(totals[i])} a device" for i in order]
    except Exception as failure:  # the estimate is a help: what it fails by must not hide what has happened
        lines.append(f"There is no estimate: {type(failure).__name__}: {failure}")
    settings = [" ".join(map(_setting, change.items())) for change in changes]
    width = max(map(len, settings[:SUGGESTIONS]), default=0)
    lines.append("What helps most:" if settings else "No setting is left that would take less.")
    lines += [f"  {text:{width}}{note}".rstrip() for text, note in zip(settings, notes, strict=True)][:SUGGESTIONS]
    lines.append("A run that has begun goes on with other settings by run.force=true.")
    return "\n".join(lines)


def _setting(item: tuple[str, Any]) -> str:
    key, value = item
    return f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


def _changes(recipe: Recipe, world: int, training: bool) -> list[Change]:
    """Return changes that save memory; smaller images, with which the model becomes another one, only in need."""
    model, data, trainer = recipe.model, recipe.data, recipe.trainer
    changes: list[Change] = [{"data.eval_batch_size": (data.eval_batch_size or data.batch_size) // 2}]
    if training:
        halves: Change = {"data.batch_size": data.batch_size // 2, "trainer.accumulate": 2 * trainer.accumulate}
        if data.global_batch is not None:
            del halves["data.batch_size"]
        changes = [{"model.grad_checkpointing": True}, halves] if model.grad_checkpointing is not True else [halves]
    if trainer.precision == "32":
        changes.append({"trainer.precision": "bf16"})
    if training and world > 1 and trainer.strategy != "fsdp":
        changes.append({"trainer.strategy": "fsdp"})
    if recipe.ema.decay is not None:
        changes.append({"ema.decay": None})
    changes = [change for change in changes if _is_possible(_changed(recipe, change), world)]
    if len(changes) >= SUGGESTIONS:
        return changes
    if recipe.task == "detection":
        return [*changes, {"data.scale": [max(32, side * 3 // 4) for side in data.scale]}]
    return [*changes, {"data.size": max(32, data.size * 3 // 4 // 32 * 32)}] if data.size > 32 else changes


def _is_possible(recipe: Recipe, world: int) -> bool:
    """Return whether the keys of a recipe go together, and its batches have images left."""
    try:
        return device_batch(recipe, world) > 0 and recipe.data.eval_batch_size != 0 and not any(check(recipe))
    except RecipeError:
        return False


def _changed(recipe: Recipe, change: Change) -> Recipe:
    recipe = copy.deepcopy(recipe)
    for key, value in change.items():
        section, _, name = key.partition(".")
        setattr(getattr(recipe, section), name, value)
    return recipe
