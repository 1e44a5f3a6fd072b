"""Clean passes shared by points that see the same: one window, one mask, one prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cwm_jax.counterfactual import multimask
from cwm_jax.types import Prediction


def first_alike(windows: Int[Array, "k d"], masks: Bool[Array, "k m 2 gh gw"]) -> Int[Array, "k m"]:
  """For each (point, mask), the first point with an equal window and an equal mask of that number.

  Args:
    windows: what tells the points' frames apart: pair, corners.
    masks: each point's masks, in one order.
  """
  window = jnp.all(windows[:, None] == windows[None], axis=-1)
  mask = jnp.all(masks[:, None] == masks[None], axis=(3, 4, 5))
  # Every point is like itself, so there is a first one; argmax takes it.
  return jnp.argmax(window[..., None] & mask, axis=1).astype(jnp.int32)


def clean_predictions(
  predict_fn: multimask.PredictFn,
  frames: Float[Array, "k 2 h w 3"],
  masks: Bool[Array, "k m 2 gh gw"],
  windows: Int[Array, "k d"],
  valid: Bool[Array, " k"],
  *,
  chunk: int,
  points_xy: Float[Array, "k 2"] | None,
) -> tuple[Prediction, Int[Array, "k m"]]:
  """`multimask.clean_predictions` of each point's own frames, with no pass done twice.

  All of a pass's tokens would take several times the bytes of its image; of each are kept those
  that a point may read.

  Args:
    frames: what the predictor sees for each point; equal where `windows` are.
    masks: each point's masks.
    windows: equal rows see equal frames.
    valid: False for padding.
    chunk: passes a step; steps without a pass that is needed are skipped.
    points_xy: where in its frame each point lies, pixels; None where no mark reads the tokens.

  Returns:
    Predictions: image [k * m, h, w, 3], tokens [k * m, k, C], those of every point's patch, or
    None; and for each point and mask the place of its own. See `own_predictions`.
  """
  k, m = masks.shape[:2]
  # Padding never stands for a real point: its window is like no other.
  windows = jnp.concatenate([windows, jnp.where(valid, -1, jnp.arange(k))[:, None]], axis=1)
  alike = first_alike(windows, masks)
  needed = ((alike == jnp.arange(k)[:, None]) & valid[:, None]).reshape(-1)
  order = jnp.argsort(~needed)
  place = jnp.zeros(k * m, jnp.int32).at[order].set(jnp.arange(k * m, dtype=jnp.int32))

  def predict(item):
    prediction = predict_fn(frames[item // m], masks[item // m, item % m])
    if points_xy is None or prediction.tokens is None:
      return prediction._replace(tokens=None)
    row, col = multimask.cells_yx(points_xy, frames.shape[2:4], prediction.tokens.shape[1:3]).T
    return prediction._replace(tokens=prediction.tokens[:, row, col])

  predictions = multimask.map_chunks(predict, order, needed[order], chunk=chunk)
  return jax.lax.stop_gradient(predictions), place[alike * m + jnp.arange(m)]


def own_predictions(
  clean: Prediction, place: Int[Array, "k m"], chosen: Int[Array, " c"]
) -> Prediction:
  """The predictions of some of the points from what `clean_predictions` returned.

  Args:
    chosen: the points' numbers.

  Returns:
    image [c, m, h, w, 3]; tokens [c, m, 1, 1, C], each point's own as a grid of one cell, or None.
  """
  at = place[chosen]
  tokens = None
  if clean.tokens is not None:
    tokens = clean.tokens[at, chosen[:, None]][:, :, None, None]
  return Prediction(clean.image[at], tokens)
