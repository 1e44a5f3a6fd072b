"""A tracker's answers about one clip: asked for, kept in a file, set beside the truth."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwm_jax import whole_files
from cwm_jax.data import tapvid_queries as queries_lib
from cwm_jax.data.tapvid import TapVidClip
from cwm_jax.evals import tapvid_metrics
from cwm_jax.evals.protocols import Protocol


class ClipAnswers(NamedTuple):
  """Q questions about a clip and their answers in K frames each (see `tapvid_queries.Questions`).

  The first five are the project's form of tracks; coordinates are continuous pixels of `size_hw`.

  tracks_xy:      float32 [Q, K, 2].
  occluded:       bool [Q, K].
  confidence:     float32 [Q, K] in [0, 1].
  queries_tyx:    float32 [Q, 3], as the tracker was asked.
  size_hw:        int32 [2], of the frames as the tracker saw them.
  frames:         int32 [Q, K], which frame of the clip each column is.
  point:          int32 [Q], which annotated point was asked about.
  truth_xy:       float32 [Q, K, 2], meaningless where occluded.
  truth_occluded: bool [Q, K].
  """

  tracks_xy: np.ndarray
  occluded: np.ndarray
  confidence: np.ndarray
  queries_tyx: np.ndarray
  size_hw: np.ndarray
  frames: np.ndarray
  point: np.ndarray
  truth_xy: np.ndarray
  truth_occluded: np.ndarray

  @property
  def start(self) -> np.ndarray:
    """int [Q]: the frame in which the tracker was shown each point."""
    return self.queries_tyx[:, 0].astype(int)


def ask(
  tracker: Any, clip: TapVidClip, protocol: Protocol, *, frame_gap: int = 5, query_stride: int = 5
) -> ClipAnswers:
  """Asks a tracker what the protocol asks.

  Args:
    tracker: anything with `track` and `flow` as `cwm_jax.tracker.Tracker` has them.
    clip: at the size that the tracker is to see.
    frame_gap, query_stride: of queries "cfg" and "strided".
  """
  if protocol.queries == "cfg":
    asked = queries_lib.queries_cfg(clip, gap=frame_gap)
  elif protocol.queries == "strided":
    asked = queries_lib.queries_strided(clip, stride=query_stride)
  else:
    asked = queries_lib.queries_first(clip)
  queries = queries_lib.queries_tyx(clip, asked, whole_pixels=protocol.bare_indices)
  rows = asked.point[:, None], asked.frames
  # In the query's own frame the answer is the query, unless the tracker is asked there too.
  xy = np.broadcast_to(queries[:, None, :0:-1], (*asked.frames.shape, 2)).copy()
  visible = asked.frames == asked.start[:, None]
  found = xy, visible, visible.astype(np.float32)
  if len(queries) and protocol.queries == "cfg":
    _ask_pairs(tracker, clip.video, asked, queries, found)
  elif len(queries):
    _ask_tracks(tracker, clip.video, queries, found, backwards=protocol.queries == "strided")
  if protocol.query_frame == "asked":
    _ask_query_frames(tracker, clip.video, asked, queries, found)
  xy, visible, confidence = found
  return ClipAnswers(
    tracks_xy=xy,
    occluded=~visible,
    confidence=confidence,
    queries_tyx=queries,
    size_hw=np.array(clip.video.shape[1:3], np.int32),
    frames=asked.frames,
    point=asked.point,
    truth_xy=clip.points_xy[rows],
    truth_occluded=clip.occluded[rows],
  )


def compare(answers: ClipAnswers, protocol: Protocol) -> tapvid_metrics.Answers:
  """Sets answers beside the truth, as the protocol wants it."""
  size_hw = tuple(answers.size_hw.tolist())
  found_xy = answers.tracks_xy - (0.5 if protocol.bare_indices else 0.0)
  compared = tapvid_metrics.compare(
    answers.start,
    tapvid_metrics.to_raster(answers.truth_xy, size_hw),
    answers.truth_occluded,
    tapvid_metrics.to_raster(found_xy, size_hw),
    answers.truth_occluded if protocol.truth_hidden else answers.occluded,
    query_mode="strided" if protocol.queries == "strided" else "first",
    frames=answers.frames,
  )
  if protocol.query_frame == "given":
    return compared._replace(distance=np.where(compared.at_query, 0.0, compared.distance))
  return compared


def track_errors(answers: ClipAnswers, protocol: Protocol, *, least: int = 1) -> np.ndarray:
  """float64 [Q]: the mean distance of each track, pixels at 256 x 256.

  The query's own frame does not count.

  Args:
    least: a track that is visible in fewer frames has no error but NaN.
  """
  size_hw = tuple(answers.size_hw.tolist())
  found_xy = answers.tracks_xy - (0.5 if protocol.bare_indices else 0.0)
  away_xy = tapvid_metrics.to_raster(found_xy - answers.truth_xy, size_hw)
  from_query = answers.frames - answers.start[:, None]
  asked = from_query != 0 if protocol.queries == "strided" else from_query > 0
  counts = asked & ~answers.truth_occluded
  total = np.where(counts, np.linalg.norm(away_xy, axis=-1), 0.0).sum(axis=1)
  number = counts.sum(axis=1)
  return np.where(number >= max(1, least), total / np.maximum(number, 1), np.nan)


def save(path: Path, answers: ClipAnswers, *, origin: str = "", manner: str = "") -> None:
  """Writes a `.npz`; a file of that name is there whole or not at all.

  Args:
    origin: tells whose answers they are, such as a hash of the weights that were asked.
    manner: tells how they were asked, such as a hash of the settings.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with whole_files.writing(path) as partial, open(partial, "wb") as file:
    np.savez(file, **answers._asdict(), origin=np.array(origin), manner=np.array(manner))


def load(path: Path, *, origin: str = "", manner: str = "") -> ClipAnswers | None:
  """What `save` wrote; None where that is not there, is of another origin or manner, or cannot be
  read. Files from before the manner was noted are taken for any."""
  try:
    with np.load(path, allow_pickle=False) as file:
      if (str(file["origin"]) if "origin" in file else "") != origin:
        return None
      if "manner" in file and str(file["manner"]) != manner:
        return None
      return ClipAnswers(*(file[key] for key in ClipAnswers._fields))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _ask_tracks(tracker: Any, video: np.ndarray, queries, found, *, backwards: bool) -> None:
  """Fills in what lies after each query and, on the video played backwards, what lies before."""
  last = len(video) - 1
  passes = [(video, queries, slice(None))]
  if backwards:
    mirrored = np.column_stack([last - queries[:, 0], queries[:, 1:]])
    passes.append((video[::-1], mirrored, slice(None, None, -1)))
  for frames, asked, order in passes:
    tracks = tracker.track(frames, asked)
    later = np.arange(len(video)) > asked[:, :1]
    for mine, theirs in zip(found, tracks):
      mine[:, order][later] = np.asarray(theirs)[later]


def _ask_pairs(tracker: Any, video: np.ndarray, asked, queries, found) -> None:
  """Fills in the later frame of each question; the earlier one is its query's."""
  stop = asked.frames[:, 1]
  for start in np.unique(asked.start):
    mine = asked.start == start
    frames = video[start], video[stop[mine][0]]
    for to, answer in zip(found, tracker.flow(*frames, queries[mine, :0:-1])):
      to[mine, 1] = answer


def _ask_query_frames(tracker: Any, video: np.ndarray, asked, queries, found) -> None:
  """Fills in the query's own frame, by asking from it to itself."""
  at_query = asked.frames == asked.start[:, None]
  for start in np.unique(asked.start):
    mine = asked.start == start
    answer = tracker.flow(video[start], video[start], queries[mine, :0:-1])
    for to, values in zip(found, answer):
      to[at_query & mine[:, None]] = values
