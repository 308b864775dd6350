"""Published figures: the one table that `effb ls`, the README and the tests read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row: a model at one image size.

    Attributes:
        model: Registered name.
        size: Side of the image, pixels.
        params: Parameters of the model as it trains and classifies, exact.
        gmacs: Multiply-adds of one image in 1e9: convolutions, linear layers and attention products, our count of what
            the model computes, which may be less than what the release computes for the same numbers.
        top1: Published ImageNet-1K top-1 accuracy, percent; None where none was published.
        source: Where top1 is published.
        note: What to know about the row.
    """

    model: str
    size: int
    params: int
    gmacs: float
    top1: float | None
    source: str
    note: str = ""


_UNIFORMER = "Sense-X/UniFormer README"
_TL = "trained by token labelling"
_GC_VIT = "NVlabs/GCVit README"
_21K = "pre-trained on ImageNet-21K"
_TRANSNEXT = "DaiShiResearch/TransNeXt README"
_S2AFORMER = "arXiv 2505.22195v1 as transcribed in igm503/heedless-backbones"
_SGFORMER = "SG-Former paper (arXiv 2308.12216)"
_SGFORMER_QUOTED = f"{_SGFORMER}, as quoted by arXiv 2405.07992"
_STVIT = "hhb072/STViT README"
_STVIT_R = "changsn/STViT-R README"


def _s2aformer(gmacs: str) -> str:
    """Return the note of a row of S2AFormer whose published multiply-adds are `gmacs`."""
    return (
        "no official code or weights: our reading of the paper, top-1 is of the authors' model; "
        f"{gmacs} GMACs published, without attention products"
    )


ZOO: tuple[Published, ...] = (
    Published("uniformer_xxs", 128, 10_215_280, 0.42, 76.8, _UNIFORMER),
    Published("uniformer_xxs", 160, 10_215_280, 0.66, 79.1, _UNIFORMER),
    Published("uniformer_xxs", 192, 10_215_280, 0.95, 79.9, _UNIFORMER),
    Published("uniformer_xxs", 224, 10_215_280, 1.30, 80.6, _UNIFORMER),
    Published("uniformer_xs", 192, 16_509_264, 1.42, 81.5, _UNIFORMER),
    Published("uniformer_xs", 224, 16_509_264, 1.93, 82.0, _UNIFORMER),
    Published("uniformer_small", 224, 21_545_256, 3.63, 82.9, _UNIFORMER),
    Published("uniformer_small_plus", 224, 24_032_552, 4.20, 83.4, _UNIFORMER, "heads of 32"),
    Published("uniformer_small_plus_dim64", 224, 24_032_552, 4.20, 83.4, _UNIFORMER, "heads of 64"),
    Published("uniformer_base", 224, 49_776_552, 8.25, 83.8, _UNIFORMER),
    Published("uniformer_base_ls", 224, 49_796_520, 8.25, 83.9, _UNIFORMER, "layer scale"),
    Published("uniformer_small_tl", 224, 22_058_256, 3.66, 83.4, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_small_tl", 384, 22_058_256, 11.91, 84.6, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_small_dim64_tl", 224, 22_058_256, 3.66, 83.4, _UNIFORMER, f"{_TL}, heads of 64"),
    Published("uniformer_small_plus_tl", 224, 24_545_552, 4.23, 83.9, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_small_plus_tl", 384, 24_545_552, 13.72, 84.9, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_small_plus_dim64_tl", 224, 24_545_552, 4.23, 83.6, _UNIFORMER, f"{_TL}, heads of 64"),
    Published("uniformer_base_tl", 224, 50_289_552, 8.27, 85.1, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_base_tl", 384, 50_289_552, 27.21, 86.0, _UNIFORMER, f"{_TL}, heads of 32"),
    Published("uniformer_base_dim64_tl", 224, 50_289_552, 8.27, 84.8, _UNIFORMER, f"{_TL}, heads of 64"),
    Published(
        "uniformer_large_ls_tl", 224, 100_103_888, 19.71, 85.6, _UNIFORMER, f"{_TL}, layer scale; 12.6 GFLOPs published"
    ),
    Published(
        "uniformer_large_ls_tl", 384, 100_103_888, 62.76, 86.3, _UNIFORMER, f"{_TL}, layer scale; 39.2 GFLOPs published"
    ),
    Published("gc_vit_xxtiny", 224, 11_995_428, 2.12, 79.9, _GC_VIT),
    Published("gc_vit_xtiny", 224, 19_981_294, 2.91, 82.0, _GC_VIT, "2.6 GFLOPs published"),
    Published("gc_vit_tiny", 224, 28_221_974, 4.76, 83.5, _GC_VIT),
    Published("gc_vit_tiny2", 224, 34_535_654, 6.18, 83.7, _GC_VIT, "5.5 GFLOPs published"),
    Published("gc_vit_small", 224, 51_092_173, 8.53, 84.3, _GC_VIT, "layer scale"),
    Published("gc_vit_small2", 224, 68_615_197, 11.54, 84.8, _GC_VIT, "layer scale; 10.7 GFLOPs published"),
    Published("gc_vit_base", 224, 90_320_836, 14.82, 85.0, _GC_VIT, "layer scale; 85.9 in the README's introduction"),
    Published("gc_vit_large", 224, 202_075_570, 32.55, 85.7, _GC_VIT, "layer scale"),
    Published("gc_vit_large_224_21k", 224, 202_075_570, 32.55, 86.6, _GC_VIT, f"layer scale; {_21K}"),
    Published(
        "gc_vit_large_384_21k",
        384,
        202_860_610,
        103.94,
        87.4,
        _GC_VIT,
        f"layer scale; {_21K}; 120.4 GFLOPs published",
    ),
    Published(
        "gc_vit_large_512_21k",
        512,
        203_795_362,
        202.14,
        87.6,
        _GC_VIT,
        f"layer scale; {_21K}; 245.0 GFLOPs published",
    ),
    Published("transnext_micro", 224, 12_809_304, 2.59, 82.5, _TRANSNEXT, "2.65 GMACs as released"),
    Published("transnext_tiny", 224, 28_258_960, 5.65, 84.0, _TRANSNEXT),
    Published("transnext_small", 224, 49_741_564, 10.15, 84.7, _TRANSNEXT),
    Published("transnext_small", 384, 49_741_564, 31.60, 86.0, _TRANSNEXT, "fine-tuned from 224"),
    Published("transnext_base", 224, 89_721_496, 18.14, 84.8, _TRANSNEXT),
    Published("transnext_base", 384, 89_721_496, 55.71, 86.2, _TRANSNEXT, "fine-tuned from 224"),
    Published("transnext_micro_AAAA", 256, 13_114_008, 3.26, 82.6, _TRANSNEXT, "pooled attention in all stages"),
    Published("s2aformer_mini", 224, 5_015_836, 0.439, 75.1, _S2AFORMER, _s2aformer("0.43")),
    Published("s2aformer_mini", 256, 5_015_836, 0.579, 75.7, _S2AFORMER, _s2aformer("0.56")),
    Published("s2aformer_t", 224, 5_801_770, 0.665, 77.7, _S2AFORMER, _s2aformer("0.655")),
    Published("s2aformer_t", 256, 5_801_770, 0.883, 78.3, _S2AFORMER, _s2aformer("0.855")),
    Published("s2aformer_xs", 224, 6_536_084, 0.804, 78.9, _S2AFORMER, _s2aformer("0.786")),
    Published("s2aformer_xs", 256, 6_536_084, 1.06, 79.3, _S2AFORMER, _s2aformer("1.03")),
    Published("s2aformer_s", 224, 10_685_534, 1.40, 80.8, _S2AFORMER, _s2aformer("1.38")),
    Published("s2aformer_s", 256, 10_685_534, 1.85, 81.3, _S2AFORMER, _s2aformer("1.80")),
    Published("s2aformer_m", 224, 24_868_254, 4.14, 82.3, _S2AFORMER, _s2aformer("4.12")),
    Published("s2aformer_m", 256, 24_868_254, 5.45, 82.7, _S2AFORMER, _s2aformer("5.38")),
    Published("sgformer_s", 224, 22_545_981, 4.78, 83.2, _SGFORMER_QUOTED),
    Published("sgformer_m", 224, 38_689_316, 7.43, 84.1, _SGFORMER_QUOTED),
    Published("sgformer_b", 224, 77_950_293, 15.54, 84.7, _SGFORMER),
    Published("stvit_small", 224, 25_495_624, 4.34, 83.6, _STVIT),
    Published("stvit_small", 384, 25_495_624, 14.08, 85.0, _STVIT),
    Published("stvit_base", 224, 51_691_288, 9.82, 84.8, _STVIT),
    Published("stvit_base", 384, 51_691_288, 31.35, 86.0, _STVIT, "32.5 GFLOPs published"),
    Published("stvit_large", 224, 94_971_096, 15.54, 85.3, _STVIT),
    Published("stvit_large", 384, 94_971_096, 49.58, 86.4, _STVIT),
    Published(
        "stvit_r_swin_tiny",
        224,
        28_320_214,
        3.54,
        None,
        "",
        "3.60 GMACs as released, which has its configuration only, no result",
    ),
    Published(
        "stvit_r_swin_small",
        224,
        49_625_518,
        5.63,
        82.7,
        _STVIT_R,
        "5.80 GMACs as released; 82.65 in its log, 82.43 in a user's retraining",
    ),
    Published(
        "stvit_r_swin_base",
        224,
        87_812_336,
        9.92,
        83.2,
        _STVIT_R,
        "10.23 GMACs as released; 83.21 in its log, 82.72 in a user's retraining",
    ),
)
