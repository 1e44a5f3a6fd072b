"""How well a tracker finds the motion of points between two frames whose truth is known.

All numbers are pixels at 256 x 256, of points that stay visible. Three references come with them:
zero motion; the same tracker with frame 2 taken from another pair (if it really looks at frame 2,
its answers are then no better than chance); and chance, its own motions given to the points of
another pair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cwm_jax.data import flowfiles
from cwm_jax.evals import scenes
from cwm_jax.evals.tapvid_metrics import THRESHOLDS, to_raster
from cwm_jax.types import InputError

# At 256 x 256; below it a point counts as standing still.
MOVING = 1.0


class FlowQuestions(NamedTuple):
  """Points of some pairs of one size.

  frames:    uint8 [P, 2, H, W, 3].
  points_xy: float32 [P, N, 2], in frame 1, continuous pixels.
  truth_xy:  float32 [P, N, 2], in frame 2.
  visible:   bool [P, N], whether the point is seen in frame 2.
  """

  frames: np.ndarray
  points_xy: np.ndarray
  truth_xy: np.ndarray
  visible: np.ndarray


class FlowEvaluator:
  """Asks a tracker about points of frame pairs."""

  def __init__(self, tracker: Any, questions: Iterable[FlowQuestions], *, honesty: bool = True):
    """
    Args:
      tracker: anything with `pairs` as `cwm_jax.tracker.Tracker` has it.
      questions: groups of pairs, consumed one at a time by `run`.
      honesty: also ask with frame 2 taken from another pair of the group (of two and more).
    """
    self._tracker, self._questions, self._honesty = tracker, questions, honesty

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields, over all groups together:

    average_distance, median_distance, within_<k>, delta_avg; zero/... the same of zero motion;
    median_ratio: of the two medians; moving/... of the points that move; exchanged/... with frame 2
    exchanged, chance/... with the answers exchanged; num_points.

    Raises:
      InputError: there is nothing to ask about.
    """
    found: dict[str, list[np.ndarray]] = {}
    moving = []
    for group in self._questions:
      motion = _motion(group.truth_xy, group)
      moving.append((np.linalg.norm(motion, axis=-1) >= MOVING)[group.visible])
      answered = _motion(self._tracker.pairs(group.frames, group.points_xy).xy, group)
      guesses = {"": answered, "zero/": np.zeros_like(motion)}
      if self._honesty and len(group.frames) > 1:
        guesses["chance/"] = np.roll(answered, 1, axis=0)
        mixed = group.frames.copy()
        mixed[:, 1] = np.roll(mixed[:, 1], 1, axis=0)
        guesses["exchanged/"] = _motion(self._tracker.pairs(mixed, group.points_xy).xy, group)
      for name, guess in guesses.items():
        distance = np.linalg.norm(guess - motion, axis=-1)[group.visible]
        found.setdefault(name, []).append(distance)
    moves = np.concatenate(moving) if moving else np.zeros(0, bool)
    if not moves.size:
      raise InputError("there is no point that stays visible to ask about")
    distances = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, distance in distances.items():
      yield from _summarise(name, distance)
    yield from _ratio("", distances)
    if moves.any():
      for name in ("", "zero/"):
        yield from _summarise("moving/" + name, distances[name][moves])
      yield from _ratio("moving/", {name: distances[name][moves] for name in ("", "zero/")})
    yield "num_points", float(moves.size)


def scene_questions(*, limit: int = 500) -> Iterator[FlowQuestions]:
  """The frozen test set `scenes-test-v1`, its first `limit` scenes."""
  for pairs in scenes.scenes_test_v1(limit=limit, at_a_time=min(limit, 10)):
    visible = np.ones(pairs.points_xy.shape[:2], bool)
    yield FlowQuestions(pairs.frames, pairs.points_xy, pairs.truth_xy, visible)


def flow_pair_questions(
  root: str | os.PathLike[str], *, per_side: int = 8
) -> Iterator[tuple[str, FlowQuestions]]:
  """(name, one pair) for each pair with dense truth below a folder.

  Asks about the centres of `per_side` x `per_side` cells whose truth is known and lies in the
  frame; visibility is not known in these files, so nothing else is left out.
  """
  for pair in flowfiles.iter_flow_pairs(root):
    h, w = pair.valid.shape
    rows, cols = (((np.arange(per_side) + 0.5) * side / per_side).astype(int) for side in (h, w))
    row, col = (index.reshape(-1) for index in np.meshgrid(rows, cols, indexing="ij"))
    points = np.stack([col, row], axis=-1).astype(np.float32) + 0.5
    truth = points + pair.flow_xy[row, col]
    inside = ((truth >= 0) & (truth <= (w, h))).all(axis=-1) & pair.valid[row, col]
    frames = np.stack([pair.frame1, pair.frame2])
    yield pair.name, FlowQuestions(frames[None], points[None], truth[None], inside[None])


def _motion(xy: np.ndarray, group: FlowQuestions) -> np.ndarray:
  """Displacement from the points, at 256 x 256."""
  return to_raster(xy.astype(float) - group.points_xy, group.frames.shape[2:4])


def _summarise(name: str, distance: np.ndarray) -> Iterator[tuple[str, float]]:
  yield f"{name}average_distance", float(distance.mean())
  yield f"{name}median_distance", float(np.median(distance))
  within = [float((distance < k).mean()) for k in THRESHOLDS]
  yield from ((f"{name}within_{k}", value) for k, value in zip(THRESHOLDS, within))
  yield f"{name}delta_avg", float(np.mean(within))


def _ratio(name: str, distances: dict[str, np.ndarray]) -> Iterator[tuple[str, float]]:
  """The median as a share of zero motion's; NaN where that is 0."""
  still = float(np.median(distances["zero/"]))
  yield f"{name}median_ratio", float(np.median(distances[""])) / still if still else float("nan")
