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
  keep_tokens: bool,
) -> tuple[Prediction, Int[Array, "k m"]]:
  """`multimask.clean_predictions` of each point's own frames, with no pass done twice.

  Args:
    frames: what the predictor sees for each point; equal where `windows` are.
    masks: each point's masks.
    windows: equal rows see equal frames.
    valid: False for padding.
    chunk: passes a step; steps without a pass that is needed are skipped.
    keep_tokens: whether a mark reads the tokens.

  Returns:
    Predictions with a leading axis [k * m], and for each point and mask the place of its own.
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
    return prediction if keep_tokens else prediction._replace(tokens=None)

  predictions = multimask.map_chunks(predict, order, needed[order], chunk=chunk)
  return jax.lax.stop_gradient(predictions), place[alike * m + jnp.arange(m)]
