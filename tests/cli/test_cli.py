"""The command line, from its arguments to what it prints and its exit code."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from project import ROOT
from tiny_checkout import RECIPE, make_checkout, train_quickstart

from effbackbones import __version__, doctor
from effbackbones.assets import list_recipes
from effbackbones.bench.operators import OPERATORS
from effbackbones.bench.suite import REFERENCE, Suite
from effbackbones.checkpoint import read_checkpoint
from effbackbones.cli import COMMANDS, EXAMPLES, _parser, main
from effbackbones.config import explain, load_recipe
from effbackbones.data.fashion_mnist import FashionMnist
from effbackbones.models._zoo import ZOO
from effbackbones.train.run import load_target, run_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

RUN = Path("runs/quickstart")
BEST = RUN / "checkpoints" / "best.ckpt"
COAT, BOOT = "data/samples/coat.png", "data/samples/ankle_boot.png"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Effb = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a checkout with a finished run in runs/quickstart, and what the training printed."""
    folder = make_checkout(tmp_path_factory.mktemp("checkout"))
    return folder, train_quickstart(folder)


@pytest.fixture
def effb(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Effb:
    """Return what runs a command line in that checkout."""
    monkeypatch.chdir(trained[0])

    def run(*argv: str | Path) -> Result:
        code = main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def run_copy(effb: Effb, tmp_path: Path) -> Path:
    """Return a copy of the run, to be changed."""
    return shutil.copytree(RUN, tmp_path / "copy")


def cells(line: str) -> list[str]:
    """Return the cells of a printed row; empty ones are left out."""
    return re.split(r"\s{2,}", line.strip())


# Help


def examples() -> list[tuple[str, list[str]]]:
    """Return command and arguments of every example in the help texts."""
    lines = [line for text in EXAMPLES.values() for line in text.strip().splitlines()]
    commands = [shlex.split(cells(line)[0]) for line in lines]
    assert all(words[0] == "effb" for words in commands)
    return [(" ".join(words), words[1:]) for words in commands]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = re.findall(r"^    (\w+) {2,}\w", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == list(COMMANDS) == list(EXAMPLES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert shown == EXAMPLES[command].strip("\n").splitlines()
    assert all(line.startswith(f"  effb {command}") and len(line) <= 120 for line in shown)


@pytest.mark.parametrize(("argv"), [pytest.param(argv, id=text) for text, argv in examples()])
def test_example_is_a_valid_command_line(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = vars(_parser().parse_args(argv))
    target = args.get("recipe") or args.get("target") or args.get("run")
    if target and target.startswith("runs/"):
        target = target.removeprefix("runs/")
        assert run_folder(load_recipe(target)) == Path("runs") / target
    if target and timm.is_model(target):
        args["model"] = target
    elif target:
        load_target(target, args.get("overrides", ()))
    for name in [*args.get("names", ()), *args.get("vs", ())]:
        assert timm.is_model(name) or "=" in name or name.removeprefix("op:") in OPERATORS
    if args.get("model"):
        assert timm.is_model(args["model"])
        assert args["checkpoint"]


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


def test_installed_command_is_main() -> None:
    (command,) = entry_points(group="console_scripts", name="effb")
    assert command.load() is main


# ls


def test_ls_models_prints_the_published_table_a_line_per_row(effb: Effb) -> None:
    head, _, *lines = effb("ls", "models").out.splitlines()
    assert cells(head) == ["Model", "Size", "Parameters", "GMACs", "Top-1", "Source", "Note"]
    expected = [
        [
            *(row.model, str(row.size), f"{row.params / 1e6:.2f} M", f"{row.gmacs:.2f}"),
            f"{row.top1:.1f}" if row.top1 else "-",
            *(text for text in (row.source, row.note) if text),
        ]
        for row in ZOO
    ]
    assert [cells(line) for line in lines] == expected


def test_ls_recipes_prints_every_recipe_with_its_file(effb: Effb) -> None:
    _, _, *lines = effb("ls", "recipes").out.splitlines()
    assert {name: Path(path) for name, path in map(cells, lines)} == list_recipes()
    assert len(lines) == len(list_recipes()) > 3
    assert all(Path(cells(line)[1]).is_file() for line in lines)


def test_ls_alone_prints_models_and_then_recipes(effb: Effb) -> None:
    assert effb("ls").out == f"{effb('ls', 'models').out}\n{effb('ls', 'recipes').out}"


def test_ls_pattern_selects_names(effb: Effb) -> None:
    models = [cells(line)[0] for line in effb("ls", "models", "uniformer_x*s").out.splitlines()[2:]]
    assert set(models) == {"uniformer_xs", "uniformer_xxs"}
    recipes = effb("ls", "all", "in1k/*_xxs").out.splitlines()[2:]
    assert [cells(line)[0] for line in recipes] == ["in1k/uniformer_xxs"]


def test_ls_pattern_without_a_match_is_an_error(effb: Effb) -> None:
    code, out, err = effb("ls", "models", "resnet*")
    assert (code, out) == (2, "")
    assert "nothing is named 'resnet*'" in err


@pytest.mark.parametrize("argv", [("ls",), ("show", "quickstart"), ("doctor",)], ids=" ".join)
def test_output_does_not_depend_on_the_width_of_the_terminal(
    argv: tuple[str, ...], effb: Effb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    wide = effb(*argv).out
    monkeypatch.setenv("COLUMNS", "40")
    assert effb(*argv).out == wide
    assert "…" not in wide


# show


def shown(result: Result) -> dict[str, list[str]]:
    assert result.code == 0
    head, _, *lines = result.out.splitlines()
    assert cells(head) == ["Key", "Value", "Origin", "Meaning"]
    return {cells(line)[0]: cells(line)[1:] for line in lines}


def line_of(text: str, start: str) -> int:
    """Return the number, from 1, of the line of `text` that starts with `start` after its indent."""
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start))


def test_show_tells_where_each_value_comes_from(effb: Effb) -> None:
    rows = shown(effb("show", "quickstart", "optim.lr=5e-4"))
    base = ROOT / "recipes" / "quickstart.yaml"
    assert rows["optim.lr"][:2] == ["0.0005", "command line"]
    assert rows["trainer.limit_val"][:2] == ["3", f"recipes/quickstart.yaml:{line_of(RECIPE, 'limit_val:')}"]
    assert rows["data.source"][:2] == ["fashion_mnist", f"{base}:{line_of(base.read_text(), 'source:')}"]
    assert rows["trainer.nodes"] == ["1", "default", "machines"]
    assert rows["run.dir"][:2] == ["null", "default"]


def test_show_prints_every_key_with_its_meaning(effb: Effb) -> None:
    rows = shown(effb("show", "quickstart"))
    expected = {key: meaning for key, _, _, meaning in explain(load_recipe("quickstart"))}
    assert {key: row[2] for key, row in rows.items()} == expected


@pytest.mark.parametrize("name", ["quickstart", "in1k/uniformer_small"])
def test_show_values_can_be_set_as_they_are_printed(name: str, effb: Effb) -> None:
    rows = shown(effb("show", name, "model.args.strings=[a, b]", "model.args.nothing=null"))
    again = load_recipe(name, [f"{key}={value}" for key, (value, *_) in rows.items()]).recipe
    expected = load_recipe(name, ["model.args.strings=[a, b]", "model.args.nothing=null"]).recipe
    assert again == expected


def test_show_of_a_run_prints_the_recipe_it_ran(effb: Effb) -> None:
    rows = shown(effb("show", RUN))
    assert rows["data.batch_size"][0] == "8"
    assert rows["data.batch_size"][1].startswith(f"{RUN}/recipe.yaml:")


# train


def closing_commands(printed: str) -> dict[str, list[str]]:
    """Return the commands that a training prints at its end, by what they are for."""
    return {what: shlex.split(line) for what, line in re.findall(r"^  (\w+) +effb (.+)$", printed, re.MULTILINE)}


def test_train_prints_progress_and_the_files_it_left(trained: tuple[Path, str], effb: Effb) -> None:
    printed = trained[1]
    assert re.search(r"epoch 1/1  step 2/2  loss \d", printed)
    named = re.findall(r"runs/\S+\.\w+", printed)
    assert {Path(name).name for name in named} == {"best.ckpt", "curves.png", "predictions.png"}
    assert all(Path(name).stat().st_size > 1000 for name in named)


def test_train_closing_block_has_the_next_commands(trained: tuple[Path, str]) -> None:
    assert closing_commands(trained[1]) == {
        "evaluate": ["eval", str(RUN)],
        "predict": ["predict", "IMAGE", "--run", str(RUN)],
        "resume": ["train", str(RUN)],
    }


@pytest.mark.parametrize("what", ["evaluate", "predict", "resume"])
def test_train_closing_command_works(what: str, trained: tuple[Path, str], effb: Effb) -> None:
    command = closing_commands(trained[1])[what]
    code, out, err = effb(*(COAT if word == "IMAGE" else word for word in command))
    assert (code, err) == (0, "")
    assert {"evaluate": "top1 ", "predict": COAT, "resume": str(RUN)}[what] in out


@pytest.mark.parametrize("target", ["quickstart", str(RUN)])
def test_train_finished_run_again_leaves_it_as_it_is(target: str, effb: Effb) -> None:
    metrics, weights = (RUN / "metrics.csv").read_bytes(), read_checkpoint(BEST)["state_dict"]
    result = effb("train", target)
    assert result.code == 0
    assert f"{RUN} at step 2" in result.out
    assert (RUN / "metrics.csv").read_bytes() == metrics
    assert all(torch.equal(value, weights[key]) for key, value in read_checkpoint(BEST)["state_dict"].items())


def test_train_of_a_run_with_more_to_do_goes_on(effb: Effb, run_copy: Path) -> None:
    result = effb("train", run_copy, "trainer.epochs=2", "run.force=true")
    assert result.code == 0
    assert f"Resuming {run_copy} at step 2." in result.out
    assert "step 3/4" in result.out
    assert "step 1/4" not in result.out
    assert read_checkpoint(run_copy / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_train_of_a_run_with_another_recipe_is_refused(effb: Effb) -> None:
    code, out, err = effb("train", "quickstart", "optim.lr=0.5")
    assert (code, out) == (2, "")
    assert "optim.lr: 0.002 then, 0.5 now" in err
    assert "run.dir" in err


# eval


def test_eval_of_a_run_gives_the_score_the_training_printed(trained: tuple[Path, str], effb: Effb) -> None:
    (best,) = re.findall(r"Best top1: (\S+%)", trained[1])
    result = effb("eval", RUN)
    assert result.code == 0
    assert f"Evaluating {BEST}" in result.out
    assert re.fullmatch(rf"top1 {best}  top5 \d+\.\d\d%  loss \d+\.\d{{4}}", result.out.splitlines()[-1])


@pytest.mark.parametrize("checkpoint", [RUN, BEST], ids=["run", "file"])
def test_eval_of_a_recipe_with_a_checkpoint_equals_that_of_the_run(checkpoint: Path, effb: Effb) -> None:
    of_recipe = effb("eval", "quickstart", f"model.checkpoint={checkpoint}").out.splitlines()[-1]
    assert of_recipe == effb("eval", RUN).out.splitlines()[-1]


def test_eval_overrides_apply_to_a_run(effb: Effb) -> None:
    scores = [effb("eval", RUN, f"data.eval_batch_size={n}", f"trainer.limit_val={24 // n}").out for n in (4, 12)]
    assert scores[0].splitlines()[-1] == scores[1].splitlines()[-1]


# predict


def test_predict_prints_the_five_best_classes_of_each_image(effb: Effb) -> None:
    code, out, err = effb("predict", BOOT, COAT, "--run", RUN)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert (lines[0], lines[6]) == (BOOT, COAT)
    for block in (lines[1:6], lines[7:12]):
        rows = [re.fullmatch(r" {2,4}(\d+\.\d)%  (.+)", line) for line in block]
        assert all(rows)
        assert {row[2] for row in rows if row} < set(FashionMnist.classes)
        probabilities = [float(row[1]) for row in rows if row]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 50 <= sum(probabilities) <= 100.3  # five of ten classes, rounded
    assert len(lines) == 12


def test_predict_bad_image_after_a_good_one_prints_the_good_one(effb: Effb) -> None:
    code, out, err = effb("predict", COAT, "nowhere.png", BOOT, "--run", RUN)
    assert code == 2
    assert len(out.splitlines()) == 6
    assert "nowhere.png" in err


# bench

QUICK = ("--size", "32", "--repeats", "1", "--warmup", "1", "--device", "cpu")


def test_bench_fails_where_a_ratio_is_below_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split("bench op:token_merging --vs ops=reference --size 32 --repeats 1 --warmup 1 --at-least")
    assert main([*command, "1e-3"]) == 0
    capsys.readouterr()
    assert main([*command, "1e3"]) == 1
    assert re.search(
        r"^effb: op:token_merging inference: ratio [\d.]+ to ops=reference, expected at least 1000$",
        capsys.readouterr().err,
        re.MULTILINE,
    )


def test_bench_suite_writes_tables_and_a_picture_beside_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Suite, "run", lambda self, keys, effort: iter(keys))
    command = ["bench", "suite", "--device", "cpu", "--out", str(tmp_path / "suite.json"), "--only", "_xxs train 224"]
    assert main([*command, "--list"]) == 0
    keys = capsys.readouterr().out.splitlines()
    assert keys == [f"uniformer_xxs train 224 vs {other}" for other in (REFERENCE, "compile=yes", "dtype=bfloat16")]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Suite, "run", lambda self, keys, effort: iter(()))
    monkeypatch.setattr(Suite, "missing", lambda self, only: [])
    assert main(command) == 0
    assert "## Growth with the area of the image" in (tmp_path / "suite.md").read_text()
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")


def test_bench_suite_refuses_a_pattern_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite", "--out", str(tmp_path / "suite.json"), "--only", "resnet"]) == 2
    assert "effb bench: --only resnet: found in the name of no pair" in capsys.readouterr().err


def test_bench_prints_a_row_for_each_case_and_writes_them(effb: Effb, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    argv = ("uniformer_xxs", "--vs", "attention=plain", "resnet18", "--batch", "1", "3", "--out", out)
    result = effb("bench", *argv, *QUICK)
    assert (result.code, result.err) == (0, "")
    _, head, _, *rows = map(cells, result.out.splitlines()[:9])
    assert [row[:4] for row in rows] == [
        [name, "inference", batch, "32"]
        for batch in "13"
        for name in ("uniformer_xxs", "vs attention=plain", "vs resnet18")
    ]
    assert [len(head) - len(row) for row in rows] == [2, 0, 0] * 2  # what is compared has no ratio
    assert [row[-1] for row in rows] == ["sdpa", "plain", "-"] * 2
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [result["label"] for result in document["results"]] == ["uniformer_xxs", "attention=plain", "resnet18"] * 2
    assert [len(result["samples_ms"]) for result in document["results"]] == [2] * 6


def test_bench_threads_are_those_asked_for(effb: Effb, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()
    before = torch.get_num_threads()

    def call() -> torch.Tensor:
        used.add(torch.get_num_threads())
        return torch.ones(1)

    monkeypatch.setitem(OPERATORS, "toy", lambda example: call)
    result = effb("bench", "op:toy", "--threads", before + 1, *QUICK)
    assert (result.code, used, torch.get_num_threads()) == (0, {before + 1}, before)
    assert f", {before + 1} threads; " in result.out


def test_bench_case_that_fails_is_exit_code_1_and_the_others_are_there(effb: Effb) -> None:
    # One image of 32 pixels leaves one value for each channel of the last batch norm in training.
    code, out, err = effb("bench", "resnet18", "--mode", "train", "inference", *QUICK)
    assert (code, err) == (1, "")
    train, inference = out.splitlines()[3:5]
    assert cells(train)[-1].startswith("failed: ValueError: Expected more than 1 value per channel")
    assert float(cells(inference)[5]) > 0


# doctor


def test_doctor_prints_its_sections(effb: Effb) -> None:
    code, out, _ = effb("doctor")
    assert code == 0
    assert re.findall(r"^\w+", out, re.MULTILINE) == ["System", "Packages", "Devices", "Attention", "OpenMMLab"]
    rows = dict(cells(line)[:2] for line in out.splitlines() if line.startswith("  "))
    assert rows["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert rows["sdpa"] == rows["plain"] == "works"


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_doctor_malicious_release_is_exit_code_1(release: str, effb: Effb, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: release if name == "lightning" else real(name))
    code, out, _ = effb("doctor")
    assert code == 1
    problem = out.split("Problems\n")[1]
    assert f"lightning {release} is a malicious release: uninstall it at once" in problem


# Bad input

BAD = {
    "recipe_misspelt": ("show quikstart", "'quikstart'", "`effb ls`", "nearest: quickstart"),
    "recipe_file_missing": ("train nowhere.yaml", "'nowhere.yaml'", "expected the path of a .yaml file"),
    "key_misspelt": ("train quickstart optim.lrr=1", "command line: optim.lrr: unknown key; nearest: optim.lr"),
    "key_without_value": ("show quickstart optim.lr", "'optim.lr'", "section.key=value"),
    "value_of_another_type": ("eval quickstart optim.lr=fast", "optim.lr: expected float, got 'fast'"),
    "model_misspelt": ("train quickstart model.name=uniformer_smal", "model.name", "nearest: uniformer_small"),
    "dataset_missing": ("train quickstart data.root=nowhere run.dir=runs/a", "nowhere/", "data.root"),
    "run_folder_is_a_file": (
        "train quickstart run.dir=recipes/quickstart.yaml",
        "run.dir: recipes/quickstart.yaml cannot be written",
    ),
    "folder_is_no_run": ("eval data", "data: no recipe.yaml", "runs/quickstart"),
    "nothing_to_evaluate": ("eval quickstart", "run folder or model.checkpoint=FILE"),
    "checkpoint_missing": ("eval quickstart model.checkpoint=nowhere.pth", "nowhere.pth: no such file"),
    "image_missing": (f"predict nowhere.png --run {RUN}", "nowhere.png", "No such file"),
    "image_is_text": (f"predict recipes/quickstart.yaml --run {RUN}", "recipes/quickstart.yaml: cannot be read as"),
    "folder_without_images": (f"predict recipes --run {RUN}", "recipes: no image in this folder"),
    "run_missing": (f"predict {COAT} --run runs/nowhere", "runs/nowhere: no checkpoint", "is it a run folder?"),
    "run_is_a_recipe": (f"predict {COAT} --run quickstart", "quickstart: no checkpoint", "is it a run folder?"),
    "model_without_checkpoint": (f"predict {COAT} --model uniformer_small", "--model and --checkpoint go together"),
    "run_with_checkpoint": (f"predict {COAT} --run {RUN} --checkpoint {BEST}", "--model and --checkpoint go together"),
    "no_such_model": (f"predict {COAT} --model uniformer_smal --checkpoint x", "'uniformer_smal'", "uniformer_small"),
    "checkpoint_of_model_missing": (f"predict {COAT} --model uniformer_xxs --checkpoint x.pth", "x.pth: no such file"),
    "bench_model_misspelt": ("bench uniformer_xss", "'uniformer_xss'", "nearest: uniformer_xs"),
    "bench_other_misspelt": ("bench uniformer_xxs --vs resnet8", "'resnet8'", "nearest: resnet18"),
    "bench_backend_cannot_serve": ("bench uniformer_xxs --vs attention=xformers --device cpu", "xformers cannot serve"),
    "bench_folder_missing": ("bench uniformer_xxs --out nowhere/a.json", "nowhere/a.json", "in a folder that exists"),
    "checkpoint_of_other_classes": (
        f"predict {COAT} --model uniformer_xxs --checkpoint {BEST}",
        f"{BEST}: made for 10 classes, expected 1000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case: str, effb: Effb) -> None:
    command, *expected = BAD[case]
    code, out, err = effb(*shlex.split(command))
    assert (code, out) == (2, "")
    assert err.startswith(f"effb {command.split()[0]}: ")
    assert err.count("\n") == 1
    assert [part for part in expected if part not in err] == []


@pytest.mark.parametrize("command", ["eval {run}", "train {run}", f"predict {COAT} --run {{run}}"])
def test_damaged_checkpoint_is_named_and_exit_code_2(command: str, effb: Effb, run_copy: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        path = run_copy / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-5000])
    code, _, err = effb(*command.format(run=run_copy).split())
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(r"copy/checkpoints/(best|last)\.ckpt: not a weight file, or a damaged or incomplete one", err)


def test_device_that_is_not_there_is_exit_code_2(effb: Effb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = effb("train", "quickstart", "trainer.accelerator=cuda", f"run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "CUDAAccelerator" in err


def test_bench_device_that_is_not_there_is_exit_code_2(effb: Effb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = effb("bench", "uniformer_xxs", "--device", "cuda")
    assert (code, out) == (2, "")
    assert err.startswith("effb bench: device cuda: torch finds no CUDA device here")


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["frobnicate"], ["ls", "modles"], ["predict", COAT], ["predict", "--run", str(RUN)], ["show"], ["bench"]),
        *(["bench", "resnet18", *wrong] for wrong in (["--size", "0"], ["--size", "32x"], ["--batch", "-1"])),
    ],
    ids=" ".join,
)
def test_command_line_that_does_not_parse_prints_its_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("usage: effb")
    assert "error: " in err
