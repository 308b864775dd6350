"""EffBackbone: what it gives, what it leaves out, what stays frozen, and the weights it takes."""

import logging
from typing import Any

import mmdet.registry
import mmseg.registry
import pytest
import timm
import torch
from mm.small_heads import CLASSES, MASK_RCNN, build, recipe
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner import save_checkpoint
from models.test_contract import SMALLEST
from small_models import depths
from torch import nn

from effbackbones.checkpoint import CheckpointError, load_weights, strip_wrappers
from effbackbones.mm import EffBackbone
from effbackbones.mm.config import build_from_cfg, build_model_cfg

SMALL: dict[str, Any] = {"model": "uniformer_xxs", "depths": (1, 1, 1, 1)}


def small(**kwargs: Any) -> EffBackbone:
    return EffBackbone(**{**SMALL, **kwargs})


def timm_model(**kwargs: Any) -> Any:
    return timm.create_model("uniformer_xxs", depths=(1, 1, 1, 1), **kwargs)


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mm_log():
    """The lines of mmengine's log."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Lines(), MMLogger.get_current_instance()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # training of ours quietens it
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("package", [mmdet, mmseg], ids=["mmdet", "mmseg"])
def test_backbone_is_built_by_the_registry_of_either_package(package):
    built = package.registry.MODELS.build({"type": "EffBackbone", **SMALL})
    assert type(built) is EffBackbone


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "classifier"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (3,)], ids=str)
def test_backbone_gives_the_maps_of_the_chosen_stages(indices, dense):
    torch.manual_seed(0)
    backbone = small(out_indices=indices, dense=dense).eval()
    torch.manual_seed(0)
    maps = timm_model(dense=dense).eval().forward_intermediates(images(), intermediates_only=True)
    given = backbone(images())
    assert type(given) is tuple
    torch.testing.assert_close(given, tuple(maps[i] for i in indices))
    assert [info["num_chs"] for info in backbone.feature_info] == [x_bchw.shape[1] for x_bchw in given]


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_maps_serve_operators_of_mmcv_which_take_memory_as_channels_first(name):
    from mmcv.ops import roi_align
    from torchvision.ops import roi_align as expected

    rois = torch.tensor([[0, 3.0, 5.0, 60.0, 70.0]])
    backbone = EffBackbone(name, depths=depths(name, compiled=True)).eval()
    for i, x_bchw in enumerate(backbone(torch.rand(1, 3, 96, 128))):
        scale = 1 / (4 * 2**i)
        ours = roi_align(x_bchw, rois, (7, 7), scale, 0, "avg", True)
        torch.testing.assert_close(ours, expected(x_bchw, rois, (7, 7), scale, -1, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "classifier"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_backbone_has_no_parameter_without_gradient(name, indices, dense):
    backbone = EffBackbone(name, indices, dense=dense, depths=depths(name))
    sum(x_bchw.square().mean() for x_bchw in backbone(images())).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "uniformer_smal"}, "expected a model of the zoo; nearest: uniformer_small, "),
        ({"model": "resnet50"}, "expected a model of the zoo"),
        ({"out_indices": (0, 4)}, r"out_indices=\(0, 4\): expected increasing numbers of stages, of 0 to 3"),
        ({"out_indices": (1, 0)}, "expected increasing numbers of stages"),
        ({"out_indices": ()}, "expected increasing numbers of stages"),
        ({"frozen_stages": 5}, r"frozen_stages=5: expected -1 \(none\), or 0 \(stem\) to 4"),
        ({"pretrained": "open-mmlab://resnet50"}, "has no `pretrained`: drop it .* and set `checkpoint`"),
        ({"init_cfg": {"type": "Kaiming"}}, "expected none, and the weights' file in `checkpoint`"),
    ],
    ids=["unknown", "not_ours", "beyond", "decreasing", "none", "frozen", "pretrained", "init_cfg"],
)
def test_backbone_of_wrong_argument_raises_and_says_what_to_give(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**arguments)


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_backbone_keeps_frozen_stages_without_gradient_in_eval_mode(frozen):
    backbone = small(frozen_stages=frozen).train()
    parts = [backbone.model.stem, *backbone.model.stages]
    for i, part in enumerate(parts):
        assert {parameter.requires_grad for parameter in part.parameters()} == {i > frozen}
        assert {module.training for module in part.modules()} == {i > frozen}
    assert backbone.model.norms.training


def test_backbone_frozen_leaves_frozen_weights_and_statistics_unchanged():
    backbone = small(frozen_stages=1)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    sum(x_bchw.square().mean() for x_bchw in backbone.train()(images())).backward()
    optimizer.step()
    changed = {key.split(".blocks")[0] for key, value in backbone.state_dict().items() if not value.equal(before[key])}
    assert "model.stages.1" in changed
    assert not any(key.startswith(("model.stem", "model.stages.0")) for key in changed)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_backbone_norm_eval_keeps_batch_norms_alone_in_eval_mode(norm_eval):
    backbone = small(norm_eval=norm_eval).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {module.training for module in norms} == {not norm_eval}
    assert backbone.model.stages[0].training


@pytest.mark.parametrize(
    ("with_cp", "recomputed"), [(True, (2, 3)), (False, ()), ([0, 3], (3,)), ((2,), (2,)), ([], ())]
)
def test_backbone_with_cp_recomputes_activations(with_cp, recomputed):
    backbone = small(with_cp=with_cp)
    calls = []
    for i in (2, 3):
        backbone.model.stages[i].blocks[0].register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    backbone.train()(images())[3].sum().backward()
    assert sorted(calls) == sorted([2, 3, *recomputed])


# Weights


def write(state: Any, path: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return str(path)


def same_weights(backbone: EffBackbone, trained: Any) -> bool:
    state = trained.state_dict()
    return all(value.equal(state[key]) for key, value in backbone.model.state_dict().items())


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2)], ids=str)
def test_init_weights_takes_a_dense_models_file(tmp_path, indices):
    trained = timm_model(dense=True)
    nn.init.normal_(trained.norms[1].weight)
    backbone = small(checkpoint=write(trained.state_dict(), tmp_path / "w.pth"), out_indices=indices)
    backbone.init_weights()
    assert same_weights(backbone, trained)


def test_init_weights_takes_a_classifiers_file_and_logs_what_is_fresh(tmp_path, mm_log):
    trained = timm_model()
    backbone = small(checkpoint=write({"model": trained.state_dict()}, tmp_path / "w.pth"), out_indices=(0, 3))
    backbone.init_weights()
    state = backbone.model.state_dict()
    assert all(value.equal(state[key]) for key, value in trained.state_dict().items() if key in state)
    (line,) = mm_log
    assert line.startswith(f"uniformer_xxs: Started from {tmp_path / 'w.pth'}: ")
    assert "; fresh: norms.0.*, norms.1.*, norms.2.*, norms.3.*; left out: norm.*, head.fc.*" in line


def test_init_weights_takes_a_run_folder(tmp_path):
    trained = timm_model()
    state = {f"model.{key}": value for key, value in trained.state_dict().items()}
    write({"state_dict": state}, tmp_path / "checkpoints" / "best.ckpt")
    backbone = small(checkpoint=str(tmp_path), dense=False)
    backbone.init_weights()
    assert same_weights(backbone, trained)


def test_init_weights_takes_the_backbone_of_a_detectors_checkpoint(tmp_path):
    detector = build(MASK_RCNN)
    backbone = small(checkpoint=write({"state_dict": detector.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth"))
    backbone.init_weights()
    assert same_weights(backbone, detector.backbone.model)


def test_init_weights_takes_the_file_of_a_pretrained_init_cfg(tmp_path):
    trained = timm_model(dense=True)
    path = write(trained.state_dict(), tmp_path / "w.pth")
    backbone = small(init_cfg={"type": "Pretrained", "checkpoint": path})
    backbone.init_weights()
    assert same_weights(backbone, trained)


def test_init_weights_of_a_detector_reaches_the_backbone(tmp_path):
    trained = timm_model(dense=True)
    path = write(trained.state_dict(), tmp_path / "w.pth")
    config = build_model_cfg(recipe(MASK_RCNN), CLASSES)
    config.backbone.checkpoint = path
    assert same_weights(build_from_cfg(config, "mmdet").backbone, trained)


def test_init_weights_of_another_model_raises_and_loads_nothing(tmp_path):
    other = timm.create_model("s2aformer_mini", depths=(1, 1, 1, 1))
    backbone = small(checkpoint=write(other.state_dict(), tmp_path / "w.pth"))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"w\.pth: the checkpoint does not fit uniformer_xxs"):
        backbone.init_weights()
    assert all(value.equal(before[key]) for key, value in backbone.state_dict().items())


def test_backbone_of_absent_checkpoint_is_built_until_its_weights_are_asked_for(tmp_path):
    backbone = small(checkpoint=str(tmp_path / "gone.pth"))
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file"):
        backbone.init_weights()


def test_load_weights_reads_a_checkpoint_with_the_log_of_mms_runner(tmp_path):
    detector = build(MASK_RCNN)
    log = HistoryBuffer([0.5, 0.25], [1, 1])
    hub = {"log_scalars": {"train/loss": log}, "runtime_info": {"iter": 2}, "resumed_keys": {"train/loss": True}}
    path = tmp_path / "iter_2.pth"
    save_checkpoint({"meta": {"epoch": 1}, "state_dict": detector.state_dict(), "message_hub": hub}, str(path))
    model = timm_model(dense=True)
    load_weights(model, path)
    assert same_weights(detector.backbone, model)
    assert strip_wrappers({"state_dict": detector.state_dict()}).keys() == model.state_dict().keys()
