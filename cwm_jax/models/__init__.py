"""Networks. `build(config.model)` is the one way from a config to a module."""

from __future__ import annotations

from typing import Any


def build(model: Any):
  """Makes the predictor that `config.model` describes.

  Args:
    model: mapping with the keys of `configs/base.py`'s `model` section.

  Raises:
    ValueError: a size or dtype that cannot be built.
  """
  import jax.numpy as jnp

  from cwm_jax.models.predictor import Predictor

  dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  if model["dtype"] not in dtypes:
    raise ValueError(f"model.dtype is {model['dtype']!r}; choose one of {', '.join(dtypes)}")
  h, w = model["image_hw"]
  keys = (
    "patch masking positions encoder_width encoder_depth encoder_heads decoder_width decoder_depth "
    "decoder_heads mlp_ratio context attention_impl remat"
  ).split()
  named = {key: model[key] for key in keys}
  named["attention_impl"] = named["attention_impl"] or None
  grid_hw = (h // model["patch"], w // model["patch"])
  # Rotary positions belong to no grid, and weights files that have them need not name one.
  if model["positions"] != "rotary" and model["positions_hw"]:
    grid_hw = tuple(model["positions_hw"])
  return Predictor(grid_hw=grid_hw, dtype=dtypes[model["dtype"]], **named)
