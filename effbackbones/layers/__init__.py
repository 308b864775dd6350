"""Layers that two or more families share."""

from effbackbones.layers.attention import (
    aligned_bias,
    attend,
    attention_backend,
    attention_report,
    last_backend,
    why_not,
)

__all__ = ["aligned_bias", "attend", "attention_backend", "attention_report", "last_backend", "why_not"]
