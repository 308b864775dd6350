"""Compare the time of a step of `effb train` with that of a bare PyTorch loop that does the same work.

Both train in this process and take turns of a few steps, so that a machine that is busy, or warms up, is so for both.
The same are: model, loader, optimizer, schedule, average of the weights, clipping, precision. The rest is what our loop
costs: Lightning's hooks, the seeds of a step, the guard on gradients, loggers, the progress line.

    OMP_NUM_THREADS=1 python tools/bench_loop.py quickstart ema.decay=0.999 optim.clip_grad=5
    OMP_NUM_THREADS=1 python tools/bench_loop.py quickstart model.name=s2aformer_mini --rounds 5 --out loop.json
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone needs no installation

from effbackbones.bench.report import environment, number, write_json
from effbackbones.bench.timing import order, paired_ratios, seconds_per_call, spread, synchronize
from effbackbones.config import RecipeError, load_recipe
from effbackbones.data import DataError
from effbackbones.train import run
from effbackbones.train.batch import device_batch

WARMUP = 5  # steps of each loop before its first turn


def bare_loop(module: Any, optimizer: Any, schedule: Any, batches: Iterable[Any]) -> Iterator[None]:
    """Train the model of a module, a step with each iteration, as one writes that with PyTorch."""
    model, ema, recipe, device = module.model, module.ema, module.recipe, module.device
    if recipe.model.compile:  # which a copy is not
        model.compile()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for step, batch in enumerate(batches):
        schedule.step_update(step)
        batch = module.transfer_batch_to_device(batch, device, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.trainer.precision == "bf16"):
            loss = module.forward_loss(batch)["loss"]
        loss.backward()
        if recipe.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(weights, recipe.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model, step=step + 1)
        yield


class TakingTurns(Callback):
    """Has a bare loop take its turns between those of the trainer.

    Attributes:
        samples: Seconds of a step, mean over each turn, of the trainer and of the bare loop.

    Args:
        batches: Those of the bare loop.
        steps: Steps of a turn.
        turns: Whose turn it is, one after the other: 0 for the trainer, 1 for the bare loop.
    """

    def __init__(self, batches: Iterable[Any], steps: int, turns: Sequence[int]):
        self.batches, self.steps, self.turns = batches, steps, iter(turns)
        self.samples: tuple[list[float], list[float]] = ([], [])
        self._ends_at, self._began_at = WARMUP, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = pl_module.device.type
        schedule = trainer.lr_scheduler_configs[0].scheduler
        copies = deepcopy((pl_module, trainer.optimizers[0], schedule))
        self._take_bare_step = partial(next, bare_loop(*copies, self.batches))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step < self._ends_at:
            return
        synchronize(self._device)
        if trainer.global_step == WARMUP:
            seconds_per_call(self._take_bare_step, WARMUP, self._device)
        else:
            self.samples[0].append((time.perf_counter() - self._began_at) / self.steps)
        for bare in self.turns:
            if not bare:
                break
            self.samples[1].append(seconds_per_call(self._take_bare_step, self.steps, self._device))
        self._ends_at += self.steps
        self._began_at = time.perf_counter()


def measure(target: str, overrides: Sequence[str], steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Train a recipe for some steps; return the samples of the trainer and of the bare loop.

    Raises RecipeError where the recipe cannot be compared.
    """
    turns = [who for round_ in range(rounds) for who in order(2, round_)]
    in_all = WARMUP + 2 * rounds * steps
    with tempfile.TemporaryDirectory() as folder:
        options = [f"trainer.steps={in_all}", "trainer.epochs=1", "trainer.limit_val=1", f"run.dir={folder}"]
        loaded = load_recipe(target, [*overrides, *options])
        recipe = loaded.recipe
        if recipe.trainer.precision == "fp16" or recipe.trainer.accumulate != 1:
            raise RecipeError("the bare loop has no fp16 and no accumulation: set trainer.precision and accumulate")
        recipe.data.batch_size = device_batch(recipe, 1)
        loader = run.open_data(recipe).train_dataloader()
        if len(loader) < in_all:
            raise RecipeError(f"{in_all} steps are more than an epoch, {len(loader)}: choose fewer --rounds or --steps")
        alternate, own = TakingTurns(loader, steps, turns), run._callbacks
        with (
            patch.object(run, "_callbacks", lambda *args: [*own(*args), alternate]),
            contextlib.redirect_stdout(sys.stderr),
        ):
            run.train(loaded)
    return alternate.samples


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as data.batch_size=8")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of a turn; default: 5")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds of two turns each; default: 15")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything there, samples too")
    args = parser.parse_args(argv)
    try:
        effb, bare = measure(args.recipe, args.overrides, args.steps, args.rounds)
    except (RecipeError, DataError) as error:
        parser.error(str(error))
    ratios = paired_ratios(bare, effb)
    for name, samples in (("effb train", effb), ("bare loop", bare)):
        median, lower, upper = (number(1e3 * seconds) for seconds in spread(samples))
        print(f"{name:10}  {median} ms a step ({lower}-{upper})")
    median, lower, upper = map(number, spread(ratios))
    print(f"ratio       {median} ({lower}-{upper}), paired in {args.rounds} rounds of two turns of {args.steps} steps")
    if args.out:
        document = {
            **vars(args),
            "out": None,
            "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
            "samples_ms": {"effb": [1e3 * x for x in effb], "bare": [1e3 * x for x in bare]},
            "ratios": ratios,
        }
        write_json(args.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
