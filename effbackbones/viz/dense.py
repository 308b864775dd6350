"""Pictures of detection and segmentation: boxes, instance masks, class overlays, and sheets of them."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from effbackbones.files import replacing
from effbackbones.viz.curves import INK

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SMALL = 400  # pixels: an image with a shorter long side is enlarged until text is readable on it
MASK_OPACITY = 0.45
LEGEND_CLASSES = 12
SHEET_SIDE = 720  # pixels: a larger picture is shrunk on a contact sheet

# Okabe & Ito, "Color Universal Design", 2008: seven colours that stay apart with every kind of colour vision.
_OKABE_ITO = ["#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#e69f00"]
# Machado et al. 2009, severity 1: linear RGB as seen with normal, protanopic and deuteranopic vision.
_VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# Red and green look nearly alike to the other two, who would have colours of blues and yellows alone: a distance
# counts less with normal vision, which then has to be larger.
_WEIGHTS_V1 = np.array([[0.4], [1], [1]])
# Ottosson, "A perceptual color space for image processing", 2020: linear RGB to cone responses to OKLab.
_TO_LMS = np.array(
    [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
)
_TO_LAB = np.array(
    [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
)


@lru_cache(maxsize=8)
def palette(n: int) -> np.ndarray:
    """Return `n` RGB colours, (n, 3) uint8, read-only: the first k are the same whatever `n` is.

    The first seven are Okabe and Ito's. Each further one is, of a grid that leaves out what is nearly black, white or
    grey, the colour farthest from those before it, to whichever kind of colour vision tells them apart worst. Beyond
    some 2900, colours recur.
    """
    grid_n3 = np.array(np.meshgrid(*[np.arange(0, 256, 17)] * 3, indexing="ij")).reshape(3, -1).T
    lightness, *chroma = _seen(grid_n3)[0].T
    grid_n3 = grid_n3[(lightness > 0.4) & (lightness < 0.92) & (np.hypot(*chroma) > 0.1)]
    chosen = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in _OKABE_ITO]

    seen_vn3 = _seen(grid_n3)
    nearest = np.full(len(grid_n3), np.inf)
    for index in range(min(n, len(_OKABE_ITO) + len(grid_n3))):
        if index == len(chosen):
            chosen.append(grid_n3[nearest.argmax()].tolist())
        apart_vn = np.linalg.norm(seen_vn3 - _seen(np.array(chosen[index : index + 1])), axis=-1)
        nearest = np.minimum(nearest, (_WEIGHTS_V1 * apart_vn).min(axis=0))
    colors = np.resize(np.array(chosen, np.uint8)[: max(n, 1)], (n, 3))
    colors.flags.writeable = False
    return colors


def draw_boxes(
    image_hwc: np.ndarray,
    boxes_k4: np.ndarray,
    labels_k: np.ndarray,
    scores_k: np.ndarray | None,
    classes: Sequence[str],
    masks_khw: np.ndarray | None = None,
) -> Image.Image:
    """Draw every box with its class and score, and its instance mask, in the colour of its class.

    A small image is enlarged by a whole factor. Choosing the boxes worth drawing is left to the caller.

    Args:
        image_hwc: RGB, uint8.
        boxes_k4: x1, y1, x2, y2 in pixels of the image; what lies outside it is cut off.
        labels_k: class indices.
        scores_k: 0 to 1; None leaves them out.
        classes: the names.
        masks_khw: bool; None draws the boxes alone.

    Raises:
        ValueError: the shapes do not belong together, a label is beyond the classes, or a box is no box.
    """
    _check_image(image_hwc)
    boxes_k4, labels_k = np.asarray(boxes_k4, float), np.asarray(labels_k)
    count = len(labels_k)
    _expect("labels", labels_k, (count,), "a class index per box")
    _expect("boxes", boxes_k4, (count, 4), "x1, y1, x2, y2 per label")
    if scores_k is not None:
        _expect("scores", np.asarray(scores_k), (count,), "a score per box")
    if masks_khw is not None:
        _expect("masks", masks_khw, (count, *image_hwc.shape[:2]), "a mask of the image's size per box")
        if masks_khw.dtype != bool:
            raise ValueError(f"masks of type {masks_khw.dtype}; expected bool, such as `masks > 0.5`")
    _check_labels(labels_k, classes)
    sound = np.isfinite(boxes_k4).all(axis=1) & (boxes_k4[:, :2] <= boxes_k4[:, 2:]).all(axis=1)
    if not sound.all():
        index = int(sound.argmin())
        raise ValueError(f"box {index} is {boxes_k4[index].tolist()}; expected x1, y1, x2, y2 with x1 <= x2, y1 <= y2")

    picture, factor = _enlarged(image_hwc)
    line, font = _line(picture), _font(picture)
    colors_k3 = palette(len(classes))[labels_k.astype(int)]
    last = np.array(picture.size * 2) - 1
    corners_k4 = np.clip(np.rint(boxes_k4 * factor) - [0, 0, 1, 1], 0, last).astype(int)
    corners_k4[:, 2:] = np.maximum(corners_k4[:, :2], corners_k4[:, 2:])

    small_last = np.argsort(-np.prod(boxes_k4[:, 2:] - boxes_k4[:, :2], axis=1), kind="stable")
    if masks_khw is not None:
        for index in small_last.tolist():
            _paint_mask(picture, masks_khw[index], factor, colors_k3[index], line)
    draw = ImageDraw.Draw(picture, "RGBA")
    casing = line // 2  # around a line, so that it also shows on ground of its own colour
    for index in small_last.tolist():
        box = corners_k4[index] + line // 2 * np.array([-1, -1, 1, 1])
        around = box + casing * np.array([-1, -1, 1, 1])
        contrast = 0 if _ink_on(colors_k3[index]) == "black" else 255
        draw.rectangle(around.tolist(), outline=(contrast, contrast, contrast, 130), width=line + 2 * casing)
        draw.rectangle(box.tolist(), outline=tuple(colors_k3[index].tolist()), width=line)

    captions = [classes[label] for label in labels_k]
    order = np.arange(count)
    if scores_k is not None:
        order = np.argsort(-np.asarray(scores_k, float), kind="stable")
        captions = [f"{name} {score:.0%}" for name, score in zip(captions, scores_k, strict=True)]
    pad = round(font.size * 0.3)
    taken = np.empty((0, 4), int)
    for index in order.tolist():
        text = _shortened(captions[index], font, picture.width - 2 * pad)
        size = math.ceil(font.getlength(text)) + 2 * pad, sum(font.getmetrics()) + pad // 2
        place = _free_place(size, corners_k4[index], taken, picture.size)
        taken = np.vstack([taken, place])
        color = colors_k3[index]
        left, top, right, bottom = place.tolist()
        draw.rectangle((left, top, right - 1, bottom - 1), fill=tuple(color.tolist()))
        draw.text((left + pad, (top + bottom) / 2), text, fill=_ink_on(color), font=font, anchor="lm")
    return picture


def draw_segmentation(
    image_hwc: np.ndarray, labels_hw: np.ndarray, classes: Sequence[str], opacity: float = 0.55, ignore: int = 255
) -> Image.Image:
    """Lay the colour of each pixel's class over the image, with class boundaries, and a legend below.

    The legend names the 12 largest classes and their shares of the image's pixels. A small image is enlarged by a
    whole factor.

    Args:
        image_hwc: RGB, uint8.
        labels_hw: class indices.
        classes: the names.
        opacity: of the colours, 0 to 1.
        ignore: label of pixels without a class, which stay as they are.

    Raises:
        ValueError: the shapes do not belong together, or a label is beyond the classes.
    """
    _check_image(image_hwc)
    labels_hw = np.asarray(labels_hw)
    _expect("labels", labels_hw, image_hwc.shape[:2], "a class index per pixel")
    known_hw = labels_hw != ignore
    _check_labels(labels_hw[known_hw], classes)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity {opacity}; expected 0 to 1")

    picture, factor = _enlarged(image_hwc)
    drawn_hw = _enlarged_labels(labels_hw, factor)
    drawn_known_hw = drawn_hw != ignore
    colors_hw3 = palette(len(classes))[np.where(drawn_known_hw, drawn_hw, 0)]
    picture.paste(Image.fromarray(colors_hw3), mask=_gray(255 * opacity * drawn_known_hw))
    edges_hw = np.zeros(drawn_hw.shape)
    edges_hw[:, 1:] += drawn_hw[:, 1:] != drawn_hw[:, :-1]
    edges_hw[1:] += drawn_hw[1:] != drawn_hw[:-1]
    thickness = _line(picture) // 3 | 1  # odd, as the filter wants it
    picture.paste("white", mask=_gray(230 * edges_hw.clip(max=1)).filter(ImageFilter.MaxFilter(thickness)))
    return _with_legend(picture, labels_hw[known_hw], labels_hw.size, classes)


def contact_sheet(
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    titles: tuple[str, str] = ("prediction", "ground truth"),
    columns: int = 2,
) -> Image.Image:
    """Put pairs of pictures beside each other under their titles, `columns` pairs to a row; large ones are shrunk.

    Raises:
        ValueError: no pairs, or `columns` below 1.
    """
    if not pairs or columns < 1:
        raise ValueError(f"{len(pairs)} pairs in {columns} columns; expected at least one of each")
    cells = [[_shrunk(picture) for picture in pair] for pair in pairs]
    columns = min(columns, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width = max(picture.width for pair in cells for picture in pair)
    heights = [max(picture.height for pair in row for picture in pair) for row in rows]

    gap, between = 8, 28  # pixels: within a pair, around pairs
    font = _font_of(18)
    header = between + sum(font.getmetrics())
    pair_width = 2 * width + gap + between
    size = between + columns * pair_width, header + gap + sum(heights) + between * len(rows)
    sheet = Image.new("RGB", size, "#eeeeee")
    draw = ImageDraw.Draw(sheet)
    for side, title in enumerate(titles):
        for column in range(columns):
            x = between + column * pair_width + side * (width + gap)
            draw.text((x, header), _shortened(title, font, width), fill=INK, font=font, anchor="ld")
    top = header + gap
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            for side, picture in enumerate(pair):
                x = between + column * pair_width + side * (width + gap)
                sheet.paste(picture, (x, top))
        top += height + between
    return sheet


def save_picture(image: Image.Image, out: Path) -> None:
    """Write a picture in one go, so that nobody meets a half-written one; `out`'s ending says in which format.

    Raises:
        ValueError: the ending names no format.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{out}: the ending {out.suffix!r} names no picture format; expected one of {', '.join(FORMATS)}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        # For JPEG, whose defaults blur thin coloured lines.
        image.save(part, format=FORMATS[out.suffix.lower()], quality=95, subsampling=0)


def _check_image(image_hwc: np.ndarray) -> None:
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.size == 0 or image_hwc.dtype != np.uint8:
        given = f"an image of shape {image_hwc.shape} and type {image_hwc.dtype}"
        raise ValueError(f"{given}; expected (H, W, 3) with a pixel at least, RGB, uint8")


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} of shape {array.shape}; expected {shape}, {meaning}")


def _check_labels(labels: np.ndarray, classes: Sequence[str]) -> None:
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of type {labels.dtype}; expected class indices, integers")
    beyond = labels[(labels < 0) | (labels >= len(classes))]
    if beyond.size:
        raise ValueError(
            f"label {beyond[0]}; expected 0 to {len(classes) - 1}, an index into the {len(classes)} classes"
        )


def _seen(colors_n3: np.ndarray) -> np.ndarray:
    """Return sRGB colours, 0 to 255, in OKLab as each kind of vision sees them, (visions, n, 3)."""
    linear_vn3 = (_linear(colors_n3) @ _VISIONS.transpose(0, 2, 1)).clip(0)
    return np.cbrt(linear_vn3 @ _TO_LMS.T) @ _TO_LAB.T


def _linear(colors: np.ndarray) -> np.ndarray:
    """Return sRGB colours, 0 to 255, as light, 0 to 1."""
    return np.where(colors > 10, ((colors / 255 + 0.055) / 1.055) ** 2.4, colors / 255 / 12.92)


def _ink_on(color_3: np.ndarray) -> str:
    """Return the one of black and white that is easier to read on `color_3`: 4.5 : 1 at least (WCAG 2, contrast)."""
    return "black" if _linear(color_3) @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"


def _enlarged(image_hwc: np.ndarray) -> tuple[Image.Image, int]:
    """Return the image, enlarged if it is small, and the factor."""
    image = Image.fromarray(image_hwc)
    factor = math.ceil(SMALL / max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC), factor


def _enlarged_labels(labels_hw: np.ndarray, factor: int) -> np.ndarray:
    """Return the labels enlarged as the image is: of the classes around, each pixel takes the one that weighs most."""
    if factor == 1:
        return labels_hw
    size = factor * labels_hw.shape[1], factor * labels_hw.shape[0]
    labels = np.unique(labels_hw)
    weights = [_gray(255 * (labels_hw == label)).resize(size, Image.Resampling.BILINEAR) for label in labels]
    return labels[np.argmax(np.stack([np.asarray(weight) for weight in weights]), axis=0)]


def _line(picture: Image.Image) -> int:
    return max(2, round(max(picture.size) / 220))


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    return _font_of(max(12, round(max(picture.size) / 46)))


@lru_cache(maxsize=16)
def _font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font: it is on every machine, and has letters of most alphabets."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return `text` on one line, cut off where it would be wider than `width` pixels."""
    text = " ".join(text.split())
    kept = len(text)
    while kept and font.getlength(text) > width:
        kept -= 1
        text = text[:kept].rstrip() + "…"
    return text


def _paint_mask(picture: Image.Image, mask_hw: np.ndarray, factor: int, color_3: np.ndarray, line: int) -> None:
    """Tint the mask's pixels and draw its outline, both with soft edges."""
    rows, columns = mask_hw.any(axis=1).nonzero()[0], mask_hw.any(axis=0).nonzero()[0]
    if not rows.size:
        return
    margin = 2 + math.ceil(2 * line / factor)  # pixels of the image, to leave room for the outline
    top, left = rows[0] - margin, columns[0] - margin
    crop_hw = np.pad(mask_hw[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], margin)
    mask = Image.fromarray(crop_hw.astype(np.uint8) * 255)
    mask = mask.resize((factor * mask.width, factor * mask.height), Image.Resampling.BICUBIC)
    soft_hw = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.45 * line)), np.float32) / 255
    outline_hw = 4 * soft_hw * (1 - soft_hw)  # 1 on the mask's edge, about a line wide
    alpha_hw = np.maximum(MASK_OPACITY * soft_hw, outline_hw)
    at = (factor * int(left), factor * int(top))
    picture.paste(tuple(color_3.tolist()), (*at, at[0] + mask.width, at[1] + mask.height), _gray(255 * alpha_hw))


def _gray(values_hw: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values_hw).astype(np.uint8))


def _free_place(size: tuple[int, int], box_4: np.ndarray, taken_n4: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Return where at a box a caption lies inside the image and covers least of the captions in `taken_n4`."""
    width, height = size
    left, top, right, bottom = box_4
    places = [
        (x, y)
        for x in (left, right + 1 - width)
        for y in (top - height, top, bottom + 1, bottom + 1 - height)  # above, inside, below, inside
    ]
    corners_p2 = np.clip(places, 0, np.maximum(np.subtract(limits, size), 0))
    places_p14 = np.hstack([corners_p2, corners_p2 + size])[:, None]
    shared_pn2 = np.minimum(places_p14[..., 2:], taken_n4[:, 2:]) - np.maximum(places_p14[..., :2], taken_n4[:, :2])
    covered_p = shared_pn2.clip(0).prod(axis=-1).sum(axis=-1)
    return places_p14[covered_p.argmin(), 0]


def _with_legend(picture: Image.Image, labels: np.ndarray, pixels: int, classes: Sequence[str]) -> Image.Image:
    """Return the picture over a strip that names the largest classes."""
    counts = np.bincount(labels, minlength=len(classes))
    largest = [index for index in np.argsort(-counts, kind="stable")[:LEGEND_CLASSES].tolist() if counts[index]]
    font = _font(picture)
    swatch = round(font.size)
    pad, row = round(0.7 * swatch), round(1.6 * swatch)
    width = max(picture.width, 14 * swatch)
    room = width - 3 * pad - swatch
    entries = []
    for index in largest:
        share = f"  {counts[index] / pixels:.1%}"
        entries.append((index, _shortened(classes[index], font, room - font.getlength(share)) + share))
    widest = max((font.getlength(text) for _, text in entries), default=0)
    columns = max(1, int((width - pad) // (widest + 3 * pad + swatch)))
    strip = math.ceil(len(entries) / columns) * row + 2 * pad if entries else 0
    whole = Image.new("RGB", (width, picture.height + strip), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for number, (index, text) in enumerate(entries):
        x = pad + (number % columns) * ((width - pad) // columns)
        y = picture.height + pad + (number // columns) * row + row // 2
        square = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        draw.rectangle(square, fill=tuple(palette(len(classes))[index].tolist()), outline=INK)
        draw.text((x + swatch + pad, y), text, fill=INK, font=font, anchor="lm")
    return whole


def _shrunk(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    return picture
