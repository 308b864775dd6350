"""Reading recipes: what they resolve to, where each value comes from, and every message of a broken one."""

from dataclasses import asdict
from pathlib import Path

import pytest

from effbackbones.assets import asset_dir, list_recipes
from effbackbones.config import Recipe, RecipeError, explain, load_recipe

VALID = "model:\n  name: resnet18\ndata:\n  root: images\n"
DETECTION = ["task=detection", "data.source=coco", "model.head=mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"]
SEGMENTATION = ["task=segmentation", "data.source=ade20k", "model.head=mmseg::upernet/upernet_r50.py"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file of the current directory, an empty one."""
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="x.yaml"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


def errors_of(name, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value).splitlines()


# Values


def test_load_minimal_file_gives_defaults_elsewhere(write):
    recipe = load_recipe(write(VALID)).recipe
    expected = Recipe()
    expected.model.name, expected.data.root = "resnet18", "images"
    assert recipe == expected


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=.5", "optim.lr", 0.5),
        ("optim.clip_grad=null", "optim.clip_grad", None),
        ("optim.betas=[0.9, 0.95]", "optim.betas", [0.9, 0.95]),
        ("trainer.precision=32", "trainer.precision", "32"),
        ("trainer.devices=8", "trainer.devices", 8),
        ("trainer.devices='8'", "trainer.devices", "8"),
        ("model.compile=True", "model.compile", True),
        ("model.checkpoint=", "model.checkpoint", None),
        ("run.dir=runs/a=b", "run.dir", "runs/a=b"),
        ("run.dir='1e-3'", "run.dir", "1e-3"),
        ("run.dir=no", "run.dir", "no"),
        ("run.dir=2024-01-01", "run.dir", "2024-01-01"),
        ("run.dir=12:30", "run.dir", "12:30"),
        ("run.dir=runs/${model.name}-${data.size}", "run.dir", "runs/resnet18-224"),
        ("data.eval_batch_size=${data.batch_size}", "data.eval_batch_size", 128),
        ("data.std=${data.mean}", "data.std", [0.485, 0.456, 0.406]),
    ],
)
def test_load_override_gives_typed_value(write, override, key, value):
    section, name = key.split(".")
    loaded = load_recipe(write(VALID), [override])
    got = getattr(getattr(loaded.recipe, section), name)
    assert (got, type(got)) == (value, type(value))
    assert loaded.origins[key] == "command line"


def test_load_model_args_merge_as_mapping(write):
    write("model: {name: resnet18, args: {a: 1, deep: {x: 1, y: 2}}}\ndata: {root: images}", "base.yaml")
    name = write("extends: base\nmodel: {args: {b: 1e-2, deep: {y: [3]}}}")
    loaded = load_recipe(name, ["model.args.c=true", "model.args={deep: {z: no}}"])
    assert loaded.recipe.model.args == {"a": 1, "deep": {"x": 1, "y": [3], "z": "no"}, "b": 0.01, "c": True}
    assert loaded.origins["model.args.deep.x"] == "base.yaml:1"
    assert loaded.origins["model.args.deep.y"] == "x.yaml:2"
    assert loaded.origins["model.args.deep.z"] == "command line"
    assert "model.args" not in loaded.origins


def test_load_model_args_list_gives_way_to_mapping(write):
    name = write("model: {name: resnet18, args: {a: [1]}}\ndata: {root: images}")
    assert load_recipe(name, ["model.args.a.b=1"]).recipe.model.args == {"a": {"b": 1}}


def test_load_head_overrides_take_the_key_that_replaces_a_mapping(write):
    name = write(f"{VALID}task: detection\n".replace("  name", "  head_overrides: {neck: {_delete_: true}}\n  name"))
    loaded = load_recipe(name, [*DETECTION, "model.head_overrides.a.b._delete_=true"])
    assert loaded.recipe.model.head_overrides == {"neck": {"_delete_": True}, "a": {"b": {"_delete_": True}}}
    assert load_recipe(write(loaded.to_yaml(), "again.yaml")).recipe == loaded.recipe


# Names, origins, dumping


def test_load_name_prefers_recipes_of_current_directory(write):
    write(VALID, "recipes/in1k/uniformer_small.yaml")
    loaded = load_recipe("in1k/uniformer_small")
    assert loaded.recipe.model.name == "resnet18"
    assert (loaded.name, loaded.path) == ("in1k/uniformer_small", Path("recipes/in1k/uniformer_small.yaml"))


def test_list_recipes_elsewhere_gives_those_of_the_package(write):
    write(VALID, "recipes/mine.yaml")
    names = list_recipes()
    assert names["mine"] == Path("recipes/mine.yaml")
    assert names["in1k/uniformer_small"] == asset_dir("recipes") / "in1k/uniformer_small.yaml"


def test_asset_dir_in_wheel_is_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("effbackbones.assets.__file__", str(tmp_path / "effbackbones/assets.py"))
    (tmp_path / "recipes").mkdir()
    assert asset_dir("recipes") == tmp_path / "recipes"
    (tmp_path / "effbackbones/_share/recipes").mkdir(parents=True)
    assert asset_dir("recipes") == tmp_path / "effbackbones/_share/recipes"


def test_asset_dir_unknown_kind_names_both_places():
    with pytest.raises(FileNotFoundError, match=r"_share/nothing or .*/nothing"):
        asset_dir("nothing")


@pytest.mark.parametrize(
    ("path", "name"), [("recipes/a/b.yaml", "a/b"), ("elsewhere/a/b.yaml", "b"), ("./elsewhere/c.yml", "c")]
)
def test_load_path_gives_name(write, path, name):
    assert load_recipe(write(VALID, path)).name == name


def test_load_origins_name_file_and_line_of_every_leaf(write):
    write("model:\n  name: resnet50\n\ndata:\n  root: images\n  size: 160\n", "recipes/base.yaml")
    loaded = load_recipe(write("extends: base\nmodel:\n  name: resnet18\n"), ["data.size=192"])
    assert loaded.origins["model.name"] == "x.yaml:3"
    assert loaded.origins["data.root"] == "recipes/base.yaml:5"
    assert loaded.origins["data.size"] == "command line"
    assert loaded.origins["task"] == loaded.origins["data.mean"] == loaded.origins["model.args"] == "default"
    assert "data" not in loaded.origins


def test_explain_gives_every_key_in_schema_order_with_help(write):
    loaded = load_recipe(write(VALID), ["model.args.depth=2"])
    rows = explain(loaded)
    assert [row[0] for row in rows] == list(loaded.origins)
    assert rows[0] == ("task", "classification", "default", "what is trained")
    assert ("model.args.depth", 2, "command line", rows[5][3]) == rows[5]
    assert len(rows) == sum(len(section) for section in asdict(Recipe()).values() if isinstance(section, dict)) + 1


def test_to_yaml_reads_back_equal(write):
    overrides = [
        "model.args={a: '1e-3', b: [1, {c: 'no'}], d: 'null', e: {}, f: \"\\x00 é\\n\", g: ''}",
        "optim.lr=1e-5",
    ]
    loaded = load_recipe(write(VALID), [*overrides, "run.dir=runs/${model.name}"])
    assert load_recipe(write(loaded.to_yaml(), "again.yaml")).recipe == loaded.recipe


# Errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "x.yaml:1: optim.lrr: unknown key; nearest: optim.lr"),
        ("epochs: 3", "x.yaml:1: epochs: unknown key; nearest: trainer.epochs"),
        ("optimizer: {lr: 1}", "x.yaml:1: optimizer: unknown key; nearest: optim"),
        ("zzz: 1", "x.yaml:1: zzz: unknown key"),
        ("data:\n  size: abc", "x.yaml:2: data.size: expected int, got 'abc'"),
        ("data: {size: 224.5}", "x.yaml:1: data.size: expected int, got 224.5"),
        ("data: {size: true}", "x.yaml:1: data.size: expected int, got True"),
        ("data: {size: 31}", "x.yaml:1: data.size: expected a value >= 32, got 31"),
        ("optim: {lr: 0}", "x.yaml:1: optim.lr: expected a value > 0, got 0.0"),
        ("optim: {lr: false}", "x.yaml:1: optim.lr: expected float, got False"),
        ("optim: {lr: 1e999}", "x.yaml:1: optim.lr: the number '1e999' is out of range"),
        ("optim: {lr: .nan}", "x.yaml:1: optim.lr: expected float, got '.nan'"),
        ("ema: {decay: 1.5}", "x.yaml:1: ema.decay: expected a value <= 1, got 1.5"),
        ("ema: {warmup: yes}", "x.yaml:1: ema.warmup: expected bool, got 'yes'"),
        ("optim: {clip_grad: x}", "x.yaml:1: optim.clip_grad: expected float or null, got 'x'"),
        ("optim: {betas: 0.9}", "x.yaml:1: optim.betas: expected a list of float or null, got 0.9"),
        ("data: {mean: [0, a, 0]}", "x.yaml:1: data.mean: expected float, got 'a'"),
        (
            "data: {source: cifar}",
            "x.yaml:1: data.source: expected one of fashion_mnist, folder, shards, hf, synthetic, coco, ade20k, got",
        ),
        ("trainer: {precision: 16}", "x.yaml:1: trainer.precision: expected one of 32, bf16, fp16, got 16"),
        ("trainer: {devices: 1.5}", "x.yaml:1: trainer.devices: expected int or str, got 1.5"),
        ("data:", "x.yaml:1: data: expected a mapping of keys, got null"),
        ("data: [1]", "x.yaml:1: data: expected a mapping of keys, got [1]"),
        ("model: {args: 3}", "x.yaml:1: model.args: expected a mapping of keys, got 3"),
        ("run: {dir: 3}", "x.yaml:1: run.dir: expected str or null, got 3"),
        ("ema: {decay: 1}\nema: {}", "x.yaml:2: ema: set twice, first at x.yaml:1"),
        ("data.size: 3", "x.yaml:1: 'data.size': unknown key: keys are names such as batch_size, nested by section"),
        ("[1]: 3", "x.yaml:1: "),
        ("optim: {_target_: os.system}", "x.yaml:1: 'optim._target_': unknown key: keys are names"),
        ("model: {args: {a: {_delete_: true}}}", "x.yaml:1: 'model.args.a._delete_': unknown key: keys are names"),
        (
            "model: {head_overrides: {_delete_: true}}",
            "x.yaml:1: 'model.head_overrides._delete_': unknown key: keys are names",
        ),
        (
            "model: {head_overrides: {neck: {_scope_: x}}}",
            "x.yaml:1: 'model.head_overrides.neck._scope_': unknown key: keys are names",
        ),
        ("model: {head_overrides: {a._delete_: true}}", "x.yaml:1: 'model.head_overrides.a._delete_': unknown key"),
        ("run: {dir: '${oc.env:HOME}'}", "x.yaml:1: run.dir: '${oc.env:HOME}': $ is only for references"),
        ("run: {dir: '\\${run.force}'}", "x.yaml:1: run.dir: '\\\\${run.force}': $ is only for references"),
        ("run: {dir: $HOME/x}", "x.yaml:1: run.dir: '$HOME/x': $ is only for references"),
        ("run: {dir: '???'}", "x.yaml:1: run.dir: '???': $ is only for references"),
        ("run: {dir: '${data.sizes}'}", "x.yaml:1: run.dir: ${data.sizes} refers to no value; nearest: data.size"),
        ("run: {dir: '${run}'}", "x.yaml:1: run.dir: ${run} refers to no value"),
        ("run: {dir: '${run.dir}'}", "x.yaml:1: run.dir: ${run.dir} refers to a reference; give its value"),
        ("extends: nothing", "x.yaml:1: extends: 'nothing': no such recipe"),
    ],
)
def test_load_bad_value_names_line_and_key(write, text, expected):
    assert any(line.startswith(expected) for line in errors_of(write(text)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.size", "command line: 'data.size': expected section.key=value, such as data.size=224"),
        ("=3", "command line: '=3': expected section.key=value"),
        ("data..size=3", "command line: 'data..size=3': expected section.key=value"),
        ("_target_=os.system", "command line: '_target_=os.system': expected section.key=value"),
        ("model.args.a._delete_=1", "command line: 'model.args.a._delete_=1': expected section.key=value"),
        ("data.size=[1", "command line: data.size: cannot be read as YAML: "),
        ("data.sise=3", "command line: data.sise: unknown key; nearest: data.size"),
        ("data=3", "command line: data: expected a mapping of keys, got 3"),
        ("data.size.x=3", "command line: data.size: expected int, got {'x': 3}"),
        ("extends=base", "command line: extends: unknown key"),
        ("data.size=!!python/name:os.system", "command line: data.size: cannot be read as YAML: the tag "),
    ],
)
def test_load_bad_override_names_command_line(write, override, expected):
    (line,) = errors_of(write(VALID), override)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "x.yaml: expected sections such as model: and data:, got nothing"),
        ("# nothing\n", "x.yaml: expected sections"),
        ("- 1\n", "x.yaml: expected sections such as model: and data:, got [1]"),
        ("model: {\n", "x.yaml:2: cannot be read as YAML: "),
        ("a: b: c\n", "x.yaml:1: cannot be read as YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: cannot be read as YAML: but found another document"),
        ("a: \0", "x.yaml: cannot be read as YAML: special characters are not allowed"),
        ('a: "\\UFFFFFFFF"', "x.yaml: cannot be read as YAML: "),
        (b"a: \xff", "x.yaml: not UTF-8 text (at byte 3)"),
        ("#" * 70_000, "x.yaml: larger than 64 KiB"),
        ("a: &b 1\n", "x.yaml:1: cannot be read as YAML: anchors and aliases are not allowed"),
        ("a: *b\n", "x.yaml:1: cannot be read as YAML: anchors and aliases are not allowed"),
        ("a: " + "[" * 5000, "x.yaml:1: cannot be read as YAML: nested more than 16 deep"),
        ("a: !!python/object/apply:os.system [x]", "x.yaml:1: cannot be read as YAML: the tag "),
    ],
)
def test_load_unreadable_file_is_one_error(write, content, expected):
    (line,) = errors_of(write(content))
    assert line.startswith(expected)


def test_load_directory_is_error(write):
    write(VALID, "folder.yaml/x.yaml")
    assert errors_of("folder.yaml")[0].startswith("'folder.yaml': no such recipe")


@pytest.mark.parametrize("name", ["missing.yaml", "", "..", "\0.yaml", "x" * 5000 + ".yaml", "/dev/null"])
def test_load_missing_file_is_one_error(write, name):
    assert len(errors_of(name)) == 1


def test_load_unreadable_permissions_is_error(write, monkeypatch):
    name = write(VALID)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("builtins.open", refuse)
    assert errors_of(name) == ["'x.yaml': [Errno 13] Permission denied: 'x.yaml'"]


def test_load_unknown_name_gives_nearest(write):
    write(VALID, "recipes/in1k/resnet.yaml")
    assert errors_of("in1k/resnets")[0].partition("; nearest: ")[2].split(", ")[0] == "in1k/resnet"


def test_load_two_levels_of_extends_is_error(write):
    write("model: {name: resnet18}", "a.yaml")
    write("extends: a\ndata: {root: x}", "b.yaml")
    assert errors_of(write("extends: b.yaml")) == [
        "b.yaml:1: extends: x.yaml extends this recipe, so this one may not extend another"
    ]


def test_load_recipe_that_extends_itself_is_error(write):
    assert errors_of(write("extends: x.yaml"))[0].startswith("x.yaml:1: extends: x.yaml extends this recipe")


def test_load_errors_of_base_file_and_overrides_come_together(write):
    write("data: {size: abc}\n", "base.yaml")
    lines = errors_of(write("extends: base\noptim: {lrr: 1}\nmodel: {name: resnet19}"), "ema.decay=2", "x")
    assert [line.split(": ")[:2] for line in sorted(lines)] == [
        ["base.yaml:1", "data.size"],
        ["command line", "'x'"],
        ["command line", "ema.decay"],
        ["x.yaml", "data.root"],
        ["x.yaml:2", "optim.lrr"],
        ["x.yaml:3", "model.name"],
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name="], "command line: model.name: expected str, got null"),
        (["model.name=''"], "command line: model.name: required"),
        (["model.name=resnet19"], "command line: model.name: expected a registered model, without a weights tag, got"),
        (["model.name=resnet18.a1_in1k"], "command line: model.name: expected a registered model, without a weights"),
        (["model.name=hf-hub:timm/resnet18"], "command line: model.name: expected a registered model"),
        (["model.args={pretrained: true}"], "command line: model.args: does not take pretrained (model.checkpoint "),
        *(
            ([*DETECTION, f"model.args.{name}=1"], f"command line: model.args: does not take {name} ({key} sets it)")
            for name, key in {
                "type": "model.name",
                "model": "model.name",
                "checkpoint": "model.checkpoint",
                "init_cfg": "model.checkpoint",
                "out_indices": "model.head",
                "frozen_stages": "model.frozen_stages",
                "norm_eval": "model.norm_eval",
                "with_cp": "model.grad_checkpointing",
            }.items()
        ),
        (["optim.name=adamv"], "command line: optim.name: expected an optimizer of timm, got 'adamv'; nearest: adam"),
        (["optim.betas=[0.9]"], "command line: optim.betas: expected two numbers"),
        (["data.mean=[0.5]"], "command line: data.mean: expected 3 numbers, one per channel, got [0.5]"),
        (["data.std=[1, 1]"], "command line: data.std: expected 3 numbers, one per channel, got [1.0, 1.0]"),
        (["data.std=[1, 1, 0]"], "command line: data.std: expected positive numbers"),
        (
            ["augment.scale=[1, 0.5]"],
            "command line: augment.scale: expected two increasing numbers above 0 and up to 1",
        ),
        (["augment.scale=[0.5, 1.5]"], "command line: augment.scale: expected two increasing numbers"),
        (["augment.ratio=[1]"], "command line: augment.ratio: expected two increasing numbers"),
        (["data.source=synthetic"], "command line: data.num_classes: required where data.source is synthetic"),
        (["data.root=null"], "command line: data.root: required where data.source is folder"),
        (["data.batch_size=7", "augment.cutmix=1"], "command line: data.batch_size: expected an even number"),
        (
            ["schedule.warmup_epochs=301"],
            "command line: schedule.warmup_epochs: 301 do not fit into trainer.epochs: 300",
        ),
        (
            ["schedule.name=multistep"],
            "command line: schedule.milestones: expected increasing epochs where schedule.name is multistep, such as",
        ),
        (
            ["schedule.name=multistep", "schedule.milestones=[11, 8]"],
            "command line: schedule.milestones: expected increasing epochs where schedule.name is multistep, such as",
        ),
        (
            ["schedule.milestones=[8, 11]"],
            "command line: schedule.milestones: has no effect where schedule.name is cosine: leave it out, or at []",
        ),
        (
            ["schedule.name=step", "schedule.power=2"],
            "command line: schedule.power: has no effect where schedule.name is step: leave it out, or at 1.0",
        ),
        (["trainer.monitor=top1_ema"], "command line: trainer.monitor: top1_ema needs an average of the weights"),
        (["trainer.devices=all"], "command line: trainer.devices: expected auto or a positive number, got 'all'"),
        (["trainer.devices=0"], "command line: trainer.devices: expected auto or a positive number, got 0"),
        (
            ["data.source=coco"],
            "command line: data.source: expected one of fashion_mnist, folder, shards, hf, synthetic for class",
        ),
        (["data.source=coco", "task=detection"], "command line: model.head: required for detection: an mm config"),
        (["model.head=mmdet::x.py"], "command line: model.head: has no effect in classification: leave it out"),
        (["model.head_overrides.neck.a=1"], "command line: model.head_overrides: has no effect in classification"),
        ([*DETECTION, "augment.mixup=0.8"], "command line: augment.mixup: has no effect in detection: leave it out"),
        ([*DETECTION, "augment.scale=[0.5, 1]"], "command line: augment.scale: has no effect in detection"),
        (
            [*DETECTION, "trainer.monitor=top1"],
            "command line: trainer.monitor: expected one of box_ap, mask_ap for detection",
        ),
        (
            [*DETECTION, "data.scale=[320, 640]"],
            "command line: data.scale: expected the longer side, then the shorter one",
        ),
        *(
            ([*task, f"{key}={value}"], f"command line: {key}: has no effect in {task[0].partition('=')[2]}: leave it")
            for task, keys in (
                (DETECTION, {"augment.zoom": "[1, 1]", "data.size": 512, "data.crop_pct": 1}),
                (SEGMENTATION, {"augment.resize": "detr", "augment.mix_prob": 0.5, "data.interpolation": "bilinear"}),
            )
            for key, value in keys.items()
        ),
        (
            [*SEGMENTATION, "augment.zoom=[2, 1]"],
            "command line: augment.zoom: expected two increasing numbers above 0, got [2.0, 1.0]",
        ),
        (
            ["data.split_by_node=true"],
            "command line: data.split_by_node: has no effect where data.source is folder: leave it out",
        ),
        (
            ["data.source=hf", "data.val_shards=v.tar"],
            "command line: data.val_shards: has no effect where data.source is hf: leave it out",
        ),
        (
            ["data.source=shards", "data.split_by_node=true", "trainer.overfit=true"],
            "command line: data.split_by_node: not beside trainer.overfit",
        ),
        (
            ["data.source=shards", "data.split_by_node=true", "data.shrink_batch=true"],
            "command line: data.shrink_batch: not beside data.split_by_node",
        ),
    ],
)
def test_load_impossible_combination_is_one_error(write, overrides, expected):
    (line,) = errors_of(write(VALID), *overrides)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.batch_size=7"],
        ["schedule.warmup_epochs=300"],
        ["augment.scale=[1, 1]", "augment.ratio=[1, 1]"],
        ["trainer.monitor=top1_ema", "ema.decay=0.99"],
        ["trainer.sync_bn=true"],
        ["trainer.sync_bn=true", "trainer.accelerator=cpu"],
        DETECTION,
        [*DETECTION, "model.args.dense=false"],
        [*DETECTION, "schedule.name=multistep", "schedule.milestones=[8, 11]", "schedule.decay_rate=0.2"],
        [*SEGMENTATION, "data.size=512", "augment.zoom=[1, 1]", "schedule.name=poly", "schedule.power=2"],
        [*DETECTION, "trainer.monitor=mask_ap_ema", "ema.decay=0.9", "augment.resize=detr", "optim.backbone_lr=0.1"],
        ["data.source=synthetic", "data.num_classes=2", "data.root=null"],
    ],
)
def test_load_possible_combination_loads(write, overrides):
    assert load_recipe(write(VALID), overrides).recipe.model.name == "resnet18"


def test_load_broken_key_hides_checks_that_depend_on_it(write):
    (line,) = errors_of(write(VALID), "ema.decay=abc", "trainer.monitor=top1_ema")
    assert line.startswith("command line: ema.decay: expected float or null")
