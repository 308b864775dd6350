"""Make a set with the layout of ImageNet-1K out of the images that ship: 1,000 classes of small JPEGs.

DIR/folders holds train/<class>/*.JPEG and val/<class>/*.JPEG, DIR/shards the same images in train-0000.tar and so on,
as webdataset writes them: KEY.jpg, and KEY.cls with the number of the class, in random order; classes.txt lists them.

    python tools/make_imagenet_like.py --out datasets/imagenet_like
    effb train in1k/uniformer_small data.root=datasets/imagenet_like/folders

A class is a kind of garment in a colour, so that a model can learn them.
"""

import argparse
import colorsys
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone needs no installation

from effbackbones.assets import asset_dir
from effbackbones.data.classes import imagenet_classes
from effbackbones.data.fashion_mnist import FashionMnist

SIDES = (64, 128)  # pixels, the shorter and the longer
SHARD = 1000  # images


def make_split(source: FashionMnist, rng: np.random.Generator, classes: Sequence[str], count: int) -> dict[str, bytes]:
    """Return `count` JPEG files for each class by name, class by class.

    Raises ValueError where the source has too few images for so many different ones.
    """
    kinds = len(source.classes)
    colors = -(-len(classes) // kinds)
    garments = [np.flatnonzero(source.labels == kind) for kind in range(kinds)]
    if min(map(len, garments)) < colors * count:
        raise ValueError(
            f"the images that ship are too few for {count} different ones in each of {len(classes)} classes"
        )
    files = {}
    for number, name in enumerate(classes):
        kind, color = number % kinds, number // kinds
        tint = np.array(colorsys.hsv_to_rgb(color / colors, 0.8, 1.0))
        indices = garments[kind][color * count : (color + 1) * count]
        for place, index in enumerate(indices):
            pixels_hwc = source.images[index][..., None] * tint
            image = Image.fromarray(pixels_hwc.astype(np.uint8)).resize(rng.integers(*SIDES, 2, endpoint=True).tolist())
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90)
            files[f"{name}_{place}"] = file.getvalue()
    return files


def write_folders(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name.partition("_")[0] / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_shards(files: dict[str, bytes], prefix: Path, classes: Sequence[str], rng: np.random.Generator) -> None:
    names = rng.permutation(list(files)).tolist()
    for shard, start in enumerate(range(0, len(names), SHARD)):
        with tarfile.open(f"{prefix}-{shard:04}.tar", "w") as tar:
            for name in names[start : start + SHARD]:
                number = classes.index(name.partition("_")[0])
                for suffix, content in (("jpg", files[name]), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="the first N; default: all 1000")
    parser.add_argument("--train", type=int, default=3, metavar="N", help="training images of a class; default: 3")
    parser.add_argument("--val", type=int, default=1, metavar="N", help="evaluation images of a class; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    rng, classes = np.random.default_rng(args.seed), list(imagenet_classes())[: args.classes]
    splits = {}
    try:
        for split, part, count in (("train", "train", args.train), ("val", "t10k", args.val)):
            source = FashionMnist(asset_dir("data") / "fashion-mnist", part)
            splits[split] = make_split(source, rng, classes, count)
        args.out.mkdir(parents=True)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    (args.out / "shards").mkdir()
    for split, files in splits.items():
        write_folders(files, args.out / "folders" / split)
        write_shards(files, args.out / "shards" / split, classes, rng)
        print(f"{split}: {len(files)} images of {len(classes)} classes")
    (args.out / "shards" / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    print(f"data.root={args.out / 'folders'}\ndata.source=shards data.root={args.out / 'shards'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
