"""A grid of images with what the model sees in them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from effbackbones.viz.curves import INK, save_figure

MAX_IMAGES, MAX_COLUMNS = 32, 8
WIDTH, LINE, GAP = 1.5, 0.15, 0.14  # inches: of an image, of a line below it, between cells
DPI = 192  # shows an image of 32 pixels at 9 times its size
FONT = 8  # points
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_predictions(
    images_bchw: Tensor,
    probs_bk: Tensor,
    classes: Sequence[str],
    targets_b: Tensor | None,
    out: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Draw up to 32 images with the predicted class and its probability: green if right, red with the truth if wrong.

    Args:
        images_bchw: model inputs of 1 or 3 channels, normalised with `mean` and `std` (0 to 1 scale, per channel).
        probs_bk: probabilities, 0 to 1.
        classes: the K names.
        targets_b: index of each image's true class; None where it is not known.
        out: the picture; its ending says in which format.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if images_bchw.ndim != 4 or len(images_bchw) == 0 or images_bchw.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images_bchw.shape)}; expected (B, 1 or 3, H, W) with B of at least 1")
    batch, channels, height, width = images_bchw.shape
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {list(mean)} and std {list(std)}; expected a value for each of {channels} channels")
    if probs_bk.shape != (batch, len(classes)):
        raise ValueError(f"probs of shape {tuple(probs_bk.shape)}; expected {(batch, len(classes))}, images by classes")
    if targets_b is not None and targets_b.shape != (batch,):
        raise ValueError(f"targets of shape {tuple(targets_b.shape)}; expected {(batch,)}, a class index per image")

    count = min(batch, MAX_IMAGES)
    mean_c11, std_c11 = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    images_bchw = (images_bchw[:count].detach().cpu().float() * std_c11 + mean_c11).clamp(0, 1)

    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    image_height = WIDTH * height / width
    cell_width = WIDTH + GAP
    cell_height = image_height + LINE * (1 if targets_b is None else 2) + GAP
    figure_width, figure_height = GAP + columns * cell_width, GAP + rows * cell_height
    figure = Figure(figsize=(figure_width, figure_height), dpi=DPI)
    FigureCanvasAgg(figure)  # measures text: without a canvas of its own, the figure makes one for each text
    for index in range(count):
        row, column = divmod(index, columns)
        left = GAP + column * cell_width
        bottom = figure_height - GAP - row * cell_height - image_height
        box = (left / figure_width, bottom / figure_height, WIDTH / figure_width, image_height / figure_height)
        axes = figure.add_axes(box, xticks=[], yticks=[])
        # "antialiased" keeps the pixels of a small image and smooths a large one.
        image_hwc = images_bchw[index].permute(1, 2, 0).numpy()
        axes.imshow(image_hwc, cmap="gray", vmin=0, vmax=1, interpolation="antialiased", aspect="auto")

        predicted = int(probs_bk[index].argmax())
        truth = predicted if targets_b is None else int(targets_b[index])
        color = WRONG if truth != predicted else INK if targets_b is None else RIGHT
        axes.spines[:].set(color=color, linewidth=1.5)
        lines = [("", classes[predicted], f" {probs_bk[index, predicted]:.0%}", color)]
        if truth != predicted:
            lines.append(("true: ", classes[truth], "", INK))
        for number, (before, name, after, ink) in enumerate(lines):
            y = bottom - 0.05 - number * LINE
            text = figure.text(left, y, "", size=FONT, color=ink, va="top", transform=figure.dpi_scale_trans)
            text.set_parse_math(False)
            _fill(text, before, name, after)
    save_figure(figure, out)


def _fill(text: Text, before: str, name: str, after: str) -> None:
    """Put the three into a line of text, the name shortened where it would be wider than its image."""
    text.set_text(before + name + after)
    kept = min(len(name), 60)  # more would not fit even of the narrowest letters
    while kept and text.get_window_extent().width > WIDTH * DPI:
        kept -= 1
        text.set_text(f"{before}{name[:kept].rstrip()}…{after}")
