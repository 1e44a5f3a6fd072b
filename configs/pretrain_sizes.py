"""Predictors of every size on procedural scenes, by name, from tiny to ViT-L.

python -m cwm_jax.main --config configs/pretrain_sizes.py:small --workdir /tmp/small
Sizes: tiny, small, base, large (default small). One GPU up to base; several (mesh.fsdp) for large.
Not yet measured on a GPU; on CPU only tiny is of use.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base

# Name: image side, patch, encoder (width, depth, heads), decoder (width, depth, heads).
SIZES = {
  "tiny": (32, 4, (128, 4, 8), (128, 3, 8)),
  "small": (128, 8, (384, 12, 6), (192, 4, 3)),
  "base": (256, 8, (768, 12, 12), (384, 4, 6)),
  "large": (256, 8, (1024, 24, 16), (512, 8, 8)),
}


def resize(model: ConfigDict, size: str) -> None:
  """Sets the sizes of a config's `model` section.

  Raises:
    ValueError: an unknown size.
  """
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
  side, patch, encoder, decoder = SIZES[size]
  model.update(image_hw=(side, side), patch=patch)
  model.encoder_width, model.encoder_depth, model.encoder_heads = encoder
  model.decoder_width, model.decoder_depth, model.decoder_heads = decoder


def get_config(arg: str = "small") -> ConfigDict:
  c = base.get_config()
  resize(c.model, arg or "small")
  c.model.positions = "rotary"
  c.total = "10e6 examples"
  c.optim.update(warmup="2000 steps", clip_norm=1.0, scale_lr=True, peak_lr=6e-4)
  c.data.batch_size = 256
  if arg != "tiny":
    c.model.update(dtype="bfloat16", mask_ratio=0.9)
    c.data.num_workers = 4
  return c
