"""What `effb doctor` finds."""

import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from project import requirements

from effbackbones import doctor
from effbackbones.doctor import (
    MALICIOUS,
    OPENMMLAB,
    PACKAGES,
    devices,
    installed_versions,
    operators_failure,
    problems,
    report,
)

BUILD = f"`bash tools/build_mmcv.sh {sys.executable}`"
MM = {"onedl-mmcv": "2.3.6", "onedl-mmengine": "0.10.12", "onedl-mmdetection": "3.5.1", "onedl-mmsegmentation": "1.4.2"}


@pytest.fixture
def only_mm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let no package of OpenMMLab be installed but those added to the fixture."""
    found: dict[str, str] = {}
    names = {name for names in OPENMMLAB.values() for name in names}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: found.get(name) if name in names else real(name))
    return found


@pytest.fixture
def mmcv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty `mmcv` that new processes import in place of an installed one."""
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "mmcv"


def test_installed_versions_hold_no_malicious_release() -> None:
    assert problems(installed_versions()) == []


@pytest.mark.parametrize(("name", "release"), sorted(MALICIOUS))
def test_problems_malicious_release_is_named_with_what_to_do(name: str, release: str) -> None:
    (problem,) = problems({"torch": "2.11.0", name: release, "xformers": None})
    assert problem.startswith(f"{name} {release} is a malicious release: uninstall it at once")
    (advice,) = map(Requirement, re.findall(r"install (\S+)$", problem))
    assert not advice.specifier.contains(release)
    (required,) = [required for required in requirements() if required.name == name]
    assert set(advice.specifier) < set(required.specifier)


@pytest.mark.parametrize("found", [None, "2.6.1", "2.6.4", "2.6.6"])
def test_problems_other_release_is_none(found: str | None) -> None:
    assert problems({"lightning": found, "torch": "2.6.2"}) == []


@pytest.mark.parametrize(("name", "release"), sorted(MALICIOUS))
def test_pyproject_excludes_every_malicious_release_by_name(name: str, release: str) -> None:
    (required,) = [required for required in requirements() if required.name == name]
    assert f"!={release}" in map(str, required.specifier)
    assert not required.specifier.contains(release)


def test_packages_are_those_that_the_project_may_use() -> None:
    used = [*requirements(), *requirements("xformers", "mm", "data", "export", "log", "lora")]
    assert set(PACKAGES) == {"effbackbones", *(required.name for required in used)}


def test_installed_versions_absent_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    versions = installed_versions()
    assert versions["no-such-package"] is None
    assert versions["torch"]
    assert doctor.report()["Packages"]["no-such-package"] == "not installed"


def test_devices_names_every_gpu_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA Test", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    cpu, *gpus = [line for line in devices() if not line.startswith("mps")]
    assert re.fullmatch(rf"cpu: .+, {torch.get_num_threads()} threads", cpu)
    assert gpus == ["cuda:0: NVIDIA Test, 80 GiB", "cuda:1: NVIDIA Test, 80 GiB"]


def test_report_has_all_sections_and_every_attention_backend() -> None:
    found = report()
    assert list(found) == ["System", "Packages", "Devices", "Attention", "OpenMMLab", "Problems"]
    assert found["System"]["python"] == platform.python_version()
    assert list(found["Attention"]) == ["xformers", "sdpa", "triton", "plain"]
    assert found["Attention"]["sdpa"] == "works"
    assert found["Problems"] == {}


# OpenMMLab


def test_report_without_mm_says_how_to_install_it_and_is_no_problem(only_mm: dict[str, str]) -> None:
    found = report()
    assert found["OpenMMLab"]["mmcv operators"].startswith("not installed; ")
    assert f"{BUILD}, then `{sys.executable} -m pip install -e '.[mm]'`" in found["OpenMMLab"]["mmcv operators"]
    assert found["Problems"] == {}
    assert "mmcv" not in found["Packages"]


def test_report_failing_operators_are_shown_and_a_problem(
    only_mm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_mm.update(MM)
    monkeypatch.setattr(doctor, "operators_failure", lambda: "ImportError: why")
    found = report()
    assert found["OpenMMLab"] == {"mmcv operators": "ImportError: why"}
    (problem,) = found["Problems"].values()
    assert problem.startswith("the operators of mmcv fail here (ImportError: why): ")


def test_report_original_packages_are_listed_and_no_problem(
    only_mm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_mm.update({"mmcv": "2.1.0", "mmengine": "0.10.7", "mmdet": "3.3.0", "mmsegmentation": "1.2.2"})
    monkeypatch.setattr(doctor, "operators_failure", lambda: "")
    found = report()
    assert found["Packages"]["mmcv"] == "2.1.0"
    assert found["OpenMMLab"] == {"mmcv operators": "works"}
    assert found["Problems"] == {}


@pytest.mark.parametrize(
    ("original", "ours", "install"),
    [
        ("mmcv", "onedl-mmcv", BUILD),
        ("mmcv-lite", "onedl-mmcv", BUILD),
        ("mmengine", "onedl-mmengine", "install -e '.[mm]'`"),
        ("mmdet", "onedl-mmdetection", "install -e '.[mm]'`"),
        ("mmsegmentation", "onedl-mmsegmentation", "install -e '.[mm]'`"),
    ],
)
def test_problems_original_package_beside_ours_is_named_with_what_to_do(original: str, ours: str, install: str) -> None:
    (problem,) = problems({**MM, original: "1.0"})
    assert problem.startswith(f"{ours} and {original} overwrite each other")
    assert f"-m pip uninstall {ours} {original}`, then" in problem
    assert problem.endswith(install)


@pytest.mark.parametrize("needing", ["onedl-mmdetection", "mmsegmentation"])
def test_problems_mm_without_mmcv_gives_the_command_that_builds_it(needing: str) -> None:
    (problem,) = problems({"onedl-mmengine": "0.10.12", "onedl-mmcv": None, needing: "1.0"})
    assert problem == f"mmcv is missing, which {needing} need: {BUILD} builds and installs it"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("ModuleNotFoundError: No module named 'mmcv._ext'", f"installed without them; {BUILD}"),
        ("ImportError: /lib/mmcv/_ext.so: undefined symbol: _ZN3c105ErrorC2E", f"built for another torch; {BUILD}"),
        ("ImportError: libcudart.so.12: cannot open shared object file", f"built for another torch; {BUILD}"),
        ("the process ended by signal 11", f"built for another torch; {BUILD}"),
        ("RuntimeError: nms_impl: implementation for device cuda:0 not found.", "built without CUDA; set CUDA_HOME"),
        ("ImportError: libGL.so.1: cannot open shared object file", "OpenCV needs this system library"),
        ("ModuleNotFoundError: No module named 'addict'", "install -e '.[mm]'` installs what is missing"),
        ("no answer within 120 seconds", f"uninstall onedl-mmcv`, then {BUILD}"),
    ],
)
def test_problems_failing_operators_give_the_advice_for_their_error(error: str, advice: str) -> None:
    (problem,) = problems(MM, error)
    assert problem.startswith(f"the operators of mmcv fail here ({error}): ")
    assert advice in problem


def test_operators_failure_mmcv_without_operators_is_the_import_error(mmcv: Path) -> None:
    (mmcv / "ops.py").write_text("from mmcv._ext import nms\n", encoding="utf-8")
    assert operators_failure() == "ModuleNotFoundError: No module named 'mmcv._ext'"


def test_operators_failure_error_of_many_lines_is_its_first(mmcv: Path) -> None:
    (mmcv / "ops.py").write_text("raise ImportError('undefined symbol: x\\nand a trace')\n", encoding="utf-8")
    assert operators_failure() == "ImportError: undefined symbol: x"


def test_operators_failure_process_that_dies_is_its_signal(mmcv: Path) -> None:
    (mmcv / "ops.py").write_text("import os\nos.kill(os.getpid(), 9)\n", encoding="utf-8")
    assert operators_failure() == "the process ended by signal 9"


def test_operators_failure_working_operators_is_empty(mmcv: Path) -> None:
    (mmcv / "ops.py").write_text("def nms(boxes, scores, iou_threshold): pass\n", encoding="utf-8")
    assert operators_failure() == ""
