"""Parameter groups of a whole detector: which rate and weight decay each parameter has, under either runner."""

from typing import Any

import pytest
import torch
from mm.small_heads import MASK_RCNN, build
from mmengine.optim import build_optim_wrapper
from timm.scheduler import PolyLRScheduler
from torch import nn

from effbackbones.mm.optim import param_groups

LR, DECAY = 0.01, 0.05


@pytest.fixture(scope="module")
def detector():
    return build(MASK_RCNN, args={"depths": [1, 1, 2, 1]})


def settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the factor on the rate and the weight decay of each parameter; one in two groups is an error."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g.get("lr_scale", g["lr"]), g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_param_groups_hold_every_parameter_at_one_rate_by_default(detector):
    groups = param_groups(detector, LR, DECAY)
    found = settings(detector, groups)
    assert found.keys() == {name for name, _ in detector.named_parameters()}
    assert {scale for scale, _ in found.values()} == {1.0}
    assert {group["lr"] for group in groups} == {LR}


def test_param_groups_spare_vectors_biases_and_what_the_backbone_names(detector, monkeypatch):
    special = "stages.0.blocks.0.pos_embed.weight"
    monkeypatch.setattr(detector.backbone.model, "no_weight_decay", lambda: {special})
    found = settings(detector, param_groups(detector, LR, DECAY))
    for name, parameter in detector.named_parameters():
        spared = parameter.ndim <= 1 or name == f"backbone.model.{special}"
        assert found[name][1] == (0.0 if spared else DECAY), name
    assert f"backbone.model.{special}" in found


def test_param_groups_of_named_parts_spare_these_alone(detector):
    found = settings(detector, param_groups(detector, LR, DECAY, no_decay=["norm", "neck.lateral_convs.0"]))
    for name, (_, decay) in found.items():
        assert decay == (0.0 if "norm" in name or name.startswith("neck.lateral_convs.0") else DECAY), name
    assert found["roi_head.bbox_head.fc_cls.bias"][1] == DECAY


def test_param_groups_layer_decay_falls_from_the_heads_to_the_stem(detector):
    found = settings(detector, param_groups(detector, LR, DECAY, layer_decay=0.5))
    expected = {
        "roi_head.bbox_head.fc_cls.weight": 0,
        "neck.lateral_convs.0.conv.weight": 0,
        "backbone.model.norms.0.weight": 0,
        "backbone.model.stages.3.blocks.0.mlp.fc1.weight": 1,
        "backbone.model.stages.2.blocks.1.mlp.fc1.weight": 2,
        "backbone.model.stages.2.blocks.0.mlp.fc1.weight": 3,
        "backbone.model.stages.0.blocks.0.mlp.fc1.weight": 5,
        "backbone.model.stem.conv1.weight": 6,
    }
    assert {name: found[name][0] for name in expected} == {name: 0.5**n for name, n in expected.items()}


def test_param_groups_backbone_lr_is_for_the_backbone_alone(detector):
    found = settings(detector, param_groups(detector, LR, DECAY, layer_decay=0.5, backbone_lr=0.1))
    assert found["neck.lateral_convs.0.conv.weight"][0] == 1.0
    assert found["backbone.model.norms.0.weight"][0] == 0.1
    assert found["backbone.model.stem.conv1.weight"][0] == pytest.approx(0.1 * 0.5**6)


def test_param_groups_leave_out_frozen_parameters():
    model = build(MASK_RCNN, frozen_stages=1)
    found = settings(model, param_groups(model, LR, DECAY))
    assert not any(name.startswith(("backbone.model.stem", "backbone.model.stages.0")) for name in found)
    assert "backbone.model.stages.1.blocks.0.mlp.fc1.weight" in found


def test_param_groups_of_another_backbone_raises():
    model = nn.Module()
    model.backbone = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="expected a model whose backbone is an EffBackbone, got Linear"):
        param_groups(model, LR, DECAY)


def test_param_groups_under_a_schedule_of_timm_keep_their_ratios(detector):
    optimizer = torch.optim.AdamW(param_groups(detector, LR, DECAY, backbone_lr=0.1))
    schedule = PolyLRScheduler(optimizer, t_initial=10, power=1.0, t_in_epochs=False, lr_min=0.0)
    for step in (0, 5):
        schedule.step_update(step)
        rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
        assert rates[0.1] == pytest.approx(0.1 * rates[1.0])
        assert rates[1.0] == pytest.approx(LR * (1 - step / 10))


# mm's runner


def wrapper(model: nn.Module, **paramwise_cfg: Any) -> Any:
    return build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": DECAY},
            "constructor": "EffOptimWrapperConstructor",
            "paramwise_cfg": paramwise_cfg or None,
        },
    )


@pytest.mark.parametrize(
    "options", [{}, {"layer_decay": 0.5, "backbone_lr": 0.1}, {"no_decay": ["norm"]}], ids=["none", "rates", "decay"]
)
def test_constructor_gives_mms_optimizer_the_same_groups(detector, options):
    groups = wrapper(detector, **options).optimizer.param_groups
    ours = settings(detector, param_groups(detector, LR, DECAY, **options))
    expected = {name: (pytest.approx(LR * scale), decay) for name, (scale, decay) in ours.items()}
    assert settings(detector, groups) == expected


def test_constructor_of_a_wrapped_model_finds_the_model(detector):
    wrapped = nn.Module()
    wrapped.module = detector
    assert len(wrapper(wrapped).optimizer.param_groups) == len(wrapper(detector).optimizer.param_groups)


def test_constructor_of_unknown_option_raises(detector):
    with pytest.raises(ValueError, match="paramwise_cfg holds layer_decay_rate; expected layer_decay, backbone_lr, no"):
        wrapper(detector, layer_decay_rate=0.5)


def test_constructor_without_rate_raises(detector):
    cfg = {"optimizer": {"type": "AdamW"}, "constructor": "EffOptimWrapperConstructor"}
    with pytest.raises(ValueError, match="expected lr, which the groups' rates start from"):
        build_optim_wrapper(detector, cfg)
