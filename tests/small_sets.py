"""Small sets of images of two classes as class folders, tar shards and a directory of Hugging Face's `datasets`."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image

disable_progress_bars()

CLASSES = ("cat", "dog")
COUNTS = {"train": 12, "val": 5}


def picture(split: str, number: int) -> bytes:
    """Return an image file of its own: image `number` of a split; those of odd numbers are dogs."""
    pixels = np.random.default_rng([len(split), number]).integers(0, 256, (40, 48, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def by_class(split: str) -> list[int]:
    """Return the numbers of the images of a split in the order of class folders."""
    return sorted(range(COUNTS[split]), key=lambda number: (number % 2, f"{number:02d}"))


def write_folders(root: Path) -> Path:
    for split, count in COUNTS.items():
        for number in range(count):
            path = root / split / CLASSES[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(split, number))
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def members(split: str, numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Return the members of a shard with these images of a split."""
    return [
        member
        for number in numbers
        for member in ((f"{number:02d}.cls", b"%d" % (number % 2)), (f"{number:02d}.png", picture(split, number)))
    ]


def write_shards(root: Path, per_shard: int = 3) -> Path:
    """Write shards of so many images each, in the order of class folders, and classes.txt."""
    root.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        numbers = by_class(split)
        for shard, start in enumerate(range(0, len(numbers), per_shard)):
            write_tar(root / f"{split}-{shard:04d}.tar", members(split, numbers[start : start + per_shard]))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def write_hf(root: Path, val: str = "validation") -> Path:
    """Write what `save_to_disk` does, in the order of class folders."""
    features = Features({"text": Value("string"), "picture": ImageFeature(), "kind": ClassLabel(names=list(CLASSES))})
    splits = {}
    for split, name in (("train", "train"), ("val", val)):
        numbers = by_class(split)
        columns = {
            "text": ["unused"] * len(numbers),
            "picture": [{"bytes": picture(split, number), "path": f"{number:02d}.png"} for number in numbers],
            "kind": [number % 2 for number in numbers],
        }
        splits[name] = Dataset.from_dict(columns, features)
    DatasetDict(splits).save_to_disk(str(root))
    return root
