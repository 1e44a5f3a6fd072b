"""The smallest networks that still have every part, as sections of a config."""

from __future__ import annotations

from typing import Any


def config(**changes: Any) -> dict[str, Any]:
  """A predictor: a fresh `model` section, with `changes`."""
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


def flow_network() -> dict[str, Any]:
  """A fresh `flow_network` section, to update the base config's with."""
  return dict(
    kind="sea_raft",
    stem_width=4,
    widths=(4, 6, 8),
    depths=(1, 1, 1),
    feature_width=8,
    hidden_width=6,
    context_width=4,
    corr_widths=(8, 6),
    flow_widths=(6, 4),
    motion_width=8,
    head_width=6,
    radius=1,
    levels=2,
    iterations=1,
  )
