"""Datasets of dense tasks: layouts, pipelines, and everything that can be wrong with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmcv", reason="needs the mm extra")

import torch
from PIL import Image
from small_scenes import ROOTS, dense_recipe, scenes

from effbackbones.data import BadImageError, DataError
from effbackbones.data.sampler import EpochBatches
from effbackbones.mm.data import OrientedBatches, build_data, read_instances, read_labels

GARMENTS = 10


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a copy of the scenes that a test may damage."""
    return Path(shutil.copytree(scenes(), tmp_path / "scenes"))


def build(tmp_path, task="detection", root=None, *overrides):
    folder = root or scenes()
    return build_data(dense_recipe(task, tmp_path / "run", [f"data.root={folder / ROOTS[task]}", *overrides]).recipe)


def annotations(root, split="train"):
    return root / "coco" / "annotations" / f"instances_{split}2017.json"


def change(root, edit, split="train"):
    """Let `edit` change the annotation file of a split."""
    content = json.loads(annotations(root, split).read_text())
    edit(content)
    annotations(root, split).write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(("task", "classes"), [("detection", GARMENTS), ("segmentation", 16)])
def test_scenes_open_with_their_classes_and_numbers(tmp_path, task, classes):
    data = build(tmp_path, task)
    assert len(data.classes) == classes
    assert data.classes[:2] == ("T-shirt/top", "Trouser")
    assert (len(data.train_dataset), len(data.val_dataset)) == (8, 3)


def test_training_batch_of_detection_has_images_boxes_and_masks(tmp_path):
    batch = next(iter(build(tmp_path).train_dataloader()))
    assert [x.dtype for x in batch["inputs"]] == [torch.uint8] * 2
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        instances = sample.gt_instances
        assert image.shape == (3, 96, 128)
        assert len(instances.bboxes) == len(instances.labels) == len(instances.masks) > 0
        assert instances.masks.masks.shape[1:] == (96, 128)
        assert instances.labels.max() < GARMENTS


def test_training_batch_of_segmentation_has_crops_of_the_size(tmp_path):
    batch = next(iter(build(tmp_path, "segmentation").train_dataloader()))
    assert [tuple(x.shape) for x in batch["inputs"]] == [(3, 64, 64)] * 2
    assert [tuple(sample.gt_sem_seg.data.shape) for sample in batch["data_samples"]] == [(1, 64, 64)] * 2
    assert max(int(sample.gt_sem_seg.data.max()) for sample in batch["data_samples"]) < 16


def test_evaluation_keeps_the_map_at_the_size_of_the_image(tmp_path):
    data = build(tmp_path, "segmentation", None, "data.scale=[64, 48]")
    sample = data.val_dataset[0]
    assert tuple(sample["inputs"].shape) == (3, 48, 64)
    assert tuple(sample["data_samples"].gt_sem_seg.data.shape) == (1, 96, 128)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_augmentation_follows_the_key_alone(tmp_path, task):
    data = build(tmp_path, task, None, "augment.photometric=true")
    one, again, other = (data.train_dataset[key]["inputs"] for key in [(1, 7), (1, 7), (1, 8)])
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("policy", ["multiscale", "detr"])
def test_resizing_policies_stay_within_the_scale(tmp_path, policy):
    data = build(tmp_path, "detection", None, f"augment.resize={policy}")
    shapes = {tuple(data.train_dataset[(0, seed)]["inputs"].shape[1:]) for seed in range(12)}
    assert len(shapes) > 3
    assert all(max(shape) <= 128 and min(shape) <= 96 for shape in shapes)


def test_instances_agree_with_the_semantic_map(tmp_path):
    detection, segmentation = build(tmp_path), build(tmp_path, "segmentation")
    boxes, labels, masks = read_instances(detection.val_annotations, 0, masks=True)
    labels_hw = read_labels(segmentation.val_annotations, 0)
    for box, label, mask in zip(boxes, labels, masks, strict=True):
        assert (labels_hw[mask] == label).mean() > 0.9
        rows, columns = np.nonzero(mask)
        assert np.abs(box - [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).max() <= 2


# What can be wrong


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_missing_root_is_an_error_that_says_what_belongs_there(tmp_path, task):
    with pytest.raises(DataError, match=r"no such f.*data.root must hold"):
        build(tmp_path, task, tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": 3, "annotations": [], "categories": []}', "\x00"])
def test_broken_annotation_file_is_an_error_with_its_name(tmp_path, root, text):
    annotations(root).write_text(text)
    with pytest.raises(DataError, match=r"instances_train2017.json: not an annotation file of COCO's kind"):
        build(tmp_path, "detection", root)


def test_missing_image_is_an_error_with_its_name_or_is_skipped_and_counted(tmp_path, root):
    (root / "coco" / "train2017" / "000000000003.jpg").unlink()
    with pytest.raises(BadImageError, match=r"000000000003.jpg.*Repair or remove the file, or set data.on_bad_image"):
        build(tmp_path, "detection", root).train_dataset[(2, 0)]
    data = build(tmp_path, "detection", root, "data.on_bad_image=skip")
    assert data.train_dataset[(2, 0)]["data_samples"].img_id == 4
    assert data.bad_images == 1


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_image_that_is_empty_or_broken_is_an_error_with_its_name(tmp_path, root, damage):
    path = root / "coco" / "val2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:100] if damage is None else damage)
    with pytest.raises(BadImageError, match=r"val2017/000000000001.jpg: cannot be read as an image"):
        build(tmp_path, "detection", root).val_dataset[0]


@pytest.mark.parametrize(("task", "name"), [("detection", "000000000001.jpg"), ("segmentation", "00000001.jpg")])
def test_image_with_too_many_pixels_is_an_error_with_its_name(tmp_path, root, task, name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 - 1)
    with pytest.raises(BadImageError, match=rf"{name}: cannot be read as an image \(DecompressionBombWarning"):
        build(tmp_path, task, root).val_dataset[0]


def test_evaluation_leaves_out_an_image_that_cannot_be_read(tmp_path, root):
    (root / "coco" / "val2017" / "000000000001.jpg").write_bytes(b"")
    data = build(tmp_path, "detection", root, "data.on_bad_image=skip", "data.eval_batch_size=1")
    batches = list(data.val_dataloader())
    assert [len(batch["inputs"]) for batch in batches] == [0, 1, 1]
    assert data.bad_images == 1


def test_box_without_area_is_left_out_and_counted(tmp_path, root, caplog):
    def edit(content):
        content["annotations"][0]["bbox"][2] = 0

    content = change(root, edit)
    data = build(tmp_path, "detection", root)
    first = content["annotations"][0]["image_id"]
    kept = sum(annotation["image_id"] == first for annotation in content["annotations"]) - 1
    index = next(i for i in range(8) if data.train_annotations.get_data_info(i)["img_id"] == first)
    assert len(data.train_annotations.get_data_info(index)["instances"]) == kept
    assert "left out 1 annotations, such as annotation" in caplog.text


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda a: a.update(category_id=99), r"category_id 99, which categories does not list"),
        (
            lambda a: a.update(segmentation={"size": [5, 7], "counts": "0"}),
            r"a mask of \[5, 7\], expected \[96, 128\] \(rows, columns\)",
        ),
        (lambda a: a.update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\], expected \[x, y, width, height\]"),
        (lambda a: a.update(bbox=[1, 2, 3, float("nan")]), r"bbox \[1, 2, 3, nan\], expected"),
        (lambda a: a.update(bbox=None), r"bbox None, expected"),
    ],
)
def test_annotation_that_does_not_fit_is_an_error_or_left_out(tmp_path, root, caplog, edit, problem):
    change(root, lambda content: edit(content["annotations"][0]))
    with pytest.raises(DataError, match=rf"instances_train2017.json: annotation \d+ of .*jpg: {problem}"):
        build(tmp_path, "detection", root)
    build(tmp_path, "detection", root, "data.on_bad_image=skip")
    assert "left out 1 annotations" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotation_file_without_images_is_an_error_with_its_name(tmp_path, root, split):
    change(root, lambda content: content.update(images=[], annotations=[]), split)
    with pytest.raises(DataError, match=rf"instances_{split}2017.json: no images in it"):
        build(tmp_path, "detection", root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(annotations=[]),
        lambda content: content.pop("annotations"),
        lambda content: [image.update(width=31) for image in content["images"]],
    ],
)
def test_training_file_with_nothing_to_train_on_is_an_error_with_its_name(tmp_path, root, edit):
    change(root, edit)
    overrides = ["data.on_bad_image=skip"]  # masks do not fit narrower images either
    with pytest.raises(DataError, match=r"instances_train2017.json: nothing to train on: no image of it has an annot"):
        build(tmp_path, "detection", root, *overrides)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_folder_without_images_to_segment_is_an_error_with_its_name(tmp_path, root, split):
    for path in (root / "ade20k" / "images" / split).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"images/{split}: no .jpg images in it"):
        build(tmp_path, "segmentation", root)


def test_image_of_another_size_than_annotated_is_an_error(tmp_path, root):
    path = root / "coco" / "train2017" / "000000000001.jpg"
    Image.new("RGB", (50, 40)).save(path)
    with pytest.raises(
        BadImageError, match=r"\(40, 50\) pixels \(rows, columns\), the annotation file says \(96, 128\)"
    ):
        build(tmp_path, "detection", root).train_dataset[(0, 0)]


def test_image_without_annotations_does_not_train(tmp_path, root):
    change(root, lambda content: content.update(annotations=[a for a in content["annotations"] if a["image_id"] != 1]))
    assert len(build(tmp_path, "detection", root).train_dataset) == 7


def test_classes_that_differ_between_the_splits_are_an_error(tmp_path, root):
    change(root, lambda content: content["categories"][0].update(name="hat"), "val")
    with pytest.raises(DataError, match=r"training and validation differ in their classes: T-shirt/top, hat"):
        build(tmp_path, "detection", root)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_number_of_classes_that_contradicts_the_data_is_an_error(tmp_path, task):
    with pytest.raises(DataError, match=r"data.num_classes=7, but .* has 1\d classes"):
        build(tmp_path, task, None, "data.num_classes=7")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.full((96, 128), 17, np.uint8), r"label 17, expected 0 \(no class\) to 16"),
        (np.zeros((90, 128), np.uint8), r"\(90, 128\) pixels \(rows, columns\), its image has \(96, 128\)"),
    ],
)
def test_segmentation_map_that_does_not_fit_is_an_error_with_its_name(tmp_path, root, labels, problem):
    path = sorted((root / "ade20k" / "annotations" / "training").iterdir())[0]
    Image.fromarray(labels).save(path)
    with pytest.raises(BadImageError, match=rf"{path.name}: {problem}"):
        build(tmp_path, "segmentation", root).train_dataset[(0, 0)]


def test_missing_segmentation_map_is_an_error_with_its_name(tmp_path, root):
    sorted((root / "ade20k" / "annotations" / "training").iterdir())[0].unlink()
    with pytest.raises(BadImageError, match=r"\.jpg: cannot be used \(FileNotFoundError: .*\.png"):
        build(tmp_path, "segmentation", root).train_dataset[(0, 0)]


def test_broken_class_table_is_an_error_with_its_name(tmp_path, root):
    (root / "ade20k" / "objectInfo150.txt").write_text("nothing of the kind\n")
    with pytest.raises(DataError, match=r"objectInfo150.txt: expected a table"):
        build(tmp_path, "segmentation", root)


def test_without_a_class_table_the_classes_are_those_of_ade20k(tmp_path, root):
    (root / "ade20k" / "objectInfo150.txt").unlink()
    classes = build(tmp_path, "segmentation", root).classes
    assert len(classes) == 150
    assert classes[:2] == ("wall", "building")


# Orientation


def oriented(upright, batch_size, **options):
    return OrientedBatches(
        torch.tensor(upright), len(upright), batch_size, **{"seed": 0, "position": lambda: (0, 0), **options}
    )


def indices(batches):
    return [[index for index, _ in batch] for batch in batches]


UPRIGHT = [i % 3 == 0 for i in range(53)]  # 18 of 53


@pytest.mark.parametrize("epoch", range(3))
def test_oriented_batches_are_of_one_kind_up_to_the_last_and_hold_an_image_once(epoch):
    batches = indices(oriented(UPRIGHT, 4, position=lambda: (epoch, 0)))
    kinds = [{UPRIGHT[index] for index in batch} for batch in batches]
    assert [len(kind) for kind in kinds] == [1] * 12 + [2]
    assert len({index for batch in batches for index in batch}) == 4 * len(batches)
    assert {True, False} == {kind for (kind,) in kinds[:5]}  # as they come, not one kind after the other


def test_oriented_batches_of_two_ranks_or_of_two_at_a_time_make_the_batch_of_one():
    one = list(oriented(UPRIGHT, 8))
    ranks = zip(*(oriented(UPRIGHT, 4, rank=rank, world=2) for rank in (0, 1)), strict=True)
    halves = iter(oriented(UPRIGHT, 4, accumulate=2))
    assert [first + second for first, second in ranks] == one
    assert [first + second for first, second in zip(halves, halves, strict=True)] == one


def test_oriented_batches_go_on_in_the_middle_of_an_epoch():
    whole, rest = (list(oriented(UPRIGHT, 4, position=lambda done=done: (2, done))) for done in (0, 7))
    assert rest == whole[7:]


def test_oriented_batches_of_one_kind_alone_are_those_of_any_images():
    options = {"seed": 0, "position": lambda: (1, 0)}
    assert list(oriented([False] * 20, 3, **options)) == list(EpochBatches(20, 3, **options))


@pytest.mark.parametrize("seed", range(3))
def test_detection_trains_on_batches_of_one_orientation(tmp_path, root, seed):
    def edit(content):
        for image in content["images"][::2]:
            image.update(height=128, width=96)
        for annotation in content["annotations"]:
            del annotation["segmentation"]  # of the old size

    change(root, edit)
    data = build(tmp_path, "detection", root, f"trainer.seed={seed}")
    annotated = [data.train_annotations.get_data_info(i) for i in range(8)]
    batches = indices(data.train_dataloader().batch_sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert all(len({annotated[index]["height"] for index in batch}) == 1 for batch in batches)
