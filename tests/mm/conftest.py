"""The tests of the mm bridge need its packages, compiled operators included."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


class _Skipped(pytest.Module):
    def collect(self) -> Any:
        pytest.skip("needs the mm extra: onedl-mmcv with its operators, onedl-mmdetection, onedl-mmsegmentation")


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    installed = all(find_spec(name) for name in ("mmcv", "mmdet", "mmseg")) and find_spec("mmcv._ext")
    return None if installed else _Skipped.from_parent(parent, path=module_path)
