"""UniFormer against the official numbers, the literal implementation, and the specification's fine print."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import comparison
from models import reference_uniformer as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_uniformer import VARIANTS, Config, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effbackbones.models import uniformer
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.uniformer import AttentionBlock, ConvBlock, PruningBlock, exchange, random_box

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "uniformer").glob("*.json"))
LIGHT = ["uniformer_xxs", "uniformer_xs"]
TL = [name for name in VARIANTS if VARIANTS[name].token_labelling]
CLASSES = 5


def small(name: str, **changes: Any) -> Config:
    """Return a variant of few and narrow layers, with its own heads; three blocks prune what the second one scored."""
    d = VARIANTS[name].head_dim
    return replace(VARIANTS[name], **{"depths": (1, 2, 3, 2), "dims": (8, 12, 2 * d, 3 * d), **changes})


def filled(config: Config) -> dict[str, Tensor]:
    return fill_state_dict(state_dict_shapes(config, CLASSES))


def ported(name: str, config: Config, **kwargs: Any) -> Any:
    """Return our model of that architecture in float64, with the filled official weights."""
    overlay = {"num_classes": CLASSES}
    model = timm.create_model(
        name,
        pretrained_cfg_overlay=overlay,
        num_classes=CLASSES,
        depths=config.depths,
        dims=config.dims,
        dense=config.dense,
        **kwargs,
    )
    model = model.double().eval()
    model.load_state_dict(checkpoint_filter_fn(filled(config), model))
    return model


def assert_same_numbers(model: Any, config: Config, size: tuple[int, int]) -> None:
    comparison.assert_same_numbers(model, partial(reference.forward, config=config), filled(config), size)


# Parity


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_official_checkpoint_file_gives_official_numbers(path, tmp_path):
    meta, _ = load_fixture(path)
    torch.save({"model": reference_state_dict(meta), "epoch": 299}, tmp_path / "official.pth")
    torch.set_default_dtype(torch.float64)
    try:
        overlay = {"file": str(tmp_path / "official.pth")}
        model = timm.create_model(meta["official_name"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    x = make_input(meta["input_shape"], meta["input_seed"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
    assert_numbers_of_fixture(path, logits, maps)


def test_small_at_224_in_float32_gives_official_logits():
    meta, expected = load_fixture(next(path for path in FIXTURES if path.stem == "uniformer_small_224x224"))
    model = timm.create_model("uniformer_small").eval()
    model.load_state_dict(checkpoint_filter_fn(reference_state_dict(meta), model))
    with torch.no_grad():
        logits = model(make_input(meta["input_shape"], meta["input_seed"]).float())
    assert error(logits.double(), torch.from_numpy(expected["logits"])) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_the_literal_implementation(name):
    config = small(name)
    assert_same_numbers(ported(name, config), config, (70, 101))


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_variant_equals_the_literal_implementation_with_hybrid_windows_of_14(name):
    light = VARIANTS[name].light
    config = small(name, dense=True, attention="global" if light else "hybrid", depths=(1, 1, 3 if light else 5, 1))
    assert_same_numbers(ported(name, config), config, (96, 133))


@pytest.mark.parametrize("window_size", [1, 2, 3, 5, 8, 14])  # of a map of 6 x 8
@pytest.mark.parametrize("attention", ["window", "hybrid"])
def test_windowed_attention_equals_the_literal_implementation(attention, window_size):
    switches = {"attention": attention, "window_size": window_size}
    config = small("uniformer_small", dense=True, depths=(1, 1, 5, 1), **switches)
    assert_same_numbers(ported("uniformer_small", config, **switches), config, (96, 133))


@pytest.mark.parametrize(("attention", "dense"), [("global", True), ("hybrid", False)])
def test_attention_mode_is_free_of_dense_mode(attention, dense):
    config = small("uniformer_small", dense=dense, depths=(1, 1, 5, 1), attention=attention)
    assert_same_numbers(ported("uniformer_small", config, attention=attention), config, (96, 133))


@pytest.mark.parametrize("size", [(64, 96), (150, 203), (32, 32), (32, 64), (64, 32), (250, 70)], ids=str)
def test_pruning_at_any_size_equals_the_literal_implementation(size):
    config = Config((1, 1, 3, 4), (8, 12, 16, 24), 8, 2, conv_stem=True, light=True)
    assert_same_numbers(ported("uniformer_xxs", config, head_dim=8, mlp_ratio=2), config, size)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 3)], ids=str)  # 1 x 2 drops one token, and scores it
@torch.no_grad()
def test_pruning_block_equals_the_literal_one_in_map_class_token_and_score(grid):
    torch.manual_seed(0)
    block = PruningBlock(8, 4, 2, 0.0, None).double().eval()
    x, cls = torch.randn(3, 8, *grid, dtype=torch.float64), torch.randn(3, 1, 8, dtype=torch.float64)
    score = torch.rand(3, grid[0] * grid[1], dtype=torch.float64)
    state = {f"block.{key}": value for key, value in block.state_dict().items()}
    for given in (None, score):
        expected = reference._light_block(state, "block", x, cls, given, heads=2)
        for ours, theirs in zip(block(x, cls, given), expected, strict=True):
            assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_of_full_size_map_one_to_one(name, dense):
    with torch.device("meta"):
        model = timm.create_model(name, dense=dense)
        official = {k: torch.empty(s) for k, s in state_dict_shapes(replace(VARIANTS[name], dense=dense)).items()}
    mapped = checkpoint_filter_fn(official, model)
    assert mapped.keys() == model.state_dict().keys()
    assert sorted(map(id, mapped.values())) == sorted(map(id, official.values()))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("uniformer_small", [(51, 82), (25, 41), (12, 20), (6, 10)]),
        ("uniformer_xxs", [(52, 83), (26, 41), (13, 20), (6, 10)]),
        ("uniformer_small_plus", [(52, 83), (26, 42), (13, 21), (7, 11)]),
    ],
)
def test_maps_of_indivisible_size_round_as_official(name, sizes):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1), features_only=True).eval()
        assert [tuple(m.shape[2:]) for m in model(torch.empty(1, 3, 205, 330))] == sizes


# Arguments


def test_unknown_attention_raises():
    with pytest.raises(ValueError, match="attention='local': expected global, window or hybrid"):
        timm.create_model("uniformer_small", attention="local")


@pytest.mark.parametrize(
    "arguments",
    [{"attention": "window"}, {"attention": "hybrid"}, {"window_size": 14}, {"attn_layer_scale": 1e-6}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_light_model_refuses_windows_and_layer_scale(arguments):
    with pytest.raises(ValueError, match="light UniFormers have global attention only, and no layer scale"):
        timm.create_model("uniformer_xxs", dense=True, **arguments)


# Initialisation, weight decay, drop path


@pytest.mark.parametrize("name", ["uniformer_small_plus_tl", "uniformer_xxs", "uniformer_large_ls_tl"])
def test_initial_weights_have_their_distributions(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 1, 1)).requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std() == pytest.approx(0.02, rel=0.02), key
            assert module.weight.abs().max() > 0.06, f"{key} is cut off at a few deviations"
            assert not module.bias.any(), key
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for values in (module.weight, module.bias):
                assert 0.8 * bound < values.abs().max() <= bound, key
            assert module.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), key
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key


@pytest.mark.parametrize(
    ("name", "stages"),
    [("uniformer_small", ()), ("uniformer_base_ls", (2, 3)), ("uniformer_large_ls_tl", (0, 1, 2, 3))],
)
def test_layer_scales_start_at_a_millionth(name, stages):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    scales = {key: p for key, p in model.named_parameters() if "gamma" in key}
    assert list(scales) == [f"stages.{i}.blocks.0.gamma{k}" for i in stages for k in (1, 2)]
    assert all(torch.equal(p, torch.full_like(p, 1e-6)) for p in scales.values())


@pytest.mark.parametrize("name", LIGHT)
def test_class_token_starts_at_zero(name):
    assert not timm.create_model(name, depths=(1, 1, 1, 1)).stages[2].cls_token.any()


@pytest.mark.parametrize("name", ["uniformer_xxs", "uniformer_large_ls_tl", "uniformer_base_ls"])
def test_weight_decay_spares_vectors_biases_and_the_class_token_alone(name):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1))
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    # Position residuals decay in spite of their name; so do the layer scales of convolution blocks, being 4-d.
    expected = {key for key, p in model.named_parameters() if p.ndim > 1 and not key.endswith("cls_token")}
    assert decayed == expected
    assert "stages.2.blocks.0.pos_embed.weight" in decayed
    assert ("stages.0.blocks.0.gamma1" in decayed) == (name == "uniformer_large_ls_tl")


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("uniformer_small", drop_path_rate=0.34)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.34 * k / 17 for k in range(18)])


@pytest.mark.parametrize(
    "block", [ConvBlock(8, 2, 1.0, None), AttentionBlock(8, 4, 2, 1.0, None)], ids=["conv", "attn"]
)
def test_drop_path_spares_the_position_residual(block):
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block.train()(x), block.pos_embed(x))


@pytest.mark.parametrize(
    "block", [ConvBlock(8, 2, 0.5, None), AttentionBlock(8, 4, 2, 0.5, None)], ids=["conv", "attn"]
)
def test_drop_path_draws_for_every_sample_and_branch(block):
    torch.manual_seed(0)
    out = block.train()(torch.randn(1, 8, 4, 4).expand(64, -1, -1, -1)).flatten(1)
    kinds = {tuple(row) for row in out.mul(1e4).round().int().tolist()}
    assert len(kinds) == 4


def test_pruned_tokens_share_one_update_that_drop_path_spares():
    torch.manual_seed(0)
    block = PruningBlock(8, 4, 2, 1.0, None).double().train()
    x, cls = torch.randn(2, 8, 4, 5, dtype=torch.float64), torch.randn(2, 1, 8, dtype=torch.float64)
    score = torch.rand(2, 20, dtype=torch.float64)
    out, out_cls, _ = block(x, cls, score)
    assert torch.equal(out_cls, cls)
    change = (out - block.pos_embed(x)).flatten(2).transpose(1, 2)
    pruned = torch.ones(2, 20).scatter(1, score.argsort(descending=True)[:, :10], 0).bool()
    assert change[~pruned].abs().max() < 1e-12
    shared = change[pruned].reshape(2, 10, 8)
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, 10, -1))
    assert shared.abs().amax((1, 2)).min() > 1e-3


def test_scores_that_all_underflow_give_finite_outputs():
    stage = timm.create_model("uniformer_xxs", depths=(1, 1, 1, 1)).stages[3]
    score = torch.zeros(1, 9)
    score[0, 8] = 1  # of a 3 x 3 map, whose last row and column pooling drops
    x, cls, score = stage(torch.randn(1, 224, 3, 3), torch.zeros(1, 1, 224), score)
    assert all(t.isfinite().all() for t in (x, cls, score))


@pytest.mark.parametrize("gap", [0, 20, 50, 70, 86, 95, 200])
def test_scores_of_the_lower_half_down_to_zero_give_finite_gradients(gap):
    block = timm.create_model("uniformer_xxs", depths=(1, 1, 2, 1)).stages[2].blocks[1]
    logits = torch.linspace(0, 1, 16).repeat(2, 1).index_fill(1, torch.arange(8), -gap).requires_grad_()
    x_bchw, cls_b1c = torch.randn(2, 224, 4, 4), torch.zeros(2, 1, 224)
    outputs = block(x_bchw, cls_b1c, logits.softmax(1))
    sum((output * 100 * torch.randn_like(output)).sum() for output in outputs).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


# Training outputs of the light models


def frozen_norms(model: nn.Module) -> Any:
    """Put a model in training mode, except for its batch norms."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@torch.no_grad()
def test_light_training_output_is_the_pair_of_map_and_class_token_logits(monkeypatch):
    config = small("uniformer_xxs")
    model, x, state = ported("uniformer_xxs", config), make_input((2, 3, 70, 101)), filled(config)
    blocks = []
    real = reference._light_block
    monkeypatch.setattr(reference, "_light_block", lambda *args: blocks.append(real(*args)) or blocks[-1])
    logits, _ = reference.forward(state, x, config)
    cls_bc = blocks[-1][1][:, 0]
    normed = F.layer_norm(cls_bc, cls_bc.shape[1:], state["norm_cls.weight"], state["norm_cls.bias"], 1e-5)
    expected = normed @ state["head_cls.weight"].T + state["head_cls.bias"]
    ours, ours_cls = frozen_norms(model)(x)
    assert error(ours, logits) < 1e-9
    assert error(ours_cls, expected) < 1e-9


def test_light_loss_is_the_mean_of_both_heads():
    model = timm.create_model("uniformer_xxs", depths=(1, 1, 1, 1))
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 1])
    expected = (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2
    torch.testing.assert_close(model.loss((a, b), target, F.cross_entropy), expected)


# Token labelling


def test_random_box_has_uniform_area_and_centre_within_the_map():
    torch.manual_seed(0)
    height, width = 1000, 600
    boxes = torch.stack([random_box(height, width, torch.device("cpu")) for _ in range(3000)]).double()
    top, bottom, left, right = boxes.unbind(1)
    assert ((top >= 0) & (top <= bottom) & (bottom <= height)).all()
    assert ((left >= 0) & (left <= right) & (right <= width)).all()
    whole = (top > 0) & (bottom < height) & (left > 0) & (right < width)
    sides = torch.stack([(bottom - top) / height, (right - left) / width])[:, whole]
    assert (sides[0] - sides[1]).abs().max() < 0.01  # rounding alone
    # With side s, the square root of a uniform area, a border cuts s^2 / 8 off a side on average.
    area = ((bottom - top) * (right - left)).mean() / (height * width)
    assert area == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)
    assert (top + bottom).mean() / 2 / height == pytest.approx(0.5, abs=0.02)
    assert (left + right).mean() / 2 / width == pytest.approx(0.5, abs=0.02)


def test_exchange_swaps_the_box_alone_and_undoes_itself():
    x = torch.arange(3 * 2 * 4 * 5.0).reshape(3, 2, 4, 5)
    box = torch.tensor([1, 3, 0, 2])
    mixed = exchange(x, box)
    expected = x.clone()
    expected[:, :, 1:3, 0:2] = x.flip(0)[:, :, 1:3, 0:2]
    assert torch.equal(mixed, expected)
    assert torch.equal(exchange(mixed, box), x)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (4, 4, 0, 16), (0, 32, 0, 16)], ids=str)
def test_exchange_of_an_empty_box_does_nothing_and_of_all_swaps_images(box):
    x = torch.randn(2, 1, 32, 16)
    full = box == (0, 32, 0, 16)
    assert torch.equal(exchange(x, torch.tensor(box)), x.flip(0) if full else x)


@torch.no_grad()
def test_token_labelling_training_output_is_a_triple_on_the_grid_of_tokens():
    model = timm.create_model("uniformer_small_tl", depths=(1, 1, 1, 1), num_classes=CLASSES).train()
    torch.manual_seed(0)
    logits, tokens, box = model(torch.randn(2, 3, 96, 133))
    assert logits.shape == (2, CLASSES)
    assert tokens.shape == (2, 3 * 4, CLASSES)
    top, bottom, left, right = box.tolist()
    assert 0 <= top <= bottom <= 3
    assert 0 <= left <= right <= 4


@torch.no_grad()
def test_token_labelling_box_is_rounded_down_to_tokens(monkeypatch):
    monkeypatch.setattr(uniformer, "random_box", lambda *_: torch.tensor([7, 17, 9, 15]))
    model = timm.create_model("uniformer_small_tl", depths=(1, 1, 1, 1), dims=(8, 8, 64, 64)).train()
    assert model(torch.randn(2, 3, 128, 64))[2].tolist() == [0, 2, 1, 1]


@torch.no_grad()
def test_token_labelling_without_exchange_gives_the_logits_of_evaluation(monkeypatch):
    monkeypatch.setattr(uniformer, "random_box", lambda *_: torch.zeros(4, dtype=torch.long))
    model = timm.create_model("uniformer_small_tl", depths=(1, 1, 1, 1), num_classes=CLASSES).double().eval()
    x = make_input((2, 3, 64, 96))
    expected = model(x)
    logits, tokens, _ = frozen_norms(model)(x)
    torch.testing.assert_close(logits + 0.5 * tokens.amax(1), expected)


@torch.no_grad()
def test_token_labelling_puts_exchanged_tokens_back_to_their_images(monkeypatch):
    model = timm.create_model("uniformer_small_tl", depths=(1, 1, 1, 1), dims=(8, 8, 64, 64)).double()
    # Stages that keep tokens apart, so that an exchange of whole tokens can be undone exactly.
    model.stages = nn.ModuleList(
        [nn.AvgPool2d(2), nn.AvgPool2d(2), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 64, 1))]
    )
    frozen_norms(model.double())
    x = make_input((3, 3, 128, 64))  # 32 x 16 after the stem, 4 x 2 tokens
    outputs = {}
    for box in ((0, 0, 0, 0), (8, 24, 0, 8)):
        monkeypatch.setattr(uniformer, "random_box", lambda *_, box=box: torch.tensor(box))
        outputs[box] = model(x)
    (logits, tokens, _), (mixed_logits, mixed_tokens, mixed_box) = outputs.values()
    assert mixed_box.tolist() == [1, 3, 0, 1]
    torch.testing.assert_close(mixed_tokens, tokens)
    assert (mixed_logits - logits).abs().max() > 1e-6


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_token_labelling_loss_mixes_targets_by_the_area_of_the_box(soft):
    model = timm.create_model("uniformer_small_tl", depths=(1, 1, 1, 1), num_classes=CLASSES)
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, CLASSES), torch.randn(3, 8, CLASSES)  # 4 x 2 tokens
    target = torch.tensor([0, 3, 1])
    probabilities = F.one_hot(target, CLASSES).float()
    mixed = 0.75 * probabilities + 0.25 * probabilities.flip(0)
    expected = F.cross_entropy(logits, mixed) + F.cross_entropy(
        tokens.flatten(0, 1), probabilities.repeat_interleave(8, 0)
    )
    loss = model.loss((logits, tokens, torch.tensor([1, 3, 0, 1])), probabilities if soft else target, F.cross_entropy)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", TL)
@torch.no_grad()
def test_token_labelling_model_without_classes_trains_as_a_plain_one(name):
    model = timm.create_model(name, depths=(1, 1, 1, 1), dims=(8, 8, 64, 64), num_classes=0).train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 64)
