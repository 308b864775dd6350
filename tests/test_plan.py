"""Plans against what really happens: memory, parameters, steps; and what they warn of."""

import functools

import pytest
import timm
import torch
from small_models import depths
from small_scenes import RECIPES, ROOTS, scenes
from torch.utils._pytree import tree_leaves

from effbackbones.bench.memory import peak_bytes
from effbackbones.bench.subjects import dense_loss
from effbackbones.cli import main
from effbackbones.config import RecipeError, load_recipe
from effbackbones.models._zoo import ZOO
from effbackbones.plan import estimate_memory, footprint, gib, make_plan
from effbackbones.train.classification import ClassificationModule
from effbackbones.train.dry_run import dry_run
from effbackbones.train.optim import build_optimizer
from effbackbones.train.run import PRECISION, build_task

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

CLASSES = tuple(map(str, range(10)))
FAMILIES = [
    *(("uniformer_small", "bf16"), ("s2aformer_mini", "32")),
    *(
        pytest.param(name, precision, marks=pytest.mark.slow)
        for name, precision in (
            *(("uniformer_small", "32"), ("uniformer_xxs", "32"), ("gc_vit_xxtiny", "32"), ("transnext_micro", "32")),
            *(("transnext_micro", "bf16"), ("sgformer_s", "32"), ("sgformer_s", "bf16"), ("stvit_small", "32")),
            *(("stvit_small", "bf16"), ("stvit_r_swin_tiny", "32")),
        )
    ),
]
# Enough pixels that activations outweigh scratch memory of the libraries and copies that convolutions make of weights.
IMAGES = ("data.batch_size=16", "data.size=128")


def small(name, *overrides):
    """Return the loaded recipe of a model with few blocks on 10 classes of noise."""
    shape = [f"model.name={name}", f"model.args={{depths: {list(depths(name, compiled=True))}}}", "data.size=64"]
    data = ["data.source=synthetic", "data.num_classes=10", "data.synthetic_images=100", "data.batch_size=4"]
    return load_recipe("debug/two_steps", [*shape, *data, "trainer.precision=32", *overrides])


@functools.cache
def small_footprint(name):
    return footprint(small(name).recipe, 1)


@pytest.fixture
def one_footprint(monkeypatch):
    """Have plans of small models take their memory from what is computed once."""
    monkeypatch.setattr("effbackbones.plan.footprint", lambda recipe, *args: small_footprint(recipe.model.name))


def measured(recipe):
    """Return the most bytes that a step in training holds besides weights and gradients."""
    torch.manual_seed(0)
    module = ClassificationModule(recipe, CLASSES, "")
    mixed, images, size = recipe.trainer.precision != "32", recipe.data.batch_size, recipe.data.size

    def step():
        batch = torch.randn(images, 3, size, size), torch.zeros(images, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            loss = module.forward_loss(batch)["loss"]
        loss.backward()  # into the gradients of the first step, which are there already

    step()
    return peak_bytes(step, "cpu")


@pytest.mark.parametrize(("name", "precision"), FAMILIES)
def test_activations_are_those_of_a_real_step(name, precision):
    recipe = small(name, f"trainer.precision={precision}", *IMAGES).recipe
    estimate, real = estimate_memory(recipe, 1).activations, measured(recipe)
    print(f"{name} {precision}: estimated {estimate}, measured {real}, ratio {estimate / real:.3f}")
    assert estimate == pytest.approx(real, rel=0.1)


def test_recomputed_activations_are_not_in_the_estimate():
    plain = estimate_memory(small("uniformer_small", *IMAGES).recipe, 1).activations
    recipe = small("uniformer_small", "model.grad_checkpointing=[0]", *IMAGES).recipe
    some = estimate_memory(recipe, 1).activations
    assert some == pytest.approx(measured(recipe), rel=0.1)
    recipe.model.grad_checkpointing = True
    assert estimate_memory(recipe, 1).activations < some < 0.9 * plain


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion"])
def test_weights_gradients_and_optimizer_are_exact(optimizer):
    recipe = small("uniformer_small", f"optim.name={optimizer}", "optim.momentum=0.9", "ema.decay=0.9").recipe
    recipe.optim.momentum = 0.9 if optimizer == "sgd" else None
    plan, model = estimate_memory(recipe, 1), ClassificationModule(recipe, CLASSES, "").model
    steps = build_optimizer(model, recipe.optim, 1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    parameters, buffers = (sum(x.nbytes for x in xs) for xs in (model.parameters(), model.buffers()))
    assert plan.weights == plan.average == parameters + buffers
    assert plan.gradients == parameters
    assert plan.optimizer == sum(
        leaf.nbytes for leaf in tree_leaves(list(steps.state.values())) if torch.is_tensor(leaf)
    )
    assert plan.total == plan.weights + plan.gradients + plan.optimizer + plan.average + plan.activations
    assert estimate_memory(recipe, 2).communication == parameters  # DDP's buckets


def test_what_is_frozen_has_no_gradient_and_no_activations():
    whole, frozen = (estimate_memory(small("uniformer_small", f"model.frozen_stages={n}").recipe, 1) for n in (-1, 4))
    assert frozen.weights == whole.weights
    trained = ClassificationModule(
        small("uniformer_small", "model.frozen_stages=4").recipe, CLASSES, ""
    ).model.parameters()
    assert frozen.gradients == sum(parameter.nbytes for parameter in trained if parameter.requires_grad)
    assert frozen.activations < whole.activations / 2


def test_shards_divide_what_is_kept_and_gather_blocks():
    found = footprint(small("uniformer_small", "ema.decay=0.9", "trainer.strategy=fsdp").recipe, 8)
    whole, shard = found.on("ddp", 8), found.on("fsdp", 8)
    assert shard.gradients == -(-whole.gradients // 8)
    assert shard.optimizer == -(-whole.optimizer // 8)
    assert shard.weights == found.buffers + -(-(whole.weights - found.buffers) // 8)
    assert shard.activations == whole.activations
    assert shard.communication == found.rest + 3 * found.unit
    recipe = small("uniformer_small", "ema.decay=0.9", "trainer.strategy=fsdp").recipe
    assert estimate_memory(recipe, 8) == shard
    largest = max(
        timm.create_model("uniformer_small").stages, key=lambda stage: sum(p.numel() for p in stage.parameters())
    )
    assert found.unit == sum(p.nbytes for p in largest.blocks[0].parameters())


def test_plan_of_a_published_recipe_has_the_figures_of_the_zoo():
    row = next(row for row in ZOO if row.model == "uniformer_small" and row.size == 224)
    plan = make_plan(load_recipe("in1k/uniformer_small"), 8, images=1_281_167)
    assert plan.parameters == plan.trained == row.params
    assert plan.gmacs == pytest.approx(row.gmacs, rel=0.02)
    assert (plan.steps_per_epoch, plan.steps) == (1251, 375_300)
    assert plan.batch.startswith("Global batch 1024 = 128 per device x accumulate 1 x 8 devices; learning rate 0.001 ")
    assert plan.warnings == []


def test_plan_counts_the_steps_of_a_run(one_footprint):
    plan = make_plan(small("uniformer_small", "trainer.accumulate=3", "trainer.epochs=2", "trainer.steps=null"), 2)
    assert (plan.images, plan.steps_per_epoch, plan.steps) == (100, 4, 8)  # 4 x 2 x 3 images a step


@pytest.mark.parametrize(
    ("overrides", "world", "warning"),
    [
        ([], 1, "batch norms see 4 images at a time"),
        (["trainer.sync_bn=true"], 2, "batch norms see 8 images at a time"),
        (["trainer.sync_bn=true"], 4, None),
        (["data.batch_size=16"], 1, None),
        (["model.norm_eval=true"], 1, None),
        (["model.name=gc_vit_xxtiny"], 1, None),
    ],
)
def test_plan_warns_of_small_batches_for_batch_norms(one_footprint, overrides, world, warning):
    found = make_plan(small("uniformer_small", *overrides), world).warnings
    said = [text for text in found if "batch norms" in text]
    assert len(said) == (warning is not None)
    assert all(text.startswith(warning) for text in said)


@pytest.mark.parametrize(
    ("overrides", "warned"), [([], True), (["optim.lr_batch=64"], False), (["data.global_batch=8"], False)]
)
def test_plan_warns_of_a_rate_that_no_batch_belongs_to(one_footprint, overrides, warned):
    found = make_plan(small("uniformer_small", *overrides), 2).warnings
    assert any("stays whatever the batch, which is 8 here" in text for text in found) == warned


@pytest.mark.parametrize(
    ("images", "warning"),
    [(100, None), (103, "3 of 103 images (2.9%), others in each epoch, are left out"), (3, "3 images, fewer than one")],
)
def test_plan_warns_of_images_that_fill_no_batch(one_footprint, images, warning):
    found = make_plan(small("uniformer_small"), 1, images).warnings
    assert any(warning in text for text in found) if warning else not any("images (" in text for text in found)


def test_command_plans_without_the_dataset_and_says_so(capsys, tmp_path):
    missing = ["data.source=folder", f"data.root={tmp_path / 'nowhere'}", "data.num_classes=null"]
    recipe = ["debug/two_steps", "--devices", "2", "model.args.depths=[1, 1, 1, 1]", *missing]
    assert main(["plan", *recipe]) == 0
    said = capsys.readouterr().out
    assert "Steps          unknown\n" in said
    assert "Warning: the dataset is not there, --images N stands for it" in said
    assert main(["plan", *recipe, "--images", "1000"]) == 0
    said = capsys.readouterr().out
    assert " an epoch of 1000 images, 2 in all\n" in said
    assert "the dataset" not in said
    assert "Memory, ddp" in said
    assert "Memory, fsdp" in said


def test_command_given_a_batch_that_does_not_divide_ends_with_code_2(capsys):
    assert main(["plan", "debug/two_steps", "data.global_batch=10", "--devices", "4"]) == 2
    assert "set data.global_batch=8 or 12" in capsys.readouterr().err


# Dry runs


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dry_run_steps_as_one_of_many_ranks(strategy):
    loaded = small("uniformer_small", f"trainer.strategy={strategy}", "ema.decay=0.9", "optim.clip_grad=1")
    done = dry_run(loaded, 64)
    assert (done.strategy, done.world, done.steps) == (strategy, 64, 1)
    whole = estimate_memory(loaded.recipe, 1).gradients
    assert done.whole == whole
    if strategy == "ddp":
        assert done.parameters == whole
    else:
        assert whole / 64 <= done.parameters < whole / 16  # the rows of a small tensor do not divide by 64
    assert done.optimizer == pytest.approx(2 * done.parameters, rel=0.05)
    assert not torch.distributed.is_initialized()


def test_command_reports_a_dry_run(capsys):
    recipe = ["debug/two_steps", "model.args.depths=[1, 1, 1, 1]", "trainer.strategy=fsdp"]
    assert main(["plan", *recipe, "--devices", "16", "--dry-run"]) == 0
    assert "Dry run        1 step as one of 16 ranks under fsdp: weights " in capsys.readouterr().out


def test_dry_run_of_a_dense_task_is_refused():
    with pytest.raises(RecipeError, match="needs its dataset: leave it out"):
        dry_run(load_recipe("coco/mask_rcnn_1x_uniformer_small"), 2)


@pytest.mark.parametrize(("size", "text"), [(5 * 2**20, "5.0 MiB"), (3 * 2**30, "3.00 GiB"), (2**28, "0.25 GiB")])
def test_bytes_are_shown_in_units_to_read(size, text):
    assert gib(size) == text


def test_precisions_of_estimates_are_those_of_training():
    from effbackbones.plan import AUTOCAST

    assert AUTOCAST.keys() == PRECISION.keys()


# Dense tasks


@pytest.mark.parametrize("task", [pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_plan_of_a_dense_task_has_the_backbone_and_neck(task, tmp_path):
    pytest.importorskip("mmcv", reason="needs the mm extra")
    (tmp_path / "dense.yaml").write_text(RECIPES[task])
    loaded = load_recipe(tmp_path / "dense.yaml", [f"data.root={scenes() / ROOTS[task]}", "data.batch_size=8"])
    plan = make_plan(loaded, 1)
    module = build_task(loaded)[0]
    assert plan.parameters == sum(parameter.numel() for parameter in module.model.parameters())
    images = torch.randn(8, 3, *((64, 64) if task == "segmentation" else (96, 128)))

    def step():
        dense_loss(module.model.extract_feat(images.clone())).backward()

    module.train()
    step()
    assert plan.memory["ddp"].activations == pytest.approx(peak_bytes(step, "cpu"), rel=0.15)  # small images
    assert plan.steps == 2 * (plan.images // 8)
    assert plan.warnings[0].startswith("the activations of the head")
