"""A job of many ranks in one process: rank 0 of it builds, wraps and steps, the others only seem to be there."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from effbackbones.config import LoadedRecipe, RecipeError
from effbackbones.plan import gib
from effbackbones.train.callbacks.stop import EndOfRun
from effbackbones.train.run import build_task, make_trainer


@dataclass(frozen=True)
class DryRun:
    """What rank 0 of a dry run held.

    Attributes:
        strategy: How the ranks shared the work.
        world: How many there seemed to be.
        steps: Optimizer steps that were taken.
        whole: Bytes of the model's parameters.
        parameters: Bytes of those that the rank kept.
        optimizer: Bytes of the optimizer's state that the rank kept.
    """

    strategy: str
    world: int
    steps: int
    whole: int
    parameters: int
    optimizer: int

    def __str__(self) -> str:
        return (
            f"{self.steps} step as one of {self.world} ranks under {self.strategy}: weights {gib(self.parameters)} of "
            f"{gib(self.whole)}, optimizer {gib(self.optimizer)}"
        )


def dry_run(loaded: LoadedRecipe, world: int) -> DryRun:
    """Take one step of a recipe as rank 0 of `world`, on a CPU, with two images of noise.

    What other ranks would send is made up, so that the numbers mean nothing; that everything can be built, wrapped and
    stepped does.

    Raises:
        RecipeError: The recipe is of a dense task, which has no images of noise, or cannot be built.
    """
    if loaded.recipe.task != "classification":
        raise RecipeError(
            f"--dry-run: {loaded.name} is of task {loaded.recipe.task}, and needs its dataset: leave it out"
        )
    loaded = copy.deepcopy(loaded)
    recipe = loaded.recipe
    recipe.data.source, recipe.data.num_classes = "synthetic", recipe.data.num_classes or 1000
    recipe.data.batch_size, recipe.data.global_batch, recipe.data.workers = 2, None, 0
    recipe.data.synthetic_images = 2 * world
    recipe.trainer.accelerator, recipe.trainer.devices, recipe.trainer.nodes = "cpu", world, 1
    recipe.trainer.accumulate, recipe.trainer.limit_val = 1, 0
    recipe.model.checkpoint = recipe.distill.teacher = None
    recipe.model.compile = False
    module, data = build_task(loaded)
    with _fake_ranks(world):
        trainer = make_trainer(recipe, None, [EndOfRun(1), _OwnGradients()], _Started())
        trainer.fit(module, datamodule=data)
    state = [leaf for leaf in tree_leaves(list(trainer.optimizers[0].state.values())) if isinstance(leaf, Tensor)]
    return DryRun(
        strategy=recipe.trainer.strategy if recipe.trainer.strategy != "auto" else "ddp",
        world=trainer.world_size,
        steps=trainer.global_step,
        whole=sum(parameter.nbytes for parameter in module.model.parameters()),
        parameters=_kept(module.model.parameters()),
        optimizer=_kept(state),
    )


class _Started(LightningEnvironment):
    """Processes that something else has started."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


class _OwnGradients(Callback):
    """Has DDP take the gradients of this rank for the mean: of those that are made up it gets none."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(None, self.reduce)

    @staticmethod
    def reduce(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


@contextmanager
def _fake_ranks(world: int) -> Iterator[None]:
    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def _kept(tensors: Iterable[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)
