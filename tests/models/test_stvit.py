"""STViT against the official numbers, the literal implementation, and the specification's fine print."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import comparison
from models import reference_stvit as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_stvit import VARIANTS, Config, is_constant, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.stvit import Block
from effbackbones.ops import ops_backend

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "stvit").glob("*.json"))
CLASSES = 5
IDENTITY = torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3)


def small(name: str, **changes: Any) -> Config:
    """Return a variant of few and narrow layers, whose heads have other widths than its stages."""
    shape = {"depths": (2, 1, 2, 1), "dims": (8, 12, 20, 24), "heads": (1, 2, 5, 4), "projection": 16}
    return replace(VARIANTS[name], **{**shape, **changes})


def official(config: Config, num_classes: int = CLASSES) -> dict[str, Tensor]:
    """Return a filled state dict with the constants that an official checkpoint has."""
    state = fill_state_dict(state_dict_shapes(config, num_classes))
    return {key: IDENTITY if is_constant(key) else value for key, value in state.items()}


def build(name: str, config: Config, **kwargs: Any) -> Any:
    """Return our model of that architecture; cells and rounds are those of `config`."""
    return timm.create_model(
        name,
        pretrained_cfg_overlay={"num_classes": CLASSES},
        num_classes=CLASSES,
        depths=config.depths,
        dims=config.dims,
        num_heads=config.heads,
        projection=config.projection,
        stoken_size=config.cells,
        n_iter=config.n_iter,
        **kwargs,
    )


def ported(name: str, config: Config, **kwargs: Any) -> Any:
    """Return that model in float64, with the filled official weights."""
    model = build(name, config, **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(official(config), model))
    return model


def assert_same_numbers(model: Any, config: Config, size: tuple[int, int]) -> None:
    constants = {key: value for key, value in official(config).items() if is_constant(key)}
    state = {key: value for key, value in official(config).items() if key not in constants}
    comparison.assert_same_numbers(
        model, lambda state, x: reference.forward({**state, **constants}, x, config), state, size
    )


# Parity


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_official_checkpoint_file_gives_official_numbers(path, tmp_path):
    meta, _ = load_fixture(path)
    # The fixtures fill the constants at random, although the reference ran with the identity.
    weights = {k: IDENTITY if is_constant(k) else v for k, v in reference_state_dict(meta).items()}
    file = tmp_path / "official.pth"
    torch.save({"model": weights, "epoch": 299, "args": argparse.Namespace(lr=1e-3), "max_accuracy": 83.6}, file)
    torch.set_default_dtype(torch.float64)
    try:
        name = path.stem.rsplit("_", 1)[0]
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    constants = sum(value.numel() for key, value in weights.items() if is_constant(key))
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"] - constants
    x = make_input(meta["input_shape"], meta["input_seed"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
    assert_numbers_of_fixture(path, logits, maps)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_literal_implementation_gives_official_numbers(path):
    meta, _ = load_fixture(path)
    config = VARIANTS[path.stem.rsplit("_", 1)[0]]
    with torch.no_grad():
        x = make_input(meta["input_shape"], meta["input_seed"])
        logits, maps = reference.forward(reference_state_dict(meta), x, config)
    assert_numbers_of_fixture(path, logits, maps)
    assert state_dict_shapes(config) == {k: tuple(v) for k, v in meta["state_dict"].items()}


@pytest.mark.parametrize(("name", "entries"), [("stvit_small", 478), ("stvit_base", 728), ("stvit_large", 910)])
def test_literal_state_dict_has_the_official_number_of_entries(name, entries):
    assert len(state_dict_shapes(VARIANTS[name])) == entries


@torch.no_grad()
def test_small_at_224_in_float32_gives_official_logits():
    meta, expected = load_fixture(next(path for path in FIXTURES if path.stem == "stvit_small_224x224"))
    weights = {key: value for key, value in reference_state_dict(meta).items() if not is_constant(key)}
    model = timm.create_model("stvit_small").eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    logits = model(make_input(meta["input_shape"], meta["input_seed"]).float())
    assert error(logits.double(), torch.from_numpy(expected["logits"])) < 1e-4


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_the_literal_implementation(name, dense, path):
    config = small(name)
    with ops_backend(path):
        assert_same_numbers(ported(name, config, dense=dense), config, (70, 101))


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (130, 35), (96, 128)], ids=str)
def test_model_at_any_size_equals_the_literal_implementation(size):
    config = small("stvit_base", depths=(1, 1, 1, 1))
    assert_same_numbers(ported("stvit_base", config), config, size)


@pytest.mark.parametrize(
    ("cells", "n_iter"),
    [((16, 8, 2, 1), (1, 1, 1, 1)), ((8, 4, 1, 1), (3, 2, 1, 1)), ((3, 5, 2, 2), (2, 1, 2, 3)), ((1,) * 4, (1,) * 4)],
    ids=str,
)
def test_cells_and_rounds_equal_the_literal_implementation(cells, n_iter):
    config = small("stvit_base", depths=(1, 1, 1, 1), cells=cells, n_iter=n_iter)
    assert_same_numbers(ported("stvit_base", config), config, (70, 101))


# Arguments


def test_one_number_of_cells_or_rounds_counts_for_all_stages():
    model = timm.create_model("stvit_small", depths=(1, 1, 1, 1), stoken_size=2, n_iter=3)
    assert [(s.blocks[0].attn.cell, s.blocks[0].attn.n_iter) for s in model.stages] == [(2, 3)] * 4


@pytest.mark.parametrize("mode", [{}, {"dense": True}], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_samples_super_tokens_in_two_stages_once(name, mode):
    with torch.device("meta"):
        model = timm.create_model(name, **mode)
    attention = [[block.attn for block in stage.blocks] for stage in model.stages]
    assert {(a.cell, a.n_iter) for a in attention[0]} == {(8, 1)}
    assert {(a.cell, a.n_iter) for a in attention[1]} == {(4, 1)}
    assert not any(hasattr(a, "cell") for a in (*attention[2], *attention[3]))


@pytest.mark.parametrize("name", ["stoken_size", "n_iter"])
@pytest.mark.parametrize("value", [0, -1, (8, 4, 0, 1), (8, 4, 1)], ids=str)
def test_cells_and_rounds_that_are_not_positive_or_not_four_raise(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*: expected a positive number, or four of them"):
        timm.create_model("stvit_small", **{name: value})


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match=r"num_heads=\(1, 2, 3, 8\) do not divide dims=\(64, 128, 320, 512\)"):
        timm.create_model("stvit_small", num_heads=(1, 2, 3, 8))


# Maps


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_maps_stay_channels_last(training):
    model = build("stvit_base", small("stvit_base")).train(training)
    for x_bchw in model.forward_intermediates(torch.randn(2, 3, 70, 101), intermediates_only=True):
        assert x_bchw.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("size", "sizes"), [(205, (52, 26, 13, 7)), (330, (83, 42, 21, 11)), (33, (9, 5, 3, 2))], ids=str
)
def test_maps_of_indivisible_size_round_up(size, sizes):
    with torch.device("meta"):
        model = timm.create_model("stvit_small", depths=(1, 1, 1, 1), features_only=True).eval()
        maps = model(torch.empty(1, 3, size, 224))
    assert tuple(m.shape[2] for m in maps) == sizes


# Super tokens of a model


@pytest.mark.parametrize(("stage", "block", "number"), [(0, 0, 0), (0, -1, 1), (1, -1, 2)])
@torch.no_grad()
def test_super_tokens_of_a_block_are_those_of_the_literal_implementation(stage, block, number, monkeypatch):
    config, x = small("stvit_small"), make_input((2, 3, 70, 101))
    calls = []
    real = reference.associate
    monkeypatch.setattr(reference, "associate", lambda *args: calls.append((args[0], real(*args))) or calls[-1][1])
    _, maps = reference.forward(official(config), x, config)
    x_bnc, (q_bnk, total_b) = calls[number]  # two blocks of stage 0, one of stage 1
    s_bc = reference._update(x_bnc, q_bnk, total_b)

    s_bchw, q_bkhw = ported("stvit_small", config).super_tokens(x, stage, block)
    assert s_bchw.shape[1] == config.dims[stage]
    assert q_bkhw.shape == (2, 9, *maps[stage].shape[2:])
    cell, covered = config.cells[stage], torch.zeros(maps[stage].shape[2:])
    assert s_bchw.shape[2:] == tuple(math.ceil(n / cell) for n in covered.shape)
    for i, j in x_bnc:
        assert error(s_bchw[:, :, i, j], s_bc[i, j]) < 1e-9
        rows, cols = slice(i * cell, (i + 1) * cell), slice(j * cell, (j + 1) * cell)
        ours = q_bkhw[:, :, rows, cols]
        expected = q_bnk[i, j].transpose(1, 2).unflatten(2, (cell, cell))
        assert error(ours, expected[:, :, : ours.shape[2], : ours.shape[3]]) < 1e-9
        covered[rows, cols] += 1
    assert covered.eq(1).all()


@torch.no_grad()
def test_super_tokens_of_a_stage_without_them_raise():
    model = build("stvit_small", small("stvit_small"))
    with pytest.raises(ValueError, match="stage 2 has no super tokens: its stoken_size is 1"):
        model.super_tokens(torch.zeros(1, 3, 64, 64), stage=2)


# Checkpoints


@pytest.mark.parametrize("constants", [True, False], ids=["with constants", "without"])
@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_of_full_size_map_one_to_one(name, dense, constants):
    with torch.device("meta"):
        model = timm.create_model(name, dense=dense)
        shapes = state_dict_shapes(VARIANTS[name]).items()
        state = {key: torch.empty(shape) for key, shape in shapes if not is_constant(key)}
    count = len(state)
    if constants:
        state |= {key: IDENTITY for key, _ in shapes if is_constant(key)}
    mapped = checkpoint_filter_fn(state, model)
    assert mapped.keys() == model.state_dict().keys()
    assert len(mapped) == count - (9 if dense else 0)  # convolution, norm and linear layer of the classifier


@pytest.mark.parametrize("key", ["layers.1.blocks.0.attn.fold.weights", "layers.2.blocks.1.attn.unfold.weights"])
@pytest.mark.parametrize("wrong", [2 * IDENTITY, IDENTITY.flip(0), IDENTITY.reshape(9, 9)], ids=["2", "flip", "shape"])
def test_constant_that_is_not_the_identity_raises_and_is_named(key, wrong):
    config = small("stvit_small")
    with pytest.raises(CheckpointError, match=rf"^{key}: not the identity"):
        checkpoint_filter_fn({**official(config), key: wrong}, build("stvit_small", config))


def test_constants_in_half_precision_are_dropped():
    config = small("stvit_small")
    state = {key: value.half() if is_constant(key) else value for key, value in official(config).items()}
    assert not [key for key in checkpoint_filter_fn(state, build("stvit_small", config)) if "fold" in key]


def test_checkpoint_of_the_withdrawn_release_raises_with_the_reason():
    config = small("stvit_small")
    key = "layers.0.blocks.1.pos_embed.shortcut"
    state = {**official(config), key: torch.eye(3).reshape(1, 1, 3, 3)}
    with pytest.raises(CheckpointError, match=rf"^{key}: of a release .* that was withdrawn"):
        checkpoint_filter_fn(state, build("stvit_small", config))


def test_larger_kernel_in_place_of_a_linear_layer_raises_and_is_named():
    config = small("stvit_small")
    state = official(config)
    key = "layers.0.blocks.0.mlp2.fc1.weight"
    state[key] = state[key].expand(-1, -1, 3, 3)
    with pytest.raises(CheckpointError, match=r"wrong shape: stages\.0\.blocks\.0\.mlp\.fc1\.weight: \(32, 8, 3, 3\)"):
        checkpoint_filter_fn(state, build("stvit_small", config))


# Initialisation, weight decay, drop path


def test_initial_weights_have_their_distributions():
    torch.manual_seed(0)
    model = timm.create_model("stvit_base", depths=(1, 1, 1, 1)).requires_grad_(False)
    for key, module in model.named_modules():
        if key == "head.fc":
            assert module.weight.std() == pytest.approx(0.02, rel=0.02)
            assert module.weight.abs().max() > 0.06, "cut off at a few deviations"
            assert not module.bias.any()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for values in (module.weight, module.bias):
                assert 0.8 * bound < values.abs().max() <= bound, key
            assert module.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), key
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key
            assert module.eps == (1e-6 if isinstance(module, nn.LayerNorm) else 1e-5), key


@pytest.mark.parametrize(("name", "stages"), [("stvit_small", ()), ("stvit_base", (2, 3)), ("stvit_large", (2, 3))])
def test_layer_scales_start_at_a_millionth(name, stages):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    scales = {key: p for key, p in model.named_parameters() if "gamma" in key}
    assert list(scales) == [f"stages.{i}.blocks.0.gamma{k}" for i in stages for k in (1, 2)]
    assert all(torch.equal(p, torch.full_like(p, 1e-6)) for p in scales.values())


@pytest.mark.parametrize("name", ["stvit_small", "stvit_base"])
def test_weight_decay_spares_the_vectors_of_the_release_alone(name):
    config = replace(VARIANTS[name], depths=(1, 1, 1, 1))
    with torch.device("meta"):
        model = timm.create_model(name, depths=config.depths)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    # Layer scales are 4-d in the release, and decay.
    release = checkpoint_filter_fn(official(config, 1000), timm.create_model(name, depths=config.depths))
    assert decayed == {key for key, value in release.items() if value.ndim > 1}
    assert ("stages.2.blocks.0.gamma1" in decayed) == (name == "stvit_base")


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("stvit_small", drop_path_rate=0.1)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * k / 19 for k in range(20)])


@pytest.mark.parametrize("cell", [1, 3])
def test_drop_path_spares_the_position_residual(cell):
    block = Block(8, 2, 2, cell, 1, drop_path=1.0, layer_scale=None).train()
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), block.pos_embed(x))
    torch.testing.assert_close(
        block.pos_embed(x), x + nn.functional.conv2d(x, *block.pos_embed.parameters(), 1, 1, 1, 8)
    )


def test_drop_path_draws_for_every_sample_and_branch():
    torch.manual_seed(0)
    block = Block(8, 2, 2, 2, 1, drop_path=0.5, layer_scale=None).train()
    block.norm2.eval()  # over a batch whose branches differ, every sample would be of its own kind
    out = block(torch.randn(1, 8, 4, 4).expand(64, -1, -1, -1)).flatten(1)
    kinds = {tuple(row) for row in out.mul(1e4).round().int().tolist()}
    assert len(kinds) == 4


@torch.no_grad()
def test_training_differs_from_evaluation_by_batch_norms_alone():
    config = small("stvit_base")
    model, x = ported("stvit_base", config), make_input((2, 3, 70, 101))
    expected = model(x)
    model.train()
    assert error(model(x), expected) > 1e-3
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.load_state_dict(checkpoint_filter_fn(official(config), model))
    assert torch.equal(model(x), expected)
