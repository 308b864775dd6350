"""The thin scripts of tools/: commands for a clone and for torchrun."""

import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import build_data
from effbackbones.data.classes import imagenet_classes
from effbackbones.data.folder import load_folders
from effbackbones.models._zoo import ZOO
from effbackbones.train.classification import ClassificationModule

TOOLS = Path(__file__).parents[1] / "tools"
SMALL = ["data.batch_size=2", "model.args.depths=[1, 1, 1, 1]"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def run_tool(monkeypatch, name, *arguments):
    """Run a script in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return end.value.code


def test_scripts_train_a_recipe_and_evaluate_its_run(tmp_path, monkeypatch, capsys):
    assert run_tool(monkeypatch, "train.py", "debug/two_steps", f"run.dir={tmp_path}", *SMALL) == 0
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    capsys.readouterr()
    assert run_tool(monkeypatch, "test.py", tmp_path) == 0
    *_, metrics = capsys.readouterr().out.splitlines()
    assert metrics.startswith("top1 ")


@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_script_given_a_bad_recipe_ends_with_code_2(monkeypatch, capsys, name):
    assert run_tool(monkeypatch, name, "debug/no_such_recipe") == 2
    assert "no such recipe" in capsys.readouterr().err


def test_torchrun_trains_in_two_processes(tmp_path):
    command = ["bash", str(TOOLS / "dist_train.sh"), "2", "debug/two_steps", f"run.dir={tmp_path / 'run'}", *SMALL]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert done.stdout.count("Best top1") == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("arguments", [[], ["2"], ["two", "quickstart"], ["0", "quickstart"]])
def test_dist_train_without_devices_and_recipe_says_what_it_expects(arguments):
    done = subprocess.run(["bash", str(TOOLS / "dist_train.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dist_train: expected DEVICES RECIPE")


# slurm_train.sh

# A task for each of SLURM_NTASKS; signals reach all of them; the code is the largest of theirs, as that of srun.
SRUN = """#!/usr/bin/env bash
shift
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    wait "$task"
    own=$?
    code=$((own > code ? own : code))
done
exit $code
"""
TASK = """#!/usr/bin/env bash
echo $$ >"pid$SLURM_PROCID"
trap 'echo stopped >>"task$SLURM_PROCID"; exit 143' USR1
echo "$@" >"task$SLURM_PROCID"
for ((i = 0; i < ${PATIENCE:-0}; i++)); do sleep 0.1; done
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>scontrol.calls
"""


@pytest.fixture
def slurm(tmp_path):
    """Start slurm_train.sh as sbatch does, in a folder like a clone with a stub of everything that it calls."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").touch()
    for name, script in {"srun": SRUN, "scontrol": SCONTROL, "python": TASK}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}

    def start(*arguments, **environment):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(TOOLS / "slurm_train.sh"), *arguments]
        env = {**os.environ, **job, "PATH": path, **environment}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("code", [0, 2, 143])
def test_slurm_train_starts_the_tasks_and_requeues_a_run_that_was_stopped(slurm, tmp_path, code):
    job = slurm("in1k/uniformer_small", "optim.lr=1e-3", CODE=str(code))
    assert job.wait() == code
    wanted = "tools/train.py in1k/uniformer_small optim.lr=1e-3 trainer.devices=2 trainer.nodes=2\n"
    assert [(tmp_path / f"task{rank}").read_text() for rank in range(4)] == [wanted] * 4
    calls = tmp_path / "scontrol.calls"
    assert (calls.read_text() if calls.exists() else "") == ("requeue 4711\n" if code == 143 else "")


def test_slurm_train_outlives_the_signal_that_its_tasks_end_from(slurm, tmp_path):
    job = slurm("quickstart", CODE="9", PATIENCE="600")
    tasks = [tmp_path / f"task{rank}" for rank in range(4)]
    while not all(task.exists() and task.read_text() for task in tasks):
        assert job.poll() is None
    job.terminate()  # as SLURM does with the shell of a job that it preempts
    for rank in range(4):
        os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGUSR1)
    assert job.wait() == 143
    assert all(task.read_text().endswith("stopped\n") for task in tasks)
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 4711\n"


def test_slurm_train_outside_of_a_clone_or_without_a_recipe_says_what_it_expects(slurm, tmp_path):
    for arguments in ((), ("quickstart",)):
        job = slurm(*arguments)
        assert job.wait() == 2
        assert job.stderr.read().startswith("slurm_train: expected a RECIPE [KEY=VALUE ...], and the root of a clone")
        (tmp_path / "tools" / "train.py").unlink(missing_ok=True)


def test_slurm_train_asks_for_the_signal_it_requeues_by():
    options = [line for line in (TOOLS / "slurm_train.sh").read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --signal=USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)


# bench_loop.py

LOOP = """
model: {name: uniformer_small, args: {head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 1, 1]}}
data: {source: synthetic, num_classes: 4, size: 32, batch_size: 4, workers: 0, synthetic_images: 100}
optim: {clip_grad: 0.5}
schedule: {warmup_epochs: 0.5}
ema: {decay: 0.9}
trainer: {accelerator: cpu, log_every: 1}
"""
"""25 steps an epoch."""


@pytest.fixture
def loop_recipe(tmp_path):
    (tmp_path / "loop.yaml").write_text(LOOP)
    return tmp_path / "loop.yaml"


def test_bench_loop_compares_loops_that_compute_the_same(tmp_path, monkeypatch, capsys, loop_recipe):
    losses = {}

    def note(module, batch):
        found = forward_loss(module, batch)
        averaged = [weight.sum().item() for weight in module.ema.module.parameters()]
        losses.setdefault(module, []).append((found["loss"].item(), averaged))
        return found

    forward_loss = ClassificationModule.forward_loss
    monkeypatch.setattr(ClassificationModule, "forward_loss", note)
    arguments = ["--steps", 3, "--rounds", 2, "--out", tmp_path / "loop.json"]
    assert run_tool(monkeypatch, "bench_loop.py", loop_recipe, *arguments) == 0
    effb, bare = losses.values()
    assert effb == bare
    assert len(effb) == 5 + 2 * 2 * 3

    document = json.loads((tmp_path / "loop.json").read_text())
    samples = document["samples_ms"]
    assert [len(samples[name]) for name in ("effb", "bare")] == [4, 4]
    ratios = [sum(samples["effb"][i : i + 2]) / sum(samples["bare"][i : i + 2]) for i in (0, 2)]
    assert document["ratios"] == pytest.approx(ratios)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["effb", "bare", "ratio"]
    assert float(shown[2].split()[1]) == pytest.approx(sum(ratios) / 2, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 3], "35 steps are more than an epoch, 25"),
        (["trainer.precision=fp16"], "no fp16 and no accumulation"),
        (["trainer.accumulate=2"], "no fp16 and no accumulation"),
        (["data.syze=3"], "unknown key"),
    ],
)
def test_bench_loop_that_cannot_compare_says_why(monkeypatch, capsys, loop_recipe, arguments, message):
    assert run_tool(monkeypatch, "bench_loop.py", loop_recipe, *arguments) == 2
    assert message in capsys.readouterr().err


# bench_scale.py


def test_bench_scale_measures_a_checkpoint(tmp_path, monkeypatch, capsys):
    arguments = ["checkpoint", "s2aformer_mini", "--rounds", 2, "--out", tmp_path / "checkpoint.json"]
    assert run_tool(monkeypatch, "bench_scale.py", *arguments) == 0
    row = json.loads((tmp_path / "checkpoint.json").read_text())["checkpoint"]
    parameters = next(row.params for row in ZOO if row.model == "s2aformer_mini")
    assert row["parameters"] == parameters
    assert 4 * 4 * parameters <= row["bytes"] < 4.1 * 4 * parameters  # weights, average, two moments
    assert all(len(row[what]) == 2 and min(row[what]) > 0 for what in ("save", "load"))
    assert capsys.readouterr().out.split()[-4] == str(parameters)


@pytest.mark.slow
def test_bench_scale_measures_steps_by_ranks(tmp_path, monkeypatch, capsys, loop_recipe):
    settings = ["--ranks", 1, 2, "--strategies", "ddp", "fsdp", "--steps", 4, "--out", tmp_path / "steps.json"]
    assert run_tool(monkeypatch, "bench_scale.py", "steps", loop_recipe, "trainer.epochs=9", *settings) == 0
    rows = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert [(row["strategy"], row["ranks"]) for row in rows] == [(name, n) for name in ("ddp", "fsdp") for n in (1, 2)]
    assert all(row["memory"] > row["start"] > 0 for row in rows)
    assert [row["images_per_second"] * row["ms"] / 1e3 for row in rows] == pytest.approx([4, 8, 4, 8])
    assert len(capsys.readouterr().out.splitlines()) == 5


# make_imagenet_like.py


def test_imagenet_like_set_trains_from_folders_and_has_the_same_images_in_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "set"
    arguments = ["--classes", 12, "--train", 2, "--val", 1]
    assert run_tool(monkeypatch, "make_imagenet_like.py", "--out", out, *arguments) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "train: 24 images of 12 classes",
        "val: 12 images of 12 classes",
    ]
    train, val = load_folders(out / "folders")
    assert (len(train), len(val), train.classes) == (24, 12, list(imagenet_classes())[:12])
    shards = build_data(DataConfig(source="shards", root=str(out / "shards")), AugmentConfig(), seed=0)
    assert (len(shards.train_dataset), len(shards.val_dataset), list(shards.classes)) == (24, 12, train.classes)
    for split, source in (("train", train), ("val", val)):
        with tarfile.open(out / "shards" / f"{split}-0000.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        jpegs = {name.removesuffix(".jpg"): content for name, content in files.items() if name.endswith(".jpg")}
        targets = {name.removesuffix(".cls"): int(text) for name, text in files.items() if name.endswith(".cls")}
        paths = {path.stem: path for path in (out / "folders" / split).rglob("*.JPEG")}
        assert jpegs == {name: path.read_bytes() for name, path in paths.items()}
        assert targets == {name: source.classes.index(path.parent.name) for name, path in paths.items()}
        assert len(set(jpegs.values())) == len(source)
        assert list(targets.values()) != sorted(targets.values())
        sizes = {source[i][0].size for i in range(len(source))}
        assert len(sizes) > 5
        assert all(64 <= side <= 128 for size in sizes for side in size)


def test_imagenet_like_set_follows_from_its_seed(tmp_path, monkeypatch):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        arguments = ["--classes", 10, "--train", 1, "--seed", seed]
        assert run_tool(monkeypatch, "make_imagenet_like.py", "--out", tmp_path / name, *arguments) == 0
    one, same, other = (
        (tmp_path / name / "shards" / "train-0000.tar").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "File exists"), (["--train", 20, "--classes", 1000], "too few for 20 different ones")],
)
def test_imagenet_like_set_that_cannot_be_made_says_why(tmp_path, monkeypatch, capsys, arguments, message):
    out = tmp_path / "missing" if arguments else tmp_path
    assert run_tool(monkeypatch, "make_imagenet_like.py", "--out", out, "--classes", 10, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# build_mmcv.sh, with a torch, a pip, an mmcv and compilers that only stand for the real ones

TORCH = """
from types import SimpleNamespace
__version__ = {torch!r}
version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(is_available=lambda: {gpu!r})
def tensor(values, device): return device
"""
OPERATORS = """
def nms(boxes, scores, iou_threshold, offset): assert boxes == scores in {devices!r}
def get_compiling_cuda_version(): return {cuda!r}
"""
CPU_OPERATORS = OPERATORS.format(cuda="not available", devices=["cpu"])
CUDA_OPERATORS = OPERATORS.format(cuda="13.0", devices=["cpu", "cuda"])
PIP = """
import json, os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parents[1]
if sys.argv[1:] == ["cache", "dir"]:
    print(here / "cache")
elif "onedl-mmcv" in sys.argv:
    for compiler in ("CXX", "PYTORCH_NVCC"):
        subprocess.run([os.environ.get(compiler, "c++"), "-O3", "-std=c++17", "a file.cpp"], check=True)
    names = ("MAX_JOBS", "FORCE_CUDA", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
    call = {"arguments": sys.argv[1:], "environment": {name: os.environ.get(name) for name in names}}
    with open(here / "calls", "a") as calls:
        calls.write(json.dumps(call) + "\\n")
    builds = sorted(here.glob("build_*"))
    if builds:
        (here / "mmcv").mkdir(exist_ok=True)
        (here / "mmcv/__init__.py").write_text("raise ImportError('mmcv itself is not to be imported')")
        builds[0].rename(here / "mmcv/_ext.py")
"""
COMPILER = """#!/usr/bin/env bash
[[ $* == --version ]] && echo "release {release}, V{release}.1" && exit
printf '%s|' "$(basename "$0")" "$@" >>{log}
echo >>{log}
"""


class MmcvBuild:
    """A Python with a torch of one version, for tools/build_mmcv.sh to build mmcv in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"PYTHONPATH": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        self.write("bin/python", f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')  # sees no installed package
        self.write("pip/__main__.py", PIP)
        self.write("sysconfig.py", f"def get_path(name): return {str(folder / 'include')!r}\n")
        self.write("include/Python.h", "")
        self.write("build_1", CPU_OPERATORS)
        for compiler in ("c++", "nvcc"):
            self.write(f"bin/{compiler}", COMPILER.format(release="13.0", log=folder / "compiled"))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")
        (self.folder / name).chmod(0o755)

    def has_torch(self, torch="2.11.0+cpu", cuda=None, gpu=False):
        self.write("torch.py", TORCH.format(torch=torch, cuda=cuda, gpu=gpu))

    def has_operators(self):
        self.write("mmcv/__init__.py", "")
        self.write("mmcv/_ext.py", CPU_OPERATORS)

    def run(self, **environment):
        """Run the script; return its exit code and all that it printed."""
        names = ("CXX", "CUDA_HOME", "FORCE_CUDA", "MAX_JOBS", "PYTORCH_NVCC")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        done = subprocess.run(
            ["bash", str(TOOLS / "build_mmcv.sh"), str(self.folder / "bin" / "python")],
            env={**inherited, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    @property
    def builds(self):
        """The calls of pip that built mmcv."""
        calls = self.folder / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    @property
    def compiled(self):
        """The command lines that reached the compilers."""
        return [line.rstrip("|").split("|") for line in (self.folder / "compiled").read_text().splitlines()]


@pytest.fixture
def mmcv_build(tmp_path):
    return MmcvBuild(tmp_path)


@pytest.mark.parametrize(
    ("torch_version", "standard"),
    [("2.11.0+cu130", 17), ("2.13.1", 17), ("2.14.0", 20), ("2.14.0.dev20261101+cpu", 20), ("3.0.0", 20)],
)
def test_build_mmcv_compiles_with_the_standard_of_the_torch(mmcv_build, torch_version, standard):
    mmcv_build.has_torch(torch_version)
    code, output = mmcv_build.run()
    assert code == 0, output
    assert f"compiling mmcv for torch {torch_version} (cpu, C++{standard}, " in output
    assert mmcv_build.compiled[0] == ["c++", "-O3", f"-std=c++{standard}", "a file.cpp"]


def test_build_mmcv_installs_the_tested_version_without_isolation_or_requirements(mmcv_build):
    mmcv_build.has_torch()
    code, output = mmcv_build.run()
    assert code == 0, output
    assert "mmcv's operators work with torch 2.11.0+cpu (cpu), after 0 min " in output
    (build,) = mmcv_build.builds
    assert {"--no-build-isolation", "--no-deps", "--force-reinstall", "onedl-mmcv"} < set(build["arguments"])
    constraints = Path(build["arguments"][build["arguments"].index("--constraint") + 1])
    assert "\nonedl-mmcv==" in constraints.read_text(encoding="utf-8")


def test_build_mmcv_working_operators_are_left_alone(mmcv_build):
    mmcv_build.has_torch()
    mmcv_build.has_operators()
    code, output = mmcv_build.run(CXX="no-such-compiler")
    assert (code, mmcv_build.builds) == (0, [])
    assert "mmcv's operators work with torch 2.11.0+cpu (cpu): nothing to build" in output


def test_build_mmcv_operators_of_another_torch_are_built_anew(mmcv_build):
    mmcv_build.has_torch()
    mmcv_build.write("mmcv/_ext.py", "raise ImportError('undefined symbol')")
    code, output = mmcv_build.run()
    assert code == 0, output
    assert len(mmcv_build.builds) == 1


def test_build_mmcv_every_torch_has_a_cache_of_its_own(mmcv_build):
    caches = []
    for torch_version in ("2.11.0+cpu", "2.13.0+cpu"):
        mmcv_build.has_torch(torch_version)
        mmcv_build.run()
        arguments = mmcv_build.builds[-1]["arguments"]
        caches.append(arguments[arguments.index("--cache-dir") + 1])
        (mmcv_build.folder / "mmcv" / "_ext.py").rename(mmcv_build.folder / "build_1")
    cache = mmcv_build.folder / "cache" / "onedl-mmcv"
    assert caches == [str(cache / "torch-2.11.0+cpu-cpu"), str(cache / "torch-2.13.0+cpu-cpu")]


def test_build_mmcv_kept_wheel_that_does_not_load_is_built_anew(mmcv_build):
    mmcv_build.has_torch()
    kept = "cache/onedl-mmcv/torch-2.11.0+cpu-cpu/wheels/mmcv.whl"
    mmcv_build.write(kept, "")
    mmcv_build.write("build_0", "raise ImportError('undefined symbol')")
    code, output = mmcv_build.run()
    assert code == 0, output
    assert "the wheel that pip kept does not load with torch 2.11.0+cpu: compiling it anew" in output
    assert len(mmcv_build.builds) == 2
    assert not (mmcv_build.folder / kept).exists()


def test_build_mmcv_operators_that_do_not_load_are_an_error(mmcv_build):
    mmcv_build.has_torch()
    mmcv_build.write("build_0", "raise ImportError('undefined symbol')")
    code, output = mmcv_build.run()
    assert (code, len(mmcv_build.builds)) == (1, 1)
    assert "mmcv's operators do not load with torch 2.11.0+cpu: " in output


def test_build_mmcv_jobs_given_are_used(mmcv_build):
    mmcv_build.has_torch()
    mmcv_build.run(MAX_JOBS="7")
    assert mmcv_build.builds[0]["environment"]["MAX_JOBS"] == "7"


def test_build_mmcv_jobs_are_at_most_the_cores(mmcv_build):
    mmcv_build.has_torch()
    mmcv_build.run()
    assert 1 <= int(mmcv_build.builds[0]["environment"]["MAX_JOBS"]) <= os.cpu_count()


@pytest.mark.parametrize(("torch_version", "standard"), [("2.11.0+cu130", 17), ("2.14.0+cu130", 20)])
def test_build_mmcv_gpu_with_matching_nvcc_builds_for_cuda(mmcv_build, torch_version, standard):
    mmcv_build.has_torch(torch_version, cuda="13.0", gpu=True)
    mmcv_build.has_operators()  # of the CPU only: these do not serve
    mmcv_build.write("build_1", CUDA_OPERATORS)
    code, output = mmcv_build.run()
    assert code == 0, output
    (build,) = mmcv_build.builds
    assert build["environment"]["FORCE_CUDA"] == "1"
    assert build["environment"]["CUDA_HOME"] == str(mmcv_build.folder)
    if standard == 20:
        assert mmcv_build.compiled[1] == ["nvcc", "-O3", "-std=c++20", "a file.cpp"]


def test_build_mmcv_forced_cuda_without_a_gpu_builds_for_cuda(mmcv_build):
    mmcv_build.has_torch("2.11.0+cu130", cuda="13.0")
    mmcv_build.has_operators()
    mmcv_build.write("build_1", CUDA_OPERATORS)
    code, output = mmcv_build.run(FORCE_CUDA="1")
    assert code == 0, output
    assert "for torch 2.11.0+cu130 (cuda13.0, C++17, " in output
    assert mmcv_build.builds[0]["environment"]["FORCE_CUDA"] == "1"


def test_build_mmcv_operators_of_another_gpu_are_built_anew(mmcv_build):
    mmcv_build.has_torch("2.11.0+cu130", cuda="13.0", gpu=True)
    mmcv_build.has_operators()
    mmcv_build.write("mmcv/_ext.py", OPERATORS.format(cuda="13.0", devices=["cpu"]))
    mmcv_build.write("build_1", CUDA_OPERATORS)
    code, output = mmcv_build.run()
    assert code == 0, output
    assert len(mmcv_build.builds) == 1


def test_build_mmcv_gpu_with_another_nvcc_builds_for_the_cpu_and_says_so(mmcv_build):
    mmcv_build.has_torch("2.11.0+cu126", cuda="12.6", gpu=True)
    code, output = mmcv_build.run()
    assert code == 0, output
    assert "torch sees a GPU, but the CUDA of nvcc is 13.0 and that of torch 2.11.0+cu126 is 12.6" in output
    environment = mmcv_build.builds[0]["environment"]
    assert (environment["FORCE_CUDA"], environment["CUDA_VISIBLE_DEVICES"]) == ("0", "")


def test_build_mmcv_forced_cuda_without_its_nvcc_is_an_error(mmcv_build):
    mmcv_build.has_torch("2.11.0+cu130", cuda="13.0")
    code, output = mmcv_build.run(FORCE_CUDA="1", CUDA_HOME=str(mmcv_build.folder / "nowhere"))
    assert (code, mmcv_build.builds) == (1, [])
    assert "FORCE_CUDA=1, but the CUDA of nvcc is missing and that of torch 2.11.0+cu130 is 13.0" in output


def test_build_mmcv_without_torch_is_an_error(mmcv_build):
    code, output = mmcv_build.run()
    assert (code, mmcv_build.builds) == (1, [])
    assert "torch does not import in" in output
    assert "(ModuleNotFoundError: No module named 'torch'): install it there first" in output


def test_build_mmcv_without_a_compiler_is_an_error(mmcv_build):
    mmcv_build.has_torch()
    code, output = mmcv_build.run(CXX="no-such-compiler")
    assert (code, mmcv_build.builds) == (1, [])
    assert "no C++ compiler no-such-compiler: install one" in output


def test_build_mmcv_without_python_headers_is_an_error(mmcv_build):
    mmcv_build.has_torch()
    (mmcv_build.folder / "include" / "Python.h").unlink()
    code, output = mmcv_build.run()
    assert (code, mmcv_build.builds) == (1, [])
    assert f"no {mmcv_build.folder}/include/Python.h: install the headers of this Python" in output


@pytest.mark.parametrize("original", ["mmcv", "mmcv-lite"])
def test_build_mmcv_beside_an_original_mmcv_is_an_error(mmcv_build, original):
    mmcv_build.has_torch()
    mmcv_build.write(f"{original.replace('-', '_')}-2.1.0.dist-info/METADATA", f"Name: {original}\nVersion: 2.1.0\n")
    code, output = mmcv_build.run()
    assert (code, mmcv_build.builds) == (1, [])
    assert f"{original} is installed, which provides mmcv too: first " in output
