"""The thin scripts of tools/: commands for a clone and for torchrun."""

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


@pytest.mark.slow
def test_torchrun_trains_in_two_processes(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = ["debug/two_steps", "trainer.devices=2", f"run.dir={tmp_path / 'run'}", *SMALL]
    command = [*torchrun, str(TOOLS / "train.py"), *recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert done.stdout.count("Best top1") == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
