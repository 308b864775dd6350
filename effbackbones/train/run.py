"""A run: from a recipe to a run folder, and from a run folder to an evaluation."""

import logging
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from effbackbones.checkpoint import CheckpointError, read_checkpoint, run_checkpoint
from effbackbones.config import LoadedRecipe, Recipe, RecipeError, explain, load_recipe
from effbackbones.data import RecipeData, build_data
from effbackbones.files import replacing
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints
from effbackbones.train.callbacks.finite import FiniteGuard
from effbackbones.train.callbacks.pictures import Pictures
from effbackbones.train.callbacks.progress import ProgressLine
from effbackbones.train.callbacks.stop import EndOfRun
from effbackbones.train.classification import ClassificationModule
from effbackbones.train.logger import MetricsCSV
from effbackbones.train.module import TrainingModule, has_sync_bn

PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

# What may differ when a run goes on: where and how it is computed and logged, not what is computed.
MAY_CHANGE = (
    "run.",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.nodes",
    "trainer.strategy",
    "trainer.log_every",
    "trainer.save_every",
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "model.checkpoint",
)


# Lightning announces what the recipe says, and advertises.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return the run folder of a recipe: `run.dir`, or runs/<recipe name>."""
    return Path(loaded.recipe.run.dir or Path("runs") / loaded.name)


def train(loaded: LoadedRecipe) -> Path:
    """Train a recipe in its run folder, from the last checkpoint on where there is one; return the folder.

    Raises:
        RecipeError: The folder holds a run of a recipe that differs in what is computed.
        CheckpointError: A checkpoint cannot be read or does not fit.
        OSError: The run folder cannot be written.
        NonFiniteError: A step had a loss or gradient that is not finite.
    """
    recipe, folder = loaded.recipe, run_folder(loaded)
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        _check_same_recipe(folder, loaded)
    recipe.run.force = False  # said to this command, not to those that find recipe.yaml

    seed_everything(recipe.trainer.seed, verbose=False)
    module, data = build_task(loaded)
    if recipe.model.checkpoint and not last.exists():
        module.load_weights(recipe.model.checkpoint)

    _prepare(folder, loaded)
    logger = MetricsCSV(folder)
    trainer = _trainer(recipe, folder, [logger, *_optional_loggers(folder)], _callbacks(recipe, folder))
    step = read_checkpoint(last)["global_step"] if last.exists() else 0
    logger.resume_at(step)
    if step:
        trainer.print(f"Resuming {folder} at step {step}.")
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    if step == trainer.global_step:
        trainer.print("The run is complete: nothing was left to train.")
    trainer.print(_closing_words(folder, trainer, data))
    return folder


def evaluate(target: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate a run's best checkpoint, or a recipe's `model.checkpoint`; return the metrics.

    Args:
        target: A run folder, or a recipe's name or path.
        overrides: Dotlist overrides of the recipe.

    Raises:
        RecipeError: The recipe is invalid, or names no checkpoint.
        CheckpointError: The checkpoint cannot be read or does not fit.
    """
    loaded = load_target(target, overrides)
    recipe, is_run = loaded.recipe, Path(target).is_dir()
    checkpoint = run_checkpoint(target) if is_run else recipe.model.checkpoint
    if checkpoint is None:
        raise RecipeError(f"{loaded.name}: nothing to evaluate; give a run folder or model.checkpoint=FILE")
    recipe.ema.decay, ema = None, is_run and recipe.monitor.endswith("_ema")
    module, data = build_task(loaded)
    module.load_weights(checkpoint, ema, same_classes=True)
    trainer = _trainer(recipe, None, False, [ProgressLine()])
    trainer.print(f"Evaluating {checkpoint} on {len(data.val_dataset)} images.")
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return {name.removeprefix("val/"): value for name, value in metrics.items()}


def load_target(target: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe of a run folder, or the recipe of that name or path.

    Raises:
        RecipeError: The recipe is invalid.
        CheckpointError: The folder is no run folder.
    """
    if not Path(target).is_dir():
        return load_recipe(target, overrides)
    path = Path(target) / "recipe.yaml"
    if not path.is_file():
        raise CheckpointError(f"{target}: no recipe.yaml in it; expected a run folder such as runs/quickstart")
    loaded = load_recipe(path, overrides)
    loaded.recipe.run.dir = target
    return loaded


def build_task(loaded: LoadedRecipe) -> tuple[TrainingModule, RecipeData]:
    """Return the LightningModule and the LightningDataModule of a recipe's task.

    Raises:
        RecipeError: The model, or the head, cannot be built from the recipe.
        DataError: The dataset is absent, damaged or not what the recipe says.
    """
    recipe = loaded.recipe
    if recipe.task == "classification":
        data: RecipeData = build_data(
            recipe.data, recipe.augment, seed=recipe.trainer.seed, overfit=recipe.trainer.overfit
        )
        return ClassificationModule(recipe, data.classes, loaded.to_yaml()), data
    with needing_mm(f"task: {recipe.task}"):
        from effbackbones.mm.data import build_data as build_dense_data
        from effbackbones.train.detection import DetectionModule
        from effbackbones.train.segmentation import SegmentationModule
    data = build_dense_data(recipe)
    module = DetectionModule if recipe.task == "detection" else SegmentationModule
    return module(recipe, data.classes, loaded.to_yaml()), data


@contextmanager
def needing_mm(what: str) -> Iterator[None]:
    """Import the mm bridge in here: where that fails, it is a RecipeError that says what needs it and what to do."""
    try:
        yield
    except ImportError as error:
        raise RecipeError(
            f"{what} needs mmdet and mmseg, but {error}: install them as the README says, and ask `effb doctor` what "
            "is missing"
        ) from error


@rank_zero_only
def _prepare(folder: Path, loaded: LoadedRecipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.rglob(".*.part"):  # of a run that was killed while it wrote
        part.unlink()
    with replacing(folder / "recipe.yaml") as part:
        part.write_text(loaded.to_yaml())


def _check_same_recipe(folder: Path, loaded: LoadedRecipe) -> None:
    before, now = ({key: value for key, value, *_ in explain(recipe)} for recipe in (load_target(str(folder)), loaded))
    keys = [key for key in now | before if not key.startswith(MAY_CHANGE)]
    differing = [key for key in keys if before.get(key) != now.get(key)]
    if differing and not loaded.recipe.run.force:
        changes = "\n".join(f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differing)
        raise RecipeError(
            f"{folder} holds a run of another recipe:\n{changes}\n"
            "Go on with the old values, choose another run.dir, or set run.force=true to resume with the new ones."
        )


def _trainer(recipe: Recipe, folder: Path | None, loggers: list[Logger] | bool, callbacks: list[Callback]) -> Trainer:
    cfg = recipe.trainer
    devices = cfg.devices if cfg.devices == "auto" else int(cfg.devices)
    # Lightning's advice on worker counts and logging intervals is a matter of the recipe here.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics has added up the ranks already
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    return Trainer(
        accelerator=cfg.accelerator,
        devices=devices,
        num_nodes=cfg.nodes,
        strategy=cfg.strategy,
        precision=PRECISION[cfg.precision],
        max_epochs=cfg.epochs,
        accumulate_grad_batches=cfg.accumulate,
        gradient_clip_val=recipe.optim.clip_grad,
        sync_batchnorm=cfg.sync_bn and _synchronises(cfg.accelerator),
        check_val_every_n_epoch=cfg.val_every,
        limit_train_batches=cfg.limit_train,
        limit_val_batches=cfg.limit_val,
        log_every_n_steps=cfg.log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        enable_model_summary=False,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
    )


def _synchronises(accelerator: str) -> bool:
    if has_sync_bn(accelerator):
        return True
    rank_zero_warn("trainer.sync_bn: batch norms synchronise on CUDA only; they are plain ones here")
    return False


def _callbacks(recipe: Recipe, folder: Path) -> list[Callback]:
    cfg = recipe.trainer
    return [
        ProgressLine(),
        FiniteGuard(),
        Pictures(folder),
        EndOfRun(cfg.steps),
        RunCheckpoints(folder / "checkpoints", f"val/{recipe.monitor}", cfg.save_every),
    ]


def _optional_loggers(folder: Path) -> list[Logger]:
    if find_spec("tensorboard") is None:
        return []
    return [TensorBoardLogger(folder, name=None, version="tensorboard")]


def _closing_words(folder: Path, trainer: Trainer, data: RecipeData) -> str:
    checkpoints = next(c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoints))
    name = shlex.quote(str(folder))
    lines = []
    if checkpoints.best_score is not None:
        metric, score = checkpoints.monitor.removeprefix("val/"), checkpoints.best_score
        lines.append(f"Best {metric}: {score:.4f}" if metric == "loss" else f"Best {metric}: {100 * score:.2f}%")
        lines.append(f"  checkpoint  {checkpoints.best}")
    if data.bad_images:
        lines.append(f"  skipped     {data.bad_images} images that could not be read")
    lines += [
        f"  pictures    {folder / 'curves.png'}  {folder / 'predictions.png'}",
        f"  evaluate    effb eval {name}",
        f"  predict     effb predict IMAGE --run {name}",
        f"  resume      effb train {name}",
    ]
    return "\n".join(lines)
