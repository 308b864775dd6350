"""Class maps."""

import pytest
from timm.data import ImageNetInfo

from effbackbones.data.classes import imagenet_classes, read_class_map, what_classes_show
from effbackbones.data.errors import DataError


def test_imagenet_classes_are_those_of_timm_in_their_order():
    names = ImageNetInfo()
    expected = [(names.index_to_label_name(i), names.index_to_description(i)) for i in range(1000)]
    assert list(imagenet_classes().items()) == expected
    assert list(imagenet_classes()) == sorted(imagenet_classes())  # as class folders are numbered


def test_classes_of_imagenet_are_shown_by_what_they_are_and_others_by_name():
    assert what_classes_show(["n01440764", "cat"]) == ["tench, Tinca tinca", "cat"]


def test_class_map_has_a_line_for_each_class_with_or_without_what_it_shows(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("b7\ta bear, any bear\n\n  eel \nÅl\t\n", encoding="utf-8")
    assert list(read_class_map(path).items()) == [("b7", "a bear, any bear"), ("eel", "eel"), ("Ål", "Ål")]


@pytest.mark.parametrize(("text", "problem"), [("a\nb\na\n", ":3: the class 'a' is there twice"), ("", ": no class")])
def test_class_map_that_cannot_be_is_an_error_that_names_it(tmp_path, text, problem):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt{problem}"):
        read_class_map(tmp_path / "classes.txt")
