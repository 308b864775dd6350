"""Image folders: root/train/<class>/* and root/val/<class>/*."""

from pathlib import Path

from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from effbackbones.data.datasets import ImageSource
from effbackbones.data.errors import BadImageError, DataError


def load_folders(root: Path) -> tuple[ImageSource, ImageSource]:
    """Find the images of root/train and root/val; classes are numbered in the order of their names.

    Raises DataError where a folder is missing, a class is empty, or the classes of train and val differ.
    """
    train, val = (_load_folder(root / split) for split in ("train", "val"))
    if train.classes != val.classes:
        differences = [
            f"only in {split}: {', '.join(sorted(set(mine.classes) - set(other.classes)))}"
            for split, mine, other in (("train", train, val), ("val", val, train))
            if set(mine.classes) - set(other.classes)
        ]
        raise DataError(f"{root}: train and val must have the same classes, but {'; '.join(differences)}")
    return train, val


def _load_folder(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data.root must hold train/<class>/ and val/<class>/")
    try:
        return ImageFolder(str(folder), loader=load_image)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: {error} Every class needs images: fill or remove the folder") from error


def load_image(path: str, upright: bool = False) -> Image.Image:
    """Read an image file as RGB; with `upright` turned as its EXIF orientation says, which mm does and torchvision not.

    Raises BadImageError where that fails for whatever reason.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on damaged files
        raise BadImageError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
