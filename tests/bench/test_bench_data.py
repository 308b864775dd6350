"""The loader alone: what is timed, on a clock of the test, and the command with real loaders."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from effbackbones.bench import report
from effbackbones.bench.data import Cost, DataReport, LoaderSpeed, measure_cost, measure_loader, worker_counts
from effbackbones.cli import main
from effbackbones.config import LoadedRecipe, load_recipe
from effbackbones.data import RecipeData
from effbackbones.train.run import open_data

RECIPE = """
model: {name: uniformer_small}
data: {source: synthetic, num_classes: 3, size: 32, batch_size: 4, workers: 3, synthetic_images: 20}
trainer: {devices: 1}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def loaded(recipe: Path) -> LoadedRecipe:
    return load_recipe(recipe)


class Source:
    """Reading an image takes 2 ms, of the first batch 1 s, on the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.read = clock, 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read += 1
        self.clock.now += 1 if self.read <= 4 else 0.002
        return Image.new("RGB", (40, 40)), 0


def slow_data(loaded: LoadedRecipe, clock: Clock) -> RecipeData:
    """Return data that take 2, 3 and 4 ms of an image to read, to augment and to collate."""

    def transform(image: Image.Image) -> Tensor:
        clock.now += 0.003
        return torch.zeros(3, 32, 32)

    def collate(samples: list[Any]) -> list[Any]:
        clock.now += 0.004 * len(samples)
        return samples

    data: Any = open_data(loaded.recipe)
    data.train_dataset.source, data.train_dataset.transform, data._collate = Source(clock), transform, collate
    return data


def test_cost_is_that_of_each_part_for_an_image_after_the_first_batch(loaded: LoadedRecipe) -> None:
    clock = Clock()
    data: Any = slow_data(loaded, clock)
    transform = data.train_dataset.transform
    cost = measure_cost(data, 0.5, clock)
    assert cost == Cost(pytest.approx(0.002), pytest.approx(0.003), pytest.approx(0.004))
    assert cost.total == pytest.approx(0.009)
    # 14 batches of 36 ms are the first to reach half a second, over more than two epochs.
    assert data.train_dataset.source.read == 4 + 14 * 4
    assert data.train_dataset.transform is transform


def test_cost_is_of_one_batch_after_the_first_at_least(loaded: LoadedRecipe) -> None:
    clock = Clock()
    data: Any = slow_data(loaded, clock)
    assert measure_cost(data, 0.0, clock).total == pytest.approx(0.009)
    assert data.train_dataset.source.read == 8


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_cost_of_dense_data_has_all_parts(task: str, tmp_path: Path) -> None:
    pytest.importorskip("mmcv", reason="needs the mm extra")
    from small_scenes import dense_recipe

    cost = measure_cost(open_data(dense_recipe(task, tmp_path / "run").recipe), 0.0)
    assert min(cost.read, cost.augment, cost.collate) > 0


class Loader:
    """An epoch of 5 batches. The first of all takes a second; then each worker has brought two before they are asked
    for; from then on all workers bring one together, every 0.3 s."""

    prefetch_factor = 2

    def __init__(self, clock: Clock, num_workers: int) -> None:
        self.clock, self.num_workers, self.taken = clock, num_workers, 0

    def __iter__(self) -> Iterator[None]:
        for _ in range(5):
            ahead = self.taken - 1 - 2 * self.num_workers
            if self.taken == 0:
                self.clock.now += 1
            elif ahead >= 0 and ahead % self.num_workers == 0:
                self.clock.now += 0.3
            self.taken += 1
            yield


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_speed_of_a_loader_is_that_of_all_workers_in_the_long_run(workers: int) -> None:
    clock = Clock()
    loader: Any = Loader(clock, workers)
    speed = measure_loader(loader, 8, 1.0, clock)
    assert (speed.workers, speed.first_batch) == (workers, 1.0)
    assert speed.samples == [pytest.approx(8 * workers / 0.3)] * 4
    assert loader.taken == 1 + (2 + 4) * workers


def test_speed_of_a_loader_is_measured_over_three_windows_at_least() -> None:
    clock = Clock()
    loader: Any = Loader(clock, 1)
    assert len(measure_loader(loader, 8, 0.0, clock).samples) == 3


def test_speed_of_fast_batches_is_that_over_a_tenth_of_a_second() -> None:
    clock = Clock()

    class Fast(Loader):
        def __iter__(self) -> Iterator[None]:
            for _ in range(5):
                self.clock.now += 0.03
                self.taken += 1
                yield

    loader: Any = Fast(clock, 2)
    assert measure_loader(loader, 8, 0.0, clock).samples == [pytest.approx(8 / 0.03)] * 3
    assert loader.taken == 1 + 4 + 3 * 4


@pytest.mark.parametrize(
    ("configured", "cores", "counts"),
    [(4, 2, [0, 1, 2, 4]), (0, 1, [0, 1]), (2, 6, [0, 1, 2, 4, 6]), (10, 16, [0, 1, 2, 4, 8, 10, 16])],
)
def test_numbers_of_workers_double_up_to_the_cores(configured: int, cores: int, counts: list[int]) -> None:
    assert worker_counts(configured, cores) == counts


def test_conclusion_says_how_many_workers_a_device_needs(loaded: LoadedRecipe) -> None:
    made = DataReport(loaded, [], open_data(loaded.recipe), 1.0)
    rows = [
        made.add(LoaderSpeed(*values)) for values in ((0, 0.1, [450.0]), (1, 0.5, [400.0, 390, 410]), (3, 1.5, [780]))
    ]
    assert [row.split()[:3] for row in rows] == [
        ["0", "450.0", "450.0-450.0"],
        ["1", "400.0", "395.0-405.0"],
        ["*", "3", "780.0"],
    ]
    conclusion = made.conclusion()
    assert conclusion.startswith("A worker prepares 400.0 images/s.")
    assert "500 images/s 2, 1000 images/s 3, 2000 images/s 5" in conclusion
    assert "780.0 images/s for all devices, with 3 workers" in conclusion


# The command


def test_bench_data_prints_and_writes_what_it_measures(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "cpu_count", lambda: 1)
    out = tmp_path / "data.json"
    assert main(["bench", "data", str(recipe), "data.size=64", "--min-time", "0.01", "--out", str(out)]) == 0
    _, what, cost, _, *rows, needs, most = capsys.readouterr().out.splitlines()
    assert what == "small: 20 images of synthetic, batches of 4"
    total, *parts = map(float, re.findall(r"\d+\.\d+", cost))
    assert sum(parts) == pytest.approx(total, rel=0.01)
    assert [row.split()[:-4] for row in rows] == [["0"], ["1"], ["*", "3"]]
    assert needs.startswith("A worker prepares ")
    assert most.startswith("The most here: ")
    document = json.loads(out.read_text(encoding="utf-8"))
    assert (document["recipe"], document["overrides"]) == ("small", ["data.size=64"])
    assert min(document["ms_per_image"].values()) > 0
    assert [result["workers"] for result in document["results"]] == [0, 1, 3]
    assert all(len(result["samples"]) >= 3 and min(result["samples"]) > 0 for result in document["results"])


def test_bench_data_workers_are_those_asked_for_and_the_batch_that_of_a_device(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = ["data.global_batch=16", "trainer.devices=2", "trainer.accumulate=4"]
    assert main(["bench", "data", str(recipe), "--workers", "2", "--min-time", "0.01", *shares]) == 0
    _, what, _, _, row, *_ = capsys.readouterr().out.splitlines()
    assert what.endswith("batches of 2")
    assert row.split()[0] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "nowhere/a.json"], "in a folder that exists"),
        (["data.source=folder", "data.root=nowhere"], "nowhere"),
        (["data.sice=3"], "nearest: data.size"),
    ],
)
def test_bench_data_of_bad_input_is_one_message(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", str(recipe), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("effb bench: ")
    assert message in line
