"""Curves of a training run, drawn from its metrics.csv."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from effbackbones.files import replacing
from effbackbones.train.logger import read_metrics

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
INK = "#333333"

Curve = Callable[[str], tuple[np.ndarray, np.ndarray]]  # name of a metric -> its abscissae and its finite values
Line = tuple[str, str, str, str]  # name of a metric, its label, colour and line style


def _with_ema(**lines: tuple[str, str]) -> tuple[Line, ...]:
    """Return a line for each name of a validation metric with its label and colour, then those of their averages."""
    plain = [(f"val/{name}", label, color, "-") for name, (label, color) in lines.items()]
    averaged = [(f"{name}_ema", f"{label}, EMA", color, "--") for name, label, color, _ in plain]
    return (*plain, *averaged)


SCORES: dict[str, tuple[Line, ...]] = {  # what a panel's ordinate says -> its fractions, drawn in percent
    "top-1 accuracy (%)": (
        ("val/top1", "validation", BLUE, "-"),
        ("val/top1_ema", "validation, EMA", ORANGE, "-"),
    ),
    "average precision (%)": _with_ema(
        box_ap=("box AP", BLUE), box_ap50=("box AP50", GREEN), mask_ap=("mask AP", ORANGE)
    ),
    "IoU and accuracy (%)": _with_ema(miou=("mIoU", BLUE), macc=("mean accuracy", ORANGE)),
}


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw the loss, the task's scores and the learning rate of a run; `out`'s ending says in which format.

    A panel whose metrics were not logged is left out.

    Raises:
        ValueError: the file holds nothing to draw, or is no metrics.csv.
    """
    metrics_csv = Path(metrics_csv)
    rows = read_metrics(metrics_csv)
    per_epoch = _steps_per_epoch(rows)

    def curve(name: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(row["step"] / (per_epoch or 1), row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        x, y = np.array(points).reshape(-1, 2).T
        return x, y

    panels: list[tuple[Callable[[Axes, Curve], None], tuple[str, ...]]] = [
        (_draw_loss, ("train/loss", "val/loss")),
        *(
            (partial(_draw_scores, ylabel, lines), tuple(name for name, *_ in lines))
            for ylabel, lines in SCORES.items()
        ),
        (_draw_lr, ("lr",)),
    ]
    drawn = [draw for draw, names in panels if any(curve(name)[0].size for name in names)]
    if not drawn:
        names = ", ".join(name for _, names in panels for name in names)
        raise ValueError(f"{metrics_csv}: nothing to draw in its {len(rows)} rows; expected numbers in one of {names}")

    figure = Figure(figsize=(4.4 * len(drawn), 3.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    figure.suptitle(metrics_csv.resolve().parent.name, fontsize=11, color=INK, parse_math=False)
    for draw, axes in zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        axes.set_xlabel("epoch" if per_epoch else "optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        clear_ground(axes)
        draw(axes, curve)
        axes.set_xlim(left=0)
    save_figure(figure, out)


def clear_ground(axes: Axes) -> None:
    """Leave of a panel's frame the two axes, over a pale grid."""
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure in one go, so that nobody meets a half-written picture."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        figure.savefig(part, format=out.suffix.removeprefix(".") or "png")


def _steps_per_epoch(rows: list[dict[str, float]]) -> float | None:
    """Return the length of an epoch; None while the first one has not come to its evaluation."""
    evaluated = any(name.startswith("val/") for row in rows for name in row)
    epochs = [(row["epoch"], row["step"]) for row in rows if "epoch" in row]
    if evaluated or any(epoch > 1 for epoch, _ in epochs):
        return max((step / epoch for epoch, step in epochs), default=None)
    return None


def _draw_loss(axes: Axes, curve: Curve) -> None:
    x, y = curve("train/loss")
    if x.size > 60:
        axes.plot(x, y, color=GREY, linewidth=0.6, alpha=0.4)
        axes.plot(x, _smooth(y, x.size // 30 | 1), color=GREY, linewidth=1.6, label="training (smoothed)")
    elif x.size:
        axes.plot(x, y, color=GREY, linewidth=1.6, marker=_marker(x), markersize=4, label="training")
    x, y = curve("val/loss")
    if x.size:
        axes.plot(x, y, color=BLUE, linewidth=1.6, marker=_marker(x), markersize=4, label="validation")
    # Detection and segmentation, which log no validation loss, train on weighted sums of several kinds of loss.
    axes.set_ylabel("loss (nats)" if x.size else "loss")
    axes.legend(frameon=False)


def _draw_scores(ylabel: str, lines: tuple[Line, ...], axes: Axes, curve: Curve) -> None:
    for name, label, color, style in lines:
        x, y = curve(name)
        if x.size:
            percent, best = 100 * y, y.argmax()
            label = f"{label}: best {percent[best]:.2f} %"
            axes.plot(x, percent, style, color=color, linewidth=1.6, marker=_marker(x), markersize=4, label=label)
            axes.plot(
                x[best], percent[best], "o", color=color, markersize=8, markerfacecolor="white", markeredgewidth=1.8
            )
    axes.set_ylabel(ylabel)
    if len(axes.get_legend_handles_labels()[1]) > 2:  # would hide the lines
        axes.legend(frameon=False, ncols=2, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    else:
        axes.legend(frameon=False)


def _draw_lr(axes: Axes, curve: Curve) -> None:
    x, y = curve("lr")
    axes.plot(x, y, color=INK, linewidth=1.6, marker=_marker(x), markersize=4)
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylim(bottom=0)


def _marker(x: np.ndarray) -> str:
    return "o" if x.size <= 20 else ""


def _smooth(y: np.ndarray, width: int) -> np.ndarray:
    """Return the centred moving average of `y`, over fewer points near its ends."""
    window = np.ones(width)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
