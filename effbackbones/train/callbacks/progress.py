"""One line of progress for a run, rewritten in place on a terminal and printed now and then elsewhere."""

import math
import shutil
import sys
import time
from collections import deque
from typing import Any, NamedTuple, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer.states import TrainerFn

from effbackbones.train.callbacks.stop import total_steps

TERMINAL_SECONDS = 0.2  # between two updates of the line on a terminal
PLAIN_SECONDS = 10.0  # between two lines anywhere else
WINDOW = 50  # batches the speed is averaged over


class _Batch(NamedTuple):
    seconds: float
    waited: float
    images: int


class Speed(NamedTuple):
    """How fast a run trains, over all devices; the wait is the share of the time (0 to 1) spent waiting for data."""

    seconds_per_batch: float
    images_per_second: float
    data_wait: float


class Throughput(Profiler):
    """The speed of training over its last 50 batches, and the share of that time in which the loop waits for data.

    The first batch of a process, with its compilation and warm-up, and evaluations are left out. The wait is that of
    the host, from asking the loader for a batch to having it, and nothing here waits for a device: one that still has
    work queued meanwhile is idle for less. A trainer whose profiler this is says when it asks for a batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._window: deque[_Batch] = deque(maxlen=WINDOW)
        self._ended_at: float | None = None
        self._asked_at = 0.0
        self._waited = 0.0  # since the last batch ended

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._asked_at = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._waited += time.monotonic() - self._asked_at

    def restart(self) -> None:
        """Begin anew: the next batch is the first one."""
        self._window.clear()
        self._ended_at = None

    def end_batch(self, images: int) -> None:
        """Count a batch, of so many images on all devices, as done now."""
        now = time.monotonic()
        if self._ended_at is not None:
            self._window.append(_Batch(now - self._ended_at, self._waited, images))
        self._ended_at, self._waited = now, 0.0

    def leave_out(self, seconds: float) -> None:
        """Leave out so many seconds since the last batch ended."""
        if self._ended_at is not None:
            self._ended_at += seconds

    def speed(self) -> Speed | None:
        """Return the speed over the window; None before the second batch."""
        seconds = sum(batch.seconds for batch in self._window)
        if not seconds:
            return None
        images, waited = sum(batch.images for batch in self._window), sum(batch.waited for batch in self._window)
        return Speed(seconds / len(self._window), images / seconds, waited / seconds)


class ProgressLine(ProgressBar):
    """Show `epoch 2/10  step 1430/7800  loss 0.412  lr 9.1e-04  812 img/s  wait 3%  1:43 left`, and evaluations.

    Steps are optimizer steps of the whole run; images/s are those of all devices, evaluation excluded; the wait is the
    share of the time in which the loop waits for its loader; the time left is that of the whole run, with the
    evaluations to come. Speed and wait are logged too. Batches are (images, targets), or hold the images as `inputs`.

    Args:
        stream: where to write; None: standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self.is_enabled = True
        self._line = ""  # what stands on the terminal's current line
        self._shown_at = -math.inf
        self._throughput = Throughput()
        self._evaluation_began_at = 0.0
        self._evaluation_seconds: float | None = None
        self._batches_evaluated = 0

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the line."""
        line = self._line
        self._erase()
        print(*args, **{"file": self.stream} | kwargs)
        if line:
            self._show(line)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.profiler = self._throughput  # type: ignore[attr-defined]

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._throughput.restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._throughput.end_batch(_images(batch) * trainer.world_size)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and (speed := self._throughput.speed()):
            metrics = {"train/images_per_second": speed.images_per_second, "train/data_wait": speed.data_wait}
            pl_module.log_dict(metrics)
        if trainer.is_last_batch or self._is_due(time.monotonic()) or trainer.global_step >= total_steps(trainer):
            self._show(self._train_line(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish()

    # Evaluation, within a run or alone

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation_began_at = time.monotonic()
        self._batches_evaluated = 0

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            return
        self._batches_evaluated += 1
        if self._is_due(time.monotonic()):
            batches = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
            self._show(_join(_epoch(trainer), f"evaluation {_of(self._batches_evaluated, batches)}"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._evaluation_seconds = time.monotonic() - self._evaluation_began_at
        self._throughput.leave_out(self._evaluation_seconds)
        self._show(_join(_epoch(trainer), *_evaluation_metrics(trainer)))
        self._finish()

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    # What the line says

    def _train_line(self, trainer: Trainer) -> str:
        # Reading a metric waits for the device: this is called for lines that are shown, and only for those.
        metrics = getattr(trainer.lightning_module, "step_metrics", {}) if self.is_enabled else {}
        speed = self._throughput.speed()
        return _join(
            _epoch(trainer),
            f"step {_of(trainer.global_step, total_steps(trainer))}",
            f"loss {_number(float(metrics['train/loss']))}" if "train/loss" in metrics else "",
            f"lr {float(metrics['lr']):.1e}" if "lr" in metrics else "",
            _rate(speed.images_per_second) if speed else "",
            f"wait {speed.data_wait:.0%}" if speed else "",
            self._time_left(trainer, speed.seconds_per_batch) if speed else "",
        )

    def _time_left(self, trainer: Trainer, seconds_per_batch: float) -> str:
        """Return the time the rest of the run takes; nothing where its length is not known."""
        steps_in_all = total_steps(trainer)
        if math.isinf(steps_in_all):
            return ""
        batches = (steps_in_all - trainer.global_step) * trainer.accumulate_grad_batches
        every = trainer.check_val_every_n_epoch if trainer.enable_validation else None
        epochs = steps_in_all // _steps_per_epoch(trainer)
        evaluations = epochs // every - trainer.current_epoch // every if every else 0
        evaluation_seconds = self._evaluation_seconds
        if evaluation_seconds is None:  # none was timed yet: a forward pass is about a third of a training step
            evaluation_seconds = sum(trainer.num_val_batches) * seconds_per_batch / 3
        seconds = batches * seconds_per_batch + max(evaluations, 0) * evaluation_seconds
        return f"{_duration(seconds)} left" if math.isfinite(seconds) else ""

    # Where it says it

    @property
    def stream(self) -> TextIO:
        return self._stream or sys.stdout

    def _is_due(self, now: float) -> bool:
        return now - self._shown_at >= (TERMINAL_SECONDS if self.stream.isatty() else PLAIN_SECONDS)

    def _show(self, line: str) -> None:
        """Put `line` in the place of the one shown before, or on a line of its own where there is no terminal."""
        self._shown_at = time.monotonic()
        if not self.is_enabled:
            return
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            self.stream.write(f"\r{line[:width]:{width}}")
            self._line = line
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def _erase(self) -> None:
        if self._line:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{'':{width}}\r")
            self._line = ""

    def _finish(self) -> None:
        """Leave the line that is shown where it is, and begin the next one below."""
        if self._line:
            self.stream.write("\n")
            self.stream.flush()
            self._line = ""


def _images(batch: Any) -> int:
    return len(batch["inputs"] if isinstance(batch, dict) else batch[0])


def _steps_per_epoch(trainer: Trainer) -> float:
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def _epoch(trainer: Trainer) -> str:
    """Return `epoch 2/10` within a run, nothing for an evaluation alone."""
    if trainer.state.fn != TrainerFn.FITTING:
        return ""
    steps, steps_per_epoch = total_steps(trainer), _steps_per_epoch(trainer)
    bounded = math.isfinite(steps) and math.isfinite(steps_per_epoch)
    epochs = math.ceil(steps / steps_per_epoch) if bounded else math.inf
    return f"epoch {_of(trainer.current_epoch + 1, epochs)}"


def _evaluation_metrics(trainer: Trainer) -> list[str]:
    """Return the metrics of the evaluation that just ended: shares in percent, then losses."""
    prefix = "test/" if trainer.testing else "val/"
    found = {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    shares = [f"{name} {value:.1%}".removesuffix("%") for name, value in found.items() if "loss" not in name]
    return shares + [f"{name} {_number(value)}" for name, value in found.items() if "loss" in name]


def _join(*parts: str) -> str:
    return "  ".join(filter(None, parts))


def _of(count: int, total: float) -> str:
    return f"{count}/{total:.0f}" if math.isfinite(total) else str(count)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _rate(rate: float) -> str:
    return f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.1f} img/s"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
