"""What the tests of the kernels share."""

from typing import Any

import pytest

pytest.importorskip("triton")
interpreter: Any = pytest.importorskip("triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _scalars_of_arrays(monkeypatch):
    """Triton's interpreter (3.6) makes bounds of loops of arrays with a dim, which numpy (2.4) refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
