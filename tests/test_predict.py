"""Prediction with ImageNet-1K checkpoints of registered models."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from project import ROOT
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from tiny_checkout import official_weights

from effbackbones.checkpoint import CheckpointError
from effbackbones.cli import main
from effbackbones.config import RecipeError
from effbackbones.predict import Predictor

MODEL = "uniformer_xxs"
IMAGES = [str(ROOT / "data" / "samples" / f"{name}.png") for name in ("bag", "dress")]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Return weights of MODEL in the official format, float32."""
    return official_weights(f"uniformer/{MODEL}_128x128")


@pytest.fixture(scope="module")
def official(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save({"model": weights}, path)
    return path


@pytest.fixture(scope="module")
def model(official: Path) -> Any:
    """Return MODEL with those weights, as timm gives it."""
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay={"file": str(official)}).eval()


def expected_top5(model: Any, path: str) -> list[tuple[str, float]]:
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        probs = model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(0)
    names = ImageNetInfo()
    return [(names.index_to_description(i), probs[i].item()) for i in probs.argsort(descending=True)[:5].tolist()]


def test_from_model_gives_what_timm_gives_under_imagenet_names(model: Any, official: Path) -> None:
    predicted = list(Predictor.from_model(MODEL, official)(IMAGES))
    for path, classes in zip(IMAGES, predicted, strict=True):
        names, probabilities = zip(*expected_top5(model, path), strict=True)
        assert tuple(name for name, _ in classes) == names
        assert [p for _, p in classes] == pytest.approx(probabilities, rel=1e-5)


def test_from_model_class_names_stand_in_the_order_of_imagenet(official: Path) -> None:
    classes = Predictor.from_model(MODEL, official).classes
    assert len(classes) == 1000
    for index, name in {0: "tench", 207: "golden retriever", 608: "jean", 999: "toilet tissue"}.items():
        assert classes[index].startswith(name)


def test_predict_command_prints_the_same_for_official_and_own_checkpoints(
    model: Any, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, own)
    printed = []
    for checkpoint in (official, own):
        assert main(["predict", *IMAGES, "--model", MODEL, "--checkpoint", str(checkpoint)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    blocks = ["".join(f"  {100 * p:5.1f}%  {name}\n" for name, p in expected_top5(model, path)) for path in IMAGES]
    assert printed[0] == "".join(f"{path}\n{block}" for path, block in zip(IMAGES, blocks, strict=True))


def test_from_model_checkpoint_of_other_classes_raises_checkpoint_error(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "ten.pth"
    torch.save(weights | {"head.weight": torch.zeros(10, 512), "head.bias": torch.zeros(10)}, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: made for 10 classes, expected 1000")):
        Predictor.from_model(MODEL, path)


def test_from_model_damaged_checkpoint_raises_checkpoint_error(official: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    path.write_bytes(official.read_bytes()[: official.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"half\.pth: not a weight file, or a damaged or incomplete one"):
        Predictor.from_model(MODEL, path)


def test_from_model_unknown_name_raises_recipe_error_with_the_nearest(official: Path) -> None:
    with pytest.raises(RecipeError, match=r"got 'uniformer_xss'; nearest: .*uniformer_xxs"):
        Predictor.from_model("uniformer_xss", official)


@pytest.mark.parametrize("name", ["hf-hub:someone/uniformer", "local-dir:/nowhere", "resnet18.a1_in1k"])
def test_from_model_name_that_timm_would_look_up_elsewhere_raises_recipe_error(name: str, official: Path) -> None:
    with pytest.raises(RecipeError, match="expected a registered model"):
        Predictor.from_model(name, official)


def test_predictor_fewer_than_five_classes_gives_all_of_them() -> None:
    classes = ("a", "b", "c")
    predictor = Predictor(_Constant(), lambda image: torch.zeros(3, 4, 4), classes)
    (best,) = predictor(IMAGES[:1])
    assert [name for name, _ in best] == ["c", "b", "a"]
    assert sum(p for _, p in best) == pytest.approx(1)


class _Constant(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(3.0).expand(len(x), 3)
