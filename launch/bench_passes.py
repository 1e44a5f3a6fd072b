"""Accuracy against passes: fixed and adaptive masks, one mark and many marks a pass.

Run by `launch/bench passes`, on scenes-test-v1. Two studies, each a JSON line for every setting and
a chart in DIR/passes.png:

  points  the set's own four points a scene: N masks for every point, against adaptive masks
  dense   a grid of 32 x 32 points: one mark a pass, against many; with and without votes

One-mark answers do not depend on which other points are asked about, so on grids they are taken
from some points of each scene, the same for all methods; their passes are those of the whole grid.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 256  # of the scenes
GRID = 32  # points a side
THRESHOLDS = (1, 2, 4, 8, 16)


def by_masks(predict_fn, frames, masks, points_xy, *, patch, mark, counts, order):
  """Destinations [counts, n, 2] in pixels of the scene by the first `count` masks.

  A program for `Tracker.ask`; every pass is done once.
  """
  import jax
  import jax.numpy as jnp

  from cwm_jax.counterfactual import flow, multimask, perturb

  clean = predict_fn(jnp.broadcast_to(frames, (len(masks), *frames.shape)), masks)

  def of_point(point):
    tokens = None if not perturb.reads_token(mark) else clean.tokens[None]
    marked = multimask.mark_frames(mark, frames[:1], tokens, point[None])
    answer = multimask.marked_predictions(predict_fn, marked, frames[1:], masks[None])
    colours, _ = multimask.mark_colours(marked - frames[:1])
    found = []
    for count in counts:
      colour = colours[:, :count] if colours.shape[1] > 1 else colours
      sums = multimask.sum_over_masks(
        (answer - clean.image)[:, :count], order=order, colours=colour
      )
      response = multimask.average_over_masks(
        *sums, masks[None, :count], order=order, average="hidden"
      )
      read = flow.read_out(response, point[None], readout="window", middle=perturb.middle(mark))
      found.append(read.xy[0])
    return jnp.stack(found)

  return jnp.moveaxis(jax.lax.map(of_point, points_xy), 0, 1) * (SIDE / frames.shape[1])


def _mark(options: argparse.Namespace) -> Any:
  """The mark that the weights recommend, or what `Tracker` paints where they say nothing."""
  from cwm_jax import loading
  from cwm_jax.counterfactual import perturb
  from cwm_jax.pretrained import releases, weights

  path = releases.locate(options.weights) if options.weights else weights.shipped()
  params, config = weights.load(path)
  plain = dict(mask_ratio=None, mark=None, dtype=None, attention_dtype=None)
  parts = loading.predictor(path, params, config, **plain)
  if parts.mark is None:
    return perturb.Square(size=max(1, parts.patch // 2))
  return perturb.build(parts.mark) if isinstance(parts.mark, Mapping) else parts.mark


class Errors:
  """Distances in pixels at 256 x 256, by method."""

  def __init__(self):
    self._kept: dict[Any, list[np.ndarray]] = {}

  def add(self, method: Any, distance: np.ndarray) -> None:
    self._kept.setdefault(method, []).append(distance.ravel())

  def row(self, method: Any) -> dict[str, float]:
    every = np.concatenate(self._kept[method])
    return dict(
      average_distance=round(float(every.mean()), 3),
      median_distance=round(float(np.median(every)), 3),
      delta_avg=round(float(np.mean([(every < k).mean() for k in THRESHOLDS])), 4),
      points=len(every),
    )


def scenes(count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
  """Frames, the grid's flow and visibility, and the seed's number, scene by scene."""
  from cwm_jax.data import procedural, rendering

  seeds, preset = procedural.scenes_test_v1()
  at = (np.arange(GRID) + 0.5) * SIDE / GRID
  index = at.astype(int)
  for begin in range(0, count, 10):
    drawn = [procedural.draw_scene(seed, preset) for seed in seeds[begin : begin + 10]]
    together = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
    pair = rendering.render(together, size_hw=(SIDE, SIDE), texture_size=SIDE, truth=True)
    frames = np.round(np.asarray(pair.frames) * 255).astype(np.uint8)
    flow = np.asarray(pair.flow_xy)[:, index][:, :, index]
    seen = np.asarray(pair.visible)[:, index][:, :, index]
    yield from list(zip(frames, flow, seen))[: count - begin]


def study_points(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Fixed numbers of masks and adaptive masks on the set's own points."""
  from cwm_jax.evals.scenes import scenes_test_v1
  from cwm_jax.tracker import Tracker

  counts, order = tuple(range(1, options.most_masks + 1)), options.order or "matched"
  fixed, adaptive = (
    Tracker.load(options.weights, num_masks=num_masks, readout="window", order=order)
    for num_masks in (counts[-1], "adaptive")
  )
  curve = dict(mark=_mark(options), counts=counts, order=order)
  errors = Errors()
  for group in scenes_test_v1(limit=options.scenes, at_a_time=min(10, options.scenes)):
    for frames, points, truth in zip(group.frames, group.points_xy, group.truth_xy):
      for count, xy in zip(counts, fixed.ask(by_masks, *frames, points, **curve)):
        errors.add(count, np.linalg.norm(xy - truth, axis=-1))
    found = adaptive.pairs(group.frames, group.points_xy).xy
    errors.add("adaptive", np.linalg.norm(found - group.truth_xy, axis=-1))
  passes = adaptive.passes
  pairs, points = options.scenes, options.scenes * group.points_xy.shape[1]
  rows = [
    dict(method="fixed", masks=count, marked_a_point=count, clean_a_pair=count, **errors.row(count))
    for count in counts
  ]
  mine = errors.row("adaptive")
  # The smallest fixed number that is as good, but for two percent.
  alike = [row for row in rows if row["average_distance"] <= 1.02 * mine["average_distance"]]
  spent = passes.marked / points
  rows.append(
    dict(
      method="adaptive",
      marked_a_point=round(spent, 3),
      clean_a_pair=round(passes.clean / pairs, 2),
      fixed_as_good=alike[0]["masks"] if alike else None,
      fewer_marked=round(alike[0]["masks"] / spent, 2) if alike else None,
      fewer_in_all=round(alike[0]["masks"] * (points + pairs) / (passes.marked + passes.clean), 2)
      if alike
      else None,
      **mine,
    )
  )
  return rows


def study_dense(options: argparse.Namespace) -> list[dict[str, Any]]:
  """One mark a pass and many on a grid."""
  from cwm_jax.tracker import Tracker

  counts, order = (1, 2, 4, 10), options.order or "release"
  one = Tracker.load(options.weights, num_masks=counts[-1], readout="window", order=order)
  curve = dict(mark=_mark(options), counts=counts, order=order)
  many = {
    (marks, rounds, votes): Tracker.load(options.weights, num_masks=rounds, readout="window")
    for marks, rounds, votes in options.many
  }
  stride = SIDE // GRID
  errors, random, spent = Errors(), np.random.default_rng(0), {}
  for number, (frames, flow, seen) in enumerate(scenes(options.scenes)):
    began = time.perf_counter()
    picked = np.flatnonzero(seen.ravel())
    picked = random.permutation(picked)[: options.points]
    at = (np.stack(np.meshgrid(*[np.arange(GRID) + 0.5] * 2), axis=-1) * stride).reshape(-1, 2)
    points, motion = at[picked].astype(np.float32), flow.reshape(-1, 2)[picked]
    for count, xy in zip(counts, one.ask(by_masks, *frames, points, **curve)):
      errors.add(("one mark", 1, count, 0.0), np.linalg.norm(xy - points - motion, axis=-1))
      spent["one mark", 1, count, 0.0] = count * (GRID * GRID + 1)
    for (marks, rounds, votes), tracker in many.items():
      method = ("one mark" if marks == 1 else "many marks", marks, rounds, votes)
      before = tracker.passes
      motions, _ = tracker.dense_flow(*frames, stride=stride, marks=marks, votes=votes)
      after = tracker.passes
      spent[method] = after.marked + after.clean - before.marked - before.clean
      distance = np.linalg.norm(motions.reshape(-1, 2)[picked] - motion, axis=-1)
      errors.add(method, distance)
    print(f"scene {number + 1}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
  rows = [
    dict(method=method[0], marks=method[1], masks=method[2], votes=method[3], passes=passes)
    | errors.row(method)
    for method, passes in spent.items()
  ]
  return sorted(rows, key=lambda row: (row["method"], row["marks"], row["votes"], row["passes"]))


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
  """A chart for each study."""
  from cwm_jax import viz
  from cwm_jax.evals import charts

  panels = []
  if "points" in rows:
    lines = {
      name: charts.Line(
        [row["marked_a_point"] for row in rows["points"] if row["method"] == name],
        [row["average_distance"] for row in rows["points"] if row["method"] == name],
      )
      for name in ("fixed", "adaptive")
    }
    chart = charts.line_chart(
      lines, x_label="marked passes a point", y_label="average distance, px"
    )
    panels.append([("four points a scene", chart), ("", charts.legend(list(lines)))])
  if "dense" in rows:
    lines = {}
    for row in rows["dense"]:
      voted = ", votes" if row["votes"] else ""
      name = f"{row['method'] if row['marks'] == 1 else str(row['marks']) + ' marks'}{voted}"
      xs, ys = lines.setdefault(name, ([], []))
      xs.append(np.log10(row["passes"]))
      ys.append(100 * row["delta_avg"])
    curves = {name: charts.Line(*xy) for name, xy in lines.items()}
    chart = charts.line_chart(
      curves, x_label="log10 of passes for 32 x 32 points", y_label="within 1 to 16 px, %"
    )
    panels.append([("a grid of points", chart), ("", charts.legend(list(curves)))])
  viz.write_png(path, viz.page(panels, title="Accuracy against passes, scenes-test-v1"))


def _many(text: str) -> tuple[int, int, float]:
  marks, rounds, votes = text.split(",")
  return int(marks), int(rounds), float(votes)


def main() -> int:
  """Prints the rows; the exit code is 2 where something given cannot be used."""
  parser = argparse.ArgumentParser(prog="launch/bench passes", description=__doc__)
  parser.add_argument("studies", nargs="*", metavar="STUDY", help="points, dense (default: both)")
  parser.add_argument("--weights", default=None, help="default: the shipped predictor")
  parser.add_argument("--scenes", type=int, default=40)
  parser.add_argument("--points", type=int, default=64, help="of each grid that are looked at")
  parser.add_argument("--most-masks", type=int, default=20, help="of the fixed numbers")
  parser.add_argument(
    "--order",
    help="of averaging (default: matched for points, release for one mark a pass; many marks have "
    "their own)",
  )
  parser.add_argument(
    "--many",
    type=_many,
    nargs="*",
    default=[(1, 1, 1.0), (16, 5, 1.0), (16, 10, 1.0), (16, 20, 1.0), (16, 10, 0.0), (16, 20, 0.0)],
    metavar="MARKS,ROUNDS,VOTES",
  )
  parser.add_argument("--out", type=Path, default=Path("passes"), metavar="DIR")
  options = parser.parse_args()
  import bench_facts

  from cwm_jax import progress
  from cwm_jax.types import InputError

  known = {"points": study_points, "dense": study_dense}
  rows, compilations = {}, progress.CompilationCounter()
  try:
    for name in options.studies or known:
      if name not in known:
        raise InputError(f"there is no study {name!r}; choose points or dense")
      before = compilations.count
      rows[name] = known[name](options)
      of_study = dict(study=name, scenes=options.scenes, compilations=compilations.count - before)
      for row in rows[name]:
        print(json.dumps(bench_facts.row("passes", **of_study, **row)), flush=True)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  options.out.mkdir(parents=True, exist_ok=True)
  draw(rows, options.out / "passes.png")
  return 0


if __name__ == "__main__":
  sys.exit(main())
