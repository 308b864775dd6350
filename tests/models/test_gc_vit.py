"""GC ViT against the official numbers, the literal implementation, timm's, and the specification's fine print."""

import argparse
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
from models import reference_gc_vit as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_gc_vit import NATIVE, VARIANTS, Config, square, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.checkpoint import CheckpointError
from effbackbones.layers import RelativePositionBias, attention_backend
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.gc_vit import Block, PointwiseConv, WindowAttention

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "gcvit").glob("*.json"))
CLASSES = 5
SMALL = Config((2, 3, 2, 2), (1, 2, 2, 4), dim=16)
DENSE = square(24, 24, 24, 24)


def filled(config: Config) -> dict[str, Tensor]:
    return fill_state_dict(state_dict_shapes(config, CLASSES))


def built(config: Config, **kwargs: Any) -> Any:
    """Return our model of that architecture, which `kwargs` have to give the right windows."""
    return timm.create_model(
        "gc_vit_xxtiny",
        pretrained_cfg_overlay={"num_classes": CLASSES},
        num_classes=CLASSES,
        depths=config.depths,
        dim=config.dim,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        layer_scale=1e-5 if config.layer_scale else None,
        dense=config.dense,
        **kwargs,
    )


def ported(config: Config, **kwargs: Any) -> Any:
    """Return it in float64, with the filled official weights."""
    model = built(config, **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(filled(config), model))
    return model


def assert_same_numbers(model: Any, config: Config, size: tuple[int, int]) -> None:
    comparison.assert_same_numbers(model, partial(reference.forward, config=config), filled(config), size)


# Parity


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_official_checkpoint_file_gives_official_numbers(path, tmp_path):
    meta, _ = load_fixture(path)
    state = reference_state_dict(meta)
    state |= {key: torch.zeros(shape, dtype=torch.long) for key, shape in meta["int_buffers"].items()}
    dense = "dense" in path.stem
    if dense:  # a detector's file
        state = {f"backbone.{key}": value for key, value in state.items()} | {"neck.weight": torch.ones(2)}
    file = tmp_path / "official.pth.tar"
    torch.save({"state_dict": state, "epoch": 309, "args": argparse.Namespace(model="gc_vit")}, file)
    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model(
            "gc_vit_xxtiny",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file)},
            depths=meta["kwargs"]["depths"],
            dense=dense,
            img_size=meta["kwargs"].get("resolution"),
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    x = make_input(meta["input_shape"], meta["input_seed"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
    assert_numbers_of_fixture(path, logits, maps)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@torch.no_grad()
def test_literal_implementation_gives_official_numbers(path):
    meta, _ = load_fixture(path)
    windows = meta["kwargs"].get("window_size", [7, 7, 14, 7])
    config = Config(tuple(meta["kwargs"]["depths"]), windows=square(*windows), dense="dense" in path.stem)
    state = reference_state_dict(meta)
    assert {key: tuple(value.shape) for key, value in state.items()} == state_dict_shapes(config)
    logits, maps = reference.forward(state, make_input(meta["input_shape"], meta["input_seed"]), config)
    assert_numbers_of_fixture(path, logits, maps)


@torch.no_grad()
def test_xxtiny_at_224_in_float32_gives_official_logits():
    meta, expected = load_fixture(next(path for path in FIXTURES if path.stem == "gc_vit_xxtiny_224x224"))
    model = timm.create_model("gc_vit_xxtiny").eval()
    model.load_state_dict(checkpoint_filter_fn(reference_state_dict(meta), model))
    logits = model(make_input(meta["input_shape"], meta["input_seed"]).float())
    assert error(logits.double(), torch.from_numpy(expected["logits"])) < 1e-4


# Against the literal implementation


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (224, 222)),
        ({}, (70, 101)),
        ({}, (32, 32)),
        ({}, (250, 40)),
        ({"depths": (1, 1, 3, 1)}, (64, 96)),
        ({"layer_scale": True, "mlp_ratio": 2}, (96, 133)),
    ],
    ids=["native", "indivisible", "smallest", "narrow", "without_global_blocks", "layer_scale"],
)
def test_classifier_equals_the_literal_implementation(changes, size):
    config = replace(SMALL, **changes)
    assert_same_numbers(ported(config), config, size)


@pytest.mark.parametrize(
    ("img_size", "windows", "size"),
    [
        (64, square(2, 2, 4, 2), (64, 64)),
        (250, square(8, 8, 16, 8), (250, 250)),
        ((64, 96), ((2, 3), (2, 3), (4, 6), (2, 3)), (64, 96)),
        ((64, 96), ((2, 3), (2, 3), (4, 6), (2, 3)), (97, 64)),
        (32, square(1, 1, 2, 1), (32, 64)),
    ],
    ids=str,
)
def test_classifier_with_windows_of_an_image_size_equals_the_literal_implementation(img_size, windows, size):
    config = replace(SMALL, windows=windows)
    assert_same_numbers(ported(config, img_size=img_size), config, size)


@pytest.mark.parametrize(
    ("arguments", "windows", "size"),
    [
        ({}, DENSE, (96, 133)),
        ({"window_size": 16}, square(16, 16, 16, 16), (70, 101)),
        ({"window_size": (16, 16, 32, 16)}, square(16, 16, 32, 16), (64, 96)),
        ({"window_size": (7, 7, 14, 7)}, NATIVE, (70, 300)),
        ({"window_size": (3, 5, 14, 2)}, square(3, 5, 14, 2), (70, 101)),
        ({"window_size": [4, 2, 2, 1], "layer_scale": 1e-5}, square(4, 2, 2, 1), (40, 32)),
    ],
    ids=["default", "16", "16_16_32_16", "native", "3_5_14_2", "layer_scale"],
)
def test_dense_model_equals_the_literal_implementation(arguments, windows, size):
    config = replace(SMALL, windows=windows, dense=True, layer_scale=arguments.pop("layer_scale", None) is not None)
    assert_same_numbers(ported(config, **arguments), config, size)


@pytest.mark.parametrize(("pretrain_size", "window"), [(384, 24), (512, 32), (200, 13)])
def test_dense_model_of_other_pretraining_equals_the_literal_implementation(pretrain_size, window):
    config = replace(SMALL, windows=square(8, 8, 24, 8), dense=True, pretrain_window=window)
    model = ported(config, window_size=(8, 8, 24, 8), pretrain_size=pretrain_size)
    assert [stage.query.pool for stage in model.stages] == [True, True, window != 24, False]
    assert_same_numbers(model, config, (64, 96))


@pytest.mark.parametrize("window_size", [(7, 7, 14, 7), (3, 4, 14, 5)], ids=str)
@pytest.mark.parametrize("size", [(224, 224), (96, 133)], ids=str)
@torch.no_grad()
def test_dense_model_with_native_windows_gives_norms_of_the_classifiers_maps(window_size, size):
    config = replace(SMALL, windows=square(*window_size))
    classifier = ported(config, window_size=window_size)
    dense = built(replace(config, dense=True), window_size=window_size).double().eval()
    dense.load_state_dict(checkpoint_filter_fn(classifier.state_dict(), dense))
    for norm in dense.norms:
        norm.weight.normal_()
        norm.bias.normal_()
    x = make_input((2, 3, *size))
    maps = classifier.forward_intermediates(x, intermediates_only=True)
    for ours, raw, norm in zip(dense.forward_intermediates(x, intermediates_only=True), maps, dense.norms, strict=True):
        expected = F.layer_norm(raw.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, 1e-5)
        assert error(ours, expected.permute(0, 3, 1, 2)) < 1e-7  # the classifier's scale is rounded


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_classifier_alone_holds_its_scale_in_float32(dense):
    with torch.device("meta"):
        model = timm.create_model("gc_vit_xxtiny", dense=dense)
    scales = {block.attn.scale for stage in model.stages for block in stage.blocks}
    assert scales == {32**-0.5 if dense else 0.1767766922712326}


# Against timm's implementation


def timm_key(key: str) -> str:
    """Return timm's name of one of our parameters."""
    for ours, theirs in (
        ("stem.proj.", "stem.conv1."),
        ("position_bias.table", "rel_pos.relative_position_bias_table"),
        (".conv.", ".conv_block."),
        (".dw.", ".conv_dw."),
        (".pw.", ".conv_pw."),
    ):
        key = key.replace(ours, theirs)
    if key.startswith("norm."):
        key = f"stages.3.{key}"
    stage, _, rest = key.partition(".query.steps.")
    return f"{stage}.global_block.blocks.conv{int(rest[0]) + 1}{rest[1:]}" if rest else key


@torch.no_grad()
def test_batch_of_two_gives_the_numbers_of_timms_gcvit():
    torch.manual_seed(0)
    model = timm.create_model("gc_vit_xxtiny").double().eval()
    theirs = timm.create_model("gcvit_xxtiny").double().eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    ours = {timm_key(key): value for key, value in model.state_dict().items()}
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    theirs.load_state_dict({key: value.reshape(shapes.get(key, value.shape)) for key, value in ours.items()})

    x = make_input((2, 3, 224, 224))
    last, maps = model.forward_intermediates(x, norm=True)  # timm's last stage ends with the classifier's norm
    # One image at a time: timm before 1.0.31 gives windows the queries of other images.
    outputs = [theirs.forward_intermediates(x[i : i + 1], intermediates_only=True) for i in range(2)]
    for a, b in zip(maps, zip(*outputs, strict=True), strict=True):
        assert error(a, torch.cat(b)) < 1e-7  # timm's scale is exact
    assert error(model.forward_head(last), torch.cat([theirs(x[i : i + 1]) for i in range(2)])) < 1e-7


# Global queries


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("size", [(224, 224), (96, 133)], ids=str)
@torch.no_grad()
def test_order_of_a_batch_does_not_change_results(dense, size):
    config = replace(SMALL, windows=square(3, 3, 3, 3), dense=dense)
    model = ported(config, window_size=3)
    x = make_input((3, 3, *size))
    for a, b in zip(
        model.forward_intermediates(x.flip(0), intermediates_only=True),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert error(a.flip(0), b) < 1e-12


@torch.no_grad()
def test_query_is_made_once_a_stage_and_for_global_blocks_only():
    model = built(replace(SMALL, depths=(1, 4, 6, 2))).eval()
    made = []
    for i, stage in enumerate(model.stages[1:], start=1):
        stage.query.register_forward_hook(lambda *_, i=i: made.append(i))
    assert model.stages[0].query is None
    assert [key for key in model.state_dict() if key.startswith("stages.0.query")] == []
    model(torch.randn(2, 3, 96, 64))
    assert made == [1, 2, 3]


def test_every_second_block_is_global():
    with torch.device("meta"):
        model = timm.create_model("gc_vit_tiny")
    for stage in model.stages:
        widths = [block.attn.qkv.out_features // block.attn.qkv.in_features for block in stage.blocks]
        assert widths == [3 - j % 2 for j in range(len(stage.blocks))]


@torch.no_grad()
def test_queries_of_a_constant_map_are_heads_of_its_channels():
    query = built(SMALL).stages[3].query
    for parameter in query.parameters():
        parameter.zero_()
    x_bchw = torch.arange(2 * 128.0).reshape(2, 128, 1, 1).expand(-1, -1, 7, 7)
    expected = torch.arange(2 * 128.0).reshape(2, 4, 1, 32).expand(-1, -1, 49, -1)
    assert torch.equal(query(x_bchw), expected)


# Windows and padding


@pytest.mark.parametrize(
    ("name", "arguments", "windows"),
    [
        ("gc_vit_xxtiny", {}, [(7, 7), (7, 7), (14, 14), (7, 7)]),
        ("gc_vit_xxtiny", {"img_size": (256, 210)}, [(8, 7), (8, 7), (16, 14), (8, 7)]),
        ("gc_vit_xxtiny", {"window_size": (4, 3, 2, 1)}, [(4, 4), (3, 3), (2, 2), (1, 1)]),
        ("gc_vit_xxtiny", {"dense": True}, [(24, 24)] * 4),
        ("gc_vit_xxtiny", {"dense": True, "img_size": 384}, [(24, 24)] * 4),
        ("gc_vit_large_384_21k", {}, [(12, 12), (12, 12), (24, 24), (12, 12)]),
        ("gc_vit_large_512_21k", {}, [(16, 16), (16, 16), (32, 32), (16, 16)]),
        ("gc_vit_large_512_21k", {"img_size": 224}, [(7, 7), (7, 7), (14, 14), (7, 7)]),
    ],
    ids=str,
)
def test_windows_follow_the_image_size_unless_given(name, arguments, windows):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(2, 2, 2, 2), **arguments)
    assert [stage.window for stage in model.stages] == windows
    assert [{block.attn.window for block in stage.blocks} for stage in model.stages] == [{w} for w in windows]
    assert [stage.query.window for stage in model.stages] == windows


@pytest.mark.parametrize(
    ("arguments", "pool"),
    [
        ({}, False),
        ({"img_size": 384}, False),
        ({"window_size": 24}, False),
        ({"dense": True}, True),
        ({"dense": True, "window_size": 14}, False),
        ({"dense": True, "window_size": (16, 16, 32, 16)}, True),
        ({"dense": True, "window_size": 24, "pretrain_size": 384}, False),
        ({"dense": True, "window_size": (16, 16, 32, 16), "pretrain_size": 512, "img_size": 384}, False),
        ({"dense": True, "pretrain_size": 512}, True),
    ],
    ids=str,
)
def test_query_of_stage_2_is_pooled_in_dense_mode_with_another_window_than_in_pretraining(arguments, pool):
    with torch.device("meta"):
        model = timm.create_model("gc_vit_xxtiny", **arguments)
    assert [stage.query.pool for stage in model.stages] == [True, True, pool, False]
    assert [len(stage.query.steps) for stage in model.stages] == [3, 2, 1, 1]


def test_padding_is_not_projected():
    def gmacs(window_size: Any) -> float:
        with torch.device("meta"):
            model = timm.create_model("gc_vit_tiny", dense=True, window_size=window_size).eval().requires_grad_(False)
        counter = FlopCounterMode(display=False)
        with attention_backend("plain"), counter:
            model(torch.empty(1, 3, 512, 512, device="meta"))
        return counter.get_total_flops() / 2e9

    assert gmacs(16) == pytest.approx(27.9, abs=0.05)
    assert gmacs((16, 16, 32, 16)) == pytest.approx(35.6, abs=0.05)
    assert gmacs(24) == pytest.approx(44.6, abs=0.05)  # 52.2 if padding went through the projections


@pytest.mark.parametrize("own_queries", [True, False])
@torch.no_grad()
def test_padded_tokens_take_part_as_zeros_in_front_of_the_projection(own_queries):
    torch.manual_seed(0)
    attn = WindowAttention(8, 2, (3, 2), 0.5, own_queries).double()
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    q = None if own_queries else torch.randn(8, 2, 6, 4, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))
    assert error(attn(x, q), attn(padded, q)[:, :4, :3]) < 1e-12


def test_maps_stay_in_channels_last_memory():
    model = built(SMALL).eval()
    for size in ((224, 224), (96, 133)):
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, PointwiseConv)) and module.in_channels > 3:
                module.register_forward_pre_hook(assert_channels_last)
        maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def assert_channels_last(module: nn.Module, args: tuple[Tensor]) -> None:
    assert args[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("window_size", [0, (7, 7, 14), (7, 7, 0, 7), (7, 7, 14, 7, 7)], ids=str)
def test_bad_window_size_raises(window_size):
    with pytest.raises(ValueError, match=r"window_size=.*: expected a positive number of tokens, or four"):
        timm.create_model("gc_vit_xxtiny", window_size=window_size)


def test_heads_that_do_not_divide_the_widths_raise():
    with pytest.raises(ValueError, match=r"num_heads=\(2, 4, 8, 12\) do not divide the widths \[64, 128, 256, 512\]"):
        timm.create_model("gc_vit_xxtiny", num_heads=(2, 4, 8, 12))


# Checkpoints


@pytest.mark.parametrize(
    ("name", "dense"), [*((name, False) for name in VARIANTS), ("gc_vit_xxtiny", True), ("gc_vit_small", True)]
)
def test_official_keys_of_full_size_map_one_to_one(name, dense):
    config = replace(VARIANTS[name], dense=dense, windows=DENSE if dense else VARIANTS[name].windows)
    with torch.device("meta"):
        model = timm.create_model(name, dense=dense)
        official = {key: torch.empty(shape) for key, shape in state_dict_shapes(config).items()}
    indices = {
        key.replace("bias_table", "index"): torch.empty(1) for key in official if key.endswith("position_bias_table")
    }
    mapped = checkpoint_filter_fn(official | indices, model)
    assert mapped.keys() == model.state_dict().keys()
    assert sorted(map(id, mapped.values())) == sorted(map(id, official.values()))


@pytest.mark.parametrize(
    ("img_size", "window"), [(64, (2, 2)), (448, (14, 14)), (768, (24, 24)), ((64, 160), (2, 5))], ids=str
)
def test_tables_of_other_windows_are_resized_bicubically_head_by_head(img_size, window):
    config = replace(SMALL, depths=(1, 1, 1, 1))
    model, state = built(config, img_size=img_size), filled(config)
    table = state["levels.3.blocks.0.attn.relative_position_bias_table"]
    resized = checkpoint_filter_fn(state, model)["stages.3.blocks.0.attn.position_bias.table"]
    for head in range(4):
        image = table[:, head].reshape(1, 1, 13, 13)
        size = (2 * window[0] - 1, 2 * window[1] - 1)
        expected = F.interpolate(image, size, mode="bicubic", align_corners=False)
        assert torch.equal(resized[:, head], expected.flatten())


@pytest.mark.parametrize("arguments", [{}, {"img_size": (32, 160)}, {"img_size": (64, 96)}, {"dense": True}], ids=str)
def test_own_tables_are_not_touched(arguments):
    # 1 x 5 windows have 9 offsets, as many as square ones of 2.
    config = replace(SMALL, dense="dense" in arguments)
    model = built(config, **{key: value for key, value in arguments.items() if key != "dense"})
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    mapped = checkpoint_filter_fn(dict(state), model)
    assert [key for key, value in mapped.items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize("key", ["patch_embed.conv_down.conv.1.weight", "levels.0.downsample.conv.4.bias"])
def test_unknown_layer_of_a_convolution_raises_and_names_it(key):
    with pytest.raises(CheckpointError, match=r"unknown: st\S+conv\.[14]\."):
        checkpoint_filter_fn(filled(SMALL) | {key: torch.ones(1)}, built(SMALL))


@pytest.mark.parametrize("rows", [168, 196, 171])  # even, of an even side, of 9 x 19 offsets
def test_table_of_no_square_window_raises_and_names_it(rows):
    state = filled(SMALL)
    state["levels.1.blocks.2.attn.relative_position_bias_table"] = torch.zeros(rows, 2)
    message = rf"wrong shape: stages\.1\.blocks\.2\.attn\.position_bias\.table: \({rows}, 2\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(state, built(SMALL))


# Initialisation, weight decay, drop path


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_initial_weights_have_their_distributions(dense):
    torch.manual_seed(0)
    model = timm.create_model("gc_vit_small", depths=(1, 2, 2, 2), dense=dense).requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std() == pytest.approx(0.02, rel=0.05), key
            assert module.weight.abs().max() > 0.06, f"{key} is cut off at a few deviations"
            assert module.bias is None or not module.bias.any(), key
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for values in (module.weight, *([] if module.bias is None else [module.bias])):
                assert 0.8 * bound < values.abs().max() <= bound, key
            assert module.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), key
        elif isinstance(module, RelativePositionBias):
            assert module.table.std() == pytest.approx(0.02, rel=0.1), key
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_scales_start_at_a_hundred_thousandth_where_the_variant_has_them(name):
    model = timm.create_model(name, depths=(1, 1, 1, 1), dim=16, num_heads=(1, 1, 1, 1))
    scales = {key: p for key, p in model.named_parameters() if "gamma" in key}
    expected = [f"stages.{i}.blocks.0.gamma{k}" for i in range(4) for k in (1, 2)]
    assert list(scales) == (expected if VARIANTS[name].layer_scale else [])
    assert all(torch.equal(p, torch.full_like(p, 1e-5)) for p in scales.values())


def test_weight_decay_spares_vectors_and_no_tables():
    with torch.device("meta"):
        model = timm.create_model("gc_vit_small", depths=(2, 2, 2, 2))
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1}
    assert "stages.0.blocks.0.attn.position_bias.table" in decayed


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("gc_vit_xxtiny", drop_path_rate=0.22)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.22 * k / 11 for k in range(12)])


@torch.no_grad()
def test_drop_path_draws_for_every_image_and_branch():
    torch.manual_seed(0)
    stage = built(SMALL, window_size=7).stages[0].double().train()
    stage.blocks = nn.ModuleList([Block(16, WindowAttention(16, 1, (7, 7), 1.0, True), 2, 0.5, None).double()])
    x = torch.randn(1, 16, 14, 21, dtype=torch.float64).expand(64, -1, -1, -1)  # six windows
    kinds = {tuple(row) for row in stage(x).flatten(1).mul(1e6).round().int().tolist()}
    assert len(kinds) == 4


@pytest.mark.parametrize("name", VARIANTS)
def test_pretrained_config_has_the_size_of_the_variants_windows(name):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1))
    (_, height, width), window = model.pretrained_cfg["input_size"], model.stages[3].window
    assert (height // 32, width // 32) == window == model.pretrained_cfg["pool_size"]
