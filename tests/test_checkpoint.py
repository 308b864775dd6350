"""Weight files: what is read, what is refused, and that a file is whole or not there."""

import argparse
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

import effbackbones  # noqa: F401
from effbackbones.checkpoint import (
    CheckpointError,
    Loaded,
    load_weights,
    read_checkpoint,
    run_checkpoint,
    strip_wrappers,
)
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO

WEIGHTS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "head.fc.bias": torch.ones(4)}
AVERAGED = {key: value + 1 for key, value in WEIGHTS.items()}


def prefixed(prefix: str, weights: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def weight_file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS, "epoch": 3}, path)
    return path


# Nesting


@pytest.mark.parametrize(
    "checkpoint",
    [
        WEIGHTS,
        {"model": WEIGHTS, "optimizer": {"state": {}, "param_groups": []}, "epoch": 299},
        {"state_dict": OrderedDict(WEIGHTS), "state_dict_ema": AVERAGED, "arch": "uniformer_small"},
        {"model": WEIGHTS, "model_ema": AVERAGED, "args": argparse.Namespace(lr=1e-3), "max_accuracy": 82.9},
        prefixed("module."),
        {"model": prefixed("module.")},
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        {"state_dict": prefixed("backbone.") | {"neck.conv.weight": torch.ones(2), "bbox_head.fc.bias": torch.ones(2)}},
        {"state_dict": prefixed("module.backbone.") | {"module.decode_head.conv.bias": torch.ones(2)}, "meta": {}},
        {"state_dict": prefixed("model.") | prefixed("ema.module.", AVERAGED) | {"metrics.0.total": torch.ones(())}},
        {"state_dict": prefixed("backbone.model.") | {"neck.conv.weight": torch.ones(2)}, "message_hub": {}},
        {"state_dict": prefixed("model.backbone.model.") | {"model.neck.conv.weight": torch.ones(2)}},
    ],
    ids=[
        "flat", "model", "state_dict", "model_beside_ema", "ddp", "model_ddp", "compiled", "ddp_compiled",
        "compiled_ddp", "detector", "ddp_segmentor", "own_run", "detector_on_ours", "own_run_of_detector",
    ],
)  # fmt: skip
def test_strip_wrappers_of_known_nesting_returns_the_weights(checkpoint):
    assert same(strip_wrappers(checkpoint), WEIGHTS)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": WEIGHTS, "state_dict_ema": AVERAGED},
        {"model": WEIGHTS, "model_ema": prefixed("module.", AVERAGED)},
        {"state_dict": prefixed("model.") | prefixed("ema.module.", AVERAGED)},
        {"state_dict": prefixed("model.backbone.model.") | prefixed("ema.module.backbone.model.", AVERAGED)},
    ],
    ids=["state_dict_ema", "model_ema", "own_run", "own_run_of_detector"],
)
def test_strip_wrappers_with_ema_returns_the_averaged_weights(checkpoint):
    assert same(strip_wrappers(checkpoint, ema=True), AVERAGED)


@pytest.mark.parametrize("checkpoint", [WEIGHTS, {"state_dict": prefixed("model.")}], ids=["flat", "own_run"])
def test_strip_wrappers_with_ema_of_raw_weights_alone_raises(checkpoint):
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        strip_wrappers(checkpoint, ema=True)


def test_strip_wrappers_keeps_the_checkpoint_as_it_is():
    checkpoint = {"model": prefixed("module.")}
    strip_wrappers(checkpoint)
    assert list(checkpoint["model"]) == list(prefixed("module."))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "no weights"),
        ({"model": {}}, "no weights"),
        (WEIGHTS | {"epoch": 3}, "entries that are no tensors: epoch"),
        ({"model": WEIGHTS | {"note": "best"}}, "entries that are no tensors: note"),
        ({0: 1.0}, "entries that are no tensors: 0"),
    ],
    ids=["empty", "empty_model", "flat_with_number", "model_with_text", "numbered"],
)
def test_strip_wrappers_of_other_entries_raises_and_names_them(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        strip_wrappers(checkpoint)


def test_strip_wrappers_adds_adapters_of_lora_to_their_layers():
    linear, conv = torch.randn(4, 3), torch.randn(4, 3, 1, 1)
    down, up = torch.randn(2, 3), torch.randn(4, 2)
    state = {
        "fc.base_layer.weight": linear,
        "fc.base_layer.bias": torch.ones(4),
        "fc.lora_A.default.weight": down,
        "fc.lora_B.default.weight": up,
        "conv.base_layer.weight": conv,
        "conv.lora_A.default.weight": down[..., None, None],
        "conv.lora_B.default.weight": up[..., None, None],
        "norm.weight": torch.ones(4),
    }
    weights = strip_wrappers({"state_dict": prefixed("model.", state), "lora_scaling": 0.5})
    expected = {
        "fc.weight": linear + 0.5 * up @ down,
        "fc.bias": torch.ones(4),
        "conv.weight": conv + 0.5 * (up @ down)[..., None, None],
        "norm.weight": torch.ones(4),
    }
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value)


# Reading


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before_torch_1.6"])
def test_read_checkpoint_returns_what_was_saved(tmp_path, legacy):
    path = tmp_path / "weights.pth"
    args = argparse.Namespace(lr=1e-3)
    torch.save({"model": WEIGHTS, "epoch": 3, "args": args}, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint["model"], WEIGHTS)
    assert (checkpoint["epoch"], checkpoint["args"]) == (3, args)


def test_read_checkpoint_of_safetensors_returns_the_tensors(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert same(read_checkpoint(tmp_path / "weights.safetensors"), WEIGHTS)


def test_read_checkpoint_of_missing_file_raises(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such file"):
        read_checkpoint(tmp_path / "absent.pth")


def test_read_checkpoint_of_folder_raises(tmp_path):
    with pytest.raises(CheckpointError, match="no such file; give a weight file or a run folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"weights, honestly\n" * 9, b'{"model": {}}', bytes(500), b"PK\x03\x04"], ids=lambda c: str(c[:4])
)
def test_read_checkpoint_of_something_else_raises_and_names_the_file(tmp_path, content, suffix):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"other\{suffix}: not a weight file, or a damaged or incomplete one"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_read_checkpoint_of_cut_off_file_raises(tmp_path, weight_file, suffix):
    path = tmp_path / f"cut{suffix}"
    whole = weight_file.read_bytes() if suffix == ".pth" else safetensors.torch.save(WEIGHTS)
    for length in (1, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            read_checkpoint(path)


def test_read_checkpoint_of_flipped_weight_raises_though_torch_reads_it(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(1000.0)}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match="data/0 does not have its checksum"):
        read_checkpoint(path)


def test_read_checkpoint_of_any_damaged_byte_raises_or_returns_the_saved(weight_file, tmp_path):
    whole = weight_file.read_bytes()
    damaged = tmp_path / "damaged.pth"
    refused = 0
    for i in range(0, len(whole), 7):
        damaged.write_bytes(whole[:i] + bytes([whole[i] ^ 0x81]) + whole[i + 1 :])
        try:
            assert same(strip_wrappers(read_checkpoint(damaged)), WEIGHTS)
        except CheckpointError as error:
            assert str(damaged) in str(error)
            refused += 1
    assert refused > len(whole) / 7 / 2


def test_read_checkpoint_of_damaged_safetensors_header_raises(tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = bytearray(safetensors.torch.save(WEIGHTS))
    whole[whole.index(b"F32")] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_checkpoint(path)


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_read_checkpoint_of_pickle_with_code_raises_and_runs_nothing(tmp_path, writer):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {"model": WEIGHTS, "extra": Malicious(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(CheckpointError, match=r"holds \S+, which is neither weights nor a plain type, and is not read"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file does have what would have run


class HistoryBuffer:
    """What mm's runner logs with, as far as its pickle goes."""

    def __init__(self, trace: Path):
        self._log_history = np.array([0.5, 0.25])
        self.last = self._log_history[-1]
        self.trace = str(trace)
        self.statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> None:
        raise NotImplementedError

    @staticmethod
    def touch(path: str) -> None:
        Path(path).touch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.touch(state["trace"])


@pytest.fixture
def mm_history_buffer(monkeypatch):
    """The class at its place in mmengine, whether that is installed or not."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_checkpoint_of_mms_runner_gives_the_weights_and_makes_none_of_its_objects(
    tmp_path, mm_history_buffer, zipped
):
    path, trace = tmp_path / "iter_2.pth", tmp_path / "trace"
    content = {
        "meta": {"epoch": 1, "cfg": "model = dict()", "dataset_meta": {"classes": ("bag", "boot")}},
        "state_dict": OrderedDict(prefixed("backbone.model.")),
        "message_hub": {"log_scalars": OrderedDict(loss=mm_history_buffer(trace)), "runtime_info": OrderedDict(iter=2)},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "param_schedulers": [{"last_step": 2, "_last_value": [np.float64(0.1)]}],
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert same(strip_wrappers(checkpoint), WEIGHTS)
    assert checkpoint["meta"] == content["meta"]
    assert checkpoint["optimizer"] == content["optimizer"]
    assert checkpoint["message_hub"]["runtime_info"] == {"iter": 2}
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does have the object


class Attribute:
    """Unpickles as an attribute of an object."""

    def __init__(self, of: Any, name: str):
        self.arguments = (of, name)

    def __call__(self) -> None:
        """Make pickle take it for a function."""

    def __reduce__(self) -> Any:
        return getattr, self.arguments


class Call:
    """Unpickles as what a function returns that is an attribute of mm's HistoryBuffer."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Attribute(HistoryBuffer, "touch"), (str(self.trace),)


def test_read_checkpoint_calls_nothing_that_mms_objects_lead_to(tmp_path, mm_history_buffer):
    path, trace = tmp_path / "iter_2.pth", tmp_path / "trace"
    torch.save({"state_dict": WEIGHTS, "message_hub": Call(trace)}, path)
    with pytest.raises(CheckpointError, match=r"iter_2\.pth: not a weight file, .* UnpicklingError"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_read_checkpoint_of_tensor_alone_raises(tmp_path):
    torch.save(torch.ones(3), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor, expected a mapping"):
        read_checkpoint(tmp_path / "weights.pth")


# Run folders


def test_run_checkpoint_prefers_best_and_falls_back_to_last(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").touch()
    assert run_checkpoint(tmp_path) == folder / "last.ckpt"
    (folder / "best.ckpt").touch()
    assert run_checkpoint(tmp_path) == folder / "best.ckpt"
    assert run_checkpoint(tmp_path, "last") == folder / "last.ckpt"


@pytest.mark.parametrize("made", ["", "run", "run/checkpoints"])
def test_run_checkpoint_of_folder_without_checkpoints_raises(tmp_path, made):
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match=r"run: no checkpoint in .*expected best\.ckpt or last\.ckpt"):
        run_checkpoint(tmp_path / "run")


# Loading into models


def tiny(**kwargs: Any) -> Any:
    return timm.create_model("uniformer_xxs", depths=(1, 1, 2, 1), dims=(8, 8, 28, 28), **kwargs)


def test_load_weights_takes_a_run_folder_and_its_averaged_weights(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    raw, averaged, model = (tiny(num_classes=7) for _ in range(3))
    state = prefixed("model.", raw.state_dict()) | prefixed("ema.module.", averaged.state_dict())
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "checkpoints" / "best.ckpt")
    load_weights(model, tmp_path)
    assert same(model.state_dict(), raw.state_dict())
    load_weights(model, tmp_path, ema=True)
    assert same(model.state_dict(), averaged.state_dict())


def test_load_weights_returns_what_was_taken_and_what_was_not(tmp_path):
    trained, model = tiny(num_classes=7), tiny(num_classes=5)
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    loaded = load_weights(model, path)
    heads = tuple(key for key in model.state_dict() if key.startswith("head"))
    tensors = sum(not key.startswith("head") and not key.endswith("tracked") for key in model.state_dict())
    assert loaded == Loaded(str(path), tensors, fresh=heads, left_out=heads)


def test_loaded_says_it_in_a_line():
    kept = ("a.b.weight", "a.b.bias", "c.weight")
    assert str(Loaded("w.pth", 3)) == "Started from w.pth: 3 tensors loaded"
    assert str(Loaded("w.pth", 3, kept)) == "Started from w.pth: 3 tensors loaded; fresh: a.b.*, c.*"
    left_out = ("a.b.weight", *(f"d{i}.weight" for i in range(6)))
    assert str(Loaded("w.pth", 3, kept, left_out)) == (
        "Started from w.pth: 3 tensors loaded; fresh: a.b.*, c.*; left out: d0.*, d1.*, d2.*, d3.*, 2 more"
    )


def test_load_weights_of_other_classes_leaves_the_classifier_out(tmp_path):
    trained, model = tiny(num_classes=7), tiny(num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, tmp_path / "weights.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith("head") else trained.state_dict())[key])
    assert model.pretrained_cfg["num_classes"] == 1000


def test_load_weights_of_as_many_other_classes_leaves_the_classifier_out(tmp_path):
    trained, model = tiny(num_classes=3), tiny(num_classes=3)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": prefixed("model.", trained.state_dict()), "classes": ["cat", "dog", "emu"]}, path)
    assert load_weights(model, path, classes=("cat", "dog", "emu")).fresh == ()
    assert same(model.state_dict(), trained.state_dict())
    loaded = load_weights(model, path, classes=("cat", "emu", "dog"))
    assert loaded.fresh == loaded.left_out == tuple(key for key in model.state_dict() if key.startswith("head"))
    with pytest.raises(CheckpointError, match="made for the classes cat, dog, emu; expected cat, emu, dog"):
        load_weights(model, path, same_classes=True, classes=("cat", "emu", "dog"))


@pytest.mark.parametrize(("entries", "made_for"), [("", "7"), ("head", "no")], ids=["other_width", "no_classifier"])
def test_load_weights_of_same_classes_refuses_another_classifier(tmp_path, entries, made_for):
    model = tiny(num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny(num_classes=7).state_dict()
    torch.save({key: v for key, v in state.items() if not (entries and key.startswith(entries))}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w\.pth: made for {made_for} classes, expected 5"):
        load_weights(model, tmp_path / "w.pth", same_classes=True)
    assert same(model.state_dict(), before)
    assert model.pretrained_cfg["num_classes"] == 1000


def test_load_weights_of_same_classes_takes_an_equal_classifier(tmp_path):
    model, trained = tiny(num_classes=5), tiny(num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth", same_classes=True)
    assert same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_distilled_patch16_224"])
def test_load_weights_serves_other_models_of_timm(tmp_path, name):
    kwargs = {} if name == "resnet18" else {"depth": 1}
    trained, model, other = (timm.create_model(name, num_classes=n, **kwargs) for n in (7, 7, 5))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model.state_dict(), trained.state_dict())
    load_weights(other, tmp_path / "weights.pth")
    heads = other.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    assert [k for k, v in other.state_dict().items() if not torch.equal(v, trained.state_dict()[k])] == [
        key for key in other.state_dict() if key.removesuffix(".weight").removesuffix(".bias") in heads
    ]


def test_load_weights_into_model_of_a_hub_takes_the_given_file(tmp_path):
    trained, model = timm.create_model("resnet18"), timm.create_model("resnet18")
    model.pretrained_cfg |= {"source": "hf-hub", "hf_hub_id": "nobody/nothing"}
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("channels", [1, 3])
def test_load_weights_into_model_of_grey_images_takes_grey_and_adapts_colour(tmp_path, channels):
    trained, model = tiny(in_chans=channels), tiny(in_chans=1)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    kernel = trained.stem.conv1.weight
    torch.testing.assert_close(model.stem.conv1.weight, kernel.sum(1, keepdim=True))


@pytest.mark.parametrize("build", [tiny, lambda: timm.create_model("resnet18")], ids=["zoo", "timm"])
@pytest.mark.parametrize("damage", ["missing", "unknown", "wrong shape"])
def test_load_weights_that_do_not_fit_raises_and_loads_nothing(tmp_path, build, damage):
    model, state = build(), dict(build().state_dict())
    key = [key for key in state if key.endswith(".weight")][-2]
    if damage == "missing":
        del state[key]
    elif damage == "wrong shape":
        state[key] = torch.cat([state[key], state[key]])
    else:
        state[key := f"{key}_more"] = torch.ones(1)
    torch.save(state, tmp_path / "weights.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"weights\.pth: the checkpoint does not fit [\w ]+: {damage}: {key}\b"):
        load_weights(model, tmp_path / "weights.pth")
    assert same(model.state_dict(), before)


# Writing


def test_atomic_io_writes_what_it_reads(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": WEIGHTS, "epoch": 1}, path)
    AtomicCheckpointIO().save_checkpoint({"state_dict": AVERAGED, "epoch": 2}, path)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    assert checkpoint["epoch"] == 2
    assert same(checkpoint["state_dict"], AVERAGED)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_atomic_io_never_unpickles_objects(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"extra": Malicious(trace)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not trace.exists()


def test_atomic_io_whose_save_fails_keeps_the_previous_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": WEIGHTS}, path)

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    io = AtomicCheckpointIO()
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be written: .*No space left on device"):
        io.save_checkpoint({"state_dict": AVERAGED}, path)
    assert not io.complete
    assert same(read_checkpoint(path)["state_dict"], WEIGHTS)
    assert os.listdir(tmp_path) == ["last.ckpt"]


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from effbackbones import files
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO
from effbackbones.checkpoint import read_checkpoint

path = sys.argv[1]

def save(epoch):
    AtomicCheckpointIO().save_checkpoint({"epoch": epoch, "w": torch.full((1000,), epoch)}, path)

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_way(content, file):
    file.write(b"PK" * 500)
    file.flush()
    die()

patches = {
    "writing": (torch, "save", die_half_way),
    "syncing": (os, "fsync", die),
    "renaming": (files.Path, "replace", die),
}
for epoch in range(1, 4):
    save(epoch)
    for moment, patch in patches.items():
        child = os.fork()
        if not child:
            setattr(*patch)
            save(99)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
        checkpoint = read_checkpoint(path)
        assert checkpoint["epoch"] == epoch and checkpoint["w"].eq(epoch).all(), moment
"""


def test_atomic_io_killed_at_any_moment_of_a_save_keeps_the_previous_file(tmp_path):
    script = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "last.ckpt")]
    child = subprocess.run(script, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
