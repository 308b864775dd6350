"""A run: from a recipe to a run folder, and from a run folder to an evaluation."""

import logging
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeGuard

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from effbackbones.checkpoint import CheckpointError, read_checkpoint, run_checkpoint
from effbackbones.config import LoadedRecipe, Recipe, RecipeError, explain, load_recipe
from effbackbones.config.load import COMMAND_LINE
from effbackbones.data import RecipeData, build_data
from effbackbones.files import replacing
from effbackbones.train.batch import describe_batch, device_batch, global_batch
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints
from effbackbones.train.callbacks.finite import FiniteGuard
from effbackbones.train.callbacks.memory import MemoryAdvice
from effbackbones.train.callbacks.pictures import Pictures
from effbackbones.train.callbacks.progress import ProgressLine
from effbackbones.train.callbacks.ranks import RankWatch
from effbackbones.train.callbacks.signals import StopSignals
from effbackbones.train.callbacks.stop import EndOfRun
from effbackbones.train.classification import ClassificationModule
from effbackbones.train.fsdp import FullySharded
from effbackbones.train.logger import Backend, MetricsCSV, build_backend
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

# What may differ where it makes up the same number of images of an optimizer step.
BATCH = ("data.batch_size", "data.global_batch", "trainer.accumulate")

HEAD = "head.py"
"""What a run folder keeps of a `model.head` that is a file: the run goes on, and predicts, without that file."""


# Lightning announces what the recipe says, and advertises.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return the run folder of a recipe: `run.dir`, or runs/<recipe name>."""
    return Path(loaded.recipe.run.dir or Path("runs") / loaded.name)


def train(loaded: LoadedRecipe) -> Path:
    """Train a recipe in its run folder, from the last checkpoint on where there is one; return the folder.

    Raises:
        RecipeError: The folder holds a run of a recipe that differs in what is computed, or cannot be written.
        CheckpointError: A checkpoint cannot be read or does not fit.
        NonFiniteError: A step had a loss or gradient that is not finite.
        MemoryLimitError: A step needs more memory than there is.
        StoppedError: A signal stopped the run.
    """
    recipe, folder = loaded.recipe, run_folder(loaded)
    last = folder / "checkpoints" / "last.ckpt"
    signals = StopSignals()
    trainer = make_trainer(recipe, folder, _callbacks(recipe, folder, signals))
    recipe.data.batch_size = device_batch(recipe, trainer.world_size)
    step = 0
    if last.exists():
        saved = read_checkpoint(last)
        step = saved["global_step"]
        _check_same_recipe(folder, loaded, saved["global_batch"], global_batch(recipe, trainer.world_size))
        del saved  # as large as the model and its optimizer
    recipe.run.force = False  # said to this command, not to those that find recipe.yaml

    seed_everything(recipe.trainer.seed, verbose=False)
    module, data = build_task(loaded)
    beginning = f"{recipe.model.name} starts from scratch: model.checkpoint names no weights."
    if recipe.model.checkpoint and not last.exists():
        beginning = str(module.load_weights(recipe.model.checkpoint))

    try:
        _prepare(folder, loaded)
        logger = MetricsCSV(folder)
        logger.resume_at(step)
    except OSError as error:
        raise RecipeError(f"run.dir: {folder} cannot be written: {error}; set another run.dir") from error
    trainer.loggers = [logger, *_backends(recipe, folder)]
    trainer.print(f"Resuming {folder} at step {step}." if step else beginning)
    trainer.print(describe_batch(recipe, trainer.world_size))
    with signals.listening(trainer):
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
        MemoryLimitError: A batch needs more memory than there is.
    """
    loaded = load_target(target, overrides)
    recipe, is_run = loaded.recipe, Path(target).is_dir()
    checkpoint = run_checkpoint(target) if is_run else recipe.model.checkpoint
    if checkpoint is None:
        raise RecipeError(f"{loaded.name}: nothing to evaluate; give a run folder or model.checkpoint=FILE")
    # What training needs besides the model.
    recipe.ema.decay = recipe.lora.rank = recipe.distill.teacher = None
    ema = is_run and recipe.monitor.endswith("_ema")
    module, data = build_task(loaded)
    module.load_weights(checkpoint, ema, same_classes=True)
    trainer = make_trainer(recipe, None, [ProgressLine(), RankWatch(), MemoryAdvice(recipe)])
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
    head = Path(target) / HEAD
    if head.is_file() and _is_file(loaded.recipe.model.head) and loaded.origins["model.head"] != COMMAND_LINE:
        loaded.recipe.model.head = str(head)
    return loaded


def _is_file(head: str | None) -> TypeGuard[str]:
    """Return whether `model.head` is the path of a config, not a config of an installed package."""
    return head is not None and "::" not in head


def build_task(loaded: LoadedRecipe) -> tuple[TrainingModule, RecipeData]:
    """Return the LightningModule and the LightningDataModule of a recipe's task.

    Raises:
        RecipeError: The model, or the head, cannot be built from the recipe.
        DataError: The dataset is absent, damaged or not what the recipe says.
    """
    recipe = loaded.recipe
    data = open_data(recipe)
    return module_class(recipe.task)(recipe, data.classes, loaded.to_yaml()), data


def module_class(task: str) -> Callable[[Recipe, tuple[str, ...], str], TrainingModule]:
    """Return the LightningModule of a task. Raises RecipeError where it needs mm, which is not there."""
    if task == "classification":
        return ClassificationModule
    with needing_mm(f"task: {task}"):
        from effbackbones.train.detection import DetectionModule
        from effbackbones.train.segmentation import SegmentationModule
    return DetectionModule if task == "detection" else SegmentationModule


def open_data(recipe: Recipe) -> RecipeData:
    """Return the LightningDataModule of a recipe's task.

    Raises:
        RecipeError: The task needs mm, which is not there.
        DataError: The dataset is absent, damaged or not what the recipe says.
    """
    trainer = recipe.trainer
    if recipe.task == "classification":
        return build_data(recipe.data, recipe.augment, seed=trainer.seed, overfit=trainer.overfit, nodes=trainer.nodes)
    with needing_mm(f"task: {recipe.task}"):
        from effbackbones.mm.data import build_data as build_dense_data
    return build_dense_data(recipe)


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
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for part in folder.rglob(".*.part"):  # of a run that was killed while it wrote
        part.unlink()
    with TemporaryFile(dir=folder / "checkpoints") as probe:  # now, not after the first epoch
        probe.write(b"0")
    if _is_file(loaded.recipe.model.head):
        from effbackbones.mm.config import store_head

        store_head(loaded.recipe.model.head, folder / HEAD)
    with replacing(folder / "recipe.yaml") as part:
        part.write_text(loaded.to_yaml())


def _check_same_recipe(folder: Path, loaded: LoadedRecipe, saved_batch: int, batch: int) -> None:
    """Raise RecipeError where a recipe would compute something else than the run in a folder did.

    Args:
        folder: The run folder.
        loaded: The recipe.
        saved_batch: Images of an optimizer step of that run.
        batch: Those of the recipe.
    """
    before, now = ({key: value for key, value, *_ in explain(recipe)} for recipe in (load_target(str(folder)), loaded))
    if _is_file(before["model.head"]) and _is_file(now["model.head"]):
        with needing_mm("model.head"):
            from effbackbones.mm.config import same_head
        if same_head(before["model.head"], now["model.head"]):
            now["model.head"] = before["model.head"]
    same_batch = saved_batch == batch
    may_change: tuple[str, ...] = (*MAY_CHANGE, *BATCH) if same_batch else MAY_CHANGE
    if loaded.recipe.data.split_by_node:  # nodes have other images then
        may_change = tuple(key for key in may_change if key != "trainer.nodes")
    keys = [key for key in now | before if not key.startswith(may_change)]
    if not same_batch:
        key = "images of an optimizer step"
        before[key], now[key] = saved_batch, batch
        keys.append(key)
    differing = [key for key in keys if before.get(key) != now.get(key)]
    if differing and not loaded.recipe.run.force:
        changes = "\n".join(f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differing)
        raise RecipeError(
            f"{folder} holds a run of another recipe:\n{changes}\n"
            + ("" if same_batch else f"On any devices, data.global_batch={saved_batch} keeps the old batch. ")
            + "Go on with the old values, choose another run.dir, or set run.force=true to resume with the new ones."
        )


def make_trainer(
    recipe: Recipe, folder: Path | None, callbacks: list[Callback], environment: ClusterEnvironment | None = None
) -> Trainer:
    """Return Lightning's trainer of a recipe, without loggers.

    Args:
        recipe: The whole recipe.
        folder: The run folder; None for an evaluation.
        callbacks: What looks after the run.
        environment: What has started the processes; None: Lightning finds out.

    Raises:
        RecipeError: The recipe has other devices or nodes than torchrun or SLURM have started processes for.
    """
    cfg = recipe.trainer
    devices = cfg.devices if cfg.devices == "auto" else int(cfg.devices)
    # Lightning's advice on worker counts and logging intervals is a matter of the recipe here.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics has added up the ranks already
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    trainer = Trainer(
        accelerator=cfg.accelerator,
        devices=devices,
        num_nodes=cfg.nodes,
        strategy=FullySharded() if cfg.strategy == "fsdp" else cfg.strategy,
        precision=PRECISION[cfg.precision],
        max_epochs=cfg.epochs,
        accumulate_grad_batches=cfg.accumulate,
        sync_batchnorm=cfg.sync_bn and _synchronises(cfg.accelerator),
        check_val_every_n_epoch=cfg.val_every,
        limit_train_batches=cfg.limit_train,
        limit_val_batches=cfg.limit_val,
        log_every_n_steps=cfg.log_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=any(isinstance(callback, ProgressLine) for callback in callbacks),
        logger=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *([environment] if environment else [])],
    )
    launcher: Any = getattr(trainer.strategy, "cluster_environment", None)
    if launcher is not None:
        try:
            launcher.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except ValueError as error:
            raise RecipeError(f"trainer.devices, trainer.nodes: set them to what was launched: {error}") from error
    return trainer


def _synchronises(accelerator: str) -> bool:
    if has_sync_bn(accelerator):
        return True
    rank_zero_warn("trainer.sync_bn: batch norms synchronise on CUDA only; they are plain ones here")
    return False


def _callbacks(recipe: Recipe, folder: Path, signals: StopSignals) -> list[Callback]:
    cfg = recipe.trainer
    return [
        ProgressLine(),
        FiniteGuard(clip=recipe.optim.clip_grad),
        Pictures(folder),
        EndOfRun(cfg.steps),
        RankWatch(signals),
        MemoryAdvice(recipe),
        RunCheckpoints(folder / "checkpoints", f"val/{recipe.monitor}", cfg.save_every, signals),
    ]


def _backends(recipe: Recipe, folder: Path) -> list[Backend]:
    chosen = recipe.run.loggers
    if chosen is None:
        chosen = ["tensorboard"] if find_spec("tensorboard") else []
    for name in chosen:
        if find_spec(name) is None:
            raise RecipeError(
                f"run.loggers: {name} is not installed; pip install 'effbackbones[log]', or leave it out of the list"
            )
    return [build_backend(name, folder) for name in chosen]


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
