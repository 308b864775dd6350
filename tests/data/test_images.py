"""Reading images: right pixels, or an error that names the file."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from effbackbones.data.errors import BadImageError
from effbackbones.data.images import load_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header promises so many pixels and whose data are few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(format: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(file, format, **options)
    return file.getvalue()


def frames(format: str) -> bytes:
    return saved(format, save_all=True, append_images=[Image.fromarray(255 - NOISE)])


BROKEN = {
    "bomb of an error in Pillow": (png_of_size(100_000, 100_000), "DecompressionBombError"),
    "bomb of a warning in Pillow": (png_of_size(10_000, 10_000), "DecompressionBombWarning"),
    "less data than the header says": (png_of_size(100, 100), "truncated"),
    "truncated": (saved("jpeg")[:1000], "truncated"),
    "empty": (b"", "UnidentifiedImageError"),
    "text": (b"not an image", "UnidentifiedImageError"),
    "animated gif": (frames("gif"), "2 frames, expected one"),
    "animated png": (frames("png"), "2 frames, expected one"),
    "animated webp": (frames("webp"), "2 frames, expected one"),
    "pages of tiff": (frames("tiff"), "2 frames, expected one"),
    "16 bits": (saved("png", Image.fromarray(np.full((4, 4), 300, np.uint16))), "mode I;16, expected 8 bits"),
    "floating point": (saved("tiff", Image.fromarray(np.ones((4, 4), np.float32))), "mode F, expected 8 bits"),
    "postscript": (saved("eps"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_image_is_an_error_that_names_it_and_no_warning(tmp_path, case):
    content, reason = BROKEN[case]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(BadImageError, match=rf"image.png: cannot be read .*{reason}"):
            load_image(str(path))
    assert warned == []


def test_postscript_is_not_interpreted_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: (tmp_path / "trace").touch())
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: (tmp_path / "trace").touch())
    path = tmp_path / "image.jpg"
    path.write_bytes(saved("eps"))
    with pytest.raises(BadImageError):
        load_image(str(path))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("format", ["png", "bmp", "ppm", "tiff"])
def test_image_is_read_whole_whatever_its_name(tmp_path, format):
    path = tmp_path / "image.jpg"
    path.write_bytes(saved(format))
    assert np.array_equal(np.asarray(load_image(str(path))), NOISE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_image_of_any_mode_is_read_as_rgb(mode):
    image = Image.fromarray(NOISE).convert("L").convert(mode) if mode == "LA" else Image.fromarray(NOISE).convert(mode)
    format = {"LA": "png", "YCbCr": "jpeg"}.get(mode, "tiff")
    read = load_image(io.BytesIO(saved(format, image)), "an image")
    assert (read.mode, read.size) == ("RGB", (48, 40))
    if format != "jpeg":
        assert np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))


def test_photograph_with_previews_is_its_first_picture():
    file = io.BytesIO(frames("mpo"))
    assert Image.open(file).n_frames == 2
    read = np.asarray(load_image(file), int)
    first, second = (np.abs(read - pixels).mean() for pixels in (NOISE.astype(int), 255 - NOISE.astype(int)))
    assert first < second


def test_image_is_turned_upright_where_asked():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    content = saved("png", exif=exif)
    assert load_image(io.BytesIO(content)).size == (48, 40)
    upright = load_image(io.BytesIO(content), upright=True)
    assert np.array_equal(np.asarray(upright), np.rot90(NOISE, -1))


def test_error_names_an_open_file_as_it_is_told():
    with pytest.raises(BadImageError, match=r"^shard 3: 07\.png: cannot be read"):
        load_image(io.BytesIO(b"x"), "shard 3: 07.png")
