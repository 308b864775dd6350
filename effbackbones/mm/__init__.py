"""The bridge to mmdet and mmseg, whose packages are imported below here only.

Importing this package registers `EffBackbone` and `EffOptimWrapperConstructor` in mmengine's root registries, where
both find them: `custom_imports = dict(imports=['effbackbones.mm'])` in an mm config is all it takes.
"""

from effbackbones.mm.backbone import EffBackbone
from effbackbones.mm.optim import EffOptimWrapperConstructor

__all__ = ["EffBackbone", "EffOptimWrapperConstructor"]
