"""Every recipe that comes with the package loads, and its header says how to run it and what to expect."""

from itertools import takewhile

import pytest

from effbackbones.assets import asset_dir
from effbackbones.config import load_recipe

PATHS = {
    path.relative_to(asset_dir("recipes")).with_suffix("").as_posix(): path
    for path in sorted(asset_dir("recipes").rglob("*.y*ml"))
}


@pytest.mark.parametrize("name", PATHS)
def test_recipe_loads_under_its_name(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.path.samefile(PATHS[name])


@pytest.mark.parametrize("name", PATHS)
def test_recipe_header_has_command_and_expectation(name):
    header = list(takewhile(lambda line: line.startswith("#"), PATHS[name].read_text().splitlines()))
    assert any(f"effb train {name}" in line for line in header)
    for topic in ("Hardware:", "Time:", "Expect:"):
        assert any(line.removeprefix("#").strip().startswith(topic) for line in header), topic


@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("in1k/")])
def test_in1k_recipe_learning_rate_belongs_to_eight_devices(name):
    recipe = load_recipe(name).recipe
    assert recipe.optim.lr_batch == 8 * recipe.data.batch_size
