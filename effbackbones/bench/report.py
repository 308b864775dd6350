"""What is told of results: a table, line by line as they come, and a JSON file with all there is."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from effbackbones import __version__
from effbackbones.bench.cases import Case
from effbackbones.bench.run import Effort, Result
from effbackbones.cpu import cpu_field
from effbackbones.doctor import installed_versions
from effbackbones.files import replacing

HEAD = (
    *("Name", "Mode", "Batch", "Size", "Dtype", "ms", "quartiles", "images/s", "peak MiB", "ratio", "quartiles"),
    "attention",
)
LEFT = ("Name", "Mode", "Size", "Dtype", "attention")
NOTES = """\
ms: median time of a call. peak MiB: the most memory that a call holds at one time, besides weights and images.
ratio: time of the row over that of the row it is compared with, paired round by round; above 1, the latter is faster.
attention: the backends that served, of eager models of effbackbones."""


class Report:
    """Collects results: rows of a table, and a JSON document.

    Attributes:
        document: All there is, of plain types.

    Args:
        groups: All that is going to be measured.
        effort: How thoroughly.
    """

    def __init__(self, groups: Sequence[Sequence[Case]], effort: Effort):
        self.document: dict[str, Any] = {
            "format": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(groups[0][0].device),
            "effort": asdict(effort),
            "results": [],
        }
        cells = [HEAD[:5], *(_case_cells(case, i > 0) for group in groups for i, case in enumerate(group))]
        self._widths = [max(map(len, column)) for column in zip(*cells, strict=True)] + [8, 15, 8, 8, 6, 13, 9]

    @property
    def failed(self) -> bool:
        """Whether a case could not be measured."""
        return any(result["error"] for result in self.document["results"])

    def slower_than(self, ratio: float) -> list[str]:
        """Return a line for each result whose ratio is below this one: what it is compared with is too slow."""
        return [
            f"{found['versus']} {found['mode']}: ratio {number(found['ratio']['median'])} to {found['label']}, "
            f"expected at least {number(ratio)}"
            for found in self.document["results"]
            if found.get("ratio") and found["ratio"]["median"] < ratio
        ]

    def heading(self) -> str:
        """Return the lines above the rows: the machine, and the head of the table."""
        found = self.document["environment"]
        versions = f"torch {found['versions']['torch']}, effbackbones {found['versions']['effbackbones']}"
        return (
            f"{hardware(found)}; {versions}\n{self._line(HEAD)}\n{self._line(['-' * width for width in self._widths])}"
        )

    def add(self, results: Sequence[Result]) -> str:
        """Take the results of a group, and return their rows."""
        subject = results[0].case.label
        rows = []
        for i, result in enumerate(results):
            self.document["results"].append({**as_json(result), "versus": subject if i else None})
            rows.append(self._line([*_case_cells(result.case, i > 0), *_result_cells(result)]))
        return "\n".join(rows)

    def write(self, path: Path) -> None:
        """Write the JSON document, whole or not at all."""
        write_json(path, self.document)

    def _line(self, cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(HEAD, cells, self._widths, strict=False)
        ]
        return "  ".join(padded).rstrip()


def _case_cells(case: Case, compared: bool) -> tuple[str, ...]:
    return (
        f"  vs {case.label}" if compared else case.label,
        case.mode,
        str(case.batch),
        size_text(case.size),
        case.dtype,
    )


def _result_cells(result: Result) -> list[str]:
    if result.error:
        return [f"failed: {result.error}"]
    ms = [1e3 * seconds for seconds in result.time]
    cells = [number(ms[0]), f"{number(ms[1])}-{number(ms[2])}", number(result.images_per_second)]
    cells.append(mebibytes(result.peak_bytes))
    if result.ratios:
        median, lower, upper = map(number, result.ratio)
        cells += [median, f"{lower}-{upper}"]
    else:
        cells += ["", ""]
    return [*cells, "+".join(result.attention) or "-"]


def size_text(size: tuple[int, int]) -> str:
    """Return a size (height, width) as the command line takes it."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def mebibytes(count: int | None) -> str:
    """Return a number of bytes in MiB, `-` for what is not known."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def number(value: float) -> str:
    """Return a number with four digits, or all of those before the point."""
    decimals = next((places for places, bound in ((3, 10), (2, 100), (1, 1000)) if value < bound), 0)
    return f"{value:.{decimals}f}"


def as_json(result: Result) -> dict[str, Any]:
    """Return all there is to know of a result; times in milliseconds."""
    found: dict[str, Any] = {
        **asdict(result.case),
        "error": result.error or None,
        "parameters": result.parameters,
        "weight_bytes": result.weight_bytes,
    }
    if result.error:
        return found
    return {
        **found,
        "peak_bytes": result.peak_bytes,
        "attention_served": result.attention,
        "first_call_ms": 1e3 * result.first_call,
        "calls_per_sample": result.calls,
        "ms": {name: 1e3 * value for name, value in result.time._asdict().items()},
        "images_per_second": result.images_per_second,
        "ratio": result.ratio._asdict() if result.ratios else None,
        "samples_ms": [1e3 * sample for sample in result.samples],
        "ratios": result.ratios,
    }


def environment(device: str) -> dict[str, Any]:
    """Return what times depend on besides the cases: hardware, versions, switches."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cpus": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {**installed_versions(), "effbackbones": __version__, "torch": torch.__version__},
        "variables": {key: value for key, value in os.environ.items() if key.startswith("EFFBACKBONES_")},
    }


def hardware(environment: dict[str, Any]) -> str:
    """Return what of an environment computes."""
    return environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document of plain types, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def cpu_count() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the model of the CPU as the system names it, with the instructions that torch computes in on it."""
    name = cpu_field("model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
