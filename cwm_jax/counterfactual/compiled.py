"""The compiled programs under the engine. All that it computes on the device is inside them.

Each shape that a program meets is a compilation, and an operation outside them one more; so frames
come as flat lists, sizes of videos as numbers, and everything is padded before it gets here.

Of what they are given only the bank of adaptive masks comes back in the same shape, so only that is
donated: frames and clean predictions are asked about again, and answers are a few bytes a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from cwm_jax import geometry
from cwm_jax.counterfactual import adaptive, flow, many, multimask, zoom
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import InputError, PointFlow, Prediction, Response

_SETTINGS = "order average readout inverse_temperature occlusion_threshold protocol".split()
# What `clean` says of pairs: their frames, masks and clean predictions.
Asked = tuple[Float[Array, "p 2 h w 3"], Bool[Array, "p m 2 gh gw"], Prediction]


@partial(jax.jit, static_argnums=(1, 2, 3))
def sample_masks(
  seed: UInt32[Array, ""] | np.uint32,
  grid_hw: tuple[int, int],
  num_visible: int,
  shape: tuple[int, ...],
) -> Bool[Array, "*s 2 gh gw"]:
  """`masks.sample_masks` from a seed."""
  return masks_lib.sample_masks(jax.random.key(seed), grid_hw, num_visible, shape)


def make_masks(
  seed: int, *, grid_hw: tuple[int, int], mask_ratio: float, num_masks: int, zoom: int
) -> Bool[Array, "r m 2 gh gw"]:
  """The masks of a whole frame and of each round of zoom, from one seed.

  Raises:
    InputError: settings that no mask can meet.
  """
  if num_masks < 1 or zoom < 0:
    raise InputError(f"num_masks is {num_masks} (1 or more) and zoom is {zoom} (0 or more)")
  num_visible = masks_lib.num_visible_patches(grid_hw, mask_ratio)
  if zoom and num_visible > grid_hw[0] * grid_hw[1] - 9:
    raise InputError(
      f"zoom hides 3 x 3 patches round the last answer, and a mask ratio of {mask_ratio} hides "
      f"fewer than 9 of {grid_hw[0] * grid_hw[1]}; take a higher mask_ratio or zoom=0"
    )
  # As JAX takes a seed: its lower 32 bits.
  return sample_masks(np.uint32(seed & 0xFFFFFFFF), grid_hw, num_visible, (zoom + 1, num_masks))


@partial(jax.jit, static_argnames=("pairs", "chunk", "keep_tokens"))
def clean(
  predict_fn: multimask.PredictFn,
  images: Sequence[Array],
  masks: Bool[Array, "r m 2 gh gw"],
  valid: Bool[Array, " n"],
  *,
  pairs: int,
  chunk: int,
  keep_tokens: bool,
) -> Asked:
  """Frames, masks and clean predictions of `pairs` pairs, of which the first n are worked out.

  Args:
    images: both frames of n pairs, one after the other: normalised [h, w, 3].
    masks: those of the whole frame first; all pairs get the same.
    valid, chunk, keep_tokens: see `multimask.clean_predictions`.
  """
  frames = jnp.stack(images).reshape(-1, 2, *images[0].shape)
  masks = jnp.broadcast_to(masks[0], (len(frames), *masks.shape[1:]))
  made = multimask.clean_predictions(
    predict_fn, frames, masks, valid, chunk=chunk, keep_tokens=keep_tokens
  )

  def lengthened(x):
    return jnp.concatenate([x, jnp.zeros((pairs - len(x), *x.shape[1:]), x.dtype)])

  return jax.tree.map(lengthened, (frames, masks, made))


@partial(jax.jit, static_argnames=("image_hw", "plan", "read_at", *_SETTINGS))
def ask(
  predict_fn: multimask.PredictFn,
  mark: Any,
  asked: Asked,
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  valid: Bool[Array, " n"],
  video_hw: Int[Array, " 2"],
  *,
  image_hw: tuple[int, int],
  read_at: tuple[int, int] | None,
  **settings: Any,
) -> PointFlow:
  """Destinations in pixels of the video, from whole frames.

  Args:
    asked: from `clean`.
    points_xy: pixels of the video, whose size is an argument of the program.
    image_hw: what the predictor sees.
    read_at: size at which responses are read out; None for the predictor's own.
    **settings: see `flow.flow_points`.
  """
  protocol = settings["protocol"]
  placed = flow.place_points(points_xy, video_hw, image_hw, protocol=protocol)
  answer = flow.flow_points(
    predict_fn, mark, *asked, pair_of, placed, valid, video_hw=read_at, **settings
  )
  if protocol == "release":
    return answer
  return answer._replace(xy=geometry.scale_points_xy(answer.xy, image_hw, video_hw))


@partial(jax.jit, static_argnames=("image_hw", "plan", "held", "keep_tokens", *_SETTINGS))
def refine(
  predict_fn: multimask.PredictFn,
  mark: Any,
  images: Sequence[Array],
  masks: Bool[Array, "r m 2 gh gw"],
  number: Int[Array, ""],
  *args: Any,
  **settings: Any,
) -> tuple[PointFlow, Float[Array, "n 2"]]:
  """`zoom.refine` of one round; a program for each size of video.

  Args:
    images: both frames of the pairs, one after the other: [H, W, 3], pixels of the video.
    masks: of all rounds.
    number: of the round.
    *args, **settings: what `zoom.refine` takes after its masks.
  """
  pairs = jnp.stack(images).reshape(-1, 2, *images[0].shape)
  return zoom.refine(predict_fn, mark, pairs, masks[number], *args, **settings)


@partial(
  jax.jit,
  static_argnames=("rule", "chunk", "image_hw", *_SETTINGS),
  donate_argnames=("bank",),
)
def ask_adaptively(
  predict_fn: multimask.PredictFn,
  mark: Any,
  images: Sequence[Array],
  masks: Bool[Array, "r b 2 gh gw"],
  bank: adaptive.Bank,
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  valid: Bool[Array, " n"],
  video_hw: Int[Array, " 2"],
  *,
  image_hw: tuple[int, int],
  **settings: Any,
) -> tuple[PointFlow, Int[Array, ""], Int[Array, ""], adaptive.Bank]:
  """Destinations in pixels of the video under masks of each point's choice.

  Args:
    images: both frames of the pairs, one after the other: normalised [h, w, 3].
    bank: is used up; the one that comes back lies in its place.
    points_xy: pixels of the video.
    image_hw: what the predictor sees.
    **settings: see `adaptive.flow_points`.

  Returns:
    The answers, how many marked and how many clean passes they took, and the bank.
  """
  frames = jnp.stack(images).reshape(-1, 2, *images[0].shape)
  placed = geometry.scale_points_xy(points_xy, video_hw, image_hw)
  answer, asked, filled = adaptive.flow_points(
    predict_fn, mark, frames, masks[0], bank, pair_of, placed, valid, **settings
  )
  answer = answer._replace(xy=geometry.scale_points_xy(answer.xy, image_hw, video_hw))
  return answer, jnp.sum(asked), jnp.sum(filled.known) - jnp.sum(bank.known), filled


@partial(jax.jit, static_argnames=("pairs", "keep_tokens"))
def empty_bank(
  predict_fn: multimask.PredictFn, masks: Array, image: Array, *, pairs: int, keep_tokens: bool
) -> adaptive.Bank:
  """`adaptive.empty_bank` of so many pairs of frames like `image`."""
  frames = jnp.broadcast_to(image, (pairs, 2, *image.shape))
  return adaptive.empty_bank(predict_fn, frames, masks[0], keep_tokens=keep_tokens)


@partial(jax.jit, static_argnames=("image_hw", "protocol"))
def explain_masks(
  predict_fn: multimask.PredictFn,
  mark: Any,
  asked: Asked,
  point_xy: Float[Array, " 2"],
  video_hw: Int[Array, " 2"],
  *,
  image_hw: tuple[int, int],
  protocol: str,
) -> tuple[Array, Array, Array, Array]:
  """`flow.explain_masks` of a point in pixels of the video.

  Args:
    asked: from `clean`, of one pair.

  Returns:
    The marked frame 1 [h, w, 3], clean and marked predictions [m, h, w, 3], marks' colours [m, 3].
  """
  placed = flow.place_points(point_xy[None], video_hw, image_hw, protocol=protocol)
  marked, answers, colours = flow.explain_masks(predict_fn, mark, *asked, placed)
  return marked, asked[2].image[0], answers, colours


@partial(jax.jit, static_argnames=("image_hw", "read_at", "middle", *_SETTINGS))
def explain_answer(
  diff: Float[Array, "m h w 3"],
  colours: Float[Array, "m 3"],
  masks: Bool[Array, "r m 2 gh gw"],
  count: Int[Array, ""],
  point_xy: Float[Array, " 2"],
  video_hw: Int[Array, " 2"],
  *,
  image_hw: tuple[int, int],
  read_at: tuple[int, int] | None,
  **settings: Any,
) -> tuple[Response, PointFlow]:
  """`flow.explain_answer` about a point, and with an answer, in pixels of the video.

  Args:
    diff: marked minus clean predictions of each mask, model units.
    colours: of the mark, in each mask's passes.
    masks: of the passes; the first revealed set is the one that was asked under.
    count: how many of the m masks were asked.
    point_xy: pixels of the video, whose (height, width) is `video_hw`.
    image_hw: what the predictor sees.
    read_at: see `ask`.
    **settings: see `flow.explain_answer`.
  """
  protocol = settings["protocol"]
  placed = flow.place_points(point_xy[None], video_hw, image_hw, protocol=protocol)
  response, answer = flow.explain_answer(
    diff, colours, masks[0], count, placed, video_hw=read_at, **settings
  )
  if protocol == "release":
    return response, answer
  return response, answer._replace(xy=geometry.scale_points_xy(answer.xy, image_hw, video_hw))


@partial(
  jax.jit,
  static_argnames="image_hw step_yx votes chunk readout inverse_temperature".split(),
)
def ask_grid(
  predict_fn: multimask.PredictFn,
  mark: Any,
  images: Sequence[Array],
  masks: Bool[Array, "r m 2 gh gw"],
  dealt: Int[Array, "m s k"],
  points_xy: Float[Array, "gy gx 2"],
  video_hw: Int[Array, " 2"],
  *,
  image_hw: tuple[int, int],
  **settings: Any,
) -> tuple[Float[Array, "gy gx 2"], Float[Array, "gy gx"]]:
  """`many.flow_grid` in pixels of the video."""
  placed = geometry.scale_points_xy(points_xy, video_hw, image_hw)
  asked = (predict_fn, mark, jnp.stack(images), masks[0], dealt, placed)
  xy, confidence = many.flow_grid(*asked, **settings)
  return geometry.scale_points_xy(xy, image_hw, video_hw), confidence
