"""Tar shards: the samples webdataset sees, in the order of training, and everything that can be wrong with them."""

import io
import os
import pickle
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import CLASSES, COUNTS, by_class, members, picture, write_folders, write_shards, write_tar

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import BadImageError, build_data, shards
from effbackbones.data.errors import DataError
from effbackbones.data.shards import ShardImages, find_shards, index_shard, shard_classes

LABEL = b"1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Return the folder of cached indices of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "effbackbones" / "shards"


def build(root, **options):
    config = DataConfig(source="shards", root=str(root), size=32, batch_size=2, workers=0)
    for name, value in options.items():
        setattr(config, name, value)
    return build_data(config, AugmentConfig(scale=[1, 1], ratio=[1, 1], hflip=0), seed=0)


def pixels(image):
    return np.asarray(image).tolist()


def samples(source):
    return [(pixels(image), target) for image, target in map(source.__getitem__, range(len(source)))]


# What is read


@pytest.mark.parametrize("compressed", ["png", "jpg", "jpeg"])
def test_samples_are_those_that_webdataset_reads_from_what_it_wrote(tmp_path, compressed):
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            image = Image.open(io.BytesIO(picture("train", number)))
            writer.write({"__key__": f"sub/{number:03d}", compressed: image, "cls": number % 3, "txt": "unused"})
    files = sorted(map(str, tmp_path.glob("*.tar")))
    stream = webdataset.WebDataset(files, shardshuffle=False).decode("pilrgb").to_tuple(compressed, "cls")
    source = ShardImages(find_shards(tmp_path, "*.tar"), "abc")
    assert source.parts == [5, 5, 2]
    assert samples(source) == [(pixels(image), target) for image, target in stream]


def test_shards_hold_the_images_of_the_folders_they_were_made_of(tmp_path):
    folders = build(write_folders(tmp_path / "folders"), source="folder")
    tars = build(write_shards(tmp_path / "shards"))
    assert tars.classes == folders.classes == CLASSES
    for split in ("train_dataset", "val_dataset"):
        assert samples(getattr(tars, split).source) == samples(getattr(folders, split).source)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (("cls", b"1"), 1),
        (("cls", b"007\n"), 7),
        (("json", b'{"cls": 2, "label": 5}'), 2),
        (("json", b'{"label": 5, "caption": "x"}'), 5),
    ],
)
def test_class_is_that_of_cls_or_json(tmp_path, label, expected):
    suffix, content = label
    path = write_tar(tmp_path / "a.tar", [("7.JPG", picture("train", 0)), (f"7.{suffix}", content)])
    assert index_shard(path)["target"].tolist() == [expected]


def test_what_is_no_sample_is_left_out(tmp_path):
    image = picture("train", 0)
    others = [("readme", b""), ("__meta__/x.jpg", image), ("info.json", b"{}"), ("1.txt", b"caption")]
    path = write_tar(tmp_path / "a.tar", [*others, ("2.seg.png", image), ("2.jpg", image), ("2.cls", LABEL)])
    assert index_shard(path)["target"].tolist() == [1]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format_are_read(tmp_path, format):
    name = "/".join(["folder" * 5] * 6)
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("folder/"), None)
        for suffix, content in (("cls", LABEL), ("png", picture("train", 3))):
            member = tarfile.TarInfo(f"{name}/é.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert samples(ShardImages([tmp_path / "a.tar"], CLASSES)) == [
        (pixels(Image.open(io.BytesIO(picture("train", 3)))), 1)
    ]


# Which shards and classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train*.tar", ["train-0.tar", "train-1.tar", "train-10.tar"]),
        ("train-{0..1}.tar", ["train-0.tar", "train-1.tar"]),
        ("list.txt", ["val-0.tar", "train-10.tar"]),
        ("{08..10}/{0..1}.tar", ["08/0.tar", "08/1.tar", "09/0.tar", "09/1.tar", "10/0.tar", "10/1.tar"]),
    ],
)
def test_shards_are_named_by_a_glob_a_range_or_a_list(tmp_path, names, expected):
    for name in ("train-0.tar", "train-1.tar", "train-10.tar", "val-0.tar"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("val-0.tar\n\ntrain-10.tar\n")
    assert find_shards(tmp_path, names) == [tmp_path / name for name in expected]


def test_root_with_the_signs_of_a_glob_is_a_plain_folder(tmp_path):
    root = tmp_path / "[a]*"
    root.mkdir()
    (root / "train.tar").touch()
    assert find_shards(root, "train*.tar") == [root / "train.tar"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("test*.tar", r"no shards named test\*.tar; data.train_shards"),
        ("train-{0000..0009}.tar", r"train-0004.tar: No such file"),
        ("none.txt", r"none.txt: no list of shards"),
    ],
)
def test_shards_that_are_not_there_are_an_error_that_names_them(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        build(write_shards(tmp_path), train_shards=names)


def test_classes_are_those_of_the_file_or_as_many_as_the_recipe_says(tmp_path):
    assert shard_classes(tmp_path, 3) == ("0", "1", "2")
    assert shard_classes(tmp_path, 1000)[:2] == ("n01440764", "n01443537")
    with pytest.raises(DataError, match=r"set data.num_classes, or write the names of the classes into .*classes.txt"):
        shard_classes(tmp_path, None)
    (tmp_path / "classes.txt").write_text("b\tbears\na\n")
    assert shard_classes(tmp_path, None) == shard_classes(tmp_path, 1000) == ("b", "a")


def test_number_of_classes_that_contradicts_the_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.num_classes=3, but the shards dataset has 2 classes"):
        build(write_shards(tmp_path), num_classes=3)


# What is wrong with a shard

PNG = picture("train", 1)


def special(kind: bytes, name: str = "1.png", target: str = "") -> bytes:
    """Return a tar of one member of a kind that has no content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)
    return file.getvalue()


def tarred(*contents: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


WHOLE = tarred(("1.png", PNG), ("1.cls", LABEL), ("2.png", PNG), ("2.cls", LABEL))
BROKEN = {
    "parent folder": (tarred(("../1.png", PNG)), r"a.tar: ../1.png: refused, as it points out"),
    "parent folder inside": (tarred(("x/../../1.png", PNG)), r"x/../../1.png: refused, as it points out"),
    "absolute path": (tarred(("/tmp/1.png", PNG)), r"a.tar: /tmp/1.png: refused, as it points out"),
    "folder outside": (special(tarfile.DIRTYPE, "../x"), r"a.tar: ../x: refused, as it points out"),
    "symbolic link": (special(tarfile.SYMTYPE, target="/etc/passwd"), r"a.tar: 1.png: refused, as a link"),
    "hard link": (special(tarfile.LNKTYPE, target="2.png"), r"a.tar: 1.png: refused, as a link"),
    "device": (special(tarfile.CHRTYPE), r"a.tar: 1.png: refused, as a link, device"),
    "pipe": (special(tarfile.FIFOTYPE), r"a.tar: 1.png: refused, as a link, device"),
    "no class": (tarred(("1.png", PNG), ("2.png", PNG), ("2.cls", LABEL)), r"a.tar: 1.png: no class beside it"),
    "no class at the end": (tarred(("1.png", PNG)), r"a.tar: 1.png: no class beside it; expected 1.cls or 1.json"),
    "class apart": (tarred(("1.png", PNG), ("2.png", PNG), ("1.cls", LABEL)), r"1.png: no class beside it"),
    "no image": (tarred(("1.bmp", PNG), ("1.cls", LABEL)), r"a.tar: 1.cls: no image beside it; expected one of jpg"),
    "two images": (tarred(("1.png", PNG), ("1.jpg", PNG), ("1.cls", LABEL)), r"1.png: the second image of its sample"),
    "twice": (tarred(("1.png", PNG), ("1.PNG", PNG), ("1.cls", LABEL)), r"a.tar: 1.PNG: twice in a row"),
    "class that is text": (tarred(("1.png", PNG), ("1.cls", b"dog")), r"a.tar: 1.cls: b'dog' is no class"),
    "negative class": (tarred(("1.png", PNG), ("1.cls", b"-1")), r"a.tar: 1.cls: b'-1' is no class"),
    "huge class": (tarred(("1.png", PNG), ("1.cls", b"9" * 5000)), r"a.tar: 1.cls: b'9999.* is no class"),
    "true": (tarred(("1.png", PNG), ("1.json", b'{"cls": true}')), r"a.tar: 1.json: .* is no class"),
    "deep json": (tarred(("1.png", PNG), ("1.json", b"[" * 100_000)), r"a.tar: 1.json: .* is no class"),
    "class out of range": (tarred(("1.png", PNG), ("1.cls", b"2")), r"1.png: class 2, expected 0 to 1, as data.num"),
    "cut off in a member": (WHOLE[: 1024 + len(PNG) // 2], r"a.tar: damaged.*after 1.png \(ReadError: unexpected"),
    "cut off in the last member": (WHOLE[: WHOLE.rindex(b"2.cls") + 512], r"a.tar: damaged.*, after 2.cls"),
    "cut off between members": (WHOLE[: WHOLE.rindex(b"2.cls")], r"after 2.png \(ReadError: no end-of-archive mark\)"),
    "header overwritten": (WHOLE.replace(b"2.cls", b"3.cls"), r"a.tar: damaged.*, after 2.png"),
    "gzip": (b"\x1f\x8b" + bytes(600), r"a.tar: damaged, or no uncompressed tar file, after its beginning"),
    "empty": (b"", r"a.tar: damaged, or no uncompressed tar file"),
    "nothing in it": (tarred(), r"a.tar: no image in the 1 shards"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_shard_that_is_broken_is_an_error_that_names_it_and_the_member(tmp_path, case):
    content, message = BROKEN[case]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ShardImages([tmp_path / "a.tar"], CLASSES)
    assert set(os.listdir(tmp_path)) <= {"a.tar", "cache"}
    assert not (tmp_path.parent / "1.png").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(WHOLE) - 1), junk=st.binary(max_size=40), keep=st.booleans())
def test_damage_anywhere_is_an_error_of_the_dataset_or_harmless(tmp_path, start, junk, keep):
    (tmp_path / "a.tar").write_bytes(WHOLE[:start] + junk + (WHOLE[start + len(junk) :] if keep else b""))
    try:
        source = ShardImages([tmp_path / "a.tar"], CLASSES)
        for i in range(len(source)):
            source[i]
    except DataError as error:
        assert "a.tar" in str(error)


def test_image_that_cannot_be_read_is_an_error_with_shard_and_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.png", PNG[:300]), ("1.cls", LABEL)])
    with pytest.raises(BadImageError, match=r"a.tar: 1.png: cannot be read as an image \(OSError: .*truncated"):
        ShardImages([path], CLASSES)[0]


@pytest.mark.parametrize("change", ["rewritten", "cut off", "removed"])
def test_shard_that_changes_after_the_start_is_an_error_that_names_it(tmp_path, change):
    path = write_tar(tmp_path / "a.tar", members("train", range(3)))
    source = ShardImages([path], CLASSES)
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000] if change == "cut off" else bytes(100_000))
    with pytest.raises(BadImageError, match=r"a\.tar: "):
        source[2]


def test_shard_with_a_broken_image_goes_on_without_it(tmp_path):
    root = write_shards(tmp_path)
    write_tar(root / "train-0000.tar", [("1.png", PNG[:300]), ("1.cls", LABEL)])
    data = build(root, on_bad_image="skip")
    image, target = data.train_dataset[0, 0]
    assert (image.shape, target) == ((3, 32, 32), by_class("train")[3] % 2)
    assert data.bad_images == 1


# The index


def test_index_is_kept_and_read_again_until_the_shard_changes(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / "a.tar", members("train", range(3)))
    first = index_shard(path)
    assert len(list(cache.glob("*.npy"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_walk", lambda path: pytest.fail("walked again"))
        assert np.array_equal(index_shard(path), first)
    write_tar(path, members("train", range(4)))
    assert len(index_shard(path)) == 4
    os.utime(path, ns=(0, 0))
    assert len(index_shard(path)) == 4
    assert len(list(cache.glob("*.npy"))) == 3
    assert not list(cache.glob(".*"))


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "other numbers"])
def test_damaged_index_is_made_anew_and_runs_nothing(tmp_path, cache, damage):
    path = write_tar(tmp_path / "a.tar", members("train", range(3)))
    first = index_shard(path)
    (kept,) = cache.glob("*.npy")
    whole, trace = kept.read_bytes(), tmp_path / "trace"
    if damage == "pickle":
        np.save(kept, np.array([Payload(trace)], object), allow_pickle=True)
    elif damage == "other numbers":
        np.save(kept, np.zeros(3))
    else:
        kept.write_bytes(whole[:-10] if damage == "truncated" else b"")
    assert np.array_equal(index_shard(path), first)
    assert kept.read_bytes() == whole
    assert not trace.exists()


def test_cache_that_cannot_be_written_is_none(tmp_path, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    path = write_tar(tmp_path / "a.tar", members("train", range(3)))
    assert len(index_shard(path)) == 3


def test_index_and_handles_are_not_copied_into_another_process(tmp_path):
    source = build(write_shards(tmp_path)).train_dataset.source
    assert len(samples(source)) == COUNTS["train"]
    sent = pickle.loads(bytes(ForkingPickler.dumps(source)))
    assert (len(source._files), len(sent._files)) == (4, 0)
    sent._samples["target"][0] = 9
    assert source.targets[0] == 9


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_KEPT_OPEN", 2)
    source = build(write_shards(tmp_path, per_shard=1)).train_dataset.source
    before = len(os.listdir("/proc/self/fd"))
    whole = samples(source)
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    assert samples(source)[::-1] == [(pixels(source[i][0]), source[i][1]) for i in reversed(range(len(source)))]
    assert len(whole) == COUNTS["train"]


# Training


def keys(loader):
    return [[index for index, _ in batch] for batch in loader.batch_sampler]


def test_epoch_takes_every_image_once_from_a_few_shards_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("effbackbones.data.sampler.PARTS_TOGETHER", 2)
    data = build(write_shards(tmp_path))
    order = [index for batch in keys(data.train_dataloader()) for index in batch]
    assert sorted(order) == list(range(COUNTS["train"]))
    assert [len({index // 3 for index in order[start : start + 6]}) for start in (0, 6)] == [2, 2]


def test_batches_are_bit_identical_with_and_without_workers(tmp_path):
    root = write_shards(tmp_path)
    alone, with_workers = (build(root, workers=workers).train_dataloader() for workers in (0, 2))
    pairs = list(zip(alone, with_workers, strict=True))
    assert len(pairs) == 6
    assert all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def test_fewer_shards_than_nodes_are_an_error(tmp_path):
    config = DataConfig(source="shards", root=str(write_shards(tmp_path)), split_by_node=True)
    with pytest.raises(DataError, match=r"data\.split_by_node: 4 shards in data.train_shards for 5 nodes"):
        build_data(config, AugmentConfig(), seed=0, nodes=5)
