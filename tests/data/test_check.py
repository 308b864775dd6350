"""`effb data check`: what is in a set, and everything that is wrong with it."""

import io

import pytest
from PIL import Image
from small_sets import members, write_folders, write_hf, write_shards, write_tar

from effbackbones.cli import main
from effbackbones.data.check import check_dataset

WRITERS = {"folder": write_folders, "shards": write_shards, "hf": write_hf}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(root, workers=0):
    """Return what is said of the splits, and the problems."""
    lines = list(check_dataset(root, workers, lambda done, total: None).lines())
    (start,) = (number for number, line in enumerate(lines) if line.startswith("problems: "))
    problems = [line.strip() for line in lines[start + 1 :]]
    assert lines[start] == f"problems: {len(problems)}"
    return lines[:start], problems


@pytest.mark.parametrize("layout", WRITERS)
def test_whole_set_of_any_layout_is_counted_and_has_no_problem(tmp_path, layout, capsys):
    root = WRITERS[layout](tmp_path / "set")
    assert main(["data", "check", str(root), "--workers", "1"]) == 0
    val = "validation" if layout == "hf" else "val"
    assert capsys.readouterr().out.splitlines()[1:] == [  # after the first line of progress
        "17/17 images",
        f"data.source={layout}",
        "train: 12 images of 2 classes",
        "  width      min 48, median 48, max 48 pixels",
        "  height     min 40, median 40, max 40 pixels",
        "  per class  min 6 (cat), median 6, max 6 (cat) images",
        f"{val}: 5 images of 2 classes",
        "  width      min 48, median 48, max 48 pixels",
        "  height     min 40, median 40, max 40 pixels",
        "  per class  min 2 (dog), median 2.5, max 3 (cat) images",
        "problems: 0",
    ]


def test_progress_goes_on_over_the_splits(tmp_path, monkeypatch):
    monkeypatch.setattr("effbackbones.data.check.BATCH", 5)
    seen = []
    check_dataset(write_folders(tmp_path), 0, lambda *numbers: seen.append(numbers))
    assert seen == [(5, 17), (10, 17), (12, 17), (17, 17)]


def test_sizes_are_those_of_the_images_that_can_be_read(tmp_path):
    root = write_folders(tmp_path)
    for number, size in (("00", (500, 30)), ("02", (32, 700))):
        Image.new("RGB", size).save(root / "train" / "cat" / f"{number}.png")
    (root / "train" / "dog" / "01.png").write_bytes(b"")
    found, _ = check(root)
    assert found[2:4] == [
        "  width      min 32, median 48, max 500 pixels",
        "  height     min 30, median 40, max 700 pixels",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_of_class_folders_is_named(tmp_path, workers, monkeypatch, capsys):
    root = write_folders(tmp_path / "set")
    (root / "train" / "cat" / "02.png").write_bytes(b"no image")
    bomb = io.BytesIO()
    Image.new("RGB", (100, 100)).save(bomb, "png")
    (root / "val" / "dog" / "03.png").write_bytes(bomb.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    (root / "val" / "eel").mkdir()
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "1.png").write_bytes((root / "train" / "cat" / "00.png").read_bytes())
    found, problems = check(root, workers)
    assert found[1] == "train: 13 images of 3 classes"
    expected = [
        f"{root}/val/eel: no image in it",
        f"{root}/train/cat/02.png: cannot be read as an image (UnidentifiedImageError",
        f"{root}/val/dog/03.png: cannot be read as an image (DecompressionBombWarning",
        "classes only in train: emu",
    ]
    assert [problem[: len(start)] for problem, start in zip(problems, expected, strict=True)] == expected
    assert main(["data", "check", str(root), "--workers", "1"]) == 1


def test_split_that_is_not_there_is_a_problem_and_the_other_is_checked(tmp_path):
    root = write_folders(tmp_path)
    (root / "val").rename(tmp_path / "test")
    found, problems = check(root)
    assert found[1] == "train: 12 images of 2 classes"
    assert [problem.partition(";")[0] for problem in problems] == [f"{root}/val: no such folder"]


def test_every_problem_of_shards_is_named_and_the_others_are_checked(tmp_path):
    root = write_shards(tmp_path)
    (root / "train-0001.tar").write_bytes((root / "train-0001.tar").read_bytes()[:2000])
    write_tar(root / "val-0002.tar", [("9.cls", b"5"), ("9.png", b"no image")])
    (root / "classes.txt").unlink()
    found, problems = check(root)
    assert [line for line in found if "images of" in line] == [
        "train: 9 images of 2 classes",
        "val: 6 images of 3 classes",
    ]
    expected = [
        f"{root}/train-0001.tar: damaged, or no uncompressed tar file",
        f"{root}/val-0002.tar: 9.png: cannot be read as an image",
        "classes only in val: 5",
    ]
    assert [problem[: len(start)] for problem, start in zip(problems, expected, strict=True)] == expected


def test_class_of_shards_that_is_not_in_their_list_is_a_problem(tmp_path):
    root = write_shards(tmp_path)
    (root / "classes.txt").write_text("cat\n")
    _, problems = check(root)
    assert [problem.partition(", as")[0] for problem in problems] == [
        f"{root}/train-0002.tar: 01.png: class 1, expected 0 to 0",
        f"{root}/val-0001.tar: 01.png: class 1, expected 0 to 0",
    ]


def test_evaluation_shards_that_are_not_there_are_a_problem(tmp_path):
    write_tar(tmp_path / "train.tar", members("train", range(4)))
    found, problems = check(tmp_path)
    assert found[:2] == ["data.source=shards", "train: 4 images of 2 classes"]
    assert [problem.partition(";")[0] for problem in problems] == [f"{tmp_path}: no shards named val*.tar"]


def test_folder_of_class_folders_without_splits_is_checked_as_one(tmp_path):
    root = write_folders(tmp_path) / "train"
    found, problems = check(root)
    assert found[:2] == ["data.source=folder", "all: 12 images of 2 classes"]
    assert problems == []


@pytest.mark.parametrize(("name", "problem"), [("", "neither folders of classes, nor"), ("nowhere", "no such folder")])
def test_folder_of_no_known_layout_is_an_error(tmp_path, name, problem, capsys):
    assert main(["data", "check", str(tmp_path / name)]) == 2
    assert f"effb data: {tmp_path / name}: {problem}" in capsys.readouterr().err
