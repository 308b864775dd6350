"""The zoo. Importing this module registers every model in timm."""

from effbackbones.models import gc_vit, s2aformer, sg_former, stvit, stvit_r, transnext, uniformer

__all__ = ["gc_vit", "s2aformer", "sg_former", "stvit", "stvit_r", "transnext", "uniformer"]
