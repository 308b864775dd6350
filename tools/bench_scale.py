"""Measure what a job costs as it grows: a step at several ranks on one machine, a checkpoint of a large model.

    OMP_NUM_THREADS=1 python tools/bench_scale.py steps quickstart --ranks 1 2 4 --strategies ddp fsdp --out steps.json
    OMP_NUM_THREADS=1 python tools/bench_scale.py checkpoint gc_vit_large --out checkpoint.json

Linux only. Ranks are processes that talk by gloo where there is no GPU. The batch of each stays the same, so that a
step would take as long at any number of ranks if each had a machine of its own; on one machine they share its cores.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone needs no installation

from effbackbones.bench.report import environment, write_json
from effbackbones.bench.timing import spread
from effbackbones.checkpoint import read_checkpoint, write_checkpoint
from effbackbones.config import RecipeError, load_recipe
from effbackbones.data import DataError
from effbackbones.train import run
from effbackbones.train.callbacks.finite import FiniteGuard
from effbackbones.train.callbacks.stop import EndOfRun

WARMUP = 3  # steps before the first that counts


class Times(Callback):
    """Seconds of every step after the first few, and the most memory that the process has held."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._step, self._began = 0, 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:  # between the batches of an accumulated step
            return
        now = time.perf_counter()
        if trainer.global_step > WARMUP:
            self.seconds.append(now - self._began)
        self._step, self._began = trainer.global_step, now

    @property
    def memory(self) -> int:
        """Bytes: resident ones of the process, or of the device where there is one."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        # Not by getrusage, which counts those of the process that started this one.
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(peak.split()[1])


def train_as_rank(recipe: str, overrides: list[str], steps: int) -> None:
    """Train without a run folder, and print what this rank has measured."""
    loaded, times = load_recipe(recipe, overrides), Times()
    loaded.recipe.trainer.limit_val = 0
    guard = FiniteGuard(clip=loaded.recipe.optim.clip_grad)
    trainer = run.make_trainer(loaded.recipe, None, [guard, EndOfRun(WARMUP + steps), times])
    module, data = run.build_task(loaded)
    before = times.memory
    trainer.fit(module, datamodule=data)
    print(json.dumps({"seconds": times.seconds, "memory": times.memory, "start": before}))


def measure_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each strategy and number of ranks, and print it."""
    print(f"{'strategy':10}{'ranks':>6}{'ms/step':>10}{'images/s':>10}{'MiB/rank':>10}{'of it before the run':>22}")
    rows = []
    for strategy in args.strategies:
        for ranks in args.ranks:
            settings = [f"trainer.devices={ranks}", f"trainer.strategy={strategy}", *args.overrides]
            recipe = load_recipe(args.recipe, settings).recipe
            reports = _start_ranks(ranks, ["--as-rank", "steps", args.recipe, *settings, "--steps", str(args.steps)])
            step = max(spread(report["seconds"]).median for report in reports)
            row = {
                "strategy": strategy,
                "ranks": ranks,
                "ms": 1e3 * step,
                "images_per_second": recipe.data.batch_size * ranks * recipe.trainer.accumulate / step,
                "memory": max(report["memory"] for report in reports),
                "start": max(report["start"] for report in reports),
            }
            print(
                f"{strategy:10}{ranks:6}{row['ms']:10.1f}{row['images_per_second']:10.2f}{row['memory'] / 2**20:10.0f}"
                f"{row['start'] / 2**20:22.0f}",
                flush=True,
            )
            rows.append(row)
    return rows


def _start_ranks(ranks: int, arguments: list[str]) -> list[dict[str, Any]]:
    """Run this script as each of `ranks` processes; return what they print last."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **group, "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RecipeError(f"a rank ended with {[process.returncode for process in processes]}: its message is above")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Return, and print, the seconds that a checkpoint takes to write and to read: a model, its average and AdamW's."""
    model = timm.create_model(args.model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    state = {"model": weights, "ema": {name: value.clone() for name, value in weights.items()}}
    content = {"state_dict": state, "optimizer_states": [optimizer.state_dict()]}
    saved, loaded = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "last.ckpt"
        for _ in range(args.rounds):
            begin = time.perf_counter()
            write_checkpoint(content, path)
            written = time.perf_counter()
            read = read_checkpoint(path)
            model.load_state_dict(read["state_dict"]["model"])
            optimizer.load_state_dict(read["optimizer_states"][0])
            loaded.append(time.perf_counter() - written)
            saved.append(written - begin)
            del read
        size = path.stat().st_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = {"parameters": parameters, "bytes": size, "save": saved, "load": loaded}
    print(f"{'parameters':>12}{'file MiB':>10}{'save s':>8}{'load s':>8}")
    print(f"{parameters:12}{size / 2**20:10.0f}{spread(saved).median:8.2f}{spread(loaded).median:8.2f}")
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the script; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    what = parser.add_subparsers(dest="what", required=True)
    steps = what.add_parser("steps", help="time and memory of a step, by number of ranks")
    steps.add_argument("recipe", help="name or path of a recipe")
    steps.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    steps.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    steps.add_argument("--strategies", nargs="+", choices=["ddp", "fsdp"], default=["ddp"], help="default: ddp")
    steps.add_argument("--steps", type=int, default=20, metavar="N", help="steps to measure; default: 20")
    checkpoint = what.add_parser("checkpoint", help="time to write and to read a checkpoint")
    checkpoint.add_argument("model", help="model of timm's registry, such as gc_vit_large with its 202 M parameters")
    checkpoint.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    checkpoint.add_argument("--folder", metavar="DIR", help="where the file goes; default: that of temporary files")
    for command in (steps, checkpoint):
        command.add_argument("--out", metavar="FILE.json", type=Path, help="write everything there: samples, machine")
    args = parser.parse_args(argv)
    try:
        if args.what == "checkpoint":
            rows: Any = measure_checkpoint(args)
        elif args.as_rank:
            train_as_rank(args.recipe, args.overrides, args.steps)
            return 0
        else:
            rows = measure_steps(args)
    except (RecipeError, DataError) as error:
        print(f"bench_scale.py: {error}", file=sys.stderr)
        return 2
    if args.out:
        machine = environment("cuda" if torch.cuda.is_available() else "cpu")
        write_json(args.out, {"machine": machine, args.what: rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
