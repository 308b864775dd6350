"""A small dense dataset, made from the Fashion-MNIST images that ship with the package, in COCO's and ADE20K's layouts.

A scene is some garments, tinted and partly one over the other, on one or two grounds with procedural textures. Shapes
and coordinates are in pixels; the pixel of row y and column x covers [x, x + 1) by [y, y + 1), as in COCO.
"""

import colorsys
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image

from effbackbones.assets import asset_dir
from effbackbones.data.errors import DataError
from effbackbones.data.fashion_mnist import FashionMnist

GARMENTS = FashionMnist.classes
GROUNDS = ("noise", "stripes", "checks", "gradient", "weave", "dots")
CLASSES = (*GARMENTS, *GROUNDS)
"""Class c of the semantic maps is `CLASSES[c - 1]`, as is the COCO category of a garment; 0 is left for unlabelled."""

MIN_SIDE = 96
MIN_VISIBLE = 0.6  # share of a garment that those in front of it leave to be seen
PAD = 4
TRIES = 12  # places that are tried for a garment before it is left out

_SUPERCATEGORIES = {"Sandal": "footwear", "Sneaker": "footwear", "Ankle boot": "footwear", "Bag": "accessory"}
_WITH_HOLES = tuple(GARMENTS.index(name) for name in ("Sandal", "Bag"))


@dataclass
class Scene:
    """A picture with its annotations.

    Attributes:
        image: (H, W, 3) RGB bytes.
        semantic: (H, W) bytes, classes from 1 (see `CLASSES`).
        labels: The garments' indices in `GARMENTS`, from the back to the front.
        masks: One (H, W) bool per garment: its visible pixels. They do not overlap.
        polygons: Per garment the outlines of its visible parts, each [x0, y0, x1, y1, ...].
    """

    image: np.ndarray
    semantic: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]
    polygons: list[list[list[float]]]


def make_scenes(
    out: Path,
    *,
    train: int = 800,
    val: int = 200,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write scenes to `out`/coco and, the same ones, to `out`/ade20k, in exactly the layouts of these datasets.

    Scenes of train show Fashion-MNIST's training images, those of val its test images. A scene follows from `seed`, its
    split and its index alone. Nothing is in `out` until everything is.

    Args:
        out: Folder that is new or empty.
        train: Number of scenes for training.
        val: Number of scenes for validation.
        size: Height and width of the scenes.
        seed: Not negative.
        progress: Called after every scene with the number of finished ones and of all.

    Raises:
        DataError: `out` holds something, or is no folder; or a number is out of range.
        OSError: The disk is full or cannot be written to; nothing is left behind.
    """
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give a new folder for the scenes")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; give a new folder for the scenes, or remove this one")
    if min(size) < MIN_SIDE:
        raise DataError(f"scenes of {size[0]} by {size[1]} pixels, expected at least {MIN_SIDE} by {MIN_SIDE}")
    if min(train, val) < 1:
        raise DataError(f"{train} scenes for training and {val} for validation, expected at least one for each")
    if seed < 0:
        raise DataError(f"seed {seed}, expected 0 or more")

    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process with the same number
    try:
        part.mkdir()
        _write_dataset(part, {"train": train, "val": val}, size, seed, progress or (lambda done, total: None))
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_dataset(
    root: Path, counts: dict[str, int], size: tuple[int, int], seed: int, progress: Callable[[int, int], None]
) -> None:
    data = asset_dir("data") / "fashion-mnist"
    sources = {"train": FashionMnist(data, "train"), "val": FashionMnist(data, "t10k")}
    annotations = root / "coco" / "annotations"
    annotations.mkdir(parents=True)
    pixels = np.zeros(len(CLASSES) + 1, np.int64)
    presence = {split: np.zeros(len(CLASSES) + 1, np.int64) for split in counts}
    done = 0
    for number, (split, count) in enumerate(counts.items()):
        ade_split = {"train": "training", "val": "validation"}[split]
        images = root / "coco" / f"{split}2017"
        ade_images, ade_maps = (root / "ade20k" / kind / ade_split for kind in ("images", "annotations"))
        for folder in (images, ade_images, ade_maps):
            folder.mkdir(parents=True)
        coco = _coco_header()
        for i in range(count):
            scene = compose_scene(sources[split], np.random.default_rng((seed, number, i)), size)
            name, ade_name = f"{i + 1:012d}.jpg", f"ADE_{split}_{i + 1:08d}"
            Image.fromarray(scene.image).save(images / name, quality=92)
            _link(images / name, ade_images / f"{ade_name}.jpg")
            Image.fromarray(scene.semantic).save(ade_maps / f"{ade_name}.png")
            _add_to_coco(coco, scene, i + 1, name)
            areas = np.bincount(scene.semantic.ravel(), minlength=len(pixels))
            pixels += areas
            presence[split] += areas > 0
            done += 1
            progress(done, sum(counts.values()))
        (annotations / f"instances_{split}2017.json").write_text(json.dumps(coco))
    ratios = pixels / pixels.sum()
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for c, name in enumerate(CLASSES, 1):
        stuff = int(name in GROUNDS)
        rows.append(f"{c}\t{ratios[c]:.4f}\t{presence['train'][c]}\t{presence['val'][c]}\t{stuff}\t{name}")
    (root / "ade20k" / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _coco_header() -> dict[str, Any]:
    return {
        "info": {
            "description": "Scenes of garments from Fashion-MNIST",
            "url": "https://github.com/zalandoresearch/fashion-mnist",
            "version": "1.0",
            "year": 2017,
            "contributor": "The effbackbones authors",
        },
        "licenses": [{"id": 1, "name": "MIT License", "url": "https://opensource.org/license/mit"}],
        "images": [],
        "annotations": [],
        "categories": [
            {"id": i, "name": name, "supercategory": _SUPERCATEGORIES.get(name, "clothing")}
            for i, name in enumerate(GARMENTS, 1)
        ],
    }


def _add_to_coco(coco: dict[str, Any], scene: Scene, image_id: int, file_name: str) -> None:
    height, width = scene.semantic.shape
    coco["images"].append({"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1})
    for label, mask, polygons in zip(scene.labels, scene.masks, scene.polygons, strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                "area": int(mask.sum()),
                "segmentation": polygons,
                "iscrowd": 0,
            }
        )


def compose_scene(source: FashionMnist, rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Return a scene of the given height and width with 2 to 6 garments of the source, or fewer where they do not fit.

    At least `MIN_VISIBLE` of what the scene shows of a garment is left by those in front of it.
    """
    canvas, semantic = _draw_ground(rng, size)
    labels: list[int] = []
    alphas: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    for _ in range(rng.integers(2, 7)):
        label, grey, alpha = _pick_garment(source, rng)
        for _ in range(TRIES):
            affine, scale = _random_place(rng, alpha, size)
            placed = _warp(alpha, affine, size)
            mask = placed > 0.5
            if all((m & ~mask).sum() >= MIN_VISIBLE * area for m, area in zip(masks, areas, strict=True)):
                break
        else:
            continue
        alphas = [np.minimum(other, 1 - placed) for other in alphas] + [placed]
        masks = [other & ~mask for other in masks] + [mask]
        areas.append(int(mask.sum()))
        labels.append(label)
        semantic[mask] = label + 1
        _draw_garment(canvas, rng, _warp(grey, affine, size), placed, scale)
    canvas += rng.normal(0, 0.012, size)[..., None]
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(image, semantic, labels, masks, [_outlines(alpha) for alpha in alphas])


def _pick_garment(source: FashionMnist, rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the label, the grey values and the coverage (the garment is where it is above 0.5) of a random image.

    Both are float32 from 0 to 1, with `PAD` more pixels than the image on every side.
    """
    index = int(rng.integers(len(source)))
    label = int(source.labels[index])
    grey = np.pad(source.images[index] / np.float32(255), PAD)
    # Relative to the garment's own darker parts, so that a black coat has its edge where a white one has it.
    alpha = (grey / (0.6 * np.quantile(grey[grey > 0.05], 0.2))).clip(0, 1)
    if GARMENTS[label] in _SUPERCATEGORIES:  # no clothing: bridges the gaps in thin straps and above soles
        alpha = np.maximum(alpha, -_dilate(-_dilate(alpha)))
    empty = alpha < 0.3
    outside = _reach(empty, np.pad(np.zeros((28, 28), bool), PAD, constant_values=True))
    if label in _WITH_HOLES:
        outside |= _reach(empty, grey == 0)
    edge = _dilate(outside)
    for _ in range(3):  # the garment's colour goes on beyond its edge, so that no black of the image mixes into it
        around = _dilate(grey)
        grey = np.where(edge & (grey < 0.7 * around), around, grey)
    return label, grey, _smooth(np.where(outside, alpha, 1))


def _dilate(values: np.ndarray) -> np.ndarray:
    """Return the largest value of every 3 by 3 neighbourhood."""
    padded = np.pad(values, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _reach(free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return what can be reached from `start` by steps up, down, left or right within `free`."""
    reached = start & free
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= free
        if (grown == reached).all():
            return reached
        reached = grown


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the values of the cubic B-spline with these coefficients: a small blur."""
    padded = np.pad(values, 1, mode="edge")
    rows = (padded[:-2] + 4 * padded[1:-1] + padded[2:]) / 6
    return (rows[:, :-2] + 4 * rows[:, 1:-1] + rows[:, 2:]) / 6


def _random_place(
    rng: np.random.Generator, alpha: np.ndarray, size: tuple[int, int]
) -> tuple[tuple[float, ...], float]:
    """Return the affine map from a scene to a garment's image, in PIL's order, and the scale from image to scene."""
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    side = min(size) * math.exp(rng.uniform(math.log(0.3), math.log(0.58)))
    angle = rng.uniform(-0.25, 0.25)
    cos, sin = math.cos(angle), math.sin(angle)
    extent_y = height * cos + width * abs(sin)
    extent_x = width * cos + height * abs(sin)
    scale = min(side / math.sqrt(height * width), 0.95 * size[0] / extent_y, 0.95 * size[1] / extent_x)
    y, x = (
        rng.uniform(0.45 * extent * scale, whole - 0.45 * extent * scale)  # up to a twentieth lies outside
        for extent, whole in ((extent_y, size[0]), (extent_x, size[1]))
    )
    flip = rng.choice((-1, 1))
    a, b, d, e = flip * cos / scale, flip * sin / scale, -sin / scale, cos / scale
    return (a, b, (left + right) / 2 - a * x - b * y, d, e, (top + bottom) / 2 - d * x - e * y), scale


def _warp(values: np.ndarray, affine: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """Return the values where the affine map leads from a canvas of this size, 0 outside; bicubic."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.transform(size[::-1], Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)).clip(0, 1)


def _draw_garment(
    canvas: np.ndarray, rng: np.random.Generator, grey: np.ndarray, alpha: np.ndarray, scale: float
) -> None:
    hue = rng.random()
    saturation = rng.uniform(0.3, 0.8)
    light = _colour(hue, saturation, rng.uniform(0.8, 1))
    dark = _colour(hue + rng.uniform(-0.08, 0.08), saturation, rng.uniform(0.1, 0.25))
    tinted = dark + (light - dark) * grey[..., None]
    edge = ((alpha - 0.5) * scale + 0.5).clip(0, 1)[..., None]  # about one pixel wide
    shift = 1 + round(scale)
    shadow = np.zeros_like(alpha)
    shadow[shift:, shift:] = alpha[:-shift, :-shift]
    canvas *= 1 - 0.45 * shadow[..., None]
    canvas += edge * (tinted - canvas)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _draw_ground(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return one ground, or one above the other, (H, W, 3) float32 from 0 to 1, and its classes (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    kinds = rng.choice(len(GROUNDS), 2, replace=False)
    above, below = (_texture(rng, GROUNDS[kind], y, x) for kind in kinds)
    border = size[0] * rng.uniform(0.3, 0.7) + rng.uniform(-0.3, 0.3) * (x - size[1] / 2)
    share = (y - border + 0.5).clip(0, 1) if rng.random() < 0.6 else np.ones(size, np.float32)
    canvas = above + share[..., None] * (below - above)
    return canvas, (np.where(share > 0.5, kinds[1], kinds[0]) + len(GARMENTS) + 1).astype(np.uint8)


def _texture(rng: np.random.Generator, kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a texture (H, W, 3) in two random colours, float32 from 0 to 1."""
    angle = rng.uniform(0, math.pi)
    period = rng.uniform(12, 22)
    u = (math.cos(angle) * x + math.sin(angle) * y) / period + rng.random()
    v = (math.cos(angle) * y - math.sin(angle) * x) / period + rng.random()
    if kind == "noise":
        mix = _octaves(rng, y.shape, (48, 24, 12, 6, 3))
    elif kind == "stripes":
        mix = _step(np.sin(2 * math.pi * u), period / 6)
    elif kind == "checks":
        mix = _step(np.sin(math.pi * u) * np.sin(math.pi * v), period / 4)
    elif kind == "gradient":
        mix = u - u.min()
        mix /= mix.max()
    elif kind == "weave":
        across = (np.floor(u * 2) + np.floor(v * 2)) % 2 == 0
        mix = np.abs(np.sin(2 * math.pi * np.where(across, u, v)))
    else:
        mix = _step(0.3 - np.hypot(u % 1 - 0.5, v % 1 - 0.5), period)
    first, second = (_colour(rng.random(), rng.uniform(0.1, 0.45), value) for value in rng.permutation((0.45, 0.85)))
    return (first + (second - first) * mix[..., None]).astype(np.float32)


def _step(values: np.ndarray, steepness: float) -> np.ndarray:
    return (values * steepness + 0.5).clip(0, 1)


def _octaves(rng: np.random.Generator, size: tuple[int, ...], periods: tuple[int, ...]) -> np.ndarray:
    """Return smooth noise from 0 to 1 with the given periods, the longer the stronger."""
    total = np.zeros(size, np.float32)
    for period in periods:
        coarse = rng.random((size[0] // period + 3, size[1] // period + 3), np.float32)
        total += period**0.5 * _warp(coarse, (1 / period, 0, 1, 0, 1 / period, 1), (size[0], size[1]))
    total -= total.min()
    return total / total.max()


def _outlines(alpha: np.ndarray) -> list[list[float]]:
    """Return the outlines of the parts with alpha > 0.5. A cut joins a hole to its part: COCO's polygons have none."""
    contours = contour_generator(z=np.pad(alpha, 1), fill_type=FillType.OuterOffset).filled(0.5, 2)
    polygons = []
    for points, offsets in zip(*contours, strict=True):
        rings = [_simplify(points[a : b - 1] - 0.5) for a, b in pairwise(offsets)]
        outer = rings[0]
        for hole in rings[1:]:
            distances = ((outer[:, None] - hole) ** 2).sum(-1)
            i, j = np.unravel_index(distances.argmin(), distances.shape)
            outer = np.concatenate((outer[: i + 1], hole[j:], hole[: j + 1], outer[i:]))
        polygons.append(outer.round(2).ravel().tolist())
    return polygons


def _simplify(ring: np.ndarray, tolerance: float = 0.25) -> np.ndarray:
    """Return the ring (N, 2) without the points that lie closer than `tolerance` to it then (Douglas-Peucker)."""
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    keep = np.zeros(len(ring) + 1, bool)
    keep[[0, far]] = True
    closed = np.concatenate((ring, ring[:1]))
    spans = [(0, far), (far, len(ring))]
    while spans:
        a, b = spans.pop()
        if b - a < 2:
            continue
        dx, dy = closed[b] - closed[a]
        offsets = closed[a + 1 : b] - closed[a]
        distances = np.abs(offsets[:, 0] * dy - offsets[:, 1] * dx)
        k = int(distances.argmax())
        if distances[k] > tolerance * math.hypot(dx, dy):
            keep[a + 1 + k] = True
            spans += [(a, a + 1 + k), (a + 1 + k, b)]
    return ring[keep[:-1]] if keep[:-1].sum() > 2 else ring
