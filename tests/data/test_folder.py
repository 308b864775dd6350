import logging
import os
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import LEFT_OUT, BadImageError, build_data
from effbackbones.data.errors import DataError
from effbackbones.data.folder import FolderImages, PathIndex


@pytest.fixture
def root(tmp_path):
    """A dataset of 2 classes with 3 images of either split; image i of a class has the grey value 40 * i."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (48, 40), (40 * i,) * 3).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def truncate_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(path, format="jpeg")
    path.write_bytes(path.read_bytes()[:1000])


BREAKS = {
    "truncated": truncate_jpeg,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "unlinked": lambda path: path.unlink(),
}


def build(root, skip=False, augment=None, **options):
    augment = augment or AugmentConfig(scale=[1, 1], ratio=[1, 1], hflip=0)
    config = DataConfig(root=str(root), size=32, batch_size=2, mean=[0, 0, 0], std=[1, 1, 1], **options)
    config.on_bad_image = "skip" if skip else "error"
    config.workers = options.get("workers", 0)
    return build_data(config, augment, seed=0)


def grey(image):
    return round(image.mean().item() * 255)


def test_folder_is_read_by_class_names_in_order(root):
    data = build(root)
    assert data.classes == ("cat", "dog")
    assert len(data.classes) == 2
    assert [(grey(image), target) for image, target in (data.val_dataset[i] for i in range(6))] == [
        (0, 0), (40, 0), (80, 0), (0, 1), (40, 1), (80, 1),
    ]  # fmt: skip


def paths(source):
    """Return (path, class) of every image, as torchvision lists them."""
    return [
        (os.path.join(source.folder, source.classes[target], name), target)
        for name, target in (source._index[i] for i in range(len(source)))
    ]


FILES = (
    *("b/x.png", "b/c/y.PNG", "b/c-d/z.jpg", "b/c/e/q.jpeg", "b/é.jpg", "b/c.jpg/w.jpg", "b/notes.txt", "a/10.jpg"),
    *("a/9.jpg", "a/.hidden.jpg", "a/thumbs.db", "B/1.webp", "é/1.tiff", "list.jpg"),
)


def test_images_are_numbered_as_torchvision_does(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "b")
    with open(os.path.join(os.fsencode(tmp_path), b"a", b"\xff.jpg"), "wb"):  # a name that is no UTF-8
        pass
    expected = ImageFolder(str(tmp_path))
    source = FolderImages(tmp_path)
    assert source.classes == expected.classes
    assert paths(source) == expected.samples
    assert source.targets.tolist() == expected.targets
    assert len(source) == len(expected) > len(FILES)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))))
def test_index_gives_back_what_it_was_made_of(listings):
    index = PathIndex(listings)
    expected = [(path, target) for target, paths in listings for path in paths]
    assert [index[i] for i in range(len(index))] == expected
    assert index.targets.tolist() == [target for _, target in expected]


def test_index_is_shared_with_worker_processes_not_copied():
    index = PathIndex((target, [f"{i}.jpg" for i in range(1000)]) for target in range(10))
    sent = pickle.loads(bytes(ForkingPickler.dumps(index)))
    assert [sent[i] for i in range(0, len(index), 999)] == [index[i] for i in range(0, len(index), 999)]
    assert len(ForkingPickler.dumps(index)) < 5000
    sent._targets[5] = 77
    assert index[5] == ("5.jpg", 77)


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_image_is_an_error_that_names_it_and_says_what_to_do(root, damage):
    data = build(root)
    path = root / "train" / "cat" / "1.png"
    BREAKS[damage](path)
    with pytest.raises(BadImageError, match=rf"{path}: cannot be read as an image \(.+\)\. Repair .*on_bad_image=skip"):
        data.train_dataset[1, 0]


def test_broken_image_in_a_worker_process_is_the_same_error(root):
    data = build(root, workers=1)
    BREAKS["text"](root / "val" / "dog" / "2.png")
    with pytest.raises(BadImageError, match=r"val/dog/2.png: cannot be read as an image \(UnidentifiedImageError"):
        list(data.val_dataloader())


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_image_in_training_is_replaced_by_the_next_one_that_can_be_read(root, damage):
    data = build(root, skip=True)
    BREAKS[damage](root / "train" / "cat" / "1.png")
    BREAKS[damage](root / "train" / "cat" / "2.png")
    image, target = data.train_dataset[1, 0]
    assert (grey(image), target) == (0, 1)
    assert data.bad_images == 2


def test_broken_last_image_is_replaced_by_the_first(root):
    data = build(root, skip=True)
    BREAKS["empty"](root / "train" / "dog" / "2.png")
    image, target = data.train_dataset[5, 0]
    assert (grey(image), target) == (0, 0)


def test_replacement_is_augmented_with_the_seed_of_the_key(root):
    data = build(root, skip=True, augment=AugmentConfig(erase=1.0))
    expected, _ = data.train_dataset[2, 99]
    BREAKS["empty"](root / "train" / "cat" / "1.png")
    image, _ = data.train_dataset[1, 99]
    assert torch.equal(image, expected)


def test_no_readable_training_image_is_an_error(root):
    data = build(root, skip=True)
    for path in (root / "train").rglob("*.png"):
        BREAKS["empty"](path)
    with pytest.raises(BadImageError, match="none of the 6 training images can be read"):
        data.train_dataset[0, 0]


def test_broken_image_in_evaluation_is_left_out_by_its_target(root):
    data = build(root, skip=True)
    BREAKS["truncated"](root / "val" / "dog" / "0.png")
    images, targets = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert targets.tolist() == [0, 0, 0, LEFT_OUT, 1, 1]
    assert not images[3].any()
    assert data.bad_images == 1
    assert torch.nn.CrossEntropyLoss().ignore_index == LEFT_OUT


def test_skipped_image_is_logged_and_counted_once(root, caplog):
    data = build(root, skip=True)
    path = root / "train" / "cat" / "1.png"
    BREAKS["text"](path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            data.train_dataset[1, 0]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"skipped image 1 (of at most 100): {path}: cannot be read as an image (Unid")
    assert data.bad_images == 1


def test_skipped_images_of_both_splits_count_together_up_to_the_bound(root):
    data = build(root, skip=True, max_bad_images=2)
    for path in ("train/cat/0.png", "val/cat/0.png", "val/dog/0.png"):
        BREAKS["empty"](root / path)
    data.train_dataset[0, 0]
    data.val_dataset[0]
    assert data.bad_images == 2
    with pytest.raises(BadImageError, match=r"3 images could not .* data.max_bad_images=2. The last: .*/val/dog/0.png"):
        data.val_dataset[3]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_skipped_images_are_counted_over_worker_processes(root, start_method):
    data = build(root, skip=True)
    for path in ("val/cat/0.png", "val/dog/2.png"):
        BREAKS["empty"](root / path)
    workers = 2 if start_method == "fork" else 1
    loader = DataLoader(data.val_dataset, batch_size=1, num_workers=workers, multiprocessing_context=start_method)
    assert [target.item() for _, target in loader] == [LEFT_OUT, 0, 0, 1, 1, LEFT_OUT]
    assert data.bad_images == 2


def test_missing_root_is_an_error():
    with pytest.raises(DataError, match=r"data.source=folder needs data.root"):
        build_data(DataConfig(), AugmentConfig(), seed=0)


def test_missing_split_is_an_error_that_names_it(root):
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=rf"{root}/val: no such folder; data.root must hold train/<class>/"):
        build(root)


def test_split_without_classes_is_an_error_that_names_it(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(DataError, match=rf"{root}/val: no folder in it; expected one for each class"):
        build(root)


def test_empty_class_is_an_error_that_names_it(root):
    (root / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=rf"{root}/train: no image in eel. Every class needs images"):
        build(root)


def test_classes_that_differ_are_an_error_that_names_them(root):
    (root / "val" / "dog").rename(root / "val" / "emu")
    with pytest.raises(DataError, match="same classes, but only in train: dog; only in val: emu"):
        build(root)


def test_num_classes_that_contradicts_the_folder_is_an_error(root):
    with pytest.raises(DataError, match=r"data.num_classes=3, but the folder dataset has 2 classes"):
        build(root, num_classes=3)
