"""The bridge to mmdet and mmseg, whose packages are imported below here only.

Importing this package registers `EffBackbone` and `EffOptimWrapperConstructor` in mmengine's root registries, where
both find them: `custom_imports = dict(imports=['effbackbones.mm'])` in an mm config is all it takes.
"""

import contextlib
import io
import warnings

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    # They announce optional packages that are not there.
    warnings.simplefilter("ignore")
    import mmdet.datasets
    import mmdet.evaluation  # noqa: F401
    import mmseg.datasets  # noqa: F401

from effbackbones.mm.backbone import EffBackbone
from effbackbones.mm.optim import EffOptimWrapperConstructor

__all__ = ["EffBackbone", "EffOptimWrapperConstructor"]
