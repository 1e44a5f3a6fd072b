"""Whether a mover moves along with itself: segments asked where the layers are known.

A point on a mover is asked what moves along with it (`counterfactual.segments`): the pixels whose
score is above 0. The truth is what can be seen of that mover in the same picture. Beside it stands
a disc round the point, of the size that movers have in the middle, which looks at nothing. The disc
is a strong guess, for the point lies on the mover: an answer that is no better has found a
neighbourhood and no object. Motion does not come into it, frame 2 of a scene is never shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cwm_jax import viz
from cwm_jax.counterfactual import segments
from cwm_jax.data import procedural
from cwm_jax.evals import scenes, spread
from cwm_jax.types import InputError


class SegmentQuestion(NamedTuple):
  """A point on a mover.

  frame:    uint8 [H, W, 3].
  point_xy: float32 [2], continuous pixels.
  truth:    bool [H, W], what is seen of the mover that the point lies on.
  """

  frame: np.ndarray
  point_xy: np.ndarray
  truth: np.ndarray


class SegmentsEvaluator:
  """Asks a tracker what moves along with points; several processes share them out."""

  def __init__(
    self, tracker: Any, questions: Iterable[SegmentQuestion], *, radius: float, expected: int = 0
  ):
    """
    Args:
      tracker: anything with `ask` as `cwm_jax.tracker.Tracker` has it.
      questions: the same on every process; consumed one at a time by `run`.
      radius: of the disc to compare with, as a share of the frame's shorter side.
      expected: about how many questions, for the time left that is logged; 0 logs none.
    """
    self._tracker, self._radius = tracker, radius
    self._questions, self._expected = questions, expected

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields, over all points, means of intersection over union with the mover:

    iou: of the pixels whose score is above 0; sized/iou: of as many pixels as the disc has, those
    with the highest scores, so that a threshold in the wrong place is not to blame; disc/iou;
    iou_ratio: of iou to the disc's; share: how much of the picture is said to move along;
    truth/share: how much does; num_points. The same on every process.

    Raises:
      InputError: there is nothing to ask about, or the tracker is no predictor.
    """
    mine: dict[int, bytes] = {}
    count = 0
    asked = spread.logged(self._questions, total=self._expected, unit="points")
    for count, question in enumerate(asked, start=1):
      if spread.is_mine(count - 1):
        mine[count - 1] = json.dumps(self._compare(question)).encode()
    if not count:
      raise InputError("there is no point on a mover to ask about")
    found = spread.gather(mine, count)
    rows = [json.loads(found[index]) for index in range(count)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    yield from means.items()
    yield "iou_ratio", means["iou"] / means["disc/iou"]
    yield "num_points", float(len(rows))

  def _compare(self, question: SegmentQuestion) -> dict[str, float]:
    frame, point_xy, truth = question
    small = self._tracker.ask(segments.moves_along, frame, frame, point_xy)
    score = viz.resized(np.asarray(small, np.float32), truth.shape)
    near = disc(truth.shape, point_xy, self._radius)
    # Ranks, so that exactly as many pixels are taken.
    rank = np.argsort(np.argsort(-score, axis=None)).reshape(score.shape)
    answers = {"": score > 0, "sized/": rank < near.sum(), "disc/": near}
    shares = {"share": float((score > 0).mean()), "truth/share": float(truth.mean())}
    return {f"{name}iou": _iou(answer, truth) for name, answer in answers.items()} | shares


def disc(
  size_hw: tuple[int, int], point_xy: Float[np.ndarray, " 2"], radius: float
) -> Bool[np.ndarray, "h w"]:
  """The pixels whose centres lie within `radius` of a point, as a share of the shorter side."""
  h, w = size_hw
  x, y = np.arange(w) + 0.5 - point_xy[0], np.arange(h) + 0.5 - point_xy[1]
  return np.hypot(x[None], y[:, None]) <= radius * min(h, w)


def on_scenes(tracker: Any, *, limit: int) -> SegmentsEvaluator:
  """Of the points on movers of the first `limit` scenes of `scenes-test-v1`, two a scene."""
  seeds, preset = procedural.scenes_test_v1()
  radius, expected = sum(preset.radius) / 2, 2 * len(seeds[:limit])
  return SegmentsEvaluator(tracker, _scene_questions(limit), radius=radius, expected=expected)


def _scene_questions(limit: int) -> Iterator[SegmentQuestion]:
  for pairs in scenes.scenes_test_v1(limit=limit, at_a_time=min(limit, 10)):
    for scene, point in np.argwhere(pairs.mover):
      point_xy, layers = pairs.points_xy[scene, point], pairs.layers[scene]
      column, row = point_xy.astype(int)
      yield SegmentQuestion(pairs.frames[scene, 0], point_xy, layers == layers[row, column])


def _iou(answer: np.ndarray, truth: np.ndarray) -> float:
  return float((answer & truth).sum() / (answer | truth).sum())
