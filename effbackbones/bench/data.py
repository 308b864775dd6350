"""The input pipeline alone: images per second of a recipe's loader, and what an image costs in it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from effbackbones.bench.report import cpu_count, cpu_name, environment, number, write_json
from effbackbones.bench.timing import Spread, spread
from effbackbones.config import LoadedRecipe
from effbackbones.data import RecipeData

MIN_WINDOWS = 3
MIN_WINDOW = 0.1  # seconds
SPEEDS = (500, 1000, 2000)  # images per second of a device, to say what they need
HEAD = f"{'workers':>9}  {'images/s':>8}  {'quartiles':>13}  first batch"


@dataclass(frozen=True)
class Cost:
    """Seconds that an image takes in one process: to read and decode it, to augment it, to put it into a batch."""

    read: float
    augment: float
    collate: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.read + self.augment + self.collate


@dataclass(frozen=True)
class LoaderSpeed:
    """How fast a loader is with a number of worker processes.

    Attributes:
        workers: The number; 0 loads in this process.
        first_batch: Seconds until the first batch is there, the start of the processes included.
        samples: Images per second of the windows, in order of time.
    """

    workers: int
    first_batch: float
    samples: list[float]

    @property
    def images_per_second(self) -> Spread:
        """Median and quartiles of the samples."""
        return spread(self.samples)


def worker_counts(configured: int, cores: int) -> list[int]:
    """Return the numbers of workers to measure: 0, 1, 2, 4 and so on up to the cores, these, and the configured one."""
    doubling = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    return sorted({0, *doubling, cores, configured})


def measure_cost(data: RecipeData, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Cost:
    """Load batches in this process for so long, two at least, and return what an image takes. The first is warm-up."""
    loader, dataset = data.train_dataloader(), data.train_dataset
    owner: Any = dataset if hasattr(dataset, "transform") else dataset.source
    transform, augmenting = owner.transform, 0.0

    def timed(image: Any) -> Any:
        nonlocal augmenting
        began = clock()
        result = transform(image)
        augmenting += clock() - began
        return result

    owner.transform = timed
    try:
        loading = collating = 0.0
        images, begin = 0, clock()
        for batch, keys in enumerate(_endless(loader.batch_sampler)):
            if batch == 1:
                augmenting = loading = collating = 0.0
                images, begin = 0, clock()
            if batch > 1 and clock() - begin >= seconds:
                break
            began = clock()
            samples = [dataset[key] for key in keys]
            loaded = clock()
            loader.collate_fn(samples)
            loading, collating, images = loading + loaded - began, collating + clock() - loaded, images + len(keys)
    finally:
        owner.transform = transform
    return Cost((loading - augmenting) / images, augmenting / images, collating / images)


def measure_loader(
    loader: DataLoader, batch_size: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> LoaderSpeed:
    """Take batches for so long, three windows at least, one epoch after the other, and return how fast they come.

    A window is a batch of every worker at least, as these finish together. What the workers prepare ahead of the first
    window is left out.
    """
    workers = loader.num_workers
    batches, begin = _endless(loader), clock()
    next(batches)
    first_batch = clock() - begin
    for _ in range(workers * (loader.prefetch_factor or 0)):
        next(batches)
    samples: list[float] = []
    begin = clock()
    while len(samples) < MIN_WINDOWS or clock() - begin < seconds:
        taken, began = 0, clock()
        while taken == 0 or clock() - began < MIN_WINDOW:
            for _ in range(max(workers, 1)):
                next(batches)
            taken += max(workers, 1)
        samples.append(taken * batch_size / (clock() - began))
    return LoaderSpeed(workers, first_batch, samples)


def _endless(batches: Any) -> Iterator[Any]:
    return chain.from_iterable(repeat(batches))


class DataReport:
    """Collects what is measured of a recipe's input pipeline: lines to print, and a JSON document.

    Attributes:
        document: All there is, of plain types.

    Args:
        loaded: The recipe.
        overrides: Those of the command line.
        data: What it opens.
        seconds: How long to measure each.
    """

    def __init__(self, loaded: LoadedRecipe, overrides: Sequence[str], data: RecipeData, seconds: float):
        self._recipe, self._data = loaded.recipe, data
        self._speeds: list[LoaderSpeed] = []
        self.document: dict[str, Any] = {
            "format": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment("cpu"),
            "recipe": loaded.name,
            "overrides": list(overrides),
            "images": len(data.train_dataset),
            "batch_size": data.batch_size,
            "workers": self._recipe.data.workers,
            "seconds": seconds,
            "results": [],
        }

    def heading(self) -> str:
        """Return what is measured, and on what."""
        return (
            f"{cpu_name()}, {cpu_count()} cores\n{self.document['recipe']}: {len(self._data.train_dataset)} images of "
            f"{self._recipe.data.source}, batches of {self._data.batch_size}"
        )

    def add_cost(self, cost: Cost) -> str:
        """Take what an image costs, and return a line of it."""
        parts = {"read": cost.read, "augment": cost.augment, "collate": cost.collate}
        self.document["ms_per_image"] = {name: 1e3 * seconds for name, seconds in parts.items()}
        total, read, augment, collate = (
            number(1e3 * seconds) for seconds in (cost.total, cost.read, cost.augment, cost.collate)
        )
        return f"an image in one process: {total} ms = {read} read and decode + {augment} augment + {collate} batch"

    def add(self, speed: LoaderSpeed) -> str:
        """Take a speed, and return its row."""
        self._speeds.append(speed)
        median, lower, upper = speed.images_per_second
        self.document["results"].append(
            {
                "workers": speed.workers,
                "first_batch_s": speed.first_batch,
                "images_per_second": speed.images_per_second._asdict(),
                "samples": speed.samples,
            }
        )
        mark = "*" if speed.workers == self.document["workers"] else " "
        quartiles = f"{number(lower)}-{number(upper)}"
        return f"{mark}{speed.workers:>8}  {number(median):>8}  {quartiles:>13}  {speed.first_batch:.2f} s"

    def write(self, path: Path) -> None:
        """Write the JSON document, whole or not at all."""
        write_json(path, self.document)

    def conclusion(self) -> str:
        """Return what the speeds support."""
        fastest = max(self._speeds, key=lambda speed: speed.images_per_second.median)
        one = min(self._speeds, key=lambda speed: abs(speed.workers - 1))
        per_worker = one.images_per_second.median / max(one.workers, 1)
        needs = ", ".join(f"{speed} images/s {math.ceil(speed / per_worker)}" for speed in SPEEDS)
        self.document["images_per_second_and_worker"] = per_worker
        return (
            f"A worker prepares {number(per_worker)} images/s. Workers that a device needs which trains: {needs}.\n"
            f"The most here: {number(fastest.images_per_second.median)} images/s for all devices, with "
            f"{fastest.workers} workers on {cpu_count()} cores. *: the recipe's workers."
        )
