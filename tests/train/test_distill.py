"""Distillation: what the losses are, what a teacher sees, and what is left of it in a run."""

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from small_runs import (
    BreakOff,
    BrokenOffError,
    checkpoint,
    differences,
    outcome,
    small_recipe,
    train,
    write_recipe,
)
from timm.data import IMAGENET_INCEPTION_MEAN

from effbackbones.checkpoint import load_weights, strip_wrappers
from effbackbones.config import RecipeError
from effbackbones.train.classification import ClassificationModule, build_model
from effbackbones.train.distill import Teacher
from effbackbones.train.run import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weight files of teachers of 4 classes, by the name of their model."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("test_resnet", "test_vit"):
        torch.manual_seed(1)
        torch.save(timm.create_model(name, num_classes=4).state_dict(), folder / f"{name}.pth")
    return folder


def distilled(folder, weights, *overrides, teacher="test_resnet"):
    source = [f"distill.teacher={teacher}", f"distill.checkpoint={weights / teacher}.pth"]
    return small_recipe(folder, [*source, *overrides])


def module_of(loaded):
    module = ClassificationModule(loaded.recipe, tuple("abcd"), loaded.to_yaml())
    module.train()
    return module


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def teacher_logits(weights, images):
    """Return what the teacher says of images as its own normalisation makes them."""
    teacher = timm.create_model("test_resnet", num_classes=4).eval()
    load_weights(teacher, weights / "test_resnet.pth")
    with torch.no_grad():
        return teacher(images)


# Losses


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["distill.temperature=3"],
            lambda s, t: 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="sum") / 4,
        ),
        (["distill.hard=true"], lambda s, t: F.cross_entropy(s, t.argmax(1))),
    ],
    ids=["soft", "hard"],
)
def test_losses_are_those_of_labels_and_logits_by_their_shares(tmp_path, weights, settings, expected):
    normal = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]  # those of the teacher, test_resnet
    module = module_of(distilled(tmp_path / "run", weights, "distill.alpha=0.3", *settings, *normal))
    images, targets = batch()
    losses = module.forward_loss((images, targets))
    student = module.model(images)
    assert losses["label"].item() == pytest.approx(F.cross_entropy(student, targets).item(), rel=1e-5)
    assert losses["teacher"].item() == pytest.approx(
        expected(student, teacher_logits(weights, images)).item(), rel=1e-4
    )
    assert losses["loss"].item() == pytest.approx(0.7 * losses["label"].item() + 0.3 * losses["teacher"].item())


def test_features_are_compared_by_their_direction_after_a_projection(tmp_path, weights):
    module = module_of(distilled(tmp_path / "run", weights, "distill.alpha=0", "distill.features=0.5"))
    images, targets = batch()
    losses = module.forward_loss((images, targets))
    pooled = module.model.forward_head(module.model.forward_features(images), pre_logits=True)
    _, features = module.distillation._teacher(images)
    projected = module.distillation.projection(pooled)
    cosine = (projected * features).sum(1) / projected.norm(dim=1) / features.norm(dim=1)
    assert losses["features"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(losses["label"].item() + 0.5 * losses["features"].item())
    losses["features"].backward()
    assert module.distillation.projection.weight.grad.abs().sum() > 0
    assert module.model.stem.proj.weight.grad.abs().sum() > 0


def test_student_with_a_loss_of_its_own_learns_the_logits_by_it(tmp_path, weights):
    loaded = distilled(tmp_path / "run", weights, "model.name=uniformer_small_tl", "distill.alpha=1")
    module = module_of(loaded)
    losses = module.forward_loss(batch())
    losses["loss"].backward()
    assert module.model.head_aux.weight.grad.abs().sum() > 0


# What the teacher sees


def test_teacher_sees_images_normalised_and_sized_as_it_was_trained(tmp_path, weights):
    recipe = distilled(tmp_path / "run", weights, teacher="test_vit").recipe
    teacher = Teacher(recipe, tuple("abcd"))
    assert teacher.model.pretrained_cfg["mean"] == IMAGENET_INCEPTION_MEAN
    seen = []
    teacher.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    raw = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.data.mean, recipe.data.std))
    teacher((raw - mean) / std)
    (images,) = seen
    assert images.shape == (2, 3, *teacher.model.pretrained_cfg["input_size"][1:])
    torch.testing.assert_close(images, ((raw - 0.5) / 0.5)[..., :1, :1].expand_as(images))


def test_run_as_a_teacher_brings_its_arguments_and_its_normalisation(tmp_path, weights):
    run = train(
        small_recipe(
            tmp_path / "teacher",
            ["trainer.steps=1", "data.std=[0.5, 0.5, 0.5]", "ema.decay=0.9", "trainer.monitor=top1_ema"],
        )
    )
    loaded = small_recipe(tmp_path / "run", ["distill.teacher=uniformer_small", f"distill.checkpoint={run}"])
    classes = tuple(checkpoint(run)["classes"])
    teacher = Teacher(loaded.recipe, classes)
    expected = build_model(loaded.recipe, 4).eval()
    load_weights(expected, run, ema=True)
    images, _ = batch()
    with torch.no_grad():
        std = torch.tensor(loaded.recipe.data.std)[:, None, None]
        torch.testing.assert_close(teacher(images)[0], expected(images * std / 0.5))
    with pytest.raises(RecipeError, match=r"not made for the 4 classes of the dataset, .*distill\.alpha=0"):
        Teacher(loaded.recipe, classes[::-1])
    loaded.recipe.distill.teacher = "uniformer_xxs"
    with pytest.raises(RecipeError, match=r"distill\.teacher=uniformer_xxs: .* is a run of uniformer_small"):
        Teacher(loaded.recipe, classes)


def test_teacher_of_other_classes_teaches_features_alone(tmp_path, weights):
    with pytest.raises(
        RecipeError, match=r"test_resnet\.pth: not made for the 3 classes of the dataset, .*distill\.alpha=0"
    ):
        train(distilled(tmp_path / "run", weights, "data.num_classes=3"))
    features = ["distill.alpha=0", "distill.features=1"]
    folder = train(distilled(tmp_path / "run", weights, "data.num_classes=3", *features, "trainer.steps=1"))
    assert "train/features" in (folder / "metrics.csv").read_text().splitlines()[0]


# Runs


class Watch(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.projection = pl_module.distillation.projection.weight.clone()
        self.teacher = {k: v.clone() for k, v in pl_module.distillation._teacher.model.state_dict().items()}

    def on_train_end(self, trainer, pl_module):
        distillation = pl_module.distillation
        self.learnt = not torch.equal(self.projection, distillation.projection.weight)
        after = distillation._teacher.model.state_dict()
        self.teacher_changed = [k for k, v in self.teacher.items() if not torch.equal(v, after[k])]
        self.teacher_trains = distillation._teacher.model.training
        self.decayed = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]


MIXED = ["distill.features=0.5", "augment.mixup=0.8", "augment.cutmix=1", "ema.decay=0.9", "model.drop_path_rate=0.3"]


def test_run_keeps_the_teacher_as_it_is_and_out_of_its_checkpoints(tmp_path, weights):
    watch = Watch()
    folder = train(distilled(tmp_path / "run", weights, *MIXED, "optim.weight_decay=0.1"), watch)
    assert watch.learnt
    assert watch.teacher_changed == []
    assert not watch.teacher_trains
    assert watch.decayed[-1] == 0
    student = set(build_model(small_recipe(folder).recipe, 4).state_dict())
    for name in ("best", "last"):
        saved = checkpoint(folder, name)
        others = {key for key in saved["state_dict"] if not key.startswith(("model.", "ema.module.", "metrics."))}
        assert others == {"distillation.projection.weight", "distillation.projection.bias"}
        for ema in (False, True):
            assert set(strip_wrappers(saved, ema)) == student


def test_evaluation_needs_no_teacher(tmp_path, weights):
    teacher = weights / "test_resnet.pth"
    gone = tmp_path / "test_resnet.pth"
    gone.write_bytes(teacher.read_bytes())
    folder = train(distilled(tmp_path / "run", tmp_path, "trainer.steps=1"))
    gone.unlink()
    assert 0 <= evaluate(str(folder))["top1"] <= 1


def test_run_with_a_teacher_resumes_to_the_same_bits(tmp_path, weights):
    overrides = [*MIXED, "trainer.save_every=4"]
    whole = train(distilled(tmp_path / "whole", weights, *overrides))
    with pytest.raises(BrokenOffError):
        train(distilled(tmp_path / "run", weights, *overrides), BreakOff("on_train_batch_start", 9))
    assert differences(outcome(whole), outcome(train(distilled(tmp_path / "run", weights, *overrides)))) == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_adapters_and_a_projection_beside_a_teacher(forks, tmp_path, weights, strategy):
    teacher = ["distill.teacher=test_resnet", f"distill.checkpoint={weights / 'test_resnet.pth'}"]
    parts = ["distill.features=0.5", "lora.rank=2", "model.frozen_stages=1", "ema.decay=0.9"]
    arguments = [str(write_recipe(tmp_path)), f"run.dir={tmp_path / 'run'}", *teacher, *parts, "trainer.steps=3"]
    for process in forks.start_ranks("train", *arguments, strategy=strategy):
        assert process.wait(180) == 0, process.said
    saved = checkpoint(tmp_path / "run")
    assert saved["global_step"] == 3
    added = {name: value for name, value in saved["state_dict"].items() if ".lora_B." in name}
    assert {name.split(".")[2] for name in added if name.startswith("model.stages.")} == {"1", "2", "3"}
    assert all(value.any() for value in added.values())
    assert {"distillation.projection.weight", "distillation.projection.bias"} < set(saved["state_dict"])


def test_compiled_student_has_the_same_losses(tmp_path, weights, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend="eager", **options))
    images, targets = batch()
    losses = []
    for compiled in ("false", "true"):
        torch.manual_seed(0)
        settings = ["distill.features=1", f"model.compile={compiled}"]
        module = module_of(distilled(tmp_path / "run", weights, *settings))
        losses.append({name: loss.item() for name, loss in module.forward_loss((images, targets)).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.alpha=0.2"], r"distill: has no effect without distill\.teacher"),
        (["distill.teacher=resnet18"], r"distill\.checkpoint: required: the weights of the teacher"),
        (
            ["distill.teacher=resnet81", "distill.checkpoint=x"],
            r"distill\.teacher: expected a registered model, .*nearest",
        ),
        (
            ["distill.teacher=resnet18", "distill.checkpoint=x", "distill.alpha=0"],
            r"distill\.alpha: expected one above 0",
        ),
        (
            ["distill.teacher=resnet18", "distill.checkpoint=x", "distill.hard=true", "distill.temperature=2"],
            r"distill\.temperature: has no effect where no probabilities are learnt",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe(tmp_path / "run", overrides)
