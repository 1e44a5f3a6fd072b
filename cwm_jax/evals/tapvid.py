"""TAP-Vid's evaluation of any tracker, video by video, over devices and processes, resumable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.data import tapvid_queries
from cwm_jax.data.tapvid import ClipSource
from cwm_jax.evals import protocols, spread, tapvid_answers, tapvid_metrics
from cwm_jax.progress import format_seconds
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)


class TapVidEvaluator:
  """Runs a tracker over a set of clips.

  After `run`: `answers` {clip: Answers}, `numbers` {clip: numbers}, `skipped` {clip: why}.
  """

  def __init__(
    self,
    trackers: Any | Sequence[Any],
    clips: ClipSource,
    *,
    protocol: str = "first",
    frame_gap: int = 5,
    query_stride: int = 5,
    resolution: str = "native",
    kept: Path | None = None,
    origin: str = "",
    manner: str = "",
    on_clip: Callable[[str, dict[str, float]], None] | None = None,
  ):
    """
    Args:
      trackers: anything with `track` and `flow` as `cwm_jax.tracker.Tracker` has them; several
        (of one kind) share the clips, each in a thread of its own.
      clips: see `data.tapvid_pickles.open_clips`.
      protocol: a name of `evals.protocols`.
      frame_gap, query_stride: of queries "cfg" and "strided".
      resolution: at which the tracker sees the clips, see `tapvid_queries.resolution_hw`.
      kept: folder for one .npz of answers a clip; those that are there, and of the same
        origin and manner, are not computed again.
      origin, manner: tell whose answers they are, see `tapvid_answers.save`.
      on_clip: called with a clip's name and numbers when it is done by this process.

    Raises:
      InputError: an unknown protocol or resolution, or a gap or stride below 1.
    """
    self.protocol = protocols.find(protocol)
    if frame_gap < 1 or query_stride < 1:
      raise InputError("the frame gap and the stride of the queries must be 1 or more")
    tapvid_queries.resolution_hw(resolution, (16, 16))
    self._trackers = trackers if isinstance(trackers, list | tuple) else [trackers]
    self._clips, self._kept, self._on_clip = clips, kept, on_clip
    self._asked = dict(frame_gap=frame_gap, query_stride=query_stride)
    self._resolution, self._whose = resolution, dict(origin=origin, manner=manner)
    self.answers: dict[str, tapvid_metrics.Answers] = {}
    self.numbers: dict[str, dict[str, float]] = {}
    self.skipped: dict[str, str] = {}

  def run(self) -> Iterator[tuple[str, float]]:
    """Yields <clip>/<number> for each clip, then mean/<number> (over clips), pooled/<number> (over
    all clips' answers together), num_clips, of them num_empty (clips about which the protocol asks
    nothing, which no mean counts), and num_skipped. The same on every process.

    Raises:
      InputError: no clip could be used.
    """
    names = self._clips.names
    mine = spread.my_share(len(names))
    started, computed = time.monotonic(), 0
    results: dict[int, bytes] = {}
    done = spread.work_through(self._answer, mine, self._trackers)
    for index, (answers, is_new) in done:
      results[index] = _pack(answers)
      computed += is_new
      each = (time.monotonic() - started) / max(computed, 1)
      left = format_seconds(each * (len(mine) - len(results)))
      place = f"{len(results)}/{len(mine)} {names[index]}"
      if isinstance(answers, str):
        _LOG.warning("  %s is left out: %s", place, answers)
        continue
      numbers = self._summarise(answers)
      _LOG.info("  %s: AD %.2f px  eta %s", place, numbers["average_distance"], left)
      if self._on_clip is not None:
        self._on_clip(names[index], numbers)
    self._collect(spread.gather(results, len(names)))
    for name, numbers in self.numbers.items():
      yield from ((f"{name}/{key}", value) for key, value in numbers.items())
    nan_spreads, everything = self.protocol.nan_spreads, list(self.numbers.values())
    asked = [self.numbers[name] for name, own in self.answers.items() if own.distance.size]
    over = tapvid_metrics.mean_over_videos(asked or everything, nan_spreads=nan_spreads)
    yield from ((f"mean/{key}", value) for key, value in over.items())
    pooled = self._summarise(tapvid_metrics.pool(list(self.answers.values())))
    yield from ((f"pooled/{key}", value) for key, value in pooled.items())
    yield "num_clips", float(len(everything))
    yield "num_empty", float(len(everything) - len(asked))
    yield "num_skipped", float(len(self.skipped))

  def read(self, index: int) -> Any:
    """A clip as the trackers see it. Raises InputError where it is broken."""
    return tapvid_queries.at_resolution(self._clips.read(index), self._resolution)

  def kept_answers(self, name: str) -> tapvid_answers.ClipAnswers | None:
    """A clip's answers where they are kept, and of this origin and manner; else None."""
    if self._kept is None:
      return None
    return tapvid_answers.load(self._kept / f"{name}.npz", **self._whose)

  def _collect(self, results: dict[int, bytes]) -> None:
    for index, name in enumerate(self._clips.names):
      answers = _unpack(results[index])
      if isinstance(answers, str):
        self.skipped[name] = answers
      else:
        self.answers[name], self.numbers[name] = answers, self._summarise(answers)
    if not self.answers:
      why = next(iter(self.skipped.values()), "there is none")
      raise InputError(f"none of the {len(self.skipped)} clips can be used: {why}")

  def _summarise(self, answers: tapvid_metrics.Answers) -> dict[str, float]:
    return tapvid_metrics.summarise(
      answers,
      distance_at_query=self.protocol.query_frame != "out",
      nan_spreads=self.protocol.nan_spreads,
    )

  def _answer(self, tracker: Any, index: int) -> tuple[tapvid_metrics.Answers | str, bool]:
    """A clip's answers, or why it has none; and whether they were computed now."""
    name = self._clips.names[index]
    known = self.kept_answers(name)
    if known is not None:
      return tapvid_answers.compare(known, self.protocol), False
    try:
      clip = self.read(index)
    except InputError as error:
      return str(error), False
    found = tapvid_answers.ask(tracker, clip, self.protocol, **self._asked)
    if self._kept is not None:
      tapvid_answers.save(self._kept / f"{name}.npz", found, **self._whose)
    return tapvid_answers.compare(found, self.protocol), True


def _pack(answers: tapvid_metrics.Answers | str) -> bytes:
  """One clip's result as bytes, to be sent to other processes."""
  whole = {"why": np.array(answers)} if isinstance(answers, str) else answers._asdict()
  return spread.pack(whole)


def _unpack(packed: bytes) -> tapvid_metrics.Answers | str:
  found = spread.unpack(packed)
  return str(found["why"]) if "why" in found else tapvid_metrics.Answers(**found)
