"""The zoo. Importing this module registers every model in timm."""

from effbackbones.models import stvit, uniformer

__all__ = ["stvit", "uniformer"]
