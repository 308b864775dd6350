from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effbackbones.viz import dense
from effbackbones.viz.dense import contact_sheet, draw_boxes, draw_segmentation, palette, save_picture

CLASSES = ["cat", "dog", "bird"]
GREY = np.full((480, 640, 3), 128, np.uint8)
WHITE = np.full((480, 640, 3), 255, np.uint8)
BOX = np.array([[100, 200, 300, 400]])
NONE = np.zeros(0, int)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def near(pixel: np.ndarray, color: np.ndarray, within: int = 2) -> bool:
    return bool(np.abs(pixel - color.astype(float)).max() <= within)


def is_ground(picture_hwc: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
    return (picture_hwc == image_hwc).all(axis=-1)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Collect the rectangles of the captions, in the order they are placed."""
    places: list[tuple[int, int, int, int]] = []
    find = dense._free_place

    def record(*given: object) -> np.ndarray:
        place = find(*given)
        places.append(tuple(place.tolist()))
        return place

    monkeypatch.setattr(dense, "_free_place", record)
    return places


def test_palette_first_colours_are_the_same_for_any_number() -> None:
    np.testing.assert_array_equal(palette(200)[:12], palette(12))


def test_palette_colours_are_distinct_with_every_vision() -> None:
    seen_vn3 = dense._seen(palette(80))
    apart_vnn = np.linalg.norm(seen_vn3[:, :, None] - seen_vn3[:, None], axis=-1) + np.eye(80)
    assert apart_vnn[0].min() > 0.05  # OKLab: 0.02 is about a just noticeable difference
    assert apart_vnn.min() > 0.02


def test_palette_beyond_its_colours_repeats_them() -> None:
    colors = palette(4000)
    assert colors.shape == (4000, 3)
    assert colors.dtype == np.uint8
    (again,) = (colors[1:] == colors[0]).all(axis=1).nonzero()
    np.testing.assert_array_equal(colors[again[0] + 1 :], colors[: 4000 - again[0] - 1])


def test_seen_grey_is_grey_to_every_vision() -> None:
    seen_vn3 = dense._seen(np.array([[255, 255, 255], [119, 119, 119]]))
    np.testing.assert_allclose(seen_vn3[..., 1:], 0, atol=1e-3)
    np.testing.assert_allclose(seen_vn3[:, 0, 0], 1, atol=1e-3)


def test_ink_on_every_colour_of_the_palette_is_readable() -> None:
    for color in palette(300):
        luminance = dense._linear(color) @ [0.2126, 0.7152, 0.0722]
        ink = 0 if dense._ink_on(color) == "black" else 1
        lighter, darker = max(ink, luminance), min(ink, luminance)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_draw_boxes_line_has_the_colour_of_its_class_at_the_edges() -> None:
    picture = pixels(draw_boxes(GREY, BOX, np.array([2]), None, CLASSES))
    for x, y in [(100, 300), (299, 300), (250, 399)]:
        assert near(picture[y, x], palette(3)[2])
    assert is_ground(picture, GREY)[230:390, 110:290].all()
    assert is_ground(picture, GREY)[:, 305:].all()


def test_draw_boxes_line_shows_on_ground_of_its_own_colour() -> None:
    ground = np.broadcast_to(palette(3)[0], GREY.shape).copy()
    picture = pixels(draw_boxes(ground, BOX, np.array([0]), None, CLASSES))
    assert (~is_ground(picture, ground))[300].sum() >= 4


def test_draw_boxes_mask_tints_its_pixels_alone() -> None:
    mask_hw = np.zeros((480, 640), bool)
    mask_hw[250:350, 150:250] = True
    picture = pixels(draw_boxes(GREY, BOX, np.array([1]), None, CLASSES, mask_hw[None]))
    assert near(picture[300, 200], (1 - dense.MASK_OPACITY) * 128 + dense.MASK_OPACITY * palette(3)[1])
    assert near(picture[300, 150], palette(3)[1], within=10)
    assert (picture[300, 160:240] == picture[300, 160]).all()
    assert is_ground(picture, GREY)[230:240, 110:290].all()


def test_draw_boxes_mask_at_the_border_and_an_empty_mask_are_drawn() -> None:
    masks_khw = np.zeros((2, 480, 640), bool)
    masks_khw[0, 400:, 600:] = True
    boxes_k4 = np.array([[600, 400, 640, 480], [10, 100, 10, 100]])
    picture = pixels(draw_boxes(GREY, boxes_k4, np.array([0, 1]), None, CLASSES, masks_khw))
    assert near(picture[440, 620], (1 - dense.MASK_OPACITY) * 128 + dense.MASK_OPACITY * palette(3)[0])


def test_draw_boxes_scores_lengthen_the_caption(captions: list[tuple[int, int, int, int]]) -> None:
    draw_boxes(GREY, BOX, np.array([0]), None, CLASSES)
    draw_boxes(GREY, BOX, np.array([0]), np.array([0.9]), CLASSES)
    (left, _, right, bottom), (left_scored, _, right_scored, _) = captions
    assert (left, left_scored, bottom) == (100, 100, 200)
    assert right_scored > right


@pytest.mark.parametrize("box", [(0, 0, 640, 480), (600, 2, 640, 60), (-50, 470, 3, 500), (639, 479, 700, 600)])
def test_draw_boxes_captions_stay_inside_the_image(
    captions: list[tuple[int, int, int, int]], box: tuple[int, ...]
) -> None:
    names = ["W" * 200, "cat"]
    draw_boxes(GREY, np.array([box, box]), np.array([0, 1]), np.array([1.0, 0.5]), names)
    for left, top, right, bottom in captions:
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480


def test_draw_boxes_captions_of_close_boxes_do_not_overlap(captions: list[tuple[int, int, int, int]]) -> None:
    boxes_k4 = BOX + np.arange(4)[:, None] * 3
    draw_boxes(GREY, boxes_k4, np.zeros(4, int), np.array([0.5, 0.9, 0.8, 0.7]), CLASSES)
    covered = np.zeros((480, 640), int)
    for left, top, right, bottom in captions:
        covered[top:bottom, left:right] += 1
    assert covered.max() == 1


def test_draw_boxes_most_certain_caption_is_placed_first(captions: list[tuple[int, int, int, int]]) -> None:
    boxes_k4 = np.array([[10, 100, 100, 200], [300, 100, 400, 200]])
    draw_boxes(GREY, boxes_k4, np.array([0, 1]), np.array([0.5, 0.9]), CLASSES)
    assert [left for left, *_ in captions] == [300, 10]


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 20), (260, 416)), ((399, 200), (400, 798)), ((300, 400), (400, 300)), ((1, 1), (400, 400))],
)
def test_draw_boxes_small_image_is_enlarged_by_a_whole_factor(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image_hwc = np.zeros((*shape, 3), np.uint8)
    assert draw_boxes(image_hwc, np.zeros((0, 4)), NONE, None, CLASSES).size == size


def test_draw_boxes_small_image_boxes_are_enlarged_with_it() -> None:
    picture = pixels(draw_boxes(GREY[:40, :40], np.array([[10, 20, 30, 38]]), np.array([0]), None, CLASSES))
    assert near(picture[290, 100], palette(3)[0])
    assert near(picture[290, 299], palette(3)[0])
    assert near(picture[379, 200], palette(3)[0])


def test_draw_boxes_large_image_has_larger_captions(captions: list[tuple[int, int, int, int]]) -> None:
    for scale in (1, 4):
        draw_boxes(GREY.repeat(scale, axis=0).repeat(scale, axis=1), BOX * scale, np.array([0]), None, CLASSES)
    small, large = ((right - left, bottom - top) for left, top, right, bottom in captions)
    assert large == pytest.approx([4 * length for length in small], rel=0.1)


def test_draw_boxes_without_boxes_is_the_image() -> None:
    picture = draw_boxes(GREY, np.zeros((0, 4)), NONE, np.zeros(0), CLASSES, np.zeros((0, 480, 640), bool))
    np.testing.assert_array_equal(picture, GREY)


def test_draw_boxes_leaves_its_image_alone() -> None:
    image_hwc = GREY.copy()
    draw_boxes(image_hwc, BOX, np.array([0]), None, CLASSES, np.ones((1, 480, 640), bool))
    np.testing.assert_array_equal(image_hwc, GREY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_hwc": GREY[..., 0]}, r"image of shape \(480, 640\) and type uint8; expected \(H, W, 3\)"),
        ({"image_hwc": GREY[:0]}, r"image of shape \(0, 640, 3\)"),
        ({"image_hwc": GREY / 255}, "type float64; expected .* uint8"),
        ({"boxes_k4": BOX[:, :3]}, r"boxes of shape \(1, 3\); expected \(1, 4\)"),
        ({"boxes_k4": np.zeros((2, 4))}, r"boxes of shape \(2, 4\); expected \(1, 4\)"),
        (
            {"boxes_k4": np.array([[300, 200, 100, 400]])},
            r"box 0 is \[300.0, .*; expected x1, y1, x2, y2 with x1 <= x2",
        ),
        ({"boxes_k4": np.full((1, 4), np.nan)}, "box 0 is .*nan"),
        ({"labels_k": np.array([[1]])}, r"labels of shape \(1, 1\); expected \(1,\)"),
        ({"labels_k": np.array([3])}, "label 3; expected 0 to 2, an index into the 3 classes"),
        ({"labels_k": np.array([-1])}, "label -1"),
        ({"labels_k": np.array([0.5])}, "labels of type float64; expected class indices"),
        ({"scores_k": np.zeros(2)}, r"scores of shape \(2,\); expected \(1,\)"),
        ({"masks_khw": np.zeros((1, 48, 64), bool)}, r"masks of shape \(1, 48, 64\); expected \(1, 480, 640\)"),
        ({"masks_khw": np.zeros((1, 480, 640))}, "masks of type float64; expected bool"),
    ],
)
def test_draw_boxes_what_does_not_belong_together_raises_value_error(change: dict, message: str) -> None:
    given = {"image_hwc": GREY, "boxes_k4": BOX, "labels_k": np.array([0]), "scores_k": None, "classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        draw_boxes(**(given | change))


def halves(left: int, right: int) -> np.ndarray:
    labels_hw = np.full((480, 640), left)
    labels_hw[:, 320:] = right
    return labels_hw


def test_draw_segmentation_mixes_image_and_class_by_opacity() -> None:
    picture = pixels(draw_segmentation(GREY, halves(0, 2), CLASSES, opacity=0.25))
    assert near(picture[100, 100], 0.75 * 128 + 0.25 * palette(3)[0])
    assert near(picture[100, 500], 0.75 * 128 + 0.25 * palette(3)[2])


def test_draw_segmentation_draws_a_thin_light_line_between_classes() -> None:
    row = pixels(draw_segmentation(GREY, halves(0, 2), CLASSES))[100]
    bright = (row.min(axis=-1) > 200).nonzero()[0]
    assert 1 <= len(bright) <= 3
    assert abs(bright.mean() - 320) <= 1


def test_draw_segmentation_ignored_pixels_stay_as_they_are() -> None:
    picture = pixels(draw_segmentation(GREY, halves(255, 1), CLASSES))
    assert is_ground(picture[:480], GREY)[:, :310].all()
    assert not is_ground(picture[:480], GREY)[:, 330:].any()


def test_draw_segmentation_all_ignored_has_no_legend() -> None:
    np.testing.assert_array_equal(draw_segmentation(GREY, halves(255, 255), CLASSES), GREY)


def test_draw_segmentation_legend_lists_the_largest_classes_with_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    draw = dense.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        dense.ImageDraw.ImageDraw, "text", lambda self, xy, text, **kw: (texts.append(text), draw(self, xy, text, **kw))
    )
    labels_hw = np.zeros((480, 640), np.uint8)
    labels_hw[:, 480:] = 2
    labels_hw[:120, :320] = 255
    labels_hw[-15:, :] = 3 + np.arange(640) // 40
    draw_segmentation(WHITE, labels_hw, [*CLASSES, *(f"class {index}" for index in range(3, 19))])
    assert len(texts) == dense.LEGEND_CLASSES
    assert texts[:3] == ["cat  60.2%", "bird  24.2%", "class 3  0.2%"]


def test_draw_segmentation_legend_shows_the_colours_below_the_picture() -> None:
    picture = pixels(draw_segmentation(WHITE, halves(0, 2), CLASSES, opacity=0))
    assert picture.shape[1] == 640
    legend = picture[480:].reshape(-1, 3).tolist()
    assert all(legend.count(color.tolist()) > 50 for color in palette(3)[[0, 2]])
    assert legend.count(palette(3)[1].tolist()) == 0


def test_draw_segmentation_narrow_image_has_room_for_long_names() -> None:
    picture = draw_segmentation(GREY[:, :20], np.zeros((480, 20), int), ["a class name as long as this"])
    assert picture.width >= 100


def test_draw_segmentation_small_image_is_enlarged_with_its_labels() -> None:
    labels_hw = np.zeros((40, 40), int)
    labels_hw[:, 20:] = 1
    picture = pixels(draw_segmentation(GREY[:40, :40], labels_hw, CLASSES, opacity=1))
    assert near(picture[200, 190], palette(3)[0])
    assert near(picture[200, 210], palette(3)[1])
    assert picture.shape[1] == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_hwc": GREY[..., :2]}, r"image of shape \(480, 640, 2\)"),
        ({"labels_hw": np.zeros((480, 641), int)}, r"labels of shape \(480, 641\); expected \(480, 640\)"),
        ({"labels_hw": np.full((480, 640), 3)}, "label 3; expected 0 to 2"),
        ({"labels_hw": np.zeros((480, 640))}, "labels of type float64"),
        ({"ignore": 254, "labels_hw": np.full((480, 640), 255)}, "label 255"),
        ({"opacity": 55}, "opacity 55; expected 0 to 1"),
    ],
)
def test_draw_segmentation_what_does_not_belong_together_raises_value_error(change: dict, message: str) -> None:
    given = {"image_hwc": GREY, "labels_hw": np.zeros((480, 640), int), "classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        draw_segmentation(**(given | change))


def plain(color: str, size: tuple[int, int] = (100, 60)) -> Image.Image:
    return Image.new("RGB", size, color)


def extent(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, ...]:
    """Return left, top, right and bottom of what has that colour."""
    ys, xs = (pixels(sheet) == color).all(axis=-1).nonzero()
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_contact_sheet_puts_each_prediction_beside_its_truth() -> None:
    sheet = contact_sheet([(plain("red"), plain("lime")), (plain("blue"), plain("yellow"))], columns=1)
    red, lime = extent(sheet, (255, 0, 0)), extent(sheet, (0, 255, 0))
    blue, yellow = extent(sheet, (0, 0, 255)), extent(sheet, (255, 255, 0))
    assert (red[2] - red[0], red[3] - red[1]) == (100, 60)
    assert (red[1], blue[1]) == (lime[1], yellow[1])
    assert red[2] < lime[0]
    assert (blue[0], yellow[0]) == (red[0], lime[0])
    assert red[3] < blue[1]


def test_contact_sheet_columns_put_pairs_beside_each_other() -> None:
    sheet = contact_sheet([(plain("red"), plain("lime")), (plain("blue"), plain("yellow"))], columns=2)
    assert extent(sheet, (255, 0, 0))[1] == extent(sheet, (0, 0, 255))[1]
    assert extent(sheet, (0, 255, 0))[2] < extent(sheet, (0, 0, 255))[0]


def test_contact_sheet_large_pictures_are_shrunk_and_keep_their_shape() -> None:
    sheet = contact_sheet([(plain("red", (2160, 1440)), plain("lime", (300, 500)))])
    left, top, right, bottom = extent(sheet, (255, 0, 0))
    assert (right - left, bottom - top) == (720, 480)
    left, top, right, bottom = extent(sheet, (0, 255, 0))
    assert (right - left, bottom - top) == (300, 500)


def test_contact_sheet_titles_stand_above_the_pictures() -> None:
    pair = plain("red"), plain("lime")
    shown, untitled = (pixels(contact_sheet([pair], titles=titles)) for titles in (("before", "after"), ("", "")))
    ys, xs = (shown != untitled).any(axis=-1).nonzero()
    red, lime = extent(contact_sheet([pair]), (255, 0, 0)), extent(contact_sheet([pair]), (0, 255, 0))
    assert ys.max() < red[1]
    assert red[0] <= xs.min() < red[2]
    assert lime[0] < xs.max() <= lime[2]


@pytest.mark.parametrize(("pairs", "columns"), [(0, 2), (1, 0)])
def test_contact_sheet_without_pairs_or_columns_raises_value_error(pairs: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs in {columns} columns"):
        contact_sheet([(plain("red"), plain("lime"))] * pairs, columns=columns)


@pytest.mark.parametrize(
    ("name", "format"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_save_picture_ending_selects_the_format(tmp_path: Path, name: str, format: str) -> None:
    save_picture(plain("red"), tmp_path / "new" / name)
    with Image.open(tmp_path / "new" / name) as image:
        assert (image.format, image.size) == (format, (100, 60))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize(("name", "ending"), [("a.txt", "'.txt'"), ("a", "''")])
def test_save_picture_unknown_ending_raises_value_error(tmp_path: Path, name: str, ending: str) -> None:
    with pytest.raises(ValueError, match=f"ending {ending} names no picture format; expected one of .png"):
        save_picture(plain("red"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_save_picture_that_fails_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def fail(self: Image.Image, path: Path, **given: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(plain("red"), out)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]
