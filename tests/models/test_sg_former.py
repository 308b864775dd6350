"""SG-Former against the official numbers, the literal implementation, and the specification's fine print."""

import argparse
import functools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from models import comparison
from models import reference_sg_former as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_sg_former import VARIANTS, Config, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError, load_weights
from effbackbones.models import sg_former
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.sg_former import Block, FullAttention, GuidedAttention, HybridAttention

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "sgformer").glob("*.json"))
SMALL = Config((2, 4, 2, 1), (8, 12, 16, 24), (2, 2, 4, 3), grid=10)
CLASSES = 5


def build(config: Config = SMALL, **kwargs: Any) -> Any:
    """Return our model of an architecture, freshly initialised."""
    arguments = {"img_size": 4 * config.grid, "num_classes": CLASSES, **kwargs}
    overlay = {"num_classes": CLASSES}
    sizes = {"depths": config.depths, "dims": config.dims, "heads": config.heads}
    return timm.create_model("sgformer_s", pretrained_cfg_overlay=overlay, **sizes, **arguments).eval()


@functools.lru_cache(maxsize=2)
def filled(config: Config) -> dict[str, Tensor]:
    return fill_state_dict(state_dict_shapes(config, CLASSES))


def ported(config: Config = SMALL, **kwargs: Any) -> Any:
    """Return our model of that architecture in float64, with the filled official weights."""
    model = build(config, **kwargs).double()
    model.load_state_dict(checkpoint_filter_fn(dict(filled(config)), model))
    return model


def assert_same_numbers(model: Any, config: Config, size: tuple[int, int], batch: int = 2) -> None:
    comparison.assert_same_numbers(model, partial(reference.forward, config=config), filled(config), size, batch)


def guided(model: nn.Module) -> list[GuidedAttention]:
    return [module for module in model.modules() if isinstance(module, GuidedAttention)]


# Parity


@functools.lru_cache(maxsize=1)
def official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta, _ = load_fixture(path)
    return meta, reference_state_dict(meta)


def assert_probe(meta: dict[str, Any], significances: dict[str, Tensor]) -> None:
    for block, probe in zip(meta["significance_probe"]["blocks"], meta["significance_probe"]["values"], strict=True):
        values = significances[block][meta["significance_probe"]["batch_item"]]
        assert len(values) == probe["tokens"]
        assert values.sum().item() == pytest.approx(probe["sum"], rel=1e-12)
        assert values[:8].tolist() == pytest.approx(probe["first8"], rel=1e-9)
        order = values.argsort(stable=True).tolist()
        assert (order[:8], order[-8:]) == (probe["order_first8"], probe["order_last8"])


each_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem, scope="module")


@each_fixture
@torch.no_grad()
def test_official_checkpoint_file_gives_official_numbers(path, tmp_path):
    meta, state = official(path)
    content = {"epoch": 309, "arch": "SGFormer", "state_dict": state, "args": argparse.Namespace(lr=1e-3), "version": 2}
    torch.save(content, tmp_path / "official.pth")
    torch.set_default_dtype(torch.float64)
    try:
        overlay = {"file": str(tmp_path / "official.pth")}
        model = timm.create_model(meta["kwargs"]["model"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    significances = {}
    for i, stage in enumerate(model.stages[:3], start=1):
        stage.blocks[0].register_forward_hook(lambda *args, i=i: significances.update({f"block{i}.0": args[2][1]}))
    last, maps = model.forward_intermediates(make_input(meta["input_shape"], meta["input_seed"]))
    assert_numbers_of_fixture(path, model.forward_head(last), maps)
    if "significance_probe" in meta:
        assert_probe(meta, significances)


@each_fixture
@torch.no_grad()
def test_literal_implementation_gives_official_numbers(path):
    meta, state = official(path)
    config = VARIANTS[meta["kwargs"]["model"]]
    assert state_dict_shapes(config) == {key: tuple(shape) for key, shape in meta["state_dict"].items()}
    logits, maps = reference.forward(state, make_input(meta["input_shape"], meta["input_seed"]), config)
    assert_numbers_of_fixture(path, logits, maps)


def test_averaged_weights_of_an_official_checkpoint_load(tmp_path):
    state = filled(SMALL)
    raw = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": raw, "state_dict_ema": state, "args": argparse.Namespace()}, tmp_path / "official.pth")
    model = build().double()
    load_weights(model, tmp_path / "official.pth", ema=True)
    expected = ported().state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("size", [(64, 96), (75, 110), (150, 203), (32, 32), (40, 40), (224, 112)], ids=str)
def test_any_size_equals_the_literal_implementation(size, dense):
    assert_same_numbers(ported(dense=dense), SMALL, size)


def test_base_with_heads_of_24_channels_equals_the_literal_implementation():
    config = replace(VARIANTS["sgformer_b"], depths=(2, 2, 2, 1), grid=16)
    assert config.dims[0] // config.heads[0] == 24
    assert_same_numbers(ported(config), config, (64, 64), batch=1)


def test_significance_in_chunks_equals_the_literal_implementation(monkeypatch):
    monkeypatch.setattr(sg_former, "STORED", 2401)  # the windows' weights alone
    monkeypatch.setattr(sg_former, "CHUNK", 5000)
    assert_same_numbers(ported(), SMALL, (150, 203))


@pytest.mark.parametrize("name", VARIANTS)
def test_official_keys_of_full_size_all_have_a_place(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        state = {key: torch.empty(shape) for key, shape in state_dict_shapes(VARIANTS[name]).items()}
    mapped = checkpoint_filter_fn(state, model)
    assert mapped.keys() == model.state_dict().keys()
    assert sum(v.numel() for v in mapped.values()) == sum(v.numel() for v in state.values())


# Significance


@pytest.mark.parametrize("grid", [(14, 21), (9, 10), (3, 5), (7, 8)], ids=str)
@torch.no_grad()
def test_significance_is_the_attention_that_a_token_gets(grid):
    torch.manual_seed(0)
    attn, (h, w), d = HybridAttention(16, 4, 2).double(), grid, 4
    x = torch.randn(2, h, w, 16, dtype=torch.float64)
    _, significance = attn(x, None)
    q1, q2, k2, _ = attn.qkv(x).chunk(4, -1)
    z = attn.act(attn.norm(attn.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
    k1 = attn.kv(z).chunk(2, -1)[0]
    expected = torch.zeros(2, h, w, dtype=torch.float64)
    for head in (slice(0, d), slice(d, 2 * d)):
        p = torch.einsum("bijc,bklc->bijkl", q1[..., head], k1[..., head]).mul(d**-0.5).flatten(3).softmax(-1)
        received = p.mean((1, 2)).unflatten(1, z.shape[1:3])
        for y in range(h):
            for x_ in range(w):
                expected[:, y, x_] += received[:, y * z.shape[1] // h, x_ * z.shape[2] // w] / 2
        for top in range(0, h, 7):
            for left in range(0, w, 7):
                cell = (slice(None), slice(top, top + 7), slice(left, left + 7), head)
                q, k = q2[cell].flatten(1, 2), k2[cell].flatten(1, 2)
                received = (q @ k.transpose(1, 2) * d**-0.5).softmax(-1).sum(1) / 49  # also where the cell is smaller
                expected[cell[:3]] += received.reshape(expected[cell[:3]].shape) / 2
    torch.testing.assert_close(significance, expected.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", [2**19, 0])
def test_significance_is_in_float32_under_autocast_and_has_no_gradient(stored, monkeypatch):
    monkeypatch.setattr(sg_former, "STORED", stored)
    q, k, v = make_input((3, 2, 2, 50, 8)).bfloat16().requires_grad_().unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out, count = sg_former.attend_and_count(q, k, v)
    assert (out.dtype, count.dtype, count.requires_grad) == (torch.bfloat16, torch.float32, False)
    expected = (q.float() @ k.float().transpose(2, 3) * 8**-0.5).softmax(-1).sum(2).mean(1)
    torch.testing.assert_close(count, expected, rtol=1e-5, atol=1e-5)


def test_significance_guides_the_next_block_alone():
    model, given = ported(), []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda _, args: given.append(args[1]))
            block.register_forward_hook(lambda _, args, out: given.append(out[1]))
    model(make_input((1, 3, 64, 64)))
    assert [value is None for value in given] == [True, False, False, True] * 4 + [True, True]
    assert all(given[4 * i + 1] is given[4 * i + 2] for i in range(4))


# Order


def test_equal_significances_keep_the_order_of_tokens():
    values = torch.tensor([3.0, 1.0, 2.0, 1.0]).repeat(2, 500)
    order = sg_former.ascending(values)
    expected = [i for value in (1, 2, 3) for i in range(2000) if values[0, i] == value]
    assert order.tolist() == [expected, expected]


def recorded_orders(model: Any, x: Tensor) -> list[Tensor]:
    """Return the order in which each guided block takes its tokens."""
    orders: list[Tensor] = []
    hooks = [
        attn.register_forward_pre_hook(lambda _, args: orders.append(sg_former.ascending(args[1])))
        for attn in guided(model)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return orders


@torch.no_grad()
def test_float32_agrees_with_float64_where_the_order_is_given():
    model, x = ported(), make_input((2, 3, 150, 203))
    expected, orders = model(x), recorded_orders(model, x)
    model.float()
    for attn, order in zip(guided(model), orders, strict=True):
        attn.order = order
    assert error(model(x.float()).double(), expected) < 1e-5


@torch.no_grad()
def test_one_order_serves_all_images_and_stays_out_of_checkpoints():
    model, x = ported(), make_input((3, 3, 64, 64))
    keys = model.state_dict().keys()
    for attn, order in zip(guided(model), recorded_orders(model, x[:1]), strict=True):
        attn.order = order
    ours = model(x)
    assert model.state_dict().keys() == keys
    assert error(ours[:1], ported()(x[:1])) < 1e-9
    for attn in guided(model):
        attn.order = attn.order.expand(3, -1)
    assert error(ours, model(x)) < 1e-9


def test_order_of_another_size_raises():
    model = ported()
    guided(model)[1].order = torch.arange(10)[None]
    with pytest.raises(ValueError, match="order is of 10 tokens, expected 64 at this image size"):
        model(make_input((1, 3, 64, 64)))


@torch.no_grad()
def test_stage_that_sorts_exports_with_a_dynamic_batch_and_runs_in_onnx():
    stage = build().stages[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(stage, (make_input((2, 8, 16, 24)).float(),), dynamic_shapes=({0: batch},))
    x = make_input((3, 8, 16, 24), seed=1).float()
    expected = stage(x)
    # Rounding swaps a few tokens, which freshly initialised weights hardly tell apart.
    assert error(exported.module()(x), expected) < 1e-3
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert "TopK" in {node.op_type for node in program.model_proto.graph.node}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(torch.from_numpy(out), expected) < 1e-3


@torch.no_grad()
def test_order_of_equal_values_exports_to_onnx():
    class Ascending(nn.Module):
        def forward(self, x_bn: Tensor) -> Tensor:
            return sg_former.ascending(x_bn)

    x = torch.tensor([3.0, 1.0, 2.0, 1.0]).repeat(2, 500)
    program = torch.onnx.export(Ascending().eval(), (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (order,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(order), sg_former.ascending(x))


# Positions


def test_table_of_positions_starts_with_sines_of_columns_then_of_rows():
    table = build(replace(SMALL, dims=(12, 12, 16, 24)), img_size=(24 * 4, 40 * 4)).stem.pos_embed
    assert table.shape == (1, 24, 40, 12)
    for row, col in ((0, 0), (0, 1), (1, 0), (23, 39), (7, 5)):
        waves = [10000 ** (-k / 3) for k in range(3)]
        expected = [f(p * wave) for p in (col, row) for f in (math.sin, math.cos) for wave in waves]
        assert table[0, row, col].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert table[0, 0, 1, 0].item() == pytest.approx(math.sin(1))
    assert table[0, 1, 0, 0].item() == 0


@pytest.mark.parametrize("img_size", [32, 64, 100, (64, 96), (160, 40), (80, 20 * 4)], ids=str)
def test_table_of_a_checkpoint_is_resized_to_the_image_size(img_size):
    state = filled(SMALL)
    model = build(img_size=img_size).double()
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    square = state["pos_embed"].reshape(1, 10, 10, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (height // 4, width // 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.stem.pos_embed.data, expected)


def test_table_of_as_many_tokens_in_another_shape_is_resized_not_cut_up():
    model = build(img_size=(80, 20 * 4)).double()  # 20 x 20
    wide = build(img_size=(160, 40)).double()  # 40 x 10, as many
    mapped = checkpoint_filter_fn(model.state_dict(), wide)
    tall = F.interpolate(model.stem.pos_embed.permute(0, 3, 1, 2), (40, 10), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(mapped["stem.pos_embed"], tall)


@torch.no_grad()
def test_resized_table_is_kept_at_inference_until_the_weights_change(monkeypatch):
    model, x = ported(), make_input((1, 3, 64, 96))
    first = model(x)
    resized = []
    monkeypatch.setattr(sg_former, "resize_table", lambda *args: resized.append(args))
    assert torch.equal(model(x), first)
    assert not resized
    monkeypatch.undo()
    model.stem.pos_embed.mul_(2)
    assert not torch.equal(model(x), first)


def test_table_of_wrong_width_is_named_with_its_shape():
    state = dict(filled(SMALL))
    state["pos_embed"] = state["pos_embed"][..., :4]
    with pytest.raises(CheckpointError, match=r"wrong shape: stem\.pos_embed: \(1, 100, 4\) in the checkpoint"):
        checkpoint_filter_fn(state, build())


# Checkpoints


@torch.no_grad()
def test_rows_of_guided_keys_and_values_are_those_of_both_halves_in_turn():
    state, model = filled(SMALL), ported()
    (keys1, values1), (keys2, values2) = (state[f"block2.1.attn.kv{i}.weight"].chunk(2) for i in (1, 2))
    assert torch.equal(model.stages[1].blocks[1].attn.kv.weight, torch.cat([keys1, keys2, values1, values2]))


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("block1.1.attn.kv2.weight", r"missing: stages\.0\.blocks\.1\.attn\.kv\.weight"),
        ("block1.0.attn.q2.bias", r"missing: stages\.0\.blocks\.0\.attn\.qkv\.bias"),
        ("block4.0.attn.kv.weight", r"missing: stages\.3\.blocks\.0\.attn\.qkv\.weight"),
    ],
)
def test_checkpoint_without_a_part_of_a_projection_raises_and_names_the_projection(part, whole):
    state = {key: value for key, value in filled(SMALL).items() if key != part}
    with pytest.raises(CheckpointError, match=whole):
        checkpoint_filter_fn(state, build())


def test_checkpoint_with_a_misshapen_part_raises_and_names_the_part():
    state = dict(filled(SMALL))
    # Together they have as many rows as they should.
    state["block1.0.attn.q1.weight"] = torch.zeros(6, 8)
    state["block1.0.attn.q2.weight"] = torch.zeros(2, 8)
    with pytest.raises(CheckpointError, match=r"unknown: .*stages\.0\.blocks\.0\.attn\.q1\.weight"):
        checkpoint_filter_fn(state, build())


# Arguments


@pytest.mark.parametrize("depths", [(1, 2, 2, 1), (2, 3, 2, 1), (2, 2, 5, 1)], ids=str)
def test_odd_depths_of_the_first_stages_raise(depths):
    with pytest.raises(ValueError, match=r"must be even"):
        build(replace(SMALL, depths=depths))


@pytest.mark.parametrize(
    "changes", [{"heads": (1, 2, 4, 3)}, {"heads": (2, 2, 4, 5)}, {"dims": (6, 12, 16, 24)}], ids=str
)
def test_widths_that_heads_or_positions_do_not_divide_raise(changes):
    with pytest.raises(ValueError, match=r"heads must divide dims and be even"):
        build(replace(SMALL, **changes))


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (16, 16)], ids=str)
def test_images_below_32_pixels_raise_in_every_way(size):
    model, x = build(), torch.zeros(1, 3, *size)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=rf"images of {size[0]} x {size[1]} pixels: SG-Former takes 32"):
            call(x)
    with pytest.raises(ValueError, match="SG-Former takes 32"):
        build(img_size=size)


@torch.no_grad()
def test_dense_maps_are_the_classifiers():
    x = make_input((1, 3, 75, 110))
    classifier, dense = (ported(dense=dense).forward_intermediates(x)[1] for dense in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(classifier, dense, strict=True))


# Initialisation, weight decay, drop path


def test_initial_weights_have_their_distributions():
    torch.manual_seed(0)
    model = timm.create_model("sgformer_s", depths=(2, 2, 2, 1)).requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 1000:
            assert module.weight.std() == pytest.approx(0.02, rel=0.05), key
            assert module.weight.abs().max() > 0.06, f"{key} is cut off at a few deviations"
        elif isinstance(module, nn.Conv2d):
            outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels / module.groups
            assert module.weight.std() == pytest.approx(math.sqrt(2 / outputs), rel=0.1), key
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            assert module.weight.eq(1).all(), key
        if isinstance(getattr(module, "bias", None), Tensor):
            assert not module.bias.any(), key
    merges = torch.cat(
        [p.flatten() for key, p in model.named_parameters() if key.endswith((".f1.weight", ".f2.weight"))]
    )
    assert 0.015 < merges.std() < 0.025


def test_weight_decay_spares_vectors_and_biases_alone():
    with torch.device("meta"):
        model = timm.create_model("sgformer_s", depths=(2, 2, 2, 1))
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1}
    assert {"stem.pos_embed", "stages.0.blocks.1.attn.f3.weight", "stages.2.blocks.1.attn.f2.weight"} <= decayed


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("sgformer_s", drop_path_rate=0.44)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.44 * k / 22 for k in range(23)])


@pytest.mark.parametrize(
    "attn",
    [HybridAttention(8, 2, 2), GuidedAttention(8, 2, (2, 1)), FullAttention(8, 2)],
    ids=["hybrid", "guided", "full"],
)
def test_drop_path_draws_for_every_sample_and_branch(attn):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 8).expand(64, -1, -1, -1)
    out, _ = Block(8, attn, 0.5).train()(x, torch.rand(1, 16).expand(64, -1))
    kinds = {tuple(row) for row in out.flatten(1).mul(1e4).round().int().tolist()}
    assert len(kinds) == 4
    assert tuple(x[0].flatten().mul(1e4).round().int().tolist()) in kinds
