"""The table and the JSON document, of results with given samples."""

import json
import platform
import re
from datetime import datetime
from pathlib import Path

import pytest
import timm
import torch

from effbackbones import __version__
from effbackbones.bench import Effort, Report, Result, plan, report
from effbackbones.bench.report import cpu_name, environment, number


@pytest.fixture
def results() -> list[Result]:
    """Return three results: a subject, another twice as slow and one that failed."""
    versus = ["attention=plain,ops=reference", "resnet18"]
    (group,) = plan(["uniformer_xxs"], versus, batches=[8], sizes=[(64, 96)], device="cpu")
    first, other, bad = map(Result, group)
    first.samples, first.calls, first.attention = [0.010, 0.012, 0.011, 0.011], 3, ["sdpa", "xformers"]
    first.parameters, first.weight_bytes, first.peak_bytes, first.first_call = 10, 40, 3 * 2**19, 0.5
    other.samples, other.ratios, other.attention = [0.020, 0.024, 0.022, 0.022], [2.0, 2.0], ["plain"]
    bad.error = "OutOfMemoryError: CUDA out of memory."
    return [first, other, bad]


def table(results: list[Result]) -> list[list[str]]:
    """Return the cells of the head and of the rows."""
    made = Report([[result.case for result in results]], Effort())
    _, head, _, *rest = f"{made.heading()}\n{made.add(results)}".splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in (head, *rest)]


def test_table_has_a_row_for_each_result(results: list[Result]) -> None:
    head, first, other, bad = table(results)
    assert head[:5] == ["Name", "Mode", "Batch", "Size", "Dtype"]
    assert first == [
        *("uniformer_xxs", "inference", "8", "64x96", "float32"),
        *("11.00", "10.75-11.25", "727.3", "1.5", "sdpa+xformers"),
    ]
    assert other == [
        *("vs attention=plain,ops=reference", "inference", "8", "64x96", "float32"),
        *("22.00", "21.50-22.50", "363.6", "0.0", "2.000", "2.000-2.000", "plain"),
    ]
    assert bad == ["vs resnet18", "inference", "8", "64x96", "float32", "failed: OutOfMemoryError: CUDA out of memory."]


def test_columns_of_the_table_are_aligned(results: list[Result]) -> None:
    made = Report([[result.case for result in results]], Effort())
    _, head, rule, *rows = f"{made.heading()}\n{made.add(results)}".splitlines()
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    for column in ("ms", "images/s", "peak MiB", "ratio"):
        assert head.index(column) + len(column) in ends
    assert rows[0].index("11.00") + 5 == rows[1].index("22.00") + 5 == head.index(" ms") + 3
    assert rows[1].index("2.000") + 5 == head.index("ratio") + 5


def test_table_names_the_machine(results: list[Result]) -> None:
    (line, *_) = Report([[result.case for result in results]], Effort()).heading().splitlines()
    assert line == (
        f"{cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, effbackbones {__version__}"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.012"), (1.23456, "1.235"), (12.3456, "12.35"), (123.456, "123.5"), (1234.56, "1235")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_json_has_everything(results: list[Result], tmp_path: Path) -> None:
    made = Report([[result.case for result in results]], Effort(warmup=2, rounds=2))
    assert not made.failed
    made.add(results)
    assert made.failed
    made.write(tmp_path / "bench.json")
    document = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]
    assert document["format"] == 1
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(document["date"])).total_seconds()) < 3600
    assert document["effort"] == {"warmup": 2, "rounds": 2, "seconds": 2.0}
    first, other, bad = document["results"]
    assert first == {
        "label": "uniformer_xxs",
        "name": "uniformer_xxs",
        "versus": None,
        "mode": "inference",
        "batch": 8,
        "size": [64, 96],
        "dtype": "float32",
        "device": "cpu",
        "channels_last": False,
        "compile": False,
        "dense": False,
        "attention": None,
        "ops": None,
        "fused": False,
        "onnx": False,
        "error": None,
        "parameters": 10,
        "weight_bytes": 40,
        "peak_bytes": 3 * 2**19,
        "attention_served": ["sdpa", "xformers"],
        "first_call_ms": 500.0,
        "calls_per_sample": 3,
        "ms": pytest.approx({"median": 11.0, "lower": 10.75, "upper": 11.25}),
        "images_per_second": pytest.approx(8 / 0.011),
        "ratio": None,
        "ratios": [],
        "samples_ms": pytest.approx([10.0, 12.0, 11.0, 11.0]),
    }
    assert (other["versus"], other["attention"], other["ops"]) == ("uniformer_xxs", "plain", "reference")
    assert (other["ratio"], other["ratios"]) == ({"median": 2.0, "lower": 2.0, "upper": 2.0}, [2.0, 2.0])
    assert (bad["name"], bad["error"]) == ("resnet18", "OutOfMemoryError: CUDA out of memory.")
    assert "samples_ms" not in bad


def test_environment_has_hardware_threads_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBACKBONES_ATTENTION", "sdpa")
    found = environment("cpu")
    assert (found["cpu"], found["gpu"], found["python"]) == (cpu_name(), None, platform.python_version())
    assert found["threads"] == torch.get_num_threads()
    assert found["cpus"] >= 1
    versions = found["versions"]
    assert (versions["torch"], versions["timm"], versions["effbackbones"]) == (
        torch.__version__,
        timm.__version__,
        __version__,
    )
    assert "xformers" in versions
    assert found["variables"]["EFFBACKBONES_ATTENTION"] == "sdpa"
    json.dumps(found)


def test_environment_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA Test", 80 * 2**30

    monkeypatch.setattr(report.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(report.torch.cuda, "get_device_properties", lambda device: Properties)
    found = environment("cuda")
    assert found["gpu"] == "NVIDIA Test, 80 GiB"
    assert {"cuda", "cudnn"} <= found.keys()


def test_cpu_has_a_name() -> None:
    name, instructions = cpu_name().rsplit(" (", 1)
    assert name.strip()
    assert instructions == f"{torch.backends.cpu.get_cpu_capability()})"
    assert "\n" not in cpu_name()
