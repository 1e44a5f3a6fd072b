"""FLOW: where the points of frame 1 are in frame 2.

Mark the point, predict frame 2 with and without the mark under the same masks, and read the place
of the difference. With a fixed mark it is the paper's FLOW, with a learned one and the soft
read-out its diffFLOW.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cwm_jax import geometry
from cwm_jax.counterfactual import multimask, perturb
from cwm_jax.types import InputError, PointFlow, Prediction, Response

READOUTS = ("argmax", "soft", "window")
PROTOCOLS = ("half_pixel", "release")


def check_protocol(protocol: str, *, readout: str, average: str, zoom: int) -> None:
  """Raises InputError unless the settings go together."""
  if readout not in READOUTS:
    raise InputError(f"the read-out is {readout!r}; choose one of {', '.join(READOUTS)}")
  if protocol not in PROTOCOLS:
    raise InputError(f"the protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
  if protocol == "release" and average != "release":
    raise InputError(f"the protocol 'release' averages over all masks, not by {average!r}")
  if protocol == "release" and zoom and readout != "argmax":
    raise InputError(f"the protocol 'release' zooms by the argmax, not by the read-out {readout!r}")


def place_points(
  points_xy: Float[Array, "*n 2"], from_hw: Any, to_hw: tuple[int, int], *, protocol: str
) -> Float[Array, "*n 2"]:
  """Points of the video, or of a window of it, in pixels of the predictor's image.

  Args:
    points_xy: continuous (x, y), pixels of the video or window.
    from_hw: its (height, width), which may be traced.
    to_hw: the predictor's.
    protocol: "half_pixel" keeps where in its pixel a point lies; "release" takes the pixel's index,
      moves it with truncation (`geometry.rescale_index_yx`) and means the centre of that pixel.
  """
  if protocol != "release":
    return geometry.scale_points_xy(points_xy, from_hw, to_hw)
  index = geometry.point_to_index_yx(points_xy, from_hw)
  return geometry.index_to_point_xy(geometry.rescale_index_yx(index, from_hw, to_hw))


def read_out(
  response: Response,
  points_xy: Float[Array, "*n 2"],
  *,
  readout: str = "argmax",
  inverse_temperature: float = 200.0,
  occlusion_threshold: float = 0.05,
  confidence_radius: int = 2,
  protocol: str = "half_pixel",
  middle: float | None = 0.5,
) -> PointFlow:
  """Destination, visibility and confidence from a response.

  A mark that lies on a pixel stands for a query anywhere in it: the sub-pixel read-outs carry over
  how far from the mark's middle the query lies. An argmax answer is a pixel's centre. Under the
  protocol "release" an answer is a bare index: that of a pixel, or the mean of indices.

  Args:
    response: heat [..., h, w], peak [...].
    points_xy: the queries, continuous (x, y), pixels of the heat map.
    readout: "argmax": the highest pixel's centre; "soft": the expectation under
      softmax(inverse_temperature * heat); "window": the mean of the squared heat round its highest
      pixel, sub-pixel.
    occlusion_threshold: below this peak (normalised units) a point counts as occluded.
    confidence_radius: confidence is the share of the heat within so many pixels of its highest
      pixel, 0 where there is no heat.
    protocol: "half_pixel" or "release".
    middle: where in the query's pixel the mark's middle lay, from its corner; None: on the query.

  Returns:
    xy [..., 2], pixels of the heat map (continuous unless bare), visible [...], confidence [...].

  Raises:
    InputError: an unknown read-out.
  """
  heat = response.heat
  if readout == "argmax":
    index = geometry.argmax_yx(heat)
  elif readout == "soft":
    index = geometry.soft_argmax_yx(heat, inverse_temperature=inverse_temperature)
  elif readout == "window":
    index = geometry.window_argmax_yx(heat)
  else:
    raise InputError(f"the read-out is {readout!r}; choose one of {', '.join(READOUTS)}")
  top = geometry.argmax_yx(heat)
  near = geometry.near(top, heat.shape[-2:], radius=confidence_radius)
  total = jnp.sum(heat, axis=(-2, -1))
  share = jnp.sum(jnp.where(near, heat, 0.0), axis=(-2, -1)) / jnp.maximum(total, 1e-12)
  xy = geometry.index_to_point_xy(index)
  if protocol == "release":
    xy = xy - 0.5
  elif middle is not None and readout != "argmax":
    corner_yx = geometry.point_to_index_yx(points_xy, heat.shape[-2:])
    xy = xy + points_xy - (corner_yx[..., ::-1].astype(jnp.float32) + middle)
  return PointFlow(
    xy,
    response.peak >= occlusion_threshold,
    jnp.clip(share, 0.0, 1.0),
  )


def respond_and_read(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "n 2 h w 3"],
  masks: Bool[Array, "n m 2 gh gw"],
  clean: Prediction,
  points_xy: Float[Array, "n 2"],
  *,
  plan: multimask.Plan,
  order: str = "release",
  average: str = "hidden",
  to_video: multimask.ToVideo | None = None,
  **reading: Any,
) -> PointFlow:
  """Responses of some points, each with its own pair, masks and clean predictions, read out.

  The arguments are those of `multimask.respond` and `read_out`.
  """
  response = multimask.respond(
    predict_fn,
    mark,
    frames,
    masks,
    clean,
    points_xy,
    masks_at_once=plan.masks,
    order=order,
    average=average,
    to_video=to_video,
  )
  return read_out(response, points_xy, middle=perturb.middle(mark), **reading)


def flow_points(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "p 2 h w 3"],
  masks: Bool[Array, "p m 2 gh gw"],
  clean: Prediction,
  pair_of: Int[Array, " n"],
  points_xy: Float[Array, "n 2"],
  valid: Bool[Array, " n"],
  *,
  plan: multimask.Plan,
  video_hw: tuple[int, int] | None = None,
  **settings: Any,
) -> PointFlow:
  """Destinations of points of several pairs, whose clean predictions are at hand.

  Heat maps live only within a step of `plan.points` points, so memory does not grow with n.

  Args:
    predict_fn: (frames, mask) -> Prediction; under jit a `jax.tree_util.Partial`, so that
      parameters are arguments and not constants of the program.
    mark: see `perturb`; under jit a Partial too.
    frames: normalised pairs.
    masks: the masks of each pair.
    clean: what `multimask.clean_predictions` gave for these pairs and masks.
    pair_of: index of each point's pair.
    points_xy: continuous (x, y), pixels of the predictor's image.
    valid: False for padding.
    video_hw: the size to which differences are brought before they are read out; None leaves them
      in the predictor's.
    **settings: order and average of `multimask.respond`; readout, inverse_temperature,
      occlusion_threshold and protocol of `read_out`.

  Returns:
    xy [n, 2] in pixels of the predictor's image or of `video_hw`, visible [n], confidence [n];
    padding is undefined.
  """

  def step(items):
    pair, points = items
    return respond_and_read(
      predict_fn,
      mark,
      frames[pair],
      masks[pair],
      jax.tree.map(lambda x: x[pair], clean),
      points,
      plan=plan,
      to_video=whole_video(video_hw),
      **settings,
    )

  return multimask.map_chunks(step, (pair_of, points_xy), valid, chunk=plan.points)


def whole_video(video_hw: tuple[int, int] | None) -> multimask.ToVideo | None:
  """The `to_video` of `multimask.respond` for whole frames of that size."""
  return None if video_hw is None else partial(geometry.resize, size_hw=video_hw)


def flow_pair(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "2 h w 3"],
  masks: Bool[Array, "m 2 gh gw"],
  points_xy: Float[Array, "n 2"],
  **settings: Any,
) -> PointFlow:
  """Destinations of the points of one pair, all passes at once; the short form for small problems.

  Args:
    frames: one normalised pair.
    points_xy: continuous (x, y), pixels of the predictor's image.
    **settings: as in `flow_points`.
  """
  n, m = points_xy.shape[0], masks.shape[0]
  clean = multimask.clean_predictions(
    predict_fn, frames[None], masks[None], jnp.ones(1, bool), chunk=m
  )
  return flow_points(
    predict_fn,
    mark,
    frames[None],
    masks[None],
    clean,
    jnp.zeros(n, jnp.int32),
    points_xy,
    jnp.ones(n, bool),
    plan=multimask.Plan(clean=m, points=n, masks=m),
    **settings,
  )


def explain_masks(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "1 2 h w 3"],
  masks: Bool[Array, "1 m 2 gh gw"],
  clean: Prediction,
  points_xy: Float[Array, "1 2"],
) -> tuple[Float[Array, "h w 3"], Float[Array, "m h w 3"], Float[Array, "m 3"]]:
  """The passes of one question: the (first mask's) marked frame 1, predictions, marks' colours.

  All are normalised, at the predictor's resolution.
  """
  marked = multimask.mark_frames(mark, frames[:, 0], clean.tokens, points_xy)
  answers = multimask.marked_predictions(predict_fn, marked, frames[:, 1], masks)[0]
  colours, _ = multimask.mark_colours(marked[0] - frames[0, 0])
  return marked[0, 0], answers, jnp.broadcast_to(colours, (len(answers), 3))


def explain_answer(
  diff: Float[Array, "m h w 3"],
  colours: Float[Array, "m 3"],
  masks: Bool[Array, "m 2 gh gw"],
  count: Int[Array, ""],
  points_xy: Float[Array, "1 2"],
  *,
  video_hw: tuple[int, int] | None = None,
  order: str,
  average: str,
  middle: float | None,
  **reading: Any,
) -> tuple[Response, PointFlow]:
  """The answer to one question by its first `count` masks.

  Args:
    diff: marked minus clean predictions; of the masks beyond `count` whatever it may be.
    colours: of the marks under each mask.
    points_xy: continuous (x, y), pixels of the predictor's image.
    video_hw, order, average: see `flow_points`.
    middle, **reading: of `read_out`.

  Returns:
    The response at the predictor's resolution, and the answer, in pixels of the predictor's image
    or of `video_hw`; both have a leading axis of one point.
  """
  m = masks.shape[0]
  known = jnp.arange(m) < count
  # A mask that is not known yet adds nothing to a sum, and hides nothing where hiding is counted.
  diff = jnp.where(known[:, None, None, None], diff, 0.0)[None]
  hiding = (masks & known[:, None, None, None])[None]
  share = count / m

  def average_all(to_video):
    sums = multimask.sum_over_masks(diff, order=order, to_video=to_video, colours=colours[None])
    heat, peak = multimask.average_over_masks(*sums, hiding, order=order, average=average)
    return Response(heat if average == "hidden" else heat / share, peak / share)

  answer = read_out(average_all(whole_video(video_hw)), points_xy, middle=middle, **reading)
  return average_all(None), answer
