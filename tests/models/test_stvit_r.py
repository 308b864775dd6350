"""STViT-R against the official numbers, the literal implementation, and the specification's fine print."""

import math
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import comparison
from models import reference_stvit_r as reference
from models.comparison import assert_numbers_of_fixture
from models.reference_stvit_r import VARIANTS, Config, constants, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict, subsample
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError, read_checkpoint
from effbackbones.models import stvit_r
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.stvit_r import STViTR

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "stvit_r").glob("*.json"))
CLASSES = 5
SMALL = Config((1, 2, 6, 2), (8, 16, 16, 32), head_dim=8, mlp_ratio=2)
DENSE = replace(SMALL, dense=True)


def filled(config: Config) -> dict[str, Tensor]:
    """Return official weights; learned offsets are as large as tokens, lest they go unnoticed."""
    state = fill_state_dict(state_dict_shapes(config, CLASSES))
    return {key: value * 5 if key.endswith("semantic_token2") else value for key, value in state.items()}


def built(config: Config) -> Any:
    """Return our model of that architecture, freshly initialised."""
    return timm.create_model(
        "stvit_r_swin_tiny",
        pretrained_cfg_overlay={"num_classes": CLASSES},
        num_classes=CLASSES,
        depths=config.depths,
        dims=config.dims,
        head_dim=config.head_dim,
        mlp_ratio=config.mlp_ratio,
        window_size=config.window,
        use_global=config.global_token,
        use_layer_scale=config.layer_scale,
        dense=config.dense,
        pad_mask=config.pad_mask,
    )


def ported(config: Config) -> Any:
    """Return our model of that architecture in float64, with the filled official weights."""
    model = built(config).double().eval()
    model.load_state_dict(checkpoint_filter_fn(filled(config), model))
    return model


def assert_same_numbers(config: Config, size: tuple[int, int], batch: int = 2) -> None:
    forward = partial(reference.forward, config=config)
    comparison.assert_same_numbers(ported(config), forward, filled(config), size, batch)


# Parity


def released(meta: dict[str, Any], state: dict[str, Tensor], config: Config) -> dict[str, Any]:
    """Return a fixture's checkpoint as the releases nest it, with its constants."""
    made = constants(config, meta["kwargs"].get("img_size", 0))
    state = state | {key: made[key] for key in (*meta["int_buffers"], *meta["const_buffers"])}
    if not config.dense:
        return {"model": state, "epoch": 299, "max_accuracy": 82.7}
    detector = {f"backbone.{key}": value for key, value in state.items()}
    return {"meta": {"epoch": 36}, "state_dict": detector | {"neck.fpn_convs.0.conv.weight": torch.zeros(1)}}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@torch.no_grad()
def test_official_checkpoint_file_gives_official_numbers_and_so_does_the_literal_implementation(path, tmp_path):
    meta, _ = load_fixture(path)
    name, window = f"stvit_r_swin_{meta['kwargs']['variant']}", meta["kwargs"]["window_size"]
    config = replace(VARIANTS[name], window=window, dense="dense" in path.stem)
    state = {key: value for key, value in reference_state_dict(meta).items() if key not in meta["const_buffers"]}
    assert {key: tuple(value.shape) for key, value in state.items()} == state_dict_shapes(config)
    file = tmp_path / "official.pth"
    torch.save(released(meta, state, config), file)
    torch.set_default_dtype(torch.float64)
    try:
        overlay = {"file": str(file)}
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, window_size=window, dense=config.dense
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]

    x = make_input(meta["input_shape"], meta["input_seed"])
    last, ours = model.forward_intermediates(x)
    for logits, maps in ((model.forward_head(last), ours), reference.forward(state, x, config)):
        assert_numbers_of_fixture(path, logits, maps)


@torch.no_grad()
def test_dense_in_float32_gives_official_maps_where_no_key_is_hidden():
    meta, expected = load_fixture(next(path for path in FIXTURES if path.stem == "stvit_r_dense_tiny_224x336"))
    model = timm.create_model("stvit_r_swin_tiny", dense=True).eval()
    model.load_state_dict(checkpoint_filter_fn(reference_state_dict(meta), model))
    x = make_input(meta["input_shape"], meta["input_seed"]).float()
    for i, m in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        assert abs(subsample(m) - expected[f"feature_{i}"]).max() < 1e-5 * abs(expected[f"feature_{i}"]).max()


# Against the literal implementation


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (202, 301), (64, 410)], ids=str)
def test_classifier_equals_the_literal_implementation(size):
    assert_same_numbers(SMALL, size)


@pytest.mark.parametrize("window", [2, 5, 8, 12])
def test_classifier_of_other_windows_equals_the_literal_implementation(window):
    assert_same_numbers(replace(SMALL, window=window), (150, 203))


# Stage 2's maps: 13 x 18 and 27 x 9 are padded along both sides, 14 x 19 and 19 x 14 along one, 14 x 21 not at all;
# 3 x 3 is all within a window.
@pytest.mark.parametrize("size", [(208, 280), (224, 304), (304, 224), (224, 336), (33, 47), (425, 130)], ids=str)
@pytest.mark.parametrize("pad_mask", ["official", "exact"])
def test_dense_equals_the_literal_implementation(pad_mask, size):
    assert_same_numbers(replace(DENSE, pad_mask=pad_mask), size, batch=1)


@pytest.mark.parametrize("window", [2, 5, 8])
def test_dense_of_other_windows_equals_the_literal_implementation(window):
    for pad_mask in ("official", "exact"):
        assert_same_numbers(replace(DENSE, window=window, pad_mask=pad_mask), (96, 133), batch=1)


@pytest.mark.parametrize("size", [(208, 280), (224, 304), (224, 336)], ids=str)
def test_dense_with_copied_patches_equals_the_literal_implementation(size, monkeypatch):
    monkeypatch.setattr(stvit_r, "WHOLE", 0)
    for pad_mask in ("official", "exact"):
        assert_same_numbers(replace(DENSE, pad_mask=pad_mask), size)


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_layer_scale_of_swin_blocks_equals_the_literal_implementation(dense):
    assert_same_numbers(replace(SMALL, layer_scale=True, dense=dense), (96, 133))


@pytest.mark.parametrize("size", [(224, 224), (101, 260)], ids=str)
def test_learned_offset_of_semantic_tokens_equals_the_literal_implementation(size):
    assert_same_numbers(replace(SMALL, global_token=True, depths=(1, 1, 12, 1)), size)


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_units_follow_one_another(dense):
    assert_same_numbers(replace(SMALL, depths=(1, 1, 18, 1), dense=dense), (96, 133))


# Fine print


def test_classifier_patches_are_the_official_ones_where_there_are_official_ones():
    bias = stvit_r.near_bias((14, 14), 7, torch.float32, torch.device("cpu"))[0, 0].reshape(2, 2, 9, 36 + 196)
    for row in range(2):
        for col in range(2):
            expected = torch.full((14, 14), -torch.inf)
            expected[4 * row : 4 * row + 10, 4 * col : 4 * col + 10] = 0
            own = torch.full((4, 9), -torch.inf)
            own[2 * row + col] = 0
            assert torch.equal(bias[row, col], torch.cat([own.flatten(), expected.flatten()]).expand(9, -1))


def test_classifier_patches_of_ten_cover_their_windows_of_seven():
    for length in range(1, 80):
        bias = stvit_r.near_bias((length, 7), 7, torch.float32, torch.device("cpu"))[0, 0]
        windows = -(-length // 7)
        rows = bias[::9, 9 * windows :].reshape(windows, length, 7)[:, :, 0] == 0
        for i in range(windows):
            assert rows[i, i * length // windows : (i + 1) * length // windows].all()
            assert rows[i].sum() == min(10, length)


def counts(size: tuple[int, int], semantic: bool, pad_mask: str) -> Tensor:
    """Return how often each key counts in each window's patch, (W, M + 1)."""
    reach = 27 if semantic else 21
    return stvit_r.map_bias(size, 7, reach, semantic, pad_mask, torch.float64, torch.device("cpu")).exp().round()


def test_official_mask_hides_nothing_where_windows_divide_the_map():
    for semantic, reach in ((False, 21), (True, 27)):
        count = counts((14, 21), semantic, "official")
        assert (count.sum(1) == reach**2).all()
        assert (count[:, -1] > 0).all()
    assert stvit_r.patch_bias((14, 21), 7, 14, False, "official", torch.float32, torch.device("cpu")) is None


def test_official_mask_hides_the_border_and_the_corner_where_both_sides_are_padded():
    count = counts((13, 18), False, "official")
    # The patch around the first window of 2 x 3 is cut at the left and the top: 14 x 14 of the map. The next is cut at
    # the top: 14 x 21, of which 14 + 3 * 14 - 3 are padding; the corner of 3 is hidden, the rest is seen.
    assert count[0].sum() == 14 * 14
    assert count[0, -1] == 14
    assert count[1].sum() == 14 * 21 - 3
    assert count[1, -1] == 21 + 3 * 14 - 3 - 3


def test_official_mask_takes_padding_in_image_tokens_off_the_semantic_map():
    hidden = counts((14, 19), True, "official")[0, :-1].reshape(2, 3, 3, 3).transpose(1, 2).reshape(6, 9) == 0
    expected = torch.zeros(6, 9, dtype=torch.bool)
    expected[:, 7:] = True  # two columns, for the two of image tokens
    assert torch.equal(hidden, expected)


def test_exact_mask_hides_what_no_image_token_is_in_and_nothing_else():
    for size in ((13, 18), (14, 19), (14, 21), (3, 30)):
        x = torch.zeros(1, *size, 1)
        x = nn.functional.pad(x + 1, (0, 0, 0, -size[1] % 7, 0, -size[0] % 7))
        nh, nw = stvit_r.grid_of(size, 7)
        holds = stvit_r.pool_tokens(x, (nh, nw)).flatten() > 0
        image, semantic = (counts(size, s, "exact") for s in (False, True))
        assert not image[:, -1].any()
        assert not semantic[:, -1].any()
        assert torch.equal(semantic[:, :-1].any(0), holds)
        assert image[:, :-1].any(0).all()


def test_pooling_takes_bins_of_three_of_a_window_of_seven():
    x = torch.randn(2, 14, 21, 4, generator=torch.Generator().manual_seed(0))
    tokens = stvit_r.pool_tokens(x, (2, 3)).reshape(2, 2, 3, 3, 3, 4)
    for n, (lo, hi) in enumerate(((0, 3), (2, 5), (4, 7))):
        window = x[:, 7 + lo : 7 + hi, 14:21].amax(1)
        assert torch.equal(tokens[:, 1, 2, n, 0], window[:, :3].amax(1))


@pytest.mark.parametrize(("size", "shifts"), [((224, 224), 0), ((256, 480), 3)], ids=str)
@torch.no_grad()
def test_classifier_shifts_larger_maps_than_a_window_and_dense_all(size, shifts):
    for dense, expected in ((False, shifts), (True, 3)):
        model = built(replace(SMALL, dense=dense)).eval()
        called = []
        model.stages[3].blocks[1].attn.register_forward_pre_hook(lambda _, args, called=called: called.append(args[1]))
        model(torch.zeros(1, 3, *size))
        assert called == [expected]
        assert not any(block.shift for block in model.stages[2].blocks if hasattr(block, "shift"))


@torch.no_grad()
def test_pooled_tokens_are_no_part_of_what_the_classifier_generates():
    torch.manual_seed(0)
    for cls, kwargs, rest in (
        (stvit_r.GenerateBlock, {}, 0.0),
        (stvit_r.DenseGenerateBlock, {"reach": 14, "pad_mask": "official"}, 1.0),
    ):
        block = cls(8, 4, 2.0, 0.0, window=7, **kwargs).eval()
        block.gamma1.zero_()
        block.gamma2.zero_()
        s = torch.randn(1, 36, 8)
        assert torch.equal(block(s, torch.randn(1, 14, 14, 8)), s * rest)


# Arguments


@pytest.mark.parametrize("depth", [1, 5, 8])
def test_depth_that_is_no_whole_unit_raises(depth):
    with pytest.raises(ValueError, match=rf"depths=\(2, 2, {depth}, 2\): expected a multiple of 6"):
        timm.create_model("stvit_r_swin_tiny", depths=(2, 2, depth, 2))


def test_unfit_arguments_raise():
    with pytest.raises(ValueError, match="head_dim=36 does not divide"):
        timm.create_model("stvit_r_swin_tiny", head_dim=36)
    with pytest.raises(ValueError, match="pad_mask='none': expected official or exact"):
        timm.create_model("stvit_r_swin_tiny", pad_mask="none")
    with pytest.raises(ValueError, match="a dense model has no learned offset"):
        timm.create_model("stvit_r_swin_tiny", use_global=True, dense=True)


# Checkpoints


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_of_full_size_map_one_to_one(name, dense):
    with torch.device("meta"):
        model = timm.create_model(name, dense=dense)
        official = {k: torch.empty(s) for k, s in state_dict_shapes(replace(VARIANTS[name], dense=dense)).items()}
    mapped = checkpoint_filter_fn(official, model)
    assert mapped.keys() == model.state_dict().keys()
    assert sorted(map(id, mapped.values())) == sorted(map(id, official.values()))


def test_merges_belong_to_the_stage_that_follows():
    weights = checkpoint_filter_fn(filled(SMALL), built(SMALL))
    for i in range(3):
        expected = filled(SMALL)[f"layers.{i}.downsample.reduction.weight"]
        assert torch.equal(weights[f"stages.{i + 1}.downsample.reduction.weight"], expected)


@pytest.mark.parametrize("name", ["layers.0.blocks.0.attn.relative_position_index", "layers.1.blocks.1.attn_mask"])
def test_wrong_constant_raises_and_names_it(name):
    model, state = built(SMALL), filled(SMALL) | constants(SMALL, 224)
    assert checkpoint_filter_fn(dict(state), model).keys() == model.state_dict().keys()
    key = name.replace("layers", "stages").replace(".", r"\.")
    transposed = state[name].transpose(-1, -2)
    for value in (
        transposed if name.endswith("index") else -state[name],
        state[name][..., :-1],
        state[name][0],
        state[name].sum(),
        torch.cat([state[name]] * 2),
    ):
        with pytest.raises(CheckpointError, match=rf"{key}: not the constant"):
            checkpoint_filter_fn({**state, name: value}, model)


def test_tables_of_other_windows_are_resized():
    weights = checkpoint_filter_fn(filled(replace(SMALL, window=8)) | constants(SMALL, 0), ported(SMALL))
    tables = {key: value for key, value in weights.items() if key.endswith("table")}
    assert len(tables) == 1 + 2 + 1 + 2
    old = filled(replace(SMALL, window=8))["layers.3.blocks.1.attn.relative_position_bias_table"]
    image = nn.functional.interpolate(old.T.reshape(1, 4, 15, 15), (13, 13), mode="bicubic")
    torch.testing.assert_close(tables["stages.3.blocks.1.attn.rel_pos.table"], image.flatten(2)[0].T)


def test_dense_model_leaves_out_the_learned_offset_and_names_it(caplog):
    with caplog.at_level("INFO", "effbackbones"):
        weights = checkpoint_filter_fn(filled(replace(SMALL, global_token=True)), built(DENSE))
    assert "stages.2.global_token" not in weights
    assert any("not in dense models: stages.2.global_token" in record.message for record in caplog.records)


@pytest.mark.parametrize("option", ["global_token", "layer_scale"])
def test_options_of_checkpoint_and_model_have_to_agree(option):
    with_it = replace(SMALL, **{option: True})
    key = "global_token" if option == "global_token" else "gamma1"
    with pytest.raises(CheckpointError, match=rf"unknown: .*{key}"):
        checkpoint_filter_fn(filled(with_it), built(SMALL))
    with pytest.raises(CheckpointError, match=rf"missing: .*{key}"):
        checkpoint_filter_fn(filled(SMALL), built(with_it))


def test_official_file_with_its_pickled_configuration_is_refused_by_name(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    path = tmp_path / "STViT-R-Swin-S.pth"
    torch.save({"model": filled(SMALL), "config": module.CfgNode()}, path)
    with pytest.raises(CheckpointError, match=r"holds yacs\.config\.CfgNode.*not read.*Save the state dict alone"):
        read_checkpoint(path)


# Initialisation, weight decay, drop path


def test_initial_weights_have_their_distributions():
    torch.manual_seed(0)
    model = timm.create_model("stvit_r_swin_tiny", depths=(1, 1, 6, 1), use_global=True, use_layer_scale=True)
    model.requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std() == pytest.approx(0.02, rel=0.02), key
            assert module.weight.abs().max() > 0.06, f"{key} is cut off at a few deviations"
            assert module.bias is None or not module.bias.any(), key
            assert (module.bias is None) == key.endswith("reduction"), key
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.abs().max() <= bound, key
            assert module.bias is None, key
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert module.eps == 1e-5, key
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key
    tables = [p for key, p in model.named_parameters() if key.endswith((".table", "global_token"))]
    assert len(tables) == 5
    assert torch.cat([p.flatten() for p in tables]).std() == pytest.approx(0.02, rel=0.03)
    scales = {key: p for key, p in model.named_parameters() if "gamma" in key}
    blocks = ["0.blocks.0", "1.blocks.0", *(f"2.blocks.{j}" for j in range(1, 6)), "3.blocks.0"]
    assert list(scales) == [f"stages.{block}.gamma{k}" for block in blocks for k in (1, 2)]
    assert all(torch.equal(p, torch.full_like(p, 1e-5)) for p in scales.values())


def test_weight_decay_spares_vectors_and_bias_tables_alone():
    model = built(replace(SMALL, global_token=True, layer_scale=True))
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1 and not key.endswith("rel_pos.table")}
    assert "stages.2.global_token" in decayed


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("stvit_r_swin_small", drop_path_rate=0.46)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.46 * k / 23 for k in range(24)])


def unit_blocks(dense: bool) -> list[nn.Module]:
    """Return blocks 1 to 5 of a unit that drop a branch half of the time, or always; MLPs add nothing."""
    torch.manual_seed(0)
    model = STViTR((1, 1, 6, 1), (8, 8, 8, 8), head_dim=4, drop_path_rate=0.5, dense=dense).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for block in model.stages[2].blocks:
        block.drop_path.drop_prob = 0.5
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
    return list(model.stages[2].blocks)[1:]


@torch.no_grad()
def test_classifier_draws_stochastic_depth_image_by_image_but_not_of_what_it_generates():
    generate, refine, local, overall, recover = unit_blocks(dense=False)
    x, s = torch.randn(1, 14, 14, 8).expand(64, -1, -1, -1), torch.randn(1, 36, 8).expand(64, -1, -1)
    outputs = [generate(s, x), refine(s, x, None), local(s), overall(s), recover(x, s)]
    for i, (out, before) in enumerate(zip(outputs, (s, s, s, s, x), strict=True)):
        changed = ~(out == before).flatten(1).all(1)
        assert len(out.flatten(1).mul(1e3).round().unique(dim=0)) == (1 if i == 0 else 2)
        assert changed.all() if i == 0 else 10 < changed.sum() < 54


@torch.no_grad()
def test_dense_draws_stochastic_depth_of_attention_window_by_window():
    generate, refine, local, overall, recover = unit_blocks(dense=True)
    x, s = torch.randn(16, 13, 20, 8), torch.randn(16, 54, 8)
    for block in (generate, refine):
        dropped = (block(s, x) == s).reshape(16, 6, -1)
        assert torch.equal(dropped.all(2), dropped.any(2))
        assert 28 < dropped.all(2).sum() < 68
    for block in (local, overall):
        dropped = (block(s) == s).reshape(16, -1)
        assert torch.equal(dropped.all(1), dropped.any(1))
    dropped = recover(x, s) == x
    windows = [dropped[:, i : i + 7, j : j + 7].flatten(1) for i in (0, 7) for j in (0, 7, 14)]
    assert all(torch.equal(window.all(1), window.any(1)) for window in windows)
    assert 28 < sum(window.all(1).sum() for window in windows) < 68


@torch.no_grad()
def test_dense_stochastic_depth_keeps_the_mean():
    recover = unit_blocks(dense=True)[4]
    x, s = torch.randn(1, 7, 7, 8), torch.randn(1, 9, 8)
    expected = recover.eval()(x, s) - x
    change = recover.train()(x, s) - x
    while not change.any():
        change = recover(x, s) - x
    torch.testing.assert_close(change, 2 * expected, rtol=1e-4, atol=1e-4)
