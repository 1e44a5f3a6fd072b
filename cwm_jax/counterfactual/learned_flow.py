"""diffFLOW: the flow of points as a differentiable function of the mark, in bounded memory.

What `flow` answers for any number of points without gradients, this answers for the few points of a
training step with them. Gradients reach the mark through the marked passes only: the clean passes,
and the tokens that a learned mark reads from them, are a fixed reference. Passes run one after the
other and are recomputed on the way back, so that what they need does not grow with their number.
What is kept throughout are the images of the clean passes: one for each mask, so for each point and
mask where points have masks of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask, perturb
from cwm_jax.types import InputError


class LearnedFlow(NamedTuple):
  """What the points of a batch of pairs answered.

  flow_xy: float32 [B, N, 2], (dx, dy), pixels of the video.
  spread:  float32 [B, N], root mean square width of the response, pixels of the map it was read
           from; without gradient.
  peak:    float32 [B, N], mean over masks of each mask's own maximum, normalised units.
  """

  flow_xy: Array
  spread: Array
  peak: Array


class _Passes(NamedTuple):
  """The clean passes of K sets of M masks, K being the number of points or 1 for all of them.

  masks:  bool [K, M, B, 2, gh, gw].
  images: float32 [K, M, B, h, w, 3].
  tokens: float32 [N, M, B, C], that of each point's patch, or None.
  """

  masks: Array
  images: Array
  tokens: Array | None


def learned_flow(
  predict_fn: multimask.PredictFn,
  mark: Any,
  frames: Float[Array, "b 2 h w 3"],
  masks: Bool[Array, "b k m 2 gh gw"],
  points_xy: Float[Array, "b n 2"],
  *,
  video_hw: tuple[int, int] | None = None,
  inverse_temperature: float = 200.0,
  order: str = "release",
  average: str = "hidden",
  protocol: str = "half_pixel",
  points_at_once: int = 1,
) -> LearnedFlow:
  """The flow of every point, read by the expectation under softmax(inverse_temperature * response).

  The paper's equations for diffFLOW. Several masks a point are averaged as in `multimask.respond`.

  Args:
    predict_fn: (frames [B, 2, h, w, 3], mask [B, 2, gh, gw]) -> Prediction.
    mark: see `perturb`; as a `jax.tree_util.Partial` its parameters get gradients.
    frames: normalised, as the predictor sees them.
    masks: m masks for each point (k is n), or the same for all points of a pair (k is 1).
    points_xy: continuous (x, y), pixels of the video. The flow is that of the mark's middle, which
      lies in the pixel that holds the point or on the point itself, see `perturb.middle`. Under
      the protocol "release" it is the pixel's.
    video_hw: size of the frames that points and flow are about; None where it is the predictor's.
    order, average: of `multimask.respond`.
    protocol: "release" resizes differences to the video before they are read out and moves points
      with truncation; see `flow.place_points`.
    points_at_once: points of each pair whose passes run together.

  Raises:
    InputError: another number of masks, or settings that do not go together.
  """
  b, n = points_xy.shape[:2]
  k, m = masks.shape[1:3]
  image_hw = frames.shape[2:4]
  video_hw = tuple(video_hw or image_hw)
  if k not in (1, n):
    raise InputError(f"there are masks for {k} points; give them for each of {n} points, or for 1")
  flow.check_protocol(protocol, readout="soft", average=average, zoom=0)
  multimask.check_averaging(order, average)
  release = protocol == "release"
  to_video = flow.whole_video(video_hw) if release else None
  placed_xy = flow.place_points(points_xy, video_hw, image_hw, protocol=protocol).swapaxes(0, 1)
  # Where the flow starts, in indices: those of pixels, or between them.
  if release:
    start_yx = geometry.point_to_index_yx(points_xy.swapaxes(0, 1), video_hw)
  elif (middle := perturb.middle(mark)) is None:
    start_yx = placed_xy[..., ::-1] - 0.5
  else:
    start_yx = geometry.point_to_index_yx(placed_xy, image_hw) + (middle - 0.5)
  keep_tokens = perturb.reads_token(mark)
  clean = _clean_passes(predict_fn, frames, masks, placed_xy, keep_tokens=keep_tokens)

  def pass_of(mark, i, j):
    """Point i of each pair under its mask j: sums for `average_over_masks`."""
    token = None if clean.tokens is None else clean.tokens[i, j]
    marked = jax.vmap(mark)(frames[:, 0], placed_xy[i], token)
    pairs = jnp.stack([marked, frames[:, 1]], axis=1)
    image = predict_fn(pairs, clean.masks[i % k, j]).image
    diff = (image - clean.images[i % k, j])[:, None]
    colours = None
    if order == "matched":
      # What the response is measured along is no way for a mark to change it.
      colours, _ = multimask.mark_colours(jax.lax.stop_gradient(marked - frames[:, 0])[:, None])
    return multimask.sum_over_masks(diff, order=order, to_video=to_video, colours=colours)

  def point(mark, i):
    sums = pass_of(mark, i, 0)
    if m > 1:
      again = jax.checkpoint(pass_of)
      add = lambda total, j: (jax.tree.map(jnp.add, total, again(mark, i, j)), None)  # noqa: E731
      sums, _ = jax.lax.scan(add, sums, jnp.arange(1, m))
    mine = clean.masks[i % k].swapaxes(0, 1)
    response = multimask.average_over_masks(*sums, mine, order=order, average=average)
    weights = geometry.heat_distribution(response.heat, inverse_temperature=inverse_temperature)
    # The width of a single pixel is 0, where the root has no gradient.
    spread = geometry.spread(jax.lax.stop_gradient(weights))
    return geometry.mean_yx(weights) - start_yx[i], spread, response.peak

  again = jax.checkpoint(point)
  moved_yx, spread, peak = jax.lax.map(
    lambda i: again(mark, i), jnp.arange(n), batch_size=min(points_at_once, n)
  )
  flow_xy = moved_yx[..., ::-1].swapaxes(0, 1)
  if not release:
    flow_xy = geometry.scale_points_xy(flow_xy, image_hw, video_hw)
  return LearnedFlow(flow_xy, spread.T, peak.T)


def _clean_passes(
  predict_fn: multimask.PredictFn,
  frames: Float[Array, "b 2 h w 3"],
  masks: Bool[Array, "b k m 2 gh gw"],
  points_xy: Float[Array, "n b 2"],
  *,
  keep_tokens: bool,
) -> _Passes:
  """One pass at a time; of its tokens only those at the points that its masks are for are kept."""
  b, k, m = masks.shape[:3]
  masks = jnp.moveaxis(masks, 0, 2)
  asked = points_xy.reshape(k, -1, *points_xy.shape[1:])
  index = multimask.cells_yx(asked, frames.shape[2:4], masks.shape[-2:])

  def one(item):
    which, mask = item
    prediction = predict_fn(frames, mask)
    if not keep_tokens:
      return prediction.image, None
    row, col = jnp.moveaxis(index[which], -1, 0)
    return prediction.image, prediction.tokens[jnp.arange(b), row, col]

  flat = masks.reshape(k * m, *masks.shape[2:])
  images, tokens = jax.lax.stop_gradient(jax.lax.map(one, (jnp.repeat(jnp.arange(k), m), flat)))
  if tokens is not None:
    # [k m, n / k, b, c] to [n, m, b, c].
    tokens = tokens.reshape(k, m, *tokens.shape[1:]).swapaxes(1, 2)
    tokens = tokens.reshape(-1, m, *tokens.shape[3:])
  return _Passes(masks, images.reshape(k, m, *images.shape[1:]), tokens)
