"""The study's cells as a Markdown table beside the paper's numbers, the trends, and a figure.

And of the trainings behind the learned marks, how much Psi-flow leans on the flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cwm_jax import viz
from cwm_jax.evals import charts

_TITLES = {
  "red": "red square",
  "green": "green square",
  "white": "white Gaussian",
  "learned": "learned",
  "learned_white": "learned + WBinit",
}
# Lines in the marks' own colours; the white one is grey on white paper.
_COLOURS = {
  "red": (220, 60, 50),
  "green": (50, 160, 70),
  "white": (125, 125, 130),
  "learned": (235, 150, 20),
  "learned_white": (40, 80, 220),
}
_HAND_MADE = ("red", "green", "white")
_BEST = "learned_white"
_DATA = {"scenes": "scenes-test-v1", "tapvid": "TAP-Vid clips"}
# Average distance, median distance, delta_avg in percent, on DAVIS, of the paper's 512 model; its
# Table 3 and, for 40 masks, Table 1.
PAPER = {
  ("red", 1): (21.92, 12.49, 27.80),
  ("green", 1): (17.66, 8.22, 34.90),
  ("learned", 1): (14.97, 6.45, 40.54),
  ("learned", 40): (12.45, 4.62, 47.50),
  ("learned_white", 40): (11.78, 3.63, 52.30),
}
_COLUMNS = (("AD px", "average_distance", 1), ("MD px", "median_distance", 1))
_COLUMNS += (("delta %", "delta_avg", 100),)

Cells = Mapping[Any, Mapping[str, float]]


def markdown(cells: Cells, *, marks: Sequence[str], masks: Sequence[int]) -> str:
  """A table for each data set: mean over seeds and, from two seeds on, their standard deviation.

  Args:
    cells: {(mark, masks, data, seed): numbers}.
    marks, masks: order of the rows.
  """
  parts = []
  for data in dict.fromkeys(key[2] for key in cells):
    heads = ["mark", "masks", "seeds", *(head for head, _, _ in _COLUMNS), "paper AD / MD / delta"]
    rows = [heads, ["---"] * len(heads)]
    for mark in marks:
      for count in masks:
        chosen = _of(cells, mark, count, data)
        if not chosen:
          continue
        values = [_told([factor * c[key] for c in chosen]) for _, key, factor in _COLUMNS]
        paper = " / ".join(f"{v:g}" for v in PAPER.get((mark, count), ())) or "-"
        rows.append([_TITLES[mark], f"MM-{count}", str(len(chosen)), *values, paper])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    told = [f"- {line}" for line in (*trends(cells, data), *_clips_left_out(cells, data))]
    parts.append("\n".join([f"## {_DATA[data]}", "", *lines, "", *told]))
  return "\n\n".join(parts) + "\n"


def _clips_left_out(cells: Cells, data: str) -> Iterator[str]:
  """A sentence for each cell that lacks clips, for it stands beside cells of all clips."""
  for (mark, count, where, seed), numbers in cells.items():
    if where == data and (lost := numbers.get("num_skipped")):
      used = numbers["num_clips"]
      yield (
        f"{_TITLES[mark]} at MM-{count}, seed {seed}, is of {used:.0f} of {used + lost:.0f} clips: "
        "the others could not be read"
      )


def bottleneck(numbers: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
  """A table with a row a learned mark and seed: how much Psi-flow leans on the mark's flow.

  Args:
    numbers: {(mark, seed): as `study_marks.bottleneck` has them}.
  """
  heads = ["mark", "seed", "scenes", "loss", "without flow %", "with another pair's %", "spread px"]
  rows = [heads, ["---"] * len(heads)]
  for (mark, seed), found in sorted(numbers.items()):
    rises = [_rise(found, name) for name in ("zeroed", "exchanged")]
    spread = f"{found['spread_px']:.2f}"
    scenes = f"{found['num_scenes']:.0f}"
    rows.append([_TITLES[mark], str(seed), scenes, f"{found['loss']:.5f}", *rises, spread])
  about = (
    "Rise of Psi-flow's error without the mark's flow, or with that of another pair, on scenes "
    "that training never draws (95 % interval over scenes); the mean width of the response."
  )
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join(["## Bottleneck", "", about, "", *lines]) + "\n"


def _rise(found: Mapping[str, float], name: str) -> str:
  rise, low, high = (100 * found[f"{name}{end}"] for end in ("", "_low", "_high"))
  return f"{rise:+.1f} ({low:+.1f} to {high:+.1f})"


def trends(cells: Cells, data: str) -> list[str]:
  """The paper's trends as sentences with their numbers, as far as the cells tell.

  Args:
    cells: as in `markdown`.
    data: "scenes" or "tapvid".
  """
  marks = list(dict.fromkeys(key[0] for key in cells if key[2] == data))
  lines = []
  best = _distances(cells, _BEST, 10, data)
  for mark in (mark for mark in marks if mark in _HAND_MADE and best):
    other = _distances(cells, mark, 10, data)
    if not other:
      continue
    gain = np.mean(other) - np.mean(best)
    against = f"than the {_TITLES[mark]} at MM-10"
    if len(best) == len(other) == 1:
      verdict = "better" if gain > 0 else "not better"
      lines.append(f"{_TITLES[_BEST]} is {verdict} {against}: {gain:+.2f} px, one seed")
      continue
    spread = max(_spread(best), _spread(other))
    verdict = "better" if gain > spread else "not better"
    lines.append(
      f"{_TITLES[_BEST]} is {verdict} {against} by more than the spread over seeds: "
      f"{gain:+.2f} px, spread {spread:.2f} px"
    )
  for mark in marks:
    for few, many in ((1, 10), (10, 40)):
      gains = _gains(cells, mark, few, many, data)
      if gains:
        lines.append(f"{_TITLES[mark]}: MM-{many} gains {np.mean(gains):+.2f} px on MM-{few}")
  return lines


def figure(cells: Cells, *, marks: Sequence[str]) -> np.ndarray:
  """Average distance and delta_avg against the number of masks, a line a mark; uint8 [H, W, 3]."""
  rows = []
  marks = [mark for mark in marks if any(key[0] == mark for key in cells)]
  colours = [_COLOURS[mark] for mark in marks]
  for data in dict.fromkeys(key[2] for key in cells):

    def chart(name: str, label: str, factor: float, data: str = data) -> np.ndarray:
      lines = {}
      for mark in marks:
        counts = sorted({key[1] for key in cells if key[0] == mark and key[2] == data})
        means = [factor * _mean(_of(cells, mark, count, data), name) for count in counts]
        lines[mark] = charts.Line(counts, means)
      return charts.line_chart(lines, x_label="masks a point", y_label=label, colours=colours)

    rows.append(
      [
        (_DATA[data], chart("average_distance", "average distance, px at 256", 1.0)),
        ("", chart("delta_avg", "within 1 to 16 px, %", 100.0)),
        ("", charts.legend([_TITLES[mark] for mark in marks], colours=colours)),
      ]
    )
  return viz.page(rows, title="Marks against numbers of masks, means over seeds")


def _of(cells: Cells, mark: str, masks: int, data: str) -> list[Mapping[str, float]]:
  """The cells of all seeds."""
  return [numbers for key, numbers in cells.items() if tuple(key[:3]) == (mark, masks, data)]


def _distances(cells: Cells, mark: str, masks: int, data: str) -> list[float]:
  return [numbers["average_distance"] for numbers in _of(cells, mark, masks, data)]


def _gains(cells: Cells, mark: str, few: int, many: int, data: str) -> list[float]:
  """By how much many masks are better than few, seed by seed, where both are there."""
  seeds = [key[3] for key in cells if tuple(key[:3]) == (mark, many, data)]
  pairs = [(cells.get((mark, few, data, seed)), cells[mark, many, data, seed]) for seed in seeds]
  return [one["average_distance"] - other["average_distance"] for one, other in pairs if one]


def _spread(values: Sequence[float]) -> float:
  """Standard deviation over seeds; 0 for a single one."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _mean(chosen: Sequence[Mapping[str, float]], name: str) -> float:
  return float(np.mean([numbers[name] for numbers in chosen]))


def _told(values: Sequence[float]) -> str:
  mean = float(np.mean(values))
  if math.isnan(mean):
    return "-"
  return f"{mean:.2f}" + (f" ± {_spread(values):.2f}" if len(values) > 1 else "")
