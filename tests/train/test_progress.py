import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from effbackbones.train.callbacks import progress
from effbackbones.train.callbacks.progress import ProgressLine
from effbackbones.train.logger import MetricsCSV, read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only in the steps of TinyModule."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines a terminal would show, without the blanks at their ends."""
        lines = []
        for raw in self.getvalue().split("\n"):
            shown = ""
            for text in raw.split("\r"):
                shown = text + shown[len(text) :]
            lines.append(shown.rstrip())
        return lines


class TinyModule(pl.LightningModule):
    """A training step takes 1 s and an evaluation batch 0.5 s, on the clock of the test."""

    def __init__(self, clock: Clock, train_seconds: float = 1.0) -> None:
        super().__init__()
        self.clock, self.train_seconds = clock, train_seconds
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.clock.now += self.train_seconds
        self.step_metrics = {"train/loss": torch.tensor(0.4123), "lr": 9.1e-4}
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 0.5
        self.log_dict({"val/loss": 0.512, "val/top1": 0.8134, "val/top5": 0.994, "val/top1_ema": 0.82})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"test/loss": 0.04, "test/top1": 0.7})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(5 * batches, 2), torch.zeros(5 * batches)), batch_size=5)


def trainer(bar: ProgressLine, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callbacks = [bar, *options.pop("callbacks", [])]
    return pl.Trainer(**{"accelerator": "cpu", "num_sanity_val_steps": 0, "callbacks": callbacks, **quiet, **options})


EVALUATED = "top1 81.3  top5 99.4  top1_ema 82.0  loss 0.512"


def test_fit_plain_output_prints_each_epoch_and_evaluation(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine(), max_epochs=2).fit(TinyModule(clock), loader(4), loader(2))
    # 4 and 0 batches of 1 s are left; an evaluation is taken for 2 / 3 s until one was timed at 1 s.
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 1/8  loss 0.412  lr 9.1e-04",
        "epoch 1/2  step 4/8  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:05 left",
        f"epoch 1/2  {EVALUATED}",
        "epoch 2/2  step 8/8  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:01 left",
        f"epoch 2/2  {EVALUATED}",
    ]


def test_fit_plain_output_prints_at_most_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine(), max_epochs=1).fit(TinyModule(clock), loader(35))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == [f"step {step}/35" for step in (1, 11, 21, 31, 35)]
    assert [line.split("  ")[-1] for line in lines[1:]] == ["0:24 left", "0:14 left", "0:04 left", "0:00 left"]


def test_fit_terminal_rewrites_one_line_and_keeps_the_evaluations(clock: Clock) -> None:
    terminal = Terminal()
    trainer(ProgressLine(terminal), max_epochs=2).fit(TinyModule(clock), loader(4), loader(2))
    assert terminal.screen() == [f"epoch 1/2  {EVALUATED}", f"epoch 2/2  {EVALUATED}", ""]
    assert "\repoch 1/2  step 3/8  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:06 left" in terminal.getvalue()
    assert "\repoch 2/2  evaluation 1/2 " in terminal.getvalue()


def test_fit_terminal_without_evaluation_keeps_the_last_line_of_each_epoch(clock: Clock) -> None:
    terminal = Terminal()
    trainer(ProgressLine(terminal), max_epochs=2).fit(TinyModule(clock), loader(4))
    assert terminal.screen() == [
        "epoch 1/2  step 4/8  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:04 left",
        "epoch 2/2  step 8/8  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:00 left",
        "",
    ]


def test_fit_terminal_updates_at_most_five_times_a_second(clock: Clock) -> None:
    terminal = Terminal()
    trainer(ProgressLine(terminal), max_epochs=1).fit(TinyModule(clock, train_seconds=0.0625), loader(64))
    assert terminal.getvalue().count("\r") == 17  # 4 s: each fourth batch, the first and the last
    assert "80 img/s" in terminal.screen()[0]


def test_fit_narrow_terminal_never_wraps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    terminal = Terminal()
    trainer(ProgressLine(terminal), max_epochs=1).fit(TinyModule(clock), loader(4))
    updates = terminal.getvalue().rstrip("\n").split("\r")[1:]
    assert {len(update) for update in updates} == {23}
    assert updates[-1] == "epoch 1/1  step 4/4  lo"


def test_fit_accumulation_counts_optimizer_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine(), max_epochs=2, accumulate_grad_batches=2).fit(TinyModule(clock), loader(5))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 0/6  loss 0.412  lr 9.1e-04",
        "epoch 1/2  step 3/6  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:06 left",
        "epoch 2/2  step 6/6  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:00 left",
    ]


def test_fit_limited_batches_and_max_steps_end_where_training_ends(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 9, "max_steps": 5}
    trainer(ProgressLine(), **limits).fit(TinyModule(clock), loader(20), loader(20))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 1/5  loss 0.412  lr 9.1e-04",
        "epoch 1/2  step 3/5  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:02 left",
        f"epoch 1/2  {EVALUATED}",
        "epoch 2/2  step 5/5  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:00 left",
    ]


def test_fit_resumed_counts_from_its_checkpoint(
    clock: Clock, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save = ModelCheckpoint(tmp_path, "step{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1)
    trainer(ProgressLine(), max_epochs=1, enable_checkpointing=True, callbacks=[save]).fit(TinyModule(clock), loader(4))
    capsys.readouterr()
    checkpoint = {"ckpt_path": tmp_path / "step4.ckpt", "weights_only": True}
    trainer(ProgressLine(), max_epochs=3).fit(TinyModule(clock), loader(4), **checkpoint)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 2/3  step 5/12  loss 0.412  lr 9.1e-04",
        "epoch 2/3  step 8/12  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:04 left",
        "epoch 3/3  step 12/12  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:00 left",
    ]


class SlowImages(TensorDataset):
    """Reading an image takes 0.2 s on the clock of the test."""

    def __init__(self, clock: Clock, images: int) -> None:
        super().__init__(torch.ones(images, 2), torch.zeros(images))
        self.clock = clock

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.clock.now += 0.2
        return super().__getitem__(index)


class SlowCallback(pl.Callback):
    """Takes 2 s after each batch, on the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.now += 2


def test_fit_waiting_for_data_shows_the_share_of_the_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (DataLoader(SlowImages(clock, images), batch_size=5) for images in (20, 30))
    trainer(ProgressLine(), max_epochs=2).fit(TinyModule(clock), train, val)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "img/s" in line] == [
        "epoch 1/2  step 4/8  loss 0.412  lr 9.1e-04  2.5 img/s  wait 50%  0:16 left",
        "epoch 2/2  step 8/8  loss 0.412  lr 9.1e-04  2.5 img/s  wait 50%  0:09 left",
    ]


def test_fit_other_work_between_batches_is_no_wait(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    images = DataLoader(SlowImages(clock, 20), batch_size=5)
    trainer(ProgressLine(), max_epochs=1, callbacks=[SlowCallback(clock)]).fit(TinyModule(clock), images)
    assert "1.2 img/s  wait 25%" in capsys.readouterr().out  # of 4 s


def test_fit_logs_speed_and_wait_in_the_rows_of_the_logger(clock: Clock, tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    images = DataLoader(SlowImages(clock, 35), batch_size=5)
    trainer(ProgressLine(), max_epochs=1, logger=log, log_every_n_steps=3).fit(TinyModule(clock), images)
    rows = read_metrics(log.path)
    assert [row["step"] for row in rows] == [3, 6]
    assert [(row["train/images_per_second"], row["train/data_wait"]) for row in rows] == [
        (pytest.approx(2.5), pytest.approx(0.5))
    ] * 2


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return iter([(torch.ones(2), 0)] * 20)


def test_fit_data_without_length_shows_no_totals(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine(), max_epochs=1).fit(TinyModule(clock), DataLoader(Endless(), batch_size=5))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1  step 1  loss 0.412  lr 9.1e-04",
        "epoch 1  step 4  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%",
    ]


def test_fit_several_processes_counts_the_images_of_all(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 8)
    trainer(ProgressLine(), max_epochs=1).fit(TinyModule(clock), loader(4))
    assert "40 img/s" in capsys.readouterr().out


def test_fit_sanity_check_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine(), max_epochs=1, num_sanity_val_steps=2).fit(TinyModule(clock), loader(4), loader(2))
    assert capsys.readouterr().out.startswith("epoch 1/1  step 1/4")


def test_fit_metrics_are_read_for_shown_lines_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = progress._number
    monkeypatch.setattr(progress, "_number", lambda value: read.append(1) or real(value))
    stream = io.StringIO()
    trainer(ProgressLine(stream), max_epochs=1).fit(TinyModule(clock), loader(35))
    assert len(read) == len(stream.getvalue().splitlines()) == 5


def test_fit_disabled_as_on_other_ranks_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressLine()
    bar.disable()
    trainer(bar, max_epochs=1).fit(TinyModule(clock), loader(2), loader(2))
    assert capsys.readouterr().out == ""


class FailingModule(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise RuntimeError("broken batch")
        return super().training_step(batch, batch_idx)


def test_fit_exception_on_a_terminal_finishes_the_line(clock: Clock) -> None:
    terminal = Terminal()
    with pytest.raises(RuntimeError, match="broken batch"):
        trainer(ProgressLine(terminal), max_epochs=1).fit(FailingModule(clock), loader(4))
    assert terminal.screen() == ["epoch 1/1  step 2/4  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:02 left", ""]


class TalkingModule(TinyModule):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.print("a message")


def test_print_on_a_terminal_stands_above_the_line(clock: Clock) -> None:
    terminal = Terminal()
    trainer(ProgressLine(terminal), max_epochs=1).fit(TalkingModule(clock), loader(3))
    line = "epoch 1/1  step 3/3  loss 0.412  lr 9.1e-04  5.0 img/s  wait 0%  0:00 left"
    assert terminal.screen() == ["a message", line, ""]


def test_validate_alone_prints_its_metrics_without_epoch(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine()).validate(TinyModule(clock), loader(3), verbose=False)
    assert capsys.readouterr().out.splitlines() == ["evaluation 1/3", EVALUATED]


def test_test_alone_prints_its_metrics(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(ProgressLine()).test(TinyModule(clock), loader(3), verbose=False)
    assert capsys.readouterr().out.splitlines() == ["evaluation 1/3", "top1 70.0  loss 0.04"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (103, "1:43"), (3599.6, "1:00:00"), (7384, "2:03:04"), (400_000, "111:06:40")]
)
def test_duration_shows_hours_where_there_are_any(seconds: float, shown: str) -> None:
    assert progress._duration(seconds) == shown
