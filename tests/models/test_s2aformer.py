"""S2AFormer against its fixtures, the literal implementation, the published counts; properties of its attention."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import comparison
from models import reference_s2aformer as reference
from models.comparison import assert_numbers_of_fixture, error
from models.reference_s2aformer import VARIANTS, Config, state_dict_shapes
from parity.parity import fill_state_dict, load_fixture, make_input, reference_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.models import s2aformer
from effbackbones.models._hierarchical import checkpoint_filter_fn
from effbackbones.models.s2aformer import Block, PatchEmbed, StripAttention, strip_attention

FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "s2aformer").glob("*.json"))
CLASSES = 5
WEIGHTS = ("weight", "bias")
SMALL = Config((1, 2, 2, 1), (8, 12, 16, 24), (1, 3, 2, 4), stem_width=4, head_hidden_size=20)


def built(config: Config, **kwargs: Any) -> Any:
    """Return our model of that architecture."""
    arguments = {**vars(config), "num_classes": CLASSES, **kwargs}
    return timm.create_model("s2aformer_t", pretrained_cfg_overlay={"num_classes": CLASSES}, **arguments)


def ported(config: Config) -> Any:
    """Return our model of that architecture in float64, with the weights that the filling rule gives."""
    model = built(config).double().eval()
    model.load_state_dict(fill_state_dict(state_dict_shapes(config, CLASSES)))
    return model


def assert_same_numbers(config: Config, size: tuple[int, int]) -> None:
    state = fill_state_dict(state_dict_shapes(config, CLASSES))
    comparison.assert_same_numbers(ported(config), partial(reference.forward, config=config), state, size)


# Parity


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_checkpoint_file_gives_the_numbers_of_the_fixture(path, tmp_path):
    meta, _ = load_fixture(path)
    torch.save({"model": reference_state_dict(meta), "epoch": 299}, tmp_path / "weights.pth")
    torch.set_default_dtype(torch.float64)
    try:
        overlay = {"file": str(tmp_path / "weights.pth")}
        model = timm.create_model(meta["model"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    x = make_input(meta["input_shape"], meta["input_seed"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
    assert_numbers_of_fixture(path, logits, maps)


def test_fixture_was_made_of_the_registered_variant():
    meta, _ = load_fixture(FIXTURES[0])
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in meta["kwargs"].items()}
    assert given == {key: v for key, v in vars(VARIANTS[meta["model"]]).items() if key != "dense"} | {
        "num_classes": 1000
    }


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_literal_implementation_gives_the_numbers_of_the_fixture(path):
    meta, _ = load_fixture(path)
    config = VARIANTS[meta["model"]]
    assert state_dict_shapes(config) == {k: tuple(v) for k, v in meta["state_dict"].items()}
    with torch.no_grad():
        logits, maps = reference.forward(
            reference_state_dict(meta), make_input(meta["input_shape"], meta["input_seed"]), config
        )
    assert_numbers_of_fixture(path, logits, maps)


def test_mini_at_224_in_float32_gives_the_logits_of_the_fixture():
    meta, expected = load_fixture(next(path for path in FIXTURES if path.stem == "s2aformer_mini_224x224"))
    model = timm.create_model("s2aformer_mini").eval()
    model.load_state_dict(reference_state_dict(meta))
    with torch.no_grad():
        logits = model(make_input(meta["input_shape"], meta["input_seed"]).float())
    assert error(logits.double(), torch.from_numpy(expected["logits"])) < 1e-4


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize("size", [(64, 96), (70, 101), (33, 250), (32, 32)], ids=str)
def test_model_equals_the_literal_implementation(size, dense):
    assert_same_numbers(replace(SMALL, dense=dense), size)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": (1, 1, 1, 1)},
        {"num_heads": (8, 12, 16, 24)},
        {"sr_ratios": (1, 1, 1, 1)},
        {"sr_ratios": (3, 5, 1, 2)},
        {"mlp_ratio": 2, "stem_width": 6, "head_hidden_size": 7},
    ],
    ids=str,
)
def test_model_of_other_arguments_equals_the_literal_implementation(changes):
    assert_same_numbers(replace(SMALL, **changes), (70, 101))


# Counts and shapes


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "stem", "embeddings", "stages", "head"),
    [
        ("mini", 5_136, [2_144, 8_384, 41_440, 154_320], [13_826, 45_188, 796_830, 2_357_808], 1_590_760),
        ("t", 5_136, [2_144, 7_336, 25_424, 126_280], [41_478, 104_838, 1_446_412, 2_400_762], 1_641_960),
        ("xs", 5_136, [2_144, 10_480, 51_680, 185_184], [27_652, 207_852, 1_857_016, 2_536_740], 1_652_200),
        ("s", 5_136, [2_680, 15_648, 74_304, 271_392], [40_964, 197_000, 4_557_408, 3_786_882], 1_734_120),
        ("m", 19_488, [9_432, 46_560, 205_760, 677_424], [179_718, 799_692, 12_518_520, 8_452_260], 1_959_400),
    ],
)
def test_parts_have_their_parameters(name, stem, embeddings, stages, head):
    with torch.device("meta"):
        model = timm.create_model(f"s2aformer_{name}")
    assert count(model.stem) == stem
    assert [count(stage.downsample) for stage in model.stages] == embeddings
    assert [count(stage.blocks) for stage in model.stages] == stages
    assert count(model.head) == head
    assert count(model) == stem + sum(embeddings) + sum(stages) + head


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("s2aformer_mini", {224: 0.43, 256: 0.56}),
        ("s2aformer_t", {224: 0.655, 256: 0.855}),
        ("s2aformer_xs", {224: 0.786, 256: 1.03}),
        ("s2aformer_s", {224: 1.38, 256: 1.80}),
        ("s2aformer_m", {224: 4.12, 256: 5.38}),
    ],
)
def test_multiply_adds_without_attention_products_are_the_published_ones(name, published):
    config = VARIANTS[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in state_dict_shapes(config).items()}
    for size, figure in published.items():
        counter = FlopCounterMode(display=False)
        with counter:
            reference.forward(state, torch.empty(1, 3, size, size, device="meta"), config)
        products = 0
        for i, (depth, c, ratio) in enumerate(zip(config.depths, config.dims, config.sr_ratios, strict=True)):
            n = (size // 4 // 2**i) ** 2
            products += depth * c * n * n // ratio**2
        gmacs = counter.get_total_flops() / 2e9 - products / 1e9
        # The counter behind the published figures adds up to 1.4% for biases and batch norms.
        assert gmacs <= figure + 0.005
        assert gmacs * 1.014 >= figure - 0.005


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_variant_has_the_entries_of_its_architecture(name, dense):
    with torch.device("meta"):
        state = timm.create_model(name, dense=dense).state_dict()
    shapes = state_dict_shapes(replace(VARIANTS[name], dense=dense))
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes


@torch.no_grad()
def test_maps_round_up():
    with torch.device("meta"):
        model = built(SMALL, features_only=True).eval()
        maps = model(torch.empty(1, 3, 193, 250))
    assert [tuple(m.shape[2:]) for m in maps] == [(49, 63), (25, 32), (13, 16), (7, 8)]


def test_variants_claim_no_pretrained_weights():
    assert [name for name in VARIANTS if timm.is_model_pretrained(name)] == []


@torch.no_grad()
def test_pooled_vector_has_the_width_of_the_projection():
    model = built(SMALL).eval()
    assert (model.num_features, model.head_hidden_size) == (24, 20)
    last = model.forward_features(torch.randn(1, 3, 32, 32))
    assert model.forward_head(last, pre_logits=True).shape == (1, 20)


def test_heads_that_do_not_divide_the_widths_raise():
    with pytest.raises(ValueError, match=r"num_heads=\(1, 3, 2, 5\) does not divide dims=\(8, 12, 16, 24\)"):
        built(replace(SMALL, num_heads=(1, 3, 2, 5)))


# Memory layout and padding


class Layouts(TorchFunctionMode):
    """Notes for every convolution, linear layer and layer norm whether its input lies in memory channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear, F.layer_norm):
            layout = torch.channels_last if func is F.conv2d else torch.contiguous_format
            self.seen.append((func.__name__, args[0].is_contiguous(memory_format=layout)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=str)
@torch.no_grad()
def test_every_layer_sees_its_input_channels_last(size, training):
    with Layouts() as layouts:
        built(SMALL).train(training)(torch.randn(2, 3, *size))
    assert len(layouts.seen) == 3 + 4 * 2 + 6 * 12 + 5 + 2  # stem, embeddings, blocks, reductions, head
    assert [entry for entry in layouts.seen if not entry[1]] == []


@torch.no_grad()
def test_nothing_is_padded_where_32_divides_the_size(monkeypatch):
    model, x = ported(SMALL), make_input((1, 3, 64, 96))
    expected = model(x)
    monkeypatch.setattr(s2aformer, "pad_to_windows", lambda x_bhwc, window: x_bhwc)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_odd_map_is_embedded_with_zeros_at_the_bottom_and_the_right():
    embed, x = PatchEmbed(4, 6).double(), make_input((2, 4, 5, 7))
    padded = torch.zeros(2, 4, 6, 8, dtype=torch.float64)
    padded[:, :, :5, :7] = x
    assert error(embed(x), embed(padded)) < 1e-12


@torch.no_grad()
def test_reduced_map_is_padded_with_zeros_in_the_normalised_space():
    attn, x = attention(6, 2, ratio=4), make_input((2, 5, 7, 6))
    padded = torch.zeros(2, 8, 8, 6, dtype=torch.float64)
    padded[:, :5, :7] = x
    assert attn._reduced(x).shape == (2, 4, 6)
    assert error(attn._reduced(x), attn._reduced(padded)) < 1e-12


# Strip attention


def attention(dim: int, heads: int, ratio: int = 1) -> StripAttention:
    """Return strip attention in evaluation mode, all of whose weights are random, in float64."""
    torch.manual_seed(0)
    attn = StripAttention(dim, heads, ratio).double().eval()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_()
        if ratio > 1:
            attn.sr_bn.running_mean.normal_()
            attn.sr_bn.running_var.uniform_(0.5, 1.5)
    return attn


def changed(attn: StripAttention, **tensors: Tensor) -> StripAttention:
    """Return a copy with other parameters; their names have underscores for dots."""
    attn = copy.deepcopy(attn)
    for name, parameter in attn.named_parameters():
        if (value := tensors.pop(name.replace(".", "_"), None)) is not None:
            parameter.data = value
    assert not tensors
    return attn


def test_strip_attention_equals_the_plain_formula_with_its_gradients():
    results = []
    for function in (strip_attention, lambda q, k, v: (q * k.mT).softmax(-1) @ v):
        leaves = [make_input(shape, i) for i, shape in enumerate([(2, 3, 20, 1), (2, 3, 6, 1), (2, 3, 6, 4)])]
        out = function(*(x.requires_grad_() for x in leaves))
        out.backward(make_input((2, 3, 20, 4), 3))
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-12


def test_attention_weights_sum_to_one():
    q, k = 3 * make_input((2, 3, 20, 1)), 3 * make_input((2, 3, 6, 1), 1)
    out = strip_attention(q, k, torch.ones(2, 3, 6, 4, dtype=torch.float64))
    assert (out - 1).abs().max() < 1e-14


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_a_constant_added_to_the_keys_changes_nothing(heads):
    attn, x = attention(12, heads, ratio=2), make_input((2, 5, 7, 12))
    assert error(changed(attn, k_bias=attn.k.bias + 2)(x), attn(x)) < 1e-12
    assert error(changed(attn, q_bias=attn.q.bias + 2)(x), attn(x)) > 1e-3


@pytest.mark.parametrize("heads", [1, 3])
def test_key_bias_alone_gets_a_gradient_of_zero(heads):
    attn = attention(12, heads, ratio=2)
    attn(make_input((2, 5, 7, 12))).square().mean().backward()
    size = {name: p.grad.abs().max().item() for name, p in attn.named_parameters()}
    assert size.pop("k.bias") < 1e-12 * max(size.values())
    assert min(size.values()) > 1e-6 * max(size.values())


@pytest.mark.parametrize("factor", [-1.0, 3.0])
@torch.no_grad()
def test_factor_moved_from_keys_to_queries_changes_nothing(factor):
    attn, x = attention(12, 3, ratio=2), make_input((2, 5, 7, 12))
    scale = torch.tensor([1, factor, 1], dtype=torch.float64)
    moved = changed(
        attn,
        q_weight=attn.q.weight * scale[:, None],
        q_bias=attn.q.bias * scale,
        k_weight=attn.k.weight / scale[:, None],
        k_bias=attn.k.bias / scale,
    )
    assert error(moved(x), attn(x)) < 1e-12
    assert error(changed(attn, q_weight=attn.q.weight * scale[:, None])(x), attn(x)) > 1e-3


@torch.no_grad()
def test_heads_are_tied_across_queries_keys_values_and_projection():
    attn, x = attention(12, 3, ratio=2), make_input((2, 5, 7, 12))
    heads = torch.tensor([2, 0, 1])
    channels = torch.arange(12).reshape(3, 4)[heads].flatten()
    strips = {f"{name}_{kind}": getattr(getattr(attn, name), kind)[heads] for name in "qk" for kind in WEIGHTS}
    values = {f"v_{kind}": getattr(attn.v, kind)[channels] for kind in WEIGHTS}
    values["proj_weight"] = attn.proj.weight[:, channels]
    assert error(changed(attn, **strips, **values)(x), attn(x)) < 1e-12
    assert error(changed(attn, **strips)(x), attn(x)) > 1e-3


@torch.no_grad()
def test_equal_keys_give_the_mean_of_the_values():
    attn, x = attention(12, 3), make_input((2, 5, 7, 12))
    attn.k.weight.zero_()
    expected = attn.proj(attn.v(x).mean((1, 2), keepdim=True)).expand_as(x)
    assert error(attn(x), expected) < 1e-12


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_a_single_token_gets_its_projected_value(heads):
    attn, x = attention(12, heads), make_input((2, 1, 1, 12))
    assert error(attn(x), attn.proj(attn.v(x))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_logits_keep_float32_under_autocast(dtype):
    attn, x = attention(12, 3), make_input((2, 5, 7, 12)).to(dtype)
    attn.q.weight.mul_(100)  # logits beyond float16, and of differences that bfloat16 has no digits for
    attn.k.weight.mul_(100)
    expected = attn(x.double())
    with torch.autocast("cpu", dtype):
        ours = attn.float()(x)
    assert error(ours.double(), expected) < 0.05


@torch.no_grad()
def test_model_in_bfloat16_gives_finite_maps_of_its_dtype():
    maps = built(SMALL, features_only=True).bfloat16().eval()(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in maps)


# Initialisation, weight decay, drop path


def test_initial_weights_have_their_distributions():
    torch.manual_seed(0)
    model = timm.create_model("s2aformer_mini").requires_grad_(False)
    for key, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias is None or not module.bias.any(), key
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert module.weight.eq(1).all(), key
            assert not module.bias.any(), key
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        weight = module.weight
        if key.endswith(("attn.q", "attn.k")):
            expected = module.in_features**-0.5
        elif isinstance(module, nn.Linear) or key.endswith("lpu"):
            expected = 0.02
        else:
            expected = (2 / (weight[0, 0].numel() * module.out_channels / module.groups)) ** 0.5
        assert weight.std() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5), key
        assert weight.numel() < 10_000 or weight.abs().max() > 3 * expected, f"{key} is cut off at a few deviations"


@torch.no_grad()
def test_map_does_not_grow_along_the_initial_blocks():
    torch.manual_seed(0)
    maps = timm.create_model("s2aformer_t", features_only=True)(torch.randn(2, 3, 64, 64))
    assert all(m.std() < 10 for m in maps)


def test_reset_classifier_has_the_initial_distribution_again():
    model = built(SMALL, head_hidden_size=1280)
    model.reset_classifier(100)
    assert model.head.fc.weight.detach().std() == pytest.approx(0.02, rel=0.02)
    assert not model.head.fc.bias.any()


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_weight_decay_spares_vectors_alone(dense):
    with torch.device("meta"):
        model = built(SMALL, dense=dense)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1}


def test_drop_path_rate_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("s2aformer_t", drop_path_rate=0.38)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.38 * k / 19 for k in range(20)])


def test_drop_path_spares_the_depthwise_residual():
    block, x = Block(8, 2, 2, 2, drop_path=1.0).train(), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), block.lpu(x))


def test_drop_path_draws_for_every_sample_and_branch():
    torch.manual_seed(0)
    block = Block(8, 2, 2, 2, drop_path=0.5).double().train()
    out = block(make_input((1, 8, 4, 4)).expand(128, -1, -1, -1)).flatten(1)
    kinds = {tuple(row) for row in out.mul(1e6).round().long().tolist()}
    assert len(kinds) == 8


# Dense mode


@torch.no_grad()
def test_dense_maps_are_norms_of_the_classifiers_maps():
    dense = ported(replace(SMALL, dense=True))
    plain = ported(SMALL)
    x = make_input((1, 3, 70, 101))
    raw = plain.forward_intermediates(x, intermediates_only=True)
    for norm, m, expected in zip(
        dense.norms, dense.forward_intermediates(x, intermediates_only=True), raw, strict=True
    ):
        assert norm.eps == 1e-6
        assert error(m, norm(expected)) < 1e-12


def test_classifier_checkpoint_loads_into_dense_model():
    state = fill_state_dict(state_dict_shapes(SMALL, CLASSES))
    dense = built(replace(SMALL, dense=True)).double()
    loaded = checkpoint_filter_fn(state, dense)
    assert {key for key in loaded if key not in state} == {f"norms.{i}.{kind}" for i in range(4) for kind in WEIGHTS}
    assert {key for key in state if key not in loaded} == {key for key in state if key.startswith("head.")}
