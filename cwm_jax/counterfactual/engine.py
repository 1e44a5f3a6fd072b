"""The inference engine under `Tracker`: questions of any number in, padded device work out.

Points, pairs and their groups are padded to buckets, so the number of compiled programs does not
depend on how many are asked about; `multimask.plan` decides how many passes run at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from cwm_jax import geometry
from cwm_jax.counterfactual import flow, multimask, perturb, zoom
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.types import InputError, PointFlow, Prediction, Response

BUCKETS = (1, 4, 16, 64, 256)
# The default budget: a share of a device that tells its size, a fixed amount on one that does not.
_SHARE_OF_DEVICE, _BYTES_ELSEWHERE = 0.25, 2**30
# More passes at once bring no more speed on an accelerator; on a CPU they cost it once attention
# scores fall out of cache: of passes that take 32 MiB each, five at once are 1.4 x slower than two.
_MAX_PASSES, _MAX_PASSES_ON_CPU, _BYTES_OF_PASSES_ON_CPU = 256, 16, 80 * 2**20

_SETTINGS = "order average readout inverse_temperature occlusion_threshold protocol".split()
_clean_predictions = jax.jit(multimask.clean_predictions, static_argnames=("chunk", "keep_tokens"))
_flow_points = jax.jit(flow.flow_points, static_argnames=("plan", "video_hw", *_SETTINGS))
_refine = jax.jit(
  zoom.refine, static_argnames=("image_hw", "plan", "held", "keep_tokens", *_SETTINGS)
)
_explain_masks = jax.jit(flow.explain_masks)
_explain_answer = jax.jit(flow.explain_answer, static_argnames=("video_hw", "on_pixel", *_SETTINGS))


@partial(jax.jit, static_argnames=("image_hw", "antialias"))
def _prepare(frame, *, image_hw, antialias):
  return geometry.resize(geometry.to_normalised(frame), image_hw, antialias=antialias)


class Frame(NamedTuple):
  """A frame on the device.

  small: float32 [h, w, 3], normalised, as the predictor sees it.
  full:  [H, W, 3], as it came, or None where nothing will look closer.
  """

  small: Any
  full: Any


class Pending(NamedTuple):
  """Answers that the device may still be working on.

  parts: (positions in the result, padded PointFlow on the device) of each group of points.
  count: how many points were asked about.
  """

  parts: list[tuple[np.ndarray, PointFlow]]
  count: int

  def fetch(self) -> PointFlow:
    """Waits, and returns NumPy arrays: xy [n, 2], visible [n], confidence [n]."""
    out = PointFlow(
      np.zeros((self.count, 2), np.float32),
      np.zeros(self.count, bool),
      np.zeros(self.count, np.float32),
    )
    for where, part in self.parts:
      for mine, theirs in zip(out, part):
        mine[where] = np.asarray(theirs)[: len(where)]
    return out


def bucket(count: int) -> int:
  """The smallest bucket that holds `count`; the largest for anything above it."""
  return next((size for size in BUCKETS if size >= count), BUCKETS[-1])


class Engine:
  """One predictor, one mark, one set of masks; asked about points of pairs of frames."""

  def __init__(
    self,
    predict_fn: Any,
    mark: Any,
    masks: Bool[Array, "r m 2 gh gw"],
    *,
    patch: int,
    memory_budget: float | None,
    settings: Mapping[str, Any],
  ):
    """Measures the predictor and lays out the work.

    Args:
      predict_fn: (frames, mask) -> Prediction. As a `jax.tree_util.Partial` its parameters are
        arguments of the compiled programs; what a plain function closes over becomes constants.
      mark: see `perturb`.
      masks: those of the whole frame, then those of each round of zoom.
      patch: side of a patch in pixels.
      memory_budget: bytes for the passes in flight; None takes a quarter of the device's memory, or
        1 GiB where that is not told.
      settings: order, average, readout, inverse_temperature, occlusion_threshold, protocol.

    Raises:
      InputError: a budget below one pass, or settings that do not go together.
    """
    multimask.check_averaging(settings["order"], settings["average"])
    flow.check_protocol(
      settings["protocol"],
      readout=settings["readout"],
      average=settings["average"],
      zoom=masks.shape[0] - 1,
    )
    self.image_hw = (masks.shape[-2] * patch, masks.shape[-1] * patch)
    self.masks, self.patch = masks, patch
    self._predict_fn = predict_fn if isinstance(predict_fn, Partial) else Partial(predict_fn)
    self._mark = mark if isinstance(mark, Partial) else Partial(mark)
    self._keep_tokens = perturb.reads_token(mark)
    self._settings = dict(settings)
    num_masks = masks.shape[1]
    device = jax.local_devices()[0]  # only a process's own devices tell their memory
    if memory_budget is None:
      told = (device.memory_stats() or {}).get("bytes_limit", 0)
      memory_budget = told * _SHARE_OF_DEVICE or _BYTES_ELSEWHERE
    grid_hw = masks.shape[-2:]
    pass_bytes = multimask.measure_pass_bytes(self._predict_fn, self.image_hw, grid_hw)
    max_passes = _MAX_PASSES
    if device.platform == "cpu":
      max_passes = min(_MAX_PASSES_ON_CPU, int(_BYTES_OF_PASSES_ON_CPU // pass_bytes))
    self.plan = multimask.plan(
      num_masks, pass_bytes=pass_bytes, memory_budget=memory_budget, max_passes=max_passes
    )
    # The clean predictions of a group of pairs are held while its points are asked about; in zoom
    # those of a group of points, a power of two so that every bucket divides into groups.
    clean_bytes = num_masks * self._prediction_bytes()
    self.pairs_at_once = max(n for n in BUCKETS if n == 1 or n * clean_bytes < memory_budget / 4)
    self.windows_at_once = max(
      n for n in (1, 2, 4, 8, 16) if n == 1 or n * clean_bytes < memory_budget / 4
    )

  @property
  def _release(self) -> bool:
    return self._settings["protocol"] == "release"

  def _prediction_bytes(self) -> int:
    """What is kept of one clean pass: the image, and the tokens where the mark reads them."""
    shapes = jax.eval_shape(
      lambda: self._predict_fn(
        jnp.zeros((1, 2, *self.image_hw, 3)), jnp.zeros((1, *self.masks.shape[2:]), bool)
      )
    )
    kept = shapes if self._keep_tokens else shapes.image
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

  def prepare(self, image: np.ndarray) -> Frame:
    """Puts a frame on the device in the predictor's size.

    Args:
      image: [H, W, 3], as `geometry.to_normalised` takes it. It is shrunk with antialiasing, but
        under the protocol "release" without.
    """
    image = jnp.asarray(image)
    full = image if self.masks.shape[0] > 1 else None
    return Frame(_prepare(image, image_hw=self.image_hw, antialias=not self._release), full)

  def ask(
    self,
    pairs: Sequence[tuple[Frame, Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Pending:
    """Starts the work for some points of some pairs; does not wait for it.

    Args:
      pairs: (frame 1, frame 2).
      pair_of: int [n], the pair of each point.
      points_xy: float32 [n, 2], continuous (x, y), pixels of the frames as given.
      video_hw: the size of the frames as given.

    Returns:
      Answers in the pixels of the frames as given: continuous, or bare indices under the protocol
      "release".
    """
    parts = []
    for begin in range(0, len(pairs), self.pairs_at_once):
      group = pairs[begin : begin + self.pairs_at_once]
      mine = np.flatnonzero((pair_of >= begin) & (pair_of < begin + len(group)))
      if not mine.size:
        continue
      frames, valid = _stack([[f.small for f in pair] for pair in group])
      masks = jnp.broadcast_to(self.masks[0], (frames.shape[0], *self.masks.shape[1:]))
      clean = self._clean(frames, masks, valid)
      full = None
      if self.masks.shape[0] > 1:
        full, _ = _stack([[f.full for f in pair] for pair in group])
      for start in range(0, len(mine), BUCKETS[-1]):
        where = mine[start : start + BUCKETS[-1]]
        asked = (pair_of[where] - begin, points_xy[where])
        parts.append((where, self._ask_group(frames, masks, clean, full, *asked, video_hw)))
    return Pending(parts, len(points_xy))

  def explain(
    self,
    pair: tuple[Frame, Frame],
    point_xy: np.ndarray,
    video_hw: tuple[int, int],
    *,
    masks_at_once: int,
  ) -> Iterator[tuple[Array, Array, Array, Response, PointFlow]]:
    """One whole-frame question with its intermediates, by groups of masks.

    Args:
      pair, video_hw: see `ask`.
      point_xy: [2], pixels of the frames as given.
      masks_at_once: a divisor of the number of masks.

    Yields:
      Of the masks so far: marked [h, w, 3], clean and counterfactual predictions [m, h, w, 3]
      (normalised), the Response and the PointFlow, both of one point; the answer in the pixels of
      the frames as given.
    """
    frames, valid = _stack([[f.small for f in pair]])
    point = self._place(jnp.asarray(point_xy)[None], video_hw)
    num_masks = self.masks.shape[1]
    diff = jnp.zeros((num_masks, *self.image_hw, 3))
    cleans, answers, marked = [], [], None
    for begin in range(0, num_masks, masks_at_once):
      group = slice(begin, begin + masks_at_once)
      masks = self.masks[:1, group]
      clean = self._clean(frames, masks, valid)
      ours, answer = _explain_masks(self._predict_fn, self._mark, frames, masks, clean, point)
      marked = ours if marked is None else marked
      cleans.append(clean.image[0])
      answers.append(answer)
      diff = diff.at[group].set(answer - clean.image[0])
      response, found = _explain_answer(
        diff,
        self.masks[0],
        begin + masks_at_once,
        point,
        video_hw=self._read_at(video_hw),
        on_pixel=perturb.on_pixel(self._mark),
        **self._settings,
      )
      so_far = (jnp.concatenate(cleans), jnp.concatenate(answers))
      yield marked, *so_far, response, self._place_back(found, video_hw)

  def ask_program(
    self,
    program: Any,
    pair: tuple[Frame, Frame],
    point_xy: np.ndarray,
    video_hw: tuple[int, int],
    named: Mapping[str, Any],
  ) -> Any:
    """What a program of the user's own says of a pair and a point; see `Tracker.ask`."""
    compiled = jax.jit(program, static_argnames=("patch", *named))
    frames = jnp.stack([frame.small for frame in pair])
    point = self._place(jnp.asarray(point_xy)[None], video_hw)[0]
    return compiled(self._predict_fn, frames, self.masks[0], point, patch=self.patch, **named)

  def _place(self, points_xy: Array, video_hw: tuple[int, int]) -> Array:
    """Points of the video in pixels of the predictor's image."""
    protocol = self._settings["protocol"]
    return flow.place_points(points_xy, video_hw, self.image_hw, protocol=protocol)

  def _read_at(self, video_hw: tuple[int, int]) -> tuple[int, int] | None:
    """The size at which responses are read out; None for the predictor's own."""
    return video_hw if self._release else None

  def _place_back(self, answer: PointFlow, video_hw: tuple[int, int]) -> PointFlow:
    if self._release:
      return answer
    return answer._replace(xy=geometry.scale_points_xy(answer.xy, self.image_hw, video_hw))

  def _clean(
    self, frames: Float[Array, "p 2 h w 3"], masks: Bool[Array, "p m 2 gh gw"], valid: Any
  ) -> Prediction:
    return _clean_predictions(
      self._predict_fn,
      frames,
      masks,
      jnp.asarray(valid),
      chunk=self.plan.clean,
      keep_tokens=self._keep_tokens,
    )

  def _ask_group(self, frames, masks, clean, full, pair_of, points_xy, video_hw) -> PointFlow:
    size = bucket(len(points_xy))
    valid = jnp.asarray(np.arange(size) < len(points_xy))
    pair_of = jnp.asarray(np.resize(pair_of, size).astype(np.int32))
    points = jnp.asarray(np.resize(points_xy, (size, 2)).astype(np.float32))
    answer = _flow_points(
      self._predict_fn,
      self._mark,
      frames,
      masks,
      clean,
      pair_of,
      self._place(points, video_hw),
      valid,
      plan=self.plan,
      video_hw=self._read_at(video_hw),
      **self._settings,
    )
    answer = self._place_back(answer, video_hw)
    inside = None
    if self._release:
      # The release's first window lies in the video, each later one in the one before it.
      whole = jnp.array(video_hw[::-1], jnp.float32)
      inside = (jnp.zeros((size, 2)), whole)
    rounds = self.masks.shape[0] - 1
    for masks, window in zip(self.masks[1:], zoom.crop_sizes(video_hw, rounds)):
      answer, corners = _refine(
        self._predict_fn,
        self._mark,
        full,
        masks,
        pair_of,
        points,
        answer.xy,
        jnp.float32(window),
        valid,
        inside,
        image_hw=self.image_hw,
        plan=self.plan,
        held=self.windows_at_once,
        keep_tokens=self._keep_tokens,
        **self._settings,
      )
      if self._release:
        inside = (corners, jnp.full(2, window, jnp.float32))
    return answer


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
  key = jax.random.key(seed)
  return masks_lib.sample_masks(key, grid_hw, num_visible, (zoom + 1, num_masks))


def _stack(pairs: list[list[Any]]) -> tuple[Array, np.ndarray]:
  """[bucket, 2, ...] and which of them are real; the rest repeats the first."""
  size = bucket(len(pairs))
  padded = [*pairs, *[pairs[0]] * (size - len(pairs))]
  flat = jnp.stack([frame for pair in padded for frame in pair])
  return flat.reshape(size, 2, *flat.shape[1:]), np.arange(size) < len(pairs)
