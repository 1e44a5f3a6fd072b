"""One protocol of TAP-Vid in the evaluation job: runs trackers, keeps and reports what they find.

In a workdir, `<title>` being the protocol and its number (first, cfg-5):

  answers/<title>/<tracker>/<clip>.npz   every answer, see `tapvid_answers.ClipAnswers`
  tapvid/<title>/<tracker>/clips.*       numbers clip by clip
  tapvid/<title>/error-by-gap.*          all trackers' errors against the frame gap
  tapvid/<title>/<tracker>/*.mp4         the best and the worst tracks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cwm_jax.data.tapvid import ClipSource
from cwm_jax.evals import protocols, tapvid, tapvid_metrics, tapvid_report


class TapVidJob:
  """A protocol on a set of clips, for one tracker after another."""

  def __init__(
    self,
    clips: ClipSource,
    workdir: Path,
    *,
    protocol: str,
    frame_gap: int,
    query_stride: int,
    resolution: str,
    overlays: int,
  ):
    """
    Args:
      overlays: how many best and worst tracks are drawn on their clips.
      The others: see `TapVidEvaluator`.

    Raises:
      InputError: an unknown protocol.
    """
    self.title = protocols.title(protocol, frame_gap=frame_gap, query_stride=query_stride)
    self._clips, self._overlays = clips, overlays
    self._settings = dict(
      protocol=protocol, frame_gap=frame_gap, query_stride=query_stride, resolution=resolution
    )
    self._answers = workdir / "answers" / self.title
    self._reports = workdir / "tapvid" / self.title

  def measure(
    self, name: str, trackers: Sequence[Any], *, origin: str = "", manner: str = ""
  ) -> dict[str, float]:
    """One tracker's numbers over all clips; writes its tables and overlays.

    Args:
      name: of the tracker.
      trackers: one for every worker.
      origin, manner: tell whose answers are kept, see `tapvid_answers.save`.

    Raises:
      InputError: no clip can be used.
    """
    evaluator = tapvid.TapVidEvaluator(
      trackers,
      self._clips,
      kept=self._answers / name,
      origin=origin,
      manner=manner,
      **self._settings,
    )
    numbers = dict(evaluator.run())
    of_clips = {f"{clip}/{key}" for clip, own in evaluator.numbers.items() for key in own}
    over = {key: value for key, value in numbers.items() if key not in of_clips}
    if jax.process_index() > 0:
      return over
    folder = self._reports / name
    together = {
      kind: {k.removeprefix(f"{kind}/"): v for k, v in over.items() if k.startswith(f"{kind}/")}
      for kind in ("mean", "pooled")
    }
    tapvid_report.write_tables(folder, evaluator.numbers, together, evaluator.skipped)
    everything = tapvid_metrics.pool(list(evaluator.answers.values()))
    tapvid_report.write_gaps(folder, tapvid_metrics.by_gap(everything))
    # A pair of frames is no track to be drawn.
    if self._overlays and evaluator.protocol.queries != "cfg":
      names = self._clips.names
      tapvid_report.write_overlays(folder, evaluator, names, count=self._overlays)
    return over

  def figures(self, trackers: Sequence[str]) -> dict[str, np.ndarray]:
    """Pictures of all trackers together, {name: uint8 [H, W, 3]}; written as files too."""
    title = f"Error against frame gap, {self.title}"
    figure = tapvid_report.gap_figure(self._reports, trackers, title=title)
    return {} if figure is None else {f"tapvid/{self.title}/error-by-gap": figure}
