"""Directories of Hugging Face's `datasets`."""

import builtins
import json
import pickle
import socket
from multiprocessing.reduction import ForkingPickler

import datasets
import numpy as np
import pytest
import torch
from small_sets import CLASSES, COUNTS, by_class, picture, write_folders, write_hf

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import BadImageError, build_data
from effbackbones.data.errors import DataError


def build(root, **options):
    config = DataConfig(source="hf", root=str(root), size=32, batch_size=2, workers=0)
    for name, value in options.items():
        setattr(config, name, value)
    return build_data(config, AugmentConfig(scale=[1, 1], ratio=[1, 1], hflip=0), seed=0)


def samples(source):
    return [(np.asarray(image).tolist(), target) for image, target in map(source.__getitem__, range(len(source)))]


def change(root, edit, split="train"):
    """Rewrite a dataset with one split changed."""
    splits = datasets.load_from_disk(str(root))
    splits[split] = edit(splits[split])
    changed = root.parent / "changed"
    splits.save_to_disk(str(changed))
    return changed


@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_dataset_holds_the_images_of_the_folders_it_was_made_of(tmp_path, val):
    folders = build(write_folders(tmp_path / "folders"), source="folder")
    hf = build(write_hf(tmp_path / "hf", val))
    assert hf.classes == folders.classes == CLASSES
    for split in ("train_dataset", "val_dataset"):
        assert samples(getattr(hf, split).source) == samples(getattr(folders, split).source)


def test_batches_are_bit_identical_with_and_without_workers(tmp_path):
    root = write_hf(tmp_path / "hf")
    pairs = list(zip(*(build(root, workers=workers).train_dataloader() for workers in (0, 2)), strict=True))
    assert len(pairs) == COUNTS["train"] // 2
    assert all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def test_images_are_not_copied_into_another_process(tmp_path):
    source = build(write_hf(tmp_path / "hf")).train_dataset.source
    sent = bytes(ForkingPickler.dumps(source))
    assert len(sent) < sum(len(picture("train", number)) for number in by_class("train")) / 4
    assert samples(pickle.loads(sent)) == samples(source)


def test_dataset_is_opened_without_the_network_and_its_scripts(tmp_path, monkeypatch):
    root = write_hf(tmp_path / "hf")
    for name in ("hf.py", "dataset.py", "train/train.py"):
        (root / name).write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")

    def refuse(*args):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(samples(build(root).train_dataset.source)) == COUNTS["train"]
    assert not (tmp_path / "trace").exists()


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    root = write_hf(tmp_path / "hf")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"needs the package datasets .*: pip install 'effbackbones\[data\]'"):
        build(root)


def test_folder_that_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no dataset_dict.json in it; expected what save_to_disk of a D"):
        build(tmp_path)


@pytest.mark.parametrize("damage", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_damaged_dataset_is_an_error_that_names_it(tmp_path, damage):
    root = write_hf(tmp_path / "hf")
    path = root / "train" / damage
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"{root}: cannot be read as a dataset \(.*: write it again with save_to_disk"):
        build(root)


def test_dataset_without_a_split_to_evaluate_is_an_error(tmp_path):
    root = write_hf(tmp_path / "hf", "dev")
    with pytest.raises(DataError, match="splits train, dev; expected train, and one of validation, val, test"):
        build(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda split: split.remove_columns("picture"), "train: columns of Image: none; expected one"),
        (lambda split: split.cast_column("kind", datasets.Value("int64")), "columns of ClassLabel: none; expected one"),
        (
            lambda split: split.add_column("other", split["kind"]).cast_column("other", split.features["kind"]),
            "columns of ClassLabel: kind, other; expected one",
        ),
    ],
)
def test_split_needs_a_column_of_images_and_one_of_classes(tmp_path, edit, message):
    with pytest.raises(DataError, match=message):
        build(change(write_hf(tmp_path / "hf"), edit))


@pytest.mark.parametrize("label", [None, -1])
def test_row_without_a_class_is_an_error_that_names_it(tmp_path, label):
    root = write_hf(tmp_path / "hf", "test")

    def edit(split):
        features, columns = split.features, split.to_dict()
        columns["kind"][3] = label
        return datasets.Dataset.from_dict(columns, features)

    with pytest.raises(DataError, match=r"test: row 3 has no class; remove such rows \(1 in all\)"):
        build(change(root, edit, "test"))


def test_splits_of_other_classes_are_an_error(tmp_path):
    root = write_hf(tmp_path / "hf")
    path = root / "validation" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["kind"]["names"].reverse()
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match="train and validation must have the same classes in the same order"):
        build(root)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": b"no image", "path": "a.png"}, r"train: row 1 \(a.png\): cannot be read as an image \(Unidentified"),
        ({"bytes": None, "path": "/etc/hostname"}, "train: row 1: no image in it"),
        (None, "train: row 1: no image in it"),
    ],
)
def test_image_that_cannot_be_read_is_an_error_that_names_its_row(tmp_path, cell, message):
    def edit(split):
        pictures = [{"bytes": picture("train", number), "path": None} for number in by_class("train")]
        pictures[1] = cell
        columns = {"text": split["text"], "picture": pictures, "kind": split["kind"]}
        return datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()}, split.features)

    root = write_hf(tmp_path / "hf")
    splits = datasets.load_from_disk(str(root))
    edited = edit(splits["train"])
    from effbackbones.data.hf import HfImages

    with pytest.raises(BadImageError, match=message):
        HfImages(edited, "train")[1]
