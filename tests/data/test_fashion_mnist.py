import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import build_data
from effbackbones.data.errors import DataError
from effbackbones.data.fashion_mnist import FashionMnist, read_idx

ROOT = Path(__file__).parents[2] / "data" / "fashion-mnist"


def write_idx(path, array, magic=None, shape=None):
    shape = array.shape if shape is None else shape
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape) if magic is None else magic, *shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def root(tmp_path):
    """A dataset of 6 images for either split."""
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", np.arange(6 * 784).reshape(6, 28, 28).astype(np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.array([9, 0, 3, 1, 2, 5], np.uint8))
    return tmp_path


@pytest.mark.parametrize(("split", "count"), [("train", 10000), ("t10k", 2000)])
def test_shipped_files_hold_the_expected_images_and_labels(split, count):
    source = FashionMnist(ROOT, split)
    labels = gzip.decompress((ROOT / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = np.frombuffer(gzip.decompress((ROOT / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    assert len(source) == count
    for index in (0, 1, 77, count - 1):
        image, target = source[index]
        grey = pixels[index * 784 : (index + 1) * 784].reshape(28, 28, 1)
        assert target == labels[index]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), grey.repeat(3, axis=2))


def test_default_root_is_the_data_that_ships_with_the_package():
    data = build_data(DataConfig(source="fashion_mnist", size=32), AugmentConfig(), seed=0)
    assert (len(data.train_dataset), len(data.val_dataset)) == (10000, 2000)
    assert len(data.classes) == 10
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"


def test_missing_file_is_an_error_that_names_it(root):
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: no such file; set data.root"):
        FashionMnist(root, "t10k")


def test_truncated_gzip_is_an_error_that_names_it(root):
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: expected a whole gzip file"):
        FashionMnist(root, "train")


def test_altered_gzip_is_an_error_that_names_it(root):
    path = root / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: expected a whole gzip file"):
        FashionMnist(root, "train")


def test_file_that_is_not_gzip_is_an_error_that_names_it(root):
    (root / "train-labels-idx1-ubyte.gz").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: expected a whole gzip file"):
        FashionMnist(root, "train")


@pytest.mark.parametrize("magic", [0x0801, 0x0D03, 0x01000803])
def test_wrong_magic_number_is_an_error(tmp_path, magic):
    write_idx(tmp_path / "a.gz", np.zeros((2, 28, 28), np.uint8), magic=magic)
    with pytest.raises(DataError, match=rf"a.gz: begins with {magic:08x}, expected the idx magic number 00000803"):
        read_idx(tmp_path / "a.gz", ndim=3)


def test_header_that_is_cut_off_is_an_error(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes.fromhex("0000080300000002")))
    with pytest.raises(DataError, match=r"a.gz: 8 bytes, expected a header of 16"):
        read_idx(tmp_path / "a.gz", ndim=3)


@pytest.mark.parametrize("count", [1, 3])
def test_byte_count_that_contradicts_the_header_is_an_error(tmp_path, count):
    write_idx(tmp_path / "a.gz", np.zeros((2, 28, 28), np.uint8), shape=(count, 28, 28))
    with pytest.raises(DataError, match=rf"a.gz: 1568 bytes of data, expected {count * 784} for the shape"):
        read_idx(tmp_path / "a.gz", ndim=3)


def test_label_count_that_contradicts_the_images_is_an_error(root):
    write_idx(root / "train-labels-idx1-ubyte.gz", np.zeros(5, np.uint8))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: 5 labels, expected 6"):
        FashionMnist(root, "train")


def test_label_out_of_range_is_an_error(root):
    write_idx(root / "train-labels-idx1-ubyte.gz", np.array([0, 1, 10, 3, 4, 5], np.uint8))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: label 10, expected 0 to 9"):
        FashionMnist(root, "train")


def test_images_of_another_size_are_an_error(root):
    write_idx(root / "train-images-idx3-ubyte.gz", np.zeros((6, 32, 32), np.uint8))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: images of \(32, 32\) pixels, expected"):
        FashionMnist(root, "train")
