"""Published figures: the one table that `effb ls`, the README and the tests read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row: a model at one image size.

    Attributes:
        model: Registered name.
        size: Side of the image, pixels.
        params: Parameters of the model as it trains and classifies, exact.
        gmacs: Multiply-adds of one image in 1e9: convolutions, linear layers and attention products, our count.
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
_SGFORMER = "SG-Former paper (arXiv 2308.12216)"
_SGFORMER_QUOTED = f"{_SGFORMER}, as quoted by arXiv 2405.07992"
_TL = "trained by token labelling"
_STVIT = "hhb072/STViT README"

_S2AFORMER = "arXiv 2505.22195v1 as transcribed in igm503/heedless-backbones"


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
    Published("stvit_small", 224, 25_495_624, 4.34, 83.6, _STVIT),
    Published("stvit_small", 384, 25_495_624, 14.08, 85.0, _STVIT),
    Published("stvit_base", 224, 51_691_288, 9.82, 84.8, _STVIT),
    Published("stvit_base", 384, 51_691_288, 31.35, 86.0, _STVIT, "32.5 GFLOPs published"),
    Published("stvit_large", 224, 94_971_096, 15.54, 85.3, _STVIT),
    Published("stvit_large", 384, 94_971_096, 49.58, 86.4, _STVIT),
    Published("sgformer_s", 224, 22_545_981, 4.78, 83.2, _SGFORMER_QUOTED),
    Published("sgformer_m", 224, 38_689_316, 7.43, 84.1, _SGFORMER_QUOTED),
    Published("sgformer_b", 224, 77_950_293, 15.54, 84.7, _SGFORMER),
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
)
