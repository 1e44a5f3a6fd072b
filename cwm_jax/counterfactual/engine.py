"""The inference engine under `Tracker`: questions of any number in, padded device work out.

Points and pairs are padded, so a handful of compiled programs (`compiled`) answers any number of
them; `budget` decides how many passes run at a time, `ahead` compiles before there is a question.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from cwm_jax import geometry
from cwm_jax.counterfactual import ahead, compiled, flow, many, multimask, pending, perturb, zoom
from cwm_jax.counterfactual import budget as budget_lib
from cwm_jax.counterfactual.pending import Passes, Pending
from cwm_jax.types import InputError, PointFlow, Response

# Numbers of points that have a program; steps without a point in them cost next to nothing.
BUCKETS = (1, 16, 256)
# Points of the middle bucket, and clean passes of several pairs, that are worked on at a time: a
# step that is half empty costs as much as a full one.
_FEW = 4


class Frame(NamedTuple):
  """A frame on the device.

  small: float32 [h, w, 3], normalised, as the predictor sees it.
  full:  [H, W, 3], as it came, or None where nothing will look closer.
  """

  small: Any
  full: Any


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
      memory_budget: see `budget.lay_out`.
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
    self._counts: list[tuple[Any, Any]] = []
    # What puts a program to work; a copy of the engine that only compiles has another one.
    self.run: Any = ahead.call
    laid = budget_lib.lay_out(
      self._predict_fn,
      image_hw=self.image_hw,
      grid_hw=masks.shape[-2:],
      num_masks=masks.shape[1],
      keep_tokens=self._keep_tokens,
      memory_budget=memory_budget,
    )
    self._laid, self._memory_budget = laid, laid.budget
    self.plan, self.pairs_at_once, self.windows_at_once = laid.plan, laid.pairs, laid.windows
    # One point at a time wastes no step, however many there may be. In zoom all sizes of video have
    # programs of their own.
    self.buckets = BUCKETS
    if masks.shape[0] > 1:
      self.buckets = (BUCKETS[0], BUCKETS[-1])
    elif self.plan.points == 1:
      self.buckets = BUCKETS[-1:]

  @property
  def _release(self) -> bool:
    return self._settings["protocol"] == "release"

  def prepare(self, image: np.ndarray) -> Frame:
    """Puts a frame on the device in the predictor's size.

    Args:
      image: [H, W, 3], as `geometry.to_normalised` takes it. It is shrunk with antialiasing, but
        under the protocol "release" without.
    """
    # On the host, or every size of video would have a program of its own.
    small = geometry.prepare_on_host(image, self.image_hw, antialias=not self._release)
    # The caller may write the next frame into the same memory.
    full = jax.device_put(image, may_alias=False) if self.masks.shape[0] > 1 else None
    return Frame(jax.device_put(small, may_alias=False), full)

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
    return pending.begin(self.parts(pairs, pair_of, points_xy, video_hw), len(points_xy))

  def parts(
    self,
    pairs: Sequence[tuple[Frame, Frame]],
    pair_of: np.ndarray,
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
  ) -> Iterator[tuple[np.ndarray, PointFlow]]:
    """`ask` in parts: (which points, their padded answers on the device)."""
    for begin in range(0, len(pairs), self.pairs_at_once):
      group = pairs[begin : begin + self.pairs_at_once]
      mine = np.flatnonzero((pair_of >= begin) & (pair_of < begin + len(group)))
      if not mine.size:
        continue
      asked = self._clean([[f.small for f in pair] for pair in group])
      self._count(len(mine) * self.masks.shape[1], len(group) * self.masks.shape[1])
      full = None
      if self.masks.shape[0] > 1:
        full = flat([[f.full for f in pair] for pair in group], self.pairs_at_once)
      for start in range(0, len(mine), self.buckets[-1]):
        where = mine[start : start + self.buckets[-1]]
        points = (pair_of[where] - begin, points_xy[where])
        yield where, self._ask_group(asked, full, *points, video_hw)

  def compile_ahead(
    self, video_hw: tuple[int, int], *, points: int | None, pairs: int
  ) -> list[jax.stages.Compiled]:
    """See `Tracker.compile`; returns the programs."""
    small = jax.ShapeDtypeStruct((*self.image_hw, 3), np.float32)
    full = jax.ShapeDtypeStruct((*video_hw, 3), np.uint8) if self.masks.shape[0] > 1 else None
    counts = ahead.counts_to_ask(
      self.buckets, points=points, pairs=pairs, pairs_at_once=self.pairs_at_once
    )
    twin = copy.copy(self)
    twin._counts = []
    return ahead.compile_questions(twin, (Frame(small, full),) * 2, video_hw, counts=counts)

  def ask_grid(
    self,
    pair: tuple[Frame, Frame],
    points_xy: np.ndarray,
    video_hw: tuple[int, int],
    *,
    marks: int,
    votes: float,
  ) -> PointFlow:
    """Destinations of an even grid of points, several of them marked in each pass.

    A grid that memory does not hold at once is asked in several that lie between each other.

    Args:
      pair, video_hw: see `ask`.
      points_xy: float32 [gy, gx, 2], pixels of the frames as given.
      marks, votes: see `Tracker.flow_grid`.

    Returns:
      xy [gy, gx, 2], pixels of the frames as given; visible, True since it cannot be told; and
      confidence [gy, gx].

    Raises:
      InputError: a number of marks that the grid cannot have, zoom, or the protocol "release".
    """
    if self.masks.shape[0] > 1 or self._release:
      raise InputError("several marks a pass look at whole frames: no zoom, no protocol 'release'")
    found_xy, confidence = np.empty_like(points_xy), np.empty(points_xy.shape[:2], np.float32)
    most = self._memory_budget // many.bytes_a_point(self.image_hw)
    for part in many.parts(points_xy.shape[:2], most):
      part_xy = points_xy[part]
      settings = many.Settings(many.blocks(marks, part_xy.shape[:2]), self.masks.shape[1], votes)
      self._count(many.num_passes(part_xy.shape[:2], settings) - settings.rounds, settings.rounds)
      found_xy[part], confidence[part] = compiled.ask_grid(
        self._predict_fn,
        self._mark,
        [frame.small for frame in pair],
        self.masks,
        many.deal(part_xy.shape[:2], settings, seed=0),
        part_xy,
        np.array(video_hw, np.int32),
        image_hw=self.image_hw,
        step_yx=many.step_yx(part_xy, video_hw, self.image_hw),
        votes=votes,
        chunk=self.plan.clean,
        readout=self._settings["readout"],
        inverse_temperature=self._settings["inverse_temperature"],
      )
    return PointFlow(found_xy, np.ones(confidence.shape, bool), confidence)

  def passes(self) -> Passes:
    """How many passes all that was asked has taken."""
    totals = [sum(int(count) for count in kind) for kind in zip(*self._counts)] or [0, 0]
    self._counts = [tuple(totals)]
    return Passes(*totals)

  def _count(self, marked: Any, clean: Any) -> None:
    """Adds to the passes; the numbers may still be on their way from the device."""
    self._counts.append((marked, clean))

  def explain(
    self,
    pair: tuple[Frame, Frame],
    point_xy: np.ndarray,
    video_hw: tuple[int, int],
    *,
    masks_at_once: int,
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Response, PointFlow]]:
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
    num_masks, masks = self.masks.shape[1], np.asarray(self.masks)
    point, size = np.asarray(point_xy, np.float32), np.array(video_hw, np.int32)
    # On the host, where arrays of any number of masks need no program of their own.
    cleans, answers = np.zeros((2, num_masks, *self.image_hw, 3), np.float32)
    colours, marked = np.zeros((num_masks, 3), np.float32), None
    for begin in range(0, num_masks, masks_at_once):
      count = begin + masks_at_once
      asked = self._clean([[f.small for f in pair]], masks[:1, begin:count], pairs_held=1)
      ours, *made = compiled.explain_masks(
        self._predict_fn,
        self._mark,
        asked,
        point,
        size,
        image_hw=self.image_hw,
        protocol=self._settings["protocol"],
      )
      marked = np.asarray(ours) if marked is None else marked
      cleans[begin:count], answers[begin:count], colours[begin:count] = map(np.asarray, made)
      response, found = compiled.explain_answer(
        answers - cleans,
        colours,
        self.masks,
        np.int32(count),
        point,
        size,
        image_hw=self.image_hw,
        read_at=self._read_at(video_hw),
        middle=perturb.middle(self._mark),
        **self._settings,
      )
      yield marked, cleans[:count], answers[:count], response, found

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
    point = self._place(jnp.asarray(point_xy), video_hw)
    return compiled(self._predict_fn, frames, self.masks[0], point, patch=self.patch, **named)

  def _place(self, points_xy: Array, video_hw: tuple[int, int]) -> Array:
    """Points of the video in pixels of the predictor's image."""
    protocol = self._settings["protocol"]
    return flow.place_points(points_xy, video_hw, self.image_hw, protocol=protocol)

  def _read_at(self, video_hw: tuple[int, int]) -> tuple[int, int] | None:
    """The size at which responses are read out; None for the predictor's own."""
    return video_hw if self._release else None

  def _clean(self, pairs: list[list[Any]], masks: Any = None, *, pairs_held: int = 0) -> Any:
    """`compiled.clean` of some pairs, padded to `pairs_held` (0: as many as are ever held)."""
    masks = self.masks if masks is None else masks
    held = pairs_held or self.pairs_at_once
    num_masks = masks.shape[1]
    # A single pair, as for most frames of a video, has a program of its own: padding costs a fifth
    # of its time; not with zoom, whose programs are many. Of several pairs, a step is all the masks
    # of one, or of some where these are few.
    size = 1 if len(pairs) == 1 and len(masks) == 1 else held
    together = 1 if size == 1 else max(1, _FEW // num_masks)
    return self.run(
      compiled.clean,
      self._predict_fn,
      flat(pairs, size),
      masks,
      np.arange(size) < len(pairs),
      pairs=held,
      chunk=min(together * num_masks, self.plan.clean),
      keep_tokens=self._keep_tokens,
    )

  def _ask_group(self, asked, full, pair_of, points_xy, video_hw) -> PointFlow:
    size = next(size for size in self.buckets if size >= len(points_xy))
    valid = np.arange(size) < len(points_xy)
    pair_of = np.resize(pair_of, size).astype(np.int32)
    points = np.resize(points_xy, (size, 2)).astype(np.float32)
    plan = self.plan
    if size == BUCKETS[1]:
      plan = plan._replace(points=min(plan.points, _FEW))
    answer = self.run(
      compiled.ask,
      self._predict_fn,
      self._mark,
      asked,
      pair_of,
      points,
      valid,
      np.array(video_hw, np.int32),
      image_hw=self.image_hw,
      plan=plan,
      read_at=self._read_at(video_hw),
      **self._settings,
    )
    inside = None
    if self._release:
      # The release's first window lies in the video, each later one in the one before it.
      inside = (np.zeros((size, 2), np.float32), np.array(video_hw[::-1], np.float32))
    rounds = self.masks.shape[0] - 1
    for number, window in enumerate(zoom.crop_sizes(video_hw, rounds), start=1):
      answer, corners = self.run(
        compiled.refine,
        self._predict_fn,
        self._mark,
        full,
        self.masks,
        np.int32(number),
        pair_of,
        points,
        answer.xy,
        np.float32(window),
        valid,
        inside,
        image_hw=self.image_hw,
        plan=plan,
        held=self.windows_at_once,
        keep_tokens=self._keep_tokens,
        **self._settings,
      )
      if self._release:
        inside = (corners, np.full(2, window, np.float32))
    return answer


def flat(pairs: list[list[Any]], size: int) -> list[Any]:
  """The frames of `size` pairs one after the other; beyond those given, the first ones again."""
  padded = [*pairs, *[pairs[0]] * (size - len(pairs))]
  return [frame for pair in padded for frame in pair]
