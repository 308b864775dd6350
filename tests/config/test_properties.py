"""Whatever a recipe holds, loading it gives a recipe or a RecipeError, and runs nothing."""

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from effbackbones.config import LoadedRecipe, Recipe, RecipeError, explain, load_recipe
from effbackbones.config.load import _SCHEMA
from effbackbones.config.schema import DataConfig, ModelConfig, OptimConfig

VALID = """\
model: {name: resnet18, args: {block_size: 3}}
data:
  source: folder
  root: images
  mean: [0.5, 0.5, 0.5]
augment: {mixup: 0.8, policy: rand-m9-mstd0.5-inc1}
optim:
  lr: 1e-3
  betas: [0.9, 0.999]
run: {dir: "runs/${model.name}"}
"""
CALL = "recipe_sentinel.leave_trace"
HOSTILE = [
    f"!!python/object/apply:{CALL} []",
    f"!!python/object/new:{CALL} []",
    f"!!python/name:{CALL}",
    "!!python/module:recipe_sentinel",
    f"{{_target_: {CALL}}}",
    f"{{_target_: {CALL}, _args_: [1]}}",
    "${recipe_sentinel:}",
    "${oc.env:HOME}",
    "${oc.decode:'1'}",
    "${oc.create:{a: 1}}",
    "${${model.name}}",
    "${model.args}",
    "${..}",
    "&a [*a, *a]",
    "hf-hub:recipe/sentinel",
    CALL,
    "???",
]

common = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
junk = st.text(max_size=12)
keys = st.sampled_from([*_SCHEMA, "_target_", "extends", "data", "model.args.x", "model.args"]) | junk
scalars = st.none() | st.booleans() | st.integers() | st.floats() | junk | st.sampled_from(HOSTILE)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys | scalars, v, max_size=3), max_leaves=8
)
sections = st.sampled_from([*vars(Recipe()), "extends"]) | junk
names = st.sampled_from([key.rpartition(".")[2] for key in _SCHEMA]) | junk
trees = st.dictionaries(sections, st.dictionaries(names, values, max_size=4) | values, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def trace(tmp_path_factory):
    """Offer a module that leaves a file where it is imported or called; it must never be."""
    folder = tmp_path_factory.mktemp("sentinel")
    trace = folder / "trace"
    lines = ["from pathlib import Path", f"def leave_trace(*args): Path({str(trace)!r}).touch()", "leave_trace()"]
    (folder / "recipe_sentinel.py").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    assert not trace.exists()
    assert "recipe_sentinel" not in sys.modules


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("x.yaml")


def load_or_refuse(path, content, overrides=()):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        loaded = load_recipe(path, overrides)
    except RecipeError as error:
        refusal = str(error)
    else:
        assert isinstance(loaded.recipe, Recipe)
        assert len(explain(loaded)) == len(loaded.origins)
        return loaded
    assert all(line.startswith(("x.yaml", "command line")) for line in refusal.split("\n"))
    return None


@common
@given(st.binary(max_size=200))
def test_load_random_bytes_loads_or_refuses(path, content):
    load_or_refuse(path, content)


@common
@given(st.text(alphabet=st.sampled_from("ab:-#[]{}&*!|>'\"%@`,?~$.=\\ \n\t1e0é"), max_size=60))
@example("%YAML " + "9" * 5000 + ".1\n--- a")
@example('a: "\\UFFFFFFFF"')
@example("? a\n? b")
@example("<<: {a: 1}")
@example("=: 1")
def test_load_random_yaml_syntax_loads_or_refuses(path, content):
    load_or_refuse(path, content)


@common
@given(trees)
def test_load_random_tree_loads_or_refuses(path, tree):
    load_or_refuse(path, yaml.safe_dump(tree, allow_unicode=True))


@common
@given(st.lists(st.builds("{}={}".format, keys, st.builds(yaml.safe_dump, values) | junk) | junk, max_size=4))
@example(["model.args.a=${model.args}", "model.args.a={x: 1}", "model.args.a.b=${model.args}"])
def test_load_random_overrides_load_or_refuse(path, overrides):
    load_or_refuse(path, VALID, overrides)


@common
@given(st.integers(0, len(VALID)), st.integers(0, 12), st.sampled_from(HOSTILE) | junk)
def test_load_mutated_recipe_loads_or_refuses(path, start, length, replacement):
    load_or_refuse(path, VALID[:start] + replacement + VALID[start + length :])


@pytest.mark.parametrize("value", HOSTILE[:-6])
@pytest.mark.parametrize("key", ["model", "model.name", "data.root", "optim.name", "augment.policy", "extends"])
def test_load_hostile_value_is_refused(path, key, value):
    section, _, name = key.partition(".")
    assert load_or_refuse(path, f"{section}: {{{name}: {value}}}" if name else f"{section}: {value}") is None
    assert load_or_refuse(path, VALID, [f"{key}={value}"]) is None


text = st.text(max_size=40).filter(lambda t: "$" not in t and t != "???")
floats = st.floats(1e-300, 1e18)
plain = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | floats | text | st.sampled_from(["1e3", "no", "~"])
trees_of_args = st.recursive(
    st.dictionaries(st.from_regex(r"x[A-Za-z0-9_]{0,8}", fullmatch=True), plain, max_size=3),
    lambda v: st.dictionaries(st.sampled_from(["a", "no", "b_1"]), v | st.lists(v | plain, max_size=3), max_size=3),
    max_leaves=4,
)


@common
@given(trees_of_args, floats, text)
def test_to_yaml_of_any_recipe_reads_back_equal(path, args, lr, root):
    recipe = Recipe(model=ModelConfig(name="resnet18", args=args), data=DataConfig(root=root), optim=OptimConfig(lr=lr))
    loaded = load_or_refuse(path, LoadedRecipe(recipe, "x", path, {}).to_yaml())
    assert loaded.recipe == recipe
