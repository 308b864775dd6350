import struct
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from effbackbones.viz import curves
from effbackbones.viz.curves import plot_curves

HEADER = "epoch,step,train/loss,lr,val/loss,val/top1,val/top1_ema\n"
TWO_EPOCHS = HEADER + (
    "1,5,2.3,0.0005,,,\n"
    "1,10,1.9,0.001,1.5,0.7,0.6\n"
    "2,15,nan,0.0005,,,\n"
    "2,20,1.2,0,1.25,0.825,0.75\n"
)  # fmt: skip


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def write(folder: Path, text: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text)
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures instead of saving them."""
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, out: figures.append(figure))
    return figures


@pytest.mark.parametrize(
    ("text", "panels"),
    [
        (TWO_EPOCHS, 3),
        (HEADER + "1,1,2.3,0.001,,,\n", 2),
        (HEADER + "1,1,nan,0.001,nan,,\n", 1),
        ("epoch,step,val/top1_ema\n1,7,0.5\n", 1),
        ("epoch,step,val/loss,val/top1\n,7,0.5,0.5\n,8,0.5,0.5\n", 2),
        ("epoch,step,train/loss,lr\n" + "".join(f"1,{s},{s % 7},0.1\n" for s in range(1, 200)), 2),
    ],
    ids=["all", "one row", "nan", "ema alone", "epoch missing", "many steps"],
)
def test_plot_curves_any_rows_draws_one_panel_per_kind_of_metric(tmp_path: Path, text: str, panels: int) -> None:
    plot_curves(write(tmp_path, text), tmp_path / "plots" / "curves.png")
    assert png_size(tmp_path / "plots" / "curves.png") == (660 * panels, 540)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curves.png"]


def test_plot_curves_whole_epochs_are_the_abscissa(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves(write(tmp_path, TWO_EPOCHS), tmp_path / "curves.png")
    loss = figures[0].axes[0]
    assert loss.get_xlabel() == "epoch"
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[0.5, 2.3], [1, 1.9], [2, 1.2]],
        [[1, 1.5], [2, 1.25]],
    ]


def test_plot_curves_first_epoch_unfinished_steps_are_the_abscissa(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves(write(tmp_path, HEADER + "1,5,2.3,0.1,,,\n1,10,2.2,0.1,,,\n"), tmp_path / "curves.png")
    loss = figures[0].axes[0]
    assert loss.get_xlabel() == "optimizer step"
    assert loss.lines[0].get_xdata().tolist() == [5, 10]


def test_plot_curves_top1_is_in_percent_with_the_best_marked(tmp_path: Path, figures: list[Figure]) -> None:
    rows = "1,1,,,,0.7,0.6\n2,2,,,,0.825,0.75\n3,3,,,,0.8,0.7\n"
    plot_curves(write(tmp_path, HEADER + rows), tmp_path / "curves.png")
    (top1,) = figures[0].axes
    assert top1.get_ylabel() == "top-1 accuracy (%)"
    assert [text.get_text() for text in top1.get_legend().get_texts()] == [
        "validation: best 82.50 %",
        "validation, EMA: best 75.00 %",
    ]
    assert [line.get_xydata().tolist() for line in top1.lines if len(line.get_xydata()) == 1] == [
        [[2, 82.5]],
        [[2, 75]],
    ]


@pytest.mark.parametrize(
    ("columns", "ylabel", "legend"),
    [
        ("val/box_ap,val/box_ap50", "average precision (%)", ["box AP: best 30.00 %", "box AP50: best 60.00 %"]),
        (
            "val/box_ap_ema,val/mask_ap",
            "average precision (%)",
            ["mask AP: best 60.00 %", "box AP, EMA: best 30.00 %"],
        ),
        ("val/miou,val/macc", "IoU and accuracy (%)", ["mIoU: best 30.00 %", "mean accuracy: best 60.00 %"]),
        ("val/miou,val/miou_ema", "IoU and accuracy (%)", ["mIoU: best 30.00 %", "mIoU, EMA: best 60.00 %"]),
    ],
)
def test_plot_curves_dense_scores_are_in_percent_over_epochs(
    tmp_path: Path, figures: list[Figure], columns: str, ylabel: str, legend: list[str]
) -> None:
    text = f"epoch,step,train/loss,train/loss_cls,{columns}\n1,5,2,1,,\n1,10,1,0.5,0.3,0.6\n"
    plot_curves(write(tmp_path, text), tmp_path / "curves.png")
    loss, scores = figures[0].axes
    assert (loss.get_ylabel(), scores.get_ylabel(), scores.get_xlabel()) == ("loss", ylabel, "epoch")
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[0.5, 2], [1, 1]]]
    assert [text.get_text() for text in scores.get_legend().get_texts()] == legend


def test_plot_curves_six_scores_do_not_lie_under_the_legend(tmp_path: Path, figures: list[Figure]) -> None:
    names = [f"val/{name}{ema}" for name in ("box_ap", "box_ap50", "mask_ap") for ema in ("", "_ema")]
    text = f"epoch,step,{','.join(names)}\n" + "".join(f"{e},{e}{f',0.{e}' * 6}\n" for e in range(1, 9))
    plot_curves(write(tmp_path, text), tmp_path / "curves.png")
    (scores,) = figures[0].axes
    figures[0].canvas.draw()
    assert len(scores.get_legend().get_texts()) == 6
    assert scores.get_legend().get_window_extent().y0 >= scores.bbox.y1


@pytest.mark.parametrize("text", ["", HEADER, HEADER + "1,1,nan,,,,\n"])
def test_plot_curves_nothing_to_draw_raises_value_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"metrics\.csv: nothing to draw .* train/loss"):
        plot_curves(write(tmp_path, text), tmp_path / "curves.png")


def test_plot_curves_leaves_matplotlib_settings_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_curves(write(tmp_path, TWO_EPOCHS), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_save_figure_that_fails_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "curves.png"
    out.write_bytes(b"old")

    def fail(self: Figure, path: Path, format: str) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        curves.save_figure(Figure(), out)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("curves.png", b"old")]


def test_save_figure_ending_selects_the_format(tmp_path: Path) -> None:
    curves.save_figure(Figure(), tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
