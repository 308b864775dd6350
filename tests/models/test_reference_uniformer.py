"""The literal UniFormer against the fixtures of the official one and against its published counts."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from models.reference_uniformer import (
    VARIANTS,
    Config,
    _attention,
    _pool_score,
    _window_attention,
    forward,
    state_dict_shapes,
)
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict, subsample

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "uniformer").glob("*.json"))

TINY = Config((2, 2, 3, 2), (8, 12, 16, 24), head_dim=8, mlp_ratio=2)
TINY_LIGHT = replace(TINY, conv_stem=True, light=True)
TINY_KINDS = {
    "plain": TINY,
    "conv": replace(TINY, conv_stem=True, conv_downsample=True),
    "attention_layer_scale": replace(TINY, layer_scale="attention"),
    "all_layer_scale_token_labelling": replace(TINY, layer_scale="all", token_labelling=True),
    "light": TINY_LIGHT,
    "window": replace(TINY, attention="window", window_size=3),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def num_params(shapes: dict[str, tuple[int, ...]]) -> int:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(prod(shape) for key, shape in shapes.items() if not key.endswith(buffers))


def tiny_state(config: Config) -> dict[str, torch.Tensor]:
    return fill_state_dict(state_dict_shapes(config, num_classes=5))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_forward_on_fixture_equals_official_numbers(path):
    meta, expected = load_fixture(path)
    with torch.no_grad():
        x = make_input(meta["input_shape"], meta["input_seed"])
        logits, maps = forward(reference_state_dict(meta), x, VARIANTS[meta["official_name"]])
    assert [list(m.shape) for m in maps] == meta["feature_shapes"]
    ours = {"logits": logits.numpy(), **{f"feature_{i}": subsample(m) for i, m in enumerate(maps)}}
    assert ours.keys() == expected.keys()
    errors = {k: abs(ours[k] - expected[k]).max() / abs(expected[k]).max() for k in expected}
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_state_dict_shapes_of_fixture_equal_official_ones(path):
    meta, _ = load_fixture(path)
    shapes = state_dict_shapes(VARIANTS[meta["official_name"]])
    assert shapes == {k: tuple(v) for k, v in meta["state_dict"].items()}
    assert num_params(shapes) == meta["num_params"]


@pytest.mark.parametrize(
    ("name", "entries", "params"),
    [
        ("uniformer_small", 331, 21_545_256),
        ("uniformer_small_plus", 386, 24_032_552),
        ("uniformer_small_plus_dim64", 386, 24_032_552),
        ("uniformer_base", 687, 49_776_552),
        ("uniformer_base_ls", 741, 49_796_520),
        ("uniformer_xxs", 334, 10_215_280),
        ("uniformer_xs", 384, 16_509_264),
        ("uniformer_small_tl", 333, 21_545_256 + 513_000),
        ("uniformer_small_dim64_tl", 333, 21_545_256 + 513_000),
        ("uniformer_small_plus_tl", 388, 24_032_552 + 513_000),
        ("uniformer_small_plus_dim64_tl", 388, 24_032_552 + 513_000),
        ("uniformer_base_tl", 689, 49_776_552 + 513_000),
        ("uniformer_base_dim64_tl", 689, 49_776_552 + 513_000),
        ("uniformer_large_ls_tl", 881, 100_103_888),
    ],
)
def test_state_dict_shapes_of_variant_have_official_counts(name, entries, params):
    shapes = state_dict_shapes(VARIANTS[name])
    assert (len(shapes), num_params(shapes)) == (entries, params)


@pytest.mark.parametrize(("name", "entries"), [("uniformer_small", 332), ("uniformer_xxs", 331)])
def test_state_dict_shapes_in_dense_mode_have_official_count(name, entries):
    assert len(state_dict_shapes(replace(VARIANTS[name], dense=True))) == entries


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (TINY, [(51, 82), (25, 41), (12, 20), (6, 10)]),
        (TINY_KINDS["conv"], [(52, 83), (26, 42), (13, 21), (7, 11)]),
        (TINY_LIGHT, [(52, 83), (26, 41), (13, 20), (6, 10)]),
    ],
    ids=["patch", "conv", "light"],
)
def test_maps_of_indivisible_size_round_as_official(config, sizes):
    _, maps = forward(tiny_state(config), make_input((1, 3, 205, 330)), config)
    assert [tuple(m.shape[2:]) for m in maps] == sizes


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)], ids=str)
def test_light_of_one_or_two_last_tokens_is_finite(size):
    logits, maps = forward(tiny_state(TINY_LIGHT), make_input((2, 3, *size)), TINY_LIGHT)
    assert maps[3].shape[2] * maps[3].shape[3] in (1, 2)
    assert all(t.isfinite().all() for t in (logits, *maps))


def test_pool_score_of_odd_map_drops_the_rest_and_keeps_the_sum():
    score_bn = torch.tensor([[1.0, 2, 3, 4, 9, 5, 6, 7, 8, 9]])  # 2 x 5: the last column is dropped
    expected = torch.tensor([[14.0, 22.0]]) * 54 / 36
    torch.testing.assert_close(_pool_score(score_bn, 2, 5), expected)


def test_token_labelling_logits_add_half_the_largest_aux_logits():
    config = replace(TINY, token_labelling=True)
    state = tiny_state(config)
    logits, maps = forward(state, make_input((2, 3, 64, 96)), config)
    norm = [state[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    z_bchw = torch.nn.functional.batch_norm(maps[3], *norm)
    head, aux = (
        torch.einsum("bchw,kc->bkhw", z_bchw, state[f"{name}.weight"]) + state[f"{name}.bias"][:, None, None]
        for name in ("head", "aux_head")
    )
    torch.testing.assert_close(logits, head.mean(dim=(2, 3)) + aux.amax(dim=(2, 3)) / 2)


@pytest.mark.parametrize("config", TINY_KINDS.values(), ids=TINY_KINDS)
def test_gradient_of_input_and_state_equals_finite_difference(config):
    state = {k: v for k, v in tiny_state(config).items() if v.is_floating_point()}
    x = make_input((2, 3, 70, 96))
    names = ["x", *state]
    point = [x, *state.values()]
    torch.manual_seed(0)
    direction = [torch.randn_like(t) * t.std(correction=0) for t in point]

    def loss(step: float = 0.0) -> torch.Tensor:
        moved = dict(zip(names, (p + step * d for p, d in zip(point, direction, strict=True)), strict=True))
        logits, maps = forward({k: moved[k] for k in state}, moved["x"], config)
        return logits.square().mean() + sum(m.square().mean() for m in maps)

    for t in point:
        t.requires_grad_()
    grads = torch.autograd.grad(loss(), point, allow_unused=True)
    unused = {k for k, g in zip(names, grads, strict=True) if g is None}
    assert unused == {k for k in names if k.startswith(("norm_cls", "head_cls"))}
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
    with torch.no_grad():
        torch.testing.assert_close(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-6, atol=0)


def test_dense_maps_are_layer_norms_of_classifier_maps():
    dense = replace(TINY, dense=True)
    state = tiny_state(TINY) | tiny_state(dense)
    x = make_input((1, 3, 64, 96))
    _, raw = forward({k: state[k] for k in state_dict_shapes(TINY)}, x, TINY)
    logits, maps = forward({k: state[k] for k in state_dict_shapes(dense)}, x, dense)
    assert logits is None
    for i, (m, r) in enumerate(zip(maps, raw, strict=True), start=1):
        weight, bias = state[f"norm{i}.weight"], state[f"norm{i}.bias"]
        expected = torch.nn.functional.layer_norm(r.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6)
        torch.testing.assert_close(m, expected.permute(0, 3, 1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["window", "hybrid"])
def test_window_of_map_size_equals_global_attention(attention):
    x = make_input((1, 3, 96, 96))
    windowed = replace(TINY, attention=attention, window_size=6)
    torch.testing.assert_close(forward(tiny_state(TINY), x, windowed), forward(tiny_state(TINY), x, TINY))


def test_hybrid_attention_is_global_in_every_fourth_block():
    deep = replace(TINY, depths=(1, 1, 4, 1), window_size=2)
    state, x = tiny_state(deep), make_input((1, 3, 96, 96))
    # With no output in the three windowed blocks, only the fourth, global one is left to differ.
    for j in range(3):
        state[f"blocks3.{j}.attn.proj.weight"].zero_()
    logits = {a: forward(state, x, replace(deep, attention=a))[0] for a in ("global", "hybrid", "window")}
    torch.testing.assert_close(logits["hybrid"], logits["global"])
    assert (logits["window"] - logits["global"]).abs().max() > 1e-6


def test_window_attention_of_small_map_attends_to_padding():
    state = tiny_state(TINY)
    y_bhwc = make_input((1, 2, 3, 16))
    ours = _window_attention(state, "blocks3.0", y_bhwc, heads=2, window=4)
    tokens = torch.cat([y_bhwc.reshape(1, 6, 16), torch.zeros(1, 10, 16, dtype=torch.float64)], dim=1)
    expected = _attention(state, "blocks3.0", tokens, heads=2)[0][:, :6].reshape(1, 2, 3, 16)
    torch.testing.assert_close(ours, expected)


def test_forward_of_state_with_unknown_key_raises():
    state = tiny_state(TINY) | {"blocks1.0.gamma_1": torch.ones(8)}
    with pytest.raises(ValueError, match=r"blocks1\.0\.gamma_1"):
        forward(state, make_input((1, 3, 32, 32)), TINY)
