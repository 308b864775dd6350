"""TransNeXt against the official numbers, the literal implementation, and the specification's fine print."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from models import comparison
from models import reference_transnext as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_transnext import VARIANTS, Config, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError
from effbackbones.models import transnext
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.transnext import AggregatedAttention, Attention, Block, LogPositionBias
from effbackbones.ops import ops_backend

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "transnext").glob("*.json"))
CLASSES = 5


def small(name: str = "transnext_micro", **changes: Any) -> Config:
    """Return a variant of few and narrow layers."""
    return replace(VARIANTS[name], **{"depths": (1, 1, 2, 1), "dims": (24, 24, 48, 48), **changes})


def filled(config: Config) -> dict[str, Tensor]:
    return fill_state_dict(state_dict_shapes(config, CLASSES))


def ported(config: Config, name: str = "transnext_micro") -> Any:
    """Return our model of that architecture in float64, with the filled official weights."""
    model = timm.create_model(
        name,
        pretrained_cfg_overlay={"num_classes": CLASSES},
        num_classes=CLASSES,
        depths=config.depths,
        dims=config.dims,
        dense=config.dense,
        bias_mode="interpolate" if config.interpolate else "extrapolate",
        img_size=config.img_size,
        pretrain_size=config.pretrain_size,
        fixed_pool_size=config.fixed_pool_size,
    )
    model = model.double().eval()
    model.load_state_dict(checkpoint_filter_fn(filled(config), model))
    return model


def assert_same_numbers(model: Any, config: Config, size: tuple[int, int]) -> None:
    comparison.assert_same_numbers(model, partial(reference.forward, config=config), filled(config), size)


# Parity


def fixture_config(path: Path) -> tuple[str, Config]:
    kwargs = load_fixture(path)[0]["kwargs"]
    name = "transnext_tiny" if "tiny" in path.stem else "transnext_micro"
    return name, replace(
        VARIANTS[name],
        dense="dense" in path.stem,
        interpolate=not kwargs.get("is_extrapolation", True),
        img_size=kwargs["img_size"],
        pretrain_size=kwargs.get("pretrain_size", kwargs["img_size"]),
    )


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_official_checkpoint_file_gives_official_numbers(path, tmp_path):
    meta, _ = load_fixture(path)
    name, config = fixture_config(path)
    weights = reference_state_dict(meta)
    if config.dense:  # as a detector's
        checkpoint = {"state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {"neck.x": torch.zeros(1)}}
    else:
        checkpoint = {"model": weights, "optimizer": {}, "epoch": 299, "max_accuracy": 82.5}
    torch.save(checkpoint, tmp_path / "official.pth")
    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "official.pth")},
            dense=config.dense,
            bias_mode="interpolate" if config.interpolate else "extrapolate",
            img_size=config.img_size,
            pretrain_size=config.pretrain_size,
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    with torch.no_grad():
        last, maps = model.forward_intermediates(make_input(meta["input_shape"], meta["input_seed"]))
        logits = None if config.dense else model.forward_head(last)
    assert_numbers_of_fixture(path, logits, maps)


@pytest.mark.parametrize("path", [path for path in FIXTURES if "micro" in path.stem], ids=lambda path: path.stem)
@torch.no_grad()
def test_literal_implementation_gives_official_numbers(path):
    meta, _ = load_fixture(path)
    _, config = fixture_config(path)
    assert state_dict_shapes(config) == {key: tuple(shape) for key, shape in meta["state_dict"].items()}
    x = make_input(meta["input_shape"], meta["input_seed"])
    assert_numbers_of_fixture(path, *reference.forward(reference_state_dict(meta), x, config))


SIZES = [(64, 96), (70, 101), (32, 32), (128, 32), (61, 45)]  # bins even and uneven, maps of one row or token


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_classifier_equals_the_literal_implementation(size):
    config = small()
    assert_same_numbers(ported(config), config, size)


@pytest.mark.parametrize("size", [(128, 128), (70, 101), (32, 64)], ids=str)
def test_aggregated_attention_in_all_stages_equals_the_literal_implementation(size):
    config = small("transnext_micro_AAAA")
    assert_same_numbers(ported(config, "transnext_micro_AAAA"), config, size)


@pytest.mark.parametrize("fixed_pool_size", [1, 3, 7])  # 7 is more than the last maps have
@pytest.mark.parametrize("interpolate", [False, True], ids=["extrapolate", "interpolate"])
def test_fixed_pool_size_equals_the_literal_implementation(fixed_pool_size, interpolate):
    config = small(fixed_pool_size=fixed_pool_size, interpolate=interpolate, img_size=96)
    assert_same_numbers(ported(config), config, (70, 101))


@pytest.mark.parametrize("img_size", [160, (64, 96), 32])
@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=str)
def test_interpolated_bias_equals_the_literal_implementation(img_size, size):
    config = small(dense=True, interpolate=True, img_size=img_size)
    assert_same_numbers(ported(config), config, size)


def test_bias_mode_is_free_of_dense_mode():
    for config in (small(dense=True), small(interpolate=True, img_size=96)):
        assert_same_numbers(ported(config), config, (64, 64))


@pytest.mark.parametrize("pretrain_size", [384, 40])  # 40: stages whose unit would be zero
def test_pretrain_size_sets_the_unit_of_positions(pretrain_size):
    config = small(pretrain_size=pretrain_size)
    assert_same_numbers(ported(config), config, (64, 96))


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_of_full_size_map_one_to_one(name, dense):
    with torch.device("meta"):
        model = timm.create_model(name, dense=dense)
        official = {k: torch.empty(s) for k, s in state_dict_shapes(replace(VARIANTS[name], dense=dense)).items()}
    mapped = checkpoint_filter_fn(official, model)
    assert mapped.keys() == model.state_dict().keys()
    assert sorted(map(id, mapped.values())) == sorted(map(id, official.values()))


def test_checkpoint_of_another_kind_of_last_stage_raises_and_names_its_keys():
    with torch.device("meta"):
        model = timm.create_model("transnext_micro")
        official = {k: torch.empty(s) for k, s in state_dict_shapes(VARIANTS["transnext_micro_AAAA"]).items()}
    with pytest.raises(CheckpointError, match=r"missing: stages\.3\.blocks\.0\.attn\.qkv\.weight") as caught:
        checkpoint_filter_fn(official, model)
    assert "unknown: stages.3.blocks.0.attn.relative_pos_bias_local" in str(caught.value)


def test_maps_of_indivisible_size_round_up():
    with torch.device("meta"):
        model = timm.create_model("transnext_micro", depths=(1, 1, 1, 1), features_only=True).eval()
        sizes = [tuple(m.shape[2:]) for m in model(torch.empty(1, 3, 205, 330))]
    assert sizes == [(52, 83), (26, 42), (13, 21), (7, 11)]


# Position bias


GRIDS = [
    ((8, 8), (2, 2)),
    ((12, 8), (3, 4)),
    ((7, 10), (3, 4)),  # bins that overlap
    ((7, 8), (3, 2)),
    ((5, 5), (7, 7)),
    ((1, 6), (1, 3)),
    ((6, 6), (6, 6)),
]


def literal_bias(module: LogPositionBias, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """Return the bias (heads, N, P), pair by pair."""
    state = {f"cpb_{key}": value for key, value in module.state_dict().items()}
    return reference._pair_bias({f".{k}": v for k, v in state.items()}, "", grid, pool, module.unit)


def in_raster_order(bias: Tensor) -> Tensor:
    """Return a bias (heads, pH, pW, H, W) of keys in reverse order as (heads, N, P)."""
    return bias.flip(1, 2).flatten(3).flatten(1, 2).mT


@pytest.mark.parametrize(("grid", "pool"), GRIDS, ids=str)
@torch.no_grad()
def test_tabulated_bias_is_that_of_every_pair(grid, pool):
    torch.manual_seed(0)
    module = LogPositionBias(3, 7, None, flat=False).double()
    expected = literal_bias(module, grid, pool)
    assert error(in_raster_order(module(grid, pool)), expected) < 1e-12
    module.flat = True
    assert error(module(grid, pool)[0], expected) < 1e-12


@torch.no_grad()
def test_bias_of_even_bins_is_a_view_of_a_table_of_offsets():
    module = LogPositionBias(3, 56, None, flat=False)
    bias = module((56, 56), (7, 7))
    assert bias.untyped_storage().nbytes() == 4 * 3 * 104 * 104


@torch.no_grad()
def test_bias_interpolated_to_its_own_map_is_the_extrapolated_one():
    model = ported(small(interpolate=True, img_size=(64, 96)))
    extrapolating = ported(small())
    x = make_input((1, 3, 64, 96))
    assert torch.equal(model.forward_features(x), extrapolating.forward_features(x))
    x = make_input((1, 3, 64, 64))
    assert error(model.forward_features(x), extrapolating.forward_features(x)) > 1e-6


@pytest.mark.parametrize("trained", [None, ((6, 9), (3, 3))], ids=["extrapolate", "interpolate"])
def test_bias_does_not_depend_on_chunks_of_its_table(trained, monkeypatch):
    torch.manual_seed(0)
    module = LogPositionBias(2, 7, trained, flat=False).double()
    whole = module((8, 8), (2, 2))
    expected = torch.autograd.grad(whole.square().sum(), list(module.parameters()))
    monkeypatch.setattr(LogPositionBias, "_CHUNK", 1)
    by_rows = module((8, 8), (2, 2))
    grads = torch.autograd.grad(by_rows.square().sum(), list(module.parameters()))
    for a, b in zip((by_rows, *grads), (whole, *expected), strict=True):
        torch.testing.assert_close(a, b)


def test_hidden_values_of_the_table_are_not_kept_for_the_backward_pass():
    module, kept = LogPositionBias(2, 7, None, flat=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        module((8, 8), (2, 2))
    assert max(kept) < 14 * 14 * 512


@pytest.mark.parametrize("limit", [2**24, 1], ids=["small", "large"])
@torch.no_grad()
def test_bias_is_kept_while_weights_and_sizes_rest(limit, monkeypatch):
    monkeypatch.setattr(LogPositionBias, "_KEPT", limit)
    calls: list[Any] = []
    outer = LogPositionBias._outer
    monkeypatch.setattr(LogPositionBias, "_outer", lambda *args: calls.append(args) or outer(*args))
    module = LogPositionBias(2, 7, None, flat=False).eval()
    first = module((8, 8), (2, 2))
    assert torch.equal(module((8, 8), (2, 2)), first)
    assert len(calls) == 1
    module((8, 8), (4, 4))
    module((8, 6), (2, 2))
    assert len(calls) == 3
    module.fc2.bias.add_(1)
    torch.testing.assert_close(module((8, 6), (2, 2)).mean(), module((8, 6), (2, 2)).mean())
    assert len(calls) == 4
    module.train()((8, 6), (2, 2))
    module((8, 6), (2, 2))
    assert len(calls) == 6


@torch.no_grad()
def test_large_bias_that_is_not_kept_gives_the_same_maps(monkeypatch):
    model, x = ported(small(interpolate=True, img_size=96)), make_input((1, 3, 70, 101))
    expected = model.forward_features(x)
    monkeypatch.setattr(LogPositionBias, "_KEPT", 1)
    model.train().eval()
    assert torch.equal(model.forward_features(x), expected)


def test_large_resized_bias_is_no_tensor_that_the_backward_pass_keeps(monkeypatch):
    model, x = ported(small(interpolate=True, img_size=96)), make_input((1, 3, 160, 192))

    def step(limit: int) -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}
        monkeypatch.setattr(LogPositionBias, "_KEPT", limit)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            loss = model.forward_features(x).square().mean()
        return [loss, *torch.autograd.grad(loss, model.parameters(), allow_unused=True)], sum(kept.values())

    (expected, all_numbers), (ours, numbers) = step(2**24), step(1)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert numbers < all_numbers - (40 * 48) * (5 * 6)


# Arguments


def test_unknown_bias_mode_raises():
    with pytest.raises(ValueError, match="bias_mode='resize': expected extrapolate or interpolate"):
        timm.create_model("transnext_micro", bias_mode="resize")


def test_fixed_pool_size_of_nothing_raises():
    with pytest.raises(ValueError, match="fixed_pool_size=0: expected a positive number"):
        timm.create_model("transnext_micro", fixed_pool_size=0)


def test_head_dim_that_does_not_divide_the_widths_raises():
    with pytest.raises(ValueError, match=r"head_dim=32 does not divide dims \(48, 96, 192, 384\)"):
        timm.create_model("transnext_micro", head_dim=32)


@pytest.mark.parametrize(("name", "units"), [("transnext_micro", (55, 27, 13, 6)), ("transnext_micro_AAAA", None)])
@pytest.mark.parametrize("img_size", [None, 384])
def test_unit_of_positions_is_that_of_the_pretraining_whatever_the_image(name, units, img_size):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1), img_size=img_size)
    assert tuple(stage.blocks[0].attn.cpb.unit for stage in model.stages) == (units or (63, 31, 15, 7))


def test_dense_mode_interpolates_from_the_size_of_the_pretraining_unless_told_otherwise():
    def trained(**kwargs: Any) -> list[Any]:
        with torch.device("meta"):
            model = timm.create_model("transnext_micro", depths=(1, 1, 1, 1), dense=True, **kwargs)
        return [stage.blocks[0].attn.cpb.trained for stage in model.stages]

    assert trained()[0] == ((56, 56), (7, 7))
    assert trained(img_size=800) == [
        ((200, 200), (25, 25)),
        ((100, 100), (25, 25)),
        ((50, 50), (25, 25)),
        ((25, 25), (25, 25)),
    ]
    assert trained(img_size=(256, 512))[2] == ((16, 32), (8, 16))
    assert trained(bias_mode="extrapolate") == [None] * 4


# Initialisation, weight decay, drop path


def test_initial_weights_have_their_distributions():
    torch.manual_seed(0)
    model = timm.create_model("transnext_tiny", depths=(1, 1, 1, 1)).requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std() == pytest.approx(0.02, rel=0.05), key
            assert not module.bias.any(), key
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert module.weight.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), key
            assert module.weight.abs().max() > 2.5 * module.weight.std(), key
            assert not module.bias.any(), key
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key
    for key, parameter in model.named_parameters():
        kind = key.rsplit(".", 1)[-1]
        if kind == "temperature":
            torch.testing.assert_close(nn.functional.softplus(parameter), torch.full_like(parameter, 1 / 0.24))
        elif kind in ("query_embedding", "learnable_tokens"):
            assert parameter.std() == pytest.approx(0.02, rel=0.25), key
        elif kind == "relative_pos_bias_local":
            assert parameter.std() == pytest.approx(0.0004, rel=0.5), key
        elif kind == "learnable_bias":
            assert not parameter.any(), key


def test_norms_have_their_epsilons():
    with torch.device("meta"):
        model = timm.create_model("transnext_micro")
    coarse = {key for key, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.eps == 1e-5}
    fine = {key for key, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.eps == 1e-6}
    pooled = {f"stages.{i}.blocks.{j}.attn.norm" for i, depth in enumerate((2, 2, 15)) for j in range(depth)}
    assert coarse == pooled | {"stem.norm", *(f"stages.{i}.downsample.norm" for i in (1, 2, 3))}
    assert len(fine) == 2 * 21 + 4


@pytest.mark.parametrize("name", ["transnext_micro", "transnext_micro_AAAA"])
def test_weight_decay_spares_vectors_biases_and_the_named_parameters_alone(name):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1))
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    spared = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
    assert decayed == {k for k, p in model.named_parameters() if p.ndim > 1 and not any(part in k for part in spared)}
    assert {"stages.0.blocks.0.attn.learnable_tokens", "stages.0.blocks.0.attn.learnable_bias"} <= decayed


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("transnext_micro", drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.4 * k / 20 for k in range(21)])


def test_drop_path_draws_for_every_sample_and_branch():
    torch.manual_seed(0)
    block = Block(24, Attention(24, 24, 7, None, exact_length=True), 4, 0.5)
    out = block.train()(torch.randn(1, 24, 4, 4).expand(64, -1, -1, -1)).flatten(1)
    kinds = {tuple(row) for row in out.mul(1e4).round().int().tolist()}
    assert len(kinds) == 4


# Paths


@pytest.mark.parametrize("name", ["transnext_micro", "transnext_micro_AAAA"])
@torch.no_grad()
def test_reference_operator_gives_the_same_maps(name):
    model, x = ported(small(name), name), make_input((2, 3, 70, 101))
    expected = model.forward_features(x)
    with ops_backend("reference"):
        assert error(model.forward_features(x), expected) < 1e-12


def test_queries_and_keys_of_zero_length_give_finite_gradients():
    attention = AggregatedAttention(24, 24, 2, None, 7, None)
    nn.init.zeros_(attention.q.weight)
    nn.init.zeros_(attention.kv.weight)
    x = torch.randn(1, 4, 4, 24, requires_grad=True)
    y = attention(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (x, *attention.parameters()))


@torch.no_grad()
def test_uneven_bins_export_to_onnx_with_any_batch():
    torch.manual_seed(0)
    attention = AggregatedAttention(24, 24, 3, None, 7, (9, 6)).eval()
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(attention, (torch.randn(2, 7, 10, 24),), dynamic_shapes=(dims,))
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    x = torch.randn(3, 7, 10, 24)
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(torch.from_numpy(ours), attention(x)) < 1e-5


def test_constants_are_those_of_the_reference_in_float32():
    lengths = transnext._log_lengths((3, 4), (1, 2), torch.device("cpu")).unflatten(0, (3, 4))
    assert torch.equal(lengths[:, 1], torch.tensor([8.0, 11.0, 8.0]).log())
    assert torch.equal(lengths[0, 0], torch.tensor(6.0).log())
    assert transnext._log_offsets(4, 2, 3, torch.device("cpu")).dtype == torch.float32
