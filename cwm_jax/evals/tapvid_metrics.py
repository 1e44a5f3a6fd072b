"""TAP-Vid's numbers, NumPy only: distances, thresholds, Jaccard, occlusion.

Everything is measured on TAP-Vid's raster of 256 x 256, whatever the video's size and shape. The
answers about a video are flattened into `Answers`, so that numbers over several videos are those of
their concatenation. A number without a single answer behind it is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cwm_jax.types import InputError

RASTER = 256
THRESHOLDS = (1, 2, 4, 8, 16)
QUERY_MODES = ("first", "strided")


class Answers(NamedTuple):
  """One entry per (point, frame), [K]; frames that nothing is asked about are left out.

  distance:      float64, pixels at 256 x 256 between answer and truth.
  gt_occluded:   bool. Distances count where this is False.
  pred_occluded: bool.
  gap:           int32, frames from the query's to this one. Where it is 0, in the query's own
                 frame, an entry counts for distances only, and there only where asked for.
  """

  distance: np.ndarray
  gt_occluded: np.ndarray
  pred_occluded: np.ndarray
  gap: np.ndarray

  @property
  def at_query(self) -> np.ndarray:
    """bool [K]: entries in the query's own frame."""
    return self.gap == 0


def to_raster(
  points_xy: Float[np.ndarray, "*n 2"], size_hw: tuple[int, int]
) -> Float[np.ndarray, "*n 2"]:
  """Moves (x, y), pixels of a video of that size, to the raster of 256 x 256."""
  return points_xy * (RASTER / np.array([size_hw[1], size_hw[0]], float))


def compare(
  query_frames: Int[np.ndarray, " n"],
  gt_xy: Float[np.ndarray, "n t 2"],
  gt_occluded: Bool[np.ndarray, "n t"],
  pred_xy: Float[np.ndarray, "n t 2"],
  pred_occluded: Bool[np.ndarray, "n t"],
  *,
  query_mode: str = "first",
  frames: Int[np.ndarray, "n t"] | None = None,
) -> Answers:
  """Sets answers beside the truth.

  Args:
    query_frames: the frame in which each point was asked about.
    gt_xy, pred_xy: (x, y), pixels at 256 x 256.
    query_mode: "first" asks about the frames after the query's, "strided" about all others.
    frames: which frame each column is, for each point; None where column t is frame t.

  Raises:
    InputError: an unknown query mode.
  """
  if query_mode not in QUERY_MODES:
    raise InputError(f"the query mode is {query_mode!r}; choose one of {', '.join(QUERY_MODES)}")
  columns = np.arange(gt_xy.shape[1]) if frames is None else frames
  from_query = (columns - query_frames[:, None]).astype(np.int32)
  asked = from_query >= 0 if query_mode == "first" else np.ones_like(gt_occluded)
  distance = np.linalg.norm(pred_xy.astype(float) - gt_xy, axis=-1)
  values = (distance, gt_occluded, pred_occluded, from_query)
  return Answers(*(value[asked] for value in values))


def pool(answers: Sequence[Answers]) -> Answers:
  """All answers together."""
  return Answers(*(np.concatenate(values) for values in zip(*answers)))


def summarise(
  answers: Answers, *, distance_at_query: bool = False, nan_spreads: bool = False
) -> dict[str, float]:
  """The numbers of one video, or of several pooled.

  Args:
    distance_at_query: whether the query's own frame counts in average_distance and median_distance.
    nan_spreads: occlusion F1 goes by precision and recall, so it is NaN without a true positive.

  Returns:
    average_distance, median_distance: pixels, of points that are visible in truth.
    within_<k>, delta_avg: share of visible points closer than k pixels; the mean over all k.
    jaccard_<k>, average_jaccard: true positives (within k, said to be visible) over those plus all
      other visible points plus false positives.
    occlusion_accuracy: share of answers whose visibility is right.
    occlusion_f1: of saying "occluded"; with occlusion_tp, occlusion_fp, occlusion_fn, its counts.
    num_visible: how many visible points there are behind the thresholds.
  """
  visible = ~answers.gt_occluded
  measured = answers.distance[visible & (distance_at_query | ~answers.at_query)]
  out = {
    "average_distance": _mean(measured),
    "median_distance": float(np.median(measured)) if measured.size else float("nan"),
  }
  rest = ~answers.at_query
  distance, visible = answers.distance[rest], visible[rest]
  said_occluded = answers.pred_occluded[rest]
  said_visible, occluded = ~said_occluded, ~visible
  for k in THRESHOLDS:
    close = distance < k
    right = np.sum(close & visible & said_visible)
    wrong = np.sum(said_visible & ~(close & visible))
    out[f"within_{k}"] = _mean(close[visible])
    out[f"jaccard_{k}"] = _ratio(right, np.sum(visible) + wrong)
  out["delta_avg"] = float(np.mean([out[f"within_{k}"] for k in THRESHOLDS]))
  out["average_jaccard"] = float(np.mean([out[f"jaccard_{k}"] for k in THRESHOLDS]))
  tp, fp = np.sum(said_occluded & occluded), np.sum(said_occluded & visible)
  fn = np.sum(said_visible & occluded)
  out["occlusion_accuracy"] = _mean(said_occluded == occluded)
  out["occlusion_f1"] = _f1(tp, fp, fn, nan_spreads)
  counts = dict(occlusion_tp=tp, occlusion_fp=fp, occlusion_fn=fn, num_visible=visible.sum())
  return out | {name: float(value) for name, value in counts.items()}


def mean_over_videos(
  videos: Sequence[dict[str, float]], *, nan_spreads: bool = False
) -> dict[str, float]:
  """TAP-Vid's summary: means over videos, occlusion F1 over all videos' answers together.

  Args:
    nan_spreads: a video without a number makes the mean NaN; otherwise it is left out. For F1 see
      `summarise`.
  """
  out = {}
  for name in videos[0]:
    values = np.array([video[name] for video in videos])
    counted = values if nan_spreads else values[~np.isnan(values)]
    total = name.startswith("occlusion_") and name[-2:] in ("tp", "fp", "fn")
    out[name] = float(counted.sum()) if total or name == "num_visible" else _mean(counted)
  counts = (out[f"occlusion_{kind}"] for kind in ("tp", "fp", "fn"))
  return out | {"occlusion_f1": _f1(*counts, nan_spreads)}


def by_gap(answers: Answers, *, bins: int = 24) -> dict[str, np.ndarray]:
  """How errors grow with the number of frames between query and answer.

  Args:
    bins: gaps are put together in at most so many groups of one width.

  Returns:
    gap float [B], the middle of each group that has visible points; average_distance,
    median_distance, delta_avg and num_visible, float [B].
  """
  counts = ~answers.gt_occluded & ~answers.at_query
  gap, distance = np.abs(answers.gap[counts]), answers.distance[counts]
  width = max(1, -(-int(gap.max(initial=0)) // bins))
  # Gaps 1 to `width` are the first group.
  group = (gap - 1) // width
  rows = []
  for index in np.unique(group):
    here = distance[group == index]
    delta = np.mean([np.mean(here < k) for k in THRESHOLDS])
    rows.append((index * width + (width + 1) / 2, here.mean(), np.median(here), delta, here.size))
  names = ("gap", "average_distance", "median_distance", "delta_avg", "num_visible")
  return dict(zip(names, np.array(rows, float).reshape(-1, len(names)).T))


def _f1(tp, fp, fn, nan_without_hit: bool) -> float:
  if nan_without_hit and not tp:
    return float("nan")
  return _ratio(2 * tp, 2 * tp + fp + fn)


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else float("nan")


def _ratio(part: np.number | float, whole: np.number | float) -> float:
  return float(part / whole) if whole else float("nan")
