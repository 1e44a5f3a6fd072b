"""A tiny predictor on procedural scenes, on two CPU cores.

python -m cwm_jax.main --config configs/pretrain_tiny.py --workdir /tmp/tiny
Two CPU cores: about 600 pairs/s at 32 x 32. `:runlocal` shrinks it to a minute.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config()
  c.total = "3e6 examples"
  c.model.update(
    image_hw=(32, 32),
    patch=4,
    mask_ratio=0.75,
    positions="rotary",
    encoder_width=128,
    encoder_depth=4,
    encoder_heads=8,
    decoder_width=128,
    decoder_depth=3,
    decoder_heads=8,
  )
  c.optim.update(peak_lr=2e-3, warmup="200 steps", clip_norm=1.0)
  c.data.batch_size = 64
  c.data.sources.scenes.curriculum = (
    (0, "patch_shifts"),
    (200_000, "shifts"),
    (400_000, "sprites"),
  )
  c.log.update(every="50 steps", eval_every="1000 steps", images_every="1000 steps")
  c.checkpoint.every = "1000 steps"
  if arg == "runlocal":
    c.total = "20 steps"
    c.data.batch_size = 8
    c.model.update(encoder_depth=1, decoder_depth=1)
    c.optim.warmup = "5 steps"
    c.log.every = "5 steps"
  return c
