"""Prediction of dense tasks: pictures of what a detector or segmentor sees in image files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from effbackbones.checkpoint import read_checkpoint, run_checkpoint
from effbackbones.config import Recipe, RecipeError
from effbackbones.data import BadImageError, DataError
from effbackbones.data.images import load_image
from effbackbones.mm.data import read_image, test_transform
from effbackbones.train.dense import DenseModule
from effbackbones.train.detection import SHOWN_SCORE, DetectionModule
from effbackbones.train.run import load_target
from effbackbones.train.segmentation import SegmentationModule
from effbackbones.viz.dense import save_picture


def open_run(folder: str | Path) -> DenseModule:
    """Return the module of a run of a dense task with the weights of its best checkpoint, in evaluation mode.

    Raises:
        CheckpointError: The folder holds no run with a checkpoint, or the checkpoint cannot be read.
        RecipeError: It is a run of classification.
    """
    path = run_checkpoint(folder)
    loaded = load_target(str(folder))
    recipe = loaded.recipe
    modules: dict[str, type[DenseModule]] = {"detection": DetectionModule, "segmentation": SegmentationModule}
    if recipe.task not in modules:
        raise RecipeError(f"{folder}: a run of {recipe.task}, expected one of {' or '.join(modules)}")
    ema, recipe.ema.decay = recipe.monitor.endswith("_ema"), None
    module = modules[recipe.task](recipe, tuple(read_checkpoint(path)["classes"]), loaded.to_yaml())
    module.load_weights(path, ema, same_classes=True)
    return module.eval()


def predict_pictures(
    run: str | Path, files: Sequence[tuple[Path, Path]], out: str | Path | None = None
) -> Iterator[tuple[str, bool]]:
    """Draw what a run's best checkpoint sees in each image file.

    Yields a line for each, when its picture is written or the file cannot be read, and which of both.

    Args:
        run: Run folder of a dense task.
        files: Image files and their names, as of :func:`~effbackbones.predict.image_files`.
        out: Folder of the pictures, which have the names of the images; None: predictions in the run folder.

    Raises:
        DataError: Two images would have the same picture, or a picture would overwrite an image.
    """
    folder = Path(out or Path(run) / "predictions")
    pictures = [
        folder / (name if name.suffix.lower() in (".jpg", ".png") else name.with_suffix(".png")) for _, name in files
    ]
    if twice := [picture for picture, count in Counter(pictures).items() if count > 1]:
        raise DataError(f"{twice[0]}: several of the images would have this picture: predict them apart")
    images = {file.resolve() for file, _ in files}
    if lost := [picture for picture in pictures if picture.resolve() in images]:
        raise DataError(f"{lost[0]}: a picture would overwrite this image: choose another folder for the pictures")
    module = open_run(run)
    module.to(device_of(module.recipe))
    for (file, _), picture in zip(files, pictures, strict=True):
        try:
            sample = sample_of(module, file)
        except BadImageError as error:
            yield f"{error}", False
            continue
        save_picture(module.draw_sample(load_image(str(file), upright=True), sample), picture)
        yield f"{file}  {_summary(module, sample)}  {picture}", True


def device_of(recipe: Recipe) -> str:
    """Return where a model of a recipe predicts: on a GPU where there is one, unless the recipe says otherwise."""
    return "cuda" if recipe.trainer.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


@torch.inference_mode()
def sample_of(module: DenseModule, file: str | Path) -> Any:
    """Return mm's data sample of an image file with what the model sees in it.

    Raises:
        BadImageError: The file cannot be read as an image.
    """
    image = read_image(load_image(str(file), upright=True), file)
    return module.predict(module.model, [test_transform(module.recipe)(image)])[0]


def _summary(module: DenseModule, sample: Any) -> str:
    """Return the objects of a detection with their numbers, or the shares of a segmentation, the most first."""
    if "pred_instances" in sample:
        instances = sample.pred_instances
        labels = instances.labels[instances.scores >= SHOWN_SCORE].tolist()
        counts = Counter(module.classes[label] for label in labels)
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
    labels_hw = sample.pred_sem_seg.data
    counts = Counter({name: int((labels_hw == i).sum()) for i, name in enumerate(module.classes)})
    return ", ".join(f"{count / labels_hw.numel():.0%} {name}" for name, count in counts.most_common(3) if count)
