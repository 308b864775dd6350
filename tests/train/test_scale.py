"""The batch of an optimizer step: how devices share it, and that it stays when their number changes."""

import json
import signal
from dataclasses import replace
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from small_runs import BreakOff, BrokenOffError, checkpoint, small_recipe, train
from small_sets import write_shards

from effbackbones.config import Recipe, RecipeError, load_recipe
from effbackbones.config.schema import AugmentConfig, DataConfig, OptimConfig, TrainerConfig
from effbackbones.train import run
from effbackbones.train.batch import describe_batch, device_batch, global_batch
from effbackbones.train.classification import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def recipe(total, accumulate=1, **augment):
    return Recipe(
        data=DataConfig(global_batch=total, batch_size=6),
        augment=AugmentConfig(**augment),
        trainer=TrainerConfig(accumulate=accumulate),
    )


@pytest.mark.parametrize(
    ("total", "world", "accumulate", "batch"), [(1024, 8, 1, 128), (1024, 16, 2, 32), (48, 3, 4, 4), (None, 8, 2, 6)]
)
def test_batch_of_a_device_follows_from_the_global_batch(total, world, accumulate, batch):
    assert device_batch(recipe(total, accumulate), world) == batch
    assert global_batch(recipe(total, accumulate), world) == (total or 6 * world * accumulate)


@pytest.mark.parametrize(
    ("total", "world", "accumulate", "augment", "fits", "devices"),
    [
        (1000, 3, 1, {}, "set data.global_batch=999 or 1002", "or use 1, 2, 4, 5, 8, 10, 20 or ... devices"),
        (16, 3, 2, {}, "set data.global_batch=12 or 18", "or use 1, 2, 4 or 8 devices"),
        (4, 8, 1, {}, "set data.global_batch=8", "or use 1, 2 or 4 devices"),
        (24, 8, 1, {"mixup": 0.8}, "set data.global_batch=16 or 32", "or use 1, 2, 3, 4, 6 or 12 devices"),
        (3, 2, 2, {"cutmix": 1.0}, "set data.global_batch=8", ""),
    ],
)
def test_global_batch_that_does_not_divide_is_refused_with_numbers_that_fit(
    total, world, accumulate, augment, fits, devices
):
    with pytest.raises(RecipeError) as refusal:
        device_batch(recipe(total, accumulate, **augment), world)
    message = str(refusal.value)
    assert message.startswith(f"data.global_batch={total} does not divide over {world} devices x trainer.accumulate=")
    assert f"{fits}, {devices}" in message if devices else message.endswith(fits)
    for number in map(int, fits.partition("=")[2].split(" or ")):
        assert device_batch(recipe(number, accumulate, **augment), world) > 0


def test_line_of_the_batch_has_every_number():
    scaled = replace(recipe(1024, 2), optim=OptimConfig(lr=5e-4, lr_batch=512))
    assert describe_batch(scaled, 8) == (
        "Global batch 1024 = 64 per device x accumulate 2 x 8 devices; learning rate 0.001 (0.0005 for 512, scaled)."
    )
    assert "learning rate 0.001 (not scaled: optim.lr_batch is null)." in describe_batch(recipe(1024), 8)


def test_run_says_its_batch_and_has_it(tmp_path, capsys):
    settings = ["data.global_batch=12", "trainer.accumulate=2", "trainer.steps=1", "optim.lr=0.01", "optim.lr_batch=24"]
    folder = train(small_recipe(tmp_path / "run", settings))
    line = "Global batch 12 = 6 per device x accumulate 2 x 1 devices; learning rate 0.005 (0.01 for 24, scaled)."
    assert line in capsys.readouterr().out.splitlines()
    assert load_recipe(folder / "recipe.yaml").recipe.data.batch_size == 6
    assert checkpoint(folder)["global_batch"] == 12


def test_run_whose_batch_does_not_divide_ends_before_it_begins(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.global_batch=9 does not divide"):
        train(small_recipe(tmp_path / "run", ["data.global_batch=9", "trainer.accumulate=2"]))
    assert not (tmp_path / "run").exists()


# Another number of devices on resume. 70 images: an epoch has 4 steps of 16, and leaves 6 images out.

RECORDING = """
import json
import os
import sys

from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.data.datasets import TrainImages
from effbackbones.train import run
from effbackbones.train.callbacks.pictures import Pictures


class Record(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == last:
            os._exit(9)
        with open(f"{out}.{trainer.global_rank}", "a") as file:
            print(json.dumps([trainer.global_step, batch[1].tolist()]), file=file)


out, last = sys.argv[1], int(sys.argv[2])
callbacks, load = run._callbacks, TrainImages.load
run._callbacks = lambda *args: [*(c for c in callbacks(*args) if not isinstance(c, Pictures)), Record()]
TrainImages.load = lambda self, index: (load(self, index)[0], index)  # the class says which image it is
sys.exit(main(["train", *sys.argv[3:]]))
"""
IMAGES = [
    *("data.synthetic_images=70", "data.num_classes=70", "data.global_batch=16", "trainer.save_every=1"),
    *("trainer.limit_val=1", "model.norm_eval=true", "ema.decay=0.9"),
]


class Recorded:
    """A run whose command, given once or several times, records the images of every step."""

    def __init__(self, forks, folder):
        self.forks, self.folder, self.out = forks, folder / "run", folder / "seen"
        self.recipe = str(small_recipe(folder / "run").path)

    def train(self, *settings, ranks=1, until=99):
        """Train, and be killed before the step `until`, counted from 0."""
        arguments = (str(self.out), str(until), self.recipe, f"run.dir={self.folder}", *IMAGES, *settings)
        if ranks == 1:
            processes = [self.forks.start(*arguments, "trainer.devices=1", code=RECORDING)]
        else:
            processes = self.forks.start_ranks(*arguments, code=RECORDING)
        for process in processes:
            assert process.wait(600) == (0 if until == 99 else 9), process.said

    @property
    def steps(self):
        """The images of every step, in the order of ranks and batches."""
        files = (self.out.with_name(f"seen.{rank}") for rank in (0, 1))
        seen = {}
        for line in chain(*(file.read_text().splitlines() for file in files if file.exists())):
            step, images = json.loads(line)
            seen.setdefault(step, []).extend(images)
        return [seen[step] for step in sorted(seen)]


@pytest.fixture(scope="module")
def moved(forks, tmp_path_factory):
    """A run of two epochs on one device, and one that goes from two devices to one, and there to two halves."""
    whole, moving = (Recorded(forks, tmp_path_factory.mktemp(name)) for name in ("whole", "moving"))
    whole.train()
    moving.train(ranks=2, until=3)
    moving.train(until=6)
    moving.train("trainer.accumulate=2")
    return whole, moving


def test_run_on_other_devices_sees_the_same_images_in_every_step(moved):
    whole, moving = moved
    assert len(whole.steps) == 8
    assert moving.steps == whole.steps


def test_run_on_other_devices_sees_every_image_once_in_an_epoch(moved):
    _, moving = moved
    for epoch in (moving.steps[:4], moving.steps[4:]):
        images = list(chain(*epoch))
        assert len(images) == len(set(images)) == 64


def test_run_on_other_devices_ends_with_the_same_weights(moved):
    whole, moving = (checkpoint(run.folder) for run in moved)
    assert moving["global_step"] == whole["global_step"] == 8
    for name, value in whole["state_dict"].items():
        assert (value.double() - moving["state_dict"][name].double()).abs().max() < 1e-5, name


def test_another_batch_on_resume_is_refused_with_what_keeps_it(tmp_path):
    with pytest.raises(BrokenOffError):
        train(small_recipe(tmp_path / "run", ["trainer.save_every=2"]), BreakOff("on_train_batch_start", 2))
    with pytest.raises(RecipeError) as refusal:
        train(small_recipe(tmp_path / "run", ["trainer.devices=2"]))
    message = str(refusal.value)
    assert "  images of an optimizer step: 4 then, 8 now\n" in message
    assert "data.global_batch=4 keeps the old batch" in message
    train(small_recipe(tmp_path / "run", ["data.global_batch=4", "trainer.accumulate=2"]))
    assert checkpoint(tmp_path / "run")["global_step"] == 12


def test_other_nodes_with_images_of_their_own_are_refused_on_resume(tmp_path):
    shards = ["data.source=shards", f"data.root={write_shards(tmp_path / 'set')}", "data.num_classes=2"]
    settings = [*shards, "data.split_by_node=true", "trainer.steps=1", "trainer.limit_val=1", "data.global_batch=4"]
    train(small_recipe(tmp_path / "run", settings))
    with pytest.raises(RecipeError, match=r"of another recipe:\n  trainer\.nodes: 1 then, 2 now\n"):
        train(small_recipe(tmp_path / "run", [*settings, "trainer.nodes=2", "trainer.devices=1"]))


@pytest.mark.parametrize(("stages", "calls"), [("true", [2, 2, 2, 2]), ("[1, 3]", [1, 2, 1, 2]), ("false", [1] * 4)])
def test_activations_are_recomputed_in_the_stages_of_the_recipe(tmp_path, stages, calls):
    count = [0] * 4

    class Count(BreakOff):
        def on_train_start(self, trainer, pl_module):
            for i, stage in enumerate(pl_module.model.stages):
                stage.blocks[0].register_forward_pre_hook(lambda *args, i=i: count.__setitem__(i, count[i] + 1))

        def on_train_batch_end(self, *args):
            self.seen = list(count)

    watch = Count("on_fit_end", -1)
    train(small_recipe(tmp_path / "run", ["trainer.steps=1", f"model.grad_checkpointing={stages}"]), watch)
    assert watch.seen == calls


@pytest.mark.parametrize("stages", ["[]", "[1, 0]", "[4]", "[0, 0]"])
def test_stages_that_are_none_are_refused(tmp_path, stages):
    with pytest.raises(RecipeError, match=r"model\.grad_checkpointing: expected true, false, or increasing numbers"):
        small_recipe(tmp_path / "run", [f"model.grad_checkpointing={stages}"])


def test_stages_of_a_model_without_any_are_refused(tmp_path):
    settings = ["model.name=resnet18", "model.grad_checkpointing=[0]"]
    with pytest.raises(RecipeError, match=r"model\.grad_checkpointing: resnet18 is no model of the zoo"):
        small_recipe(tmp_path / "run", settings)


def test_optimizer_that_cannot_step_shards_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"optim\.name: muon is not known to work with trainer\.strategy=fsdp"):
        small_recipe(tmp_path / "run", ["optim.name=muon", "trainer.strategy=fsdp"])


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [(("trainer.precision=bf16",), True), (("trainer.precision=fp16",), None), (("optim.name=lamb",), None)],
)
def test_run_takes_the_fused_optimizer_where_there_is_one_that_fits(tmp_path, overrides, fused):
    watch = Callback()
    watch.on_train_start = lambda trainer, module: groups.extend(trainer.optimizers[0].param_groups)
    groups = []
    train(small_recipe(tmp_path / "run", ["trainer.steps=1", "trainer.limit_val=1", *overrides]), watch)
    assert {group.get("fused") for group in groups} == {fused}


def test_model_is_compiled_and_stored_channels_last_where_the_recipe_says_so(tmp_path):
    settings = ["model.compile=true", "model.channels_last=true"]
    for overrides, wanted in ((settings, True), ([], False)):
        recipe = small_recipe(tmp_path / "run", overrides).recipe
        module = ClassificationModule(recipe, ("a", "b", "c", "d"), "")
        assert (module.model._compiled_call_impl is not None) == wanted
        weights = [weight for weight in module.model.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights} == {wanted}
        assert module._layout(torch.ones(2, 3, 32, 32)).is_contiguous(memory_format=torch.channels_last) == wanted


def test_batch_norms_synchronise_where_there_is_cuda(tmp_path, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(run, "has_sync_bn", lambda accelerator, has=has: has)
        for asked in (True, False):
            recipe = small_recipe(
                tmp_path / "run", [f"trainer.sync_bn={str(asked).lower()}", "trainer.devices=2"]
            ).recipe
            strategy = run.make_trainer(recipe, None, []).strategy
            assert isinstance(strategy._layer_sync, TorchSyncBatchNorm) == (has and asked)


# Launchers


def test_tasks_of_slurm_are_ranks_of_one_run_that_a_signal_ends_with_the_code_of_a_requeue(forks, tmp_path):
    recipe = str(small_recipe(tmp_path / "run").path)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "effb", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    settings = ["trainer.devices=2", "trainer.steps=40", "data.synthetic_images=400", "trainer.limit_val=1"]

    ranks = ({"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"} for rank in (0, 1))
    tasks = [
        forks.start("train", recipe, f"run.dir={tmp_path / 'run'}", *settings, env={**job, "SLURM_NNODES": "1", **rank})
        for rank in ranks
    ]
    tasks[0].wait_to_say("step 1/", 600)
    for task in tasks:
        task.kill(signal.SIGUSR1)
    assert [task.wait(600) for task in tasks] == [143, 143], tasks[0].said
    assert "Global batch 8 = 4 per device x accumulate 1 x 2 devices" in tasks[0].said
    assert 1 <= checkpoint(tmp_path / "run")["global_step"] < 40


def test_other_devices_than_torchrun_has_started_are_refused(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RecipeError, match=r"trainer\.devices, trainer\.nodes: set them to what was launched: .*size \(4\)"
    ):
        train(small_recipe(tmp_path / "run", ["trainer.devices=2"]))
