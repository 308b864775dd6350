"""The suite: every family over modes, sizes, precisions, compiled and fused; what came of it, and what was aimed at.

It is a list of pairs, a case and what it is compared with, each measured side by side in a process of its own: one that
runs out of memory takes nothing with it. The file is written after every pair, and a suite that was stopped goes on.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.bench.cases import BenchError, Case, plan
from effbackbones.bench.operators import OPERATORS, PREFIX, Example
from effbackbones.bench.report import as_json, environment, mebibytes, number, size_text, write_json
from effbackbones.bench.run import Effort, Result, measure, threads
from effbackbones.bench.timing import seconds_per_call
from effbackbones.layers import attention_backend
from effbackbones.ops import ops_backend

REFERENCE = "attention=plain,ops=reference"
MODELS = {  # of each family the smallest, and the one nearest to the 28 M parameters of the papers' tables
    "uniformer": ("uniformer_xxs", "uniformer_small"),
    "gc_vit": ("gc_vit_xxtiny", "gc_vit_tiny"),
    "transnext": ("transnext_micro", "transnext_tiny"),
    "s2aformer": ("s2aformer_mini", "s2aformer_m"),
    "sgformer": ("sgformer_s",),
    "stvit": ("stvit_small",),
    "stvit_r": ("stvit_r_swin_tiny",),
}
CLASSIFIER, DETECTION = (224, 224), (800, 1344)
DENSE = ((512, 512), DETECTION)
LEAST = 1.1
"""How many times as fast as its reference path a model shall be where no target says more."""
MEMORY = 0.6
"""The share of its reference path's peak memory that a training step at `DETECTION` may take."""

Entry = dict[str, Any]  # a result as the file has it


class Cell(NamedTuple):
    """A model or operator at work: what a row of the table is about."""

    name: str
    mode: str
    size: tuple[int, int]
    dense: bool = False


@dataclass(frozen=True)
class Target:
    """How many times as fast as `versus` a cell shall be on a CPU in float32."""

    cell: Cell
    ratio: float
    versus: str = REFERENCE


TARGETS = (
    Target(Cell("transnext_micro", "inference", (224, 224)), 2.0),
    Target(Cell("transnext_tiny", "inference", (512, 512), True), 4.0),
    Target(Cell("stvit_small", "inference", (224, 224)), 1.4),
    Target(Cell("stvit_small", "inference", (1024, 1024), True), 2.5),
    Target(Cell("uniformer_small", "inference", (1024, 1024), True), 2.0),
    Target(Cell("gc_vit_tiny", "inference", (512, 512), True), 2.9),
    Target(Cell("sgformer_s", "inference", (448, 448)), 1.4),
    Target(Cell("uniformer_xxs", "inference", (128, 128)), 1.3),
    Target(Cell("gc_vit_tiny", "inference", (224, 224)), 1.3, "gcvit_tiny"),
    Target(Cell("gc_vit_tiny", "train", (224, 224)), 1.2, "gcvit_tiny"),
)


# ---- what there is to measure


def pairs(device: str | None) -> dict[str, tuple[Case, Case]]:
    """Return all pairs by their keys, `NAME MODE SIZE [dense] vs OTHER`.

    On CUDA they are in bfloat16, compared with float32, and in batches.

    Raises:
        BenchError: The device is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, other = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    served = ["fused=yes"] if device == "cuda" else ["fused=yes", "onnx=yes,fused=yes"]
    found = {}

    def add(cell: Cell, *versus: str) -> None:
        (case, *others), *_ = plan(
            [cell.name],
            versus,
            modes=[cell.mode],
            batches=[_batch(cell, device)],
            sizes=[cell.size],
            dtypes=[dtype],
            device=device,
            dense=cell.dense,
        )
        found.update({f"{title(cell)} vs {one.label}": (case, one) for one in others})

    for names in MODELS.values():
        for name in names:
            for size, dense in ((CLASSIFIER, False), *((size, True) for size in DENSE)):
                common = (REFERENCE, "compile=yes", f"dtype={other}")
                add(Cell(name, "inference", size, dense), *common, *served)
                add(Cell(name, "train", size, dense), *common)
    for target in TARGETS:
        add(target.cell, target.versus)
    for name in OPERATORS:
        for mode in ("inference", "train"):
            for size in (CLASSIFIER, DETECTION):
                add(Cell(f"{PREFIX}{name}", mode, size), REFERENCE)
    return found


def _batch(cell: Cell, device: str) -> int:
    if device == "cpu":
        return 1
    return max(1, 128 * CLASSIFIER[0] * CLASSIFIER[1] // (cell.size[0] * cell.size[1]))


def title(cell: Cell) -> str:
    """Return a cell as a user reads it."""
    return f"{cell.name} {cell.mode} {size_text(cell.size)}" + (" dense" if cell.dense else "")


# ---- measuring


class Suite:
    """The suite's file: what has been measured of it.

    Attributes:
        document: All there is, of plain types; `pairs` has the two results of each pair by its key.

    Args:
        path: The file; where it exists, it is gone on with.
        pairs: All that belongs to the suite.
        number_of_threads: CPU threads to compute on; None for torch's.

    Raises:
        BenchError: The file is none of a suite, or is from another machine or of other versions.
    """

    def __init__(self, path: Path, pairs: dict[str, tuple[Case, Case]], number_of_threads: int | None = None):
        self._path, self._pairs, self._threads = path, pairs, number_of_threads
        first, _ = next(iter(pairs.values()))
        with threads(number_of_threads):
            found = environment(first.device)
        self.document: dict[str, Any] = {"format": 1, "environment": found, "machine": {}, "pairs": {}}
        if path.exists():
            self.document = _read(path, found)

    def missing(self, only: Sequence[str] = ()) -> list[str]:
        """Return the keys of the pairs that are not measured, of those that one of the patterns `only` is found in.

        A pair with a result that failed, or of other settings than it has now, is not measured.

        Raises:
            BenchError: A pattern is none, or none is found.
        """
        try:
            wanted = [key for key in self._pairs if not only or any(re.search(pattern, key) for pattern in only)]
        except re.error as error:
            raise BenchError(f"--only: {error.pattern!r} is no regular expression: {error}") from None
        if not wanted:
            example = next(iter(self._pairs))
            raise BenchError(f"--only {' '.join(only)}: found in the name of no pair; one is: {example}")
        return [key for key in wanted if not self._measured(key)]

    def _measured(self, key: str) -> bool:
        results = self.document["pairs"].get(key, [])
        settings = [_plain(asdict(case)) for case in self._pairs[key]]
        return not any(entry["error"] for entry in results) and settings == [
            {name: entry.get(name) for name in case} for case, entry in zip(settings, results, strict=False)
        ]

    def run(self, keys: Sequence[str], effort: Effort) -> Iterator[str]:
        """Measure pairs, write the file after each, and yield a line for each."""
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        if not self.document["machine"] and keys:
            with threads(self._threads):
                self.document["machine"] = machine(self._pairs[keys[0]][0])
        for i, key in enumerate(keys):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    results = pool.submit(_measure, self._pairs[key], effort, self._threads).result()
                except BrokenProcessPool:
                    killed = "its process was killed: most likely, memory ran out"
                    results = [Result(case, killed) for case in self._pairs[key]]
            self.document["pairs"][key] = [
                {**as_json(result), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
                for result in results
            ]
            write_json(self._path, self.document)
            yield f"{i + 1}/{len(keys)}  {key}:  {_outcome(results)}"


def _read(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = document["environment"]
        document["pairs"], document["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"--out {path}: expected the file of a suite ({type(error).__name__}: {error})") from None
    other = [key for key, value in _plain(found).items() if before.get(key) != value]
    if other:
        changes = "; ".join(f"{key} was {before.get(key)!r}, is {found[key]!r}" for key in other)
        raise BenchError(f"--out {path} is of another machine or other versions: {changes}. Give another file.")
    return document


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _measure(pair: Sequence[Case], effort: Effort, number_of_threads: int | None) -> list[Result]:
    with threads(number_of_threads):
        return measure(pair, effort)


def _outcome(results: Sequence[Result]) -> str:
    for result in results:
        if result.error:
            return f"failed: {result.error}"
    ratio = results[1].ratio.median
    peaks = [mebibytes(result.peak_bytes) for result in results]
    ms = [number(1e3 * result.time.median) for result in results]
    return f"{ms[0]} and {ms[1]} ms, ratio {number(ratio)}; {peaks[0]} and {peaks[1]} MiB"


def machine(case: Case) -> dict[str, float]:
    """Return what the machine of a case can do at best: bytes copied, and operations of a matrix product, per second.

    Bytes read and written are both counted; the product is in the case's dtype.
    """
    bytes_, side = 2**28, 2048
    source = torch.ones(bytes_, dtype=torch.uint8, device=case.device)
    copy = torch.empty_like(source)
    a = torch.randn(side, side, device=case.device).to(case.torch_dtype)
    product = torch.empty_like(a)

    def best(call: Callable[[], Any]) -> float:
        return min(seconds_per_call(call, 1, case.device) for _ in range(10))

    return {
        "bytes_per_second": 2 * bytes_ / best(lambda: copy.copy_(source)),
        "operations_per_second": 2 * side**3 / best(lambda: torch.mm(a, a, out=product)),
    }


# ---- what came of it


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a row for each cell of a model."""
    head = ("Model", "Mode", "Size", "Batch", "ms", "Reference", "Compiled", "Other precision", "Fused", "ONNX")
    lines = ["| " + " | ".join((*head, "Peak MiB", "Of reference")) + " |", "|---|---|---" + "|--:" * 9 + "|"]
    for cell, versus in by_cell(document).items():
        if cell.name.startswith(PREFIX):
            continue
        case = next(iter(versus.values()))[0]
        height, width = cell.size
        size = f"{height}x{width}" + (", maps" if cell.dense else "")
        cells = [f"`{cell.name}`", cell.mode, size, str(case["batch"])]
        pair = versus.get(REFERENCE)
        cells += [number((pair[0] if pair else case)["ms"]["median"]), _times(pair)]
        other = next((pair for label, pair in versus.items() if label.startswith("dtype=")), None)
        cells += [_times(versus.get("compile=yes"), True), _times(other, True), _times(versus.get("fused=yes"), True)]
        cells += [_times(versus.get("onnx=yes,fused=yes"), True)]
        cells += [f"{case['peak_bytes'] / 2**20:.0f}"]
        cells += [f"{100 * pair[0]['peak_bytes'] / pair[1]['peak_bytes']:.0f}%" if pair else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(pair: tuple[Entry, Entry] | None, inverse: bool = False) -> str:
    if not pair:
        return ""
    ratio: float = pair[1]["ratio"]["median"]
    return f"{1 / ratio if inverse else ratio:.2f}x"


def operator_table(document: dict[str, Any]) -> str:
    """Return the operators as a Markdown table: times, and what share of the machine's rates they reach."""
    head = ("Operator", "Mode", "Size", "ms", "Reference", "Peak MiB", "Of reference", "Bandwidth", "Matrix rate")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---" + "|--:" * 6 + "|"]
    rates = document["machine"]
    for cell, versus in by_cell(document).items():
        if not cell.name.startswith(PREFIX) or REFERENCE not in versus:
            continue
        case, other = pair = versus[REFERENCE]
        seconds = case["ms"]["median"] / 1e3
        operations, bytes_ = work(cell, case["batch"], getattr(torch, case["dtype"]))
        cells = [f"`{cell.name}`", cell.mode, "x".join(map(str, cell.size)), number(1e3 * seconds), _times(pair)]
        cells += [mebibytes(case["peak_bytes"]), f"{100 * case['peak_bytes'] / other['peak_bytes']:.0f}%"]
        cells += [f"{100 * bytes_ / seconds / rates['bytes_per_second']:.0f}%"]
        cells += [f"{100 * operations / seconds / rates['operations_per_second']:.0f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def work(cell: Cell, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return what an operator cannot do without: operations of its products, and bytes in and out.

    Operations are those of the reference's products. Inputs are read and outputs written once; a training step reads
    inputs and the output's gradient again, and writes the gradients of the inputs.
    """
    train = cell.mode == "train"
    example = Example(batch, *cell.size, dtype, "meta", train)
    function = OPERATORS[cell.name.removeprefix(PREFIX)](example)
    with ops_backend("reference"), attention_backend("plain"), FlopCounterMode(display=False) as counter:
        output = function()
        if train:
            output.float().square().mean().backward()
    inputs = sum(tensor.nbytes for tensor in example.tensors)
    return counter.get_total_flops(), 3 * inputs + 2 * output.nbytes if train else inputs + output.nbytes


def growth_table(document: dict[str, Any]) -> str:
    """Return, as a Markdown table, the powers of H W that time and peak memory grow with in dense mode."""
    lines = ["| Model | Mode | Time | of reference | Peak memory | of reference |", "|---|---" + "|--:" * 4 + "|"]
    sizes: dict[tuple[str, str], dict[float, tuple[Entry, Entry]]] = {}
    for cell, versus in by_cell(document).items():
        if cell.dense and REFERENCE in versus:
            sizes.setdefault((cell.name, cell.mode), {})[math.prod(cell.size)] = versus[REFERENCE]
    for (name, mode), found in sizes.items():
        if len(found) < 2:
            continue
        powers = []
        for value in (lambda entry: entry["ms"]["median"], lambda entry: entry["peak_bytes"]):
            for i in range(2):
                powers.append(f"{power({area: value(pair[i]) for area, pair in found.items()}):.2f}")
        lines.append(f"| `{name}` | {mode} | " + " | ".join(powers) + " |")
    return "\n".join(lines)


def power(values: dict[float, float]) -> float:
    """Return the power of x that y grows with: the least-squares slope of log y over log x."""
    points = [(math.log(x), math.log(y)) for x, y in values.items()]
    x_mean, y_mean = (sum(point[i] for point in points) / len(points) for i in range(2))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


def target_table(document: dict[str, Any]) -> str:
    """Return, as a Markdown table, what was aimed at on a CPU in float32, and what was reached."""
    lines = ["| Cell | Compared with | Aim | Reached | |", "|---|---|--:|--:|---|"]
    aims = {(target.cell, target.versus): target.ratio for target in TARGETS}
    for cell, versus in by_cell(document).items():
        for label, (case, other) in versus.items():
            aim = aims.get((cell, label), LEAST if label == REFERENCE else None)
            if aim is None or case["device"] != "cpu":
                continue
            ratio = other["ratio"]["median"]
            verdict = "reached" if ratio >= aim else "missed"
            against = "reference" if label == REFERENCE else f"`{label}`"
            lines.append(f"| {title(cell)} | {against} | {aim:.1f}x | {ratio:.2f}x | {verdict} |")
            if label == REFERENCE and cell.mode == "train" and cell.size == DETECTION and cell.dense:
                share = case["peak_bytes"] / other["peak_bytes"]
                verdict = "reached" if share <= MEMORY else "missed"
                lines.append(f"| {title(cell)}, peak memory | {against} | {MEMORY:.0%} | {share:.0%} | {verdict} |")
    return "\n".join(lines)


def by_cell(document: dict[str, Any]) -> dict[Cell, dict[str, tuple[Entry, Entry]]]:
    """Return the pairs that were measured, by cell and by what it is compared with."""
    found: dict[Cell, dict[str, tuple[Entry, Entry]]] = {}
    for case, other in document["pairs"].values():
        if not case["error"] and not other["error"]:
            cell = Cell(case["name"], case["mode"], tuple(case["size"]), case["dense"])
            found.setdefault(cell, {})[other["label"]] = case, other
    return found


def report(document: dict[str, Any]) -> str:
    """Return all tables, as Markdown."""
    parts = {
        "Models": table(document),
        "Operators": operator_table(document),
        "Growth with the area of the image": growth_table(document),
        "Aims": target_table(document),
    }
    failed = [
        f"- {key}: {entry['error']}"
        for key, results in document["pairs"].items()
        for entry in results
        if entry["error"]
    ]
    if failed:
        parts["Failed"] = "\n".join(failed)
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items())
