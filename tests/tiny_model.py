"""The smallest predictor that still has every part, as the `model` section of a config."""

from __future__ import annotations

from typing import Any


def config(**changes: Any) -> dict[str, Any]:
  """A fresh `model` section, with `changes`."""
  return (
    dict(
      image_hw=[16, 16],
      patch=4,
      mask_ratio=0.75,
      masking="drop",
      positions="rotary",
      encoder_width=16,
      encoder_depth=1,
      encoder_heads=2,
      decoder_width=16,
      decoder_depth=1,
      decoder_heads=2,
      mlp_ratio=2.0,
      context=2,
      dtype="float32",
      attention_impl="",
      attention_dtype="",
      remat="none",
    )
    | changes
  )
