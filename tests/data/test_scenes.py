import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from effbackbones.data import scenes
from effbackbones.data.errors import DataError
from effbackbones.data.fashion_mnist import FashionMnist
from effbackbones.data.scenes import CLASSES, GARMENTS, GROUNDS, MIN_VISIBLE, compose_scene, make_scenes

ROOT = Path(__file__).parents[2] / "data" / "fashion-mnist"
SIZE = (120, 160)
COUNTS = {"train": 12, "val": 5}
ADE_SPLITS = {"train": "training", "val": "validation"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small set of scenes."""
    out = tmp_path_factory.mktemp("scenes") / "set"
    make_scenes(out, **COUNTS, size=SIZE)
    return out


def coco_file(dataset, split):
    return json.loads((dataset / "coco" / "annotations" / f"instances_{split}2017.json").read_text())


def semantic_map(dataset, split, image_id):
    name = f"ADE_{split}_{image_id:08d}.png"
    return np.asarray(Image.open(dataset / "ade20k" / "annotations" / ADE_SPLITS[split] / name))


def rasterise(polygons, size, zoom=8):
    """Return the pixels whose centre lies in one of COCO's polygons."""
    canvas = Image.new("1", (size[1] * zoom, size[0] * zoom))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon([v * zoom - 0.5 for v in polygon], fill=1)
    return np.asarray(canvas)[zoom // 2 :: zoom, zoom // 2 :: zoom]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def some_scenes(count=20):
    source = FashionMnist(ROOT, "train")
    return [compose_scene(source, np.random.default_rng(i), SIZE) for i in range(count)]


def test_layout_is_that_of_coco_and_ade20k(dataset):
    expected = {"ade20k/objectInfo150.txt"}
    for split, count in COUNTS.items():
        expected.add(f"coco/annotations/instances_{split}2017.json")
        for i in range(1, count + 1):
            expected.add(f"coco/{split}2017/{i:012d}.jpg")
            expected.add(f"ade20k/images/{ADE_SPLITS[split]}/ADE_{split}_{i:08d}.jpg")
            expected.add(f"ade20k/annotations/{ADE_SPLITS[split]}/ADE_{split}_{i:08d}.png")
    assert set(files_of(dataset)) == expected


def test_picture_is_stored_once_for_both_layouts(dataset):
    coco = dataset / "coco" / "val2017" / "000000000003.jpg"
    assert coco.samefile(dataset / "ade20k" / "images" / "validation" / "ADE_val_00000003.jpg")
    with Image.open(coco) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE[::-1])


def test_file_system_without_hard_links_gets_copies(dataset, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    make_scenes(tmp_path / "set", **COUNTS, size=SIZE)
    assert files_of(tmp_path / "set") == files_of(dataset)


@pytest.mark.parametrize("split", COUNTS)
def test_coco_file_has_the_fields_of_coco(dataset, split):
    coco = coco_file(dataset, split)
    assert set(coco) == {"info", "licenses", "images", "annotations", "categories"}
    assert [image["id"] for image in coco["images"]] == list(range(1, COUNTS[split] + 1))
    for image in coco["images"]:
        assert (image["height"], image["width"]) == SIZE
        assert image["license"] == coco["licenses"][0]["id"]
        assert (dataset / "coco" / f"{split}2017" / image["file_name"]).is_file()
    assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate(GARMENTS, 1))
    assert {c["supercategory"] for c in coco["categories"]} == {"clothing", "footwear", "accessory"}
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for annotation in coco["annotations"]:
        assert set(annotation) == {"id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"}
        assert annotation["iscrowd"] == 0
        for polygon in annotation["segmentation"]:
            assert len(polygon) >= 6
            assert len(polygon) % 2 == 0
            assert min(polygon) >= 0
            assert max(polygon[::2]) <= SIZE[1]
            assert max(polygon[1::2]) <= SIZE[0]


def test_polygons_rasterise_to_the_masks():
    overlaps = [
        iou(rasterise(polygons, SIZE), mask)
        for scene in some_scenes()
        for mask, polygons in zip(scene.masks, scene.polygons, strict=True)
    ]
    assert np.mean(overlaps) > 0.97
    assert min(overlaps) > 0.9


def test_outline_of_a_ring_leaves_its_hole_out():
    y, x = np.mgrid[:60, :60] - 29.5
    radius = np.hypot(y, x)
    alpha = (np.minimum(25 - radius, radius - 12) / 4 + 0.5).clip(0, 1)
    polygons = scenes._outlines(alpha)
    assert len(polygons) == 1
    assert iou(rasterise(polygons, (60, 60)), alpha > 0.5) > 0.97


def test_outlines_of_two_parts_are_two_polygons():
    alpha = np.zeros((20, 40))
    alpha[2:9, 3:12] = alpha[11:18, 20:36] = 1
    polygons = scenes._outlines(alpha)
    assert len(polygons) == 2
    assert np.array_equal(rasterise(polygons, (20, 40)), alpha > 0.5)


def test_simplified_ring_stays_within_the_tolerance():
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    ring = 30 * np.stack((np.cos(angle), np.sin(3 * angle)), axis=1)
    simple = scenes._simplify(ring, tolerance=0.25)
    assert 10 < len(simple) < 100
    dense = np.concatenate([np.linspace(a, b, 200) for a, b in pairwise([*simple, simple[0]])])
    assert np.sqrt(((ring[:, None] - dense) ** 2).sum(-1)).min(1).max() < 0.26


@pytest.mark.parametrize("split", COUNTS)
def test_boxes_and_areas_are_those_of_the_visible_pixels(dataset, split):
    coco = coco_file(dataset, split)
    checked = 0
    for annotation in coco["annotations"]:
        same_class = [
            a
            for a in coco["annotations"]
            if (a["image_id"], a["category_id"]) == (annotation["image_id"], annotation["category_id"])
        ]
        if len(same_class) > 1:
            continue
        mask = semantic_map(dataset, split, annotation["image_id"]) == annotation["category_id"]
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == mask.sum()
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("split", COUNTS)
def test_semantic_map_agrees_with_the_instances(dataset, split):
    coco = coco_file(dataset, split)
    for image in coco["images"]:
        semantic = semantic_map(dataset, split, image["id"])
        assert (semantic.dtype, semantic.shape) == (np.uint8, SIZE)
        assert semantic.min() >= 1
        assert semantic.max() <= len(CLASSES)
        from_instances = np.zeros(SIZE, np.uint8)
        for annotation in coco["annotations"]:
            if annotation["image_id"] == image["id"]:
                from_instances[rasterise(annotation["segmentation"], SIZE)] = annotation["category_id"]
        assert (from_instances == np.where(semantic <= len(GARMENTS), semantic, 0)).mean() > 0.99


def test_class_table_counts_pixels_and_images(dataset):
    header, *rows = (dataset / "ade20k" / "objectInfo150.txt").read_text().splitlines()
    assert header == "Idx\tRatio\tTrain\tVal\tStuff\tName"
    maps = {split: [semantic_map(dataset, split, i + 1) for i in range(n)] for split, n in COUNTS.items()}
    assert len(rows) == len(CLASSES) == 16
    for c, row in enumerate(rows, 1):
        index, ratio, train, val, stuff, name = row.split("\t")
        assert (int(index), name, int(stuff)) == (c, CLASSES[c - 1], CLASSES[c - 1] in GROUNDS)
        assert int(train) == sum((m == c).any() for m in maps["train"])
        assert int(val) == sum((m == c).any() for m in maps["val"])
        assert float(ratio) == pytest.approx(np.mean([m == c for m in maps["train"] + maps["val"]]), abs=1e-4)


def test_scenes_are_varied_and_their_garments_easy_to_see():
    made = some_scenes(40)
    assert {len(scene.labels) for scene in made} >= {2, 3, 4, 5}
    assert {c for scene in made for c in np.unique(scene.semantic)} == set(range(1, len(CLASSES) + 1))
    sides = [np.ptp(np.nonzero(mask), axis=1) + 1 for scene in made for mask in scene.masks]
    assert np.quantile(np.min(sides, axis=1), 0.05) > 0.18 * min(SIZE)
    assert any(len(polygons) > 1 for scene in made for polygons in scene.polygons)


def test_masks_do_not_overlap():
    for scene in some_scenes():
        assert np.sum(scene.masks, axis=0).max() == 1


def test_garments_in_front_leave_most_of_a_garment_visible(monkeypatch):
    whole = []
    draw = scenes._draw_garment

    def record(canvas, rng, grey, alpha, scale):
        whole.append((alpha > 0.5).sum())
        draw(canvas, rng, grey, alpha, scale)

    monkeypatch.setattr(scenes, "_draw_garment", record)
    visible = [mask.sum() for scene in some_scenes() for mask in scene.masks]
    shares = np.array(visible) / whole
    assert shares.min() >= MIN_VISIBLE
    assert (shares < 0.95).sum() > 5


def test_scene_depends_on_seed_split_and_index_alone(dataset, tmp_path):
    make_scenes(tmp_path / "fewer", train=3, val=2, size=SIZE)
    make_scenes(tmp_path / "other", train=3, val=2, size=SIZE, seed=1)
    whole, fewer, other = (files_of(folder) for folder in (dataset, tmp_path / "fewer", tmp_path / "other"))
    pictures = [name for name in fewer if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 15
    for name in pictures:
        assert fewer[name] == whole[name]
        assert fewer[name] != other[name]
    count = sum(a["image_id"] <= 3 for a in coco_file(dataset, "train")["annotations"])
    assert coco_file(tmp_path / "fewer", "train")["annotations"] == coco_file(dataset, "train")["annotations"][:count]
    grounds = [
        [set(np.unique(semantic_map(dataset, split, i))) - set(range(len(GARMENTS) + 1)) for i in range(1, 6)]
        for split in COUNTS
    ]
    assert grounds[0] != grounds[1]


def test_train_and_val_show_images_of_their_own_split(tmp_path, monkeypatch):
    def only_half_of_the_classes(root, split):
        source = FashionMnist(root, split)
        chosen = (source.labels < 5) == (split == "train")
        source.images, source.labels = source.images[chosen], source.labels[chosen]
        return source

    monkeypatch.setattr(scenes, "FashionMnist", only_half_of_the_classes)
    make_scenes(tmp_path / "set", train=5, val=5, size=SIZE)
    assert all(a["category_id"] <= 5 for a in coco_file(tmp_path / "set", "train")["annotations"])
    assert all(a["category_id"] > 5 for a in coco_file(tmp_path / "set", "val")["annotations"])


def test_progress_is_told_after_every_scene(tmp_path):
    calls = []
    make_scenes(tmp_path / "set", train=2, val=1, size=SIZE, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    make_scenes(tmp_path / "set", train=1, val=1, size=SIZE)
    assert len(files_of(tmp_path / "set")) == 9
    assert os.listdir(tmp_path) == ["set"]


def test_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty; give a new folder for the scenes, or remove this one"):
        make_scenes(tmp_path, train=1, val=1, size=SIZE)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_path_of_a_file_is_refused(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(DataError, match="set: is a file; give a new folder"):
        make_scenes(tmp_path / "set", train=1, val=1, size=SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 0}, "0 scenes for training and 200 for validation, expected at least one for each"),
        ({"val": -1}, "800 scenes for training and -1 for validation, expected at least one for each"),
        ({"size": (64, 256)}, "scenes of 64 by 256 pixels, expected at least 96 by 96"),
        ({"seed": -1}, "seed -1, expected 0 or more"),
    ],
)
def test_number_out_of_range_is_an_error(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        make_scenes(tmp_path / "set", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the terminal is gone")])
@pytest.mark.parametrize("stop", [1, 5])
def test_interruption_leaves_nothing_behind(tmp_path, error, stop):
    def interrupt(done, total):
        assert not (tmp_path / "set").exists()
        if done == stop:
            raise error

    with pytest.raises(type(error)):
        make_scenes(tmp_path / "set", train=3, val=2, size=SIZE, progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left on device"):
        make_scenes(tmp_path / "set", train=1, val=1, size=SIZE)
    assert os.listdir(tmp_path) == []
