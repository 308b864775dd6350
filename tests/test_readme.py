"""The README holds: its commands run, its figures are those of the table, its links lead somewhere."""

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from parity.parity import load_fixture, make_input
from project import PYPROJECT, ROOT
from tiny_checkout import make_checkout, make_scenes_runs, official_weights, train_quickstart

from effbackbones.cli import COMMANDS, _parser, main
from effbackbones.config import load_recipe
from effbackbones.data import scenes as data_scenes
from effbackbones.layers.attention import _NAMES
from effbackbones.models._zoo import ZOO
from effbackbones.train.run import load_target

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

HAS_MM = find_spec("mmcv") is not None
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))
BASH = [line for kind, text in BLOCK.findall(README) if kind == "bash" for line in text.splitlines()]
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|…")  # as in `effb eval RUN`

EFFB = dict.fromkeys(line for line in BASH + CODE if line.startswith("effb ") and not PLACEHOLDER.search(line))
RUNNABLE = [line for line in EFFB if "/data/" not in line]
TRAINING = [line.partition("tools/")[2] or line for line in BASH if "data.root=/data/" in line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a checkout, in which quickstart has been trained."""
    folder = make_checkout(tmp_path_factory.mktemp("checkout"))
    train_quickstart(folder)
    if HAS_MM:
        make_scenes_runs(folder)
    return folder


def test_blocks_are_bash_or_python() -> None:
    assert {kind for kind, _ in BLOCK.findall(README)} == {"bash", "python"}
    programs = r"effb ({})( |$)|make [\w-]+$|torchrun .* tools/\w+\.py |bash tools/\w+\.sh$|pip install "
    known = re.compile(programs.format("|".join(COMMANDS)))
    assert [line for line in BASH if not known.match(line)] == []
    assert len(RUNNABLE) >= 6
    assert len(TRAINING) >= 2


# Commands


@pytest.mark.parametrize("line", RUNNABLE)
def test_effb_command_runs(
    line: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    if "scenes" in line and not HAS_MM:
        pytest.skip("needs the mm extra")
    if line.startswith("effb data scenes"):
        monkeypatch.chdir(tmp_path)  # a new folder, and the runs of the others keep their data
        few = functools.partial(data_scenes.make_scenes, train=2, val=1)
        monkeypatch.setattr(data_scenes, "make_scenes", lambda out, **options: few(out, size=options["size"]))
    assert main(shlex.split(line)[1:]) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


@pytest.mark.parametrize("line", TRAINING)
def test_published_recipe_loads_with_the_root_of_the_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    script, *words = shlex.split(line)
    if script != "effb":
        assert (ROOT / "tools" / script).is_file()
        words = [Path(script).stem, *words]
    args = _parser().parse_args(words)
    (root,) = re.findall(r"data.root=(\S+)", line)
    assert load_target(args.recipe, args.overrides).recipe.data.root == root


@pytest.mark.parametrize("line", dict.fromkeys(line for line in BASH + CODE if line.startswith("make ")))
def test_make_target_exists(line: str) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    command = [*shlex.split(line), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ".venv/bin/" in done.stdout.splitlines()[-1]


def test_commands_named_are_those_that_exist() -> None:
    named = [re.match(r"effb (\S+)", text) for text in CODE]
    words = [match[1] for match in named if match]
    assert {word for word in words if not PLACEHOLDER.search(word)} == set(COMMANDS)
    table = re.findall(r"^\| `effb (\w+)", README, re.MULTILINE)
    assert table == list(COMMANDS)


@pytest.mark.parametrize("setting", dict.fromkeys(text for text in CODE if re.fullmatch(r"[a-z]+\.\w+=\S+", text)))
def test_setting_of_a_recipe_is_valid(setting: str) -> None:
    assert load_recipe("quickstart", [setting]).origins[setting.partition("=")[0]] == "command line"


def test_attention_variable_lists_every_backend() -> None:
    (listed,) = re.findall(r"EFFBACKBONES_ATTENTION=(\S+)`", README)
    assert tuple(listed.split("|")) == _NAMES


def test_extras_named_exist() -> None:
    named = re.findall(r"pip install '?effbackbones\[(\w+)\]", README)
    assert named
    assert set(named) <= set(PYPROJECT["project"]["optional-dependencies"])


def test_python_version_is_that_of_pyproject() -> None:
    assert [f">={version}" for version in re.findall(r"Python (3\.\d+) or newer", README)] == [
        PYPROJECT["project"]["requires-python"]
    ]


# Python

Executed = tuple[list[dict[str, Any]], list[str]]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """Return the names each Python block leaves, and what it prints; each goes on where the one before ended."""
    folder = tmp_path_factory.mktemp("python")
    torch.save(official_weights("uniformer/uniformer_small_224x224"), folder / "uniformer_small_in1k.pth")
    names: dict[str, Any] = {}
    states, outputs = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for text in (text for kind, text in BLOCK.findall(README) if kind == "python"):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(textwrap.dedent(text), "README.md", "exec"), names)
            states.append(dict(names))
            outputs.append(printed.getvalue())
    return states, outputs


def test_python_prints_maps_at_strides_4_to_32(executed: Executed) -> None:
    shapes, info = executed[1][0].splitlines()
    maps = ast.literal_eval(shapes)
    assert [shape[:2] for shape in maps] == [(1, channels) for channels in (64, 128, 320, 512)]
    assert [shape[2:] for shape in maps] == [(205 // stride, 330 // stride) for stride in (4, 8, 16, 32)]
    assert info == "[64, 128, 320, 512] [4, 8, 16, 32]"
    assert executed[0][0]["logits"].shape == (2, 10)


def test_python_official_checkpoint_gives_the_official_numbers(executed: Executed) -> None:
    meta, expected = load_fixture(ROOT / "tests" / "parity" / "uniformer" / "uniformer_small_224x224")
    with torch.no_grad():
        logits = executed[0][1]["model"].eval()(make_input(meta["input_shape"], meta["input_seed"]).float()).numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4 * abs(expected["logits"]).max())


def test_python_mm_config_builds_the_backbone(executed: Executed) -> None:
    pytest.importorskip("mmcv", reason="needs the mm extra")
    from mmengine.registry import MODELS

    names = executed[0][3]
    for module in names["custom_imports"]["imports"]:
        import_module(module)
    assert MODELS.build(names["backbone"]).frozen_stages == 1


def test_python_pyramid_has_256_channels_at_every_stride(executed: Executed) -> None:
    shapes = [tuple(each.shape) for each in executed[0][2]["maps"].values()]
    assert shapes == [(1, 256, 320 // stride, 480 // stride) for stride in (4, 8, 16, 32)]


DENSE = {
    "UniFormer": "uniformer_small",
    "GC ViT": "gc_vit_xxtiny",
    "TransNeXt": "transnext_micro",
    "STViT": "stvit_small",
    "STViT-R": "stvit_r_swin_tiny",
}
ARGUMENTS = [
    (DENSE[re.findall(r"[\w-]+(?: ViT)?", family)[-1]], argument)
    for family, arguments in re.findall(r"^\| ([^|`]+) \| [^|`]+ \| ([^|]*`[^|]*) \|$", README, re.MULTILINE)
    for argument in re.findall(r"`(\w+=[^`]+)`", arguments)
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_argument_of_dense_mode_is_taken(name: str, argument: str) -> None:
    with torch.device("meta"):
        eval(f"timm.create_model(name, dense=True, {argument})", {"timm": timm, "name": name})


def test_arguments_of_dense_mode_are_of_every_family_that_has_some() -> None:
    assert {name for name, _ in ARGUMENTS} == set(DENSE.values())


# What it says


def test_tables_are_those_of_the_published_figures_and_of_the_suite() -> None:
    updated = runpy.run_path(str(ROOT / "tools" / "update_readme.py"))["with_tables"](README)
    assert updated == README, "a table is out of date: run `python tools/update_readme.py`"


def test_zoo_table_has_every_figure() -> None:
    table = README.split("<!-- zoo: begin -->\n")[1].split("\n<!-- zoo: end -->")[0]
    rows = [line[2:-2].split(" | ") for line in table.splitlines()[2:]]
    assert [(row[0].strip("`"), int(row[1]), row[4]) for row in rows] == [
        (published.model, published.size, f"{published.top1:.1f}" if published.top1 else "-") for published in ZOO
    ]


def test_every_model_of_the_zoo_has_an_imagenet_recipe() -> None:
    recipes = [load_recipe(path) for path in (ROOT / "recipes" / "in1k").glob("*.yaml")]
    assert {loaded.recipe.model.name for loaded in recipes} == {row.model for row in ZOO}


@pytest.mark.parametrize("target", dict.fromkeys(re.findall(r"\]\(([^)]+)\)", README)))
def test_link_leads_somewhere(target: str) -> None:
    if target.startswith("http"):
        assert re.fullmatch(r"https://[\w.-]+\.[a-z]+/\S*", target)
    else:
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("path", dict.fromkeys(t for t in CODE if re.fullmatch(r"(recipes|tools|data|docs)/\S*", t)))
def test_path_named_exists(path: str) -> None:
    assert (ROOT / path).exists()
