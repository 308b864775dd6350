"""What `effb doctor` finds."""

import platform
import re
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from project import requirements

from effbackbones import doctor
from effbackbones.doctor import MALICIOUS, PACKAGES, devices, installed_versions, problems, report


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
    used = [*requirements(), *requirements("xformers", "mm", "data", "export", "log")]
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
    assert list(found) == ["System", "Packages", "Devices", "Attention", "Problems"]
    assert found["System"]["python"] == platform.python_version()
    assert list(found["Attention"]) == ["xformers", "sdpa", "plain"]
    assert found["Attention"]["sdpa"] == "works"
    assert found["Problems"] == {}
