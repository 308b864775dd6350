"""The thin scripts of tools/: commands for a clone and for torchrun."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = ["debug/two_steps", "trainer.devices=2", f"run.dir={tmp_path / 'run'}", *SMALL]
    command = [*torchrun, str(TOOLS / "train.py"), *recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert done.stdout.count("Best top1") == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


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
