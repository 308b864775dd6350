"""Efficient hierarchical vision backbones. Importing this package registers its models in timm."""

from effbackbones import models

__all__ = ["models"]
__version__ = "0.1.0.dev0"
