"""LoRA: what is adapted in each family, what is trained, and that merged weights say the same."""

import builtins
import sys

import pytest
import timm
import torch
from lightning.pytorch import Callback
from small_models import depths
from small_runs import BreakOff, BrokenOffError, checkpoint, differences, outcome, small_recipe, train
from torch import nn

from effbackbones.checkpoint import CheckpointError, load_weights, strip_wrappers
from effbackbones.config import RecipeError
from effbackbones.config.schema import LoraConfig
from effbackbones.models import sg_former
from effbackbones.predict import Predictor
from effbackbones.train import run
from effbackbones.train.classification import build_model
from effbackbones.train.logger import read_metrics
from effbackbones.train.lora import adaptable, add_adapters, load_beneath

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

FAMILIES = {
    "uniformer_xxs": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "uniformer_small_tl": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "gc_vit_xxtiny": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "transnext_micro": ("attn.q", "attn.kv", "attn.sr", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "s2aformer_mini": ("attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "sgformer_s": ("attn.q", "attn.kv", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "stvit_small": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "stvit_r_swin_tiny": ("attn.q", "attn.kv", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}
LORA = ["lora.rank=2", "lora.alpha=6"]


def small(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, depths=depths(name, compiled=True)).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_adapted_in_attention_and_mlp_and_merges_to_the_same_outputs(name, monkeypatch):
    # Tokens that are sorted by their significance swap places at the least difference.
    monkeypatch.setattr(sg_former, "ascending", lambda x_bn: torch.arange(x_bn.shape[1]).expand(x_bn.shape))
    model, plain = small(name), small(name)
    before = set(dict(model.named_parameters()))
    targets = adaptable(model, 4)
    add_adapters(model, LoraConfig(rank=4, alpha=6))
    for layer in FAMILIES[name]:
        assert any(target.endswith(f".{layer}") for target in targets), layer
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(targets)
    assert {key.partition(".lora_")[0] for key in trained} == set(targets)
    for key, value in trained.items():
        if ".lora_B." in key:
            nn.init.normal_(value, std=0.05)

    # 96 pixels do not divide into the windows of GC ViT, which computes with weights of its own then.
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    output = model.train()(images)
    model.loss(output, torch.tensor([0, 1]), nn.functional.cross_entropy).backward()
    assert [key for key, value in trained.items() if value.grad is None or not value.grad.any()] == []

    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    weights = strip_wrappers({"state_dict": state, "lora_scaling": 6 / 4})
    assert before <= set(weights)
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected, merged = model.eval()(images), plain.eval()(images)
    assert (merged - expected).abs().max() < 1e-6 * expected.abs().max()


def test_adapters_start_without_an_effect_on_the_weights_beneath():
    model, other = small("uniformer_xxs").eval(), small("uniformer_xxs").eval()
    nn.init.normal_(other.stages[2].blocks[0].attn.proj.weight)
    add_adapters(model, LoraConfig(rank=4))
    load_beneath(model, other.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), other(images))


def test_blocks_of_other_models_are_adapted_too():
    model = timm.create_model("test_vit")
    assert {name.partition(".")[2].partition(".")[2] for name in adaptable(model, 2)} == {
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


class Watch(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.before = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    def on_train_end(self, trainer, pl_module):
        after = pl_module.model.state_dict()
        self.changed = {name for name, value in self.before.items() if not torch.equal(value, after[name])}
        self.optimized = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with LoRA and an average of the weights from the weights of another run, and what was watched of it."""
    folder = tmp_path_factory.mktemp("lora")
    start = train(small_recipe(folder / "start", ["data.num_classes=3", "trainer.steps=2"]))
    watch = Watch()
    overrides = [*LORA, "optim.lr=0.05", "ema.decay=0.5", f"model.checkpoint={start}"]
    return start, train(small_recipe(folder / "run", overrides), watch), watch


def test_run_trains_adapters_and_classifier_and_nothing_else(trained):
    start, _, watch = trained
    assert {name for name in watch.changed if ".lora_" not in name} == {"head.fc.weight", "head.fc.bias"}
    assert watch.optimized == len(watch.changed) == len([name for name in watch.before if ".lora_" in name]) + 2
    beneath = {name.replace(".base_layer.", "."): value for name, value in watch.before.items()}
    weights = strip_wrappers(checkpoint(start, "best"))
    assert all(torch.equal(beneath[name], value) for name, value in weights.items() if not name.startswith("head."))


def test_checkpoint_of_a_run_is_plain_and_serves_like_any_other(tmp_path, trained, monkeypatch):
    _, folder, _ = trained
    last = checkpoint(folder)
    recipe = small_recipe(folder, LORA).recipe
    adapted = build_model(recipe, 4)
    add_adapters(adapted, recipe.lora)
    adapted.load_state_dict({k.removeprefix("model."): v for k, v in last["state_dict"].items() if k[:6] == "model."})
    images = torch.randn(3, 3, 32, 32)
    model = build_model(recipe, 4)
    fresh = model.eval()(images)
    load_weights(model, folder / "checkpoints" / "last.ckpt", same_classes=True)
    with torch.no_grad():
        expected, merged = adapted.eval()(images), model(images)
    assert (merged - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (merged - fresh).abs().max() > 1e-2 * expected.abs().max()

    # From here on as on a machine without peft.
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "effbackbones.train.lora")
    best = checkpoint(folder, "best")["global_step"]
    (row,) = [row for row in read_metrics(folder / "metrics.csv") if row["step"] == best]
    evaluated = {name: row[f"val/{name}"] for name in ("top1", "top5", "loss")}
    assert run.evaluate(str(folder)) == pytest.approx(evaluated, rel=1e-5)
    assert Predictor.from_run(folder).model.state_dict().keys() == model.state_dict().keys()
    tuned = train(small_recipe(tmp_path / "tuned", [f"model.checkpoint={folder}", "trainer.steps=1"]))
    assert set(strip_wrappers(checkpoint(tuned))) == set(model.state_dict())


def test_averaged_adapters_merge_as_well(trained):
    _, folder, _ = trained
    last = checkpoint(folder)
    averaged, raw = strip_wrappers(last, ema=True), strip_wrappers(last)
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw if ".blocks." in key)


def test_adapters_without_their_scaling_are_refused(trained):
    _, folder, _ = trained
    with pytest.raises(CheckpointError, match="holds adapters of LoRA, but no lora_scaling"):
        strip_wrappers({"state_dict": checkpoint(folder)["state_dict"]})


@pytest.mark.parametrize("more", [["lora.dropout=0.3", "model.frozen_stages=2", "model.grad_checkpointing=true"]])
def test_run_with_adapters_resumes_to_the_same_bits(tmp_path, more):
    overrides = [*LORA, *more, "model.drop_path_rate=0.3", "ema.decay=0.9", "trainer.save_every=4"]
    watch = Watch()
    whole = train(small_recipe(tmp_path / "whole", overrides), watch)
    assert {name.split(".")[1] for name in watch.changed if ".lora_" in name} == {"2", "3"}
    with pytest.raises(BrokenOffError):
        train(small_recipe(tmp_path / "run", overrides), BreakOff("on_train_batch_start", 9))
    assert differences(outcome(whole), outcome(train(small_recipe(tmp_path / "run", overrides)))) == []


def test_rank_that_no_layer_takes_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"lora\.rank=500: no linear layer of UniFormer's blocks takes that rank"):
        train(small_recipe(tmp_path / "run", ["lora.rank=500"]))


def test_settings_without_a_rank_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"lora: has no effect without lora\.rank"):
        small_recipe(tmp_path / "run", ["lora.alpha=4"])


def test_missing_peft_is_an_error_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "effbackbones.train.lora")
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(RecipeError, match=r"lora\.rank needs peft, .*pip install 'effbackbones\[lora\]'"):
        train(small_recipe(tmp_path / "run", LORA))
