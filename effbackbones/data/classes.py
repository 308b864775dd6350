"""Class maps: text files with a line for each class, in the order of their indices: its name, a tab, what it shows."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from effbackbones.assets import asset_dir
from effbackbones.data.errors import DataError


def read_class_map(path: Path) -> dict[str, str]:
    """Return the classes of a class map, with what they show; that is the name itself in lines without a tab.

    Raises DataError where a name is there twice, or none is.
    """
    classes: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, _, text = map(str.strip, line.partition("\t"))
        if name in classes:
            raise DataError(f"{path}:{number}: the class {name!r} is there twice; expected every class once")
        if name:
            classes[name] = text or name
    if not classes:
        raise DataError(f"{path}: no class in it; expected a line with the name of each")
    return classes


@cache
def imagenet_classes() -> dict[str, str]:
    """Return the 1,000 classes of ImageNet-1K (n01440764), with what they show (tench, Tinca tinca)."""
    return read_class_map(asset_dir("data") / "classes" / "imagenet1k.txt")


def what_classes_show(classes: Iterable[str]) -> list[str]:
    """Return the names of classes as people read them: those of ImageNet-1K by what they show."""
    return [imagenet_classes().get(name, name) for name in classes]
