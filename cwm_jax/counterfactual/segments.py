"""Segments: move one patch of a still picture, and see what moves with it.

An example of a counterfactual of one's own; segments.md beside this file takes it apart.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.counterfactual.multimask import PredictFn

MOVES = tuple(move for move in itertools.product((-1, 0, 1), repeat=2) if any(move))


def moves_along(
  predict_fn: PredictFn,
  frames: Float[Array, "2 h w 3"],
  masks: Bool[Array, "m 2 gh gw"],
  point_xy: Float[Array, " 2"],
  *,
  patch: int,
  reach: float = 0.35,
  moves: tuple[tuple[int, int], ...] = MOVES,
) -> Float[Array, "h w"]:
  """How much better each pixel of frame 1 is explained by moving along than by staying.

  Frame 2 is frame 1 with the point's patch moved by one of `moves`. Far from the point some patches
  are shown as they are; near it nothing but the moved one. If the predictor knows objects, it moves
  the rest of the point's object too.

  Args:
    frames: normalised; only frame 1 is looked at.
    masks: how many patches are shown is theirs, and which of the far ones.
    point_xy: continuous (x, y), pixels of the predictor's image.
    patch: side of a patch, pixels.
    reach: patches nearer than this share of the image's longer side are hidden.
    moves: (rows, columns), in patches.

  Returns:
    Averaged over masks and moves, normalised units: above 0 where a pixel moves along.
  """
  first, (gh, gw) = frames[0], masks.shape[-2:]
  row, col = geometry.point_to_index_yx(point_xy, first.shape[:2]) // patch
  rows, cols = jnp.arange(gh)[:, None], jnp.arange(gw)[None]
  far = jnp.hypot(rows - row, cols - col) > reach * max(gh, gw)
  shown = jnp.sum(~masks[0, 1])

  def ask(mask, move):
    to_row, to_col = jnp.clip(row + move[0], 0, gh - 1), jnp.clip(col + move[1], 0, gw - 1)
    shift = jnp.stack([to_row - row, to_col - col]) * patch
    # As many are shown as before: the moved patch first, then far ones that the mask shows, far
    # ones that it hides, and near ones only where nothing else is left.
    moved = (rows == to_row) & (cols == to_col)
    order = jnp.where(moved, 0, jnp.where(far, jnp.where(mask[1], 2, 1), 3)).reshape(-1)
    rank = jnp.argsort(jnp.argsort(order, stable=True), stable=True).reshape(gh, gw)
    hidden = jnp.stack([jnp.zeros((gh, gw), bool), rank >= shown])
    along = jnp.roll(first, shift, axis=(0, 1))
    second = jnp.where(masks_lib.patches_to_pixels(moved, patch)[..., None], along, first)
    predicted = predict_fn(jnp.stack([first, second])[None], hidden[None]).image[0]
    unknown = masks_lib.patches_to_pixels(hidden[1], patch)
    predicted = jnp.where(unknown[..., None], predicted, second)
    stays = jnp.sum(jnp.abs(predicted - first), axis=-1)
    goes = jnp.sum(jnp.abs(jnp.roll(predicted, -shift, axis=(0, 1)) - first), axis=-1)
    return stays - goes

  pairs = jnp.arange(len(masks) * len(moves))
  table = jnp.array(moves)
  scores = jax.lax.map(lambda i: ask(masks[i // len(moves)], table[i % len(moves)]), pairs)
  return jnp.mean(scores, axis=0)
