"""Models of the zoo with few blocks."""


def depths(name: str, compiled: bool = False) -> tuple[int, ...]:
    """Return the blocks of a cut model; `compiled`: fewer, where the family has fewer, for what takes long."""
    if name.startswith("stvit_r_"):
        return (1, 1, 6, 1) if compiled else (2, 2, 6, 2)  # a unit has six blocks
    if name.startswith("sgformer_"):
        return (2, 2, 2, 1) if compiled else (2, 2, 2, 2)  # hybrid and guided blocks come in pairs
    return (1, 1, 2, 1) if compiled else (2, 2, 2, 2)
