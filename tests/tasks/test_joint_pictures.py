"""What the pictures of a joint training show, and of which query."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import joint_job
import numpy as np

from cwm_jax import geometry, tasks
from cwm_jax.counterfactual import flow
from cwm_jax.types import FramePair

FACTOR = 5  # 28 pixels are shown at about 128
# Of each colour: on its pixel, narrow, seen well.
NUMBERS = (0.0, 0.0, -0.5, -0.5, 0.0, 0.9)


def with_a_known_mark(params):
  """Parameters whose mark is the same whatever the token."""
  norm = params["perturber"]["norm3"]
  bias = jnp.arctanh(jnp.tile(jnp.array(NUMBERS), 3))
  norm = {"scale": jnp.zeros_like(norm["scale"]), "bias": bias}
  return {**params, "perturber": {**params["perturber"], "norm3": norm}}


def windows(task, params, frames, keys):
  """16 pixels round each pair's first query, with the mark and without."""
  seen = task.as_seen(geometry.normalise(frames))
  placed = flow.place_points(task.queries(keys)[:, 0], (28, 28), (32, 32), protocol="release")
  token = jnp.zeros(params["perturber"]["fc1"]["kernel"].shape[0])
  marked = jax.vmap(lambda image, point: task.mark(params)(image, point, token))(seen[:, 0], placed)
  side = jnp.float32(16)
  near = jax.vmap(lambda image, point: geometry.crop_resize(image, point - 8, side, (28, 28)))
  window, bare = (near(geometry.unnormalise(x), placed) for x in (marked, seen[:, 0]))
  return jnp.clip(window, 0.0, 1.0), jnp.clip(bare, 0.0, 1.0)


def test_a_strip_shows_the_frames_and_the_first_query_s_mark_as_the_loss_lays_it(tmp_path):
  predictor = joint_job.weights_file(tmp_path, image_hw=[32, 32])
  # Of this protocol most places are another pixel than the scaled point's.
  changes = dict(joint__protocol="release", joint__average="release", joint__image_hw=(28, 28))
  task = tasks.build(joint_job.get_config(predictor, **changes))
  params = with_a_known_mark(jax.jit(task.init)(jax.random.key(0)))
  frames = jnp.asarray(np.random.default_rng(0).random((3, 2, 28, 28, 3), np.float32))
  keys = jax.random.split(jax.random.key(1), 3)
  strip = jax.jit(lambda params: task.pictures(params, FramePair(frames), keys)["joint"])(params)
  tiles = np.asarray(strip).reshape(3, 28, FACTOR, 5, 28, FACTOR, 3)[:, :, 0, :, :, 0]
  first, near, _, predicted, second = np.moveaxis(tiles, 2, 0)
  np.testing.assert_array_equal(first, frames[:, 0])
  np.testing.assert_array_equal(second, frames[:, 1])
  # Psi-flow begins as a copy of frame 1.
  np.testing.assert_allclose(predicted, first, atol=1e-5)

  window, bare = jax.jit(partial(windows, task))(params, frames, keys)
  np.testing.assert_allclose(near, window, atol=1e-5)
  rows, columns = np.nonzero((np.abs(near - bare) > 1e-4).any((0, 3)))
  assert 14 in rows and 14 in columns and {*rows, *columns} <= {*range(8, 20)}
