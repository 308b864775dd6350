"""Detection and segmentation under Lightning: training, resuming, averaging, evaluating, predicting, exporting."""

import copy
import json
import math
import shutil
import subprocess
import sys

import pytest
import timm
import yaml

pytest.importorskip("mmcv", reason="needs the mm extra")

import mmcv
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from small_runs import BreakOff, BrokenOffError, checkpoint, differences, outcome, train, train_command
from small_scenes import RECIPES, ROOTS, dense_recipe, scenes

from effbackbones.checkpoint import CheckpointError, load_weights
from effbackbones.cli import main
from effbackbones.config import RecipeError
from effbackbones.data.images import load_image
from effbackbones.mm.config import HeadError, load_head
from effbackbones.mm.data import read_image
from effbackbones.predict_dense import device_of, open_run, sample_of
from effbackbones.train.callbacks.finite import NonFiniteError
from effbackbones.train.logger import read_metrics
from effbackbones.train.run import build_task, evaluate, load_target

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TASKS = ("detection", "segmentation")
ORIENTATION = 0x0112  # EXIF tag
HEADS = {task: yaml.safe_load(text)["model"]["head"] for task, text in RECIPES.items()}
METRICS = {"detection": ("box_ap", "box_ap50", "mask_ap"), "segmentation": ("miou", "macc", "aacc")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a finished run of each task, with the average of the weights."""
    folder = tmp_path_factory.mktemp("runs")
    return {task: train(dense_recipe(task, folder / task, ["ema.decay=0.5"]), pictures=True) for task in TASKS}


def image_of(task):
    return sorted((scenes() / "coco" / "val2017").iterdir())[0]


@pytest.mark.parametrize("task", TASKS)
def test_run_leaves_metrics_checkpoints_and_pictures(runs, task):
    rows = read_metrics(runs[task] / "metrics.csv")
    assert rows[-1]["step"] == 8
    assert all(0 <= rows[-1][f"val/{name}{suffix}"] <= 1 for name in METRICS[task] for suffix in ("", "_ema"))
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    assert Image.open(runs[task] / "predictions.png").width > 300
    assert Image.open(runs[task] / "curves.png").width > 300
    assert len(checkpoint(runs[task])["classes"]) == {"detection": 10, "segmentation": 16}[task]


@pytest.mark.parametrize("task", TASKS)
def test_run_broken_off_and_resumed_equals_the_whole_one(tmp_path, runs, task):
    folder = tmp_path / "run"
    overrides = ["ema.decay=0.5", "trainer.save_every=1"]
    with pytest.raises(BrokenOffError):
        train(dense_recipe(task, folder, overrides), BreakOff("on_train_batch_start", 2))
    train(dense_recipe(task, folder, overrides))
    assert differences(outcome(runs[task]), outcome(folder)) == []


@pytest.mark.parametrize("task", TASKS)
def test_loss_that_is_not_finite_does_not_reach_the_weights(tmp_path, task):
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is"):
        train(dense_recipe(task, tmp_path / "run", ["optim.lr=1e18", "trainer.steps=5"]))


@pytest.mark.parametrize("task", TASKS)
def test_bf16_trains_with_finite_losses(tmp_path, task):
    folder = train(dense_recipe(task, tmp_path / "run", ["trainer.precision=bf16", "trainer.steps=2"]))
    assert all(math.isfinite(row["train/loss"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row)


def test_mixed_precision_of_training_is_not_that_of_predictions(tmp_path):
    folder = train(dense_recipe("detection", tmp_path / "run", ["trainer.precision=bf16", "trainer.steps=2"]))
    module = open_run(folder)
    assert module.mixed_trunk
    mixed = sample_of(module, image_of("detection")).pred_instances
    module.mixed_trunk = False
    plain = sample_of(module, image_of("detection")).pred_instances
    assert torch.equal(mixed.bboxes, plain.bboxes)
    assert torch.equal(mixed.scores, plain.scores)


@pytest.mark.parametrize("task", TASKS)
def test_layer_decay_and_factor_of_the_backbone_set_the_rates(tmp_path, task):
    overrides = ["optim.layer_decay=0.5", "optim.backbone_lr=0.1", "trainer.steps=1", "schedule.name=constant"]
    train(dense_recipe(task, tmp_path / "run", overrides))
    groups = checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    rates = sorted({group["lr"] for group in groups})
    assert rates[-1] == pytest.approx(1e-3)
    assert max(rate for rate in rates if rate < 9e-4) <= 1e-4
    assert rates[0] < 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_frozen_stages_keep_their_weights(tmp_path, task):
    loaded = dense_recipe(task, tmp_path / "run", ["model.frozen_stages=2", "trainer.steps=2", "ema.decay=0.5"])
    seed_everything(0)  # as the run does
    before = copy.deepcopy(build_task(loaded)[0].model.state_dict())
    train(loaded)
    after = {k.removeprefix("model."): v for k, v in checkpoint(tmp_path / "run")["state_dict"].items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not [name for name in changed if name.startswith(("backbone.model.stem", "backbone.model.stages.1."))]
    assert [name for name in changed if name.startswith("backbone.model.stages.2.")]


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_gives_the_metrics_of_the_best_checkpoint(runs, task):
    metric = METRICS[task][0]
    best = max(row[f"val/{metric}"] for row in read_metrics(runs[task] / "metrics.csv") if f"val/{metric}" in row)
    assert evaluate(str(runs[task]))[metric] == pytest.approx(best, abs=1e-6)


def test_run_evaluated_without_annotations_goes_on_to_its_end(tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(scenes() / "coco", root)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    folder = train(dense_recipe("detection", tmp_path / "run", [f"data.root={root}", "trainer.steps=2"]))
    assert math.isnan(read_metrics(folder / "metrics.csv")[-1]["val/box_ap"])
    assert checkpoint(folder)["global_step"] == 2


@pytest.mark.parametrize("task", TASKS)
def test_predict_draws_every_image_of_a_folder(runs, tmp_path, capsys, task):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.open(image_of(task)).save(folder / f"{i}.jpg")
    assert main(["predict", str(folder), "--run", str(runs[task]), "--out", str(tmp_path / "seen")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1/2", "2/2"]
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["0.jpg", "1.jpg"]
    assert Image.open(tmp_path / "seen" / "0.jpg").width >= 128


def test_predict_keeps_the_subfolders_of_a_folder(runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.open(image_of("segmentation")).save(tmp_path / "images" / name / "0.jpg")
    seen = tmp_path / "seen"
    assert main(["predict", str(tmp_path / "images"), "--run", str(runs["segmentation"]), "--out", str(seen)]) == 0
    assert sorted(str(path.relative_to(seen)) for path in seen.rglob("*.jpg")) == ["one/0.jpg", "two/0.jpg"]


def test_predict_refuses_images_that_would_have_the_same_picture(runs, tmp_path, capsys):
    for name in ("0.png", "0.webp"):
        Image.open(image_of("segmentation")).save(tmp_path / name)
    assert main(["predict", str(tmp_path), "--run", str(runs["segmentation"]), "--out", str(tmp_path / "seen")]) == 2
    assert "seen/0.png: several of the images would have this picture" in capsys.readouterr().err


def test_predict_refuses_to_overwrite_an_image(runs, tmp_path, capsys):
    image = tmp_path / "0.jpg"
    Image.open(image_of("segmentation")).save(image)
    before = image.read_bytes()
    assert main(["predict", str(tmp_path), "--run", str(runs["segmentation"]), "--out", str(tmp_path)]) == 2
    assert f"{image}: a picture would overwrite this image" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_predict_skips_a_file_that_cannot_be_read_and_says_so(runs, tmp_path, capsys):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    Image.open(image_of("segmentation")).save(tmp_path / "1.jpg")
    seen = tmp_path / "seen"
    assert main(["predict", str(tmp_path), "--run", str(runs["segmentation"]), "--out", str(seen)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"1/2  {tmp_path / '0.jpg'}: cannot be read as an image")
    assert [path.name for path in seen.iterdir()] == ["1.jpg"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_to_predict_is_turned_as_mm_turns_it(tmp_path, orientation):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.open(image_of("detection")).save(path, exif=exif)
    assert (read_image(load_image(str(path), upright=True), path)["img"] == mmcv.imread(path)).all()


def test_prediction_of_a_turned_image_is_that_of_the_upright_one(runs, tmp_path):
    module, exif = open_run(runs["segmentation"]), Image.Exif()
    exif[ORIENTATION] = 6
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.open(image_of("segmentation")).save(upright)
    Image.open(upright).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    one, other = (sample_of(module, path).seg_logits.data for path in (upright, turned))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("accelerator", "available", "device"),
    [("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu")],
)
def test_prediction_is_on_the_gpu_unless_there_is_none_or_the_recipe_says_cpu(
    tmp_path, monkeypatch, accelerator, available, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    loaded = dense_recipe("detection", tmp_path / "run", [f"trainer.accelerator={accelerator}"])
    assert device_of(loaded.recipe) == device


@pytest.mark.parametrize("command", [["predict", "IMAGE", "--run", "RUN"], ["export", "mm", "RUN", "--out", "OUT"]])
def test_command_without_mm_says_what_to_install(tmp_path, command):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dense_recipe("detection", run).to_yaml())
    paths = {"IMAGE": str(image_of("detection")), "RUN": str(run), "OUT": str(tmp_path / "out")}
    code = "import sys; sys.modules['mmcv'] = None; from effbackbones.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, *(paths.get(argument, argument) for argument in command)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "needs mmdet and mmseg" in done.stderr
    assert "install them as the README says" in done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_exported_config_and_weights_give_identical_predictions_in_mm(runs, tmp_path, capsys, task):
    assert main(["export", "mm", str(runs[task]), "--out", str(tmp_path)]) == 0
    config, weights = capsys.readouterr().out.splitlines()
    image = str(image_of(task))
    ours = sample_of(open_run(runs[task]), image)
    if task == "detection":
        from mmdet.apis import inference_detector, init_detector

        theirs = inference_detector(init_detector(config, weights, device="cpu"), image).pred_instances
        assert torch.equal(theirs.bboxes, ours.pred_instances.bboxes)
        assert torch.equal(theirs.scores, ours.pred_instances.scores)
        assert torch.equal(torch.as_tensor(theirs.masks), torch.as_tensor(ours.pred_instances.masks))
        assert len(theirs.bboxes)
    else:
        from mmseg.apis import inference_model, init_model

        theirs = inference_model(init_model(config, weights, device="cpu"), image)
        assert torch.equal(theirs.seg_logits.data, ours.seg_logits.data)


@pytest.mark.parametrize("task", TASKS)
def test_run_of_a_dense_task_gives_its_backbone_to_timm(runs, tmp_path, task):
    recipe = dense_recipe(task, tmp_path / "run").recipe
    model = timm.create_model(recipe.model.name, dense=True, **recipe.model.args)
    load_weights(model, runs[task])
    trained = open_run(runs[task]).model.backbone.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name in trained)


def test_weights_of_a_whole_detector_start_one_with_other_classes(runs, tmp_path):
    root = tmp_path / "coco"
    for split in ("train", "val"):
        source = scenes() / "coco"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / f"{split}2017").symlink_to(source / f"{split}2017")
        content = json.loads((source / "annotations" / f"instances_{split}2017.json").read_text())
        content["categories"] = content["categories"][:4]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 4]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    loaded = dense_recipe("detection", tmp_path / "run", [f"data.root={root}"])
    module, _ = build_task(loaded)
    module.load_weights(runs["detection"])
    trained = open_run(runs["detection"]).model.state_dict()
    own = module.model.state_dict()
    other = {name for name, value in own.items() if value.shape != trained[name].shape}
    assert other == {
        f"roi_head.{layer}.{kind}"
        for layer in ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(own[name], trained[name]) for name in own.keys() - other)


def test_checkpoint_of_another_head_is_refused_for_evaluation(runs, tmp_path):
    loaded = dense_recipe("segmentation", tmp_path / "run")
    module, _ = build_task(loaded)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this model: \d+ names differ"):
        module.load_weights(runs["detection"], same_classes=True)


def test_checkpoint_of_another_head_gives_its_backbone(runs, tmp_path):
    module, _ = build_task(dense_recipe("segmentation", tmp_path / "run"))
    module.load_weights(runs["detection"])
    trained = open_run(runs["detection"]).model.backbone.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in module.model.backbone.state_dict().items())


@pytest.fixture
def own_head(tmp_path):
    """Return a recipe of two steps whose head is a file that has a base beside it."""
    base, head = tmp_path / "base.py", tmp_path / "own.py"
    base.write_text(f"_base_ = {load_head(HEADS['segmentation']).filename!r}\nmodel = dict(neck=dict(num_outs=4))")
    head.write_text("_base_ = './base.py'\nmodel = dict(decode_head=dict(dropout_ratio=0.3))")
    return dense_recipe("segmentation", tmp_path / "run", [f"model.head={head}", "trainer.steps=2"])


def test_run_goes_on_and_predicts_without_the_file_of_its_head(own_head, tmp_path, capsys):
    folder = train(own_head)
    before = evaluate(str(folder))
    for name in ("own.py", "base.py"):
        (tmp_path / name).unlink()
    moved = str(folder.rename(tmp_path / "moved"))
    assert evaluate(moved) == before
    assert open_run(moved).model.decode_head.dropout_ratio == 0.3
    assert main(["export", "mm", moved, "--out", str(tmp_path / "exported")]) == 0
    assert main(["train", moved]) == 0
    assert "nothing was left to train" in capsys.readouterr().out


def test_changed_file_of_a_head_is_refused_like_a_changed_recipe(own_head, tmp_path):
    train(own_head)
    text = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(text + "  # the same")
    train(own_head)
    (tmp_path / "own.py").write_text(text.replace("0.3", "0.4"))
    with pytest.raises(RecipeError, match=r"another recipe:\n  model\.head: '.*run/head\.py' then, '.*/own\.py' now"):
        train(own_head)
    train(load_target(str(tmp_path / "run")))
    own_head.recipe.run.force = True
    train(own_head)
    assert open_run(tmp_path / "run").model.decode_head.dropout_ratio == 0.4


def test_head_that_mm_cannot_write_back_ends_the_run_before_its_first_step(own_head, tmp_path):
    (tmp_path / "own.py").write_text("_base_ = './base.py'\nmodel = dict(test_cfg=dict(limit=float('inf')))")
    with pytest.raises(HeadError, match=r"run/head\.py: cannot be read: NameError: name 'inf' is not defined"):
        train(own_head)


def test_flip_of_a_segmentation_averages_both_views(runs):
    module = open_run(runs["segmentation"])
    plain = sample_of(module, image_of("segmentation"))
    module.recipe.data.test_flip = True
    flipped = sample_of(module, image_of("segmentation"))
    both = evaluate(str(runs["segmentation"]), ["data.test_flip=true"])
    assert plain.pred_sem_seg.data.shape == flipped.pred_sem_seg.data.shape
    assert not torch.equal(plain.pred_sem_seg.data, flipped.pred_sem_seg.data)
    assert both["miou"] != evaluate(str(runs["segmentation"]))["miou"]


def test_flip_of_a_detection_merges_the_boxes_of_both_views(tmp_path):
    head = ["model.head=mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "trainer.steps=2", "data.test_flip=true"]
    loaded = dense_recipe("detection", tmp_path / "run", head)
    loaded.recipe.model.head_overrides = {}
    folder = train(loaded)
    assert "box_ap50" in evaluate(str(folder))
    assert sample_of(open_run(folder), image_of("detection")).pred_instances.bboxes.isfinite().all()


def test_flip_of_masks_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"data.test_flip: mm merges boxes only"):
        build_task(dense_recipe("detection", tmp_path / "run", ["data.test_flip=true"]))


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_end_with_the_evaluation_of_one(tmp_path, task):
    folder = tmp_path / "run"
    recipe = dense_recipe(task, folder)
    two = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=1", "trainer.save_every=1"]
    command = train_command(str(recipe.path), f"data.root={scenes() / ROOTS[task]}", f"run.dir={folder}", *two)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metric = METRICS[task][0]
    best = max(row[f"val/{metric}"] for row in read_metrics(folder / "metrics.csv") if f"val/{metric}" in row)
    alone = evaluate(str(folder), ["trainer.devices=1", "trainer.strategy=auto"])
    assert alone[metric] == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("task", TASKS)
def test_unknown_head_is_an_error_of_the_command(tmp_path, capsys, task):
    path = dense_recipe(task, tmp_path / "run").path
    root = f"data.root={scenes() / ROOTS[task]}"
    assert main(["train", str(path), root, "model.head=mmdet::mask_rcnn/mask-rcnn_r5_fpn_1x_coco.py"]) == 2
    assert "mmdet has no such config; nearest: mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py" in capsys.readouterr().err
