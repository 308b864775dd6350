"""Where the files that come with the package lie: recipes and data, in a wheel and in a checkout."""

from pathlib import Path


def asset_dir(kind: str) -> Path:
    """Return the folder of "recipes" or "data" that comes with the package; FileNotFoundError where there is none."""
    package = Path(__file__).resolve().parent
    folders = [package / "_share" / kind, package.parent / kind]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {' or '.join(map(str, folders))}: the installation is incomplete, reinstall it")


def recipe_dirs() -> list[Path]:
    """Return the folders in which recipes are looked up by name, the first to look in first."""
    return [folder for folder in (Path("recipes"), asset_dir("recipes")) if folder.is_dir()]


def list_recipes() -> dict[str, Path]:
    """Return the path of every recipe by name (in1k/uniformer_small), in alphabetical order."""
    paths = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in reversed(recipe_dirs())
        for path in folder.rglob("*.yaml")
    }
    return dict(sorted(paths.items()))
