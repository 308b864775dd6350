"""What every model of the zoo promises, family by family unseen: a model is tested by being registered.

Models are cut to two blocks a stage, or the fewest that the family has, and to small widths; what they are at their
real size the tests of their families tell. What the class decides is tested on the smallest variant of each class,
what depends on the layers on the smallest variant of each set of layers, names on all.
"""

import argparse
import copy
import functools
import logging
import math
import re
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from small_models import depths, small
from timm.models import group_parameters, model_entrypoint
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from effbackbones.checkpoint import CheckpointError, Loaded
from effbackbones.layers import ProjectionHead, attention_backend, ops_backend, recompute
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models._zoo import ZOO

SIZES = ((32, 32), (64, 96), (203, 301), (224, 224), (256, 320))
MODELS = list(dict.fromkeys(row.model for row in ZOO))


def skeleton(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **small(name))


SKELETONS = {name: skeleton(name) for name in MODELS}
_PARAMS = {row.model: row.params for row in ZOO}
_BY_SIZE = sorted(MODELS, key=_PARAMS.__getitem__)
_LAYERS = {name: (type(model), tuple(model.state_dict())) for name, model in SKELETONS.items()}
DISTINCT = [next(name for name in _BY_SIZE if _LAYERS[name] == key) for key in dict.fromkeys(_LAYERS.values())]
_CLASSES = dict.fromkeys(map(type, SKELETONS.values()))
SMALLEST = [next(name for name in _BY_SIZE if type(SKELETONS[name]) is cls) for cls in _CLASSES]

each_model = pytest.mark.parametrize("name", MODELS, scope="module")
each_distinct = pytest.mark.parametrize("name", DISTINCT, scope="module")
each_class = pytest.mark.parametrize("name", SMALLEST, scope="module")
each_mode = pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])


@functools.lru_cache(maxsize=4)
def shared(name: str, dense: bool = False, compiled: bool = False) -> Any:
    """Return the cut model in evaluation mode, not to be changed.

    Its weights are random, all of them: initial zeros and tiny layer scales would hide what they multiply.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **small(name, compiled), dense=dense).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def own(name: str, dense: bool = False, **kwargs: Any) -> Any:
    """Return a model with the weights of the shared one, to be changed at will."""
    if not kwargs:
        return copy.deepcopy(shared(name, dense))
    model = timm.create_model(name, **small(name), dense=dense, **kwargs).eval()
    backbone = model.model if kwargs.get("features_only") else model
    assert not backbone.load_state_dict(shared(name, dense).state_dict(), strict=False).missing_keys
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def objective(model: Any, x: Tensor) -> Tensor:
    """Return a loss of the classifier, or of the maps of a dense model, which all parameters influence."""
    if not model.num_classes:
        return sum(
            (m * images(*m.shape, dtype=m.dtype)).mean()
            for m in model.forward_intermediates(x, intermediates_only=True)
        )
    target = torch.arange(len(x)) % model.num_classes
    return model.loss(model(x), target, F.cross_entropy)


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(2)
    model.zero_grad()
    objective(model, x).backward()
    return {key: p.grad for key, p in model.named_parameters()}


def in_fixed_order(model: Any, x: Tensor) -> Any:
    """Return the model itself, or, where it sorts tokens, a copy that takes them in a random order at the size of `x`.

    Rounding swaps tokens of about equal value, so that float32 is too coarse to compare such a model. A module that
    sorts takes what it sorts by as its last argument, (B, N), and an order in its place as its attribute `order`.
    """
    if not any(hasattr(module, "order") for module in model.modules()):
        return model
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)

    def fix(module: Any, args: Any) -> None:
        module.order = torch.randperm(args[-1].shape[1], generator=generator)[None]

    hooks = [module.register_forward_pre_hook(fix) for module in model.modules() if hasattr(module, "order")]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return model


# Registration


def test_zoo_lists_exactly_the_registered_models():
    registered = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("effbackbones.")}
    assert registered == set(MODELS)


@each_model
def test_create_model_shadows_no_model_of_timm(name):
    assert model_entrypoint(name).__module__.startswith("effbackbones.models.")


# Maps


@each_distinct
@each_mode
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_features_at_any_size_are_four_finite_maps_of_their_strides(name, dense, size):
    model = own_features(name, dense)
    maps = model(images(1, 3, *size))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for m, stride in zip(maps, (4, 8, 16, 32), strict=True):
        for got, length in zip(m.shape[2:], size, strict=True):
            assert length // stride <= got <= math.ceil(length / stride)
        assert m.isfinite().all()


@functools.lru_cache(maxsize=4)
def own_features(name: str, dense: bool) -> Any:
    return own(name, dense, features_only=True)


@each_distinct
@each_mode
@torch.no_grad()
def test_maps_from_every_way_are_the_same(name, dense):
    model, x = shared(name, dense), images(2, 3, 70, 101)
    maps = own_features(name, dense)(x)
    last, intermediates = model.forward_intermediates(x)
    for ours in (intermediates, model.forward_intermediates(x, intermediates_only=True)):
        assert all(torch.equal(a, b) for a, b in zip(ours, maps, strict=True))
    assert torch.equal(last, maps[3])
    assert torch.equal(model.forward_features(x), maps[3])


@each_class
@each_mode
@torch.no_grad()
def test_forward_is_the_head_of_the_last_map(name, dense):
    model, x = shared(name, dense), images(2, 3, 64, 96)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x)))


@each_class
@each_mode
@pytest.mark.parametrize(
    ("indices", "stages"),
    [((0, 2), (0, 2)), ((-1,), (3,)), ((-3, 0), (1, 0)), (2, (2, 3)), (None, (0, 1, 2, 3))],
    ids=str,
)
@torch.no_grad()
def test_forward_intermediates_returns_the_chosen_maps_in_order(name, dense, indices, stages):
    model, x = shared(name, dense), images(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    chosen = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert [m.shape for m in chosen] == [maps[i].shape for i in stages]
    assert all(torch.equal(a, maps[i]) for a, i in zip(chosen, stages, strict=True))


@each_class
@each_mode
@pytest.mark.parametrize("out_indices", [(0, 1), (-2, 0), 2], ids=str)
@torch.no_grad()
def test_features_of_chosen_stages_agree_with_feature_info_and_hold_no_later_stage(name, dense, out_indices):
    model = own(name, dense, features_only=True, out_indices=out_indices)
    x = images(1, 3, 64, 96)
    everything = shared(name, dense).forward_intermediates(x, intermediates_only=True)
    stages = [range(4)[i] for i in ((-2, -1) if out_indices == 2 else out_indices)]
    maps = model(x)
    assert all(torch.equal(m, everything[i]) for m, i in zip(maps, stages, strict=True))
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [4 * 2**i for i in stages]
    assert len(model.model.stages) == max(stages) + 1
    assert not [key for key in model.state_dict() if key.startswith(("model.norm.", "model.head"))]


@each_class
@torch.no_grad()
def test_stop_early_runs_no_later_stage(name):
    model, x = own(name), images(1, 3, 64, 64)
    called = []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: called.append(i))
    last, (stage1,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert called == [0, 1]
    assert torch.equal(last, stage1)
    last, (stage1,) = model.forward_intermediates(x, indices=[1])
    assert torch.equal(last, model.forward_features(x))


@each_class
@torch.no_grad()
def test_norm_of_intermediates_is_applied_to_the_last_map_alone(name):
    model, x = shared(name), images(1, 3, 64, 64)
    raw = model.forward_intermediates(x, intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(raw[:3], normed[:3], strict=True))
    assert torch.equal(normed[3], model.norm(raw[3]))


@each_class
@pytest.mark.parametrize("indices", [(4,), (0, -5), 0, 5], ids=str)
def test_forward_intermediates_of_unknown_stage_raises(name, indices):
    with pytest.raises(AssertionError, match="out of range"):
        shared(name).forward_intermediates(images(1, 3, 32, 32), indices=indices)


@each_class
def test_forward_intermediates_of_another_layout_raises(name):
    with pytest.raises(ValueError, match=r"'NHWC'.*NCHW only"):
        shared(name).forward_intermediates(images(1, 3, 32, 32), output_fmt="NHWC")


@each_class
@each_mode
@torch.no_grad()
def test_image_gives_the_same_maps_alone_and_in_a_batch(name, dense):
    model, x = own(name, dense).double(), images(3, 3, 64, 96, dtype=torch.float64)
    together = [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    for i in range(3):
        alone = [model(x[i : i + 1]), *model.forward_intermediates(x[i : i + 1], intermediates_only=True)]
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-9, atol=1e-9)


@each_class
@each_mode
@torch.no_grad()
def test_evaluation_follows_weights_that_change(name, dense):
    model, x = own(name, dense).double(), images(2, 3, 64, 96, dtype=torch.float64)

    def fresh() -> list[Tensor]:
        other = timm.create_model(name, **small(name), dense=dense).double().eval()
        other.load_state_dict(model.state_dict())
        return maps_of(other)(x)

    maps_of(model)(x)  # what may be kept is kept now
    for parameter in model.parameters():
        parameter.mul_(1.1)
    for ours, expected in zip(maps_of(model)(x), fresh(), strict=True):
        assert torch.equal(ours, expected)
    model.load_state_dict(
        {key: value * 0.9 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    )
    for ours, expected in zip(maps_of(model)(x), fresh(), strict=True):
        assert torch.equal(ours, expected)
    with torch.inference_mode():
        maps_of(model)(x)
    with torch.enable_grad():
        sum(m.square().mean() for m in maps_of(model)(x)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []
    assert model.stem.get_parameter(next(k for k, _ in model.stem.named_parameters())).grad.any()


# Classifier


@each_class
def test_reset_classifier_gives_a_trainable_one_of_other_width(name):
    model = own(name).double()
    model.reset_classifier(7)
    x = images(2, 3, 64, 64, dtype=torch.float64)
    assert model.num_classes == 7
    assert model.get_classifier().out_features == 7
    assert not model.get_classifier().bias.any()
    with torch.no_grad():
        assert model(x).shape == (2, 7)
    assert all(grad.isfinite().all() for grad in gradients(model.train(), x).values())


@each_class
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model_without_classes_returns_the_pooled_vector(name, training):
    x = images(2, 3, 64, 64)
    for model in (own(name, num_classes=0), own(name)):
        model.reset_classifier(0)
        model.train(training)
        expected = pooled(model, model.forward_features(x), torch.mean)
        assert isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(model(x), expected)
        assert model(x).shape == (2, model.head_hidden_size)
        assert not [key for key, _ in model.named_parameters() if key.startswith("head.fc")]


def pooled(model: Any, x_bchw: Tensor, pool: Any) -> Tensor:
    """Return what the classifier sees of a last map: normed, widened where the family does that, pooled."""
    x_bchw = model.norm(x_bchw)
    if isinstance(model.head, ProjectionHead):
        x_bchw = model.head.act(model.head.bn(model.head.conv(x_bchw)))
    return pool(x_bchw, (2, 3))


@each_class
@torch.no_grad()
def test_global_pool_max_pools_by_maximum(name):
    x = images(2, 3, 64, 96)
    built, reset = own(name, global_pool="max"), own(name)
    reset.reset_classifier(5, "max")
    for model in (built, reset):
        x_bchw = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(x_bchw, pre_logits=True), pooled(model, x_bchw, torch.amax))
    assert reset(x).shape == (2, 5)


@each_class
@torch.no_grad()
def test_model_cut_to_three_stages_takes_a_new_classifier(name):
    model, x = own(name), images(2, 3, 64, 64)
    third = model.forward_intermediates(x, intermediates_only=True)[2]
    assert model.prune_intermediate_layers([-2]) == [2]
    assert torch.equal(model.forward_features(x), third)
    model.reset_classifier(6, "avg")
    assert model.num_features == third.shape[1]
    assert model(x).shape == (2, 6)


@each_class
def test_dense_model_refuses_a_classifier(name):
    model = own(name, dense=True)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="no classifier to give 5 classes"):
        model.reset_classifier(5)


# Arguments that mean what they mean in timm


@each_distinct
@pytest.mark.parametrize("in_chans", [1, 4])
@torch.no_grad()
def test_in_chans_is_taken(name, in_chans):
    model = timm.create_model(name, **small(name), in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model.forward_features(images(1, in_chans, 32, 32)).isfinite().all()


@each_class
@torch.no_grad()
def test_drop_path_rate_drops_branches_in_training_only(name):
    x = images(4, 3, 64, 64)
    for rate, differs in ((0.0, False), (0.9, True)):
        model = own(name, drop_path_rate=rate)
        assert torch.equal(model(x), shared(name)(x))
        assert torch.equal(*(model.train().forward_features(x) for _ in range(2))) is not differs


@each_class
@torch.no_grad()
def test_drop_rate_drops_pooled_features_in_training_only(name):
    model, x = own(name, drop_rate=0.5), images(2, 3, 32, 32)
    x_bchw = model.forward_features(x)
    assert torch.equal(model.forward_head(x_bchw), shared(name).forward_head(x_bchw))
    model.head.train()
    dropped = model.forward_head(x_bchw, pre_logits=True) == 0
    assert 0.4 < dropped.float().mean() < 0.6


@each_class
@each_mode
@pytest.mark.parametrize("img_size", [64, (64, 96)], ids=str)
@torch.no_grad()
def test_img_size_is_taken(name, dense, img_size):
    model = timm.create_model(name, **small(name), dense=dense, img_size=img_size).eval()
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert model.forward_features(images(1, 3, height, width)).shape[2:] == (height // 32, width // 32)


@each_class
def test_unknown_argument_raises(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(name, no_such_argument=1)


# Parameters


@each_model
@each_mode
def test_parameter_names_are_uniform(name, dense):
    pattern = r"(stem|stages\.[0-3]\.(downsample|blocks\.[0-5]|(?!blocks|\d)\w+)|norms\.[0-3]|norm|head\w*)(\.|$)"
    with torch.device("meta"):
        model = timm.create_model(name, **small(name), dense=dense)
    assert [key for key in model.state_dict() if not re.match(pattern, key)] == []
    assert ("norms" in dict(model.named_children())) is dense


def depth(key: str, coarse: bool) -> tuple[int, ...]:
    """Return how deep a parameter is: what a stage holds besides blocks belongs to its first one."""
    if key.startswith("stem."):
        return (0,)
    if not key.startswith("stages."):
        return (2,)
    _, i, part, j, *_ = f"{key}.0.0".split(".")
    return (1, int(i)) if coarse else (1, int(i), int(j) if part == "blocks" else 0)


@each_model
@each_mode
@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_group_matcher_orders_all_parameters_by_depth(name, dense, coarse):
    with torch.device("meta"):
        model = timm.create_model(name, **small(name), dense=dense)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    place = {key: depth(key, coarse) for key, _ in model.named_parameters()}
    rank = {d: i for i, d in enumerate(sorted(set(place.values())))}
    assert groups == {key: rank[d] for key, d in place.items()}
    last = dense and "norms.0.weight" not in place  # a dense model without output norms ends with its blocks
    assert len(rank) == 1 + (4 if coarse else sum(depths(name))) + (not last)


@each_distinct
@each_mode
def test_layer_decay_covers_all_parameters_and_spares_those_without_weight_decay(name, dense):
    model = own(name, dense)
    parameters = dict(model.named_parameters())
    exempt = model.no_weight_decay()
    assert exempt <= parameters.keys()
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8).param_groups
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(map(id, parameters.values()))
    of = {id(p): group for group in groups for p in group["params"]}
    scales = {key: of[id(p)]["lr_scale"] for key, p in parameters.items()}
    assert max(scales.values()) == 1
    assert min(scales.values()) == scales["stem." + next(k for k, _ in model.stem.named_parameters())] < 0.2
    for key, p in parameters.items():
        assert (of[id(p)]["weight_decay"] == 0) == (p.ndim == 1 or key.endswith(".bias") or key in exempt), key


# Training


@each_distinct
@each_mode
def test_training_gives_every_parameter_a_finite_gradient(name, dense):
    grads = gradients(own(name, dense).train(), images(2, 3, 64, 96))
    assert [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


@each_distinct
def test_training_features_gives_every_parameter_a_finite_gradient(name):
    model = own(name, features_only=True).train()
    sum(m.square().mean() for m in model(images(2, 3, 64, 96))).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@each_class
@each_mode
def test_grad_checkpointing_gives_equal_gradients(name, dense):
    model, x = own(name, dense, drop_path_rate=0.3).train(), images(2, 3, 64, 64)
    expected = gradients(model, x)
    recomputed = []
    for i, stage in enumerate(model.stages):
        stage.blocks[0].register_forward_pre_hook(lambda *_, i=i: recomputed.append(i))
    model.set_grad_checkpointing()
    got = gradients(model, x)
    assert sorted(recomputed) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [key for key, grad in expected.items() if not torch.equal(got[key], grad)] == []
    recomputed.clear()
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert recomputed == [0, 1, 2, 3]


@each_class
@each_mode
@pytest.mark.parametrize("checkpointing", [False, True], ids=["alone", "checkpointing"])
def test_activations_computed_twice_give_equal_gradients(name, dense, checkpointing, monkeypatch):
    model, x = own(name, dense, drop_path_rate=0.3).train(), images(2, 3, 64, 64)
    expected = gradients(model, x)
    monkeypatch.setattr(recompute, "_LARGE", 1)
    model.set_grad_checkpointing(checkpointing)
    got = gradients(model, x)
    assert [key for key, grad in expected.items() if not torch.equal(got[key], grad)] == []


@each_class
@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_finite_outputs_and_gradients(name, dense, dtype):
    model, x = own(name, dense), images(2, 3, 64, 64)
    with torch.autocast("cpu", dtype):
        with torch.no_grad():
            outputs = [model(x), *model.forward_intermediates(x, intermediates_only=True)]
        grads = gradients(model.train(), x)
    assert all(out.isfinite().all() for out in outputs)
    assert [key for key, grad in grads.items() if not grad.isfinite().all()] == []


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(name, tmp_path_factory):
    """Return the file of the classifier's weights."""
    path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
    torch.save(shared(name).state_dict(), path)
    yield path
    path.unlink()


def load(name: str, path: Any, **kwargs: Any) -> Any:
    overlay = {"file": str(path)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **small(name), **kwargs).eval()


def assert_same_entries(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [key for key, value in got.items() if not torch.equal(value, expected[key])] == []


@each_distinct
def test_own_checkpoint_loads_whole(name, checkpoint):
    got = load(name, checkpoint).state_dict()
    assert got.keys() == shared(name).state_dict().keys()
    assert_same_entries(got, shared(name).state_dict())


@each_class
def test_official_checkpoint_of_raw_and_averaged_weights_gives_those_of_the_published_accuracy(name, tmp_path):
    raw = shared(name).state_dict()
    averaged = {key: value * 0.5 if value.is_floating_point() else value for key, value in raw.items()}
    content = {"model": raw, "model_ema": averaged, "args": argparse.Namespace(epochs=300)}
    torch.save(content, tmp_path / "official.pth")
    expected = averaged if SKELETONS[name].official_ema else raw
    assert_same_entries(load(name, tmp_path / "official.pth").state_dict(), expected)


@each_class
def test_own_safetensors_loads_whole(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(shared(name).state_dict(), path)
    assert_same_entries(load(name, path).state_dict(), shared(name).state_dict())


@each_distinct
@torch.no_grad()
def test_checkpoint_loads_into_features(name, checkpoint):
    x = images(1, 3, 64, 64)
    expected = shared(name).forward_intermediates(x, intermediates_only=True)
    maps = load(name, checkpoint, features_only=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@each_distinct
@pytest.mark.parametrize("features_only", [False, True], ids=["model", "features"])
def test_checkpoint_loads_into_dense_model_with_fresh_output_norms_in_the_log(name, checkpoint, features_only, caplog):
    with caplog.at_level(logging.INFO, "effbackbones"):
        model = load(name, checkpoint, dense=True, features_only=features_only)
    state = (model.model if features_only else model).state_dict()
    fresh = [key for key in state if key.startswith("norms.")]
    expected = shared(name, dense=True).adapt_weights(shared(name).state_dict())
    for key in fresh:
        value = state.pop(key)
        assert torch.equal(value, torch.ones_like(value) if key.endswith("weight") else torch.zeros_like(value))
    assert_same_entries(state, expected)
    left_out = [key for key in expected if key not in state]
    loaded = Loaded(str(checkpoint), len(state), tuple(fresh), tuple(left_out))
    assert str(loaded) in [record.message for record in caplog.records]


@each_class
def test_dense_checkpoint_loads_whole_into_dense_model(name, tmp_path):
    path = tmp_path / "dense.pth"
    torch.save(shared(name, dense=True).state_dict(), path)
    assert_same_entries(load(name, path, dense=True).state_dict(), shared(name, dense=True).state_dict())


@each_distinct
@pytest.mark.parametrize("num_classes", [7, 0])
def test_checkpoint_of_other_classes_loads_without_its_classifier(name, checkpoint, num_classes):
    state = load(name, checkpoint, num_classes=num_classes).state_dict()
    assert_same_entries(
        {key: value for key, value in state.items() if not key.startswith("head")}, shared(name).state_dict()
    )
    assert all(num_classes in value.shape for key, value in state.items() if key == "head.fc.weight")


@each_class
def test_checkpoint_without_classifier_loads_into_model_of_other_classes(name):
    headless = own(name, num_classes=0).state_dict()
    model = timm.create_model(name, **small(name), num_classes=7)
    assert_same_entries(checkpoint_filter_fn(headless, model), headless)


@each_distinct
@torch.no_grad()
def test_checkpoint_of_colour_loads_into_model_of_grey_images(name, checkpoint):
    x = images(1, 1, 64, 64, dtype=torch.float64)
    grey, colour = load(name, checkpoint, in_chans=1).double(), own(name).double()
    ours = in_fixed_order(grey, x).forward_features(x)
    expected = in_fixed_order(colour, x.expand(-1, 3, -1, -1)).forward_features(x.expand(-1, 3, -1, -1))
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()


def some_keys(state: dict[str, Tensor]) -> list[str]:
    """Return keys from all over a state dict, its first and last among them; not the counters of batch norms."""
    keys = [key for key, value in state.items() if value.ndim]
    return [*keys[:: len(keys) // 6], keys[-1]]


@each_distinct
@each_mode
@pytest.mark.parametrize("damage", ["missing", "unknown", "wrong shape"])
def test_checkpoint_with_damaged_key_raises_and_names_it(name, dense, damage):
    model = shared(name, dense)
    for key in some_keys(model.state_dict()):
        state = dict(model.state_dict())
        value = state.pop(key)
        if damage == "unknown":
            state |= {key: value, (key := f"{key}_more"): value}
        elif damage == "wrong shape":
            state[key] = torch.cat([value, value])
        if dense and damage == "missing" and key.startswith("norms."):
            continue  # a classifier's checkpoint has none
        with pytest.raises(CheckpointError, match=rf"{damage}: {re.escape(key)}\b"):
            checkpoint_filter_fn(state, model)


@each_distinct
def test_checkpoint_of_other_patch_size_raises_and_names_the_layer(name):
    model = shared(name)
    key = f"{model.pretrained_cfg['first_conv']}.weight"
    state = model.state_dict() | {key: F.pad(model.state_dict()[key], (1, 1, 1, 1))}
    with pytest.raises(CheckpointError, match=f"wrong shape: {key}"):
        checkpoint_filter_fn(state, model)


@each_class
def test_damaged_checkpoint_through_timm_raises_and_names_the_key(name, tmp_path):
    state = dict(shared(name).state_dict())
    key = some_keys(state)[3]
    del state[key]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=rf"does not fit {name}: missing: {re.escape(key)}\n"):
        load(name, tmp_path / "damaged.pth")


# Paths


@each_distinct
@each_mode
def test_reference_path_gives_the_same_maps_and_gradients(name, dense):
    model, x, found = own(name, dense).double(), images(2, 3, 70, 96, dtype=torch.float64), []
    for ops, attention in (("auto", "auto"), ("reference", "plain")):
        with ops_backend(ops), attention_backend(attention):
            with torch.no_grad():
                kept = maps_of(model)(x)  # what is cached where there is no gradient
            maps = maps_of(model)(x)
            loss = sum((m * images(*m.shape, dtype=m.dtype)).mean() for m in maps)
            grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
            found.append([*kept, *maps, *grads])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11 * max(1.0, expected.abs().max().item()))


# Fusing


@each_distinct
@each_mode
@torch.no_grad()
def test_fused_model_gives_equal_outputs_without_norms_and_scales_that_fold(name, dense):
    model, x = own(name, dense).double(), images(2, 3, 70, 96, dtype=torch.float64)
    call = maps_of(model) if dense else model
    expected = call(x)
    assert model.fuse() is model
    torch.testing.assert_close(call(x), expected, rtol=1e-10, atol=1e-10 * max(m.abs().max() for m in expected))
    kinds = {type(module) for stage in model.stages for module in stage.modules()}
    assert nn.BatchNorm2d not in kinds
    assert not [key for key, parameter in model.named_parameters() if "gamma" in key or parameter.requires_grad]
    assert not [module for module in model.modules() if getattr(module, "folded", True) is False]


@each_class
def test_fused_model_in_float32_is_within_1e_5(name):
    x = images(2, 3, 64, 64)
    model = copy.deepcopy(in_fixed_order(shared(name), x))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@each_class
def test_fusing_is_for_evaluation_alone(name):
    model = own(name).train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        model.fuse()


# Compilation and export


@pytest.fixture
def _dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def maps_of(model: Any) -> Any:
    return functools.partial(model.forward_intermediates, intermediates_only=True)


@pytest.mark.usefixtures("_dynamo")
@each_class
@each_mode
@torch.no_grad()
def test_compiled_model_has_no_graph_break_and_equal_outputs(name, dense):
    x = images(2, 3, 70, 96)
    model = in_fixed_order(shared(name, dense, compiled=True), x)
    call = maps_of(model) if dense else model
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(x), call(x))


@pytest.mark.usefixtures("_dynamo")
@each_class
@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["classifier", "dense"])
def test_compiled_training_has_no_graph_break_and_equal_gradients(name, dense):
    model = copy.deepcopy(shared(name, dense, compiled=True)).double().train()
    x = images(2, 3, 64, 64, dtype=torch.float64)
    expected = gradients(model, x)
    method = "forward_intermediates" if dense else "forward"
    backend = "eager" if dense else "aot_eager"  # one traces forward, the other backward too, for twice the time
    setattr(model, method, torch.compile(getattr(model, method), fullgraph=True, backend=backend))
    for key, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.slow
@pytest.mark.usefixtures("_dynamo")
@each_class
@each_mode
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_model_takes_sizes_of_detection_with_few_compilations(name, dense, training):
    model = copy.deepcopy(shared(name, dense, compiled=True)).train(training)
    call, counter = maps_of(model) if dense else model, CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for height, width in ((96, 128), (128, 96), (64, 160), (160, 64), (128, 192), (192, 128), (96, 224), (224, 96)):
            x = images(2, 3, height, width)
            output = compiled(x)
            if model.continuous and not training:
                torch.testing.assert_close(output, call(x))
    assert counter.frame_count <= 4


@functools.lru_cache(maxsize=1)
def exported(name: str) -> tuple[Any, Any]:
    """Return the exported program of a cut model, and the model it was made of."""
    batch, x = torch.export.Dim("batch", min=1, max=64), images(2, 3, 64, 96)
    model = in_fixed_order(shared(name, compiled=True), x)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), model


@each_class
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_exported_model_of_any_batch_gives_equal_logits(name, batch):
    x = images(batch, 3, 64, 96)
    program, model = exported(name)
    torch.testing.assert_close(program.module()(x), model(x))


@each_class
@torch.no_grad()
def test_onnx_model_of_another_batch_gives_equal_logits(name):
    exported_program, model = exported(name)
    program = torch.onnx.export(exported_program, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    x = images(3, 3, 64, 96)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x)
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 * expected.abs().max()
