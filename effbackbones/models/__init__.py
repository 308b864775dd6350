"""The zoo. Importing this module registers every model in timm."""

from effbackbones.models import uniformer

__all__ = ["uniformer"]
