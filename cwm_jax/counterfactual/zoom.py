"""Multi-scale refinement: ask again inside smaller and smaller windows round the last answer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import PointFlow


def crop_sizes(video_hw: tuple[int, int], rounds: int, *, shrink: float = 0.75) -> list[int]:
  """Side of each round's square window: the video's shorter side, then x `shrink`, truncated."""
  sizes = [min(video_hw)]
  while len(sizes) < rounds:
    sizes.append(max(1, int(shrink * sizes[-1])))
  return sizes[:rounds]


def window_corner_xy(
  centre_xy: Float[Array, "*n 2"], size: Float[Array, ""], video_hw: tuple[int, int]
) -> Float[Array, "*n 2"]:
  """Upper left corner of a window of side `size` round a point, shifted to stay in the video."""
  corner = jnp.floor(centre_xy) - jnp.floor(size / 2)
  return jnp.clip(corner, 0, jnp.array(video_hw[::-1]) - size)


def refine(
  predict_fn: multimask.PredictFn,
  mark: Any,
  pairs: UInt8[Array, "p 2 H W 3"],
  masks: Bool[Array, "m 2 gh gw"],
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  guess_xy: Float[Array, "n 2"],
  size: Float[Array, ""],
  valid: Bool[Array, " n"],
  *,
  image_hw: tuple[int, int],
  plan: multimask.Plan,
  keep_tokens: bool,
  readout: str,
  **settings: Any,
) -> PointFlow:
  """One round: crops of both frames, new clean and marked passes, the answer in video pixels.

  Frame 1 is cropped round the point and frame 2 round the guess. The 3 x 3 patches round the guess
  are hidden in every mask. The window's size is an argument of the compiled program, not a constant
  of it, so that all rounds share one program.

  Args:
    pairs: both frames of each pair in video pixels, RGB 0 to 255.
    points_xy: what is asked about; continuous (x, y), video pixels.
    guess_xy: the answer so far; same.
    size: side of the window in video pixels.
    valid: False for padding.
    image_hw: what the predictor sees.
    keep_tokens: whether the mark reads the encoder's tokens.
    **settings: order, average, inverse_temperature, occlusion_threshold; see `flow.flow_points`.
  """
  video_hw = pairs.shape[2:4]
  h, w = image_hw
  grid = jnp.array(masks.shape[-2:])
  scale = jnp.array([w, h], jnp.float32) / size

  def crop(frames, corners):
    resize = jax.vmap(lambda f, c: geometry.crop_resize(f, c, size, image_hw))
    return geometry.normalise(resize(frames.astype(jnp.float32) / 255.0, corners))

  def step(items):
    pair, points, guesses = items
    corner1 = window_corner_xy(points, size, video_hw)
    corner2 = window_corner_xy(guesses, size, video_hw)
    frames = jnp.stack([crop(pairs[pair, 0], corner1), crop(pairs[pair, 1], corner2)], axis=1)
    asked, guessed = (points - corner1) * scale, (guesses - corner2) * scale
    patch = (guessed[:, ::-1] * grid / jnp.array(image_hw)).astype(jnp.int32)
    patch = jnp.clip(patch, 0, grid - 1)
    own_masks = jax.vmap(lambda rc: masks_lib.hide_neighbourhood(masks, rc))(patch)
    everything = jnp.ones(points.shape[0], bool)
    clean = multimask.clean_predictions(
      predict_fn, frames, own_masks, everything, chunk=plan.clean, keep_tokens=keep_tokens
    )
    answer = flow.respond_and_read(
      predict_fn, mark, frames, own_masks, clean, asked, plan=plan, readout=readout, **settings
    )
    return answer._replace(xy=answer.xy / scale + corner2)

  return multimask.map_chunks(step, (pair_of, points_xy, guess_xy), valid, chunk=plan.points)
