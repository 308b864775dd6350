"""The choice between the operators' references and their fast paths."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_ENV = "EFFBACKBONES_OPS"
_NAMES = ("auto", "reference")


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_NAMES)}")
    return name


_choice = _checked(os.environ.get(_ENV, "auto"), f"environment variable {_ENV}")


@contextmanager
def ops_backend(name: str) -> Iterator[None]:
    """Force the operators' path within the block: auto or reference.

    Raises ValueError for another name. The choice is one of the process, not of the thread.
    """
    global _choice
    before, _choice = _choice, _checked(name, "the operators' backend")
    try:
        yield
    finally:
        _choice = before


def use_reference() -> bool:
    """Return whether the references are forced."""
    return _choice == "reference"
