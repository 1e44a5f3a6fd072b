"""How well a tracker finds the motion of points between two frames whose truth is known.

All numbers are pixels at 256 x 256, of points that stay visible. Three references come with them:
zero motion; the same tracker with frame 2 taken from another pair (if it really looks at frame 2,
its answers are then no better than chance); and chance, its own motions given to the points of
another pair.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwm_jax import whole_files
from cwm_jax.data import flowfiles
from cwm_jax.evals import scenes, spread
from cwm_jax.evals.tapvid_metrics import THRESHOLDS, to_raster
from cwm_jax.types import InputError

# At 256 x 256; below it a point counts as standing still.
MOVING = 1.0
_LENGTH, _ORIGIN = "length", "origin"


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
  """Asks a tracker about points of frame pairs; several processes share the groups out."""

  def __init__(
    self,
    trackers: Any,
    questions: Sequence[FlowQuestions],
    *,
    honesty: bool = True,
    kept: Path | None = None,
    origin: str = "",
  ):
    """
    Args:
      trackers: anything with `pairs` as `cwm_jax.tracker.Tracker` has it, or a list of such, one
        for every worker.
      questions: groups of pairs, the same on every process.
      honesty: also ask with frame 2 taken from another pair of the group (of two and more).
      kept: folder for one .npz of distances a group; those that are there, and of the same origin,
        are not asked for again.
      origin: tells who is asked what and how, such as a hash of all settings.
    """
    self._trackers = trackers if isinstance(trackers, list | tuple) else [trackers]
    self._questions, self._honesty = questions, honesty
    self._kept, self._origin = kept, origin

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields, over all groups together:

    average_distance, median_distance, within_<k>, delta_avg; zero/... the same of zero motion;
    median_ratio: of the two medians; moving/... of the points that move; exchanged/... with frame 2
    exchanged, chance/... with the answers exchanged; num_points. The same on every process.

    Raises:
      InputError: there is nothing to ask about.
    """
    count = len(self._questions)
    mine = spread.my_share(count)
    done = spread.work_through(self._known_or_asked, mine, self._trackers)
    done = spread.logged(done, total=len(mine), unit="groups of pairs")
    found = spread.gather({index: spread.pack(parts) for index, parts in done}, count)
    groups = [spread.unpack(found[index]) for index in range(count)]
    # A lone pair cannot be exchanged with another, so a group may lack a name.
    names = dict.fromkeys(name for group in groups for name in group)
    distances = {name: np.concatenate([g[name] for g in groups if name in g]) for name in names}
    moves = distances.pop(_LENGTH, np.zeros(0)) >= MOVING
    if not moves.size:
      raise InputError("there is no point that stays visible to ask about")
    for name, distance in distances.items():
      yield from _summarise(name, distance)
    yield from _ratio("", distances)
    if moves.any():
      for name in ("", "zero/"):
        yield from _summarise("moving/" + name, distances[name][moves])
      yield from _ratio("moving/", {name: distances[name][moves] for name in ("", "zero/")})
    yield "num_points", float(moves.size)

  def _known_or_asked(self, tracker: Any, index: int) -> dict[str, np.ndarray]:
    """`_distances`, kept."""
    if self._kept is None:
      return self._distances(tracker, index)
    path = self._kept / f"{index:03d}.npz"
    try:
      found = spread.unpack(path.read_bytes())
      if str(found.pop(_ORIGIN)) == self._origin:
        return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      pass
    found = self._distances(tracker, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_files.writing(path) as partial:
      partial.write_bytes(spread.pack({**found, _ORIGIN: np.array(self._origin)}))
    return found

  def _distances(self, tracker: Any, index: int) -> dict[str, np.ndarray]:
    """{whose guess: pixels it is off, of each visible point} of a group; _LENGTH: of the motion."""
    group = self._questions[index]
    motion = _motion(group.truth_xy, group)
    answered = _motion(tracker.pairs(group.frames, group.points_xy).xy, group)
    guesses = {"": answered, "zero/": np.zeros_like(motion)}
    if self._honesty and len(group.frames) > 1:
      guesses["chance/"] = np.roll(answered, 1, axis=0)
      mixed = group.frames.copy()
      mixed[:, 1] = np.roll(mixed[:, 1], 1, axis=0)
      guesses["exchanged/"] = _motion(tracker.pairs(mixed, group.points_xy).xy, group)
    off = {name: np.linalg.norm(guess - motion, axis=-1) for name, guess in guesses.items()}
    off[_LENGTH] = np.linalg.norm(motion, axis=-1)
    return {name: values[group.visible] for name, values in off.items()}


def scene_questions(*, limit: int = 500) -> Iterator[FlowQuestions]:
  """The frozen test set `scenes-test-v1`, its first `limit` scenes."""
  groups = scenes.scenes_test_v1(limit=limit, at_a_time=min(limit, 10))
  for pairs in spread.logged(groups, total=-(-limit // 10), unit="groups of scenes drawn"):
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
