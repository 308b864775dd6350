"""How the images of an optimizer step are shared out."""

from effbackbones.config import Recipe, RecipeError
from effbackbones.train.optim import scaled_lr


def device_batch(recipe: Recipe, world: int) -> int:
    """Return the images that each of `world` devices takes at a time: `data.batch_size`, or what follows from
    `data.global_batch`.

    Raises:
        RecipeError: The global batch does not divide into whole batches, or into even ones where images are mixed.
    """
    total, accumulate = recipe.data.global_batch, recipe.trainer.accumulate
    if total is None:
        return recipe.data.batch_size
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    unit = world * accumulate * (2 if mixes else 1)
    if total % unit:
        below = total // unit * unit
        fits = " or ".join(str(number) for number in (below, below + unit) if number)
        pairs = ", in even numbers, as mixup and cutmix mix pairs" if mixes else ""
        worlds = [str(n) for n in range(1, total + 1) if total % (unit // world * n) == 0]
        raise RecipeError(
            f"data.global_batch={total} does not divide over {world} devices x trainer.accumulate={accumulate}{pairs}: "
            f"set data.global_batch={fits}" + (f", or use {_listed(worlds)} devices" if worlds else "")
        )
    return total // (world * accumulate)


def global_batch(recipe: Recipe, world: int) -> int:
    """Return the images of an optimizer step over `world` devices."""
    return device_batch(recipe, world) * world * recipe.trainer.accumulate


def describe_batch(recipe: Recipe, world: int) -> str:
    """Return a line of what an optimizer step takes: images and learning rate."""
    optim, accumulate = recipe.optim, recipe.trainer.accumulate
    batch = global_batch(recipe, world)
    rate = f"{scaled_lr(optim, batch):.3g}"
    rule = f"{optim.lr:g} for {optim.lr_batch}, scaled" if optim.lr_batch else "not scaled: optim.lr_batch is null"
    shares = f"{device_batch(recipe, world)} per device x accumulate {accumulate} x {world} devices"
    return f"Global batch {batch} = {shares}; learning rate {rate} ({rule})."


def _listed(numbers: list[str], most: int = 8) -> str:
    *rest, last = numbers if len(numbers) <= most else [*numbers[: most - 1], "..."]
    return f"{', '.join(rest)} or {last}" if rest else last
