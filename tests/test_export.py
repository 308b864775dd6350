"""Exported files: what they hold, that they are checked, and what is refused."""

import json

import onnx
import onnxruntime
import pytest
import timm
import torch
from small_models import depths

from effbackbones import export as module
from effbackbones.cli import main
from effbackbones.export import Deployable, ExportError, export

FORMS = {"torch": "pt2", "onnx": "onnx"}


def small(name="uniformer_small", size=(64, 96), dense=False):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=depths(name, compiled=True), num_classes=7, dense=dense).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # fresh, all tokens are of almost equal rank
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return Deployable(model, size, {"model": name, "mean": [0.5, 0.5, 0.5], "classes": ["a", "b"]})


def opened(path):
    """Return a file's function of images, and its notes."""
    if path.suffix == ".pt2":
        files = {"effbackbones.json": ""}
        program = torch.export.load(path, extra_files=files)
        return program.module(), json.loads(files["effbackbones.json"])
    session = onnxruntime.InferenceSession(path)
    notes = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})], notes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@torch.no_grad()
def test_file_gives_the_outputs_of_the_model_for_any_batch_and_says_what_it_is(tmp_path, form, dense):
    source = small(dense=dense)
    x = torch.randn(5, 3, 64, 96)
    expected = source.model.forward_intermediates(x, intermediates_only=True) if dense else [source.model(x)]
    path = tmp_path / "new" / f"model.{FORMS[form]}"
    difference = export(source, form, path)
    assert 0 <= difference < 1e-4
    call, notes = opened(path)
    outputs = call(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert notes == source.notes
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_onnx_outputs_have_names_and_a_free_batch(tmp_path):
    for dense, names in ((False, ["logits"]), (True, [f"map_{i}" for i in range(4)])):
        export(small(dense=dense), "onnx", tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert [output.name for output in session.get_outputs()] == names
        batch, *rest = session.get_inputs()[0].shape
        assert isinstance(batch, str)
        assert rest == [3, 64, 96]


@pytest.mark.parametrize("fuse", [False, True])
def test_model_is_fused_unless_told_otherwise(tmp_path, fuse):
    export(small(), "torch", tmp_path / "model.pt2", fuse)
    program = torch.export.load(tmp_path / "model.pt2")
    # The classifier's last norm stays.
    assert len([key for key in program.state_dict if "running_mean" in key]) == (1 if fuse else 5)


@pytest.mark.parametrize("form", FORMS)
def test_file_whose_outputs_differ_is_not_written(tmp_path, monkeypatch, form):
    path = tmp_path / "model"
    path.write_text("before")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(
        ExportError, match=r"is not written: its outputs differ from eager ones by .* more than -1e\+00"
    ):
        export(small(), form, path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_model_that_ranks_tokens_is_written_however_rounding_orders_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    export(small("sgformer_s"), "torch", tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").exists()


def test_missing_package_is_an_error_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ExportError, match=r"^onnxscript not installed: pip install 'effbackbones\[export\]'$"):
        export(small(), "onnx", tmp_path / "model.onnx")


def test_model_that_cannot_be_traced_is_an_error_that_names_it(tmp_path, monkeypatch):
    def export_program(*args, **kwargs):
        raise RuntimeError("a graph break")

    monkeypatch.setattr(torch.export, "export", export_program)
    with pytest.raises(ExportError, match="uniformer_small is not exported as torch: a graph break"):
        export(small(), "torch", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_named_model_is_of_the_size_and_weights_that_are_given(tmp_path):
    weights = tmp_path / "weights.pth"
    model = timm.create_model("uniformer_xxs")
    torch.save(model.state_dict(), weights)
    source = Deployable.from_model("uniformer_xxs", str(weights), (96, 64))
    assert source.size == (96, 64)
    torch.testing.assert_close(source.model.head.fc.weight, model.head.fc.weight)
    assert not source.model.training
    assert source.notes["classes"][0] == "tench, Tinca tinca"
    dense = Deployable.from_model("uniformer_xxs", str(weights), dense=True)
    assert dense.size == (224, 224)
    assert dense.model.dense
    assert "classes" not in dense.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uniformer_smal"], "uniformer_smal"),
        (["resnet18"], "resnet18 is no model of effbackbones: `effb ls models` lists those that can be exported"),
        (["uniformer_xxs", "--checkpoint", "absent.pth"], "absent.pth"),
        (["{run}", "--dense"], "is a run: --checkpoint and --dense are for the name of a model"),
        (["{run}"], "is a run of segmentation: `effb export mm"),
    ],
)
def test_command_says_what_it_cannot_export(tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(
        "task: segmentation\nmodel: {name: uniformer_xxs, head: mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py}\n"
        "data: {source: ade20k, root: x}\n"
    )
    out = tmp_path / "model.onnx"
    assert main(["export", "onnx", *[a.format(run=run) for a in arguments], "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
