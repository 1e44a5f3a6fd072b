"""A joint training small enough for tests: a random predictor of 16 x 16 pixels, 2 queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tiny_model

from cwm_jax import models
from cwm_jax.configs import base
from cwm_jax.pretrained import weights


def weights_file(folder: Path, **changes: Any) -> Path:
  """A weights file of the tiny predictor with random parameters; `changes` to its model section."""
  model = tiny_model.config(**changes)
  (h, w), patch = model["image_hw"], model["patch"]
  mask = jnp.zeros((1, 2, h // patch, w // patch), bool)
  init = jax.jit(models.build(model).init, static_argnames="num_visible")
  frames = jnp.zeros((1, 2, h, w, 3))
  params = init(jax.random.key(7), frames, mask, num_visible=mask.size)["params"]
  mark = {"kind": "gaussian", "sigma": 1.0, "amplitude": 0.5}
  return weights.save(folder / f"predictor-{h}.safetensors", params, dict(model=model, mark=mark))


def get_config(predictor: Path, **changes: Any):
  """A job on that predictor; `changes` by dotted keys with '__' for '.'."""
  c = base.get_config()
  c.task = "joint"
  c.total = "3 steps"
  c.joint.update(weights=str(predictor), num_points=2)
  c.perturber.update(hidden_width=8, size=5)
  c.flow_predictor.patch = 4
  c.flow_predictor.single.update(width=16, depth=1, heads=2)
  c.optim.update(peak_lr=1e-3, freeze="^predictor/")
  c.data.batch_size = 2
  c.data.sources.scenes.update(
    first_seed=1000, curriculum=((0, "shifts"),), max_objects=1, texture_size=16
  )
  c.log.update(every="1 steps", eval_every="0 steps", images_every="0 steps", eval_scenes=0)
  c.checkpoint.every = "0 steps"
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c
