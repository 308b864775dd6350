"""No file that is read can run code: whatever the way in, it is refused, says why, and leaves no trace."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import effbackbones  # noqa: F401  (registers the models)
from effbackbones.checkpoint import CheckpointError
from effbackbones.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

RECIPE = """
model:
  name: uniformer_small
  args: {head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 1, 1]}
data: {source: synthetic, num_classes: 4, size: 32, batch_size: 4, workers: 0, synthetic_images: 8}
trainer: {epochs: 1, accelerator: cpu}
"""


class Payload:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a recipe; the trace that nothing may leave is `trace` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "small.yaml").write_text(RECIPE)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "image.png")
    return tmp_path


def refused(capsys, command, *words):
    """Run a command that must end with code 2 and say `words`, without a trace."""
    capsys.readouterr()
    assert main(command) == 2, command
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not Path("trace").exists(), command


# Weights

WRITERS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}
CONTENTS = {
    "in the weights": lambda payload: {"state_dict": {"stem.weight": payload}},
    "beside the weights": lambda payload: {
        "state_dict": {"stem.weight": torch.zeros(1)},
        "optimizer_states": [payload],
    },
    "alone": lambda payload: payload,
}
EVIL = [(writer, content) for writer in WRITERS for content in CONTENTS]


def write_evil(path, writer="zip", content="beside the weights"):
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[writer](CONTENTS[content](Payload(Path("trace"))), path)
    return str(path)


@pytest.mark.parametrize(("writer", "content"), EVIL)
def test_payload_does_run_where_it_is_unpickled(place, writer, content):
    path = Path(write_evil(place / "evil.pth", writer, content))
    pickle.loads(path.read_bytes()) if writer == "pickle" else torch.load(path, weights_only=False)
    assert Path("trace").exists()


@pytest.mark.parametrize(("writer", "content"), EVIL)
def test_weight_file_with_code_is_refused_wherever_it_is_named(place, capsys, writer, content):
    evil = write_evil(place / "evil.pth", writer, content)
    says = (evil, "is not read, as it could run code")
    refused(capsys, ["train", "small.yaml", f"model.checkpoint={evil}"], *says)
    refused(capsys, ["eval", "small.yaml", f"model.checkpoint={evil}"], *says)
    refused(capsys, ["predict", "image.png", "--model", "uniformer_small", "--checkpoint", evil], *says)
    teacher = ["distill.teacher=uniformer_xxs", f"distill.checkpoint={evil}"]
    refused(capsys, ["train", "small.yaml", *teacher], *says)


@pytest.mark.parametrize("writer", WRITERS)
def test_weight_file_with_code_is_refused_through_timm(place, writer):
    overlay = {"file": write_evil(place / "evil.pth", writer)}
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        timm.create_model("uniformer_small", pretrained=True, pretrained_cfg_overlay=overlay)
    assert not Path("trace").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_run_folder_with_code_is_refused(place, capsys, writer):
    run = place / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE)
    last, best = (f"run/checkpoints/{name}.ckpt" for name in ("last", "best"))
    for path in (last, best):
        write_evil(place / path, writer)
    why = "is not read, as it could run code"
    refused(capsys, ["train", "run"], last, why)
    refused(capsys, ["train", "small.yaml", "model.checkpoint=run", "run.dir=other"], best, why)
    refused(capsys, ["eval", "run"], best, why)
    refused(capsys, ["predict", "image.png", "--run", "run"], best, why)


def test_safetensors_file_that_is_a_pickle_is_refused(place, capsys):
    evil = write_evil(place / "evil.safetensors", "pickle")
    refused(capsys, ["train", "small.yaml", f"model.checkpoint={evil}"], evil, "not a weight file")


# Recipes

CALLS = [
    "!!python/object/apply:os.mkdir [trace]",
    "!!python/object/new:os.mkdir [trace]",
    "!!python/object/apply:subprocess.check_call [[mkdir, trace]]",
    "!!python/name:os.mkdir",
    "!os.mkdir trace",
]
RESOLVERS = ["${oc.env:HOME}", "${oc.decode:trace}", "$(mkdir trace)", "${os.mkdir:trace}"]


@pytest.mark.parametrize("value", CALLS)
def test_tag_in_a_recipe_is_refused_wherever_it_is_read(place, capsys, value):
    Path("evil.yaml").write_text(f"{RECIPE}run:\n  dir: {value}\n")
    Path("heir.yaml").write_text("extends: evil.yaml\n")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(Path("evil.yaml").read_text())
    for command in (["show"], ["train"], ["eval"]):
        for recipe in ("evil.yaml", "heir.yaml", "run"):
            refused(capsys, [*command, recipe], "is not allowed")
    refused(capsys, ["train", "small.yaml", f"run.dir={value}"], "is not allowed")


@pytest.mark.parametrize("value", RESOLVERS)
def test_resolver_in_a_recipe_is_refused(place, capsys, value):
    Path("evil.yaml").write_text(f"{RECIPE}run:\n  dir: '{value}'\n")
    refused(capsys, ["train", "evil.yaml"], "run.dir")
    refused(capsys, ["train", "small.yaml", f"run.dir={value}"], "run.dir")


@pytest.mark.parametrize("key", ["_target_", "__reduce__", "model._target_", "model.args._target_"])
def test_key_that_names_what_to_call_is_refused(place, capsys, key):
    refused(capsys, ["train", "small.yaml", f"{key}=os.mkdir"], key.rpartition(".")[2])


# Datasets


def write_tar(path, name, content=b"", **attributes):
    """Write a shard of one image with its class, the image's member as given."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for member, data in ((name, content or picture.getvalue()), (f"{name.rpartition('.')[0]}.cls", b"0")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            if member == name:
                for attribute, value in attributes.items():
                    setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("../trace.png", {}),
        ("a/../../trace.png", {}),
        ("/trace.png", {}),
        ("trace.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}),
        ("trace.png", {"type": tarfile.LNKTYPE, "linkname": "../image.png", "size": 0}),
        ("trace.png", {"type": tarfile.FIFOTYPE, "size": 0}),
    ],
)
def test_shard_that_reaches_out_of_itself_is_refused(place, capsys, name, attributes):
    (place / "shards").mkdir()
    before = sorted(place.rglob("*"))
    for split in ("train", "val"):
        write_tar(place / "shards" / f"{split}.tar", name, **attributes)
    refused(capsys, ["train", "small.yaml", "data.source=shards", "data.root=shards"], f"train.tar: {name}: refused")
    refused(capsys, ["eval", "small.yaml", "data.source=shards", "data.root=shards", "model.checkpoint=x"], "refused")
    assert {path.name for path in set(place.rglob("*")) - set(before)} == {"train.tar", "val.tar"}
    assert not list(place.parent.glob("trace*"))
    assert not Path("/trace.png").exists()


def bomb():
    """Return a PNG of some kB that unfolds to 900 million pixels."""
    packed = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(packed, "PNG")
    return packed.getvalue()


def write_folders(root, content):
    """Write an image folder of two classes of one file each."""
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (root / part).mkdir(parents=True)
        (root / part / "0.png").write_bytes(content)


def test_decompression_bomb_is_refused_and_never_unfolded(place, capsys):
    content = bomb()
    assert len(content) < 1 << 20
    write_folders(place / "set", content)
    (place / "shards").mkdir()
    for split in ("train", "val"):
        write_tar(place / "shards" / f"{split}.tar", "bomb.png", content)
    why = "could be decompression bomb"
    small = ["train", "small.yaml", "data.batch_size=1", "data.num_classes=null"]
    refused(capsys, [*small, "data.source=folder", "data.root=set"], "cannot be read as an image", why)
    refused(capsys, [*small, "data.source=shards", "data.root=shards", "data.num_classes=2"], "bomb.png", why)


def test_program_in_place_of_an_image_is_refused(place, capsys):
    # Pillow hands PostScript to an interpreter that runs it.
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(trace) (w) file closefile\nshowpage\n"
    write_folders(place / "set", program)
    small = ["train", "small.yaml", "data.batch_size=1", "data.num_classes=null", "data.source=folder"]
    refused(capsys, [*small, "data.root=set"], "cannot be read as an image")


def test_script_beside_a_dataset_of_hugging_face_is_not_run(place, capsys):
    (place / "set").mkdir()
    for name in ("set.py", "dataset.py", "__init__.py"):
        (place / "set" / name).write_text("import os\nos.mkdir('trace')\n")
    refused(capsys, ["train", "small.yaml", "data.source=hf", "data.root=set"], "set")
