import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from effbackbones.viz import predictions
from effbackbones.viz.predictions import draw_predictions

HALF = {"mean": [0.5], "std": [0.5]}
CLASSES = ["cat", "dog"]
PROBS = torch.tensor([[0.75, 0.25], [0.125, 0.875]])


def draw(out: Path, images: torch.Tensor, classes: int = 2, targets: torch.Tensor | None = None) -> None:
    probs = torch.full((len(images), classes), 1 / classes)
    channels = images.shape[1]
    names = [f"class {index}" for index in range(classes)]
    draw_predictions(images, probs, names, targets, out, mean=[0.5] * channels, std=[0.5] * channels)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures instead of saving them."""
    figures: list[Figure] = []
    monkeypatch.setattr(predictions, "save_figure", lambda figure, out: figures.append(figure))
    return figures


def texts(figure: Figure) -> list[tuple[str, str]]:
    return [(text.get_text(), to_hex(text.get_color())) for text in figure.texts]


@pytest.mark.parametrize(
    ("shape", "columns", "rows", "image_height"),
    [
        ((1, 1, 32, 32), 1, 1, 1.5),
        ((9, 3, 64, 64), 8, 2, 1.5),
        ((40, 1, 32, 32), 8, 4, 1.5),
        ((2, 3, 32, 64), 2, 1, 0.75),
    ],
)
def test_draw_predictions_png_has_the_size_of_its_grid(
    tmp_path: Path, shape: tuple[int, ...], columns: int, rows: int, image_height: float
) -> None:
    draw(tmp_path / "out.png", torch.zeros(shape), targets=torch.zeros(shape[0], dtype=torch.long))
    size = struct.unpack(">II", (tmp_path / "out.png").read_bytes()[16:24])
    inches = 0.14 + columns * (1.5 + 0.14), 0.14 + rows * (image_height + 2 * 0.15 + 0.14)
    assert size == pytest.approx([192 * length for length in inches], abs=1)


def test_draw_predictions_names_the_truth_where_wrong(tmp_path: Path, figures: list[Figure]) -> None:
    draw_predictions(torch.zeros(2, 1, 8, 8), PROBS, CLASSES, torch.tensor([0, 0]), tmp_path / "out.png", **HALF)
    assert texts(figures[0]) == [
        ("cat 75%", predictions.RIGHT),
        ("dog 88%", predictions.WRONG),
        ("true: cat", predictions.INK),
    ]


def test_draw_predictions_without_targets_judges_nothing(tmp_path: Path, figures: list[Figure]) -> None:
    draw_predictions(torch.zeros(2, 1, 8, 8), PROBS, CLASSES, None, tmp_path / "out.png", **HALF)
    assert texts(figures[0]) == [("cat 75%", predictions.INK), ("dog 88%", predictions.INK)]


def test_draw_predictions_normalises_back(tmp_path: Path, figures: list[Figure]) -> None:
    mean, std = [0.5, 0.25, 0.75], [0.5, 0.25, 0.5]
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    draw_predictions(images, PROBS[:1], CLASSES, None, tmp_path / "out.png", mean=mean, std=std)
    (shown,) = figures[0].axes[0].images
    np.testing.assert_allclose(shown.get_array(), pixels[0].permute(1, 2, 0), atol=1e-6)


def test_draw_predictions_half_precision_images_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    draw(tmp_path / "out.png", torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16))
    assert len(figures[0].axes) == 1


def test_draw_predictions_long_names_stay_below_their_image(tmp_path: Path, figures: list[Figure]) -> None:
    classes = ["W" * 80, "soft-coated wheaten terrier, a breed of dog"]
    draw_predictions(torch.zeros(2, 1, 8, 8), PROBS, classes, torch.tensor([1, 0]), tmp_path / "out.png", **HALF)
    figure = figures[0]
    assert all("…" in text.get_text() for text in figure.texts)
    assert max(text.get_window_extent().width for text in figure.texts) <= predictions.WIDTH * figure.dpi


def test_draw_predictions_dollar_signs_in_names_are_text(tmp_path: Path) -> None:
    names = ["$\\oops{$", "dog"]
    draw_predictions(torch.zeros(2, 1, 8, 8), PROBS, names, None, tmp_path / "out.png", **HALF)
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_bchw": torch.zeros(2, 4, 8, 8)}, r"images of shape \(2, 4, 8, 8\)"),
        ({"images_bchw": torch.zeros(0, 1, 8, 8)}, r"images of shape \(0, 1, 8, 8\)"),
        ({"images_bchw": torch.zeros(1, 8, 8)}, r"images of shape \(1, 8, 8\)"),
        ({"probs_bk": PROBS[:1]}, r"probs of shape \(1, 2\); expected \(2, 2\)"),
        ({"classes": ["cat"]}, r"probs of shape \(2, 2\); expected \(2, 1\)"),
        ({"targets_b": torch.zeros(3)}, r"targets of shape \(3,\)"),
        ({"mean": [0.5, 0.5, 0.5]}, "expected a value for each of 1 channels"),
    ],
)
def test_draw_predictions_shapes_that_disagree_raise_value_error(tmp_path: Path, change: dict, message: str) -> None:
    given = {"images_bchw": torch.zeros(2, 1, 8, 8), "probs_bk": PROBS, "classes": CLASSES, "targets_b": None, **HALF}
    with pytest.raises(ValueError, match=message):
        draw_predictions(**(given | change), out=tmp_path / "out.png")
