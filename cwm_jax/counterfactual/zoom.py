"""Multi-scale refinement: ask again inside smaller and smaller windows round the last answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask, shared
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import PointFlow


def crop_sizes(video_hw: tuple[int, int], rounds: int, *, shrink: float = 0.75) -> list[int]:
  """Side of each round's square window: the video's shorter side, then x `shrink`, truncated."""
  sizes = [min(video_hw)]
  while len(sizes) < rounds:
    sizes.append(max(1, int(shrink * sizes[-1])))
  return sizes[:rounds]


def window_corner_xy(
  centre_xy: Float[Array, "*n 2"],
  size: Float[Array, ""],
  video_hw: tuple[int, int],
  *,
  inside: tuple[Float[Array, "*n 2"], Float[Array, " 2"]] | None = None,
) -> Float[Array, "*n 2"]:
  """Upper left corner of a window of side `size` round a point, shifted to stay in the video.

  Args:
    inside: (corners, [width, height]) of larger windows that this one must stay in too.
  """
  low, high = jnp.zeros(2), jnp.array(video_hw[::-1], jnp.float32) - size
  if inside is not None:
    low, high = inside[0], inside[0] + inside[1] - size
  return jnp.clip(jnp.floor(centre_xy) - jnp.floor(size / 2), low, high)


def refine(
  predict_fn: multimask.PredictFn,
  mark: Any,
  pairs: UInt8[Array, "p 2 H W 3"] | Float[Array, "p 2 H W 3"],
  masks: Bool[Array, "m 2 gh gw"],
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  guess_xy: Float[Array, "n 2"],
  size: Float[Array, ""],
  valid: Bool[Array, " n"],
  inside: tuple[Float[Array, "n 2"], Float[Array, " 2"]] | None = None,
  *,
  image_hw: tuple[int, int],
  plan: multimask.Plan,
  held: int,
  keep_tokens: bool,
  protocol: str = "half_pixel",
  **settings: Any,
) -> tuple[PointFlow, Float[Array, "n 2"]]:
  """One round: crops of both frames, new clean and marked passes, the answer in video pixels.

  Frame 1 is cropped round the point and frame 2 round the guess. The 3 x 3 patches round the guess
  are hidden in every mask. Points whose windows and masks coincide share their clean passes. The
  window's size is an argument of the compiled program, not a constant of it, so that all rounds
  share one program.

  Args:
    pairs: both frames of each pair in video pixels, as `geometry.to_normalised` takes them.
    points_xy: what is asked about; continuous (x, y), video pixels.
    guess_xy: the answer so far; same (bare indices under the protocol "release").
    size: side of the window in video pixels.
    valid: False for padding.
    inside: (corners, [width, height]) of the last round's windows of frame 2, which those of this
      round must not leave: the release crops its crops. None: the video.
    image_hw: what the predictor sees.
    held: points whose clean predictions are held at a time.
    keep_tokens: whether the mark reads the encoder's tokens.
    protocol: "half_pixel", or "release": indices, crops and differences resized without antialias,
      the response read out in the window's own pixels, and its choice of patches to reveal.
    **settings: order, average, readout, inverse_temperature, occlusion_threshold; see
      `flow.flow_points`.

  Returns:
    The answers, and the corners of the windows of frame 2.
  """
  video_hw = pairs.shape[2:4]
  h, w = image_hw
  grid = jnp.array(masks.shape[-2:])
  release = protocol == "release"
  corner1 = window_corner_xy(points_xy, size, video_hw)
  corner2 = window_corner_xy(guess_xy, size, video_hw, inside=inside)
  asked, guessed = (
    flow.place_points(points - corners, (size, size), image_hw, protocol=protocol)
    for points, corners in ((points_xy, corner1), (guess_xy, corner2))
  )
  patch = (guessed[:, ::-1] * grid / jnp.array(image_hw)).astype(jnp.int32)
  patch = jnp.clip(patch, 0, grid - 1)

  def crop(frames, corners):
    def one(frame, corner):
      if not release:
        return geometry.crop_resize(frame, corner, size, image_hw)
      corner_yx = corner[::-1].astype(jnp.int32)
      return geometry.resize_window(frame, corner_yx, (size, size), image_hw, canvas_hw=image_hw)

    return jax.vmap(one)(geometry.to_normalised(frames), corners)

  def to_video(diff):
    canvas = (min(video_hw),) * 2
    return geometry.resize_window(
      diff, jnp.zeros(2, jnp.int32), image_hw, (size, size), canvas_hw=canvas
    )

  def step(items):
    pair, asked, patch, corner1, corner2, valid = items
    frames = jnp.stack([crop(pairs[pair, 0], corner1), crop(pairs[pair, 1], corner2)], axis=1)
    hide = partial(masks_lib.hide_neighbourhood, reveal="release" if release else "spread")
    own_masks = jax.vmap(lambda centre: hide(masks, centre))(patch)
    windows = jnp.concatenate([pair[:, None], corner1, corner2], axis=1).astype(jnp.int32)
    clean, place = shared.clean_predictions(
      predict_fn,
      frames,
      own_masks,
      windows,
      valid,
      chunk=plan.clean,
      points_xy=asked if keep_tokens else None,
    )

    def ask(chosen):
      return flow.respond_and_read(
        predict_fn,
        mark,
        frames[chosen],
        own_masks[chosen],
        shared.own_predictions(clean, place, chosen),
        asked[chosen],
        plan=plan,
        to_video=to_video if release else None,
        protocol=protocol,
        **settings,
      )

    return multimask.map_chunks(ask, jnp.arange(pair.shape[0]), valid, chunk=plan.points)

  # Neighbours in this order are held together, so that those that can share do.
  order = jnp.lexsort([*patch.T, *corner1.T, *corner2.T, pair_of, ~valid])
  items = (pair_of, asked, patch, corner1, corner2, valid)
  sorted_items = jax.tree.map(lambda x: x[order], items)
  answer = multimask.map_chunks(step, sorted_items, valid[order], chunk=held)
  answer = jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x), answer)
  xy = answer.xy if release else answer.xy * size / jnp.array([w, h], jnp.float32)
  return answer._replace(xy=xy + corner2), corner2
