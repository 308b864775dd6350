"""The package as it is installed and imported, and the files of its repository."""

import ast
import importlib
import json
import re
import runpy
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution, distributions, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from project import PYPROJECT, ROOT, requirements

import effbackbones
from effbackbones import assets
from effbackbones.models._zoo import ZOO

PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}
TESTED = [*requirements(), *requirements("dev", "xformers")]
INSTALLED = {pin.name for pin in PINS.values() if any(distributions(name=pin.name))}

# Import


IMPORT = """
import json, logging, os, sys, warnings
import timm, torch
from timm.models._registry import _model_entrypoints as registry

warnings.simplefilter("error")
def packages():
    return {name.partition(".")[0] for name in sys.modules}
def state():
    handlers = [str(logging.getLogger(name).handlers) for name in ("", "effbackbones", "timm")]
    return [torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.cuda.is_initialized(),
            torch.get_rng_state().sum(), dict(os.environ), sys.path, os.listdir(), handlers]
models, modules, before = dict(registry), packages(), str(state())
import effbackbones
print(json.dumps({
    "state": before == str(state()),
    "modules": sorted(packages() - modules),
    "heavy": sorted({"lightning", "matplotlib", "torchmetrics", "omegaconf", "xformers"} & packages()),
    "added": sorted(set(registry) - set(models)),
    "replaced": [name for name in models if registry[name] is not models[name]],
}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return what `import effbackbones` changed in a fresh process."""
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def test_import_changes_nothing_but_the_registry(imported: dict[str, object]) -> None:
    assert imported["state"]


def test_import_brings_nothing_that_timm_does_not(imported: dict[str, object]) -> None:
    assert imported["modules"] == ["effbackbones"]
    assert imported["heavy"] == []


def test_import_registers_the_zoo_and_leaves_timms_models_alone(imported: dict[str, object]) -> None:
    assert imported["replaced"] == []
    assert imported["added"] == sorted({row.model for row in ZOO})


def test_tool_runs_from_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    # -S: only the folders of PYTHONPATH, so that an editable installation does not help.
    command = [sys.executable, "-S", str(ROOT / "tools" / "train.py"), "nowhere.yaml"]
    environment = {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "effb train: 'nowhere.yaml': no such recipe" in done.stderr


@pytest.mark.parametrize(("script", "command"), [("train.py", "train"), ("test.py", "eval")])
def test_tool_is_a_command_of_effb(
    script: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [script, "nowhere.yaml"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / script), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"effb {command}: 'nowhere.yaml'")
    assert sys.path[0] == str(ROOT)


# Distribution


def test_version_has_one_source() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "effbackbones/__init__.py"
    assert "version" not in PYPROJECT["project"]
    text = effbackbones.__version__
    sources = [path for path in ROOT.glob("effbackbones/**/*.py") if text in path.read_text(encoding="utf-8")]
    assert sources == [ROOT / "effbackbones" / "__init__.py"]
    assert str(Version(text)) == text


def test_wheel_includes_all_that_is_read_at_run_time() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["effbackbones"]
    assert wheel["force-include"] == {kind: f"effbackbones/_share/{kind}" for kind in ("recipes", "data")}
    assert all((ROOT / folder).is_dir() for folder in wheel["force-include"])
    asked = {
        kind
        for path in ROOT.glob("effbackbones/**/*.py")
        for kind in re.findall(r'asset_dir\("(\w+)"\)', path.read_text(encoding="utf-8"))
    }
    assert asked == set(wheel["force-include"])


def test_assets_of_a_wheel_come_before_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "effbackbones"
    shared, loose = package / "_share" / "recipes", package.parent / "recipes"
    for folder in (shared, loose):
        folder.mkdir(parents=True)
    monkeypatch.setattr(assets, "__file__", str(package / "assets.py"))
    assert assets.asset_dir("recipes") == shared
    shared.rmdir()
    assert assets.asset_dir("recipes") == loose
    loose.rmdir()
    with pytest.raises(FileNotFoundError, match="installation is incomplete, reinstall it"):
        assets.asset_dir("recipes")


def test_entry_point_exists() -> None:
    (target,) = PYPROJECT["project"]["scripts"].values()
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_licence_is_apache_2() -> None:
    project = PYPROJECT["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004\s+http://www\.apache\.org/licenses/", text)
    assert len(text.splitlines()) > 190
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_begins_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *_ = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"),
    }


# Dependencies


def test_imports_of_the_package_are_its_requirements() -> None:
    own = sys.stdlib_module_names | {"effbackbones", "triton"}  # which torch brings along where it has a GPU to serve
    imported = {
        name.partition(".")[0]
        for path in ROOT.glob("effbackbones/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.module
            else []
        )
    }
    names = packages_distributions()
    needed = {canonicalize_name(name) for module in imported - own for name in names.get(module, [module])}
    extras = PYPROJECT["project"]["optional-dependencies"].keys() - {"dev"}
    core, optional = (
        {canonicalize_name(required.name) for required in group} for group in (requirements(), requirements(*extras))
    )
    assert core <= needed <= core | optional


@pytest.mark.parametrize("required", TESTED, ids=str)
def test_constraints_pin_every_requirement_to_a_version_it_allows(required: Requirement) -> None:
    pin = PINS[canonicalize_name(required.name)]
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert required.specifier.contains(exact.version, prereleases=True)


def test_constraints_are_the_versions_that_are_tested() -> None:
    pins = [pin for pin in PINS.values() if pin.marker is None or pin.marker.evaluate()]
    other = [
        f"{pin} is pinned, {version(pin.name)} is installed"
        for pin in pins
        if pin.name in INSTALLED and not pin.specifier.contains(version(pin.name).partition("+")[0])
    ]
    assert other == [], "tests are of the pinned versions: set up by `make test`, or bring constraints.txt up to date"


def test_constraints_hold_on_every_python_that_is_supported() -> None:
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    unsupported = [
        str(pin)
        for pin in PINS.values()
        if pin.name in INSTALLED
        and (pin.marker is None or pin.marker.evaluate({"python_version": oldest}))
        and not SpecifierSet(distribution(pin.name).metadata["Requires-Python"] or "").contains(f"{oldest}.99")
    ]
    assert unsupported == []
