import multiprocessing
import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from effbackbones.train.logger import MetricsCSV, read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def log_steps(folder: Path, count: int) -> MetricsCSV:
    """Log `count` rows as Lightning does, whose steps begin at 0."""
    log = MetricsCSV(folder)
    for step in range(count):
        log.log_metrics({"loss": 2.0 - step, "epoch": 0}, step)
    return log


def test_log_metrics_writes_epoch_and_step_counted_from_one_first(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "run")
    log.log_metrics({"train/loss": 0.5, "lr": 1e-3, "epoch": 0}, 9)
    log.log_metrics({"train/loss": torch.tensor(0.25), "lr": 9.1e-4, "epoch": 1}, 19)
    assert (tmp_path / "run" / "metrics.csv").read_text() == (
        "epoch,step,train/loss,lr\n1,10,0.5,0.001\n2,20,0.25,0.00091\n"
    )


def test_log_metrics_same_step_makes_one_row(tmp_path: Path) -> None:
    log = log_steps(tmp_path, 2)
    log.log_metrics({"val/top1": 0.8, "epoch": 0}, 1)
    assert read_metrics(log.path) == [
        {"epoch": 1, "step": 1, "loss": 2.0},
        {"epoch": 1, "step": 2, "loss": 1.0, "val/top1": 0.8},
    ]


def test_log_metrics_new_column_keeps_rows_and_leaves_their_cells_empty(tmp_path: Path) -> None:
    log = log_steps(tmp_path, 1)
    log.log_metrics({"late": 7.0, "epoch": 0}, 1)
    assert log.path.read_text() == "epoch,step,loss,late\n1,1,2,\n1,2,,7\n"


def test_log_metrics_nan_and_infinity_are_read_back(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": float("nan"), "b": float("inf")}, 0)
    (row,) = read_metrics(log.path)
    assert row["a"] != row["a"]
    assert row["b"] == float("inf")


def test_log_metrics_large_step_is_exact(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1 / 3}, 123_456_788)
    assert read_metrics(log.path) == [{"step": 123_456_789, "a": pytest.approx(1 / 3, rel=1e-6)}]


def test_log_metrics_without_step_raises_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a step"):
        MetricsCSV(tmp_path).log_metrics({"a": 1.0})


def test_metrics_csv_existing_file_is_continued(tmp_path: Path) -> None:
    before = log_steps(tmp_path, 2).path.read_text()
    log = MetricsCSV(tmp_path)
    assert log.path.read_text() == before
    log.log_metrics({"loss": 0.0, "epoch": 0}, 2)
    assert log.path.read_text() == before + "1,3,0\n"


def test_metrics_csv_half_written_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = log_steps(tmp_path, 2).path
    whole = path.read_text()
    path.write_text(whole + "1,3,0.12")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    MetricsCSV(tmp_path).log_metrics({"loss": -1.0, "epoch": 0}, 3)
    assert path.read_text() == whole + "1,4,-1\n"


def test_metrics_csv_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log = log_steps(tmp_path, 1)
    log.resume_at(0)
    assert list(tmp_path.iterdir()) == []


def test_resume_at_drops_the_rows_beyond_the_step(tmp_path: Path) -> None:
    log_steps(tmp_path, 5)
    log = MetricsCSV(tmp_path)
    log.resume_at(3)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3]
    log.log_metrics({"loss": 9.0, "epoch": 0}, 3)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]


def test_resume_at_no_file_creates_none(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).resume_at(0)
    assert list(tmp_path.iterdir()) == []


def test_rewrite_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_steps(tmp_path, 3)
    before = log.path.read_text()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        log.log_metrics({"new": 1.0}, 3)
    assert log.path.read_text() == before
    assert list(tmp_path.iterdir()) == [log.path]


def _log_for_ever(folder: Path) -> None:
    log = MetricsCSV(folder)
    for step in range(1_000_000):
        log.log_metrics({"loss": step / 7, f"extra{step // 50 % 20}": 1.0, "epoch": 0}, step)


def test_metrics_csv_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("fork").Process(target=_log_for_ever, args=(tmp_path,))
    writer.start()
    path = tmp_path / "metrics.csv"
    deadline = time.monotonic() + 20
    while not path.exists() or path.stat().st_size < 8000:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()

    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["loss"] for row in rows] == pytest.approx([step / 7 for step in range(len(rows))], rel=1e-6)
    assert len(rows) > 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "expected a metrics.csv"),
        ("epoch,step,loss\n1,1,2\n1,2,oops\n", "line 3: .*oops"),
        ("epoch,step,loss\n1,1\n", "line 2: "),
    ],
)
def test_read_metrics_malformed_file_raises_value_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


class TinyModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", float(self.global_step))
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/top1", self.global_step / 100)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, epochs: int, accumulate: int, resume: Path | None = None) -> list[dict[str, float]]:
    """Train on 6 batches an epoch, every step logged and saved, and return the rows."""
    log = MetricsCSV(folder)
    if resume is not None:
        log.resume_at(torch.load(resume, weights_only=True)["global_step"])
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=log,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        callbacks=[
            ModelCheckpoint(folder, "step{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1),
            ModelCheckpoint(folder, "end{step}", auto_insert_metric_name=False, save_top_k=-1, monitor="val/top1"),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(12, 2)), batch_size=2)
    trainer.fit(TinyModule(), loader, loader, ckpt_path=resume, weights_only=True)
    return read_metrics(log.path)


@pytest.mark.parametrize(
    ("accumulate", "checkpoint"), [(1, "step4"), (1, "step6"), (1, "end6"), (2, "step2"), (2, "end3")]
)
def test_metrics_csv_resumed_trainer_logs_every_step_once(tmp_path: Path, accumulate: int, checkpoint: str) -> None:
    rows = fit(tmp_path, 2, accumulate)
    assert [row["step"] for row in rows] == list(range(1, 12 // accumulate + 1))
    assert fit(tmp_path, 2, accumulate, resume=tmp_path / f"{checkpoint}.ckpt") == rows
