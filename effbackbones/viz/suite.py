"""The suite of benchmarks as a picture: throughput over accuracy, and memory over resolution."""

import math
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effbackbones.bench.report import hardware
from effbackbones.bench.suite import CLASSIFIER, MODELS, REFERENCE, Cell, Entry, by_cell
from effbackbones.models._zoo import ZOO
from effbackbones.viz.curves import INK, clear_ground, save_figure


def plot_suite(document: dict[str, Any], out: Path) -> None:
    """Draw what a suite's file holds; `out`'s ending says in which format.

    Left, images per second in inference at 224 over published top-1; right, the peak memory of a training step in
    dense mode over the area of the image. Full marks and lines are ours, hollow and dashed ones the reference paths'.
    """
    colors = {name: colormaps["tab10"](i) for i, names in enumerate(MODELS.values()) for name in names}
    cells = {
        cell: versus[REFERENCE]
        for cell, versus in by_cell(document).items()
        if REFERENCE in versus and cell.name in colors
    }
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    environment = document["environment"]
    figure.suptitle(f"{hardware(environment)}; torch {environment['versions']['torch']}", fontsize=10, color=INK)
    speed, memory = figure.subplots(1, 2)
    _draw_speed(speed, cells, colors)
    _draw_memory(memory, cells, colors)
    for axes in (speed, memory):
        clear_ground(axes)
    save_figure(figure, out)


def _draw_speed(axes: Axes, cells: dict[Cell, tuple[Entry, Entry]], colors: dict[str, Any]) -> None:
    top1 = {row.model: row.top1 for row in ZOO if (row.size, row.size) == CLASSIFIER}
    for cell, (ours, reference) in cells.items():
        accuracy = top1.get(cell.name)
        if cell.mode != "inference" or cell.size != CLASSIFIER or cell.dense or accuracy is None:
            continue
        speeds = [reference["images_per_second"], ours["images_per_second"]]
        color = colors[cell.name]
        axes.plot(speeds, [accuracy] * 2, color=color, linewidth=1)
        axes.scatter(speeds, [accuracy] * 2, color=["white", color], edgecolors=[color], zorder=3)
        axes.annotate(cell.name, (speeds[1], accuracy), (6, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xscale("log")
    axes.set_xlabel("inference at 224, images/s")
    axes.set_ylabel("published ImageNet-1K top-1, %")


def _draw_memory(axes: Axes, cells: dict[Cell, tuple[Entry, Entry]], colors: dict[str, Any]) -> None:
    for name, color in colors.items():
        areas = sorted(
            (math.prod(cell.size), *(entry["peak_bytes"] / 2**30 / entry["batch"] for entry in pair))
            for cell, pair in cells.items()
            if cell.name == name and cell.mode == "train" and cell.dense
        )
        if areas:
            megapixels = [area / 1e6 for area, *_ in areas]
            axes.plot(megapixels, [peak for _, peak, _ in areas], "o-", color=color, label=name, markersize=4)
            axes.plot(megapixels, [peak for *_, peak in areas], "o--", color=color, mfc="white", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("megapixels of an image, dense mode")
    axes.set_ylabel("peak memory of a training step, GiB per image")
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)
