"""Models of the zoo with few blocks, and narrow ones."""

from typing import Any

_NARROW: dict[str, dict[str, Any]] = {  # by how names begin
    "uniformer_x": {"dims": (28, 56, 112, 168), "head_dim": 28},
    "uniformer_": {"dims": (32, 64, 128, 160), "head_dim": 32},
    "gc_vit_": {"dim": 32, "num_heads": (1, 2, 4, 8)},
    "transnext_": {"dims": (24, 48, 96, 144)},
    "s2aformer_": {"dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)},
    "sgformer_": {"dims": (32, 64, 128, 160), "heads": (2, 2, 4, 5)},
    "stvit_r_": {"dims": (32, 64, 128, 256)},
    "stvit_": {"dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)},
}


def depths(name: str, compiled: bool = False) -> tuple[int, ...]:
    """Return the blocks of a cut model; `compiled`: fewer, where the family has fewer, for what takes long."""
    if name.startswith("stvit_r_"):
        return (1, 1, 6, 1) if compiled else (2, 2, 6, 2)  # a unit has six blocks
    if name.startswith("sgformer_"):
        return (2, 2, 2, 1) if compiled else (2, 2, 2, 2)  # hybrid and guided blocks come in pairs
    return (1, 1, 2, 1) if compiled else (2, 2, 2, 2)


def small(name: str, compiled: bool = False) -> dict[str, Any]:
    """Return the arguments of a model cut in depth, as by `depths`, and in width."""
    narrow = next(args for start, args in _NARROW.items() if name.startswith(start))
    return {"depths": depths(name, compiled), **narrow}
