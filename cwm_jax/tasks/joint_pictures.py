"""What a joint training looks like, as a strip a pair: the paper's Figure 6, a step at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask
from cwm_jax.types import FramePair

_SIDE = 128  # pixels; pictures are enlarged by whole factors to about this
_WINDOW = 4  # the mark is seen in a window of so many patches


def strip(
  task: Any, params: dict[str, Any], pair: FramePair, keys: Array
) -> Float[Array, "b h w 3"]:
  """Frame 1, the mark seen near, the response over frame 2, Psi-flow's frame 2, frame 2.

  The mark and the response are those of each pair's first query, under its first mask.

  Args:
    task: a `joint.Joint`.
    params: its parameters.
    pair: frames float32 [B, 2, H, W, 3], RGB in [0, 1].
    keys: typed keys [B], as the loss has them.
  """
  frames = geometry.normalise(pair.frames)
  points = task.queries(keys)
  found = task.flow(params, frames, points, keys)
  predicted = task.predict_frame2(params, frames[:, 0], points, found.flow_xy)
  seen = task.as_seen(frames)
  query = flow.place_points(points[:, 0], task.image_hw, task.predictor_hw, protocol=task.protocol)
  marked, heat = _respond(task, params, seen, query, keys)
  tiles = [
    pair.frames[:, 0],
    _near(marked, query, _WINDOW * task.predictor.patch, task.image_hw),
    _over(pair.frames[:, 1], geometry.resize(heat[..., None], task.image_hw)),
    predicted,
    pair.frames[:, 1],
  ]
  factor = max(1, round(_SIDE / min(task.image_hw)))
  enlarge = lambda x: jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)  # noqa: E731
  return jnp.clip(jnp.concatenate([enlarge(tile) for tile in tiles], axis=2), 0.0, 1.0)


def _respond(task, params, seen, query, keys):
  """The marked frame 1 (RGB) and the response, of one query a pair under one mask."""
  masks = task.draw_masks(keys)[:, 0, :1]
  predict = task.predict_fn(params)
  clean = predict(seen, masks[:, 0])
  marked = multimask.mark_frames(task.mark(params), seen[:, 0], clean.tokens[:, None], query)
  answer = multimask.marked_predictions(predict, marked, seen[:, 1], masks)[:, 0]
  return geometry.unnormalise(marked[:, 0]), jnp.sum(jnp.abs(answer - clean.image), axis=-1)


def _near(images, points_xy, size, size_hw):
  """A window of `size` pixels round each point, as large as the whole."""

  def one(image, point):
    return geometry.crop_resize(image, point - size / 2, jnp.float32(size), size_hw)

  return jax.vmap(one)(images, points_xy)


def _over(images, heat):
  """Heat [b, h, w, 1] over a dim grey copy of the images: black, red, yellow, white."""
  share = heat / jnp.maximum(jnp.max(heat, axis=(1, 2, 3), keepdims=True), 1e-12)
  colour = jnp.clip(3 * share - jnp.arange(3.0), 0.0, 1.0)
  grey = 0.4 * jnp.mean(images, axis=-1, keepdims=True)
  weight = jnp.sqrt(share)
  return grey * (1 - weight) + colour * weight
