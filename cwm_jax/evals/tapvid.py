"""TAP-Vid's evaluation of any tracker on clips in the folder form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.data import tapvid
from cwm_jax.evals import tapvid_metrics
from cwm_jax.types import InputError

PROTOCOLS = ("first", "cfg")


class TapVidEvaluator:
  """Runs a tracker over a folder of clips.

  Protocol "first" asks about each point from its first visible frame in every later frame (First,
  or VFG); "cfg" asks from every frame in which it is visible about the one `frame_gap` later.
  """

  def __init__(
    self,
    tracker: Any,
    root: str | os.PathLike[str],
    *,
    protocol: str = "first",
    frame_gap: int = 5,
    distance_at_query: bool = False,
    results: str | os.PathLike[str] | None = None,
    on_clip: Callable[[str, dict[str, float]], None] | None = None,
  ):
    """Lists the clips.

    Args:
      tracker: anything with `track` and `flow` as `cwm_jax.tracker.Tracker` has them.
      root: folder of clip folders, or one clip's.
      frame_gap: of protocol "cfg".
      distance_at_query: see `tapvid_metrics.summarise`.
      results: folder for one .npz of answers a clip; those that are there are not computed again.
      on_clip: called with a clip's name and numbers when it is done.

    Raises:
      InputError: an unknown protocol, or no clips.
    """
    if protocol not in PROTOCOLS:
      raise InputError(f"the protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    self._tracker, self._protocol, self._frame_gap = tracker, protocol, frame_gap
    self._distance_at_query, self._on_clip = distance_at_query, on_clip
    self._folders = tapvid.list_clips(root)
    self._results = None if results is None else Path(results)

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields <clip>/<number> for each clip, then mean/<number> (over clips) and pooled/<number>."""
    answers, numbers = [], []
    for folder in self._folders:
      name = os.path.basename(os.path.abspath(folder))
      answers.append(self._stored(name, folder))
      numbers.append(self._numbers(answers[-1]))
      if self._on_clip is not None:
        self._on_clip(name, numbers[-1])
      yield from ((f"{name}/{key}", value) for key, value in numbers[-1].items())
    for key, value in tapvid_metrics.mean_over_videos(numbers).items():
      yield f"mean/{key}", value
    for key, value in self._numbers(tapvid_metrics.pool(answers)).items():
      yield f"pooled/{key}", value

  def answer(self, clip: tapvid.TapVidClip) -> tapvid_metrics.Answers:
    """The answers about one clip."""
    ask = self._ask_first if self._protocol == "first" else self._ask_gap
    return ask(clip)

  def _numbers(self, answers: tapvid_metrics.Answers) -> dict[str, float]:
    return tapvid_metrics.summarise(answers, distance_at_query=self._distance_at_query)

  def _stored(self, name: str, folder: str) -> tapvid_metrics.Answers:
    if self._results is None:
      return self.answer(tapvid.read_clip(folder))
    path = self._results / f"{name}.npz"
    if path.is_file():
      with np.load(path) as file:
        return tapvid_metrics.Answers(*(file[key] for key in tapvid_metrics.Answers._fields))
    answers = self.answer(tapvid.read_clip(folder))
    self._results.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **answers._asdict())
    os.replace(partial, path)
    return answers

  def _ask_first(self, clip: tapvid.TapVidClip) -> tapvid_metrics.Answers:
    points = np.flatnonzero(~clip.occluded.all(axis=1))
    starts = np.argmin(clip.occluded[points], axis=1)
    queries = np.column_stack([starts, clip.points_xy[points, starts][:, ::-1]])
    tracks = self._tracker.track(clip.video, queries)
    return self._compare(
      clip, starts, clip.points_xy[points], clip.occluded[points], tracks.xy, tracks.visible
    )

  def _ask_gap(self, clip: tapvid.TapVidClip) -> tapvid_metrics.Answers:
    asked = tapvid.queries_cfg(clip, gap=self._frame_gap)
    found = asked.start_xy.copy()
    visible = np.ones(len(asked.point), bool)
    for start in np.unique(asked.start):
      mine = asked.start == start
      pair = clip.video[start], clip.video[start + self._frame_gap]
      answer = self._tracker.flow(*pair, asked.start_xy[mine])
      found[mine], visible[mine] = answer.xy, answer.visible
    # Each question is a track of two frames, the first of which is the query's.
    both = [asked.start, asked.stop]
    truth = np.stack([clip.points_xy[asked.point, t] for t in both], axis=1)
    occluded = np.stack([clip.occluded[asked.point, t] for t in both], axis=1)
    return self._compare(
      clip,
      np.zeros(len(found), int),
      truth,
      occluded,
      np.stack([asked.start_xy, found], axis=1),
      np.stack([np.ones_like(visible), visible], axis=1),
    )

  def _compare(self, clip, query_frames, truth_xy, occluded, found_xy, visible):
    size_hw = clip.video.shape[1:3]
    return tapvid_metrics.compare(
      query_frames,
      tapvid_metrics.to_raster(truth_xy, size_hw),
      occluded,
      tapvid_metrics.to_raster(found_xy, size_hw),
      ~visible,
    )
