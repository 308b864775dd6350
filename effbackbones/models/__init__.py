"""The zoo. Importing this module registers every model in timm."""

from effbackbones.models import s2aformer, sg_former, stvit, uniformer

__all__ = ["s2aformer", "sg_former", "stvit", "uniformer"]
