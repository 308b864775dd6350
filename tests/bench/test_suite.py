"""The suite: its pairs, its file, and what it makes of results."""

import json
import os
from typing import Any

import pytest
import torch

from effbackbones.bench import BenchError, Effort, plan
from effbackbones.bench import suite as module
from effbackbones.bench.suite import REFERENCE, TARGETS, Cell, Suite, pairs, power, report, title, work

EFFORT = Effort(1, 3, 0.0)


def small_pairs(*names: str) -> dict[str, Any]:
    found = {}
    for name in names:
        (case, other), *_ = plan([name], ["ops=reference"], sizes=[(32, 32)], device="cpu")
        found[f"{name} vs ops=reference"] = case, other
    return found


def die(*_: Any) -> None:
    os._exit(9)


def test_pairs_cover_families_operators_and_targets() -> None:
    found = pairs("cpu")
    names = {case.name for case, _ in found.values()}
    assert names >= {name for models in module.MODELS.values() for name in models}
    for target in TARGETS:
        assert f"{title(target.cell)} vs {target.versus}" in found
    for key in ("uniformer_xxs train 800x1344 dense vs compile=yes", f"op:token_merging train 224 vs {REFERENCE}"):
        assert key in found
    assert not [key for key, (case, _) in found.items() if case.batch != 1 or case.dtype != "float32"]
    case, fused = found["gc_vit_tiny inference 512 dense vs fused=yes"]
    assert (case.dense, case.size, case.fused, fused.fused) == (True, (512, 512), False, True)


def test_suite_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    path, all_pairs = tmp_path / "suite.json", small_pairs("op:token_merging", "op:super_token_attention")
    first, second = all_pairs
    suite = Suite(path, all_pairs, 1)
    assert suite.missing() == [first, second]
    assert suite.missing(["^op:super", "nowhere"]) == [second]
    (line,) = suite.run([first], EFFORT)
    assert line.startswith(f"1/1  {first}:  ")
    assert suite.document["machine"]["bytes_per_second"] > 1e8 < suite.document["machine"]["operations_per_second"]

    again = Suite(path, all_pairs, 1)
    assert again.document == json.loads(path.read_text())
    assert again.missing() == [second]
    monkeypatch.setattr(module, "_measure", die)
    (line,) = again.run([second], EFFORT)
    assert "its process was killed" in line
    assert Suite(path, all_pairs, 1).missing() == [second]  # what failed is measured again
    assert f"- {second}: its process was killed" in report(again.document)

    (case, other), *_ = plan(["op:token_merging"], ["ops=torch"], sizes=[(32, 32)], device="cpu")
    assert Suite(path, {first: (case, other)}, 1).missing() == [first]  # of other settings now


def test_file_of_another_machine_is_refused(tmp_path) -> None:
    path, all_pairs = tmp_path / "suite.json", small_pairs("op:token_merging")
    document = Suite(path, all_pairs, 1).document
    path.write_text(json.dumps({**document, "environment": {**document["environment"], "cpu": "another"}}))
    with pytest.raises(BenchError, match=r"suite.json is of another machine or other versions: cpu was 'another', is"):
        Suite(path, all_pairs, 1)


@pytest.mark.parametrize("text", ["", "[]", '{"environment": {}}', "1"])
def test_file_that_is_no_suite_is_refused(tmp_path, text) -> None:
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="expected the file of a suite"):
        Suite(path, small_pairs("op:token_merging"), 1)
    assert path.read_text() == text


def test_patterns_are_checked(tmp_path) -> None:
    suite = Suite(tmp_path / "suite.json", small_pairs("op:token_merging"), 1)
    with pytest.raises(BenchError, match=r"found in the name of no pair; one is: op:token_merging vs ops=reference"):
        suite.missing(["resnet"])
    with pytest.raises(BenchError, match=r"'\(' is no regular expression"):
        suite.missing(["("])


def entry(cell: Cell, label: str, ms: float, peak: float, ratio: float | None = None) -> dict[str, Any]:
    return {
        "label": label,
        "name": cell.name,
        "mode": cell.mode,
        "size": list(cell.size),
        "dense": cell.dense,
        "batch": 1,
        "device": "cpu",
        "dtype": "float32",
        "error": None,
        "peak_bytes": int(peak * 2**20),
        "ms": {"median": ms},
        "images_per_second": 1e3 / ms,
        "ratio": ratio and {"median": ratio},
    }


def document(*found: tuple[Cell, str, float, float, float, float]) -> dict[str, Any]:
    return {
        "machine": {"bytes_per_second": 1e10, "operations_per_second": 1e11},
        "environment": {"gpu": None, "cpu": "a CPU", "threads": 2, "versions": {"torch": "2"}},
        "pairs": {
            f"{title(cell)} vs {label}": [
                entry(cell, cell.name, ms, peak),
                entry(cell, label, ms * ratio, other_peak, ratio),
            ]
            for cell, label, ms, ratio, peak, other_peak in found
        },
    }


def test_tables_tell_speed_memory_growth_and_aims() -> None:
    small, large = (Cell("transnext_tiny", "train", size, True) for size in ((512, 512), (800, 1344)))
    micro = Cell("transnext_micro", "inference", (224, 224))
    text = report(
        document(
            (small, REFERENCE, 100.0, 1.2, 10.0, 20.0),
            (small, "compile=yes", 100.0, 0.5, 10.0, 20.0),
            (large, REFERENCE, 400.0, 1.0, 80.0, 100.0),
            (micro, REFERENCE, 10.0, 2.5, 5.0, 20.0),
            (micro, "dtype=bfloat16", 10.0, 2.0, 5.0, 20.0),
            (micro, "fused=yes", 10.0, 0.8, 5.0, 20.0),
            (micro, "onnx=yes,fused=yes", 10.0, 0.5, 5.0, 20.0),
        )
    )
    assert "| `transnext_tiny` | train | 512x512, maps | 1 | 100.0 | 1.20x | 2.00x |  |  |  | 10 | 50% |" in text
    assert (
        "| `transnext_micro` | inference | 224x224 | 1 | 10.00 | 2.50x |  | 0.50x | 1.25x | 2.00x | 5 | 25% |" in text
    )
    assert "| `transnext_tiny` | train | 0.98 | 0.85 | 1.47 | 1.14 |" in text
    assert "| transnext_micro inference 224 | reference | 2.0x | 2.50x | reached |" in text
    assert "| transnext_tiny train 512 dense | reference | 1.1x | 1.20x | reached |" in text
    assert "| transnext_tiny train 800x1344 dense | reference | 1.1x | 1.00x | missed |" in text
    assert "| transnext_tiny train 800x1344 dense, peak memory | reference | 60% | 80% | missed |" in text
    assert "Failed" not in text


def test_operator_table_tells_shares_of_the_machines_rates() -> None:
    cell = Cell("op:attention", "inference", (224, 224))
    operations, bytes_ = work(cell, 1, torch.float32)
    assert operations == 2 * 2 * 5 * 196 * 196 * 64
    assert bytes_ == 4 * 4 * 5 * 196 * 64
    text = report(document((cell, REFERENCE, 2.0, 1.5, 1.0, 2.0)))
    shares = f"{100 * bytes_ / 2e-3 / 1e10:.0f}% | {100 * operations / 2e-3 / 1e11:.0f}%"
    assert f"| `op:attention` | inference | 224x224 | 2.000 | 1.50x | 1.0 | 50% | {shares} |" in text


@pytest.mark.parametrize("name", ["aggregated_attention", "super_token_attention", "window_attention"])
def test_work_of_training_is_more_than_that_of_inference(name: str) -> None:
    once, train = (work(Cell(f"op:{name}", mode, (64, 64)), 2, torch.float32) for mode in ("inference", "train"))
    assert 0 < once[0] < train[0]
    assert 0 < 2 * once[1] <= train[1]


def test_power_is_the_slope_of_logarithms() -> None:
    assert power({10.0: 3.0, 100.0: 300.0}) == pytest.approx(2)
    assert power({1.0: 1.0, 2.0: 2**1.5, 4.0: 4**1.5}) == pytest.approx(1.5)
