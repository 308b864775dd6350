"""Fashion-MNIST, or a part of it, in its own file format (https://github.com/zalandoresearch/fashion-mnist, MIT)."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from effbackbones.data.errors import DataError


class FashionMnist:
    """Images of 28 by 28 grey pixels, given as RGB. Raises DataError for a damaged file, naming it."""

    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

    def __init__(self, root: Path, split: Literal["train", "t10k"]) -> None:
        images_path = root / f"{split}-images-idx3-ubyte.gz"
        labels_path = root / f"{split}-labels-idx1-ubyte.gz"
        self.images = read_idx(images_path, ndim=3)
        self.labels = read_idx(labels_path, ndim=1)
        if self.images.shape[1:] != (28, 28):
            raise DataError(f"{images_path}: images of {self.images.shape[1:]} pixels, expected (28, 28)")
        if len(self.labels) != len(self.images):
            raise DataError(
                f"{labels_path}: {len(self.labels)} labels, expected {len(self.images)} as {images_path.name} has "
                "so many images: take both files from one release"
            )
        if self.labels.max(initial=0) >= len(self.classes):
            raise DataError(f"{labels_path}: label {self.labels.max()}, expected 0 to {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read a gzipped idx file of bytes with `ndim` dimensions. Raises DataError where it is not one, whole."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data.root to the folder of the four idx .gz files")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file, but {error}: fetch it again") from error
    magic = struct.pack(">HBB", 0, 8, ndim)  # two zeros, the code of unsigned bytes, the number of dimensions
    if content[:4] != magic:
        raise DataError(f"{path}: begins with {content[:4].hex()}, expected the idx magic number {magic.hex()}")
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes, expected a header of {header}: fetch it again")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path}: {len(content) - header} bytes of data, expected {math.prod(shape)} for the shape {shape} of its "
            "header: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
