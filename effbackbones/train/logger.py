"""Where a run logs: metrics.csv, one row per optimizer step, kept when a run is killed and resumed; and backends."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from effbackbones.files import replacing

KEYS = ("epoch", "step")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.csv, each without its empty cells.

    A last line that was cut off while it was being written is left out.

    Raises:
        ValueError: the file is no metrics.csv, or a cell is not a number.
    """
    text = Path(path).read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines:
        return []
    header = lines.pop(0)
    if tuple(header[:2]) != KEYS:
        raise ValueError(f"{path}: the header is {header}; expected a metrics.csv, which begins with epoch,step")
    rows = []
    for number, cells in enumerate(lines, start=2):
        try:
            rows.append({name: float(cell) for name, cell in zip(header, cells, strict=True) if cell})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected {len(header)} numbers: repair it") from None
    return rows


class MetricsCSV(Logger):
    """Append what Lightning logs to `<folder>/metrics.csv`.

    Columns: epoch and step, both counted from 1 (step is the number of optimizer steps taken, as in
    `trainer.global_step`), then the metrics in the order they first came. What is logged at one step
    is one row. Every row is on disk when `log_metrics` returns, and a file that exists is continued,
    never deleted. Where a row cannot be written, as on a full disk, a warning says so, and it is kept
    until the next one can. Only rank zero writes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows = read_metrics(self.path) if self.path.exists() else []
        self._header: list[str] = []  # of the file as this process wrote it: the first row rewrites what it found
        self._complete = True  # the file has every row

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved recipe lies beside metrics.csv."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars, by name. `step` and the metric "epoch" are Lightning's, which count from 0."""
        if step is None:
            raise ValueError(f"MetricsCSV got {list(metrics)} without a step; pass the step they belong to")
        row = {name: float(value) for name, value in metrics.items()} | {"step": step + 1}
        if "epoch" in row:
            row["epoch"] += 1
        merges = bool(self._rows) and self._rows[-1]["step"] == row["step"]
        if merges:
            self._rows[-1].update(row)
        else:
            self._rows.append(row)
        try:
            if merges or not row.keys() <= set(self._header):
                self._rewrite()
            else:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    file.write(_csv_line(_cells(row, self._header)))
            self._complete = True
        except OSError as error:
            if self._complete:
                rank_zero_warn(f"{self.path} cannot be written: {error}. Its rows are kept until it can; make room")
            self._header, self._complete = [], False

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop the rows beyond `step` optimizer steps, which a run resumed from there logs anew."""
        self._rows = [row for row in self._rows if row["step"] <= step]
        if self.path.exists():
            self._rewrite()

    def _rewrite(self) -> None:
        """Replace the file in one go, so that a kill leaves either the old one or the new one."""
        self._header = list(dict.fromkeys([*KEYS, *(name for row in self._rows for name in row)]))
        lines = [self._header, *(_cells(row, self._header) for row in self._rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            part.write_text("".join(map(_csv_line, lines)), encoding="utf-8", newline="")


class Backend(Logger):
    """A logger of Lightning beside metrics.csv. The run goes on without it from its first error on, which is a warning.

    Args:
        name: What the warning calls it.
        build: Makes the logger.
    """

    def __init__(self, name: str, build: Callable[[], Logger]) -> None:
        super().__init__()
        self._name = name
        self._logger: Logger | None = None
        self._try(lambda: setattr(self, "_logger", build()))

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved recipe lies in the run folder."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, by name."""
        if self._logger is not None:
            self._try(self._logger.log_metrics, dict(metrics), step)

    def save(self) -> None:
        """Have the backend write what it holds."""
        if self._logger is not None:
            self._try(self._logger.save)

    def finalize(self, status: str) -> None:
        """End the log."""
        if self._logger is not None:
            self._try(self._logger.finalize, status)

    def _try(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # whatever a backend fails by, it is no reason to lose a run
            self._logger = None
            rank_zero_warn(
                f"run.loggers: {self._name} has failed, and is left out from here on: {type(error).__name__}: {error}. "
                "metrics.csv has everything"
            )


def build_backend(name: str, folder: Path) -> Backend:
    """Return the backend `tensorboard` or `wandb` for a run folder."""
    if name == "tensorboard":
        return Backend(name, lambda: TensorBoardLogger(folder, name=None, version="tensorboard"))
    return Backend(name, lambda: WandbLogger(name=folder.name, group=str(folder), save_dir=folder))


def _cells(row: Mapping[str, float], header: list[str]) -> list[str]:
    return ["" if name not in row else f"{row[name]:.0f}" if name in KEYS else f"{row[name]:.7g}" for name in header]


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
