"""Reading an image, whatever it lies in: the one place where files of others are decoded."""

import warnings
from typing import IO

from PIL import Image, ImageOps

from effbackbones.data.errors import BadImageError

# Pictures of pixels only: Pillow gives an EPS file, whatever its name, to Ghostscript, which runs it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

# Modes of 8 bits a channel. Pillow clips the others (I;16, I, F) to 255, which leaves white where there was a picture.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def load_image(file: str | IO[bytes], name: str = "", upright: bool = False) -> Image.Image:
    """Read an image as RGB.

    Args:
        file: A path, or an open file.
        name: What an error calls the image; by default the path.
        upright: Turn it as its EXIF orientation says, which mm does and torchvision does not.

    Raises:
        BadImageError: It cannot be read, whatever the reason: a file that is damaged or no image, more pixels than
            Pillow's bound against decompression bombs, several frames, or samples of more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                _check(image)
                return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on damaged files
        reason = f"{type(error).__name__}: {error}"
        raise BadImageError(f"{name or file}: cannot be read as an image ({reason})") from error


def _check(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its previews
        raise ValueError(f"{frames} frames, expected one: save the one that is meant")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel: convert it, its range is not known here")
