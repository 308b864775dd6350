import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from small_runs import differences, outcome, small_recipe, train

from effbackbones.config import RecipeError
from effbackbones.train import run
from effbackbones.train.logger import Backend, MetricsCSV, read_metrics

pytestmark = [
    pytest.mark.filterwarnings("error:.*cannot be written", "error:run.loggers"),
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


def test_rows_that_cannot_be_written_are_kept_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_steps(tmp_path, 3)
    before = log.path.read_text()

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.warns(UserWarning, match=f"{log.path} cannot be written: .*No space left on device"):
            log.log_metrics({"new": 1.0, "epoch": 0}, 3)
        log.log_metrics({"new": 2.0, "epoch": 0}, 4)
    assert log.path.read_text() == before
    assert list(tmp_path.iterdir()) == [log.path]
    log.log_metrics({"new": 3.0, "epoch": 0}, 5)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4, 5, 6]
    assert [row["new"] for row in read_metrics(log.path)[3:]] == [1, 2, 3]


def test_full_disk_under_an_appended_row_loses_none(tmp_path: Path) -> None:
    log = log_steps(tmp_path, 2)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="No space left on device"):
        log.log_metrics({"loss": 0.0, "epoch": 0}, 2)
    log.path.unlink()
    log.log_metrics({"loss": -1.0, "epoch": 0}, 3)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]


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


# Backends


class Down(Logger):
    """A backend that fails from one of its calls on, counted from 0, and notes those that reach it."""

    def __init__(self, fails_at: int = 10**9) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.calls: list[str] = []

    def call(self, what: str) -> None:
        self.calls.append(what)
        if len(self.calls) > self.fails_at:
            raise ConnectionError("no route to host")

    name = version = ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the resolved recipe is in the run folder")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.call(f"{step} {metrics}")

    def save(self) -> None:
        self.call("save")

    def finalize(self, status: str) -> None:
        self.call(status)


def use(backend: Backend) -> None:
    backend.log_hyperparams({"lr": 1.0})
    backend.log_metrics({"loss": 1.0}, 0)
    backend.save()
    backend.finalize("success")


def test_backend_passes_on_what_is_logged() -> None:
    down = Down()
    use(Backend("wandb", lambda: down))
    assert down.calls == ["0 {'loss': 1.0}", "save", "success"]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_backend_that_fails_is_left_out_from_there_on_with_one_warning(fails_at: int) -> None:
    down = Down(fails_at)
    backend = Backend("wandb", lambda: down)
    with pytest.warns(UserWarning, match="wandb has failed, and is left out from here on: ConnectionError: no route"):
        use(backend)
    assert len(down.calls) == fails_at + 1
    use(backend)
    assert len(down.calls) == fails_at + 1


def test_backend_that_cannot_be_built_is_left_out_with_one_warning() -> None:
    def build() -> Logger:
        raise ConnectionError("no route to host")

    with pytest.warns(UserWarning, match="wandb has failed"):
        backend = Backend("wandb", build)
    use(backend)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_run_whose_backend_goes_down_ends_with_all_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any, name: str
) -> None:
    whole = uninterrupted()
    down = Down(fails_at=3)
    loggers = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger"}
    monkeypatch.setattr(f"effbackbones.train.logger.{loggers[name]}", lambda *args, **kwargs: down)
    monkeypatch.setattr(run, "find_spec", lambda module: True)
    with pytest.warns(UserWarning, match=f"run.loggers: {name} has failed") as warnings:
        folder = train(small_recipe(tmp_path / "run", [f"run.loggers=[{name}]"]))
    assert len([warning for warning in warnings if "run.loggers" in str(warning.message)]) == 1
    assert len(down.calls) == 4
    assert differences(whole, outcome(folder)) == []


def test_backend_that_is_not_installed_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda module: None)
    with pytest.raises(RecipeError, match=r"run\.loggers: wandb is not installed; pip install"):
        train(small_recipe(tmp_path / "run", ["run.loggers=[wandb]"]))
    assert [type(logger) for logger in run._backends(small_recipe(tmp_path / "run").recipe, tmp_path)] == []


@pytest.mark.parametrize(("chosen", "there"), [("null", True), ("[tensorboard]", True), ("[]", False)])
def test_run_logs_to_tensorboard_unless_told_otherwise(tmp_path: Path, chosen: str, there: bool) -> None:
    folder = train(small_recipe(tmp_path / "run", [f"run.loggers={chosen}", "trainer.steps=1"]))
    assert (folder / "tensorboard").is_dir() == there
