"""From PIL images to normalised tensors, by timm's transforms."""

from itertools import chain
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torchvision.transforms import Compose

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data.datasets import Transform
from effbackbones.data.errors import DataError


def train_transform(data: DataConfig, augment: AugmentConfig) -> Transform:
    """Return the augmentation of a recipe: RGB image of any size to float32 (3, data.size, data.size).

    Raises DataError where timm does not know augment.policy.
    """
    try:
        transform = create_transform(
            data.size,
            is_training=True,
            scale=tuple(augment.scale),  # type: ignore[arg-type]
            ratio=tuple(augment.ratio),  # type: ignore[arg-type]
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,  # type: ignore[arg-type]  # timm takes None too
            auto_augment=augment.policy,
            interpolation=data.interpolation,
            mean=tuple(data.mean),
            std=tuple(data.std),
            re_prob=augment.erase,
            re_mode="pixel",
            re_count=1,
        )
    except AssertionError as error:
        raise DataError(
            f"augment.policy={augment.policy!r} is no policy of timm ({error}): write one like rand-m9-mstd0.5-inc1, "
            "augmix-m3-w3 or original, or null"
        ) from error
    for step in transform.transforms:
        for op in getattr(step, "ops", None) or chain(*getattr(step, "policy", ())):
            if getattr(op, "aug_fn", None) is posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Posterize as timm does, to no bits too: timm's policies ask for that black image, Pillow refuses from 13 on."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def eval_transform(data: DataConfig) -> Transform:
    """Return the evaluation of a recipe: image of any mode and size to float32 (3, data.size, data.size).

    The shorter side is resized to size / crop_pct, and the centre is cropped.
    """
    transform = create_transform(
        data.size,
        is_training=False,
        crop_pct=data.crop_pct,
        interpolation="bicubic" if data.interpolation == "random" else data.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )
    return Compose([_to_rgb, *transform.transforms])


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
