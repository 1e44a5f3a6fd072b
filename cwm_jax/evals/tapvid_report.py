"""What an evaluation on TAP-Vid leaves behind for people: tables by video, a figure, overlays."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax import viz, whole_files
from cwm_jax.evals import charts, tapvid_answers
from cwm_jax.evals.protocols import Protocol
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)
GAPS = "gaps.json"
_FPS = 12.0
# Columns of a table: (heading, name of the number, whether it is a fraction).
COLUMNS = (
  ("AD px", "average_distance", False),
  ("MD px", "median_distance", False),
  ("delta %", "delta_avg", True),
  ("AJ %", "average_jaccard", True),
  ("OA %", "occlusion_accuracy", True),
  ("OF1 %", "occlusion_f1", True),
)


def table(
  rows: Mapping[str, Mapping[str, float]],
  columns: Iterable[tuple[str, str, bool]],
  *,
  corner: str = "tracker",
) -> str:
  """Rows of numbers as aligned text; fractions in percent, "-" for what is not known."""
  columns = list(columns)
  width = max(len(corner), *map(len, rows))
  lines = ["  ".join([corner.ljust(width), *(f"{head:>12}" for head, _, _ in columns)])]
  for name, numbers in rows.items():
    cells = []
    for _, key, fraction in columns:
      value = numbers.get(key, math.nan) * (100 if fraction else 1)
      cells.append(f"{'-' if math.isnan(value) else f'{value:.2f}':>12}")
    lines.append("  ".join([name.ljust(width), *cells]))
  return "\n".join(lines)


def write_tables(
  folder: Path,
  clips: Mapping[str, Mapping[str, float]],
  over: Mapping[str, Mapping[str, float]],
  skipped: Mapping[str, str],
) -> str:
  """Writes clips.txt (percent), clips.csv and clips.json (fractions, every number; null: unknown).

  Args:
    clips: {clip: numbers}.
    over: {"mean": numbers, "pooled": numbers}, over all clips.
    skipped: {clip: why it was left out}.

  Returns:
    The text.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rows = {**clips, **{f"({name})": numbers for name, numbers in over.items()}}
  text = table(rows, COLUMNS, corner="clip")
  text += "".join(f"\nleft out: {name}: {why}" for name, why in skipped.items())
  (folder / "clips.txt").write_text(text + "\n")
  content = {"clips": clips, **over, "skipped": skipped}
  (folder / "clips.json").write_text(whole_files.to_json(content, indent=1))
  names = list(next(iter(rows.values())))
  with open(folder / "clips.csv", "w", newline="") as file:
    out = csv.writer(file)
    out.writerow(["clip", *names])
    out.writerows([clip, *(numbers[name] for name in names)] for clip, numbers in clips.items())
  return text


def write_gaps(folder: Path, by_gap: Mapping[str, np.ndarray]) -> None:
  """Keeps one tracker's `tapvid_metrics.by_gap` for `gap_figure`."""
  content = {name: values.tolist() for name, values in by_gap.items()}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / GAPS).write_text(json.dumps(content))


def gap_figure(folder: Path, trackers: Sequence[str], *, title: str) -> np.ndarray | None:
  """Error against frame gap, all trackers in one picture: PNG and CSV (the paper's Figure 7).

  Args:
    folder: the protocol's; what `write_gaps` kept lies in folder / tracker.

  Returns:
    The picture, uint8 [H, W, 3]; None where there are fewer than two gaps to draw.
  """
  kept = {name: folder / name / GAPS for name in trackers}
  curves = {name: json.loads(path.read_text()) for name, path in kept.items() if path.is_file()}
  if max((len(curve["gap"]) for curve in curves.values()), default=0) < 2:
    return None
  with open(folder / "error-by-gap.csv", "w", newline="") as file:
    out = csv.writer(file)
    names = list(next(iter(curves.values())))
    out.writerow(["tracker", *names])
    for tracker, curve in curves.items():
      out.writerows([tracker, *row] for row in zip(*(curve[name] for name in names)))

  def chart(name: str, label: str, factor: float = 1.0) -> np.ndarray:
    lines = {
      tracker: charts.Line(curve["gap"], [factor * value for value in curve[name]])
      for tracker, curve in curves.items()
    }
    return charts.line_chart(lines, x_label="frames from the query's", y_label=label)

  row = [
    ("", chart("average_distance", "average distance, px at 256")),
    ("", chart("median_distance", "median distance, px at 256")),
    ("", chart("delta_avg", "within 1 to 16 px, %", 100.0)),
    ("", charts.legend(list(curves))),
  ]
  picture = viz.page([row], title=title)
  viz.write_png(folder / "error-by-gap.png", picture)
  return picture


def write_overlays(folder: Path, evaluator: Any, names: Sequence[str], *, count: int) -> list[Path]:
  """Draws the `count` best and worst tracks on their clips: best-<clip>.mp4, worst-<clip>.mp4.

  A track's error is its mean distance; crosses are the truth, hollow marks are said to be hidden.
  Tracks that are visible in less than a quarter of the frames are left out.
  Clips whose answers another process keeps where this one cannot see them are left out.

  Args:
    evaluator: a `TapVidEvaluator` that keeps its answers; its clips are read again.
    names: of all clips, in their order.
  """
  protocol: Protocol = evaluator.protocol
  found = []
  for index, name in enumerate(names):
    answers = evaluator.kept_answers(name)
    if answers is None:
      continue
    least = answers.frames.shape[1] // 4
    errors = tapvid_answers.track_errors(answers, protocol, least=least)
    found += [(errors[row], index, row) for row in np.flatnonzero(np.isfinite(errors)).tolist()]
  found.sort()
  folder.mkdir(parents=True, exist_ok=True)
  written = []
  for kind, chosen in (("best", found[:count]), ("worst", found[::-1][:count])):
    for old in folder.glob(f"{kind}-*.mp4"):  # of other answers, where these are asked anew
      old.unlink()
    for index in sorted({index for _, index, _ in chosen}):
      rows = [row for _, other, row in chosen if other == index]
      path = folder / f"{kind}-{names[index]}.mp4"
      try:
        answers = evaluator.kept_answers(names[index])
        written.append(_draw(path, evaluator.read(index), answers, rows))
      except InputError as error:
        _LOG.warning("  no overlay %s: %s", path.name, error)
  return written


def _draw(path: Path, clip: Any, answers: tapvid_answers.ClipAnswers, rows: list[int]) -> Path:
  hidden = answers.truth_occluded[rows][..., None]
  frames = viz.draw_tracks(
    clip.video,
    answers.tracks_xy[rows],
    ~answers.occluded[rows],
    starts=answers.start[rows].tolist(),
    truth_xy=np.where(hidden, np.nan, answers.truth_xy[rows]),
  )
  return viz.write_mp4(path, frames, fps=_FPS)
