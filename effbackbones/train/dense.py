"""What the training of detection and of segmentation have in common: a model of mm under Lightning."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from effbackbones.checkpoint import Loaded, load_model_weights
from effbackbones.config import Recipe
from effbackbones.data.images import load_image
from effbackbones.mm.config import build_model, with_flip
from effbackbones.mm.data import pseudo_collate
from effbackbones.mm.metrics import Metric, quiet
from effbackbones.mm.optim import param_groups
from effbackbones.mm.progress import tell_progress
from effbackbones.train.callbacks.stop import total_steps
from effbackbones.train.module import TrainingModule, has_sync_bn
from effbackbones.train.optim import scaled_lr
from effbackbones.viz.dense import contact_sheet, save_picture

Batch = dict[str, list[Any]]

DRAWN = 8  # images in predictions.png


class DenseModule(TrainingModule):
    """Trains a detector or a segmentor of mm whose backbone is ours. Batches are those of mm: see `DenseData`."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], recipe_yaml: str):
        quiet()
        super().__init__(
            recipe, classes, recipe_yaml, build_model(recipe, classes, has_sync_bn(recipe.trainer.accelerator))
        )
        if recipe.model.compile:
            self.model.backbone.compile()
        self.metrics: dict[str, Metric] = {}
        # mmcv's operators do not take bf16: heads that use them run in float32 behind a mixed backbone and neck.
        uses_operators = any(type(module).__module__.startswith("mmcv.ops") for module in self.model.modules())
        self.mixed_trunk = recipe.trainer.precision != "32" and (recipe.task == "detection" or uses_operators)
        self._in_mixed_trunk = False
        if self.mixed_trunk:
            for model in self.evaluated.values():
                for part in filter(None, (model.backbone, getattr(model, "neck", None))):
                    part.register_forward_pre_hook(self._enter_trunk)
                    part.register_forward_hook(self._leave_trunk, always_call=True)

    @abstractmethod
    def build_metric(self) -> Metric:
        """Return what computes the metrics of an evaluation."""

    @abstractmethod
    def draw_sample(self, image: Image.Image, sample: Any) -> Image.Image:
        """Return the picture of an RGB image with the predictions in a data sample of mm."""

    @abstractmethod
    def draw_truth(self, image: Image.Image, index: int) -> Image.Image:
        """Return the picture of an evaluation image with its annotations."""

    def load_weights(self, path: str | Path, ema: bool = False, same_classes: bool = False) -> Loaded:
        """Start from the weights of a file or a run folder, as :func:`~effbackbones.checkpoint.load_model_weights`."""
        loaded = load_model_weights(self.model, path, ema, same_classes)
        if self.ema is not None:
            self.ema.set(self.model)
        return loaded

    def parameters_to_train(self) -> list[dict[str, Any]]:
        optim = self.recipe.optim
        return param_groups(
            self.model,
            scaled_lr(optim, self.global_batch),
            optim.weight_decay,
            optim.layer_decay,
            optim.backbone_lr,
            optim.no_decay,
        )

    def on_fit_start(self) -> None:
        self._tell_device()

    def on_validation_start(self) -> None:
        self._tell_device()

    def _tell_device(self) -> None:
        """Tell mm's preprocessors, which move batches, where the models are: Lightning does not."""
        for model in self.evaluated.values():
            model._set_device(self.device)

    def forward_loss(self, batch: Batch) -> dict[str, Tensor]:
        epochs = self.recipe.trainer.epochs
        tell_progress(self.current_epoch, self.global_step, epochs, total_steps(self.trainer))
        with self._autocast():
            losses = self.model(**self.model.data_preprocessor(batch, True), mode="loss")
            return dict(self.model.parse_losses(losses)[1])

    def on_validation_epoch_start(self) -> None:
        self.metrics = {suffix: self.build_metric() for suffix in self.evaluated}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not batch["inputs"]:  # none of them could be read
            return
        for suffix, model in self.evaluated.items():
            with self._autocast():
                self.metrics[suffix].update(self._predict(model, batch))

    def on_validation_epoch_end(self) -> None:
        for suffix, metric in self.metrics.items():
            self.log_dict({f"val/{name}{suffix}": value for name, value in metric.compute().items()})

    def predict(self, model: Any, samples: Sequence[Any]) -> list[Any]:
        """Return mm's data samples with the predictions of a model, of samples of an evaluation dataset."""
        self._tell_device()
        with self._autocast():
            return self._predict(model, pseudo_collate(samples))

    def _predict(self, model: Any, batch: Batch) -> list[Any]:
        # Predictions are put into the samples, which the next model needs as they are.
        batch = {**batch, "data_samples": copy.deepcopy(batch["data_samples"])}
        tester: Any = with_flip(model, self.recipe.task) if self.recipe.data.test_flip else model
        samples: list[Any] = tester.test_step(batch)
        return samples

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Keep the precision that is set, mixed or not, to backbone and neck where the head cannot have it."""
        device = self.device.type
        self._in_mixed_trunk = self.mixed_trunk and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if self._in_mixed_trunk else nullcontext():
            yield

    def _enter_trunk(self, module: nn.Module, inputs: Any) -> None:
        if self._in_mixed_trunk:
            torch.set_autocast_enabled(self.device.type, True)

    def _leave_trunk(self, module: nn.Module, inputs: Any, maps: Any) -> Any:
        if not self._in_mixed_trunk:
            return maps
        torch.set_autocast_enabled(self.device.type, False)
        return maps if maps is None else tuple(x_bchw.float() for x_bchw in maps)

    @torch.no_grad()
    def draw(self, out: Path) -> None:
        """Draw evaluation images, each with what the model sees beside what is annotated."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.model.eval()
        pairs = []
        for index in range(len(data.val_dataset)):
            sample = data.val_dataset[index]
            if sample is None:  # it could not be read
                continue
            (predicted,) = self.predict(self.model, [sample])
            image = load_image(predicted.img_path, upright=True)
            pairs.append((self.draw_sample(image, predicted), self.draw_truth(image, index)))
            if len(pairs) == DRAWN:
                break
        save_picture(contact_sheet(pairs), out)
